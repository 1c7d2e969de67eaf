"""Captions by a real model and by a server that answers, refuses and dies; kills, reruns, and what comes after."""

import hashlib
import io
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from open_qwen2vl.cli import main
from open_qwen2vl.data.recaptioning import RecaptionOptions, recaption_pool
from open_qwen2vl.data.recaptioning.journal import Journal, Written
from open_qwen2vl.data.scoring import read_score_metadata
from tests.chat_server import chat_server, completion
from tests.data.killed_step import OUTPUT, check_killed_step, read_folder
from tests.data.scoring.conftest import rows

COLORS = ("red", "green", "blue", "black", "white")


def members_of(sample, photo, tar: int, count: int = 8):
    members = []
    for i in range(count):
        members += sample(f"{i:03}", f"old caption {tar} {i}", photo(100 * tar + i), f"{100 * tar + i:032x}")
    return members


@pytest.fixture
def pictures(tmp_path, make_tar, sample, photo, encode):
    """Two tars of eight pairs; the second has a picture without a caption and two that cannot be read."""
    folder = tmp_path / "pool"
    folder.mkdir()
    make_tar(folder / "a.tar", members_of(sample, photo, 0))
    bad = [("x.png", photo(200)), *sample("y", "broken", photo(201)[:200]), *sample("z", "text alone", b"")]
    narrow = sample("w", "narrow", encode(Image.new("RGB", (600, 2))))
    make_tar(folder / "b.tar", [*members_of(sample, photo, 1)[:6], *bad, *narrow, *members_of(sample, photo, 1)[6:]])
    return folder


def said_about(request) -> str:
    """A caption that follows from the picture alone."""
    url = request["messages"][0]["content"][0]["image_url"]["url"]
    number = int(hashlib.sha256(url.encode()).hexdigest()[:8], 16)
    return f"A {COLORS[number % 5]} square number {number} lies here."


@pytest.fixture(scope="module")
def model(backbones, processor, tmp_path_factory) -> str:
    """A tiny model of random weights, of whose tokens some end an answer."""
    from open_qwen2vl import OpenQwen2VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    network = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**backbones, image_seq_length=4)
    network.generation_config = GenerationConfig(
        eos_token_id=list(range(0, len(processor.tokenizer), 7)), pad_token_id=0
    )
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_a_model_writes_what_it_writes_of_each_picture_alone(pictures, model, photo, tmp_path, capsys):
    command = ["recaption", str(pictures), "--output", str(tmp_path / "out"), "--model", model, "--device", "cpu"]
    command += ["--prompt", "Say it better: {caption}", "--max-new-tokens", "6", "--min-words", "1"]
    assert main([*command, "--batch-size", "3", "--num-workers", "2"]) == 0
    assert "captioning" not in capsys.readouterr().out
    found = rows(tmp_path / "out/recaption/a.parquet")
    network, processor = (
        AutoModelForImageTextToText.from_pretrained(model).eval(),
        AutoProcessor.from_pretrained(model),
    )
    for i in (0, 5):
        picture = {"type": "image", "image": Image.open(io.BytesIO(photo(i))).convert("RGB")}
        text = {"type": "text", "text": f"Say it better: old caption 0 {i}"}
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [picture, text]}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        output = network.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        said = processor.tokenizer.decode(output, skip_special_tokens=True)
        assert " ".join(said.split()).strip('"') == found[i]["detail"].strip('"')
    reasons = {row["key"]: row["reason"] for row in rows(tmp_path / "out/recaption/b.parquet")}
    assert reasons["x"] == "missing_caption" and reasons["y"] == "corrupt_image" and reasons["w"] == "image_too_large"
    assert reasons["z"] == "empty_image"
    made = read_score_metadata(tmp_path / "out/recaption/a.parquet")
    assert made["recipe"]["options"]["prompt"] == "Say it better: {caption}" and made["made_with"]["precision"]
    page = (tmp_path / "out/recaption/report.html").read_text()
    assert "Say it better: {caption}" in page and "data:image/jpeg;base64" in page and "before: old caption" in page
    whole = read_folder(tmp_path / "out")
    resume_in_the_middle(tmp_path / "out/recaption", made["recipe"], found)
    assert main([*command, "--batch-size", "3", "--num-workers", "2"]) == 0
    assert read_folder(tmp_path / "out") == whole
    assert main([*command, "--max-words", "9"]) == 2
    assert "made with --max-words 250, now 9" in capsys.readouterr().err


def resume_in_the_middle(folder, recipe, found):
    """As a killed run leaves it: the first batch in the journal, and half a line behind it."""
    (folder / "a.parquet").unlink()
    journal = Journal(folder / "a.parquet", recipe)
    journal.add(
        [Written(row["key"], row["uid"], row["detail"], row["reason"] != "cut_off", None) for row in found[:3]]
    )
    journal.close()
    with open(folder / ".unfinished/a.jsonl", "ab") as file:
        file.write(b'[["003", "0')


