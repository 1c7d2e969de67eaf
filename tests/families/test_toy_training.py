"""The toy family trains, resumes and is refused where it must be, by what it tells of itself alone."""

import json

import pytest
import torch
from PIL import Image

from open_qwen2vl import PackedTrainer, PackedTrainingArguments
from open_qwen2vl.data import PackMixture, parse_sources, plan_packs
from open_qwen2vl.families import register_family
from tests.data.conftest import encode_image, write
from tests.families.toy_family import ToyDocuments, ToyProcessor
from tests.families.toy_model import ToyConfig, ToyForConditionalGeneration, ToyPackedModel


@pytest.fixture(scope="module", autouse=True)
def family():
    register_family("ToyProcessor", ToyDocuments, "toy", ToyPackedModel)


@pytest.fixture(scope="module")
def packs(tokenizer, tmp_path_factory):
    """Captions of pictures whose sizes differ, and one text without."""
    folder = tmp_path_factory.mktemp("toy")
    members = []
    for number in range(24):
        picture = encode_image(Image.new("RGB", (8 * (1 + number % 3), 16), (9 * number, 0, 0)), "JPEG")
        members += [(f"{number:02}.jpg", picture), (f"{number:02}.txt", b"two dogs run in the park"[: 8 + number % 9])]
    toy = ToyProcessor(tokenizer)
    plan_packs([write(folder / "a.tar", members)], folder / "packs", toy, max_length=48, num_workers=1)
    return PackMixture(parse_sources(str(folder / "packs")), toy)


@pytest.fixture
def make_trainer(packs, tokenizer, tmp_path):
    def build(name: str, **options) -> PackedTrainer:
        torch.manual_seed(0)
        model = ToyForConditionalGeneration(
            ToyConfig(len(tokenizer), tokenizer.convert_tokens_to_ids("<|image_pad|>"))
        )
        quiet = {"use_cpu": True, "disable_tqdm": True, "dataloader_num_workers": 0, "logging_steps": 1}
        defaults = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3, "max_steps": 8}
        args = PackedTrainingArguments(str(tmp_path / name), **{**quiet, **defaults, **options})
        return PackedTrainer(model=model, args=args, train_dataset=packs, eval_dataset=packs)

    return build


def logs(trainer) -> list[tuple]:
    names = ("loss", "grad_norm", "learning_rate/projector", "learning_rate/language_model")
    return [tuple(log.get(name) for name in names) for log in trainer.state.log_history if "loss" in log]


def test_it_trains_by_parts_and_resumes_with_the_very_same_losses(make_trainer, tmp_path):
    options = {"projector_learning_rate": 3e-2, "gradient_accumulation_steps": 2}
    whole = make_trainer("whole", **options)
    before = {name: parameter.clone() for name, parameter in whole.model.named_parameters()}
    whole.train()
    losses = [loss for loss, *_ in logs(whole)]
    assert losses[-1] < losses[0] - 0.5 and all(log[2] == pytest.approx(3 * log[3]) for log in logs(whole))
    still = {name.split(".")[0] for name, p in whole.model.named_parameters() if torch.equal(p, before[name])}
    assert still == {"eyes"}, "the vision tower is frozen by default"
    summary = whole.summary()
    # 16 micro-batches of a pack; ToyPackedModel counts 1,000 for a token and 1 for a patch.
    patches = summary["flops"] - 1000 * summary["tokens"]
    assert 0 < patches <= 16 * max(whole.train_dataset.patches_per_pack)
    assert whole.evaluate()["eval_loss"] < losses[0]

    resumed = make_trainer("resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert logs(resumed) == logs(whole)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), parameter), name


def test_it_is_refused_where_it_must_be(make_trainer, tmp_path, packs):
    make_trainer("run", max_steps=3).train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    with pytest.raises(ValueError, match="checkpoint-3 was trained with train_vision_tower False, now True"):
        make_trainer("run", max_steps=3, train_vision_tower=True).train(resume_from_checkpoint=True)
    record = json.loads((checkpoint / "run.json").read_text())
    record["data"]["packs"]["plan"] = "another"
    (checkpoint / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="checkpoint-3 was trained with data.packs.plan another, now"):
        make_trainer("run", max_steps=3).train(resume_from_checkpoint=True)

    stranger = ToyForConditionalGeneration(ToyConfig())
    stranger.config.model_type = "stranger"
    args = PackedTrainingArguments(str(tmp_path / "stranger"), use_cpu=True)
    with pytest.raises(ValueError, match="stranger is no known model family; known are"):
        PackedTrainer(model=stranger, args=args, train_dataset=packs)
