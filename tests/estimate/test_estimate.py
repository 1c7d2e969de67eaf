"""`open-qwen2vl estimate`: its figures by hand, from a plan, from numbers of pairs, and what it refuses."""

import ast
import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from open_qwen2vl import OpenQwen2VLConfig
from open_qwen2vl.cli import main
from open_qwen2vl.data import plan_packs
from open_qwen2vl.estimate.estimate import PRICES, estimate_run, find_gpu
from open_qwen2vl.estimate.figures import duration
from open_qwen2vl.estimate.inputs import (
    DEFAULTS,
    RECIPE_OPTIONS,
    assumed_work,
    planned_work,
    read_recipe,
    read_training,
)
from open_qwen2vl.estimate.options import EstimateOptions
from open_qwen2vl.families.interface import StepWork
from open_qwen2vl.families.open_qwen2vl_model import OpenQwen2VLPackedModel
from open_qwen2vl.trainer.figures.flops import GPUS
from tests.estimate.fake_step import config_of
from tests.tars import write_caption_tar

ROOT = Path(__file__).parents[2]
BAD = ("-5", "0", "inf", "nan")
RECIPE_2B = read_recipe(ROOT / "recipes" / "pretrain_2b.yaml")


@pytest.fixture(scope="module")
def plans(tmp_path_factory, processor):
    """Plans of 24 and 10 captions, the second with 16 tokens an image."""
    root = tmp_path_factory.mktemp("plans")
    for name, captions, budget in (("small", 24, 4), ("large", 10, 16)):
        write_caption_tar(root / f"{name}.tar", ["a cat " * (i % 4 + 1) for i in range(captions)])
        options = {"image_seq_length": budget, "max_length": 64, "num_workers": 1}
        plan_packs([root / f"{name}.tar"], root / name, processor.tokenizer, **options)
    return root


@pytest.fixture
def recipe(tmp_path, backbones, plans):
    """`recipe(**options)`: the path of a YAML file that trains the tiny model."""

    def write(**options):
        defaults = {
            "vision_model": backbones["vision"],
            "text_model": backbones["text"],
            "image_seq_length": 4,
            "train_packs": str(plans / "small"),
            "num_train_epochs": 1,
            "bf16": True,
        }
        chosen = {name: value for name, value in {**defaults, **options}.items() if value is not None}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(chosen))
        return str(path)

    return write


def test_the_papers_run_on_its_gpus():
    """28.4M pairs: 4,768 steps of 256 packs; at the published MFU of 28.8 % about the published 220 A100 hours.

    They were counted for whole-pack attention and 27 vision blocks: 7.11e19 FLOPs, where isolation needs 6.48e19.
    """
    work = assumed_work(28.4e6, 176, 1, 144)
    options = EstimateOptions("", "a100-40gb", 8, mfu=0.288)
    figures = estimate_run(RECIPE_2B, OpenQwen2VLConfig(), work, options).as_dict()
    assert (figures["packs_per_step"], figures["steps"]) == (256, 4767)
    assert figures["tokens"] == pytest.approx(5e9, rel=1e-3) and figures["images"] == 28.4e6
    assert figures["flops"] == pytest.approx(6.48e19, rel=1e-3)
    assert figures["gpu_hours"] == pytest.approx(220 * 6.48 / 7.11, rel=0.01)
    assert figures["cost"] == pytest.approx(figures["gpu_hours"] * PRICES["a100-40gb"][0])
    assert figures["fits"] == {"ddp": False, "fsdp2": True}


