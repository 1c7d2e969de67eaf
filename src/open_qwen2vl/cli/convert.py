"""`open-qwen2vl convert`: from and to the checkpoints of the original code."""

import argparse


def add_command(commands: "argparse._SubParsersAction") -> None:
    """Add `convert` to the subcommands."""
    summary = "make a folder for the Auto classes from a checkpoint of the original code"
    parser = commands.add_parser("convert", help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument(
        "source", metavar="ORIGINAL_DIR", help="holds config.json and checkpoints/latest-checkpoint.pt"
    )
    parser.add_argument("output", metavar="OUT_DIR", help="folder to make")
    parser.add_argument(
        "--text-model",
        metavar="ID_OR_DIR",
        help="hub id or folder of the language model's config and tokenizer, as Qwen/Qwen2.5-1.5B-Instruct",
    )
    parser.add_argument(
        "--vision-weights",
        metavar="FILE_OR_TIMM_ID",
        help="SigLIP with timm's names (default: the checkpoint's own, or else hf-hub:timm/ViT-SO400M-14-SigLIP-384)",
    )
    parser.add_argument(
        "--vision-heads", type=int, metavar="N", help="attention heads of a vision tower of unusual width"
    )
    parser.add_argument(
        "--to-original",
        action="store_true",
        help="the other way: ORIGINAL_DIR is a model's folder, OUT_DIR gets the original's layout",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from ..conversion.convert import convert_checkpoint, convert_to_original

    if args.to_original:
        if args.text_model or args.vision_heads:
            raise ValueError("--to-original takes no --text-model and no --vision-heads: the model's folder has both")
        print(convert_to_original(args.source, args.output, args.vision_weights))
        return
    if not args.text_model:
        raise ValueError("--text-model is required (a hub id or folder, as Qwen/Qwen2.5-1.5B-Instruct)")
    print(convert_checkpoint(args.source, args.output, args.text_model, args.vision_weights, args.vision_heads))
