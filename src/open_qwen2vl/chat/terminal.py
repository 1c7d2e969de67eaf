"""A conversation with a model, and the terminal as a way to have one: answers stream, images are added on the way.

`Conversation` is the browser's too (`demo.py`). In the terminal, standard output has the answers only and everything
else goes to standard error, so that a script can pipe questions in and answers out. The model is loaded by the Auto
classes and never runs code of the checkpoint.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TextIteratorStreamer,
)

from ..model_folders import model_folder
from ..modeling.configuration_open_qwen2vl import pooled_grid_side
from ..processing.images import decode_image

HELP = "/image FILE adds an image to the next message, /reset starts anew, /quit or Ctrl-D ends"


def chat(
    model: str,
    images: list[str] | None = None,
    image_seq_length: int | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
) -> None:
    """Read messages from standard input and print the model's answers, until the input ends.

    Args:
        model (`str`): hub id or folder of a model with its processor, or the `output_dir` of a training.
        images (`list[str]`, *optional*): image files of the first message.
        image_seq_length (`int`, *optional*): tokens per image; the processor's where not given.
        max_new_tokens (`int`, *optional*, defaults to 512): longest answer.
        temperature (`float`, *optional*, defaults to 0.0): of sampling; 0 takes the likeliest token each time.

    Raises:
        ValueError: if an option is out of its range, or the model cannot be loaded.
    """
    options = generation_options(max_new_tokens, temperature)
    conversation = Conversation(*load_model(model, image_seq_length), image_seq_length, options)
    _note(HELP)
    for file in images or []:
        _add_image(conversation, file)
    _talk(conversation)


def load_model(model: str, image_seq_length: int | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a model to talk with, on the GPU where there is one, and its processor.

    Args:
        model (`str`): hub id or folder of a model with its processor, or the `output_dir` of a training.
        image_seq_length (`int`, *optional*): tokens per image that will be asked for.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`: the model in evaluation mode.

    Raises:
        ValueError: if the model cannot be loaded or has no such budget.
    """
    model = model_folder(model)
    loaded = AutoModelForImageTextToText.from_pretrained(
        model, dtype="auto", device_map="auto", trust_remote_code=False
    ).eval()
    if image_seq_length is not None:
        pooled_grid_side(image_seq_length, loaded.config.patches_per_side)
    return loaded, AutoProcessor.from_pretrained(model, trust_remote_code=False)


def generation_options(max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """What `generate` is called with.

    Args:
        max_new_tokens (`int`): longest answer.
        temperature (`float`): of sampling; 0 takes the likeliest token each time.

    Returns:
        `dict[str, Any]`: arguments.

    Raises:
        ValueError: if one is out of its range.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError("--max-new-tokens must be at least 1 and --temperature at least 0")
    options = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    return options | ({"temperature": temperature} if temperature > 0 else {})


class Conversation:
    """The messages so far, and the model that answers them.

    Args:
        model (`PreTrainedModel`): generates.
        processor (`ProcessorMixin`): has the chat template.
        image_seq_length (`int`, *optional*): tokens per image; the processor's where not given.
        options (`dict`): passed to `generate`.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, image_seq_length: int | None, options: dict):
        self.model = model
        self.processor = processor
        self.set_options(image_seq_length, options)
        self.reset()

    def set_options(self, image_seq_length: int | None, options: dict) -> None:
        """Change how the next answers are made.

        Args:
            image_seq_length (`int`, *optional*): tokens per image, of earlier ones too; `None` for the processor's.
            options (`dict`): passed to `generate`.
        """
        self.processor_kwargs = {} if image_seq_length is None else {"image_seq_length": image_seq_length}
        self.options = options

    def reset(self) -> None:
        """Forget all messages and waiting images."""
        self.messages: list[dict] = []
        self.waiting: list[Image.Image] = []

    def ask(self, text: str, stop: Event | None = None) -> Iterator[str]:
        """Send a message with the waiting images; what was yielded is remembered, also of an answer cut short.

        Args:
            text (`str`): the message.
            stop (`Event`, *optional*): ends the answer when another thread sets it.

        Yields:
            `str`: pieces of the answer.

        Raises:
            ValueError: if the conversation and the longest answer exceed the model's positions. Message and images
                then count as not sent.
        """
        content = [{"type": "image", "image": image} for image in self.waiting]
        # Training has a newline between an image and its text.
        content.append({"type": "text", "text": "\n" + text if self.waiting else text})
        messages = [*self.messages, {"role": "user", "content": content}]
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=self.processor_kwargs,
        ).to(self.model.device)
        self._check_length(inputs["input_ids"].shape[1])
        answer = {"type": "text", "text": ""}
        self.messages = [*messages, {"role": "assistant", "content": [answer]}]
        self.waiting = []
        for piece in stream(self.model, self.processor.tokenizer, {**inputs, **self.options}, stop):
            answer["text"] += piece
            yield piece

    def _check_length(self, length: int) -> None:
        most, answer = self.model.config.get_text_config().max_position_embeddings, self.options["max_new_tokens"]
        if length + answer > most:
            raise ValueError(
                f"too long: the conversation has {length:,} tokens and the answer may have {answer:,}, the model "
                f"takes {most:,}; start anew, or ask for a shorter answer or fewer tokens per image"
            )


def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: dict, stop: Event | None = None
) -> Iterator[str]:
    """Generate in a thread and yield the text as it comes; a caller that stops reading stops the generation.

    Args:
        model (`PreTrainedModel`): generates.
        tokenizer (`PreTrainedTokenizerBase`): decodes.
        inputs (`dict`): all arguments of `generate`, for one prompt.
        stop (`Event`, *optional*): ends the generation when another thread sets it.

    Yields:
        `str`: pieces of the answer, never empty.
    """
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
    commands: dict[str, Callable[[str], None]] = {
        "/image": lambda file: _add_image(conversation, file),
        "/reset": lambda _: conversation.reset(),
        "/help": lambda _: _note(HELP),
    }
    for line in _lines():
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word in commands:
            commands[word](rest.strip())
        elif word.startswith("/"):
            _note(f"{word}: no such command; {HELP}")
        else:
            _answer(conversation, line)


def _lines() -> Iterator[str]:
    """Lines of the user that are not blank; Ctrl-D and, at the prompt, Ctrl-C end them."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
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
    except ValueError as error:
        _note(str(error))
        return
    print(flush=True)


def _add_image(conversation: Conversation, file: str) -> None:
    try:
        image = decode_image(Path(file).expanduser().read_bytes())
    except (ValueError, OSError) as error:
        _note(f"{file or '/image'}: cannot be read: {getattr(error, 'strerror', None) or error}")
        return
    conversation.waiting.append(image)
    _note(f"{file}: {image.width}x{image.height}, goes with the next message")


def _note(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr, flush=True)
