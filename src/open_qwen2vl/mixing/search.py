"""The search as a whole: what is trained is read and drawn, trained where it is missing, fitted, and written down."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from ..data.engine.engine import process_rank, work_through
from ..data.packing.plan_files import read_plan
from ..data.packing.sources import parse_sources
from ..families import difference
from ..files import remove_temporaries, write_json, write_text
from ..options import flag, load_yaml
from ..output_lock import only_writer
from .fitting import fit_domain, propose
from .options import MixOptions, own_recipe
from .proxies import Proxy, train_proxy
from .report import MixReport, write_report

_DECIMALS = 3  # of weights
_NOT_OF_PROXIES = ("resume_from_checkpoint", "push_to_hub", "eval_tasks")


def search_mixture(options: MixOptions) -> MixReport:
    """Train the proxies that are missing, fit, and write `mixture.yaml`, `report.json` and `report.html`.

    Raises:
        ValueError: for a file of sources that is none, an output of other sources or options, too few proxies, or an
            error of the recipe.
        FolderInUse: if another process works on the output.
        ChildProcessError: if a proxy breaks or a worker is killed.
    """
    if process_rank()[1] > 1:
        raise ValueError("start mix once: it starts the proxies itself (--num-workers)")
    base = read_base(options)
    sources, domains = (parse_sources(base[name]) for name in ("train_packs", "eval_packs"))
    names, domain_names = [s.name for s in sources], tuple(s.name for s in domains)
    target = read_target(options.target, domain_names)
    own = _normal([source.weight or 1.0 for source in sources])
    if options.proxies < 2 * len(sources) + 1:
        raise ValueError(f"--proxies must be at least {2 * len(sources) + 1} for {len(sources)} sources")
    output, prior = Path(options.output).absolute(), options.concentration * len(sources) * own
    train = partial(_train, options, base, dict.fromkeys(names), domain_names, output)
    with only_writer(output, "searching"):
        remove_temporaries(output / name for name in ("settings.json", "mixture.yaml", "report.json"))
        _check_settings(output / "settings.json", _settings(options, base, sources + domains))
        mixtures = draw_mixtures(prior, options.proxies, options.seed)
        seeds = training_seeds(options, base)[: options.seeds]
        records = train(
            [(f"proxies/{i:04}", mixture, s) for i, mixture in enumerate(mixtures) for s in seeds], "proxies"
        )
        kept, losses, failed = _by_mixture(records, len(seeds), domain_names)
        if len(kept) < 2 * len(sources) + 1:
            raise ValueError(f"{len(failed)} of {len(mixtures)} proxies failed, too many for a fit: {failed[0]}")
        fits = [fit_domain(mixtures[kept], column) for column in losses.T]
        named = {"weights of SOURCES.yaml": own, "all alike": _normal([1.0] * len(names))}
        named |= {f"{name} alone": alone for name, alone in zip(names, np.eye(len(names)), strict=True)}
        proposal = propose(mixtures[kept], losses, [fit.form for fit in fits], target, prior, named, options.seed)
        proposal.weights = round_weights(proposal.weights)
        checked = _check(
            training_seeds(options, base)[options.seeds :], train, {"proposal": proposal.weights, **named}, target
        )
        report = MixReport(
            names, domain_names, target, own, mixtures[kept], losses, len(failed), fits, proposal, checked
        )
        write_text(output / "mixture.yaml", _proposed_recipe(options, base, proposal.weights))
        write_report(output, report)
    return report


def read_base(options: MixOptions) -> dict[str, Any]:
    """Options of the proxies' recipe; a `ValueError` for what a search cannot do."""
    if find_spec("sklearn") is None:
        raise ValueError('mix needs scikit-learn: pip install "open-qwen2vl[mix]"')
    if options.recipe is None and own_recipe() is None:
        raise ValueError("recipes/pretrain.py of this project is not installed here: name one by --recipe")
    if options.recipe is not None and not Path(options.recipe).is_file():
        raise ValueError(f"--recipe {options.recipe} does not exist: leave it out for recipes/pretrain.py")
    base, file = load_yaml(f"cannot read {options.sources}", options.sources), options.sources
    if not isinstance(base, dict) or not all(base.get(name) for name in ("train_packs", "eval_packs")):
        raise ValueError(f"{file}: options of a training with train_packs and eval_packs are needed")
    sources = parse_sources(base["train_packs"])
    if len(sources) < 2:
        raise ValueError(f"{file}: train_packs must list two sources at least")
    if any(isinstance(s.weight, tuple) or s.phase is not None or s.epochs not in (None, 1.0) for s in sources):
        raise ValueError(f"{file}: weights are looked for, so that train_packs take no schedule, epochs or phase")
    for name in _NOT_OF_PROXIES:
        if name in base:
            raise ValueError(f"{file}: {name} is not for proxies; put it into the training that mixture.yaml is for")
    base["train_packs"] = [{**entry, "name": s.name} for entry, s in zip(base["train_packs"], sources, strict=True)]
    base["max_steps"] = options.steps or base.get("max_steps")
    if not isinstance(base["max_steps"], int) or base["max_steps"] < 1:
        raise ValueError(f"{file}: max_steps (or --steps) says how long a proxy trains, got {base['max_steps']!r}")
    return base


