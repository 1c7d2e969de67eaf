"""`pack --share-images`: which conversations become one document, what is counted, what is lost in training."""

import json
from collections import Counter

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from open_qwen2vl import (
    OpenQwen2VLForConditionalGeneration,
    PackedDataset,
    PackedTrainer,
    PackedTrainingArguments,
    PackingCollator,
    cli,
)
from open_qwen2vl.data import PackMixture, parse_sources, plan_packs
from tests.data.conftest import encode_image
from tests.shared_pictures import write_conversations

OPTIONS = {"image_seq_length": 4, "max_length": 256, "num_workers": 1}


def turns(question: str = "what?", answer: str = "a cat", mark: str = "<image>\n") -> list[dict]:
    return [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]


def png(number: int) -> bytes:
    return encode_image(Image.new("RGB", (8, 8), (number, 0, 7)))


@pytest.fixture
def folder(tmp_path):
    """With pictures 0.png to 4.png, of which 3.png has the bytes of 0.png."""
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(png(0 if number == 3 else number))
    return tmp_path


def plan(folder, records, processor, name="packs", **options):
    (folder / f"{name}.json").write_text(json.dumps(records))
    options = {**OPTIONS, "images": (folder,), "share_images": True, **options}
    report = plan_packs([folder / f"{name}.json"], folder / name, processor.tokenizer, **options)
    return report, PackedDataset(folder / name, processor)


def documents_of(dataset) -> set[tuple[str, ...]]:
    """Keys of the conversations that share a picture."""
    found = []
    for index in range(len(dataset)):
        for row in dataset._documents(index):
            if row["shared"]:
                found[-1] += (row["key"],)
            else:
                found.append((row["key"],))
    return {tuple(sorted(keys)) for keys in found}


def test_what_becomes_one_document_and_what_stays_alone(folder, processor):
    learned = [{"from": "human", "value": "draw it"}, {"from": "gpt", "value": "<image> so"}]
    records = [
        {"id": "a1", "image": "0.png", "conversations": turns("what is shown?")},
        {"id": "b1", "image": "1.png", "conversations": turns(mark="look: <image>")},
        {"id": "a2", "image": "./0.png", "conversations": turns() + turns(mark="")},
        {"id": "c1", "image": "3.png", "conversations": turns()},
        {"id": "b2", "image": "1.png", "conversations": turns("and?", mark="look: <image>")},
        {"id": "a3", "image": "0.png", "conversations": turns(mark="before <image>")},
        {"id": "a4", "image": ["0.png", "1.png"], "conversations": turns() + turns(mark="or <image>")},
        {"id": "d1", "image": "2.png", "conversations": learned},
        {"id": "d2", "image": "2.png", "conversations": learned},
        {"id": "n1", "conversations": turns(mark="")},
    ]
    report, dataset = plan(folder, records, processor)
    assert documents_of(dataset) == {("a1", "a2", "a4"), ("b1", "b2"), ("a3",), ("c1",), ("d1",), ("d2",), ("n1",)}
    assert (report.documents, report.images, report.shared) == (10, 7, 3)
    assert report.unshared == {"learned_prefix": 2, "other_prefix": 1}
    _, alone = plan(folder, records, processor, "alone", share_images=False)
    saved = alone.per_pack("tokens").sum() - dataset.per_pack("tokens").sum()
    assert report.shared_tokens == saved > 3 * 4
    line = f"3 pictures and {saved} positions saved; alone on a picture of several: learned_prefix 2, other_prefix 1"
    assert line in str(report) and "saved" not in str(alone.plan["totals"])
    # A branch counts on behind the picture, and has the second picture that it is about.
    assert sum(len(dataset[i]["pixel_values"]) for i in range(len(dataset))) == 7


