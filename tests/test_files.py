"""Files and folders are there as a whole or not at all, on the disk too; errors name them."""

import ast
import errno
import os
from pathlib import Path

import pytest

import open_qwen2vl
from open_qwen2vl import files
from open_qwen2vl.files import (
    describe_shard,
    new_folder,
    os_errors_named,
    publish_folder,
    remove_temporaries,
    renamed_when_whole,
    shard_path,
    write_json,
)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, str]]:
    """What was synced and renamed, in order."""
    made, names = [], {}
    replace, fsync, opened = os.replace, os.fsync, os.open

    def open_file(path, *args, **kwargs):
        descriptor = opened(path, *args, **kwargs)
        names[descriptor] = Path(path).name
        return descriptor

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (made.append(("sync", names[descriptor])), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda a, b: (made.append(("replace", Path(b).name)), replace(a, b)))
    return made


def test_a_file_is_synced_before_it_gets_its_name_and_its_folder_after(tmp_path, calls):
    write_json(tmp_path / "a.json", {"é": 1}, ensure_ascii=False)
    assert (tmp_path / "a.json").read_text(encoding="utf8") == '{\n "é": 1\n}\n'
    temporary = f"a.json.{os.getpid()}.tmp"
    assert calls == [("sync", temporary), ("replace", "a.json"), ("sync", tmp_path.name)]


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyError), renamed_when_whole(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_folder_is_synced_with_all_its_files(tmp_path, calls):
    with new_folder(tmp_path / "deep/model") as folder:
        (folder / "sub").mkdir()
        (folder / "sub/weights").write_text("w")
    assert (tmp_path / "deep/model/sub/weights").read_text() == "w" and os.listdir(tmp_path / "deep") == ["model"]
    synced = calls[: calls.index(("replace", "model"))]
    assert {name for _, name in synced} == {"weights", "sub", f"model.{os.getpid()}.tmp"}
    assert calls[-1] == ("sync", "deep")
    with pytest.raises(ValueError, match="model exists"), new_folder(tmp_path / "deep/model"):
        pass


def test_a_folder_is_replaced(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    publish_folder(tmp_path / "new", tmp_path / "old")
    assert os.listdir(tmp_path) == ["old"] and os.listdir(tmp_path / "old") == ["new"]


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(tmp_path):
    leftovers = ["a.json.17.tmp", "a.json.17.tmp.json", "model.4.tmp"]
    others = ["a.json", "b.json.17.tmp", "a.json.tmp", "a.json.17.tmp.png", "a.tmp.17"]
    for name in (*leftovers[:2], *others):
        (tmp_path / name).touch()
    (tmp_path / "model.4.tmp").mkdir()
    (tmp_path / "model.4.tmp/half").touch()
    remove_temporaries([tmp_path / "a.json", tmp_path / "model", tmp_path / "nowhere/c"])
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_a_new_folder_removes_what_a_killed_run_left_of_it(tmp_path):
    (tmp_path / "model.17.tmp").mkdir()
    with new_folder(tmp_path / "model"):
        pass
    assert os.listdir(tmp_path) == ["model"]


def test_a_writer_that_goes_by_the_suffix_gets_it(tmp_path):
    with renamed_when_whole(tmp_path / "trace.json.gz", keep_suffix=True) as temporary:
        assert temporary.name.endswith(".tmp.gz")
        temporary.touch()
    assert os.listdir(tmp_path) == ["trace.json.gz"]


def test_a_full_disk_names_the_file(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*a\.json'"),
        renamed_when_whole(tmp_path / "a.json"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError) as raised, os_errors_named("b"):
        open("/nowhere/b")  # names its file already
    assert raised.value.filename == "/nowhere/b"


def test_a_described_file_is_found_again_behind_links(tmp_path):
    (tmp_path / "real/data").mkdir(parents=True)
    (tmp_path / "real/data/a.tar").write_bytes(b"123")
    (tmp_path / "link").symlink_to(tmp_path / "real/data")
    described = describe_shard(tmp_path / "link/a.tar", tmp_path / "plan")
    assert (described["path"], described["size"]) == ("../real/data/a.tar", 3)
    assert shard_path(tmp_path / "plan", described) == str(tmp_path / "real/data/a.tar")


def test_nobody_else_renames(tmp_path):
    """Every file appears by files.py: no other module of the package renames or makes temporary files."""
    root = Path(open_qwen2vl.__file__).parent
    found = []
    for path in root.rglob("*.py"):
        if path == Path(files.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if (node.value.id, node.attr) in {("os", "replace"), ("os", "rename"), ("os", "renames")}:
                    found.append(f"{path.relative_to(root)}:{node.lineno}")
                if node.value.id == "os" and node.attr == "fsync":
                    found.append(f"{path.relative_to(root)}:{node.lineno}")
    assert not found
