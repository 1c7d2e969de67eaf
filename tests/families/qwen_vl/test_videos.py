"""Clips become the ids and the pixels that the stock processors make of the same frames."""

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

from open_qwen2vl import prepare_for_packing
from open_qwen2vl.families.interface import Media
from open_qwen2vl.families.qwen_vl.processing import QwenVLDocuments
from open_qwen2vl.processing.sample_error import SampleError
from open_qwen2vl.processing.videos import video_frames
from tests.clips import animation, clip, moving_frames
from tests.qwen_vl import FAMILIES, make_model, make_processor

CLIPS = {
    "five seconds": (moving_frames(50), 10, "mp4"),
    "an odd number": (moving_frames(13, 100, 60), 5, "webm"),
    "short": (moving_frames(3, 50, 90), 30000 / 1001, "mkv"),
    "one frame": (moving_frames(1), 10, "mp4"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def processor(family, qwen_vl_tokenizer):
    return make_processor(family, qwen_vl_tokenizer, max_tokens=64)


def described(layout: QwenVLDocuments, data: bytes) -> tuple[Media, bool]:
    return layout.describe_video(lambda limit: data[:limit])


@pytest.mark.parametrize("name", CLIPS)
def test_ids_grids_and_pixels_are_the_stock_processors(family, processor, qwen_vl_tokenizer, name):
    layout, data = QwenVLDocuments(processor), clip(*CLIPS[name])
    media, is_broken = described(layout, data)
    assert media.frames == len(CLIPS[name][0]) and media.fps == pytest.approx(CLIPS[name][1]) and not is_broken
    read = layout.read_media(data, media)
    numbers = layout.videos.numbers(media.frames, media.fps)
    frames = np.stack(list(video_frames(data, numbers, media.frames, media.fps)))
    if len(frames) == 1:
        # The stock ones divide by zero, or say that an image is none: the doubled frame is ours.
        frames, numbers = np.concatenate([frames, frames]), np.array([0, 0])
    metadata = VideoMetadata(media.frames, media.fps, frames_indices=numbers.tolist())
    stock = processor(
        text=[f"{layout.media_strings['video']}a cat"], videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
        video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )  # fmt: skip
    block = layout.placeholder_ids(media)
    assert stock["input_ids"][0].tolist() == block + qwen_vl_tokenizer("a cat")["input_ids"]
    assert torch.equal(read["video_grid_thw"], stock["video_grid_thw"])
    assert read["pixel_values_videos"].dtype == torch.uint8
    model = prepare_for_packing(make_model(family, qwen_vl_tokenizer), processor)
    found = model._as_stock_pixels({"pixel_values_videos": read["pixel_values_videos"]})["pixel_values_videos"]
    # Both resize with torch's integer kernel and normalise in fp32 in one order: not a bit differs.
    assert torch.equal(found, stock["pixel_values_videos"])
    if family == "qwen2_5_vl" and name != "one frame":
        assert torch.equal(read["second_per_grid_ts"], torch.as_tensor(stock["second_per_grid_ts"]))


def test_work_is_a_segment_for_each_pair_of_frames(processor):
    layout = QwenVLDocuments(processor)
    media = Media("video", 64, 48, 50, 10.0)
    pairs, rows, columns = layout.videos.grid(*media[1:])
    assert pairs == 5
    area = rows * columns
    work = layout.vision_work(media)
    assert work[:3] == (pairs * area, pairs * area**2, pairs * area // 4)
    # Windows are 2.5's alone, and never more than the whole.
    assert 0 <= work.windowed <= work.squared


@pytest.mark.parametrize("lossless", [True, False])
def test_extracted_frames_stand_for_the_clip(processor, lossless):
    layout, data = QwenVLDocuments(processor), clip(moving_frames(30, 90, 60), 10)
    media, _ = described(layout, data)
    file = layout.extract_frames(data, lossless)
    assert described(layout, file) == (media, False)
    expected, found = layout.read_media(data, media), layout.read_media(file, media)
    assert torch.equal(expected["video_grid_thw"], found["video_grid_thw"])
    difference = (expected["pixel_values_videos"].int() - found["pixel_values_videos"].int()).abs().float()
    assert difference.max() == 0 if lossless else 0 < difference.mean() < 2


def test_frames_of_other_options_or_of_another_clip_are_refused(processor):
    layout, data = QwenVLDocuments(processor), clip(moving_frames(30), 10)
    media, _ = described(layout, data)
    file = layout.extract_frames(data, False)
    others = QwenVLDocuments(processor, video_fps=1.0)
    for call, reason in (
        (lambda: described(others, file), "other_frames"),
        (lambda: layout.read_media(file, media._replace(frames=31)), "video_changed"),
        (lambda: layout.read_media(file[:3000], media), "corrupt_frames"),
        (lambda: described(layout, file[:560]), "corrupt_frames"),
        (lambda: layout.read_media(data, media._replace(width=99)), "video_changed"),
        (lambda: described(layout, b"no clip"), "corrupt_video"),
        (lambda: layout.placeholder_ids(Media("video", 2, 500, 9, 3.0)), "video_aspect"),
    ):
        with pytest.raises(SampleError) as error:
            call()
        assert error.value.reason == reason


def test_a_clip_that_breaks_off_is_used_as_far_as_it_goes_or_left_out_by_name(processor, caplog):
    layout, strict = QwenVLDocuments(processor), QwenVLDocuments(processor, skip_broken_videos=True)
    whole = clip(moving_frames(50), 10, "mkv")
    data = whole[: int(0.8 * len(whole))]
    media, is_broken = described(layout, data)
    assert is_broken and 10 < media.frames < 45
    assert len(layout.read_media(data, media)["pixel_values_videos"])
    file = layout.extract_frames(data, False)
    assert described(layout, file) == (media, True)
    # Planned when it was whole.
    planned, _ = described(layout, whole)
    read = layout.read_media(data, planned)
    assert read["video_grid_thw"].tolist() == layout.read_media(whole, planned)["video_grid_thw"].tolist()
    assert "breaks off" in caplog.text
    for call in (
        lambda: described(strict, data),
        lambda: described(strict, file),
        lambda: strict.read_media(data, planned),
    ):
        with pytest.raises(SampleError) as error:
            call()
        assert error.value.reason == "broken_video"


def test_an_animation_is_sampled_by_its_time_stamps(processor):
    """Its third frame is shown for most of the time, from 0.2 to 3.2 seconds."""
    frames, durations = moving_frames(6), [100, 100, 3000, 100, 100, 600]
    layout, data = QwenVLDocuments(processor), animation(frames, durations, "WEBP")
    media, _ = described(layout, data)
    assert (media.frames, media.fps) == (6, pytest.approx(1.5))
    shown = list(video_frames(data, range(6), media.frames, media.fps))
    levels = [int(one[0, 0, 0]) for one in frames]
    assert [levels.index(int(one[0, 0, 0])) for one in shown] == [0, 2, 2, 2, 2, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"text_after_video": "frames"}, "text_after_video"), ({"max_frames": 3}, "max_frames")],
)
def test_options_are_checked(processor, options, message):
    with pytest.raises(ValueError, match=message):
        QwenVLDocuments(processor, **options)
