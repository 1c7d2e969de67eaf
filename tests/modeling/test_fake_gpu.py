"""What a GPU needs of the packed path: the host never waits for it."""

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from open_qwen2vl import OpenQwen2VLConfig, OpenQwen2VLForConditionalGeneration, PackingCollator
from tests.modeling.packs import join, make_document

CAPTIONS = ["a cat", "two dogs run in the park", "x", "blue and green squares, red circles on a mat", "what is shown"]


def make_batch(tokenizer, captions: list[str], seed: int = 0) -> dict:
    documents = [make_document(tokenizer, caption, seed + i) for i, caption in enumerate(captions)]
    batch = PackingCollator(pad_to_multiple_of=128)([join(documents)])
    batch.pop("packing_stats")
    return batch


@pytest.fixture
def config(tiny_model) -> OpenQwen2VLConfig:
    """One block in each backbone; heads of 16, which torch's varlen attention asks for."""
    config = tiny_model.config
    config.vision_config.num_hidden_layers = 2
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = config.text_config.layer_types[:1]
    config.text_config.head_dim = 16
    return config


def to_fake_gpu(batch: dict) -> dict:
    return {
        name: torch.empty(value.shape, dtype=value.dtype, device="cuda") if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


@pytest.mark.parametrize("known", [True, False], ids=["label_positions", "none"])
def test_the_packed_path_never_waits_for_the_device(config, tokenizer, monkeypatch, known):
    """On a GPU that does not exist: tensors are shapes only, and every look at a value is an error."""
    batch = make_batch(tokenizer, CAPTIONS)
    with torch.device("meta"):
        model = OpenQwen2VLForConditionalGeneration._from_config(
            config, attn_implementation="packed_varlen", dtype=torch.bfloat16
        )
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    # cuDNN is another backend of varlen attention, and chosen by asking the driver.
    backends = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    with FakeTensorMode(allow_non_fake_inputs=True), backends:
        model = model.to_empty(device="cuda").train()
        inputs = to_fake_gpu({**batch, "num_items_in_batch": torch.tensor(7)})
        if known:
            output = model(**inputs, return_row_losses=True)
            assert output.loss.device.type == "cuda" and output.row_losses.shape == (1,)
            return
        del inputs["label_positions"]
        # Where the collator does not say which positions are labelled, the device is asked: the test can fail.
        with pytest.raises(DynamicOutputShapeException, match="nonzero"):
            model(**inputs)
