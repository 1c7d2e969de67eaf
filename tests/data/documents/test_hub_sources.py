"""Data sets of the Hub as sources of a plan, from a Hub on the loopback interface, in a process of its own."""

import io
import json
import os
import re
import subprocess
import sys

import datasets
import pytest
from PIL import Image

from open_qwen2vl.data.packing.plan_files import read_plan
from open_qwen2vl.data.storage import hub_files
from tests.hub_server import Repo, hub_server

# Clients read their environment when huggingface_hub is imported: the command runs in a process with the Hub's.
CLIENT = """
import contextlib, io, json, os, sys
from open_qwen2vl import OpenQwen2VLProcessor, PackedDataset
from open_qwen2vl.cli import main
results, processor = [], OpenQwen2VLProcessor.from_pretrained(sys.argv[2])
for arguments in json.loads(sys.argv[1]):
    output, images = arguments[arguments.index("--output") + 1], None
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(arguments)
    if not code:
        dataset = PackedDataset(output, processor)
        images = sum(len(dataset[i]["pixel_values"]) for i in range(len(dataset)))
    results.append((code, errors.getvalue(), images))
print(json.dumps(results))
"""


def parquet(text: str) -> bytes:
    image = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 99, 199)).save(image, "PNG")
    buffer = io.BytesIO()
    datasets.Dataset.from_list([{"image": {"bytes": image.getvalue()}, "text": text}] * 3).to_parquet(buffer)
    return buffer.getvalue()


def test_pack_and_training_read_the_hub_where_it_is(tmp_path, backbones, processor, make_tar, sample):
    tar = make_tar(tmp_path / "a.tar", [member for i in range(4) for member in sample(f"{i:04d}")]).read_bytes()
    files = {
        "README.md": b"# Captions",
        "data/train-00000-of-00002.parquet": parquet("a cat"),
        "data/train-00001-of-00002.parquet": parquet("two dogs"),
        "data/test-00000-of-00001.parquet": parquet("a mat"),
    }
    root = "hf://datasets/tester"
    cases = {
        "split": (f"{root}/rows/data/train-*.parquet", 6),
        "file": (f"{root}/rows@main/data/test-00000-of-00001.parquet", 3),
        "tars": (f"{root}/tars", 4),
        "folder": (f"{root}/tars/more", 4),
    }
    errors = {
        f"{root}/rows": f"holds the splits data/test, data/train: name one, as {root}/rows/data/train-*.parquet",
        f"{root}/none": "hf://datasets/tester/none: ",
        f"{root}/rows@other": "hf://datasets/tester/rows@other: ",
        f"{root}/rows/nowhere": "there is no such file, and no .tar, .parquet, .jsonl below it",
        "hf://tester/model": "data sets of the Hub are named hf://datasets/ORG/NAME[@REVISION][/PATH]",
    }
    options = ["--tokenizer", backbones["text"], "--image-seq-length", "4", "--num-workers", "1"]
    arguments = [["pack", uri, "--output", str(tmp_path / name), *options] for name, (uri, _) in cases.items()]
    arguments += [["pack", uri, "--output", str(tmp_path / "none"), *options] for uri in errors]
    with hub_server() as hub:
        for name, content in {"rows": files, "tars": {"more/b.tar": tar, "x.json": b"{}"}}.items():
            repo = Repo(f"tester/{name}", f"{hub.url}/datasets/tester/{name}", content)
            hub.repos["datasets", f"tester/{name}"] = repo
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        processor.save_pretrained(tmp_path / "processor")
        command = [sys.executable, "-c", CLIENT, json.dumps(arguments), str(tmp_path / "processor")]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])
    for (name, (_, documents)), (code, stderr, images) in zip(cases.items(), results, strict=False):
        assert (code, images) == (0, documents), stderr
        shards = read_plan(tmp_path / name)["shards"]
        assert all(re.match("hf://datasets/tester/[a-z]+@[0-9a-f]{40}/", shard["path"]) for shard in shards)
    for (uri, message), (code, stderr, _) in zip(errors.items(), results[len(cases) :], strict=True):
        assert code == 2 and message in stderr, (uri, stderr)
        assert len(stderr.splitlines()) == 1
    assert not [path for path in (tmp_path / "home").rglob("*") if path.suffix in (".tar", ".parquet")]


def test_offline_is_one_clear_error(tmp_path, backbones, monkeypatch):
    with pytest.raises(ValueError, match="hf://datasets/a/b: .*offline"):
        hub_files.find_files("hf://datasets/a/b")
