"""Step 6: questions about pictures out of one Python package, as LLaVA conversations.

    easy-VQA's 64 px drawings, questions and answers  ->  sft/data/train.json, test.json, images/{train,test}/N.png

easy-VQA has its own split: 4,000 pictures with 38,575 questions to learn from, and 1,000 others with 9,673 questions.
The questions of one training picture are turns of a few conversations, so that a picture is encoded for several of
them; a test question stands alone. `--validation` takes the last eighth of the training pictures for the test, for
whoever chooses options.
"""

import argparse
import importlib.metadata
import json
import random
import shutil
from pathlib import Path

import easy_vqa

from open_qwen2vl.files import new_folder

# More turns cost less each, but then more answers follow from earlier ones and need no look at the picture.
TURNS = 4
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


def split_evenly(pairs: list[tuple[str, str]], turns: int) -> list[list[tuple[str, str]]]:
    """Cut a picture's questions into groups of nearly the same length, none above `turns`."""
    groups = -(-len(pairs) // turns)
    return [pairs[number::groups] for number in range(groups)]


def conversation(identifier: str, image: str, pairs: list[tuple[str, str]]) -> dict:
    r"""One record of LLaVA's form.

    Args:
        identifier (`str`): unique in its file.
        image (`str`): path in the image folder.
        pairs (`list[tuple[str, str]]`): questions and answers, in the order of the turns.

    Returns:
        `dict`: `id`, `image`, `conversations`; the first question comes after `"<image>\n"`.
    """
    turns = []
    for question, answer in pairs:
        prefix = "" if turns else "<image>\n"
        turns += [{"from": "human", "value": prefix + question}, {"from": "gpt", "value": answer}]
    return {"id": identifier, "image": image, "conversations": turns}


def build_split(
    folder: Path, split: str, turns: int, limit: int | None, seed: int, validation: bool
) -> dict[str, int]:
    """Write `{split}.json` and copy the pictures.

    Args:
        folder (`Path`): where to.
        split (`str`): `"train"` or `"test"`.
        turns (`int`): questions in one conversation at most.
        limit (`int`, *optional*): only the first pictures.
        seed (`int`): of the order of a picture's questions and of the conversations.
        validation (`bool`): see [`questions_by_image`].

    Returns:
        `dict[str, int]`: numbers of `images`, `questions` and `conversations`.
    """
    images = questions_by_image(split, limit, validation)
    paths = SPLITS["train" if validation else split][1]()
    (folder / "images" / split).mkdir(parents=True)
    records = []
    for image, pairs in images.items():
        name = f"{split}/{image}.png"
        shutil.copyfile(paths[image], folder / "images" / name)
        shuffled = random.Random(f"{seed}/{name}").sample(pairs, len(pairs))
        for number, group in enumerate(split_evenly(shuffled, turns)):
            records.append(conversation(f"{split}/{image}/{number}", name, group))
    random.Random(seed).shuffle(records)
    (folder / f"{split}.json").write_text(json.dumps(records, indent=0) + "\n")
    return {
        "images": len(images),
        "questions": sum(len(pairs) for pairs in images.values()),
        "conversations": len(records),
    }


def build(output: Path, turns: int = TURNS, limit: int | None = None, seed: int = 0, validation: bool = False) -> dict:
    """Write both splits; a folder that is there already is left as it is.

    Args:
        output (`Path`): folder of the json files and the pictures; it appears whole or not at all.
        turns (`int`, *optional*, defaults to 4): questions in one training conversation at most.
        limit (`int`, *optional*): only the first pictures of each split.
        seed (`int`, *optional*, defaults to 0): of the order.
        validation (`bool`, *optional*, defaults to `False`): test on training pictures that are kept apart, and leave
            easy-VQA's test split out altogether.

    Returns:
        `dict`: options and, for each split, counts; also in `corpus.json`.

    Raises:
        ValueError: if `output` was made with other options, or `turns` is below 1.
    """
    if turns < 1:
        raise ValueError(f"turns is {turns}, but a conversation has at least one question")
    options = {"turns": turns, "limit": limit, "seed": seed, "validation": validation}
    options["easy_vqa"] = importlib.metadata.version("easy-vqa")
    summary_file = output / "corpus.json"
    if summary_file.exists():
        summary = json.loads(summary_file.read_text())
        if summary["options"] != options:
            raise ValueError(f"{output} was made with {summary['options']}, not {options}: delete it or name another")
        return summary
    with new_folder(output) as folder:
        summary = {
            "options": options,
            "train": build_split(folder, "train", turns, limit, seed, validation),
            "test": build_split(folder, "test", 1, limit, seed, validation),
        }
        (folder / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart/sft/data"))
    parser.add_argument("--turns", type=int, default=TURNS, help="questions in one training conversation at most")
    parser.add_argument("--limit", type=int, help="use only the first pictures of each split")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument(
        "--validation",
        action="store_true",
        help="ask about training pictures kept apart, not the test's",
    )
    args = parser.parse_args()
    try:
        summary = build(args.output, args.turns, args.limit, args.seed, args.validation)
    except ValueError as error:
        parser.error(str(error))
    train, test = summary["train"], summary["test"]
    print(
        f"{train['questions']:,} questions on {train['images']:,} pictures, in {train['conversations']:,} "
        f"conversations, and {test['questions']:,} on {test['images']:,} others for the test in {args.output}"
    )


if __name__ == "__main__":
    main()
