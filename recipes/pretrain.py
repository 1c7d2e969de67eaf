"""Pre-train on packs: a new model from two backbones, or a checkpoint that trains further.

    open-qwen2vl pack shards/ --output packs/ --tokenizer Qwen/Qwen2.5-1.5B-Instruct
    accelerate launch recipes/pretrain.py recipes/pretrain_2b.yaml --train_packs packs/ --output_dir runs/2b

Options stand in the YAML file; those on the command line win; `--help` lists them all. The same command again resumes
from the newest checkpoint in `output_dir`, with the losses that an undisturbed run would have had. At the end
`output_dir` holds `model/` (for the Auto classes), `loss.png` and `train_results.json`. docs/training.md tells more.

On a CPU say how many threads to use: `accelerate launch` gives a single process one thread otherwise.

    OMP_NUM_THREADS=$(nproc) accelerate launch --config_file recipes/accelerate/single_gpu.yaml \
        recipes/pretrain.py recipes/quickstart.yaml

`accelerate launch --quiet` leaves an error of yours as the one line that this script prints, without accelerate's own
traceback after it.
"""

import logging
import os
import sys
from dataclasses import dataclass, field

# Before the imports that take ten seconds.
if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    print("INFO importing torch, transformers and open_qwen2vl", file=sys.stderr, flush=True)

from transformers import PreTrainedModel, ProcessorMixin, set_seed

from open_qwen2vl import (
    OpenQwen2VLForConditionalGeneration,
    OpenQwen2VLProcessor,
    PackedTrainer,
    PackedTrainingArguments,
)
from open_qwen2vl.data.packing.plan_files import read_plan
from open_qwen2vl.data.packing.sources import parse_sources
from open_qwen2vl.trainer import parse_arguments, run_recipe
from open_qwen2vl.trainer.loading import read_packs
from open_qwen2vl.trainer.model_loading import check_dtype, load_pretrained, loading_errors_named, tokens_per_image

logger = logging.getLogger("pretrain")


@dataclass
class ModelArguments:
    """The model to train: Open-Qwen2VL from two backbones, or a checkpoint of any family that packs."""

    vision_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a vision tower, for a new model (docs/backbones.md)."}
    )
    text_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a language model, for a new model."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a checkpoint, or of a training, to start from instead of two backbones."
        },
    )
    image_seq_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per image of Open-Qwen2VL: that of the (last) plan, which is taken where none is given."
        },
    )
    attn_implementation: str = field(
        default="packed_varlen", metadata={"help": "Attention: packed_varlen, sdpa, eager or flash_attention_2."}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Type of the weights. With `bf16: true` fp32 weights are computed with in bf16."},
    )

    def __post_init__(self):
        new = self.vision_model is not None and self.text_model is not None
        if new == (self.model_name_or_path is not None) or (self.vision_model is None) != (self.text_model is None):
            raise ValueError("give either vision_model and text_model, or model_name_or_path")


@dataclass
class DataArguments:
    """The packs to train on."""

    train_packs: str = field(
        metadata={
            "help": "Folder of `open-qwen2vl pack`; in a YAML file also a list of {path, weight or epochs, name}"
        }
    )
    eval_packs: str | None = field(
        default=None, metadata={"help": "The same for evaluation, which runs as `eval_strategy` says."}
    )


def load_model(args: ModelArguments, budget: int | None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A checkpoint, or a new model from two backbones; `budget` is the packs' number of tokens per image."""
    if args.model_name_or_path is not None:
        model, processor = load_pretrained(args.model_name_or_path, args.dtype, args.attn_implementation)
        if budget is not None:
            model.config.image_seq_length = processor.image_seq_length = budget
        return model, processor
    if budget is None:
        raise ValueError(
            "train_packs: planned for another family than the Open-Qwen2VL that vision_model and text_model make; "
            "name a model of that family by model_name_or_path"
        )
    check_dtype(args.dtype)
    backbones = (args.vision_model, args.text_model)
    logger.info("building a new model from %s and %s (%s)", *backbones, args.dtype)
    options = {"dtype": args.dtype, "attn_implementation": args.attn_implementation}
    with loading_errors_named(" and ".join(backbones), args.attn_implementation):
        model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(*backbones, budget, **options)
    return model, OpenQwen2VLProcessor.from_vision_text_pretrained(*backbones, budget)


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: PackedTrainingArguments
) -> PackedTrainer:
    """Model, processor and packs, put together."""
    if bool(data_args.eval_packs) == (args.eval_strategy == "no"):
        raise ValueError("eval_packs and eval_strategy (steps or epoch) go together")
    sources = parse_sources(data_args.train_packs)
    logger.info("reading the plan of %s", ", ".join(source.path for source in sources))
    plans = {source.path: read_plan(source.path) for source in sources}
    budget = tokens_per_image(model_args.image_seq_length, plans)
    set_seed(args.seed)
    model, processor = load_model(model_args, budget)
    return PackedTrainer(
        model=model,
        args=args,
        train_dataset=read_packs(data_args.train_packs, processor, args),
        eval_dataset=read_packs(data_args.eval_packs, processor, args) if data_args.eval_packs else None,
        processing_class=processor,
    )


def main() -> None:
    """Train, save, plot, sum up."""
    model_args, data_args, args = parse_arguments(
        (ModelArguments, DataArguments, PackedTrainingArguments),
        "Train a vision-language model on packs of image-text pairs and documents.",
    )
    run_recipe("pretrain.py", lambda: build_trainer(model_args, data_args, args), args)


if __name__ == "__main__":
    main()
