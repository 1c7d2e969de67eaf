"""transformers' common tests of models and processors, as they stand, on this project's classes."""

import unittest

import pytest
import torch

from open_qwen2vl import (
    OpenQwen2VLConfig,
    OpenQwen2VLForConditionalGeneration,
    OpenQwen2VLModel,
    OpenQwen2VLProcessor,
)
from tests.peer.common_tests import load_common_tests, run_common_tests

pytestmark = pytest.mark.slow

NETWORK = "it downloads a picture; tests/processing reads pictures of every kind from files and data URIs"
CODE = "of a class outside transformers the saved parts have an auto_map, which they had not before saving"
PROCESSOR_LEFT_OUT = {
    "test_apply_chat_template_image_0": NETWORK,
    "test_apply_chat_template_image_1": NETWORK,
    "test_processor_text_has_no_visual": NETWORK,
    "test_processor_from_and_save_pretrained": CODE,
    "test_processor_from_and_save_pretrained_as_nested_dict": CODE,
    "test_processor_from_pretrained_vs_from_components": CODE,
    "test_chat_template_save_loading": "it saves the form of transformers 4 beside named templates, which is refused",
    "test_subprocessor_defaults_1_images": "the Auto class resizes with torchvision, which is a grey level off; this "
    "processor always with Pillow",
}
MODEL_LEFT_OUT = {
    "test_generation_tester_mixin_inheritance": "the mixin it asks for is not in the source distribution; "
    "tests/modeling/test_generation.py has its kinds of generation",
}


def test_processor(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    common = load_common_tests("test_processing_common")

    class Case(common.ProcessorTesterMixin, unittest.TestCase):
        processor_class = OpenQwen2VLProcessor
        model_id = str(tmp_path)
        maxDiff = None
        # The tiny vocabulary needs more tokens for their texts.
        images_text_kwargs_max_length, images_text_kwargs_override_max_length = 200, 190

    assert run_common_tests(Case, PROCESSOR_LEFT_OUT) == {}


class ModelTester:
    """Sizes and inputs of a tiny model, in the form that the common tests ask for."""

    batch_size, seq_length, image_size, image_seq_length, vocab_size = 3, 7, 16, 4, 99
    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size = 32, 2, 4, 37
    is_training, image_token_id, pad_token_id = True, 4, 1

    def get_config(self) -> OpenQwen2VLConfig:
        vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 4}
        text = {"vocab_size": self.vocab_size, "num_key_value_heads": 2, "pad_token_id": self.pad_token_id}
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            text[name] = getattr(self, name)
        return OpenQwen2VLConfig(
            vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4, **vision},
            text_config={"model_type": "qwen2", "bos_token_id": 2, "eos_token_id": 3, **text},
            image_token_id=self.image_token_id,
            image_seq_length=self.image_seq_length,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[OpenQwen2VLConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(5, self.vocab_size, (self.batch_size, self.seq_length))
        ids[:, : self.image_seq_length] = self.image_token_id
        pixels = torch.rand(self.batch_size, 3, self.image_size, self.image_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_model():
    common = load_common_tests("test_modeling_common")

    class Case(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (OpenQwen2VLModel, OpenQwen2VLForConditionalGeneration)
        model_tester = ModelTester()
        _is_composite = True
        test_resize_embeddings = True

        def setUp(self):
            super().setUp()
            if self._testMethodName.startswith("test_training"):
                self.all_model_classes = self.all_model_classes[1:]  # the base model has no loss

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
            # Which classes take labels stands in tables of transformers.
            return inputs | ({"labels": inputs["input_ids"]} if return_labels else {})

    assert run_common_tests(Case, MODEL_LEFT_OUT) == {}
