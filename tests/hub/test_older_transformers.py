"""The code that travels with a checkpoint runs on the transformers that vLLM asks for, 5.16.1 to 5.19."""

import json
import os
import subprocess
import sys

import pytest

from tests.hub.conftest import bare_site  # noqa: F401 - a fixture

CLIENT = """
import json, sys, torch, transformers
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
folder, options = sys.argv[1], {"trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained(folder, **options).eval()
processor = AutoProcessor.from_pretrained(folder, **options)
image, text = Image.linear_gradient("L").convert("RGB"), "<s><|image_pad|>\\na photo"
answers = []
for budget in ({}, {"image_seq_length": 9}):
    inputs = processor(images=image, text=text, return_tensors="pt", **budget)
    answers.append(model.generate(**inputs, max_new_tokens=8)[0].tolist())
content = [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]
chat = [{"role": "user", "content": content}]
settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
answers.append(processor.apply_chat_template(chat, **settings)["input_ids"][0].tolist())
answers += processor._get_num_multimodal_tokens(image_sizes=[[10, 10]], image_seq_length=9)["num_image_tokens"]
try:
    processor(images=image, text=text, image_seq_length=5)
except ValueError as error:
    answers.append(str(error))
answers.append(type(AutoModel.from_pretrained(folder, **options)).__name__)
assert "open_qwen2vl" not in sys.modules
print("ANSWERS", json.dumps([transformers.__version__, answers]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("version", "beside"), [("5.16.1", ["huggingface_hub<2"]), ("5.19.0", [])])
def test_the_same_answers_as_here(version, beside, tiny_model, processor, bare_site, tmp_path):  # noqa: F811
    other = tmp_path / "other"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(other)]
    installed = subprocess.run(
        [*pip, f"transformers=={version}", *beside], capture_output=True, text=True, timeout=600
    )
    if installed.returncode:
        pytest.skip(f"transformers {version} cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
    for part in (tiny_model, processor):
        part.save_pretrained(tmp_path / "model")

    def answers(*sites):
        command = [sys.executable, "-S", "-c", CLIENT, str(tmp_path / "model")]
        paths = os.pathsep.join(map(str, sites))
        home = {"PYTHONPATH": paths, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **home}, timeout=600)
        assert run.returncode == 0, run.stderr[-3000:]
        (line,) = (line for line in run.stdout.splitlines() if line.startswith("ANSWERS"))
        return json.loads(line.removeprefix("ANSWERS"))

    (older, given), (_, expected) = answers(other, bare_site), answers(bare_site)
    assert older == version and given == expected
