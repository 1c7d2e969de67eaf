r"""From conversations to token ids and labels, through the chat template.

    messages   the normal form of conversation_records.py, boxes as their family writes them
      │ data's text: special tokens' strings are parted, so that they stay text
      │ chat template: text, and where in it the answers are ({% generation %})
      │ cut at control tokens and at answers, each piece tokenised alone; an image's piece becomes its block of ids
      ▼
    input_ids, labels (S,): labels are the answers with their end of turn, nothing else

The ids are those of `processor.apply_chat_template`. They differ where that would turn data into control tokens, or
where an answer starts with a newline, which there melts into the prompt's last token and here does not.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .conversation_records import join_texts
from .rendering import limit_rendering
from .sample_error import SampleError
from .text_formats import IGNORE_INDEX, count_as_text, encode_as_text
from .tool_forms import ToolForm, plain_messages, uses_tools

SHORT_PIECE = 64  # characters: what the template writes itself comes again and again, a longer text is the data's
KEPT_PIECES = 256
_TOOLS = re.compile(r"\btools\b")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Private use: parts a special token's string; what follows is learned no more, is learned again.
_MARK, _OFF, _ON = "\U000f0002", "\U000f0003", "\U000f0004"
_NO_MARKS = dict.fromkeys(map(ord, (_MARK, _OFF, _ON)))

Pieces = list[tuple[str, bool]]  # control tokens, media and the texts between them, each with whether it is answered


class ConversationFormat:
    """How conversations become ids: a tokenizer, a chat template whose answers have `{% generation %}` marks, and what
    that writes for an image or video by its kind, as `{"image": "<|image_pad|>"}`; `tool_form` says how calls look.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str,
        media_strings: Mapping[str, str],
        tool_form: ToolForm = "tool_call",
    ):
        if not has_generation_marks(chat_template):
            raise ValueError("the chat template has no {% generation %} marks, which say what is trained on")
        limit_rendering(chat_template)
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.tool_form = tool_form
        tokens = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        tokens.sort(key=len, reverse=True)
        self._media = frozenset(media_strings.values())
        # A media string of several tokens is one piece: it stands before its own first token in the alternatives.
        strings = sorted({*self._media, *tokens, _OFF, _ON}, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, tokens)) + ")")
        self._cuts = re.compile("(" + "|".join(map(re.escape, strings)) + ")")
        self._special_ids = dict(zip(tokens, tokenizer.convert_tokens_to_ids(tokens), strict=True))
        self._short_pieces: dict[str, list[int]] = {}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the template, 64 hex digits."""
        return hashlib.sha256(self.chat_template.encode()).hexdigest()

    def plain(self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages whose calls and results are text, and which say what may be called, by [`plain_messages`].

        Raises:
            SampleError: as that, and `unsupported_tools` for a chat template that writes calls in another way.
        """
        if not uses_tools(messages, tools):
            return messages
        if self.writes_tools and not self._writes_tools_so:
            raise SampleError("unsupported_tools", "the chat template writes calls of tools in a way of its own")
        return plain_messages(messages, tools, self.tool_form, self._default_system)

    @cached_property
    def _default_system(self) -> str:
        """What the template says where there is no system turn."""
        user = {"role": "user", "content": [{"type": "text", "text": "u"}]}
        system = {"role": "system", "content": [{"type": "text", "text": _MARK}]}
        before, _, after = self._render([system, user])[0].partition(_MARK)
        alone = self._render([user])[0]
        says = alone.startswith(before) and alone.endswith(after) and len(alone) >= len(before) + len(after)
        return alone[len(before) : len(alone) - len(after)] if says else ""

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template writes tools and calls by itself."""
        return self.tool_form == "tool_call" and bool(_TOOLS.search(self.chat_template))

    @cached_property
    def _writes_tools_so(self) -> bool:
        """Whether it writes them as we do."""
        call, tool = {"name": "f", "arguments": "{}"}, {"type": "function", "function": {"name": "f"}}
        messages = [
            {"role": "user", "content": [{"type": "text", "text": "u"}]},
            {"role": "assistant", "content": [], "tool_calls": [call, call]},
            *[{"role": "tool", "content": [{"type": "text", "text": "r"}]}] * 2,
            {"role": "assistant", "content": [{"type": "text", "text": "a"}], "tool_calls": [call]},
        ]
        try:
            ours = plain_messages(messages, [tool], "tool_call", self._default_system)
            return self._render(messages, tools=[tool])[0] == self._render(ours)[0]
        except SampleError:
            return False

    def document(self, messages: list[dict[str, Any]], blocks: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Int64 ids and labels `(S,)` of a conversation; blocks are the ids of its media in reading order."""
        pieces = self.pieces(messages)
        encoded = self.encode([pieces])
        ids: list[int] = []
        labels: list[int] = []
        following = iter(blocks)
        for text, is_answer in pieces:
            is_media = text in self._media
            new = next(following) if is_media else encoded[text]
            ids += new
            labels += new if is_answer and not is_media else [IGNORE_INDEX] * len(new)
        labels[:1] = [IGNORE_INDEX]
        return np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64)

    def lengths(
        self, conversations: Sequence[Pieces], block_lengths: Sequence[Sequence[int]]
    ) -> Iterable[tuple[int, int]]:
        """Positions and labelled positions of many conversations, each given as its [`pieces`]."""
        texts = {text for pieces in conversations for text, _ in pieces} - self._media - self._special_ids.keys()
        unknown = [text for text in texts if text not in self._short_pieces]
        counts = count_as_text(self.tokenizer, [text.replace(_MARK, "") for text in unknown])
        # Media are counted by their blocks, control tokens are one position each.
        sizes = dict.fromkeys(self._special_ids, 1) | dict.fromkeys(self._media, 0)
        sizes |= {text: len(ids) for text, ids in self._short_pieces.items()} | dict(zip(unknown, counts, strict=True))
        for pieces, blocks in zip(conversations, block_lengths, strict=True):
            labels = sum([sizes[text] for text, is_answer in pieces if is_answer])
            if pieces and pieces[0][1] and sizes[pieces[0][0]]:
                labels -= 1  # the first position of a document has none
            yield sum([sizes[text] for text, _ in pieces]) + sum(blocks), labels

    def pieces(self, messages: list[dict[str, Any]]) -> Pieces:
        """What a conversation becomes before it is tokenised; `template_error` if the template loses an image."""
        marked = [{**message, "content": _switched(self._mark(message["content"]))} for message in messages]
        media = sum(part["type"] != "text" for message in marked for part in message["content"])
        pieces = list(self._cut(*self._render(marked)))
        lost = media - sum(text in self._media for text, _ in pieces)
        if lost:
            raise SampleError("template_error", f"the chat template loses or doubles {abs(lost)} images")
        return pieces

    def prefix(self, pieces: Pieces, block_length: int) -> tuple[tuple[str, ...], int, bool] | None:
        """What stands before the first image or video, positions up to its end with its block, and whether an answer
        is in it or follows at once; None without any.
        """
        first = next((i for i, (text, _) in enumerate(pieces) if text in self._media), None)
        if first is None:
            return None
        texts = tuple(text for text, _ in pieces[:first])
        ids = self.encode([pieces[:first]])
        is_learned = any(is_answer for _, is_answer in pieces[: first + 2])
        return texts, sum(len(ids[text]) for text in texts) + block_length, is_learned

    def encode(self, conversations: Sequence[Pieces]) -> dict[str, list[int]]:
        """Ids of all pieces of some conversations but media, tokenised at once."""
        texts = {text for pieces in conversations for text, _ in pieces} - self._media
        encoded = {text: [self._special_ids[text]] for text in texts if text in self._special_ids}
        encoded |= {text: self._short_pieces[text] for text in texts if text in self._short_pieces}
        missing = sorted(texts - encoded.keys())
        ids = encode_as_text(self.tokenizer, [text.replace(_MARK, "") for text in missing])
        for text, own in zip(missing, ids, strict=True):
            encoded[text] = own
            if len(text) < SHORT_PIECE and len(self._short_pieces) < KEPT_PIECES:
                self._short_pieces[text] = own
        return encoded

    def _mark(self, content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The content with each special token's string in its text parted by a mark."""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else join_texts(content)
        return [self._mark_part(part) for part in parts]

    def _mark_part(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "control":  # tokens that the family wrote, as around a box
            return {**part, "type": "text"}
        if part["type"] == "text":
            return {**part, "text": self._special.sub(_part_token, part["text"].translate(_NO_MARKS))}
        return part

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        try:
            (text,), (answers,) = render_jinja_template(
                [messages],
                chat_template=self.chat_template,
                return_assistant_tokens_mask=True,
                **options,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise SampleError("template_error", f"the chat template refuses it: {error}") from error
        return text, _learned(answers, messages)

    def _cut(self, text: str, answers: list[tuple[int, int]]) -> Iterable[tuple[str, bool]]:
        """Control tokens, media and the texts between them, each with whether it is of an answer."""
        start = 0
        bounds = [bound for first, stop in answers for bound in ((first, False), (stop, True))]
        for stop, is_answer in [*bounds, (len(text), False)]:
            is_learned = is_answer
            for piece in self._cuts.split(text[start:stop]):
                if piece in (_OFF, _ON):
                    is_learned = is_answer and piece == _ON
                elif piece:
                    yield piece, is_learned
            start = stop


def _switched(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts with marks around texts that are not learned; after the last of a turn its end is not learned either."""
    last = len(parts) - 1
    return [
        part
        if part.get("train", True)
        else {"type": "text", "text": _OFF + part["text"] + (_ON if number < last else "")}
        for number, part in enumerate(parts)
    ]


def _learned(answers: list[tuple[int, int]], messages: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """The answers without those that their messages set aside."""
    trained = [message.get("train", True) for message in messages if message["role"] == "assistant"]
    if all(trained):
        return answers
    if len(trained) != len(answers):
        raise SampleError("template_error", f"{len(answers)} answers of the chat template for {len(trained)} turns")
    return [answer for answer, is_trained in zip(answers, trained, strict=True) if is_trained]


def has_generation_marks(chat_template: Any) -> bool:
    """Whether a chat template, or what stands in its place (`None`, a dict of them), says what is generated."""
    return isinstance(chat_template, str) and bool(_GENERATION.search(chat_template))


def named_chat_template(templates: str | Mapping[str, str] | None, name: str | None = None) -> str | None:
    """One of a processor's or tokenizer's templates: its only one, or that of a name, `default` where not given."""
    if not isinstance(templates, Mapping):
        if name in (None, "default"):
            return templates
        raise ValueError(f"there is no chat template named {name!r}: there is one template, without names")
    if name is not None and name not in templates:
        raise ValueError(f"there is no chat template named {name!r} among {', '.join(templates)}")
    return templates.get(name or "default")


def training_chat_template(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> str:
    """The template that conversations are trained with: the tokenizer's own if that has `{% generation %}` marks, else
    the one of new models, which [`OpenQwen2VLProcessor.from_vision_text_pretrained`] would give it.
    """
    own = named_chat_template(tokenizer.chat_template, name)
    if has_generation_marks(own) or name is not None:
        return own
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf8")


def _part_token(match: re.Match) -> str:
    return match[0][0] + _MARK + match[0][1:]
