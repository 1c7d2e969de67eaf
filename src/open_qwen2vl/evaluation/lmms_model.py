"""Any image-text-to-text model of transformers as a model of lmms-eval.

Requests are sorted by length, cut into batches, dealt to the ranks, and answered in turn while a thread prepares the
next batches; answers come back in the order of the requests. lmms-eval picks the *least* of its "log-likelihoods",
because its own models return losses, so that is what `loglikelihood` returns.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ..grounding.prompting import answer_parts, box_form
from .boxes import boxes_line
from .generation import cut_at, generation_options, load_model, stop_at
from .journal import Journal, request_key
from .likelihood import continuation_losses
from .prompts import Prompt, PromptBuilder, ShownPrompt, user_turn

PREPARED_BATCHES = 2


class ScoredElsewhere(Exception):
    """All ranks have answered and rank 0 has the answers: the others have nothing more to do in this task."""


class _Work(NamedTuple):
    """A prepared batch: what the journal knew, and the rest with its inputs and the ids of given answers."""

    known: dict[int, tuple[Any, ShownPrompt]]
    waiting: list[tuple[int, str, Prompt]]
    inputs: dict
    continuations: list[list[int]]


class TransformersModel(lmms):
    """Answers lmms-eval's requests with a model of transformers.

    Args:
        pretrained (`str` or `PreTrainedModel`): hub id or folder, or a model that is loaded.
        processor (`ProcessorMixin`, *optional*): of a loaded model.
        device (`str`, *optional*): where to; the process's own GPU, or else the CPU, where not given.
        batch_size (`int`, *optional*, defaults to 1): prompts, or answers of one prompt, that run at a time.
        prompt_style (`str`, *optional*, defaults to `"chat"`): `"chat"` (the chat template) or `"raw"`.
        image_seq_length (`int`, *optional*): tokens per image; the processor's where not given.
        max_new_tokens (`int`, *optional*, defaults to 1024): longest answer where a task names none.
        share_requests (`bool`, *optional*, defaults to `False`): every rank gets all requests and answers its part of
            them; lmms-eval's own CLI deals them out itself.
        shot_separator (`str`, *optional*): ends a demonstration of a raw prompt.
        max_batch_size (`int`, *optional*): not used; lmms-eval's CLI passes it.

    Raises:
        ValueError: if the model cannot be loaded or an option does not fit it.
    """

    is_simple = False
    accelerator = None

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        processor: ProcessorMixin | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        prompt_style: str = "chat",
        image_seq_length: int | None = None,
        max_new_tokens: int = 1024,
        share_requests: bool = False,
        shot_separator: str = "",
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.batch_size = int(batch_size)
        if self.batch_size < 1 or max_new_tokens < 1:
            raise ValueError("batch_size and max_new_tokens must be at least 1")
        if isinstance(pretrained, str):
            pretrained, processor = load_model(pretrained, device)
        self.model, self.processor = pretrained, processor
        self.prompt_builder = PromptBuilder(processor, prompt_style, image_seq_length, shot_separator)
        self.max_new_tokens = max_new_tokens
        self.state = PartialState() if share_requests else None
        # Of rank 0, after a task: the prompt of each (task, document).
        self.prompts: dict[tuple[str, int], ShownPrompt] = {}
        # Makes the messages of (document, row) in place of the task.
        self.make_messages: Callable[[int, dict], list[dict]] | None = None
        self.journal: Journal | None = None
        self.fingerprint: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def clean(self) -> None:
        """Keep the model: lmms-eval would throw it away after a task."""

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Generate an answer to each request, cut at the first of its `until` strings."""
        options = [json.dumps(generation_kwargs(request), sort_keys=True, default=str) for request in requests]
        # Longest first: what does not fit into memory fails at once.
        order = sorted(range(len(requests)), key=lambda i: (options[i], -len(str(requests[i].args[0])), i))
        batches = [
            chunk
            for _, alike in groupby(order, options.__getitem__)
            for chunk in _chunks(list(alike), self.batch_size)
        ]
        return [GenerationResult(text=text) for text in self._answer_all(requests, batches, self._generate)]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Losses of given answers; those of one document share its context's KV cache."""
        for request in requests:
            if len(request.args) < 6:
                raise ValueError(f"{request.task_name}: acc_mutual_info is not supported")
        contexts: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            contexts.setdefault((request.args[4], request.args[3], request.args[0]), []).append(i)
        pairs = self._answer_all(requests, list(contexts.values()), self._score)
        return [GenerationResult(text=(loss, greedy)) for loss, greedy in pairs]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError(f"{requests[0].task_name}: tasks of several rounds are not supported")

    def _answer_all(self, requests: list[Instance], batches: list[list[int]], answer: Callable) -> list:
        """Answers in the order of the requests, on each rank that lmms-eval goes on in."""
        if self.state is None:
            answers = self._answer_own(requests, batches, answer)
        else:
            answers = self._gather(lambda mine: self._answer_own(requests, batches[mine], answer))
            if not self.state.is_main_process:
                raise ScoredElsewhere
        for i, (_, prompt) in answers.items():
            self.prompts[requests[i].args[4], requests[i].args[3]] = prompt
        return [answers[i][0] for i in range(len(requests))]

    def _gather(self, answer_own: Callable[[slice], dict]) -> dict[int, tuple[Any, ShownPrompt]]:
        """All ranks' answers; an error of one is an error of all, so that none waits for it."""
        answers, error = {}, None
        try:
            answers = answer_own(slice(self.state.process_index, None, self.state.num_processes))
        except Exception as exception:
            error = exception
        shares = gather_object([(answers, error and f"{type(error).__name__}: {error}")])
        if error is not None:
            raise error
        for rank, (_, message) in enumerate(shares):
            if message:
                raise RuntimeError(f"rank {rank}: {message}")
        return {i: answer for share, _ in shares for i, answer in share.items()}

    def _answer_own(self, requests: list[Instance], batches: list[list[int]], answer: Callable) -> dict:
        nth = count_repeats(requests)
        answers: dict[int, tuple[Any, ShownPrompt]] = {}
        total = sum(len(batch) for batch in batches)
        hidden = self.state is not None and not self.state.is_main_process
        name = requests[0].task_name if requests else ""
        with tqdm(total=total, desc=name, unit="request", disable=hidden or None) as bar:
            for work in _ahead(lambda batch: self._prepare(requests, nth, batch), batches):
                answers.update(work.known)
                if work.waiting:
                    new = answer([requests[i] for i, _, _ in work.waiting], work)
                    if self.journal is not None:
                        self.journal.add(dict(zip([key for _, key, _ in work.waiting], new, strict=True)))
                    for (i, _, prompt), one in zip(work.waiting, new, strict=True):
                        answers[i] = (one, prompt.shown)
                bar.update(len(work.known) + len(work.waiting))
        return answers

    def _prepare(self, requests: list[Instance], nth: list[int], batch: list[int]) -> _Work:
        known, waiting, prompt = {}, [], None
        scoring = requests[batch[0]].request_type == "loglikelihood"
        for i in batch:
            if prompt is None or not scoring:
                prompt = self._prompt(requests[i])
            key = "" if self.journal is None else self._key(requests[i], prompt, nth[i])
            found = None if self.journal is None else self.journal.get(key)
            waiting.append((i, key, prompt))
            if found is not None:
                known[i] = (found, prompt.shown)
        if scoring and len(known) < len(batch):
            # All or none: a loss's last digits depend on what it is computed with.
            known = {}
        waiting = [entry for entry in waiting if entry[0] not in known]
        prompts = [entry[2] for entry in waiting][: 1 if scoring else None]
        inputs = self.prompt_builder.encode(prompts) if prompts else {}
        # Here, for a fast tokenizer serves one thread at a time.
        answers = [_continuation(self, requests[i]) for i, _, _ in waiting] if scoring else []
        return _Work(known, waiting, inputs, [self.prompt_builder.continuation_ids(prompt, one) for one in answers])

    def _prompt(self, request: Instance) -> Prompt:
        try:
            return self.prompt_builder.build(request_messages(self, request))
        except (ValueError, OSError) as error:
            raise ValueError(f"{request.args[4]}, sample {request.args[3]}: {error}") from error

    def _key(self, request: Instance, prompt: Prompt, nth: int) -> str:
        continuation = _continuation(self, request) if request.request_type == "loglikelihood" else None
        options = {} if continuation is not None else generation_kwargs(request)
        parts = (request.request_type, request.args[4], request.args[3], nth, prompt.text, continuation, options)
        budget = (self.prompt_builder.options, self.max_new_tokens, self.prompt_builder.style)
        return request_key(self.fingerprint, *parts, *budget, *prompt.images, *(clip.digest for clip in prompt.clips))

    @torch.inference_mode()
    def _generate(self, requests: list[Instance], work: _Work) -> list[str]:
        options, until = generation_options(generation_kwargs(requests[0]), self.max_new_tokens)
        inputs = work.inputs.to(self.device)
        length = inputs["input_ids"].shape[1]
        self._check_length(length + options["max_new_tokens"])
        tokenizer = self.processor.tokenizer
        if until:
            options["stopping_criteria"] = [stop_at(tokenizer, until, length)]
        ids = self.model.generate(**inputs, **options)[:, length:]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts = [cut_at(text, until) for text in texts]
        if not generation_kwargs(requests[0]).get("boxes"):
            return texts
        return [
            f"{text}\n{self._boxes_line(own, prompt, until)}"
            for text, own, (_, _, prompt) in zip(texts, ids.tolist(), work.waiting, strict=True)
        ]

    def _boxes_line(self, ids: list[int], prompt: Prompt, until: list[str]) -> str:
        form = box_form(self.processor)
        if form is None or not prompt.images:
            raise ValueError("a task asks for boxes: of an image, and of a model whose family has a form for them")
        size = prompt.images[-1].size
        written = "".join(part["text"] for part in answer_parts(ids, self.processor))
        return boxes_line(form.read(cut_at(written, until), *size), size)

    def _score(self, requests: list[Instance], work: _Work) -> list[tuple[float, bool]]:
        ids = work.continuations
        self._check_length(work.inputs["input_ids"].shape[1] + max(map(len, ids)))
        return continuation_losses(self.model, work.inputs.to(self.device), ids, self.batch_size)

    def _check_length(self, positions: int) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and positions > limit:
            raise ValueError(
                f"a prompt with its answer takes {positions} positions and the model has {limit}: fewer shots or a "
                "smaller image_seq_length fit"
            )


