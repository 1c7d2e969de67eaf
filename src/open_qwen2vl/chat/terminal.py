"""A conversation with a model, and the terminal as a way to have one: answers stream, images are added on the way.

`Conversation` is the browser's too (`demo.py`). In the terminal, standard output has the answers only and everything
else goes to standard error, so that a script can pipe questions in and answers out. The model is loaded by the Auto
classes and never runs code of the checkpoint.
"""

import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TextIteratorStreamer

from ..evaluation.clips import Clip, read_clip
from ..evaluation.generation import check_image_seq_length
from ..evaluation.generation import load_model as evaluation_model
from ..evaluation.prompts import encode_messages, image_options, message_images, user_turn
from ..files import renamed_when_whole
from ..grounding.drawing import draw_boxes
from ..grounding.prompting import answer_parts, box_form
from ..processing.images import decode_image

SAVED = (".png", ".jpg", ".jpeg", ".webp")
HELP = "/image FILE or /video FILE adds one to the next message, /reset starts anew, /quit or Ctrl-D ends"


def chat(
    model: str,
    images: list[str] | None = None,
    videos: list[str] | None = None,
    image_seq_length: int | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    save: str | None = None,
) -> None:
    """Read messages from standard input and print the model's answers, until the input ends.

    With `save`, a file that gets the last image with the boxes of the newest answer that has any.
    """
    options = generation_options(max_new_tokens, temperature)
    if save is not None and Path(save).suffix.lower() not in SAVED:
        raise ValueError(f"--save {save}: the name of an image, ending in {', '.join(SAVED)}")
    first = [(file, _read_image(file)) for file in images or []]
    conversation = Conversation(*load_model(model, image_seq_length), image_seq_length, options)
    if save is not None and box_form(conversation.processor) is None:
        raise ValueError(f"--save: models of {model}'s family write no boxes that could be drawn")
    clips = [(file, _read_video(conversation.processor, file)) for file in videos or []]
    _note(HELP)
    for file, one in [*first, *clips]:
        _add(conversation, file, one)
    _talk(conversation, save)


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
        """Forget all messages, waiting images and videos."""
        self.messages: list[dict] = []
        self.waiting: list[Image.Image | Clip] = []
        self.drawn: Image.Image | None = None  # the last image with the boxes of the last answer, if that has any

    def ask(self, text: str, stop: Event | None = None) -> Iterator[str]:
        """Send a message with the waiting images and videos and yield pieces of the answer.

        The answer is remembered with the marks around boxes, which are not shown, also one that another thread cuts
        short by `stop`; of one that is not read to its end, what was yielded. Where the longest answer would exceed
        the model's positions, nothing counts as sent (ValueError).
        """
        messages = [*self.messages, *user_turn(self.waiting, text)]
        inputs = encode_messages(self.processor, [messages], self.processor_kwargs).to(self.model.device)
        self._check_length(inputs["input_ids"].shape[1])
        yielded = {"type": "text", "text": ""}
        answer = {"role": "assistant", "content": [yielded]}
        self.messages = [*messages, answer]
        self.waiting, self.drawn = [], None
        ids: list[int] = []
        for piece in stream(self.model, self.processor.tokenizer, {**inputs, **self.options}, stop, ids):
            yielded["text"] += piece
            yield piece
        answer["content"] = answer_parts(ids, self.processor)
        self._draw(answer["content"])

    def _draw(self, answer: list[Mapping[str, Any]]) -> None:
        form, images = box_form(self.processor), message_images(self.messages)
        if form and images:
            boxes = form.read("".join(part["text"] for part in answer), *images[-1].size)
            self.drawn = draw_boxes(images[-1], boxes) if boxes else None

    def _check_length(self, length: int) -> None:
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        answer = self.options["max_new_tokens"]
        if most is not None and length + answer > most:
            raise ValueError(
                f"too long: the conversation has {length:,} tokens and the answer may have {answer:,}, the model "
                f"takes {most:,}; start anew, or ask for a shorter answer or fewer tokens per image"
            )


class _Streamer(TextIteratorStreamer):
    """Keeps the ids of the answer, too."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: list[int]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ids = ids

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt:
            self._ids += value.flatten().tolist()
        super().put(value)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict,
    stop: Event | None = None,
    ids: list[int] | None = None,
) -> Iterator[str]:
    """Generate for one prompt in a thread and yield pieces of text; who stops reading stops the generation.

    The ids of the answer are appended to `ids`.
    """
    streamer = _Streamer(tokenizer, [] if ids is None else ids)
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


def _talk(conversation: Conversation, save: str | None) -> None:
    missing = ""
    for line in _lines():
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word in ("/image", "/video"):
            missing = _try_adding(conversation, word[1:], rest.strip())
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
            if save is not None:
                _save(conversation.drawn, Path(save))


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


def _save(drawn: Image.Image | None, path: Path) -> None:
    if drawn is None:
        _note(f"{path}: not written, for the answer has no box of an image")
        return
    with renamed_when_whole(path, keep_suffix=True) as temporary:
        drawn.save(temporary)
    _note(f"{path}: the image with the boxes of the answer")


def _try_adding(conversation: Conversation, kind: str, file: str) -> str:
    """Add an image or a video; what could not be read, if anything."""
    try:
        one = _read_image(file) if kind == "image" else _read_video(conversation.processor, file)
        _add(conversation, file, one)
    except ValueError as error:
        _note(str(error))
        return file or f"the {kind}"
    return ""


def _read_image(file: str) -> Image.Image:
    try:
        return decode_image(Path(file).expanduser().read_bytes())
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{file or '/image'}: cannot be read: {reason}") from error


def _read_video(processor: ProcessorMixin, file: str) -> Clip:
    try:
        return read_clip(processor, file)
    except OSError as error:
        raise ValueError(f"{file or '/video'}: cannot be read: {error.strerror or error}") from error


def _add(conversation: Conversation, file: str, one: Image.Image | Clip) -> None:
    conversation.waiting.append(one)
    if isinstance(one, Clip):
        shown = f"{len(one.frames)} frames of {one.frames.shape[3]}x{one.frames.shape[2]}"
    else:
        shown = f"{one.width}x{one.height}"
    _note(f"{file}: {shown}, goes with the next message")


def _note(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr, flush=True)
