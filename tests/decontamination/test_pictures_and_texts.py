import numpy as np
import pytest
from PIL import ImageOps

from open_qwen2vl.decontamination import pictures
from open_qwen2vl.decontamination.attacks import ATTACKS, self_test
from open_qwen2vl.decontamination.index import ContaminationIndex, build_index
from open_qwen2vl.decontamination.sets import find_sets
from open_qwen2vl.decontamination.texts import MOST_TEXTS, index_texts, ngrams
from open_qwen2vl.decontamination.views import CROPS, Unlike

MUST_BE_FOUND = ("unchanged", "JPEG 30", "64 pixels", "crop to 90 %", "crop to 80 %", "mirrored", "frame", "grey")


@pytest.fixture(scope="module")
def index(evaluation_folder, tmp_path_factory) -> ContaminationIndex:
    folder = tmp_path_factory.mktemp("index") / "against"
    build_index(folder, find_sets([str(evaluation_folder)]))
    return ContaminationIndex(folder)


def test_changed_copies_are_found_and_nothing_else_is_taken_for_them(index, evaluation_pictures):
    samples = [(int(entry), evaluation_pictures[entry]) for entry in np.unique(index.owners)]
    assert len(samples) >= 10
    counts = {one.kind: one for one in self_test(index.like, samples)}
    assert set(counts) == set(ATTACKS)
    assert [kind for kind in MUST_BE_FOUND if counts[kind].recall < 1] == []
    assert [kind for kind, one in counts.items() if one.precision < 1] == []
    assert {kind: one.recall for kind, one in counts.items() if one.recall < 0.5} == {}


def test_other_pictures_are_no_copies(index, other_pictures):
    for picture in other_pictures:
        try:
            assert index.match_image(picture).similarity < 0.85
        except Unlike as error:
            assert error.reason == "plain_image"


def test_a_crop_of_a_transform_is_the_transform_of_a_crop(evaluation_pictures):
    thumbnail = pictures.thumbnails(evaluation_pictures[2])[0].grey.astype(np.float32)
    for window in (CROPS[0], pictures.Window(pictures.Interval(0.25, 1), pictures.Interval(0, 0.75))):
        (left, right), (top, bottom) = (tuple(round(64 * edge) for edge in interval) for interval in window)
        crop = thumbnail[top:bottom, left:right].astype(np.float64)
        for rows, columns in ((0, 0), (1, 3), (5, 2)):
            waves = [
                np.cos(np.pi * number * (np.arange(size) + 0.5) / size)
                for number, size in zip((rows, columns), crop.shape, strict=True)
            ]
            expected = waves[0] @ crop @ waves[1] / crop.size
            assert pictures.transform(thumbnail, window, 8)[rows, columns] == pytest.approx(expected, abs=0.01)


def test_frames_are_looked_through(evaluation_pictures):
    framed = ImageOps.expand(evaluation_pictures[0], (20, 12, 6, 30), (200, 10, 90))
    (_, inside), (plain, *_) = pictures.thumbnails(framed), pictures.thumbnails(evaluation_pictures[0])
    assert np.corrcoef(inside.grey.ravel(), plain.grey.ravel())[0, 1] > 0.97


QUESTION = "how many of the people who are standing beside the river wear a hat that is blue"


def test_ngrams_find_texts_within_texts():
    short = "which bird sits on the left old fence"
    index, left_out = index_texts([QUESTION, "is it red?", short, f"{QUESTION} seven"])
    assert left_out == {"text_too_short": 1}
    assert index.best(f"Well... {QUESTION.upper()}, who knows?") == (1.0, 0)
    assert index.best(f"{QUESTION}: seven") == (1.0, 0)  # of two whole ones the first
    share, number = index.best(" ".join(QUESTION.split()[:15]))
    assert (share, number) == (3 / 5, 0)
    assert index.best("Tell me: which bird sits, on the left, old fence or pole") == (1.0, 2)
    assert index.best("which bird sits on the right old fence") == (0.0, -1)
    assert index.best("is it red?") == (0.0, -1) and index.best("") == (0.0, -1)


def test_the_wording_of_a_prompt_tells_nothing():
    wording = "answer the question with the letter of the right option from the given choices"
    index, left_out = index_texts([f"{wording} {number}" for number in range(MOST_TEXTS + 1)])
    assert index.best(wording) == (0.0, -1)
    assert left_out == {} and index.best(f"{wording} 3") == (1.0, 3)
    assert index_texts([])[0].best(QUESTION) == (0.0, -1)


def test_lengths_of_ngrams():
    words = QUESTION.split()
    assert len(ngrams(words)) == len(words) - 12 and len(ngrams(words[:9])) == 1 and ngrams(words[:7]) == []
    assert set(ngrams(words[2:11])) <= set(ngrams(words, shorter=True))
