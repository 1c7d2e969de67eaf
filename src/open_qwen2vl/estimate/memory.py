"""What a training step keeps in a GPU's memory, before anything is loaded.

Parameters are counted on the meta device. Activations are counted too and not guessed, by the model's family. What no
count reaches (CUDA's own memory, fragmentation) is a stated reserve.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from ..families import packed_model
from ..families.interface import StepWork, VisionWork
from ..modeling.loss import CHUNK_BYTES
from ..trainer.optimization import LANGUAGE_MODEL, part_of
from ..trainer.options import MUON

GIB = 2**30
# Context, kernels and libraries of CUDA; and what the allocator cannot use, as a share of the rest.
RESERVED_BYTES, FRAGMENTATION = 1.5 * GIB, 0.05
# Optimizer states: values of the weights' own type for each trained parameter; the 8-bit ones in bytes.
STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "adagrad": 1, "rmsprop": 1, "lion_32bit": 1, "sgd": 0}
STATES[MUON] = 1  # of a matrix; embeddings and head are AdamW's
BYTES_OF_8_BIT = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "adamw_torch_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1}


PARTS = ("vision_tower", "projector", LANGUAGE_MODEL)


@dataclass(frozen=True)
class MicroBatch:
    """What one device works on at a time."""

    positions: int  # of its packs, padding included
    images: int
    labels: int  # labelled positions
    vision: VisionWork  # of the images


@dataclass(frozen=True)
class Training:
    """What a recipe's options mean for memory."""

    trained: frozenset[str]  # parts that train, of `vision_tower`, `projector`, `language_model`
    dtype: torch.dtype = torch.float32  # type of the weights
    bf16: bool = True  # whether it computes in bf16
    optim: str = "adamw_torch_fused"  # the optimizer's name
    accumulation: int = 1  # micro-batches of an optimizer step
    checkpoint_every: int = 0  # every n-th block is computed again in the backward pass; 0 for none
    averaged: bool = False  # whether a moving average of the weights is kept
    fused_by: str = ""  # norms, RoPE and SwiGLU: `kernels` (Liger's), `compiled`; what follows is for the time alone
    bf16_residual: bool = False  # whether blocks are added up in bf16
    float8: bool = False  # whether the language model's products are in float8
    workers: int = 0  # of the loader


