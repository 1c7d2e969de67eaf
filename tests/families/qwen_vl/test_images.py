"""uint8 patches of one frame: after normalising and doubling, what the stock processor makes of the same file."""

import io

import pytest
import torch
from PIL import Image

from open_qwen2vl.families.interface import Media
from open_qwen2vl.families.qwen_vl.processing import QwenVLDocuments
from open_qwen2vl.processing.sample_error import SampleError
from tests.families.qwen_vl.packs import SIZES, picture, stock_pixels
from tests.qwen_vl import FAMILIES, make_processor


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request, qwen_vl_tokenizer):
    return make_processor(request.param, qwen_vl_tokenizer, max_tokens=64)


@pytest.mark.parametrize("size", [*SIZES, (640, 480), (1, 150), (28, 28)])
def test_patches_are_the_stock_processors(processor, size):
    layout = QwenVLDocuments(processor)
    data = picture(*size, seed=size[0])
    read = layout.read_media(data, Media("image", *size))
    stock = processor.image_processor(Image.open(io.BytesIO(data)), return_tensors="pt")
    assert torch.equal(read["image_grid_thw"], stock["image_grid_thw"])
    assert read["pixel_values"].dtype == torch.uint8
    assert read["pixel_values"].nbytes * 8 == stock["pixel_values"].nbytes
    # Both resize with torch's integer kernel and normalise in fp32 in one order: not a bit differs.
    assert torch.equal(stock_pixels(read["pixel_values"], processor), stock["pixel_values"])


def test_the_pillow_backend_differs_by_what_its_resizing_differs(qwen_vl_tokenizer):
    """Without resizing not at all; with it by a few grey levels of 256."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = make_processor("qwen2_vl", qwen_vl_tokenizer)
    layout = QwenVLDocuments(processor)
    pillow = Qwen2VLImageProcessorPil(size=processor.image_processor.size)
    grey_level = 1 / (255 * min(pillow.image_std))
    for size, levels in (((112, 84), 1e-3), ((160, 120), 4)):
        smooth = Image.open(io.BytesIO(picture(8, 6))).resize(size, Image.Resampling.BICUBIC)
        file = io.BytesIO()
        smooth.save(file, "PNG")
        ours = stock_pixels(layout.read_media(file.getvalue(), Media("image", *size))["pixel_values"], processor)
        theirs = torch.as_tensor(pillow(smooth, return_tensors="pt")["pixel_values"])
        assert (ours - theirs).abs().max() <= levels * grey_level


def test_an_image_is_upright(processor):
    """EXIF says that it is to be turned: width and height swap, and so does the grid."""
    layout = QwenVLDocuments(processor)
    image = Image.open(io.BytesIO(picture(200, 100)))
    exif = Image.Exif()
    exif[0x0112] = 6
    file, turned = io.BytesIO(), io.BytesIO()
    image.save(file, "PNG", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(turned, "PNG")
    read = layout.read_media(file.getvalue(), Media("image", 100, 200))
    expected = layout.read_media(turned.getvalue(), Media("image", 100, 200))
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    assert read["image_grid_thw"][0, 1] > read["image_grid_thw"][0, 2]


@pytest.mark.parametrize(
    ("data", "media", "reason"),
    [
        (b"no image", Media("image", 10, 10), "corrupt_image"),
        (picture(40, 30)[:60], Media("image", 40, 30), "corrupt_image"),
        (picture(40, 30), Media("image", 30, 40), "image_changed"),
        (picture(402, 2), Media("image", 402, 2), "image_aspect"),
    ],
)
def test_a_broken_or_changed_image_is_a_named_skip(processor, data, media, reason):
    with pytest.raises(SampleError) as error:
        QwenVLDocuments(processor).read_media(data, media)
    assert error.value.reason == reason
