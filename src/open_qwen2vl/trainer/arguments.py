"""Arguments of a training on packs: transformers' own, three switches, and the defaults that packs ask for.

All of `TrainingArguments` is available under its own name, in a YAML file or on the command line. Only what would be
wrong or slow for packed documents has another default here. `parse_arguments` reads the file and the command line of a
recipe; whatever is wrong with them ends in one line.
"""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import SchedulerType


@dataclass
class PackedTrainingArguments(TrainingArguments):
    """Arguments of [`PackedTrainer`].

    Args:
        train_projector (`bool`, *optional*, defaults to `True`):
            Train the projector between vision tower and language model.
        train_language_model (`bool`, *optional*, defaults to `True`):
            Train the language model: embeddings, blocks and head.
        train_vision_tower (`bool`, *optional*, defaults to `False`):
            Train the vision tower.
        per_device_train_batch_size (`int`, *optional*, defaults to 1):
            Packs, not documents: one pack of 4096 positions already holds about 23 captioned images.
        per_device_eval_batch_size (`int`, *optional*, defaults to 1):
            The same for evaluation.
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine"`):
            With `warmup_steps=0.03`, a share of all steps, the schedule of the paper.
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`):
            A NaN loss is shown. The filter would hide it, and waits for the device at every micro-batch.
        dataloader_num_workers (`int`, *optional*, defaults to 4):
            Images are decoded in these processes, which persist over epochs.
        ddp_find_unused_parameters (`bool`, *optional*, defaults to `False`):
            Every trained parameter takes part in every step, in batches without images too.

    Raises:
        ValueError: if nothing is to be trained, or for an option that this training cannot honour.
    """

    train_projector: bool = field(
        default=True, metadata={"help": "Train the projector between vision tower and language model."}
    )
    train_language_model: bool = field(
        default=True, metadata={"help": "Train the language model: embeddings, blocks and head."}
    )
    train_vision_tower: bool = field(default=False, metadata={"help": "Train the vision tower."})

    per_device_train_batch_size: int = field(default=1, metadata={"help": "Packs per device and micro-batch."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Packs per device in evaluation."})
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "Learning rate schedule, see transformers' `SchedulerType`."}
    )
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Linear warm-up: a number of steps, or below 1 a share of all steps."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between two logs, or below 1 a share of all steps."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace NaN and infinite losses in the logs by an average."}
    )
    prediction_loss_only: bool = field(
        default=True, metadata={"help": "Evaluate the loss only, without building logits."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator needs all that a pack carries."}
    )
    dataloader_num_workers: int = field(
        default=4, metadata={"help": "Processes that read and decode packs; 0 is the main process."}
    )
    dataloader_persistent_workers: bool = field(
        default=True, metadata={"help": "Keep the loader's processes between epochs."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Not needed: every trained parameter takes part in every step."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not (self.train_projector or self.train_language_model or self.train_vision_tower):
            raise ValueError("nothing to train: switch on train_projector, train_language_model or train_vision_tower")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor is not supported: it needs the logits of every position")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be false: the collator needs all that a pack carries")
        if self.dataloader_num_workers == 0:
            # torch refuses to keep workers where there are none.
            self.dataloader_persistent_workers = False
        if self.device.type == "cpu":
            # There is nothing to pin memory for, and torch warns of it.
            self.dataloader_pin_memory = False


class _Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        """End with one line instead of the usage, which has a page of options."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def destinations(self) -> dict[str, list[Any]]:
        """The actions of every option by its name (a switch that is on by default has a second, `--no_...`)."""
        actions: dict[str, list[Any]] = {}
        for action in self._actions:
            if action.option_strings and action.dest != "help":
                actions.setdefault(action.dest, []).append(action)
        return actions

    def unknown(self, option: str, where: str = "") -> None:
        """End with the option's name and the nearest known one."""
        name = option.lstrip("-").split("=")[0].replace("-", "_")
        near = difflib.get_close_matches(name, self.destinations(), n=1)
        self.error(f"{where}unknown option {option!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))

    def read_defaults(self, path: str) -> None:
        """Take the options of a YAML file as defaults, read as the command line's are."""
        try:
            options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"cannot read {path}: {' '.join(str(error).split())}")
        if not isinstance(options, dict):
            self.error(f"{path}: not a YAML file of `option: value` lines")
        known = self.destinations()
        for name, value in options.items():
            if name not in known:
                self.unknown(str(name), f"{path}: ")
            for action in known[name]:
                # As a string, so that argparse converts it: YAML takes 5e-5 for a word.
                action.default = str(value) if isinstance(value, bool | int | float | str) else value
                action.required = False


def parse_arguments(
    dataclasses: Sequence[type], description: str, argv: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """Arguments of a recipe from `CONFIG.yaml --option value ...`; an option on the command line wins.

    Args:
        dataclasses (`Sequence[type]`): their fields are the options.
        description (`str`): shown by `--help`.
        argv (`Sequence[str]`, *optional*): the command line; the process's by default.

    Returns:
        `tuple`: an instance of each dataclass. A wrong file, option or value ends the process with one line and exit
        code 2.
    """
    parser = _Parser(
        dataclasses, description=description, usage="%(prog)s [CONFIG.yaml] [--option value ...]", allow_abbrev=False
    )
    options = list(sys.argv[1:] if argv is None else argv)
    if options and not options[0].startswith("-"):
        parser.read_defaults(options.pop(0))
    for option in options:
        # Before anything else, or a mistyped option would be reported as another one that is missing.
        if option.startswith("--") and option.split("=")[0] not in parser._option_string_actions:
            parser.unknown(option)
    try:
        *parsed, unused = parser.parse_args_into_dataclasses(
            options, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    if unused:
        parser.error(f"{unused[0]!r} is no option")
    return tuple(parsed)
