"""From files to a folder that loads, for the three families: pack, read, train, stop, resume, save."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from open_qwen2vl import PackedDataset, PackedTrainer, PackedTrainingArguments, PackingCollator, cli
from open_qwen2vl.data import PackMixture, parse_sources
from open_qwen2vl.trainer import newest_complete_checkpoint, save_final_model
from tests.families.qwen_vl.packs import SIZES, picture
from tests.qwen_vl import FAMILIES

MAX_PIXELS = 9 * 32**2


def turned(width: int, height: int) -> bytes:
    """A picture that EXIF says is to be turned by 90 degrees: upright it has these sides."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.open(io.BytesIO(picture(height, width))).save(file, "PNG", exif=exif)
    return file.getvalue()


def write_captions(path: Path) -> None:
    """Twelve captions of images of any size; one is turned, one too long, one broken."""
    images = {f"{i:03d}": picture(*SIZES[i % len(SIZES)], seed=i) for i in range(9)}
    images |= {"100": turned(60, 200), "101": picture(450, 2), "102": b"no image"}
    with tarfile.open(path, "w") as tar:
        for key, image in images.items():
            for extension, content in (("png", image), ("txt", f"a picture called {key}".encode())):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_conversations(folder: Path) -> Path:
    """Two conversations, one with two images in different turns and a control token in its text."""
    (folder / "images").mkdir()
    for number in range(3):
        (folder / "images" / f"{number}.png").write_bytes(picture(*SIZES[number], seed=number))
    part = {"type": "image"}
    records = [
        {
            "images": ["0.png", "1.png"],
            "messages": [
                {"role": "user", "content": [part, {"type": "text", "text": "what is <|im_end|> this?"}]},
                {"role": "assistant", "content": "a red square"},
                {"role": "user", "content": [{"type": "text", "text": "and "}, part]},
                {"role": "assistant", "content": "a blue one"},
            ],
        },
        {
            "images": ["2.png"],
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": [part, {"type": "text", "text": "name it"}]},
                {"role": "assistant", "content": "a circle"},
            ],
        },
    ]
    file = folder / "conversations.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def pack(files: list, output: Path, processor: Path, *options: str) -> int:
    names = [*map(str, files), "--output", str(output), "--processor", str(processor), "--num-workers", "1", *options]
    return cli.main(["pack", *names])


@pytest.fixture(scope="module", params=FAMILIES)
def planned(request, tmp_path_factory, qwen_vl_folder) -> tuple[Path, Path]:
    """A checkpoint, and a folder with `captions` and `conversations`, planned at 9 tokens' worth of pixels."""
    folder, model = tmp_path_factory.mktemp("planned"), qwen_vl_folder(request.param)
    write_captions(folder / "0.tar")
    options = ["--max-length", "96", "--max-pixels", str(MAX_PIXELS)]
    assert pack([folder / "0.tar"], folder / "captions", model, *options) == 0
    conversations = write_conversations(folder)
    images = ["--images", str(folder / "images")]
    assert pack([conversations], folder / "conversations", model, *images, *options) == 0
    return model, folder


def test_what_cannot_be_taken_is_a_named_skip(planned):
    _, folder = planned
    plan = json.loads((folder / "captions" / "plan.json").read_text())
    assert plan["vision"]["family"] == "qwen_vl" and plan["vision"]["max_pixels"] == MAX_PIXELS
    rows = pq.read_table(folder / "captions" / "skipped-00000.parquet").to_pylist()
    skipped = {row["key"]: row["reason"] for row in rows}
    assert skipped == {"101": "image_aspect", "102": "corrupt_image"}


