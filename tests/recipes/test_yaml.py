"""Each YAML of pre-training says what its comments say, and is understood by its recipe."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml

from open_qwen2vl import PackedSFTConfig, PackedTrainingArguments
from open_qwen2vl.data import parse_sources, plan_packs
from open_qwen2vl.trainer import parse_arguments
from tests.tars import write_caption_tar

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(
    str(path.relative_to(RECIPES))
    for pattern in (
        "pretrain_*.yaml",
        "stages/*.yaml",
        "qwen2_vl/pretrain_*.yaml",
        "datacomp_vlm/*.yaml",
        "speedrun/align.yaml",
    )
    for path in RECIPES.glob(pattern)
)


@pytest.fixture(scope="module")
def recipe() -> dict:
    return runpy.run_path(str(RECIPES / "pretrain.py"))


def parse(recipe, path, *options):
    classes = (recipe["ModelArguments"], recipe["DataArguments"], PackedTrainingArguments)
    return parse_arguments(classes, "", [str(path), "--bf16=false", "--use_cpu", *options])


@pytest.fixture(scope="module")
def plans(tmp_path_factory, processor) -> Path:
    """`packs_4` and `packs_16`: the same twelve pairs at two numbers of tokens an image."""
    root = tmp_path_factory.mktemp("plans")
    write_caption_tar(root / "0.tar", ["a photo of a cat"] * 12)
    for budget in (4, 16):
        plan_packs(
            [root / "0.tar"],
            root / f"packs_{budget}",
            processor.tokenizer,
            image_seq_length=budget,
            max_length=64,
            num_workers=1,
        )
    return root


def test_all_of_them_are_found():
    assert len(NAMES) == 13 and "stages/align.yaml" in NAMES and "pretrain_2b.yaml" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_options_are_known_and_comments_true(name, recipe, tmp_path):
    _, data, args = parse(recipe, RECIPES / name, "--output_dir", str(tmp_path))
    sources = parse_sources(data.train_packs)
    text = (RECIPES / name).read_text()
    # The commands at its head plan the packs that it reads, and launch this file.
    assert all(f"--output {source.path}" in text for source in sources)
    assert f"recipes/pretrain.py recipes/{name}" in text
    # "256 packs a step = 2 (per device) x 16 (accumulation) x 8 (devices)"
    packs = int(re.search(r"(\d+) packs(?: a step|, about)", text)[1])
    written = [int(re.search(rf"(\d+) \({word}\)", text)[1]) for word in ("per device", "accumulation")]
    devices = re.search(r"(\d+) \(devices\)", text)
    assert written == [args.per_device_train_batch_size, args.gradient_accumulation_steps]
    assert written[0] * written[1] * int(devices[1] if devices else 1) == packs
    assert args.bf16 is False and yaml.safe_load(text)["bf16"] is True
    assert args.num_train_epochs == 1 and args.warmup_steps == 0.03 and args.lr_scheduler_type == "cosine"
    assert args.save_total_limit == 2 and args.save_strategy == "steps"


@pytest.mark.parametrize(
    ("name", "script", "arguments"),
    [("pretrain", "pretrain.py", PackedTrainingArguments), ("sft_2b", "sft.py", PackedSFTConfig)],
)
def test_the_others_of_qwen2_vl(name, script, arguments, tmp_path):
    """Options are known, and the command at the head names what the file reads."""
    path, recipe = RECIPES / "qwen2_vl" / f"{name}.yaml", runpy.run_path(str(RECIPES / script))
    classes = (recipe["ModelArguments"], recipe["DataArguments"], arguments)
    model, data, args = parse_arguments(classes, "", [str(path), "--bf16=false", "--use_cpu"])
    text = path.read_text()
    assert f"recipes/{script} recipes/qwen2_vl/{name}.yaml" in text and args.train_projector
    run = (RECIPES / "qwen2_vl" / "run.sh").read_text().replace("$name", "dynamic")
    assert re.search(rf'--output "?{data.train_packs}\b', text if name == "sft_2b" else run)
    if name == "sft_2b":
        assert (model.model_name_or_path, args.train_vision_tower) == ("Qwen/Qwen2-VL-2B-Instruct", False)
        assert f"--processor {model.model_name_or_path}" in text
        packs = args.per_device_train_batch_size * args.gradient_accumulation_steps * 8
        assert packs == int(re.search(r"(\d+) packs a step", text)[1])
    else:
        assert args.train_vision_tower and args.train_language_model and args.weight_decay == 0.05


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        ("align", {"multi_modal_projector"}),
        ("pretrain", {"multi_modal_projector", "language_model"}),
        ("full_pretrain", {"multi_modal_projector", "language_model", "vision_tower"}),
    ],
)
def test_a_stage_trains_its_parts(stage, trained, recipe, plans, backbones, tiny_model, processor, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    model = {
        "align": ["--vision_model", backbones["vision"], "--text_model", backbones["text"]],
    }.get(stage, ["--model_name_or_path", str(tmp_path / "model")])
    arguments = parse(
        recipe,
        RECIPES / "stages" / f"{stage}.yaml",
        *model,
        "--train_packs",
        str(plans / "packs_4"),
        "--output_dir",
        str(tmp_path / "run"),
        "--max_steps",
        "1",
        "--gradient_accumulation_steps",
        "2",
        "--dataloader_num_workers",
        "0",
        "--save_strategy",
        "no",
        "--activation_checkpointing=false",
    )
    trainer = recipe["build_trainer"](*arguments)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    rates = {group["lr"] for group in trainer.create_optimizer().param_groups}
    assert rates == ({5e-5, 5e-6} if stage == "full_pretrain" else {arguments[2].learning_rate})
    trainer.train()
    changed = {name.split(".")[1] for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained


def test_low_to_high_goes_from_few_tokens_an_image_to_many(recipe, plans, backbones, tmp_path):
    text = (RECIPES / "pretrain_low_to_high.yaml").read_text()
    for budget, place in ((4, "packs/captions_144"), (16, "packs/captions_729")):
        text = text.replace(f"path: {place}", f"path: {plans}/packs_{budget}")
    path = tmp_path / "config.yaml"
    path.write_text(text)
    arguments = parse(
        recipe,
        path,
        "--vision_model",
        backbones["vision"],
        "--text_model",
        backbones["text"],
        "--output_dir",
        str(tmp_path / "run"),
        "--gradient_accumulation_steps",
        "1",
        "--dataloader_num_workers",
        "0",
        "--save_strategy",
        "no",
    )
    arguments[0].image_seq_length = 4
    with pytest.raises(ValueError, match="remove image_seq_length: the packs have 4, then 16 tokens an image"):
        recipe["build_trainer"](*arguments)
    arguments[0].image_seq_length = None
    trainer = recipe["build_trainer"](*arguments)
    budgets = [batch["image_seq_length"] for batch in trainer.get_train_dataloader()]
    assert set(budgets) == {4, 16} and budgets == sorted(budgets)
    assert trainer.model.config.image_seq_length == 16
    trainer.train()
    assert trainer.state.global_step == len(budgets)


@pytest.mark.slow
def test_captions_instructions_text_and_documents_share_steps(recipe, backbones, processor, tmp_path):
    write_caption_tar(tmp_path / "captions.tar", ["a photo of a cat"] * 12)
    rows = {
        "text": [{"text": "two dogs run in the park"}] * 12,
        "interleaved": [{"texts": ["a photo of a cat", "blue and green squares"], "images": [None, None]}] * 12,
        "instructions": [
            {"conversations": [{"from": "human", "value": "what is shown?"}, {"from": "gpt", "value": "two dogs"}]}
        ]
        * 24,
    }
    text = (RECIPES / "pretrain_mixture.yaml").read_text()
    for name in ("captions", *rows):
        file = tmp_path / ("captions.tar" if name == "captions" else f"{name}.jsonl")
        if name in rows:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        plan_packs([file], tmp_path / name, processor.tokenizer, image_seq_length=4, max_length=64, num_workers=1)
        text = text.replace(f"path: packs/{name}", f"path: {tmp_path / name}")
    (tmp_path / "config.yaml").write_text(text)
    options = ["--vision_model", backbones["vision"], "--text_model", backbones["text"], "--max_steps", "1"]
    options += ["--output_dir", str(tmp_path / "run"), "--save_strategy", "no", "--dataloader_num_workers", "0"]
    trainer = recipe["build_trainer"](*parse(recipe, tmp_path / "config.yaml", *options))
    trainer.train()
    read = trainer.summary()["sources"]
    assert list(read) == ["captions", "instructions", "text", "interleaved"]
    assert all(source["packs"] for source in read.values()) and trainer.state.global_step == 1
