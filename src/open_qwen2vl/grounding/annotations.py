"""Published annotations of boxes as images with regions, whatever file they come in.

    COCO           instances_*.json {images, annotations [x, y, w, h], categories}
    Visual Genome  region_descriptions.json [{id, regions [{phrase, x, y, width, height}]}], sizes in image_data.json
    RefCOCO        a table of jxu124/refcoco, or refs as json [{ann_id, sentences}] whose boxes are in instances.json
                   └─► Annotated: where the image may lie, the size that the boxes are of, regions

RefCOCO's own refs(unc).p is a pickle, which is never opened.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from ..data.storage.json_records import read_record, record_spans
from ..places import open_file
from ..processing.sample_error import SampleError

BROKEN = (AttributeError, KeyError, TypeError, ValueError)  # of an entry that is not as its format has it
PICKLES = (".p", ".pkl", ".pickle")


class Region(NamedTuple):
    """A place of an image and what is there."""

    phrase: str
    box: tuple[float, float, float, float]  # left, top, right, bottom
    is_crowd: bool = False  # it holds many: no box of one thing


class Annotated(NamedTuple):
    """An image with its regions."""

    key: str
    names: tuple[str, ...]  # paths that it may have
    size: tuple[int, int]  # width and height of the image that the boxes are of
    regions: list[Region]


def read_annotations(source: str, split: str, skipped: Counter) -> tuple[str, Iterator[Annotated]]:
    """What a file is (`coco`, `visual genome` or `refcoco`), and its images; entries that cannot be read are counted.

    Raises:
        ValueError: for a file of none of these, a pickle, or a file that should lie beside it and does not.
    """
    path = Path(source)
    if path.suffix in PICKLES:
        raise ValueError(
            f"{source}: a pickle can run code and is never opened: take the tables of jxu124/refcoco, refcocoplus or "
            "refcocog on the Hub, or have whoever trusts it write it as json"
        )
    if path.suffix == ".parquet":
        return "refcoco", _read_refcoco_table(path, split, skipped)
    with open(path, "rb") as file:
        is_list = file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not is_list:
        return "coco", _read_coco(path, skipped)
    first = next(_records(path, Counter()), {})
    if "regions" in first:
        return "visual genome", _read_visual_genome(path, skipped)
    if "sentences" in first:
        return "refcoco", _read_refs(path, split, skipped)
    raise ValueError(f"{source}: its first record has neither regions (Visual Genome) nor sentences (RefCOCO)")


def _records(path: Path, skipped: Counter) -> Iterator[dict[str, Any]]:
    """The objects of an array, one at a time: these files have up to a gigabyte."""
    with open_file(path) as file:
        for offset, size in record_spans(path, 0, None):
            try:
                record = read_record(file, offset, size)
            except SampleError as error:
                skipped[error.reason] += 1
                continue
            if record is not None:
                yield record


def _load(path: Path, kind: type) -> Any:
    """A json file without outlines, which are nine tenths of COCO's."""
    if not path.exists():
        raise ValueError(f"{path} is missing: it belongs to the annotations")
    try:
        found = json.loads(path.read_bytes(), object_hook=_without_outlines)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: invalid json: {error}") from error
    if not isinstance(found, kind):
        raise ValueError(f"{path}: a json {type(found).__name__}, not the file of that name")
    return found


def _without_outlines(record: dict[str, Any]) -> dict[str, Any]:
    record.pop("segmentation", None)
    return record


def _read_coco(path: Path, skipped: Counter) -> Iterator[Annotated]:
    content = _load(path, dict)
    if missing := [name for name in ("images", "annotations", "categories") if name not in content]:
        raise ValueError(f"{path}: no {', '.join(missing)}, which COCO's instances have")
    labels = {category.get("id"): category.get("name") for category in content["categories"]}
    regions = defaultdict(list)
    for one in content["annotations"]:
        try:
            x, y, width, height = map(float, one["bbox"])
            region = Region(labels[one["category_id"]], (x, y, x + width, y + height), bool(one.get("iscrowd")))
            regions[one["image_id"]].append(region)
        except BROKEN:
            skipped["bad_annotation"] += 1
    for number, (name, size) in _images(content["images"], skipped).items():
        yield Annotated(str(number), (name,), size, regions.pop(number, []))
    if regions:
        skipped["unknown_image"] += sum(map(len, regions.values()))


