"""A training that learns nothing, or on too little of its data, ends with the reason; no weight moves for nothing."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from open_qwen2vl.data import PackMixture, parse_sources, plan_packs
from open_qwen2vl.trainer import run_recipe
from open_qwen2vl.trainer.checkpoints.folders import checkpoints_by_step
from open_qwen2vl.trainer.figures.data_watch import EMPTY_STEPS, FEW_DROPPED, DataStopped, DataWatch
from open_qwen2vl.trainer.figures.steps import Step
from tests.tars import break_images, write_caption_tar


@pytest.fixture
def captions(tmp_path, processor):
    """`captions(broken)`: packs of 60 captions with images, of a tar in `tmp_path`."""

    def build(broken=False) -> PackMixture:
        write_caption_tar(tmp_path / "0.tar", ["a photo of a cat on a mat", "two dogs run"] * 30)
        if broken:
            break_images(tmp_path / "0.tar")
        options = {"image_seq_length": 4, "max_length": 48, "num_workers": 1}
        plan_packs([tmp_path / "0.tar"], tmp_path / "packs", processor.tokenizer, **options)
        return PackMixture(parse_sources(str(tmp_path / "packs")), processor)

    return build


def state_of(trainer) -> dict[str, torch.Tensor]:
    """Weights, and what the optimizer keeps of each."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    state = {f"weight {name}": p.detach().clone() for name, p in trainer.model.named_parameters()}
    for parameter, values in trainer.optimizer.state.items():
        state |= {f"{key} {names[id(parameter)]}": value.clone() for key, value in values.items()}
    return state


def assert_equal_states(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class EachStep(TrainerCallback):
    """Keeps the trainer's state after each step, and calls `then` after one of them."""

    def __init__(self, step=None, then=None):
        self.trainer, self.states, self.step, self.then = None, {}, step, then

    def on_step_end(self, args, state, control, **kwargs):
        self.states[state.global_step] = state_of(self.trainer)
        if state.global_step == self.step:
            self.then()


def watched(make_trainer, watch: EachStep, **options):
    trainer = make_trainer(callbacks=[watch], weight_decay=0.1, warmup_steps=0, **options)
    watch.trainer = trainer
    return trainer


def test_broken_images_end_a_run_with_exit_code_1(make_trainer, captions, capsys):
    trainers = []

    def build():
        trainers.append(make_trainer(train_dataset=captions(broken=True), weight_decay=0.1))
        return trainers[0]

    args = make_trainer().args  # four steps, fewer than would end a long run
    with pytest.raises(SystemExit) as ended:
        run_recipe("pretrain.py", build, args)
    assert ended.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pretrain.py: error: step 4 and 3 before it have no label, so that nothing was learned")
    assert "lost so far are corrupt_image, for example" in error and "0.tar/000" in error
    (trainer,) = trainers
    before = {name: p for name, p in make_trainer().model.named_parameters()}
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert not (Path(args.output_dir) / "model").exists()


def test_images_that_vanish_in_mid_run_leave_the_good_checkpoints(make_trainer, captions, tmp_path):
    watch = EachStep(3, lambda: break_images(tmp_path / "0.tar"))
    options = {"max_steps": 60, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer = watched(make_trainer, watch, train_dataset=captions(), **options)
    good = 4  # whose pack had been read when the images broke
    with pytest.raises(
        DataStopped, match=rf"^step {good + EMPTY_STEPS} and {EMPTY_STEPS - 1} before it have no label"
    ):
        trainer.train()
    kept = checkpoints_by_step(trainer.args.output_dir)
    assert list(kept) == list(range(good, good + EMPTY_STEPS)), "the last good one, and those from then on"
    assert_equal_states(state_of(trainer), watch.states[good])
    assert not all(torch.equal(watch.states[3][name], value) for name, value in watch.states[good].items())


@pytest.mark.parametrize(("supervised", "moves"), [((False, False), False), ((False, True), True)])
def test_a_step_without_labels_moves_nothing(make_trainer, make_pack, supervised, moves):
    """Of two micro-batches; the step before has filled the optimizer's momenta."""
    packs = [make_pack(2, seed=i) for i in range(2)]
    packs += [make_pack(2, seed=2 + i, supervised=labels) for i, labels in enumerate(supervised)]
    watch = EachStep()
    options = {"gradient_accumulation_steps": 2, "max_steps": 2, "train_sampling_strategy": "sequential"}
    trainer = watched(make_trainer, watch, train_dataset=packs, lr_scheduler_type="constant", **options)
    trainer.train()
    if not moves:
        assert_equal_states(watch.states[2], watch.states[1])
    weights = [{n: v for n, v in watch.states[step].items() if n.startswith("weight")} for step in (1, 2)]
    assert moves != all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def step(number, documents, lost, labels=5, **more) -> Step:
    counts = {"documents": documents, "dropped": lost}
    return Step(number, counts=counts, sources=[{"labels": labels, "tokens": 9, "packs": 1}], **more)


def test_a_share_of_lost_documents_ends_a_run():
    watch = DataWatch()
    assert not any(watch.verdict(step(n, 20, 0), 0.1, False) for n in range(100))
    lost = {"dropped": Counter(missing_image=15), "places": {"missing_image": "0.tar/7"}}
    verdicts = [watch.verdict(step(100 + n, 5, 15, **lost), 0.1, False) for n in range(8)]
    # A window of 1,000 documents: 105 lost are too many, 90 are not.
    assert verdicts[:6] == [None] * 6
    assert verdicts[6].startswith("105 of the last 1000 documents up to step 106 could not be read, more than max_")
    assert verdicts[6].endswith("105 of the 105 lost so far are missing_image, for example 0.tar/7")
    assert watch.doubtful(0.1) and not watch.doubtful(0.2)
    assert DataWatch().verdict(step(1, 0, 5000), 1, False) is None, "switched off"


def test_a_short_run_is_judged_at_its_end():
    for lost, expected in ((FEW_DROPPED, None), (FEW_DROPPED + 1, "21 of the last 61 documents")):
        watch = DataWatch()
        assert watch.verdict(step(1, 40, lost), 0.1, False) is None
        verdict = watch.verdict(step(2, 0, 0), 0.1, True)
        assert verdict is None if expected is None else verdict.startswith(expected)


def test_its_counts_go_on_in_a_resumed_run(make_trainer, packs, tmp_path):
    packs = [{**pack, "dropped": {"gone": 1}, "dropped_places": {"gone": "0.tar/3"}} for pack in packs]
    options = {"train_dataset": packs, "save_strategy": "steps", "save_steps": 2, "max_dropped_share": 1}
    make_trainer(**options).train()
    again = make_trainer(**options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    watch = again._callback(DataWatch)
    assert (watch.reasons, watch.places, len(watch.window), watch.learned) == (
        {"gone": 4},
        {"gone": "0.tar/3"},
        4,
        True,
    )
