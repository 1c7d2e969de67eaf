"""Ctrl-C ends a command within two seconds, whatever it is doing."""

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Iterator

INTERRUPTED = 128 + signal.SIGINT
GRACE_SECONDS = 1.5  # for what the command cleans up itself


@contextlib.contextmanager
def ended_by_ctrl_c(watched: bool = True) -> Iterator[None]:
    """Let the process end with exit code 130 if Ctrl-C has not ended the block soon after.

    Python raises `KeyboardInterrupt` between two of its own instructions: a long call of a library, a database's query
    or a pool that waits for its workers would go on. A thread hears of the signal at once.
    """
    if not watched or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, tell = socket.socketpair()
    tell.setblocking(False)
    over = threading.Event()
    before = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_soon_after, args=(heard, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        tell.close()


def _end_soon_after(heard: socket.socket, over: threading.Event) -> None:
    with heard:
        while numbers := heard.recv(64):
            if signal.SIGINT in numbers and not over.wait(GRACE_SECONDS):
                for child in multiprocessing.active_children():
                    child.kill()
                with contextlib.suppress(OSError):  # nobody reads it any more
                    os.write(2, b"\nopen-qwen2vl: interrupted\n")  # sys.stderr may be locked by the main thread
                os._exit(INTERRUPTED)
