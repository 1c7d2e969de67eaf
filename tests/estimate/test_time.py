"""The roofline: its factors counted anew, and its figures beside those of a simulated step of the 2B model."""

import functools
from dataclasses import replace

import pytest

from open_qwen2vl import OpenQwen2VLConfig
from open_qwen2vl.estimate.estimate import _micro_batch, _roofline, find_gpu
from open_qwen2vl.estimate.inputs import assumed_work
from open_qwen2vl.estimate.levers import predict_levers
from open_qwen2vl.estimate.memory import GIB, Training
from open_qwen2vl.estimate.options import EstimateOptions
from open_qwen2vl.estimate.placement import best_placement
from open_qwen2vl.estimate.time import LINK
from open_qwen2vl.estimate.traffic import BLOCK, SHARDED_BLOCK, TOWER
from open_qwen2vl.trainer.figures.flops import GPUS
from tests.estimate.traffic import language_block, tower_block

TRAINING = Training(frozenset({"projector", "language_model"}), accumulation=256, workers=8)
COMPILED = replace(TRAINING, fused_by="compiled")
WIDTHS = (1536, 8960, 256)  # of Qwen2.5-1.5B: hidden, inner, keys
PAPERS = assumed_work(28.4e6, 176, 1, 144)
PACK_FLOPS = 53.13e12


def roofline(gpu: str = "h100", num_gpus: int = 1, **options):
    """Of the 2B model on the paper's pairs."""
    asked = EstimateOptions("", gpu=gpu, num_gpus=num_gpus, **options)
    return _roofline(OpenQwen2VLConfig(), PAPERS, find_gpu(asked)[1], asked)


def by_factors(factors: tuple, widths: tuple) -> tuple[float, ...]:
    return tuple(sum(f * width for f, width in zip(each, widths, strict=True)) for each in factors)


