"""`open-qwen2vl init-vit`: the vision tower of a tiny Qwen2-VL from a tiny CLIP of open_clip."""

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from open_qwen2vl import PackedDataset, PackedTrainer, PackedTrainingArguments
from open_qwen2vl.cli import main
from open_qwen2vl.families.qwen_vl.from_clip import check_sizes, fold_ln_pre, tower_weights
from open_qwen2vl.families.qwen_vl.images import patchify
from tests.qwen_vl import save_text_model
from tests.tars import write_caption_tar
from tests.tiny_clip import PIXELS, make_clip, save_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return save_clip(tmp_path_factory.mktemp("clips") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        colours = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((80 + number, 60), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def init_vit(model, output, *options) -> int:
    return main(["init-vit", str(model), "--output", str(output), *map(str, options)])


@torch.no_grad()
def test_both_towers_compute_the_same_without_what_only_one_of_them_has(qwen_vl_folder):
    """No class token, positions or `ln_pre` there, no rotation here; one epsilon for both."""
    theirs = make_clip().visual
    ours = AutoModelForImageTextToText.from_pretrained(qwen_vl_folder("qwen2_vl")).model.visual
    weights, left = tower_weights(theirs.state_dict(), frames=2)
    assert set(left) == {"class_embedding", "positional_embedding", "proj", "ln_pre.weight", "ln_pre.bias"}
    missing = ours.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and all(name.startswith("merger.mlp.") for name in missing.missing_keys)
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = ours.blocks[0].norm1.eps
    pixels = torch.randint(0, 256, (3, 56, 56), dtype=torch.uint8)
    # Raster order there, blocks of four patches here.
    order = torch.from_numpy(np.arange(16).reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).ravel())
    wanted = theirs.conv1(pixels[None] / 255).flatten(2).transpose(1, 2)
    wanted = theirs.ln_post(theirs.transformer(wanted))[0, order]

    patches = torch.from_numpy(patchify(pixels.numpy(), 14, 2)).unflatten(1, (3, 1, 196)).expand(-1, -1, 2, -1)
    stream = ours.patch_embed(patches.flatten(1) / 255)
    still = torch.ones(16, 16), torch.zeros(16, 16)
    for block in ours.blocks:
        stream = block(stream, cu_seqlens=torch.tensor([0, 16], dtype=torch.int32), position_embeddings=still)
    found = ours.merger.ln_q(stream)
    assert found.abs().max() > 1
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_names_and_shapes_agree_at_real_size():
    """DFN5B's ViT-H-14 and the tower of Qwen2-VL-2B: nothing is allocated."""
    with torch.device("meta"):
        theirs = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14-quickgelu")).visual
        ours = Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(hidden_size=1536))
    check_sizes(theirs, ours.config)
    weights, _ = tower_weights(theirs.state_dict(), frames=2)
    wanted = {name: weight.shape for name, weight in ours.state_dict().items() if not name.startswith("merger.mlp.")}
    assert {name: weight.shape for name, weight in weights.items()} == wanted


def test_folding_brings_the_first_stream_nearer_to_clips():
    """By the figures that it reports, and by the streams themselves after the first attention's bias."""
    visual, pixels = make_clip().visual, torch.randn(8, 3, 56, 56)
    weights, _ = tower_weights(visual.state_dict(), frames=2)
    plain = {name: tensor.clone() for name, tensor in weights.items()}
    fold = fold_ln_pre(weights, visual, pixels)
    changed = {name for name in weights if not torch.equal(weights[name], plain[name])}
    assert changed == {"patch_embed.proj.weight", "blocks.0.attn.proj.bias"}
    assert fold.images == 8 and fold.cosine > fold.cosine_without + 0.02 and fold.cosine > 0.95
    with torch.no_grad():
        patches = visual.conv1(pixels).flatten(2).transpose(1, 2)
        wanted = visual.ln_pre(patches + visual.positional_embedding[1:])
        embedding = weights["patch_embed.proj.weight"].sum(2)
        ours = nn.functional.conv2d(pixels, embedding, stride=14).flatten(2).transpose(1, 2)
        ours += weights["blocks.0.attn.proj.bias"] - plain["blocks.0.attn.proj.bias"]
    # Of CLIP's size too, which residual blocks go by: the stream as it was is far off.
    assert (ours - wanted).norm() < 0.5 * wanted.norm() < (patches - wanted).norm()


def test_the_command_makes_a_model_that_loads_and_trains(clip, pictures, qwen_vl_folder, tmp_path, capsys):
    model = qwen_vl_folder("qwen2_vl")
    assert init_vit(model, tmp_path / "model", "--clip", clip, "--images", pictures) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "model/init_vit.json").read_text())
    assert record["clip"] == clip and record["ln_pre"]["images"] == 5
    assert set(record["not_carried"]) == {"class_embedding", "positional_embedding", "proj", "ln_pre", "merger.mlp"}
    assert all(f"not carried: {name}" in printed for name in record["not_carried"]) and "on 5 images" in printed

    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before, visual = AutoModelForImageTextToText.from_pretrained(model), make_clip().visual
    assert torch.equal(loaded.model.visual.blocks[1].mlp.fc1.weight, visual.transformer.resblocks[1].mlp.c_fc.weight)
    assert not torch.equal(loaded.model.visual.merger.mlp[0].weight, before.model.visual.merger.mlp[0].weight)
    language = before.model.language_model.state_dict()
    assert all(torch.equal(one, language[name]) for name, one in loaded.model.language_model.state_dict().items())
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    parts = (processor.image_processor, processor.video_processor)
    assert [list(part.image_mean) for part in parts] == [PIXELS["mean"]] * 2

    write_caption_tar(tmp_path / "0.tar", ["a cat", "two dogs run"] * 4, size=(60, 90))
    pack = ["pack", tmp_path / "0.tar", "--output", tmp_path / "packs", "--processor", tmp_path / "model"]
    assert main([*map(str, pack), "--max-length", "96", "--num-workers", "1"]) == 0
    options = {"max_steps": 1, "save_strategy": "no", "use_cpu": True, "dataloader_num_workers": 0}
    trainer = PackedTrainer(
        model=loaded,
        args=PackedTrainingArguments(str(tmp_path / "run"), train_vision_tower=True, learning_rate=1e-3, **options),
        train_dataset=PackedDataset(tmp_path / "packs", processor),
        processing_class=processor,
    )
    start = {name: weight.detach().clone() for name, weight in trainer.model.model.visual.named_parameters()}
    assert trainer.train().training_loss > 0
    trained = trainer.model.model.visual.named_parameters()
    assert not any(torch.equal(weight, start[name]) for name, weight in trained if name.endswith("weight"))


