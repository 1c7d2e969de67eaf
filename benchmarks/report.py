"""What every benchmark prints and keeps: its table, the command, the machine, the versions."""

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def describe_machine(command: str) -> list[str]:
    """Lines that name the command, the processor and the versions."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
        processor = names[0] if names else processor
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy"))
    return [
        f"`{command}`, {date.today()}",
        "",
        f"{processor}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}",
    ]


def write_result(name: str, table: list[str], machine: list[str]) -> None:
    """Print the table and write it to `benchmarks/results/<name>.md`."""
    text = "\n".join([*table, "", *machine, ""])
    print(text)
    RESULTS.mkdir(exist_ok=True)
    partial = RESULTS / f"{name}.md.partial"
    partial.write_text(text, encoding="utf8")
    partial.replace(RESULTS / f"{name}.md")
