"""Speed and fill of `pack_lengths` against first-fit-decreasing.

First-fit-decreasing here is the straightforward form, one document after the other, with a segment tree over the
packs instead of a scan: the same packs as the scan gives, in n log n. Both run in this process, one after the other,
on the same lengths. Prints a Markdown table and writes it to benchmarks/results/packing.md.

    python benchmarks/packing.py [--capacity 4096] [--seed 0]
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import numpy as np
from report import describe_machine, write_result

from open_qwen2vl.data.packing.bins import lower_bound, pack_lengths

ASSET = Path(__file__).parents[1] / "tests/assets/packing_ffd.npz"
HEADER = ["input", "n", "seconds", "FFD seconds", "packs", "FFD packs", "bound", "fill", "FFD fill"]


def first_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Number of packs; `room[node]` is the most space in any pack below the node, pack p being leaf `size + p`."""
    size = 1 << (len(lengths) - 1).bit_length()
    room = [capacity] * (2 * size)
    opened = 0
    for length in sorted(lengths, reverse=True):
        node = 1
        while node < size:
            node *= 2
            node += room[node] < length
        opened = max(opened, node - size + 1)
        room[node] -= length
        while node := node // 2:
            most = max(room[2 * node], room[2 * node + 1])
            if room[node] == most:
                break
            room[node] = most
    return opened


def inputs(asset: Path, capacity: int, seed: int) -> dict[str, np.ndarray]:
    """The recorded lengths, larger samples of them, uniform ones, and the extremes."""
    rng = np.random.default_rng(seed)
    with np.load(asset) as arrays:
        recorded = {
            name: arrays[f"{name}/lengths"] for name in ("captions_1k", "captions", "interleaved_1k", "mixed_1k")
        }
    captions, documents = recorded["captions"], recorded["interleaved_1k"]
    million = 1_000_000
    return {
        **recorded,
        "mixed, 80 % captions": np.concatenate([rng.choice(captions, 8_000), rng.choice(documents, 2_000)]),
        "mixed, 50 % captions": np.concatenate([rng.choice(captions, 5_000), rng.choice(documents, 5_000)]),
        "conversations, 729 an image": np.clip(729 + rng.lognormal(5.3, 0.8, 80_000), 740, 4096).astype(np.int64),
        "captions, drawn again": rng.choice(captions, million),
        "uniform 1..capacity": rng.integers(1, capacity + 1, million),
        "uniform 1..capacity/2": rng.integers(1, capacity // 2 + 1, million),
        "all 1": np.ones(million, dtype=np.int64),
        "all 173": np.full(million, 173),
        "all capacity": np.full(million, capacity),
    }


def measure(name: str, lengths: np.ndarray, capacity: int) -> list[str]:
    """One row of the table."""
    started = time.process_time()
    numbers = pack_lengths(lengths, capacity)
    seconds = time.process_time() - started
    packs, tokens = int(numbers.max()) + 1, int(lengths.sum())
    as_list = lengths.tolist()
    started = time.process_time()
    ffd_packs = first_fit_decreasing(as_list, capacity)
    ffd_seconds = time.process_time() - started
    fills = (f"{100 * tokens / (number * capacity):.2f} %" for number in (packs, ffd_packs))
    counts = (f"{number:,}" for number in (packs, ffd_packs, lower_bound(lengths, capacity)))
    return [name, f"{lengths.size:,}", f"{seconds:.3f}", f"{ffd_seconds:.3f}", *counts, *fills]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--capacity", type=int, default=4096, help="tokens a pack")
    parser.add_argument("--seed", type=int, default=0, help="of the lengths that are drawn")
    parser.add_argument("--asset", type=Path, default=ASSET, help="recorded lengths")
    args = parser.parse_args()

    rows = [
        measure(name, lengths, args.capacity) for name, lengths in inputs(args.asset, args.capacity, args.seed).items()
    ]
    table = ["| " + " | ".join(row) + " |" for row in [HEADER, *rows]]
    table.insert(1, "|---|" + "---:|" * (len(HEADER) - 1))
    note = f"{args.capacity} tokens a pack. Seconds are CPU seconds of one core; no packing is below `bound`."
    write_result("packing", [*table, "", note], describe_machine(shlex.join(["python", *sys.argv])))


if __name__ == "__main__":
    main()
