"""The packed forward for transformers' own `...ForConditionalGeneration` models, by a change of the instance's class.

As torch's `fully_shard` does: the model stays an instance of its stock class, under the same name, and is saved,
loaded, adapted and generated from as before. Only a batch with `cu_seq_lens_q` takes the way below.

    packed batch   input_ids, labels (packs, S), position_ids (4, packs, S), cu_seq_lens_*, media tensors
      │ refuse what would join documents; uint8 patches are normalised; a blank image where there is none
      ▼
    embeddings (packs, S, hidden), the features of media in place of their placeholders
      ▼
    stock `model.model.language_model` ─► hidden states (packs, S, hidden) ─► loss at labelled positions, no logits
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from ..modeling.attention import packs_without_mask, shared_prefix_mask
from ..modeling.loss import selected_position_loss

_OWN_OPTIONS = ("label_positions", "skip_logits", "return_row_losses", "loss_weights")


@dataclass
class PackedOutput(CausalLMOutputWithPast):
    """Output of a packed forward: transformers' own, with the losses of each row where they are asked for."""

    row_losses: torch.FloatTensor | None = None  # sum of the losses of each row's labels, detached


class PackedForward:
    """What [`packed_class`] puts before a stock class; a family gives the names and methods that raise here."""

    # Trainer then passes num_items_in_batch, and both forwards honour it.
    accepts_loss_kwargs = True

    # Names of the forward's media tensors; the first dimension of each is 0, or it is not there, without media.
    media_names: tuple[str, ...] = ()
    # Arguments of the packed forward alone that say where the placeholders of media are, as the collator gives them.
    position_names: tuple[str, ...] = ()
    # Arguments of the forward that a plan has for all of its batches, to be compared with the config.
    plan_names: tuple[str, ...] = ()

    def _as_stock_pixels(self, media: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Media tensors in the stock model's form: ours are normalised, its own are taken as they are."""
        raise NotImplementedError

    def _encode_media(
        self, media: dict[str, Any], input_ids: torch.LongTensor
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], dict[str, Any]]:
        """Positions `(tokens,)` in the flattened batch and features `(tokens, hidden)` of each kind of media that is
        there, and what else the language model takes of them.

        `media` has the values of `media_names` and `position_names`, None where not given.
        """
        raise NotImplementedError

    def _check_plan(self, media: dict[str, Any], **options: Any) -> None:
        """Refuse what a plan says of the model by `plan_names` and the model's config does not."""

    def _blank_passes(self, media: dict[str, torch.Tensor | None]) -> int:
        """How often the tower runs on blank media in a batch that has these."""
        return int(not _is_any(media))

    def _blank_media(self) -> torch.Tensor:
        """A scalar 0 computed by the whole vision tower."""
        raise NotImplementedError

    @can_return_tuple
    def _forward_packed(
        self,
        input_ids: torch.LongTensor,
        position_ids: torch.LongTensor,
        labels: torch.LongTensor | None = None,
        label_positions: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool | None = None,
        return_row_losses: bool = False,
        loss_weights: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> PackedOutput:
        media = {name: kwargs.pop(name, None) for name in (*self.media_names, *self.position_names)}
        self._check_plan(media, **{name: kwargs.pop(name, None) for name in self.plan_names})
        # A batch without images has the same gradients and collectives as others.
        blank = sum(self._blank_media() for _ in range(self._blank_passes(media)))
        # Before the embeddings: FSDP2 shards these apart, and all ranks must gather the same units in the same order.
        seen, options = self._encode_media(media, input_ids)
        embeds = self.get_input_embeddings()(input_ids)
        for positions, features in seen:
            flat = embeds.flatten(0, 1)
            embeds = flat.index_copy(0, positions, features.to(flat.device, flat.dtype)).view_as(embeds)
        if isinstance(blank, torch.Tensor):
            embeds = embeds + blank.to(embeds.device, embeds.dtype)
        config = self.model.language_model.config
        if kwargs.get("key_positions") is not None:
            options = {**options, "attention_mask": shared_prefix_mask(config, embeds, position_ids[0])}
        # Row 0 is for masks by position, of which packed_varlen has none: with it S x S would be built in vain.
        rows = position_ids[1:] if packs_without_mask(config._attn_implementation) else position_ids
        # Not through the stock `model.model`, which looks for placeholders and waits for the device to do so.
        outputs = self.model.language_model(
            inputs_embeds=embeds, position_ids=rows, use_cache=False, **options, **kwargs
        )
        hidden = outputs.last_hidden_state
        loss = row_losses = logits = None
        if labels is not None:
            loss, row_losses = selected_position_loss(
                hidden, self.lm_head, labels, num_items_in_batch, True, label_positions, loss_weights=loss_weights
            )
        if not (labels is not None if skip_logits is None else skip_logits):
            logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        return PackedOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            row_losses=row_losses if return_row_losses else None,
        )


