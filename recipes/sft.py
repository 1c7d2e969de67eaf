"""Fine-tune on conversations: packed or one by one, all weights, LoRA or QLoRA.

    open-qwen2vl pack llava_v1_5_mix665k.json --images images/ --output packs/ --tokenizer runs/2b/model \
        --image-seq-length 729
    accelerate launch recipes/sft.py recipes/sft_llava665k.yaml --model_name_or_path runs/2b/model --train_packs packs/

Options are those of `trl sft` (`SFTConfig`, `ModelConfig`), as far as they apply to packs of images and text, and
stand in the YAML file; those on the command line win; `--help` lists them all. All that recipes/pretrain.py does with
a run holds here too: the same command resumes from the newest checkpoint, and `output_dir` ends with `model/` (the
adapter's folder with `use_peft`), `loss.png` and `train_results.json`. docs/sft.md tells more.
"""

import logging
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

# Before the imports that take ten seconds.
if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    print("INFO importing torch, transformers, TRL and open_qwen2vl", file=sys.stderr, flush=True)

import datasets
import torch
from datasets.exceptions import DatasetsError
from peft import LoraConfig
from pyarrow import ArrowException
from transformers import BitsAndBytesConfig, PreTrainedModel, ProcessorMixin, set_seed

from open_qwen2vl import PackedSFTConfig, PackedSFTTrainer
from open_qwen2vl.data.packing.plan_files import read_plan
from open_qwen2vl.data.packing.sources import parse_sources
from open_qwen2vl.data.packing.unpacked_dataset import UnpackedConversations
from open_qwen2vl.trainer import parse_arguments, run_recipe
from open_qwen2vl.trainer.loading import read_packs
from open_qwen2vl.trainer.lora import ATTENTION_MODULES, MLP_MODULES, UNQUANTISED_MODULES, lora_config
from open_qwen2vl.trainer.model_loading import load_pretrained, tokens_per_image

logger = logging.getLogger("sft")

LORA_MODULES = (*ATTENTION_MODULES, *MLP_MODULES)
FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class ModelArguments:
    """The model to fine-tune, and its adapter; names and defaults as in TRL's `ModelConfig`."""

    model_name_or_path: str = field(
        metadata={"help": "Hub id or folder of a model of any family that packs, or of a training."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the weights. With `bf16: true` fp32 weights are computed with in bf16. Adapters are fp32."
        },
    )
    attn_implementation: str = field(
        default="packed_varlen", metadata={"help": "Attention: packed_varlen, sdpa, eager or flash_attention_2."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter, and the projector in full."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter's updates."})
    lora_alpha: int = field(default=32, metadata={"help": "Updates are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the updates."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LORA_MODULES),
        metadata={"help": "Linear layers of the language model's blocks to adapt."},
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) instead."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: the language model's blocks in 4 bits (NF4), which needs use_peft."}
    )

    def __post_init__(self):
        given = [one.name for one in fields(self) if one.name.startswith(("lora_", "use_")) and one.name != "use_peft"]
        given = [name for name in given if getattr(self, name) != getattr(ModelArguments, name, list(LORA_MODULES))]
        if given and not self.use_peft:
            raise ValueError(f"{given[0]} has no effect without use_peft")
        if self.load_in_4bit and not self.use_peft:
            raise ValueError("load_in_4bit needs use_peft: weights of 4 bits cannot be trained")


@dataclass
class DataArguments:
    """The conversations: packs, or a data set by the name of its rows."""

    train_packs: str | None = field(
        default=None,
        metadata={
            "help": "Folder of `open-qwen2vl pack`; in a YAML file also a list of {path, weight or epochs, name}"
        },
    )
    eval_packs: str | None = field(
        default=None, metadata={"help": "The same for evaluation, which runs as `eval_strategy` says."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Unpacked, instead of train_packs: Hub id, folder of `save_to_disk`, or a .json, .jsonl or "
            ".parquet file with `messages` and `images`; images named by a path lie beside the file."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split for evaluation, if eval_strategy is set."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "With dataset_name: name of one of the processor's chat templates, as chatml."},
    )
    image_seq_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per image of Open-Qwen2VL. Packs have the plan's; else all patches of the tower (729)."
        },
    )

    def __post_init__(self):
        if bool(self.train_packs) == bool(self.dataset_name):
            raise ValueError("give either train_packs or dataset_name")
        if self.chat_template and not self.dataset_name:
            raise ValueError("chat_template goes with dataset_name: packs have the one that they were planned with")
        if self.dataset_name and self.eval_packs:
            raise ValueError("eval_packs goes with train_packs; with dataset_name use dataset_test_split")