def test_another_language_model_and_no_pictures(clip, qwen_vl_folder, tmp_path, capsys, caplog):
    """MODEL then needs no weights; what leaving `ln_pre` out means is said."""
    source = qwen_vl_folder("qwen2_vl")
    shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    GenerationConfig(eos_token_id=[3, 4]).save_pretrained(tmp_path / "bare")
    text = save_text_model(tmp_path / "text", source)
    arguments = ("--clip", clip, "--language-model", tmp_path / "text")
    assert init_vit(tmp_path / "bare", tmp_path / "model", *arguments) == 0
    assert "ln_pre of CLIP is left out: the blocks get patches of another scale" in caplog.text
    record = json.loads((tmp_path / "model/init_vit.json").read_text())
    assert record["ln_pre"] is None and "no --images" in record["not_carried"]["ln_pre"]
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    expected = text.model.state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in loaded.model.language_model.state_dict().items())
    assert torch.equal(loaded.lm_head.weight, text.lm_head.weight)
    assert loaded.generation_config.eos_token_id == [3, 4]

    text.config.rms_norm_eps, text.config.tie_word_embeddings = 0.5, False
    text.config.save_pretrained(tmp_path / "text")
    assert init_vit(tmp_path / "bare", tmp_path / "other", *arguments) == 2
    assert "rms_norm_eps 0.5 instead of 1e-05, tie_word_embeddings False instead of True" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"layers": 3}, "vision_config: depth 3 instead of 2"),
        ({"head_width": 8, "mlp_ratio": 4}, "num_heads 4 instead of 2, mlp_ratio 4.0 instead of 2"),
        ({"width": 64, "patch_size": 28}, "embed_dim 64 instead of 32, num_heads 4 instead of 2, patch_size 28"),
        ({"quick_gelu": False}, "hidden_act gelu instead of quick_gelu"),
        ({"ls_init_value": 0.1}, "has no place for blocks.0.ls_1.gamma, blocks.0.ls_2.gamma"),
        ({"attentional_pool": True}, "has no place for attn_pool."),
        ({"no_ln_pre": True}, "--images has no effect"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused_by_name(vision, message, pictures, qwen_vl_folder, tmp_path, capsys):
    clip = save_clip(tmp_path / "clip", **vision)
    arguments = ("--clip", clip, "--images", pictures)
    assert init_vit(qwen_vl_folder("qwen2_vl"), tmp_path / "model", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]


class Harmful:
    def __reduce__(self):
        return print, ("code of a checkpoint was run",)


def test_other_mistakes_are_one_line(clip, pictures, qwen_vl_folder, tmp_path, capsys):
    model, output = qwen_vl_folder("qwen2_vl"), tmp_path / "model"
    (tmp_path / "harmful.pt").write_bytes(pickle.dumps({"a": Harmful()}, protocol=2))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    wrong = {
        ("--clip", clip, "--images", tmp_path / "broken.png"): "broken.png, broken.png: corrupt_image",
        ("--clip", clip, "--images", tmp_path / "empty"): "empty: no picture there",
        ("--clip", "ViT-B-32"): "--clip ViT-B-32: ",
        ("--clip", "ViT-B-32", "--pretrained", tmp_path / "harmful.pt"): "harmful.pt",
        ("--clip", clip, "--pretrained", "openai"): "leave --pretrained out",
    }
    for arguments, message in wrong.items():
        assert init_vit(model, output, *arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and "code of a" not in captured.out
    assert init_vit(qwen_vl_folder("qwen2_5_vl"), output, "--clip", clip) == 2
    assert "model type 'qwen2_5_vl' instead of 'qwen2_vl'" in capsys.readouterr().err
    output.mkdir()
    assert init_vit(model, output, "--clip", clip) == 2
    assert "model exists; give a new folder" in capsys.readouterr().err


def test_pictures_of_a_tar_and_no_more_than_are_needed(clip, qwen_vl_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("open_qwen2vl.conversion.init_vit.MOST_IMAGES", 3)
    write_caption_tar(tmp_path / "0.tar", ["a cat"] * 8, size=(60, 90))
    file = io.BytesIO()
    Image.linear_gradient("L").save(file, "JPEG")
    (tmp_path / "one.jpg").write_bytes(file.getvalue())
    images = ("--images", tmp_path / "0.tar", tmp_path / "one.jpg")
    assert init_vit(qwen_vl_folder("qwen2_vl"), tmp_path / "model", "--clip", clip, *images) == 0
    assert json.loads((tmp_path / "model/init_vit.json").read_text())["ln_pre"]["images"] == 3
