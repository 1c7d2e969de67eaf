"""A few steps under torch's profiler: where the time of a step goes."""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...files import renamed_when_whole, write_text

logger = logging.getLogger(__name__)

OPERATORS = 60  # rows of the table


class ProfileCallback(TrainerCallback):
    """Records some of a run's first steps into `output_dir/profile`; the run is as without it.

    `trace-rank0.json.gz` is for https://ui.perfetto.dev or `chrome://tracing`, `operators.txt` lists the operators by
    the time that they take themselves. A rerun writes both anew. `wait` steps let caches fill, `warmup` run
    profiled, unkept, `active` are recorded.
    """

    def __init__(self, wait: int = 2, warmup: int = 1, active: int = 3, all_ranks: bool = False):
        self.schedule = schedule(wait=wait, warmup=warmup, active=active, repeat=1)
        self.steps = wait + warmup + active
        self.all_ranks = all_ranks
        self._profiler: profile | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Start the profiler; it counts the steps of this process."""
        if args.process_index and not self.all_ranks:
            return
        folder = Path(args.output_dir) / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available() and args.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=self.schedule,
            record_shapes=True,
            on_trace_ready=lambda profiler: _write(profiler, folder, args.process_index),
        )
        self._profiler.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """An optimizer step is a step of the profiler's schedule."""
        if self._profiler is None:
            return
        self._profiler.step()
        if self._profiler.step_num >= self.steps:
            self._stop()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Write what there is of a run that ends early."""
        if self._profiler is not None:
            logger.warning(
                "the profile is incomplete: it takes %d steps, and this run made %d",
                self.steps,
                self._profiler.step_num,
            )
            self._stop()

    def _stop(self) -> None:
        self._profiler.stop()
        self._profiler = None


def _write(profiler: profile, folder: Path, rank: int) -> None:
    # The temporary name ends in .gz as well: the exporter goes by that.
    with renamed_when_whole(folder / f"trace-rank{rank}.json.gz", keep_suffix=True) as temporary:
        profiler.export_chrome_trace(str(temporary))
    if rank == 0:
        device = "cuda" if ProfilerActivity.CUDA in profiler.activities else "cpu"
        table = profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=OPERATORS)
        write_text(folder / "operators.txt", table)
    logger.info("profile written to %s", folder)
