"""From a pool in a bucket to packs that are read there: the same scores, shards, plans and items as on disk."""

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

from open_qwen2vl import PackedDataset
from open_qwen2vl.cli import main
from open_qwen2vl.data import (
    FilterOptions,
    ReshardOptions,
    ScoreOptions,
    find_sources,
    plan_packs,
    reshard,
    score_pool,
    select_pairs,
)
from open_qwen2vl.data.packing.plan_files import read_plan
from open_qwen2vl.model_folders import model_folder
from open_qwen2vl.places import list_tree, place
from open_qwen2vl.trainer.arguments import PackedTrainingArguments
from open_qwen2vl.trainer.loading import read_packs
from open_qwen2vl.trainer.run import asked_checkpoint
from tests.data.conftest import make_sample, write

ROOT = Path(__file__).parents[2]
PLAN = {"image_seq_length": 4, "max_length": 128, "num_workers": 1}


@pytest.fixture
def pool(tmp_path) -> Path:
    """Two tars of 12 samples."""
    (tmp_path / "pool").mkdir()
    for shard in range(2):
        members = []
        for number in range(12):
            words = "some cats sit here " * (number % 5 + 1)
            members += make_sample(f"{number:04d}", words + str(number), uid=f"{shard * 100 + number:032x}")
        write(tmp_path / "pool" / f"{shard:05d}.tar", members)
    return tmp_path / "pool"


@pytest.fixture(params=["memory", pytest.param("bucket", marks=pytest.mark.slow)])
def remote(request, pool) -> str:
    """URL of a folder that has the pool."""
    folder = request.getfixturevalue(request.param)
    for tar in pool.iterdir():
        (place(folder) / "pool" / tar.name).write_bytes(tar.read_bytes())
    return folder


def run_steps(folder: str, tokenizer) -> None:
    """Score, filter, reshard and pack in one folder."""
    for scorer in ("basic", "image-hash"):
        score_pool(ScoreOptions(pool=(f"{folder}/pool",), scorer=scorer, output=f"{folder}/scores", num_workers=1))
    select_pairs(
        FilterOptions(scores=(f"{folder}/scores",), keep="basic.words >= 10", deduplicate="exact", threads=1,
                      output=f"{folder}/subset.npy")
    )  # fmt: skip
    reshard(
        ReshardOptions(pool=(f"{folder}/pool",), subset=f"{folder}/subset.npy", output=f"{folder}/shards",
                       samples_per_shard=8, shuffle=True, num_workers=1)
    )  # fmt: skip
    for name in ("pool", "shards"):
        plan_packs(find_sources([f"{folder}/{name}"]), f"{folder}/packs-{name}", tokenizer, **PLAN)


def content_of(path, name: str):
    """What has to be the same wherever it was made: all but the names and dates of the sources."""
    if name.endswith("shards.arrow"):
        return [os.path.basename(row["path"]) for row in pa.ipc.open_file(path.read_bytes()).read_all().to_pylist()]
    if name.endswith((".parquet", ".arrow")) and not name.endswith("index.parquet"):
        content = pa.BufferReader(path.read_bytes())
        is_arrow = name.endswith(".arrow")
        table = pa.ipc.open_file(content).read_all() if is_arrow else pq.read_table(content)
        metadata = {key: json.loads(value) for key, value in (table.schema.metadata or {}).items()}
        for values in metadata.values():
            values.get("recipe", {}).pop("source", None)
            values.get("settings", {}).pop("shards", None)
        return table.replace_schema_metadata(None).to_pylist(), metadata
    if name.endswith(".json"):
        values = json.loads(path.read_bytes())
        values.get("recipe", values).pop("shards", None)
        return values
    return path.read_bytes()


def items_of(folder: str, processor, **options) -> list[dict]:
    dataset = PackedDataset(folder, processor)
    return list(DataLoader(dataset, batch_size=None, **options))


def same(one, other) -> bool:
    (left, form), (right, like) = tree_flatten(one), tree_flatten(other)
    return form == like and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(left, right, strict=True)
    )


