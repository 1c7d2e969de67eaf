"""Made-up conversations of which several are on one picture, as published statistics have them, for sft.py.

ten questions     ten one-turn conversations a picture, questions of 4 to 24 words, answers of 1 to 40
LLaVA-665k        the sources of arXiv 2310.03744, table 7, with images (ShareGPT's 40k have none): conversations, the
                  pictures that they are on, and turns by its rules: VQA pairs of a picture are merged, RefCOCO's and
                  Visual Genome's at most ten. COCO's 118k pictures are in five of the sources. Turns where it gives
                  none are the annotations of a picture that each set publishes
MAmmoTH-VL        publishes no such figures. ASSUMED: a geometric number of conversations a picture, mean two, of one
                  turn with answers of 60 to 300 words, as its rewritten ones have

Pictures are drawn uniformly from a source's; the file is sorted by picture, as a plan needs it (docs/sft.md).
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from open_qwen2vl import OpenQwen2VLConfig
from open_qwen2vl.families.interface import StepWork
from open_qwen2vl.families.open_qwen2vl_model import OpenQwen2VLPackedModel

WORDS = (
    "the a of in on is are with two red blue small large person dog table street sign window light water green left "
    "right behind standing holding picture shows which what where how many color object visible background several"
).split()
# Thousands of conversations, the pictures' set, turns (fewest, most), words of an answer (fewest, most).
LLAVA = (
    (58, "coco", (3, 6), (10, 40)),  # LLaVA-158k: conversation, detail, complex reasoning
    (23, "coco", (1, 1), (60, 120)),
    (77, "coco", (1, 1), (60, 150)),
    (83, "coco", (3, 8), (1, 2)),  # VQAv2, 5.4 questions a picture
    (9, "coco", (1, 2), (1, 2)),  # OKVQA
    (66, "coco", (1, 1), (1, 1)),  # A-OKVQA, once for each of four choices
    (48, "coco", (4, 10), (4, 12)),  # RefCOCO
    (86, "genome", (10, 10), (4, 12)),  # Visual Genome
    (72, "genome", (5, 20), (1, 2)),  # GQA, 943k questions on 72k pictures: 13 a picture
    (80, "ocr", (4, 7), (1, 6)),  # OCR-VQA, five questions a cover
    (22, "textcaps", (1, 1), (8, 16)),
)
PICTURES = {"coco": 118, "genome": 108, "ocr": 80, "textcaps": 22}  # thousands of them
SETS = {"ten questions a picture": "ten", "LLaVA-665k": "llava", "MAmmoTH-VL (assumed)": "mammoth"}
NUMBER = 1200  # conversations of a set, about


def conversation(random: np.random.Generator, image: str, turns: int, words: tuple[int, int]) -> dict:
    found = []
    for turn in range(turns):
        question = " ".join(random.choice(WORDS, random.integers(4, 25)))
        answer = " ".join(random.choice(WORDS, random.integers(words[0], words[1] + 1)))
        found += [{"from": "human", "value": question if turn else f"<image>\n{question}"},
                  {"from": "gpt", "value": answer}]  # fmt: skip
    return {"image": image, "conversations": found}


def llava(random: np.random.Generator) -> list[dict]:
    scale = NUMBER / sum(thousands for thousands, *_ in LLAVA)
    records = []
    for thousands, pictures, turns, words in LLAVA:
        for _ in range(round(thousands * scale)):
            picture = random.integers(max(1, round(PICTURES[pictures] * scale)))
            records.append(
                conversation(random, f"{pictures}-{picture}.jpg", random.integers(turns[0], turns[1] + 1), words)
            )
    return records


def ten(random: np.random.Generator) -> list[dict]:
    return [conversation(random, f"{number // 10}.jpg", 1, (1, 40)) for number in range(NUMBER)]


def mammoth(random: np.random.Generator) -> list[dict]:
    counts = random.geometric(0.5, NUMBER // 2)
    return [conversation(random, f"{i}.jpg", 1, (60, 300)) for i, count in enumerate(counts) for _ in range(count)]


def shared_set(folder: Path, name: str, make_jpeg: Callable[[np.random.Generator], dict]) -> tuple[Path, Path]:
    """The file of a set and the folder of its pictures."""
    random = np.random.default_rng(0)
    records = {"ten": ten, "llava": llava, "mammoth": mammoth}[name](random)
    records.sort(key=lambda record: record["image"])
    images = folder / "images"
    images.mkdir()
    for image in {record["image"]: None for record in records}:
        (images / image).write_bytes(make_jpeg(random)["bytes"])
    (folder / "conversations.json").write_text(json.dumps(records))
    return folder / "conversations.json", images


def flops_per_conversation(totals: dict) -> float:
    """Of the 2B model with a frozen tower, from a plan's totals."""
    family, config = OpenQwen2VLPackedModel(), OpenQwen2VLConfig()
    vision = family.vision_work(config, totals["images"], totals["images"] * 729)
    work = StepWork(totals["tokens"], totals["squared_lengths"], totals["images"], vision)
    trained = {"projector": 1, "language_model": 1, "vision_tower": 0}
    return family.step_flops(config, work, trained) / totals["documents"]
