"""Pools of conversations, and evaluation pictures that are found by the embeddings that a scorer has kept."""

import json
import shutil
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from open_qwen2vl.cli import main
from open_qwen2vl.data.scoring.clip import ClipScorer
from open_qwen2vl.data.storage.uids import read_uids
from open_qwen2vl.decontamination import embeddings
from open_qwen2vl.decontamination.attacks import ATTACKS
from open_qwen2vl.decontamination.embeddings import KeptEmbeddings
from open_qwen2vl.decontamination.sets import find_sets
from tests.data.conftest import encode_image
from tests.data.scoring.conftest import save_tiny_clip

QUESTION = "how many of the people who are standing beside the river wear a hat that is"


def rows(path) -> dict[tuple[str, str], dict]:
    """Of a score file, by key and value."""
    return {(row["key"], row["scorer"].split(".")[1]): row for row in pq.read_table(path).to_pylist()}


def run(pool, output, *against, images: tuple = (), **options) -> int:
    flags = [part for image in images for part in ("--images", str(image))]
    options = {"self_test": 0, "num_workers": 1, **options}
    flags += [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return main(["decontaminate", str(pool), "--against", *map(str, against), "--output", str(output), *flags])


@pytest.fixture
def chats(tmp_path, evaluation_pictures, other_pictures):
    """LLaVA's json: a picture that is one, a crop among several, question with answer, neither, a lost picture."""
    (tmp_path / "images").mkdir()
    pictures = {"copy": evaluation_pictures[8], "crop": evaluation_pictures[2].crop((10, 20, 150, 150)),
                "other": other_pictures[0]}  # fmt: skip
    for name, picture in pictures.items():
        picture.save(tmp_path / f"images/{name}.jpg", quality=85)

    def record(name: str, images: list[str], asked: str, answer: str) -> dict:
        said = [{"from": "human", "value": "<image>\n" * len(images) + asked}, {"from": "gpt", "value": answer}]
        return {"id": name, **({"image": images} if images else {}), "conversations": said}

    (tmp_path / "chats.json").write_text(json.dumps([
        record("one", ["copy.jpg"], "What is it?", "A cat."),
        record("several", ["other.jpg", "crop.jpg"], "Which is a roof?", "The second."),
        record("words", [], f"{QUESTION}", "blue"),
        record("clean", ["other.jpg"], "What is it?", "A temple."),
        record("lost", ["gone.jpg"], "What is it?", "Nothing."),
    ]))  # fmt: skip
    return tmp_path / "chats.json"


def test_pictures_and_words_of_conversations(chats, evaluation_folder, evaluation_pictures, tmp_path):
    pq.write_table(pa.table({"question": [QUESTION], "answer": ["blue"]}), tmp_path / "quiz.parquet")
    sets = (evaluation_folder, f"quiz={tmp_path}/quiz.parquet")
    assert run(chats, tmp_path / "scores", *sets, images=[tmp_path / "images"]) == 0
    # Nothing about embeddings where nobody asked for them.
    assert "embeddings" not in (tmp_path / "scores/contaminated/report.html").read_text()
    found = rows(tmp_path / "scores/contaminated/chats-00000.parquet")
    assert found["one", "image"]["detail"].startswith("bench, 08.png, distance 0.0")
    assert found["several", "image"]["value"] > 0.85
    assert found["several", "image"]["detail"].startswith("bench, 02.png")
    assert (found["words", "text"]["value"], found["words", "image"]["value"]) == (1, 0)
    assert found["clean", "image"]["value"] < 0.85 and found["clean", "text"]["value"] == 0
    assert found["lost", "image"]["reason"] == found["lost", "text"]["reason"] == "missing_image"

    command = ["filter", str(tmp_path / "scores"), "--keep", "not contaminated()", "--threads", "1"]
    assert main([*command, "--output", str(tmp_path / "subset.npy")]) == 0
    decisions = pq.read_table(tmp_path / "subset_report/decisions.parquet").to_pylist()
    reasons = {row["key"]: row["reason"] for row in decisions}
    assert "bench, 08.png" in reasons["one"] and "quiz, row 0" in reasons["words"]
    assert len(read_uids(tmp_path / "subset.npy")) == 1 and "(" not in reasons["clean"]

    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    images = [[{"bytes": encode_image(evaluation_pictures[8], "JPEG", quality=85), "path": None}]]
    pq.write_table(pa.table({"messages": [messages], "images": images}), tmp_path / "rows.parquet")
    assert run(tmp_path / "rows.parquet", tmp_path / "scores", evaluation_folder) == 2  # other sets
    assert run(tmp_path / "rows.parquet", tmp_path / "others", evaluation_folder) == 0
    ((_, row),) = [
        item for item in rows(tmp_path / "others/contaminated/rows-00000.parquet").items() if "image" in item[0]
    ]
    assert row["detail"].startswith("bench, 08.png")


def test_pictures_are_found_by_kept_embeddings(
    evaluation_folder, evaluation_pictures, other_pictures, write_pool, tmp_path, tmp_path_factory, capsys
):
    clip = save_tiny_clip(tmp_path_factory.mktemp("clip"))
    pool = write_pool({"copy": (evaluation_pictures[8], "a cat"), "other": (other_pictures[0], "a temple"),
                       "broken": (b"no image", "a dog")})  # fmt: skip

    def score(model, name: str) -> None:
        command = ["score", str(pool), "--scorer", "clip", "--model", f"local-dir:{model}", "--device", "cpu"]
        command += ["--num-workers", "1", "--keep-embeddings", "--name", name, "--output", str(tmp_path / "scores")]
        assert main(command) == 0

    score(clip, "clip")
    kept = tmp_path / "scores/clip"
    assert run(pool, tmp_path / "scores", evaluation_folder, embeddings=kept, self_test=2) == 0
    shown = capsys.readouterr().out
    assert "embedded   the same, by a cosine of 0.95:" in shown and "pictures by embeddings" in shown
    assert "found by embeddings" in (tmp_path / "scores/contaminated/report.html").read_text()
    report = json.loads((tmp_path / "scores/contaminated/report.json").read_text())
    assert [one["kind"] for one in report["embedded"]] == list(ATTACKS)
    assert report["embedded"][0]["recall"] == 1
    found = rows(tmp_path / "scores/contaminated/00000.parquet")
    assert found["copy", "embedding"]["detail"].startswith("bench, 08.png, distance 0.0")
    assert found["broken", "embedding"]["value"] is None
    scorer = ClipScorer(f"local-dir:{clip}", device="cpu")
    against = scorer.embed_images([Image.open(path) for path in sorted(evaluation_folder.iterdir())])
    cosines = against @ scorer.embed_images(other_pictures[:1])[0]
    # The pool has that picture as a JPEG, and 16 bits of its embedding.
    assert found["other", "embedding"]["value"] == pytest.approx(float(np.max(cosines)), abs=0.02)

    assert run(pool, tmp_path / "scores", evaluation_folder, embeddings=kept) == 0  # a rerun finds all done
    assert "1 done before" in capsys.readouterr().out
    another = save_tiny_clip(tmp_path_factory.mktemp("another"))
    score(another, "another")
    for scores, message in (
        (tmp_path / "scores/another", f", now local-dir:{another} ("),
        (tmp_path / "scores", "(16 numbers), others are of local-dir:"),
        (tmp_path / "scores/contaminated", "--embeddings needs embeddings: run open-qwen2vl score with"),
    ):
        assert run(pool, tmp_path / "scores", evaluation_folder, embeddings=scores) == 2
        assert message in capsys.readouterr().err
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(pool, elsewhere)
    (elsewhere / "00000.tar").touch()
    assert run(elsewhere, tmp_path / "again", evaluation_folder, embeddings=kept) == 2
    assert f"is of another shard than {elsewhere}/00000.tar" in capsys.readouterr().err

    (clip / "open_clip_model.safetensors").touch()
    assert run(pool, tmp_path / "again", evaluation_folder, embeddings=kept) == 2
    assert "is not there, or it has changed since it scored the pool" in capsys.readouterr().err
    score(clip, "rescored")
    assert run(pool, tmp_path / "scores", evaluation_folder, embeddings=tmp_path / "scores/rescored") == 2
    assert f"made with --embeddings local-dir:{clip} (" in capsys.readouterr().err
    write_pool({"new": (other_pictures[1], "a roof")}, name="00001.tar")
    assert run(pool, tmp_path / "again", evaluation_folder, embeddings=tmp_path / "scores/another") == 2
    assert "00001.tar: score it first" in capsys.readouterr().err


def test_what_has_no_embedding(chats, evaluation_folder, tmp_path, tmp_path_factory, capsys):
    """Words alone are like no picture; of several pictures a scorer keeps nothing."""
    clip = save_tiny_clip(tmp_path_factory.mktemp("clip"))
    command = ["score", str(chats), "--images", str(tmp_path / "images"), "--scorer", "clip", "--device", "cpu"]
    command += ["--model", f"local-dir:{clip}", "--keep-embeddings", "--num-workers", "1"]
    for name in ("clip", "twice"):
        assert main([*command, "--name", name, "--output", str(tmp_path / "scores")]) == 0
    options = {"images": [tmp_path / "images"], "embeddings": tmp_path / "scores/clip"}
    assert run(chats, tmp_path / "scores", evaluation_folder, **options) == 0
    found = rows(tmp_path / "scores/contaminated/chats-00000.parquet")
    assert found["words", "embedding"]["value"] == 0 and found["one", "embedding"]["value"] > 0.99
    assert (found["several", "embedding"]["value"], found["several", "embedding"]["reason"]) == (None, "no_embedding")
    capsys.readouterr()
    several = [flag for name in ("clip", "twice") for flag in ("--embeddings", str(tmp_path / "scores" / name))]
    flags = ["--images", str(tmp_path / "images"), "--output", str(tmp_path / "again"), "--num-workers", "1"]
    assert main(["decontaminate", str(chats), "--against", str(evaluation_folder), *several, *flags]) == 2
    assert "are both of a shard chats-00000" in capsys.readouterr().err


def test_pictures_are_embedded_without_being_held(tmp_path, evaluation_folder, monkeypatch):
    monkeypatch.setattr(embeddings, "embeddings_of", lambda file: ("fake", 4))
    seen, held = [], []

    class Embedder:
        def embed_images(self, images):
            vectors = []
            for image in images:
                seen.append(weakref.ref(image))
                held.append(sum(one() is not None for one in seen))
                vectors.append(np.eye(4, dtype=np.float32)[len(held) % 4])
            return np.stack(vectors)

    kept = KeptEmbeddings({"0": None}, "fake", None, "fake")
    embeddings.embed_sets(tmp_path / "embedded", find_sets([str(evaluation_folder)]), kept, Embedder())
    assert len(held) == len(list(evaluation_folder.iterdir())) and max(held) <= 3
