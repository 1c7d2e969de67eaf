"""Two processes on one output, and what a lock leaves behind."""

import contextlib
import subprocess
import sys

import numpy as np
import pytest

from open_qwen2vl.cli import main
from open_qwen2vl.data import plan_packs
from open_qwen2vl.data.storage.uids import UID_DTYPE, write_uids
from open_qwen2vl.output_lock import FolderInUse, only_writer

HOLD = """
import sys, time
from open_qwen2vl.output_lock import only_writer
output, is_file, rank, ranks = sys.argv[1], sys.argv[2] == "file", int(sys.argv[3]), int(sys.argv[4])
with only_writer(output, is_file=is_file, rank=rank, ranks=ranks):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def holder(output, kind="folder", rank=0, ranks=1):
    command = [sys.executable, "-c", HOLD, str(output), kind, str(rank), str(ranks)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_another_process_is_refused_by_name_and_a_dead_one_is_not(tmp_path):
    output = tmp_path / "new" / "packs.v2"
    with holder(output) as other:
        with pytest.raises(FolderInUse, match=f"process {other.pid} is writing .*packs.v2: wait"):
            with only_writer(output, patience=0):
                pass
    assert list(output.iterdir()) == [output / ".lock"]  # it was killed
    with only_writer(output):
        pass
    assert list(output.iterdir()) == []


def test_a_folder_that_nothing_was_written_to_is_gone(tmp_path):
    with pytest.raises(KeyError), only_writer(tmp_path / "new" / "packs"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_is_to_be_and_the_other_way_round_are_named(tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "packs"):
        with pytest.raises(ValueError, match=f"^{output}: .*file is a file, not a folder$"), only_writer(output):
            pass
    with pytest.raises(ValueError, match=f"^{tmp_path} is a folder; a file"), only_writer(tmp_path, is_file=True):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_ranks_work_side_by_side_but_not_beside_another_run(tmp_path):
    with holder(tmp_path, rank=1, ranks=4):
        with only_writer(tmp_path, patience=0, rank=0, ranks=4), only_writer(tmp_path, patience=0, rank=2, ranks=4):
            pass
        for rank, ranks in ((1, 2), (0, 1)):
            with pytest.raises(FolderInUse), only_writer(tmp_path, patience=0, rank=rank, ranks=ranks):
                pass
        assert (tmp_path / ".lock").exists()
    with only_writer(tmp_path, rank=1, ranks=2):
        pass
    assert not (tmp_path / ".lock").exists()


def test_a_planner_of_python_takes_the_lock(tmp_path, make_tar, sample, tokenizer):
    tar, output = make_tar(tmp_path / "00000.tar", sample("a")), tmp_path / "packs"
    with holder(output) as other:
        with pytest.raises(FolderInUse, match=f"process {other.pid} is writing .*packs: wait"):
            plan_packs([tar], output, tokenizer, max_length=256, num_workers=1)
    assert plan_packs([tar], output, tokenizer, max_length=256, num_workers=1).documents == 1
    assert not (output / ".lock").exists()


@pytest.mark.parametrize("step", ["pack", "filter", "reshard", "score"])
def test_every_data_step_takes_the_lock(step, tmp_path, make_tar, sample, backbones, capsys):
    pool = str(make_tar(tmp_path / "00000.tar", sample("a", uid="1" * 32)))
    write_uids(tmp_path / "all.npy", np.zeros(1, UID_DTYPE))
    output, arguments = {
        "pack": ("packs", [pool, "--tokenizer", str(backbones["text"])]),
        "filter": ("subset.npy", [str(tmp_path / "scores"), "--keep", "clip > 0"]),
        "reshard": ("tars", [pool, "--subset", str(tmp_path / "all.npy")]),
        "score": ("made", [pool, "--scorer", "image-hash"]),
    }[step]
    locked = tmp_path / output / ("image-hash" if step == "score" else "")
    with holder(locked, "file" if step == "filter" else "folder") as other:
        assert main([step, *arguments, "--output", str(tmp_path / output)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"open-qwen2vl {step}: error: process {other.pid} is writing {locked}")
