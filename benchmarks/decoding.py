"""Decoders beside Pillow's draft: how fast each is on real photographs, and how far from today's pixels.

    python benchmarks/decoding.py [--photographs FOLDER] [--repeats 5]

Photographs that packages ship (scikit-learn, matplotlib, gradio), or those of a folder, written as JPEGs (quality 90,
4:2:0) and PNGs of several widths, and as they are. One core, one thread, all ways in turn, the best of the repeats,
CPU time: from a file's bytes to the 384 x 384 pixels of training. Where a decoder has fractions it takes the one that
Pillow's draft takes. A package that is not installed is said so. Last, two threads in a worker beside two workers.
Writes benchmarks/results/decoding.md.
"""

import argparse
import io
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import describe_machine, write_result

from open_qwen2vl.processing import images

SIDE = 384
WIDTHS = (512, 1024, 2048)
SHIPPED = {
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
    "gradio": ("media_assets/images/tower.jpg", "media_assets/images/cheetah.jpg", "media_assets/images/groot.jpeg"),
}
Decoder = Callable[[bytes], np.ndarray]


def read_photographs(folder: Path | None) -> list[bytes]:
    """JPEG files."""
    if folder is not None:
        return [path.read_bytes() for path in sorted(folder.rglob("*.jp*g"))]
    found = [files(package).joinpath(name) for package, names in SHIPPED.items() for name in names]
    return [path.read_bytes() for path in found if path.is_file()]


def at_width(photograph: bytes, width: int, kind: str) -> bytes:
    """The photograph as a file of this width; a smaller one is enlarged, which gives it less detail than it had."""
    image = Image.open(io.BytesIO(photograph)).convert("RGB")
    image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return buffer.getvalue()


def decoded_size(data: bytes) -> tuple[int, int, int]:
    """Width and height at which Pillow's draft decodes, and the whole number that it divides by."""
    with Image.open(io.BytesIO(data)) as image:
        width = image.width
        image.draft(None, (images.DRAFT_MARGIN * SIDE,) * 2)
        return *image.size, round(width / image.width)


def jpeg_decoders() -> dict[str, Callable[[], Decoder]]:
    """What each package needs to decode, imported when asked."""

    def pillow():
        return lambda data: np.array(images.decode_image(data, (SIDE, SIDE)))

    def ours():
        if images.decode_jpeg is None:
            raise ImportError("simplejpeg is not installed")
        return lambda data: images.decode_pixels(data, (SIDE, SIDE))

    def simplejpeg():
        from simplejpeg import decode_jpeg

        def decode(data):
            width, height, _ = decoded_size(data)
            return decode_jpeg(data, min_width=width, min_height=height)

        return decode

    def opencv():
        import cv2

        cv2.setNumThreads(0)
        reduced = {n: getattr(cv2, f"IMREAD_REDUCED_COLOR_{n}") for n in (2, 4, 8)}

        def decode(data):
            _, _, fraction = decoded_size(data)
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), reduced.get(fraction, cv2.IMREAD_COLOR))
            return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)

        return decode

    def torchvision():
        from torchvision.io import ImageReadMode, decode_jpeg

        return lambda data: to_numpy(decode_jpeg(to_tensor(data), ImageReadMode.RGB))

    def torchcodec():
        from torchcodec.decoders import decode_jpeg

        return lambda data: to_numpy(decode_jpeg(to_tensor(data)))

    def imagecodecs():
        from imagecodecs import jpeg8_decode

        return lambda data: jpeg8_decode(data)

    def pyvips():
        import pyvips

        pyvips.cache_set_max(0)
        return lambda data: pyvips.Image.jpegload_buffer(data, shrink=decoded_size(data)[2]).numpy()

    return {
        "Pillow with draft (before)": pillow,
        "`decode_pixels` (simplejpeg, checks and all)": ours,
        "simplejpeg alone": simplejpeg,
        "opencv-python-headless": opencv,
        "torchvision, no fractions": torchvision,
        "torchcodec, no fractions": torchcodec,
        "imagecodecs, no fractions": imagecodecs,
        "pyvips": pyvips,
    }


def png_decoders() -> dict[str, Callable[[], Decoder]]:
    """The same for PNGs, which have no fractions."""

    def pillow():
        return lambda data: np.array(images.decode_image(data, (SIDE, SIDE)))

    def pyspng():
        from pyspng import load

        return lambda data: load(data)

    def opencv():
        import cv2

        cv2.setNumThreads(0)
        return lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].copy()

    def torchvision():
        from torchvision.io import ImageReadMode, decode_png

        return lambda data: to_numpy(decode_png(to_tensor(data), ImageReadMode.RGB))

    return {"Pillow": pillow, "pyspng": pyspng, "opencv-python-headless": opencv, "torchvision": torchvision}


