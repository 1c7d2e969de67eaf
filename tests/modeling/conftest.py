"""What tests of compiled models and of GPUs share."""

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM


@pytest.fixture(scope="session")
def gpu_backbones(backbones, tmp_path_factory) -> dict[str, str]:
    """The tiny backbones, with heads that the kernels of a GPU take."""
    folder = tmp_path_factory.mktemp("gpu_backbones")
    config = Qwen2Config.from_pretrained(backbones["text"])
    config.head_dim = 16
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbones["text"]).save_pretrained(folder)
    return {**backbones, "text": str(folder)}
