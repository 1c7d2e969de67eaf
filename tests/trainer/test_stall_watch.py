"""A rank that does not come on is named, and the job ends in bounded time."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from open_qwen2vl.trainer.stall_watch import verdict, where

SCRIPT = Path(__file__).with_name("stuck_rank.py")


def rank(**changes) -> dict:
    return {"step": 7, "place": "forward (model.py:3)", "waits": True, "at": 1000.0, "host": "node1", **changes}


def test_who_is_named():
    behind = rank(waits=False, place="read (disk.py:9)", host="node2")
    assert "step 8 has not ended in 90 s" in verdict([rank(), behind, rank()], 90)
    assert "waited for: rank 1 on node2, in read (disk.py:9). The same" in verdict([rank(), behind, rank()], 90)
    silent = rank(at=900.0, waits=False)
    assert "waited for: rank 2 on node1, which says nothing any more" in verdict(
        [rank(), rank(waits=False), silent], 90
    )
    # One that has not ended the step before is behind those that wait in the next.
    assert "step 7 has not ended in 90 s (ddp_timeout); waited for: rank 0" in verdict(
        [rank(step=6, waits=False), rank()], 90
    )
    assert "no rank stands out: all of them wait, rank 0 in forward" in verdict([rank(), rank()], 90)
    many = [rank(waits=False)] * 20
    assert verdict(many, 90).count("rank ") == 8 and "and 12 more" in verdict(many, 90)


def test_where_a_thread_is():
    over = threading.Event()

    def reads_a_disk():
        while not over.is_set():
            time.sleep(0.01)

    thread = threading.Thread(target=reads_a_disk)
    thread.start()
    try:
        place, waits = where(sys._current_frames()[thread.ident])
    finally:
        over.set()
        thread.join()
    assert place.startswith("reads_a_disk (test_stall_watch.py:") and not waits


@pytest.mark.slow
def test_a_stuck_rank_ends_the_job(tmp_path, make_pack, backbones):
    torch.save([make_pack(2, seed=i) for i in range(8)], tmp_path / "packs.pt")
    (tmp_path / "backbones.json").write_text(json.dumps(backbones))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode != 0
    assert "step 3 has not ended in" in done.stderr and "waited for: rank 1 on" in done.stderr, [
        line for line in done.stderr.splitlines() if "rror" in line
    ]
    assert "on_step_begin (stuck_rank.py:" in done.stderr
