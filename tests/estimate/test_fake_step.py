"""`estimate` against a step of the real widths on tensors without contents, alone and on ranks that do not exist."""

from dataclasses import replace
from pathlib import Path

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from open_qwen2vl import OpenQwen2VLConfig
from open_qwen2vl.estimate.estimate import _micro_batch
from open_qwen2vl.estimate.inputs import assumed_work, read_recipe, read_training
from open_qwen2vl.estimate.memory import Training, step_memory
from tests.estimate.fake_step import config_of, fake_ranks, make_model, peak_bytes, shard, with_blocks

RECIPES = Path(__file__).parents[2] / "recipes"
PRETRAINING = Training(frozenset({"projector", "language_model"}), accumulation=2)
TOLERANCE = 0.05
PAPERS = assumed_work(28.4e6, 176, 1, 144)
# Recipe: the ranks that share its model, as replicas and shards; None for one GPU, or DDP.
LAYOUTS = {
    "pretrain_2b": (1, 8),
    "pretrain_low_to_high": None,
    "pretrain_0.5b": None,
    "stages/align": None,
    "stages/full_pretrain": (2, 8),
}


@pytest.mark.parametrize(("trains_tower", "units"), [(False, 5), (True, 7)])
def test_a_frozen_tower_is_whole_on_each_rank_and_in_no_unit(trains_tower, units):
    """Two decoder layers, embeddings and head, the root; with a tower that trains its blocks beside them."""
    config = with_blocks(OpenQwen2VLConfig(), 2)
    trained = PRETRAINING.trained | ({"vision_tower"} if trains_tower else set())
    with fake_ranks(1, 8) as accelerator, FakeTensorMode(allow_non_fake_inputs=True):
        model = shard(make_model(config, replace(PRETRAINING, trained=frozenset(trained))), accelerator)
    tower = model.model.vision_tower
    assert {isinstance(parameter, DTensor) for parameter in tower.parameters()} == {trains_tower}
    assert any(isinstance(module, FSDPModule) for module in tower.modules()) == trains_tower
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == units


def estimated_and_counted(recipe: str, config: OpenQwen2VLConfig, blocks: tuple[int, ...] = ()) -> tuple[float, float]:
    """Bytes of a recipe's step on each GPU, without the reserve; counted on all blocks, or grown from two numbers."""
    options, ranks = read_recipe(RECIPES / f"{recipe}.yaml"), LAYOUTS[recipe]
    training, packs = read_training(options), int(options["per_device_train_batch_size"])
    shards = ranks[1] if ranks else 1

    def count(config: OpenQwen2VLConfig) -> int:
        work = _micro_batch(config, PAPERS, packs)
        if ranks is None:
            return peak_bytes(config, training, work, packs)
        with fake_ranks(*ranks) as accelerator:
            return peak_bytes(config, training, work, packs, accelerator)

    figures = step_memory(config, training, _micro_batch(config, PAPERS, packs), shards, ranks is not None)
    del figures["reserve"]
    if not blocks:
        return sum(figures.values()), count(config)
    few, more = (count(with_blocks(config, number)) for number in blocks)
    growth = (more - few) / (blocks[1] - blocks[0])
    return sum(figures.values()), few + growth * (config.text_config.num_hidden_layers - blocks[0])


@pytest.mark.parametrize("recipe", ["pretrain_2b", "pretrain_0.5b", "stages/align"])
def test_a_step_grown_from_few_blocks_takes_what_is_estimated(recipe):
    estimated, counted = estimated_and_counted(recipe, config_of(recipe), (2, 4))
    assert estimated == pytest.approx(counted, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", LAYOUTS)
def test_a_whole_step_takes_what_is_estimated(recipe):
    estimated, counted = estimated_and_counted(recipe, config_of(recipe))
    assert estimated == pytest.approx(counted, rel=TOLERANCE)
