r"""From texts with media between them to token ids and labels; captions are a case, [image, caption].

    texts    a text, or None where an image or video stands
      │ text_parts: what is tokenised of each entry ── encode_as_text, many documents at once
      ▼
    <start> block "\n" text <text_end> block "\n" text <text_end> ... <end>     ids and labels (S,): join_document
                                                                                lengths alone: split_document

A block is the ids that stand for an image or video; the family has them (families/). Labels are all ids but those of
blocks, told by their place, and the first. Text from data never becomes a control token: it stays text.
"""

import hashlib
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

BOS_TOKEN = "<s>"
EOS_TOKEN = "<|im_end|>"
END_OF_CHUNK_TOKEN = "<|endofchunk|>"
IMAGE_TOKEN = "<|image_pad|>"
IGNORE_INDEX = -100
SYSTEM_PROMPT = "You are a helpful assistant."
MAX_INTERLEAVED_IMAGES = 9
_BLANKS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs without ink


@dataclass(frozen=True)
class TextFormat:
    """What stands around texts and media in a document that is no conversation."""

    document_start: tuple[int, ...]  # ids before the first entry
    document_end: tuple[int, ...]  # ids behind the last entry
    after_media: str = ""  # text behind each image or video, tokenised with the text that follows it
    text_end: tuple[int, ...] = ()  # ids behind each text of a document with two or more media
    renames: tuple[tuple[str, str], ...] = ()  # literal strings of data's texts and what they become


def has_words(text: str) -> bool:
    """Whether anything in a text is to be seen: white space, controls, marks and zero-width characters are not."""
    # A letter comes first in nearly every text, which ends the search.
    return any(unicodedata.category(character)[0] not in "CZM" and character not in _BLANKS for character in text)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a language model's tokenizer the tokens that this model uses beyond its own; a second call changes nothing.

    `<s>` becomes the beginning of a document; in Qwen2.5's vocabulary it exists (id 128245). `<|endofchunk|>` is
    added (id 151665). Neither makes Qwen2.5's embedding grow: it has 151,936 rows. Others' vocabularies may lack what
    marks images and turns, too, and a token for padding.

    Raises:
        ValueError: for a tokenizer that encodes a text behind a token in another way than alone.
    """
    vocabulary = tokenizer.get_vocab()
    marks = (IMAGE_TOKEN, "<|im_start|>", EOS_TOKEN, END_OF_CHUNK_TOKEN)
    if missing := [token for token in marks if token not in vocabulary]:
        # In this order, and `<s>` last, as the model gets its rows (modeling/backbones.py).
        tokenizer.add_tokens(missing, special_tokens=True)
    if tokenizer.bos_token != BOS_TOKEN:
        tokenizer.add_special_tokens({"bos_token": BOS_TOKEN})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or EOS_TOKEN
    if tokenizer.encode("") != []:
        # Llama 3's and Gemma's begin every text with a token of their own; here the format says what stands there.
        tokenizer.add_bos_token = tokenizer.add_eos_token = False
    if tokenizer.encode(f"{BOS_TOKEN}a") != [tokenizer.bos_token_id, *tokenizer.encode("a")] or tokenizer.encode(""):
        raise ValueError(
            f"{tokenizer.name_or_path}: the tokenizer encodes a text behind a token in another way than alone, as "
            "Llama 2's with a space before it, so that training and generation would see other ids"
        )
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, in hex, over all that decides the ids of a text; the last call's padding and truncation do not."""
    special_ids = [tokenizer.convert_tokens_to_ids(t) for t in (BOS_TOKEN, EOS_TOKEN, IMAGE_TOKEN)]
    # The backend writes the same tokenizer in the same bytes; to parse a vocabulary and sort it takes a second.
    return hashlib.sha256(f"{_plain_backend(tokenizer).to_str()}{special_ids}".encode()).hexdigest()


def encode_as_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts from data, in which special tokens' strings are text like any other."""
    return [encoding.ids for encoding in _encodings(tokenizer, texts)]


def count_as_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    """How many ids [`encode_as_text`] gives each text."""
    return list(map(len, _encodings(tokenizer, texts)))


def _encodings(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Any]:
    if not texts:
        return []
    backend = _plain_backend(tokenizer)
    backend.encode_special_tokens = True
    # Without the offsets that `tokenizer(...)` collects this is twice as fast, and planning is mostly this.
    return backend.encode_batch_fast(texts, add_special_tokens=False)


def _plain_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The backend without what the last call left in it."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return backend


def text_parts(texts: list[str | None], text_format: TextFormat) -> list[str]:
    """What is tokenised of each entry: a text with what separates it from the media before it; "" for nothing."""
    parts, after = [], ""
    for i, text in enumerate(texts):
        if text is None:
            # What follows an image melts into the text behind it, or stands alone where none follows.
            followed = i + 1 < len(texts) and texts[i + 1] is not None
            parts.append("" if followed else text_format.after_media)
            after = text_format.after_media
        else:
            for literal, name in text_format.renames:
                text = text.replace(literal, name)
            parts.append(after + text)
            after = ""
    return parts


