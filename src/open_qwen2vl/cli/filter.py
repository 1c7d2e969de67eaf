"""`open-qwen2vl filter`: the pairs that stay, chosen by their scores."""

import argparse
from pathlib import Path
from typing import Any

_EXPRESSION = """
EXPR joins clauses with and, or, not and parentheses:
  NAME >= X          the score is X or more; also >, <= and <. NAME is the --name given to score (the scorer's by
                     default), with .PART where it has several values: clip, mlm-filter.semantic_understanding
  top(NAME, F)       the best fraction F of the pairs that have this score. Of those at the threshold some are drawn
                     by their uids and --seed, so that the expected number is met
  in(FILE.npy)       the uid stands in a file (dtype u8,u8: DFN's, or an earlier --output)
  basic()            DataComp's basic filter, from `score --scorer basic`: English, more than 2 words and 5
                     characters, smaller side at least 200 pixels, sides at most 3 : 1
A clause about a score that a pair does not have is neither true nor false, and so is its `not`; a pair is kept where
the whole of EXPR is true. Example:  --keep "basic() and (top(clip, 0.3) or in(dfn.npy))"

A config file has the same options, as `keep: clip >= 0.3` and `scores: [scores/clip]`; the command line wins.
"""

# Name, type, metavar, help; in a config file the names may have _ for -.
_OPTIONS = (
    ("keep", str, "EXPR", "which pairs stay, see below"),
    ("output", str, "FILE.npy", "the uids of the pairs that stay, sorted; a rerun makes it anew"),
    ("report", str, "DIR", "folder of decisions.parquet and index.html (default: beside the output, NAME_report)"),
    ("memory-limit", str, "SIZE", "of the process; more goes to the output's disk (default: 4GB)"),
    ("threads", int, "N", "default: one per core"),
    ("seed", int, "N", "which of equal scores at a top() threshold stay (default: 42)"),
    ("deduplicate", str, "exact|near", "of chosen pairs with equal image files, or similar pictures, keep the "
        "smallest uid; needs scores of image-hash"),
    ("near-distance", int, "N", "most of the hash's 64 bits in which similar pictures differ (default: 3)"),
)  # fmt: skip
_LISTS = ("scores", "pool")


def add_command(commands: "argparse._SubParsersAction") -> None:
    """Add `filter` to the subcommands."""
    summary = "choose pairs by their scores"
    parser = commands.add_parser(
        "filter",
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=_EXPRESSION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scores", nargs="*", metavar="SCORES", help="score files, or folders of them")
    parser.add_argument("--config", metavar="FILE.yaml", help="file with these options")
    for name, kind, metavar, text in _OPTIONS:
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    parser.add_argument(
        "--pool",
        nargs="+",
        metavar="TAR",
        help="tars, or folders of them, with the report's pictures (default: those that the score files name)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from tqdm.contrib.logging import logging_redirect_tqdm

    from ..data.filtering import select_pairs

    options = _read_config(args.config) if args.config else {}
    given = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in [*_LISTS, *_names()]}
    options.update({name: value for name, value in given.items() if value not in (None, [])})
    for name in ("scores", "keep", "output"):
        if not options.get(name):
            raise ValueError(f"no {'SCORES' if name == 'scores' else '--' + name} given")
    with logging_redirect_tqdm():
        report = select_pairs(options.pop("scores"), options.pop("keep"), options.pop("output"), **options)
    print(report)


def _names() -> list[str]:
    return [name for name, *_ in _OPTIONS]


def _read_config(path: str) -> dict[str, Any]:
    """The options of a YAML file, of the types that the command line gives them."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: not a file of `option: value` lines")
    kinds = {name: kind for name, kind, *_ in _OPTIONS}
    options = {}
    for name, value in content.items():
        option = str(name).replace("_", "-")
        if option not in kinds and option not in _LISTS:
            raise ValueError(f"--config {path}: no option {name!r}; there are {', '.join([*_LISTS, *kinds])}")
        if option in _LISTS:
            value = [value] if isinstance(value, str) else value
            good = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        else:
            good = type(value) is kinds[option]
        if not good:
            raise ValueError(f"--config {path}: {name}: {value!r} is no value for it")
        options[option.replace("-", "_")] = value
    return options
