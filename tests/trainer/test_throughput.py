import json
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from open_qwen2vl import OpenQwen2VLConfig, OpenQwen2VLForConditionalGeneration, PackingCollator
from open_qwen2vl.trainer.progress import progress_figures, summary_lines
from open_qwen2vl.trainer.throughput import (
    ThroughputCallback,
    language_model_parameters,
    peak_flops,
    rates,
    step_flops,
    vision_parameters,
)

CPU = torch.device("cpu")


def count(parameters, dims=None):
    return sum(p.numel() for p in parameters if dims is None or p.ndim in dims)


def test_parameter_counts_are_those_of_the_models(tiny_model):
    with torch.device("meta"):
        full_size = OpenQwen2VLForConditionalGeneration(OpenQwen2VLConfig())
    for model in (tiny_model, full_size):
        language = [*model.model.language_model.parameters()]
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight or model is full_size
        assert language_model_parameters(model.config.text_config) == count(language)
        assert vision_parameters(model.config) == count(model.model.vision_tower.encoder.layers.parameters())
    assert language_model_parameters(full_size.config.text_config) == 1_543_714_304


def test_flops_of_a_full_size_pack_by_hand():
    """23 documents of 178 tokens, an image of 144 tokens each, in the 2B model with its frozen vision tower."""
    documents, length = 23, 178
    language = 6 * 1_543_714_304 * documents * length + 6 * 28 * 1536 * documents * length**2
    block = 4 * (1152 * 1152 + 1152) + (1152 * 4304 + 4304) + (4304 * 1152 + 1152) + 4 * 1152
    vision = 26 * (2 * block * 729 + 4 * 1152 * 729**2) * documents
    projector = 6 * (1152 * 1536 + 1536 + 1536 * 1536 + 1536) * 144 * documents
    size = (OpenQwen2VLConfig(), documents * length, documents * length**2, documents, 144)
    assert step_flops(*size) == language + vision + projector == 52_941_463_945_152
    assert step_flops(*size, train_vision_tower=True) == language + 3 * vision + projector
    assert step_flops(*size, train_projector=False) == language + vision + projector // 3
    through = 4 * 1_543_714_304 * documents * length
    assert step_flops(*size, train_language_model=False) == language + vision + projector - through // 2


@pytest.mark.parametrize("train_vision_tower", [False, True])
def test_flops_agree_with_what_torch_counts(tiny_model, make_pack, train_vision_tower):
    """Equal to the last operation, once the differences that the definition makes on purpose are taken out."""
    model, config = tiny_model.train(), tiny_model.config
    model.set_attn_implementation("eager")
    model.model.vision_tower.requires_grad_(train_vision_tower)
    batch = PackingCollator()([make_pack(1, seed=3)])
    stats = batch.pop("packing_stats")
    batch["labels"] = batch["input_ids"].clone()  # the head is counted at every position, so let every one be labelled
    with FlopCounterMode(display=False) as counter:
        model(**batch, num_items_in_batch=1).loss.backward()

    tokens, text, vision = stats["tokens"], config.text_config, config.vision_config
    ours = step_flops(config, tokens, stats["squared_lengths"], 1, 4, train_vision_tower=train_vision_tower)
    passes = 3 if train_vision_tower else 1
    adjusted = (
        ours
        + 6 * text.num_hidden_layers * text.hidden_size * tokens**2  # torch: the upper triangle of the scores too
        - 6 * text.vocab_size * text.hidden_size  # nothing follows the last position
        - 6 * tokens * count(model.model.language_model.parameters(), dims={1})  # biases and norms multiply nothing
        - 6 * 4 * count(model.model.multi_modal_projector.parameters(), dims={1})
        - passes * 2 * 16 * count(model.model.vision_tower.encoder.parameters(), dims={1})
    )
    patch_embedding = 2 * 16 * 3 * 8 * 8 * vision.hidden_size  # not one of the blocks; pixels need no gradient
    adjusted += patch_embedding * (2 if train_vision_tower else 1)
    if not train_vision_tower:
        adjusted -= 2 * 4 * vision.hidden_size * text.hidden_size  # pooled features need no gradient
    assert counter.get_total_flops() == adjusted


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("cpu", None),
    ],
)
def test_peaks_by_device_name(name, teraflops):
    assert peak_flops(name) == (teraflops and teraflops * 1e12)


