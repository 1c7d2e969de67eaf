"""The package as a user gets it: what importing costs, what a wheel carries."""

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, **options) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **options)
    return result.stdout.strip()


def test_importing_the_package_and_every_help_are_light():
    """Counted in modules, since seconds are a machine's own."""
    code = """
import contextlib, io, sys
import open_qwen2vl
from open_qwen2vl.cli import COMMANDS, main
names = [command.__name__.rpartition(".")[2].replace("_", "-") for command in COMMANDS]
for arguments in [[], *([name] for name in names)]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:
        main([*arguments, "--help"])
    assert "usage: open-qwen2vl" in text.getvalue(), arguments
heavy = ("torch", "transformers", "numpy", "pyarrow", "PIL")
print(len(sys.modules), *(name for name in heavy if name in sys.modules))
"""
    modules, *heavy = run(code).split()
    assert heavy == [] and int(modules) < 200


# Before, in the middle of and after the import of the Auto classes.
@pytest.mark.parametrize(
    "code",
    [
        "import open_qwen2vl; import transformers",
        "from transformers import AutoModel, AutoProcessor; import open_qwen2vl",
        "import open_qwen2vl.modeling.modeling_open_qwen2vl",
    ],
)
def test_auto_classes_find_the_model(code):
    check = """
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING, PROCESSOR_MAPPING, AutoConfig
config = AutoConfig.for_model("open_qwen2vl")
tables = (MODEL_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PROCESSOR_MAPPING)
print(config.image_seq_length, *(table[type(config)].__name__ for table in tables))
import sys
print([m for m in ("trl", "datasets", "peft", "open_clip", "transformers.trainer", "matplotlib") if m in sys.modules])
print([finder for finder in sys.meta_path if type(finder).__module__.startswith("open_qwen2vl")])
"""
    names = "OpenQwen2VLModel OpenQwen2VLForConditionalGeneration OpenQwen2VLProcessor"
    assert run(code + check).splitlines() == [f"144 {names}", "[]", "[]"]


def test_public_names_resolve():
    import open_qwen2vl

    everything = {}
    exec("from open_qwen2vl import *", everything)
    assert set(open_qwen2vl.__all__) <= {*dir(open_qwen2vl)} & {*everything}
    for name in open_qwen2vl.__all__:
        value = getattr(open_qwen2vl, name)
        assert value is everything[name] and pickle.loads(pickle.dumps(value)) is value
    with pytest.raises(AttributeError, match="no attribute 'PackedTrainers'"):
        open_qwen2vl.PackedTrainers  # noqa: B018


def test_wheel_carries_its_template_and_runs_elsewhere(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert (site / "open_qwen2vl/processing/chat_template.jinja").stat().st_size > 0
    recipes = next(site.glob("*.data")) / "data/share/open_qwen2vl/recipes"
    for name in (
        "pretrain.py",
        "pretrain_2b.yaml",
        "accelerate/single_gpu.yaml",
        "quickstart/run.sh",
        "real_lm/run.sh",
        "qwen2_vl/run.sh",
    ):
        assert (recipes / name).read_bytes() == (ROOT / "recipes" / name).read_bytes()
    code = "import open_qwen2vl, os; print(os.path.dirname(open_qwen2vl.__file__)); import open_qwen2vl.cli"
    code += "; from open_qwen2vl.mixing.options import own_recipe; print(own_recipe())"
    out = run(code, cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"})
    assert out.splitlines() == [str(site / "open_qwen2vl"), str(recipes / "pretrain.py")]
