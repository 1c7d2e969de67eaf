"""The eight benchmarks as small repositories on a local Hub, so that the tasks' own names load them."""

import io
import json
from pathlib import Path

import yaml
from datasets import Dataset, Features, Image, List, Value

from tests.evaluation.fixture_rows import Fixture, benchmark_fixtures
from tests.hub_server import Hub, Repo


def _features(columns: dict[str, str]) -> Features:
    special = {
        "image": Image(),
        "images": List(Image()),
        "strings": List(Value("string")),
        "integers": List(Value("int64")),
        "mmstar_info": {name: Value("string") for name in ("source", "split", "image_path")},
        "mathvista_metadata": {
            **dict.fromkeys(("category", "context", "grade"), Value("string")),
            **dict.fromkeys(("img_height", "img_width"), Value("int64")),
            "language": Value("string"),
            "skills": List(Value("string")),
            **dict.fromkeys(("source", "split", "task"), Value("string")),
        },
    }
    return Features({name: special.get(kind) or Value(kind) for name, kind in columns.items()})


def parquet(fixture: Fixture) -> bytes:
    """The data file of a fixture."""
    buffer = io.BytesIO()
    Dataset.from_list([row.doc for row in fixture.rows], _features(fixture.columns)).to_parquet(buffer)
    return buffer.getvalue()


def add_benchmarks(hub: Hub) -> None:
    """Put the eight data sets on a local Hub, under their real names.

    Args:
        hub (`Hub`): from `hub_server()`.
    """
    for fixture in benchmark_fixtures().values():
        files = {fixture.path: parquet(fixture)}
        if fixture.config:
            data_files = [{"split": fixture.split, "path": fixture.path}]
            configs = yaml.safe_dump({"configs": [{"config_name": fixture.config, "data_files": data_files}]})
            files["README.md"] = f"---\n{configs}---\n".encode()
        hub.repos["datasets", fixture.repo] = Repo(
            fixture.repo, f"{hub.url}/datasets/{fixture.repo}", files, {fixture.path}
        )


def write_answers(path: Path) -> None:
    """Write the recorded answers for a process that has no access to this module: `{benchmark: [answer, ...]}`."""
    answers = {name: [row.response for row in fixture.rows] for name, fixture in benchmark_fixtures().items()}
    path.write_text(json.dumps(answers))
