"""Arguments of a training on packs: those of the stock trainers, a few of our own, and the defaults that packs need.

All of `TrainingArguments` (and of TRL's `SFTConfig` in SFT) is available under its own name, in a YAML file or on the
command line. Only what would be wrong or slow for packed documents has another default here.
"""

import os
from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from ..range_reads import PATIENCE
from .options import (
    MUON,
    check_fused_step,
    check_loader,
    check_report_to,
    check_values,
    check_what_is_built,
    refuse_unsupported,
)


@dataclass
class PackedArguments:
    """What training on packs adds to the arguments of a stock trainer; a mixin in front of its class.

    Args:
        train_projector (`bool`, *optional*, defaults to `True`):
            Train the projector between vision tower and language model.
        train_language_model (`bool`, *optional*, defaults to `True`):
            Train the language model: embeddings, blocks and head.
        train_vision_tower (`bool`, *optional*, defaults to `False`):
            Train the vision tower. A frozen one is kept in bf16 where `bf16` is set.
        projector_learning_rate (`float`, *optional*):
            Learning rate of the projector; `learning_rate` where not given. All follow the same schedule.
        language_model_learning_rate (`float`, *optional*):
            The same for the language model.
        vision_tower_learning_rate (`float`, *optional*):
            The same for the vision tower.
        optim (`str`, *optional*, defaults to `"adamw_torch_fused"`):
            One of transformers' optimizers, or `muon`: matrices of hidden layers by Muon, all else by AdamW.
        ema_decay (`float`, *optional*):
            Keep a moving average of the weights that train, with this decay (0.999, shorter at first). Evaluations and
            the final model are of the average; each checkpoint has it as a model in `ema/`.
        async_save (`bool`, *optional*, defaults to `False`):
            Write checkpoints from a copy in host memory while training goes on.
        max_loss_rise (`float`, *optional*, defaults to 3.0):
            Stop when the loss of a step is so much above its running average (nats per token), and name the samples;
            0 never stops. A loss that is not finite stops always.
        max_dropped_share (`float`, *optional*, defaults to 0.1):
            Stop when more than this share of the last 1,000 documents could not be read, and name the commonest
            reason; 1 never stops.
        eval_tasks (`str`, *optional*):
            Benchmarks of `open-qwen2vl evaluate` to run during the training and at its end, separated by commas.
        eval_tasks_steps (`int`, *optional*):
            Steps between two such runs; they follow `eval_strategy` where not given.
        eval_tasks_limit (`int`, *optional*):
            Only the first samples of each task.
        eval_tasks_shots (`int`, *optional*):
            Prompt as a base model with so many demonstrations, and not through the chat template.
        eval_tasks_batch_size (`int`, *optional*, defaults to 8):
            Prompts that run at a time on each device.
        eval_tasks_path (`str`, *optional*):
            Folder with YAML files of more tasks, whose Python code runs.
        trust_task_code (`bool`, *optional*, defaults to `False`):
            Run the Python code and templates of `eval_tasks_path`, which is refused without it.
        cache_dir (`str`, *optional*):
            Folder on a local disk for the shards of packs whose files are in a bucket. Without it, ranges are read.
        cache_gb (`float`, *optional*):
            Size of `cache_dir` in GB, 100 where not given; the shards read longest ago go. All processes of a machine
            share it.
        shuffle_window (`int`, *optional*):
            Parts of a plan whose packs are mixed with each other, all by default. With few, each shard is needed for
            a short time once an epoch, which is what a cache smaller than the data asks for.
        read_patience (`float`, *optional*, defaults to 120):
            Seconds in which a read from a bucket is tried again; then the run ends in a checkpoint.
        profile (`bool`, *optional*, defaults to `False`):
            Record a few steps with torch's profiler into `output_dir/profile`.
        bf16_residual (`bool`, *optional*, defaults to `False`):
            Add up the language model's blocks in bf16 where `bf16` is set, as FSDP2 does in any case; weights, norms
            and RoPE stay in fp32.
        float8 (`bool`, *optional*, defaults to `False`):
            Compute the large products of the language model's blocks in float8, by torchao. Needs `torch_compile`.
        per_device_train_batch_size (`int`, *optional*, defaults to 1):
            Packs, not documents: one pack of 4096 positions already holds about 23 captioned images.
        per_device_eval_batch_size (`int`, *optional*, defaults to 1):
            The same for evaluation.
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine"`):
            With `warmup_steps=0.03`, a share of all steps, the schedule of the paper.
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`):
            A NaN loss is shown. The filter would hide it, and waits for the device at every micro-batch.
        dataloader_num_workers (`int`, *optional*, defaults to 4):
            Images are decoded in these processes, which persist over epochs.
        ddp_find_unused_parameters (`bool`, *optional*, defaults to `False`):
            Every trained parameter takes part in every step, in batches without images too.

    Raises:
        ValueError: if nothing is to be trained, or for an option that this training cannot honour.
    """

    train_projector: bool = field(
        default=True, metadata={"help": "Train the projector between vision tower and language model."}
    )
    train_language_model: bool = field(
        default=True, metadata={"help": "Train the language model: embeddings, blocks and head."}
    )
    train_vision_tower: bool = field(default=False, metadata={"help": "Train the vision tower."})
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector; learning_rate where not given."}
    )
    language_model_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the language model; learning_rate where not given."}
    )
    vision_tower_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower; learning_rate where not given."}
    )
    optim: str = field(
        default=TrainingArguments.default_optim,
        metadata={"help": "The optimizer: one of transformers', or muon (Muon for matrices, AdamW for the rest)."},
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay of a moving average of the weights, which is evaluated and saved."}
    )
    async_save: bool = field(
        default=False, metadata={"help": "Write checkpoints from a copy in host memory while training goes on."}
    )
    max_loss_rise: float = field(
        default=3.0,
        metadata={"help": "Stop when a step's loss is so far above its running average (nats); 0 never stops."},
    )
    max_dropped_share: float = field(
        default=0.1,
        metadata={"help": "Stop when more than this share of the last 1,000 documents could not be read; 1 never."},
    )
    eval_tasks: str | None = field(
        default=None, metadata={"help": "Benchmarks to run during training, separated by commas."}
    )
    eval_tasks_steps: int | None = field(
        default=None, metadata={"help": "Steps between two runs of eval_tasks; as eval_strategy where not given."}
    )
    eval_tasks_limit: int | None = field(
        default=None, metadata={"help": "Only the first samples of each of the eval_tasks."}
    )
    eval_tasks_shots: int | None = field(
        default=None,
        metadata={
            "help": "Prompt eval_tasks as for a base model, with so many demonstrations; else by chat template."
        },
    )
    eval_tasks_batch_size: int = field(
        default=8, metadata={"help": "Prompts of eval_tasks that run at a time on each device."}
    )
    eval_tasks_path: str | None = field(
        default=None, metadata={"help": "Folder with YAML files of more tasks for eval_tasks, whose Python code runs."}
    )
    trust_task_code: bool = field(
        default=False, metadata={"help": "Run the Python code and templates of eval_tasks_path's folder."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder on a local disk for shards in a bucket; else ranges are read."}
    )
    cache_gb: float | None = field(default=None, metadata={"help": "Size of cache_dir in GB; 100 if not given."})
    shuffle_window: int | None = field(
        default=None, metadata={"help": "Parts of a plan whose packs are mixed with each other; all by default."}
    )
    read_patience: float = field(
        default=PATIENCE, metadata={"help": "Seconds in which a read from a bucket is tried again."}
    )
    profile: bool = field(
        default=False, metadata={"help": "Record a few steps with torch's profiler into output_dir/profile."}
    )
    bf16_residual: bool = field(
        default=False, metadata={"help": "Add up the language model's blocks in bf16, instead of fp32, under bf16."}
    )
    float8: bool = field(
        default=False, metadata={"help": "Compute the language model's large products in float8 (torchao)."}
    )

    per_device_train_batch_size: int = field(default=1, metadata={"help": "Packs per device and micro-batch."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Packs per device in evaluation."})
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "Learning rate schedule, see transformers' `SchedulerType`."}
    )
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Linear warm-up: a number of steps, or below 1 a share of all steps."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between two logs, or below 1 a share of all steps."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace NaN and infinite losses in the logs by an average."}
    )
    prediction_loss_only: bool = field(
        default=True, metadata={"help": "Evaluate the loss only, without building logits."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator needs all that a pack carries."}
    )
    dataloader_num_workers: int = field(
        default=4, metadata={"help": "Processes that read and decode packs; 0 is the main process."}
    )
    dataloader_persistent_workers: bool = field(
        default=True, metadata={"help": "Keep the loader's processes between epochs."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Not needed: every trained parameter takes part in every step."}
    )

    def __post_init__(self):
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
            raise ValueError("accelerate's config asks for DeepSpeed, which is not supported: use FSDP2")
        refuse_unsupported(self)
        check_values(self)
        muon = self.optim == MUON
        if muon:
            # Trainer knows no such name, but takes the optimizer as it is made.
            self.optim = self.default_optim
        super().__post_init__()
        if muon:
            self.optim = MUON
        check_loader(self.accelerator_config)
        check_report_to(self.report_to)
        check_what_is_built(self)
        # `accelerate launch --mixed_precision` counts too: the tower's type and the checkpoint's record go by these.
        self.bf16, self.fp16 = self.mixed_precision == "bf16", self.mixed_precision == "fp16"
        check_fused_step(self)
        if not (self.train_projector or self.train_language_model or self.train_vision_tower):
            raise ValueError("nothing to train: switch on train_projector, train_language_model or train_vision_tower")
        if self.dataloader_num_workers == 0:
            # torch refuses to keep workers where there are none.
            self.dataloader_persistent_workers = False
        if self.device.type == "cpu":
            # There is nothing to pin memory for, and torch warns of it.
            self.dataloader_pin_memory = False
        # Of evaluations; a training copies its batches itself.
        self.accelerator_config.non_blocking = self.dataloader_pin_memory


@dataclass
class PackedTrainingArguments(PackedArguments, TrainingArguments):
    """Arguments of [`PackedTrainer`]: [`PackedArguments`] and all of `transformers.TrainingArguments`."""