def join_document(
    texts: list[str | None], part_ids: list[list[int]], blocks: list[list[int]], text_format: TextFormat
) -> tuple[np.ndarray, np.ndarray]:
    """Lay out a document: int64 ids and labels `(S,)`; `part_ids` are those of [`text_parts`], `blocks` in order.

    Labels are -100 at the first token, so that nothing before the document predicts into it, and at blocks.
    """
    text_end = list(text_format.text_end) if len(blocks) > 1 else []
    ids, media, following = list(text_format.document_start), [], iter(blocks)
    for text, own in zip(texts, part_ids, strict=True):
        if text is None:
            block = next(following)
            media.append(slice(len(ids), len(ids) + len(block)))
            ids += block
        ids += own if text is None else own + text_end
    input_ids = np.array([*ids, *text_format.document_end], dtype=np.int64)
    labels = input_ids.copy()
    labels[:1] = IGNORE_INDEX
    for place in media:
        labels[place] = IGNORE_INDEX
    return input_ids, labels


def text_document(
    texts: list[str | None], blocks: list[list[int]], tokenizer: PreTrainedTokenizerBase, text_format: TextFormat
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise and lay out one document, as [`join_document`] does."""
    return join_document(texts, encode_as_text(tokenizer, text_parts(texts, text_format)), blocks, text_format)


def split_document(
    texts: list[str | None],
    part_lengths: list[int],
    block_lengths: list[int],
    text_format: TextFormat,
    max_length: int,
    max_media: int = MAX_INTERLEAVED_IMAGES,
) -> list[tuple[int, int, int]]:
    """Split a document before media into pieces that each become a document: first entry, one behind the last, length.

    Each piece takes as much as fits. What stands from an image to the next is never split; if that is too long by
    itself its piece is too. Together the pieces are the document, in order. Only the first can be without an image:
    the text that stands before all of them, where it does not fit to the first.
    """
    ends, text_end = len(text_format.document_start) + len(text_format.document_end), len(text_format.text_end)

    def length(media: int, chunks: int, positions: int) -> int:
        return ends + positions + (chunks * text_end if media > 1 else 0)

    if None not in texts[1:]:  # a caption or a text has nowhere to be split: the same as below, in one step
        chunks = len(texts) - texts.count(None)
        return [(0, len(texts), length(len(block_lengths), chunks, sum(part_lengths) + sum(block_lengths)))]
    pieces: list[tuple[int, int, int]] = []
    starts = [i for i, text in enumerate(texts) if text is None or i == 0]
    blocks = iter(block_lengths)
    first = media = chunks = positions = 0  # of the piece that is being filled
    for start, stop in zip(starts, [*starts[1:], len(texts)], strict=True):
        has_media = texts[start] is None
        new_chunks = stop - start - has_media
        new_positions = sum(part_lengths[start:stop]) + (next(blocks) if has_media else 0)
        joined = length(media + has_media, chunks + new_chunks, positions + new_positions)
        if start > first and (media + has_media > max_media or joined > max_length):
            pieces.append((first, start, length(media, chunks, positions)))
            first, media, chunks, positions = start, 0, 0, 0
        media, chunks, positions = media + has_media, chunks + new_chunks, positions + new_positions
    return [*pieces, (first, len(texts), length(media, chunks, positions))]


def original_conversation_document(
    turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, image_seq_length: int, drop_newline: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    r"""Lay out a LLaVA conversation as the original's fine-tuning does: no `"\n<|im_start|>"` before `assistant`.

    Args:
        turns (`list[dict[str, str]]`): `{"from": "human" or "gpt", "value": text}`, `<image>` where an image stands.
        tokenizer (`PreTrainedTokenizerBase`): a tokenizer from [`prepare_tokenizer`].
        image_seq_length (`int`): tokens of each image.
        drop_newline (`bool`, *optional*, defaults to `False`): drop the newline after an image, which released
            weights never saw. Their tokeniser dropped any token there; only the newline is dropped here.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: int64 `input_ids` and `labels`; only answers with their `<|im_end|>\n` have
        labels.

    Raises:
        ValueError: for a turn of another speaker.
    """
    bos, eos = tokenizer.convert_tokens_to_ids([BOS_TOKEN, EOS_TOKEN])
    start, newline = tokenizer.convert_tokens_to_ids("<|im_start|>"), _text_ids(tokenizer, "\n")
    ids = [bos, start, *_text_ids(tokenizer, f"system\n{SYSTEM_PROMPT}"), eos, *newline]
    labels = [IGNORE_INDEX] * len(ids)
    for turn in turns:
        if turn["from"] == "gpt":
            new = [*_text_ids(tokenizer, turn["value"]), eos, *newline]
            labels += new
        elif turn["from"] == "human":
            value = turn["value"].replace("<image>\n", "<image>") if drop_newline else turn["value"]
            new = [start, *_user_turn_ids(tokenizer, value, image_seq_length)]
            labels += [IGNORE_INDEX] * len(new)
        else:
            raise ValueError(f"turn from {turn['from']!r}: a conversation is between 'human' and 'gpt'")
        ids += new
    return np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64)


def _user_turn_ids(tokenizer: PreTrainedTokenizerBase, value: str, image_seq_length: int) -> list[int]:
    eos, image = tokenizer.convert_tokens_to_ids([EOS_TOKEN, IMAGE_TOKEN])
    first, *others = (_text_ids(tokenizer, text) for text in f"user\n{value}".split("<image>"))
    after_images = [token for ids in others for token in [image] * image_seq_length + ids]
    return [*first, *after_images, eos, *_text_ids(tokenizer, "assistant\n")]


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