# Cached, so that two models of a stock class are of one class afterwards, too.
@functools.cache
def packed_class(stock: type[PreTrainedModel], mixin: type[PackedForward]) -> type[PreTrainedModel]:
    """A subclass of a stock class, under its name, whose forward takes packed batches too."""
    signature = inspect.signature(stock.forward)
    names = [name for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD]
    own_names = (*_OWN_OPTIONS, *mixin.plan_names, *mixin.position_names)

    @functools.wraps(stock.forward)
    def forward(self, *args, **kwargs):
        kwargs |= dict(zip(names[1:], args, strict=False))
        kwargs |= self._as_stock_pixels({name: kwargs[name] for name in self.media_names if name in kwargs})
        # Boundaries make a batch a packed one; any other, as in generation, meets the stock model.
        if kwargs.get("cu_seq_lens_q") is None:
            for name in ("return_row_losses", "loss_weights"):
                if kwargs.get(name) is not None and kwargs[name] is not False:
                    raise ValueError(f"{name} needs a packed batch (cu_seq_lens_q)")
            return stock.forward(self, **{name: kwargs[name] for name in kwargs if name not in own_names})
        _check_packed_arguments(kwargs)
        return self._forward_packed(**{name: value for name, value in kwargs.items() if name not in _NOT_IN_PACKS})

    # Before **kwargs, which has to stay last.
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in own_names]
    parameters = list(signature.parameters.values())
    # `generate` and Trainer look at the names that a forward takes.
    forward.__signature__ = signature.replace(parameters=[*parameters[:-1], *own, parameters[-1]])
    namespace = {"forward": forward, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (mixin, stock), namespace)


def _is_any(media: dict[str, torch.Tensor | None]) -> bool:
    return any(tensor is not None and len(tensor) for tensor in media.values())


# Checked, then dropped: they say nothing in a packed batch, or are computed from all of it as if it were one document.
_NOT_IN_PACKS = ("attention_mask", "past_key_values", "use_cache", "mm_token_type_ids", "inputs_embeds",
                 "second_per_grid_ts", "mm_encoder_outputs")  # fmt: skip


def _check_packed_arguments(arguments: dict[str, Any]) -> None:
    positions, input_ids = arguments.get("position_ids"), arguments.get("input_ids")
    if input_ids is None or arguments.get("inputs_embeds") is not None:
        raise ValueError("a packed batch (cu_seq_lens_q) takes input_ids, not inputs_embeds")
    if arguments.get("mm_encoder_outputs") is not None:
        raise ValueError("a packed batch (cu_seq_lens_q) takes pixels, not mm_encoder_outputs")
    if positions is None or tuple(positions.shape) != (4, *input_ids.shape):
        given = "none" if positions is None else f"of shape {tuple(positions.shape)}"
        raise ValueError(
            f"a packed batch (cu_seq_lens_q) needs position_ids of shape {(4, *input_ids.shape)}, given are {given}: "
            "rows text, t, h, w, each from 0 in every document; with fewer rows documents would see each other"
        )
    if arguments.get("attention_mask") is not None:
        raise ValueError("a packed batch (cu_seq_lens_q) takes no attention_mask: it would join the documents")
    if arguments.get("past_key_values") is not None or arguments.get("use_cache"):
        raise ValueError("a packed batch (cu_seq_lens_q) takes no cache: it would join the documents")
