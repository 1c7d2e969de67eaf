"""The time of an optimizer step by a roofline: each part at its own rate, and what can hide behind it.

    micro-batch   products + attention + operators + casts, or the gathers of FSDP2, or loading: the longest
    step          micro-batches + the exchange of gradients, where the last backward does not hide it, + optimizer

Rates are shares of the vendors' figures. On an H100 they are the 650 TFLOP/s and 2.95 TB/s that matrix products of the
2B model's sizes and copies reach by reports; nothing of it has been measured with this code. Of Muon only what AdamW
does is counted.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from ..families import packed_model
from ..families.interface import StepWork
from ..trainer.figures.flops import Gpu
from ..trainer.optimization import LANGUAGE_MODEL
from .memory import PARTS, Training, embedding_parameters, optimizer_bytes
from .traffic import OPTIMIZER_BYTES, WEIGHT_BYTES, block_bytes, float8_bytes, loss_bytes, tower_bytes

# Shares of the peak, of the memory's bandwidth, and of link and network.
PRODUCTS, ATTENTION, BANDWIDTH, LINK, NETWORK = 0.657, 0.4, 0.88, 0.8, 0.9
HIDDEN_EXCHANGE = 2 / 3  # of a micro-batch is the backward pass, which gradients are sent beside


@dataclass(frozen=True)
class StepTime:
    """Seconds of a micro-batch (the first seven) and of an optimizer step.

    Attributes:
        products (`float`): matrix products.
        attention (`float`): of the language model; the tower's is among the products.
        operators (`float`): all other operators, which wait for the memory, in proportion to positions and patches.
        casts (`float`): casts of weights and gradients, and their sum, whatever the micro-batch's size.
        gathers (`float`): waiting for FSDP2's weights.
        loading (`float`): waiting for the loader.
        accumulation (`int`): micro-batches of a step.
        exchange (`float`): of a step, waiting for the other ranks' gradients.
        optimizer (`float`): of a step.
    """

    products: float
    attention: float
    operators: float
    casts: float
    gathers: float
    loading: float
    accumulation: int
    exchange: float
    optimizer: float

    @property
    def micro_batch(self) -> float:
        """Of a micro-batch."""
        return self.products + self.attention + self.operators + self.casts + self.gathers + self.loading

    @property
    def step(self) -> float:
        """Of an optimizer step."""
        return self.accumulation * self.micro_batch + self.exchange + self.optimizer


@dataclass(frozen=True)
class Roofline:
    """What a step's time depends on beside its layout.

    Attributes:
        config (`PreTrainedConfig`): of the model.
        counts (`dict[str, int]`): its parameters by part.
        gpu ([`Gpu`]): with `network` as it is.
        num_gpus (`int`): all of them.
        gpus_per_machine (`int`): of these on a machine.
        pack ([`StepWork`]): of a mean pack.
        labels (`float`): of a mean pack.
        loader_rate (`float`): images a second that a worker of the loader gives.
    """

    config: PreTrainedConfig
    counts: dict[str, int]
    gpu: Gpu
    num_gpus: int
    gpus_per_machine: int
    pack: StepWork
    labels: float
    loader_rate: float

    @property
    def machines(self) -> int:
        """How many machines there are."""
        return -(-self.num_gpus // self.gpus_per_machine)

    def shards(self, layout: str) -> int:
        """GPUs that share weights, gradients and optimizer in a layout (`one_gpu`, `ddp`, `fsdp2`, `hsdp`)."""
        return {"fsdp2": self.num_gpus, "hsdp": min(self.num_gpus, self.gpus_per_machine)}.get(layout, 1)

    @property
    def layouts(self) -> tuple[str, ...]:
        """Those that there are, the simplest first."""
        if self.num_gpus == 1:
            return ("one_gpu",)
        return ("ddp", "hsdp", "fsdp2") if self.machines > 1 else ("ddp", "fsdp2")

    def step(self, layout: str, training: Training, packs: int) -> StepTime:
        """Of `packs` at a time on each GPU."""
        sharded = layout in ("fsdp2", "hsdp")
        products, attention = self._compute(training, packs)
        moved = block_bytes(self.config, training, packs * self.pack.tokens, sharded)
        moved += tower_bytes(self.config, training, packs * self.pack.vision.patches)
        moved += loss_bytes(self.config, packs * self.labels)
        trained = sum(self.counts[part] for part in training.trained)
        weights = WEIGHT_BYTES * trained
        if training.float8:
            casts, of_weights = float8_bytes(self.config, packs * self.pack.tokens)
            moved, weights = moved + casts, weights + of_weights
        updated = OPTIMIZER_BYTES + 2 * optimizer_bytes(training.optim, training.dtype.itemsize)
        memory = BANDWIDTH * self.gpu.bandwidth
        compute = products + attention + (moved + weights) / memory
        gathers = max(0.0, self._gathers(layout, training) - compute)
        loading = packs * self.pack.media / (self.loader_rate * max(1, training.workers))
        if training.workers:
            loading = max(0.0, loading - compute - gathers)
        return StepTime(
            products=products,
            attention=attention,
            operators=moved / memory,
            casts=weights / memory,
            gathers=gathers,
            loading=loading,
            accumulation=training.accumulation,
            exchange=max(0.0, self._exchange(layout, trained) - HIDDEN_EXCHANGE * compute),
            optimizer=updated * trained / self.shards(layout) / memory,
        )

    def _compute(self, training: Training, packs: int) -> tuple[float, float]:
        """Seconds of products and of the language model's attention; the head at labelled positions only."""
        family, text, pack = packed_model(self.config), self.config.text_config, self.pack
        trained = {part: int(part in training.trained) for part in PARTS}
        alone = family.step_flops(self.config, pack._replace(squared_lengths=0), trained)
        attention = family.step_flops(self.config, pack, trained) - alone
        passes = 6 if trained[LANGUAGE_MODEL] else 4
        head = text.vocab_size * text.hidden_size
        blocks = passes * (self.counts[LANGUAGE_MODEL] - embedding_parameters(self.config)) * pack.tokens
        flops = alone - passes * head * (pack.tokens - self.labels)
        if training.checkpoint_every:
            flops += blocks / (passes / 2) / training.checkpoint_every
        peak = PRODUCTS * self.gpu.peak_flops
        # In float8 the units do twice as much.
        seconds = (flops - blocks / 2 if training.float8 else flops) / peak
        return packs * seconds, packs * attention / (ATTENTION * self.gpu.peak_flops)

    def _gathers(self, layout: str, training: Training) -> float:
        """Of a micro-batch: all weights but a frozen tower's, in the forward and once more in the backward pass."""
        shards = self.shards(layout)
        if shards == 1:
            return 0.0
        frozen = 0 if "vision_tower" in training.trained else self.counts["vision_tower"]
        bytes_each = 2 if training.bf16 else training.dtype.itemsize
        moved = 2 * bytes_each * (sum(self.counts.values()) - frozen) * (shards - 1) / shards
        # Across machines each GPU takes nearly all of them through its own share of the network.
        crosses = shards > self.gpus_per_machine
        return moved / (NETWORK * self.gpu.network if crosses else LINK * self.gpu.link)

    def _exchange(self, layout: str, trained: int) -> float:
        """Of a step, gradients in fp32: a ring within the machine, and between machines each GPU with its share."""
        if self.num_gpus == 1:
            return 0.0
        if layout == "fsdp2" and self.machines > 1:
            return 4 * trained / (NETWORK * self.gpu.network)
        local = min(self.num_gpus, self.gpus_per_machine)
        ways = 1 if layout in ("fsdp2", "hsdp") else 2  # scattered, or also gathered again
        within = ways * 4 * trained * (local - 1) / local / (LINK * self.gpu.link)
        between = 2 * 4 * trained / local * (self.machines - 1) / self.machines / (NETWORK * self.gpu.network)
        return within + between
