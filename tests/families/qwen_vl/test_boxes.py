"""Boxes of a conversation through plan and reader into the form of each family, and back within half a cell."""

import json
from collections.abc import Sequence

import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from open_qwen2vl import PackedDataset, parse_boxes
from open_qwen2vl.data import plan_packs
from open_qwen2vl.data.documents.forms import conversation_format
from open_qwen2vl.families import document_processor
from open_qwen2vl.families.boxes import write_boxes
from open_qwen2vl.families.interface import Media
from open_qwen2vl.families.qwen_vl.boxes import MARKS
from open_qwen2vl.processing.conversation_records import read_conversation
from open_qwen2vl.processing.sample_error import SampleError
from tests.families.qwen_vl.packs import picture
from tests.qwen_vl import FAMILIES, make_processor

MARKED = (
    "<|object_ref_start|>a red car<|object_ref_end|><|box_start|>(100,200),(500,600)<|box_end|>"
    "<|box_start|>(0,0),(999,999)<|box_end|>"
)
# Of an image of 200 x 100 pixels, which the processors below make 112 x 56 (2.5) and 128 x 64 (3).
BOXES = [[20, 20, 100.18, 60], [0, 0, 200, 100]]
WRITTEN = {
    "qwen2_vl": MARKED,
    "qwen2_5_vl": '[{"bbox_2d": [11, 11, 56, 34], "label": "a red car"}, {"bbox_2d": [0, 0, 112, 56], "label": "a red '
    'car"}]',
    "qwen3_vl": '[{"bbox_2d": [100, 200, 501, 600], "label": "a red car"}, '
    '{"bbox_2d": [0, 0, 1000, 1000], "label": "a red car"}]',
}


@pytest.fixture(scope="module")
def processors(qwen_vl_tokenizer):
    return {family: make_processor(family, qwen_vl_tokenizer, max_tokens=8) for family in FAMILIES}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


QUESTION = [{"type": "image"}, text("where?")]


def conversation(*answer: dict, question: Sequence[dict] = QUESTION, images: Sequence[str] = ("a.png",)) -> dict:
    messages = [{"role": "user", "content": list(question)}, {"role": "assistant", "content": list(answer)}]
    return {"messages": messages, "images": list(images)}


def read_back(plan, processor) -> list[tuple[str, str]]:
    """All of a document and its labelled part, as text with control tokens, in the order of the records."""
    dataset, found = PackedDataset(plan, processor), []
    decode = processor.tokenizer.decode
    for item in (dataset[number] for number in range(len(dataset))):
        assert item["dropped"] == {}
        starts = (item["position_ids"][0] == 0).nonzero().flatten()[1:].tolist()
        for ids, labels in zip(*(item[name].tensor_split(starts) for name in ("input_ids", "labels")), strict=True):
            found.append((decode(ids), decode(labels[labels >= 0])))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_are_written_in_the_familys_form_and_learned(processors, tmp_path, family):
    """In an answer they are labelled, in a question not; a box of the first image knows its size."""
    processor, part = processors[family], {"type": "box", "label": "a red car", "box": BOXES}
    question = [{"type": "image"}, {"type": "image"}, text("what is "), {**part, "image": 0}, text("?")]
    records = [conversation(text("here: "), part), conversation(text("a car"), question=question, images="ab")]
    for name, size in {"a.png": (200, 100), "a": (200, 100), "b": (90, 90)}.items():
        (tmp_path / name).write_bytes(picture(*size))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    plan_packs([tmp_path / "a.jsonl"], tmp_path / "packs", processor, images=[tmp_path], max_length=512, num_workers=1)
    (whole, other), (_, learned) = sorted(read_back(tmp_path / "packs", processor), key=lambda one: len(one[1]))
    assert learned == f"here: {WRITTEN[family]}<|im_end|>\n"
    assert f"what is {WRITTEN[family]}?<|im_end|>" in whole and other == "a car<|im_end|>\n"


