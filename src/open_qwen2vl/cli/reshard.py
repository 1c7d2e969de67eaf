"""`open-qwen2vl reshard`: the samples of a subset in training tars."""

import argparse


def add_command(commands: "argparse._SubParsersAction") -> None:
    """Add `reshard` to the subcommands."""
    summary = "copy the samples of a subset into new tars (member bytes untouched, an index beside each tar)"
    parser = commands.add_parser("reshard", help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument("pool", nargs="+", metavar="POOL", help="WebDataset tars, or folders of tars")
    parser.add_argument(
        "--subset", required=True, metavar="FILE.npy", help="uids to keep (dtype u8,u8), as filter writes them"
    )
    parser.add_argument(
        "--output", required=True, help="folder of the new tars; a rerun finishes what is missing in it"
    )
    parser.add_argument(
        "--samples-per-shard", type=int, default=10_000, metavar="N", help="samples of a tar (default: %(default)s)"
    )
    parser.add_argument(
        "--shuffle",
        action="store_true",
        help="shuffle the tars of the pool, then the samples of every 32 of them, so that an output tar is read from "
        "these 32 only (from 64 where it spans two windows); without, the order of the pool is kept",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --shuffle (default: %(default)s)")
    parser.add_argument("--num-workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument(
        "--engine",
        default="local",
        choices=("local", "ray"),
        help="ray: workers on a Ray cluster whose machines share the files (default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from tqdm.contrib.logging import logging_redirect_tqdm

    from ..data.resharding.resharding import reshard

    with logging_redirect_tqdm():
        report = reshard(
            args.pool,
            args.subset,
            args.output,
            samples_per_shard=args.samples_per_shard,
            shuffle_seed=args.seed if args.shuffle else None,
            num_workers=args.num_workers,
            engine=args.engine,
        )
    print(report)
