"""The model side of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: their parts, their cost, and the packed forward.

It rests on four private facts of transformers' models, and `QwenVL.prepare` says so by name when one is gone:
`model.visual.blocks[i].attn` with `qkv`, `proj`, `num_heads` and `scaling`; `model.visual.patch_embed` with `proj`,
a convolution; `apply_rotary_pos_emb_vision` in the model's module; `_deepstack_process` of Qwen3-VL's language model.
"""

import sys
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ...modeling.attention import PACKED_VARLEN
from ..interface import StepWork, VisionWork
from ..packed_forward import PackedForward, packed_class
from .deepstack import packed_deepstack
from .memory import language_model_kept, projector_kept, vision_tower_kept
from .patch_embedding import normalised, packed_patch_embedding
from .sizes import WINDOW_SIZE, squared_in_windows
from .tower_inputs import tower_inputs
from .vision_attention import packed_vision_attention

# Of the released checkpoints, where no processor says it.
_PIXELS = {"qwen3_vl": ([0.5] * 3, [0.5] * 3)}
_MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


class QwenVLPackedForward(PackedForward):
    """The packed forward of the three models."""

    media_names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    position_names = ("image_positions", "video_positions")
    plan_names = ("tokens_per_second",)
    # Mean and standard deviation of pixels in 0..255, of images and of videos; set by `QwenVL.prepare`.
    pixel_statistics: dict[str, tuple[list[float], list[float]]]

    def _as_stock_pixels(self, media: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # An image keeps its one frame, by which the patch embedding tells it.
        ours = {name: media[name] for name in self.pixel_statistics if name in media and media[name] is not None}
        ours = {
            name: normalised(pixels, *self.pixel_statistics[name])
            for name, pixels in ours.items()
            if pixels.dtype == torch.uint8
        }
        return {**media, **ours}

    def _encode_media(
        self, media: dict[str, Any], input_ids: torch.LongTensor
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], dict[str, Any]]:
        seen, levels = [], []
        for kind, pixels in (("image", media["pixel_values"]), ("video", media["pixel_values_videos"])):
            if pixels is None:
                continue
            positions = media[f"{kind}_positions"]
            if positions is None:
                # Not from the collator: the device is asked, and waited for.
                positions = torch.nonzero(input_ids.flatten() == getattr(self.config, f"{kind}_token_id")).squeeze(1)
            features, deepstack = self._encode(pixels, media[f"{kind}_grid_thw"])
            if len(positions) != len(features):
                raise ValueError(f"{len(positions)} placeholders of {kind}s and {len(features)} features of them")
            seen.append((positions, features))
            levels.append(deepstack)
        if not any(levels):
            return seen, {}
        # (placeholders,) in place of the stock mask; a level is (placeholders, hidden)
        positions, joined = torch.cat([own for own, _ in seen]), [torch.cat(own) for own in zip(*levels, strict=True)]
        return seen, {"visual_pos_masks": positions, "deepstack_visual_embeds": joined}

    def _encode(
        self, pixels: torch.Tensor, grids: torch.Tensor | list[list[int]]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Features `(tokens, hidden)`, and likewise for each level of a deepstack; grids in a list cause no wait."""
        tower = self.model.visual
        known = tower_inputs(tower, grids.tolist() if isinstance(grids, torch.Tensor) else grids, pixels.device)
        outputs = tower(pixels.type(tower.dtype), return_dict=True, **known)
        return outputs.pooler_output, getattr(outputs, "deepstack_features", None) or []

    def _check_plan(self, media: dict[str, Any], tokens_per_second: float | None) -> None:
        own = getattr(self.config.vision_config, "tokens_per_second", None)
        if media["video_grid_thw"] is not None and tokens_per_second not in (None, own):
            raise ValueError(
                f"positions of videos were planned with tokens_per_second {tokens_per_second}, the model's config has "
                f"{own}: plan with --tokens-per-second {own}"
            )

    def _blank_passes(self, media: dict[str, torch.Tensor | None]) -> int:
        # Images and videos are a pass each, and ranks that share a sharded tower must meet each of its collectives.
        passes = sum(media[name] is not None for name in ("pixel_values", "pixel_values_videos"))
        wanted = 2 if isinstance(self.model.visual.blocks[0], FSDPModule) else 1
        return max(0, wanted - passes)

    def _blank_media(self) -> torch.Tensor:
        vision = self.config.vision_config
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        merge = vision.spatial_merge_size
        device = self.get_input_embeddings().weight.device
        # One token: no image is smaller.
        features, deepstack = self._encode(torch.zeros(merge**2, width, device=device), [[1, merge, merge]])
        # All outputs, deepstack's too: a parameter without a gradient is one that DDP waits for.
        return 0 * sum(tensor.sum() for tensor in (features, *deepstack))


def prepare_for_packing(model: PreTrainedModel, processor: Any = None) -> PreTrainedModel:
    """Give a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model of transformers the packed forward.

    Afterwards a batch with `cu_seq_lens_q` is a batch of packs: documents do not see each other, the loss comes from
    the labelled positions only, and logits are built on request (`skip_logits=False`). It has `input_ids` and `labels`
    of shape `(packs, S)`, `position_ids` of shape `(4, packs, S)` (text, t, h, w; each from 0 in every document),
    `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k` over the flattened batch, `pixel_values` and
    `image_grid_thw` of all images in reading order, `pixel_values_videos` and `video_grid_thw` of all videos. Float
    pixels are the stock processor's; uint8 ones, `(patches, 3 * P * P)` of images, one frame, and
    `(patches, 3 * 2 * P * P)` of videos, are normalised on the device, and an image's frame doubled. Grids as nested
    lists, and `image_positions` and `video_positions` of the placeholders in the flattened batch, as
    `PackingCollator` gives them, keep the host from waiting for the device.
    `num_items_in_batch` divides the summed loss; `return_row_losses=True` returns the sum of each row. Any other batch
    meets the stock forward, and generation, `save_pretrained`, `isinstance`, PEFT and pipelines are as before.

    Args:
        model (`PreTrainedModel` or `PeftModel`): changed in place; a second call changes nothing more.
        processor (`ProcessorMixin`, *optional*): whose mean and standard deviation uint8 pixels are normalised with;
            the released checkpoints' own where not given.

    Returns:
        `PreTrainedModel`: the same object.

    Raises:
        ValueError: for another model. The forward raises it for a packed batch with an attention mask, a cache, or
            positions of another shape: each would let documents see each other in silence.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    QwenVL().prepare(base, processor)
    return model


class QwenVL:
    """What the pipeline asks of the three models; see [`PackedModel`] for its methods."""

    parts = {
        "projector": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
        "vision_tower": "model.visual.",
    }
    # Of all three; a model has two of them.
    block_classes = (
        *("Qwen2VLDecoderLayer", "Qwen2VLVisionBlock"),
        *("Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"),
        *("Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"),
    )
    # Of all three. Norms and MLPs of 2.5's tower are such, too; RoPE of the towers is another function.
    fused_classes = {
        **dict.fromkeys(("Qwen2VLRMSNorm", "Qwen2_5_VLRMSNorm", "Qwen3VLTextRMSNorm"), "rms_norm"),
        **dict.fromkeys(("Qwen2MLP", "Qwen2_5_VLMLP", "Qwen3VLTextMLP"), "swiglu"),
        **dict.fromkeys(("Qwen2VLAttention", "Qwen2_5_VLAttention", "Qwen3VLTextAttention"), "rope"),
    }

    def prepare(self, model: PreTrainedModel, processor: Any = None) -> PreTrainedModel:
        """Give a stock model the packed forward, with the pixels' statistics of its processor."""
        if model.config.model_type not in _MODEL_TYPES:
            raise ValueError(f"{model.config.model_type}: not a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model")
        if "sliding_attention" in (getattr(model.config.text_config, "layer_types", None) or []):
            raise ValueError("use_sliding_window: packed documents need full attention in every layer")
        if not isinstance(model, PackedForward):
            _check_private_facts(model)
            model.__class__ = packed_class(type(model), QwenVLPackedForward)
            for block in model.model.visual.blocks:
                block.attn.__class__ = packed_vision_attention(type(block.attn))
            embedding = model.model.visual.patch_embed
            embedding.__class__ = packed_patch_embedding(type(embedding))
            if model.config.model_type == "qwen3_vl":
                model.model.language_model.__class__ = packed_deepstack(type(model.model.language_model))
            if model.model.language_model.config._attn_implementation == "sdpa":
                # The default; an attention that was asked for stays.
                model.model.language_model.set_attn_implementation(PACKED_VARLEN)
        released = _PIXELS.get(model.config.model_type, (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        model.pixel_statistics = {}
        for name, part in (("pixel_values", "image_processor"), ("pixel_values_videos", "video_processor")):
            own = getattr(processor, part, None)
            statistics = released if own is None else (own.image_mean, own.image_std)
            # In fp32 and times 255, as the processors compute them.
            model.pixel_statistics[name] = tuple((torch.tensor(values) * 255).tolist() for values in statistics)
        return model

    def step_flops(self, config: PreTrainedConfig, work: StepWork, trained: dict[str, int]) -> int:
        """FLOPs of forward and backward over packed documents, a multiply-add being two.

        A forward is 2 FLOPs a parameter and position (patch, token), gradients of activations 2 more where something
        before them trains, gradients of weights 2 more where they train. The head counts at every real position, as is
        usual. Attention is causal within documents and full within images, or windows of them in Qwen2.5-VL.
        """
        text = config.text_config
        towers = trained.get("vision_tower", 0) + trained.get("projector", 0)
        adapter = trained.get("adapter", 0)
        passes = 3 if trained.get("language_model") else 2 if towers or adapter else 1
        language = 2 * passes * language_parameters(text) * work.tokens + 6 * adapter * work.tokens
        width = text.num_attention_heads * _head_dim(text)
        # Scores and values: 4 x width x length^2 in full, half of it causal; its backward is always needed twice.
        language += 2 * (3 if passes > 1 else 1) * text.num_hidden_layers * width * work.squared_lengths

        projector_passes = 3 if trained.get("projector") else 2 if trained.get("vision_tower") else 1
        projector = 2 * projector_passes * projector_parameters(config.vision_config) * work.vision.tokens
        vision, patches = config.vision_config, work.vision.patches
        blocks = 2 * vision_parameters(vision) * patches + _vision_attention(vision, work)
        # Pixels need no gradient.
        embedding = 2 * patch_embedding_parameters(vision) * patches
        tower = 3 * blocks + 2 * embedding if trained.get("vision_tower") else blocks + embedding
        return language + projector + tower

    def vision_work(self, config: PreTrainedConfig, images: float, tokens: float) -> VisionWork:
        """What encoding so many images costs, which take so many positions together and are of one size."""
        patches = tokens * config.vision_config.spatial_merge_size**2
        if not images:
            return VisionWork(patches, 0, tokens)
        side, window = (patches / images) ** 0.5, _window(config.vision_config)
        windowed = images * squared_in_windows((side, side), window) if window else 0
        return VisionWork(patches, patches**2 / images, tokens, windowed)

    def activation_bytes(
        self,
        config: PreTrainedConfig,
        work: StepWork,
        trained: dict[str, int],
        dtype: torch.dtype = torch.float32,
        autocast: bool = False,
        checkpoint_every: int = 0,
    ) -> float:
        """Bytes that the forward pass of a micro-batch keeps for its backward pass, the loss apart.

        `dtype` is that of the weights in use; `autocast` computes fp32 weights in bf16; every `checkpoint_every`-th
        block is computed again.
        """
        language = language_model_kept(config, bool(trained.get("language_model")), dtype, autocast)
        total = language.bytes(work.tokens, checkpoint_every)
        if trained.get("vision_tower"):
            total += vision_tower_kept(config, dtype, autocast).bytes(work.vision.patches, checkpoint_every)
        if trained.get("vision_tower") or trained.get("projector"):
            total += projector_kept(config, dtype, autocast).bytes(work.vision.patches)
        return total


def language_parameters(text: PreTrainedConfig) -> int:
    """Weights of the language model's matrices, embeddings and head counted once; biases and norms left out."""
    hidden, head_dim = text.hidden_size, _head_dim(text)
    attention = 2 * hidden * head_dim * (text.num_attention_heads + text.num_key_value_heads)
    block = attention + 3 * hidden * text.intermediate_size
    return text.num_hidden_layers * block + text.vocab_size * hidden


def projector_parameters(vision: PreTrainedConfig) -> int:
    """Weights of the mergers' matrices: one merger, and one more for each level of Qwen3-VL's deepstack."""
    merged = vision_width(vision) * vision.spatial_merge_size**2
    output = getattr(vision, "out_hidden_size", None) or vision.hidden_size
    return (1 + len(getattr(vision, "deepstack_visual_indexes", ()))) * merged * (merged + output)


def vision_parameters(vision: PreTrainedConfig) -> int:
    """Weights of the matrices of the tower's blocks."""
    width = vision_width(vision)
    inner = getattr(vision, "intermediate_size", None) or width * vision.mlp_ratio
    matrices = 3 if vision.model_type.startswith("qwen2_5") else 2  # its MLP is gated
    return vision.depth * (4 * width**2 + matrices * width * inner)


def patch_embedding_parameters(vision: PreTrainedConfig) -> int:
    """Weights of the convolution over patches of two frames."""
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * vision_width(vision)


def vision_width(vision: PreTrainedConfig) -> int:
    """Width of the tower; Qwen2-VL's `hidden_size` is that of its output."""
    return getattr(vision, "embed_dim", None) or vision.hidden_size


def _vision_attention(vision: PreTrainedConfig, work: StepWork) -> int:
    """Forward FLOPs of scores and values over the tower's segments."""
    full, in_windows, window = vision.depth, 0, _window(vision)
    if window:
        full = len(vision.fullatt_block_indexes)
        # Documents are laid out without the config, for windows of the released size; others count as whole ones.
        released = window == WINDOW_SIZE // vision.patch_size
        in_windows = (vision.depth - full) * (work.vision.windowed if released else work.vision.patches * window**2)
    return 4 * vision_width(vision) * (full * work.vision.squared + in_windows)


def _window(vision: PreTrainedConfig) -> int:
    """Patches of a window's side; 0 where no block attends in windows."""
    return vision.window_size // vision.patch_size if hasattr(vision, "fullatt_block_indexes") else 0


def _head_dim(text: PreTrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _check_private_facts(model: PreTrainedModel) -> None:
    """Fail by name where transformers has changed what this module rests on."""
    missing = []
    try:
        attention = model.model.visual.blocks[0].attn
        missing += [f"attn.{name}" for name in ("qkv", "proj", "num_heads", "scaling") if not hasattr(attention, name)]
        if not hasattr(model.model.visual.patch_embed, "proj"):
            missing.append("patch_embed.proj")
        if not hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb_vision"):
            missing.append("apply_rotary_pos_emb_vision")
        text = ["set_attn_implementation"] + ["_deepstack_process"] * (model.config.model_type == "qwen3_vl")
        missing += [f"language_model.{name}" for name in text if not hasattr(model.model.language_model, name)]
    except (AttributeError, IndexError) as error:
        missing.append(str(error))
    if missing:
        raise ValueError(f"{type(model).__name__} of this transformers cannot be packed: {', '.join(missing)}")