def parameters_by_part(config: PreTrainedConfig) -> dict[str, int]:
    """Parameters of `vision_tower`, `projector` and `language_model` of the model that a config describes, on meta."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    parts = packed_model(config).parts
    counts = dict.fromkeys((*parts, LANGUAGE_MODEL), 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name, parts)] += parameter.numel()
    return counts


def step_memory(
    config: PreTrainedConfig,
    training: Training,
    batch: MicroBatch,
    num_gpus: int = 1,
    sharded: bool = False,
    counts: dict[str, int] | None = None,
) -> dict[str, float]:
    """Bytes on each GPU at the fullest moment of a step, the end of a forward pass.

    Parts: `weights`, `gradients` (DDP's buckets are these), `optimizer`, `gathered` (FSDP2: blocks in use), `pixels`
    (of this micro-batch and the next), `activations`, `loss`, `average` where there is one, and `reserve`. `counts`
    are those of [`parameters_by_part`], where they are known. Under HSDP `num_gpus` are those of a machine. Within 5 %
    of steps on tensors without contents, but for the reserve (`tests/estimate/test_fake_step.py`).
    """
    counts = counts or parameters_by_part(config)
    shards = num_gpus if sharded else 1
    size = training.dtype.itemsize
    trained = sum(counts[part] for part in training.trained)
    # A frozen tower is in bf16, and FSDP2 leaves it whole on each GPU; a frozen language model is sharded like others.
    frozen_tower = 0 if "vision_tower" in training.trained else counts["vision_tower"]
    others = sum(counts.values()) - frozen_tower
    compute = torch.bfloat16 if training.bf16 else training.dtype
    figures = {
        "weights": others * size / shards + frozen_tower * (2 if training.bf16 else size),
        "gradients": _gradient_bytes(trained, size, shards if sharded else 0, training.accumulation),
        "optimizer": _optimizer_bytes(config, training, trained) / shards,
        "gathered": _gathered_bytes(config, counts[LANGUAGE_MODEL], trained, training) if sharded else 0,
        "pixels": 2 * 3 * config.vision_config.patch_size**2 * batch.vision.patches,
        "activations": activation_bytes(config, training, batch, sharded),
        "loss": loss_bytes(config.text_config, batch.labels, compute, "language_model" in training.trained, sharded),
    }
    if training.averaged:
        figures["average"] = trained * size / shards
    return {**figures, "reserve": RESERVED_BYTES + FRAGMENTATION * sum(figures.values())}


def optimizer_bytes(optim: str, size: int) -> int:
    """Bytes of an optimizer's states for each trained parameter."""
    if optim in BYTES_OF_8_BIT:
        return BYTES_OF_8_BIT[optim]
    if optim not in STATES:
        raise ValueError(
            f"optim: the memory of {optim!r} is not known; known are {', '.join(STATES | BYTES_OF_8_BIT)}"
        )
    return STATES[optim] * size


def _gradient_bytes(trained: int, size: int, shards: int, accumulation: int) -> float:
    """Under FSDP2 (`shards` not 0) whole ones in fp32 until accumulation ends, and only then shards."""
    return 4 * trained if shards and accumulation > 1 else trained * size / max(shards, 1)


def _optimizer_bytes(config: PreTrainedConfig, training: Training, trained: int) -> int:
    size = training.dtype.itemsize
    of_adamw = embedding_parameters(config) if training.optim == MUON and LANGUAGE_MODEL in training.trained else 0
    return trained * optimizer_bytes(training.optim, size) + of_adamw * size


def embedding_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the embeddings, and of the head where it is not tied to them."""
    text = config.text_config
    tied = getattr(text, "tie_word_embeddings", False) or getattr(config, "tie_word_embeddings", False)
    return text.vocab_size * text.hidden_size * (1 if tied else 2)


def _gathered_bytes(config: PreTrainedConfig, parameters: int, trained: int, training: Training) -> float:
    """FSDP2: weights of the root and two blocks, and their fp32 gradients where they are not kept whole anyway."""
    embeddings = embedding_parameters(config)
    block = (parameters - embeddings) / config.text_config.num_hidden_layers
    weights = (2 if training.bf16 else training.dtype.itemsize) * (embeddings + 2 * block)
    return weights + (0 if training.accumulation > 1 else 4 * min(trained, embeddings + 2 * block))


def activation_bytes(config: PreTrainedConfig, training: Training, batch: MicroBatch, sharded: bool = False) -> float:
    """Bytes that the forward pass of a micro-batch keeps, the loss apart, with the weights that autocast copies."""
    # FSDP2 hands bf16 weights to the blocks; autocast makes its own copies, and leaves the residual stream in fp32.
    dtype = torch.bfloat16 if sharded and training.bf16 else training.dtype
    return packed_model(config).activation_bytes(
        config,
        StepWork(batch.positions, 0, batch.images, batch.vision),
        {part: 1 for part in training.trained},
        dtype=dtype,
        autocast=training.bf16 and dtype != torch.bfloat16,
        checkpoint_every=training.checkpoint_every,
    )


def loss_bytes(
    text_config: PreTrainedConfig, labels: int, compute: torch.dtype, trained: bool, sharded: bool = False
) -> float:
    """Bytes that the loss takes at its fullest: a chunk of logits and its softmax, the head's copy and gradient."""
    row = text_config.vocab_size * compute.itemsize
    rows = max(1, min(labels, CHUNK_BYTES // row))
    chunk = rows * (row + 4 * text_config.vocab_size)
    head = text_config.vocab_size * text_config.hidden_size
    # Summed in fp32 where there is more than one chunk, then once more in the type of the computation.
    gradient = head * (compute.itemsize + (4 if rows < labels and compute.itemsize < 4 else 0))
    # FSDP2 gathers the head in that type.
    copied = head * compute.itemsize if compute.itemsize < 4 and not sharded else 0
    return chunk + copied + gradient * trained + labels * text_config.hidden_size * compute.itemsize
