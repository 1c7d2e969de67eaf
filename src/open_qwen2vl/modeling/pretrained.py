"""What both model classes share: how they are initialised and saved, and the output with a loss.

This file travels with checkpoints: it imports installed libraries and its siblings only.
"""

from dataclasses import dataclass

import torch
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaPreTrainedModel

from .configuration_open_qwen2vl import OpenQwen2VLConfig

try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # transformers 5.19, which vLLM asks for

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """`(batch, kept, hidden)`: the last positions, all for 0, or those of a tensor."""
        return hidden_states[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


@dataclass
class OpenQwen2VLCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """LLaVA's output, with the losses of each row where they are asked for.

    Args:
        row_losses (`torch.FloatTensor` of shape `(batch,)`, *optional*): sum of the losses of each row's labels,
            detached.
    """

    row_losses: torch.FloatTensor | None = None


class OpenQwen2VLPreTrainedModel(LlavaPreTrainedModel):
    """Weights' initialisation, loading and saving, shared by both model classes."""

    config: OpenQwen2VLConfig
    config_class = OpenQwen2VLConfig

    def post_init(self) -> None:
        """As in transformers, but no class that does not exist is named as not to be split (SigLIP names its head)."""
        super().post_init()
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: for custom code transformers leaves out the rules of modules without own parameters, as SigLIP's."""
        return False

    def save_pretrained(self, *args, **kwargs) -> None:
        """As in transformers, but `auto_map` names both classes of their file, not only the one that is saved."""
        if self.is_remote_code():
            module = type(self).__module__.rpartition(".")[2]
            self.config.auto_map = {
                **(getattr(self.config, "auto_map", None) or {}),
                "AutoModel": f"{module}.OpenQwen2VLModel",
                "AutoModelForImageTextToText": f"{module}.OpenQwen2VLForConditionalGeneration",
                "AutoModelForMultimodalLM": f"{module}.OpenQwen2VLForConditionalGeneration",
            }
        super().save_pretrained(*args, **kwargs)
