"""The data side of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: documents over the processor that the checkpoint comes with.

Tokenizer, template and image processor stay as published. An image stands in the text as
`<|vision_start|><|image_pad|>...<|vision_end|>`, a video with `<|video_pad|>` in it, and Qwen3-VL's has a time stamp
and marks of its own around each pair of frames; a document that is no conversation starts with its first entry and
ends in `<|endoftext|>`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import ProcessorMixin, Qwen2_5_VLProcessor, Qwen3VLProcessor
from transformers.utils.chat_template_utils import render_jinja_template

from ...processing.conversations import has_generation_marks, named_chat_template
from ...processing.images import decode_pixels
from ...processing.processing_open_qwen2vl import TORCH_RESAMPLING
from ...processing.sample_error import SampleError
from ...processing.text_formats import encode_as_text
from ..interface import Media, TextFormat, VisionWork
from .boxes import box_form
from .images import image_patches
from .positions import AfterVideo, VideoRule, mrope_positions
from .sizes import WINDOW_SIZE, ImageSizes, VideoSizes, squared_in_windows
from .videos import describe_video, frames_file, resized_frames, video_patches

VIDEO_DEFAULTS = {"video_fps": 2.0, "max_frames": 768, "max_video_tokens": 16_384}  # the article's
KEPT = "shown_videos"  # the attribute of a video processor that has those of a training instead
TOKENS_PER_SECOND = 2.0  # of the released Qwen2.5-VL
# Conversations in which one template cannot look like another: with and without a system turn, images, several turns.
_TURN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "image"}]}
_ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "b"}]}
_PROBES = [
    [_TURN, _ANSWER],
    [{"role": "system", "content": [{"type": "text", "text": "s"}]}, _TURN, _ANSWER, _TURN, _ANSWER],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
]


class QwenVLDocuments:
    """Lays out documents for Qwen2-VL, Qwen2.5-VL and Qwen3-VL; see [`DocumentProcessor`] for its methods.

    Images are brought between `min_pixels` and `max_pixels` (the image processor's own where not given), or all to a
    square of side `fixed_resolution`, for ablations. Of a video `video_fps` frames a second are shown, at most
    `max_frames`, each so large that all take at most `max_video_tokens` positions: where not given as in the training
    that the processor comes from, or as in the article. Text behind it counts on from its
    rows and columns as in transformers 5 (`text_after_video="space"`), or from its frames too, as in the article
    (`"time"`). `tokens_per_second` is that of Qwen2.5-VL's config.
    """

    needs_sizes = True
    rope_rows = 4
    host_names = ("image_grid_thw", "video_grid_thw")
    plan_options = ("min_pixels", "max_pixels", "fixed_resolution", "video_fps", "max_frames", "max_video_tokens",
                    "skip_broken_videos", "text_after_video", "tokens_per_second")  # fmt: skip

    def __init__(
        self,
        processor: ProcessorMixin,
        chat_template: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        fixed_resolution: int | None = None,
        video_fps: float | None = None,
        max_frames: int | None = None,
        max_video_tokens: int | None = None,
        skip_broken_videos: bool = False,
        text_after_video: AfterVideo = "space",
        tokens_per_second: float | None = None,
    ):
        self.processor, image_processor = processor, processor.image_processor
        self.image_processor = image_processor
        self.tokenizer = processor.tokenizer
        self.sizes = ImageSizes(
            image_processor.patch_size,
            image_processor.merge_size,
            image_processor.size["shortest_edge"] if min_pixels is None else min_pixels,
            image_processor.size["longest_edge"] if max_pixels is None else max_pixels,
            fixed_resolution,
        )
        tokens = ("<|vision_start|>", processor.image_token, "<|vision_end|>", "<|endoftext|>", processor.video_token)
        # The whole vocabulary would take a tenth of a second.
        ids = [self.tokenizer.backend_tokenizer.token_to_id(token) for token in tokens]
        if missing := [token for token, found in zip(tokens, ids, strict=True) if found is None]:
            raise ValueError(f"the tokenizer has no {', '.join(missing)}; that of a Qwen2-VL checkpoint has")
        self._start, self.image_token_id, self._end, end_of_text, self.video_token_id = ids
        self.placeholder_names = {"image_positions": self.image_token_id, "video_positions": self.video_token_id}
        self.boxes = box_form(processor, self.sizes)
        video, is_2_5 = processor.video_processor, isinstance(processor, Qwen2_5_VLProcessor)
        self._frames_apart = isinstance(processor, Qwen3VLProcessor)
        shown = {**VIDEO_DEFAULTS, **(getattr(video, KEPT, None) or {})}
        given = {"video_fps": video_fps, "max_frames": max_frames, "max_video_tokens": max_video_tokens}
        shown |= {name: value for name, value in given.items() if value is not None}
        self.videos = VideoSizes(
            video.patch_size, video.merge_size, video.size["shortest_edge"], video.size["longest_edge"],
            shown["video_fps"], video.min_frames, shown["max_frames"], shown["max_video_tokens"], self._frames_apart
        )  # fmt: skip
        self._skip_broken = skip_broken_videos
        if tokens_per_second is not None and not is_2_5:
            raise ValueError("tokens_per_second is an option of Qwen2.5-VL alone")
        if text_after_video not in get_args(AfterVideo):
            raise ValueError(f"text_after_video must be {' or '.join(get_args(AfterVideo))}, got {text_after_video!r}")
        self._rule = VideoRule(
            text_after_video,
            (tokens_per_second or TOKENS_PER_SECOND) if is_2_5 else None,
            self._frames_apart,
        )
        self.text_format = TextFormat(document_start=(), document_end=(end_of_text,))
        self.chat_template = training_template(processor, chat_template)
        self.media_strings = {
            kind: f"<|vision_start|>{token}<|vision_end|>"
            for kind, token in (("image", processor.image_token), ("video", processor.video_token))
        }
        self.mode = TORCH_RESAMPLING.get(image_processor.resample)
        if self.mode is None:
            raise ValueError(f"the image processor's resample {image_processor.resample!r} is not known here")

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the ids and counts of media."""
        sizes = self.sizes
        return {
            "family": "qwen_vl",
            "patch_size": sizes.patch_size,
            "merge_size": sizes.merge_size,
            "min_pixels": sizes.min_pixels,
            "max_pixels": sizes.max_pixels,
            "fixed_resolution": sizes.fixed_resolution,
            "boxes": self.boxes and self.boxes.name,
            "video_fps": self.videos.fps,
            "min_frames": self.videos.min_frames,
            "max_frames": self.videos.max_frames,
            "max_video_tokens": self.videos.max_tokens,
            "video_pixels": [self.videos.min_pixels, self.videos.max_pixels],
            "skip_broken_videos": self._skip_broken,
            "text_after_video": self._rule.after,
            "tokens_per_second": self._rule.tokens_per_second,
            "ids": [self._start, self.image_token_id, self.video_token_id, self._end, *self.text_format.document_end],
        }

    def describe_video(self, read: Callable[[int | None], bytes]) -> tuple[Media, bool]:
        """See [`DocumentProcessor`]."""
        media, is_broken = describe_video(read, self.videos)
        if is_broken and self._skip_broken:
            raise SampleError("broken_video", f"it breaks off after {media.frames} frames")
        return media, is_broken

    def placeholder_ids(self, media: Media) -> list[int]:
        """An image's or video's tokens between marks; an aspect ratio above 200 is a SampleError."""
        if media.kind == "video":
            return self._video_ids(media)
        return [self._start, *[self.image_token_id] * self.sizes.tokens(media.width, media.height), self._end]

    def read_media(self, data: bytes, media: Media) -> dict[str, torch.Tensor]:
        """Of an image file `pixel_values` uint8 `(patches, 3 * P * P)` and `image_grid_thw` int64 `(1, 3)`; of a clip
        `pixel_values_videos` uint8 `(patches, 3 * 2 * P * P)`, `video_grid_thw` and for Qwen2.5-VL
        `second_per_grid_ts` float32 `(1,)`, the seconds of a pair of frames.
        """
        if media.kind == "video":
            return self._read_video(data, media)
        pixels = decode_pixels(data)
        height, width = pixels.shape[:2]
        # Its placeholders are in the sequence by now: another size would need another number of them.
        if media.width and (width, height) != (media.width, media.height):
            raise SampleError("image_changed", f"it has {width}x{height} pixels, planned {media.width}x{media.height}")
        rows, columns = self.sizes.grid(width, height)
        return {
            "pixel_values": image_patches(pixels, self.sizes, self.mode),
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
        }

    def _video_ids(self, media: Media) -> list[int]:
        pairs, rows, columns = self.videos.grid(*media[1:])
        frame = [self.video_token_id] * (rows * columns // self.videos.merge_size**2)
        if not self._frames_apart:
            return [self._start, *frame * pairs, self._end]
        # The template's own marks stay around those of the pairs, as transformers has it.
        stamps = [f"<{time:.1f} seconds>" for time in self.videos.times(media.frames, media.fps)]
        ids = encode_as_text(self.tokenizer, stamps)
        return [self._start, *(i for stamp in ids for i in (*stamp, self._start, *frame, self._end)), self._end]

    def _read_video(self, data: bytes, media: Media) -> dict[str, torch.Tensor]:
        seconds = {}
        if self._rule.tokens_per_second is not None:
            count = self.videos.count(media.frames, media.fps)
            seconds["second_per_grid_ts"] = torch.tensor([self.videos.pair * media.frames / count / media.fps])
        return {
            "pixel_values_videos": video_patches(data, media, self.videos, self.mode, self._skip_broken),
            "video_grid_thw": torch.tensor([self.videos.grid(*media[1:])]),
            **seconds,
        }

    def keep_options(self) -> None:
        """See [`DocumentProcessor`]."""
        own = self.fingerprint()
        setattr(self.processor.video_processor, KEPT, {name: own[name] for name in VIDEO_DEFAULTS})

    def sampled_frames(self, data: bytes, media: Media) -> tuple[np.ndarray, list[int]]:
        """See [`DocumentProcessor`]; a clip of one frame has it twice."""
        frames = list(resized_frames(data, media, self.videos, self.mode, self._skip_broken))
        numbers = self.videos.numbers(media.frames, media.fps).tolist()
        twice = 2 if len(frames) == 1 else 1
        return np.stack(frames * twice), numbers * twice

    def extract_frames(self, data: bytes, lossless: bool) -> bytes:
        """A tar of a clip's resized frames, JPEG or `lossless` PNG; see [`frames_file`]."""
        media, is_broken = self.describe_video(lambda limit: data[:limit])
        return frames_file(data, media, is_broken, self.videos, self.mode, lossless, self._skip_broken)

    def empty_media(self) -> dict[str, torch.Tensor]:
        """The tensors of no image and no video."""
        seconds = {} if self._rule.tokens_per_second is None else {"second_per_grid_ts": torch.empty(0)}
        return {
            "pixel_values": torch.empty(0, 3 * self.sizes.patch_size**2, dtype=torch.uint8),
            "image_grid_thw": torch.empty(0, 3, dtype=torch.int64),
            "pixel_values_videos": torch.empty(0, 6 * self.videos.patch_size**2, dtype=torch.uint8),
            "video_grid_thw": torch.empty(0, 3, dtype=torch.int64),
            **seconds,
        }

    def position_ids(self, input_ids: np.ndarray, media: dict[str, torch.Tensor]) -> np.ndarray:
        """M-RoPE positions of one document, int64 `(4, S)`."""
        images, videos = (media[name].numpy() for name in ("image_grid_thw", "video_grid_thw"))
        seconds = media["second_per_grid_ts"].tolist() if "second_per_grid_ts" in media else None
        return mrope_positions(
            np.asarray(input_ids), self.image_token_id, images, self.sizes.merge_size,
            self.video_token_id, videos, seconds, self._rule
        )  # fmt: skip

    def vision_work(self, media: Media) -> VisionWork:
        """An image, or a pair of frames, is one segment; in some blocks of Qwen2.5-VL each of its windows."""
        is_video = media.kind == "video"
        pairs, rows, columns = (
            self.videos.grid(*media[1:]) if is_video else (1, *self.sizes.grid(media.width, media.height))
        )
        patches = pairs * rows * columns
        windowed = 0
        if self._rule.tokens_per_second is not None:  # Qwen2.5-VL
            windowed = pairs * squared_in_windows((rows, columns), WINDOW_SIZE // self.sizes.patch_size)
        return VisionWork(patches, patches * rows * columns, patches // self.sizes.merge_size**2, windowed)

    def forward_options(self) -> dict[str, Any]:
        """What Qwen2.5-VL's config must say, too."""
        seconds = self._rule.tokens_per_second
        return {} if seconds is None else {"tokens_per_second": seconds}


def training_template(processor: ProcessorMixin, name: str | None = None) -> str:
    """The processor's chat template with `{% generation %}` marks: its own, or ours where that renders the same."""
    own = named_chat_template(processor.chat_template, name)
    if has_generation_marks(own):
        return own
    templates = [path.read_text(encoding="utf8") for path in sorted(Path(__file__).parent.glob("*.jinja"))]
    # By name: Qwen2-VL's comes first, Qwen3-VL's second.
    if own is None:
        return templates[type(processor).__name__ == "Qwen3VLProcessor"]
    options = processor.tokenizer.special_tokens_map
    wanted = _render(own, options)
    for template in templates:
        if wanted is not None and _render(template, options) == wanted:
            return template
    raise ValueError(
        "the processor's chat template is not Qwen's own and has no {% generation %} marks, which say what is trained "
        "on: add them around the assistant's turns"
    )


def _render(template: str, options: dict[str, Any]) -> list[str] | None:
    try:
        return render_jinja_template(_PROBES, chat_template=template, **options)[0]
    # One that takes no system turn, say, refuses a probe: it is none of ours.
    except (TemplateError, TypeError, ValueError):
        return None
