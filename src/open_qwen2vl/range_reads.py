"""Ranges of remote files, many at a time, with retries.

    ranges ─► one task each, IN_FLIGHT at a time ─► an attempt, and a second one beside it where it is slow ─► bytes
                    ▲                                    │ failed, throttled, cut off, or no answer in time
                    └── wait: twice as long each time, times a random share ◄──┘   until `patience` is over

What is not there, or not allowed, is not asked for again.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

IN_FLIGHT = 32  # requests of one process
PATIENCE = 120.0  # seconds in which a range is asked for again and again
ATTEMPT = 20.0  # seconds for one answer
SLOW = 2.0  # seconds after which the same is asked for a second time
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0  # seconds between two attempts
DEAD_PATIENCE = 5.0  # seconds of patience with a store that has just shown itself dead
TELL_EVERY = 60.0  # seconds between two lines in the log
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, TypeError)

logger = logging.getLogger(__name__)

Fetch = Callable[[], Awaitable[bytes]]


@dataclass
class ReadCounts:
    """What the reads of this process were like."""

    requests: int = 0
    retries: int = 0
    hedges: int = 0  # asked for a second time because of a slow answer
    failures: int = 0
    slowest: float = 0.0  # seconds of the slowest range, retries included


COUNTS = ReadCounts()
_is_dead = False  # whether nothing came of the last reads
_told = (float("-inf"), ReadCounts())  # when the log was last told of retries, and of how many


async def fetch_all(fetches: Sequence[tuple[Fetch, int]], patience: float = PATIENCE) -> list[bytes | Exception]:
    """The bytes of each range, or why it has none; of a range is given what asks for it once, and its size.

    Where nothing came of all the patience, the next has little of it: whoever reads is to end, and soon.
    """
    global _is_dead
    limit = asyncio.Semaphore(IN_FLIGHT)
    patience = min(patience, DEAD_PATIENCE) if _is_dead else patience
    found = await asyncio.gather(*(_fetch(fetch, size, patience, limit) for fetch, size in fetches))
    if found:
        _is_dead = all(isinstance(one, Exception) and not isinstance(one, FINAL) for one in found)
    _tell()
    return found


async def _fetch(fetch: Fetch, size: int, patience: float, limit: asyncio.Semaphore) -> bytes | Exception:
    start, wait = time.monotonic(), FIRST_WAIT
    while True:
        try:
            async with limit:
                content = await asyncio.wait_for(_hedged(fetch), min(ATTEMPT, patience))
            if len(content) != size:
                raise OSError(f"{len(content)} bytes came, {size} were asked for")
            _count(requests=1, seconds=time.monotonic() - start)
            return content
        except FINAL as error:
            _count(requests=1, failures=1)
            return error
        except Exception as error:  # each library has its own kinds for what a network does
            if isinstance(error, TimeoutError):
                error = TimeoutError(f"no answer within {min(ATTEMPT, patience):g} s")
            if time.monotonic() - start + wait > patience:
                _count(requests=1, failures=1, seconds=time.monotonic() - start)
                return error
        _count(requests=1, retries=1)
        # A random share, so that those who were turned away together do not come back together.
        await asyncio.sleep(wait * random.random())
        wait = min(2 * wait, LONGEST_WAIT)


async def _hedged(fetch: Fetch) -> bytes:
    """The answer that comes first, of one request, or of two if the first is slow."""
    tasks = [asyncio.ensure_future(fetch())]
    try:
        done, _ = await asyncio.wait(tasks, timeout=SLOW)
        if not done:
            _count(hedges=1)
            tasks.append(asyncio.ensure_future(fetch()))
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(iter(done)).result()
    finally:
        for task in tasks:
            task.cancel()


def _tell() -> None:
    """Log retries, at most once in `TELL_EVERY`."""
    global _told
    before, now = _told[1], time.monotonic()
    if COUNTS.retries + COUNTS.failures > before.retries + before.failures and now - _told[0] >= TELL_EVERY:
        logger.warning(
            "remote reads: %d of %d were tried again, %d asked for twice, %d failed; the slowest took %.1f s",
            *(getattr(COUNTS, name) - getattr(before, name) for name in ("retries", "requests", "hedges", "failures")),
            COUNTS.slowest,
        )
        _told = now, replace(COUNTS)


def _count(seconds: float = 0.0, **amounts: int) -> None:
    # In the one thread that fsspec reads in, hence without a lock.
    for name, amount in amounts.items():
        setattr(COUNTS, name, getattr(COUNTS, name) + amount)
    COUNTS.slowest = max(COUNTS.slowest, seconds)
