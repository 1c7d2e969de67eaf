"""Captions by a model of transformers in this process, batch by batch, greedily."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from ...processing.images import decode_image
from ..scoring.chat_prompts import ChatPrompts
from ..scoring.continuation import append_text
from ..scoring.mlm_filter import load_chat_model
from ..scoring.pairs import PreparedSample, RawPair, check_sides, read_pairs
from ..scoring.scoring import find_device
from ..storage.tars import Sample
from .captioners import CAPTION, asked, written_about
from .journal import Written


class _Question(NamedTuple):
    image: Image.Image  # upright, mode RGB
    text: str  # the prompt


class ModelCaptioner:
    """Any image-text-to-text model with a chat template, greedily; bfloat16 on a GPU, float32 on the CPU."""

    def __init__(
        self, model: str, prompt: str, max_new_tokens: int, batch_size: int, device: str | None, threads: int
    ):
        self._device = find_device(device)
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        self._model, processor = load_chat_model(model, dtype, self._device)
        try:
            self._format = ChatPrompts(processor)
        except ValueError as error:
            raise ValueError(f"--model {model}: {error}") from error
        self._tokenizer, self._tokenizer_lock = processor.tokenizer, threading.Lock()
        self._prompt, self._max_new_tokens = prompt, max_new_tokens
        self._batch_size, self._threads = batch_size, threads
        self.made_with = {"precision": str(dtype).removeprefix("torch.")}
        ends = self._model.generation_config.eos_token_id
        self._ends = torch.tensor(ends if isinstance(ends, list) else [] if ends is None else [ends], dtype=torch.long)

    def captions(self, tar: Path, samples: Sequence[Sample]) -> Iterator[list[Written]]:
        """See [`Captioner`]; a group is a batch, with the samples before its last one that cannot be used."""
        waiting: tuple = ()
        with ThreadPoolExecutor(1) as runner:  # writes one batch while the next is collected
            for group in self._groups(tar, samples):
                items = [sample.item for sample in group if sample.reason is None]
                following = group, runner.submit(self._write, self._collate(items)) if items else runner.submit(list)
                if waiting:
                    yield written_about(waiting[0], waiting[1].result())
                waiting = following
            if waiting:
                yield written_about(waiting[0], waiting[1].result())

    def _groups(self, tar: Path, samples: Sequence[Sample]) -> Iterator[list[PreparedSample]]:
        group, usable = [], 0
        needs_caption = CAPTION in self._prompt
        ahead = 2 * self._batch_size + self._threads
        for sample in read_pairs(tar, samples, self._prepare, self._threads, ahead, needs_caption):
            group.append(sample)
            usable += sample.reason is None
            if usable == self._batch_size:
                yield group
                group, usable = [], 0
        if group:
            yield group

    def _prepare(self, pair: RawPair) -> _Question:
        image = decode_image(pair.image)
        check_sides(image)
        return _Question(image, asked(self._prompt, pair.caption))

    def _collate(self, items: list[_Question]) -> dict[str, Any]:
        with self._tokenizer_lock:  # fast tokenizers refuse two threads at a time
            head = self._format.head([item.image for item in items])
            tails = self._format.tails([item.text for item in items])
        return append_text(dict(head.to(self._device, self._model.dtype)), tails, self._format.pad)

    @torch.inference_mode()
    def _write(self, inputs: dict[str, Any]) -> list[tuple[str, bool]]:
        output = self._model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self._max_new_tokens,
            pad_token_id=self._format.pad,
        )
        new = output[:, inputs["input_ids"].shape[1] :].cpu()
        whole = torch.isin(new, self._ends).any(dim=1).tolist()
        with self._tokenizer_lock:
            texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        return list(zip(texts, whole, strict=True))
