"""Which checkpoint a training resumes from: a whole one, of the very same run, with the weights of this model."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..averaging import WeightAverage
from .completeness import AVERAGE_NAME, missing_part, weight_names
from .folders import newest_complete_checkpoint
from .run_record import check_same_run
from .saving import without_tied

NAMED = 3  # weights in a message


def checkpoint_to_resume(
    asked: str | os.PathLike | bool | None, output_dir: str, record: dict[str, Any], model: nn.Module
) -> str | None:
    """The checkpoint that was asked for, or for True the newest complete one in `output_dir`, if there is any."""
    if asked is True:
        asked = newest_complete_checkpoint(output_dir)
    if not asked:
        return None
    if missing := missing_part(asked):
        raise ValueError(f"{asked} is no checkpoint to resume from: {missing}")
    check_same_run(asked, record)
    _check_files(Path(asked))
    # An adapter's file has PEFT's names; `whole_adapters` compares those as they are loaded.
    if (saved := weight_names(asked)) is not None and not hasattr(model, "peft_config"):
        expected = set(without_tied(list(model.state_dict()), model))
        # Tied weights are in a file once or twice: neither missed nor unknown.
        check_weight_names(expected - saved, saved - set(model.state_dict()), str(asked))
    return str(asked)


def _check_files(checkpoint: Path) -> None:
    """Refuse files of the right name that are something else; no tensor is read, and nothing but tensors unpickled."""
    for file in [*checkpoint.glob("*.safetensors"), checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.exists():
                torch.load(file, map_location="meta", mmap=True, weights_only=True)
        except Exception as error:  # of many kinds: SafetensorError, UnpicklingError, RuntimeError, KeyError
            what = " ".join(str(error).split())[:200]
            raise ValueError(f"{checkpoint} is no checkpoint to resume: {file.name} is none ({what})") from error


def check_weight_names(missing: set[str], unexpected: set[str], where: str) -> None:
    """Refuse weights that are not the model's: a trainer would go on with fresh ones."""
    problems = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:NAMED])}{', ...' if len(names) > NAMED else ''})"
        for what, names in (("missing", missing), ("unknown", unexpected))
        if names
    ]
    if problems:
        raise ValueError(f"{where}: the weights are not this model's: {' and '.join(problems)}")


def load_checkpoint(load: Callable[[str], None], checkpoint: str, model: nn.Module, average: WeightAverage) -> None:
    """Let the trainer `load` weights into the model, first those of the average, where there shall be one."""
    with whole_adapters():
        if average.decay is not None:
            folder = Path(checkpoint) / AVERAGE_NAME
            if not folder.is_dir():
                raise ValueError(f"{checkpoint} has no {AVERAGE_NAME}/: ema_decay cannot begin in the middle of a run")
            load(str(folder))
            average.start(model)
        load(checkpoint)


@contextlib.contextmanager
def whole_adapters() -> Iterator[None]:
    """PEFT goes on with fresh weights where it finds none: an error here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            yield
        except UserWarning as warning:
            raise ValueError(f"the checkpoint's adapter is not this model's: {warning}") from warning
