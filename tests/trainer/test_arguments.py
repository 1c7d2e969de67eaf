from dataclasses import dataclass, field

import pytest

from open_qwen2vl import PackedTrainingArguments
from open_qwen2vl.trainer import parse_arguments


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
        "packs: here\nlearning_rate: 5e-5\ntrain_projector: false\nmax_steps: 7\nlimit: null\nreport_to: [wandb]\n"
        "dataloader_num_workers: 0\nlr_scheduler_kwargs: {num_cycles: 2}\nsave_total_limit: 3\n"
    )
    other, args = parse(path, "--max_steps", "9", "--lr-scheduler-type", "constant", "--train_vision_tower")
    assert (other.packs, other.limit) == ("here", None)
    assert (args.learning_rate, args.max_steps, args.lr_scheduler_type) == (5e-5, 9, "constant")
    assert (args.train_projector, args.train_vision_tower, args.train_language_model) == (False, True, True)
    assert (args.report_to, args.lr_scheduler_kwargs, args.save_total_limit) == (["wandb"], {"num_cycles": 2}, 3)
    other, args = parse(path, "--packs=there", "--no_train_language_model", "--train_projector", "true")
    assert (other.packs, args.train_language_model, args.train_projector) == ("there", False, True)


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
    ],
)
def test_a_wrong_file_is_one_line(capsys, config, text, message):
    assert message in error_of(capsys, config(text))
