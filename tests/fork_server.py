"""Commands of a shell script as forks of this process, so that none of them imports torch anew.

    with forked_programs(folder) as path:
        subprocess.run(["sh", "run.sh"], env={**os.environ, "PATH": path})

`python`, `open-qwen2vl` and `accelerate` in the script are then small clients: each hands its arguments, folder,
environment and standard streams to a server, which is a fork of this process and forks once more for each. What a
launcher starts is a fork, too. What libraries read of the environment while they are imported stays as it is here.
"""

import contextlib
import json
import logging
import os
import resource
import runpy
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

# What most programs import, here once for all forks.
from open_qwen2vl import PackedSFTTrainer, PackedTrainer, cli  # noqa: F401
from open_qwen2vl.data.packing import mixture, plan  # noqa: F401
from open_qwen2vl.trainer import run_recipe  # noqa: F401

PROGRAMS = ("python", "open-qwen2vl", "accelerate")

CLIENT = """#!{python} -S
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    call = json.dumps([{program!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(call).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(call)
    code = server.recv(8)
sys.exit(int.from_bytes(code, "big") if code else 1)
"""


@contextlib.contextmanager
def forked_programs(folder: Path, programs: tuple[str, ...] = PROGRAMS) -> Iterator[str]:
    """A PATH on which the programs are clients, before this interpreter's folder and what was there."""
    address = str(folder / "socket")
    for program in programs:
        client = folder / program
        client.write_text(CLIENT.format(python=sys.executable, address=address, program=program))
        client.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        server = os.fork()
        if server == 0:
            _serve(listener)
    try:
        yield os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


def fork_program(
    program: str,
    *argv: str | os.PathLike,
    log: Path,
    environment: Mapping[str, str] | None = None,
    file_limit: int = 0,
) -> int:
    """Start a program as a fork in a session of its own, which writes to `log`; the process id, to be waited for.

    `environment` is added to this process's; no file may become larger than `file_limit`, in bytes, where not 0: that
    stands for a disk that is full.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            if file_limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            variables = {**os.environ, **(environment or {})}
            code = _run(program, list(map(str, argv)), os.getcwd(), variables, [0, output, output])
        finally:
            os._exit(code)  # also where not even the log can be written, or the fork would run the caller's tests
    return child


def has_ended(child: int) -> bool:
    """Whether a fork has come to its end; it can still be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _serve(listener: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            _answer(connection)
        connection.close()


def _reap(*_) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _answer(connection: socket.socket) -> None:
    """Run one command in this fork and tell its exit code."""
    length, streams, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as file:
        call = json.loads(file.read(int.from_bytes(length, "big")))
    threading.Thread(target=_end_with_the_client, args=(connection,), daemon=True).start()
    code = _run(*call, streams)
    connection.sendall(code.to_bytes(8, "big"))
    os._exit(code)


def _end_with_the_client(connection: socket.socket) -> None:
    connection.recv(1)  # it sends no more
    os._exit(1)


def _run(program: str, argv: list[str], folder: str, environment: Mapping[str, str], streams: list[int]) -> int:
    """The exit code of a program in this fork, which is at its beginning."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode, closefd=False) for number, mode in enumerate("rww"))
    sys.stderr.reconfigure(line_buffering=True)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    _forget()
    try:
        return _call(program, argv)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return 1 if isinstance(stop.code, str) else stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _forget() -> None:
    """What this process has done so far is none of the program's business."""
    torch.set_num_threads(1)  # OpenMP's other threads do not outlive a fork
    logging.getLogger().handlers.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    sys.executable = shutil.which("python")  # a launcher starts the client


def _call(program: str, argv: list[str]) -> int:
    if program == "open-qwen2vl":
        return cli.main(argv)
    if program == "accelerate":
        argv = ["-m", "accelerate.commands.accelerate_cli", *argv]
    kind, *rest = [argument for argument in argv if argument != "-u"]
    sys.argv = rest if kind in ("-c", "-m") else [kind, *rest]
    if kind == "-c":
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(kind, run_name="__main__")
    return 0
