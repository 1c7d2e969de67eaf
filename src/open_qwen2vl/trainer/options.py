"""Every option of transformers' `TrainingArguments` and TRL's `SFTConfig`: honoured, or refused by name with a reason.

An option without effect would be a training other than the one that was asked for. A test compares the two lists with
the installed libraries, so that an option of a later version is decided upon and not overlooked.
"""

import importlib.util
import math
import os
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames, trainer_log_levels

_ORDER = "packs come in an order of their own, which resuming and equal loads rest on"
_METRICS = "evaluation is the loss per label, without predictions to gather"
_SAME_STEPS = "a step must have the same packs wherever it runs"
_PLAN = "it prepares TRL's data sets of text; `open-qwen2vl pack` plans packs"
_LABELS = "labels are the answers, as the chat template marks them"

# Option: the values that change nothing here, and why no other can be honoured.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0, None), "it needs the logits of every position"),
    "bf16_full_eval": ((False,), "weights stay as they are in evaluation, which computes as training does (bf16)"),
    "fp16_full_eval": ((False,), "weights stay as they are in evaluation, which computes as training does (fp16)"),
    "average_tokens_across_devices": ((True,), "every label weighs the same on whichever device it lies"),
    "liger_kernel_config": ((None,), "use_liger_kernel takes all that computes the same; the loss is the model's own"),
    "use_cache": ((False,), "a cache would join the documents of a pack"),
    "auto_find_batch_size": (
        (False,),
        f"{_SAME_STEPS}; use a smaller per_device_train_batch_size with more gradient_accumulation_steps",
    ),
    "include_num_input_tokens_seen": (("no", False, "False"), "each log has the tokens without padding"),
    "eval_do_concat_batches": ((True,), _METRICS),
    "eval_use_gather_object": ((False,), _METRICS),
    "eval_accumulation_steps": ((None,), _METRICS),
    "include_for_metrics": (([],), _METRICS),
    "batch_eval_metrics": ((False,), _METRICS),
    "save_only_model": (
        (False,),
        "such a checkpoint cannot be resumed; output_dir/model is the model alone",
    ),
    "save_on_each_node": ((False,), "all machines share output_dir"),
    "enable_jit_checkpoint": ((False,), "SIGTERM always saves a checkpoint and ends the run"),
    "ignore_data_skip": ((False,), "a resumed run would read packs again that it has read"),
    "parallelism_config": ((None,), "training is data-parallel: DDP or FSDP2, by accelerate's config"),
    "dataloader_drop_last": ((False,), "no pack is left out: empty ones fill up the last step"),
    "dataloader_in_order": ((True,), _SAME_STEPS),
    "remove_unused_columns": ((False,), "the collator needs all that a pack carries"),
    "label_names": ((None,), "labels are `labels`"),
    # `sequential` is for data sets of one's own; PackedTraining refuses it for packs.
    "train_sampling_strategy": (("random", "sequential"), _ORDER),
    "length_column_name": (("length",), _ORDER),
    "deepspeed": ((None,), "use FSDP2, by accelerate's config"),
    "do_train": ((False, True), "the recipe trains"),
    "do_predict": ((False,), "use `open-qwen2vl evaluate`"),
    # SFTConfig
    "trust_remote_code": ((False,), "code that comes with a checkpoint is never run; the package has the models"),
    "router_aux_loss_coef": ((None,), "the model has no experts"),
    "chat_template_path": ((None,), "give the processor its chat template beforehand; packs were planned with one"),
    "dataset_text_field": (("text",), _PLAN),
    "dataset_kwargs": ((None,), _PLAN),
    "dataset_num_proc": ((None,), _PLAN),
    "eos_token": ((None,), "the chat template ends turns"),
    "pad_token": ((None,), "padding is a document of its own without labels"),
    "truncation_mode": (("keep_start",), "conversations longer than max_length are left out and counted, never cut"),
    "shuffle_dataset": ((False,), _ORDER),
    "packing": ((False,), _PLAN),
    "packing_strategy": (("bfd",), _PLAN),
    "padding_free": ((False,), _PLAN),
    "eval_packing": ((None, False), _PLAN),
    "pad_to_multiple_of": ((None, "auto", "none", "null"), "a row is as long as the longest pack of its batch"),
    "completion_only_loss": ((None,), _LABELS),
    "assistant_only_loss": ((True,), _LABELS),
    "loss_type": (("nll", "chunked_nll"), "the loss is the model's own (nll)"),
}

