"""`open-qwen2vl convert`: original checkpoints in, folders for the Auto classes out, and back."""

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from open_qwen2vl.cli import main
from open_qwen2vl.conversion import vision_weights
from open_qwen2vl.conversion.convert import convert_checkpoint
from open_qwen2vl.conversion.names import read_token_budget, read_vision_config, write_arch_specifier
from open_qwen2vl.files import new_folder
from tests.hub_server import Repo, hub_server

ASSETS = Path(__file__).parents[1] / "assets" / "original"
ORIGINAL, TEXT = ASSETS / "checkpoint", ASSETS / "Qwen2.5-tiny"
CONVERSATIONS = json.loads((ASSETS / "conversations.json").read_text("utf8"))


def read_original(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(folder / "checkpoints" / "latest-checkpoint.pt", weights_only=True)["model"]


def write_original(folder: Path, tensors: dict, arch_specifier: str = "no-align+16-avgpool", **others) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": {"arch_specifier": arch_specifier}}))
    torch.save({"model": tensors} | others, folder / "checkpoints" / "latest-checkpoint.pt")
    return folder


def convert(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for part, tensors in expected.items():
        assert actual[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert actual[part][name].dtype == tensor.dtype and torch.equal(actual[part][name], tensor), name


@pytest.fixture(scope="module")
def tensors() -> dict[str, dict[str, torch.Tensor]]:
    return read_original(ORIGINAL)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """The original's checkpoint as converted by the command."""
    folder = tmp_path_factory.mktemp("convert") / "new" / "model"
    assert convert(ORIGINAL, folder, "--text-model", TEXT) == 0
    return folder


def test_converted_folder_gives_the_originals_numbers(converted):
    golden = load_file(ASSETS / "forward_single.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(converted)
    processor = AutoProcessor.from_pretrained(converted)
    assert model.config.image_seq_length == processor.image_seq_length == 16
    assert model.config.vision_config.hidden_act == "gelu" and model.dtype == torch.float32
    image = processor.image_token_id
    ids = [token for i in golden["input_ids"][0].tolist() for token in ([image] * 16 if i == -200 else [i])]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), pixel_values=golden["pixel_values"]).logits
    assert (logits - golden["logits"]).abs().max() <= 1e-5 * max(1, golden["logits"].abs().max())
    assert processor.tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<s>"]) == [4119, 4120]
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert processor.image_processor.size["height"] == 84
    assert not list(converted.parent.glob(".*"))


def test_report_names_what_was_not_used(tmp_path, tensors, caplog):
    original = write_original(tmp_path / "original", tensors, optimizer={"step": torch.zeros(1)})
    with caplog.at_level("INFO"):
        report = convert_checkpoint(original, tmp_path / "model", str(TEXT))
    assert "optimizer (beside the model)" in report.unused
    assert "llm_backbone.llm.lm_head.weight" in report.unused
    held = {f"{part}.{name}" for part in tensors for name in tensors[part]}
    others = held - set(report.unused)
    assert not any("blocks.3." in n or "attn_pool" in n or "featurizer.norm" in n for n in others)
    # A tensor is either in the model (q, k, v as one) or named.
    assert len(others) + 3 * 2 * 2 == report.num_tensors
    for name in report.unused:
        assert name in caplog.text and name in str(report)


@pytest.mark.parametrize("kind", ["safetensors", "open_clip", "pt", "checkpoint"])
def test_vision_weights_from_a_file(tmp_path, tensors, converted, kind):
    original = write_original(tmp_path / "frozen", {k: v for k, v in tensors.items() if k != "vision_backbone"})
    tower = {name.removeprefix("featurizer."): t for name, t in tensors["vision_backbone"].items()}
    path = tmp_path / ("vision.pt" if kind == "pt" else "vision.safetensors")
    if kind == "checkpoint":
        path = ORIGINAL / "checkpoints" / "latest-checkpoint.pt"
    elif kind == "pt":
        torch.save(tower, path)
    elif kind == "open_clip":
        save_file({f"visual.trunk.{name}": t for name, t in tower.items()} | {"text.bias": torch.zeros(1)}, path)
    else:
        save_file(tower, path)
    report = convert_checkpoint(original, tmp_path / "model", str(TEXT), vision_weights=str(path))
    assert ("text.bias (beside the vision tower)" in report.unused) == (kind == "open_clip")
    for file in converted.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "model" / file.name).read_bytes()


def test_default_vision_weights_and_text_model_come_from_the_hub(tmp_path, tensors, converted):
    original = write_original(tmp_path / "frozen", {k: v for k, v in tensors.items() if k != "vision_backbone"})
    tower = {f"visual.trunk.{name.removeprefix('featurizer.')}": t for name, t in tensors["vision_backbone"].items()}
    weights = {"README.md": b"", "open_clip_model.safetensors": safetensors.torch.save(tower)}
    command = [
        sys.executable,
        "-m",
        "open_qwen2vl.cli",
        "convert",
        original,
        tmp_path / "model",
        "--text-model",
        "a/text",
    ]
    with hub_server() as hub:
        for repo, files in (
            ("timm/ViT-SO400M-14-SigLIP-384", weights),
            ("a/text", {path.name: path.read_bytes() for path in TEXT.iterdir()}),
        ):
            hub.repos["models", repo] = Repo(repo, f"{hub.url}/{repo}", files)
        env = {**os.environ, **hub.environment(tmp_path / "cache")}
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    assert "hf-hub:timm/ViT-SO400M-14-SigLIP-384" in run.stdout
    for file in converted.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "model" / file.name).read_bytes()


