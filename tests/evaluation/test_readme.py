"""The README's evaluation, with a tiny model and easy-VQA in place of the eight benchmarks."""

import re
import shlex
import shutil
from pathlib import Path

from open_qwen2vl import cli

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf8")


def test_evaluate_and_report(model_folder, easyvqa, tmp_path, monkeypatch):
    section = README.split("\n## Evaluate\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    evaluate, report, demo = block.splitlines()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "runs/2b-sft/model")
    tasks = [
        "--tasks",
        "easyvqa_gen",
        "--trust-task-code",
        "--include-path",
        str(easyvqa),
        "--device",
        "cpu",
        "--limit",
        "4",
    ]
    assert cli.main([*shlex.split(evaluate)[1:], *tasks]) == 0
    assert cli.main(shlex.split(report)[1:]) == 0
    assert "easyvqa_gen" in Path("report.html").read_text(encoding="utf8")
    # The page itself is opened in tests/test_demo.py.
    assert shlex.split(demo)[:2] == ["open-qwen2vl", "demo"]