def _images(images: list[dict[str, Any]], skipped: Counter) -> dict[Any, tuple[str, tuple[int, int]]]:
    """Name and size of each image by its id; Visual Genome has no names."""
    found = {}
    for image in images:
        try:
            number = image["id"] if "id" in image else image["image_id"]
            width, height = int(image["width"]), int(image["height"])
            if width < 1 or height < 1:
                raise ValueError("an image without pixels")
            found[number] = str(image.get("file_name", f"{number}.jpg")), (width, height)
        except BROKEN:
            skipped["bad_annotation"] += 1
    return found


def _read_visual_genome(path: Path, skipped: Counter) -> Iterator[Annotated]:
    images = _images(_load(path.with_name("image_data.json"), list), skipped)
    for record in _records(path, skipped):
        number = record.get("id", record.get("image_id"))
        if number not in images or not isinstance(record.get("regions"), list):
            skipped["unknown_image"] += 1
            continue
        regions = []
        for one in record["regions"]:
            try:
                x, y, width, height = (float(one[name]) for name in ("x", "y", "width", "height"))
                regions.append(Region(str(one["phrase"]), (x, y, x + width, y + height)))
            except BROKEN:
                skipped["bad_annotation"] += 1
        name, size = images[number]
        yield Annotated(str(number), (f"VG_100K/{name}", f"VG_100K_2/{name}"), size, regions)


def _read_refs(path: Path, split: str, skipped: Counter) -> Iterator[Annotated]:
    content = _load(path.with_name("instances.json"), dict)
    boxes = {one.get("id"): one.get("bbox") for one in content.get("annotations", ())}
    images = _images(content.get("images", []), skipped)
    rows = defaultdict(list)
    for ref in _records(path, skipped):
        if ref.get("split") != split:
            skipped["other_split"] += 1
        elif ref.get("ann_id") not in boxes or ref.get("image_id") not in images:
            skipped["unknown_image"] += 1
        else:
            rows[ref["image_id"]] += _sentences(ref.get("sentences"), boxes[ref["ann_id"]], skipped)
    for number, regions in rows.items():
        name, size = images[number]
        yield Annotated(str(number), (name,), size, regions)


def _read_refcoco_table(path: Path, split: str, skipped: Counter) -> Iterator[Annotated]:
    """The annotation and the image as COCO has them stand in two columns as json."""
    columns = ["image_id", "split", "sentences", "raw_anns", "raw_image_info"]
    table = pq.ParquetFile(path)
    if missing := [name for name in columns if name not in table.schema_arrow.names]:
        raise ValueError(f"{path}: no column {', '.join(missing)}, which the tables of jxu124/refcoco have")
    rows, images = defaultdict(list), {}
    for batch in table.iter_batches(columns=columns):
        for row in batch.to_pylist():
            if row["split"] != split:
                skipped["other_split"] += 1
                continue
            try:
                box, image = json.loads(row["raw_anns"])["bbox"], json.loads(row["raw_image_info"])
                images |= _images([{**image, "id": row["image_id"]}], skipped)
            except (*BROKEN, RecursionError):
                skipped["bad_annotation"] += 1
                continue
            rows[row["image_id"]] += _sentences(row["sentences"], box, skipped)
    for number in [number for number in rows if number in images]:
        name, size = images[number]
        yield Annotated(str(number), (name,), size, rows[number])


def _sentences(sentences: Any, box: Any, skipped: Counter) -> list[Region]:
    try:
        x, y, width, height = map(float, box)
        return [Region(str(one["sent"]), (x, y, x + width, y + height)) for one in sentences]
    except BROKEN:
        skipped["bad_annotation"] += 1
        return []
