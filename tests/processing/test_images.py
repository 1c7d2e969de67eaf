"""Images as they come from the web: each is decoded right or refused under a name."""

import io
import os
import re
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from matplotlib import get_data_path
from PIL import Image, ImageFile, ImageOps

from open_qwen2vl.processing import images
from open_qwen2vl.processing.images import (
    DRAFT_MARGIN,
    FORMATS,
    MAX_PIXELS,
    array_to_rgb,
    decode_image,
    decode_pixels,
    read_image_size,
    to_rgb,
)
from open_qwen2vl.processing.sample_error import SampleError


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 20, height: int = 10) -> Image.Image:
    array = np.zeros((height, width, 3), np.uint8)
    array[..., 0] = np.linspace(0, 255, width)[None]
    array[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(array)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_formats(kind):
    image = decode_image(encode(gradient(), kind))
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert np.abs(np.asarray(image, int) - np.asarray(gradient(), int)).mean() < 8


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "1"])
def test_modes_equal_plain_conversion(mode):
    converted = gradient().convert(mode)
    assert np.array_equal(decode_image(encode(converted)), converted.convert("RGB"))


def test_cmyk():
    image = decode_image(encode(gradient().convert("CMYK"), "JPEG", quality=95))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, int) - np.asarray(gradient(), int)).mean() < 12


def test_palette_with_transparency():
    palette = gradient().convert("P")
    assert decode_image(encode(palette, transparency=bytes(range(256)))).mode == "RGB"


def test_sixteen_bit_is_scaled_not_clipped():
    values = np.linspace(0, 65535, 200).astype(np.uint16).reshape(10, 20)
    pixels = np.asarray(decode_image(encode(Image.fromarray(values))))
    assert np.array_equal(pixels[..., 0], values >> 8)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(gradient(20, 10), "JPEG", exif=exif)).size == (10, 20)