def test_an_endpoint_answers_refuses_and_dies(pictures, photo, tmp_path, capsys, caplog):
    with chat_server(lambda request: (200, said_about(request))) as server:
        command = ["recaption", str(pictures), "--output", str(tmp_path / "out"), "--model", "big", "--name", "new"]
        command += ["--endpoint", server.url, "--concurrency", "3"]
        answers = iter([(200, "I'm sorry, I can't."), (200, completion("a red", "length")), (400, {"error": "no"})])
        server.reply = lambda request: next(answers, None) or (200, said_about(request))
        assert main([*command, "--prompt", "What is it?"]) == 0
        report = capsys.readouterr().out
        for reason in ("refusal 1", "cut_off 1", "refused_request 1", "corrupt_image 1", "image_too_large 1"):
            assert reason in report
        assert "missing_caption" not in report  # nor is one needed
        request = server.requests[-1]
        assert request["model"] == "big" and request["temperature"] == 0 and request["max_tokens"] == 256
        assert request["messages"][0]["content"][1] == {"type": "text", "text": "What is it?"}
        assert {row["scorer"] for row in rows(tmp_path / "out/new/a.parquet")} == {"new"}
        shutil.rmtree(tmp_path / "out")
        # It dies behind the tenth answer, and comes back: nobody is asked twice but what was under way.
        server.requests.clear()
        server.reply = lambda request: (200, said_about(request)) if len(server.requests) < 10 else (401, {})
        assert main(command) == 2
        assert server.url in capsys.readouterr().err
        journals = list((tmp_path / "out/new/.unfinished").iterdir())
        assert len(journals) == 1
        server.reply = lambda request: (200, said_about(request))
        server.requests.clear()
        assert main(command) == 0
        assert len(server.requests) < 17
        whole = read_folder(tmp_path / "out")
        assert not any(name.startswith("new/.unfinished") for name in whole)
        shutil.rmtree(tmp_path / "out")
        assert main(command) == 0
        assert read_folder(tmp_path / "out") == whole


@pytest.fixture
def kill(tmp_path, make_tar, sample, photo):
    def check(kills: int, **more):
        (tmp_path / "many").mkdir()
        for tar in range(2):
            make_tar(tmp_path / f"many/{tar}.tar", members_of(sample, photo, tar, 20))
        (tmp_path / "runs").mkdir()
        command = ["recaption", str(tmp_path / "many"), "--output", OUTPUT]
        command += [text for name, value in more.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        check_killed_step(command, tmp_path / "runs", kills=kills)

    return check


def test_kills(kill):
    with chat_server(lambda request: (200, said_about(request))) as server:
        kill(3, model="m", endpoint=server.url, concurrency=2)


@pytest.mark.slow
def test_many_kills_of_an_endpoint(kill):
    with chat_server(lambda request: (200, said_about(request))) as server:
        kill(20, model="m", endpoint=server.url, concurrency=2)


@pytest.mark.slow
def test_many_kills_of_a_model(kill, model):
    kill(20, model=model, device="cpu", batch_size=4, num_workers=1, max_new_tokens=8, min_words=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-words", "9", "--max-words", "3"], "--max-words 3 is below --min-words 9"),
        (["--endpoint", "http://h/v1", "--batch-size", "3"], "--endpoint takes no --batch-size"),
        (["--endpoint", "http://h/v1", "--engine", "ray"], "--endpoint takes no --engine ray"),
        (["--endpoint", "h/v1"], "must begin with http"),
        (["--concurrency", "3"], "--concurrency is for --endpoint"),
        (["--prompt", " "], "--prompt: is empty"),
        (["--name", "a b"], "--name a b: a name has"),
        (["--device", "cpu"], "not an image-text-to-text model"),
    ],
)
def test_mistakes_end_in_one_line(pictures, tmp_path, capsys, arguments, message):
    command = ["recaption", str(pictures), "--output", str(tmp_path / "out"), "--model", str(tmp_path), *arguments]
    assert main(command) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]  # behind a bar, where it had begun


def test_a_journal_of_something_else_is_refused(tmp_path):
    Journal(tmp_path / "a.parquet", {"prompt": "one"}).close()
    with pytest.raises(ValueError, match="begun with other options"):
        Journal(tmp_path / "a.parquet", {"prompt": "two"})


def test_filter_and_reshard_take_the_captions(pictures, tmp_path, capsys):
    with chat_server(lambda request: (200, said_about(request))) as server:
        recaption_pool(RecaptionOptions((str(pictures),), str(tmp_path / "s"), "m", endpoint=server.url))
    assert main(["filter", str(tmp_path / "s"), "--keep", "recaption >= 3", "--output", str(tmp_path / "k.npy")]) == 0
    decided = pq.read_table(tmp_path / "k_report/decisions.parquet").to_pylist()
    assert any(": 7 (A " in row["reason"] for row in decided)
    command = ["reshard", str(pictures), "--subset", str(tmp_path / "k.npy"), "--captions", str(tmp_path / "s")]
    assert main([*command, "--output", str(tmp_path / "new"), "--caption-share", "0.5"]) == 0
    assert " new, " in capsys.readouterr().out
    assert main(["score", str(tmp_path / "new"), "--scorer", "basic", "--output", str(tmp_path / "t")]) == 0
    words = [row["value"] for row in rows(tmp_path / "t/basic/00000.parquet") if row["scorer"] == "basic.words"]
    assert len(words) == 17 and {4, 7} <= set(words)
