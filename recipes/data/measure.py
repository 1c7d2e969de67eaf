"""Step 4: how well the scores tell the pairs that match from those that do not, and what the filter kept.

scores/clip/*.parquet, truth.json, subset.npy  ─►  AUC, precision of the kept, metrics.json
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from open_qwen2vl.data.storage.uids import contains_uids, parse_uids, read_uids
from open_qwen2vl.files import write_json


def area_under_curve(scores: np.ndarray, matches: np.ndarray) -> float:
    """The chance that a pair that matches scores above one that does not; a tie counts half.

    Args:
        scores (`np.ndarray` of shape `(pairs,)`): the scores.
        matches (`np.ndarray` of shape `(pairs,)`, bool): whether the caption is the picture's own.

    Returns:
        `float`: 0 to 1, 0.5 by chance.
    """
    right, wrong = np.sort(scores[matches]), np.sort(scores[~matches])
    below = np.searchsorted(wrong, right, "left") + np.searchsorted(wrong, right, "right")
    return float(below.sum() / (2 * len(right) * len(wrong)))


def measure(scores: Path, truth: Path, subset: Path) -> dict[str, float]:
    """Compare scores and selection with the truth.

    Args:
        scores (`Path`): folder of a scorer's parquet files.
        truth (`Path`): `truth.json` of the pool.
        subset (`Path`): uids that the filter kept.

    Returns:
        `dict`: `pairs`, `auc`, `kept`, `precision` (matching pairs among those kept) and `base_rate` (in the pool).
    """
    table = pq.read_table(scores, columns=["key", "uid", "value"])
    mismatched = set(json.loads(truth.read_text())["mismatched"])
    matches = np.array([key not in mismatched for key in table["key"].to_pylist()])
    kept = contains_uids(read_uids(subset), *parse_uids(table["uid"].to_pylist()))
    return {
        "pairs": len(matches),
        "auc": area_under_curve(table["value"].to_numpy(), matches),
        "kept": int(kept.sum()),
        "precision": float(matches[kept].mean()),
        "base_rate": float(matches.mean()),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--scores", type=Path, default=Path("runs/data/scores/clip"))
    parser.add_argument("--truth", type=Path, default=Path("runs/data/pairs/truth.json"))
    parser.add_argument("--subset", type=Path, default=Path("runs/data/subset.npy"))
    parser.add_argument("--output", type=Path, default=Path("runs/data/metrics.json"))
    args = parser.parse_args()
    metrics = measure(args.scores, args.truth, args.subset)
    write_json(args.output, metrics)
    print(
        f"{metrics['pairs']} pairs, {1 - metrics['base_rate']:.1%} of them mismatched: AUC {metrics['auc']:.3f}; "
        f"kept {metrics['kept']}, of which {metrics['precision']:.1%} match"
    )


if __name__ == "__main__":
    main()
