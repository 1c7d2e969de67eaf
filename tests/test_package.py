"""The package as a user gets it: what importing costs, what a wheel carries."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(code: str, **options) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **options)
    return result.stdout.strip()


def test_import_registers_and_stays_light():
    code = (
        "import sys, open_qwen2vl; from transformers import AutoConfig; "
        "print(AutoConfig.for_model('open_qwen2vl').image_seq_length); "
        "print([m for m in ('trl', 'datasets', 'peft', 'open_clip', 'transformers.trainer', 'matplotlib') "
        "if m in sys.modules])"
    )
    assert run(code).splitlines() == ["144", "[]"]


def test_public_names_resolve():
    import open_qwen2vl

    for name in open_qwen2vl.__all__:
        assert getattr(open_qwen2vl, name) is not None


def test_wheel_carries_its_template_and_runs_elsewhere(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert (site / "open_qwen2vl/processing/chat_template.jinja").stat().st_size > 0
    recipes = next(site.glob("*.data")) / "data/share/open_qwen2vl/recipes"
    for name in ("pretrain.py", "pretrain_2b.yaml", "accelerate/single_gpu.yaml", "quickstart/run.sh"):
        assert (recipes / name).read_bytes() == (ROOT / "recipes" / name).read_bytes()
    code = "import open_qwen2vl, os; print(os.path.dirname(open_qwen2vl.__file__)); import open_qwen2vl.cli"
    out = run(code, cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"})
    assert out == str(site / "open_qwen2vl")
