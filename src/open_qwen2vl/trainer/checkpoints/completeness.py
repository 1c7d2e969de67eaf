"""Whether a checkpoint has all that a run resumes from, told from its files without loading or unpickling any."""

import json
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

STATE_NAME = "trainer_state.json"
AVERAGE_NAME = "ema"  # of the average, with `ema_decay`
MAX_HEADER = 100 << 20  # bytes, as safetensors has it
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


def missing_part(checkpoint: str | os.PathLike) -> str | None:
    """What a checkpoint lacks, in words; None where it is complete.

    Of weights and optimizer the form may differ: whole files, an index with shards, or FSDP's sharded folders.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "it is no folder"
    try:
        # Parsed, not only looked for: a copy that was cut off is there, too.
        json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"no whole {STATE_NAME}"
    if not _has_weights(folder):
        return "no whole model.safetensors"
    if (folder / AVERAGE_NAME).exists() and not _has_weights(folder / AVERAGE_NAME):
        return f"no whole {AVERAGE_NAME}/model.safetensors"
    if (folder / "latest").exists():
        return None  # DeepSpeed keeps the rest in a folder of its own form
    if not _has_state(folder, "optimizer", ".pt", ".bin"):
        return "no whole optimizer.pt (save_only_model writes none)"
    if not _is_whole_archive(folder / "scheduler.pt"):
        return "no whole scheduler.pt"
    # One file a rank: any will do, since a run may resume on another number of processes.
    if not any(map(_is_whole_archive, folder.glob("rng_state*.pth"))):
        return "no whole rng_state.pth"
    return None


def _has_weights(folder: Path) -> bool:
    return _has_state(folder, "pytorch_model_fsdp", ".bin") or any(_weights(folder))


def weight_names(checkpoint: str | os.PathLike) -> set[str] | None:
    """Names of the tensors in a checkpoint's weights; None for sharded ones, which are checked as they are loaded."""
    folder = Path(checkpoint)
    names: set[str] = set()
    for file in _weights(folder):
        names |= _safetensors_header(file).keys() - {"__metadata__"}
    return names or None


def _weights(folder: Path) -> Iterator[Path]:
    """The whole safetensors files that hold the weights; nothing where one of them is missing or cut off."""
    index = folder / "model.safetensors.index.json"
    names: set[str] | tuple[str, ...] = WEIGHTS
    if index.exists():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            return
        # Without one shard the others are worthless.
        if not all(_safetensors_header(folder / name) for name in names):
            return
    yield from (folder / name for name in names if _safetensors_header(folder / name))


def _safetensors_header(path: Path) -> dict:
    """The header of a file that is as long as it says; empty otherwise."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = os.fstat(file.fileno()).st_size
            # A damaged length may be anything: more than the file has is not read.
            header = json.loads(file.read(length)) if length <= min(size, MAX_HEADER) else {}
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=-1)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error):
        return {}
    # Tensors follow the header without a gap: a file that was cut anywhere is shorter than it says.
    return header if 8 + length + end == size else {}


def _has_state(folder: Path, name: str, *suffixes: str) -> bool:
    """Whether there is a folder of FSDP's shards, or a whole file of that name."""
    sharded = any((shards / ".metadata").exists() for shards in folder.glob(f"{name}_*"))
    return sharded or any(_is_whole_archive(folder / f"{name}{suffix}") for suffix in suffixes)


def _is_whole_archive(path: Path) -> bool:
    """What torch saves is a zip file, whose directory stands at its end, with a `data.pkl` in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False
