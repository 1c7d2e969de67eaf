"""Conversations as a pool: what each scorer says of them, which are the same, and that pack takes those that stay."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from open_qwen2vl.cli import main
from open_qwen2vl.data.packing.plan_files import read_plan
from open_qwen2vl.data.scoring import ScoreOptions, score_pool
from open_qwen2vl.data.scoring.embeddings import read_embeddings
from open_qwen2vl.data.storage.uids import format_uid, read_uids
from tests.data.killed_step import OUTPUT, check_killed_step
from tests.data.scoring.conftest import rows


def chat(name: str, image: str | None, *turns: str) -> dict:
    """A record of LLaVA's form."""
    speakers = ("human", "gpt")
    spoken = [{"from": speakers[number % 2], "value": text} for number, text in enumerate(turns)]
    if image:
        spoken[0]["value"] = "<image>\n" + spoken[0]["value"]
    return {"id": name, **({"image": image} if image else {}), "conversations": spoken}


RECORDS = [
    chat("two", "a.png", "What is it?", "A picture of the sea.", "And above?", "Only the blue sky, without a cloud."),
    chat("short", "b.png", "What is it?", "Sea"),
    chat("again", "a.png", " what  IS it?", "The sea, seen from above, with two small boats on it."),
    chat("near", "near.jpg", "What is it?", "The sea, as it looks in the morning light."),
    chat("text", None, "Who wrote Emma?", "Jane Austen wrote Emma."),
    chat("german", "b.png", "Was ist auf dem Bild zu sehen?", "Ein großer Baum steht neben einem kleinen Haus."),
    chat("gone", "gone.png", "What is it?", "Nothing."),
    {"id": "silent", "conversations": [{"from": "human", "value": "Hello?"}]},
]


@pytest.fixture
def chats(tmp_path, photo):
    """A json of conversations and a folder of their images."""
    (tmp_path / "images").mkdir()
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / f"images/{name}.png").write_bytes(photo(seed, 96, 64))
    Image.open(tmp_path / "images/b.png").convert("RGB").save(tmp_path / "images/near.jpg", quality=70)
    (tmp_path / "chats.json").write_text(json.dumps(RECORDS))
    return tmp_path


def score(folder, *options: str) -> str:
    """Scores by one scorer; their folder."""
    command = ["score", str(folder / "chats.json"), "--images", str(folder / "images"), "--num-workers", "1"]
    assert main([*command, "--output", str(folder / "scores"), "--scorer", *options]) == 0
    return str(folder / "scores")


def kept(folder, expression: str, *options: str) -> set[str]:
    """The ids of the conversations that a filter keeps."""
    command = ["filter", str(folder / "scores"), "--keep", expression, "--output", str(folder / "kept.npy"), *options]
    assert main(command) == 0
    uids = {format_uid(*uid) for uid in read_uids(folder / "kept.npy").tolist()}
    files = (folder / "scores").glob("*/*.parquet")
    return {row["key"] for file in files for row in rows(file) if row["uid"] in uids}


def test_numbers_of_a_conversation(chats):
    score(chats, "basic")
    found = {(row["key"], row["scorer"]): row for row in rows(chats / "scores/basic/chats-00000.parquet")}
    value = lambda key, part: found[key, f"basic.{part}"]["value"]  # noqa: E731
    names = ("turns", "words", "shortest", "longest", "images", "smaller_side", "aspect_ratio")
    assert [value("two", part) for part in names] == [2, 12, 5, 7, 1, 64, 1.5]
    assert value("two", "english") > 0.5 and value("german", "english") == 0
    assert value("text", "images") == 0 and found["text", "basic.smaller_side"]["reason"] == "no_image"
    assert found["gone", "basic.words"]["reason"] == "missing_image"
    assert found["silent", "basic.words"]["reason"] == "no_assistant_turn"
    assert kept(chats, "basic.words >= 4 and basic.english > 0") == {"two", "again", "near", "text"}


def test_pack_takes_what_the_filter_keeps(chats, backbones, capsys):
    score(chats, "basic")
    kept(chats, "basic.words >= 4 and basic.english > 0")
    command = ["pack", str(chats / "chats.json"), "--images", str(chats / "images"), "--tokenizer", backbones["text"]]
    command += ["--image-seq-length", "4", "--num-workers", "1", "--output", str(chats / "packs")]
    assert main([*command, "--subset", str(chats / "kept.npy")]) == 0
    out = capsys.readouterr().out
    assert "packed     4" in out and "not chosen 4 samples that --subset does not name" in out
    plan = read_plan(chats / "packs")
    assert plan["totals"]["documents"] == 4 and plan["totals"]["not_chosen"] == 4 and not plan["totals"]["skipped"]
    assert main(command) == 2
    assert "other or changed uids of --subset" in capsys.readouterr().err
    kept(chats, "basic.turns >= 2")
    assert main([*command, "--subset", str(chats / "kept.npy")]) == 2
    (chats / "other.json").write_text(json.dumps(RECORDS[1:]))
    elsewhere = [
        "pack",
        str(chats / "other.json"),
        *command[2:-1],
        str(chats / "p"),
        "--subset",
        str(chats / "kept.npy"),
    ]
    assert main(elsewhere) == 2
    assert "--subset: it has none of the 7 samples" in capsys.readouterr().err
    assert not (chats / "p").exists()


