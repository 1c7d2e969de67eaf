"""M-RoPE positions without a model are those of transformers' `get_rope_index`."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_qwen2vl.families.qwen_vl.positions import VideoRule, mrope_positions
from tests.qwen_vl import FAMILIES, make_model

IMAGE, VIDEO = 1001, 1002
text = st.tuples(st.just("text"), st.integers(1, 7))
image = st.tuples(st.just("image"), st.integers(1, 4), st.integers(1, 4))
video = st.tuples(st.just("video"), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
documents = st.lists(st.one_of(text, image, video), min_size=1, max_size=6)


def lay_out(entries: list[tuple], frames_apart: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids with a mark around each image and video (and, in Qwen3-VL, each frame), and the grids in patches."""
    ids, images, videos = [], [], []
    for kind, *size in entries:
        if kind == "text":
            ids += [5] * size[0]
        elif kind == "image":
            ids += [7, *[IMAGE] * (size[0] * size[1]), 8]
            images.append((1, 2 * size[0], 2 * size[1]))
        else:
            frames, area = size[0], size[1] * size[2]
            ids += [5, 7, *[VIDEO] * area, 8] * frames if frames_apart else [7, *[VIDEO] * (frames * area), 8]
            videos.append((frames, 2 * size[1], 2 * size[2]))
    return np.array(ids), np.array(images).reshape(-1, 3), np.array(videos).reshape(-1, 3)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, qwen_vl_tokenizer):
    return make_model(request.param, qwen_vl_tokenizer).model


@settings(max_examples=100, deadline=None)
@given(entries=documents, seconds=st.lists(st.sampled_from([0.1, 0.5, 1.0, 1.7, 2 / 3]), min_size=6, max_size=6))
def test_positions_are_those_of_get_rope_index(model, entries, seconds):
    kind = model.config.model_type
    ids, images, videos = lay_out(entries, frames_apart=kind == "qwen3_vl")
    rule = {
        "qwen2_vl": VideoRule(),
        "qwen2_5_vl": VideoRule(tokens_per_second=model.config.vision_config.to_dict().get("tokens_per_second")),
        "qwen3_vl": VideoRule(frames_apart=True),
    }[kind]
    options = {"second_per_grid_ts": torch.tensor(seconds)} if kind == "qwen2_5_vl" else {}
    expected, _ = model.get_rope_index(
        torch.from_numpy(ids)[None],
        mm_token_type_ids=torch.from_numpy((ids == IMAGE) + 2 * (ids == VIDEO))[None],
        image_grid_thw=torch.from_numpy(images) if len(images) else None,
        video_grid_thw=torch.from_numpy(videos) if len(videos) else None,
        **options,
    )
    positions = mrope_positions(ids, IMAGE, images, 2, VIDEO, videos, seconds, rule)
    assert positions.dtype == np.int64 and positions.shape == (4, len(ids))
    np.testing.assert_array_equal(positions[0], np.arange(len(ids)))
    np.testing.assert_array_equal(positions[1:], expected[:, 0].numpy())


@pytest.mark.parametrize(
    ("rule", "seconds", "times", "next_text"),
    [
        (VideoRule(), None, [1, 2, 3, 4, 5], 3),
        (VideoRule(after="time"), None, [1, 2, 3, 4, 5], 6),
        (VideoRule(tokens_per_second=4), [0.5], [1, 3, 5, 7, 9], 3),
        (VideoRule(after="time", tokens_per_second=4), [0.5], [1, 3, 5, 7, 9], 10),
    ],
)
def test_text_behind_a_video_follows_the_rule(rule, seconds, times, next_text):
    ids = np.array([5, *[VIDEO] * 10, 5, 5])
    positions = mrope_positions(ids, IMAGE, [], 2, VIDEO, np.array([[5, 2, 4]]), seconds, rule)
    assert positions[1, 1:11:2].tolist() == times
    assert positions[2:, 1:3].tolist() == [[1, 1], [1, 2]]
    assert positions[1:, 11].tolist() == [next_text] * 3


def test_an_image_then_text():
    """2 x 3 tokens at 4: the text goes on at 7."""
    ids = np.array([5] * 4 + [IMAGE] * 6 + [5])
    positions = mrope_positions(ids, IMAGE, np.array([[1, 4, 6]]), 2)
    assert positions[1, 4:].tolist() == [4, 4, 4, 4, 4, 4, 7]
    assert positions[2, 4:].tolist() == [4, 4, 4, 5, 5, 5, 7]
    assert positions[3, 4:].tolist() == [4, 5, 6, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "grids",
    [[], [[1, 2, 2], [1, 2, 2], [1, 2, 2]], [[1, 2, 4], [1, 2, 2]], [[1, 2, 8], [1, 2, 2]], [[1, 4, 4], [1, 2, 2]]],
)
def test_grids_that_are_not_the_placeholders_are_refused(grids):
    ids = np.array([5, IMAGE, 5, IMAGE])
    with pytest.raises(ValueError, match="grid"):
        mrope_positions(ids, IMAGE, np.array(grids).reshape(-1, 3), 2)
