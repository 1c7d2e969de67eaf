"""Evaluation sets, as pictures and texts: a folder, tables, a tar, or a task of lmms-eval."""

import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from PIL import Image

from ..data.storage.tables import Columns, RowTable, column_types, find_tables
from ..data.storage.tars import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, has_dotted_key, index_shard, read_member
from ..evaluation.harness import load_tasks, make_task_manager, root_cause
from ..files import describe_shard
from ..places import Place, identity, is_remote, list_tree, open_file, place, remote_errors_named
from ..processing.sample_error import SampleError
from ..transfers import fetch_file, fetch_tree

QUESTIONS = ("question", "query", "prompt", "problem", "caption", "text")
ANSWERS = ("answer", "answers")
PATHS = ("image", "images", "image_path", "img")  # columns whose texts are paths of pictures
_SUFFIXES = frozenset((".tar", ".parquet", ".arrow", *(f".{extension}" for extension in IMAGE_EXTENSIONS)))


class EvaluationSet(NamedTuple):
    """A set as it was given."""

    name: str  # in reports and reasons
    files: tuple[Place, ...]  # folders, tars, tables and pictures; none of a task
    task: str | None  # of lmms-eval
    told: dict[str, Any] | None = None  # of a remote set, of which `files` are copies: its own description


class Entry(NamedTuple):
    """What a set holds at one place."""

    name: str  # of the file, the row or the document
    images: list[bytes | Image.Image]
    texts: list[str]  # a question, and it with its answer


