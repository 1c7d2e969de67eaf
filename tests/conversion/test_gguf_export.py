"""`open-qwen2vl export --format gguf`: both files are read back, tensor by tensor, key by key."""

import copy
import re
import shlex
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen2ForCausalLM

from open_qwen2vl import OpenQwen2VLConfig, OpenQwen2VLForConditionalGeneration, OpenQwen2VLProcessor
from open_qwen2vl.cli import main
from open_qwen2vl.conversion.gguf_export import export_gguf, square_image
from open_qwen2vl.conversion.gguf_parts import check_model, text_tensors
from open_qwen2vl.trainer.lora import add_lora

F16, F32, Q8_0 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0
TEXT = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
VISION = {
    "ln1": "layer_norm1", "ln2": "layer_norm2", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_out": "self_attn.out_proj", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
    "patch_embd": "patch_embedding", "position_embd": "position_embedding",
}  # fmt: skip
DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
SENTENCES = ["two dogs run in the PARK, 12345!\n", "<|im_start|>user\nwhat is shown?<|im_end|>\n<s>", "naïve 猫 \t x"]


def own_name(name: str) -> str:
    """Ours of llama.cpp's name, written down once more."""
    if name.startswith("mm."):
        return "model.multi_modal_projector." + name[3:].replace("0.", "linear_1.").replace("2.", "linear_2.")
    parts = name.split(".")
    *block, part, kind = parts[1:] if name.startswith("v.") else parts
    known, base, layers = (
        (VISION, "model.vision_tower.", "encoder.layers")
        if name.startswith("v.")
        else (TEXT, "model.language_model.", "layers")
    )
    if block:
        return f"{base}{layers}.{block[1]}.{known[part]}.{kind}"
    return f"{base}{'embeddings.' if known is VISION else ''}{known[part]}.{kind}"


def fields(path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture(scope="module")
def parts(backbones, tmp_path_factory):
    """A tiny model of the full grid, whose language model has rows of whole q8_0 blocks, and its processor."""
    folder = tmp_path_factory.mktemp("text")
    config = Qwen2Config.from_pretrained(backbones["text"])
    config.hidden_size, config.bos_token_id = 64, 0  # Qwen2.5's config has another begin than the processor too
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbones["text"]).save_pretrained(folder)
    both = {**backbones, "text": str(folder), "image_seq_length": 16}
    model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**both)
    return model, OpenQwen2VLProcessor.from_vision_text_pretrained(**both)


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for part in parts:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """Folders of both types, by the command."""
    root = tmp_path_factory.mktemp("gguf")
    for kind in ("f16", "q8_0"):
        command = ["export", str(folder), "--format", "gguf", "--type", kind, "--output", str(root / kind)]
        assert main(command) == 0
    return root


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_every_tensor_is_the_models(exported, parts, kind):
    state, seen = parts[0].state_dict(), set()
    for file in (f"model-{kind}.gguf", f"mmproj-{kind}.gguf"):
        for tensor in gguf.GGUFReader(exported / kind / file).tensors:
            expected = state[own_name(tensor.name)].numpy()
            seen.add(own_name(tensor.name))
            assert list(tensor.shape) == list(reversed(expected.shape)), tensor.name
            if expected.ndim < 2 or tensor.name == "v.position_embd.weight":
                assert tensor.tensor_type == F32 and np.array_equal(tensor.data, expected), tensor.name
            elif kind == "f16" or expected.ndim == 4 or expected.shape[-1] % 32:
                assert tensor.tensor_type == F16, tensor.name
                assert np.array_equal(tensor.data, expected.astype(np.float16)), tensor.name
            else:
                assert tensor.tensor_type == Q8_0, tensor.name
                blocks = expected.reshape(-1, 32)
                step = np.abs(blocks).max(1, keepdims=True) / 127
                error = np.abs(gguf.quants.dequantize(tensor.data, Q8_0).reshape(-1, 32) - blocks)
                # Half a step, and the scale's own rounding to fp16.
                assert (error <= step * (0.5 + 127 * 2**-11) + 1e-7).all(), tensor.name
    assert seen == set(state) - {"lm_head.weight"}