def test_packs_have_the_ids_and_pixels_of_the_stock_processor(planned):
    model, folder = planned
    processor = AutoProcessor.from_pretrained(model)
    packs = PackedDataset(folder / "captions", processor)
    items = [packs[i] for i in range(len(packs))]
    assert all(not item["dropped"] for item in items)
    assert sum(item["media"] for item in items) == 10
    stock = AutoProcessor.from_pretrained(model)
    stock.image_processor.size["longest_edge"] = MAX_PIXELS
    for item in items:
        assert item["position_ids"].shape == (4, len(item["input_ids"]))
        text = processor.tokenizer.decode(item["input_ids"])
        documents = [f"{one}<|endoftext|>" for one in text.split("<|endoftext|>")[:-1]]
        start = 0
        for document in documents:
            name = document.removesuffix("<|endoftext|>")[-3:]
            width, height = (60, 200) if name == "100" else SIZES[int(name) % len(SIZES)]
            image = Image.new("RGB", (width, height))
            prompt = f"<|vision_start|><|image_pad|><|vision_end|>a picture called {name}<|endoftext|>"
            expected = stock(text=[prompt], images=[image], return_tensors="pt")["input_ids"][0]
            stop = start + len(expected)
            assert torch.equal(item["input_ids"][start:stop], expected)
            assert item["labels"][start] == -100 and item["position_ids"][:, start].eq(0).all()
            start = stop
        assert start == len(item["input_ids"])


def test_a_conversation_is_what_the_processor_renders(planned):
    """But for the control token in the data, which stays text; answers with their end are labelled."""
    model, folder = planned
    processor = AutoProcessor.from_pretrained(model)
    packs = PackedDataset(folder / "conversations", processor)
    items = [packs[i] for i in range(len(packs))]
    ids = torch.cat([item["input_ids"] for item in items])
    assert sum(item["media"] for item in items) == 3 and not any(item["dropped"] for item in items)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    system = processor.__class__.__name__ != "Qwen3VLProcessor"
    assert ids.eq(end).sum() == 4 + 3 + system
    labels = torch.cat([item["labels"] for item in items])
    answers = processor.tokenizer.decode(labels[labels != -100])
    assert answers.count("<|im_end|>\n") == 3 and "a red square<|im_end|>" in answers
    assert "<|image_pad|>" not in answers and "Be short" not in answers


def test_control_tokens_in_data_stay_text(planned, tmp_path):
    model, _ = planned
    texts = ["see <|vision_start|><|image_pad|><|vision_end|> here<|endoftext|>", "and <|im_end|> <|video_pad|>"]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert pack([tmp_path / "texts.jsonl"], tmp_path / "packs", model, "--max-length", "200") == 0
    processor = AutoProcessor.from_pretrained(model)
    (item,) = PackedDataset(tmp_path / "packs", processor)
    special = {token.content: number for number, token in processor.tokenizer.added_tokens_decoder.items()}
    end = special["<|endoftext|>"]
    assert [number for number in item["input_ids"].tolist() if number in special.values()] == [end, end]
    assert all(text in processor.tokenizer.decode(item["input_ids"]) for text in texts)


def test_another_budget_is_another_plan(planned, capsys):
    model, folder = planned
    again = ["--max-length", "96", "--max-pixels", str(2 * MAX_PIXELS)]
    assert pack([folder / "0.tar"], folder / "captions", model, *again) == 2
    assert "max_pixels" in capsys.readouterr().err
    with_option = ["--image-seq-length", "4"]
    assert pack([folder / "0.tar"], folder / "other", model, *with_option) == 2
    assert "image_seq_length" in capsys.readouterr().err
    processor = AutoProcessor.from_pretrained(model)
    processor.image_processor.patch_size = 8
    with pytest.raises(ValueError, match="patch_size"):
        PackedDataset(folder / "captions", processor)


