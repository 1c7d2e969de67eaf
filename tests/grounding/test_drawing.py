"""Boxes on images, by their pixels."""

import numpy as np
import pytest
from PIL import Image

from open_qwen2vl import draw_boxes
from open_qwen2vl.grounding import Box


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_the_frame_is_drawn_and_the_image_stays(mode):
    image = Image.new(mode, (100, 80))
    before = image.tobytes()
    drawn = draw_boxes(image, [Box(None, (10, 20, 60, 70))], color="#ff0000")
    pixels = np.array(drawn)
    red = (pixels == (255, 0, 0)).all(-1)
    assert (drawn.mode, drawn.size) == ("RGB", image.size) and image.tobytes() == before
    assert red[20, 10:61].all() and red[20:71, 60].all() and not red[25:65, 15:55].any() and not red[:19].any()


def test_labels_have_their_colours_and_stay_in_the_image():
    boxes = [Box("car", (0, 0, 99, 79)), Box("dog\ud83d", (90, 5, 99, 20)), Box("car", (30, 30, 60, 60))]
    pixels = np.array(draw_boxes(Image.new("RGB", (100, 80)), boxes))
    assert (pixels[79, 50] == pixels[60, 45]).all() and (pixels[79, 50] != pixels[20, 95]).any()
    assert (pixels == 255).all(-1).any()  # the text


def test_what_is_out_of_the_image_is_drawn_at_its_edge():
    drawn = np.array(draw_boxes(Image.new("RGB", (100, 80)), [Box("far", (-1e12, 20, 1e12, 1e12))], "#00ff00"))
    assert (
        (drawn[79] == (0, 255, 0)).all() and (drawn[30:, [0, 99]] == (0, 255, 0)).all() and not drawn[50, 5:95].any()
    )


def test_no_box_leaves_a_copy():
    image = Image.new("RGB", (4, 4), "blue")
    drawn = draw_boxes(image, [])
    assert drawn is not image and drawn.tobytes() == image.tobytes()
