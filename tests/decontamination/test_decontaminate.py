"""The step as a user runs it: scores, reasons, the filter's report, what is refused, kills."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from open_qwen2vl.cli import main
from open_qwen2vl.data.storage.uids import read_uids
from open_qwen2vl.decontamination import index, sets
from open_qwen2vl.decontamination import pool as step
from open_qwen2vl.decontamination.attacks import ATTACKS
from open_qwen2vl.evaluation import harness
from open_qwen2vl.places import place
from tests.data.conftest import encode_image
from tests.data.killed_step import OUTPUT, check_killed_step

QUESTION = "how many of the people who are standing beside the river wear a hat that is blue"


def run(pool, output, *against, **options) -> int:
    options = {"self_test": 2, "num_workers": 1, **options}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return main(["decontaminate", str(pool), "--against", *map(str, against), "--output", str(output), *flags])


@pytest.fixture
def table(tmp_path, evaluation_pictures):
    """A table of a question with a picture and its answer, and of a broken picture."""
    images = [{"bytes": encode_image(evaluation_pictures[0]), "path": None}, {"bytes": b"no picture", "path": "x.png"}]
    content = {"image": images, "question": [QUESTION, "is it red?"], "answer": ["seven", "no"]}
    pq.write_table(pa.table(content), tmp_path / "questions.parquet")
    return tmp_path / "questions.parquet"


def test_copies_of_pictures_and_texts_are_scored_named_and_dropped(
    evaluation_folder, evaluation_pictures, other_pictures, table, write_pool, tmp_path, capsys
):
    cropped = evaluation_pictures[2].crop((10, 20, 150, 150))
    pool = write_pool(
        {
            "copy": (evaluation_pictures[8], "a cat"),
            "crop": (cropped, "a roof"),
            "text": (other_pictures[0], f"Question: {QUESTION}? Seven."),
            "clean": (other_pictures[1], "a temple in the sun"),
            "broken": (b"not an image", "a dog"),
        }
    )
    assert run(pool, tmp_path / "scores", evaluation_folder, f"quiz={table}") == 0
    shown = capsys.readouterr().out
    assert "quiz: 1 pictures, 4 texts\n           corrupt_image 1 (row 1: " in shown
    assert "2 texts: text_too_short" in shown
    assert "found      2 pictures and 0 texts of bench" in shown and "0 pictures and 1 texts of quiz" in shown
    rows = pq.read_table(tmp_path / "scores/contaminated/00000.parquet").to_pylist()
    found = {(row["key"], row["scorer"].split(".")[1]): row for row in rows}
    assert found["copy", "image"]["value"] > 0.95 and found["crop", "image"]["value"] > 0.85
    assert found["copy", "image"]["detail"].startswith("bench, 08.png, distance 0.0")
    assert found["crop", "image"]["detail"].startswith("bench, 02.png, distance 0.")
    assert found["text", "text"]["value"] == 1 and found["text", "text"]["detail"] == "quiz, row 0, distance 0.000"
    assert found["clean", "text"]["value"] == 0 and found["clean", "image"]["value"] < 0.85
    assert (found["broken", "image"]["reason"], found["broken", "text"]["value"]) == ("corrupt_image", 0)

    report = json.loads((tmp_path / "scores/contaminated/report.json").read_text())
    assert [one["kind"] for one in report["attacks"]] == list(ATTACKS) and report["attacks"][1]["recall"] == 1
    assert report["found"] == {
        "bench": {"image": 2, "text": 0, "embedding": 0},
        "quiz": {"image": 0, "text": 1, "embedding": 0},
    }
    page = (tmp_path / "scores/contaminated/report.html").read_text()
    assert "JPEG 30" in page and "bench" in page and "<td>corrupt_image</td><td>1</td><td>row 1: " in page

    command = ["filter", str(tmp_path / "scores"), "--keep", "not contaminated()", "--threads", "1"]
    assert main([*command, "--output", str(tmp_path / "subset.npy")]) == 0
    assert [int(low) for _, low in read_uids(tmp_path / "subset.npy")] == [3]
    decisions = pq.read_table(tmp_path / "subset_report/decisions.parquet").to_pylist()
    reasons = {row["key"]: row["reason"] for row in decisions}
    assert reasons["copy"].startswith("not contaminated.image >= 0.85: ") and "bench, 08.png" in reasons["copy"]
    assert reasons["text"] == "not contaminated.text >= 0.5: 1 (quiz, row 0, distance 0.000)"
    assert "no score (corrupt_image)" in reasons["broken"]


def test_what_cannot_be_compared_with_is_one_line(evaluation_folder, write_pool, other_pictures, tmp_path, capsys):
    pool = write_pool({"a": (other_pictures[0], "a cat")})
    pq.write_table(pa.table({"number": [1]}), tmp_path / "numbers.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for against, message in (
        (["no/such/folder"], "--against no/such/folder: no such file or folder"),
        ([tmp_path / "numbers.parquet"], "no column of pictures and none of question"),
        ([tmp_path / "empty"], "no picture, table or tar in this folder"),
        ([tmp_path / "notes.txt"], "a set is a folder, .tar, .parquet or .arrow, or a task"),
        (["x="], "give the set a name without a comma and a path, as NAME=PATH"),
        ([f"={evaluation_folder}"], "give the set a name without a comma and a path, as NAME=PATH"),
        ([f"a, b={evaluation_folder}"], "give the set a name without a comma and a path, as NAME=PATH"),
        ([evaluation_folder, f"bench={tmp_path}/numbers.parquet"], "two sets are called bench"),
    ):
        assert run(pool, tmp_path / "scores", *against) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert run(pool, tmp_path / "scores", evaluation_folder, self_test=0) == 0
    assert run(pool, tmp_path / "scores", evaluation_folder, self_test=0) == 0  # a rerun finds all done
    assert "1 done before" in capsys.readouterr().out
    assert run(pool, tmp_path / "scores", f"other={evaluation_folder}") == 2
    assert "made from other sets" in capsys.readouterr().err


def test_what_another_algorithm_has_found_does_not_count(
    evaluation_folder, write_pool, other_pictures, tmp_path, capsys, monkeypatch
):
    pool, scores = write_pool({"a": (other_pictures[0], "a cat")}), tmp_path / "scores"
    with monkeypatch.context() as patch:
        for module in (index, step):
            patch.setattr(module, "ALGORITHM", "hashes")
        assert run(pool, scores, evaluation_folder, self_test=0) == 0
    assert run(pool, scores, evaluation_folder, self_test=0) == 2
    assert "against: made by hashes, now crops-" in capsys.readouterr().err
    shutil.rmtree(scores / "contaminated/against")
    assert run(pool, scores, evaluation_folder, self_test=0) == 2
    told = capsys.readouterr().err
    assert "made with the algorithm hashes, now crops-" in told and "; choose another --output, or delete" in told


@pytest.mark.slow  # imports lmms-eval
def test_a_task_of_lmms_eval_is_a_set(tmp_path, monkeypatch, write_pool, other_pictures):
    from tests.evaluation.easyvqa import write_tasks

    folder = tmp_path / "tasks"
    write_tasks(folder, 6)
    monkeypatch.setattr(sets, "make_task_manager", lambda names: harness.make_task_manager(names, [folder]))
    (entry, *others) = sets.read_set(sets.EvaluationSet("easy", (), "easyvqa_gen"))
    assert len(others) == 5 and entry.name == "document 0" and len(entry.images) == 1
    assert entry.texts[1].startswith(entry.texts[0])
    pool = write_pool({"same": (entry.images[0].resize((200, 200)), "x"), "other": (other_pictures[0], "y")})
    assert run(pool, tmp_path / "scores", "easyvqa_gen") == 0
    rows = pq.read_table(tmp_path / "scores/contaminated/00000.parquet").to_pylist()
    found = {row["key"]: row for row in rows if row["scorer"].endswith("image")}
    # One shape on a plain ground is told from nothing: such pictures of a set are left out, and counted.
    made = json.loads((tmp_path / "scores/contaminated/against/index.json").read_text())["contents"]["easyvqa_gen"]
    left_out = made["skipped"].get("plain_image", 0)
    assert left_out and made["pictures"] + left_out == 6 and found["other"]["value"] < 0.85
    assert found["same"]["value"] == 0
    with pytest.raises(ValueError, match="--against no_such_task: no such file or folder, and no task"):
        list(sets.read_set(sets.EvaluationSet("x", (), "no_such_task")))


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_bytes(evaluation_folder, other_pictures, write_pool, tmp_path, kills):
    for tar in range(3):
        pool = write_pool({f"{tar}{n}": (other_pictures[n], f"{tar} {n}") for n in range(2)}, name=f"{tar:05d}.tar")
    (tmp_path / "runs").mkdir()
    command = ["decontaminate", str(pool), "--against", str(evaluation_folder), "--self-test", "1"]
    command += ["--num-workers", "1", "--output", OUTPUT]
    preload = ["open_qwen2vl.decontamination.pool", "faiss"]
    check_killed_step(command, tmp_path / "runs", kills=kills, preload=preload)


@pytest.mark.slow
def test_pool_sets_and_scores_in_a_bucket(
    memory, evaluation_folder, evaluation_pictures, other_pictures, table, write_pool, tmp_path, capsys
):
    pool = write_pool({"copy": (evaluation_pictures[8], "a cat"), "text": (other_pictures[0], f"{QUESTION}? Seven.")})
    tars = [pool] if pool.is_file() else sorted(pool.glob("*.tar"))
    for path, name in [*((tar, f"pool/{tar.name}") for tar in tars), (table, "quiz.parquet"),
                       *((picture, f"bench/{picture.name}") for picture in evaluation_folder.iterdir())]:  # fmt: skip
        (place(memory) / name).write_bytes(path.read_bytes())
    assert run(pool, tmp_path / "scores", evaluation_folder, f"quiz={table}") == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("shards")]
    for done in ("1", "0 (1 done before)"):
        assert run(f"{memory}/pool", f"{memory}/scores", f"{memory}/bench", f"quiz={memory}/quiz.parquet") == 0
        there = capsys.readouterr().out.splitlines()
        assert f"shards     {done}" in there
        if done == "1":
            assert [line for line in there if not line.startswith("shards")] == shown
    name = f"scores/contaminated/{tars[0].stem}.parquet"
    here, there = pq.read_table(tmp_path / name), pq.read_table(pa.BufferReader((place(memory) / name).read_bytes()))
    assert here.equals(there)
    (place(memory) / "bench" / "00.png").unlink()
    assert run(f"{memory}/pool", f"{memory}/scores", f"{memory}/bench", f"quiz={memory}/quiz.parquet") == 2
    assert "made with" in capsys.readouterr().err