def test_all_steps_make_the_same_in_a_bucket(remote, pool, processor):
    run_steps(str(pool.parent), processor.tokenizer)
    run_steps(remote, processor.tokenizer)
    everything = sorted(str(path.relative_to(pool.parent)) for path in pool.parent.rglob("*") if path.is_file())
    # Indexes of the pool's tars are of the very files, by their places and ETags.
    names, found = ([name for name in own if "packs-pool_indexes/" not in name]
                    for own in (everything, [name for name, _ in list_tree(remote)]))  # fmt: skip
    assert len(list_tree(remote)) == len(everything) > len(names)
    assert found == names and "shards/00000.tar" in names and not any(".tmp" in name for name in names)
    for name in names:
        if not name.endswith(".html"):  # its pictures are those of the pool; it names the time that the filter took
            assert content_of(place(remote) / name, name) == content_of(pool.parent / name, name), name
    for name in ("pool", "shards"):
        here, there = (items_of(f"{folder}/packs-{name}", processor) for folder in (pool.parent, remote))
        assert here and all(map(same, here, there))


def test_a_plan_knows_urls_and_refuses_an_object_that_changed(remote, processor, tmp_path):
    plan_packs(find_sources([f"{remote}/pool"]), tmp_path / "packs", processor.tokenizer, **PLAN)
    shards = list(read_plan(tmp_path / "packs")["shards"])
    assert [shard["path"] for shard in shards] == [f"{remote}/pool/0000{n}.tar" for n in range(2)]
    assert all(shard["size"] and shard["etag"] and shard.keys() == {"path", "size", "etag"} for shard in shards)
    changed = place(shards[1]["path"])
    content = changed.read_bytes()
    changed.write_bytes(content.replace(b"cats", b"dogs"))
    with pytest.raises(ValueError, match=f"{changed} has changed since it was planned .etag"):
        PackedDataset(tmp_path / "packs", processor)
    with pytest.raises(ValueError, match="made with other or changed files"):
        plan_packs(find_sources([f"{remote}/pool"]), tmp_path / "packs", processor.tokenizer, **PLAN)
    changed.unlink()
    with pytest.raises(ValueError, match=f"{changed} of this plan is gone"):
        PackedDataset(tmp_path / "packs", processor)


def test_what_is_not_there_is_one_line(remote):
    for path, message in (
        (f"{remote}/none", "none: no such file"),
        (f"{remote}/pool/9.tar", "9.tar: no such file"),
        (f"{remote}/pool/*.zip", "no .tar file"),
    ):
        with pytest.raises(ValueError, match=message):
            find_sources([path])
    assert find_sources([f"{remote}/pool/*1.tar"]) == [place(f"{remote}/pool/00001.tar")]


def write_sources(folder: Path) -> None:
    """Captions of pictures in a folder, a tar and a zip, named by json lines, csv and parquet."""
    pictures = {f"p/{number}.png": make_sample(f"{number:04d}")[0][1] for number in range(6)}
    for name, content in pictures.items():
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(content)
    write(folder / "images.tar", pictures.items())
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name, content in pictures.items():
            archive.writestr(name, content)
    rows = [{"image": name, "caption": f"a picture of {name}"} for name in [*pictures, "p/none.png"]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.json").write_text(json.dumps(rows))
    lines = ["image,caption", *(",".join(row.values()) for row in rows)]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=3)
    own = [{"image": {"bytes": content, "path": None}, "caption": name} for name, content in pictures.items()]
    pq.write_table(pa.Table.from_pylist(own), folder / "own.parquet", row_group_size=2)