def test_the_same_picture_by_bytes_and_by_image_id(folder, processor):
    rows = [
        {"id": str(i), "messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}],
         "images": [{"bytes": (folder / f"{i}.png").read_bytes(), "path": f"{i}.png"}]}
        for i in range(5)
    ]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(folder / "a.parquet")
    plan_packs([folder / "a.parquet"], folder / "rows", processor.tokenizer, share_images=True, **OPTIONS)
    assert documents_of(PackedDataset(folder / "rows", processor)) == {("0", "3"), ("1",), ("2",), ("4",)}
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes() + b"longer")
    ids = {"0": 7, "1": "8", "2": 7, "3": "7", "4": 7}
    records = [{"id": i, "image": f"{i}.png", "image_id": ids[i], "conversations": turns()} for i in ids]
    # Files of one id and another size are not the same picture.
    assert documents_of(plan(folder, records, processor)[1]) == {("0", "2", "3"), ("1",), ("4",)}


@pytest.mark.parametrize("table", [False, True])
def test_branches_of_a_record_are_conversations_with_its_picture(folder, processor, table):
    branches = [turns(f"question {i}", "yes" if i else "no") for i in range(3)]
    records = [{"id": "r", "image": "0.png", "branches": branches},
               {"id": "s", "image": "0.png", "branches": [turns("last")]}]  # fmt: skip
    apart = [{"id": "r", "image": "0.png", "conversations": branch} for branch in [*branches, turns("last")]]
    if table:
        datasets.Dataset.from_list(records).to_parquet(folder / "a.parquet")
        plan_packs([folder / "a.parquet"], folder / "packs", processor.tokenizer, share_images=True, **OPTIONS)
        dataset = PackedDataset(folder / "packs", processor)
    else:
        dataset = plan(folder, records, processor)[1]
    assert documents_of(dataset) == {("r", "r", "r", "s")}
    expected = plan(folder, apart, processor, "apart")[1]
    for name in ("input_ids", "labels", "position_ids", "pixel_values"):
        assert torch.equal(dataset[0][name], expected[0][name])
    # Without sharing they are documents of their own.
    report, alone = plan(folder, records, processor, "alone", share_images=False)
    assert (report.documents, report.images) == (4, 4) and len(documents_of(alone)) == 2


def test_a_document_begins_anew_where_it_would_grow_too_large(folder, processor):
    records = [{"id": str(i), "image": "0.png", "conversations": turns("what? " * 8)} for i in range(20)]
    report, dataset = plan(folder, records, processor, max_length=200)
    assert report.shared + len(documents_of(dataset)) == 20 and max(dataset.per_pack("tokens")) <= 200
    assert report.shared > 10 and sum(map(len, documents_of(dataset))) == 20
    both = [{"id": str(i), "image": ["0.png", "1.png"], "conversations": turns() + turns(mark="<image>")}
            for i in range(5)]  # fmt: skip
    report, dataset = plan(folder, both, processor, "images", max_images=3)
    assert sorted(map(len, documents_of(dataset))) == [1, 2, 2] and max(dataset.per_pack("images")) == 3
    assert report.unshared == {"no_room": 1}


def test_what_cannot_be_read_takes_along_all_on_its_picture(folder, processor, caplog):
    records = [{"id": f"a{i}", "image": "0.png", "conversations": turns(f"{i}?")} for i in range(3)]
    both = {"id": "b1", "image": ["1.png", "2.png"], "conversations": turns() + turns(mark="<image>")}
    records += [{"id": "b0", "image": "1.png", "conversations": turns()}, both]
    records += [{"id": "c", "image": "4.png", "conversations": turns()}]
    _, dataset = plan(folder, records, processor)
    whole = dataset[0]
    (folder / "0.png").write_bytes(b"no picture")
    (folder / "2.png").unlink()
    item = dataset[0]
    assert item["dropped"] == {"corrupt_image": 3, "missing_image": 2}
    assert "a0 and 2 on its picture" in caplog.text
    assert len(item["pixel_values"]) == 1 and len(whole["pixel_values"]) == 4
    stats = PackingCollator()([item])["packing_stats"]
    assert stats["documents"] == 1 and PackingCollator()([whole])["packing_stats"]["documents"] == 6


