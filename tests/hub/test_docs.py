"""The commands of the documentation, run as they stand there, against a Hub and a tiny model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.hub_server import hub_server

DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def blocks(*titles: str) -> list[tuple[str, str]]:
    """Language and content of the code blocks below these headings."""
    found = []
    for section in re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE):
        if section.splitlines()[:1] in [[title] for title in titles]:
            found += re.findall(r"^```(python|bash)\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    return found


def as_script(found: list[tuple[str, str]]) -> str:
    """One Python program of all blocks, in order."""
    steps = [code if kind == "python" else f"subprocess.run({code!r}, shell=True, check=True)" for kind, code in found]
    return "\n".join(["import subprocess", *steps])


@pytest.fixture
def place(tiny_model, processor, tmp_path):
    """A working folder with what the document's commands read."""
    run = tmp_path / "runs" / "2b"
    tiny_model.save_pretrained(run / "model")
    processor.save_pretrained(run / "model")
    results = {"steps": 3, "epochs": 1.0, "tokens": 99, "images": 4, "train_seconds": 36.0, "devices": 1}
    results |= {"tokens_per_second": 2.75, "tflops_per_second": 0.1, "final_loss": 2.5, "dropped_documents": {}}
    totals = {"shards": 1, "samples": 4, "skipped": {}, "documents": 4, "images": 4, "packs": 1, "fill": 1.0}
    plan = {"image_seq_length": 4, "max_length": 99, "text_format": "caption", "totals": totals}
    (run / "train_results.json").write_text(json.dumps(results))
    (tmp_path / "packs").mkdir()
    (tmp_path / "packs" / "plan.json").write_text(json.dumps(plan))
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "cat.png")
    return tmp_path


def run(script: str, hub, place: Path, home: str, *options: str, **environment: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment |= {"PATH": path, "OMP_NUM_THREADS": "1", **hub.environment(place / home)}
    command = [sys.executable, *options, "-c", script]
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd=place, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_load_push_remote_code_and_adapters(place, bare_site):
    with hub_server() as hub:
        run(as_script(blocks("Load", "Push", "Adapters")), hub, place, "home")
        assert "| Steps | 3 |" in hub.repos["models", "you/my-model"].files["README.md"].decode()
        assert "adapter_model.safetensors" in hub.repos["models", "you/my-adapter"].files
        assert (place / "merged" / "model.safetensors").exists()
        run(as_script(blocks("Remote code")), hub, place, "other_home", "-S", PYTHONPATH=str(bare_site))
        assert (place / "copy" / "modeling_open_qwen2vl.py").exists()
        assert hub.refused == []


def test_every_section_has_commands():
    assert [len(blocks(title)) for title in ("Load", "Push", "Remote code", "Adapters")] == [1, 3, 1, 2]
