"""Evaluation over HTTP: an endpoint that answers OpenAI's chat completions in place of a model in memory.

lmms-eval's own client scores a request that failed as a wrong answer and starts anew after a kill; here a task with
failures has no score, and the journal keeps what was answered.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from accelerate import PartialState
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from ..endpoint import AnswerError, Endpoint, image_part
from ..output_lock import only_writer
from ..places import Place, place
from ..processing.images import to_rgb
from .evaluate import find_tasks
from .generation import cut_at, generation_options
from .journal import Journal, journal_folder, request_key
from .lmms_model import count_repeats, generation_kwargs, request_messages
from .prompts import Prompt, content_parts, message_images
from .runs import run_targets


class EndpointModel(lmms):
    """Asks a server for the answers to lmms-eval's generation requests.

    Args:
        url (`str`): where the API begins, as `http://127.0.0.1:8000/v1`.
        name (`str`, *optional*): the model's name there; the only one that the server lists where not given.
        concurrency (`int`, *optional*, defaults to 8): requests at a time.
        max_new_tokens (`int`, *optional*, defaults to 1024): longest answer where a task names none.

    Raises:
        EndpointError: if no name is given and the server does not list exactly one model.
    """

    is_simple = False

    def __init__(self, url: str, name: str | None = None, concurrency: int = 8, max_new_tokens: int = 1024):
        super().__init__()
        self.endpoint, self.url = Endpoint(url, name), url
        self.concurrency, self.max_new_tokens = concurrency, max_new_tokens
        self.journal: Journal | None = None
        # As of TransformersModel: the prompt of each (task, document), and what makes messages in a task's place.
        self.prompts: dict[tuple[str, int], Any] = {}
        self.make_messages = None

    def clean(self) -> None:
        """Keep the connections: lmms-eval cleans up after each task."""

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Refused: chat completions do not tell how likely a given answer is."""
        raise ValueError(f"{requests[0].task_name} compares losses of given answers: chat completions have none")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError(f"{requests[0].task_name}: tasks of several rounds are not supported")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Ask for an answer to each request, several at a time, each cut at the first of its `until` strings.

        Raises:
            ValueError: after all were asked, with the number of failures by name.
            EndpointError: at once, if the endpoint is to blame.
        """
        answers: dict[int, str] = {}
        ends: dict[int, list[str]] = {}
        failed: dict[int, str] = {}
        waiting: dict[Future, tuple[int, str]] = {}
        nth = count_repeats(requests)
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            with tqdm(total=len(requests), desc=requests[0].task_name, unit="request", disable=None) as bar:
                for i, request in enumerate(requests):
                    prompt = self._prompt(request)
                    options, ends[i] = self._options(request)
                    self.prompts[request.args[4], request.args[3]] = prompt.shown
                    key = self._key(request, prompt, options, nth[i])
                    if self.journal is not None and (known := self.journal.get(key)) is not None:
                        answers[i] = known
                        bar.update()
                        continue
                    waiting[pool.submit(self._ask, prompt, options)] = (i, key)
                    # So many prompts ahead, with their images.
                    while len(waiting) >= 2 * self.concurrency:
                        self._collect(waiting, answers, failed, bar)
                while waiting:
                    self._collect(waiting, answers, failed, bar)
        finally:
            # Answers under way are waited for here, where Ctrl-C ends the process, and not at its exit.
            pool.shutdown(cancel_futures=True)
        if failed:
            raise ValueError(f"{_counted(failed, len(requests))}; the same command asks these again")
        return [GenerationResult(text=cut_at(answers[i], ends[i])) for i in range(len(requests))]

    def _collect(self, waiting: dict[Future, tuple[int, str]], answers: dict, failed: dict, bar: tqdm) -> None:
        """Take the answers that are there, waiting for one at least."""
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            i, key = waiting.pop(future)
            bar.update()
            try:
                answers[i] = future.result()
            except AnswerError as error:
                failed[i] = f"{error.reason}: {error}"
            else:
                if self.journal is not None:
                    self.journal.add({key: answers[i]})

    def _prompt(self, request: Instance) -> Prompt:
        task, document = request.args[4], request.args[3]
        try:
            turns = [{"role": turn["role"], "content": _parts(turn)} for turn in request_messages(self, request)]
        except (ValueError, OSError) as error:
            raise ValueError(f"{task}, sample {document}: {error}") from error
        shown = "\n".join(f"[{turn['role']}]\n{_shown(turn['content'])}" for turn in turns)
        return Prompt(shown, turns, message_images(turns), [])

    def _options(self, request: Instance) -> tuple[dict[str, Any], list[str]]:
        """What of OpenAI's API a task's generation_kwargs mean, and the strings that end an answer.

        The latter stay here: OpenAI takes four, and transformers' server fails on any beside a processor (5.23).
        """
        kwargs = generation_kwargs(request)
        options, until = generation_options(kwargs, self.max_new_tokens)
        meant = {name: options[name] for name in ("temperature", "top_p") if options[name] is not None}
        rest = {name: value for name, value in options.items() if name not in ("max_new_tokens", "do_sample", *meant)}
        rest |= {"boxes": kwargs.get("boxes")}
        # As much as nothing: these are the defaults.
        plain = {"num_beams": 1, "repetition_penalty": 1, "length_penalty": 1, "min_new_tokens": 0, "top_k": 0}
        if other := [name for name, value in rest.items() if value and value != plain.get(name)]:
            raise ValueError(f"{request.task_name} asks for {', '.join(other)}, which chat completions do not have")
        return {"temperature": 0, **meant, "max_tokens": options["max_new_tokens"]}, until

    def _key(self, request: Instance, prompt: Prompt, options: dict[str, Any], nth: int) -> str:
        where = (self.url, self.endpoint.model, request.args[4], request.args[3], nth)
        return request_key(*where, prompt.text, options, *prompt.images)

    def _ask(self, prompt: Prompt, options: dict[str, Any]) -> str:
        turns = [{**turn, "content": [_sent(part) for part in turn["content"]]} for turn in prompt.messages]
        return self.endpoint.ask(turns, **options).text


def evaluate_endpoint(
    endpoint: str,
    tasks: Sequence[str] | None,
    output: str | os.PathLike,
    *,
    model: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    max_new_tokens: int = 1024,
    judge: bool = False,
    include_path: Sequence[str | os.PathLike] = (),
) -> dict[str, Any]:
    """Evaluate the model behind a server of OpenAI's chat completions, with lmms-eval's prompts and scoring.

    Args:
        endpoint (`str`): where the API begins, as `http://127.0.0.1:8000/v1`; the key is read from `OPENAI_API_KEY`.
        tasks (`Sequence[str]`, *optional*): as in [`evaluate`].
        output (`str` or `os.PathLike`): folder of the results; a rerun resumes a killed one.
        model (`str`, *optional*): the model's name there; the only one that the server lists where not given.
        batch_size (`int`, *optional*, defaults to 8): requests at a time.
        limit (`int`, *optional*): as in [`evaluate`], like all that follow.
        max_new_tokens (`int`, *optional*, defaults to 1024): longest answer where a task names none.
        judge (`bool`, *optional*, defaults to `False`): allow tasks that ask an LLM judge over a paid API.
        include_path (`Sequence`, *optional*): folders with YAML files of more tasks, whose Python code runs.

    Returns:
        `dict`: the content of `results.json`; without a fingerprint, for a server does not tell its weights.

    Raises:
        ValueError: as [`evaluate`]; for a server that cannot be asked.
    """
    if PartialState(cpu=True).num_processes > 1:
        raise ValueError("--endpoint: one process asks, --batch-size requests at a time; run it without a launcher")
    targets, manager = find_tasks(tasks, "standard", limit, judge, include_path)
    with only_writer(output, "evaluating to"):
        lm = EndpointModel(endpoint, model, batch_size, max_new_tokens)
        name = lm.endpoint.model
        _refuse_other_model(place(output), endpoint, name)
        lm.journal = Journal(journal_folder(output))
        identity = {"name": name.rstrip("/").rpartition("/")[2] or name, "path": name, "endpoint": endpoint}
        identity |= {"revision": None, "fingerprint": None}
        options = {"batch_size": batch_size, "limit": limit, "max_new_tokens": max_new_tokens, "judge": judge}
        options |= {"image_seq_length": None, "dtype": None, "device": None}
        with contextlib.closing(lm.journal):
            return run_targets(lm, targets, place(output), manager, identity, options)


def _refuse_other_model(output: Place, endpoint: str, name: str) -> None:
    path = output / "results.json"
    before = json.loads(path.read_text(encoding="utf-8"))["model"] if path.exists() else None
    if before is not None and (before.get("endpoint"), before["path"]) != (endpoint, name):
        where = f" at {before['endpoint']}" if before.get("endpoint") else ""
        raise ValueError(f"{output} has results of {before['path']}{where}: give another --output")


def _parts(turn: dict[str, Any]) -> list[dict[str, Any]]:
    kinds = {part["type"] for part in turn["content"]} if isinstance(turn["content"], list) else set()
    if other := kinds - {"text", "image"}:
        raise ValueError(f"a message has {' and '.join(sorted(other))} content: an endpoint is shown texts and images")
    return content_parts(turn["content"])


def _shown(parts: list[dict[str, Any]]) -> str:
    return "\n".join("<image>" if part["type"] == "image" else part["text"] for part in parts)


def _sent(part: dict[str, Any]) -> dict[str, Any]:
    # The pixels that a model here would see.
    return part if part["type"] == "text" else image_part(to_rgb(part["image"]))


def _counted(failed: dict[int, str], total: int) -> str:
    counts = Counter(reason.partition(":")[0] for reason in failed.values())
    listed = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    return f"{len(failed)} of {total} requests failed ({listed}), the first by {failed[min(failed)]}"
