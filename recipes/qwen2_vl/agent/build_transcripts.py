"""Step 1: transcripts of a search over many boards, and a small random Qwen2-VL whose tokenizer knows their words.

world.py ─┬─ open_qwen2vl.agent.run, a script in the model's place ─► data/transcripts.jsonl, data/images/
          └─ single squares and what is on them                     ─► captions.tar
                                                                       init/  model and processor
"""

import argparse
import io
import sys
from pathlib import Path

import torch

from open_qwen2vl import agent
from open_qwen2vl.families.qwen_vl.processing import training_template
from open_qwen2vl.files import new_folder, renamed_when_whole
from open_qwen2vl.processing.tool_forms import plain_messages
from open_qwen2vl.processing.tool_records import read_calls

sys.path.insert(0, str(Path(__file__).parents[1]))
from build_model import build_model, build_processor  # noqa: E402
from world import FORM, MAX_STEPS, Board, Picture, World, boards, search, write_tar  # noqa: E402

TRAINING_SEED, HELD_OUT_SEED = 0, 1


def transcript(number: int, board: Board) -> agent.Transcript:
    """A search on one board, which finds what it was sent for."""
    world = World(board, seed=number)
    found = agent.run(search(world), [world.move], world.observe, MAX_STEPS, task=world.task, tool_form=FORM)
    if not (found.ended == "answer" and world.is_solved) or found.errors:
        raise AssertionError(f"{board}: the search ended by {found.ended} after {found.errors}")
    return found


def words(transcripts: list[agent.Transcript]) -> list[str]:
    """All texts of transcripts as they are trained on, for the tokenizer."""
    found = []
    for one in transcripts:
        normal = [
            {**turn, "tool_calls": read_calls(turn["tool_calls"])} if "tool_calls" in turn else turn
            for turn in one.messages
        ]
        for message in plain_messages(normal, one.tools, FORM, "You are a helpful assistant."):
            found += [f"{message['role']}\n", *(part["text"] for part in message["content"] if part["type"] == "text")]
    return found


def write_captions(path: Path, number: int) -> None:
    """Squares of as many boards, each with what the search says of it."""
    pictures = []
    for key, board in enumerate(boards(number, TRAINING_SEED)):
        world, png = World(board, seed=key), io.BytesIO()
        world.observe().save(png, format="PNG")
        pictures.append(Picture(f"{key:06d}", world.description, png.getvalue()))
    with renamed_when_whole(path) as partial:
        write_tar(partial, pictures)


def build(output: Path, number: int) -> None:
    """Write `data/`, `captions.tar` and `init/`; what is there already is left as it is."""
    data, init = output / "data", output / "init"
    if not data.exists():
        planned = boards(number, TRAINING_SEED)
        agent.save_transcripts((transcript(*one) for one in enumerate(planned)), data)
    if not (output / "captions.tar").exists():
        write_captions(output / "captions.tar", number)
    if not init.exists():
        torch.manual_seed(0)
        examples = [transcript(*one) for one in enumerate(boards(100, TRAINING_SEED))]
        with new_folder(init) as partial:
            processor = build_processor(words(examples))
            # With marks around what the assistant says, which TRL asks for; it renders the same.
            processor.chat_template = training_template(processor)
            build_model(processor).save_pretrained(partial)
            processor.save_pretrained(partial)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/qwen2_vl/agent"))
    parser.add_argument("--boards", type=int, default=3000, help="transcripts to train on")
    args = parser.parse_args()
    build(args.output, args.boards)


if __name__ == "__main__":
    main()
