"""Fine-tune on conversations: packed or one by one, all weights, LoRA or QLoRA.

    open-qwen2vl pack llava_v1_5_mix665k.json --images images/ --output packs/ --tokenizer runs/2b/model \
        --image-seq-length 729
    accelerate launch recipes/sft.py recipes/sft_llava665k.yaml --model_name_or_path runs/2b/model --train_packs packs/

Options are those of `trl sft` (`SFTConfig`, `ModelConfig`), as far as they apply to packs of images and text, and
stand in the YAML file; those on the command line win; `--help` lists them all. All that recipes/pretrain.py does with
a run holds here too: the same command goes on from the newest checkpoint, and `output_dir` ends with `model/` (the
adapter's folder with `use_peft`), `loss.png` and `train_results.json`. docs/sft.md tells more.
"""

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
    set_seed,
)

from open_qwen2vl import PackedSFTConfig, PackedSFTTrainer
from open_qwen2vl.data.packing.mixture import PackMixture, parse_sources
from open_qwen2vl.data.packing.plan_files import read_plan
from open_qwen2vl.data.packing.unpacked_dataset import UnpackedConversations
from open_qwen2vl.trainer import parse_arguments, run_recipe
from open_qwen2vl.trainer.lora import ATTENTION_MODULES, MLP_MODULES, UNQUANTISED_MODULES, lora_config

FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class ModelArguments:
    """The model to fine-tune, and its adapter; names and defaults as in TRL's `ModelConfig`."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of a pre-trained or converted model."})
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
        default_factory=lambda: [*ATTENTION_MODULES, *MLP_MODULES],
        metadata={"help": "Linear layers of the language model's blocks to adapt."},
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) instead."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: the language model's blocks in 4 bits (NF4), which needs use_peft."}
    )

    def __post_init__(self):
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
    image_seq_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per image. Packs have the plan's; else all patches of the vision tower by default (729)."
        },
    )

    def __post_init__(self):
        if bool(self.train_packs) == bool(self.dataset_name):
            raise ValueError("give either train_packs or dataset_name")
        if self.dataset_name and self.eval_packs:
            raise ValueError("eval_packs goes with train_packs; with dataset_name use dataset_test_split")


def load_model(
    model_args: ModelArguments, args: PackedSFTConfig
) -> tuple[PreTrainedModel, ProcessorMixin, LoraConfig | None]:
    """Model, processor, and the adapter to train, if any."""
    source = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    options = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    if model_args.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else torch.float32,
            llm_int8_skip_modules=UNQUANTISED_MODULES,
        )
    model = AutoModelForImageTextToText.from_pretrained(model_args.model_name_or_path, **source, **options)
    adapter = lora_config(
        model_args.lora_r,
        model_args.lora_alpha,
        model_args.lora_dropout,
        modules=tuple(model_args.lora_target_modules),
        train_projector=args.train_projector,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
    )
    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path, **source)
    return model, processor, adapter if model_args.use_peft else None


def load_packs(data_args: DataArguments, args: PackedSFTConfig, processor: ProcessorMixin) -> tuple:
    """The packs to train on and those for evaluation, if any."""
    if bool(data_args.eval_packs) == (args.eval_strategy == "no"):
        raise ValueError("eval_packs and eval_strategy (steps or epoch) go together")
    evaluation = PackMixture(parse_sources(data_args.eval_packs), processor) if data_args.eval_packs else None
    return PackMixture(parse_sources(data_args.train_packs), processor), evaluation


def load_rows(data_args: DataArguments, args: PackedSFTConfig, processor: ProcessorMixin) -> tuple:
    """The conversations to train on and those for evaluation, if any, one by one."""
    path = Path(data_args.dataset_name)
    folder = path.parent if path.suffix in FILES else None

    def load(split: str) -> UnpackedConversations:
        rows = read_split(path, data_args.dataset_config, split)
        return UnpackedConversations(rows, processor, args.max_length, processor.image_seq_length, folder)

    evaluated = args.eval_strategy != "no"
    return load(data_args.dataset_train_split), load(data_args.dataset_test_split) if evaluated else None


def read_split(path: Path, config: str | None, split: str) -> datasets.Dataset:
    """A split of a data set in a file, in a folder of `save_to_disk`, or on the Hub."""
    if path.suffix in FILES:
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
        # The plan reserved the places of an image. Where their number changes, the last is the model's.
        last = parse_sources(data_args.train_packs)[-1].path
        planned = read_plan(Path(last))["image_seq_length"]
        if budget not in (None, planned):
            raise ValueError(f"image_seq_length is {budget}, but {last} was planned for {planned}")
        budget = planned
    set_seed(args.seed)
    model, processor, adapter = load_model(model_args, args)
    budget = model.config.patches_per_side**2 if budget is None else budget
    model.config.image_seq_length = processor.image_seq_length = budget
    load = load_packs if data_args.train_packs else load_rows
    train_dataset, eval_dataset = load(data_args, args, processor)
    return PackedSFTTrainer(model, args, train_dataset, eval_dataset, processor, adapter)


def main() -> None:
    """Train, save, plot, sum up."""
    model_args, data_args, args = parse_arguments(
        (ModelArguments, DataArguments, PackedSFTConfig), "Fine-tune Open-Qwen2VL on conversations."
    )
    run_recipe("sft.py", lambda: build_trainer(model_args, data_args, args), args)


if __name__ == "__main__":
    main()