def test_every_key_of_the_vision_file(exported):
    found = fields(exported / "f16" / "mmproj-f16.gguf")
    expected = {
        "general.architecture": "clip", "general.type": "mmproj", "general.file_type": 1,
        "clip.has_vision_encoder": True, "clip.projector_type": "mlp", "clip.use_gelu": True,
        "clip.vision.image_size": 32, "clip.vision.patch_size": 8, "clip.vision.embedding_length": 32,
        "clip.vision.feed_forward_length": 48, "clip.vision.projection_dim": 64, "clip.vision.image_mean": [0.5] * 3,
        "clip.vision.image_std": [0.5] * 3, "clip.vision.attention.head_count": 2, "clip.vision.block_count": 2,
        "clip.vision.feature_layer": [2],
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert found["clip.vision.attention.layer_norm_epsilon"] == pytest.approx(1e-6)


def test_every_key_of_the_language_models_file(exported, parts):
    found, text = fields(exported / "q8_0" / "model-q8_0.gguf"), parts[0].config.text_config
    expected = {
        "general.architecture": "qwen2", "general.type": "model", "general.file_type": 7, "qwen2.block_count": 2,
        "qwen2.context_length": text.max_position_embeddings, "qwen2.embedding_length": 64,
        "qwen2.feed_forward_length": 96, "qwen2.attention.head_count": 4, "qwen2.attention.head_count_kv": 2,
        "qwen2.rope.freq_base": 10_000.0, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.suppress_tokens": [parts[0].config.image_token_id],
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert found["qwen2.attention.layer_norm_rms_epsilon"] == pytest.approx(text.rms_norm_eps)
    tokenizer, named = parts[1].tokenizer, {"bos": "<s>", "eos": "<|im_end|>", "padding": "<|endoftext|>"}
    for name, token in named.items():
        assert found[f"tokenizer.ggml.{name}_token_id"] == tokenizer.convert_tokens_to_ids(token)
    assert found["tokenizer.chat_template"] == parts[1].chat_templates["default"]
    assert found["tokenizer.chat_template.chatml"] == parts[1].chat_templates["chatml"]
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == text.vocab_size
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if number not in tokenizer.added_tokens_decoder:
            known = tokenizer.convert_ids_to_tokens(number)
            assert (token, kind) == ((known, 1) if known else (f"[PAD{number}]", 5))
        else:
            assert (token, kind) == (tokenizer.added_tokens_decoder[number].content, 3)


def test_transformers_reads_the_file_to_the_same_ids_and_logits(exported, parts):
    """A reader that others wrote, in place of llama.cpp itself."""
    model, processor = parts
    tokenizer = AutoTokenizer.from_pretrained(exported / "f16", gguf_file="model-f16.gguf")
    read = AutoModelForCausalLM.from_pretrained(exported / "f16", gguf_file="model-f16.gguf", dtype=torch.float32)
    for sentence in SENTENCES:
        ids = processor.tokenizer(sentence)["input_ids"]
        assert tokenizer(sentence, add_special_tokens=False)["input_ids"] == ids
        with torch.no_grad():
            given, expected = (each(input_ids=torch.tensor([ids])).logits for each in (read, model))
        torch.testing.assert_close(given, expected, atol=2e-2, rtol=1e-2)
        assert torch.equal(given.argmax(-1), expected.argmax(-1))


def test_an_adapter_is_merged(parts, folder, tmp_path):
    model = OpenQwen2VLForConditionalGeneration.from_pretrained(folder)
    adapted = add_lora(model)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    parts[1].save_pretrained(tmp_path / "adapter")
    export_gguf(tmp_path / "adapter", tmp_path / "gguf")
    state = adapted.merge_and_unload().state_dict()
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "gguf" / "model-f16.gguf").tensors}
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(state[name], parts[0].state_dict()[name])
    for name, data in tensors.items():
        torch.testing.assert_close(torch.from_numpy(data.copy()).float(), state[own_name(name)], atol=1e-3, rtol=1e-3)


def test_an_untied_head_is_written(parts):
    config = copy.deepcopy(parts[0].config)
    config.tie_word_embeddings = False
    state = parts[0].state_dict()
    assert text_tensors(state, config)["output.weight"] is state["lm_head.weight"]
    with pytest.raises(ValueError, match="llama.cpp has no name for model.language_model.gate"):
        text_tensors({"model.language_model.gate": torch.ones(1)}, config)


