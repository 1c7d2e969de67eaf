"""A conversation with a model in the terminal: answers stream, images are added on the way.

Standard output has the answers only and everything else goes to standard error, so that a script can pipe questions
in and answers out. The model is loaded by the Auto classes and never runs code of the checkpoint.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TextIteratorStreamer,
)

from .modeling.configuration_open_qwen2vl import pooled_grid_side
from .processing.images import decode_image

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
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError("--max-new-tokens must be at least 1 and --temperature at least 0")
    if not (Path(model) / "config.json").exists() and (Path(model) / "model" / "config.json").exists():
        model = str(Path(model) / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(
        model, dtype="auto", device_map="auto", trust_remote_code=False
    ).eval()
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    if image_seq_length is not None:
        pooled_grid_side(image_seq_length, loaded.config.patches_per_side)
    options = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    conversation = Conversation(loaded, processor, image_seq_length, options)
    _note(HELP)
    for file in images or []:
        _add_image(conversation, file)
    _talk(conversation)


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
        self.processor_kwargs = {} if image_seq_length is None else {"image_seq_length": image_seq_length}
        self.options = options
        self.reset()

    def reset(self) -> None:
        """Forget all messages and waiting images."""
        self.messages: list[dict] = []
        self.waiting: list[Image.Image] = []

    def ask(self, text: str) -> Iterator[str]:
        """Send a message with the waiting images; what was yielded is remembered, also of an answer cut short.

        Args:
            text (`str`): the message.

        Yields:
            `str`: pieces of the answer.
        """
        content = [{"type": "image", "image": image} for image in self.waiting]
        # Training has a newline between an image and its text.
        content.append({"type": "text", "text": "\n" + text if self.waiting else text})
        self.messages.append({"role": "user", "content": content})
        self.waiting = []
        answer = {"type": "text", "text": ""}
        inputs = self.processor.apply_chat_template(
            self.messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=self.processor_kwargs,
        ).to(self.model.device)
        self.messages.append({"role": "assistant", "content": [answer]})
        for piece in stream(self.model, self.processor.tokenizer, {**inputs, **self.options}):
            answer["text"] += piece
            yield piece


def stream(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: dict) -> Iterator[str]:
    """Generate in a thread and yield the text as it comes; a caller that stops reading stops the generation.

    Args:
        model (`PreTrainedModel`): generates.
        tokenizer (`PreTrainedTokenizerBase`): decodes.
        inputs (`dict`): all arguments of `generate`, for one prompt.

    Yields:
        `str`: pieces of the answer, never empty.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = Event()
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