def to_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def to_numpy(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).numpy()


def resized(pixels: np.ndarray) -> torch.Tensor:
    """As `OpenQwen2VLProcessor.read_image` has it."""
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(tensor, (SIDE, SIDE), mode="bicubic", antialias=True).contiguous()


def measure(decoders: dict[str, Callable[[], Decoder]], data: list[bytes], title: str, repeats: int) -> list[str]:
    """A row for each decoder; the first is what the others are held against."""
    ready, missing, best = {}, {}, {}
    for name, prepare in decoders.items():
        try:
            ready[name] = prepare()
        except ImportError as error:
            missing[name] = str(error).splitlines()[0]
    for _ in range(repeats):
        for name, decode in ready.items():
            start = time.process_time()
            for one in data:
                resized(decode(one))
            best[name] = min(best.get(name, np.inf), time.process_time() - start)
    first = next(iter(ready))
    expected = torch.cat([resized(ready[first](one)).int() for one in data])
    rows = []
    for name, decode in ready.items():
        difference = (torch.cat([resized(decode(one)).int() for one in data]) - expected).abs().float()
        rows.append(
            f"| {title} | {name} | {len(data) / best[name]:.0f} | {best[first] / best[name]:.2f} "
            f"| {difference.mean():.3f} | {difference.max():.0f} |"
        )
    return rows + [f"| {title} | {name} | {why} | | | |" for name, why in missing.items()]


def read_some(data: list[bytes]) -> None:
    """As a worker of the loader does."""
    for one in data:
        resized(images.decode_pixels(one, min_size=(SIDE, SIDE)))


def worker_rows(data: list[bytes], repeats: int) -> list[str]:
    """A worker's images by one and two threads, and by two workers, in turn: wall time of all rounds."""
    pools = {
        "one thread": ThreadPoolExecutor(1),
        "two threads": ThreadPoolExecutor(2),
        "two workers": ProcessPoolExecutor(2, get_context("fork")),
    }
    total = dict.fromkeys(pools, 0.0)
    for number in range(2 * repeats + 1):
        for name, pool in pools.items():
            start = time.perf_counter()
            list(pool.map(read_some, [data[::2], data[1::2]]))
            # The first round starts the processes.
            total[name] += (time.perf_counter() - start) * (number > 0)
    for pool in pools.values():
        pool.shutdown()
    return [f"| {name} | {2 * repeats * len(data) / seconds:.0f} |" for name, seconds in total.items()]


def versions() -> str:
    names = ("pillow", "simplejpeg", "opencv-python-headless", "torchvision", "torchcodec", "imagecodecs", "pyvips")
    found = []
    for name in (*names, "pyspng"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, help="folder of JPEGs (default: those that packages ship)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the best counts (default: 5)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    photographs = read_photographs(args.photographs)
    if not photographs:
        parser.error("no photographs: install scikit-learn or name a folder of JPEGs by --photographs")
    rows, sets = [], {f"{width} px": [at_width(p, width, "JPEG") for p in photographs] for width in WIDTHS}
    for title, data in {**sets, "as they are": photographs}.items():
        rows += measure(jpeg_decoders(), data, title, args.repeats)
    pngs = [at_width(photograph, 1024, "PNG") for photograph in photographs]
    header = ["|---|---|---:|---:|---:|---:|"]
    table = [
        f"{len(photographs)} photographs, one core and one thread: images per CPU second from a file's bytes to",
        f"{SIDE} x {SIDE} pixels; grey levels (of 256) between the first row's pixels and the others'.",
        "",
        "| JPEG | decoder | images/s | gain | mean difference | largest |",
        *header,
        *rows,
        "",
        "| PNG | decoder | images/s | gain | mean difference | largest |",
        *header,
        *measure(png_decoders(), pngs, "1024 px", args.repeats),
        "",
        "JPEGs of 1024 px on two cores, wall time:",
        "",
        "| by | images/s |",
        "|---|---:|",
        *worker_rows(sets["1024 px"] * 4, args.repeats),
        "",
        versions(),
    ]
    write_result("decoding", table, describe_machine(shlex.join(["python", *sys.argv])))


if __name__ == "__main__":
    main()
