"""The declared tensor-parallel plan trains: loss and gradients on two ranks equal those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import sys
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText
import open_qwen2vl

def run(**options):
    model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32, **options)
    image = model.config.image_token_id
    ids = torch.tensor([[*[image] * 4, 30, 31, 32, 33, 34, 60, 61]])
    pixels = (torch.arange(3 * 32 * 32) % 251).to(torch.uint8).view(1, 3, 32, 32)
    output = model(input_ids=ids, pixel_values=pixels, labels=ids)
    output.loss.backward()
    full = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t
    parts = [p for p in model.parameters() if hasattr(p, "to_local")]
    sharded = sum(p.numel() != p.to_local().numel() for p in parts)
    return full(output.loss), {name: full(p.grad) for name, p in model.named_parameters()}, sharded

loss, gradients, none = run()
other, others, sharded = run(tp_plan="auto")
assert none == 0 and sharded > 10, sharded
torch.testing.assert_close(other, loss)
for name, gradient in gradients.items():
    torch.testing.assert_close(others[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text: f"{name}: {text}")
print("equal")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_tensor_parallel_gradients_equal_those_of_one_process(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "CUDA_VISIBLE_DEVICES": ""}
    command += [str(tmp_path / "rank.py"), str(tmp_path / "model")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    assert run.returncode == 0 and run.stdout.count("equal") == 2, run.stderr[-3000:]
