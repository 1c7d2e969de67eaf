r"""From a task's messages to prompts, and from prompts to model inputs.

Two styles: `chat` renders the processor's chat template; `raw` has none, only texts, images followed by a newline, and
the first token, as the paper's evaluation and base models want it. How an image looks in tokens is the processor's
business. Text of a task or a user never becomes a control token: transformers sanitizes it, as training does.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from ..grounding.prompting import prompt_messages
from ..processing.images import decode_image
from .clips import Clip, clip_options, read_clip

STYLES = ("chat", "raw")
SEPARATOR = {"type": "separator"}  # a content part: what ends a demonstration, as a control token where it is one
# Private use: stand for texts to see what a chat template puts around an image.
_BEFORE, _AFTER = "\ue000", "\ue001"
_IMAGE_PATHS = ("jpg", "jpeg", "png", "gif", "webp", "bmp", "tiff", "tif")
_RAW_TEMPLATE = (
    "{{ bos_token | default('', true) }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ IMAGE }}{{ '\\n' }}{% elif part['type'] == 'separator' %}{{ SEPARATOR }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


class Prompt(NamedTuple):
    """A prompt."""

    text: str  # all of it as it is shown, with one placeholder for each image or video
    messages: list[dict[str, Any]]  # what it is made of, in transformers' form
    images: list[Image.Image]  # in reading order
    clips: list[Clip]  # likewise

    @property
    def shown(self) -> "ShownPrompt":
        """What of it is kept with the answer."""
        parts = self.messages[-1]["content"]
        start = max((number + 1 for number, part in enumerate(parts) if part == SEPARATOR), default=0)
        texts = [part["text"].strip() for part in parts[start:] if part["type"] == "text"]
        return ShownPrompt(self.text, "\n".join(filter(None, texts)))


class ShownPrompt(NamedTuple):
    """A prompt for the eye: all of it, and the last turn's text alone, without template and demonstrations."""

    text: str
    question: str


class PromptBuilder:
    """Turns messages into prompts and prompts into model inputs."""

    def __init__(
        self,
        processor: ProcessorMixin,
        style: str = "chat",
        image_seq_length: int | None = None,
        separator: str = "",
    ):
        if style not in STYLES:
            raise ValueError(f"prompt_style {style!r}: it is one of {', '.join(STYLES)}")
        if style == "chat" and not processor.chat_template:
            raise ValueError("the processor has no chat template: a base model is evaluated with raw prompts")
        self.processor = processor
        self.style = style
        self.options = image_options(processor, image_seq_length)
        # One string, so that a tokenizer's control tokens in it are known as the template's own.
        self.chat_template = None if style == "chat" else _raw_template(processor, separator)

    def build(self, messages: list[dict[str, Any]]) -> Prompt:
        """Make one prompt of `{"role", "content"}` messages.

        Content is text or a list of `{"type": "text", "text"}`, `{"type": "image", "url" or "image": image or path}`,
        `{"type": "video", "url" or "video": clip or path}`, `{"type": "box", "box"}` in pixels of the image before it,
        and [`SEPARATOR`].
        """
        turns = [
            {"role": message["role"], "content": content_parts(message["content"], self.processor)}
            for message in messages
        ]
        clips = _message_clips(turns)
        if self.style == "raw":
            if clips:
                raise ValueError("a raw prompt takes no video: videos are for models with a chat template")
            turns = [{**turn, "content": _newline_once(turn["content"])} for turn in turns]
        turns = prompt_messages(turns, self.processor)
        text = self.processor.apply_chat_template(
            turns, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
        )
        return Prompt(text, turns, message_images(turns), clips)

    def encode(self, prompts: Sequence[Prompt]) -> BatchFeature:
        """Inputs of a batch: ids and mask `(prompts, longest)`, padded on the left, and what images become."""
        return encode_messages(
            self.processor, [prompt.messages for prompt in prompts], self.options, chat_template=self.chat_template
        )

    def continuation_ids(self, prompt: Prompt, continuation: str) -> list[int]:
        """Token ids that a continuation adds to a prompt; a chat's answer does not start with a space."""
        if self.style == "chat":
            continuation = continuation.lstrip()
        texts = [prompt.text, prompt.text + continuation, continuation]
        before, whole, alone = self.processor.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        # Where it is joined to what stands before, as Qwen's ":A": the answer's own tokens, which the paper compares.
        return whole[len(before) :] if whole[: len(before)] == before else alone


