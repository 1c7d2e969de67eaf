"""`open-qwen2vl report`: evaluations side by side on one page."""

import argparse


def add_command(commands: "argparse._SubParsersAction") -> None:
    """Add `report` to the subcommands."""
    summary = "write one HTML page on what evaluations gave: scores with intervals, categories, samples"
    parser = commands.add_parser("report", help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="folders written by open-qwen2vl evaluate")
    parser.add_argument(
        "--output", default="report.html", metavar="FILE", help="the page to write (default: %(default)s)"
    )
    parser.add_argument(
        "--samples-per-task",
        type=int,
        default=200,
        metavar="N",
        help="most samples shown of a task, those on which models disagree first (default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from ..evaluation.report import write_report

    page = write_report(args.results, args.output, args.samples_per_task)
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")
