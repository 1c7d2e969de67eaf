"""Step 9: what the tuned model answers about pictures that it never saw.

    sft/model + sft/data/*.json  ->  sft/metrics.json, report.html, report.png

Every question of easy-VQA's test split is asked alone, through the chat template, and answered greedily; an answer
counts only if it is right to the letter. Beside it stand the commonest training answer to questions of the same type,
and the model's own answers with a uniform mid-grey in place of the picture: what the wording alone gives away.
"""

import argparse
import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from PIL import Image
from report import MID_GREY, describe_machine, describe_versions
from report_sft_pages import write_html, write_png
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from open_qwen2vl.files import write_json
from open_qwen2vl.processing.images import decode_image

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
NAMES_COLOR = re.compile(rf"\b({'|'.join(COLORS)})\b")
# More than the longest answer takes, so that a longer one is seen to be wrong.
MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class Question:
    """A question with its true answer, the picture that it is about, and what the model says."""

    picture: Path
    question: str
    answer: str
    generated: str = ""

    @property
    def right(self) -> bool:
        """Whether the model's answer is the true one, character by character."""
        return self.generated == self.answer

    @property
    def kind(self) -> str:
        """`color` or `shape` where that is asked for, `yes_no_color` or `yes_no_shape` where it is named."""
        if self.question.startswith("what"):
            return "color" if "color" in self.question else "shape"
        return "yes_no_color" if NAMES_COLOR.search(self.question) else "yes_no_shape"


def read_questions(file: Path, images: Path) -> list[Question]:
    """All questions of a file in LLaVA's form, each turn for itself.

    Args:
        file (`Path`): such as `test.json`.
        images (`Path`): the folder that its paths start from.

    Returns:
        `list[Question]`: in the file's order, by picture and question within a picture's.
    """
    questions = []
    for record in json.loads(file.read_text(encoding="utf-8")):
        values = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        picture = images / record["image"]
        questions += [Question(picture, *pair) for pair in zip(values[::2], values[1::2], strict=True)]
    return questions


@torch.inference_mode()
def answer_batch(
    model: PreTrainedModel, processor: ProcessorMixin, images: list[Image.Image], questions: list[str]
) -> list[str]:
    """Ask one question about each picture, as a user of the chat template does.

    Args:
        model (`PreTrainedModel`): an Open-Qwen2VL.
        processor (`ProcessorMixin`): its processor.
        images (`list[PIL.Image.Image]`): RGB images.
        questions (`list[str]`): as many questions.

    Returns:
        `list[str]`: one answer for each question.
    """
    prompts = [
        processor.apply_chat_template(
            # Training has a newline between a picture and its question.
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\n" + question}]}],
            add_generation_prompt=True,
        )
        for question in questions
    ]
    inputs = processor(images=[[image] for image in images], text=prompts, padding=True, return_tensors="pt")
    generated = model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    new_tokens = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def read_picture(path: Path) -> Image.Image:
    """A picture as training sees it."""
    return decode_image(path.read_bytes())


def grey_picture(path: Path) -> Image.Image:
    """A uniform mid-grey of the picture's size."""
    return Image.new("RGB", read_picture(path).size, MID_GREY)


def answer_all(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: list[Question],
    batch_size: int,
    show: Callable[[Path], Image.Image] = read_picture,
) -> list[Question]:
    """Answer every question.

    Args:
        model (`PreTrainedModel`): an Open-Qwen2VL.
        processor (`ProcessorMixin`): its processor.
        questions (`list[Question]`): questions with their pictures.
        batch_size (`int`): questions at a time.
        show (`Callable`, *optional*): what the model sees of a picture's file.

    Returns:
        `list[Question]`: the same questions with `generated`.
    """
    done = []
    progress = tqdm(total=len(questions), desc="answering", unit="question", mininterval=1)
    for batch in batches(questions, batch_size):
        images = [show(question.picture) for question in batch]
        answers = answer_batch(model, processor, images, [question.question for question in batch])
        done += [replace(question, generated=answer) for question, answer in zip(batch, answers, strict=True)]
        progress.update(len(batch))
    progress.close()
    return done


def batches(questions: list[Question], size: int) -> Iterator[list[Question]]:
    """Consecutive slices of `size` questions."""
    for start in range(0, len(questions), size):
        yield questions[start : start + size]


def answer_blanked(
    model: PreTrainedModel, processor: ProcessorMixin, questions: list[Question], batch_size: int
) -> list[Question]:
    """Answer every question without its picture. Equal wordings have equal answers then, so each is asked once."""
    wordings = {question.question: question for question in questions}
    asked = answer_all(model, processor, list(wordings.values()), batch_size, grey_picture)
    answers = {question.question: question.generated for question in asked}
    return [replace(question, generated=answers[question.question]) for question in questions]


