"""Files of data sets on the Hugging Face Hub: what `hf://datasets/ORG/NAME[@REVISION][/PATH]` stands for.

They are read where they lie, as those of any bucket: a plan names them with the commit that was the newest when it was
made, so that it stays the same data whatever is pushed later. The settings and the token of huggingface_hub hold.
"""

import logging
import re
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from ...places import Place, place
from .tables import split_names

logger = logging.getLogger(__name__)

SCHEME = "hf://"
_URI = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.*))?$")
_SUFFIXES = (".tar", ".parquet", ".jsonl")  # of a folder's files the first kind that is there


def find_files(uri: str) -> list[Place]:
    """The files that a path on the Hub stands for, sorted, with their commit; or a `ValueError`.

    A folder or a whole data set stands for its `*.tar`, or else its `*.parquet`, or else its `*.jsonl` at any depth.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.hf_api import RepoFile

    match = _URI.match(uri)
    if not match:
        raise ValueError(f"{uri}: data sets of the Hub are named hf://datasets/ORG/NAME[@REVISION][/PATH]")
    repo_id, revision, inside = match[1], match[2], (match[3] or "").strip("/")
    try:
        api = HfApi()
        commit = api.dataset_info(repo_id, revision=revision).sha
        tree = api.list_repo_tree(repo_id, revision=commit, repo_type="dataset", recursive=True)
        sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
        names = _choose(uri, inside, sorted(sizes))
        total = sum(sizes[name] for name in names) / 1e9
        logger.info("%s: %d files of %.2f GB at commit %s", uri, len(names), total, commit)
    except (OSError, HTTPError) as error:  # also the connection's own; being offline is an OSError
        raise ValueError(f"{uri}: {' '.join(str(error).split())}") from error
    return [place(f"{SCHEME}datasets/{repo_id}@{commit}/{name}") for name in names]


def _choose(uri: str, inside: str, names: list[str]) -> list[str]:
    """The files that a path stands for, among all of the data set."""
    if inside in names:
        return [inside]
    if "*" in inside:
        chosen = [name for name in names if fnmatchcase(name, inside)]
    else:
        below = [name for name in names if name.startswith(f"{inside}/") or not inside]
        by_suffix = ([name for name in below if PurePosixPath(name).suffix == suffix] for suffix in _SUFFIXES)
        chosen = next(filter(None, by_suffix), [])
        splits = split_names(chosen)
        if len(splits) > 1:
            root = uri.removesuffix(f"/{inside}") if inside else uri.rstrip("/")
            raise ValueError(f"{uri} holds the splits {', '.join(splits)}: name one, as {root}/{splits[-1]}-*.parquet")
    if not chosen:
        raise ValueError(f"{uri}: there is no such file, and no {', '.join(_SUFFIXES)} below it")
    return chosen
