"""The way of a model through a Hub, each step in a process of its own: push, load, load without the package, adapt."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoModelForImageTextToText

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, cli
from open_qwen2vl.trainer.model_card import write_model_card
from tests.hub.client import figures
from tests.hub_server import hub_server
from tests.tars import write_caption_tar

REPO, ADAPTER = "tester/tiny", "tester/tiny-lora"
CLIENT = Path(__file__).with_name("client.py")
RESULTS = {
    "steps": 30,
    "epochs": 1.5,
    "tokens": 57192,
    "images": 3345,
    "train_seconds": 7200.0,
    "tokens_per_second": 8.0,
    "tflops_per_second": 371.25,
    "mfu": 0.375,
    "devices": 8,
    "final_loss": 2.34567,
    "dropped_documents": {"corrupt_image": 4},
}
PLAN = {
    "image_seq_length": 4,
    "max_length": 96,
    "text_format": "caption",
    "totals": {
        "shards": 2,
        "samples": 3350,
        "skipped": {"empty_caption": 5},
        "documents": 3345,
        "images": 3345,
        "packs": 596,
        "fill": 0.99958,
    },
}


@pytest.fixture(scope="module")
def folder(backbones, processor, tmp_path_factory):
    """A model folder with its card, as a training leaves it."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**backbones, image_seq_length=4)
    model.save_pretrained(run / "model")
    processor.save_pretrained(run / "model")
    (run / "train_results.json").write_text(json.dumps(RESULTS))
    (run / "plan.json").write_text(json.dumps(PLAN))
    write_model_card(
        run / "model",
        REPO,
        license="apache-2.0",
        results=run / "train_results.json",
        plan=run / "plan.json",
        hyperparameters={"learning_rate": 5e-5, "bf16": True, "devices": 8},
        base_models=["Qwen/Qwen2.5-1.5B-Instruct", "google/siglip-so400m-patch14-384"],
    )
    return run / "model"


@pytest.fixture(scope="module")
def expected(folder, processor):
    """The figures of the model in this process."""
    return figures(OpenQwen2VLForConditionalGeneration.from_pretrained(folder), processor)


@pytest.fixture(scope="module")
def hub():
    with hub_server() as hub:
        yield hub
        assert hub.refused == []


