"""How large an image is, upright, from the first bytes of its file: what planners and reshard ask of millions.

first 64 kB ── a usual PNG or JPEG without EXIF: read here, ten times faster than Pillow opens it
            └─ else Pillow, and the whole file where the header is longer
"""

import struct
import zlib
from collections.abc import Callable

from ...processing.images import MAX_PIXELS, read_image_size
from ...processing.sample_error import SampleError

HEAD_BYTES = 1 << 16  # of an image file: enough for its size and orientation in nearly all
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # of a JPEG: what follows has the size
# Of a PNG: bits and colour type; deflate, adaptive filters, not interlaced.
_PNG_KINDS = frozenset(bytes((8, colour, 0, 0, 0)) for colour in (0, 2, 3, 4, 6))
_APP1, _START_OF_SCAN = 0xE1, 0xDA


def upright_size(read: Callable[[int | None], bytes]) -> tuple[int, int]:
    """Width and height as EXIF turns them, or a `SampleError`; `read` gives so many bytes, or all of the file."""
    head = read(HEAD_BYTES)
    if found := _quick_size(head):
        return found
    try:
        return read_image_size(head, upright=True)
    except SampleError:  # of a header that is longer, or for good
        return read_image_size(read(None), upright=True)


def _quick_size(head: bytes) -> tuple[int, int] | None:
    """The size of a file that Pillow opens for certain and that nothing turns; None for all others."""
    found = _png_size(head) if head[:4] == b"\x89PNG" else _jpeg_size(head)
    return found if found and 0 < found[0] * found[1] <= MAX_PIXELS else None


def _png_size(head: bytes) -> tuple[int, int] | None:
    if head[:16] != b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" or len(head) < 33:
        return None
    if zlib.crc32(head[12:29]) != int.from_bytes(head[29:33]) or head[24:29] not in _PNG_KINDS:
        return None
    at = 33
    while head[at + 4 : at + 8] in (b"sRGB", b"gAMA", b"pHYs", b"PLTE"):  # others may have EXIF in them
        at += 12 + int.from_bytes(head[at : at + 4])
    return struct.unpack_from(">II", head, 16) if head[at + 4 : at + 8] == b"IDAT" else None


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    if head[:2] != b"\xff\xd8":
        return None
    at, found = 2, None
    while at + 4 <= len(head) and head[at] == 0xFF:
        marker, length = struct.unpack_from(">BH", head, at + 1)
        if marker == _START_OF_SCAN:
            return found if at + 2 + length <= len(head) else None
        if marker in _FRAME_MARKERS:
            if found or length < 8 or at + 10 > len(head):
                return None
            bits, height, width, colours = struct.unpack_from(">BHHB", head, at + 4)
            if bits != 8 or colours not in (1, 3, 4) or length != 8 + 3 * colours:
                return None
            found = width, height
        # EXIF and XMP, which turn an image; and what is no segment with a length.
        elif marker == _APP1 or not 0xC0 <= marker < 0xFF or 0xD0 <= marker <= 0xD9 or length < 2:
            return None
        at += 2 + length
    return None