@pytest.mark.parametrize("with_vision", [True, False])
def test_round_trip(tmp_path, tensors, with_vision):
    kept = tensors if with_vision else {k: v for k, v in tensors.items() if k != "vision_backbone"}
    original = write_original(tmp_path / "original", kept, "full-align+9-avgpool")
    vision = ["--vision-weights", ORIGINAL / "checkpoints" / "latest-checkpoint.pt"]
    assert convert(original, tmp_path / "model", "--text-model", TEXT, *vision) == 0
    back = tmp_path / "back"
    assert convert(tmp_path / "model", back, "--to-original", *(vision if with_vision else [])) == 0
    assert_same(read_original(back), kept)
    settings = json.loads((back / "config.json").read_text())
    assert read_token_budget(settings["model"]["arch_specifier"]) == 9
    # And it converts again to the same model.
    assert convert(back, tmp_path / "again", "--text-model", TEXT, *vision) == 0
    for file in (tmp_path / "model").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_trained_tower_goes_back(tmp_path, converted, tensors):
    """Ours where the model has it; the last block and the head from the given weights."""
    model = AutoModelForImageTextToText.from_pretrained(converted)
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():
            parameter += 1
    model.save_pretrained(tmp_path / "trained")
    checkpoint = ORIGINAL / "checkpoints" / "latest-checkpoint.pt"
    assert convert(tmp_path / "trained", tmp_path / "back", "--to-original", "--vision-weights", checkpoint) == 0
    back = read_original(tmp_path / "back")["vision_backbone"]
    for name, tensor in tensors["vision_backbone"].items():
        held = not any(part in name for part in ("blocks.3.", "attn_pool", "featurizer.norm"))
        assert torch.equal(back[name], tensor + 1 if held else tensor), name


def test_a_trained_tower_goes_back_without_being_asked_for(tmp_path, converted, tensors, monkeypatch, caplog):
    """It is compared with the weights that the original takes where it finds none: equal is left out, as there."""
    model = AutoModelForImageTextToText.from_pretrained(converted)
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[0].mlp.fc1.weight += 1
    model.save_pretrained(tmp_path / "trained")
    # Without a network nothing is known, and that is said.
    assert convert(tmp_path / "trained", tmp_path / "unknown", "--to-original") == 0
    assert "the vision tower is NOT written" in caplog.text and "--vision-weights" in caplog.text
    assert set(read_original(tmp_path / "unknown")) == {"projector", "llm_backbone"}
    caplog.clear()
    monkeypatch.setattr(vision_weights, "_download", lambda source: ORIGINAL / "checkpoints" / "latest-checkpoint.pt")
    assert convert(tmp_path / "trained", tmp_path / "back", "--to-original") == 0
    back = read_original(tmp_path / "back")["vision_backbone"]
    assert back.keys() == tensors["vision_backbone"].keys()
    name = "featurizer.blocks.0.mlp.fc1.weight"
    assert torch.equal(back[name], tensors["vision_backbone"][name] + 1)
    assert convert(converted, tmp_path / "frozen", "--to-original") == 0
    assert "vision_backbone" not in read_original(tmp_path / "frozen") and not caplog.text
    # Weights of another tower complete nothing.
    tower = {n.removeprefix("featurizer."): t for n, t in tensors["vision_backbone"].items() if "blocks.1." not in n}
    save_file(tower, tmp_path / "other.safetensors")
    assert convert(converted, tmp_path / "x", "--to-original", "--vision-weights", tmp_path / "other.safetensors") == 2


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06" + bytes(18), pickle.dumps([1, 2])])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_that_are_no_checkpoints_are_one_line(tmp_path, tensors, capsys, content, suffix):
    original = write_original(tmp_path / "original", {k: v for k, v in tensors.items() if k != "vision_backbone"})
    weights = tmp_path / f"vision.{suffix}"
    weights.write_bytes(content)
    assert convert(original, tmp_path / "model", "--text-model", TEXT, "--vision-weights", weights) == 2
    (original / "checkpoints" / "latest-checkpoint.pt").write_bytes(content)
    assert convert(original, tmp_path / "model", "--text-model", TEXT) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 2 and errors.count("not a ") == 2
    assert str(weights) in errors and "latest-checkpoint.pt" in errors


