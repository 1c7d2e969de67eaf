"""The model side of the toy family: patches of a colour, shown to a tiny Qwen2; two rows of positions."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2Model
from transformers.modeling_outputs import CausalLMOutputWithPast

from open_qwen2vl.families.interface import StepWork
from open_qwen2vl.modeling.loss import selected_position_loss


class ToyConfig(PreTrainedConfig):
    model_type = "toy"

    def __init__(self, vocab_size: int = 400, image_token_id: int = 3, **kwargs):
        self.vocab_size, self.image_token_id = vocab_size, image_token_id
        super().__init__(**kwargs)


class ToyForConditionalGeneration(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.text = Qwen2Model(Qwen2Config(vocab_size=config.vocab_size, num_key_value_heads=2, **sizes))
        self.eyes = nn.Linear(3, 16)
        self.bridge = nn.Linear(16, 32)
        self.lines = nn.Embedding(64, 32)
        self.lm_head = nn.Linear(32, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids, position_ids, labels=None, patches=None, grids=None, label_positions=None,
        num_items_in_batch=None, return_row_losses=False, skip_logits=None, **kwargs,
    ):  # fmt: skip
        if position_ids.dim() != 3 or len(position_ids) != 2:
            raise ValueError("a packed batch needs two rows of positions")
        embeds = self.text.embed_tokens(input_ids) + self.lines(position_ids[1] % 64)
        colours = torch.zeros(1, 3) if patches is None else patches.float() / 255
        seen = self.bridge(self.eyes(colours))
        if patches is None:
            embeds = embeds + 0 * seen.sum()
        else:
            embeds = embeds.masked_scatter((input_ids == self.config.image_token_id)[..., None], seen)
        hidden = self.text(inputs_embeds=embeds, position_ids=position_ids[0], use_cache=False).last_hidden_state
        loss, rows = selected_position_loss(hidden, self.lm_head, labels, num_items_in_batch, True, label_positions)
        output = CausalLMOutputWithPast(loss=loss)
        output["row_losses"] = rows
        return output


class ToyPackedModel:
    """Nothing but this is needed to train it."""

    parts = {"projector": "bridge.", "vision_tower": "eyes."}
    block_classes = ("Qwen2DecoderLayer",)
    fused_classes = {}

    def prepare(self, model: PreTrainedModel, processor: Any = None) -> PreTrainedModel:
        return model

    def step_flops(self, config: ToyConfig, work: StepWork, trained: dict[str, int]) -> int:
        return 1000 * work.tokens + work.vision.patches
