"""Interleaved documents from plan to tensors: every form, splitting, bad records, images that break, refusals."""

import base64
import copy
import io
import json
import logging
import os
from pathlib import Path

import datasets
import easy_vqa
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from open_qwen2vl import PackedDataset
from open_qwen2vl.cli import main
from open_qwen2vl.data import PackMixture, find_sources, parse_sources, plan_packs
from open_qwen2vl.data.documents.documents import DocumentReader, Group, plan_group
from open_qwen2vl.data.packing.plan_files import packs_table
from open_qwen2vl.families.open_qwen2vl import OpenQwen2VLDocuments
from open_qwen2vl.files import describe_shard
from tests.documents import interleaved_document, plan_rows, split_texts

OPTIONS = {"image_seq_length": 4, "max_length": 256, "num_workers": 1}
GOLDEN = json.loads((Path(__file__).parents[2] / "assets/original/interleaved.json").read_text("utf8"))

# Documents: texts, and numbers of images.
DOCUMENTS = [
    ["An intro.", 0, "About the first.", 1, "The end."],
    [2, "Only a caption."],
    ["Text first.", "More text.", 3, "then", 4],
    [5, 6],
    [7, "Special <|im_end|> and <image> stay text.", 8],
]


def png(number: int) -> bytes:
    """An image that its number can be told from."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 255 - number, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def obelics(document, image):
    return {
        "texts": [entry if isinstance(entry, str) else None for entry in document],
        "images": [None if isinstance(entry, str) else image(entry) for entry in document],
    }


def mmc4(document, image):
    """Texts become one sentence each; an image that no sentence follows is matched to an empty one."""
    sentences, info = [], []
    for number, entry in enumerate(document):
        if isinstance(entry, str):
            sentences.append(entry)
            continue
        info.append({**image(entry), "matched_text_index": len(sentences)})
        if number + 1 == len(document):
            sentences.append("")
    return {"text_list": sentences, "image_info": sorted(info, key=lambda image: -image["matched_text_index"])}


def originals(document, image):
    form = obelics(document, image)
    return {"texts": form["texts"], "image_info": form.pop("images")}


def inline(number):
    return {"image_base64": base64.b64encode(png(number)).decode()}


def name(number):
    return f"{number}.png"


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_array(path, records):
    path.write_text(json.dumps(records))
    return path


def write_rows(path, image):
    datasets.Dataset.from_list([obelics(d, image) for d in DOCUMENTS]).to_parquet(path, batch_size=2)
    return path


def write_documents(make_tar, path, records, members):
    """A tar of `KEY.json` with what `members(key, document)` puts behind each."""
    content = []
    for number, (record, document) in enumerate(zip(records, DOCUMENTS, strict=True)):
        content.append((f"d/{number:04d}.json", json.dumps(record).encode()))
        content += members(f"d/{number:04d}", [entry for entry in document if isinstance(entry, int)])
    return make_tar(path, content)


def own(key, numbers):
    return [(f"{key}.{number}.png", png(number)) for number in numbers]


def beside(key, numbers):
    return [(f"d/{number}.png", png(number)) for number in numbers]


SOURCES = {
    "obelics parquet": lambda tmp, tar: write_rows(tmp / "a.parquet", lambda n: {"bytes": png(n), "path": name(n)}),
    "obelics parquet without paths": lambda tmp, tar: write_rows(tmp / "a.parquet", lambda n: {"bytes": png(n)}),
    "obelics parquet by path": lambda tmp, tar: write_rows(tmp / "a.parquet", name),
    "obelics jsonl": lambda tmp, tar: write_lines(tmp / "a.jsonl", [obelics(d, name) for d in DOCUMENTS]),
    "obelics tar": lambda tmp, tar: write_documents(tar, tmp / "a.tar", [obelics(d, name) for d in DOCUMENTS], own),
    "images by name": lambda tmp, tar: write_documents(
        tar, tmp / "a.tar", [obelics(d, name) for d in DOCUMENTS], beside
    ),
    "the original's tar": lambda tmp, tar: write_documents(
        tar, tmp / "a.tar", [originals(d, inline) for d in DOCUMENTS], lambda key, numbers: []
    ),
    "mmc4 json": lambda tmp, tar: write_array(
        tmp / "a.json", [mmc4(d, lambda n: {"image_name": name(n)}) for d in DOCUMENTS]
    ),
    "mmc4 tar": lambda tmp, tar: write_documents(
        tar, tmp / "a.tar", [mmc4(d, inline) for d in DOCUMENTS], lambda key, numbers: []
    ),
}


@pytest.fixture
def images(tmp_path):
    """A folder with 30 images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(30):
        (folder / name(number)).write_bytes(png(number))
    return folder


