"""Evaluations that `test_evaluate_runs.py` kills or runs side by side: forks of one process, so that none imports.

For each line on stdin, a JSON list of {"environment": {}, "arguments": []}, a child for each entry runs the command
line; the process ids are printed, and, when all children have ended, their exit codes as wait statuses.
"""

import json
import os
import resource
import sys

from lmms_eval import evaluator  # noqa: F401

from open_qwen2vl import cli
from open_qwen2vl.evaluation import evaluate, lmms_model  # noqa: F401


def run(environment: dict[str, str], arguments: list[str]) -> None:
    os.environ.update(environment)
    if "FILE_LIMIT" in environment:
        limit = int(environment["FILE_LIMIT"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    log = os.open(environment["LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        code = cli.main(arguments)
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    for line in sys.stdin:
        children = []
        for entry in json.loads(line):
            child = os.fork()
            if child == 0:
                run(**entry)
            children.append(child)
        print(json.dumps(children), flush=True)
        print(json.dumps([os.waitpid(child, 0)[1] for child in children]), flush=True)


if __name__ == "__main__":
    main()