class SimpleTransformersModel(TransformersModel):
    """The same for lmms-eval's `--force_simple`, which its multiple-choice tasks need."""

    is_simple = True


def request_messages(model: lmms, request: Instance) -> list[dict[str, Any]]:
    """Messages of a request: by the model's `make_messages` where it has one, else the task's own."""
    context, *_, document, task, split = request.args
    doc = model.task_dict[task][split][document]
    if model.make_messages is not None:
        return model.make_messages(document, doc)
    maker = next(argument for argument in request.args[1:3][::-1] if callable(argument))
    # (context, doc_to_messages, kwargs, document, task, split) or (context, kwargs or answer, doc_to_visual, ...)
    is_chat = callable(request.args[1]) and isinstance(request.args[2], dict)
    return maker(doc) if is_chat else user_turn(maker(doc), context)


def count_repeats(requests: Sequence[Instance]) -> list[int]:
    """Which time each request is asked, from 1: a task may ask the same thing several times."""
    seen = Counter()
    numbers = []
    for request in requests:
        seen[id(request)] += 1
        numbers.append(seen[id(request)])
    return numbers


def generation_kwargs(request: Instance) -> dict[str, Any]:
    """Options of a generation request, by lmms-eval's names."""
    return next(argument for argument in request.args[1:3] if isinstance(argument, dict))


def _continuation(model: TransformersModel, request: Instance) -> str:
    _, continuation, _, document, task, split = request.args
    return continuation(model.task_dict[task][split][document]) if callable(continuation) else continuation


def _chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _ahead(function: Callable, items: Sequence) -> Iterator:
    """The function's results in order, computed in a thread a few items ahead."""
    with ThreadPoolExecutor(1) as executor:
        futures: deque = deque()
        for item in items:
            futures.append(executor.submit(function, item))
            if len(futures) > PREPARED_BATCHES:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
