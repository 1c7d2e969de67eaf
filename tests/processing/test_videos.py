"""Clips of every container are counted and decoded; what is wrong with one is a reason."""

import io
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from open_qwen2vl.processing.sample_error import SampleError
from open_qwen2vl.processing.videos import read_video_header, video_frames
from tests.clips import CODECS, animation, clip, moving_frames, rotated


def levels(data: bytes, numbers, frames: int, fps: float) -> list[int]:
    """The grey level of each frame's left half, which tells the frame."""
    return [round(float(one[:, : one.shape[1] // 2 - 4].mean())) for one in video_frames(data, numbers, frames, fps)]


@pytest.mark.parametrize("rate", [10, 30000 / 1001])
@pytest.mark.parametrize("container", CODECS)
def test_frames_of_a_container_are_those_that_were_written(container, rate):
    frames = moving_frames(26)
    data = clip(frames, rate, container)
    header = read_video_header(data)
    assert header == (64, 48, 26, pytest.approx(rate, rel=1e-6), False)
    numbers = [0, 1, 2, 7, 8, 20, 25]
    found = levels(data, numbers, header.frames, header.fps)
    assert np.abs(np.array(found) - frames[numbers, 0, 0, 0].astype(int)).max() <= 3  # they are 7 apart


def test_a_clip_without_a_constant_rate_is_read_by_its_time_stamps():
    """At 0.5 frames a second number 1 is what is on screen after two seconds, and number 2 after four."""
    frames, times = moving_frames(6), [0, 0.1, 0.2, 3.0, 3.1, 11.5]
    for container in ("mp4", "mkv"):
        data = clip(frames, 10, container, times)
        header = read_video_header(data)
        assert header.frames == 6 and 11.5 < 6 / header.fps < 14
        found = levels(data, [0, 1, 2], 6, 0.5)
        assert np.abs(np.array(found) - frames[[0, 2, 4], 0, 0, 0].astype(int)).max() <= 3


def test_a_clip_is_upright():
    data = clip(moving_frames(6), 10)
    turned = rotated(data)
    assert read_video_header(turned)[:2] == (48, 64)
    expected, found = (next(video_frames(one, [3], 6, 10.0)) for one in (data, turned))
    np.testing.assert_array_equal(found, np.rot90(expected, -1))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_a_clip(format):
    data = animation(moving_frames(5), [100, 100, 200, 0, 500], format)
    header = read_video_header(data)
    # A frame without a duration is shown for as long as browsers show it.
    assert header == (64, 48, 5, pytest.approx(5.0), False)
    expected = moving_frames(5)[[0, 2, 3, 4, 4], 0, 0, 0].astype(int)
    assert np.abs(np.array(levels(data, range(5), 5, 5.0)) - expected).max() <= 2


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_an_animation_that_breaks_off_is_used_as_far_as_it_goes_or_a_reason(format):
    noise = np.random.default_rng(0).integers(0, 256, (8, 48, 64, 3), dtype=np.uint8)
    whole = animation(noise, [100] * 8, format)
    data = whole[: int(0.6 * len(whole))]
    if format == "WEBP":  # Pillow reads nothing of it
        with pytest.raises(SampleError) as error:
            read_video_header(data)
        assert error.value.reason == "corrupt_video"
        return
    header = read_video_header(data)
    assert header.is_broken and 2 < header.frames < 8
    assert len(list(video_frames(data, [0, 1, 7], 8, 10.0))) == 3


def test_a_picture_is_a_clip_of_one_frame():
    file = io.BytesIO()
    Image.fromarray(moving_frames(1)[0]).save(file, "PNG")
    assert read_video_header(file.getvalue())[:3] == (64, 48, 1)
    (frame,) = video_frames(file.getvalue(), [0], 1, 10.0)
    np.testing.assert_array_equal(frame, moving_frames(1)[0])


def faststart(frames: np.ndarray, path: Path) -> bytes:
    """An mp4 whose header stands before its frames, as those of the web do."""
    source = av.open(io.BytesIO(clip(frames, 10)))
    with av.open(path, "w", format="mp4", options={"movflags": "faststart"}) as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    return path.read_bytes()


@pytest.mark.parametrize("container", ["mkv", "webm", "avi", "mp4"])
def test_a_clip_that_breaks_off_is_counted_as_far_as_it_goes(container, caplog, tmp_path):
    frames = moving_frames(50)
    whole = faststart(frames, tmp_path / "a.mp4") if container == "mp4" else clip(frames, 10, container)
    data = whole[: int(0.9 * len(whole))]
    header = read_video_header(data)
    assert header.is_broken and 20 < header.frames < 50
    assert not read_video_header(whole).is_broken
    # Planned before it broke: its last frame stands for what is not there.
    found = levels(data, [0, 10, 49], 50, 10.0)
    assert len(found) == 3 and found[0] < found[1] < found[2] < frames[-1, 0, 0, 0]
    assert "breaks off" in caplog.text
    with pytest.raises(SampleError) as error:
        list(video_frames(data, [0, 10, 49], 50, 10.0, skip_broken=True))
    assert error.value.reason == "broken_video"


def test_damage_in_the_middle_costs_its_frames():
    frames = moving_frames(40)
    data = bytearray(clip(frames, 10, "avi"))
    data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    found = levels(bytes(data), range(0, 40, 5), 40, 10.0)
    assert len(found) == 8 and abs(found[0] - 30) <= 3 and abs(found[-1] - int(frames[35, 0, 0, 0])) <= 40


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "corrupt_video"),
        (b"no clip at all", "corrupt_video"),
        (b"\0\0\0\x18ftypmp42" + bytes(300), "corrupt_video"),
        (clip(moving_frames(20), 10)[:500], "corrupt_video"),
        (clip(moving_frames(20), 10, "webm")[:300], "corrupt_video"),
        (sound(), "no_video_stream"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n", "corrupt_video"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "corrupt_video"),
    ],
)
def test_what_is_no_clip_is_a_reason(data, reason):
    with pytest.raises(SampleError) as error:
        read_video_header(data)
    assert error.value.reason == reason


def test_without_pyav_the_error_names_the_extra():
    code = "import sys; sys.modules['av'] = None; from open_qwen2vl.processing.videos import read_video_header\n"
    code += "read_video_header(b'\\0\\0\\0\\x18ftypmp42')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "open-qwen2vl[video]"' in done.stderr
