"""The seam: all that the pipeline asks of a model family, and nothing else of it is special anywhere.

    data     record ─► texts and media ─► DocumentProcessor ─► ids, labels, positions, media tensors of a document
    training batch of packs ─► model after PackedModel.prepare ─► loss at labelled positions

Two protocols, because a planner must not import a model. docs/architecture.md says how to add a family.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..processing.text_formats import TextFormat


class Media(NamedTuple):
    """An image or a video as its header describes it; nothing is decoded.

    Attributes:
        kind (`str`): `"image"` or `"video"`.
        width (`int`): in pixels, upright (after EXIF rotation); 0 where the family does not ask for sizes.
        height (`int`): likewise.
        frames (`int`): 1 for an image.
        fps (`float`): frames a second of a video as stored; 0.0 for an image.
    """

    kind: str
    width: int = 0
    height: int = 0
    frames: int = 1
    fps: float = 0.0


class VisionWork(NamedTuple):
    """What encoding media costs; sums over media add up field by field.

    Attributes:
        patches (`int`): patches of the vision tower, the unit of visual load.
        squared (`int`): sum over attention segments of the tower of their length squared.
        tokens (`int`): positions of the language model that show the media, marks not counted.
        windowed (`int`): as `squared`, over the windows of a tower whose blocks attend in windows; else 0.
    """

    patches: int = 0
    squared: int = 0
    tokens: int = 0
    windowed: int = 0


class Box(NamedTuple):
    """A place in an image.

    Attributes:
        label (`str`, *optional*): what is there.
        box (`tuple[float, float, float, float]`): left, top, right and bottom in pixels of the upright image as it is.
    """

    label: str | None
    box: tuple[float, float, float, float]


class BoxForm(Protocol):
    """How a family writes boxes and reads them in an answer.

    Attributes:
        name (`str`): as a plan records it.
        marks (`tuple[str, ...]`): control tokens that it writes around boxes.
    """

    name: str
    marks: tuple[str, ...]

    def write(self, boxes: Sequence[tuple[Box, Media]]) -> list[dict[str, Any]]:
        """Boxes that stand together, each with its image, as content parts.

        Parts are `text`, of which no control token comes, and `control`, whose text is control tokens alone.
        """

    def read(self, text: str, width: int, height: int) -> list[Box]:
        """The boxes of an answer about an image of so many pixels; what is no box is left out, nothing is raised."""


class DocumentProcessor(Protocol):
    """The data side of a family: wraps the processor that transformers loads; picklable, for workers.

    It is made as `Class(processor, chat_template=None, **plan_options)`, where `chat_template` is the name of one of
    the processor's templates.

    Attributes:
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer.
        chat_template (`str`): with `{% generation %}` marks; renders as the processor's own.
        media_strings (`dict[str, str]`): what the template writes for one image or video, by `Media.kind`, as
            `{"image": "<|vision_start|><|image_pad|><|vision_end|>"}`; `placeholder_ids` stand there instead.
        text_format ([`TextFormat`]): of documents that are no conversations.
        boxes ([`BoxForm`], *optional*): how boxes are written; None where the family knows none.
        needs_sizes (`bool`): whether [`placeholder_ids`] depends on width and height, so that a planner reads headers.
        rope_rows (`int`): rows of `position_ids`: 1, or 4 for M-RoPE (text, t, h, w).
        placeholder_names (`dict[str, int]`): arguments of the forward that take the positions of a token in the
            flattened batch, and its id, as `{"image_positions": 151655}`; empty for a forward that looks for them.
        host_names (`tuple[str, ...]`): media tensors that the forward takes as nested lists, for it needs their values
            on the host: grids of patches.
        plan_options (`tuple[str, ...]`): keys of the fingerprint that a plan chooses and a processor follows, as
            `image_seq_length`; keywords of the constructor. All other differences are refused.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str
    media_strings: dict[str, str]
    text_format: TextFormat
    boxes: BoxForm | None
    needs_sizes: bool
    rope_rows: int
    placeholder_names: dict[str, int]
    host_names: tuple[str, ...]
    plan_options: ClassVar[tuple[str, ...]]

    def fingerprint(self) -> dict[str, Any]:
        """All that decides ids and counts of media, flat JSON with `"family"`: a plan records it as `vision`."""

    def describe_video(self, read: Callable[[int | None], bytes]) -> tuple[Media, bool]:
        """A video by its header, and whether it breaks off before the end that it claims; `read` gives so many bytes
        of its file, or all.

        Raises:
            SampleError: if it cannot be read, or `video_unsupported`.
        """

    def placeholder_ids(self, media: Media) -> list[int]:
        """Ids that stand in the text for an image or video, marks included.

        Raises:
            SampleError: for media that the family cannot take, as an aspect ratio above 200.
        """

    def read_media(self, data: bytes, media: Media) -> dict[str, torch.Tensor]:
        """Decode one image or video into the tensors of the forward, by their names there; first dimension joins.

        Raises:
            SampleError: if it is broken, or not what the plan says it is.
        """

    def keep_options(self) -> None:
        """Write into the processor, which is saved with a model, how videos are shown: prompts then show them so."""

    def sampled_frames(self, data: bytes, media: Media) -> tuple[np.ndarray, list[int]]:
        """The frames that are shown of a video, resized, uint8 `(frames, 3, height, width)`, and their numbers."""

    def extract_frames(self, data: bytes, lossless: bool) -> bytes:
        """A file of a video's resized frames, which [`describe_video`] and [`read_media`] take in its place."""

    def empty_media(self) -> dict[str, torch.Tensor]:
        """The tensors of a document without media: first dimension 0."""

    def position_ids(self, input_ids: np.ndarray, media: dict[str, torch.Tensor]) -> np.ndarray:
        """Positions of one document, int64 `(rope_rows, S)`; row 0 is `arange(S)`."""

    def vision_work(self, media: Media) -> VisionWork:
        """What encoding an image or video costs."""

    def forward_options(self) -> dict[str, Any]:
        """Arguments of the forward that are the same for all batches of a plan."""