def plan(source, folder, processor, **options):
    return plan_packs([source], folder, processor.tokenizer, **{**OPTIONS, **options})


def as_read(documents):
    """Documents as the rows of a part have them."""
    table = packs_table(documents, np.arange(len(documents)))
    return [document for (document,) in table["documents"].to_pylist()]


def documents_of(dataset):
    """Ids, labels and the numbers of the images of every document."""
    found = []
    for item in (dataset[i] for i in range(len(dataset))):
        starts = torch.nonzero(item["position_ids"] == 0).flatten().tolist() + [len(item["position_ids"])]
        numbers = iter(item["pixel_values"][:, 0, 0, 0].tolist())
        for a, b in zip(starts, starts[1:], strict=False):
            ids, labels = item["input_ids"][a:b].tolist(), item["labels"][a:b].tolist()
            found.append(
                (ids, labels, [next(numbers) for _ in range(ids.count(dataset.processor.image_token_id) // 4)])
            )
        assert next(numbers, None) is None and item["dropped"] == {}
    return sorted(found)


def expected(documents, processor):
    found = []
    for document in documents:
        texts = [entry if isinstance(entry, str) else None for entry in document]
        ids, labels = interleaved_document(texts, processor.tokenizer, 4)
        found.append((ids.tolist(), labels.tolist(), [entry for entry in document if isinstance(entry, int)]))
    return sorted(found)


@pytest.mark.parametrize("form", SOURCES)
def test_all_forms_become_the_same_documents(images, make_tar, tmp_path, processor, form):
    source = SOURCES[form](tmp_path, make_tar)
    by_path = form in ("obelics jsonl", "obelics parquet by path", "mmc4 json")
    report = plan(source, tmp_path / "packs", processor, images=[images] if by_path else [])
    assert (report.documents, report.images, report.skipped) == (5, 9, {})
    documents = DOCUMENTS
    if form.startswith("mmc4"):  # whose sentences are no texts of their own
        documents = [*DOCUMENTS[:2], ["Text first. More text.", *DOCUMENTS[2][2:]], *DOCUMENTS[3:]]
    assert documents_of(PackedDataset(tmp_path / "packs", processor)) == expected(documents, processor)


def test_ids_of_the_original(make_tar, tmp_path, processor, qwen_tokenizer):
    """The golden documents in a tar, planned and read with Qwen2.5's vocabulary: images inside and beside."""
    processor = copy.copy(processor)
    processor.tokenizer = qwen_tokenizer
    members, ids = [], []
    for key, case in GOLDEN.items():
        document = [number if text is None else text for number, text in enumerate(case["texts"])]
        members.append((f"{key}.json", json.dumps(originals(document, inline)).encode()))
        members.append((f"{key}_by_name.json", json.dumps(obelics(document, name)).encode()))
        members += own(f"{key}_by_name", [entry for entry in document if isinstance(entry, int)])
        ids += [[token for i in case["input_ids"] for token in ([151655] * 144 if i == -200 else [i])]] * 2
    shard = describe_shard(make_tar(tmp_path / "a.tar", members), tmp_path)
    settings = {"shards": [shard], "images": [], "text_format": "interleaved", "rules": "standard", "max_length": 303,
              "max_images": None}  # fmt: skip
    family = OpenQwen2VLDocuments(processor, image_seq_length=144)
    planned = plan_group(Group(tmp_path, range(1), settings), family)
    reader = DocumentReader(tmp_path, settings, family)
    found = [reader.read([document])[0].input_ids.tolist() for document in as_read(planned.documents)]
    assert found == ids and [document.tokens for document in planned.documents] == [len(i) for i in ids]


def test_a_long_document_is_split_before_images(make_tar, tmp_path, processor):
    documents = [
        [entry for n in range(23) for entry in (n, f"text {n}")],  # pieces of 9, 9 and 5 images
        ["before", *range(10)],
        ["x" * 130, 23, "x" * 130, 24, "a"],  # too long for one pack, as a whole and with its first image
        [25, "x" * 300, 26, "fits"],  # what stands behind 25 does not fit to any pack
    ]
    members = [(f"{i}.json", json.dumps(originals(d, inline)).encode()) for i, d in enumerate(documents)]
    source = make_tar(tmp_path / "a.tar", members)
    report = plan(source, tmp_path / "packs", processor)
    assert (report.documents, report.skipped) == (3 + 2 + 2 + 1, {"too_long": 1})
    (lost,) = plan_rows(tmp_path / "packs", "skipped")
    assert (lost["file"], lost["key"], lost["reason"]) == ("../a.tar", "3", "too_long")
    assert lost["detail"].endswith(" tokens")
    pieces = [documents[0][:18], documents[0][18:36], documents[0][36:], documents[1][:10], documents[1][10:]]
    pieces += [documents[2][:1], documents[2][1:], documents[3][2:]]
    dataset = PackedDataset(tmp_path / "packs", processor)
    assert documents_of(dataset) == expected(pieces, processor)
    keys = sorted(key for i in range(len(dataset)) for _, key in dataset.document_names(i))
    assert keys == ["0", "0", "0", "1", "1", "2", "2", "3"]

    report = plan(source, tmp_path / "fewer", processor, max_images=4)
    assert max(pack["images"] for pack in plan_rows(tmp_path / "fewer", "part")) == 4
    assert (report.images, report.skipped) == (23 + 10 + 2 + 1, {"too_long": 1})


def test_the_originals_rules_drop_what_is_too_long(make_tar, tmp_path, processor, backbones, capsys):
    documents = [["a", *range(9)], ["a", *range(10)], [0, "cat " * 300], ["no image"], DOCUMENTS[0]]
    members = [(f"{i}.json", json.dumps(originals(d, inline)).encode()) for i, d in enumerate(documents)]
    source = make_tar(tmp_path / "a.tar", members)
    arguments = ["pack", str(source), "--output", str(tmp_path / "packs"), "--tokenizer", backbones["text"],
                 "--image-seq-length", "4", "--max-length", "256"]  # fmt: skip
    assert main([*arguments, "--rules", "original"]) == 0
    assert "skipped    3 (no_image 1, too_long 1, too_many_images 1)\n" in capsys.readouterr().out
    kept = expected([documents[0], documents[4]], processor)
    assert documents_of(PackedDataset(tmp_path / "packs", processor)) == kept
    assert main(arguments) == 2
    assert "made with rules original, now standard; delete" in capsys.readouterr().err


@given(
    entries=st.lists(st.one_of(st.none(), st.text(alphabet="ab \n<é", max_size=12)), min_size=1, max_size=40),
    image_seq_length=st.integers(1, 9),
    max_length=st.integers(14, 60),
    max_images=st.integers(1, 9),
)
def test_splitting_loses_nothing(tokenizer, entries, image_seq_length, max_length, max_images):
    pieces = split_texts(entries, tokenizer, image_seq_length, max_length, max_images)
    assert [entry for start, stop, _ in pieces for entry in entries[start:stop]] == entries
    for number, (start, stop, tokens) in enumerate(pieces):
        piece = entries[start:stop]
        assert tokens == len(interleaved_document(piece, tokenizer, image_seq_length)[0])
        assert piece.count(None) <= max_images
        assert number == 0 or piece[0] is None
        assert tokens <= max_length or None not in piece[1:]  # nothing left to split at


def test_pieces_take_as_much_as_fits(tokenizer):
    texts = [None, "a"] * 12
    whole = len(interleaved_document(texts[:14], tokenizer, 4)[0])
    assert [stop for _, stop, _ in split_texts(texts, tokenizer, 4, whole)] == [14, 24]
    assert [stop for _, stop, _ in split_texts(texts, tokenizer, 4, whole - 1)] == [12, 24]


def test_planning_reads_no_bytes_of_images_in_parquet(encode, tmp_path, processor):
    noise = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    source = write_rows(
        tmp_path / "a.parquet", lambda n: {"bytes": encode(Image.fromarray(noise[n])), "path": name(n)}
    )
    plan(source, tmp_path / "packs", processor)
    times, data = (source.stat().st_atime_ns, source.stat().st_mtime_ns), bytearray(source.read_bytes())
    metadata = pq.ParquetFile(source).metadata
    chunks = [
        metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in range(metadata.num_columns)
    ]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema.endswith("bytes")]
    assert len(chunks) == 3
    for chunk in chunks:
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    source.write_bytes(data)
    os.utime(source, ns=times)
    plan(source, tmp_path / "again", processor)
    assert (tmp_path / "again/plan.json").read_bytes() == (tmp_path / "packs/plan.json").read_bytes()


def test_every_bad_document_is_named(images, make_tar, tmp_path, processor, caplog):
    good = originals(DOCUMENTS[0], inline)
    bad = {
        "no_document": [{"caption": "a cat"}, {"texts": "a", "images": []}],
        "not_an_object": [[1, 2]],
        "unequal_lists": [{"texts": ["a", None], "images": ["0.png"]}],
        "empty_entry": [{"texts": ["a", None, None], "image_info": [None, {}, inline(1)]},
                        {"texts": ["a", None], "images": ["", None]}],
        "ambiguous_entry": [{"texts": ["a", None], "images": ["0.png", "1.png"]}],
        "bad_text": [{"texts": [1, None], "images": [None, "0.png"]}],
        "bad_encoding": [{"texts": ["\ud83d", None], "images": [None, "0.png"]}],
        "bad_image": [{"texts": [None], "images": [7]}, {"text_list": ["a"], "image_info": [{"face": None}]}],
        "bad_text_index": [{"text_list": ["a"], "image_info": [{**inline(1), "matched_text_index": i}]}
                           for i in (1, -1, None, "0", True)],
        "image_is_url": [{"texts": [None], "images": ["https://example.org/0.png"]}],
        "missing_image": [{"texts": [None], "images": ["none.png"]}],
        "unsafe_image_path": [{"texts": [None], "images": ["../secret.png"]}],
        "too_long": [{"texts": [None, "x" * 300], "images": ["0.png", None]}],
    }  # fmt: skip
    texts = [{"texts": ["a"], "images": [None]}, {"text_list": ["a"], "image_info": []}]
    records = [good, *(record for group in bad.values() for record in group), *texts, good]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(text + '{"texts": [oops\n')
    reasons = {reason: len(group) for reason, group in bad.items()} | {"invalid_json": 1}
    with caplog.at_level(logging.WARNING):
        report = plan(tmp_path / "a.jsonl", tmp_path / "packs", processor, images=[images])
    assert (report.documents, report.skipped) == (4, reasons)
    assert "../a.jsonl/byte " in caplog.text

    members = [(f"{i:03d}.json", json.dumps(record).encode()) for i, record in enumerate(records)]
    members += [("900.json", b"{"), ("901.json", json.dumps({"texts": [None], "images": ["e.png"]}).encode()),
                ("901.e.png", b""), ("902.txt", b"no document")]  # fmt: skip
    tar = make_tar(tmp_path / "a.tar", members)
    os.truncate(tar, tar.stat().st_size - 11 * 1024)
    tar.write_bytes(tar.read_bytes() + b"\1" * 512)
    report = plan(tar, tmp_path / "of_tar", processor, images=[images])
    damage = {key: count for key, count in report.skipped.items() if key.endswith("_tar")}
    assert sum(damage.values()) == 1
    assert {**report.skipped, **reasons, "empty_image": 1} == {**reasons, **damage, "empty_image": 1}


def test_a_record_that_names_images_needs_a_place_for_them(images, make_tar, tmp_path, processor):
    lines = write_lines(tmp_path / "a.jsonl", [obelics(d, name) for d in DOCUMENTS])
    assert find_sources([tmp_path]) == [lines]
    with pytest.raises(ValueError, match=r"names the image 0.png, but no folder .* was given \(--images\)"):
        plan(lines, tmp_path / "packs", processor)
    tar = write_documents(make_tar, tmp_path / "a.tar", [obelics(d, name) for d in DOCUMENTS], lambda key, numbers: [])
    with pytest.raises(ValueError, match="none of 5 samples can be packed: {'missing_image': 5}"):
        plan(tar, tmp_path / "packs", processor)
    plan(tar, tmp_path / "packs2", processor, images=[images])
    assert documents_of(PackedDataset(tmp_path / "packs2", processor)) == expected(DOCUMENTS, processor)


def test_images_that_break_later_drop_their_whole_document(make_tar, tmp_path, processor, caplog):
    source = SOURCES["obelics tar"](tmp_path, make_tar)
    plan(source, tmp_path / "packs", processor)
    times, data = (source.stat().st_atime_ns, source.stat().st_mtime_ns), source.read_bytes()
    data = data.replace(png(1), png(1)[:20] + bytes(len(png(1)) - 20)).replace(b"0001.2.png", b"0001.X.png")
    source.write_bytes(data.replace(b'"then"', b'"thcn"').replace(b"[null, null]", b"[null, oops]"))
    os.utime(source, ns=times)
    item = PackedDataset(tmp_path / "packs", processor)[0]
    dropped = item["dropped"]
    assert dropped.pop("changed_interleaved", 1) == 1  # another text, if it has another number of tokens
    assert dropped == {"corrupt_image": 1, "moved_member": 1, "invalid_json": 1}
    assert (item["input_ids"] == processor.image_token_id).sum() == 4 * len(item["pixel_values"])
    assert "a.tar/d/0000: corrupt_image" in caplog.text


def test_inline_images_that_are_none_drop_their_document(tmp_path, processor):
    records = [originals(d, inline) for d in DOCUMENTS]
    records[0]["image_info"][1] = {"image_base64": "abc"}  # no multiple of four
    records[1]["image_info"][0] = {"image_base64": "abcd"}
    plan(write_lines(tmp_path / "a.jsonl", records), tmp_path / "packs", processor)
    item = PackedDataset(tmp_path / "packs", processor)[0]
    assert item["dropped"] == {"corrupt_image": 2} and len(item["pixel_values"]) == 6


def test_documents_and_captions_join_in_a_mixture(caption_tars, make_tar, tmp_path, processor):
    source = SOURCES["obelics tar"](tmp_path, make_tar)
    with pytest.raises(ValueError, match="a.tar and .*00000.tar are of different kinds: plan them apart"):
        plan_packs([*caption_tars, source], tmp_path / "packs", processor.tokenizer, **OPTIONS)
    plan_packs(caption_tars, tmp_path / "captions", processor.tokenizer, **OPTIONS)
    plan(source, tmp_path / "documents", processor)
    sources = yaml.safe_load(f"[{{path: {tmp_path}/captions}}, {{path: {tmp_path}/documents, epochs: 2}}]")
    parts = [PackedDataset(entry["path"], processor) for entry in sources]
    mixture = PackMixture(parse_sources(sources), processor)
    images = [len(mixture[i]["pixel_values"]) for i in range(len(mixture))]
    assert len(mixture) == len(parts[0]) + len(parts[1]) and sum(images) == 120 + 9


def test_data_sets_from_disk_with_image_features(tmp_path, processor):
    rows = [{**obelics(d, lambda n: {"bytes": png(n), "path": None}), "general_metadata": "{}"} for d in DOCUMENTS]
    features = datasets.Features({"texts": datasets.List(datasets.Value("string")),
                                  "images": datasets.List(datasets.Image()),
                                  "general_metadata": datasets.Value("string")})  # fmt: skip
    datasets.Dataset.from_list(rows, features).save_to_disk(tmp_path / "saved")
    (source,) = find_sources([tmp_path / "saved"])
    report = plan(source, tmp_path / "packs", processor, records_per_group=2)
    assert report.documents == 5
    assert documents_of(PackedDataset(tmp_path / "packs", processor)) == expected(DOCUMENTS, processor)


def test_documents_of_real_pictures(make_tar, tmp_path, processor):
    """easy-VQA's pictures with their questions as documents: as many as fit, each picture once and in order."""
    paths = easy_vqa.get_test_image_paths()
    asked: dict[int, list[str]] = {}
    for question, answer, number in zip(*easy_vqa.get_test_questions(), strict=True):
        asked.setdefault(number, []).append(f"{question} {answer}.")
    members = []
    for start in range(0, 60, 12):
        record = {"texts": [], "images": []}
        for number in range(start, start + 12):
            record["texts"] += [None, " ".join(asked[number][:3])]
            record["images"] += [f"{number}.png", None]
        key = f"page{start:03d}"
        members.append((f"{key}.json", json.dumps(record).encode()))
        members += [(f"{key}.{n}.png", Path(paths[n]).read_bytes()) for n in range(start, start + 12)]
    report = plan(make_tar(tmp_path / "a.tar", members), tmp_path / "packs", processor, max_length=512)
    assert (report.images, report.skipped) == (60, {}) and report.documents > 5
    dataset = PackedDataset(tmp_path / "packs", processor)
    pixels = torch.cat([dataset[i]["pixel_values"] for i in range(len(dataset))])
    pictures = [processor.read_image(Path(paths[n]).read_bytes()) for n in range(60)]
    assert sorted(p.numpy().tobytes() for p in pixels) == sorted(p.numpy().tobytes() for p in torch.cat(pictures))
    texts = [processor.tokenizer.decode(dataset[i]["input_ids"]) for i in range(len(dataset))]
    assert all(asked[n][0] in "".join(texts) for n in range(60))
    assert np.all([0 < pack["tokens"] <= 512 for pack in plan_rows(tmp_path / "packs", "part")])
