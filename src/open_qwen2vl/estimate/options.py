"""Options of the command `estimate`."""

from dataclasses import dataclass

from ..options import option


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
    mfu: float = option(0.5, help="share of the peak to reckon with, 0 to 1", metavar="X")
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
        if self.gpu is None and not (self.tflops and self.memory):
            raise ValueError("name the kind of GPU by --gpu, or give both --tflops and --memory")
        if self.num_gpus < 1 or not 0 < self.mfu <= 1:
            raise ValueError(
                f"--num-gpus must be at least 1 and --mfu within 0 and 1, got {self.num_gpus} and {self.mfu}"
            )
        for name in ("tflops", "memory"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name} must be above 0, got {value}")
