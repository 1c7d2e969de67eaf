"""The largest number of bytes that a training step has at once, on tensors without contents.

    config of fewer blocks ─► model ─► FSDP2 of accelerate's own function, on ranks that do not exist ─► two steps

Tensors lie on the CPU, for backward looks for a real device. What differs on a GPU is made as there: varlen attention,
and the softmax over a whole chunk of logits.
"""

import contextlib
import copy
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers.initialization import no_init_weights

from open_qwen2vl import OpenQwen2VLConfig, OpenQwen2VLForConditionalGeneration
from open_qwen2vl.estimate.memory import MicroBatch, Training
from open_qwen2vl.families import packed_model
from open_qwen2vl.modeling import attention, loss
from open_qwen2vl.trainer.sharding import configure_fsdp

FSDP_OPTIONS = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", "reshard_after_forward": True}
BLOCKS = ["Qwen2DecoderLayer", "SiglipEncoderLayer"]  # as in recipes/accelerate/fsdp2_8gpu.yaml


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that are alive, each counted once; `peak` is the largest sum since it was set."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors come by themselves
        output = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda tensor: self._see(tensor.untyped_storage()), output)
        return output

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._forget, key)
        self.live += storage.nbytes() - self._sizes[key]
        self._sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Counts, also what FSDP does without an operator: its gathered weights are storages that it resizes."""
        resize = torch.UntypedStorage.resize_

        def resize_and_see(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resized = resize(storage, size)
            if storage._cdata in self._sizes:
                self._see(storage)
            return resized

        with self, mock.patch.object(torch.UntypedStorage, "resize_", resize_and_see):
            yield


def config_of(recipe: str) -> OpenQwen2VLConfig:
    """The 2B model's, or with the widths of Qwen2.5-0.5B: no config can be fetched here."""
    config = OpenQwen2VLConfig()
    if "0.5b" in recipe:
        text = config.text_config
        text.hidden_size, text.intermediate_size, text.num_attention_heads = 896, 4864, 14
        text.num_hidden_layers, text.layer_types = 24, text.layer_types[:24]
    return config


def with_blocks(config: OpenQwen2VLConfig, blocks: int) -> OpenQwen2VLConfig:
    """The same widths with so many blocks in each backbone."""
    config = copy.deepcopy(config)
    text = config.text_config
    text.num_hidden_layers, text.layer_types = blocks, text.layer_types[:blocks]
    config.vision_config.num_hidden_layers = blocks + 1  # of which the last is not there
    return config


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    varlen = mock.patch.object(attention, "runs_varlen", lambda device, dtype: True)
    with varlen, mock.patch.object(loss, "CACHED_ROWS", 10**9):
        yield


@contextlib.contextmanager
def fake_ranks(replicas: int, shards: int) -> Iterator[SimpleNamespace]:
    """What accelerate's function asks of an accelerator, on rank 0 of ranks that do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=replicas * shards)
    try:
        parallelism = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards)
        plugin = FullyShardedDataParallelPlugin(transformer_cls_names_to_wrap=BLOCKS, **FSDP_OPTIONS)
        plugin.set_mixed_precision("bf16")
        yield SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            torch_device_mesh=parallelism.build_device_mesh("cpu"),
            parallelism_config=parallelism,
            device=torch.device("cpu"),
            mixed_precision="bf16",
            is_main_process=True,
        )
    finally:
        dist.destroy_process_group()


def make_model(config: OpenQwen2VLConfig, training: Training) -> nn.Module:
    """A model without contents, as the trainer makes it: what does not train is frozen, its tower in bf16."""
    with no_init_weights():
        model = OpenQwen2VLForConditionalGeneration._from_config(config, attn_implementation="packed_varlen")
    model.tie_weights()
    parts = {
        "vision_tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language_model": model.model.language_model,
    }
    for name, part in parts.items():
        part.requires_grad_(name in training.trained)
    if "vision_tower" not in training.trained:
        for module in parts["vision_tower"].modules():
            for name, parameter in module.named_parameters(recurse=False):
                # `to` would swap tensors, which fakes do not allow.
                setattr(module, name, nn.Parameter(parameter.detach().bfloat16(), requires_grad=False))
    if training.checkpoint_every:
        model.activation_checkpointing_enable(every_n_layers=training.checkpoint_every)
    return model.train()


def shard(model: nn.Module, accelerator: SimpleNamespace) -> nn.Module:
    """Shard by our configuration and accelerate's own function."""
    configure_fsdp(accelerator.state.fsdp_plugin, model, packed_model(model.config))
    with mock.patch.object(type(model.model.vision_tower), "to", lambda module, *args, **kwargs: module):
        return fsdp2_prepare_model(accelerator, model)


def make_batch(config: OpenQwen2VLConfig, work: MicroBatch, packs: int, documents: int) -> dict[str, Any]:
    """A micro-batch without contents, as the collator makes it."""
    ids = torch.zeros(packs, work.positions // packs, dtype=torch.long)
    size = config.vision_config.image_size
    boundaries = torch.zeros(documents + 1, dtype=torch.int32)
    return {
        "input_ids": ids,
        "position_ids": ids.clone(),
        "labels": ids.clone(),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": work.positions // documents,
        "max_length_k": work.positions // documents,
        "pixel_values": torch.zeros(work.images, 3, size, size, dtype=torch.uint8),
        "image_positions": torch.zeros(round(work.vision.tokens), dtype=torch.long),
        "label_positions": torch.zeros(work.labels, dtype=torch.long),
        "num_items_in_batch": torch.zeros((), dtype=torch.long),
        "image_seq_length": config.image_seq_length,
    }


def peak_bytes(
    config: OpenQwen2VLConfig,
    training: Training,
    work: MicroBatch,
    packs: int,
    accelerator: SimpleNamespace | None = None,
) -> int:
    """Of the second step of two, when the optimizer has its states, in as many micro-batches as it takes to tell."""
    counter, documents = LiveBytes(), max(1, work.images)
    with _as_on_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True), counter.watching():
        model = make_model(config, training)
        if accelerator is not None:
            model = shard(model, accelerator)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, fused=True)
        batch = make_batch(config, work, packs, documents)
        pixels = batch["pixel_values"].clone()  # of the next micro-batch, which is already there
        for micro_batches in (1, min(2, training.accumulation)):
            counter.peak = 0
            for number in range(micro_batches):
                if accelerator is not None:
                    model.set_requires_gradient_sync(number == micro_batches - 1)
                with torch.autocast("cpu", torch.bfloat16):
                    result = model(**batch).loss
                result.backward()
                del result
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        del pixels
    return counter.peak
