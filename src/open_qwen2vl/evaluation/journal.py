"""Answers that were already computed: a line for each, in a file for each rank, read again after a killed run.

A key stands for all that decides an answer (weights, prompt, images, options), so that a journal is never wrong, only
useless. A line cut off by a kill is passed over.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..output_lock import local_state
from ..places import Place, is_remote
from ..processing.text_formats import tokenizer_fingerprint

PASSING_SETTINGS = {"transformers_version", "_name_or_path", "_commit_hash", "auto_map", "architectures", "dtype"}


def journal_folder(output: str | Place) -> Path:
    """Where the answers of an evaluation lie: in its output, or on this machine, for lines are added to a file."""
    if not is_remote(output):
        return Path(output) / "journal"
    return local_state(output) / "journal"


class Journal:
    """Answers by key."""

    def __init__(self, folder: Path, rank: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.answers: dict[str, Any] = {}
        for path in sorted(folder.glob("rank-*.jsonl")):
            self.answers.update(_read(path))
        path = folder / f"rank-{rank}.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def get(self, key: str) -> Any:
        """The answer of a key, None where it has none."""
        return self.answers.get(key)

    def add(self, answers: dict[str, Any]) -> None:
        """Keep answers, in the file too when this returns."""
        self.answers.update(answers)
        for key, answer in answers.items():
            self._file.write(json.dumps({"key": key, "answer": answer}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _read(path: Path) -> dict[str, Any]:
    answers = {}
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
            answers[entry["key"]] = entry["answer"]
        except (ValueError, KeyError, TypeError):
            continue
    return answers


def request_key(*parts: Any) -> str:
    """A key of all that decides an answer."""
    plain = [image_digest(part) if isinstance(part, Image.Image) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def image_digest(image: Image.Image) -> str:
    """A hash of an image's pixels."""
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def model_fingerprint(model: PreTrainedModel, processor: ProcessorMixin) -> str:
    """A hash of what answers depend on besides the request: weights, configuration, processor."""
    total = hashlib.sha256()
    generation = model.generation_config.to_dict() if model.generation_config is not None else None
    tokenizer = tokenizer_fingerprint(processor.tokenizer) if processor.tokenizer.is_fast else None
    for settings in (model.config.to_dict(), generation, processor.to_dict(), tokenizer):
        total.update(json.dumps(_lasting(settings), sort_keys=True, default=str).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _lasting(settings: Any) -> Any:
    """Settings without what says where, how and by which version they were saved."""
    if isinstance(settings, dict):
        return {name: _lasting(value) for name, value in settings.items() if name not in PASSING_SETTINGS}
    return settings
