"""The pictures of the scorers' tests."""

from tests.data.scoring.conftest import photo  # noqa: F401