@pytest.mark.parametrize("fused_by", ["", pytest.param("kernels", marks=pytest.mark.slow), "compiled"])
@pytest.mark.parametrize("bf16_residual", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_factors_of_a_block_are_those_of_its_operators(fused_by, bf16_residual):
    counted = language_block(*WIDTHS, fused_by, "bfloat16" if bf16_residual else "float32")
    assert by_factors(BLOCK[fused_by, bf16_residual], WIDTHS) == pytest.approx(counted, rel=0.01)


def test_factors_of_a_sharded_block_and_of_the_tower():
    counted = language_block(*WIDTHS, "", "bfloat16", "bfloat16")
    assert by_factors(SHARDED_BLOCK, WIDTHS) == pytest.approx(counted, rel=0.01)
    for trained, factors in TOWER.items():
        assert by_factors(factors, (1152, 4304)) == pytest.approx(tower_block(1152, 4304, trained), rel=0.01)


@pytest.mark.parametrize(
    ("training", "hours"),
    [
        (TRAINING, {1: 48, 4: 44}),
        (COMPILED, {1: 37, 4: 34}),
        (replace(COMPILED, bf16_residual=True), {1: 34, 4: 32}),
        (replace(COMPILED, float8=True), {1: 32, 4: 28}),
    ],
    ids=["eager", "fused", "bf16_residual", "float8"],
)
@pytest.mark.parametrize("packs", [1, 4])
def test_hours_of_the_papers_run_on_one_gpu(training, hours, packs):
    """Simulated apart from this code, operator by operator of a whole step, at the same rates."""
    step = roofline().step("one_gpu", replace(training, accumulation=256 // packs), packs).step
    found = step * PAPERS[0].packs / 256 / 3600
    assert found == pytest.approx(hours[packs], rel=0.06)


def test_parts_of_an_eager_pack():
    """Of the same simulation: products with attention 75 ms, operators 49, casts 14."""
    time = roofline().step("one_gpu", TRAINING, 1)
    assert time.products + time.attention == pytest.approx(0.075, rel=0.05)
    assert time.operators == pytest.approx(0.049, rel=0.05) and time.casts == pytest.approx(0.014, rel=0.12)
    assert (time.gathers, time.loading, time.exchange) == (0, 0, 0)
    assert time.step == pytest.approx(256 * time.micro_batch + time.optimizer)
    assert PACK_FLOPS / time.micro_batch / GPUS["h100"].peak_flops == pytest.approx(0.39, abs=0.01)


def test_gathers_of_one_group_over_many_machines_take_as_long_as_a_pack():
    """6.2 GB of weights a micro-batch at 45 GB/s a GPU; within a machine they hide, and so does DDP's exchange."""
    many = roofline(num_gpus=64)
    assert many._gathers("fsdp2", TRAINING) == pytest.approx(0.138, rel=0.03)
    hsdp, flat, ddp = (many.step(layout, TRAINING, 1) for layout in ("hsdp", "fsdp2", "ddp"))
    assert hsdp.gathers == hsdp.exchange == ddp.exchange == 0 and flat.gathers > 0 and flat.exchange > 0
    assert hsdp.step < flat.step
    # Of fp32 gradients a GPU sends its eighth to seven other machines and gets as much.
    between = many._exchange("hsdp", 8e9) - 4 * 8e9 * 7 / 8 / (LINK * 450e9)
    assert between == pytest.approx(2 * 4e9 * 7 / 8 / 45e9)


def test_what_is_slower_decides():
    """A loader that gives a pack in a second, and one process that loads and computes in turn."""
    slow = roofline(loader_rate=PAPERS[0].images / PAPERS[0].packs / 8)
    time, fast = slow.step("one_gpu", TRAINING, 1), roofline().step("one_gpu", TRAINING, 1)
    assert time.micro_batch == pytest.approx(1) and time.loading == pytest.approx(1 - fast.micro_batch)
    alone = slow.step("one_gpu", replace(TRAINING, workers=0), 1)
    assert alone.loading == pytest.approx(8) and alone.micro_batch == pytest.approx(8 + fast.micro_batch)


def test_computing_again_costs_a_forward_pass_of_the_blocks():
    whole, half, none = (
        roofline().step("one_gpu", replace(TRAINING, checkpoint_every=every), 1) for every in (1, 2, 0)
    )
    blocks = 2 * (1_543_714_304 - 151_936 * 1536) * 4096
    assert whole.products - none.products == pytest.approx(blocks / (0.657 * GPUS["h100"].peak_flops))
    assert half.micro_batch - none.micro_batch == pytest.approx((whole.micro_batch - none.micro_batch) / 2)


def names(gpu: str, layout: str = "one_gpu", fits: bool = True, loader_rate: float = 100.0, **options) -> list[str]:
    levers = predict_levers(
        roofline(gpu, loader_rate=loader_rate), layout, replace(TRAINING, **options), 1, 1.0, lambda *_: fits
    )
    assert all(lever.seconds < levers[0].seconds for lever in levers[1:])
    return [lever.options for lever in levers[1:]]


def test_levers_are_those_that_the_recipe_lacks_and_the_gpu_has():
    fused = ["use_liger_kernel", "torch_compile", "torch_compile, bf16_residual"]
    assert names("h100") == [*fused, "torch_compile, bf16_residual, float8", "2 packs at a time"]
    assert names("a100-40gb", fits=False) == fused
    assert names("h100", fused_by="compiled", fits=False) == ["bf16_residual", "bf16_residual, float8"]
    assert names("a100-40gb", "fsdp2", fused_by="kernels", fits=False) == []
    assert names("h100", fused_by="compiled", bf16_residual=True, float8=True, fits=False, loader_rate=10) == [
        "16 dataloader_num_workers"
    ]


def test_placement_knows_memory_and_network():
    def best(gpu: str, gib: float, **options):
        line = roofline(gpu, num_gpus=32, **options)
        micro_batch = functools.partial(_micro_batch, line.config, PAPERS)
        return best_placement(line, TRAINING, micro_batch, 8, gib * GIB)

    assert best("h100", 79).layout == "ddp"
    found = best("a100-40gb", 39)
    assert (found.layout, found.batch_size, found.checkpoint_every) == ("hsdp", 1, 0)
    assert found.reason == "DDP without activation checkpointing takes 44.5 GiB"
    # Where a machine cannot hold it, the network decides between one group of all and computing again.
    fast, slow = (best("a100-40gb", 25.5, network=speed) for speed in (250.0, 5.0))
    assert (fast.layout, fast.checkpoint_every) == ("fsdp2", 0)
    assert (
        slow.layout == "hsdp" and slow.checkpoint_every and "FSDP2 without activation checkpointing takes" in str(slow)
    )
    assert "longer" in slow.reason
