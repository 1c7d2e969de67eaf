"""The model card, from the files that a real plan and a real training leave."""

import io
import tarfile
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from open_qwen2vl.data.packing.plan import plan_packs
from open_qwen2vl.trainer import save_final_model
from open_qwen2vl.trainer.model_card import (
    _render,
    base_backbones,
    data_table,
    model_card,
    training_hyperparameters,
    write_model_card,
)


@pytest.fixture
def plan(tokenizer, tmp_path):
    """`plan.json` of one shard of four samples, one of them without a caption."""
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number in range(4):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (number, 0, 0)).save(picture, "PNG")
            caption = b"" if number == 3 else b"a cat"
            for name, content in ((f"{number}.png", picture.getvalue()), (f"{number}.txt", caption)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    plan_packs(
        [tmp_path / "00000.tar"], tmp_path / "packs", tokenizer, image_seq_length=4, max_length=64, num_workers=1
    )
    return tmp_path / "packs" / "plan.json"


@pytest.fixture
def run(make_trainer):
    """The folder of a finished training, and its trainer."""
    trainer = make_trainer(max_steps=3, learning_rate=2e-4, weight_decay=0.01, seed=7)
    trainer.train()
    trainer.save_metrics("train", trainer.summary(), combined=False)
    save_final_model(trainer, f"{trainer.args.output_dir}/model")
    return trainer.args.output_dir, trainer


def test_a_card_of_a_run(run, plan):
    output_dir, trainer = run
    path = write_model_card(
        f"{output_dir}/model",
        "someone/cats-2b",
        license="mit",
        results=f"{output_dir}/train_results.json",
        plan=plan,
        hyperparameters=training_hyperparameters(trainer.args),
    )
    text = path.read_text()
    assert text.startswith("---\n") and "{" not in text
    header = yaml.safe_load(text.split("---")[1])
    assert header["pipeline_tag"] == "image-text-to-text" and header["library_name"] == "transformers"
    assert header["license"] == "mit" and "base_model" not in header  # the tiny backbones are folders
    summary = trainer.summary()
    for row in (
        "| Samples read | 4 |",
        "| Samples left out | 1 empty_caption |",
        "| Images | 3 |",
        "| Tokens per image | 4 |",
        "| Steps | 3 |",
        f"| Tokens | {summary['tokens']:,} |",
        f"| Final training loss | {summary['final_loss']:.4f} |",
        "on 1 device (",
        "| learning_rate | 0.0002 |",
        "| lr_scheduler_type | cosine |",
        "| weight_decay | 0.01 |",
        "| train_vision_tower | False |",
        "| seed | 7 |",
        "| transformers | 5.",
        'from_pretrained("someone/cats-2b", trust_remote_code=True)',
    ):
        assert row in text
    assert text.count("# cats-2b") == 1 and "MFU" not in text
    assert ModelCard.load(path).data.license == "mit"


def test_only_what_is_known(run):
    assert (Path(run[0]) / "model" / "README.md").exists()  # the final save has written one
    text = model_card(f"{run[0]}/model", "someone/cats", license="mit")
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Use"] and "a language model (qwen2) of 2 blocks of width 48" in text


def test_backbones_of_the_hub_are_named():
    names = {"text_config": "Qwen/Qwen2.5-1.5B-Instruct", "vision_config": "/home/me/siglip"}
    config = {part: {"_name_or_path": name} for part, name in names.items()}
    assert base_backbones(config) == ["Qwen/Qwen2.5-1.5B-Instruct"]
    assert base_backbones({}) == []


def test_the_card_of_a_trainer(run):
    """What the final save leaves, and `create_model_card` of either stock trainer: no licence is made up."""
    output_dir, trainer = run
    trainer.create_model_card(model_name="passed by Trainer.push_to_hub")
    text = (Path(output_dir) / "README.md").read_text()
    assert text == (Path(output_dir) / "model" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["pipeline_tag"] == "image-text-to-text" and "license" not in header
    assert header["tags"] == ["open_qwen2vl"]
    for row in ("# run\n", "| Steps | 3 |", "| learning_rate | 0.0002 |", f'from_pretrained("{output_dir}/model", '):
        assert row in text
    assert "fine-tuned version of" not in text


def test_other_families_and_adapters():
    config = {"model_type": "qwen2_vl", "text_config": {"num_hidden_layers": 28, "hidden_size": 1536}}
    text = _render(config, "me/x", "x", {}, ["Qwen/Qwen2-VL-2B-Instruct"], None, "Qwen/Qwen2-VL-2B-Instruct")
    assert "`qwen2_vl`, its language model has 28 blocks of width 1536" in text and "trust_remote_code" not in text
    header = yaml.safe_load(text.split("---")[1])
    assert (header["base_model"], header["library_name"]) == (["Qwen/Qwen2-VL-2B-Instruct"], "peft")
    assert "LoRA adapter of Qwen/Qwen2-VL-2B-Instruct; " in text


def test_a_plan_without_a_number_of_tokens_an_image():
    totals = {"shards": 1, "samples": 1, "skipped": {}, "documents": 1, "images": 1, "packs": 1, "fill": 0.5}
    plan = {"max_length": 8, "text_format": "x", "totals": totals}
    assert "Tokens per image" not in data_table({**plan, "vision": {"patch_size": 14}})
    assert data_table({**plan, "vision": {"image_seq_length": 144}})["Tokens per image"] == 144