def test_a_pooled_budget_is_refused_with_the_way_out(tiny_model, processor, tmp_path, capsys):
    tiny_model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    command = ["export", str(tmp_path / "model"), "--output", str(tmp_path / "gguf")]
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "image_seq_length=4: llama.cpp cannot pool" in error and "export with `--image-seq-length 16`" in error
    assert error.count("error:") == 1 and not (tmp_path / "gguf").exists()
    assert main([*command, "--image-seq-length", "16"]) == 0
    output = capsys.readouterr().out
    assert "pads a picture that is not square" in output and "Make it 32x32 first" in output


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_config", "model_type", "llama"),
        ("text_config", "layer_types", ["sliding_attention", "full_attention"]),
        ("text_config", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("vision_config", "hidden_act", "quick_gelu"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(parts, part, name, value):
    config = copy.deepcopy(parts[0].config)
    if name == "model_type":
        config.text_config = LlamaConfig(hidden_size=64, num_hidden_layers=2)
    else:
        setattr(getattr(config, part), name, value)
    with pytest.raises(ValueError, match=rf"{part}\.{name}.*cannot be exported"):
        check_model(config, parts[1], None)


@pytest.mark.parametrize("kind", ["gemma3_text", "clip_vision_model", "dinov3_vit", "siglip2_vision_model"])
def test_other_backbones_are_refused_before_their_budgets(kind):
    part = "text_config" if kind.endswith("text") else "vision_config"
    config = OpenQwen2VLConfig(**{part: {"model_type": kind}}, image_seq_length=4)
    with pytest.raises(ValueError, match=f"{part}.model_type='{kind}' cannot be exported"):
        check_model(config, None, None)


def test_weights_beyond_the_type_leave_no_folder(parts, folder, tmp_path):
    model = OpenQwen2VLForConditionalGeneration.from_pretrained(folder)
    model.model.multi_modal_projector.linear_2.weight.data[0, 0] = 1e6
    model.save_pretrained(tmp_path / "model")
    parts[1].save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="mm.2.weight has weights .* F16 cannot hold; q8_0 holds them"):
        export_gguf(tmp_path / "model", tmp_path / "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export_gguf(tmp_path / "model", tmp_path / "gguf", "q8_0")
    with pytest.raises(ValueError, match="gguf exists"):
        export_gguf(tmp_path / "model", tmp_path / "gguf", "q8_0")


def test_other_folders_are_told_where_to_go(qwen_vl_folder, tmp_path, capsys):
    assert main(["export", str(qwen_vl_folder("qwen2_vl")), "--output", str(tmp_path / "gguf")]) == 2
    error = capsys.readouterr().err
    assert "a qwen2_vl model goes through llama.cpp's own converter" in error
    assert "`python convert_hf_to_gguf.py MODEL --outtype f16`" in error and "--mmproj" in error
    assert main(["export", "someone/model", "--output", str(tmp_path / "gguf")]) == 2
    assert "hf download someone/model" in capsys.readouterr().err


def test_a_picture_is_made_square_as_the_model_sees_it(parts, tmp_path):
    image = Image.effect_noise((90, 30), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.png", exif=exif)
    square_image(tmp_path / "photo.png", tmp_path / "square.png", 32)
    assert Image.open(tmp_path / "square.png").size == (32, 32)
    pixels = [parts[1].image_processor(parts_of, return_tensors="pt")["pixel_values"]
              for parts_of in (image.rotate(270, expand=True), Image.open(tmp_path / "square.png"))]  # fmt: skip
    assert torch.equal(*pixels)


def test_the_documentation(folder, tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(folder)
    Image.effect_noise((90, 30), 90).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"^open-qwen2vl (export .*)$", DOCUMENT, flags=re.MULTILINE)
    assert main(shlex.split(command)) == 0
    for name in ("model", "mmproj"):
        assert f"gguf/{name}-q8_0.gguf" in DOCUMENT and Path(f"gguf/{name}-q8_0.gguf").exists()
    (code,) = re.findall(
        r"^```python\n(from open_qwen2vl.conversion.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL
    )
    exec(compile(code, "docs/serving.md", "exec"), {})
    assert Image.open("square.png").size == (384, 384)
