"""What every stage runs: models with random weights in true sizes, packs of photographs, a trainer as recipes have it.

A run's figures are the trainer's own (`tokens_per_second`, `mfu`, `data_wait`), of the steps after a warm-up.
"""

import gc
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from photo_packs import make_packs, make_processor
from transformers import Qwen2Config, SiglipVisionConfig, TrainerCallback

from open_qwen2vl import (
    OpenQwen2VLConfig,
    OpenQwen2VLForConditionalGeneration,
    OpenQwen2VLProcessor,
    PackedTrainer,
    PackedTrainingArguments,
)
from open_qwen2vl.data import PackMixture, parse_sources
from open_qwen2vl.data.packing.plan_files import read_plan

from .running import Skip

SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
SIZES = {
    "2b": {
        "title": "SigLIP-SO400M + Qwen2.5-1.5B",
        "vision": SO400M,
        "text": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
        "vocab_size": 151936,
        "image_seq_length": 144,
        "max_length": 4096,
    },
    "0.5b": {
        "title": "SigLIP-SO400M + Qwen2.5-0.5B",
        "vision": SO400M,
        "text": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
        "vocab_size": 151936,
        "image_seq_length": 144,
        "max_length": 4096,
    },
    "tiny": {
        "title": "a few thousand parameters",
        "vision": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        # The inner width is one that float8 is for.
        "text": {"hidden_size": 32, "intermediate_size": 1040, "num_hidden_layers": 2, "num_attention_heads": 2},
        "vocab_size": 512,
        "image_seq_length": 4,
        "max_length": 128,
    },
}


def make_config(size: str, layers: int | None = None) -> OpenQwen2VLConfig:
    """The config of a size; of so many language-model layers, and one vision layer more, where given."""
    sizes = SIZES[size]
    vision, text = dict(sizes["vision"]), dict(sizes["text"])
    if layers is not None:
        vision["num_hidden_layers"], text["num_hidden_layers"] = layers + 1, layers
    return OpenQwen2VLConfig(
        vision_config=SiglipVisionConfig(**vision),
        text_config=Qwen2Config(
            **text,
            num_key_value_heads=2,
            vocab_size=sizes["vocab_size"],
            rope_theta=1e6,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
        ),
        image_seq_length=sizes["image_seq_length"],
    )


def size_processor(size: str) -> OpenQwen2VLProcessor:
    """A processor that goes with the size, of one token per byte."""
    return make_processor(SIZES[size]["vision"]["image_size"], SIZES[size]["image_seq_length"])


@dataclass(frozen=True)
class Bench:
    """Where and at what size the stages run."""

    size: str
    folder: Path  # for packs and what trainers write
    record: Path  # what is known so far
    workers: int  # processes that decode

    @property
    def gpu(self) -> bool:
        return torch.cuda.is_available()

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpu else "cpu")

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"

    def packs(self, width: int) -> Path:
        """The plan of about 32 packs of photographs of this width, made once."""
        folder = self.folder / f"photographs-{width}"
        try:
            read_plan(folder / "packs")
        except ValueError:  # none yet, or of another version of this code
            shutil.rmtree(folder, ignore_errors=True)
            samples = 24 if self.tiny else 736
            make_packs(
                folder, size_processor(self.size), samples, width, width * 3 // 4, SIZES[self.size]["max_length"]
            )
        return folder / "packs"

    def small_packs(self) -> Path:
        """Photographs that are decoded faster than any GPU takes them."""
        return self.packs(48 if self.tiny else 512)

    def large_packs(self) -> Path:
        """Photographs of the size that loading is judged by."""
        return self.packs(64 if self.tiny else 1024)


def build_model(bench: Bench, attention: str, layers: int | None = None) -> OpenQwen2VLForConditionalGeneration:
    """Random fp32 weights, the same in every process on the same device."""
    if bench.gpu:  # what a case before could not be built of
        gc.collect()
        torch.cuda.empty_cache()
    config = make_config(bench.size, layers)
    config.image_token_id = size_processor(bench.size).image_token_id
    torch.manual_seed(0)
    with bench.device:
        return OpenQwen2VLForConditionalGeneration._from_config(
            config, attn_implementation=attention, dtype=torch.float32
        )


def build_trainer(
    bench: Bench,
    packs: Path,
    options: dict[str, Any],
    steps: int,
    callbacks: list[TrainerCallback],
    attention: str = "packed_varlen",
    layers: int | None = None,
) -> PackedTrainer:
    """A trainer of so many steps, with a recipe's `options`; Skip in the trainer's words where it refuses one."""
    processor = size_processor(bench.size)
    try:
        args = PackedTrainingArguments(
            output_dir=str(bench.folder / "run"),
            max_steps=steps,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not bench.gpu,
            learning_rate=1e-5,
            # Random weights and endless epochs of the same photographs: the loss means nothing here.
            max_loss_rise=0,
            **{
                "bf16": bench.gpu or options.get("bf16_residual", False),
                "dataloader_num_workers": bench.workers,
                **options,
            },
        )
    except (ImportError, TypeError, ValueError) as refused:
        raise Skip(str(refused).splitlines()[0]) from refused
    packs_of_run = steps * args.gradient_accumulation_steps * args.per_device_train_batch_size
    # Within one epoch, whose last step would else be filled up with empty packs.
    epochs = math.ceil(packs_of_run / read_plan(packs)["totals"]["packs"])
    data = PackMixture(parse_sources([{"path": str(packs), "epochs": epochs}]), processor)
    model = build_model(bench, attention, layers)
    try:
        return PackedTrainer(model, args, train_dataset=data, processing_class=processor, callbacks=callbacks)
    except (ImportError, ValueError) as refused:
        raise Skip(str(refused).splitlines()[0]) from refused


class AfterWarmUp(TrainerCallback):
    """Logs after the warm-up and at the end, so that the last log is that of the measured steps."""

    def __init__(self, warm_up: int):
        self.warm_up = warm_up
        self.log: dict[str, float] = {}
        self.seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = state.global_step in (self.warm_up, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "tokens_per_second" in logs:
            self.seconds = logs["train_seconds"] - self.log.get("train_seconds", 0.0)
            self.log = dict(logs)


def measure(
    bench: Bench,
    options: dict[str, Any],
    packs: Path,
    measured: int = 2,
    warm_up: int = 1,
    attention: str = "packed_varlen",
) -> dict[str, float]:
    """Train `warm_up + measured` steps; figures of the measured ones."""
    last = AfterWarmUp(warm_up)
    trainer = build_trainer(bench, packs, options, warm_up + measured, [last], attention)
    args = trainer.args
    if bench.gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    packs_per_step = args.gradient_accumulation_steps * args.per_device_train_batch_size
    figures = {
        "ms a pack": 1000 * last.seconds / measured / packs_per_step,
        "tokens/s": last.log["tokens_per_second"],
        "images/s": last.log["images_per_second"],
        "MFU": last.log.get("mfu"),
        "waiting": last.log["data_wait"],
        "GiB": torch.cuda.max_memory_allocated() / 2**30 if bench.gpu else None,
    }
    release(trainer)
    return figures


def release(trainer: PackedTrainer) -> None:
    """Free what the trainer holds on the device: the next case needs the room, and its own peak."""
    torch._dynamo.reset()
    if torch.cuda.is_available():
        trainer.model = trainer.model_wrapped = trainer.optimizer = None
        trainer.accelerator.free_memory()
        torch.cuda.empty_cache()
