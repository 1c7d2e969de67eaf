"""`open-qwen2vl demo`: a conversation in the browser."""

from dataclasses import asdict

from ..chat.options import DemoOptions as OPTIONS

SUMMARY = "talk with a model in the browser"


def run(options: OPTIONS) -> None:
    """Serve the page until the user ends it."""
    from ..chat.demo import serve_demo

    serve_demo(**asdict(options))
