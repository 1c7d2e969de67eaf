"""`transformers serve`, the command of the documentation: a real server, asked over HTTP as OpenAI's clients ask."""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.cli.serve import Serve

from tests.hub.conftest import bare_site  # noqa: F401 - a fixture

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture
def place(tiny_model, processor, tmp_path):
    """A working folder with a checkpoint that carries its code, and two images."""
    tiny_model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "cat.png")
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "dogs.png")
    return tmp_path


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture
def server(place, bare_site):  # noqa: F811 - the fixture imported above
    """Address of the running server, in whose environment `open_qwen2vl` cannot be imported."""
    (command,) = re.findall(r"^transformers (serve .*)$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    port = free_port()
    arguments = command.replace("--port 8000", f"--port {port} --device cpu").split()
    environment = {**os.environ, "PYTHONPATH": str(bare_site), "HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"}
    start = "from transformers.cli.transformers import main; main()"
    with (
        open(place / "log", "w") as log,
        subprocess.Popen(
            [sys.executable, "-S", "-c", start, *arguments], cwd=place, env=environment, stdout=log, stderr=log
        ) as process,
    ):
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}", process, place / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_healthy(address: str, process: subprocess.Popen, log: Path, seconds: int = 240) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with NO_PROXY.open(f"{address}/health", timeout=10):
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(log.read_text()[-3000:])


def ask(address: str, content: list[dict], **options) -> bytes:
    body = {"model": "model", "temperature": 0, "max_tokens": 8, "messages": [{"role": "user", "content": content}]}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps(body | options).encode(),
        headers={"Content-Type": "application/json"},
    )
    with NO_PROXY.open(request, timeout=120) as response:
        return response.read()


def content(*images: Path) -> list[dict]:
    urls = ["data:image/png;base64," + base64.b64encode(image.read_bytes()).decode() for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [*parts, {"type": "text", "text": "\nwhat is shown?"}]


def expected(model, processor, images: list[Path]) -> tuple[str, int]:
    """The answer of `generate` in this process, and the length of the prompt."""
    parts = [{"type": "image", "image": Image.open(image)} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "\nwhat is shown?"}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    length = inputs["input_ids"].shape[1]
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, length:]
    return processor.decode(answer, skip_special_tokens=True), length


def test_chat_completions_with_images(server, place, tiny_model, processor, monkeypatch, capsys):
    said = []
    for images in ([], [place / "cat.png"], [place / "dogs.png", place / "cat.png"]):
        answer = json.loads(ask(server, content(*images)))
        text, length = expected(tiny_model, processor, images)
        assert answer["object"] == "chat.completion" and answer["usage"]["prompt_tokens"] == length
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": text}
        said.append(text)
    # A server that dropped the images would pass with one answer for all.
    assert len(set(said)) == 3

    # OpenAI's own client, as the document has it; what it prints is the server's answer to the same request.
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "openai" in block]
    monkeypatch.chdir(place)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    capsys.readouterr()
    exec(compile(code.replace("http://127.0.0.1:8000", server), "docs/serving.md", "exec"), {})
    document = [*content(place / "cat.png")[:1], {"type": "text", "text": "what is shown?"}]
    again = json.loads(ask(server, document))["choices"][0]["message"]["content"]
    assert capsys.readouterr().out == again + "\n"

    lines = ask(server, content(place / "cat.png"), stream=True).decode().splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    pieces = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(pieces) == said[1]

    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, content(), model="another")
    assert refused.value.code == 400


def test_qwen2_vl_is_served(qwen_vl_folder, place):
    """The same server, here in a thread: nothing of it is ours, and nothing of the folder is either."""
    folder, port = qwen_vl_folder("qwen2_vl"), free_port()
    server = Serve(str(folder), device="cpu", host="127.0.0.1", port=port, non_blocking=True)
    try:
        deadline = time.monotonic() + 240
        while not server.server.started:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        model, processor = (auto.from_pretrained(folder) for auto in (AutoModelForImageTextToText, AutoProcessor))
        lengths = set()
        for images in ([], [place / "dogs.png", place / "cat.png"]):
            answer = json.loads(ask(f"http://127.0.0.1:{port}", content(*images), model=str(folder)))
            text, length = expected(model, processor, images)
            assert answer["usage"]["prompt_tokens"] == length
            assert answer["choices"][0]["message"]["content"].strip() == text.strip()  # the server strips
            lengths.add(length)
        assert max(lengths) > min(lengths) + 2 * 16
    finally:
        server.kill_server()
