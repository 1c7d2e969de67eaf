"""Dynamic resolution: what size an image gets and how many patches and tokens that is, from its header alone."""

from dataclasses import dataclass

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from ...processing.sample_error import SampleError


@dataclass(frozen=True)
class ImageSizes:
    """The sizes that a checkpoint's image processor, or a source's own budget, allows."""

    patch_size: int  # pixels of a patch's side
    merge_size: int  # patches of a token's side
    min_pixels: int  # smaller images are enlarged to it
    max_pixels: int  # larger images are reduced to it
    fixed_resolution: int | None = None  # side of the square that every image becomes instead, for ablations

    def __post_init__(self):
        area = self.factor**2
        if not 0 < self.min_pixels <= self.max_pixels or self.max_pixels < area:
            raise ValueError(
                f"min_pixels ({self.min_pixels}) and max_pixels ({self.max_pixels}): must be above 0, in this order, "
                f"and hold a token of {area} pixels"
            )
        if self.fixed_resolution is not None and (self.fixed_resolution <= 0 or self.fixed_resolution % self.factor):
            raise ValueError(f"fixed_resolution: {self.fixed_resolution} is no multiple of {self.factor} pixels")

    @property
    def factor(self) -> int:
        """Pixels of a token's side."""
        return self.patch_size * self.merge_size

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Height and width in pixels of an upright image after resizing; an aspect above 200 is a SampleError."""
        if self.fixed_resolution is not None:
            return self.fixed_resolution, self.fixed_resolution
        try:
            return smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        except ValueError as error:
            raise SampleError("image_aspect", f"{width}x{height} pixels: {error}") from error

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of patches."""
        resized_height, resized_width = self.resized(width, height)
        return resized_height // self.patch_size, resized_width // self.patch_size

    def tokens(self, width: int, height: int) -> int:
        """Placeholders, without the two marks around them."""
        rows, columns = self.grid(width, height)
        return rows * columns // self.merge_size**2
