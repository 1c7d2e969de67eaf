"""Options of the command line and of YAML files, and which of the stock trainers' are honoured."""

import re
from dataclasses import MISSING, dataclass, field, fields

import pytest
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from open_qwen2vl import PackedSFTConfig, PackedTrainingArguments
from open_qwen2vl.trainer import parse_arguments
from open_qwen2vl.trainer.options import HONOURED, REFUSED

# Ten levels of ten aliases: 10,000,000,000 words.
BOMB = "a0: &a0 [lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 11))


@dataclass
class OtherArguments:
    """What a recipe adds."""

    packs: str = field(metadata={"help": "Folder of packs."})
    limit: int | None = field(default=None, metadata={"help": "Of something."})


def parse(*argv):
    return parse_arguments((OtherArguments, PackedTrainingArguments), "A recipe.", argv)


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1, printed
    return printed.err


def test_defaults_are_those_of_packs(tmp_path):
    args = PackedTrainingArguments(str(tmp_path))
    assert (args.train_projector, args.train_language_model, args.train_vision_tower) == (True, True, False)
    assert (args.lr_scheduler_type, args.get_warmup_steps(1000), args.per_device_train_batch_size) == ("cosine", 30, 1)
    assert (args.adam_beta1, args.adam_beta2, args.report_to) == (0.9, 0.999, [])
    assert args.prediction_loss_only and not args.remove_unused_columns and not args.logging_nan_inf_filter
    assert args.dataloader_persistent_workers and args.dataloader_num_workers > 0
    assert not PackedTrainingArguments(str(tmp_path), dataloader_num_workers=0).dataloader_persistent_workers


def test_a_file_gives_defaults_and_the_command_line_wins(config):
    path = config(
        "packs: here\nlearning_rate: 5e-5\ntrain_projector: false\nmax_steps: 7\nlimit: null\n"
        "report_to: [tensorboard]\n"
        "dataloader_num_workers: 0\nlr_scheduler_kwargs: {num_cycles: 2}\nsave_total_limit: 3\n"
    )
    other, args = parse(path, "--max_steps", "9", "--lr-scheduler-type", "constant", "--train_vision_tower")
    assert (other.packs, other.limit) == ("here", None)
    assert (args.learning_rate, args.max_steps, args.lr_scheduler_type) == (5e-5, 9, "constant")
    assert (args.train_projector, args.train_vision_tower, args.train_language_model) == (False, True, True)
    assert (args.report_to, args.lr_scheduler_kwargs, args.save_total_limit) == (["tensorboard"], {"num_cycles": 2}, 3)
    other, args = parse(path, "--packs=there", "--no_train_language_model", "--train_projector", "true")
    assert (other.packs, args.train_language_model, args.train_projector) == ("there", False, True)


def test_the_name_of_every_boolean_alone_is_true(config):
    bare = ("--bf16", "--disable_tqdm", "--hub-private-repo", "--ddp_broadcast_buffers", "--ddp_static_graph")
    (args,) = parse_arguments((PackedSFTConfig,), "", [config("bf16: false\n"), "--use_cpu", *bare])
    assert args.bf16 and args.disable_tqdm and args.hub_private_repo and args.ddp_broadcast_buffers
    assert args.ddp_static_graph is True
    (args,) = parse_arguments((PackedSFTConfig,), "", ["--use_cpu", "--bf16", "false", "--ddp_static_graph=no"])
    assert (args.bf16, args.ddp_static_graph) == (False, False)


@pytest.mark.parametrize("word", ["no", "No", "off", "false", "'no'"])
def test_no_is_a_strategy(config, word):
    """YAML takes it for a boolean."""
    path = config(f"packs: x\nsave_strategy: {word}\neval_strategy: {word}\nlogging_strategy: {word}\n")
    _, args = parse(path)
    assert (args.save_strategy, args.eval_strategy, args.logging_strategy) == ("no", "no", "no")


def test_muon_is_an_optimizer_beside_transformers_own(config):
    assert parse(config("packs: x\noptim: muon\n"))[1].optim == "muon"
    assert parse("--packs", "x", "--optim", "adamw_torch")[1].optim == OptimizerNames.ADAMW_TORCH
    assert parse("--packs", "x")[1].optim == OptimizerNames.ADAMW_TORCH_FUSED


