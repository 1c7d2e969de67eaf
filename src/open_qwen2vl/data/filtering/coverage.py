"""What the chosen pairs still name: distinct words and concepts of their captions, against those of all pairs.

A selection may hold better pairs and still train worse, because it names fewer things and is read more often. Of a
large pool the captions of some tars are read, drawn by their names; of a small one all are.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ...places import Place, open_file
from ...processing.sample_error import SampleError
from ..storage.tars import index_shard, read_member
from .decisions import Selection
from .examples import tar_of
from .tables import FILE_FACTOR

COVERED_PAIRS = 50_000  # about so many captions are read
CONCEPT_CAPTIONS = 3  # captions that a concept stands in, at least
LOST_SHOWN = 10
MANY_PASSES = 4  # over the same pairs; more of them teach less and less
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
# Words that name nothing; others of two letters and less do not either.
_FUNCTION_WORDS = frozenset(
    "the and for with from that this these those are was were has have had its his her their our your not but "
    "who which what when where how why all any some one two into onto over under near about after before "
    "between through very you she they them him can will there here than then out off per via also more most "
    "other each".split()
)


class Coverage(NamedTuple):
    """Words of captions."""

    pairs: int  # pairs whose captions were read
    tars: int  # tars that they are in
    all_tars: int  # tars of the pool
    words: int  # distinct words of all their captions
    kept_words: int  # those of the captions that stay
    concepts: int  # words of three letters and more that name something, in `CONCEPT_CAPTIONS` captions or more
    kept_concepts: int  # of these, those that a caption that stays has
    # concepts that no caption that stays has, with their number of captions: the most frequent ones
    lost: list[tuple[str, int]]


def measure_coverage(selection: Selection, tars: Sequence[Place] | None) -> Coverage | None:
    """Count, on the table `keyed`; `None` where no tar of captions is at hand. `tars` as for the examples."""
    files: dict[str, list[int]] = {}
    for number, path in enumerate(selection.scores.files):
        files.setdefault(path.stem, []).append(number)
    by_name = None if tars is None else {tar.stem: tar for tar in tars}
    captions: Counter[str] = Counter()
    kept_captions: set[str] = set()
    pairs = read = 0
    for stem in sorted(files, key=lambda stem: hashlib.sha256(stem.encode()).digest()):
        scored = selection.scores.files[files[stem][0]]
        tar = tar_of(scored) if by_name is None else by_name.get(stem)
        if tar is None:
            continue
        read += 1
        for text, kept in _captions(selection, files[stem], tar):
            pairs += 1
            words = {word.group() for word in _WORD.finditer(text.lower())}
            captions.update(words)
            if kept:
                kept_captions |= words
        if pairs >= COVERED_PAIRS:
            break
    if not pairs:
        return None
    concepts = {word: count for word, count in captions.items() if count >= CONCEPT_CAPTIONS and _names(word)}
    lost = sorted(((word, count) for word, count in concepts.items() if word not in kept_captions), key=_by_count)
    return Coverage(
        pairs=pairs,
        tars=read,
        all_tars=len(files),
        words=len(captions),
        kept_words=len(kept_captions),
        concepts=len(concepts),
        kept_concepts=len(concepts) - len(lost),
        lost=lost[:LOST_SHOWN],
    )


def _names(word: str) -> bool:
    return len(word) > 2 and word not in _FUNCTION_WORDS


def _by_count(row: tuple[str, int]) -> tuple[int, str]:
    return -row[1], row[0]


def _captions(selection: Selection, files: list[int], tar: Place) -> Iterator[tuple[str, bool]]:
    """Captions of the pairs of a tar, and whether each pair stays."""
    rows = selection.connection.execute(
        "SELECT key, step = $kept FROM keyed WHERE key IS NOT NULL AND row_id // $factor IN (SELECT unnest($files))",
        {"kept": selection.kept, "factor": FILE_FACTOR, "files": files},
    ).fetchall()
    kept = dict(rows)
    with open_file(tar, whole=True) as file:
        for sample in index_shard(tar).samples:
            if sample.key not in kept or "txt" not in sample.members:
                continue
            try:
                text = read_member(file, f"{sample.key}.txt", *sample.members["txt"])
            except SampleError:
                continue
            yield text.decode(errors="replace"), kept[sample.key]