def read_target(given: Sequence[str], domains: Sequence[str]) -> np.ndarray:
    """How much each domain counts, `(domains,)`, sum 1."""
    if not given:
        return _normal([1.0] * len(domains))
    weights = dict.fromkeys(domains, 0.0)
    for text in given:
        name, _, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if name not in weights:
            raise ValueError(f"--target {text}: no domain {name!r} in eval_packs; there are {', '.join(domains)}")
        if not 0 <= number < float("inf"):
            raise ValueError(f"--target {text}: a weight is a number that is not negative")
        weights[name] = number
    if not sum(weights.values()):
        raise ValueError("--target: the weights sum to nothing")
    return _normal(list(weights.values()))


def draw_mixtures(prior: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Mixtures `(number, sources)` of a Dirichlet distribution, its mean first; each follows from seed and number."""
    drawn = [np.random.default_rng([seed, i]).dirichlet(prior) for i in range(1, number)]
    return np.array([round_weights(mixture) for mixture in [_normal(prior), *drawn]])


def round_weights(weights: np.ndarray) -> np.ndarray:
    """Weights of three decimals that sum to 1; what is nearly nothing becomes 0, and is left out of a training."""
    rounded = np.round(weights, _DECIMALS)
    rounded[np.argmax(rounded)] += 1 - rounded.sum()
    return np.round(rounded, _DECIMALS)


def _train(
    options: MixOptions,
    base: dict[str, Any],
    names: dict[str, None],
    domains: tuple[str, ...],
    output: Path,
    wanted: Sequence[tuple[str, np.ndarray, int]],
    description: str,
) -> list[dict[str, Any]]:
    """Records of mixtures, trained where there is none; `wanted` has file name, weights and seed of each."""
    recipe, here = os.path.abspath(options.recipe or own_recipe()), os.getcwd()
    proxies = [
        Proxy(
            output / f"{name}-{seed}.json",
            recipe,
            base,
            dict(zip(names, weights.tolist(), strict=True)),
            domains,
            seed,
            here,
        )
        for name, weights, seed in wanted
    ]
    remove_temporaries(proxy.record for proxy in proxies)
    for proxy in proxies:
        if proxy.record.exists():  # killed between the record and the end
            shutil.rmtree(proxy.record.with_suffix(""), ignore_errors=True)
    # Two names may stand for the same mixture.
    missing = list({proxy.record: proxy for proxy in proxies if not proxy.record.exists()}.values())
    with tqdm(total=len(proxies), initial=len(proxies) - len(missing), desc=description, unit="run") as bar:
        for record in _trained(options, base, missing):
            bar.set_postfix_str(record.get("failed") or f"loss {np.mean(list(record['losses'].values())):.3f}")
            bar.update()
    return [json.loads(proxy.record.read_text(encoding="utf-8")) for proxy in proxies]


def _trained(options: MixOptions, base: dict[str, Any], proxies: list[Proxy]) -> Iterator[dict[str, Any]]:
    on_cpu = str(base.get("use_cpu", False)).lower() == "true"
    local = options.engine == "local"
    workers = options.num_workers or (max(1, torch.cuda.device_count() * (not on_cpu)) if local else None)
    done = work_through(
        proxies,
        _make_worker,
        engine=options.engine,
        num_workers=workers,
        num_gpus=0 if local or on_cpu else options.gpus_per_worker,
    )
    return (record for _, record in done)


def _make_worker() -> Callable[[Proxy], dict[str, Any]]:
    return train_proxy


def _by_mixture(
    records: list[dict[str, Any]], seeds: int, domains: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Mixtures all of whose trainings ended well, their mean losses `(mixtures, domains)`, and why others did not."""
    groups = [records[start : start + seeds] for start in range(0, len(records), seeds)]
    failed = [next((r["failed"] for r in group if "failed" in r), None) for group in groups]
    kept = [number for number, why in enumerate(failed) if why is None]
    losses = [np.mean([[r["losses"][name] for name in domains] for r in groups[number]], 0) for number in kept]
    return np.array(kept, int), np.array(losses).reshape(-1, len(domains)), [why for why in failed if why is not None]


def training_seeds(options: MixOptions, base: dict[str, Any]) -> list[int]:
    """Seeds of the proxies from that of their recipe on, then those of the check."""
    try:
        first = int(base.get("seed", 42))  # as transformers has it
    except (TypeError, ValueError):
        raise ValueError(f"{options.sources}: seed must be a whole number, got {base['seed']!r}") from None
    return [first + number for number in range(options.seeds + options.check_seeds)]


def _check(
    seeds: list[int], train: Callable, named: dict[str, np.ndarray], target: np.ndarray
) -> dict[str, list[float]]:
    """The target's loss of named mixtures, one for each seed, of those trainings that did not fail."""
    if not seeds:
        return {}
    # By its weights: proxies that are added may change the proposal.
    wanted = [
        ("check/" + "_".join(f"{w:g}" for w in weights), weights, s) for weights in named.values() for s in seeds
    ]
    records = train(wanted, "check")
    values = [float(target @ list(r["losses"].values())) if "losses" in r else None for r in records]
    return {
        name: [value for value in values[i * len(seeds) : (i + 1) * len(seeds)] if value is not None]
        for i, name in enumerate(named)
    }


def _settings(options: MixOptions, base: dict[str, Any], sources: Sequence[Any]) -> dict[str, Any]:
    """What the losses depend on; more proxies, other targets and other workers go with the same."""
    # Its shards are in its `content`.
    plans = {s.name: {k: v for k, v in read_plan(s.path).items() if k != "shards"} for s in sources}
    hashes = {
        f"plan of {name}": hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16] for name, plan in plans.items()
    }
    search = {flag(name): getattr(options, name) for name in ("seeds", "seed", "concentration")}
    options_of_base = {name: value for name, value in base.items() if name not in ("output_dir", "save_steps")}
    return json.loads(json.dumps({**search, **options_of_base, **hashes}))


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    if not path.exists():
        write_json(path, settings)
        return
    made = json.loads(path.read_text(encoding="utf-8"))
    if made != settings:
        raise ValueError(f"{path.parent}: made with {difference(made, settings)[:300]}; give a new --output")


def _proposed_recipe(options: MixOptions, base: dict[str, Any], weights: np.ndarray) -> str:
    sources = [
        {**entry, "weight": weight}
        for entry, weight in zip(base["train_packs"], weights.tolist(), strict=True)
        if weight
    ]
    left = [entry["name"] for entry, weight in zip(base["train_packs"], weights, strict=True) if not weight]
    head = f"# Proposed by open-qwen2vl mix on {options.proxies} mixtures; report.html has the uncertainty.\n"
    # As Python writes them: a name with a line break would not stay a comment.
    head += f"# Left out, their weight is below 0.001: {', '.join(map(ascii, left))}\n" if left else ""
    return head + yaml.safe_dump({**base, "train_packs": sources}, sort_keys=False)


def _normal(weights: Sequence[float]) -> np.ndarray:
    return np.array(weights, float) / np.sum(weights)