def test_yes_and_on_are_booleans_and_words(config):
    other, args = parse(config("packs: on\nuse_cpu: yes\ntrain_projector: off\nrun_name: 2026-11-28\nseed: 007\n"))
    assert (other.packs, args.use_cpu, args.train_projector) == ("on", True, False)
    assert (args.run_name, args.seed) == ("2026-11-28", 7)


def test_deepspeed_of_the_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed, which is not supported"):
        PackedTrainingArguments(str(tmp_path))


def options_of(kind) -> set[str]:
    return {field.name for field in fields(kind)}


def test_every_option_of_the_stock_arguments_is_decided_upon():
    """One that a later version adds is named here: is it honoured, or refused?"""
    stock = options_of(TrainingArguments) | options_of(SFTConfig)
    assert stock - HONOURED - set(REFUSED) == set()
    assert (HONOURED | set(REFUSED)) - stock == set()
    assert HONOURED & set(REFUSED) == set()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_has_no_effect_is_refused_by_name(name, tmp_path):
    """The default passes, any other value is told with its reason; for those of TRL in its own arguments."""
    kind = PackedTrainingArguments if name in options_of(TrainingArguments) else PackedSFTConfig
    allowed, reason = REFUSED[name]
    default = next(field for field in fields(kind) if field.name == name)
    value = default.default_factory() if default.default is MISSING else default.default
    assert value in allowed
    other = {bool: not value, str: "other", float: 0.5, list: ["other"]}.get(type(value), "other")
    if name == "do_train":
        other = "perhaps"
    with pytest.raises(ValueError, match=re.escape(f"{name} is not supported: {reason}")):
        kind(str(tmp_path), use_cpu=True, **{name: other})


