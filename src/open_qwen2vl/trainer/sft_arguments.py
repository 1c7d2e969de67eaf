"""Arguments of supervised fine-tuning: TRL's, with the few that packs and our loss decide for themselves refused.

Apart from `arguments.py`, so that pre-training does not import TRL.
"""

from dataclasses import dataclass, field

import torch
from trl import SFTConfig

from .arguments import PackedArguments


@dataclass
class PackedSFTConfig(PackedArguments, SFTConfig):
    """Arguments of [`PackedSFTTrainer`]: [`PackedArguments`] and all of `trl.SFTConfig`.

    Args:
        max_length (`int`, *optional*, defaults to 4096):
            Longest conversation of an unpacked data set; a longer one is left out and counted, never cut. Packs have
            the length that they were planned for. None takes any.
        assistant_only_loss (`bool`, *optional*, defaults to `True`):
            Labels are the answers with their end of turn; they cannot be anything else.
        activation_checkpointing (`bool`, *optional*, defaults to `True`):
            Compute the activations of a block again in the backward pass: TRL's default, under the name that replaces
            its `gradient_checkpointing`.
        bf16 (`bool`, *optional*):
            As in TRL on by default without `fp16`, but not on a CPU, which is faster in fp32.

    Raises:
        ValueError: for options of TRL that this training cannot honour.
    """

    max_length: int | None = field(
        default=4096, metadata={"help": "Longest conversation of an unpacked data set; longer ones are left out."}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Old name of activation_checkpointing.", "nargs": "?", "const": True}
    )
    assistant_only_loss: bool = field(
        default=True, metadata={"help": "Must stay on: labels are the answers with their end of turn."}
    )

    def __post_init__(self):
        if self.bf16 is None and (self.use_cpu or not torch.accelerator.is_available()):
            self.bf16 = False
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        super().__post_init__()
