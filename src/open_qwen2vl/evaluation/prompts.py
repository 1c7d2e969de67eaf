r"""From a task's messages to what the model sees.

    chat   the processor's chat template over the conversation, ready for the assistant's turn
    raw    bos, then images and texts as they come: for base models, and for the paper's own prompts

A text that follows an image starts with a separator, a newline by default, as in training. What an image is in tokens
is the processor's business: a prompt has one placeholder for each.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from ..processing.images import decode_image

STYLES = ("chat", "raw")


class Prompt(NamedTuple):
    """A prompt as text, with a placeholder for each image.

    Args:
        text (`str`): all of it, special tokens included.
        images (`list[PIL.Image.Image]`): in the order of the placeholders.
    """

    text: str
    images: list[Image.Image]


class PromptBuilder:
    """Turns messages into prompts and prompts into model inputs.

    Args:
        processor (`ProcessorMixin`): of any image-text-to-text model.
        style (`str`, *optional*, defaults to `"chat"`): `"chat"` or `"raw"`.
        image_seq_length (`int`, *optional*): tokens per image, for processors that take it; theirs where not given.
        image_separator (`str`, *optional*, defaults to a newline): stands between an image and what follows it.

    Raises:
        ValueError: for an unknown style, a processor without a chat template, or one that takes no `image_seq_length`.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        style: str = "chat",
        image_seq_length: int | None = None,
        image_separator: str = "\n",
    ):
        if style not in STYLES:
            raise ValueError(f"prompt_style {style!r}: it is one of {', '.join(STYLES)}")
        if style == "chat" and not processor.chat_template:
            raise ValueError("the processor has no chat template: a base model is evaluated with raw prompts")
        if image_seq_length is not None and not hasattr(processor, "image_seq_length"):
            raise ValueError(f"image_seq_length: {type(processor).__name__} has no such option")
        self.processor = processor
        self.style = style
        self.separator = image_separator
        self.options = {} if image_seq_length is None else {"image_seq_length": image_seq_length}

    def build(self, messages: list[dict[str, Any]]) -> Prompt:
        """Make one prompt.

        Args:
            messages (`list[dict]`): `{"role", "content"}`; content is text, or a list of
                `{"type": "text", "text"}` and `{"type": "image", "url" or "image": PIL image or path}`.

        Returns:
            [`Prompt`].

        Raises:
            ValueError: for content that is neither text nor image.
        """
        turns = [(message["role"], _parts(message["content"])) for message in messages]
        images = [part for _, parts in turns for part in parts if not isinstance(part, str)]
        return Prompt(self._raw(turns) if self.style == "raw" else self._chat(turns), images)

    def _chat(self, turns: list[tuple[str, list]]) -> str:
        conversation = []
        for role, parts in turns:
            content: list[dict[str, str]] = []
            for part in parts:
                if not isinstance(part, str):
                    content.append({"type": "image"})
                elif content and content[-1]["type"] == "image":
                    content.append({"type": "text", "text": self.separator + part.removeprefix(self.separator)})
                else:
                    content.append({"type": "text", "text": part})
            conversation.append({"role": role, "content": content})
        return self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)

    def _raw(self, turns: list[tuple[str, list]]) -> str:
        text, after_image = self.processor.tokenizer.bos_token or "", False
        for _, parts in turns:
            for part in parts:
                if isinstance(part, str):
                    text += part.removeprefix(self.separator) if after_image else part
                else:
                    text += self.processor.image_token + self.separator
                after_image = not isinstance(part, str)
        return text

    def encode(self, prompts: Sequence[Prompt]) -> BatchFeature:
        """Model inputs of a batch, padded on the left.

        Args:
            prompts (`Sequence[Prompt]`): at least one.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` of shape `(prompts, longest)`, and what the processor
            makes of the images.
        """
        bos = self.processor.tokenizer.bos_token
        images = [image for prompt in prompts for image in prompt.images]
        return self.processor(
            text=[prompt.text for prompt in prompts],
            images=images or None,
            padding=True,
            padding_side="left",
            # As `apply_chat_template` decides it: a template that writes the first token itself has written it.
            add_special_tokens=not (bos and prompts[0].text.startswith(bos)),
            return_tensors="pt",
            **self.options,
        )

    def continuation_ids(self, prompt: Prompt, continuation: str) -> list[int]:
        """Token ids that a continuation adds to a prompt; a chat's answer does not start with a space.

        Args:
            prompt ([`Prompt`]): what it continues.
            continuation (`str`): the text.

        Returns:
            `list[int]`: the ids.
        """
        tokenizer = self.processor.tokenizer
        if self.style == "chat":
            continuation = continuation.lstrip()
        before, whole = tokenizer([prompt.text, prompt.text + continuation], add_special_tokens=False)["input_ids"]
        if whole[: len(before)] == before:
            return whole[len(before) :]
        # Joined to what stands before, as Qwen's ":A": then the answer's own tokens, which the paper's rules compare.
        return tokenizer(continuation, add_special_tokens=False)["input_ids"]


def user_turn(images: Sequence[Image.Image] | None, text: str) -> list[dict[str, Any]]:
    """Messages of one question: its images, then its text.

    Args:
        images (`Sequence[PIL.Image.Image]`, *optional*): may be empty.
        text (`str`): the question.

    Returns:
        `list[dict]`: one message, as [`PromptBuilder.build`] takes it.
    """
    content: list[dict[str, Any]] = [{"type": "image", "url": image} for image in images or []]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def message_images(messages: list[dict[str, Any]]) -> list[Image.Image]:
    """The images of messages, in reading order.

    Args:
        messages (`list[dict]`): as [`PromptBuilder.build`] takes them.

    Returns:
        `list[PIL.Image.Image]`: the images.
    """
    parts = [part for message in messages for part in _parts(message["content"])]
    return [part for part in parts if not isinstance(part, str)]


def _parts(content: str | list[dict[str, Any]]) -> list[str | Image.Image]:
    if isinstance(content, str):
        return [content]
    return [_part(part) for part in content]


def _part(part: dict[str, Any]) -> str | Image.Image:
    if part["type"] == "text":
        return part["text"]
    image = part.get("image", part.get("url"))
    if part["type"] == "image" and isinstance(image, str):
        return decode_image(Path(image).read_bytes())
    if part["type"] != "image" or not isinstance(image, Image.Image):
        raise ValueError(f"a message has {part['type']} content of type {type(image).__name__}: only text and images")
    return image