def test_without_a_file(tmp_path):
    other, args = parse("--packs", "here", "--output_dir", str(tmp_path), "--limit", "3")
    assert (other.packs, other.limit, args.output_dir) == ("here", 3, str(tmp_path))


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "CONFIG.yaml" in text and "(default: 0.03)" in text and "--train_vision_tower" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pack", "x"], "unknown option '--pack' (did you mean 'packs'?)"),
        (["--learning-rat=3"], "unknown option '--learning-rat=3' (did you mean 'learning_rate'?)"),
        (["--packs", "x", "--max_steps", "few"], "--max_steps"),
        (["--packs", "x", "--lr_scheduler_type", "cosinus"], "cosinus"),
        (["--packs", "x", "--train_projector", "false", "--train_language_model", "false"], "nothing to train"),
        ([], "--packs"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["--packs", "x", "--learning_rate", "-1"], "learning_rate must be at least 0, got -1.0"),
        (["--packs", "x", "--learning_rate", "nan"], "learning_rate must be at least 0, got nan"),
        (["--packs", "x", "--projector_learning_rate=-1e-5"], "projector_learning_rate must be at least 0"),
        (["--packs", "x", "--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1"),
        (["--packs", "x", "--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be at least 1"),
        (["--packs", "x", "--num_train_epochs", "0"], "num_train_epochs must be above 0, got 0.0"),
        (["--packs", "x", "--max_steps", "0"], "max_steps must be at least 1 (or -1, for num_train_epochs), got 0"),
        (["--packs", "x", "--save_steps", "0"], "save_steps must be above 0"),
        (["--packs", "x", "--adam_beta2", "1"], "must be below 1"),
        (["--packs", "x", "--use_liger_kernel"], "use_liger_kernel needs a GPU"),
        (["--packs", "x", "--deepspeed", "zero3.json"], "deepspeed is not supported: use FSDP2"),
        (["--packs", "x", "--report_to", "wandbb"], "report_to: 'wandbb' is none of"),
        (["--packs", "x", "--report_to", "clearml"], "report_to: clearml is not installed (pip install clearml)"),
        (["--packs", "x", "--do_eval"], "do_eval is not supported: give eval_strategy"),
        (["--packs", "x", "--load_best_model_at_end"], "load_best_model_at_end has no effect without eval_strategy"),
        (["--packs", "x", "--metric_for_best_model=f1"], "metric_for_best_model has no effect without eval_strategy"),
        (["--packs", "x", "--optim_args", "eps=1"], "optim_args has no effect on this optim"),
        (["--packs", "x", "--optim", "adamw_8bit", "--optim_args", "eps=1"], "optim_args has no effect on this optim"),
        (
            ["--packs", "x", "--torch_compile", "--torch_compile_backend", "foo"],
            "torch_compile_backend 'foo' is none of",
        ),
        (
            ["--packs", "x", "--activation_checkpointing_kwargs", '{"every_n_layers": 0}'],
            "every_n_layers must be a whole number above 0, got 0",
        ),
        (["--packs", "x", "--optim_target_modules", "all-linear"], "optim_target_modules is for optimizers of low"),
        (["--packs", "x", "--optim", "adalomo"], "optim: "),
        (["--packs", "x", "--optim", "grokadamw"], "optim: Please install grokadamw"),
        (["--packs", "x", "--optim", "galore_adamw", "--optim_target_modules", "q_proj"], "pip install galore-torch"),
        (["--packs", "x", "--optim", "apollo_adamw"], "optim apollo_adamw needs the package apollo-torch"),
        (["--packs", "x", "--optim", "muonn"], "optim is 'muonn', none of muon, adamw_torch"),
        (["--packs", "x", "--ema_decay", "1"], "ema_decay must be below 1"),
        (["--packs", "x", "--lr_scheduler_kwargs", '{"num_cycle": 1}'], "'num_cycle'"),
        (["--packs", "x", "--lr_scheduler_kwargs", '{"num_cycles": "x"}'], "lr_scheduler_kwargs: "),
        (["--packs", "x", "--activation_checkpointing_kwargs", '{"reentrant": true}'], "reentrant is none of"),
        (["--packs", "x", "--max_dropped_share", "2"], "max_dropped_share is a share, at most 1, got 2.0"),
        (["--packs", "x", "--max_dropped_share=-1"], "max_dropped_share must be at least 0"),
        (["--packs", "x", "--neftune_noise_alpha=-5"], "neftune_noise_alpha must be at least 0"),
        (["--packs", "x", "--data_seed=-1"], "data_seed must be at least 0"),
        (["--packs", "x", "--fsdp_config", "nowhere.json", "--fsdp", "full_shard"], "nowhere.json"),
        (
            ["--packs", "x", "--accelerator_config", '{"split_batches": true}'],
            "config.split_batches is not supported",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line(capsys, argv, message):
    assert message in error_of(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("packs: x\nlearning_rat: 1\n", "unknown option 'learning_rat' (did you mean 'learning_rate'?)"),
        ("packs: x\nmax_steps: few\n", "max_steps"),
        ("packs: x\nmax_steps: 1.5\n", "max_steps"),
        ("packs: x\nlr_scheduler_type: cosinus\n", "cosinus"),
        ("packs: [x\n", "cannot read"),
        ("just words\n", "not a YAML file"),
        ("help: true\npacks: x\n", "unknown option 'help'"),
        ("packs: x\nlearning_rate: [1e-5, 2e-5]\n", "learning_rate: takes one value, got list"),
        ("packs: x\nlearning_rate: {a: 1}\n", "learning_rate: takes one value, got dict"),
        ("packs: x\nlearning_rate:\n", "learning_rate: needs a value"),
        ("packs: x\nlearning_rate: -1\n", "learning_rate must be at least 0"),
        ("packs: x\nsave_strategy: yes\n", "yes"),
        ("packs: x\nlog_level: loud\n", "log_level is 'loud', none of detail, debug"),
        ("packs: x\nmax_steps: yes\n", "max_steps"),
        ("packs: x\nseed: 1\nseed: 2\n", "'seed' is given twice"),
        ("packs: x\nbf16: !!python/object/apply:os.system ['true']\n", "bf16: "),
        ("packs: !env HOME\n", "packs: the tag !env is not allowed"),
        ("packs: x\nlr_scheduler_kwargs: {a: !!python/name:os.system }\n", "python/name:os.system"),
        ("[a, b]: x\n", "must be a word"),
        (BOMB, "its aliases stand for more than"),
        ("packs: &a [*a]\n", "its aliases stand for more than"),
        pytest.param("packs: " + "[" * 5000 + "]" * 5000 + "\n", "nested too deeply", id="deep"),
        pytest.param("# " + "x" * (1 << 20) + "\npacks: x\n", "larger than 1 MiB", id="large"),
    ],
)
def test_a_wrong_file_is_one_line(capsys, config, text, message):
    assert message in error_of(capsys, config(text))


def test_wandb_without_a_key_is_one_line(capsys, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    argv = ("--packs", "x", "--report_to", "wandb", "--output_dir", str(tmp_path))
    assert "report_to: wandb has no API key" in error_of(capsys, *argv)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert parse(*argv)[1].report_to == ["wandb"]
