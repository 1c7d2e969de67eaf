"""Whether what a model wrote is a caption: cut off, refused, repeated, too short or too long is none.

Rules of form, in one pass over the text; refusals are known in English. What a caption says is for `score` to judge.
"""

import re

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_]+(?:['\u2019-][^\W_]+)*")  # or a character of CJK
_REFUSAL = re.compile(  # what an answer begins with that is none
    r"(?:i'?m|i am) (?:very |so |really )?(?:sorry|afraid|unable|not able)\b"
    r"|(?:sorry|apologies|my apologies|unfortunately),? (?:but )?(?:i|we|there|it)\b"
    r"|i (?:apologi[sz]e|can'?t|can ?not|could ?n[o']t|do ?n[o']t (?:see|have)|do not (?:see|have)|was unable)\b"
    r"|as an? (?:ai|language model)\b|(?:please|could you|can you) (?:provide|upload|share|attach)\b"
    r"|(?:there is |there's )?no (?:image|picture) (?:is|was|has|provided|attached|given|visible)\b"
    r"|it (?:seems|looks like|appears)(?: that)? (?:there is no|no|you have ?n[o']t|you did ?n[o']t)\b",
    re.IGNORECASE,
)
_NGRAM = 4  # words
MOST_REPEATED = 0.3  # of the words that stand in a run of `_NGRAM` that stood before
_SAME_WORD = 5  # times in a row


def words_of(text: str) -> list[str]:
    """The words of a text in lower case; of Chinese and Japanese its characters."""
    return _WORD.findall(text.lower())


def check_caption(text: str, is_whole: bool, min_words: int, max_words: int) -> tuple[str, int, str | None]:
    """The caption in a model's answer, its number of words, and why it is none.

    The reason is `empty_caption`, `refusal`, `repetition`, `cut_off` (it did not come to its end), `too_short` or
    `too_long`, the first that holds; None for a caption.
    """
    caption = _unquoted(" ".join(text.split()))
    words = words_of(caption)
    if not words:
        return caption, 0, "empty_caption"
    if _REFUSAL.match(caption.replace("\u2019", "'")):
        return caption, len(words), "refusal"
    if repeated_share(words) > MOST_REPEATED:
        return caption, len(words), "repetition"
    if not is_whole:
        return caption, len(words), "cut_off"
    if not min_words <= len(words) <= max_words:
        return caption, len(words), "too_short" if len(words) < min_words else "too_long"
    return caption, len(words), None


def repeated_share(words: list[str]) -> float:
    """The part of the words that repeats four words that stood before, 0 to 1; 1 for a word five times in a row."""
    run = 1
    for before, word in zip(words, words[1:], strict=False):
        run = run + 1 if word == before else 1
        if run == _SAME_WORD:
            return 1.0
    seen: set[tuple[str, ...]] = set()
    again = [False] * len(words)
    for start in range(len(words) - _NGRAM + 1):
        gram = tuple(words[start : start + _NGRAM])
        if gram in seen:
            again[start : start + _NGRAM] = [True] * _NGRAM
        seen.add(gram)
    return sum(again) / max(1, len(words))


def _unquoted(text: str) -> str:
    pairs = {'"': '"', "\u201c": "\u201d"}
    return text[1:-1].strip() if len(text) > 1 and pairs.get(text[0]) == text[-1] else text