def load_model(
    model_args: ModelArguments, args: PackedSFTConfig
) -> tuple[PreTrainedModel, ProcessorMixin, LoraConfig | None]:
    """Model, processor, and the adapter to train, if any."""
    if args.model_init_kwargs:
        raise ValueError("model_init_kwargs is not supported: give dtype, attn_implementation and model_revision")
    options = {}
    if model_args.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else torch.float32,
            llm_int8_skip_modules=UNQUANTISED_MODULES,
        )
    model, processor = load_pretrained(
        model_args.model_name_or_path,
        model_args.dtype,
        model_args.attn_implementation,
        model_args.model_revision,
        **options,
    )
    if not model_args.use_peft:
        return model, processor, None
    adapter = lora_config(
        model_args.lora_r,
        model_args.lora_alpha,
        model_args.lora_dropout,
        modules=tuple(model_args.lora_target_modules),
        train_projector=args.train_projector,
        model=model,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
    )
    return model, processor, adapter


def load_packs(data_args: DataArguments, args: PackedSFTConfig, processor: ProcessorMixin) -> tuple:
    """The packs to train on and those for evaluation, if any."""
    if bool(data_args.eval_packs) == (args.eval_strategy == "no"):
        raise ValueError("eval_packs and eval_strategy (steps or epoch) go together")
    evaluation = read_packs(data_args.eval_packs, processor, args) if data_args.eval_packs else None
    return read_packs(data_args.train_packs, processor, args), evaluation


def load_rows(data_args: DataArguments, args: PackedSFTConfig, processor: ProcessorMixin) -> tuple:
    """The conversations to train on and those for evaluation, if any, one by one."""
    path = Path(data_args.dataset_name)
    folder = path.parent if path.suffix in FILES else None

    def load(split: str) -> UnpackedConversations:
        rows = read_split(path, data_args.dataset_config, split)
        if not len(rows):
            raise ValueError(f"{path}: no rows in its split {split!r}")
        budget = getattr(processor, "image_seq_length", None)
        return UnpackedConversations(rows, processor, args.max_length, budget, folder, data_args.chat_template)

    evaluated = args.eval_strategy != "no"
    return load(data_args.dataset_train_split), load(data_args.dataset_test_split) if evaluated else None


def read_split(path: Path, config: str | None, split: str) -> datasets.Dataset:
    """A split of a data set in a file, in a folder of `save_to_disk`, or on the Hub."""
    try:
        return _read_split(path, config, split)
    except (DatasetsError, ArrowException) as error:
        cause = error.__cause__ or error
        raise ValueError(f"cannot read {path}: {type(cause).__name__}: {cause}"[:500]) from error
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _read_split(path: Path, config: str | None, split: str) -> datasets.Dataset:
    if path.suffix in FILES:
        if path.is_file() and not path.stat().st_size:
            raise ValueError(f"{path} is empty")
        return datasets.load_dataset(FILES[path.suffix], data_files=str(path), split=split)
    if not path.is_dir():
        return datasets.load_dataset(str(path), config, split=split)
    saved = datasets.load_from_disk(path)
    splits = {"train": saved} if isinstance(saved, datasets.Dataset) else saved
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}, only {', '.join(splits)}")
    return splits[split]


def build_trainer(model_args: ModelArguments, data_args: DataArguments, args: PackedSFTConfig) -> PackedSFTTrainer:
    """Model, processor and conversations, put together."""
    budget = data_args.image_seq_length
    if data_args.train_packs:
        sources = parse_sources(data_args.train_packs)
        logger.info("reading the plan of %s", ", ".join(source.path for source in sources))
        plans = {source.path: read_plan(source.path) for source in sources}
        budget = tokens_per_image(budget, plans)
    set_seed(args.seed)
    model, processor, adapter = load_model(model_args, args)
    if hasattr(model.config, "patches_per_side"):
        budget = model.config.patches_per_side**2 if budget is None else budget
        model.config.image_seq_length = processor.image_seq_length = budget
    elif budget is not None:
        raise ValueError("remove image_seq_length: it is Open-Qwen2VL's; here an image's size decides")
    load = load_packs if data_args.train_packs else load_rows
    train_dataset, eval_dataset = load(data_args, args, processor)
    return PackedSFTTrainer(model, args, train_dataset, eval_dataset, processor, adapter)


def main() -> None:
    """Train, save, plot, sum up."""
    model_args, data_args, args = parse_arguments(
        (ModelArguments, DataArguments, PackedSFTConfig), "Fine-tune a vision-language model on conversations."
    )
    run_recipe("sft.py", lambda: build_trainer(model_args, data_args, args), args)


if __name__ == "__main__":
    main()
