"""Step 6: questions about pictures out of one Python package, as LLaVA conversations.

    easy-VQA's 64 px drawings, questions and answers  ->  sft/data/train-shapes.json, train-others.json, test.json,
                                                          images/{train,test}/N.png

easy-VQA has its own split: 4,000 pictures with 38,575 questions to learn from, and 1,000 others with 9,673 questions.
Each question is a conversation of its own; those of a picture stand together, for `pack --share-images` to encode it
once. The training questions for a shape are a file of their own, since the training begins with them. `--validation`
takes the last eighth of the training pictures for the test, for whoever chooses options.
"""

import argparse
import importlib.metadata
import json
import random
import shutil
from pathlib import Path

import easy_vqa

from open_qwen2vl.files import new_folder

VALIDATION_FRACTION = 8

SPLITS = {
    "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
    "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
}


def questions_by_image(
    split: str, limit: int | None = None, validation: bool = False
) -> dict[int, list[tuple[str, str]]]:
    """The questions of a split with their answers, by number of the picture.

    Args:
        split (`str`): `"train"` or `"test"`.
        limit (`int`, *optional*): only the first pictures.
        validation (`bool`, *optional*, defaults to `False`): both are parts of easy-VQA's training split.

    Returns:
        `dict[int, list[tuple[str, str]]]`: pairs of question and answer, pictures in the order of their numbers.
    """
    images: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in zip(*SPLITS["train" if validation else split][0](), strict=True):
        images.setdefault(image, []).append((question, answer))
    numbers = sorted(images)
    if validation:
        learnt = len(numbers) - len(numbers) // VALIDATION_FRACTION
        numbers = numbers[:learnt] if split == "train" else numbers[learnt:]
    return {image: images[image] for image in numbers[:limit]}


def file_of(split: str, question: str) -> str:
    """Name of the json file in which a question stands."""
    if split == "test":
        return "test"
    return "train-shapes" if question.startswith("what") and "color" not in question else "train-others"


def build_split(folder: Path, split: str, limit: int | None, seed: int, validation: bool) -> dict[str, int]:
    """Write the json files of a split and copy its pictures.

    Args:
        folder (`Path`): where to.
        split (`str`): `"train"` or `"test"`.
        limit (`int`, *optional*): only the first pictures.
        seed (`int`): of the order of the pictures and of a picture's questions.
        validation (`bool`): see [`questions_by_image`].

    Returns:
        `dict[str, int]`: numbers of `images` and `questions`.
    """
    images = questions_by_image(split, limit, validation)
    paths = SPLITS["train" if validation else split][1]()
    (folder / "images" / split).mkdir(parents=True)
    records: dict[str, list[dict]] = {}
    shuffled = random.Random(seed)
    for image in shuffled.sample(list(images), len(images)):
        name = f"{split}/{image}.png"
        shutil.copyfile(paths[image], folder / "images" / name)
        for number, (question, answer) in enumerate(shuffled.sample(images[image], len(images[image]))):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            record = {"id": f"{split}/{image}/{number}", "image": name, "conversations": turns}
            records.setdefault(file_of(split, question), []).append(record)
    for file, content in records.items():
        (folder / f"{file}.json").write_text(json.dumps(content, indent=0) + "\n")
    return {"images": len(images), "questions": sum(map(len, records.values()))}


def build(output: Path, limit: int | None = None, seed: int = 0, validation: bool = False) -> dict:
    """Write both splits; a folder that is there already is left as it is.

    Args:
        output (`Path`): folder of the json files and the pictures; it appears whole or not at all.
        limit (`int`, *optional*): only the first pictures of each split.
        seed (`int`, *optional*, defaults to 0): of the order.
        validation (`bool`, *optional*, defaults to `False`): test on training pictures that are kept apart, and leave
            easy-VQA's test split out altogether.

    Returns:
        `dict`: options and, for each split, counts; also in `corpus.json`.

    Raises:
        ValueError: if `output` was made with other options.
    """
    options = {"limit": limit, "seed": seed, "validation": validation}
    options["easy_vqa"] = importlib.metadata.version("easy-vqa")
    summary_file = output / "corpus.json"
    if summary_file.exists():
        summary = json.loads(summary_file.read_text())
        if summary["options"] != options:
            raise ValueError(f"{output} was made with {summary['options']}, not {options}: delete it or name another")
        return summary
    with new_folder(output) as folder:
        summary = {"options": options}
        summary |= {split: build_split(folder, split, limit, seed, validation) for split in SPLITS}
        (folder / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart/sft/data"))
    parser.add_argument("--limit", type=int, help="use only the first pictures of each split")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument(
        "--validation",
        action="store_true",
        help="ask about training pictures kept apart, not the test's",
    )
    args = parser.parse_args()
    try:
        summary = build(args.output, args.limit, args.seed, args.validation)
    except ValueError as error:
        parser.error(str(error))
    train, test = summary["train"], summary["test"]
    print(
        f"{train['questions']:,} questions on {train['images']:,} pictures, and {test['questions']:,} on "
        f"{test['images']:,} others for the test in {args.output}"
    )


if __name__ == "__main__":
    main()
