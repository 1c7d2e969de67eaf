"""The step `extract-frames`: each clip is decoded once, to the frames that training shows of it.

    tar      KEY.mp4 with its caption or json ──► a tar of the same name, KEY.frames with the same beside it
    folder   PLACE/NAME.mp4 ────────────────────► PLACE/NAME.frames in the output

A `.frames` is a tar of the resized frames and what the clip's header said (families/qwen_vl/videos.py). `pack` takes
it, with the same options, wherever it would take the clip, under the clip's name: ids, grid and uid are the same.
"""

import functools
import io
import json
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...families import document_processor
from ...families.interface import DocumentProcessor
from ...files import describe_shard, remove_temporaries, renamed_when_whole, shard_path, write_json
from ...output_lock import only_writer
from ...places import open_file
from ...processing.sample_error import SampleError
from ..engine.engine import Outcome, ShardTask, StepReport, run_tasks
from ..storage.tars import (
    ANIMATIONS,
    MAX_VIDEO_BYTES,
    VIDEO_EXTENSIONS,
    Sample,
    find_tars,
    index_shard,
    read_member,
)
from .options import ExtractOptions

logger = logging.getLogger(__name__)

RECIPE_NAME = "extract-frames.json"
_FAMILY_OPTIONS = ("video_fps", "max_frames", "max_video_tokens", "skip_broken_videos")


def extract_frames(options: ExtractOptions, processor: Any) -> StepReport:
    """Write the sampled frames of clips. Clips that cannot be read are left out and counted; a rerun tries them again.

    Args:
        options ([`ExtractOptions`]): which clips, and how.
        processor (`ProcessorMixin`): of a family that takes videos.

    Returns:
        [`StepReport`]: of this run.

    Raises:
        ValueError: for a family without videos, an input without clips, or a folder with frames of other options, or
            of a clip that has changed.
        OSError: if a file cannot be read or written.
    """
    chosen = {name: getattr(options, name) or None for name in _FAMILY_OPTIONS}
    documents = document_processor(processor, **chosen)
    if "video" not in documents.media_strings:
        raise ValueError(f"--processor {options.processor}: its model takes no videos")
    folder = Path(options.output)
    tasks = list(_tasks(options, folder))
    extensions = (*VIDEO_EXTENSIONS[:-1], *(ANIMATIONS if options.animations else ()))
    tars = [describe_shard(task.source, folder) for task in tasks if task.source.suffix == ".tar"]
    clips = [task for task in tasks if task.source.suffix != ".tar"]
    recipe = {"vision": documents.fingerprint(), "lossless": options.lossless, "extensions": list(extensions)}
    with only_writer(folder):
        _claim(folder, {**recipe, "tars": tars}, clips)
        make = functools.partial(_Extractor, documents, options.lossless, extensions)
        return run_tasks(tasks, make, num_workers=options.num_workers, description="extracting")


def _tasks(options: ExtractOptions, folder: Path) -> Iterator[ShardTask]:
    outputs: dict[Path, Path] = {}
    for path in map(Path, options.input):
        if path.is_dir() and not any(path.glob("*.tar")):
            clips = [clip for clip in sorted(path.rglob("*")) if clip.suffix[1:].lower() in VIDEO_EXTENSIONS[:-1]]
            if not clips:
                raise ValueError(f"{path}: no tar and no clip in this folder; clips end in "
                                 f"{', '.join(VIDEO_EXTENSIONS[:-1])}")  # fmt: skip
            places = [(clip, folder / clip.relative_to(path).with_suffix(".frames")) for clip in clips]
        else:
            places = [(tar, folder / tar.name) for tar in find_tars([path])]
        for source, output in places:
            if output in outputs:
                raise ValueError(f"{source} and {outputs[output]} would both become {output}: extract them apart")
            if output.resolve() == source.resolve():
                raise ValueError(f"{source} is in the output folder; choose another output")
            outputs[output] = source
            yield ShardTask(source, output)


