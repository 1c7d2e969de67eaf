"""Random conversations of which several are on one picture, as a file of records and a folder of images."""

import json
from pathlib import Path

import numpy as np

from tests.families.qwen_vl.packs import SIZES, noisy_clip, picture

WORDS = "a photo of cat on the mat two dogs run in park blue green red what is shown".split()


def turns(rng: np.random.Generator, mark: str = "<image>\n", rounds: int = 0) -> list[dict]:
    """One to three questions with their answers, the mark before the first."""
    says = lambda: " ".join(rng.choice(WORDS, rng.integers(1, 9)))  # noqa: E731
    rounds = rounds or rng.integers(1, 4)
    found = [{"from": who, "value": says()} for _ in range(rounds) for who in ("human", "gpt")]
    found[0]["value"] = mark + found[0]["value"]
    return found


def write_conversations(folder: Path, seed: int, pictures: int = 4, clips: int = 0) -> Path:
    """On each picture two to five conversations, in turn with those of others; one of each is about a second picture,
    one has its picture behind a text, one another system prompt. The last picture's are branches of one record.
    """
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    for number in range(pictures + 1):
        (folder / "images" / f"{number}.png").write_bytes(picture(*SIZES[number], seed=number))
    for number in range(clips):
        (folder / "images" / f"{number}.mp4").write_bytes(noisy_clip(64, 48, 10, seed=number))
    records = [
        {"image": f"{number}.png", "conversations": turns(rng)}
        for number in range(pictures - 1)
        for _ in range(rng.integers(2, 6))
    ]
    records += [{"video": f"{number}.mp4", "conversations": turns(rng)} for number in range(clips) for _ in range(3)]
    both = [f"{0}.png", f"{pictures}.png"]
    records += [
        {"image": both, "conversations": turns(rng, "<image>\n") + turns(rng, "and <image> ")},
        {"image": "0.png", "conversations": turns(rng, "before <image> ")},
        {"image": "1.png", "system": "You are a helpful assistant.", "conversations": turns(rng)},
        {"conversations": turns(rng, "")},
        {"image": f"{pictures - 1}.png", "branches": [turns(rng) for _ in range(4)]},
    ]
    order = rng.permutation(len(records))
    file = folder / "conversations.json"
    file.write_text(json.dumps([{"id": f"r{number}", **records[i]} for number, i in enumerate(order)]))
    return file