def encode_messages(
    processor: ProcessorMixin,
    conversations: Sequence[list[dict[str, Any]]],
    options: dict[str, Any],
    chat_template: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    continues: bool = False,
) -> BatchFeature:
    """Inputs of conversations up to where the model answers, or where it goes on with the last turn if it `continues`;
    special tokens' strings in them stay text.
    """
    clips = [clip for messages in conversations for clip in _message_clips(messages)]
    return processor.apply_chat_template(
        [_with_frames(prompt_messages(messages, processor)) for messages in conversations],
        chat_template=chat_template,
        tools=tools,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        sanitize_control_tokens=True,
        processor_kwargs={"padding": True, "padding_side": "left", **options, **clip_options(clips)},
    )


def image_options(processor: ProcessorMixin, image_seq_length: int | None) -> dict[str, int]:
    """Options of a processor call; ValueError where the processor has no budget of tokens for each image."""
    if image_seq_length is None:
        return {}
    if not hasattr(processor, "image_seq_length"):
        raise ValueError(f"image_seq_length: {type(processor).__name__} has no such option")
    return {"image_seq_length": image_seq_length}


def user_turn(media: Sequence[Image.Image | Clip | str] | None, text: str) -> list[dict[str, Any]]:
    """Messages of one question: its images and videos, then its text; a path says which by its end."""
    kinds = ("video" if _is_video(one) else "image" for one in media or [])
    content: list[dict[str, Any]] = [{"type": kind, kind: one} for kind, one in zip(kinds, media or [], strict=True)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def _is_video(one: Image.Image | Clip | str) -> bool:
    # As lmms-eval has it, a gif and a webp are images.
    return isinstance(one, Clip) or isinstance(one, str) and one.rpartition(".")[2].lower() not in _IMAGE_PATHS


def message_images(messages: list[dict[str, Any]]) -> list[Image.Image]:
    """The images of messages, in reading order."""
    parts = [part for message in messages for part in message["content"] if isinstance(message["content"], list)]
    return [part["image"] for part in content_parts([part for part in parts if part["type"] == "image"])]


def _message_clips(messages: list[dict[str, Any]]) -> list[Clip]:
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part["video"] for content in contents for part in content if part["type"] == "video"]


def _with_frames(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose clips are the arrays that a processor takes."""

    def as_array(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "video": part["video"].frames} if part["type"] == "video" else part

    return [
        {**message, "content": [as_array(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def content_parts(
    content: str | list[dict[str, Any]], processor: ProcessorMixin | None = None
) -> list[dict[str, Any]]:
    """Parts of a message's content as [`PromptBuilder.build`] takes it, images opened; videos need the processor."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [_part(part, processor) for part in content]


def _part(part: dict[str, Any], processor: ProcessorMixin | None) -> dict[str, Any]:
    if part["type"] == "video" and processor is not None:
        if any(part.get(name) is not None for name in ("start_time", "end_time")):
            raise ValueError("a message has a video from start_time to end_time: only whole videos are shown")
        clip = part.get("video", part.get("url"))
        return {"type": "video", "video": clip if isinstance(clip, Clip) else read_clip(processor, clip)}
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part == SEPARATOR or part["type"] == "box":
        return part
    image = part.get("image", part.get("url"))
    if part["type"] == "image" and isinstance(image, str):
        image = decode_image(Path(image).read_bytes())
    if part["type"] != "image" or not isinstance(image, Image.Image):
        raise ValueError(
            f"a message has {part['type']} content of type {type(image).__name__}: only text, images, videos and boxes"
        )
    return {"type": "image", "image": image}


def _newline_once(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts without the newline that a text after an image begins with: the raw template writes it."""
    behind = [None, *parts[:-1]]
    return [
        {**part, "text": part["text"].removeprefix("\n")}
        if part["type"] == "text" and before is not None and before["type"] == "image"
        else part
        for before, part in zip(behind, parts, strict=True)
    ]


def _raw_template(processor: ProcessorMixin, separator: str) -> str:
    literals = {"IMAGE": _image_text(processor), "SEPARATOR": separator}
    template = _RAW_TEMPLATE
    for name, text in literals.items():
        template = template.replace(f"{{{{ {name} }}}}", f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}")
    return template


def _image_text(processor: ProcessorMixin) -> str:
    """What the chat template writes for an image between texts, as `<|vision_start|><|image_pad|><|vision_end|>`."""
    if not processor.chat_template:
        return processor.image_token
    content = [{"type": "text", "text": _BEFORE}, {"type": "image"}, {"type": "text", "text": _AFTER}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    between = text.partition(_BEFORE)[2].partition(_AFTER)[0].strip("\n")
    return between if processor.image_token in between else processor.image_token
