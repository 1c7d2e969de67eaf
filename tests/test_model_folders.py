"""Which folder a name means: a model, a finished training, one in progress, an adapter's."""

import json

import pytest

from open_qwen2vl.model_folders import checkpoints_by_step, is_adapter, model_folder


def make_model(folder, config="config.json", weights="model.safetensors", state=None):
    folder.mkdir(parents=True)
    (folder / config).write_text("{}")
    if weights:
        (folder / weights).write_bytes(b"weights")
    if state is not None:
        (folder / "trainer_state.json").write_text(state)
    return folder


def test_names_and_folders_of_models_stay(tmp_path):
    assert model_folder("Qwen/Qwen2-VL-2B-Instruct") == "Qwen/Qwen2-VL-2B-Instruct"
    for config in ("config.json", "adapter_config.json", "tokenizer.json", "processor_config.json"):
        folder = make_model(tmp_path / config.replace(".", "-"), config)
        make_model(folder / "model")
        assert model_folder(folder) == str(folder)


@pytest.mark.parametrize("config", ["config.json", "adapter_config.json"])
def test_a_finished_training(tmp_path, config, caplog):
    model = make_model(tmp_path / "run" / "model", config)
    make_model(tmp_path / "run" / "checkpoint-9", config, state="{}")
    assert model_folder(tmp_path / "run") == str(model) and not caplog.records
    assert is_adapter(model) == (config == "adapter_config.json")


@pytest.mark.parametrize(
    ("config", "weights"),
    [("config.json", "model.safetensors.index.json"), ("adapter_config.json", "adapter_model.safetensors")],
)
def test_a_training_in_progress(tmp_path, config, weights, caplog):
    """Checkpoint 9 has no weights (sharded), 10 a cut state: 8 is the newest whole one. Steps are numbers."""
    for step in (7, 8):
        make_model(tmp_path / f"checkpoint-{step}", config, weights, json.dumps({"global_step": step}))
    make_model(tmp_path / "checkpoint-9", config, None, "{}")
    make_model(tmp_path / "checkpoint-10", config, weights, '{"global_st')
    make_model(tmp_path / ".saving" / "checkpoint-11", config, weights)
    assert model_folder(str(tmp_path)) == str(tmp_path / "checkpoint-8")
    (record,) = caplog.records
    assert "no finished model" in record.message and record.message.endswith("checkpoint-8")
    assert list(checkpoints_by_step(tmp_path)) == [7, 8, 9, 10]


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "../nowhere", "runs/2b/model"])
def test_a_path_that_does_not_exist_is_no_id_of_the_hub(name):
    with pytest.raises(ValueError, match=f"^{name}: there is no such folder$"):
        model_folder(name)


def test_a_name_below_a_folder_that_is_here_is_no_id_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_folder("runs/x") == "runs/x"
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="^runs/x: there is no such folder$"):
        model_folder("runs/x")


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="no model .* in it, in .*model or in a checkpoint$"):
        model_folder(tmp_path)
    make_model(tmp_path / "checkpoint-3", "config.json", None, "{}")
    with pytest.raises(ValueError, match="sharded checkpoints cannot be loaded"):
        model_folder(tmp_path)
