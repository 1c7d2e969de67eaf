"""The command `boxes` on small files of the published forms, down to the boxes in a plan."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from open_qwen2vl import PackedDataset, cli
from open_qwen2vl.data import plan_packs
from open_qwen2vl.processing.conversation_records import read_conversation
from tests.qwen_vl import make_processor


def save(path: Path, *size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").convert("RGB").resize(size).save(path)


@pytest.fixture
def coco(tmp_path) -> Path:
    """Two cats and a dog, a crowd, a box half out, one nearly out, one without area, one of no category."""
    boxes = [
        (1, [10.5, 20.25, 30.0, 40.0]), (1, [50, 5, 20, 10]), (2, [5, 60, 40, 30]), (3, [90, 0, 20, 50]),
        (3, [98, 0, 20, 50]), (1, [0, 0, 0, 5]), (1, [7, 7, 0.004, 5]), (9, [1, 1, 5, 5]),
    ]  # fmt: skip
    annotations = [
        {"id": n, "image_id": 7, "category_id": category, "bbox": box, "area": 1, "iscrowd": 0,
         "segmentation": [[1.0, 2.0]]}
        for n, (category, box) in enumerate(boxes)
    ]  # fmt: skip
    annotations += [
        {
            "id": 20,
            "image_id": 8,
            "category_id": 2,
            "bbox": [0, 0, 9, 9],
            "iscrowd": 1,
            "segmentation": {"counts": []},
        },
        {"id": 21, "image_id": 99, "category_id": 2, "bbox": [0, 0, 9, 9], "iscrowd": 0},
        {"id": 22, "image_id": 9, "category_id": 2, "bbox": [10, 0, 20, 50], "iscrowd": 0},
        {"id": 23, "image_id": 10, "category_id": 2, "bbox": [10, 0, 20, 50], "iscrowd": 0},
        {"id": 24, "image_id": 11, "category_id": 2, "bbox": [10, 0, 20, 50], "iscrowd": 0},
    ]
    images = [{"id": n, "file_name": f"{n:012}.jpg", "width": 100, "height": 100} for n in (7, 8, 9, 10, 11)]
    categories = [{"id": n, "name": name} for n, name in enumerate(("cat", "dog", "bird"), 1)]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "instances_val2017.json").write_text(json.dumps(content))
    for number, size in {7: (100, 100), 8: (100, 100), 9: (200, 200), 10: (100, 60)}.items():  # 11 is missing
        save(tmp_path / "val2017" / f"{number:012}.jpg", *size)
    return tmp_path / "instances_val2017.json"


def run(source: Path, images: Path, task: str, *options: str) -> list[dict]:
    output = source.parent / "out.jsonl"
    words = ["boxes", str(source), "--images", str(images), "--task", task, "--output", str(output), *options]
    assert cli.main(words) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(read_conversation(record) for record in records)
    return records


def turns(record: dict) -> list[tuple[list, list]]:
    contents = [message["content"] for message in record["messages"]]
    assert contents[0][0] == {"type": "image"} and len(record["images"]) == 1
    contents[0] = contents[0][1:]
    return list(zip(contents[::2], contents[1::2], strict=True))


def test_coco_detection(coco, capsys):
    """Scaled to the file, clipped, by label and from top to bottom; what is left out is counted."""
    first, second = run(coco, coco.parent / "val2017", "detection")
    ((question, answer),) = turns(first)
    assert [part["type"] for part in question] == ["text"]
    assert answer == [
        {"type": "box", "label": "bird", "box": [[90, 0, 100, 50]]},
        {"type": "box", "label": "cat", "box": [[50, 5, 70, 15], [10.5, 20.25, 40.5, 60.25]]},
        {"type": "box", "label": "dog", "box": [[5, 60, 45, 90]]},
    ]
    assert turns(second)[0][1] == [{"type": "box", "label": "dog", "box": [[20, 0, 60, 100]]}]
    assert (first["images"], second["images"]) == (["000000000007.jpg"], ["000000000009.jpg"])
    report = capsys.readouterr().out
    assert "2 conversations with 2 questions" in report and "clipped_boxes 1, resized_images 1" in report
    left_out = ("bad_annotation 1", "box_outside 1", "crowd 1", "empty_box 2", "missing_image 1", "other_shape 1",
                "unknown_image 1")  # fmt: skip
    assert ", ".join(left_out) in report


def test_coco_referring_asks_for_what_is_there_once(coco):
    """The second conversation begins where the first has its fill; the same run gives the same bytes."""
    first, _ = records = run(coco, coco.parent / "val2017", "referring")
    asked = {part["label"]: part["box"] for _, (part,) in turns(first)}
    assert asked == {"dog": [5, 60, 45, 90]}  # two cats; of the two birds one is nearly out, and still a bird
    assert all("dog" in question[0]["text"] for question, _ in turns(first))
    assert run(coco, coco.parent / "val2017", "referring") == records


def test_descriptions_have_the_box_in_the_question(coco):
    records = run(coco, coco.parent / "val2017", "description", "--max-turns", "3")
    assert [len(turns(record)) for record in records] == [3, 1, 1] and records[0]["id"] == records[1]["id"]
    for question, answer in (turn for record in records for turn in turns(record)):
        assert [part["type"] for part in question] == ["text", "box", "text"] and answer[0]["text"] in "cat dog bird"


def test_visual_genome(tmp_path):
    regions = [
        {"region_id": 1, "width": 82, "height": 139, "image_id": 1, "phrase": "the clock is green", "y": 57, "x": 421},
        {"region_id": 2, "width": 10, "height": 10, "image_id": 1, "phrase": "a shade", "y": 0, "x": 0},
        {"region_id": 3, "width": 10, "height": 10, "image_id": 1, "phrase": "a shade", "y": 50, "x": 50},
        {"region_id": 4, "width": 10, "height": 10, "image_id": 1, "phrase": " ", "y": 50, "x": 50},
        {"region_id": 5, "width": 10, "image_id": 1, "phrase": "no height", "y": 50, "x": 50},
    ]
    content = [{"id": 1, "regions": regions}, {"id": 2, "regions": regions[:1]}, {"id": 3, "regions": regions[:1]}]
    (tmp_path / "region_descriptions.json").write_text(json.dumps(content))
    source = tmp_path / "region_descriptions.json"
    assert cli.main(["boxes", str(source), "--images", str(tmp_path), "--task", "referring",
                     "--output", str(tmp_path / "out.jsonl")]) == 2  # fmt: skip
    data = [{"image_id": n, "width": 800, "height": 600, "url": f"https://x/VG_100K/{n}.jpg"} for n in (1, 2)]
    (tmp_path / "image_data.json").write_text(json.dumps(data))
    save(tmp_path / "VG_100K" / "1.jpg", 800, 600)
    save(tmp_path / "VG_100K_2" / "2.jpg", 600, 800)
    (record,) = run(source, tmp_path, "referring")
    ((question, answer),) = turns(record)
    assert answer == [{"type": "box", "label": "the clock is green", "box": [421, 57, 503, 196]}]
    assert "the clock is green" in question[0]["text"] and record["images"] == ["VG_100K/1.jpg"]


REF = {"ann_id": 5, "ref_id": 0, "image_id": 7, "category_id": 1, "split": "train", "sent_ids": [0, 1],
       "file_name": "COCO_train2014_000000000007_0.jpg"}  # fmt: skip
SENTENCES = [
    {"raw": "Man on LEFT!", "sent": "man on left", "sent_id": 0, "tokens": ["man", "on", "left"]},
    {"raw": "guy", "sent": "guy", "sent_id": 1, "tokens": ["guy"]},
]
ANNOTATION = {"id": 5, "image_id": 7, "category_id": 1, "bbox": [10, 20, 30, 40], "segmentation": [[1, 2]]}
IMAGE = {"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "width": 100, "height": 100}


def check_refcoco(records: list[dict]) -> None:
    (record,) = records
    found = [part["label"] for _, (part,) in turns(record)]
    assert found == ["man on left", "guy"] and turns(record)[0][1][0]["box"] == [10, 20, 40, 60]


def test_refcoco_from_refs_and_from_a_table_of_the_hub(tmp_path, capsys):
    save(tmp_path / "images/train2014" / IMAGE["file_name"], 100, 100)
    refs = [{**REF, "sentences": SENTENCES}, {**REF, "sentences": SENTENCES, "split": "val"}]
    (tmp_path / "refs.json").write_text(json.dumps(refs))
    (tmp_path / "instances.json").write_text(json.dumps({"images": [IMAGE], "annotations": [ANNOTATION]}))
    check_refcoco(run(tmp_path / "refs.json", tmp_path / "images/train2014", "referring"))
    assert "other_split 1" in capsys.readouterr().out
    rows = [{**ref, "raw_anns": json.dumps(ANNOTATION), "raw_image_info": json.dumps(IMAGE),
             "bbox": [10.0, 20.0, 40.0, 60.0]} for ref in refs]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    check_refcoco(run(tmp_path / "train.parquet", tmp_path / "images/train2014", "referring"))


def test_what_is_refused_is_one_line_and_leaves_no_file(coco, tmp_path, capsys):
    (tmp_path / "refs(unc).p").write_bytes(b"cos\nsystem\n(S'touch bad'\ntR.")
    (tmp_path / "refs.json").write_text(json.dumps([{**REF, "sentences": SENTENCES}]))
    (tmp_path / "list.json").write_text("[{}]")
    (tmp_path / "cut.json").write_text('{"images": [')
    pq.write_table(pa.table({"image": [1]}), tmp_path / "other.parquet")
    images = str(tmp_path / "val2017")
    for name, task, said in (
        ("refs(unc).p", "referring", "pickle"),
        ("refs.json", "referring", "instances.json is missing"),
        ("list.json", "referring", "neither regions"),
        ("cut.json", "detection", "invalid json"),
        ("other.parquet", "referring", "no column image_id"),
        ("absent.json", "detection", "absent.json"),
    ):
        words = [
            "boxes",
            str(tmp_path / name),
            "--images",
            images,
            "--task",
            task,
            "--output",
            str(tmp_path / "o.jsonl"),
        ]
        assert cli.main(words) == 2, name
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in error and "Traceback" not in error, name
    assert cli.main(["boxes", str(coco), "--images", images, "--task", "detection", "--output", "o.json"]) == 2
    assert not list(tmp_path.glob("o.jsonl*")) and not Path("bad").exists()


def test_conversations_are_planned_with_their_images(coco, qwen_vl_tokenizer):
    processor = make_processor("qwen2_vl", qwen_vl_tokenizer)
    run(coco, coco.parent / "val2017", "detection")
    options = {"images": [coco.parent / "val2017"], "max_length": 512, "num_workers": 1}
    report = plan_packs([coco.parent / "out.jsonl"], coco.parent / "packs", processor, **options)
    assert report.documents == 2 and report.skipped == {}
    text = processor.tokenizer.decode(PackedDataset(coco.parent / "packs", processor)[0]["input_ids"])
    assert "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(50,600),(450,900)<|box_end|>" in text
