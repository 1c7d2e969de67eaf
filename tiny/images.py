"""From an image, a file's bytes or an array, to RGB pixels, refusing what would harm a run.

Every image of the project, in training and in evaluation, is opened here, so that all see the same picture.

    bytes ── one of FORMATS? few enough pixels and scans? ──► Pillow's own mode ── strip by strip ──► upright RGB

What one image takes at most, beside its file: `MAX_PIXELS` pixels of 4 bytes as they are decoded and once more as they
are returned, 716 MB; a progressive JPEG 900 MB. To a needed size, as training reads, the second part is small.
"""

import contextlib
import functools
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from .sample_error import SampleError

try:
    from simplejpeg import decode_jpeg
except ImportError:
    decode_jpeg = None

# Above this a small file can claim gigabytes of pixels (Pillow warns from here and refuses at twice as many).
MAX_PIXELS = 89_478_485
# Pillow's other plugins start programs (PostScript) or are of no use; TGA, which has no signature, is tried last.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF", "JPEG2000", "PPM", "ICO", "TGA")
# Codecs that hold the picture several times over have half of the pixels.
_HUNGRY = {"WEBP", "AVIF", "JPEG2000"}
# Decoders that are written in Python: 10 s for so many pixels.
_SLOW_CODECS, _SLOW_PIXELS = {"ppm", "ppm_plain", "bmp_rle"}, 1 << 23
MAX_SCANS = 100  # of a JPEG; each costs as much as its pixels do
# A JPEG decoded at a fraction stays this many times as large as it is needed: below 2 the result changes visibly
# (docs/performance.md, "Loading").
DRAFT_MARGIN = 2
# Other formats are made smaller, while they are converted, above so many pixels only.
LARGE_PIXELS = 1 << 24
_STRIP_PIXELS = 1 << 20
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, min_size: tuple[int, int] | None = None) -> Image.Image:
    """An upright RGB image of a file's content, as [`to_rgb`] makes it.

    With `min_size`, the width and height to be resized to, a JPEG is decoded at 1/2, 1/4 or 1/8 where both sides stay
    `DRAFT_MARGIN` times as large: much faster, and after resizing equal but for about half a grey level of 256. Other
    formats are reduced likewise above `LARGE_PIXELS`. SampleError: `corrupt_image`, `image_too_large` (its header).
    """
    with opened_image(data) as image:
        needed = _choose_scale(image, data, min_size)
        pixels = _upright(image, needed)
        pixels.info.clear()  # what is applied must not be applied again
        return pixels


def decode_pixels(data: bytes, min_size: tuple[int, int] | None = None) -> np.ndarray:
    """The pixels of [`decode_image`], uint8 `(height, width, 3)`, writable.

    Where simplejpeg is installed it decodes plain JPEGs, to the same values (benchmarks/decoding.py): it is the same
    libjpeg-turbo, without the copies that Pillow makes of its pixels. SampleError as [`decode_image`].
    """
    with opened_image(data) as image:
        needed = _choose_scale(image, data, min_size)
        pixels = _plain_jpeg(image, data, needed)
        return np.array(_upright(image, needed)) if pixels is None else pixels


