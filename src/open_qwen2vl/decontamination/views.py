"""What of a picture is looked for: all of it, what is inside its frame, its quarters, and all of them mirrored."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from ..processing.sample_error import SampleError
from .pictures import FINE, WHOLE, WINDOWS, Interval, Thumbnail, Window, fine, thumbnails, transform
from .verification import MIN_CORNERS, Shown, corners, shown

PLAIN = "plain_image"
_HALVES = (Interval(0, 0.5), Interval(0.5, 1))
QUARTERS = tuple(Window(x, y) for x in _HALVES for y in _HALVES)
CROPS = (*WINDOWS, *QUARTERS)
_MIN_QUARTER_DETAIL = 16.0  # below, skies and gradients are all alike


class Unlike(SampleError):
    """A picture that cannot be told from others."""


class View(NamedTuple):
    """A part of a picture that is looked for."""

    window: Window  # which part
    transform: np.ndarray  # float32 (16, 16), of it
    whole: Shown  # the whole picture

    def mirrored(self) -> "View":
        """The same in a mirror."""
        start, stop = self.window.x
        signs = (-1.0) ** np.arange(FINE, dtype=np.float32)  # of horizontal frequencies
        window = Window(Interval(1 - stop, 1 - start), self.window.y)
        return View(window, self.transform * signs, self.whole.mirrored())

    def place_of_whole(self, part: Window) -> Window:
        """Where the whole picture lies, if this part of it lies at a window."""
        return Window(*map(_extended, part, self.window))


def told_apart(image: Image.Image) -> list[tuple[Thumbnail, Shown]]:
    """Thumbnails of a picture and of what is inside its frame; `Unlike` if neither shows enough."""
    found = [(thumbnail, shown(thumbnail)) for thumbnail in thumbnails(image)]
    if max(corners(picture) for _, picture in found) < MIN_CORNERS:
        raise Unlike(PLAIN, "the picture shows too little to be told from others")
    return found


def views(image: Image.Image) -> list[View]:
    """All views of a picture; `Unlike` for one that shows too little."""
    found = told_apart(image)
    plain = [View(WHOLE, picture.grey[:FINE, :FINE], picture) for _, picture in found]
    thumbnail, picture = found[0]
    for quarter in QUARTERS:  # a text or logo leaves some of them alone
        part = transform(thumbnail.grey.astype(np.float32), quarter, FINE)
        if fine(part)[1] >= _MIN_QUARTER_DETAIL:
            plain.append(View(quarter, part, picture))
    return [*plain, *(view.mirrored() for view in plain)]


def _extended(interval: Interval, part: Interval) -> Interval:
    """Where a whole axis lies, if a part of it lies at an interval."""
    scale = (interval.stop - interval.start) / (part.stop - part.start)
    start = interval.start - part.start * scale
    return Interval(start, start + scale)
