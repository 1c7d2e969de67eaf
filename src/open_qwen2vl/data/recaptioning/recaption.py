"""The step `recaption`: a model writes captions beside those of a pool.

    tar ─ pairs.py ─► captioners.py ─► journal.py, a line a batch ─ checks.py ─► OUTPUT/NAME/TAR.parquet ─► report.html

The file is a score file: the value is the number of words, `detail` the caption; of what is none `detail` has what the
model wrote, and `reason` why. `filter` reads it, and `reshard --captions` puts the captions into new tars.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...endpoint import EndpointError
from ...files import describe_shard
from ...output_lock import only_writer
from ...places import Place, is_remote, place
from ...transfers import local_copy
from ..engine.engine import Outcome, ShardTask, StepReport, process_rank, run_tasks
from ..scoring.kinds import check_finished, model_workers, score_recipe, shard_tasks
from ..scoring.score_files import DETAIL, score_table
from ..scoring.scoring import write_tar_scores
from ..storage.tars import find_tars, index_shard
from .captioners import Captioner
from .checks import check_caption
from .journal import JOURNALS, Journal, Written, journal_of
from .options import RecaptionOptions
from .report import write_report

NO_ANSWERS = 10  # samples of a tar, so many or more, without an answer to any: the endpoint is at fault

_BATCH, _CONCURRENCY = 16, 16


def recaption_pool(options: RecaptionOptions) -> StepReport:
    """Caption a pool, one file for each tar; a rerun makes what is missing, and asks no model twice.

    Args:
        options ([`RecaptionOptions`]): what is captioned, and how.

    Returns:
        [`StepReport`]: of this run; among the skipped are samples whose caption passed no check, by reason.

    Raises:
        ValueError: for two tars of one file name, captions that were made from something else, a model that cannot be
            loaded, or an endpoint that cannot be used.
        OSError: if a file cannot be read.
    """
    folder = place(options.output) / options.name
    tasks = shard_tasks(find_tars(options.pool), folder)
    recipe = score_recipe("recaption", options.name, options.of_captions(), folder)
    check_finished(tasks, recipe)
    workers, gpus, threads = (1, 0.0, 0) if options.endpoint else model_workers(options)
    rank, ranks = process_rank()
    with only_writer(folder, rank=rank, ranks=ranks):
        report = run_tasks(
            tasks,
            functools.partial(TarCaptioner, _make_captioner(options, threads), options, recipe),
            engine=options.engine,
            num_workers=workers,
            num_gpus=gpus,
            description="captioning",
        )
        _remove_journals(tasks, folder)
        if rank == 0:
            write_report(folder, [task.output for task in tasks if task.output.exists()], options)
    return report


def _make_captioner(options: RecaptionOptions, threads: int) -> Callable[[], Captioner]:
    meant = (options.model, options.prompt, options.max_new_tokens)
    if options.endpoint:
        from .endpoint_captioner import EndpointCaptioner

        return functools.partial(
            EndpointCaptioner, options.endpoint, *meant, concurrency=options.concurrency or _CONCURRENCY
        )
    from .model_captioner import ModelCaptioner

    batch_size = options.batch_size or _BATCH
    return functools.partial(ModelCaptioner, *meant, batch_size=batch_size, device=options.device, threads=threads)


class TarCaptioner:
    """Captions one tar after the other, for one worker of the engine."""

    def __init__(self, make_captioner: Callable[[], Captioner], options: RecaptionOptions, recipe: dict[str, Any]):
        self._captioner = make_captioner()
        self._options, self._recipe = options, recipe

    def __call__(self, task: ShardTask) -> Outcome:
        """Caption a tar, from where a killed run left it."""
        with local_copy(task.source) as tar:  # all of it is read
            return self._caption(task, tar)

    def _caption(self, task: ShardTask, tar: Path) -> Outcome:
        index = index_shard(tar)
        recipe = {**self._recipe, "source": describe_shard(task.source, task.output.parent)}
        journal = Journal(task.output, recipe)
        try:
            for written in self._captioner.captions(tar, index.samples[len(journal.written) :]):
                journal.add(written)
        finally:
            journal.close()
        self._check_answers(task, journal)
        table, skipped = self._table(journal.written)
        total = len(journal.written) + len(index.skipped)
        made_with = self._captioner.made_with
        outcome = write_tar_scores(task, table, total, list(index.skipped) + skipped, recipe, made_with)
        journal_of(task.output).unlink()
        return outcome

    def _check_answers(self, task: ShardTask, journal: Journal) -> None:
        """Leave a tar undone of whose samples an endpoint answered none: that is its fault, and may be mended."""
        written = journal.written
        if len(written) >= NO_ANSWERS and all(one.reason in ("bad_answer", "refused_request") for one in written):
            journal_of(task.output).unlink()
            raise EndpointError(f"--endpoint: no answer to any of the {len(written)} samples of {task.source}")

    def _table(self, written: list[Written]) -> tuple[pa.Table, list[tuple[str, str]]]:
        rows = [self._checked(one) for one in written]
        values = np.array([np.nan if reason else words for _, words, reason in rows], np.float64).reshape(-1, 1)
        reasons = [reason for *_, reason in rows]
        keys, uids = [one.key for one in written], [one.uid for one in written]
        table = score_table([self._options.name], self._options.model, keys, uids, values, reasons, None)
        table = table.append_column(DETAIL, pa.array([caption for caption, *_ in rows], pa.string()))
        return table, [(key, reason) for key, reason in zip(keys, reasons, strict=True) if reason]

    def _checked(self, one: Written) -> tuple[str | None, int, str | None]:
        if one.text is None:
            return None, 0, one.reason
        text = one.text.encode(errors="replace").decode()  # an endpoint may give half of a surrogate pair
        return check_caption(text, one.is_whole, self._options.min_words, self._options.max_words)


def _remove_journals(tasks: list[ShardTask], folder: Place) -> None:
    """Those of tars that are finished, where a kill came between, and their folder."""
    for task in tasks:
        if task.output.exists():
            journal_of(task.output).unlink(missing_ok=True)
    if not is_remote(folder) and (folder / JOURNALS).exists() and not any((folder / JOURNALS).iterdir()):
        (folder / JOURNALS).rmdir()
