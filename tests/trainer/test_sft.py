"""SFT on packs and unpacked: one loss, TRL's where that is right, full and with adapters, and exact resume."""

import logging
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from open_qwen2vl import (
    OpenQwen2VLForConditionalGeneration,
    PackedSFTConfig,
    PackedSFTTrainer,
    PackingCollator,
)
from open_qwen2vl.data.packing.unpacked_dataset import UnpackedConversations
from open_qwen2vl.trainer import newest_complete_checkpoint, save_final_model
from open_qwen2vl.trainer.lora import UNQUANTISED_MODULES, changes_anything, load_lora, lora_config
from tests.trainer.conftest import WORDS

FORWARD = OpenQwen2VLForConditionalGeneration.forward


def make_row(number: int) -> dict:
    """A conversation of TRL's form: no, one or two images in any turn, one or two answers."""
    rng = random.Random(number)
    text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))  # noqa: E731
    images = [(None, 0), (0,), (1,)][number % 3]
    turns = [{"role": "system", "content": [{"type": "text", "text": text()}]}] if number % 4 == 3 else []
    for turn in range(1 + number % 2):
        content = [{"type": "image"} for _ in images] if images[0] == turn or images[0] is None else []
        turns.append({"role": "user", "content": [*content, {"type": "text", "text": text()}]})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": text()}]})
    shown = sum(part["type"] == "image" for turn in turns for part in turn["content"])
    pixels = np.random.default_rng(number)
    return {
        "messages": turns,
        "images": [Image.fromarray(pixels.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(shown)],
    }


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    """Eight conversations, two of them without images."""
    return datasets.Dataset.from_list([make_row(number) for number in range(8)])


def pack(items: list[dict]) -> dict:
    """Items of one document each as one pack."""
    joined = {name: torch.cat([item[name] for item in items]) for name in items[0] if torch.is_tensor(items[0][name])}
    return {**joined, "image_seq_length": items[0]["image_seq_length"], "dropped": {}}


@pytest.fixture(scope="module")
def packs(rows, processor) -> list[dict]:
    """The same eight as packs of five and three."""
    items = list(UnpackedConversations(rows, processor))
    return [pack(items[:5]), pack(items[5:])]


@pytest.fixture(scope="module")
def base_folder(backbones, processor, tmp_path_factory) -> Path:
    """A folder as pre-training leaves it."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**backbones, image_seq_length=4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def options(tmp_path) -> dict:
    return {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "max_steps": 4,
    }


@pytest.fixture
def make_trainer(base_folder, options, processor):
    """`make_trainer(train_dataset, peft_config=None, **arguments)`: a trainer of the model of `base_folder`."""

    def build(train_dataset, eval_dataset=None, peft_config=None, callbacks=None, model=None, **changes):
        return PackedSFTTrainer(
            model=OpenQwen2VLForConditionalGeneration.from_pretrained(base_folder) if model is None else model,
            args=PackedSFTConfig(**{**options, **changes}),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            peft_config=peft_config,
            callbacks=callbacks,
        )

    return build


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class StopAt(TrainerCallback):
    """A power cut."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def trained_weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def run(trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return losses(trainer), gradients.first


def compare(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Gradients equal to 1e-5 of the largest of their tensor."""
    assert first.keys() == second.keys() and first
    for name, gradient in first.items():
        difference = (second[name] - gradient).abs().max()
        assert difference <= 1e-5 * max(gradient.abs().max().item(), 1e-3), name


ADAPTER = {"r": 4, "alpha": 8, "dropout": 0.0}


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["full", "lora"])
def test_packed_is_unpacked_is_trl(make_trainer, rows, packs, options, base_folder, processor, adapter):
    """All eight conversations in each step: two packs, eight rows, eight rows of TRL's own trainer."""

    def config():
        return adapter and lora_config(**adapter)

    # With plain SGD the second step shows the first one's gradients once more, at the weights that they led to.
    one_step = {"optim": "sgd", "max_steps": 3, "learning_rate": 0.05, "max_grad_norm": 1e9}
    packed = run(make_trainer(packs, peft_config=config(), per_device_train_batch_size=2, **one_step))
    unpacked = run(make_trainer(rows, peft_config=config(), per_device_train_batch_size=8, **one_step))
    args = SFTConfig(
        **{**options, **one_step}, assistant_only_loss=True, per_device_train_batch_size=8, warmup_steps=1
    )
    model = OpenQwen2VLForConditionalGeneration.from_pretrained(base_folder)
    if adapter is None:
        model.model.vision_tower.requires_grad_(False)
    stock = SFTTrainer(model, args, train_dataset=rows, processing_class=processor, peft_config=config())
    trl = run(stock)
    assert unpacked[0] == pytest.approx(packed[0], rel=1e-5)
    compare(packed[1], unpacked[1])
    assert trl[0][0] == pytest.approx(packed[0][0], rel=1e-4)  # TRL rounds its logs to four digits
    compare(packed[1], trl[1])
    assert any("lora_" in name for name in packed[1]) == (adapter is not None)
    assert any("multi_modal_projector" in name for name in packed[1])


def test_nothing_of_trls_scoring_runs_and_the_model_stays_clean(make_trainer, packs, processor):
    trainer = make_trainer(packs, per_device_train_batch_size=2, max_steps=2)
    assert isinstance(trainer, SFTTrainer) and trainer.train_dataset is packs
    assert trainer.model.forward.__func__ is FORWARD
    trainer.train()
    assert not trainer._metrics["train"], "TRL's compute_loss has run"
    log = trainer.state.log_history[0]
    assert {"loss", "tokens_per_second", "images_per_second", "fill", "data_wait"} <= log.keys()
    assert not {"entropy", "mean_token_accuracy"} & log.keys()
    folder = Path(trainer.args.output_dir) / "model"
    save_final_model(trainer, folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is OpenQwen2VLForConditionalGeneration and "forward" not in vars(trainer.model)
    assert set(model.config.auto_map) >= {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}
    assert AutoProcessor.from_pretrained(folder).chat_template == processor.chat_template


def test_a_forward_of_the_users_own_is_kept(make_trainer, tiny_model, packs):
    own = tiny_model.forward
    tiny_model.forward = own
    assert make_trainer(packs, model=tiny_model).model.forward is own


def test_it_learns_the_answers_and_evaluates(make_trainer, rows, packs):
    trainer = make_trainer(rows, eval_dataset=packs, per_device_train_batch_size=4, max_steps=30, learning_rate=3e-3)
    before = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(before, rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    assert trainer.summary()["documents"] == 4 * 30


@pytest.mark.parametrize(
    ("data", "adapter"), [("packs", {"r": 4, "alpha": 8, "dropout": 0.1}), ("rows", None)], ids=["lora", "full"]
)
def test_resume_continues_with_the_very_same_losses(make_trainer, rows, packs, tmp_path, data, adapter):
    """Killed after step 5 of 8; the adapter has dropout, whose random state goes on as well."""
    train_dataset = {"packs": packs, "rows": rows}[data]
    changes = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}

    def build(output_dir, **more):
        return make_trainer(
            train_dataset,
            peft_config=adapter and lora_config(**adapter),
            output_dir=str(tmp_path / output_dir),
            **changes,
            **more,
        )

    whole = build("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build("cut", callbacks=[StopAt(5)]).train()
    checkpoint = Path(newest_complete_checkpoint(tmp_path / "cut"))
    assert checkpoint.name == "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").exists() == (adapter is not None)
    assert (checkpoint / "model.safetensors").exists() == (adapter is None)
    resumed = build("cut")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 8
    expected = trained_weights(whole)
    for name, value in trained_weights(resumed).items():
        assert value.dtype is torch.float32 and torch.equal(value, expected[name]), name


def test_another_adapter_or_other_data_do_not_continue_a_run(make_trainer, rows, packs):
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer(rows, peft_config=lora_config(r=4, alpha=8), **changes).train()
    for dataset, options, message in [
        (rows, {"r": 4, "alpha": 16}, "adapter.lora_alpha 8, now 16"),
        (rows.select(range(6)), {"r": 4, "alpha": 8}, "data.conversations 8, now 6"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_trainer(dataset, peft_config=lora_config(**options), **changes).train(resume_from_checkpoint=True)


def test_the_adapter_folder_works_alone(make_trainer, rows, processor, base_folder):
    trainer = make_trainer(rows, peft_config=lora_config(r=4, alpha=8), per_device_train_batch_size=4)
    trainer.train()
    folder = Path(trainer.args.output_dir) / "model"
    save_final_model(trainer, folder)
    saved = load_file(folder / "adapter_model.safetensors")
    assert not any("vision_tower" in name or "embed_tokens" in name for name in saved)
    assert sum("multi_modal_projector" in name for name in saved) == 4
    image = Image.linear_gradient("L").convert("RGB")
    inputs = AutoProcessor.from_pretrained(folder)(
        images=[image], text="<s><|image_pad|>\na cat", return_tensors="pt", return_token_type_ids=False
    )
    trained = trainer.model.eval()
    with torch.no_grad():
        expected = trained(**inputs).logits
        base = OpenQwen2VLForConditionalGeneration.from_pretrained(base_folder)
        assert not torch.equal(base(**inputs).logits, expected)
        assert torch.equal(load_lora(base, folder)(**inputs).logits, expected)
        assert torch.equal(AutoModelForImageTextToText.from_pretrained(folder)(**inputs).logits, expected)
        merged = trained.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert type(merged) is OpenQwen2VLForConditionalGeneration and "forward" not in vars(merged)


def test_qlora(base_folder, make_trainer, packs):
    """4 bits on a CPU: the blocks stay as they were, the adapter learns in fp32."""
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=UNQUANTISED_MODULES, bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForImageTextToText.from_pretrained(base_folder, quantization_config=quantisation)
    blocks = {n: m.weight.clone() for n, m in base.named_modules() if isinstance(m, Linear4bit)}
    assert len(blocks) == 7 * 2
    projector = base.model.multi_modal_projector.linear_1.weight.detach().clone()
    trainer = make_trainer(
        packs, model=base, peft_config=lora_config(r=4, alpha=8, dropout=0.0), per_device_train_batch_size=2,
        max_steps=20, learning_rate=5e-3,
    )  # fmt: skip
    copied = trainer.model.get_base_model().model.multi_modal_projector.modules_to_save["default"].linear_1.weight
    assert torch.equal(copied, projector), "TRL's rounding to bf16 was undone"
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    assert changes_anything(trainer.model)
    for name, module in base.named_modules():
        if isinstance(module, Linear4bit):
            assert torch.equal(module.weight, blocks[name.replace(".base_layer", "")]), name


def test_flops_of_an_adapter_are_counted_as_they_are(make_trainer, packs):
    """Frozen weights pass gradients through (4 of 6), updates and projector train in full."""
    whole, adapted = (
        make_trainer(packs, peft_config=config, max_steps=1, per_device_train_batch_size=2)
        for config in (None, lora_config(r=4, alpha=8))
    )
    for trainer in (whole, adapted):
        trainer.train()
    language_model = sum(p.numel() for p in whole.model.model.language_model.parameters())
    adapter = sum(p.numel() for n, p in adapted.model.named_parameters() if "lora_" in n)
    tokens = sum(len(pack["input_ids"]) for pack in packs)
    saved = whole.summary()["flops"] - adapted.summary()["flops"]
    assert saved == 2 * language_model * tokens - 6 * adapter * tokens


def test_what_is_not_supported_is_refused(options, make_trainer, packs, rows, tiny_model):
    for change, message in [
        ({"packing": True}, "open-qwen2vl pack"),
        ({"padding_free": True}, "open-qwen2vl pack"),
        ({"assistant_only_loss": False}, "assistant_only_loss"),
        ({"completion_only_loss": True}, "completion_only_loss"),
        ({"chat_template_path": "chat.jinja"}, "chat_template_path"),
        ({"pad_to_multiple_of": 64}, "pad_to_multiple_of"),
        ({"loss_type": "dft"}, "loss_type"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
    ]:
        with pytest.raises(ValueError, match=message):
            PackedSFTConfig(**options, **change)
    with pytest.raises(ValueError, match="train_vision_tower"):
        make_trainer(packs, peft_config=lora_config(), train_vision_tower=True)
    with pytest.raises(ValueError, match=r"16 bits needs bf16"):
        make_trainer(packs, model=tiny_model.bfloat16(), peft_config=lora_config())
    with pytest.raises(ValueError, match="has an adapter already"):
        make_trainer(packs, model=make_trainer(packs, peft_config=lora_config()).model, peft_config=lora_config())
    with pytest.raises(ValueError, match="no column messages or conversations among text"):
        make_trainer(datasets.Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match="no order by index"):
        make_trainer(rows.to_iterable_dataset())
    for change in ({"cache_dir": "cache"}, {"shuffle_window": 2}, {"read_patience": 60.0}):
        with pytest.raises(
            ValueError, match=f"{next(iter(change))} has no effect here: it says how the packs of a plan"
        ):
            make_trainer(rows, **change)


def test_a_name_instead_of_a_model(base_folder, rows, options):
    trainer = PackedSFTTrainer(str(base_folder), PackedSFTConfig(**options), train_dataset=rows)
    assert not PackedSFTConfig(**{**options, "bf16": None}).bf16
    assert trainer.model.dtype is torch.float32 and trainer.processing_class.image_seq_length == 4


def test_rows_that_cannot_be_used_are_counted(rows, processor, tmp_path, caplog):
    picture = tmp_path / "red.png"
    Image.new("RGB", (9, 9), "red").save(picture)
    answer = {"role": "assistant", "content": "red"}
    ask = [{"role": "user", "content": "<image>what is it?"}, answer]
    cases = [
        (ask, [{"bytes": None, "path": str(picture)}], {}),
        (ask, [{"bytes": b"no image", "path": None}], {"corrupt_image": 1}),
        (ask, [{"bytes": None, "path": str(tmp_path / "gone.png")}], {"missing_image": 1}),
        (ask, [], {"too_many_placeholders": 1}),
        ([answer], [], {"roles_out_of_order": 1}),
        ([{"role": "user", "content": "two dogs " * 90}, answer], [], {"too_long": 1}),
    ]
    dataset = datasets.Dataset.from_list([{"messages": messages, "images": images} for messages, images, _ in cases])
    items = UnpackedConversations(dataset, processor, max_length=100)
    with caplog.at_level(logging.WARNING):
        for number, (_, _, dropped) in enumerate(cases):
            item = items[number]
            assert item["dropped"] == dropped and bool(len(item["input_ids"])) == (not dropped)
            assert len(item["pixel_values"]) == (not dropped)
    assert "dropped row 5: too_long" in caplog.text
    stats = PackingCollator()([items[number] for number in range(6)])["packing_stats"]
    assert stats["documents"] == 1 and sum(stats["dropped"].values()) == 5


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_compiled_blocks_learn_the_same(packs, make_trainer, adapter):
    """Beside TRL's changes of the model and activation checkpointing, which is on by default."""
    runs = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch.manual_seed(0)
        trainer = make_trainer(packs, peft_config=lora_config() if adapter else None, **compiled)
        trainer.train()
        runs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def test_liger_leaves_the_forward_of_packs(packs, make_trainer, monkeypatch):
    pytest.importorskip("liger_kernel", reason="needs the package liger-kernel")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = make_trainer(packs, use_liger_kernel=True).model
    assert "forward" not in vars(model) and type(model).forward is FORWARD
    assert "Liger" in str(type(model.model.language_model.norm).forward.__code__.co_freevars)
