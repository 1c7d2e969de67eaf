r"""From conversations to token ids and labels, through the chat template.

    messages   the normal form of conversation_records.py
      │ data's text: special tokens' strings are parted, so that they stay text
      │ chat template: text, and where in it the answers are ({% generation %})
      │ cut at control tokens and at answers, each piece tokenised alone; an image is image_seq_length placeholders
      ▼
    input_ids, labels (S,): labels are the answers with their end of turn, nothing else

The ids are those of `processor.apply_chat_template`. They differ where that would turn data into control tokens, or
where an answer starts with a newline, which there melts into the prompt's last token and here does not.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .conversation_records import join_texts
from .sample_error import SampleError
from .text_formats import IGNORE_INDEX, IMAGE_TOKEN, encode_as_text

SHORT_PIECE = 64  # characters: what the template writes itself comes again and again, a longer text is the data's
KEPT_PIECES = 256
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "\U000f0002"  # private use


def conversation_document(
    messages: list[dict[str, Any]], processor: Any, image_seq_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lay out a conversation as the processor's chat template does.

    Args:
        messages (`list[dict]`): in the normal form, or with text as content.
        processor (`OpenQwen2VLProcessor`): its chat template must have `{% generation %}` marks.
        image_seq_length (`int`): tokens of each image.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: int64 `input_ids` and `labels`; labels are -100 but at answers with their end
        of turn.

    Raises:
        ValueError: if the template has no such marks.
        SampleError: `template_error` if the template refuses the messages or loses an image.
    """
    return ConversationFormat(processor.tokenizer, processor.chat_template).document(messages, image_seq_length)


class ConversationFormat:
    """How conversations become ids: a tokenizer and a chat template.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer with `<|image_pad|>`.
        chat_template (`str`): Jinja template whose answers stand between `{% generation %}` and `{% endgeneration %}`.

    Raises:
        ValueError: if the template has no such marks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str):
        if not has_generation_marks(chat_template):
            raise ValueError("the chat template has no {% generation %} marks, which say what is trained on")
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        tokens = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        tokens.sort(key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, tokens)) + ")")
        self._special_ids = dict(zip(tokens, tokenizer.convert_tokens_to_ids(tokens), strict=True))
        self._short_pieces: dict[str, list[int]] = {}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the template, 64 hex digits."""
        return hashlib.sha256(self.chat_template.encode()).hexdigest()

    def document(self, messages: list[dict[str, Any]], image_seq_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Lay out a conversation; see [`conversation_document`]."""
        marked = [{**message, "content": self._mark(message["content"])} for message in messages]
        images = sum(part["type"] == "image" for message in marked for part in message["content"])
        ids: list[int] = []
        labels: list[int] = []
        for text, is_answer in self._pieces(*self._render(marked)):
            if text == IMAGE_TOKEN:
                new, is_answer, images = [self._special_ids[text]] * image_seq_length, False, images - 1
            else:
                new = [self._special_ids[text]] if text in self._special_ids else self._encode(text)
            ids += new
            labels += new if is_answer else [IGNORE_INDEX] * len(new)
        if images:
            raise SampleError("template_error", f"the chat template loses or doubles {abs(images)} images")
        labels[:1] = [IGNORE_INDEX]
        return np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64)

    def _mark(self, content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The content with each special token's string in its text parted by a mark."""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        return [
            {**part, "text": self._special.sub(_part_token, part["text"].replace(_MARK, ""))}
            if part["type"] == "text"
            else part
            for part in join_texts(parts)
        ]

    def _render(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        try:
            (text,), (answers,) = render_jinja_template(
                [messages],
                chat_template=self.chat_template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise SampleError("template_error", f"the chat template refuses it: {error}") from error
        return text, _learned(answers, messages)

    def _pieces(self, text: str, answers: list[tuple[int, int]]) -> Iterable[tuple[str, bool]]:
        """Control tokens and the texts between them, each with whether it is of an answer."""
        start = 0
        bounds = [bound for first, stop in answers for bound in ((first, False), (stop, True))]
        for stop, is_answer in [*bounds, (len(text), False)]:
            yield from ((piece, is_answer) for piece in self._special.split(text[start:stop]) if piece)
            start = stop

    def _encode(self, text: str) -> list[int]:
        if (ids := self._short_pieces.get(text)) is None:
            (ids,) = encode_as_text(self.tokenizer, [text.replace(_MARK, "")])
            if len(text) < SHORT_PIECE and len(self._short_pieces) < KEPT_PIECES:
                self._short_pieces[text] = ids
        return ids


def _learned(answers: list[tuple[int, int]], messages: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """The answers without those that their messages set aside."""
    trained = [message.get("train", True) for message in messages if message["role"] == "assistant"]
    if all(trained):
        return answers
    if len(trained) != len(answers):
        raise SampleError("template_error", f"{len(answers)} answers of the chat template for {len(trained)} turns")
    return [answer for answer, is_trained in zip(answers, trained, strict=True) if is_trained]


def has_generation_marks(chat_template: Any) -> bool:
    """Whether a chat template says what of a conversation is generated.

    Args:
        chat_template (`Any`): a template, or what stands in its place (`None`, a dict of templates).

    Returns:
        `bool`.
    """
    return isinstance(chat_template, str) and bool(_GENERATION.search(chat_template))


def training_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that a tokenizer's conversations are trained with.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of a processor or of a language model.

    Returns:
        `str`: its own if that has `{% generation %}` marks, else the one of new models, which
        [`OpenQwen2VLProcessor.from_vision_text_pretrained`] would give it.
    """
    if has_generation_marks(tokenizer.chat_template):
        return tokenizer.chat_template
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf8")


def _part_token(match: re.Match) -> str:
    return match[0][0] + _MARK + match[0][1:]
