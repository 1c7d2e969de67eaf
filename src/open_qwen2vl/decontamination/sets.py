"""Evaluation sets, as pictures and texts: a folder, tables, a tar, or a task of lmms-eval."""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from PIL import Image

from ..data.storage.tables import Columns, RowTable, column_types, find_tables
from ..data.storage.tars import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, index_shard, read_member
from ..evaluation.harness import load_tasks, make_task_manager, root_cause
from ..files import describe_shard
from ..processing.sample_error import SampleError

QUESTIONS = ("question", "query", "prompt", "problem", "caption", "text")
ANSWERS = ("answer", "answers")


class EvaluationSet(NamedTuple):
    """A set as it was given."""

    name: str  # in reports and reasons
    files: tuple[Path, ...]  # a folder, a tar, or tables; none of a task
    task: str | None  # of lmms-eval


class Entry(NamedTuple):
    """What a set holds at one place."""

    name: str  # of the file, the row or the document
    images: list[bytes | Image.Image]
    texts: list[str]  # a question, and it with its answer


def find_sets(against: Iterable[str]) -> list[EvaluationSet]:
    """The sets that `--against` names; a `ValueError` for two of one name."""
    sets = []
    for given in against:
        name, separator, path = given.partition("=")
        if not separator or Path(given).exists():
            name, path = Path(given).stem if Path(given).exists() else given.split("*")[0], given
        files = tuple(map(Path, sorted(glob.glob(path)))) if "*" in path else (Path(path),)
        if not files or not files[0].exists():
            if "/" in path or "." in path or "*" in path:
                raise ValueError(f"--against {path}: no such file or folder")
            sets.append(EvaluationSet(name, (), path))
            continue
        if files[0].is_dir():
            files = tuple(find_tables(files[0])) or files
        sets.append(EvaluationSet(name, files, None))
    names = [each.name for each in sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--against: two sets are called {twice[0]}; name them, as one=PATH two=PATH")
    return sets


def describe_set(each: EvaluationSet, folder: Path) -> dict[str, Any]:
    """What a rerun compares of a set: its files with their sizes, or the task."""
    if each.task is not None:
        return {"name": each.name, "task": each.task}
    files = _pictures(each.files[0]) if each.files[0].is_dir() else each.files
    described = [describe_shard(file, folder) for file in files]
    size, newest = (sum(one["size"] for one in described), max((one["mtime_ns"] for one in described), default=0))
    return {"name": each.name, "files": len(described), "bytes": size, "newest_ns": newest}


def read_set(each: EvaluationSet) -> Iterator[Entry | SampleError]:
    """What a set holds, in order; what cannot be read is an error in its place.

    A `ValueError` for a set of no known form, or a task that cannot be loaded.
    """
    if each.task is not None:
        return _read_task(each.task)
    if each.files[0].is_dir():
        return _read_folder(each.files[0])
    if each.files[0].suffix == ".tar":
        return (entry for tar in each.files for entry in _read_tar(tar))
    return (entry for table in each.files for entry in _read_table(table))


def _pictures(folder: Path) -> list[Path]:
    known = {f".{extension}" for extension in IMAGE_EXTENSIONS}
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in known and path.is_file()]
    if not found:
        raise ValueError(f"--against {folder}: no picture, table or tar in this folder")
    return found


def _read_folder(folder: Path) -> Iterator[Entry | SampleError]:
    for path in _pictures(folder):
        name = path.relative_to(folder).as_posix()
        if path.stat().st_size > MAX_IMAGE_BYTES:
            yield SampleError("image_too_large", f"{path} is larger than {MAX_IMAGE_BYTES} bytes")
        else:
            yield Entry(name, [path.read_bytes()], [])


def _read_tar(tar: Path) -> Iterator[Entry | SampleError]:
    with open(tar, "rb", buffering=0) as file:
        for sample in index_shard(tar).samples:
            extension = next((ext for ext in IMAGE_EXTENSIONS if ext in sample.members), None)
            read = {}
            try:
                for ext in filter(None, (extension, "txt" if "txt" in sample.members else None)):
                    read[ext] = read_member(file.fileno(), f"{sample.key}.{ext}", *sample.members[ext])
            except SampleError as error:
                yield error
                continue
            text = read.pop("txt", b"").decode(errors="replace")
            yield Entry(sample.key, list(read.values()), [text] if text else [])


def _read_table(path: Path) -> Iterator[Entry | SampleError]:
    """Columns of pictures are known by their type, those of texts by their names."""
    if path.suffix not in (".parquet", ".arrow"):
        raise ValueError(f"--against {path}: a set is a folder, .tar, .parquet or .arrow, or a task of lmms-eval")
    types = column_types(path)
    images = tuple(name for name, kind in types.items() if _holds_images(kind))
    texts = tuple(name for name in (*QUESTIONS, *ANSWERS) if name in types)
    if not images and not set(texts) & set(QUESTIONS):
        raise ValueError(
            f"--against {path}: no column of pictures and none of {', '.join(QUESTIONS)}; it has {', '.join(types)}"
        )
    table = RowTable(path, Columns(texts, images))
    for number, row in table.rows(0, int(table.ends[-1]) if len(table.ends) else 0):
        if isinstance(row, SampleError):
            yield row
            continue
        cells = [cell for name in images for cell in _listed(row.get(name))]
        pictures = [cell["bytes"] for cell in cells if isinstance(cell, dict) and cell.get("bytes")]
        questions = [text for name in QUESTIONS for text in _listed(row.get(name)) if isinstance(text, str)]
        answers = [text for name in ANSWERS for text in _listed(row.get(name)) if isinstance(text, str)]
        yield Entry(f"row {number}", pictures, _with_answers(questions, answers))
    table.close()


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    kind = getattr(kind, "storage_type", kind)
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _with_answers(questions: list[str], answers: list[str]) -> list[str]:
    """An answer counts with its question: alone it is too short to tell anything."""
    return [*questions, *(f"{question} {answer}" for question in questions for answer in dict.fromkeys(answers))]


def _read_task(name: str) -> Iterator[Entry | SampleError]:
    try:
        tasks = load_tasks(make_task_manager([name]), name)
    except Exception as error:  # of datasets and of the task's own code
        if str(error).startswith(f"--tasks {name}"):
            raise ValueError(f"--against {name}: no such file or folder, and no task of lmms-eval") from None
        raise ValueError(f"--against {name}: the task's data cannot be read: {root_cause(error)}") from error
    for task in tasks:
        for number, document in enumerate(task.eval_docs):
            try:
                images = [image for image in task.doc_to_visual(document) or [] if isinstance(image, Image.Image)]
                texts = [text for text in _listed(task.doc_to_text(document)) if isinstance(text, str)]
                answers = [text for text in _listed(task.doc_to_target(document)) if isinstance(text, str)]
            except Exception as error:  # of the task's own code
                yield SampleError("bad_document", f"{name}, document {number}: {error}")
                continue
            yield Entry(f"document {number}", images, _with_answers(texts, answers))
