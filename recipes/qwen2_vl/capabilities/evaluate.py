"""Last step: what the trained model answers about clips and canvases that it never saw.

    RUN/model + data/held-out.json  ->  RUN/metrics.json and a table

Every question is asked alone, of the model as transformers loads it, and answered greedily: a text counts to the
letter, a box with an IoU of at least a half. Blanked: the same with all pixels mid-grey. One frame: the clip's first
stands still. Mean box: that of the training canvases, as shares of their sides, for every canvas.
"""

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from build_clips import ANSWERS, QUESTIONS
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from open_qwen2vl.files import write_json
from open_qwen2vl.grounding import box_iou, parse_boxes
from open_qwen2vl.processing.images import decode_image
from open_qwen2vl.processing.videos import read_video_header, video_frames

MID_GREY = 128
FPS = 2  # as packs are planned
LONGEST_ANSWER = 32  # tokens


@dataclass
class Question:
    """One question about one file, and what the model says."""

    kind: str  # of content part: image or video
    asked: str  # key of QUESTIONS
    frames: np.ndarray  # uint8 (frames, height, width, 3); one of an image
    answer: dict[str, Any]  # content part
    generated: str = ""
    iou: float = 0.0  # of the first box of the answer

    @property
    def right(self) -> bool:
        """Whether the answer counts."""
        return self.iou >= 0.5 if self.asked == "box" else self.generated == self.answer["text"]


def read_frames(kind: str, data: bytes) -> np.ndarray:
    """An image, or a clip's frames two a second, uint8 `(frames, height, width, 3)`."""
    if kind == "image":
        return np.array(decode_image(data))[None]
    header = read_video_header(data)
    numbers = range(0, header.frames, round(header.fps / FPS))
    return np.stack(list(video_frames(data, numbers, header.frames, header.fps)))


def read_questions(split: Path) -> list[Question]:
    """All questions of a split, each by itself."""
    asked = {text: name for name, text in QUESTIONS.items()}
    questions = []
    for record in json.loads(split.read_text()):
        kind = "image" if "images" in record else "video"
        frames = read_frames(kind, (split.parent / "files" / record[f"{kind}s"][0]).read_bytes())
        turns = iter(record["messages"])
        for user, assistant in zip(turns, turns, strict=True):
            name = asked[user["content"][-1]["text"]]
            questions.append(Question(kind, name, frames, assistant["content"][0]))
    return questions


@torch.inference_mode()
def answer(model: PreTrainedModel, processor: ProcessorMixin, questions: list[Question], batch: int) -> list[Question]:
    """The same questions with the model's answers, greedily."""
    done = []
    for start in range(0, len(questions), batch):
        asked = questions[start : start + batch]
        turns = [
            [{"role": "user", "content": [{"type": one.kind}, {"type": "text", "text": QUESTIONS[one.asked]}]}]
            for one in asked
        ]
        text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        images = [one.frames[0] for one in asked if one.kind == "image"]
        videos = [one.frames for one in asked if one.kind == "video"]
        # The frames are sampled already.
        media = {"images": images or None, "videos": videos or None, "do_sample_frames": False}
        inputs = processor(text=text, **media, padding=True, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST_ANSWER)
        written = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        done += [
            scored(replace(one, generated=words.strip()), processor) for one, words in zip(asked, written, strict=True)
        ]
    return done


def scored(question: Question, processor: ProcessorMixin) -> Question:
    """With the overlap of the box that it names, where it is asked for one."""
    if question.asked != "box":
        return question
    height, width = question.frames.shape[1:3]
    boxes = parse_boxes(question.generated, processor, (width, height))
    return replace(question, iou=overlap(boxes[0].box, question) if boxes else 0.0)


def overlap(box: Iterable[float], question: Question) -> float:
    """IoU of a box with the true one, 0 to 1."""
    return box_iou([list(box)], [question.answer["box"]]).item()


