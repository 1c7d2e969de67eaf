"""Options of the command `mix`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..options import flag, option


@dataclass(frozen=True)
class MixOptions:
    """What is mixed, and how weights are looked for: the options of `open-qwen2vl mix`.

    Raises:
        ValueError: for an option out of its range.
    """

    sources: str = option(
        help="options of a small training: train_packs with the sources, eval_packs with the held-out domains, model",
        positional=True,
        metavar="SOURCES.yaml",
    )
    output: str = option(help="folder of proxies, report and mixture.yaml; a rerun goes on there", metavar="DIR")
    recipe: str | None = option(
        None, help="what trains a proxy (default: recipes/pretrain.py of this project)", metavar="FILE.py"
    )
    proxies: int = option(32, help="mixtures that are trained on; more can be added by a rerun", metavar="N")
    steps: int | None = option(None, help="of a proxy (default: max_steps of SOURCES.yaml)", metavar="N")
    seeds: int = option(1, help="trainings of each mixture, with seeds from that of SOURCES.yaml on", metavar="N")
    seed: int = option(0, help="of the mixtures that are drawn", metavar="N")
    concentration: float = option(
        1.0, help="of the Dirichlet prior, by source: below 1 mixtures are more extreme, above more even", metavar="X"
    )
    target: tuple[str, ...] = option(
        (), help="held-out domains that count, and how much (default: all of them, alike)", metavar="NAME=WEIGHT"
    )
    check_seeds: int = option(
        0,
        help="then train the proposal, the weights of SOURCES.yaml, all sources alike and each alone, with so many "
        "new seeds each",
        metavar="N",
    )
    num_workers: int | None = option(
        None, help="proxies that train at a time (default: one for each GPU, 1 without)", metavar="N"
    )
    gpus_per_worker: float = option(1.0, help="with --engine ray, of each proxy; 0 with use_cpu", metavar="X")
    engine: Literal["local", "ray"] = option(
        "local", help="ray: proxies on a Ray cluster whose machines share the files"
    )

    def __post_init__(self):
        for name, least in (("proxies", 1), ("steps", 1), ("seeds", 1), ("seed", 0), ("check_seeds", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{flag(name)} must be at least {least}, got {value}")
        if not 0 < self.concentration < 1e6:
            raise ValueError(f"--concentration must be above 0, got {self.concentration:g}")
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"--num-workers must be at least 1, got {self.num_workers}")
        if self.gpus_per_worker < 0:
            raise ValueError(f"--gpus-per-worker must not be negative, got {self.gpus_per_worker:g}")


def own_recipe() -> Path | None:
    """The project's recipes/pretrain.py, of the repository or as it was installed with the package; None if gone."""
    repository = Path(__file__).parents[3] / "recipes" / "pretrain.py"
    if repository.is_file():
        return repository
    from importlib.metadata import PackageNotFoundError, files  # with the library of e-mails, which no `--help` needs

    try:
        installed = files("open-qwen2vl") or []
    except PackageNotFoundError:
        return None
    ours = (Path(file.locate()) for file in installed if file.match("share/open_qwen2vl/recipes/pretrain.py"))
    return next((path for path in ours if path.is_file()), None)
