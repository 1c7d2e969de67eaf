"""Documents over the stock processor: ids as it makes them, nothing of it changed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLProcessor

from open_qwen2vl.families.interface import Media
from open_qwen2vl.families.qwen_vl.processing import QwenVLDocuments
from tests.families.qwen_vl.packs import SIZES, make_document, picture
from tests.qwen_vl import FAMILIES, make_processor, make_tokenizer


@pytest.fixture(params=FAMILIES)
def processor(request, tmp_path):
    """With a tokenizer of its own, which nobody else has touched."""
    return make_processor(request.param, make_tokenizer(tmp_path))


def test_a_document_has_the_ids_and_grids_of_the_stock_processor(processor):
    layout = QwenVLDocuments(processor)
    document = make_document(layout, ["a ", SIZES[0], " b ", SIZES[1], " c"])
    text = "a <|vision_start|><|image_pad|><|vision_end|> b <|vision_start|><|image_pad|><|vision_end|> c<|endoftext|>"
    images = [Image.new("RGB", size) for size in SIZES[:2]]
    stock = processor(text=[text], images=images, return_tensors="pt")
    assert torch.equal(document["input_ids"], stock["input_ids"][0])
    assert torch.equal(document["image_grid_thw"], stock["image_grid_thw"])


def test_the_tokenizer_and_the_processor_stay_as_they_are(processor):
    before = processor.tokenizer.backend_tokenizer.to_str(), len(processor.tokenizer), processor.chat_template
    layout = QwenVLDocuments(processor, max_pixels=6 * 56**2, fixed_resolution=None)
    make_document(layout, ["a", SIZES[0]])
    assert (
        processor.tokenizer.backend_tokenizer.to_str(),
        len(processor.tokenizer),
        processor.chat_template,
    ) == before
    assert processor.tokenizer.bos_token is None and layout.tokenizer is processor.tokenizer
    assert processor.image_processor.size["longest_edge"] != layout.sizes.max_pixels


def test_what_the_interface_asks(processor):
    layout = QwenVLDocuments(processor)
    media = Media("image", *SIZES[0])
    read = layout.read_media(picture(*SIZES[0]), media)
    work = layout.vision_work(media)
    assert work.patches == len(read["pixel_values"]) and work.squared == work.patches**2
    assert work.tokens == work.patches // 4 == len(layout.placeholder_ids(media)) - 2
    empty = layout.empty_media()
    joined = {name: torch.cat([empty[name], read[name]]) for name in read}
    assert all(torch.equal(joined[name], read[name]) and joined[name].dtype == read[name].dtype for name in read)
    assert layout.position_ids(np.arange(5), empty).tolist() == [list(range(5))] * 4
    # Which the packed forward compares with its config's.
    seconds = {"tokens_per_second": 2.0} if isinstance(processor, Qwen2_5_VLProcessor) else {}
    assert layout.forward_options() == seconds and layout.rope_rows == 4 and layout.needs_sizes
    end = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert layout.text_format.document_start == () and layout.text_format.document_end == (end,)


def test_the_fingerprint_is_json_and_knows_every_budget(processor):
    options = [{}, {"min_pixels": 5000}, {"max_pixels": 9000}, {"fixed_resolution": 32 * 14}]
    prints = [QwenVLDocuments(processor, **option).fingerprint() for option in options]
    assert json.loads(json.dumps(prints)) == prints
    assert all(one != other for i, one in enumerate(prints) for other in prints[:i])


def test_another_tokenizer_is_refused(processor, tokenizer):
    processor.tokenizer = tokenizer
    with pytest.raises(ValueError, match="vision_start"):
        QwenVLDocuments(processor)