def test_rates_are_per_second_and_per_device():
    work = {"tokens": 8000, "images": 40, "flops": 6 * 10**12}
    assert rates(work, 2.0, CPU, 3) == {
        "tokens_per_second": 4000,
        "images_per_second": 20,
        "tflops_per_second": pytest.approx(1.0),
    }


def test_a_window_holds_what_came_since_the_last_log():
    callback = ThroughputCallback()
    stats = {"tokens": 100, "documents": 3, "images": 2, "dropped": {"corrupt_image": 1}}
    callback.count(stats, 5 * 10**18)
    callback.count(stats, 5 * 10**18)
    first = callback.close_window(CPU, 1)
    second = callback.close_window(CPU, 1)
    assert first["tokens_per_second"] * callback.totals["seconds"] >= 200
    assert (second["tokens_per_second"], second["images_per_second"], second["tflops_per_second"]) == (0, 0, 0)
    assert first["dropped_documents"] == second["dropped_documents"] == 2
    assert second["train_seconds"] == callback.totals["seconds"] > first["train_seconds"]
    assert {name: callback.totals[name] for name in ("tokens", "documents", "images", "flops")} == {
        "tokens": 200,
        "documents": 6,
        "images": 4,
        "flops": 10**19,
    }
    assert json.loads(json.dumps(callback.state()))["attributes"] == {
        "totals": callback.totals,
        "dropped": {"corrupt_image": 2},
    }


class SlowPacks(list):
    """Packs that take 0.15 s each to read."""

    def __getitem__(self, index):
        time.sleep(0.15)
        return super().__getitem__(index)


def test_every_log_has_the_figures_and_evaluation_is_not_in_them(make_trainer, packs):
    trainer = make_trainer(
        eval_dataset=SlowPacks(packs), eval_strategy="steps", eval_steps=2, logging_steps=4, max_steps=4
    )
    output = trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [2, 4]  # an evaluation ends a window too
    for log in logs:
        assert log["tokens_per_second"] > 0 and log["images_per_second"] > 0 and log["tflops_per_second"] > 0
        assert log["dropped_documents"] == 0 and "mfu" not in log
    # Two evaluations of eight packs.
    assert output.metrics["train_runtime"] - logs[-1]["train_seconds"] >= 2 * 8 * 0.15


def test_reading_is_part_of_the_window(make_trainer, packs):
    trainer = make_trainer(train_dataset=SlowPacks(packs), logging_steps=2, max_steps=4)
    trainer.train()
    assert trainer.summary()["train_seconds"] >= 4 * 0.15


def test_the_bar_shows_the_figures_instead_of_dicts(make_trainer, packs, capsys):
    trainer = make_trainer(eval_dataset=packs, eval_strategy="steps", eval_steps=2, disable_tqdm=False)
    trainer.train()
    printed = capsys.readouterr()
    assert "tok/s" in printed.err and "img/s" in printed.err and "TFLOP/s" in printed.err and "4/4" in printed.err
    assert "step 2: eval loss" in printed.err
    assert "{" not in printed.out + printed.err


def test_lines_of_figures():
    logs = {
        "loss": 2.34567,
        "tokens_per_second": 12345.6,
        "images_per_second": 78.9,
        "tflops_per_second": 371.4,
        "mfu": 0.3755,
        "dropped_documents": 2,
    }
    assert progress_figures(logs) == "loss 2.3457, 12,346 tok/s, 78.9 img/s, 371 TFLOP/s, MFU 37.5%, 2 dropped"


def test_the_summary_is_printable_and_json(make_trainer, packs, tmp_path):
    trainer = make_trainer(train_dataset=[{**pack, "dropped": {"corrupt_image": 1}} for pack in packs])
    trainer.train()
    summary = trainer.summary()
    assert "4 corrupt_image" in summary_lines(summary) and f"{summary['final_loss']:.4f}" in summary_lines(summary)
    trainer.save_metrics("train", summary, combined=False)
    assert json.loads((Path(trainer.args.output_dir) / "train_results.json").read_text()) == summary
