"""A conversation with a model, and the terminal as a way to have one: answers stream, images are added on the way.

`Conversation` is the browser's too (`demo.py`). In the terminal, standard output has the answers only and everything
else goes to standard error, so that a script can pipe questions in and answers out. The model is loaded by the Auto
classes and never runs code of the checkpoint.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TextIteratorStreamer

from ..evaluation.generation import check_image_seq_length
from ..evaluation.generation import load_model as evaluation_model
from ..evaluation.prompts import encode_messages, image_options, user_turn
from ..processing.images import decode_image

HELP = "/image FILE adds an image to the next message, /reset starts anew, /quit or Ctrl-D ends"


def chat(
    model: str,
    images: list[str] | None = None,
    image_seq_length: int | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
) -> None:
    """Read messages from standard input and print the model's answers, until the input ends."""
    options = generation_options(max_new_tokens, temperature)
    first = [(file, _read_image(file)) for file in images or []]
    conversation = Conversation(*load_model(model, image_seq_length), image_seq_length, options)
    _note(HELP)
    for file, image in first:
        _add_image(conversation, file, image)
    _talk(conversation)


def load_model(model: str, image_seq_length: int | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a model to talk with and its processor; ValueError if it has no chat template or no such budget."""
    loaded, processor = evaluation_model(model, "auto")
    if not processor.chat_template:
        raise ValueError(f"{model}: it has no chat template, as base models have none: it cannot be talked with")
    check_image_seq_length(loaded, processor, image_seq_length)
    return loaded, processor


def generation_options(max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """Arguments of `generate`; a temperature of 0 takes the likeliest token. ValueError for one out of its range."""
    if max_new_tokens < 1 or not 0 <= temperature < float("inf"):
        raise ValueError("--max-new-tokens must be at least 1 and --temperature at least 0")
    options = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    return options | ({"temperature": temperature} if temperature > 0 else {})


class Conversation:
    """The messages so far, and the model that answers them."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, image_seq_length: int | None, options: dict):
        self.model = model
        self.processor = processor
        self.set_options(image_seq_length, options)
        self.reset()

    def set_options(self, image_seq_length: int | None, options: dict) -> None:
        """Change how the next answers are made: tokens per image, of earlier ones too, and options of `generate`."""
        self.processor_kwargs = image_options(self.processor, image_seq_length)
        self.options = options

    def reset(self) -> None:
        """Forget all messages and waiting images."""
        self.messages: list[dict] = []
        self.waiting: list[Image.Image] = []

    def ask(self, text: str, stop: Event | None = None) -> Iterator[str]:
        """Send a message with the waiting images and yield pieces of the answer.

        What was yielded is remembered, also of an answer that is cut short, as by another thread that sets `stop`.
        Where the longest answer would exceed the model's positions, nothing counts as sent (ValueError).
        """
        messages = [*self.messages, *user_turn(self.waiting, text)]
        inputs = encode_messages(self.processor, [messages], self.processor_kwargs).to(self.model.device)
        self._check_length(inputs["input_ids"].shape[1])
        answer = {"type": "text", "text": ""}
        self.messages = [*messages, {"role": "assistant", "content": [answer]}]
        self.waiting = []
        for piece in stream(self.model, self.processor.tokenizer, {**inputs, **self.options}, stop):
            answer["text"] += piece
            yield piece

    def _check_length(self, length: int) -> None:
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        answer = self.options["max_new_tokens"]
        if most is not None and length + answer > most:
            raise ValueError(
                f"too long: the conversation has {length:,} tokens and the answer may have {answer:,}, the model "
                f"takes {most:,}; start anew, or ask for a shorter answer or fewer tokens per image"
            )


def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: dict, stop: Event | None = None
) -> Iterator[str]:
    """Generate for one prompt in a thread and yield pieces of text; who stops reading stops the generation."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = stop or Event()
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(
            model.generate, **inputs, streamer=streamer, stopping_criteria=[lambda *_, **__: stop.is_set()]
        )
        # After an error nothing else would end the iteration below.
        future.add_done_callback(lambda _: streamer.end())
        try:
            yield from filter(None, streamer)
            future.result()
        finally:
            stop.set()


def _talk(conversation: Conversation) -> None:
    missing = ""
    for line in _lines():
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word == "/image":
            missing = _try_image(conversation, rest.strip())
        elif word == "/reset":
            conversation.reset()
        elif word == "/help":
            _note(HELP)
        elif word.startswith("/"):
            _note(f"{word}: no such command; {HELP}")
        elif missing:
            # An answer about an image that the model never saw would mislead.
            _note(f"not sent, for {missing} could not be read: send it again to go without, or add another image")
            missing = ""
        else:
            _answer(conversation, line)


def _lines() -> Iterator[str]:
    """Lines of the user that are not blank; Ctrl-D ends them."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip().encode(errors="replace").decode()  # bytes that are no text of this locale
        except EOFError:
            return
        if line:
            yield line


def _answer(conversation: Conversation, text: str) -> None:
    pieces = conversation.ask(text)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
        if not sys.stdin.isatty():  # nobody is there to go on
            raise
    except ValueError as error:
        _note(str(error))
        return
    print(flush=True)


def _try_image(conversation: Conversation, file: str) -> str:
    """Add an image; what could not be read, if anything."""
    try:
        _add_image(conversation, file, _read_image(file))
    except ValueError as error:
        _note(str(error))
        return file or "the image"
    return ""


def _read_image(file: str) -> Image.Image:
    try:
        return decode_image(Path(file).expanduser().read_bytes())
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{file or '/image'}: cannot be read: {reason}") from error


def _add_image(conversation: Conversation, file: str, image: Image.Image) -> None:
    conversation.waiting.append(image)
    _note(f"{file}: {image.width}x{image.height}, goes with the next message")


def _note(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr, flush=True)