def test_one_pixel():
    assert decode_image(encode(Image.new("RGB", (1, 1), (1, 2, 3)))).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize(
    "data", [b"", b"not an image", encode(gradient(200, 200))[:300], encode(gradient(), "JPEG")[:200]]
)
def test_corrupt_is_refused(data):
    with pytest.raises(SampleError) as error:
        decode_image(data)
    assert error.value.reason == "corrupt_image"
    assert "0x" not in str(error.value)  # an address: the same plan again would have another text


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_half_a_picture_is_refused_though_another_library_allows_it(monkeypatch, kind):
    """As lmms-eval does for the whole process when it is imported: for evaluations during training too."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(gradient(200, 200), kind)
    with pytest.raises(SampleError, match="truncated"):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 1, 60_000])
def test_decompression_bomb_is_refused_from_its_header(side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(SampleError) as error:
        decode_image(data)
    assert error.value.reason == "image_too_large"


def test_a_transparent_palette_keeps_its_colours():
    palette = gradient().convert("P")
    image = decode_image(encode(palette, transparency=0))
    assert np.array_equal(image, palette.convert("RGB"))
    assert "transparency" not in image.info


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """1536 x 1800 pixels with the detail of a photograph of 512 x 600, which tiles it mirrored."""
    tile = Image.open(f"{get_data_path()}/sample_data/grace_hopper.jpg").convert("RGB")
    whole = Image.new("RGB", (3 * tile.width, 3 * tile.height))
    for x in range(3):
        for y in range(3):
            one = ImageOps.mirror(tile) if x % 2 else tile
            whole.paste(ImageOps.flip(one) if y % 2 else one, (x * tile.width, y * tile.height))
    return whole


@pytest.mark.parametrize(
    ("needed", "size"),
    [
        (384, (768, 900)),
        (150, (384, 450)),
        (96, (192, 225)),
        (10, (192, 225)),
        (385, (1536, 1800)),
        (900, (1536, 1800)),
    ],
)
def test_a_jpeg_is_decoded_no_larger_than_it_is_needed(photograph, needed, size):
    data = encode(photograph, "JPEG", quality=90)
    small = decode_image(data, min_size=(needed, needed))
    assert small.size == size
    assert min(size) >= DRAFT_MARGIN * needed or size == photograph.size
    assert decode_image(data).size == photograph.size
    resized = [image.resize((needed, needed), Image.Resampling.BICUBIC) for image in (small, decode_image(data))]
    difference = np.abs(np.subtract(*(np.asarray(image, int) for image in resized)))
    # 0.4 to 0.5 at 1/2 and 1/4; at 1/8, which takes a photograph of 6144 pixels for 384, a little more.
    assert difference.mean() < (1.1 if size[0] == 192 else 0.6) and np.quantile(difference, 0.99) <= 6


def test_orientation_and_other_formats_at_a_needed_size(photograph):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image(encode(photograph, "JPEG", exif=exif), min_size=(300, 384))
    assert turned.size == (900, 768)
    assert decode_image(encode(photograph, "PNG"), min_size=(8, 8)).size == photograph.size
    grey = encode(photograph.convert("L"), "JPEG")
    assert (decode_image(grey, min_size=(8, 8)).mode, decode_image(grey, min_size=(8, 8)).size) == ("RGB", (192, 225))
    with pytest.raises(SampleError):
        decode_image(encode(photograph, "JPEG")[:20_000], min_size=(8, 8))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_of_the_list(kind):
    image = decode_image(encode(gradient(32, 32), kind, **({"sizes": [(32, 32)]} if kind == "ICO" else {})))
    assert (image.mode, image.size, image.info) == ("RGB", (32, 32), {})
    assert np.abs(np.asarray(image, int) - np.asarray(gradient(32, 32), int)).mean() < 12


@pytest.mark.parametrize("kind", ["EPS", "PCX", "SGI", "XBM", "IM"])
def test_no_other_format_is_opened(kind, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("a program was started"))
    picture = gradient().convert("1") if kind == "XBM" else gradient()
    for read in (decode_image, read_image_size):
        with pytest.raises(SampleError) as error:
            read(encode(picture, kind))
        assert error.value.reason == "corrupt_image"


def test_nobody_else_opens_images():
    """Pillow's `open` is called in images.py alone, in the package and the recipes."""
    root = Path(__file__).parents[2]
    found = []
    for path in [*root.glob("src/**/*.py"), *root.glob("recipes/**/*.py")]:
        text = path.read_text(encoding="utf8")
        if re.search(r"\bImage\.open\(|\bPIL\.Image\.open\(|import open as", text) and path.name != "images.py":
            found.append(str(path.relative_to(root)))
    assert not found


@pytest.mark.parametrize("bits", [8, 12, 16, 20, 31])
def test_integers_of_32_bits_are_scaled_by_the_bits_that_they_need(bits):
    values = np.linspace(0, 2**bits - 1, 200).astype(np.int32).reshape(10, 20)
    wanted = values >> (bits - 8)
    pixels = np.asarray(decode_image(encode(Image.fromarray(values), "TIFF")))
    assert np.array_equal(pixels, np.stack([wanted] * 3, -1))
    assert np.array_equal(to_rgb(Image.fromarray(values)), array_to_rgb(values))
    assert np.array_equal(to_rgb(Image.fromarray(values)).getchannel(1), wanted)


@pytest.mark.parametrize("brightest", [200, 4095, 65535])
def test_a_dark_picture_of_16_bits_stays_dark(brightest):
    """65535 is white, whatever a picture uses of it, on every way in."""
    values = np.linspace(0, brightest, 200).astype(np.uint16).reshape(10, 20)
    ways = [decode_image(encode(Image.fromarray(values), kind)) for kind in ("PNG", "TIFF")]
    ways += [to_rgb(Image.fromarray(values)), array_to_rgb(values), array_to_rgb(torch.from_numpy(values.copy()))]
    for image in ways:
        assert np.array_equal(np.asarray(image)[..., 1], values >> 8)