def test_budgets_of_pixels_mix_in_one_batch(planned, tmp_path):
    """Each source keeps its own: the patches of a batch are those of both plans."""
    model, folder = planned
    options = ["--max-length", "96", "--max-pixels", str(MAX_PIXELS // 2)]
    assert pack([folder / "0.tar"], tmp_path / "small", model, *options) == 0
    processor = AutoProcessor.from_pretrained(model)
    mixture = PackMixture(
        parse_sources([{"path": str(tmp_path / "small")}, {"path": str(folder / "captions")}]), processor
    )
    assert mixture.phases == [[0, 1]]
    items = [mixture[i] for i in range(len(mixture))]
    area = processor.image_processor.patch_size**2
    most = {0: 0, 1: 0}
    for item in items:
        most[item["source"]] = max(most[item["source"]], int(item["image_grid_thw"].prod(1).max()) * area)
    assert most[0] < most[1]
    batch = PackingCollator()(items)
    patches = int(mixture.patches_per_pack.sum())
    assert len(batch["pixel_values"]) == batch["packing_stats"]["patches"] == patches
    assert len(batch["image_grid_thw"]) == 2 * 10


class StopAt(TrainerCallback):
    """The power cut: an exception in the middle of training."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def make_trainer(model: Path, packs: list, output: Path, callbacks: list | None = None, **changes) -> PackedTrainer:
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "train_vision_tower": True,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "gradient_accumulation_steps": 2,
    } | changes
    return PackedTrainer(
        model=AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32),
        args=PackedTrainingArguments(str(output), **options),
        train_dataset=packs,
        processing_class=AutoProcessor.from_pretrained(model),
        callbacks=callbacks,
    )


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_a_killed_run_resumes_with_the_very_same_losses_and_saves_the_hubs_names(planned, tmp_path):
    """The stock trainer would go on from random weights, with a warning: the checkpoint has other names."""
    model, folder = planned
    processor = AutoProcessor.from_pretrained(model)
    packs = [item for name in ("captions", "conversations") for item in PackedDataset(folder / name, processor)]
    packs.append({**packs[-1], **{name: packs[-1][name][:0] for name in ("pixel_values", "image_grid_thw")}})
    text = torch.arange(20) + 30
    packs[-1] |= {"input_ids": text, "labels": text, "position_ids": torch.arange(20).expand(4, -1), "media": 0}

    whole = make_trainer(model, packs, tmp_path / "whole")
    whole.train()
    cut = make_trainer(model, packs, tmp_path / "cut", callbacks=[StopAt()])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    checkpoint = newest_complete_checkpoint(tmp_path / "cut")
    assert Path(checkpoint).name == "checkpoint-2"
    resumed = make_trainer(model, packs, tmp_path / "cut")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 4
    weights = dict(whole.model.named_parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in resumed.model.named_parameters())
    assert resumed.summary()["flops"] == whole.summary()["flops"] > 0

    save_final_model(whole, tmp_path / "model")
    with (
        safe_open(model / "model.safetensors", "pt") as ours,
        safe_open(tmp_path / "model/model.safetensors", "pt") as f,
    ):
        assert set(ours.keys()) == set(f.keys())
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded).__name__ == json.loads((tmp_path / "model/config.json").read_text())["architectures"][0]
    assert all(torch.equal(parameter, weights[name]) for name, parameter in loaded.named_parameters())
    again = AutoProcessor.from_pretrained(tmp_path / "model")
    assert again.chat_template == processor.chat_template and len(again.tokenizer) == len(processor.tokenizer)


def test_a_checkpoint_of_other_names_is_an_error(planned, tmp_path):
    model, folder = planned
    packs = list(PackedDataset(folder / "captions", AutoProcessor.from_pretrained(model)))
    with pytest.raises(KeyboardInterrupt):
        make_trainer(model, packs, tmp_path, callbacks=[StopAt()]).train()
    checkpoint = newest_complete_checkpoint(tmp_path)
    file = Path(checkpoint) / "model.safetensors"
    with safe_open(file, "pt") as opened:
        weights = {name.replace("model.visual.", "visual."): opened.get_tensor(name) for name in opened.keys()}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(Exception, match="visual"):
        make_trainer(model, packs, tmp_path).train(resume_from_checkpoint=checkpoint)


def test_the_figures_count_patches(planned):
    model, folder = planned
    packs = PackedDataset(folder / "captions", AutoProcessor.from_pretrained(model))
    items = [packs[i] for i in range(len(packs))]
    stats = PackingCollator()(items)["packing_stats"]
    assert stats["patches"] == sum(len(item["pixel_values"]) for item in items) == packs.per_pack("patches").sum()
    assert stats["vision_tokens"] * 4 == stats["patches"]
