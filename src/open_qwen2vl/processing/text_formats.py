r"""From captions, interleaved documents and conversations to token ids and labels.

    caption       <s> image*N "\n" caption <|im_end|>
    interleaved   <s> text <|endofchunk|> image*N "\n" text <|endofchunk|> ... <|im_end|>
    conversation  <s> system, then <|im_start|>user "\n" image*N text <|im_end|>assistant "\n" answer <|im_end|> "\n"

Labels: the answers of conversations; elsewhere all but images and the first token. For captions one function
tokenises, one lays the document out, one counts: the planner needs only the count, the dataset all three.
Text from data never becomes a control token: a special token's string inside a caption stays text.
"""

import hashlib
import json

import numpy as np
from transformers import PreTrainedTokenizerBase

BOS_TOKEN = "<s>"
EOS_TOKEN = "<|im_end|>"
END_OF_CHUNK_TOKEN = "<|endofchunk|>"
IMAGE_TOKEN = "<|image_pad|>"
IGNORE_INDEX = -100
SYSTEM_PROMPT = "You are a helpful assistant."
MAX_INTERLEAVED_IMAGES = 9


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a Qwen2.5 tokenizer the two tokens that this model uses beyond Qwen's own; a second call changes nothing.

    `<s>` becomes the beginning of a document; in Qwen2.5's vocabulary it exists (id 128245). `<|endofchunk|>` is
    added (id 151665). Neither makes the embedding matrix grow: it has 151,936 rows.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): changed in place.

    Returns:
        `PreTrainedTokenizerBase`: the same tokenizer.

    Raises:
        ValueError: if it has no `<|im_end|>` or no `<|image_pad|>`.
    """
    vocabulary = tokenizer.get_vocab()
    for token in (EOS_TOKEN, IMAGE_TOKEN):
        if token not in vocabulary:
            raise ValueError(f"{tokenizer.name_or_path}: the tokenizer has no {token} token; a Qwen2.5 tokenizer has")
    if tokenizer.bos_token != BOS_TOKEN or END_OF_CHUNK_TOKEN not in vocabulary:
        # In the original's order, which decides the ids where a vocabulary has neither.
        tokenizer.add_tokens([END_OF_CHUNK_TOKEN], special_tokens=True)
        tokenizer.add_special_tokens({"bos_token": BOS_TOKEN})
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over all that decides the ids of a text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer.

    Returns:
        `str`: 64 hex digits, independent of the padding and truncation of the last call.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("padding", None)
    state.pop("truncation", None)
    state["special_ids"] = [tokenizer.convert_tokens_to_ids(t) for t in (BOS_TOKEN, EOS_TOKEN, IMAGE_TOKEN)]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def tokenize_captions(tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> list[list[int]]:
    r"""Token ids of the text part of caption documents, `"\n" + caption`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        captions (`list[str]`): captions as they are in the data.

    Returns:
        `list[list[int]]`: one list of ids for each caption; special tokens' strings are tokenised as text, and a
        literal `<image>` as `<image-placeholder>` (the original's rule).
    """
    return encode_as_text(
        tokenizer, ["\n" + caption.replace("<image>", "<image-placeholder>") for caption in captions]
    )


def encode_as_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts from data, in which special tokens' strings are text like any other.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer.
        texts (`list[str]`): the texts, perhaps none.

    Returns:
        `list[list[int]]`: one list of ids for each.
    """
    if not texts:
        return []
    # Without the offsets that `tokenizer(...)` collects this is twice as fast, and planning is mostly this.
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def caption_document_length(num_text_ids: int, image_seq_length: int) -> int:
    """Positions that a caption document takes.

    Args:
        num_text_ids (`int`): length of its [`tokenize_captions`] ids.
        image_seq_length (`int`): tokens of its image.

    Returns:
        `int`: text, image, `<s>` and `<|im_end|>` together.
    """
    return 1 + image_seq_length + num_text_ids + 1


def caption_document(
    text_ids: list[int], tokenizer: PreTrainedTokenizerBase, image_seq_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lay out a caption document.

    Args:
        text_ids (`list[int]`): ids from [`tokenize_captions`].
        tokenizer (`PreTrainedTokenizerBase`): a tokenizer from [`prepare_tokenizer`].
        image_seq_length (`int`): tokens of its image.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: int64 `input_ids` and `labels`; labels are -100 at the first token and at the
        image, so that nothing before the document predicts into it.
    """
    bos, eos, image = (tokenizer.convert_tokens_to_ids(t) for t in (BOS_TOKEN, EOS_TOKEN, IMAGE_TOKEN))
    input_ids = np.array([bos] + [image] * image_seq_length + text_ids + [eos], dtype=np.int64)
    labels = input_ids.copy()
    labels[: 1 + image_seq_length] = IGNORE_INDEX
    return input_ids, labels


def tokenize_interleaved(tokenizer: PreTrainedTokenizerBase, texts: list[str | None]) -> list[list[int]]:
    r"""Token ids of the text parts of an interleaved document.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        texts (`list[str | None]`): the texts in reading order, None where an image stands.

    Returns:
        `list[list[int]]`: one list of ids for each entry. The newline that follows an image is at the start of the
        text behind it, or stands alone in the image's list where no text follows. A literal `<image>` becomes
        `<image-placeholder>`, as in [`tokenize_captions`].
    """
    parts = []
    for i, text in enumerate(texts):
        if text is None:
            parts.append("\n" if i + 1 == len(texts) or texts[i + 1] is None else "")
        else:
            newline = "\n" if i and texts[i - 1] is None else ""
            parts.append(newline + text.replace("<image>", "<image-placeholder>"))
    return encode_as_text(tokenizer, parts)


def interleaved_document(
    texts: list[str | None], tokenizer: PreTrainedTokenizerBase, image_seq_length: int
) -> tuple[np.ndarray, np.ndarray]:
    r"""Lay out a document of texts and images (OBELICS, MMC4), as the newer of the original's two versions does.

    Each image is followed by a newline; each text ends in `<|endofchunk|>` where there are two or more images.

    Args:
        texts (`list[str | None]`): the texts in reading order, None where an image stands.
        tokenizer (`PreTrainedTokenizerBase`): a tokenizer from [`prepare_tokenizer`].
        image_seq_length (`int`): tokens of each image.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: int64 `input_ids` and `labels`; labels are -100 at the first token and at
        images.
    """
    bos, eos, image, end_of_chunk = _special_ids(tokenizer)
    end_of_text = [end_of_chunk] if texts.count(None) > 1 else []
    ids = [bos]
    for text, text_ids in zip(texts, tokenize_interleaved(tokenizer, texts), strict=True):
        ids += [image] * image_seq_length + text_ids if text is None else text_ids + end_of_text
    input_ids = np.array([*ids, eos], dtype=np.int64)
    labels = np.where(input_ids == image, IGNORE_INDEX, input_ids)
    labels[0] = IGNORE_INDEX
    return input_ids, labels


def split_interleaved(
    texts: list[str | None],
    text_ids: list[list[int]],
    image_seq_length: int,
    max_length: int,
    max_images: int = MAX_INTERLEAVED_IMAGES,
) -> list[tuple[int, int, int]]:
    """Split a document before images into pieces that each become an [`interleaved_document`].

    Each piece takes as much as fits. What stands from an image to the next is never split; if that is too long by
    itself its piece is too.

    Args:
        texts (`list[str | None]`): the texts in reading order, None where an image stands.
        text_ids (`list[list[int]]`): their ids from [`tokenize_interleaved`].
        image_seq_length (`int`): tokens of each image.
        max_length (`int`): most positions of a piece.
        max_images (`int`, *optional*, defaults to 9): most images of a piece, at least 1.

    Returns:
        `list[tuple[int, int, int]]`: of each piece its first entry, the entry behind its last, and its positions.
        Together the pieces are the document, in order. Only the first can be without an image: the text that stands
        before all images, where it does not fit to the first.
    """
    pieces: list[tuple[int, int, int]] = []
    starts = [i for i, text in enumerate(texts) if text is None or i == 0]
    first = images = chunks = positions = 0  # of the piece that is being filled
    for start, stop in zip(starts, [*starts[1:], len(texts)], strict=True):
        has_image = texts[start] is None
        new_chunks = stop - start - has_image
        new_positions = has_image * image_seq_length + sum(map(len, text_ids[start:stop]))
        joined = _positions(images + has_image, chunks + new_chunks, positions + new_positions)
        if start > first and (images + has_image > max_images or joined > max_length):
            pieces.append((first, start, _positions(images, chunks, positions)))
            first, images, chunks, positions = start, 0, 0, 0
        images, chunks, positions = images + has_image, chunks + new_chunks, positions + new_positions
    return [*pieces, (first, len(texts), _positions(images, chunks, positions))]


def _positions(images: int, chunks: int, positions: int) -> int:
    """Of a whole interleaved document: `<s>` and `<|im_end|>` are added, and the ends of the texts."""
    return 2 + positions + (chunks if images > 1 else 0)


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
    bos, eos, _, _ = _special_ids(tokenizer)
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
    _, eos, image, _ = _special_ids(tokenizer)
    first, *others = (_text_ids(tokenizer, text) for text in f"user\n{value}".split("<image>"))
    after_images = [token for ids in others for token in [image] * image_seq_length + ids]
    return [*first, *after_images, eos, *_text_ids(tokenizer, "assistant\n")]


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer.convert_tokens_to_ids([BOS_TOKEN, EOS_TOKEN, IMAGE_TOKEN, END_OF_CHUNK_TOKEN])


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