def test_arrays_of_8_bits_are_taken_as_they_are():
    values = np.array([[-3, 0, 127]], np.int8)
    assert np.array_equal(np.asarray(array_to_rgb(values))[..., 0], [[0, 0, 127]])


def test_big_endian_and_negative_values():
    values = np.linspace(0, 65535, 200).astype(np.uint16).reshape(10, 20)
    big = Image.frombytes("I;16B", (20, 10), values.astype(">u2").tobytes())
    assert np.array_equal(to_rgb(big).getchannel(0), values >> 8)
    assert to_rgb(Image.fromarray(np.array([[-5, 200]], np.int32))).getchannel(0).tobytes() == bytes([0, 200])


@pytest.mark.parametrize(("scale", "wanted"), [(1, 255), (1.01, 255), (255, 255), (65535, 255)])
def test_floats(scale, wanted):
    values = np.linspace(0, scale, 200).astype(np.float32).reshape(10, 20)
    values[0, 3] = np.nan
    pixels = np.asarray(decode_image(encode(Image.fromarray(values), "TIFF")))[..., 0].astype(int)
    expected = np.linspace(0, 255 * (scale if scale < 2 else 1), 200).clip(0, 255).reshape(10, 20)
    expected[0, 3] = 0
    assert pixels[-1, -1] == wanted and np.abs(pixels - expected).max() < 1.5
    assert np.array_equal(np.asarray(array_to_rgb(values))[..., 0], pixels)


def test_one_rule_for_alpha_whatever_the_way_in():
    rgba = gradient().convert("RGBA")
    rgba.putalpha(gradient().getchannel(0))
    array = np.asarray(rgba)
    wanted = np.asarray(gradient())
    ways = [decode_image(encode(rgba)), to_rgb(rgba), array_to_rgb(array), array_to_rgb(array.transpose(2, 0, 1))]
    ways += [array_to_rgb(array / 255), array_to_rgb(torch.from_numpy(array.copy()).permute(2, 0, 1))]
    for image in ways:
        assert np.array_equal(image, wanted)


@pytest.mark.parametrize("array", [np.zeros((2, 2, 2)), np.zeros(4), np.zeros((0, 3, 3)), np.array([["a"]])])
def test_arrays_that_are_no_image(array):
    with pytest.raises(ValueError, match="channels"):
        array_to_rgb(array)


def test_pixels_that_are_normalised_already_are_refused_and_bfloat16_is_read():
    values = np.asarray(gradient()) / 255
    assert np.array_equal(array_to_rgb(torch.from_numpy(values).bfloat16()), array_to_rgb(
        torch.from_numpy(values).bfloat16().float().numpy()
    ))  # fmt: skip
    assert array_to_rgb(values - 0.1 * (values == 0)).mode == "RGB"  # what resampling overshoots by
    for mean, std in ((0.5, 0.5), (0.45, 0.22)):
        with pytest.raises(ValueError, match="normalised already"):
            array_to_rgb((values - mean) / std)


def progressive_scans(number: int) -> bytes:
    """A progressive JPEG in which one of its scans is repeated."""
    data = encode(gradient(64, 64), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last : data.rindex(b"\xff\xd9")]
    return data[:last] + scan * number + b"\xff\xd9"


def test_a_jpeg_of_too_many_scans_is_refused():
    assert decode_image(progressive_scans(50)).size == (64, 64)
    with pytest.raises(SampleError, match="scans") as error:
        decode_image(progressive_scans(200))
    assert error.value.reason == "image_too_large"
    # Two hundred of its marks in a comment are no scans.
    plain = encode(gradient(64, 64), "JPEG", comment=b"\xff\xda" * 200)
    assert decode_image(plain).size == (64, 64)


