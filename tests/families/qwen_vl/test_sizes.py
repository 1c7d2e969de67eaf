"""Grids and token counts from sizes alone, as the processors compute them from images."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLImageProcessor

from open_qwen2vl.families.interface import Media
from open_qwen2vl.families.qwen_vl.processing import QwenVLDocuments
from open_qwen2vl.families.qwen_vl.sizes import ImageSizes
from open_qwen2vl.processing.sample_error import SampleError
from tests.qwen_vl import make_processor

RELEASED = ImageSizes(14, 2, 56 * 56, 12_845_056)
STOCK = Qwen2VLImageProcessor()
sides = st.one_of(st.integers(1, 120), st.integers(1, 8000))


@settings(max_examples=1000, deadline=None)
@given(
    width=sides, height=sides, patch=st.sampled_from([14, 16]), least=st.integers(1, 60), most=st.integers(60, 9000)
)
@example(width=224, height=224, patch=14, least=4, most=16384)
@example(width=1, height=200, patch=16, least=4, most=16384)
def test_counts_are_the_stock_processors(width, height, patch, least, most):
    area = (2 * patch) ** 2
    sizes = ImageSizes(patch, 2, least * area, most * area)
    limits = {"patch_size": patch, "min_pixels": least * area, "max_pixels": most * area}
    try:
        expected = STOCK.get_number_of_image_patches(height, width, limits)
    except ValueError:
        assert max(width, height) > 200 * min(width, height)
        with pytest.raises(SampleError) as error:
            sizes.grid(width, height)
        assert error.value.reason == "image_aspect"
        return
    rows, columns = sizes.grid(width, height)
    assert rows * columns == expected and rows % 2 == columns % 2 == 0
    assert sizes.tokens(width, height) == expected // 4


def test_a_224_image_takes_66_tokens_with_its_marks(qwen_vl_tokenizer):
    layout = QwenVLDocuments(make_processor("qwen2_vl", qwen_vl_tokenizer, max_tokens=16384))
    ids = layout.placeholder_ids(Media("image", 224, 224))
    assert len(ids) == 66
    assert qwen_vl_tokenizer.convert_ids_to_tokens([ids[0], *set(ids[1:-1]), ids[-1]]) == [
        "<|vision_start|>",
        "<|image_pad|>",
        "<|vision_end|>",
    ]


def test_a_fixed_resolution_gives_every_image_the_same_grid():
    sizes = ImageSizes(14, 2, 56 * 56, 12_845_056, fixed_resolution=224)
    assert {sizes.grid(*size) for size in ((3, 4000), (224, 224), (30, 20))} == {(16, 16)}
    assert sizes.tokens(3, 4000) == 64


@pytest.mark.parametrize(
    ("limits", "message"),
    [((0, 10_000), "min_pixels"), ((4000, 3000), "min_pixels"), ((1, 100), "max_pixels"), ((1, 9999, 50), "fixed")],
)
def test_limits_that_no_image_meets_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        ImageSizes(14, 2, *limits)


def test_width_and_height_are_not_swapped():
    assert RELEASED.resized(width=280, height=140) == (140, 280)
    assert RELEASED.grid(width=280, height=140) == (10, 20)
