"""Right or wrong: a packed step of the trainer, with each lever, against every document alone in fp32.

Two layers of the true widths. The error is that of all gradients together, by norms; a lever's may not be far above
what bf16 costs anyway.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from . import attention
from .models import Bench, build_model, build_trainer, release

LAYERS = 2
# On a CPU, at these widths: 0.010 in bf16, with a bf16 residual stream too, and 0.081 with emulated float8.
MOST_ERROR, MOST_ERROR_OF_FLOAT8 = 0.03, 0.2

Gradients = dict[str, torch.Tensor]


class KeepGradients(TrainerCallback):
    """The gradients of the first step, before the optimizer."""

    def __init__(self):
        self.gradients: Gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {
            name.replace("_orig_mod.", ""): parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = True


def packed_step(bench: Bench, options: dict[str, Any]) -> tuple[float, Gradients, dict]:
    """Loss and gradients of the trainer's first step, and its batch."""
    kept = KeepGradients()
    options = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "dataloader_num_workers": 0, **options}
    trainer = build_trainer(bench, bench.small_packs(), options, 1, [kept], layers=LAYERS)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    loss = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
    release(trainer)
    return loss, kept.gradients, batch


def alone_step(bench: Bench, batch: dict) -> tuple[float, Gradients]:
    """The same of every document of the batch in a row of its own, in fp32 through eager attention."""
    model = build_model(bench, "eager", LAYERS).train()
    model.model.vision_tower.requires_grad_(False)
    bounds, loss, image = batch["cu_seq_lens_q"].tolist(), 0.0, 0
    labels = (batch["labels"] != -100).sum()
    for start, end in zip(bounds, bounds[1:], strict=False):
        ids = batch["input_ids"].flatten()[start:end][None]
        images = int((ids == model.config.image_token_id).sum()) // batch["image_seq_length"]
        document = {"input_ids": ids, "labels": batch["labels"].flatten()[start:end][None]}
        if images:
            document["pixel_values"] = batch["pixel_values"][image : image + images]
            document["image_seq_length"] = batch["image_seq_length"]
        image += images
        if (document["labels"] != -100).any():  # padding is a document without any
            document = {n: v.to(bench.device) if isinstance(v, torch.Tensor) else v for n, v in document.items()}
            part = model(**document, num_items_in_batch=labels.to(bench.device)).loss
            part.backward()
            loss += part.item()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(bench: Bench, options: dict[str, Any]) -> dict:
    """Errors of a step with these options."""
    loss, ours, batch = packed_step(bench, options)
    expected_loss, expected = alone_step(bench, batch)
    if ours.keys() != expected.keys():
        raise AssertionError(f"gradients of other parameters: {sorted(ours.keys() ^ expected.keys())[:3]}")
    pairs = [(ours[name].flatten().float(), expected[name].flatten()) for name in expected]
    difference = sum((a - b).square().sum() for a, b in pairs).sqrt()
    error = (difference / sum(b.square().sum() for _, b in pairs).sqrt()).item()
    allowed = MOST_ERROR_OF_FLOAT8 if options.get("float8") else MOST_ERROR
    return {"loss error": abs(loss - expected_loss), "gradient error": error, "right": error <= allowed}


def case(options: dict[str, Any]) -> Callable[[Bench], dict]:
    return lambda bench: compare(bench, options)


CASES = {f"attention: {name}": run for name, run in attention.cases(attention.exactness).items()}
CASES["attention: varlen, shared pictures"] = lambda bench: attention.exactness(
    bench, "varlen, flash", attention.Branches
)
CASES["packed step"] = case({})