def _claim(folder: Path, recipe: dict[str, Any], clips: list[ShardTask]) -> None:
    """Make the folder this recipe's, or make sure that it is; more clips of a folder may come to it."""
    path = folder / RECIPE_NAME
    described = {str(task.output.relative_to(folder)): describe_shard(task.source, folder) for task in clips}
    if not path.exists():
        if any(folder.glob("*.tar")) or any(folder.rglob("*.frames")):
            raise ValueError(
                f"{folder}: there are files in it that extract-frames has not made; choose another output"
            )
        remove_temporaries([path])
        write_json(path, {**recipe, "clips": described}, sort_keys=True)
        return
    try:
        made = dict(json.loads(path.read_text(encoding="utf8")))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path}: not as extract-frames writes it; delete {folder}") from None
    for name, value in recipe.items():
        if made.get(name) != value:
            what = "other or changed tars" if name == "tars" else f"another {name}"
            raise ValueError(f"{folder}: made with {what}; delete it or choose another output")
    known = made.get("clips", {})
    for name, clip in described.items():
        if known.get(name, clip) != clip and (folder / name).exists():
            source = shard_path(folder, clip)
            raise ValueError(f"{source} has changed since its frames were extracted: delete {folder / name}")
    if known | described != known:
        write_json(path, {**recipe, "clips": known | described}, sort_keys=True)


class _Extractor:
    """Does one tar or clip after the other."""

    def __init__(self, documents: DocumentProcessor, lossless: bool, extensions: tuple[str, ...]):
        self._documents, self._lossless, self._extensions = documents, lossless, extensions

    def __call__(self, task: ShardTask) -> Outcome:
        if task.source.suffix == ".tar":
            return self._extract_tar(task)
        try:
            if task.source.stat().st_size > MAX_VIDEO_BYTES:
                raise SampleError("video_too_large", f"more than {MAX_VIDEO_BYTES} bytes")
            frames = self._frames(task.source.read_bytes())
        except SampleError as error:
            return Outcome.of(1, [(str(task.source), "", error.reason, str(error))])
        task.output.parent.mkdir(parents=True, exist_ok=True)
        with renamed_when_whole(task.output) as temporary:
            temporary.write_bytes(frames)
        return Outcome.of(1, [])

    def _extract_tar(self, task: ShardTask) -> Outcome:
        index = index_shard(task.source)
        skipped = [(str(task.source), key, reason, "") for key, reason in index.skipped]
        with (
            open_file(task.source, whole=True) as source,
            renamed_when_whole(task.output) as temporary,
            tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as output,
        ):
            for sample in index.samples:
                try:
                    members = list(self._members(source, sample))
                except SampleError as error:
                    skipped.append((str(task.source), sample.key, error.reason, str(error)))
                    continue
                for name, content in members:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    output.addfile(info, io.BytesIO(content))
        return Outcome.of(len(index.samples) + len(index.skipped), skipped)

    def _members(self, source: int, sample: Sample) -> Iterator[tuple[str, bytes]]:
        """A sample as it is, but with frames for its clips; of several of one name for the one that counts."""
        for extension, place in sample.members.items():
            stem, dot, last = extension.rpartition(".")
            counts = next((one for one in self._extensions if f"{stem}{dot}{one}" in sample.members), None)
            if counts not in (None, last) and last in VIDEO_EXTENSIONS:  # it would be read for the frames, or for both
                left_out, other = f"{sample.key}.{extension}", f"{sample.key}.{stem}{dot}{counts}"
                logger.warning("%s is left out, for %s counts", left_out, other)
                continue
            content = read_member(source, f"{sample.key}.{extension}", *place)
            if last == counts:
                content, extension = self._frames(content), f"{stem}{dot}frames"
            yield f"{sample.key}.{extension}", content

    def _frames(self, data: bytes) -> bytes:
        return self._documents.extract_frames(data, self._lossless)
