"""`evaluate --endpoint`: transformers' own server against a local evaluation, and a server that fails when told to."""

import base64
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from transformers.cli.serve import Serve

from open_qwen2vl import cli
from open_qwen2vl.evaluation.endpoint import evaluate_endpoint
from open_qwen2vl.evaluation.evaluate import evaluate
from tests.chat_server import chat_server
from tests.evaluation.easyvqa import rows

DOCUMENT = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def read_samples(folder: Path, task: str = "easyvqa_gen") -> list[dict]:
    return pq.read_table(folder / "samples" / f"{task}.parquet").to_pylist()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with chat_server(lambda request: (200, "blue")) as server:
        yield server


def pixels(image: bytes) -> bytes:
    return Image.open(io.BytesIO(image)).convert("RGB").tobytes()


def asked(body: dict) -> tuple[str, bytes]:
    """Question and pixels of a request."""
    picture, text = body["messages"][-1]["content"]
    url = picture["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    return text["text"], pixels(base64.b64decode(url.partition(",")[2]))


@pytest.fixture(scope="module")
def answers() -> dict:
    return {(row["question"], pixels(row["image"])): row["answer"] for row in rows(20)}


def test_transformers_serve_gives_what_the_model_here_gives(model_folder, easyvqa, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    options = {"limit": 5, "include_path": [easyvqa]}
    here = evaluate(str(model_folder), ["easyvqa_gen"], tmp_path / "here", device="cpu", **options)
    server = Serve(str(model_folder), device="cpu", host="127.0.0.1", port=0, non_blocking=True)
    try:
        deadline = time.monotonic() + 240
        while not server.server.started:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        port = server.server.servers[0].sockets[0].getsockname()[1]
        (command,) = re.findall(r"^open-qwen2vl (evaluate --endpoint .*)$", DOCUMENT, flags=re.MULTILINE)
        command = command.replace(":8000", f":{port}").replace("results/served", str(tmp_path / "there")).split()
        command += ["--endpoint-model", str(model_folder), "--tasks", "easyvqa_gen", "--limit", "5"]
        assert cli.main([*command, "--include-path", str(easyvqa), "--trust-task-code"]) == 0
    finally:
        server.kill_server()
    assert "| task | tiny | samples | metric | rule |" in capsys.readouterr().out
    there = json.loads((tmp_path / "there" / "results.json").read_text())
    assert there.keys() == here.keys() and there["options"].keys() == here["options"].keys()
    assert there["model"]["name"] == "tiny" and there["model"]["fingerprint"] is None
    own, other = (there["tasks"]["easyvqa_gen"], here["tasks"]["easyvqa_gen"])
    assert own.keys() == other.keys() and own["metrics"] == other["metrics"]
    samples, expected = read_samples(tmp_path / "there"), read_samples(tmp_path / "here")
    assert len({row["prediction"] for row in expected}) > 2
    for name in ("sample_id", "question", "answer", "prediction", "score", "images"):
        assert [row[name] for row in samples] == [row[name] for row in expected], name
    assert samples[0]["prompt"] == f"[user]\n<image>\n{samples[0]['question']}"


def test_requests_are_concurrent_retried_and_greedy(server, answers, easyvqa, tmp_path):
    seen, together, running, most = Counter(), threading.Barrier(3), [], []

    def reply(body):
        running.append(body)
        most.append(len(running))
        seen[asked(body)] += 1
        if sum(seen.values()) <= 3:
            together.wait(timeout=60)  # three are under way at once
        running.remove(body)
        if seen[asked(body)] == 1 and len(seen) % 5 == 0:
            return 429, {"error": {"message": "busy"}}
        return 200, f" {answers[asked(body)]}\nand more"

    server.reply = reply
    results = evaluate_endpoint(server.url, ["easyvqa_gen"], tmp_path, batch_size=3, include_path=[easyvqa])
    entry = results["tasks"]["easyvqa_gen"]
    assert entry["metrics"]["exact_match"]["value"] == 100 and entry["num_samples"] == 20
    assert max(most) == 3 and set(seen) == set(answers) and max(seen.values()) == 2
    assert results["model"] | {"endpoint": ""} == {
        "name": "tiny", "path": "org/tiny", "endpoint": "", "revision": None, "fingerprint": None
    }  # fmt: skip
    for body in server.requests:
        assert body["model"] == "org/tiny" and body["temperature"] == 0 and body["max_tokens"] == 6
        assert "stop" not in body  # transformers' server fails on it; answers are cut here


def test_failures_are_counted_by_name_and_asked_again(server, answers, easyvqa, tmp_path):
    fails = dict(zip(list(answers)[2:4], ((400, {"error": {"message": "too long"}}), (200, {})), strict=True))
    server.reply = lambda body: fails.get(asked(body)) or (200, answers[asked(body)])
    options = {"batch_size": 2, "include_path": [easyvqa]}
    with pytest.raises(ValueError, match="1 of 1 tasks failed: easyvqa_gen: ValueError: ") as failure:
        evaluate_endpoint(server.url, ["easyvqa_gen"], tmp_path, **options)
    counted = "2 of 20 requests failed (refused_request 1, bad_answer 1), the first by refused_request: "
    assert counted in str(failure.value).replace("bad_answer 1, refused_request 1", "refused_request 1, bad_answer 1")
    assert str(failure.value).endswith("; the same command asks these again")
    assert not (tmp_path / "results.json").exists() and len(server.requests) == 20
    server.requests.clear()
    server.reply = lambda body: (200, answers[asked(body)])
    results = evaluate_endpoint(server.url, ["easyvqa_gen"], tmp_path, **options)
    assert set(map(asked, server.requests)) == set(fails) and len(server.requests) == 2
    assert results["tasks"]["easyvqa_gen"]["metrics"]["exact_match"]["value"] == 100
    evaluate_endpoint(server.url, ["easyvqa_gen"], tmp_path / "whole", **options)
    names = ("samples/easyvqa_gen.parquet", "table.md")
    assert all((tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)
    with pytest.raises(ValueError, match=f"has results of org/tiny at {server.url}: give another --output"):
        evaluate_endpoint(server.url, ["easyvqa_gen"], tmp_path, model="other", **options)


@pytest.mark.slow
def test_killed_and_interrupted_it_goes_on(server, answers, easyvqa, tmp_path):
    """Ctrl-C does not wait for an endpoint that hangs; in a process of its own, whose exit would wait for threads."""
    command = ["evaluate", "--endpoint", server.url, "--tasks", "easyvqa_gen", "--batch-size", "2"]
    command += ["--include-path", str(easyvqa), "--trust-task-code", "--output", str(tmp_path / "out")]
    hangs, hung = threading.Event(), threading.Event()

    def reply(body):
        if len(server.requests) in stops:
            hung.set()
            hangs.wait()
        return 200, answers[asked(body)]

    server.reply = reply
    try:
        for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
            stops = {len(server.requests) + 6, len(server.requests) + 7}
            hung.clear()
            log = open(tmp_path / "log", "a")
            process = subprocess.Popen([sys.executable, "-m", "open_qwen2vl.cli", *command], stdout=log, stderr=log)
            assert hung.wait(timeout=300), (tmp_path / "log").read_text()
            process.send_signal(number)
            assert process.wait(timeout=300) == code
    finally:
        hangs.set()
    stops = set()
    assert cli.main(command) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["tasks"]["easyvqa_gen"]["metrics"]["exact_match"]["value"] == 100
    assert len(server.requests) <= 20 + 2 * 2 and {asked(body) for body in server.requests} == set(answers)


def test_an_endpoint_that_answers_nothing_is_not_asked_on(server, easyvqa, tmp_path):
    server.reply = lambda body: (401, {"error": {"message": "no such key"}})
    with pytest.raises(ValueError, match="easyvqa_gen: EndpointError: --endpoint http.*no such key"):
        evaluate_endpoint(server.url, ["easyvqa_gen"], tmp_path, batch_size=2, include_path=[easyvqa])
    assert len(server.requests) <= 5


def test_what_chat_completions_cannot_do_is_refused_by_name(server, easyvqa, tmp_path):
    config = yaml.safe_load((easyvqa / "easyvqa_gen.yaml").read_text())
    (tmp_path / "more").mkdir()
    for name, kwargs in (("beams", {"num_beams": 3}), ("plain", {"num_beams": 1, "top_p": None, "until": ["\n"]})):
        text = yaml.safe_dump({**config, "task": name, "generation_kwargs": kwargs})
        (tmp_path / "more" / f"{name}.yaml").write_text(text)
    options = {"limit": 2, "include_path": [easyvqa, tmp_path / "more"]}
    with pytest.raises(ValueError, match="2 of 3 tasks failed") as failure:
        evaluate_endpoint(server.url, ["easyvqa_mc", "beams", "plain"], tmp_path / "out", **options)
    assert "easyvqa_mc compares losses of given answers: chat completions have none" in str(failure.value)
    assert "beams asks for num_beams, which chat completions do not have" in str(failure.value)
    assert len(server.requests) == 2 and list(failure.value.results["tasks"]) == ["plain"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a MODEL or --endpoint URL, one of the two"),
        (["m", "--endpoint", "http://127.0.0.1:1"], "give a MODEL or --endpoint URL, one of the two"),
        (["m", "--endpoint-model", "n"], "--endpoint-model goes with --endpoint"),
        (["--endpoint", "http://x", "--rules", "paper"], "--rules paper does not go with --endpoint"),
        (["--endpoint", "http://x", "--shots", "0"], "--shots does not go with --endpoint"),
        (["--endpoint", "http://x", "--image-seq-length", "4"], "--image-seq-length does not go with --endpoint"),
    ],
)
def test_options_that_do_not_go_together(arguments, message, tmp_path, capsys):
    assert cli.main(["evaluate", *arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
