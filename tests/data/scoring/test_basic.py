import socket

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from open_qwen2vl.data.scoring.basic import BasicScorer
from open_qwen2vl.data.scoring.pairs import RawPair
from open_qwen2vl.processing.images import read_image_size
from open_qwen2vl.processing.sample_error import SampleError


@pytest.fixture(scope="module")
def scorer():
    return BasicScorer()


@pytest.fixture(scope="module")
def picture(encode):
    return encode(Image.new("RGB", (60, 20)))


def measure(scorer, picture, caption):
    (values,) = scorer.score([scorer.prepare(RawPair("k", "0" * 32, picture, caption))])
    return dict(zip(scorer.parts, values, strict=True))


def test_numbers_of_a_pair(scorer, picture):
    found = measure(scorer, picture, "  two dogs\nrun in the park \n")
    assert found.pop("english") > 0.5
    assert found == {"words": 6, "characters": 24, "smaller_side": 20, "aspect_ratio": 3}


@pytest.mark.parametrize(
    ("caption", "english"),
    [
        ("a man rides a horse along the beach", True),
        ("A MAN RIDES A HORSE ALONG THE BEACH", True),
        ("ein Mann reitet auf einem Pferd am Strand", False),
        ("un homme monte à cheval sur la plage", False),
        ("一个人在海滩上骑马", False),
    ],
)
def test_language_without_a_connection(scorer, picture, monkeypatch, caption, english):
    monkeypatch.setattr(socket.socket, "connect", None)
    assert (measure(scorer, picture, caption)["english"] > 0) == english


@settings(deadline=None, max_examples=50)
@given(st.text(min_size=1).filter(str.strip))
def test_any_caption_has_numbers(scorer, picture, caption):
    found = measure(scorer, picture, caption)
    assert np.isfinite(list(found.values())).all() and 0 <= found["english"] <= 1


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_size_from_the_header(encode, image_format):
    data = encode(Image.effect_noise((70, 30), 90), image_format)
    assert read_image_size(data) == (70, 30)
    if image_format != "WEBP":  # whose reader asks for the whole file
        assert read_image_size(data[: len(data) // 2]) == (70, 30)


def test_headers_that_are_refused(encode):
    for data, reason in (
        (b"no image", "corrupt_image"),
        (encode(Image.new("1", (10_000, 10_000))), "image_too_large"),
        (encode(Image.new("1", (20_000, 20_000))), "image_too_large"),
    ):
        with pytest.raises(SampleError) as error:
            read_image_size(data)
        assert error.value.reason == reason