_HONOURED = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
warmup_steps optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon
gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs
gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
use_liger_kernel neftune_noise_alpha torch_empty_cache_steps full_determinism seed data_seed use_cpu accelerator_config
logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica
disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start do_eval
save_strategy save_steps save_total_limit load_best_model_at_end metric_for_best_model greater_is_better
push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
restore_callback_states_from_checkpoint resume_from_checkpoint
dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
dataloader_multiprocessing_context
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
fsdp fsdp_config debug skip_memory_metrics local_rank
model_init_kwargs max_length activation_offloading
"""
HONOURED = frozenset(_HONOURED.split())

# Option: lowest value, and whether it is itself allowed. What is None is not looked at.
_LOWEST = {
    "per_device_train_batch_size": (1, True),
    "per_device_eval_batch_size": (1, True),
    "gradient_accumulation_steps": (1, True),
    "num_train_epochs": (0, False),
    "learning_rate": (0, True),
    "projector_learning_rate": (0, True),
    "language_model_learning_rate": (0, True),
    "vision_tower_learning_rate": (0, True),
    "weight_decay": (0, True),
    "adam_beta1": (0, True),
    "adam_beta2": (0, True),
    "adam_epsilon": (0, False),
    "max_grad_norm": (0, True),
    "ema_decay": (0, False),
    "warmup_steps": (0, True),
    "max_loss_rise": (0, True),
    "save_steps": (0, False),
    "eval_steps": (0, False),
    "logging_steps": (0, False),
    "eval_delay": (0, True),
    "save_total_limit": (1, True),
    "dataloader_num_workers": (0, True),
    "dataloader_prefetch_factor": (1, True),
    "eval_tasks_steps": (1, True),
    "eval_tasks_limit": (1, True),
    "eval_tasks_shots": (0, True),
    "eval_tasks_batch_size": (1, True),
    "max_length": (1, True),
    "max_dropped_share": (0, True),
    "cache_gb": (0, False),
    "shuffle_window": (1, True),
    "read_patience": (0, False),
    "neftune_noise_alpha": (0, True),
    "data_seed": (0, True),
    "ddp_timeout": (0, False),
}
_WHOLE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_steps")
MUON = "muon"  # ours, beside transformers' names of optimizers
_NO_OPTIM_ARGS = (
    *(
        "adamw_torch",
        "adamw_torch_fused",
        "adafactor",
        MUON,
        "adamw_bnb_8bit",
        "adamw_8bit",
        "lion_8bit",
        "lion_32bit",
    ),
    *("paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit", "paged_lion_8bit"),
)
_LOW_RANK = ("galore", "apollo")  # families of optimizers, each of a package of its own
_EVALUATED = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "eval_on_start")
_CHECKPOINT_OPTIONS = frozenset(
    ("every_n_layers", "use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop", "context_fn")
)
_LOADER = {"split_batches": False, "dispatch_batches": None, "even_batches": True, "use_seedable_sampler": True}


def refuse_unsupported(args: Any) -> None:
    """Raise ValueError for the first option that has another value than those that can be honoured."""
    for name, (allowed, reason) in REFUSED.items():
        if getattr(args, name, allowed[0]) not in allowed:
            raise ValueError(f"{name} is not supported: {reason}")
    if args.do_eval and args.eval_strategy == "no":
        raise ValueError("do_eval is not supported: give eval_strategy (steps or epoch), which says when")
    for name in _EVALUATED:
        if getattr(args, name) not in (None, False) and args.eval_strategy in ("no", False):
            raise ValueError(f"{name} has no effect without eval_strategy (steps or epoch)")
    if args.ema_decay is not None and args.load_best_model_at_end:
        raise ValueError("load_best_model_at_end is not supported with ema_decay: the average is the final model")
    if args.eval_tasks_path and not args.trust_task_code:
        raise ValueError(
            f"eval_tasks_path {args.eval_tasks_path}: the tasks there may run any code; trust_task_code allows it"
        )
    if args.optim_args and str(getattr(args.optim, "value", args.optim)) in _NO_OPTIM_ARGS:
        raise ValueError("optim_args has no effect on this optim: give adam_beta1, adam_epsilon, ... by their names")
    if args.optim_target_modules and not any(kind in str(args.optim).lower() for kind in _LOW_RANK):
        raise ValueError("optim_target_modules is for optimizers of low rank (galore, apollo)")


def check_values(args: Any) -> None:
    """Raise ValueError for a number that no training can have; the stock classes take it and fail later, or never."""
    for name, (lowest, allowed) in _LOWEST.items():
        value = getattr(args, name, None)
        if value is None and name not in ("learning_rate", "num_train_epochs", "gradient_accumulation_steps"):
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < lowest or (value == lowest and not allowed):
            raise ValueError(f"{name} must be {'at least' if allowed else 'above'} {lowest}, got {value!r}")
    for name in _WHOLE:
        if not isinstance(getattr(args, name), int):
            raise ValueError(f"{name} must be a whole number, got {getattr(args, name)!r}")
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(f"max_steps must be at least 1 (or -1, for num_train_epochs), got {args.max_steps}")
    if args.ema_decay is not None and args.ema_decay >= 1:
        raise ValueError(f"ema_decay must be below 1, got {args.ema_decay}")
    if args.cache_gb is not None and args.cache_dir is None:
        raise ValueError("cache_gb is the size of cache_dir, which is not given")
    if args.max_dropped_share > 1:
        raise ValueError(f"max_dropped_share is a share, at most 1, got {args.max_dropped_share}")
    optimizers = (MUON, *(kind.value for kind in OptimizerNames))
    words = {"log_level": trainer_log_levels, "log_level_replica": trainer_log_levels, "optim": optimizers}
    for name, known in words.items():
        if getattr(args, name) not in known:
            raise ValueError(f"{name} is {getattr(args, name)!r}, none of {', '.join(known)}")
    if not (args.adam_beta1 < 1 and args.adam_beta2 < 1):
        raise ValueError(f"adam_beta1 and adam_beta2 must be below 1, got {args.adam_beta1} and {args.adam_beta2}")


def every_n_layers(name: str, given: dict[str, Any]) -> int:
    """That of the options of checkpointing, 1 where there is none; a ValueError for what is no number of blocks."""
    every = given.get("every_n_layers", 1)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"{name}: every_n_layers must be a whole number above 0, got {every!r}")
    return every


def check_what_is_built(args: Any) -> None:
    """Raise ValueError for a schedule, optimizer or checkpointing of blocks that the trainer's loop could not make."""
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        given = getattr(args, name, None)
        unknown = sorted(set(given) - _CHECKPOINT_OPTIONS) if isinstance(given, dict) else []
        if unknown:
            raise ValueError(f"{name}: {', '.join(unknown)} is none of {', '.join(sorted(_CHECKPOINT_OPTIONS))}")
        if isinstance(given, dict):
            every_n_layers(name, given)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        kwargs = dict(args.lr_scheduler_kwargs or {})
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=kwargs)
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            optimizer.step()
            schedule.step()
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"lr_scheduler_type {args.lr_scheduler_type}, lr_scheduler_kwargs: {error}") from error
    optim = str(getattr(args.optim, "value", args.optim))
    for name in _LOW_RANK:
        if name in optim:
            _check_installed(f"optim {optim}", f"{name}_torch", f"{name}-torch")
    if not args.optim_target_modules and args.optim != MUON:
        try:
            kind, _ = Trainer.get_optimizer_cls_and_kwargs(args)
        except (ImportError, RuntimeError, ValueError) as error:
            raise ValueError(f"optim: {error}") from error
        if args.async_save and kind.__module__.startswith("torchao"):
            raise ValueError("async_save is not supported with torchao's optimizers: torch cannot copy their states")


