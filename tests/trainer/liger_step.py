"""Liger's kernels against the stock modules, in all families, and a run that resumes; `test_fused_step.py` starts it.

Usage: liger_step.py FOLDER, with a tokenizer in FOLDER/tokenizer; TRITON_INTERPRET=1 where there is no GPU.
"""

import shutil
import sys
from pathlib import Path

import liger_kernel.ops.rms_norm
import numpy as np
import torch
import triton.language as tl
from transformers import AutoTokenizer, Qwen2Config, SiglipVisionConfig
from triton.runtime import interpreter

from open_qwen2vl import (
    OpenQwen2VLConfig,
    OpenQwen2VLForConditionalGeneration,
    PackedTrainer,
    PackedTrainingArguments,
    prepare_for_packing,
)
from open_qwen2vl.families import packed_model
from open_qwen2vl.families.qwen_vl.processing import QwenVLDocuments
from open_qwen2vl.trainer import fused_step
from tests.families.qwen_vl.packs import mixed_documents, pack
from tests.qwen_vl import FAMILIES, make_model, make_processor
from tests.trainer.conftest import build_pack
from tests.trainer.test_fused_step import batch_of, distance, loss_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def complete_interpreter() -> None:
    """Triton's interpreter leaves numbers with a point as Python's, and has no functions of CUDA's library."""
    stock = interpreter._implicit_cvt

    def convert(argument):
        if not isinstance(argument, float):
            return stock(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = convert
    liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)


def check(model, batch: dict) -> None:
    model = model.train().to(DEVICE)
    batch = {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in batch.items()}
    loss, expected = loss_and_gradients(model, batch, enabled=False)
    fused_step._use_liger(model, packed_model(model.config).fused_classes)
    found, gradients = loss_and_gradients(model, batch, enabled=False)
    assert abs(found - loss) < 1e-5 * loss and distance(gradients, expected) < 1e-5, (found, loss)
    print(f"{model.config.model_type}: equal")


def open_qwen2vl(tokenizer) -> OpenQwen2VLForConditionalGeneration:
    text = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    text = Qwen2Config(vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, **text)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = SiglipVisionConfig(image_size=32, patch_size=8, **vision)
    ids = {"image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"), "image_seq_length": 4}
    torch.manual_seed(0)
    config = OpenQwen2VLConfig(vision_config=vision, text_config=text, **ids)
    return OpenQwen2VLForConditionalGeneration._from_config(config, attn_implementation="packed_varlen")


def train(folder: Path, tokenizer, packs: list[dict], resume: bool) -> tuple[list[float], dict]:
    args = PackedTrainingArguments(
        str(folder / "run"),
        use_liger_kernel=True,
        use_cpu=DEVICE == "cpu",
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=1,
        max_steps=2,
        logging_steps=1,
        dataloader_num_workers=0,
    )
    trainer = PackedTrainer(open_qwen2vl(tokenizer), args, train_dataset=packs)
    trainer.train(resume_from_checkpoint=resume)
    assert "Liger" in str(type(trainer.model.model.language_model.norm).forward.__code__.co_freevars)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return losses, {name: parameter.detach().cpu() for name, parameter in trainer.model.named_parameters()}


def main(folder: Path) -> None:
    if DEVICE == "cpu":
        complete_interpreter()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for family in FAMILIES:
        processor = make_processor(family, tokenizer)
        model = prepare_for_packing(make_model(family, tokenizer), processor)
        check(model, pack([mixed_documents(QwenVLDocuments(processor))[1:3]]))
    packs = [build_pack(tokenizer, 2, seed) for seed in range(2)]
    check(open_qwen2vl(tokenizer), batch_of(packs[:1]))
    losses, weights = train(folder, tokenizer, packs, False)
    shutil.rmtree(folder / "run" / "checkpoint-2")
    again, weights_again = train(folder, tokenizer, packs, True)
    assert again == losses and all(torch.equal(weights[name], weights_again[name]) for name in weights)
    print("resumed: equal")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
