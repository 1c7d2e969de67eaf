"""A chat template comes with a checkpoint and is a program: one that runs on and on is stopped.

This file travels with checkpoints: it imports installed libraries only.
"""

import ctypes
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

MAX_SECONDS = 10
_deadlines: dict[int, float] = {}  # by thread
_lock = threading.Lock()
_watcher: threading.Thread | None = None


class TemplateTimeoutError(TemplateError):
    """A template that did not come to an end."""

    def __init__(self, message: str = f"it was stopped after {MAX_SECONDS} s: it runs on and on"):
        super().__init__(message)


def limit_rendering(chat_template: str) -> None:
    """Bound the time of each rendering of a template by transformers, which compiles it once and keeps it."""
    template = _compile_jinja_template(chat_template)
    render = template.root_render_func
    if hasattr(render, "unlimited"):
        return

    def limited(context: Any) -> Iterator[str]:
        with _time_limit():
            yield from render(context)

    limited.unlimited = render
    template.root_render_func = limited


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise `TemplateTimeoutError` in this thread when the block takes longer than `MAX_SECONDS`."""
    own = threading.get_ident()
    with _lock:
        _deadlines[own] = time.monotonic() + MAX_SECONDS
    _start_watching()
    try:
        yield
    finally:
        with _lock:
            if _deadlines.pop(own, None) is None:
                # The error may still be on its way to a thread that is through after all.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(own), None)


def _start_watching() -> None:
    global _watcher
    if _watcher is None or not _watcher.is_alive():  # a forked process has the variable and not the thread
        _watcher = threading.Thread(target=_watch, name="chat template limit", daemon=True)
        _watcher.start()


def _watch() -> None:
    """Look twice a second, for a minute after the last rendering."""
    last = time.monotonic()
    while time.monotonic() < last + 60:
        time.sleep(0.5)
        with _lock:
            now = time.monotonic()
            last = now if _deadlines else last
            for thread in [thread for thread, deadline in _deadlines.items() if deadline < now]:
                del _deadlines[thread]
                error = ctypes.py_object(TemplateTimeoutError)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)


def check_conversation(conversation: Any) -> None:
    """Refuse what has not the form of a conversation, or of several; what roles may be is the template's business."""
    if not conversation:
        raise ValueError("the conversation is empty")
    if not isinstance(conversation, list | tuple):
        raise ValueError(f"a conversation is a list of messages, not a {type(conversation).__name__}")
    if isinstance(conversation[0], list | tuple):
        for each in conversation:
            check_conversation(each)
        return
    for number, message in enumerate(conversation):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, str | list | tuple):
            raise ValueError(f"a message has no content (the {number + 1}.): it is text, or a list of parts")
        for part in () if isinstance(content, str) else content:
            if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
                raise ValueError(f"a part of the {number + 1}. message has no type: {{'type': 'text', 'text': ...}}")
