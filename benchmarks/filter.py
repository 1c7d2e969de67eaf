"""The filter on a synthetic table of scores: seconds and the most memory that its process takes.

Each pair has two scores (a row each), normal as CLIP's and whole numbers of 0 to 100 as MLM-Filter's, in files of
100,000 pairs that DuckDB writes; a seventh of the uids stand in a file as DFN's. The expression has a top fraction,
whose threshold lies among equal scores, a comparison and the file. With --deduplicate a pair has a score and image
hashes instead, a tenth of them those of another pair and a twentieth one bit away from it, and the upper half by score
is looked through. What is measured is the whole command `open-qwen2vl filter`, report included, in a process of its
own. Prints a Markdown table and writes it to benchmarks/results/filter.md.

    python benchmarks/filter.py [--pairs 4000000] [--deduplicate none near] [--memory-limit 4GB] [--folder DIR]
"""

import argparse
import contextlib
import itertools
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb
import numpy as np
from report import describe_machine, write_result

from open_qwen2vl.data.storage.uids import UID_DTYPE, write_uids

PAIRS_PER_FILE = 100_000
CLIP = "(random() + random() + random() - 1.5) * 0.2 + 0.25"
SCORES = {"none": {"clip": CLIP, "mlm-filter": "floor(random() * 101)"}}  # what stands in for values
SCORES |= {kind: {"clip": CLIP, "image-hash": "NULL::DOUBLE"} for kind in ("exact", "near")}
KEEP = {"none": "(top(mlm-filter, 0.2) and clip >= 0.2) or in({listed}) and not clip < 0.22"}
KEEP |= {kind: "top(clip, 0.5)" for kind in ("exact", "near")}
# Of ten pairs the second has the hashes of the first, and every other third one bit less or more.
HASHES = """
, CASE number % 10 WHEN 1 THEN hash(number - 1) ELSE hash(number) END AS bytes_hash
, CASE WHEN number % 10 = 1 THEN hash(number - 1, 7) WHEN number % 20 = 2 THEN xor(hash(number - 2, 7), 4096::UBIGINT)
    ELSE hash(number, 7) END AS phash
"""
HEADER = ["rows", "pairs", "deduplicate", "kept", "duplicates", "seconds", "CPU seconds", "rows/s", "MB peak"]
HEADER += ["MB on disk", "MB spilled"]


def write_scores(folder: Path, pairs: int, kind: str) -> Path:
    """Score files, and a list of a seventh of the uids, whose path is returned."""
    connection = duckdb.connect()
    uid = "md5(number::VARCHAR)"
    for name, value in SCORES[kind].items():
        (folder / "scores" / name).mkdir(parents=True)
        hashes = HASHES if name == "image-hash" else ""
        for start in range(0, pairs, PAIRS_PER_FILE):
            stop = min(start + PAIRS_PER_FILE, pairs)
            connection.execute(
                f"""
                COPY (SELECT printf('%09d', number) AS key, {uid} AS uid, '{name}' AS scorer, 'made' AS model,
                    {value} AS value, NULL::VARCHAR AS reason {hashes} FROM range({start}, {stop}) AS numbers(number))
                TO '{folder}/scores/{name}/{start // PAIRS_PER_FILE:05d}.parquet'
                (FORMAT parquet, COMPRESSION zstd, KV_METADATA {{open_qwen2vl: '{{"format_version": 1}}'}})
                """
            )
    halves = connection.execute(
        f"SELECT md5_number_upper(number::VARCHAR) AS f0, md5_number_lower(number::VARCHAR) AS f1 "
        f"FROM range(0, {pairs}, 7) AS numbers(number)"
    ).fetchnumpy()
    uids = np.empty(len(halves["f0"]), UID_DTYPE)
    for half in ("f0", "f1"):
        uids[half] = halves[half].byteswap()  # the digits of md5 stand in these numbers from the lowest byte on
    write_uids(folder / "listed.npy", uids)
    return folder / "listed.npy"


def megabytes(folder: Path, pattern: str) -> float:
    """Of the files there now; one may go meanwhile."""
    total = 0
    for path in folder.rglob(pattern):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total / 1e6


def measure(folder: Path, pairs: int, kind: str, memory_limit: str, threads: int) -> list[str]:
    """A row of the table."""
    listed = write_scores(folder, pairs, kind)
    output = folder / "subset.npy"
    command = [sys.executable, "-m", "open_qwen2vl.cli", "filter", str(folder / "scores"), "--output", str(output)]
    command += ["--keep", KEEP[kind].format(listed=listed), "--memory-limit", memory_limit, "--threads", str(threads)]
    command += [] if kind == "none" else ["--deduplicate", kind]
    started, most, spilled = time.perf_counter(), 0.0, 0.0
    with open(folder / "printed", "w+") as printed, subprocess.Popen(command, stdout=printed) as process:
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            time.sleep(0.5)
            most = max(most, megabytes(folder, "*.work/**/*"))
            spilled = max(spilled, megabytes(folder, "*.work/spilled/**/*"))
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        printed.seek(0)
        found = dict(line.split(None, 1) for line in printed.read().splitlines() if line.startswith("duplicates"))
    seconds, used = time.perf_counter() - started, ended[2]
    if process.returncode:
        raise SystemExit(process.returncode)
    rows, kept = pairs * len(SCORES[kind]), len(np.load(output, mmap_mode="r"))
    figures = [f"{rows:,}", f"{pairs:,}", kind, f"{kept:,}", found.get("duplicates", "-"), f"{seconds:.0f}"]
    figures += [f"{used.ru_utime + used.ru_stime:.0f}", f"{rows / seconds:,.0f}", f"{used.ru_maxrss / 1024:,.0f}"]
    return [*figures, f"{most:,.0f}", f"{spilled:,.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000, 4_000_000], help="sizes of the table")
    parser.add_argument("--deduplicate", nargs="+", choices=list(SCORES), default=["none", "near"], help="of filter")
    parser.add_argument("--memory-limit", default="4GB", help="given to the filter")
    parser.add_argument("--threads", type=int, default=2, help="given to the filter")
    parser.add_argument("--folder", help="where the scores are made (default: the system's temporary folder)")
    args = parser.parse_args()
    rows = []
    for pairs, kind in itertools.product(args.pairs, args.deduplicate):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows.append(measure(Path(folder), pairs, kind, args.memory_limit, args.threads))
        print(rows[-1], flush=True)
    table = ["| " + " | ".join(row) + " |" for row in [HEADER, *rows]]
    table.insert(1, "|" + "---:|" * len(HEADER))
    keep = " and ".join(f"`{KEEP[kind].format(listed='listed.npy')}` ({kind})" for kind in args.deduplicate)
    note = (
        f"`--memory-limit {args.memory_limit} --threads {args.threads}`, keep {keep}. Peak: resident memory of the "
        f"process. On disk: its tables and what it spilled, which is told apart too. DuckDB {duckdb.__version__}."
    )
    write_result("filter", [*table, "", note], describe_machine(shlex.join(["python", *sys.argv])))


if __name__ == "__main__":
    main()
