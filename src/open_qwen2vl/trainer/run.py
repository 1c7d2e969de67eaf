"""A training from built trainer to finished folder: what the recipes share."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import transformers
from transformers.trainer import TRAINER_STATE_NAME

from ..data.packing.mixture import PackMixture
from ..data.packing.weights import describe_sources
from ..places import is_remote
from .arguments import PackedArguments
from .checkpoints.folders import CheckpointError, newest_complete_checkpoint, save_final_model
from .checkpoints.interruption import EXIT_CODE, FolderInUse
from .figures.data_watch import DataWatch
from .figures.loss_watch import TrainingStopped
from .figures.plots import plot_loss
from .figures.progress import summary_lines
from .loading import train_order
from .packed_training import PackedTraining

logger = logging.getLogger(__name__)


def run_recipe(program: str, build_trainer: Callable[[], PackedTraining], args: PackedArguments) -> None:
    """Build the trainer, train to the end or resume from the newest checkpoint, save, plot, sum up.

    `output_dir` gets `model/` for the Auto classes, `loss.png` and `train_results.json`. What a user can get wrong
    ends in one line and exit code 2, a failed checkpoint or a loss gone wrong in one line and exit code 1, SIGTERM in
    a checkpoint and exit code 143.

    Args:
        program (`str`): the recipe's name, for messages.
        build_trainer (`Callable[[], PackedTraining]`): makes the trainer.
        args ([`PackedArguments`]): its arguments.
    """
    level = logging.INFO if args.process_index == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(message)s")
    try:
        checkpoint = asked_checkpoint(args)
        trainer = build_trainer()
        checkpoint = trainer.checkpoint_to_resume(checkpoint)
    except (ValueError, OSError) as error:
        # Whatever fails later is worth its traceback.
        _fail(program, error, args, code=2)
    _announce(trainer, checkpoint)
    # Weights are loaded; from here a bar per saved file would break the bar of the training.
    transformers.utils.logging.disable_progress_bar()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except FolderInUse as error:
        _fail(program, error, args, code=2)
    except (CheckpointError, TrainingStopped) as error:
        _fail(program, error, args, code=1)
    if trainer.interrupted:
        dead = next(one for one in trainer.callback_handler.callbacks if isinstance(one, DataWatch)).dead_store
        if trainer.is_world_process_zero():
            newest = newest_complete_checkpoint(args.output_dir)
            why = f"error: no answer from the store of {dead}" if dead else "stopped on request"
            print(f"{program}: {why}; the same command resumes from {newest}", file=sys.stderr)
        sys.exit(1 if dead else EXIT_CODE)
    _finish(trainer, Path(args.output_dir))


def asked_checkpoint(args: PackedArguments) -> str | None:
    """The checkpoint to resume from: the one that was named, else the newest in `output_dir`, if there is any."""
    if is_remote(args.output_dir):
        raise ValueError(
            f"output_dir: {args.output_dir}: a checkpoint is renamed into place, which no bucket can do: give a "
            "folder of this machine, and copy it from there (--push_to_hub, or `aws s3 sync` and the like)"
        )
    asked, output_dir = args.resume_from_checkpoint, Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir: {output_dir} is a file")
    existing = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        raise ValueError(f"output_dir: {existing} cannot be written to")
    newest = newest_complete_checkpoint(output_dir)
    if asked in (None, "") or str(asked).lower() == "true":
        return newest
    if str(asked).lower() == "false":
        if newest is not None:
            raise ValueError(f"resume_from_checkpoint is false, but {newest} is there: give a new output_dir")
        return None
    # A checkpoint's folder, or that of a run.
    if (Path(asked) / TRAINER_STATE_NAME).exists():
        return str(asked)
    newest = newest_complete_checkpoint(asked)
    if newest is None:
        raise ValueError(f"resume_from_checkpoint: {asked} is no complete checkpoint")
    return newest


def _fail(program: str, error: Exception, args: PackedArguments, code: int) -> None:
    # A loss is judged by all ranks alike, and anything else is told by the rank that met it.
    if args.process_index == 0 or isinstance(error, CheckpointError):
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)


def _announce(trainer: PackedTraining, checkpoint: str | None) -> None:
    parameters = [p.numel() for p in trainer.model.parameters()]
    trained = [p.numel() for p in trainer.model.parameters() if p.requires_grad]
    logger.info("training %s of %s parameters", f"{sum(trained):,}", f"{sum(parameters):,}")
    args = trainer.args
    step = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
    logger.info("%s packs, %s a step, %s devices", f"{len(trainer.train_dataset):,}", step, args.world_size)
    if isinstance(trainer.train_dataset, PackMixture) and len(trainer.train_dataset.sources) > 1:
        mixture = trainer.train_dataset
        plans = [dataset.plan for dataset in mixture.datasets]
        for line in describe_sources(mixture.sources, plans, train_order(mixture, args).counts_of_run):
            logger.info(line)
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
    if args.torch_compile:
        logger.info("the first steps compile the model, which takes minutes")


def _finish(trainer: PackedTraining, output_dir: Path) -> None:
    save_final_model(trainer, output_dir / "model")
    if trainer.is_world_process_zero():
        trainer.create_model_card()
        plot_loss(trainer.state.log_history, output_dir / "loss.png")
        summary = trainer.summary()
        trainer.save_metrics("train", summary, combined=False)
        print(f"trained {output_dir / 'model'}\n{summary_lines(summary)}")