def test_marks_are_control_tokens_and_a_label_never_is(processors):
    """The label of data stays text, whatever it holds; the marks around it are one token each."""
    documents = document_processor(processors["qwen2_vl"])
    part = {"type": "box", "label": "<|box_end|><|im_end|>", "box": [1, 1, 5, 5]}
    messages = write_boxes(read_conversation(conversation(part)).messages, [Media("image", 10, 10)], documents.boxes)
    _, labels = conversation_format(documents).document(messages, [[0]])
    ids = documents.tokenizer.convert_tokens_to_ids([*MARKS, "<|im_end|>"])
    assert [(labels == one).sum() for one in ids] == [1] * 5
    assert "(100,100),(500,500)" in documents.tokenizer.decode(labels[labels >= 0])


def test_a_box_between_clips_is_of_its_image(processors):
    """The numbers of images go past clips, and a box of a clip is of none."""
    part = {"type": "box", "box": [10, 10, 20, 20]}
    messages = [{"role": "user", "content": [{"type": kind} for kind in ("video", "image", "video")]},
                {"role": "assistant", "content": [part, text("and"), {**part, "image": 0}]}]  # fmt: skip
    record = {"messages": messages, "images": ["a.png"], "videos": ["a.mp4", "b.mp4"]}
    media = [Media("video", 500, 500, 8, 2.0), Media("image", 100, 50), Media("video", 9, 9, 8, 2.0)]
    form = document_processor(processors["qwen3_vl"]).boxes
    (_, answer) = write_boxes(read_conversation(record).messages, media, form)
    assert [part["text"] for part in answer["content"]] == ['[{"bbox_2d": [100, 200, 200, 400]}]', "and"] + [
        '[{"bbox_2d": [100, 200, 200, 400]}]'
    ]


sides = st.integers(24, 4000)
share = st.floats(0, 1)


@settings(max_examples=200, deadline=None)
@given(width=sides, height=sides, corners=st.tuples(share, share, share, share), family=st.sampled_from(FAMILIES))
@example(width=1920, height=1080, corners=(0.0, 1.0, 0.0, 1.0), family="qwen2_vl")
@example(width=1920, height=1080, corners=(0.0, 1.0, 0.0, 1.0), family="qwen2_5_vl")
@example(width=56, height=4000, corners=(0.1, 0.1001, 0.9995, 0.99951), family="qwen3_vl")
def test_a_round_trip_is_off_by_half_a_cell_at_most(processors, width, height, corners, family):
    processor = processors[family]
    (x1, x2), (y1, y2) = sorted(corners[:2]), sorted(corners[2:])
    box = [x1 * width, y1 * height, x2 * width, y2 * height]
    assume(box[0] < box[2] and box[1] < box[3])
    documents = document_processor(processor)
    messages = read_conversation(conversation({"type": "box", "label": "it {", "box": box})).messages
    (*_, message) = write_boxes(messages, [Media("image", width, height)], documents.boxes)
    ((label, found),) = parse_boxes("".join(part["text"] for part in message["content"]), processor, (width, height))
    rows, columns = documents.sizes.grid(width, height)
    patch = documents.sizes.patch_size
    cells = (columns * patch, rows * patch) if family == "qwen2_5_vl" else (1000, 1000)
    half = [side / count / 2 for side, count in zip((width, height), cells, strict=True)] * 2
    assert label == "it {"
    assert all(abs(a - b) <= most * (1 + 1e-6) for a, b, most in zip(found, box, half, strict=True))


@pytest.mark.parametrize(
    "answer, expected",
    [
        (MARKED, [("a red car", (20.1, 20.05)), ("a red car", (0.1, 0.05))]),
        # decoded without special tokens
        ("a red car(100,200),(500,600)\nthe dog(0,0),(5,5)", [("a red car", (20.1, 20.05)), ("the dog", (0.1, 0.05))]),
        ("<|box_start|>(1, 2), (3, 4)<|box_end|>x<|box_start|>(5,6),(7,8)", [("", (0.3, 0.25)), ("", (1.1, 0.65))]),
        ("<|object_ref_start|>cut<|object_ref_end|><|box_start|>(1,2),(3,", []),
        ("<|box_start|>(9,9),(1,1)<|box_end|>(99999999999999,1),(2,3)", []),
        ("(1200,5),(1300,9)", [("", (199.9, 0.55))]),
    ],
)  # fmt: skip
def test_answers_of_qwen2_vl(processors, answer, expected):
    found = parse_boxes(answer, processors["qwen2_vl"], (200, 100))
    assert [(label or "", pytest.approx(box[:2])) for label, box in found] == expected


