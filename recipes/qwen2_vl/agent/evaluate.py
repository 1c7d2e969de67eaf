"""Last step: how often the model finds what it is sent for, on boards that it never saw, and how often without seeing.

    RUN/model + boards of world.py  ->  RUN/metrics.json, and a table

Found means: the run ended with an answer, on the right square. Beside the model: the same with every square grey;
moves at random that end at random; and moves at random that end on the right square, as if always recognised.
"""

import argparse
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import transformers
from build_transcripts import HELD_OUT_SEED, TRAINING_SEED
from transformers import AutoModelForImageTextToText, AutoProcessor
from world import FORM, MAX_STEPS, STEPS, Board, World, boards, call

from open_qwen2vl import agent
from open_qwen2vl.evaluation.intervals import wilson
from open_qwen2vl.files import write_json

MAX_NEW_TOKENS = 64


def at_random(chance: random.Random, world: World | None = None) -> Callable[[list], str]:
    """An actor that moves at random and ends at random, or on the right square of a world that it is given."""

    def act(messages: list) -> str:
        ends = chance.randrange(len(STEPS) + 1) == 0 if world is None else world.is_solved
        return "found" if ends else call(chance.choice(list(STEPS)))

    return act


def success(held_out: list[Board], actor: Callable[[int, World], dict], blanked: bool = False) -> dict:
    """Share of boards on which the target was found, with its interval, steps of those, and errors of all."""
    found, steps, errors = 0, 0, Counter()
    for number, board in enumerate(held_out):
        world = World(board, seed=-1 - number, blanked=blanked)
        run = agent.run(
            tools=[world.move],
            observe=world.observe,
            max_steps=MAX_STEPS,
            task=world.task,
            tool_form=FORM,
            max_new_tokens=MAX_NEW_TOKENS,
            **actor(number, world),
        )
        is_found = run.ended == "answer" and world.is_solved
        found, steps, errors = found + is_found, steps + run.steps * is_found, errors + run.errors
    share = found / len(held_out)
    return {
        "found": found,
        "boards": len(held_out),
        "share": share,
        "interval": list(wilson(share, len(held_out))),
        "steps": steps / found if found else None,
        "errors": dict(errors),
    }


def evaluate(run: Path, number: int) -> dict[str, dict]:
    """All rows of the table, by name."""
    model = AutoModelForImageTextToText.from_pretrained(run / "model", trust_remote_code=False).eval()
    processor = AutoProcessor.from_pretrained(run / "model", trust_remote_code=False)
    trained = sum(1 for _ in open(run / "data" / "transcripts.jsonl", encoding="utf-8"))
    held_out = boards(number, HELD_OUT_SEED, frozenset(boards(trained, TRAINING_SEED)))

    def by_model(number: int, world: World) -> dict:
        return {"model": model, "processor": processor}

    return {
        "model": success(held_out, by_model),
        "model, grey squares": success(held_out, by_model, blanked=True),
        "random moves, random end": success(
            held_out, lambda number, world: {"model": at_random(random.Random(number))}
        ),
        "random moves, knows the end": success(
            held_out, lambda number, world: {"model": at_random(random.Random(number), world)}
        ),
    }


def table(rows: dict[str, dict]) -> str:
    """The rows as Markdown."""
    lines = ["| who | found | 95 % | steps where found | calls that failed |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        low, high = row["interval"]
        steps = "" if row["steps"] is None else f"{row['steps']:.1f}"
        lines.append(
            f"| {name} | {row['share']:.2f} ({row['found']} of {row['boards']}) | {low:.2f} to {high:.2f} | {steps} | "
            f"{sum(row['errors'].values())} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, nargs="?", default=Path("runs/qwen2_vl/agent"), help="folder of the training"
    )
    parser.add_argument("--boards", type=int, default=100, help="held-out boards")
    args = parser.parse_args()
    if not (args.run / "train_results.json").exists():
        parser.error(f"{args.run} holds no finished training: run sh recipes/qwen2_vl/agent/run.sh")
    transformers.utils.logging.disable_progress_bar()
    rows = evaluate(args.run, args.boards)
    write_json(args.run / "metrics.json", rows)
    print(table(rows))


if __name__ == "__main__":
    main()