def check_loader(config: Any) -> None:
    """Raise ValueError for an `accelerator_config` that would deal out packs in another way."""
    for name, default in _LOADER.items():
        if getattr(config, name) != default:
            raise ValueError(f"accelerator_config.{name} is not supported: {_SAME_STEPS}")


def check_report_to(names: list[str]) -> None:
    """Raise ValueError for a reporting library that does not exist or is not installed."""
    if not names:  # to ask which are installed imports them, wandb for more than a second
        return
    installed = get_available_reporting_integrations()
    optional = ("azure_ml", "comet_ml", "dagshub", "dvclive", "mlflow", "neptune", "tensorboard", "wandb")
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to: {name!r} is none of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
        if name in (*optional, "codecarbon", "clearml", "swanlab", "trackio") and name not in installed:
            raise ValueError(f"report_to: {name} is not installed (pip install {name.removesuffix('_ml')})")
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.api.api_key:
            raise ValueError("report_to: wandb has no API key: `wandb login`, or WANDB_MODE=offline")


def check_combinations(args: Any) -> None:
    """Raise ValueError for fused or narrow computing that another option makes useless, on whatever machine."""
    if args.use_liger_kernel and args.torch_compile:
        raise ValueError("use_liger_kernel and torch_compile fuse the same operations: choose one of them")
    if args.bf16_residual and not args.bf16:
        raise ValueError("bf16_residual needs bf16: without it the model computes in the type of its weights")
    if args.float8 and not args.torch_compile:
        raise ValueError("float8 needs torch_compile: uncompiled, the casts cost more than the products gain")


def check_fused_step(args: Any) -> None:
    """Raise ValueError for an option that this environment, device or another option makes useless or impossible."""
    if args.use_liger_kernel:
        _check_installed("use_liger_kernel", "liger_kernel", "liger-kernel")
    if args.float8:
        _check_installed("float8", "torchao", "torchao")
    check_combinations(args)
    # Triton's interpreter runs the kernels on a CPU, slowly, which is what tests do.
    if args.use_liger_kernel and args.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("use_liger_kernel needs a GPU: Liger's kernels are written in Triton")
    if args.torch_compile and args.torch_compile_mode not in (None, "default", "max-autotune-no-cudagraphs"):
        raise ValueError(
            f"torch_compile_mode {args.torch_compile_mode} is neither default nor max-autotune-no-cudagraphs; others "
            "record CUDA graphs, which packs of ever other documents would record anew"
        )
    if args.torch_compile and args.torch_compile_backend not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends())  # without those for debugging
        raise ValueError(f"torch_compile_backend {args.torch_compile_backend!r} is none of {known}")
    if args.float8 and args.device.type == "cuda":
        if torch.cuda.get_device_capability(args.device) < (8, 9):
            name = torch.cuda.get_device_name(args.device)
            raise ValueError(f"float8 needs a GPU with float8 units (sm_89 or later), this is {name}")


def _check_installed(option: str, module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{option} needs the package {package} (pip install {package})")