def blanked(question: Question) -> Question:
    """All pixels mid-grey."""
    return replace(question, frames=np.full_like(question.frames, MID_GREY))


def one_frame(question: Question) -> Question:
    """The first frame, as long as the clip."""
    return replace(question, frames=np.repeat(question.frames[:1], len(question.frames), axis=0))


def mean_box(split: Path) -> np.ndarray:
    """The mean of a split's boxes as shares of their canvases' sides, `(4,)`."""
    shares = []
    for record in json.loads(split.read_text()):
        parts = [part for message in record["messages"] for part in message["content"]]
        for box in (part["box"] for part in parts if part["type"] == "box"):
            image = decode_image((split.parent / "files" / record["images"][0]).read_bytes())
            shares.append(np.divide(box, image.size * 2))
    return np.mean(shares, axis=0)


def with_box(question: Question, shares: np.ndarray) -> Question:
    """The question, answered by a box of these shares of its canvas."""
    return replace(question, iou=overlap(shares * (question.frames.shape[2:0:-1] * 2), question))


def interval(right: int, asked: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.96, right / asked
    middle = (share + z**2 / (2 * asked)) / (1 + z**2 / asked)
    half = z / (1 + z**2 / asked) * math.sqrt(share * (1 - share) / asked + z**2 / (4 * asked**2))
    return middle - half, middle + half


def share(questions: list[Question]) -> float:
    """Of right answers, 0 to 1."""
    return sum(question.right for question in questions) / len(questions)


def evaluate(run: Path, data: Path, batch: int) -> list[dict[str, Any]]:
    """Ask all held-out questions; one row for each kind of file and question, also in `run/metrics.json`."""
    model = AutoModelForImageTextToText.from_pretrained(run / "model", trust_remote_code=False).eval()
    processor = AutoProcessor.from_pretrained(run / "model", trust_remote_code=False)
    asked = read_questions(data / "held-out.json")
    rows = []
    for kind, name in (("image", "name"), ("image", "box"), ("video", "name"), ("video", "direction")):
        questions = [one for one in asked if (one.kind, one.asked) == (kind, name)]
        seen = answer(model, processor, questions, batch)
        right = sum(one.right for one in seen)
        row = {"kind": kind, "question": name, "asked": len(seen), "right": right, "share": share(seen)}
        row["interval"] = interval(right, len(seen))
        row["blanked"] = share(answer(model, processor, list(map(blanked, questions)), batch))
        if kind == "video":
            row["one_frame"] = share(answer(model, processor, list(map(one_frame, questions)), batch))
        if name == "box":
            mean = mean_box(data / "train.json")
            row["baseline"] = share([with_box(one, mean) for one in questions])
            row["mean_iou"] = float(np.mean([one.iou for one in seen]))
        else:
            row["baseline"] = 1 / len(ANSWERS[name])
        rows.append(row)
    write_json(run / "metrics.json", {"rows": rows})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| task | right | 95 % interval | blanked | one frame | chance, or mean box |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        task = f"{row['question']} ({'clips' if row['kind'] == 'video' else 'canvases'})"
        low, high = row["interval"]
        still = f"{row['one_frame']:.3f}" if "one_frame" in row else ""
        lines.append(
            f"| {task} | {row['share']:.3f} ({row['right']} of {row['asked']}) | {low:.2f} to {high:.2f} | "
            f"{row['blanked']:.3f} | {still} | {row['baseline']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/qwen2_vl/capabilities"), help="a finished training")
    parser.add_argument("--data", type=Path, default=Path("runs/qwen2_vl/capabilities/data"))
    parser.add_argument("--batch-size", type=int, default=50, help="questions at a time")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if not (args.run / "train_results.json").exists():
        parser.error(f"{args.run} holds no finished training: run sft.py first")
    print(table(evaluate(args.run, args.data, args.batch_size)))


if __name__ == "__main__":
    main()
