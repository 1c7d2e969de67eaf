"""Conversations with tools from files to batches: the stock processor's ids, from json and tables, in both forms."""

import json

import datasets
import pytest
import torch
from PIL import Image

from open_qwen2vl import PackedDataset
from open_qwen2vl.data import plan_packs
from tests.families.qwen_vl.packs import SIZES, picture
from tests.qwen_vl import make_processor

OPTIONS = {"max_length": 1024, "num_workers": 1}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": "Do it.", "parameters": {"type": "object", "properties": {key: {}}}},
    }
    for name, key in (("move", "direction"), ("look", "far"))
]
PART = {"type": "image"}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def messages(part: dict) -> list[dict]:
    return [
        {"role": "user", "content": [part, text("go é")]},
        {"role": "assistant", "content": [text("I go.")], "tool_calls": [call("move", direction="left")]},
        {"role": "tool", "content": [text("moved "), part]},
        {"role": "assistant", "content": [], "tool_calls": [call("look", far=True)]},
        {"role": "tool", "content": [part, part]},
        {"role": "assistant", "content": [text("done")]},
    ]


RECORD = {"messages": messages(PART), "images": ["a.png"] * 4, "tools": TOOLS}


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(picture(*SIZES[0]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def item(path, processor, output, **options) -> dict:
    report = plan_packs([path], output, processor, images=["."], **OPTIONS, **options)
    assert report.skipped == {} and report.documents
    return PackedDataset(output, processor)[0]


def test_the_ids_are_those_of_the_stock_processor_with_tools(place, qwen_vl_tokenizer):
    processor = make_processor("qwen3_vl", qwen_vl_tokenizer)
    (place / "a.jsonl").write_text(json.dumps(RECORD))
    found = item("a.jsonl", processor, "packs")
    shown = messages({"type": "image", "image": Image.open("a.png").convert("RGB")})
    stock = processor.apply_chat_template(shown, tools=TOOLS, tokenize=True, return_dict=True, return_tensors="pt")
    assert found["input_ids"].tolist() == stock["input_ids"][0].tolist()
    assert torch.equal(found["image_grid_thw"], stock["image_grid_thw"])


@pytest.mark.parametrize("form", ["structs", "json"])
def test_a_table_gives_what_its_json_gives(place, qwen_vl_tokenizer, form):
    """Structs have all arguments of all functions, null where they are another's."""
    processor = make_processor("qwen2_vl", qwen_vl_tokenizer)
    row = json.loads(json.dumps(RECORD))
    if form == "json":
        row["tools"] = json.dumps(TOOLS)
        for message in row["messages"]:
            for one in message.get("tool_calls", ()):
                one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
    if form == "structs":
        for tool in row["tools"]:  # arrow has no empty structs
            tool["function"]["parameters"]["properties"] = {"direction": {"type": "string"}}
    datasets.Dataset.from_list([row]).to_parquet(place / "a.parquet")
    (place / "a.jsonl").write_text(json.dumps(row))
    found = item("a.parquet", processor, "packs")
    assert "null" not in qwen_vl_tokenizer.decode(found["input_ids"])
    assert found["input_ids"].tolist() == item("a.jsonl", processor, "others")["input_ids"].tolist()


def test_the_form_of_calls_is_part_of_the_plan(place, qwen_vl_tokenizer, caplog):
    processor = make_processor("qwen2_vl", qwen_vl_tokenizer)
    (place / "a.jsonl").write_text(json.dumps(RECORD))
    found = item("a.jsonl", processor, "packs", tool_form="function")
    labels = found["labels"]
    assert qwen_vl_tokenizer.decode(labels[labels >= 0]).endswith("*RESULT*:*RETURN*: done<|im_end|>\n")
    assert json.loads((place / "packs/plan.json").read_text())["tool_form"] == "function"
    assert "not read" not in caplog.text
    with pytest.raises(ValueError, match="tool_form"):
        plan_packs(["a.jsonl"], "packs", processor, images=["."], **OPTIONS)
    with pytest.raises(ValueError, match="tool_form must be tool_call or function"):
        plan_packs(["a.jsonl"], "packs", processor, tool_form="hermes", **OPTIONS)
    (place / "t.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="--tool-form is for conversations"):
        plan_packs(["t.jsonl"], "texts", processor, tool_form="function", **OPTIONS)


def test_without_tools_nothing_is_different(place, qwen_vl_tokenizer):
    processor = make_processor("qwen2_vl", qwen_vl_tokenizer)
    plain = {
        "messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "<tool_call> *RESULT*:"}]
    }
    (place / "a.jsonl").write_text(json.dumps(plain))
    one, other = (item("a.jsonl", processor, form, tool_form=form) for form in ("tool_call", "function"))
    stock = processor.apply_chat_template(plain["messages"], tokenize=True)
    assert one["input_ids"].tolist() == other["input_ids"].tolist() == stock[0]
    assert one["labels"].tolist() == other["labels"].tolist()
    assert "tool_form" not in json.loads((place / "tool_call/plan.json").read_text())
