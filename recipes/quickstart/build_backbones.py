"""Step 2: the two backbones that a real run takes from the Hub, small and randomly initialised.

    data/train-*.tar  ->  backbones/vision  a SigLIP vision tower and its image processor
                          backbones/text    a Qwen2 language model and a byte-level BPE trained on the captions and on
                                            the questions of the second half

Both are ordinary Hugging Face folders, so `recipes/pretrain.py` treats them like `google/siglip-so400m-patch14-384`
and `Qwen/Qwen2.5-1.5B-Instruct`. Nothing in them has learned anything yet: the quickstart trains all three parts.
Any other folder of caption tars will do as well: `--data shards --no-questions`.
"""

import argparse
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from open_qwen2vl.files import new_folder

# The block after the features is neither built nor run, so `num_hidden_layers` is one more than what runs.
VISION = {"image_size": 96, "patch_size": 16, "hidden_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4}
TEXT = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Near 1 / sqrt(hidden_size): with the usual 0.02 so small a model takes twice as long to start learning.
    "initializer_range": 0.08,
}
# Upper bound; the texts have fewer different words than that.
VOCABULARY = 2560
# A question is asked of many pictures, and what stands around it in a chat even more often.
QUESTION_WEIGHT = 20
CHAT_WORDS = "system\nYou are a helpful assistant.\nuser\nassistant\n"

# Qwen2.5's own pre-tokenizer and special tokens, and `<s>`, which Qwen2.5 has as an ordinary entry.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<s>",
    "<|endofchunk|>",
)


def read_captions(shards: list[Path]) -> list[str]:
    """The captions of WebDataset tars, in their order."""
    captions = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            captions += [tar.extractfile(member).read().decode() for member in tar if member.name.endswith(".txt")]
    return captions


def read_questions() -> list[str]:
    """What the second half asks and answers, as often as it weighs in the tokenizer's vocabulary."""
    import easy_vqa  # the quickstart's, and not needed for other data

    texts = {text for pair in zip(*easy_vqa.get_train_questions()[:2], strict=True) for text in pair}
    return [CHAT_WORDS, *sorted(texts)] * QUESTION_WEIGHT


def train_tokenizer(
    captions: list[str], vocabulary: int = VOCABULARY, special_tokens: Sequence[str] = SPECIAL_TOKENS
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as Qwen2.5's, with a vocabulary for these captions.

    Args:
        captions (`list[str]`): texts to learn the merges from.
        vocabulary (`int`, *optional*, defaults to 2560): entries at most, special tokens included.
        special_tokens (`Sequence[str]`, *optional*): control tokens, first in the vocabulary.

    Returns:
        `PreTrainedTokenizerFast`: any text round-trips through it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["\n" + caption for caption in captions], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if "<s>" in special_tokens else None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_vision(folder: Path, options: dict) -> int:
    """Save a random SigLIP vision tower with its image processor; returns its number of parameters."""
    options = {"intermediate_size": 4 * options["hidden_size"], "vision_use_head": False} | options
    model = SiglipVisionModel(SiglipVisionConfig(**options))
    model.save_pretrained(folder)
    side = options["image_size"]
    SiglipImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    return model.num_parameters()


def save_text(folder: Path, options: dict, tokenizer: PreTrainedTokenizerFast) -> int:
    """Save a random Qwen2 with its tokenizer; returns its number of parameters."""
    config = Qwen2Config(
        # A multiple of 64, as matrix kernels like it.
        vocab_size=-(-len(tokenizer) // 64) * 64,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"intermediate_size": 4 * options["hidden_size"]} | options),
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def build(
    data: Path,
    output: Path,
    vision: dict | None = None,
    text: dict | None = None,
    seed: int = 0,
    questions: bool = True,
) -> dict:
    """Train the tokenizer and save both backbones; a folder that is there already is left as it is.

    Args:
        data (`Path`): folder of step 1, or of any caption tars.
        output (`Path`): gets `vision/` and `text/`; it appears whole or not at all.
        vision (`dict`, *optional*): entries that replace those of `VISION`.
        text (`dict`, *optional*): entries that replace those of `TEXT`.
        seed (`int`, *optional*, defaults to 0): of the random weights.
        questions (`bool`, *optional*, defaults to `True`): train the tokenizer on the quickstart's questions too.

    Returns:
        `dict`: options, sizes and numbers of parameters, also in `backbones.json`.

    Raises:
        ValueError: if `data` holds no training shards, or `output` was made with other options.
    """
    options = {"vision": VISION | (vision or {}), "text": TEXT | (text or {}), "seed": seed}
    summary_file = output / "backbones.json"
    if summary_file.exists():
        summary = json.loads(summary_file.read_text())
        if summary["options"] != options:
            raise ValueError(f"{output} was made with {summary['options']}, not {options}: delete it or name another")
        return summary
    # The quickstart has other tars beside those for training.
    shards = sorted(data.glob("train-*.tar")) or sorted(data.glob("*.tar"))
    if not shards:
        raise ValueError(f"{data} holds no tars: run build_data.py first, or name another folder")
    with new_folder(output) as folder:
        torch.manual_seed(seed)
        tokenizer = train_tokenizer(read_captions(shards) + (read_questions() if questions else [CHAT_WORDS]))
        summary = {
            "options": options,
            "vocabulary": len(tokenizer),
            "vision_parameters": save_vision(folder / "vision", options["vision"]),
            "text_parameters": save_text(folder / "text", options["text"], tokenizer),
        }
        (folder / "backbones.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def entry(text: str) -> tuple[str, int | float]:
    """A command-line pair such as `hidden_size=192` or `initializer_range=0.05`."""
    name, _, value = text.partition("=")
    return name, float(value) if "." in value else int(value)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data"), help="folder of the tars")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart/backbones"))
    for part, size in (("vision", VISION), ("text", TEXT)):
        help_text = f"entries of the config that replace {size}"
        parser.add_argument(f"--{part}", type=entry, nargs="+", default=[], metavar="NAME=VALUE", help=help_text)
    parser.add_argument(
        "--questions",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train the tokenizer on the quickstart's questions too",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()  # of saving two small files
    try:
        summary = build(args.data, args.output, dict(args.vision), dict(args.text), args.seed, args.questions)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"random backbones in {args.output}: SigLIP {summary['vision_parameters'] / 1e6:.2f}M parameters, Qwen2 "
        f"{summary['text_parameters'] / 1e6:.2f}M, vocabulary {summary['vocabulary']}"
    )


if __name__ == "__main__":
    main()
