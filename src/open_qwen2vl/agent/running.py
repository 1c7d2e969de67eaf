"""The loop of an agent: what is seen, what the model calls, what comes of it.

    observe() ─► user's turn ─► model ─► call, parsed by json ─► checked ─► function ─► result ─┐
                                  ▲                                                             │
                                  └──────────────── turn `tool` ◄─── observe() ◄────────────────┘

What a model writes is parsed and checked against schemas, and never evaluated.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..chat.terminal import generation_options, load_model
from ..data.documents.forms import conversation_format
from ..evaluation.generation import stop_at
from ..evaluation.prompts import encode_messages
from ..families import document_processor
from ..processing.sample_error import SampleError
from ..processing.tool_forms import STOPS, TOOL_FORMS, Call, ToolForm, parse_calls
from ..processing.tool_records import read_calls
from .functions import BadCall, Functions, Parts, ToolError, content
from .transcripts import Transcript

Observation = str | Image.Image | Sequence[str | Image.Image] | None
Actor = Callable[[list[dict[str, Any]]], str]


class ContextFullError(ValueError):
    """The conversation and its longest answer exceed the model's positions."""


def run(
    model: str | Path | PreTrainedModel | Actor,
    tools: Sequence[Callable[..., Any]],
    observe: Callable[[], Observation],
    max_steps: int,
    *,
    task: str | None = None,
    processor: ProcessorMixin | None = None,
    tool_form: ToolForm = "tool_call",
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
) -> Transcript:
    """Let a model act until it answers.

    A call that cannot be read, of a function that there is not, or with arguments that its schema does not allow, is
    not made: the model reads why as the result, and the transcript counts it. The same holds for a [`ToolError`] of a
    function; any other exception is the caller's, and ends the run. A model's step ends with its first call; a
    callable may write several at once (form `tool_call`).

    Args:
        model (`str`, `Path`, `PreTrainedModel` or `Callable`): a hub id or folder, as `open-qwen2vl chat` takes it; a
            loaded model, which needs `processor`; or what gives the assistant's next words for the messages so far.
        tools (`Sequence[Callable]`): functions with type hints and a docstring of Google's style, of which
            transformers' `get_json_schema` makes what the model reads. They return text, images, a list of both,
            None, or anything that JSON can say.
        observe (`Callable[[], str | PIL.Image.Image | list | None]`): what is to be seen now; called before each step.
        max_steps (`int`): how often the model may act, its answer included.
        task (`str`, *optional*): what the user asks for, behind the first observation; nothing where the observation
            says it.
        processor (`ProcessorMixin`, *optional*): that of a loaded model.
        tool_form (`str`, *optional*, defaults to `"tool_call"`): how calls are written, as in training; `"function"`
            is that of Qwen2-VL's article.
        system (`str`, *optional*): a system prompt before the description of the tools.
        max_new_tokens (`int`, *optional*, defaults to 256): most tokens of a step.
        temperature (`float`, *optional*, defaults to 0.0): 0 takes the likeliest token.

    Returns:
        [`Transcript`]: what happened, as a training conversation.

    Raises:
        ValueError: for tools without a schema, an option out of range, or a chat template that cannot show tools, or
            images in results.
    """
    if tool_form not in TOOL_FORMS or max_steps < 1:
        raise ValueError(f"tool_form is {' or '.join(TOOL_FORMS)} and max_steps at least 1")
    functions = Functions(tools)
    act = _actor(model, processor, functions.schemas, tool_form, generation_options(max_new_tokens, temperature))
    first = [{"role": "system", "content": content(system)}] if system else []
    seen = {"role": "user", "content": [*content(observe()), *content(task)]}
    transcript = Transcript(functions.schemas, [*first, seen])
    _go_on(transcript, act, functions, observe, max_steps, tool_form)
    return transcript


