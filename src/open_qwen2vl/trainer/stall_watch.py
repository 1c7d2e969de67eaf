"""Ends a training of several ranks in which one does not come on, and names it.

    each rank: main thread ─► last step, and where it is now ─► the store that ranks met at, every few seconds
    a step that takes longer than STALLED x ddp_timeout ─► all ranks compared ─► one line, exit code 1

A rank that waits for others is in an operation of all of them, or in a backward pass, which ends with one; a rank that
is elsewhere, or says nothing any more, is what they wait for. The backends' own timeout would end all of them too, but
by the name of an operation.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

STALLED = 0.8  # of ddp_timeout, so that it is told before the backend gives up
WAITING = ("_engine_run_backward", "synchronize")  # functions of torch; those of its `distributed` all do
_LIBRARIES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}lib{os.sep}python", "<frozen")
EXIT_CODE = 1


class StallWatch(TrainerCallback):
    """Watches the steps of a rank from a thread; `is_paused` tells whether it saves or evaluates, which may take long.

    Does nothing where there is one rank.
    """

    def __init__(self, is_paused: Callable[[], bool]):
        self._is_paused = is_paused
        self._over: threading.Event | None = None
        self._step, self._since = 0, time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Begin to watch."""
        if args.world_size > 1 and dist.is_initialized():
            self._over, self._step, self._since = threading.Event(), state.global_step, time.monotonic()
            main = threading.get_ident()
            threading.Thread(target=self._watch, args=(args, main, self._over), daemon=True).start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """The rank has come on."""
        self._step, self._since = state.global_step, time.monotonic()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Watch no more."""
        if self._over is not None:
            self._over.set()

    def _watch(self, args: TrainingArguments, main: int, over: threading.Event) -> None:
        limit, rank = STALLED * args.ddp_timeout, args.process_index
        store = dist.distributed_c10d._get_default_store()
        while not over.wait(min(5.0, limit / 8)):
            if self._is_paused():
                self._since = time.monotonic()
            place, waits = where(sys._current_frames()[main])
            seconds = time.monotonic() - self._since
            told = {"step": self._step, "seconds": seconds, "place": place, "waits": waits, "at": time.time()}
            store.set(f"stall/{rank}", json.dumps({**told, "host": socket.gethostname()}))
            # The first rank speaks, unless it is the one that says nothing any more.
            if seconds > limit * (1 if rank == 0 else 1.1) and not over.is_set():
                ranks = [json.loads(store.get(f"stall/{other}")) for other in range(args.world_size)]
                print(verdict(ranks, seconds), file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)


def where(frame: FrameType) -> tuple[str, bool]:
    """The innermost place in a stack that is not of a library, or the innermost, and whether it waits for others."""
    innermost = frame.f_code
    in_torch = f"{os.sep}torch{os.sep}" in innermost.co_filename
    # Of `forward` of DDP and FSDP all ranks have frames, further out.
    waits = in_torch and (innermost.co_name in WAITING or "distributed" in innermost.co_filename)
    place, outer = _place(frame), frame
    while outer is not None:
        if not any(part in outer.f_code.co_filename for part in _LIBRARIES):
            return _place(outer), waits
        outer = outer.f_back
    return place, waits


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"


def verdict(ranks: list[dict[str, Any]], seconds: float) -> str:
    """One line on what all ranks said last."""
    now = max(rank["at"] for rank in ranks)
    silent = [number for number, rank in enumerate(ranks) if now - rank["at"] > max(30.0, seconds / 2)]
    first = min(rank["step"] for rank in ranks)
    behind = [n for n, rank in enumerate(ranks) if rank["step"] == first and not rank["waits"] and n not in silent]
    stuck = silent or behind
    places = ["which says nothing any more" if n in silent else f"in {rank['place']}" for n, rank in enumerate(ranks)]
    named = "; ".join(f"rank {n} on {ranks[n]['host']}, {places[n]}" for n in stuck[:8])
    what = named or f"no rank stands out: all of them wait, rank 0 in {ranks[0]['place']}"
    more = f" and {len(stuck) - 8} more" if len(stuck) > 8 else ""
    return (
        f"error: step {first + 1} has not ended in {seconds:.0f} s (ddp_timeout); waited for: {what}{more}. The same "
        "command resumes from the newest checkpoint"
    )
