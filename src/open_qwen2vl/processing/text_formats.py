r"""From a caption to token ids and labels.

    caption document   <s> image*N "\n" caption <|im_end|>        labels: all but the image and the first token

One function tokenises, one lays the document out, one counts: the planner needs only the count, the dataset all three.
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
        tokenizer.add_special_tokens({"bos_token": BOS_TOKEN})
        tokenizer.add_tokens([END_OF_CHUNK_TOKEN], special_tokens=True)
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
        `list[list[int]]`: one list of ids for each caption; special tokens' strings are tokenised as text.
    """
    if not captions:
        return []
    texts = ["\n" + caption for caption in captions]
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


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