def _go_on(
    transcript: Transcript,
    act: Actor,
    functions: Functions,
    observe: Callable[[], Observation],
    max_steps: int,
    form: ToolForm,
) -> None:
    """Step by step to the end of a run."""
    while transcript.steps < max_steps:
        if transcript.steps:
            transcript.messages[-1]["content"] += content(observe())
        try:
            text = act(transcript.messages)
        except ContextFullError:
            transcript.ended = "context_full"
            return
        if _take_step(transcript, functions, _until_stop(text, form), form):
            return


def _take_step(transcript: Transcript, functions: Functions, text: str, form: ToolForm) -> bool:
    """Add what the model has written and what came of it; whether it was an answer."""
    turn: dict[str, Any] = {"role": "assistant", "content": []}
    transcript.messages.append(turn)
    transcript.steps += 1
    try:
        prose, calls = parse_calls(text, form)
    except ValueError as error:
        # As it stands, without the end that the form writes by itself.
        turn |= {"content": content(text.removesuffix(STOPS["function"])), "train": False}
        transcript.errors["unreadable_call"] += 1
        transcript.messages.append({"role": "tool", "content": content(f"error: {error}")})
        return False
    turn["content"] = content(prose or None)
    if not calls:
        transcript.answer, transcript.ended = prose, "answer"
        return True
    turn["tool_calls"] = [{"type": "function", "function": call._asdict()} for call in calls]
    for call in calls:
        result, reason = _result(functions, call)
        if reason:
            turn["train"] = False
            transcript.errors[reason] += 1
        transcript.messages.append({"role": "tool", "content": result})
    return False


def _result(functions: Functions, call: Call) -> tuple[Parts, str]:
    """What the model reads of a call, and the reason if it failed."""
    try:
        return functions.call(call), ""
    except (BadCall, ToolError) as error:
        return content(f"error: {error}"), getattr(error, "reason", "tool_error")


def _until_stop(text: str, form: ToolForm) -> str:
    """Text up to the end of a call in the article's form: a result behind it is made up."""
    before, stop, _ = text.partition(STOPS[form])
    return before + stop if form == "function" else text


def _actor(model: Any, processor: Any, tools: list[dict[str, Any]], form: ToolForm, options: dict[str, Any]) -> Actor:
    if isinstance(model, str | Path):
        model, processor = load_model(str(model))
    if not isinstance(model, torch.nn.Module):
        return model
    if processor is None:
        raise ValueError("a loaded model needs its processor")
    return _ModelActor(model, processor, tools, form, options)


class _ModelActor:
    """What a model says next: its chat template, and calls as they were trained."""

    def __init__(self, model: Any, processor: Any, tools: list[dict[str, Any]], form: ToolForm, options: dict):
        self._model, self._processor, self._tools, self._options = model, processor, tools, options
        self._stop = STOPS[form]
        self._format = conversation_format(document_processor(processor), form)

    def __call__(self, messages: list[dict[str, Any]]) -> str:
        inputs = self._inputs(messages).to(self._model.device)
        length, tokenizer = inputs["input_ids"].shape[1], self._processor.tokenizer
        most = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and length + self._options["max_new_tokens"] > most:
            raise ContextFullError(f"{length} tokens, and the model takes {most}")
        stopping = [stop_at(tokenizer, [self._stop], length)]
        ids = self._model.generate(**inputs, **self._options, stopping_criteria=stopping)
        return tokenizer.decode(ids[0, length:], skip_special_tokens=True)

    def _inputs(self, messages: list[dict[str, Any]]) -> Any:
        normal = [
            {**message, "tool_calls": read_calls(message["tool_calls"])} if "tool_calls" in message else message
            for message in messages
        ]
        plain = self._format.plain(normal, self._tools)
        try:
            self._format.pieces(plain)
        except SampleError as error:
            raise ValueError(f"the chat template cannot show this conversation: {error}") from error
        if self._format.writes_tools:
            # Its tokens for calls are control tokens to the template, and would not be in a text.
            return encode_messages(self._processor, [messages], {}, tools=self._tools)
        # A result within the assistant's turn: the same turn goes on.
        return encode_messages(self._processor, [plain], {}, continues=plain[-1]["role"] == "assistant")