def client(hub, folder: Path, step: str, *arguments: str, site: Path | None = None) -> dict:
    """Run one step with an empty cache and return what it found."""
    environment = {**os.environ, **hub.environment(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(site)} if site else {}
    command = [sys.executable, *(["-S"] if site else []), str(CLIENT), step, str(folder / "result.json"), *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def pushed(hub, folder, tmp_path_factory):
    client(hub, tmp_path_factory.mktemp("push"), "push", str(folder), REPO)
    return hub.repos["models", REPO]


@pytest.fixture(scope="module")
def loaded(hub, pushed, tmp_path_factory):
    return client(hub, tmp_path_factory.mktemp("load"), "load", REPO, ADAPTER)


@pytest.fixture(scope="module")
def loaded_bare(hub, pushed, bare_site, tmp_path_factory):
    """Also the folder that the process without the package saved."""
    place = tmp_path_factory.mktemp("bare")
    return client(hub, place, "load_without_package", REPO, str(place / "saved"), site=bare_site), place / "saved"


def test_what_is_pushed(pushed):
    weights = {name for name in pushed.files if name.endswith(".safetensors")}
    assert len(weights) > 2 and pushed.lfs >= weights
    index = json.loads(pushed.files["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == weights
    assert not [name for name in pushed.files if name.endswith((".bin", ".pt", ".pkl"))]
    code = {"configuration_open_qwen2vl.py", "modeling_open_qwen2vl.py", "attention.py", "loss.py"}
    code |= {"processing_open_qwen2vl.py", "text_formats.py", "chat_template.jinja"}
    assert code <= set(pushed.files)
    assert b"open_qwen2vl." not in b"".join(
        line for name in code for line in pushed.files[name].splitlines() if line.startswith((b"from ", b"import "))
    )


def test_the_card_survives_the_next_push(pushed, folder):
    card = ModelCard(pushed.files["README.md"].decode())
    assert card.data.to_dict() == ModelCard.load(folder / "README.md").data.to_dict()
    assert "Hours | 2 on 8 devices (16 device-hours)" in card.text


def test_a_training_pushes_our_card(hub, folder, qwen_vl_folder, tmp_path):
    """Ours by its trainer, Qwen2-VL by the recipe, whose repository is a stock one."""
    write_caption_tar(tmp_path / "0.tar", ["a cat", "two dogs run"] * 4)
    stock = qwen_vl_folder("qwen2_vl")
    for name, processor, *sizes in (("packs", folder, "--image-seq-length", "4"), ("stock", stock)):
        options = ["--processor", str(processor), *sizes, "--max-length", "64", "--num-workers", "1"]
        assert cli.main(["pack", str(tmp_path / "0.tar"), "--output", str(tmp_path / name / "plan"), *options]) == 0
    ours = [str(folder), str(tmp_path / "packs/plan"), "tester/run"]
    found = client(hub, tmp_path, "train_both", *ours, str(stock), str(tmp_path / "stock/plan"), "tester/qwen")
    cards = found["ours"]
    for text in cards.values():
        assert text.count("# run\n") == 1 and "| Steps | 2 |" in text and "| Samples read | 8 |" in text
        assert 'from_pretrained("tester/run", trust_remote_code=True)' in text
        assert yaml.safe_load(text.split("---")[1])["pipeline_tag"] == "image-text-to-text"
    files = hub.repos["models", "tester/run"].files
    assert {"config.json", "model.safetensors", "README.md"} <= set(files) and "notes.txt" not in files
    assert not [name for name in files if name.startswith(("checkpoint", "packs", "model/"))]
    assert "license: mit" in cards["after"] and "license" not in cards["during"].split("---")[1]

    stocks = found["stock"]
    assert stocks["same"] and isinstance(stocks["pipe"], str)
    assert 'from_pretrained("tester/qwen")' in stocks["card"] and "| Steps | 2 |" in stocks["card"]
    files = hub.repos["models", "tester/qwen"].files
    assert json.loads(files["config.json"])["architectures"] == ["Qwen2VLForConditionalGeneration"]
    # The finished folder and nothing else of the run.
    assert not [name for name in files if "/" in name or name.endswith((".py", ".bin", ".pt"))]


def test_loading_back_with_the_package(loaded, expected):
    assert loaded["plain"]["answer"] == expected["answer"]
    torch.testing.assert_close(loaded["plain"]["logits"], expected["logits"], atol=0, rtol=0)
    assert loaded["types"] == ["torch.bfloat16"]
    assert isinstance(loaded["pipe"], str)


def test_loading_without_the_package(loaded_bare, expected, loaded):
    result, _ = loaded_bare
    for name in ("hub", "saved"):
        found = result[name]
        assert found["classes"] == [
            "OpenQwen2VLConfig",
            "OpenQwen2VLForConditionalGeneration",
            "OpenQwen2VLProcessor",
            "OpenQwen2VLModel",
        ]
        assert found["modules"] == ["transformers_modules"] and found["budget"] == 4
        assert found["answer"] == expected["answer"]
        torch.testing.assert_close(found["logits"], expected["logits"], atol=0, rtol=0)
    assert result["pipe"] == loaded["pipe"]


def test_what_was_saved_without_the_package_loads_with_it(loaded_bare, processor, expected):
    _, saved = loaded_bare
    assert figures(OpenQwen2VLForConditionalGeneration.from_pretrained(saved), processor) == expected


def test_an_adapter_travels_by_the_hub(hub, loaded, expected, tmp_path):
    adapter = hub.repos["models", ADAPTER]
    assert json.loads(adapter.files["adapter_config.json"])["base_model_name_or_path"] == REPO
    assert len(adapter.files["adapter_model.safetensors"]) < 100_000
    found = client(hub, tmp_path, "load_adapter", ADAPTER, REPO)
    assert loaded["adapted"]["logits"] != expected["logits"]
    assert found["by_name"] == loaded["adapted"]
    torch.testing.assert_close(found["merged"]["logits"], loaded["adapted"]["logits"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_shards_and_device_maps(folder, tmp_path, processor, expected, device_map):
    model = OpenQwen2VLForConditionalGeneration.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 4
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=device_map)
    assert figures(loaded, processor) == expected
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight


def test_blocks_on_disk(folder, tmp_path, processor, expected):
    """What accelerate does with a model that is larger than memory."""
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    places |= {f"model.language_model.{name}": "cpu" for name in ("embed_tokens", "layers.0", "norm", "rotary_emb")}
    places["model.language_model.layers.1"] = "disk"
    loaded = AutoModelForImageTextToText.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert figures(loaded, processor) == expected


def test_the_base_model_saves_code_that_names_both_classes(folder, tmp_path):
    base = AutoModel.from_pretrained(folder)
    base.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_open_qwen2vl.OpenQwen2VLConfig",
        "AutoModel": "modeling_open_qwen2vl.OpenQwen2VLModel",
        "AutoModelForImageTextToText": "modeling_open_qwen2vl.OpenQwen2VLForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_open_qwen2vl.OpenQwen2VLForConditionalGeneration",
    }


def test_the_header_of_the_card(folder):
    header = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": "apache-2.0",
        "base_model": ["Qwen/Qwen2.5-1.5B-Instruct", "google/siglip-so400m-patch14-384"],
        "tags": ["open_qwen2vl"],
    }