def find_sets(against: Iterable[str]) -> list[EvaluationSet]:
    """The sets that `--against` names; a `ValueError` for two of one name, and for a name or path that is none."""
    sets = []
    for given in against:
        name, separator, path = given.partition("=")
        if is_remote(given):
            name, path = place(given.rstrip("/")).stem, given
        elif not separator or Path(given).exists():
            name = Path(os.path.abspath(given)).stem if Path(given).exists() else given.split("*")[0]
            path = given
        if not name or not path or "," in name:
            raise ValueError(f"--against {given}: give the set a name without a comma and a path, as NAME=PATH")
        if is_remote(path):
            sets.append(EvaluationSet(name, (place(path),), None))
            continue
        files = tuple(map(Path, sorted(glob.glob(path)))) if "*" in path else (Path(path),)
        if not files or not files[0].exists():
            if "/" in path or "." in path or "*" in path:
                raise ValueError(f"--against {path}: no such file or folder")
            sets.append(EvaluationSet(name, (), path))
            continue
        sets.append(EvaluationSet(name, files, None))
    names = [each.name for each in sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--against: two sets are called {twice[0]}; name them, as one=PATH two=PATH")
    return sets


def fetch_sets(sets: Iterable[EvaluationSet], folder: Path) -> list[EvaluationSet]:
    """The sets with remote ones copied into a folder: they are small, and read three times."""
    fetched = []
    for each in sets:
        if not each.files or not is_remote(each.files[0]):
            fetched.append(each)
            continue
        (source,) = each.files
        with remote_errors_named(source):
            is_folder = source.is_dir()
        found = list_tree(str(source)) if is_folder else [(source.name, identity(source))]
        target = folder / each.name
        target.mkdir()
        if is_folder:
            fetch_tree(source, target)
        else:
            fetch_file(source, target / source.name)
        etags = hashlib.sha256("".join(sorted(known["etag"] for _, known in found)).encode()).hexdigest()
        told = {
            "name": each.name,
            "files": len(found),
            "bytes": sum(known["size"] for _, known in found),
            "etags": etags,
        }
        fetched.append(EvaluationSet(each.name, (target if is_folder else target / source.name,), None, told))
    return fetched


def describe_set(each: EvaluationSet, folder: Path) -> dict[str, Any]:
    """What a rerun compares of a set: its files with their sizes, or the task."""
    if each.task is not None:
        return {"name": each.name, "task": each.task}
    if each.told is not None:
        return each.told
    described = [describe_shard(file, folder) for file, _ in _listed_files(each)]
    size, newest = (sum(one["size"] for one in described), max((one["mtime_ns"] for one in described), default=0))
    return {"name": each.name, "files": len(described), "bytes": size, "newest_ns": newest}


def read_set(each: EvaluationSet) -> Iterator[Entry | SampleError]:
    """What a set holds, in order; what cannot be read, or is of no known kind, is an error in its place.

    A `ValueError` for a set of no known form, or a task that cannot be loaded.
    """
    if each.task is not None:
        yield from _read_task(each.task)
        return
    read: set[Path] = set()  # pictures that a table names, which are not read once more as files
    for path, name in _listed_files(each):
        if path.suffix in (".parquet", ".arrow"):
            yield from _read_table(path, read)
        elif path.suffix == ".tar":
            yield from _read_tar(path)
        elif path.resolve() not in read:
            try:
                yield Entry(name, [_read_picture(path)], [])
            except SampleError as error:
                yield error
    yield from (SampleError(f"not_read{path.suffix}", str(path)) for path in _unknown_files(each))


def readable_entries(sets: Iterable[EvaluationSet]) -> Iterator[tuple[int, Entry]]:
    """The entries of all sets with the numbers that an index gives them."""
    return enumerate(entry for each in sets for entry in read_set(each) if not isinstance(entry, SampleError))


def picture_columns(each: EvaluationSet) -> list[str]:
    """The columns of pictures in a set's tables, with their files."""
    tables = [path for path, _ in _listed_files(each) if path.suffix in (".parquet", ".arrow")]
    return [f"{name} of {table}" for table in tables for name in _image_columns(column_types(table))]


def _listed_files(each: EvaluationSet) -> list[tuple[Path, str]]:
    """The files of a set that are read and their names in it: tables, tars, then pictures, of folders those below too.

    A `ValueError` that names a file of no known kind that was given itself.
    """
    found = []
    for path in each.files:
        if path.is_dir():
            below = _files_below(path)
            if not below:
                raise ValueError(f"--against {path}: no picture, table or tar in this folder")
            found += [(file, file.relative_to(path).as_posix()) for file in below]
        elif _suffix(path) not in _SUFFIXES:
            raise ValueError(
                f"--against {path}: a set is a folder, .tar, .parquet or .arrow, or a task of lmms-eval, or pictures"
            )
        else:
            found.append((path, path.name))
    kinds = {".parquet": 0, ".arrow": 0, ".tar": 1}
    return sorted(found, key=lambda file: kinds.get(file[0].suffix, 2))


def _files_below(folder: Path) -> list[Path]:
    """Tables, tars and pictures at any depth; no links to folders; of `Dataset.save_to_disk` no cache."""
    found = []
    for inner in (folder, *sorted(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())):
        tables = find_tables(inner)
        is_saved = (inner / "state.json").is_file()
        others = [path for path in sorted(inner.iterdir()) if path.is_file() and _suffix(path) in _SUFFIXES]
        found += tables + [
            path for path in others if path.suffix != ".parquet" and not (is_saved and path.suffix == ".arrow")
        ]
    return found


def _unknown_files(each: EvaluationSet) -> list[Path]:
    """What is in a set's folders and not read, without what is hidden."""
    found = []
    for folder in filter(Path.is_dir, each.files):
        known = set(_files_below(folder))
        for path in sorted(folder.rglob("*")):
            is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if path not in known and not is_hidden and (path.is_symlink() or not path.is_dir()):
                found.append(path)
    return found


def _suffix(path: Path) -> str:
    """Of pictures in any case of letters."""
    lower = path.suffix.lower()
    return path.suffix if lower in (".tar", ".parquet", ".arrow") else lower


def _read_picture(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise SampleError("missing_image", f"{path} is no regular file")
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise SampleError("image_too_large", f"{path} is larger than {MAX_IMAGE_BYTES} bytes")
        return path.read_bytes()
    except SampleError:
        raise
    except (OSError, ValueError) as error:  # no path at all, as of base64
        raise SampleError("missing_image", f"{str(path)[:200]}: {error}") from error


def _read_tar(tar: Path) -> Iterator[Entry | SampleError]:
    index = index_shard(tar)
    yield from (SampleError(reason, f"{tar}: {key}") for key, reason in index.skipped)
    with open_file(tar, whole=True) as file:
        for sample in index.samples:
            extension = next((ext for ext in IMAGE_EXTENSIONS if ext in sample.members), None)
            if extension is None:
                reason = "dotted_key" if has_dotted_key(sample) else "missing_image"
                yield SampleError(reason, f"{tar}: {sample.key} has {', '.join(sample.members)}")
            read = {}
            try:
                for ext in filter(None, (extension, "txt" if "txt" in sample.members else None)):
                    read[ext] = read_member(file, f"{sample.key}.{ext}", *sample.members[ext])
            except SampleError as error:
                yield error
                continue
            text = read.pop("txt", b"").decode(errors="replace")
            if read or text:
                yield Entry(sample.key, list(read.values()), [text] if text else [])


def _read_table(path: Path, read: set[Path]) -> Iterator[Entry | SampleError]:
    """Columns of pictures are known by their type, those of paths and texts by their names.

    Files that are read, relative to the table's folder, are added to `read`.
    """
    types = column_types(path)
    images = _image_columns(types)
    texts = tuple(name for name in (*QUESTIONS, *ANSWERS) if name in types)
    # A table of `file_name` describes the pictures beside it, which are read as files.
    if not images and not set(texts) & set(QUESTIONS) and "file_name" not in types:
        raise ValueError(
            f"--against {path}: no column of pictures and none of {', '.join(QUESTIONS)}; it has {', '.join(types)}"
        )
    table = RowTable(path, Columns(texts, images))
    for number, row in table.rows(0, int(table.ends[-1]) if len(table.ends) else 0):
        if isinstance(row, SampleError):
            yield row
            continue
        pictures = []
        for cell in (cell for name in images for cell in _listed(row.get(name)) if cell is not None):
            try:
                pictures.append(_read_cell(cell, path.parent, read))
            except SampleError as error:
                yield error
        questions = [text for name in QUESTIONS for text in _listed(row.get(name)) if isinstance(text, str)]
        answers = [text for name in ANSWERS for text in _listed(row.get(name)) if isinstance(text, str)]
        yield Entry(f"row {number}", pictures, _with_answers(questions, answers))
    table.close()


def _read_cell(cell: Any, folder: Path, read: set[Path]) -> bytes:
    """A picture of its bytes, of a struct of bytes and path, or of its path."""
    content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
    if isinstance(content, bytes) and content:
        return content
    if not isinstance(path, str) or not path:
        raise SampleError("missing_image", "a cell has neither the bytes of a picture nor its path")
    picture = _read_picture(folder / path)
    read.add((folder / path).resolve())
    return picture


def _image_columns(types: dict[str, pa.DataType]) -> tuple[str, ...]:
    return tuple(name for name, kind in types.items() if _holds_images(name, kind))


def _holds_images(name: str, kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    kind = getattr(kind, "storage_type", kind)
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 or (name in PATHS and kind.get_field_index("path") >= 0)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or (is_text and name in PATHS)


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
