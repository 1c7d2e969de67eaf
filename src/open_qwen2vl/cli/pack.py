"""`open-qwen2vl pack`: a plan of packs from captions, texts, interleaved documents or conversations."""

from dataclasses import fields
from typing import Any

from ..data.packing.options import PackOptions as OPTIONS

SUMMARY = "plan which captions, documents or conversations share a pack (reads texts and headers, no images)"
BUCKETS = True


def run(options: OPTIONS) -> None:
    """Plan, and print the report."""
    from ..data import find_sources, plan_packs

    shards = find_sources(options.shards)
    if (options.processor is None) == (options.tokenizer is None):
        raise ValueError("name the model by --processor, or Open-Qwen2VL by --tokenizer")
    processor = load_processor(options.processor, options.tokenizer)
    named = ("shards", "output", "processor", "tokenizer")
    others = {each.name: getattr(options, each.name) for each in fields(OPTIONS) if each.name not in named}
    report = plan_packs(shards, options.output, processor, **others)
    print("parts of this rank are made; the rank that is last writes plan.json" if report is None else report)


def load_processor(processor: str | None, tokenizer: str | None) -> Any:
    """A family's processor, or Open-Qwen2VL's tokenizer."""
    from transformers import AutoProcessor, AutoTokenizer

    from ..model_folders import model_folder
    from ..processing.text_formats import prepare_tokenizer

    option, name = ("--processor", processor) if processor else ("--tokenizer", tokenizer)
    try:
        if processor:
            return AutoProcessor.from_pretrained(model_folder(processor), trust_remote_code=False)
        return prepare_tokenizer(AutoTokenizer.from_pretrained(model_folder(tokenizer), trust_remote_code=False))
    except (ValueError, OSError) as error:
        raise ValueError(f"{option} {name}: {error}") from error
