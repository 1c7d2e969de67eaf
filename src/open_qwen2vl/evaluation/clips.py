"""A clip in a prompt: the very frames that training would show of it, handed to the processor as they are."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import ProcessorMixin
from transformers.video_utils import VideoMetadata

from ..families import document_processor
from ..processing.sample_error import SampleError


class Clip(NamedTuple):
    """A video as it is shown."""

    frames: np.ndarray  # uint8 (frames, 3, height, width), resized
    numbers: list[int]  # of these frames in the clip
    total: int  # frames of the clip
    fps: float  # of the clip

    @property
    def digest(self) -> str:
        """A hash of what is shown."""
        return hashlib.sha256(f"{self.frames.shape} {self[1:]}".encode() + self.frames.tobytes()).hexdigest()


def read_clip(processor: ProcessorMixin, file: str | Path) -> Clip:
    """Sample and decode a clip as in the training that the processor comes from; else 2 frames a second, at most 768,
    within 16,384 positions.

    Raises:
        ValueError: for a family without videos, or a file that is no clip.
        OSError: if it cannot be read.
    """
    family, path = document_processor(processor), Path(file).expanduser()
    try:
        # Opened by a family that has videos.
        media, _ = family.describe_video(lambda limit: path.read_bytes()[:limit])
        return Clip(*family.sampled_frames(path.read_bytes(), media), media.frames, media.fps)
    except SampleError as error:
        raise ValueError(f"{file}: {error}") from error


def clip_options(clips: Sequence[Clip]) -> dict[str, Any]:
    """Options of a processor call whose videos are the frames of these clips."""
    if not clips:
        return {}
    metadata = [
        VideoMetadata(total_num_frames=clip.total, fps=clip.fps, frames_indices=list(clip.numbers)) for clip in clips
    ]
    # Sampled, resized and within the budget already.
    done = {"do_sample_frames": False, "do_resize": False, "cap_pixels_per_frame": False}
    return {"videos_kwargs": {"video_metadata": metadata, **done}}