def read_image_size(data: bytes, upright: bool = False) -> tuple[int, int]:
    """Width and height from an image file's header, as they stand there or as EXIF turns them; or a `SampleError`."""
    with opened_image(data) as image:
        swaps = upright and _orientation(image) in (5, 6, 7, 8)
        return (image.height, image.width) if swaps else image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright RGB image.

    The EXIF orientation is applied and an alpha channel dropped, as training does it. Of 16 bits 65535 is white, as
    PNG and TIFF have it: what uses fewer of them is dark, and a dark picture stays so. Of 32 bits nobody says what is
    white: they are scaled by the number of bits that the largest value needs, out of 8, 12 and 16 (or as many as it
    needs above); floats from 0 to 1 by 255.
    """
    pixels = _upright(image)
    if pixels is image and image.info.get("transparency") is not None:
        # A transparent colour outlives the conversion, and image processors would paint it white.
        pixels = image.copy()
        pixels.info.pop("transparency")
    return pixels


def array_to_rgb(array: Any) -> Image.Image:
    """An RGB image of an array by [`to_rgb`]'s rules.

    Shape `(height, width)`, `(channels, height, width)` or `(height, width, channels)` with 1, 3 or 4 channels.
    """
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array  # NumPy has no bfloat16
    values = np.asarray(array)
    if values.ndim == 3 and values.shape[0] in (1, 3, 4):
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[-1] not in (1, 3, 4) or values.dtype.kind not in "biuf" or not values.size:
        what = f"{values.dtype} of shape {values.shape}" if values.ndim else f"a {type(array).__name__}"
        raise ValueError(f"an image is a Pillow image, a path, or an array of 1, 3 or 4 channels, not {what}")
    values = values[..., :3]
    if values.dtype != np.uint8:
        largest = _largest(values)
        # Far more than what resampling overshoots by: such pixels would be black.
        if values.dtype.kind == "f" and np.nanmin(values) < -0.25 * max(1, largest):
            raise ValueError("an image has values far below 0, as if it was normalised already: give it as it was")
        values = _to_bytes(values, largest)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3))))


@contextlib.contextmanager
def opened_image(data: bytes) -> Iterator[Image.Image]:
    """The image of a file, its pixels not decoded yet; whatever is wrong with it is a SampleError."""
    try:
        with warnings.catch_warnings():
            # Pillow's own bomb and palette-transparency warnings; the size is checked before any pixel.
            warnings.simplefilter("ignore")
            # lmms-eval switches it on for the whole process: half a picture would be trained on as a grey one.
            ImageFile.LOAD_TRUNCATED_IMAGES = False
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                most = MAX_PIXELS // 2 if image.format in _HUNGRY else MAX_PIXELS
                if image.width * image.height > most:
                    raise SampleError("image_too_large", f"{image.width}x{image.height} pixels are above {most}")
                if image.width * image.height == 0:
                    raise SampleError("corrupt_image", f"{image.width}x{image.height} pixels")
                yield image
    except Image.DecompressionBombError as error:
        raise SampleError("image_too_large", str(error)) from error
    except SampleError:
        raise
    except UnidentifiedImageError as error:  # its own text has an address in memory, another in every run
        raise SampleError("corrupt_image", "cannot identify an image of a known format") from error
    except Exception as error:  # Pillow's decoders raise many kinds: OSError, SyntaxError, struct.error, ValueError
        raise SampleError("corrupt_image", f"{type(error).__name__}: {error}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow has: an older one may lack AVIF."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _choose_scale(image: Image.Image, data: bytes, min_size: tuple[int, int] | None) -> int | None:
    """Let a JPEG be decoded at a fraction, and return what both sides must have, if not all of it."""
    _check_cost(image, data)
    if min_size is None:
        return None
    # The larger side for both: the EXIF orientation, applied later, may swap them.
    needed = DRAFT_MARGIN * max(min_size)
    image.draft(None, (needed, needed))
    return needed


def _plain_jpeg(image: Image.Image, data: bytes, needed: int | None) -> np.ndarray | None:
    """Pixels by simplejpeg, at the size that Pillow would decode; None for what is left to Pillow.

    That is what is no JPEG of three upright channels, what Pillow makes smaller in another way, and what is damaged
    at all: Pillow decides whether that is read.
    """
    if decode_jpeg is None or image.format != "JPEG" or image.mode != "RGB" or _orientation(image) in _TURNS:
        return None
    if needed is not None and image.width * image.height > LARGE_PIXELS:
        return None
    try:
        pixels = decode_jpeg(data, min_width=image.width, min_height=image.height)
    except ValueError:
        return None
    return pixels if pixels.shape[:2] == (image.height, image.width) else None


def _check_cost(image: Image.Image, data: bytes) -> None:
    """Refuse what takes far more time than its pixels."""
    if any(tile[0] in _SLOW_CODECS for tile in image.tile) and image.width * image.height > _SLOW_PIXELS:
        raise SampleError("image_too_large", f"{image.format} of {image.width}x{image.height} pixels")
    most = MAX_SCANS
    if image.format == "TIFF":
        if "jpeg" not in str(image.info.get("compression")):
            return
        most += len(image.tile) + sum(len(image.tag_v2.get(tag, ())) for tag in (273, 324))  # strips, tiles
    elif image.format not in ("JPEG", "MPO"):
        return
    scans = data.count(b"\xff\xda")  # in coded data 0xff is followed by 0 or a restart mark
    if scans > most and (image.format == "TIFF" or _count_scans(data) > most):
        raise SampleError("image_too_large", f"{scans} scans are above {most}")


def _count_scans(data: bytes) -> int:
    """Scans of a JPEG's first image, without what looks like one in its metadata."""
    at, scans = 2, 0
    while 0 <= at < len(data) - 4:
        marker = data[at + 1]
        if data[at] != 0xFF or marker in (0x00, 0xFF) or 0xD0 <= marker <= 0xD8:
            at = data.find(b"\xff", at + 1)  # coded data
            continue
        if marker == 0xD9:
            break
        scans += marker == 0xDA
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return scans


