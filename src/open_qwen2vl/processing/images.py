"""From the bytes of an image file to RGB pixels, refusing what would harm a run.

Every image of the project, in training and in evaluation, is opened here, so that both see the same picture.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from .sample_error import SampleError

# Above this a small file can claim gigabytes of pixels (Pillow warns from here and refuses at twice as many).
MAX_PIXELS = 89_478_485
# A JPEG decoded at a fraction stays this many times as large as it is needed: below 2 the result changes visibly
# (docs/performance.md, "Loading").
DRAFT_MARGIN = 2


def decode_image(data: bytes, min_size: tuple[int, int] | None = None) -> Image.Image:
    """Decode a JPEG, PNG or WebP file to an upright RGB image.

    Palette, grey and CMYK images are converted, an alpha channel is dropped (as the original does), 16-bit grey is
    scaled to 8 bits and the EXIF orientation is applied.

    Args:
        data (`bytes`): the file's content.
        min_size (`tuple[int, int]`, *optional*): width and height to which the image will be resized. A JPEG then is
            decoded at 1/2, 1/4 or 1/8 of its size where both sides stay at least `DRAFT_MARGIN` times as large: much
            faster for photographs, and after resizing equal but for about half a grey level of 256 on average. Other
            formats are decoded whole.

    Returns:
        `PIL.Image.Image`: mode RGB.

    Raises:
        SampleError: `corrupt_image` for a file that is truncated or no image, `image_too_large` for one of more than
            `MAX_PIXELS` pixels, which is refused from its header.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's own bomb and palette-transparency warnings; the size is checked below, before any pixel.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise SampleError("image_too_large", f"{image.width}x{image.height} pixels are above {MAX_PIXELS}")
                if min_size is not None:
                    # The larger side for both: the EXIF orientation, applied later, may swap them.
                    image.draft(None, (DRAFT_MARGIN * max(min_size),) * 2)
                return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise SampleError("image_too_large", str(error)) from error
    except SampleError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds: OSError, SyntaxError, struct.error, ValueError
        raise SampleError("corrupt_image", f"{type(error).__name__}: {error}") from error


def read_image_size(data: bytes) -> tuple[int, int]:
    """Width and height from an image file's header, as they stand there.

    Args:
        data (`bytes`): the file's content.

    Returns:
        `tuple[int, int]`: in pixels, before any rotation that EXIF asks for.

    Raises:
        SampleError: `corrupt_image` for what is no image, `image_too_large` above `MAX_PIXELS` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own about large images: the size is checked here
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
    except Image.DecompressionBombError as error:
        raise SampleError("image_too_large", str(error)) from error
    except Exception as error:  # Pillow's readers raise many kinds
        raise SampleError("corrupt_image", f"{type(error).__name__}: {error}") from error
    if not 0 < width * height <= MAX_PIXELS:
        reason = "image_too_large" if width * height else "corrupt_image"
        raise SampleError(reason, f"{width}x{height} pixels")
    return width, height


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright RGB image: EXIF orientation applied, 16-bit grey scaled to 8 bits, alpha dropped.

    Args:
        image (`PIL.Image.Image`): of any mode.

    Returns:
        `PIL.Image.Image`: mode RGB.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # convert("RGB") would clip 16-bit values at 255 and leave a white picture.
        image = Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8))
    image = image.convert("RGB")
    # A palette's transparent entry outlives the conversion, and image processors would paint that colour white.
    image.info.pop("transparency", None)
    return image