def test_every_container_is_read_where_it_lies(memory, tmp_path, processor):
    write_sources(tmp_path)
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        (place(memory) / path.relative_to(tmp_path).as_posix()).write_bytes(path.read_bytes())
    for number, (file, images) in enumerate(
        [("rows.jsonl", "images"), ("rows.json", "images.tar"), ("rows.csv", "images.zip"),
         ("rows.parquet", "images"), ("own.parquet", None)]
    ):  # fmt: skip
        found = []
        for kind, root in (("here", tmp_path), ("there", place(memory))):
            output = tmp_path / f"{kind}-{number}"
            more = {"images": (str(root / images),)} if images else {}
            report = plan_packs(find_sources([str(root / file)]), output, processor.tokenizer, **PLAN, **more)
            found.append((report, items_of(output, processor)))
        (report, here), (other, there) = found
        assert report == other and report.skipped == ({"missing_image": 1} if images else {})
        assert sum(len(item["pixel_values"]) for item in here) == 6 and all(map(same, here, there))


def test_a_table_in_a_bucket_needs_to_be_told_where_its_pictures_are(memory, tmp_path, processor):
    write_sources(tmp_path)
    (place(memory) / "rows.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes())
    with pytest.raises(ValueError, match="no folder or archive of images was given .--images"):
        plan_packs([place(f"{memory}/rows.parquet")], tmp_path / "packs", processor.tokenizer, **PLAN)


def test_a_mixture_trains_on_a_plan_in_a_bucket(memory, pool, processor):
    for tar in pool.iterdir():
        (place(memory) / "pool" / tar.name).write_bytes(tar.read_bytes())
    for folder in (str(pool.parent), memory):
        plan_packs(find_sources([f"{folder}/pool"]), f"{folder}/packs", processor.tokenizer, **PLAN)
    here, there = (read_packs(f"{folder}/packs", processor) for folder in (pool.parent, memory))
    assert here.fingerprint == there.fingerprint and here.names == there.names == ["packs"]
    assert all(same(here[number], there[number]) for number in range(len(here)))


def test_what_a_bucket_cannot_do_is_refused(capsys):
    args = PackedTrainingArguments("s3://bucket/run", use_cpu=True)
    with pytest.raises(ValueError, match="output_dir: s3://bucket/run: a checkpoint is renamed into place"):
        asked_checkpoint(args)
    with pytest.raises(ValueError, match="s3://bucket/model: a model is a folder of this machine or a hub id"):
        model_folder("s3://bucket/model")
    assert main(["extract-frames", "s3://bucket/clips", "--output", "out", "--processor", "none"]) == 2
    assert "s3://bucket/clips: this command reads and writes files of this machine only" in capsys.readouterr().err


@pytest.mark.slow
def test_commands_with_several_processes_read_and_write_a_bucket(bucket, pool, processor, tmp_path):
    """Those of docs/scale.md. Their workers are new processes, a loader's are forks; keys of it stand nowhere."""
    processor.save_pretrained(tmp_path / "processor")
    for tar in pool.iterdir():
        (place(bucket) / "pool" / tar.name).write_bytes(tar.read_bytes())
    page = (ROOT / "docs" / "scale.md").read_text()
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("open-qwen2vl ")]
    assert [command[1] for command in commands] == ["score", "filter", "reshard", "pack"]
    replaced = {"s3://my-bucket": bucket, "runs/2b/model": str(tmp_path / "processor")}
    for command in commands:
        arguments = [re.sub("|".join(replaced), lambda found: replaced[found[0]], part) for part in command[1:]]
        arguments += {"reshard": ["--samples-per-shard", "6"], "pack": ["--shards-per-group", "1"]}.get(command[1], [])
        for _ in range(2):  # again: nothing is to be done
            workers = [] if arguments[0] == "filter" else ["--num-workers", "2"]
            command = [sys.executable, "-m", "open_qwen2vl.cli", *arguments, *workers]
            result = subprocess.run(command, capture_output=True, text=True, timeout=600)
            assert result.returncode == 0, result.stderr
            assert "secret" not in result.stdout + result.stderr
    names = [name for name, _ in list_tree(bucket)]
    assert sum(name.startswith("packs/part-") for name in names) == sum(name.endswith(".tar") for name in names) - 2
    assert not any(b"secret" in (place(bucket) / name).read_bytes() for name in names)
    one, two = (items_of(f"{bucket}/packs", processor, num_workers=workers) for workers in (0, 2))
    assert one and all(map(same, one, two))
