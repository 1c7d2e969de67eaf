"""What an agent saw, said and did, as a conversation to be trained on."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ..files import new_folder


@dataclass
class Transcript:
    """A run of an agent.

    Attributes:
        tools (`list[dict]`): JSON schemas of the functions.
        messages (`list[dict]`): in Hugging Face's form: `tool_calls` of the assistant, results and observations as
            turns of the role `tool`, images as `PIL.Image.Image`. A turn whose call could not be made has
            `"train": False`.
        steps (`int`): how often the model has acted.
        errors (`Counter[str]`): calls without a result by reason: `unreadable_call`, `unknown_function`,
            `bad_arguments`, `tool_error`.
        answer (`str`, *optional*): the model's last words; None where the run ended without.
        ended (`str`): `answer`, `max_steps`, or `context_full`, as the next step would exceed the model's positions.
    """

    tools: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    steps: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    answer: str | None = None
    ended: Literal["answer", "max_steps", "context_full"] = "max_steps"


def save_transcripts(transcripts: Iterable[Transcript], folder: str | Path) -> None:
    """Write `transcripts.jsonl` and the images that it names.

    `open-qwen2vl pack FOLDER/transcripts.jsonl --images FOLDER` takes them.

    Args:
        transcripts (`Iterable[Transcript]`): read one by one.
        folder (`str` or `Path`): a new one; it appears whole or not at all.

    Raises:
        ValueError: if there is such a folder.
    """
    with new_folder(Path(folder)) as partial:
        (partial / "images").mkdir()
        with open(partial / "transcripts.jsonl", "w", encoding="utf-8") as file:
            for number, transcript in enumerate(transcripts):
                messages = [_with_files(message, partial) for message in transcript.messages]
                record = {"id": f"{number:06d}", "tools": transcript.tools, "messages": messages}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _with_files(message: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A message that names its images, which are written."""
    parts = [
        {"type": "image", "image": _write(part["image"], folder)} if part["type"] == "image" else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _write(image: Image.Image, folder: Path) -> str:
    """Write an image under a name of its content, so that a screen that stays as it is takes room once."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    name = f"images/{hashlib.sha256(file.getvalue()).hexdigest()[:32]}.png"
    if not (folder / name).exists():
        (folder / name).write_bytes(file.getvalue())
    return name
