"""A tiny model's folder and easy-VQA as tasks, for the tests that run lmms-eval."""

import os
from pathlib import Path

import pytest
import torch

from open_qwen2vl import OpenQwen2VLForConditionalGeneration


@pytest.fixture(scope="session")
def datasets_cache(tmp_path_factory) -> Path:
    """Where lmms-eval keeps the data sets that it converts."""
    folder = tmp_path_factory.mktemp("datasets")
    os.environ["LMMS_EVAL_DATASETS_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def easyvqa(tmp_path_factory, datasets_cache) -> Path:
    """Twenty questions as `easyvqa_gen` and `easyvqa_mc`."""
    from tests.evaluation.easyvqa import write_tasks

    return write_tasks(tmp_path_factory.mktemp("tasks") / "easyvqa")


@pytest.fixture(scope="session")
def model_folder(backbones, processor, tmp_path_factory) -> Path:
    """The tiny model with its processor, saved."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**backbones, image_seq_length=4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
