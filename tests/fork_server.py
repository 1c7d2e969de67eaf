"""Commands of a shell script as forks of this process, so that none of them imports torch anew.

    with forked_programs(folder, "python", "open-qwen2vl") as path:
        subprocess.run(["sh", "run.sh"], env={**os.environ, "PATH": path})

`python SCRIPT ...` and `open-qwen2vl ...` in the script are then small clients: each hands its arguments, folder,
environment and standard streams to a server, which is a fork of this process and forks once more for each. With
"accelerate" among the programs, what `accelerate launch` starts is one such fork, however many processes it asks.
"""

import json
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.commands.launch import launch_command_parser

from open_qwen2vl import cli

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


@contextmanager
def forked_programs(folder: Path, *programs: str) -> Iterator[str]:
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


def _serve(listener: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            _answer(connection)
        connection.close()


def _answer(connection: socket.socket) -> None:
    """Run one command in this fork and tell its exit code."""
    code = 1
    try:
        length, streams, _, _ = socket.recv_fds(connection, 8, 3)
        with connection.makefile("rb") as file:
            program, argv, folder, environment = json.loads(file.read(int.from_bytes(length, "big")))
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        sys.stdin, sys.stdout, sys.stderr = (open(number, mode, closefd=False) for number, mode in enumerate("rww"))
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        code = _run(program, argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(code.to_bytes(8, "big"))
        os._exit(code)


def _run(program: str, argv: list[str]) -> int:
    try:
        if program == "open-qwen2vl":
            return cli.main(argv)
        if program == "accelerate":
            args = launch_command_parser().parse_args(argv[1:])
            argv = [args.training_script, *args.training_script_args]
        sys.argv = argv
        sys.path.insert(0, os.path.dirname(os.path.abspath(argv[0])))
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    return 0