def answer_by_majority(train: list[Question], test: list[Question]) -> list[Question]:
    """Give each test question the commonest training answer to questions of its type."""
    counts: dict[str, Counter[str]] = {}
    for question in train:
        counts.setdefault(question.kind, Counter())[question.answer] += 1
    answers = {kind: count.most_common(1)[0][0] for kind, count in counts.items()}
    return [replace(question, generated=answers.get(question.kind, "")) for question in test]


def accuracy(questions: list[Question]) -> float:
    """Share of the questions whose answer is right, 0 to 1."""
    return sum(question.right for question in questions) / len(questions)


def accuracy_by_type(questions: list[Question]) -> dict[str, float]:
    """The same for each type of question, in alphabetical order."""
    kinds = sorted({question.kind for question in questions})
    return {kind: accuracy([question for question in questions if question.kind == kind]) for kind in kinds}


def collect_metrics(
    run: Path, seen: list[Question], majority: list[Question], blanked: list[Question], parameters: int
) -> dict:
    """All figures of the quickstart's second half.

    Args:
        run (`Path`): the training's folder, with `train_results.json` and `data/corpus.json`.
        seen (`list[Question]`): the model's answers.
        majority (`list[Question]`): the commonest answers.
        blanked (`list[Question]`): the model's answers to the wording alone.
        parameters (`int`): of the model.

    Returns:
        `dict`: what goes into `metrics.json`; shares are 0 to 1.
    """
    training = json.loads((run / "train_results.json").read_text())
    corpus = json.loads((run / "data" / "corpus.json").read_text())
    return {
        "accuracy": accuracy(seen),
        "majority_accuracy": accuracy(majority),
        "blanked_accuracy": accuracy(blanked),
        "by_type": accuracy_by_type(seen),
        "majority_by_type": accuracy_by_type(majority),
        "blanked_by_type": accuracy_by_type(blanked),
        "questions_by_type": dict(sorted(Counter(question.kind for question in seen).items())),
        "questions": len(seen),
        "train_questions": corpus["train"]["questions"],
        "train_images": corpus["train"]["images"],
        "train_seconds": training["train_seconds"],
        "steps": training["steps"],
        "epochs": training["epochs"],
        "tokens_per_second": training["tokens_per_second"],
        "final_loss": training["final_loss"],
        "parameters": parameters,
        "machine": describe_machine(),
        "versions": describe_versions() | {"easy-vqa": importlib.metadata.version("easy-vqa")},
    }


def build(run: Path, batch_size: int = 128) -> dict:
    """Evaluate `run/model` and write `metrics.json`, `report.html` and `report.png` into `run`.

    Args:
        run (`Path`): the training's folder, with the data of step 6 in `data/`.
        batch_size (`int`, *optional*, defaults to 128): questions at a time.

    Returns:
        `dict`: the metrics.

    Raises:
        ValueError: if the training has not finished, or the data is not there.
    """
    data = run / "data"
    for needed, step in ((run / "train_results.json", "sft.py"), (data / "corpus.json", "build_sft_data.py")):
        if not needed.exists():
            raise ValueError(f"{needed} is missing: run {step} first")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(run / "model", trust_remote_code=False).to(device).eval()
    processor = AutoProcessor.from_pretrained(run / "model", trust_remote_code=False)
    train, test = (
        [question for file in sorted(data.glob(files)) for question in read_questions(file, data / "images")]
        for files in ("train-*.json", "test.json")
    )
    seen = answer_all(model, processor, test, batch_size)
    blanked = answer_blanked(model, processor, test, batch_size)
    metrics = collect_metrics(run, seen, answer_by_majority(train, test), blanked, model.num_parameters())
    write_png(run / "report.png", metrics, seen)
    write_html(run / "report.html", metrics, seen)
    write_json(run / "metrics.json", metrics, indent=2)
    return metrics


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart/sft"), help="the training's output_dir")
    parser.add_argument("--batch-size", type=int, default=128, help="questions at a time")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()  # of loading one small file
    try:
        metrics = build(args.run, args.batch_size)
    except ValueError as error:
        parser.error(str(error))
    types = ", ".join(f"{kind} {share:.3f}" for kind, share in metrics["by_type"].items())
    print(
        f"accuracy {metrics['accuracy']:.3f} ({types}); commonest answer {metrics['majority_accuracy']:.3f}, "
        f"with blanked images {metrics['blanked_accuracy']:.3f}: see {args.run / 'report.html'}"
    )


if __name__ == "__main__":
    main()
