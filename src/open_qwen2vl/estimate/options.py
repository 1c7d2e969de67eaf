"""Options of the command `estimate`."""

from dataclasses import dataclass

from ..options import flag, option

_ABOVE_0 = (
    "tflops",
    "memory",
    "bandwidth",
    "network",
    "loader_rate",
    "pairs",
    "tokens_per_pair",
    "tokens_per_image",
)


@dataclass(frozen=True)
class EstimateOptions:
    """What is estimated, and on what: the options of `open-qwen2vl estimate`.

    Raises:
        ValueError: for an option out of its range.
    """

    recipe: str = option(help="options of recipes/pretrain.py", positional=True, metavar="CONFIG.yaml")
    gpu: str | None = option(
        None, help="as h100, a100-40gb, rtx4090; or give --tflops and --memory of any other", metavar="KIND"
    )
    num_gpus: int = option(1, help="data-parallel GPUs", metavar="N")
    tflops: float | None = option(None, help="dense bf16 peak of a GPU (default: its data sheet's)", metavar="X")
    memory: float | None = option(None, help="GiB of a GPU (default: its data sheet's)", metavar="X")
    bandwidth: float | None = option(
        None,
        help="TB/s of a GPU's memory (default: its data sheet's; of a kind that is not known a byte for 300 FLOPs)",
        metavar="X",
    )
    gpus_per_machine: int = option(8, help="of the GPUs, how many a machine has", metavar="N")
    network: float | None = option(
        None, help="GB/s a GPU to other machines (default: what is usual beside the kind)", metavar="X"
    )
    loader_rate: float = option(
        100.0, help="images a second that a worker of the loader gives (100: photographs of 1024 px)", metavar="X"
    )
    mfu: float | None = option(None, help="share of the peak, 0 to 1, instead of the predicted one", metavar="X")
    pairs: float | None = option(None, help="image-text pairs, instead of the recipe's packs", metavar="N")
    tokens_per_pair: float = option(
        176.0, help="with --pairs: mean tokens of a pair, its images included", metavar="X"
    )
    tokens_per_image: float | None = option(
        None, help="with --pairs: mean tokens of an image (default: the config's image_seq_length)", metavar="X"
    )
    images_per_pair: float = option(1.0, help="with --pairs: mean images of a pair", metavar="X")
    price_per_hour: float | None = option(None, help="dollars for a GPU-hour (default: a list's)", metavar="X")
    json: bool = option(False, help="print JSON")

    def __post_init__(self):
        if self.gpu is not None and not self.gpu.strip():
            raise ValueError("--gpu is empty: name a kind, as h100")
        if self.gpu is None and not (self.tflops and self.memory):
            raise ValueError("name the kind of GPU by --gpu, or give both --tflops and --memory")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise ValueError(f"--mfu must be within 0 and 1, got {self.mfu}")
        for name in ("num_gpus", "gpus_per_machine"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in _ABOVE_0:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{flag(name)} must be above 0 and finite, got {value}")
        for name in ("images_per_pair", "price_per_hour"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{flag(name)} must be at least 0 and finite, got {value}")
