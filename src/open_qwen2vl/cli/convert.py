"""`open-qwen2vl convert`: from and to the checkpoints of the original code."""

from ..conversion.options import ConvertOptions as OPTIONS

SUMMARY = "make a folder for the Auto classes from a checkpoint of the original code"


def run(options: OPTIONS) -> None:
    """Convert, and print the report."""
    from ..conversion.convert import convert_checkpoint, convert_to_original

    if options.to_original:
        print(convert_to_original(options.source, options.output, options.vision_weights))
        return
    backbone = (options.text_model, options.vision_weights, options.vision_heads)
    print(convert_checkpoint(options.source, options.output, *backbone))
