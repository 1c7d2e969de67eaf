"""An environment that has every library but this package."""

import sysconfig
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bare_site(tmp_path_factory) -> Path:
    """All installed libraries but this package, as links; under `python -S` nothing else is importable."""
    site = tmp_path_factory.mktemp("site")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith(("open_qwen2vl", "__editable__")) and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    return site