class StepWork(NamedTuple):
    """The work of one micro-batch, padding not counted.

    Attributes:
        tokens (`int`): positions of documents.
        squared_lengths (`int`): sum over documents of length squared.
        media (`int`): images and videos.
        vision ([`VisionWork`]): of all media.
    """

    tokens: int
    squared_lengths: int
    media: int
    vision: VisionWork


class PackedModel(Protocol):
    """The model side of a family; the model classes stay transformers' own.

    Attributes:
        parts (`dict[str, str | tuple[str, ...]]`): prefix, or prefixes, of parameter names of each part, `"projector"`
            and `"vision_tower"`, as `str.startswith` takes them; the first that matches counts, and what matches none
            is `"language_model"`.
        block_classes (`tuple[str, ...]`): classes that FSDP wraps, activation checkpointing recomputes and a compiler
            compiles.
        fused_classes (`dict[str, str]`): operation, `"rms_norm"`, `"swiglu"` or `"rope"`, by the class that computes
            it as Llama does, for Liger's kernels; empty where there is none.
    """

    parts: dict[str, str | tuple[str, ...]]
    block_classes: tuple[str, ...]
    fused_classes: dict[str, str]

    def prepare(self, model: PreTrainedModel, processor: Any = None) -> PreTrainedModel:
        """Give the model the packed forward; idempotent, takes and returns the model."""

    def step_flops(self, config: PreTrainedConfig, work: StepWork, trained: dict[str, int]) -> int:
        """FLOPs of forward and backward; `trained` has the trained parameters of each part and of `"adapter"`."""

    def vision_work(self, config: PreTrainedConfig, images: float, tokens: float) -> VisionWork:
        """What encoding so many images costs, which take so many positions together: for estimates."""

    def activation_bytes(
        self, config: PreTrainedConfig, work: StepWork, trained: dict[str, int], **layout: Any
    ) -> float:
        """Bytes of activations of a micro-batch, for `open-qwen2vl estimate`."""
