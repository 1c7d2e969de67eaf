"""The scorer `mlm-filter`: any image-text-to-text model of transformers is asked how good a pair is.

    pairs ── collate: heads up to the image, and tails of caption and question (chat_prompts.py)
      │ prefill of the head and of what the tails have in common: the image is encoded once for all metrics
      │ each metric's question continues from a copy of the cache
      ▼
    expectation: probabilities of 0 to 100 from the logits (score_tokens.py)    or greedy: the number that it writes

After MLM-Filter (arXiv 2403.02677), whose way is `greedy`.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, PreTrainedModel, ProcessorMixin

from ...processing.sample_error import SampleError
from .chat_prompts import PAIR, ChatPrompts, read_prompts
from .continuation import Prompts, append_text, branch_logits, extend, prefill
from .conversations import RawConversation
from .pairs import MAX_CAPTION, Pair, RawPair, check_sides, decode_pair
from .score_tokens import expected_score, parse_score
from .scoring import Scorer, find_device

logger = logging.getLogger(__name__)

DECODING = ("expectation", "greedy")


class MlmFilterBatch(NamedTuple):
    """What the model reads for some pairs."""

    head: BatchFeature  # the processor's output for the images and the text up to them, padded at the left
    tails: list[list[list[int]]]  # for each metric and pair the ids behind the head


class MlmFilterScorer(Scorer):
    """Asks a model for a number from 0 to 100 for each metric, `about` a pair or a conversation.

    bfloat16 on a GPU, float32 on the CPU.
    """

    def __init__(
        self,
        model: str,
        metrics: Sequence[str] = ("all",),
        prompts: str | None = None,
        decode: str = "expectation",
        batch_size: int = 16,
        device: str | None = None,
        about: str = PAIR,
    ):
        if decode not in DECODING:
            raise ValueError(f"--decode {decode}: must be one of {', '.join(DECODING)}")
        self._prompts, self._about = read_prompts(prompts, metrics, about), about
        self._device = find_device(device)
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        self._model, processor = load_chat_model(model, dtype, self._device)
        try:
            self._format = ChatPrompts(processor)
            self._tree = self._format.score_tokens
        except ValueError as error:
            raise ValueError(f"--model {model}: {error}") from error
        self._tokenizer = processor.tokenizer
        self._tokenizer_lock = threading.Lock()  # fast tokenizers refuse two threads at a time
        self.parts = tuple(self._prompts)
        self.model = model
        self.recipe = {"prompts": self._prompts, "precision": str(dtype).removeprefix("torch.")}
        self.batch_size = batch_size
        self._greedy = decode == "greedy"
        self.missing_reason = "unparsable_score" if self._greedy else "nan_score"
        self.shares_prefix = len(self._prompts) > 1 and self._can_share_prefix()

    def prepare(self, pair: RawPair | RawConversation) -> Pair:
        """The pair with its image decoded; a [`SampleError`] also for a long caption or a narrow image.

        The caption of a conversation is what is said in it, turn by turn.
        """
        pair = pair if isinstance(pair, RawPair) else pair.as_pair(pair.transcript)
        if len(pair.caption) > MAX_CAPTION:
            raise SampleError("too_long", f"{len(pair.caption)} characters are above {MAX_CAPTION}")
        decoded = decode_pair(pair)
        check_sides(decoded.image)
        return decoded

    def collate(self, items: list[Pair]) -> MlmFilterBatch:
        """Process images and tokenize, while the batch before is scored."""
        with self._tokenizer_lock:
            head = self._format.head([pair.image for pair in items])
            texts = [
                [prompt.replace(self._about, pair.caption) for pair in items] for prompt in self._prompts.values()
            ]
            return MlmFilterBatch(head, [self._format.tails(own) for own in texts])

    @torch.inference_mode()
    def score(self, batch: MlmFilterBatch) -> np.ndarray:
        """Float64 `(pairs, metrics)`: 0 to 100, NaN where the model wrote no such number."""
        if self._greedy:
            columns = [[parse_score(answer) for answer in answers] for answers in self._answers(batch)]
            return np.array(columns, dtype=np.float64).T
        columns = [expected_score(own) for own in self._probabilities(batch, self.shares_prefix)]
        return torch.stack(columns, 1).cpu().numpy()

    def _probabilities(self, batch: MlmFilterBatch, shared: bool) -> Iterator[torch.Tensor]:
        """For each metric `(pairs, 101)`."""
        tree = self._tree
        for beginning, texts in self._beginnings(batch, shared):
            if isinstance(beginning, Prompts):
                prompts = extend(self._model, beginning, texts, self._format.pad)
            else:
                prompts = prefill(self._model, append_text(beginning, texts, self._format.pad))
            nodes = [tree.columns(logits) for logits in branch_logits(self._model, prompts, tree.rows)]
            root = tree.columns(prompts.logits)
            shape = (len(root), *tree.rows.shape, root.shape[-1])
            yield tree.probabilities(root, torch.cat(nodes).view(shape) if nodes else root.new_zeros(shape))

    def _answers(self, batch: MlmFilterBatch) -> Iterator[list[str]]:
        """For each metric what the model writes for each pair."""
        for beginning, texts in self._beginnings(batch, self.shares_prefix):
            if isinstance(beginning, Prompts):
                inputs = beginning.generation_inputs(texts, self._format.pad)
            else:
                inputs = append_text(beginning, texts, self._format.pad)
            output = self._model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=self._tree.longest,
                pad_token_id=self._format.pad,
            )
            with self._tokenizer_lock:
                yield self._tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _beginnings(self, batch: MlmFilterBatch, shared: bool) -> Iterator[tuple[Prompts | dict, list[list[int]]]]:
        """For each metric what its text follows: inputs or, if shared, the prompts that the model has read."""
        head = dict(batch.head.to(self._device, self._model.dtype))
        if not shared:
            yield from ((head, texts) for texts in batch.tails)
            return
        beginnings, ends = _split_common(batch.tails)
        prompts = prefill(self._model, append_text(head, beginnings, self._format.pad))
        yield from ((prompts, texts) for texts in ends)

    @torch.inference_mode()
    def _can_share_prefix(self) -> bool:
        """Whether the model, continued from a cache, says what it says after a whole prompt; tried with two pairs."""
        gradient = Image.linear_gradient("L").convert("RGB")
        pairs = [Pair("", "", gradient, "a grey square"), Pair("", "", gradient.resize((96, 64)), "grey")]
        batch = self.collate(pairs)
        whole = torch.stack(list(self._probabilities(batch, shared=False)))
        try:
            shared = torch.stack(list(self._probabilities(batch, shared=True)))
            difference = (whole - shared).abs().sum(-1).max().item() / 2  # total variation
        except Exception as error:  # of many kinds, in the code of any model
            logger.warning(
                "%s reads each metric's prompt anew: continued from a cache it fails: %r", self.model, error
            )
            return False
        if difference > torch.finfo(self._model.dtype).eps ** 0.5:
            reason = f"continued from a cache, its answers differ by {difference:.2g} of probability"
            logger.warning("%s reads each metric's prompt anew: %s", self.model, reason)
            return False
        return True


def _split_common(tails: list[list[list[int]]]) -> tuple[list[list[int]], list[list[list[int]]]]:
    """For each pair what its metrics begin with, and for each metric and pair the ids behind, at least one."""
    lengths = [_common_length([own[pair] for own in tails]) for pair in range(len(tails[0]))]
    beginnings = [ids[:length] for ids, length in zip(tails[0], lengths, strict=True)]
    return beginnings, [[ids[length:] for ids, length in zip(own, lengths, strict=True)] for own in tails]


def _common_length(prompts: list[list[int]]) -> int:
    shortest = min(map(len, prompts)) - 1
    return next((i for i in range(shortest) if len({ids[i] for ids in prompts}) > 1), shortest)


def load_chat_model(model: str, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, ProcessorMixin]:
    """An image-text-to-text model of transformers in evaluation mode, and its processor; or a `ValueError`."""
    try:
        network = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, trust_remote_code=False)
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise ValueError(f"--model {model}: not an image-text-to-text model with a processor: {error}") from error
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(f"--model {model}: it has no processor, only a {type(processor).__name__}")
    return network.to(device).eval(), processor
