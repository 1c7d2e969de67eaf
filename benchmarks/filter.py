"""The filter on a synthetic table of scores: seconds and the most memory that its process takes.

Each pair has two scores (a row each), normal as CLIP's and whole numbers of 0 to 100 as MLM-Filter's, in files of
100,000 pairs that DuckDB writes; a seventh of the uids stand in a file as DFN's. The expression has a top fraction,
whose threshold lies among equal scores, a comparison and the file. What is measured is the whole command
`open-qwen2vl filter`, report included, in a process of its own. Prints a Markdown table and writes it to
benchmarks/results/filter.md.

    python benchmarks/filter.py [--pairs 1000000 10000000] [--memory-limit 4GB] [--threads 2] [--folder DIR]
"""

import argparse
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
SCORES = {"clip": "(random() + random() + random() - 1.5) * 0.2 + 0.25", "mlm-filter": "floor(random() * 101)"}
KEEP = "(top(mlm-filter, 0.2) and clip >= 0.2) or in({listed}) and not clip < 0.22"
HEADER = ["rows", "pairs", "score files", "kept", "seconds", "rows/s", "MB peak", "MB on disk"]


def write_scores(folder: Path, pairs: int) -> Path:
    """Score files, and a list of a seventh of the uids, whose path is returned."""
    connection = duckdb.connect()
    uid = "md5(number::VARCHAR)"
    for name, value in SCORES.items():
        (folder / "scores" / name).mkdir(parents=True)
        for start in range(0, pairs, PAIRS_PER_FILE):
            stop = min(start + PAIRS_PER_FILE, pairs)
            connection.execute(
                f"""
                COPY (SELECT printf('%09d', number) AS key, {uid} AS uid, '{name}' AS scorer, 'made' AS model,
                    {value} AS value, NULL::VARCHAR AS reason FROM range({start}, {stop}) AS numbers(number))
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


def measure(folder: Path, pairs: int, memory_limit: str, threads: int) -> list[str]:
    """A row of the table."""
    listed = write_scores(folder, pairs)
    output = folder / "subset.npy"
    command = [sys.executable, "-m", "open_qwen2vl.cli", "filter", str(folder / "scores"), "--output", str(output)]
    command += ["--keep", KEEP.format(listed=listed), "--memory-limit", memory_limit, "--threads", str(threads)]
    started, most = time.perf_counter(), 0
    with subprocess.Popen(command) as process:
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            time.sleep(0.5)
            most = max(most, sum(path.stat().st_size for path in folder.rglob("*.work/**/*") if path.is_file()))
        process.returncode = os.waitstatus_to_exitcode(ended[1])
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(process.returncode)
    rows, files = pairs * len(SCORES), len(list(folder.glob("scores/*/*.parquet")))
    kept = len(np.load(output, mmap_mode="r"))
    figures = [f"{rows:,}", f"{pairs:,}", f"{files:,}", f"{kept:,}", f"{seconds:.0f}", f"{rows / seconds:,.0f}"]
    return [*figures, f"{ended[2].ru_maxrss / 1024:,.0f}", f"{most / 1e6:,.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000, 10_000_000], help="sizes of the table")
    parser.add_argument("--memory-limit", default="4GB", help="given to the filter")
    parser.add_argument("--threads", type=int, default=2, help="given to the filter")
    parser.add_argument("--folder", help="where the scores are made (default: the system's temporary folder)")
    args = parser.parse_args()
    rows = []
    for pairs in args.pairs:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows.append(measure(Path(folder), pairs, args.memory_limit, args.threads))
        print(rows[-1], flush=True)
    table = ["| " + " | ".join(row) + " |" for row in [HEADER, *rows]]
    table.insert(1, "|" + "---:|" * len(HEADER))
    note = (
        f"`--memory-limit {args.memory_limit} --threads {args.threads}`, keep `{KEEP.format(listed='listed.npy')}`. "
        f"Peak: resident memory of the process. On disk: its tables and what it spilled. DuckDB {duckdb.__version__}."
    )
    write_result("filter", [*table, "", note], describe_machine(shlex.join(["python", *sys.argv])))


if __name__ == "__main__":
    main()
