"""What of a model's words is a caption."""

import pytest

from open_qwen2vl.data.recaptioning.checks import check_caption, repeated_share, words_of


@pytest.mark.parametrize(
    ("text", "whole", "reason"),
    [
        ("A red bus stands in front of a house.", True, None),
        ('  "A red bus stands\n in front."  ', True, None),
        ("A sign says: sorry, we are closed.", True, None),
        ("I love New York, says the shirt of a man.", True, None),
        ("一只猫坐在窗边。", True, None),
        ("", True, "empty_caption"),
        (" ... ", True, "empty_caption"),
        ("I'm sorry, but I can't help with that.", True, "refusal"),
        ("I\u2019m unable to see the picture.", True, "refusal"),
        ("I cannot describe people in a picture.", True, "refusal"),
        ("Sorry, I do not know who this is.", False, "refusal"),
        ("As an AI language model, I have no eyes.", True, "refusal"),
        ("Please upload the image again.", True, "refusal"),
        ("No image was provided.", True, "refusal"),
        ("It seems that there is no picture here.", True, "refusal"),
        ("a cat a cat a cat a cat a cat a cat", True, "repetition"),
        ("very very very very very large house", True, "repetition"),
        ("the sky is blue. " * 4, True, "repetition"),
        ("A red bus stands in front of", False, "cut_off"),
        ("A bus.", True, "too_short"),
        ("one two three four five six seven eight nine ten eleven twelve thirteen", True, "too_long"),
    ],
)
def test_a_caption_and_what_is_none(text, whole, reason):
    assert check_caption(text, whole, 3, 12)[2] == reason


def test_a_caption_is_one_line_without_its_quotes():
    assert check_caption(' "A red\n  bus here." ', True, 1, 9) == ("A red bus here.", 4, None)


def test_words_and_what_of_them_repeats():
    assert words_of("A well-known cat's tail, 猫だ") == ["a", "well-known", "cat's", "tail", "猫", "だ"]
    assert repeated_share("a b c d e f g h".split()) == 0
    assert repeated_share("a b c d x a b c d".split()) == 4 / 9
    assert repeated_share([]) == 0
