"""`open-qwen2vl pack`: a plan of packs from captions, interleaved documents or conversations."""

from ..data.packing.options import PackOptions as OPTIONS
from ..output_lock import only_writer

SUMMARY = "plan which captions, documents or conversations share a pack (reads texts and headers, no images)"


def run(options: OPTIONS) -> None:
    """Plan, and print the report."""
    from transformers import AutoTokenizer

    from ..data import find_sources, plan_packs
    from ..model_folders import model_folder
    from ..processing.text_formats import prepare_tokenizer

    shards = find_sources(options.shards)
    try:
        tokenizer = prepare_tokenizer(
            AutoTokenizer.from_pretrained(model_folder(options.tokenizer), trust_remote_code=False)
        )
    except (ValueError, OSError) as error:
        raise ValueError(f"--tokenizer {options.tokenizer}: {error}") from error
    with only_writer(options.output):
        report = plan_packs(
            shards,
            options.output,
            tokenizer,
            image_seq_length=options.image_seq_length,
            max_length=options.max_length,
            max_images=options.max_images,
            shards_per_group=options.shards_per_group,
            images=options.images,
            records_per_group=options.records_per_group,
            caption_column=options.caption_column,
            rules=options.rules,
            num_workers=options.num_workers,
        )
    print(report)
