"""llama.cpp itself runs what `export --format gguf` writes: its greedy tokens are those of `generate`."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from open_qwen2vl.cli import main
from tests.conversion.test_gguf_export import folder, parts  # noqa: F401 - fixtures

# A folder that keeps the source and what was built of it; where none is given the build lasts as long as the test.
GIVEN = os.environ.get("OPEN_QWEN2VL_LLAMA_CPP")
PACKAGE = "llama-cpp-python==0.3.36"
OFF = ("COMMON", "TOOLS", "TESTS", "EXAMPLES", "SERVER", "APP")
NEW_TOKENS = 24
# Between the two best tokens of each step: fp16 moves logits by less, on any processor.
LEAST_MARGIN = 0.05

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """Folders of the package's source and of the libraries: a quarter of an hour of one core."""
    root = Path(GIVEN) if GIVEN is not None else tmp_path_factory.mktemp("llama_cpp")
    try:
        if not (root / "build" / "bin" / "libmtmd.so").exists():
            build(root)
        yield next(root.glob("llama_cpp_python-*/")), root / "build" / "bin"
    finally:
        if GIVEN is None:
            shutil.rmtree(root)


def build(root: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("llama.cpp is built by cmake and a C++ compiler")
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        ":all:",
        "-d",
        root,
        PACKAGE,
    ]
    done = subprocess.run(download, capture_output=True, text=True, timeout=900)
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    (archive,) = root.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(root, filter="data")
    (source,) = root.glob("llama_cpp_python-*/vendor/llama.cpp")
    options = [f"-DLLAMA_BUILD_{name}=OFF" for name in OFF] + ["-DLLAMA_BUILD_MTMD=ON", "-DLLAMA_OPENSSL=OFF"]
    # -O1: the models are tiny, and a third of the compiler's time is saved.
    options += ["-DBUILD_SHARED_LIBS=ON", "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
    for command in (
        ["cmake", "-S", source, "-B", root / "build", *options],
        ["cmake", "--build", root / "build", "--target", "mtmd", "-j", "1"],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=4 * 3600)


@pytest.fixture(scope="module")
def jobs(parts, tmp_path_factory):  # noqa: F811 - a fixture imported above
    """Ten square pictures whose answers no rounding decides: text, file, and ids of prompt and answer."""
    model, processor = parts
    model.eval()
    place = tmp_path_factory.mktemp("pictures")
    found = []
    for seed in range(200):
        pixels = torch.randint(0, 255, (32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        content = [{"type": "image", "image": Image.fromarray(pixels.numpy())}, {"type": "text", "text": f"{seed}?"}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=text, images=content[0]["image"], return_tensors="pt")
        options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
        answer = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **options)
        best = torch.stack(answer.logits)[:, 0].topk(2).values
        if (best[:, 0] - best[:, 1]).min() > LEAST_MARGIN:
            content[0]["image"].save(place / f"{seed}.png")
            length = inputs["input_ids"].shape[1]
            ids = answer.sequences[0].tolist()
            found.append((text, place / f"{seed}.png", ids[:length], ids[length:]))
        if len(found) == 10:
            return found
    raise AssertionError(f"only {len(found)} pictures have clear answers")


def answers(llama_cpp, exported: Path, kind: str, jobs: list) -> list[dict]:
    """What llama.cpp says."""
    files = [exported / f"{part}-{kind}.gguf" for part in ("model", "mmproj")]
    script = Path(__file__).with_name("llama_cpp_tokens.py")
    asked = [(text, str(picture), NEW_TOKENS) for text, picture, _, _ in jobs]
    done = subprocess.run(
        [sys.executable, script, *llama_cpp, *files],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_greedy_tokens(kind, llama_cpp, folder, jobs, parts, tmp_path):  # noqa: F811 - fixtures imported above
    exported = tmp_path / "gguf"
    assert main(["export", str(folder), "--format", "gguf", "--type", kind, "--output", str(exported)]) == 0
    image_token_id = parts[0].config.image_token_id
    equal = []
    for answer, (_, _, prompt, new) in zip(answers(llama_cpp, exported, kind, jobs), jobs, strict=True):
        assert answer["prompt"] == [token for token in prompt if token != image_token_id]
        assert answer["positions"] == prompt.count(image_token_id) == 16
        equal.append(sum(a == b for a, b in zip(answer["new"], new, strict=False)) / len(new))
    print(f"{kind}: {equal.count(1.0)} of 10 answers equal, {sum(equal) / 10:.3f} of the tokens")
    assert len({str(new) for *_, new in jobs}) > 5
    # Eight bits move logits further than the margin: what agrees is reported, most must.
    assert equal.count(1.0) >= (10 if kind == "f16" else 5)