def test_pixels_that_python_would_decode_are_few(monkeypatch):
    monkeypatch.setattr("open_qwen2vl.processing.images._SLOW_PIXELS", 100)
    for data in (b"P2 20 20 255 " + b"1 " * 400, b"P5 20 20 100 " + bytes(400)):
        with pytest.raises(SampleError) as error:
            decode_image(data)
        assert error.value.reason == "image_too_large"
    assert decode_image(b"P5 20 20 255 " + bytes(400)).size == (20, 20)


def test_codecs_that_hold_several_copies_have_fewer_pixels(monkeypatch):
    monkeypatch.setattr("open_qwen2vl.processing.images.MAX_PIXELS", 32 * 32)
    assert decode_image(encode(gradient(32, 32))).size == (32, 32)
    for kind in ("WEBP", "AVIF", "JPEG2000"):
        with pytest.raises(SampleError) as error:
            decode_image(encode(gradient(32, 32), kind))
        assert error.value.reason == "image_too_large"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "I;16"])
def test_large_images_are_reduced_to_what_is_needed(monkeypatch, photograph, mode):
    monkeypatch.setattr("open_qwen2vl.processing.images.LARGE_PIXELS", 1000)
    monkeypatch.setattr("open_qwen2vl.processing.images._STRIP_PIXELS", 9000)
    source = photograph.resize((512, 600))
    if mode == "I;16":
        source = Image.fromarray(np.asarray(source.convert("L")).astype(np.uint16) * 257)
    elif mode != "RGB":
        source = source.convert(mode)
    data = encode(source)
    small, whole = decode_image(data, min_size=(50, 60)), decode_image(data)
    assert small.size == (128, 150) and whole.size == (512, 600)
    resized = [np.asarray(image.resize((50, 60), Image.Resampling.BICUBIC), int) for image in (small, whole)]
    assert np.abs(np.subtract(*resized)).mean() < 1.1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_every_orientation_equals_pillows_own(orientation, image_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = [None, *(Image.Transpose(number) for number in (0, 3, 1, 5, 4, 6, 2))]
    for mode in ("RGB", "L"):
        image = gradient(33, 17).convert(mode)
        data = encode(image, image_format, exif=exif)
        turn = turns[orientation - 1]
        wanted = (image if turn is None else image.transpose(turn)).convert("RGB")
        assert np.array_equal(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"), wanted)
        assert np.array_equal(decode_image(data), wanted)
        assert read_image_size(data, upright=True) == wanted.size
        assert image_format == "TIFF" or read_image_size(data) == (33, 17)


def peak_bytes(read) -> int:
    """Most memory that a call takes, in a process forked for it, beyond what that has when it begins."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        read()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        os.write(sender, str(peak - before).encode())
        os._exit(0)
    os.close(sender)
    os.waitpid(child, 0)
    found = os.read(receiver, 64)
    os.close(receiver)
    return int(found)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="peak memory is read as Linux has it")
@pytest.mark.parametrize(
    ("mode", "kind", "whole", "needed"),
    [("RGB", "PNG", 4, 4), ("RGBA", "PNG", 8, 4), ("I;16", "PNG", 6, 2), ("L", "TIFF", 5, 1), ("RGB", "JPEG", 10, 6)],
)
def test_memory_of_a_large_image(mode, kind, whole, needed):
    """Bytes a pixel: those of Pillow's image, and of the RGB one; a progressive JPEG keeps its coefficients."""
    side = 4200
    image = Image.new(mode, (side, side), 7 if mode in ("I;16", "L") else (7, 70, 7))
    data = encode(image, kind, **({"progressive": True, "subsampling": 0} if kind == "JPEG" else {}))
    del image
    slack = 24 << 20
    assert peak_bytes(lambda: decode_image(data)) < whole * side**2 + slack
    assert peak_bytes(lambda: decode_image(data, min_size=(384, 384))) < needed * side**2 + slack


@settings(max_examples=150, deadline=None, derandomize=True)
@given(strategies.data())
def test_damaged_files_are_refused_by_reason_or_read(data):
    kind = data.draw(strategies.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "TGA", "ICO"]))
    content = bytearray(encode(gradient(16, 16), kind))
    for _ in range(data.draw(strategies.integers(0, 4))):
        content[data.draw(strategies.integers(0, len(content) - 1))] = data.draw(strategies.integers(0, 255))
    content = bytes(content[: data.draw(strategies.integers(0, len(content)))])
    try:
        image = decode_image(content)
    except SampleError as error:
        assert error.reason in ("corrupt_image", "image_too_large")
    else:
        assert image.mode == "RGB" and 0 < image.width * image.height <= MAX_PIXELS


