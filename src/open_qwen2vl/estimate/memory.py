"""What a training step keeps in a GPU's memory, before anything is loaded.

Parameters are counted on the meta device. Activations are counted too and not guessed: one and two blocks run on fake
tensors, which have shapes and no memory, what autograd would keep of them is added up, and the difference is a block.
What no count reaches (CUDA's own memory, fragmentation) is a stated reserve.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, PreTrainedConfig, SiglipVisionModel
from transformers.initialization import no_init_weights

from ..families import packed_model
from ..families.open_qwen2vl_model import language_model_parameters
from ..modeling.loss import CHUNK_BYTES
from ..modeling.modeling_open_qwen2vl import OpenQwen2VLForConditionalGeneration, OpenQwen2VLMultiModalProjector
from ..trainer.optimization import LANGUAGE_MODEL, part_of
from .figures import GIB

# Context, kernels and libraries of CUDA; and what the allocator cannot use, as a share of the rest.
RESERVED_BYTES, FRAGMENTATION = 1.5 * GIB, 0.05
# Optimizer states: values of the weights' own type for each trained parameter; the 8-bit ones in bytes.
STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "adagrad": 1, "rmsprop": 1, "lion_32bit": 1, "sgd": 0}
BYTES_OF_8_BIT = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1}


@dataclass(frozen=True)
class MicroBatch:
    """What one device works on at a time.

    Attributes:
        positions (`int`): of its packs, padding included.
        images (`int`): images in them.
        labels (`int`): labelled positions.
        image_seq_length (`int`): tokens per image.
    """

    positions: int
    images: int
    labels: int
    image_seq_length: int


@dataclass(frozen=True)
class Training:
    """What a recipe's options mean for memory.

    Attributes:
        trained (`frozenset[str]`): parts that train, of `vision_tower`, `projector`, `language_model`.
        dtype (`torch.dtype`): type of the weights.
        bf16 (`bool`): whether it computes in bf16.
        optim (`str`): the optimizer's name.
        accumulation (`int`): micro-batches of an optimizer step.
        checkpoint_every (`int`): every n-th block is computed again in the backward pass; 0 for none.
    """

    trained: frozenset[str]
    dtype: torch.dtype = torch.float32
    bf16: bool = True
    optim: str = "adamw_torch_fused"
    accumulation: int = 1
    checkpoint_every: int = 0


@dataclass(frozen=True)
class Kept:
    """What autograd keeps of a stack of equal blocks.

    Attributes:
        block (`float`): bytes of a block for each position or image.
        rest (`float`): bytes outside of the blocks, likewise.
        copies (`float`): bytes of a block's weights in the type that it computes in, whatever the batch.
        entrance (`float`): bytes that enter a block, for each position or image.
        blocks (`int`): number of blocks.
    """

    block: float
    rest: float
    copies: float
    entrance: float
    blocks: int

    def bytes(self, units: int, checkpoint_every: int = 0) -> float:
        """Bytes kept of a batch of positions or images, with one block more: that of the backward pass.

        Copies are those of all blocks: autocast holds them until the end of the forward pass.
        """
        again = math.ceil(self.blocks / checkpoint_every) if checkpoint_every else 0
        whole = self.blocks - again + 1
        return units * (whole * self.block + again * self.entrance + self.rest) + self.blocks * self.copies


def parameters_by_part(config: PreTrainedConfig) -> dict[str, int]:
    """Parameters of the model that a config describes.

    Args:
        config (`OpenQwen2VLConfig`): the config.

    Returns:
        `dict[str, int]`: of `vision_tower`, `projector` and `language_model`, a tied head counted once.
    """
    with torch.device("meta"):
        model = OpenQwen2VLForConditionalGeneration(config)
    model.tie_weights()
    parts = packed_model(config).parts
    counts = dict.fromkeys((*parts, LANGUAGE_MODEL), 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name, parts)] += parameter.numel()
    return counts


def step_memory(
    config: PreTrainedConfig, training: Training, batch: MicroBatch, num_gpus: int = 1, sharded: bool = False
) -> dict[str, float]:
    """Bytes on each GPU at the fullest moment of a step, the end of a forward pass.

    Args:
        config (`OpenQwen2VLConfig`): the model's config.
        training ([`Training`]): what trains and how.
        batch ([`MicroBatch`]): one device's packs.
        num_gpus (`int`, *optional*, defaults to 1): data-parallel GPUs.
        sharded (`bool`, *optional*, defaults to `False`): whether FSDP2 shards what trains; DDP otherwise.

    Returns:
        `dict[str, float]`: bytes by `weights`, `gradients`, `optimizer`, `gathered` (FSDP2: blocks in use), `buckets`
        (DDP: gradients on their way), `activations`, `loss` and `reserve`.

    Raises:
        ValueError: for an optimizer whose states are not known.
    """
    counts = parameters_by_part(config)
    shards = num_gpus if sharded else 1
    size = training.dtype.itemsize
    trained = sum(counts[part] for part in training.trained)
    # A frozen tower is in bf16, and FSDP2 leaves it whole on each GPU; a frozen language model is sharded like others.
    frozen_tower = 0 if "vision_tower" in training.trained else counts["vision_tower"]
    others = sum(counts.values()) - frozen_tower
    compute = torch.bfloat16 if training.bf16 else training.dtype
    figures = {
        "weights": others * size / shards + frozen_tower * (2 if training.bf16 else size),
        "gradients": trained * size / shards,
        "optimizer": trained * optimizer_bytes(training.optim, size) / shards,
        "gathered": _gathered_bytes(config, trained, training) if sharded else 0,
        "buckets": trained * size if num_gpus > 1 and not sharded else 0,
        "activations": activation_bytes(config, training, batch, sharded),
        "loss": loss_bytes(config.text_config, batch.labels, compute, "language_model" in training.trained),
    }
    return {**figures, "reserve": RESERVED_BYTES + FRAGMENTATION * sum(figures.values())}


def optimizer_bytes(optim: str, size: int) -> int:
    """Bytes of an optimizer's states for each trained parameter.

    Args:
        optim (`str`): its name in `TrainingArguments`.
        size (`int`): bytes of a weight.

    Returns:
        `int`: their number. One that is not in the tables is a ValueError.
    """
    if optim in BYTES_OF_8_BIT:
        return BYTES_OF_8_BIT[optim]
    if optim not in STATES:
        raise ValueError(
            f"optim: the memory of {optim!r} is not known; known are {', '.join(STATES | BYTES_OF_8_BIT)}"
        )
    return STATES[optim] * size


def _gathered_bytes(config: PreTrainedConfig, trained: int, training: Training) -> float:
    """FSDP2: weights of the root and two blocks, and fp32 gradients: theirs, or all until accumulation ends."""
    text = config.text_config
    embeddings = text.vocab_size * text.hidden_size
    block = (language_model_parameters(text) - embeddings) / text.num_hidden_layers
    weights = (2 if training.bf16 else training.dtype.itemsize) * (embeddings + 2 * block)
    gradients = trained if training.accumulation > 1 else min(trained, embeddings + 2 * block)
    return weights + 4 * gradients


def activation_bytes(config: PreTrainedConfig, training: Training, batch: MicroBatch, sharded: bool = False) -> float:
    """Bytes that the forward pass of a micro-batch keeps for its backward pass, the loss apart.

    Args:
        config (`OpenQwen2VLConfig`): the model's config.
        training ([`Training`]): what trains and how.
        batch ([`MicroBatch`]): the micro-batch.
        sharded (`bool`, *optional*, defaults to `False`): under FSDP2, where weights are in bf16 already.

    Returns:
        `float`: bytes, with the copies of the weights that autocast makes.
    """
    # FSDP2 hands bf16 weights to the blocks; autocast makes its own copies, and leaves the residual stream in fp32.
    dtype = torch.bfloat16 if sharded and training.bf16 else training.dtype
    autocast = training.bf16 and dtype != torch.bfloat16
    every = training.checkpoint_every
    total = language_model_kept(config, "language_model" in training.trained, dtype, autocast).bytes(
        batch.positions, every
    )
    if "vision_tower" in training.trained:
        total += vision_tower_kept(config, dtype, autocast).bytes(batch.images, every)
    if training.trained & {"vision_tower", "projector"}:
        total += batch.images * _projector_bytes(config, batch.image_seq_length, dtype, autocast)
    return total


def language_model_kept(config: PreTrainedConfig, trained: bool, dtype: torch.dtype, autocast: bool) -> Kept:
    """What is kept of the language model, for each position."""

    def run(blocks: int, positions: int) -> tuple[nn.Module, Callable[[], object]]:
        text = copy.deepcopy(config.text_config)
        text.num_hidden_layers, text.layer_types = blocks, text.layer_types[:blocks]
        model = AutoModel.from_config(text, attn_implementation="sdpa", dtype=dtype).requires_grad_(trained)
        embeds = torch.empty(1, positions, text.hidden_size, dtype=dtype, requires_grad=True)
        # Without masks, as for packed documents.
        masks = dict.fromkeys(text.layer_types)
        return model, lambda: model(inputs_embeds=embeds, attention_mask=masks, use_cache=False)

    entrance = config.text_config.hidden_size * dtype.itemsize
    return _kept(run, 64, config.text_config.num_hidden_layers, entrance, autocast)


def vision_tower_kept(config: PreTrainedConfig, dtype: torch.dtype, autocast: bool) -> Kept:
    """What is kept of a vision tower that trains, for each image."""

    def run(blocks: int, images: int) -> tuple[nn.Module, Callable[[], object]]:
        vision = copy.deepcopy(config.vision_config)
        vision.num_hidden_layers, vision.vision_use_head = blocks, False
        model = SiglipVisionModel._from_config(vision, attn_implementation="sdpa", dtype=dtype)
        pixels = torch.empty(images, 3, vision.image_size, vision.image_size, dtype=dtype)
        return model, lambda: model(pixels)

    entrance = config.patches_per_side**2 * config.vision_config.hidden_size * dtype.itemsize
    return _kept(run, 1, config.num_vision_blocks, entrance, autocast)


def _projector_bytes(config: PreTrainedConfig, image_seq_length: int, dtype: torch.dtype, autocast: bool) -> float:
    def saved(images: int) -> int:
        projector = OpenQwen2VLMultiModalProjector(config)
        features = torch.empty(images, config.patches_per_side**2, config.vision_config.hidden_size)
        return _saved_bytes(projector, lambda: projector(features, image_seq_length), autocast)

    with FakeTensorMode():
        # The projector is made in fp32, whatever the model's type.
        return (saved(2) - saved(1)) * dtype.itemsize / 4


def _kept(run: Callable[[int, int], tuple], units: int, blocks: int, entrance: float, autocast: bool) -> Kept:
    """From one block and two, of one size of batch and twice that."""
    with FakeTensorMode(), no_init_weights():
        one, two, one_twice, two_twice = (
            _saved_bytes(*run(number, size), autocast) for size in (units, 2 * units) for number in (1, 2)
        )
    block = ((two_twice - one_twice) - (two - one)) / units
    return Kept(
        block=block,
        rest=(one_twice - one) / units - block,
        copies=two - one - block * units,
        entrance=entrance,
        blocks=blocks,
    )


def _saved_bytes(model: nn.Module, run: Callable[[], object], autocast: bool) -> int:
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    model.train()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def loss_bytes(text_config: PreTrainedConfig, labels: int, compute: torch.dtype, trained: bool) -> float:
    """Bytes that the loss takes at its fullest: a chunk of logits and its softmax, the head's copy and gradient.

    Args:
        text_config (`PreTrainedConfig`): the language model's config.
        labels (`int`): labelled positions of a micro-batch.
        compute (`torch.dtype`): type of the computation.
        trained (`bool`): whether the head trains.

    Returns:
        `float`: their number.
    """
    row = text_config.vocab_size * compute.itemsize
    rows = max(1, min(labels, CHUNK_BYTES // row))
    chunk = rows * (row + 4 * text_config.vocab_size)
    head = text_config.vocab_size * text_config.hidden_size
    # Summed in fp32 where there is more than one chunk, then once more in the type of the computation.
    gradient = head * (compute.itemsize + (4 if rows < labels and compute.itemsize < 4 else 0))
    copied = head * compute.itemsize if compute.itemsize < 4 else 0
    return chunk + copied + gradient * trained + labels * text_config.hidden_size * compute.itemsize
