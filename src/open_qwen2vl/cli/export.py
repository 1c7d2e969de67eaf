"""`open-qwen2vl export`: a trained model for programs that do not read transformers' folders."""

from ..conversion.options import ExportOptions as OPTIONS

SUMMARY = "write a model as GGUF files for llama.cpp"


def run(options: OPTIONS) -> None:
    """Export, and print what was written and what to mind."""
    from ..conversion.gguf_export import export_gguf

    print(export_gguf(options.model, options.output, options.type, options.image_seq_length))