@pytest.mark.parametrize("content", [b"[]", b"\xff", b"{", b'{"model": 1}'])
def test_a_config_that_is_none_is_one_line(tmp_path, tensors, capsys, content):
    original = write_original(tmp_path / "original", tensors)
    (original / "config.json").write_bytes(content)
    assert convert(original, tmp_path / "model", "--text-model", TEXT) == 2
    assert capsys.readouterr().err.count("\n") == 1


def one_error(capsys) -> str:
    """The one line of an error; a line that says what was guessed of a toy's tower may stand before it."""
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("vision tower of width")]
    assert len(error) == 1 and error[0].startswith("open-qwen2vl convert: error: ")
    return error[0]


def change(tensors: dict, part: str, name: str, tensor: torch.Tensor | None) -> dict:
    """A copy with one tensor replaced, or left out."""
    changed = {key: dict(value) for key, value in tensors.items()}
    if tensor is None:
        del changed[part][name]
    else:
        changed[part][name] = tensor
    return changed


@pytest.mark.parametrize(
    ("part", "name", "tensor", "message"),
    [
        ("projector", "mlp_projector.2.bias", None, "lacks model.multi_modal_projector.linear_2.bias"),
        ("llm_backbone", "llm.model.norm.weight", None, "lacks model.language_model.norm.weight"),
        ("llm_backbone", "llm.model.embed_tokens.weight", None, "lacks model.language_model.embed_tokens.weight"),
        ("vision_backbone", "featurizer.pos_embed", None, "no vision tower with timm's names"),
        ("vision_backbone", "featurizer.patch_embed.proj.weight", None, "weights have no patch_embed.proj.weight"),
        ("vision_backbone", "featurizer.blocks.1.attn.qkv.bias", None, "self_attn.q_proj.bias"),
        ("projector", "mlp_projector.2.bias", torch.zeros(65), "linear_2.bias (65,) instead of (64,)"),
        ("llm_backbone", "llm.model.norm.weight", torch.zeros(3), "norm.weight (3,) instead of (64,)"),
        ("llm_backbone", "llm.model.layers.3.mlp.up_proj.weight", torch.zeros(1), "the model has no model.lang"),
        ("llm_backbone", "llm.lm_head.weight", torch.zeros(4224, 64), "lm_head.weight differs from the embedding"),
        ("projector", "mlp_projector.4.bias", torch.zeros(1), "unknown tensor projector.mlp_projector.4.bias"),
        ("vision_backbone", "featurizer.pos_embed", torch.zeros(1, 37, 64), "37 positions, which make no square"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_one_error_and_no_folder(tmp_path, tensors, capsys, part, name, tensor, message):
    original = write_original(tmp_path / "original", change(tensors, part, name, tensor))
    vision = ["--vision-weights", original / "checkpoints/latest-checkpoint.pt"]
    assert convert(original, tmp_path / "model", "--text-model", TEXT, *vision) == 2
    assert message in one_error(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_all_missing_tensors_are_named_in_one_error(tmp_path, tensors, capsys):
    missing = ["llm.model.norm.weight", "llm.model.layers.2.mlp.up_proj.weight"]
    kept = {name: t for name, t in tensors["llm_backbone"].items() if name not in missing}
    original = write_original(tmp_path / "original", tensors | {"llm_backbone": kept})
    assert convert(original, tmp_path / "model", "--text-model", TEXT) == 2
    error = capsys.readouterr().err
    assert all(name.removeprefix("llm.model.") in error for name in missing)


def test_existing_folder_is_refused(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("keep")
    assert convert(ORIGINAL, tmp_path / "model", "--text-model", TEXT) == 2
    assert "model exists; give a new folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["mine.txt"]


def test_broken_run_leaves_no_folder(tmp_path):
    with pytest.raises(OSError, match="disk full"), new_folder(tmp_path / "model") as folder:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")
    assert not list(tmp_path.iterdir())


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_objects_are_never_unpickled(tmp_path, tensors, capsys):
    trap = tmp_path / "trap"
    original = write_original(tmp_path / "original", tensors, hook=Evil(str(trap)))
    assert convert(original, tmp_path / "model", "--text-model", TEXT) == 2
    assert "not a checkpoint of tensors" in capsys.readouterr().err
    assert not trap.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([ORIGINAL, "out"], "--text-model is required"),
        (["nowhere", "out", "--text-model", TEXT], "nowhere"),
        ([ORIGINAL, "out", "--text-model", "no/such-model"], "no/such-model"),
        ([ORIGINAL, "out", "--text-model", TEXT, "--vision-weights", "no/such-model"], "no/such-model: no such file"),
        ([ORIGINAL, "out", "--text-model", TEXT, "--vision-weights", "no_such_vit"], "vision weights no_such_vit"),
        ([ORIGINAL, "out", "--text-model", TEXT, "--to-original"], "--to-original takes no --text-model"),
        ([TEXT, "out", "--to-original"], "model type 'qwen2' instead of 'open_qwen2vl'"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert convert(*arguments) == 2
    assert message in one_error(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arch_specifier", "budget"),
    [("no-align+avgpool", 144), ("full-align+729-avgpool", 729), ("no-align+16-avgpool", 16)],
)
def test_token_budget(arch_specifier, budget):
    assert read_token_budget(arch_specifier) == budget
    assert write_arch_specifier(budget) == arch_specifier


@pytest.mark.parametrize("arch_specifier", ["no-align+gelu-mlp", "linear", "avgpool", "no-align+729-avgpool-x"])
def test_other_projectors_are_refused(arch_specifier):
    with pytest.raises(ValueError, match="arch_specifier"):
        read_token_budget(arch_specifier)


def vision_tensors(width: int, patches: int = 729, blocks: int = 27) -> dict[str, torch.Tensor]:
    shapes = {"pos_embed": (1, patches, width), "patch_embed.proj.weight": (width, 3, 14, 14)}
    shapes |= {f"blocks.{i}.mlp.fc1.weight": (4304, width) for i in range(blocks)}
    return {f"featurizer.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_vision_sizes_come_from_the_tensors():
    config = read_vision_config(vision_tensors(1152))
    expected = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                "image_size": 378, "patch_size": 14, "hidden_act": "gelu"}  # fmt: skip
    assert expected.items() <= config.items()
    assert read_vision_config(vision_tensors(768))["num_attention_heads"] == 12
    with pytest.raises(ValueError, match="heads of a vision tower of width 1280: give it with --vision-heads"):
        read_vision_config(vision_tensors(1280))
    assert read_vision_config(vision_tensors(1280), 20)["num_attention_heads"] == 20


def messages_of(conversation: list[dict]) -> list[dict]:
    """LLaVA's form to that of Hugging Face."""
    messages = []
    for turn in conversation:
        first, *others = turn["value"].split("<image>")
        content = [{"type": "text", "text": first}] * bool(first)
        for text in others:
            content += [{"type": "image"}] + [{"type": "text", "text": text}] * bool(text)
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": content})
    return messages


@pytest.fixture(scope="module")
def qwen_processor(converted, qwen_tokenizer):
    """The converted processor over Qwen2.5's real vocabulary."""
    processor = AutoProcessor.from_pretrained(converted)
    processor.tokenizer = qwen_tokenizer
    return processor


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if name != "image_in_the_middle"])
def test_template_gives_what_the_weights_saw(qwen_processor, name):
    case = CONVERSATIONS[name]
    messages = messages_of(case["conversation"])
    text = qwen_processor.apply_chat_template(messages)
    ids = qwen_processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [-200 if i == 151655 else i for i in ids] == case["input_ids"]
    # The prompt of a generation is what stood before the first answer.
    prompt = qwen_processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    assert text.startswith(prompt) and prompt.endswith("<|im_end|>assistant\n")
    # An image without the newline of LLaVA's data comes to the same.
    for part in messages[0]["content"]:
        part["text"] = part.get("text", "").removeprefix("\n")
    assert qwen_processor.apply_chat_template(messages) == text


@pytest.mark.parametrize("name", ["multi_turn", "no_image"])
def test_template_marks_the_labelled_tokens(qwen_processor, name):
    case = CONVERSATIONS[name]
    messages = [{"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]}
                for turn in case["conversation"]]  # fmt: skip
    encoded = qwen_processor.tokenizer.apply_chat_template(
        messages,
        chat_template=qwen_processor.chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    labelled = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert labelled == [label for label in case["labels"] if label != -100]


def test_plain_template_is_there_by_name(converted, processor):
    loaded = AutoProcessor.from_pretrained(converted)
    assert set(loaded.chat_templates) == {"default", "chatml"}
    messages = messages_of(CONVERSATIONS["multi_turn"]["conversation"])
    text = loaded.apply_chat_template(messages, chat_template="chatml")
    assert text == processor.apply_chat_template(messages)
    assert "<|im_end|>\n<|im_start|>assistant\n" in text and "<|image_pad|>\nHow many" in text


MEASURE = r"""
import re, sys
from pathlib import Path
from open_qwen2vl.conversion.convert import convert_checkpoint

def memory(field):
    # Not getrusage: its peak is inherited from the process that started this one.
    return int(re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

tiny, tiny_text, large, large_text, output, vision = sys.argv[1:]
convert_checkpoint(tiny, output + "/warm-up", tiny_text)
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
report = convert_checkpoint(large, output + "/large", large_text, vision_weights=vision)
print("grown", memory("VmHWM") - before)
"""


def write_large(folder: Path, tensors: dict) -> tuple[Path, Path]:
    """A checkpoint of about 100 MB without a vision backbone, and the folder of its text model."""
    text = shutil.copytree(TEXT, folder / "text")
    config = json.loads((text / "config.json").read_text())
    config |= {"hidden_size": 384, "intermediate_size": 2560, "num_hidden_layers": 6}
    (text / "config.json").write_text(json.dumps(config))
    sizes = {64: 384, 160: 2560, 32: 192}
    language = {}
    for layer in range(6):
        for name, tensor in tensors["llm_backbone"].items():
            if ".layers.0." in name:
                shape = [sizes[side] for side in tensor.shape]
                language[name.replace(".layers.0.", f".layers.{layer}.")] = torch.rand(shape)
    language["llm.model.norm.weight"] = torch.rand(384)
    language["llm.model.embed_tokens.weight"] = torch.rand(4224, 384)
    language["llm.lm_head.weight"] = language["llm.model.embed_tokens.weight"].clone()
    projector = {
        "mlp_projector.0.weight": torch.rand(384, 64),
        "mlp_projector.0.bias": torch.rand(384),
        "mlp_projector.2.weight": torch.rand(384, 384),
        "mlp_projector.2.bias": torch.rand(384),
    }
    return write_original(folder / "large", {"projector": projector, "llm_backbone": language}), text


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_stays_below_1_3_times_the_checkpoint(tmp_path, tensors):
    large, text = write_large(tmp_path, tensors)
    size = (large / "checkpoints" / "latest-checkpoint.pt").stat().st_size
    assert size > 90e6
    vision = ORIGINAL / "checkpoints" / "latest-checkpoint.pt"
    command = [sys.executable, "-c", MEASURE, ORIGINAL, TEXT, large, text, tmp_path / "out", vision]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    grown = int(run.stdout.split("grown ")[1])
    print(f"peak memory grew by {grown / size:.2f} times the checkpoint")
    assert grown < 1.3 * size, f"peak memory grew by {grown / size:.2f} times the checkpoint"
    expected = read_original(large)["llm_backbone"]["llm.model.layers.5.mlp.up_proj.weight"]
    files = list((tmp_path / "out" / "large").glob("*.safetensors"))
    assert len(files) > 1
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert torch.equal(written["model.language_model.layers.5.mlp.up_proj.weight"], expected)


def test_commands_of_the_documentation(tmp_path, monkeypatch, tensors):
    """Each command and Python block of docs/checkpoints.md's first section, on small files under the names it uses."""
    guide = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text("utf8")
    section = guide.split("## Convert\n")[1].split("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ORIGINAL, "original")
    shutil.copytree(TEXT, "Qwen/Qwen2.5-1.5B-Instruct")
    save_file(
        {name.removeprefix("featurizer."): t for name, t in tensors["vision_backbone"].items()}, "vision.safetensors"
    )
    blocks = re.findall(r"```(bash|python)\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 6
    names: dict = {}
    for language, block in blocks:
        if language == "bash":
            assert main(shlex.split(block)[1:]) == 0
        else:
            exec(block, names)
    for call in re.findall(r"^(processor\..*)\n# (.*)$", section, re.MULTILINE):
        assert eval(call[0], names) == call[1].replace("\\n", "\n")
    assert_same(read_original(Path("original-trained")), tensors)
