"""Pairs per second of MLM-Filter scoring: both ways to read a score, with and without the metrics sharing a prefix.

    OMP_NUM_THREADS=1 python benchmarks/mlm_filter.py

A small model with random weights and a tokenizer that splits digits, on a CPU: compare the rows, not the machine.
"""

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from report import describe_machine, write_result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, OpenQwen2VLProcessor
from open_qwen2vl.data.scoring.chat_prompts import read_prompts
from open_qwen2vl.data.scoring.mlm_filter import MlmFilterScorer
from open_qwen2vl.data.scoring.pairs import Pair

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<s>"]
VISION = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3}
TEXT = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
BATCH = 8


def make_model(folder: Path) -> str:
    """A model of 12 and 8 layers with 144 tokens an image."""
    vision, text = str(folder / "vision"), str(folder / "text")
    SiglipVisionModel(SiglipVisionConfig(image_size=192, patch_size=16, **VISION)).save_pretrained(vision)
    SiglipImageProcessorPil(size={"height": 192, "width": 192}).save_pretrained(vision)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL_TOKENS, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=2000, **options)
    backend.train_from_iterator(list(read_prompts(None, ["all"]).values()) * 3, trainer)
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(text)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=8192, num_key_value_heads=1, **TEXT)).save_pretrained(text)
    for part in (OpenQwen2VLForConditionalGeneration, OpenQwen2VLProcessor):
        part.from_vision_text_pretrained(vision, text, image_seq_length=144).save_pretrained(folder / "model")
    return str(folder / "model")


def make_pairs(number: int) -> list[Pair]:
    """Pictures of noise with captions of one or two sentences."""
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (number, 192, 192, 3), dtype=np.uint8)
    caption = "a photo of a cat on a mat "
    return [Pair(str(i), "", Image.fromarray(pixels), caption * (1 + i % 2)) for i, pixels in enumerate(pictures)]


def pairs_per_second(scorer: MlmFilterScorer, pairs: list[Pair], repeats: int) -> float:
    """Of CPU time, the best of some repeats; images and texts are prepared before."""
    batches = [scorer.collate(pairs[start : start + BATCH]) for start in range(0, len(pairs), BATCH)]
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        for batch in batches:
            scorer.score(batch)
        seconds.append(time.process_time() - start)
    return len(pairs) / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    pairs, rows = make_pairs(args.pairs), []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        for decode in ("expectation", "greedy"):
            several = MlmFilterScorer(model, ["all"], decode=decode, batch_size=BATCH, device="cpu")
            shared = pairs_per_second(several, pairs, args.repeats)
            several.shares_prefix = False
            whole = pairs_per_second(several, pairs, args.repeats)
            one = MlmFilterScorer(model, ["semantic_understanding"], decode=decode, batch_size=BATCH, device="cpu")
            rows.append([decode, *(f"{n:.2f}" for n in (shared, whole, pairs_per_second(one, pairs, args.repeats)))])
    table = ["| `--decode` | 4 metrics, shared prefix | 4 metrics, whole prompts | 1 metric |", "|---|---:|---:|---:|"]
    table += [f"| {' | '.join(row)} |" for row in rows]
    table += [
        "",
        f"Pairs per second of CPU time, {args.pairs} pairs in batches of {BATCH}, the best of {args.repeats}.",
    ]
    write_result("mlm_filter", table, describe_machine(shlex.join(["python", *sys.argv])))


if __name__ == "__main__":
    main()