def test_the_same_picture_and_question(chats):
    score(chats, "image-hash")
    score(chats, "basic")
    everything = {"two", "short", "again", "near", "text", "german"}
    # `two` asks more than `again` about its picture; `near` is what `short` asks about, as a JPEG.
    assert kept(chats, "basic.turns >= 1", "--deduplicate", "exact") == everything
    assert len(kept(chats, "basic.turns >= 1", "--deduplicate", "near") & {"short", "near"}) == 1
    assert len(kept(chats, "basic.turns >= 1", "--deduplicate", "near")) == 5
    RECORDS_AGAIN = [*RECORDS, chat("copy", "a.png", "What is IT?", "A lake.")]
    (chats / "chats.json").write_text(json.dumps(RECORDS_AGAIN))
    for name in ("image-hash", "basic"):
        for file in (chats / "scores" / name).iterdir():
            file.unlink()
        score(chats, name)
    assert len(kept(chats, "basic.turns >= 1", "--deduplicate", "exact") & {"again", "copy"}) == 1


def test_clip_compares_the_picture_with_what_is_said(chats, clip_folder):
    from open_qwen2vl.data.scoring.clip import ClipScorer
    from open_qwen2vl.data.scoring.pairs import RawPair

    score(chats, "clip", "--model", f"local-dir:{clip_folder}", "--keep-embeddings", "--device", "cpu")
    path = chats / "scores/clip/chats-00000.parquet"
    found = {row["key"]: row for row in rows(path)}
    scorer = ClipScorer(f"local-dir:{clip_folder}", device="cpu", keep_embeddings=True)
    image = (chats / "images/b.png").read_bytes()
    pairs = [RawPair("", "", image, text) for text in ("What is it? Sea", "What is it?")]
    expected = scorer.score(scorer.collate([scorer.prepare(pair) for pair in pairs]))
    assert found["short"]["value"] == pytest.approx(expected[0, 0], abs=1e-5)
    assert found["short"]["detail"] == "What is it?" and found["text"]["reason"] == "missing_image"
    ((uids, vectors),) = read_embeddings(path.parent / "embeddings" / path.name, True)
    own = vectors[uids.index(found["short"]["uid"])] * 2**0.5
    np.testing.assert_allclose(own, expected[1, 1:], atol=2e-3)
    assert main(["filter", str(chats / "scores"), "--keep", "clip > -1", "--deduplicate", "semantic",
                 "--output", str(chats / "x.npy")]) == 2  # fmt: skip
    assert {"short", "again"} & kept(chats, "clip > -1", "--deduplicate", "semantic", "--joint")


def test_rows_of_messages_with_their_images(tmp_path, photo, capsys):
    spoken = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "The sea."},
    ]
    images = [[{"bytes": photo(i), "path": None}] for i in range(3)] + [[{"bytes": photo(0)[:99], "path": None}]]
    pq.write_table(pa.table({"messages": [spoken] * 4, "images": images}), tmp_path / "t.parquet")
    for scorer in ("image-hash", "concepts"):
        score_pool(ScoreOptions((str(tmp_path / "t.parquet"),), str(tmp_path / "s"), scorer, num_workers=1))
    found = rows(tmp_path / "s/image-hash/t-00000.parquet")
    assert len({row["bytes_hash"] for row in found}) == 4 and found[3]["reason"] == "corrupt_image"
    assert main(["score", str(tmp_path / "t.parquet"), "--scorer", "basic", "--output", str(tmp_path / "s")]) == 0
    pq.write_table(pa.table({"text": ["only a text"]}), tmp_path / "texts.parquet")
    assert main(["score", str(tmp_path / "texts.parquet"), "--scorer", "basic", "--output", str(tmp_path / "s")]) == 2
    assert "score reads tars of captions, or conversations" in capsys.readouterr().err


@pytest.mark.slow
def test_kills_with_an_archive_of_images(tmp_path, photo, make_tar):
    make_tar(tmp_path / "images.tar", [(f"{i}.png", photo(i)) for i in range(20)])
    records = [chat(str(i), f"{i % 20}.png", "What is it?", f"The sea {i}.") for i in range(400)]
    (tmp_path / "chats.json").write_text(json.dumps(records))
    (tmp_path / "runs").mkdir()
    command = ["score", str(tmp_path / "chats.json"), "--images", str(tmp_path / "images.tar"), "--num-workers", "1"]
    check_killed_step([*command, "--scorer", "image-hash", "--output", OUTPUT], tmp_path / "runs", kills=20)


@pytest.mark.slow
def test_a_model_is_asked_about_a_conversation(chats, tmp_path, backbones, processor):
    import torch

    from open_qwen2vl import OpenQwen2VLForConditionalGeneration
    from open_qwen2vl.data.scoring.mlm_filter import MlmFilterScorer
    from open_qwen2vl.data.scoring.pairs import Pair

    torch.manual_seed(0)
    model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**backbones, image_seq_length=4)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    score(chats, "mlm-filter", "--model", str(tmp_path / "model"), "--device", "cpu", "--metric", "answer_correctness")
    found = {row["key"]: row for row in rows(chats / "scores/mlm-filter/chats-00000.parquet")}
    assert {row["scorer"] for row in found.values()} == {"mlm-filter.answer_correctness"}
    assert found["text"]["reason"] == "missing_image"
    prompts = tmp_path / "prompts.yaml"
    scorer = MlmFilterScorer(str(tmp_path / "model"), ["answer_correctness"], device="cpu", about="{conversation}")
    picture = Image.open(io.BytesIO((chats / "images/b.png").read_bytes())).convert("RGB")
    batch = scorer.collate([Pair("", "", picture, "User: What is it?\nAssistant: Sea")])
    assert found["short"]["value"] == pytest.approx(scorer.score(batch)[0, 0], abs=1e-3)
    prompts.write_text("metrics:\n  one: '{caption}'\n")
    with pytest.raises(ValueError, match="must be a text with {conversation} in it"):
        MlmFilterScorer(str(tmp_path / "model"), prompts=str(prompts), device="cpu", about="{conversation}")