def test_figures_follow_from_the_flops_and_the_peak(plans):
    options = {**DEFAULTS, "dtype": "float32", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    config, (work,) = OpenQwen2VLConfig(), planned_work(str(plans / "small"))
    totals = json.loads((plans / "small" / "plan.json").read_text())["totals"]
    assert (work.packs, work.tokens, work.images) == (totals["packs"], totals["tokens"], 24)
    on = EstimateOptions("", "h100", 2, mfu=0.4, price_per_hour=3)
    result = estimate_run({**options, "max_steps": 5}, config, [work], on)
    # The five packs are filled up to one step of twelve; five steps read them five times.
    family = OpenQwen2VLPackedModel()
    step = StepWork(work.tokens, totals["squared_lengths"], 24, family.vision_work(config, 24, 24 * 4))
    trained = {"projector": 1, "language_model": 1, "vision_tower": 0}
    flops = 5 * family.step_flops(config, step, trained)
    assert (work.packs, result.steps, result.packs_per_step) == (5, 5, 12)
    assert result.flops == pytest.approx(flops)
    assert result.hours * 3600 == pytest.approx(flops / (2 * 0.4 * GPUS["h100"].peak_flops))
    assert result.tokens_per_second * result.hours * 3600 == pytest.approx(5 * work.tokens)
    assert result.as_dict()["cost"] == pytest.approx(result.hours * 2 * 3)
    result = estimate_run(
        {**options, "bf16": True, "num_train_epochs": 2.5}, config, [work], EstimateOptions("", "h100")
    )
    assert result.steps == 3 and result.images == 24 * 2.5


def test_sources_count_by_epochs_and_weights(plans):
    entries = [{"path": str(plans / "small"), "epochs": 2}, {"path": str(plans / "large")}]
    small, large = planned_work(entries)
    assert (small.images, small.media_tokens) == (48, 48 * 4) and (large.images, large.media_tokens) == (10, 160)
    once = planned_work(str(plans / "small"))[0]
    weighted = planned_work([{**entry, "weight": 1, "epochs": None} for entry in entries])
    assert weighted[0].packs == weighted[1].packs == max(once.packs, large.packs)


def test_the_command_prints_a_table(recipe, capsys):
    assert main(["estimate", recipe(), "--gpu", "rtx4090", "--num-gpus", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    by_name = {line.split()[0]: line for line in lines if line}
    assert by_name["vision"].endswith("frozen") and by_name["projector"].endswith("trains")
    assert next(line for line in lines if line.startswith("MiB")).split()[-2:] == ["DDP", "FSDP2"]
    assert by_name["of"].split()[1:] == ["24,064.0", "fits", "fits"]
    assert "no price is known" in by_name["cost"] and by_name["MFU"].endswith("predicted: not measured on a GPU")
    # So small a model waits for its four workers, and gains by more of them alone.
    assert "step" in by_name and by_name["8"].split()[:2] == ["8", "dataloader_num_workers"]
    assert len({len(line) for line in lines if line.endswith(("DDP     FSDP2", "fits      fits"))}) == 1


def test_small_figures_are_told_in_small_units(recipe, capsys):
    assert main(["estimate", recipe(), "--gpu", "rtx4090"]) == 0
    lines = capsys.readouterr().out.splitlines()
    by_name = {line.split()[0]: line.split() for line in lines if line}
    assert by_name["MiB"] == ["MiB", "on", "each", "GPU", "one", "GPU"] and by_name["of"] == ["of", "24,064.0", "fits"]
    assert 0 < float(by_name["weights"][1].replace(",", "")) and by_name["time"][2] == "s,"
    times = {0.0: "0.0 s", 1e-6: "0.0036 s", 0.02: "72.0 s", 0.5: "30.0 min", 1.99: "119.4 min", 2.5: "2.5 h"}
    assert {hours: duration(hours) for hours in times} == times


def test_a_gpu_is_found_by_any_way_to_write_it_and_may_be_of_any_kind():
    ways = {"3090": "rtx3090", "RTX 5090": "rtx5090", "NVIDIA H100 PCIe": "h100-pcie", "MI300X": "mi300x"}
    assert {way: find_gpu(EstimateOptions("", way))[0] for way in ways} == ways
    assert {"a6000", "a10", "a40", "l4", "l40s", "rtx4090", "v100-32gb", "h200", "b200"} <= {*GPUS}
    name, gpu = find_gpu(EstimateOptions("", "Abacus 1", tflops=3, memory=0.5))
    assert name == "Abacus 1" and (gpu.peak_flops, gpu.memory, gpu.bandwidth) == (3e12, 0.5, 1e10)
    assert find_gpu(EstimateOptions("", "h100", tflops=700, network=7))[1][1:] == (
        700e12,
        79,
        3.35e12,
        450e9,
        7e9,
        True,
    )
    assert find_gpu(EstimateOptions("", tflops=3, memory=0.5, bandwidth=2))[1][1:4] == (3e12, 0.5, 2e12)
    with pytest.raises(ValueError, match="by --gpu, or give both --tflops and --memory"):
        EstimateOptions("", tflops=3)


def test_the_command_prints_json(recipe, capsys):
    path = recipe(train_packs=None, bf16=True, activation_checkpointing=True)
    arguments = ["--gpu", "h100", "--pairs", "1e6", "--tokens-per-pair", "20", "--images-per-pair", "2", "--json"]
    assert main(["estimate", path, *arguments]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["images"], figures["tokens"]) == (2e6, 2e7)
    assert figures["memory"].keys() == figures["fits"].keys() == {"one_gpu"}
    assert figures["trained"] == ["language_model", "projector"]
    assert "2026" in figures["price_source"] and figures["cost"] > 0


def test_a_checkpoint_is_described_by_its_config(recipe, tiny_model, tmp_path, capsys):
    tiny_model.config.save_pretrained(tmp_path / "model")
    for name in ("model", ""):  # of the model, and of the training that wrote it
        path = recipe(vision_model=None, text_model=None, model_name_or_path=str(tmp_path / name))
        assert main(["estimate", path, "--gpu", "h100", "--json"]) == 0
        parameters = json.loads(capsys.readouterr().out)["parameters"]
        assert sum(parameters.values()) == sum(parameter.numel() for parameter in tiny_model.parameters())


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_other_families_are_estimated_by_their_config(kind, qwen_vl_folder, recipe, tmp_path, capsys):
    folder = qwen_vl_folder(kind)
    write_caption_tar(tmp_path / "pool.tar", ["a cat " * (i % 4 + 1) for i in range(12)])
    options = {"max_length": 256, "num_workers": 1}
    plan_packs([tmp_path / "pool.tar"], tmp_path / "packs", AutoProcessor.from_pretrained(folder), **options)
    totals = json.loads((tmp_path / "packs" / "plan.json").read_text())["totals"]
    model = {"vision_model": None, "text_model": None, "image_seq_length": None, "model_name_or_path": str(folder)}
    path = recipe(**model, train_packs=str(tmp_path / "packs"))
    assert main(["estimate", path, "--gpu", "h100", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert sum(figures["parameters"].values()) == sum(parameter.numel() for parameter in loaded.parameters())
    assert (figures["images"], figures["tokens"]) == (12, totals["tokens"])
    # At least 6 FLOPs for each trained parameter of a block and position.
    assert figures["flops"] > 6 * totals["tokens"] * 1000 and figures["memory"]["one_gpu"]["activations"] > 0
    trained = figures["parameters"]["language_model"] + figures["parameters"]["projector"]
    assert figures["memory"]["one_gpu"]["optimizer"] == 8 * trained
    pairs = [path, "--gpu", "h100", "--pairs", "1e6"]
    assert main(["estimate", *pairs]) == 2
    assert f"--pairs with {kind} needs --tokens-per-image" in capsys.readouterr().err
    assert main(["estimate", *pairs, "--tokens-per-image", "100"]) == 0


def test_texts_for_booleans_and_old_names_are_read_as_the_trainer_reads_them(recipe):
    names = ("torch_compile", "float8", "activation_checkpointing", "train_vision_tower", "bf16_residual")
    off = read_training(read_recipe(recipe(**dict.fromkeys(names, "false"), use_liger_kernel="No")))
    assert off == read_training(read_recipe(recipe()))
    on = read_training(read_recipe(recipe(torch_compile="true", float8="1", train_vision_tower="Yes")))
    assert on.float8 and on.fused_by == "compiled" and "vision_tower" in on.trained
    old = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 3}}
    assert read_training(read_recipe(recipe(**old))).checkpoint_every == 3
    assert read_training(read_recipe(recipe(**old, activation_checkpointing=False))).checkpoint_every == 0
    assert read_recipe(recipe(learning_rate="1e-4", max_steps="7"))["max_steps"] == 7


def test_without_bf16_the_time_is_that_of_a_given_mfu(recipe, capsys):
    command = ["estimate", recipe(bf16=False), "--gpu", "h100", "--mfu", "0.1"]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "predicted" not in table and "10%, assumed (--mfu)" in table and "MiB on each GPU" in table
    assert main([*command, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["time"] is None and figures["levers"] == [] and figures["hours"] > 0
    assert "products" not in table and not figures["assumed_products"]


def test_what_the_recipes_do_not_agree_on_is_told(recipe, capsys):
    command = ["estimate", recipe(bf16=None), "--gpu", "h100"]
    assert main(command) == 2
    told = "as recipes/pretrain.py has it (recipes/sft.py takes bf16 on a GPU)"
    assert f"the recipe does not say bf16: float32 is assumed, {told}, and time" in capsys.readouterr().err
    assert main([*command, "--mfu", "0.1"]) == 0
    assert f"products   in float32, {told}: the recipe does not say bf16" in capsys.readouterr().out


def test_the_options_of_the_recipes_are_known():
    for script in ("pretrain.py", "sft.py"):
        tree = ast.parse((ROOT / "recipes" / script).read_text(encoding="utf-8"))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments")]
        names = {field.target.id for each in classes for field in each.body if isinstance(field, ast.AnnAssign)}
        assert names and names <= RECIPE_OPTIONS


# Launch configs, tasks of an evaluation and the building of a pool are no trainings.
OTHERS = ("accelerate", "data", "evaluation")
RECIPES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path.parent.name not in OTHERS]


@pytest.mark.parametrize("path", [path for path in RECIPES if "lora" not in path.stem], ids=lambda path: path.stem)
def test_the_recipes_can_be_estimated(path):
    assert read_training(read_recipe(path)).trained


@pytest.mark.parametrize(
    ("recipe", "gpu", "num_gpus", "layout"),
    [
        ("pretrain_2b", "a100-40gb", 8, "fsdp2"),
        ("pretrain_2b_h100", "h100", 1, "one_gpu"),
        ("pretrain_2b_8h100", "h100", 8, "ddp"),
        ("pretrain_0.5b", "rtx4090", 1, "one_gpu"),
    ],
)
def test_recipes_leave_room_on_the_gpus_that_they_are_for(recipe, gpu, num_gpus, layout):
    """At least 8 % of the memory, laid out as advised; on all of them together the paper's 256 packs a step."""
    options, config = read_recipe(ROOT / "recipes" / f"{recipe}.yaml"), config_of(recipe)
    on = EstimateOptions("", gpu, num_gpus)
    estimate = estimate_run(options, config, assumed_work(28.4e6, 176, 1, 144), on)
    assert sum(estimate.memory[layout].values()) <= 0.92 * estimate.gpu_memory and estimate.packs_per_step == 256
    advised = estimate.placement
    assert (advised.layout, advised.batch_size) == (layout, options["per_device_train_batch_size"])
    assert advised.checkpoint_every == 0 and estimate.layout == layout


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, ["--gpu", "h1000"], "--gpu h1000 is not known; near it are h100"),
        ({}, ["--gpu", "a100"], "--gpu a100 is not known; near it are a100-40gb, a100-80gb; or give"),
        ({}, ["--gpu", "abacus", "--tflops", "3"], "--gpu abacus is not known; known are gb200, b200"),
        ({}, ["--memory", "-1"], "--memory must be above 0"),
        ({}, ["--mfu", "38"], "--mfu must be within 0 and 1, got 38"),
        ({}, ["--network", "0"], "--network must be above 0 and finite, got 0"),
        ({}, ["--gpus-per-machine", "0"], "--gpus-per-machine must be at least 1, got 0"),
        ({}, ["--num-gpus", "0"], "--num-gpus must be at least 1"),
        ({}, ["--pairs", "1e6", "--tokens-per-pair", "4"], "--tokens-per-pair 4 leaves no room for text"),
        ({"train_packs": None}, [], "packs must be a folder or a list"),
        ({"train_packs": "nowhere"}, [], "nowhere does not exist; a folder that `open-qwen2vl pack"),
        ({"vision_model": None}, [], "the recipe names no model"),
        ({"text_model": "nowhere/model"}, [], "text_model nowhere/model: "),
        ({"text_model": "runs/a/model"}, [], "text_model runs/a/model: runs/a/model: there is no such folder"),
        ({"dtype": "float31"}, [], "dtype: 'float31' is no type of torch"),
        ({"optim": "galore_adamw"}, [], "optim: the memory of 'galore_adamw' is not known"),
        ({"per_device_train_batch_size": "two"}, [], "per_device_train_batch_size must be at least 1, got 'two'"),
        ({"train_projector": False, "train_language_model": False}, [], "nothing to train"),
        ({"use_peft": True}, [], "adapters are not estimated"),
        ({}, ["--gpu", ""], "--gpu is empty"),
        *[({}, ["--pairs", value], f"--pairs must be above 0 and finite, got {float(value)}") for value in BAD],
        ({}, ["--pairs", "9", "--tokens-per-pair", "inf"], "--tokens-per-pair must be above 0 and finite, got inf"),
        ({}, ["--pairs", "9", "--tokens-per-image", "-10"], "--tokens-per-image must be above 0 and finite"),
        ({}, ["--pairs", "9", "--images-per-pair", "-1"], "--images-per-pair must be at least 0 and finite, got -1"),
        ({}, ["--pairs", "9", "--images-per-pair", "nan"], "--images-per-pair must be at least 0 and finite, got nan"),
        ({}, ["--price-per-hour", "-3"], "--price-per-hour must be at least 0 and finite, got -3"),
        ({}, ["--price-per-hour", "nan"], "--price-per-hour must be at least 0 and finite, got nan"),
        ({"per_device_train_batch_size": 0}, [], "per_device_train_batch_size must be at least 1, got 0"),
        ({"per_device_train_batch_size": -2}, [], "per_device_train_batch_size must be at least 1, got -2"),
        ({"per_device_train_batch_size": 1.5}, [], "per_device_train_batch_size must be a whole number, got 1.5"),
        ({"gradient_accumulation_steps": 0}, [], "gradient_accumulation_steps must be at least 1, got 0"),
        ({"num_train_epochs": 0}, [], "num_train_epochs must be above 0, got 0"),
        ({"num_train_epochs": -1}, [], "num_train_epochs must be above 0, got -1"),
        ({"max_steps": -7}, [], "max_steps must be at least 1 (or -1, for num_train_epochs), got -7"),
        ({"dataloader_num_workers": -3}, [], "dataloader_num_workers must be at least 0, got -3"),
        ({"ema_decay": "foo"}, [], "ema_decay must be above 0, got 'foo'"),
        ({"ema_decay": -1}, [], "ema_decay must be above 0, got -1"),
        ({"activation_checkpointing_kwargs": {"every_n_layers": "x"}}, [], "every_n_layers must be a whole number"),
        (
            {"gradient_checkpointing_kwargs": {"every_n_layers": 0}},
            [],
            "gradient_checkpointing_kwargs: every_n_layers",
        ),
        (
            {"activation_checkpointing_kwargs": "x"},
            [],
            "activation_checkpointing_kwargs must be options by their names",
        ),
        ({"torch_compile": "perhaps"}, [], "torch_compile must be true or false, got 'perhaps'"),
        ({"gradient_checkpointing": 2}, [], "gradient_checkpointing must be true or false, got 2"),
        ({"float8": True}, [], "float8 needs torch_compile"),
        ({"bf16": "no", "bf16_residual": True}, [], "bf16_residual needs bf16"),
        ({"use_liger_kernel": True, "torch_compile": True}, [], "use_liger_kernel and torch_compile fuse the same"),
        (
            {"gradient_acumulation_steps": 2},
            [],
            "'gradient_acumulation_steps'; near it is gradient_accumulation_steps",
        ),
        ({"bf16": False}, [], "bf16 is off: this recipe computes in float32, and time is predicted for bf16 alone"),
        ({"bf16": False, "fp16": True}, [], "this recipe computes in fp16, and time is predicted for bf16 alone"),
        ({}, ["--gpu", "v100-32gb"], "--gpu v100-32gb has no bf16 units, and time is predicted for bf16 alone"),
    ],
)
def test_what_is_wrong_is_one_line(recipe, capsys, options, arguments, message):
    gpu = [] if "--gpu" in arguments else ["--gpu", "h100"]
    assert main(["estimate", recipe(**options), *gpu, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("open-qwen2vl estimate: error: ") and message in error and error.count("\n") == 1


def test_a_file_that_is_no_recipe_is_one_line(tmp_path, capsys):
    (tmp_path / "words.yaml").write_text("just words\n")
    (tmp_path / "deep.yaml").write_text("dtype: " + "[" * 5000 + "\n")
    messages = {"words.yaml": "not a YAML file", "nowhere.yaml": "nowhere.yaml", "deep.yaml": "nested too deeply"}
    for name, message in messages.items():
        assert main(["estimate", str(tmp_path / name), "--gpu", "h100"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpu", "num_gpus", "layout", "packs", "every"),
    [
        ("h100", 8, "ddp", 2, 0),
        ("a100-40gb", 8, "fsdp2", 1, 0),
        ("rtx4090", 8, "fsdp2", 1, 2),
        ("rtx4090", 1, None, 0, 0),
    ],
)
def test_the_advice_is_the_cheapest_that_fits_with_room(gpu, num_gpus, layout, packs, every):
    options = EstimateOptions("", gpu=gpu, num_gpus=num_gpus)
    estimate = estimate_run(RECIPE_2B, OpenQwen2VLConfig(), assumed_work(28.4e6, 176, 1, 144), options)
    advised = estimate.placement
    if layout is None:
        assert advised is None and "advice     nothing fits" in str(estimate)
        return
    assert (advised.layout, advised.batch_size, advised.checkpoint_every) == (layout, packs, every)
    assert advised.batch_size * advised.accumulation * num_gpus == estimate.packs_per_step == 32 * num_gpus
    assert advised.bytes <= 0.92 * estimate.gpu_memory and f"advice     {advised}" in str(estimate)
    # Every cheaper layout is named with what it takes, which is too much.
    assert bool(advised.reason) == (layout != "ddp")
    # What is advised, put into the recipe, takes what it says.
    recipe = {**RECIPE_2B, "per_device_train_batch_size": packs, "gradient_accumulation_steps": advised.accumulation}
    recipe |= {
        "activation_checkpointing": every > 0,
        "activation_checkpointing_kwargs": {"every_n_layers": every or 1},
    }
    again = estimate_run(recipe, OpenQwen2VLConfig(), assumed_work(28.4e6, 176, 1, 144), options)
    assert sum(again.memory[layout].values()) == pytest.approx(advised.bytes)
