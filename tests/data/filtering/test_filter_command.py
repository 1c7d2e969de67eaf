import subprocess
import sys
from pathlib import Path

import pytest

from open_qwen2vl.cli import main
from open_qwen2vl.data.storage.uids import read_uids
from tests.data.killed_step import OUTPUT, check_killed_step

from .conftest import uid_of

RECIPE = Path(__file__).parents[3] / "recipes" / "data" / "open_qwen2vl.yaml"
BOMB = "keep: &a0 [lol]\nscores:\n" + "".join(f"- &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 11))
UIDS = [uid_of(number) for number in range(6)]


@pytest.fixture
def scores(write_score_file, tmp_path):
    write_score_file("clip", {uid: number / 10 for number, uid in enumerate(UIDS)})
    return str(tmp_path / "scores")


def kept(path: Path) -> list[str]:
    return [f"{high:016x}{low:016x}" for high, low in read_uids(path).tolist()]


def test_options_of_a_config_file_yield_to_the_command_line(scores, tmp_path, capsys):
    config = tmp_path / "filter.yaml"
    config.write_text(f"scores: {scores}\nkeep: clip >= 0.3\noutput: {tmp_path}/a.npy\nmemory_limit: 500MB\nseed: 1\n")
    assert main(["filter", "--config", str(config)]) == 0
    assert kept(tmp_path / "a.npy") == sorted(UIDS[3:]) and "kept        3 (50.0%)" in capsys.readouterr().out
    arguments = ["--keep", "clip > 0.45", "--output", f"{tmp_path}/b.npy", "--report", f"{tmp_path}/why"]
    assert main(["filter", "--config", str(config), *arguments]) == 0
    assert kept(tmp_path / "b.npy") == [UIDS[5]] and (tmp_path / "why" / "index.html").exists()
    assert not (tmp_path / "b_report").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("keep: [clip > 1]", "keep: ['clip > 1'] is no value for it"),
        ("threads: two", "threads: 'two' is no value for it"),
        ("kepp: clip > 1", "no option 'kepp'; there are scores, output, keep"),
        ("- clip", "not a file of `option: value` lines"),
        ("keep: 'clip", "--config"),
        pytest.param("keep: " + "[" * 5000, "nested too deeply", id="deep"),
        pytest.param(BOMB, "its aliases stand for more than 100,000 values", id="bomb"),
        ("keep: !!python/object/apply:os.getcwd []", "could not determine a constructor for the tag"),
    ],
)
def test_mistake_in_a_config_file_is_one_line(scores, tmp_path, capsys, config, message):
    (tmp_path / "filter.yaml").write_text(config + "\n")
    assert main(["filter", scores, "--config", str(tmp_path / "filter.yaml")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]


def test_what_neither_the_file_nor_the_command_line_gives_is_named(scores, tmp_path, capsys):
    (tmp_path / "filter.yaml").write_text("keep: clip > 1\n")
    with pytest.raises(SystemExit, match="2"):
        main(["filter", scores, "--config", str(tmp_path / "filter.yaml")])
    assert "error: the following arguments are required: --output (see" in capsys.readouterr().err


def test_recipe_of_the_paper_joins_its_pools(write_score_file, write_uid_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_score_file("clip-ccs", {UIDS[0]: 0.31, UIDS[1]: 0.29}, "ccs-00000")
    datacomp = {UIDS[2]: 85.0, UIDS[3]: 84.0, UIDS[4]: 10.0, UIDS[5]: "corrupt_image"}
    write_score_file("mlm-filter.semantic_understanding", datacomp, "datacomp-00000")
    write_uid_file([UIDS[2], UIDS[4]], "datacomp_medium_dfn_20m_inds.npy")
    assert main(["filter", "--config", str(RECIPE)]) == 0
    assert kept(tmp_path / "subset.npy") == sorted([UIDS[0], UIDS[2], UIDS[4]])


def test_filter_and_reshard_import_neither_torch_nor_transformers(write_score_file, write_tar, sample, tmp_path):
    pool = str(write_tar([member for key, uid in zip("abc", UIDS, strict=False) for member in sample(key, uid=uid)]))
    write_score_file("clip", {uid: number for number, uid in enumerate(UIDS)})
    subset = str(tmp_path / "subset.npy")
    steps = [
        ["filter", str(tmp_path / "scores"), "--keep", "clip >= 1", "--output", subset, "--pool", pool],
        ["reshard", pool, "--subset", subset, "--output", str(tmp_path / "tars"), "--num-workers", "1"],
    ]
    code = (
        f"import sys; from open_qwen2vl.cli import main; codes = [main(step) for step in {steps}]; "
        "print(codes, [name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[0, 0] []"
    assert (tmp_path / "tars/00000.tar").exists() and kept(tmp_path / "subset.npy") == sorted(UIDS[1:])


def step(write_score_file, write_hash_file, tmp_path) -> list[str]:
    for tar in range(8):
        uids = [uid_of(1000 * tar + number) for number in range(1000)]
        write_score_file("clip", {uid: number % 97 / 97 for number, uid in enumerate(uids)}, f"{tar:05d}")
        write_hash_file({uid: (number % 900, number % 900 + 1) for number, uid in enumerate(uids)}, f"{tar:05d}")
    options = ["--keep", "top(clip, 0.5) or clip < 0.1", "--deduplicate", "exact", "--threads", "2"]
    return ["filter", str(tmp_path / "scores"), *options, "--output", f"{OUTPUT}/subset.npy"]


def test_killed_filter_leaves_nothing_half_written(write_score_file, write_hash_file, tmp_path):
    (tmp_path / "runs").mkdir()
    command = step(write_score_file, write_hash_file, tmp_path)
    check_killed_step(command, tmp_path / "runs", kills=3)


@pytest.mark.slow
def test_filter_killed_thirty_times(write_score_file, write_hash_file, tmp_path):
    (tmp_path / "runs").mkdir()
    command = step(write_score_file, write_hash_file, tmp_path)
    check_killed_step(command, tmp_path / "runs", kills=30, seed=1)
