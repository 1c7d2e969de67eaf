"""A pre-trained language model in the pipeline: its conversion, what is held out, its figures, and the whole chain."""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from tests.documents import caption_document
from tests.fork_server import forked_programs

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "recipes" / "quickstart"), str(ROOT / "recipes" / "real_lm")]

import build_real_backbones  # noqa: E402
import build_real_data  # noqa: E402
import report_real_lm  # noqa: E402

SIZES = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 256}


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_is_a_qwen2_whose_biases_are_zero(tied, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, rms_norm_eps=1e-4, rope_theta=1e3, tie_word_embeddings=tied, initializer_range=0.3)
    llama = LlamaForCausalLM(config).eval()
    for name, weight in llama.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    qwen2 = build_real_backbones.as_qwen2(llama)
    ids = torch.randint(0, 100, (2, 40))
    with torch.inference_mode():
        assert torch.equal(qwen2(ids).logits, llama(ids).logits)
    qwen2.save_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(type(qwen2).from_pretrained(tmp_path).eval()(ids).logits, llama(ids).logits)


@pytest.mark.parametrize("option", [{"attention_bias": True}, {"head_dim": 16}])
def test_a_llama_that_is_no_qwen2_is_refused(option):
    with pytest.raises(ValueError, match="no place in Qwen2"):
        build_real_backbones.as_qwen2(LlamaForCausalLM(LlamaConfig(**SIZES, **option)))


def picture(shade: int, width: int = 96, height: int = 96) -> bytes:
    png = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).point(lambda level: (level + shade) % 256).save(png, "PNG")
    return png.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """`data/` as the quickstart leaves it, with three emoji in five tones, and `wheels/` with photographs."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("data", "wheels"):
        (folder / name).mkdir()
    Picture = build_real_data.Picture
    drawn = [Picture(f"1F44{n}-{tone}", f"{n} {tone}", picture(7 * n)) for n in range(3)
             for tone in ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")]  # fmt: skip
    held_out = [p for p in drawn if p.hexcode.endswith("1F3FD")]
    train = [p for p in drawn if p not in held_out] + [Picture("1F986", "duck", picture(99))]
    build_real_data.write_tar(folder / "data/held-out.tar", held_out)
    build_real_data.write_tar(folder / "data/train-00000.tar", train[::2])
    build_real_data.write_tar(folder / "data/train-00001.tar", train[1::2])
    with zipfile.ZipFile(folder / "wheels/scikit_image-0.whl", "w") as wheel:
        for number, name in enumerate(build_real_data.SKIMAGE):
            wheel.writestr(f"skimage/data/{name}", picture(number, 90, 60))
    return folder


def test_nothing_that_is_held_out_is_trained_on(sources, tmp_path):
    sides = {}
    for validation in (False, True):
        output = tmp_path / str(validation)
        build = build_real_data.build
        summary = build(sources / "data", sources / "wheels", output, limit=2, validation=validation)
        assert build(sources / "data", sources / "wheels", output, limit=2, validation=validation) == summary
        with pytest.raises(ValueError, match="was made with"):
            build(sources / "data", sources / "wheels", output, limit=3, validation=validation)
        for kind in ("emoji", "photos"):
            tars = [output / f"{kind}-{side}.tar" for side in ("train", "held-out")]
            sides[kind, validation] = [{p.hexcode for p in build_real_data.read_pictures([tar])} for tar in tars]
        lines = (output / "text-train.jsonl").read_text().splitlines()
        trained = {" ".join(part.split()) for line in lines for part in json.loads(line)["text"].split("\n\n")}
        asked = json.loads((output / "text-held-out.json").read_text())
        assert not trained & {" ".join(part.split()) for text in asked for part in text.split("\n\n")}
        assert len(trained) > 1000 and len(asked) > 10
    for kind in ("emoji", "photos"):
        (train, reported), (other_train, other) = sides[kind, False], sides[kind, True]
        assert reported and other and not train & reported and not other_train & other
        # A choice is made without a look at what is reported.
        assert not reported & (other_train | other) and other < train
    assert {key.split("-")[0] for key in sides["emoji", False][0] | sides["emoji", False][1]} < {
        "1F440", "1F441", "1F442"}  # fmt: skip


def test_tiles_show_every_place_once():
    found = build_real_data.tiles("a.png", "slope", picture(0, 90, 60))
    assert len(found) == 4 * 6 and len({tile.hexcode for tile in found}) == 24
    levels = [np.asarray(Image.open(io.BytesIO(tile.png))).mean() for tile in found]
    assert levels[0] < levels[6] < levels[12] < levels[18]  # the gradient runs down


def test_losses_are_those_of_the_training_document(tiny_model, processor):
    captions = ["a photo of a cat on a mat", "two dogs"]
    examples = [
        report_real_lm.Example(picture(shade), caption) for shade, caption in zip((0, 90), captions, strict=True)
    ]
    nats, tokens = report_real_lm.caption_losses(tiny_model, processor, examples, batch_size=2)
    for example, found, count in zip(examples, nats, tokens, strict=True):
        ids, _ = caption_document(example.caption, processor.tokenizer, 4)
        ids = torch.as_tensor(ids)[None]
        images = processor.image_processor(Image.open(io.BytesIO(example.png)).convert("RGB"), return_tensors="pt")
        with torch.inference_mode():
            logits = tiny_model(input_ids=ids, **images).logits[0].log_softmax(-1)
        assert count == ids.shape[1] - 6  # of the document less <s>, four placeholders and the newline
        expected = -logits[-count - 1 : -1].gather(1, ids[0, -count:, None]).sum()
        assert found == pytest.approx(float(expected), rel=1e-4)
    blanked, _ = report_real_lm.caption_losses(tiny_model, processor, examples, batch_size=1, blanked=True)
    assert (blanked != nats).all()
    losses = report_real_lm.text_losses(
        tiny_model, processor.tokenizer, ["a photo of a cat on a mat"] * 200, windows=2
    )
    assert losses.shape == (2,) and (losses > 0).all()
    assert report_real_lm.measure_texts(losses, losses)["ratio"] == 1


@pytest.mark.slow
def test_whole_chain(tmp_path, tmp_path_factory):
    """What run.sh does with the real language model, in a handful of steps."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    environment = {"EMOJI": "8", "EPOCHS": "0.05", "WINDOWS": "2", "OMP_NUM_THREADS": "1"}
    command = ["sh", "recipes/real_lm/run.sh", "--max_steps", "2", "--logging_steps", "1"]
    with forked_programs(tmp_path_factory.mktemp("bin")) as path:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **environment, "PATH": path}
        )
    run = tmp_path / "runs/real_lm"
    if not (run / "wheels").exists():
        pytest.skip(f"the wheels are not to be had: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((run / "metrics.json").read_text())
    # Frozen, the language model reads text as it did; its three new rows take next to no probability.
    for kind in ("text", "other"):
        assert 5 < metrics["before"][kind] < 40
        assert metrics["arms"]["align"]["texts"][kind]["ratio"] == pytest.approx(1, abs=1e-3)
        assert metrics["arms"]["full"]["texts"][kind]["ratio"] != 1
    for arm in ("align", "full", "full_without_text"):
        for kind in ("emoji", "photos"):
            assert 0 <= metrics["arms"][arm]["captions"][kind]["exact_match"] <= 1
    page = (run / "report.html").read_text()
    assert "CC BY-SA 4.0" in page and "<script" not in page
