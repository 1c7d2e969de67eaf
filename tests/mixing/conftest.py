"""Plans of texts: a source that is close to what is held out, one that is noise, and what is held out."""

import json
import random
from pathlib import Path

import pytest
import yaml

from open_qwen2vl.data import plan_packs

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain.py"
NEAR = "a photo of two dogs in the park"
LETTERS = "blue green red circles squares mat cat run what is".split()


@pytest.fixture(scope="session")
def text_plan(tokenizer):
    """`text_plan(folder, name, texts)`: their plan, in packs of 32 positions."""

    def build(folder: Path, name: str, texts: list[str]) -> dict:
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        plan_packs([file], folder / name, tokenizer, image_seq_length=4, max_length=32, num_workers=1)
        return {"path": str(folder / name)}

    return build


@pytest.fixture(scope="session")
def sources_file(tmp_path_factory, text_plan, backbones) -> Path:
    """SOURCES.yaml of two sources and one domain, for two steps of two packs."""
    folder, rng = tmp_path_factory.mktemp("sources"), random.Random(0)
    noise = [" ".join(rng.choices(LETTERS, k=8)) for _ in range(40)]
    options = {
        "vision_model": backbones["vision"],
        "text_model": backbones["text"],
        "train_packs": [text_plan(folder, "near", [NEAR] * 40), text_plan(folder, "noise", noise)],
        "eval_packs": text_plan(folder, "held-out", [NEAR] * 4)["path"],
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 3e-3,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "dataloader_num_workers": 0,
        "use_cpu": True,
    }
    path = folder / "sources.yaml"
    path.write_text(yaml.safe_dump(options))
    return path