def _upright(image: Image.Image, needed: int | None = None) -> Image.Image:
    """RGB pixels, reduced where both sides stay as `needed`; the image itself if it is all that already."""
    turn = _TURNS.get(_orientation(image))
    image.load()
    factor = 1
    if needed is not None and image.width * image.height > LARGE_PIXELS:
        factor = max(1, min(image.size) // needed)
    pixels = image if image.mode == "RGB" and factor == 1 else _convert(image, factor)
    return pixels if turn is None else pixels.transpose(turn)


def _orientation(image: Image.Image) -> int | None:
    # Pillow itself turns a TIFF when it is loaded, and has the size of afterwards before that.
    if image.format == "TIFF":
        return None
    # Pillow would decode a PNG to look for EXIF behind its pixels, where nobody writes it.
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return None
    return image.getexif().get(ExifTags.Base.Orientation)


def _convert(image: Image.Image, factor: int) -> Image.Image:
    """RGB of any mode, strip by strip: a copy in between would be as large as the whole."""
    width, height = image.size
    is_deep = image.mode.startswith(("I", "F"))
    rows = max(factor, _STRIP_PIXELS // width // factor * factor)
    tops = range(0, height, rows)
    boxes = [(0, top, width, min(top + rows, height)) for top in tops]
    largest = max(_largest(np.asarray(image.crop(box))) for box in boxes) if is_deep else 0
    whole = Image.new("RGB", (-(-width // factor), -(-height // factor)), None)
    for box in boxes:
        strip = image.crop(box)
        if is_deep:
            strip = Image.fromarray(_to_bytes(np.asarray(strip), largest))
        strip = strip.convert("RGB")
        whole.paste(strip.reduce(factor) if factor > 1 else strip, (0, box[1] // factor))
    return whole


def _largest(values: np.ndarray) -> float:
    if values.dtype.kind != "f":
        return values.max()
    return np.max(values, initial=0, where=np.isfinite(values))


def _to_bytes(values: np.ndarray, largest: float) -> np.ndarray:
    """Values of more than 8 bits, or floats, as uint8; what is below 0, or no number, is 0."""
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * 255
    if values.dtype.itemsize == 1:
        return values.clip(0).astype(np.uint8)
    bits = next((bits for bits in (8, 12, 16) if largest < 1 << bits), int(largest).bit_length())
    if values.dtype.kind in "iu" and values.dtype.itemsize == 2:
        bits = 16
    if values.dtype.kind != "f":
        return (values.clip(0) >> (bits - 8)).astype(np.uint8)
    # A little above 1, as resampling makes it, is still 0 to 1; a picture from 0 to 255 is not that dark.
    scale = 255 if largest < 2 else 2.0 ** (8 - bits)
    return (np.nan_to_num(values, nan=0, posinf=0, neginf=0) * scale + 0.5).clip(0, 255).astype(np.uint8)
