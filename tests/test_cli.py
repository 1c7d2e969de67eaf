import io
import tarfile
from importlib.metadata import entry_points

import pytest

from open_qwen2vl.cli import main
from open_qwen2vl.data.packing.plan_files import read_plan


@pytest.fixture
def shards(tmp_path):
    """A folder with two tars of three samples, one of which has no caption."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("0.tar", "1.tar"):
        with tarfile.open(folder / name, "w") as tar:
            for member, data in (
                ("a.jpg", b"x"),
                ("a.txt", b"a cat"),
                ("b.jpg", b"x"),
                ("c.jpg", b"x"),
                ("c.txt", b"y"),
            ):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def pack(*arguments, tokenizer, output):
    return main(["pack", *map(str, arguments), "--tokenizer", str(tokenizer), "--output", str(output)])


def test_pack_plans_and_reports(shards, backbones, tmp_path, capsys, caplog):
    packs = tmp_path / "new" / "packs"
    assert pack(shards, "--image-seq-length=4", "--max-length=64", tokenizer=backbones["text"], output=packs) == 0
    plan = read_plan(packs)
    assert (plan["vision"]["image_seq_length"], plan["max_length"]) == (4, 64)
    assert [shard["path"] for shard in plan["shards"]] == ["../../shards/0.tar", "../../shards/1.tar"]
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["samples"] == "6" and lines["packed"] == "4" and lines["skipped"] == "2 (missing_caption 2)"
    assert lines["fill"] == f"{plan['totals']['fill']:.2%}"
    assert "skipped ../../shards/0.tar/b: missing_caption" in caplog.text


def test_pack_takes_a_processor_folder(shards, processor, backbones, tmp_path, capsys):
    processor.save_pretrained(tmp_path / "model")
    for tokenizer, packs in ((tmp_path / "model", "packs1"), (backbones["text"], "packs2")):
        assert pack(shards, tokenizer=tokenizer, output=tmp_path / packs) == 0
    assert (tmp_path / "packs1/plan.json").read_bytes() == (tmp_path / "packs2/plan.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.tar"], "nowhere.tar: no such file"),
        (["{shards}", "--max-length", "100"], "max_length 100 is below 147"),
        (["{shards}", "--num-workers", "0"], "num_workers must be at least 1, got 0"),
        (["{shards}", "{shards}/0.tar"], "0.tar: given twice"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(shards, backbones, tmp_path, capsys, arguments, message):
    arguments = [argument.format(shards=shards) for argument in arguments]
    assert pack(*arguments, tokenizer=backbones["text"], output=tmp_path / "packs") == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("open-qwen2vl pack: error: ") and message in output.err
    assert output.err.count("\n") == 1


def test_unknown_tokenizer_is_one_line(shards, tmp_path, capsys):
    assert pack(shards, tokenizer=tmp_path / "no-such-tokenizer", output=tmp_path / "packs") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"open-qwen2vl pack: error: --tokenizer {tmp_path}/no-such-tokenizer: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "--output", "x"], "the following arguments are required: FILES"),
        (
            ["pack", "--max-lenght", "7", "--output", "x", "--tokenizer", "y"],
            "pack: error: unrecognized arguments: --max-lenght",
        ),
        (["pack", "--max-length", "many"], "argument --max-length: invalid int value: 'many'"),
        (["unpack"], "invalid choice: 'unpack'"),
        ([], "required: COMMAND"),
    ],
)
def test_wrong_option_is_one_line_and_exit_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    output = capsys.readouterr().err
    assert error.value.code == 2 and message in output and output.count("\n") == 1


def test_ctrl_c_before_a_command_has_begun_is_one_line(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("argparse.ArgumentParser.parse_known_args", interrupt)
    assert main(["pack"]) == 130
    assert capsys.readouterr().err == "open-qwen2vl: interrupted\n"


def test_help_shows_defaults(capsys):
    for arguments, expected in ((["--help"], ["pack"]), (["pack", "--help"], ["144", "4096", "(default: 8)"])):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        text = capsys.readouterr().out
        assert error.value.code == 0 and all(word in text for word in expected)


def test_entry_point_is_installed():
    (entry_point,) = entry_points(group="console_scripts", name="open-qwen2vl")
    assert entry_point.load() is main