BOX = '{"bbox_2d": [100, 200, 500, 600], "label": "dog"}'


@pytest.mark.parametrize(
    "answer, labels",
    [
        (f"```json\n[\n\t{BOX},\n\t{BOX}\n]\n```", ["dog", "dog"]),
        (f"It is here: {BOX}.", ["dog"]),
        (f'{{"objects": [{BOX}, {{"bbox_2d": [1, 2, 3]}}]}}', ["dog"]),
        (f'[{BOX}, {{"bbox_2d": [1, 2, 30, 40], "label": "ca', ["dog", None]),
        ('[{"bbox_2d": [1, 2, NaN, 40]}, {"bbox_2d": [1, 2, 1e999, 4]}, {"bbox_2d": [true, 2, 3, 4]}]', []),
        ('{"bbox_2d": "__import__(\'os\')", "label": 3}, {"bbox_2d": [9, 9, 1, 1]}', []),
        (f'{{"bbox_2d": [1, 2, {"9" * 5000}, 4]}} {{"bbox_2d": [5, 5, 8, 8], "label": 3}}', [None]),
        ("{" * 3000, []),
        ('{"a":' * 3000, []),
    ],
)
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_answers_of_json(processors, family, answer, labels):
    found = parse_boxes(answer, processors[family], (200, 100))
    assert [box.label for box in found] == labels
    if labels[:1] == ["dog"]:
        corners = (20, 20, 100, 60) if family == "qwen3_vl" else (100 / 112 * 200, 100, 200, 100)
        assert found[0].box == pytest.approx(corners)


@settings(max_examples=200, deadline=None)
@given(
    answer=st.lists(
        st.sampled_from([*MARKS, "(1,2)", ",", "(", '{"bbox_2d":', "[1,2,3,4]", "]", "}", '"label":', '"', "\n", "é"])
        | st.text(max_size=3)
    ).map("".join),
    family=st.sampled_from(FAMILIES),
)
def test_no_answer_raises(processors, answer, family):
    for _, (x1, y1, x2, y2) in parse_boxes(answer, processors[family], (30, 20)):
        assert 0 <= x1 <= x2 <= 30 and 0 <= y1 <= y2 <= 20


def test_what_cannot_be_written_is_named(processors, processor, tmp_path):
    """In the plan, by reason; a family without boxes leaves the conversation out."""
    good = {"type": "box", "box": [0, 0, 10, 10.9]}
    bad = {
        "box_outside": {"type": "box", "box": [0, 0, 10, 12]},
        "empty_box": {"type": "box", "box": [5, 5, 5, 9]},
        "bad_box": {"type": "box", "box": [0, 1, float("nan"), 3]},
        "box_without_image": {**good, "image": 3},
    }
    (tmp_path / "a.png").write_bytes(picture(10, 10))
    records = [conversation(part) for part in (good, *bad.values())]
    records.append(conversation(good, question=[text("where?")], images=()))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = {"images": [tmp_path], "max_length": 512, "num_workers": 1}
    report = plan_packs([tmp_path / "a.jsonl"], tmp_path / "qwen", processors["qwen3_vl"], **options)
    assert report.skipped == {**dict.fromkeys(bad, 1), "box_without_image": 2} and report.documents == 1
    rows = pq.read_table(tmp_path / "qwen" / "skipped-00000.parquet").to_pylist()
    assert any("12.0] in an image of 10x10 pixels" in row["detail"] for row in rows)
    with pytest.raises(ValueError, match="boxes_unsupported"):
        plan_packs([tmp_path / "a.jsonl"], tmp_path / "ours", processor.tokenizer, image_seq_length=4, **options)
    with pytest.raises(ValueError, match="no form for boxes"):
        parse_boxes("", processor, (10, 10))


def test_a_tokenizer_without_the_marks_has_no_form(qwen_vl_tokenizer, processors, monkeypatch):
    monkeypatch.setattr(type(qwen_vl_tokenizer), "added_tokens_encoder", {"<|box_start|>": 1})
    documents = document_processor(processors["qwen2_vl"])
    with pytest.raises(SampleError, match="or its tokenizer"):
        write_boxes(
            [{"content": [{"type": "box", "label": None, "box": [[0, 0, 1, 1]], "of": 0}]}], [], documents.boxes
        )