def either(read, *args) -> np.ndarray | str:
    """Pixels, or how they are refused."""
    try:
        return np.asarray(read(*args))
    except SampleError as error:
        return str(error)


JPEGS = {
    **{f"4:{name}": {"subsampling": f"4:{name}"} for name in ("4:4", "2:2", "2:0")},
    "progressive": {"progressive": True},
    "restart marks": {"restart_marker_blocks": 3},
    "coarse": {"quality": 5},
    "profile": {"icc_profile": b"not a real one"},
}


@pytest.mark.parametrize("needed", [None, (40, 30), (9, 9)])
@pytest.mark.parametrize("kind", JPEGS)
def test_the_other_decoder_gives_pillows_pixels(monkeypatch, photograph, kind, needed):
    """For odd sizes too, whose last blocks are cut."""
    pytest.importorskip("simplejpeg")
    used = []
    decode = images.decode_jpeg
    monkeypatch.setattr(images, "decode_jpeg", lambda *args, **kwargs: used.append(1) or decode(*args, **kwargs))
    for size in ((173, 131), (320, 240)):
        data = encode(photograph.crop((300, 300, 300 + size[0], 300 + size[1])), "JPEG", **JPEGS[kind])
        pixels = decode_pixels(data, needed)
        assert np.array_equal(pixels, decode_image(data, needed)) and pixels.flags.writeable
    assert len(used) == 2


@pytest.mark.parametrize("kind", ["grey", "CMYK", "turned", "PNG", "16 bits", "none installed"])
def test_what_it_is_not_for_is_left_to_pillow(monkeypatch, photograph, kind):
    small, exif = photograph.crop((0, 0, 101, 67)), Image.Exif()
    exif[0x0112] = 6
    data = {
        "grey": lambda: encode(small.convert("L"), "JPEG"),
        "CMYK": lambda: encode(small.convert("CMYK"), "JPEG"),
        "turned": lambda: encode(small, "JPEG", exif=exif),
        "PNG": lambda: encode(small),
        "16 bits": lambda: encode(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)),
        "none installed": lambda: encode(small, "JPEG"),
    }[kind]()
    refuse = None if kind == "none installed" else lambda *args, **kwargs: pytest.fail("it was asked")
    monkeypatch.setattr(images, "decode_jpeg", refuse)
    pixels = decode_pixels(data)
    assert np.array_equal(pixels, decode_image(data)) and pixels.flags.writeable


@settings(max_examples=150, deadline=None, derandomize=True)
@given(strategies.data())
def test_a_damaged_jpeg_is_read_or_refused_as_pillow_does(data):
    content = bytearray(encode(gradient(40, 24), "JPEG", progressive=data.draw(strategies.booleans())))
    for _ in range(data.draw(strategies.integers(0, 4))):
        content[data.draw(strategies.integers(0, len(content) - 1))] = data.draw(strategies.integers(0, 255))
    content = bytes(content[: data.draw(strategies.integers(0, len(content)))])
    ours, pillows = either(decode_pixels, content), either(decode_image, content)
    assert np.array_equal(ours, pillows)
