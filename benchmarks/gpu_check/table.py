"""The report: each stage's table with what was predicted beside what was measured, and the options that won."""

from datetime import date
from pathlib import Path

import yaml

from . import steps
from .models import SIZES, Bench
from .prediction import assumed_rates, kind_of_card, predict
from .running import Outcome, Record, Stage

TRAINED = ("step", "levers", "loader", "fp8", "together")
_PERCENT = ("MFU", "waiting", "error")


def write_report(path: Path, record: Record, stages: dict[str, Stage], bench: Bench) -> None:
    """Write the report, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".md.partial")
    partial.write_text("\n".join([*report(record, stages, bench), ""]), encoding="utf8")
    partial.replace(path)


def report(record: Record, stages: dict[str, Stage], bench: Bench) -> list[str]:
    lines = ["# GPU check", "", *_machine(record, bench), "", *_winner(record)]
    for number, (name, stage) in enumerate(stages.items(), 1):
        lines += ["", f"## {number}. {stage.title}", ""]
        outcomes = {case: record.of(name, case) for case in stage.cases}
        if name in TRAINED:
            lines += _steps_table(outcomes, bench)
        else:
            lines += _plain_table(outcomes, assumed_rates() if name == "rates" else {})
    return lines


def _machine(record: Record, bench: Bench) -> list[str]:
    size, predicted = SIZES[bench.size], f"Predicted by `open-qwen2vl estimate` for {kind_of_card()}"
    what = f"{size['title']}, random weights, packs of {size['max_length']} positions"
    if not record.machine:
        return [f"**No GPU has run this yet**: the measured columns are empty. {predicted}. {what}."]
    facts = "; ".join(f"{name} {value}" for name, value in record.machine.items())
    return [f"`make gpu-check`, {date.today()}. {facts}.", "", f"{what}. {predicted}."]


def _winner(record: Record) -> list[str]:
    """What to write into a recipe."""
    groups = {"step": steps.PACKS, "levers": steps.LEVERS, "fp8": steps.FP8}
    best = steps.fastest(record, groups)
    if best is None:
        return ["Options that won: none yet."]
    figures, options = next(record.of(stage, best)["done"] for stage in groups if best in groups[stage]), None
    both = record.of("together", steps.TOGETHER).get("done")
    if both and both["tokens/s"] > figures["tokens/s"]:
        figures, options = both, both["options"]
    options = options or steps.options_of(best)
    base = record.of("step", steps.BASE).get("done", {}).get("tokens/s")
    gain = f", {figures['tokens/s'] / base:.2f} times `{steps.BASE}`" if base else ""
    written = yaml.safe_dump(options, sort_keys=False).strip().splitlines()
    return [f"Options that won: {figures['tokens/s']:,.0f} tokens/s{gain}.", "", "```yaml", *written, "```"]


def _steps_table(outcomes: dict[str, Outcome], bench: Bench) -> list[str]:
    """Cases that train, with predictions; what they found beside a step's figures follows."""
    trained = {case: outcome for case, outcome in outcomes.items() if steps.trains(case)}
    lines = [
        "| case | ms a pack, predicted | measured | MFU, predicted | measured | GiB, predicted | measured "
        "| tokens/s | waiting | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for case, outcome in trained.items():
        done = outcome.get("done", {})
        options = done.get("options") or (None if case == steps.TOGETHER else steps.options_of(case))
        expected = predict(bench, options) if options else None
        cells = [
            _shown("ms a pack", expected and expected.milliseconds),
            _shown("ms a pack", done.get("ms a pack")),
            _shown("MFU", expected and expected.mfu),
            _shown("MFU", done.get("MFU")),
            _shown("GiB", expected and expected.gib),
            _shown("GiB", done.get("GiB")),
            _shown("tokens/s", done.get("tokens/s")),
            _shown("waiting", done.get("waiting")),
            _remark(outcome),
        ]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    others = {case: outcome for case, outcome in outcomes.items() if case not in trained}
    return lines if not others else [*lines, "", *_plain_table(others, {})]


def _plain_table(outcomes: dict[str, Outcome], assumed: dict[str, float]) -> list[str]:
    """A column for each figure; of some it is known what predictions assume."""
    names = dict.fromkeys(name for outcome in outcomes.values() for name in outcome.get("done", {}))
    lines = [f"| case | {''.join(f'{name} | ' for name in names)}{'assumed | ' if assumed else ''}|"]
    lines.append("|---|" + "---:|" * (len(names) + bool(assumed)) + "---|")
    for case, outcome in outcomes.items():
        cells = [_shown(name, outcome.get("done", {}).get(name)) for name in names]
        cells += [_shown("", assumed.get(case))] if assumed else []
        lines.append(f"| {case} | {''.join(f'{cell} | ' for cell in cells)}{_remark(outcome)} |")
    return lines


def _remark(outcome: Outcome) -> str:
    for name in ("failed", "skipped"):
        if name in outcome:
            return f"{name}: {outcome[name]}".replace("|", "\\|")
    return ""


def _shown(name: str, value: float | str | bool | None) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "right" if value else "**WRONG**"
    if isinstance(value, str):
        return value.replace("|", "\\|")
    if name.endswith(_PERCENT):
        return f"{value:.1%}" if value >= 1e-3 or not value else f"{value:.0e}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
