"""transformers' own common tests, from the source distribution of the installed version, under the name `peer_tests`.

pip fetches it into a cache folder; nothing of it is copied here. setuptools puts `tests/test*.py` into a source
distribution, and no folder below it; a wheel has no tests. So in no version on the registry (4.57.6, 5.23 and 5.24
were looked at) is there a `generation/test_utils.py` or `exporters/test_export.py`: `GenerationTesterMixin` and
`ExportTesterMixin` are empty classes here, and tests/modeling/test_generation.py has generation's own tests. A helper
of their CI that knows local copies of URLs is not there either.
"""

import importlib
import subprocess
import sys
import tarfile
import types
import unittest
from pathlib import Path

import pytest
import transformers

ABSENT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def load_common_tests(name: str) -> types.ModuleType:
    """A module of transformers' tests; the test is skipped where pip cannot fetch the distribution."""
    if "peer_tests" not in sys.modules:
        package = sys.modules["peer_tests"] = types.ModuleType("peer_tests")
        package.__path__ = [str(_fetch())]
        for module, mixin in ABSENT.items():
            parent = "peer_tests." + module.split(".")[0]
            sys.modules.setdefault(parent, types.ModuleType(parent)).__path__ = []
            stand_in = sys.modules["peer_tests." + module] = types.ModuleType("peer_tests." + module)
            setattr(stand_in, mixin, type(mixin, (), {}))
        fetching = sys.modules["fetch_hub_objects_for_ci"] = types.ModuleType("fetch_hub_objects_for_ci")
        fetching.url_to_local_path = lambda url: url
    return importlib.import_module("peer_tests." + name)


def _fetch() -> Path:
    version = transformers.__version__
    cache = Path.home() / ".cache" / "open_qwen2vl" / "peer_tests"
    tests = cache / f"transformers-{version}" / "tests"
    if not tests.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        _pip("download", "--no-deps", "--no-binary", "transformers", "--no-build-isolation", "--dest", str(cache),
             f"transformers=={version}")  # fmt: skip
        _pip("install", "--target", str(cache / "packages"), "parameterized")
        archive = cache / f"transformers-{version}.tar.gz"
        with tarfile.open(archive) as tar:
            members = [member for member in tar if "/tests/" in member.name]
            tar.extractall(cache, members=members, filter="data")
    sys.path.append(str(cache / "packages"))
    return tests


def _pip(command: str, *arguments: str) -> None:
    run = subprocess.run([sys.executable, "-m", "pip", command, "--quiet", *arguments], capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"pip cannot {command} {arguments[-1]}: {run.stderr[-200:]}")


def run_common_tests(case: type[unittest.TestCase], left_out: dict[str, str]) -> dict[str, str]:
    """Run a class of common tests but those of `left_out` (name: why), and return the failures by name.

    A test that is left out and does not exist is a failure too: the reasons must not outlive their tests.
    """
    names = unittest.TestLoader().getTestCaseNames(case)
    failures = {name: "there is no such test" for name in set(left_out) - set(names)}
    suite = unittest.TestSuite(case(name) for name in names if name not in left_out)
    result = unittest.TestResult()
    suite.run(result)
    assert result.testsRun > 20, f"only {result.testsRun} tests were found"
    for test, trace in [*result.failures, *result.errors]:
        failures[str(test).split(" ")[0]] = trace.strip()[-600:]
    for name, line in sorted(failures.items()):
        print(f"{name}: {line}")
    for test, reason in result.skipped:
        print(f"{str(test).split(' ')[0]} skips itself: {reason}")
    print(f"{result.testsRun} run, {len(result.skipped)} skipped by themselves, {len(failures)} failed")
    return failures