def test_what_is_no_branch_and_no_id_is_named(folder, processor):
    good = {"id": "g", "image": "0.png", "conversations": turns()}
    bad = {
        "bad_image_id": {"image": "0.png", "image_id": [1], "conversations": turns()},
        "bad_branches": {"image": "0.png", "branches": ["what?"]},
        "ambiguous_conversation": {"image": "0.png", "branches": [turns()], "conversations": turns()},
        "roles_out_of_order": {"image": "0.png", "branches": [turns()[::-1], turns("one more")]},
        "too_few_placeholders": {"image": "0.png", "branches": [turns(mark="")]},
    }
    no_lists = [{"image": "0.png", "branches": value} for value in ("what?", {"a": turns()}, [])]
    report, dataset = plan(folder, [good, *bad.values(), *no_lists], processor)
    assert report.skipped == {**dict.fromkeys(sorted(bad), 1), "bad_branches": 4} and report.documents == 2
    assert "branches is a str, no list" in str(pq.read_table(folder / "packs" / "skipped-00000.parquet").to_pylist())
    assert {len(keys) for keys in documents_of(dataset)} == {2}
    with pytest.raises(ValueError, match="made with share_images True, now None"):
        plan_packs([folder / "packs.json"], folder / "packs", processor.tokenizer, images=(folder,), **OPTIONS)


def test_share_images_is_for_conversations(caption_tars, tmp_path, processor):
    with pytest.raises(ValueError, match="--share-images is for conversations, not for captions"):
        plan_packs(caption_tars, tmp_path / "packs", processor.tokenizer, share_images=True, **OPTIONS)


def test_a_training_step_is_that_of_the_conversations_alone(folder, backbones, processor, tmp_path):
    """From the command line to the weights: one step over all packs, with sharing and without."""
    source, model_dir = write_conversations(tmp_path / "data", seed=3), tmp_path / "processor"
    processor.save_pretrained(model_dir)
    found = {}
    for name, options in (("alone", []), ("shared", ["--share-images"])):
        files = [str(source), "--images", str(tmp_path / "data/images"), "--output", str(tmp_path / name)]
        sizes = ["--processor", str(model_dir), "--max-length", "256", "--num-workers", "1"]
        assert cli.main(["pack", *files, *sizes, *options]) == 0
        data = PackMixture(parse_sources(str(tmp_path / name)), processor)
        torch.manual_seed(0)
        model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(
            **backbones, image_seq_length=4, attn_implementation="packed_varlen"
        )
        trainer = PackedTrainer(model, one_step(tmp_path / f"run-{name}", len(data)), train_dataset=data,
                                processing_class=processor)  # fmt: skip
        trainer.train()
        found[name] = trainer.summary(), trainer.state.log_history[0], dict(model.named_parameters())
    (alone, log, weights), (shared, own_log, own_weights) = found["alone"], found["shared"]
    assert own_log["loss"] == pytest.approx(log["loss"], rel=1e-5)
    assert shared["documents"] == alone["documents"] > shared["images"]
    assert shared["flops"] < alone["flops"]
    for name, weight in weights.items():
        torch.testing.assert_close(own_weights[name], weight, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def one_step(output_dir, packs: int) -> PackedTrainingArguments:
    """Arguments of one plain step over so many packs."""
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    plain = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0, "bf16": False}
    sizes = {"max_steps": 1, "gradient_accumulation_steps": packs, "max_grad_norm": 0.0, "dataloader_num_workers": 0}
    return PackedTrainingArguments(str(output_dir), **quiet, **plain, **sizes)


def test_every_conversation_stands_in_the_plan_once(tmp_path, processor):
    for seed in range(3):
        source = write_conversations(tmp_path / str(seed), seed=seed)
        options = {**OPTIONS, "images": (tmp_path / str(seed) / "images",), "records_per_group": 9}
        rows = {}
        for shares in (False, True):
            output = tmp_path / f"{seed}-{shares}"
            report = plan_packs([source], output, processor.tokenizer, share_images=shares, **options)
            data = PackedDataset(output, processor)
            rows[shares] = Counter(
                (row["key"], str(row["entries"]), row["tokens"] + row["shared"])
                for i in range(len(data))
                for row in data._documents(i)
            )
            assert not report.skipped
        assert rows[True] == rows[False] and report.shared
