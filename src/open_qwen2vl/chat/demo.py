"""A conversation in the browser: several images in a message, streamed answers, a stop that ends the generation.

The page is gradio's, served from this machine alone: no analytics, no fonts or scripts from elsewhere, and a policy
header that keeps the browser from loading any, whatever a model writes. One answer is generated at a time; a few
others wait in a queue. Each open page has a `Conversation` here, with shrunk images, until it is closed or idle. What
the browser holds is for the eye only: no message and no path of an example is ever taken from it.
"""

import copy
import html
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..data.storage.tars import VIDEO_EXTENSIONS
from ..evaluation.clips import Clip, read_clip
from ..processing.images import decode_image
from ..processing.sample_error import SampleError
from .demo_page import chat_area, conversation, find_examples, gr, notice, picture, start, text_box
from .terminal import Conversation, generation_options, load_model

MOST_NEW_TOKENS = 4096
SECONDS_BETWEEN_UPDATES = 0.1
IMAGE_SIDE = 1536  # a kept image's longest: 7 MB of pixels at most
MOST_TALKS = 64  # conversations that are kept
IDLE_SECONDS = 3600
MOST_WAITING = 8  # questions, the one that is being answered included
logger = logging.getLogger(__name__)

History = list[dict[str, Any]]  # messages as gradio's chatbot shows them


def serve_demo(
    model: str,
    host: str = "127.0.0.1",
    port: int = 7860,
    image_seq_length: int | None = None,
    max_new_tokens: int = 512,
    examples: str | None = None,
) -> None:
    """Serve the page until the process is interrupted. `NAME.txt` in `examples` has the question on `NAME.jpg`."""
    generation_options(max_new_tokens, 0.0)
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port must be within 0 and 65535, got {port}")
    offered = find_examples(examples) if examples else []
    loaded, processor = load_model(model, image_seq_length)
    demo = Demo(loaded, processor, model)
    page = demo.build(image_seq_length, max_new_tokens, offered)
    start(page, host, port)
    print(f"{page.local_url} (Ctrl-C ends)", flush=True)
    try:
        Event().wait()  # gradio's own way takes Ctrl-C for a good end
    finally:
        page.close(verbose=False)


@dataclass
class _Talk:
    """What one open page is at."""

    conversation: Conversation
    message: dict[str, Any] = field(default_factory=dict)  # as it was typed, to be given back after an error
    shown: History = field(default_factory=list)  # what the page shows, without the answer that is awaited
    stop: Event | None = None  # of that answer
    used: float = field(default_factory=time.monotonic)


class Demo:
    """The page and what its controls do."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, name: str):
        self.model = model
        self.processor = processor
        self.name = name
        self._talks: dict[str | None, _Talk] = {}

    def build(
        self, image_seq_length: int | None, max_new_tokens: int, examples: list[dict[str, Any]] | None = None
    ) -> "gr.Blocks":
        """Lay out the page, with examples from [`find_examples`]."""
        # Uploads are deleted after a day.
        with gr.Blocks(title=self.name, analytics_enabled=False, delete_cache=(3600, 86400), fill_height=True) as page:
            gr.Markdown(
                f"<h1>{html.escape(self.name)}</h1><p>{_parameters(self.model)} on "
                f"{self.model.device.type.upper()} · answers may be wrong</p>",
                elem_classes="title",
            )
            with gr.Row(equal_height=False):
                with gr.Column(scale=4, min_width=320):
                    self._examples = examples or []
                    outputs = chat_area(copy.deepcopy(examples))  # gradio writes into them
                with gr.Column(scale=1, min_width=280):
                    settings = self._settings(image_seq_length, max_new_tokens)
                    clear = gr.Button("New conversation", elem_id="clear")
            self._connect(*outputs, settings, clear)
            page.unload(self.leave)
        # Questions are bounded by `take`; this bounds whatever else a browser may send.
        return page.queue(max_size=16 * MOST_WAITING)

    def _connect(
        self,
        message: "gr.MultimodalTextbox",
        chat: "gr.Chatbot",
        trouble: "gr.Markdown",
        settings: list["gr.components.Component"],
        clear: "gr.Button",
    ) -> None:
        """Say what each control does. Only answers wait for each other."""
        outputs = [message, chat, trouble]
        quick = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
        # The chat is an output only: what a browser says was in it could name any file of this machine.
        taken = message.submit(self.take, message, outputs, **quick)
        taken.then(self.answer, settings, outputs, **{**quick, "concurrency_limit": 1})
        message.stop(self.stop, **quick)
        chat.example_select(self.take_example, None, message, **quick)
        gr.on([clear.click, chat.clear], self.clear, None, outputs, **quick)

    def _settings(self, image_seq_length: int | None, max_new_tokens: int) -> list["gr.components.Component"]:
        """Controls of an answer, in the order of the arguments of `answer`."""
        side = getattr(self.model.config, "patches_per_side", None)  # of models with a budget for each image
        budget = image_seq_length or getattr(self.processor, "image_seq_length", None)
        self._longest = max(MOST_NEW_TOKENS, max_new_tokens)
        return [
            gr.Dropdown(
                [(f"{n * n} tokens", n * n) for n in range(1, (side or 0) + 1)],
                value=budget,
                label="Tokens per image",
                info="More show finer detail and take longer.",
                visible=side is not None,
                elem_id="budget",
            ),
            gr.Slider(1, self._longest, max_new_tokens, step=1, label="Max new tokens", elem_id="max-new-tokens"),
            gr.Slider(0, 2, 0, step=0.05, label="Temperature", elem_id="temperature"),
        ]

    def take(self, message: dict[str, Any], request: gr.Request) -> tuple[Any, Any, Any]:
        """Move a message (text and paths of uploads) to the conversation, if it can be sent; else it stays unsent.

        Returns the text box, the messages to show and the notice.
        """
        self._drop_idle()
        talk = self._talks.setdefault(request.session_hash, _Talk(Conversation(self.model, self.processor, None, {})))
        talk.used = time.monotonic()
        text, files = message["text"].strip(), message["files"]
        try:
            if talk.stop is not None:
                raise ValueError("The last answer is still being written: wait for it, or stop it.")
            if not text:
                raise ValueError("Write a question to go with the image." if files else "Write a question.")
            if sum(other.stop is not None for other in list(self._talks.values())) >= MOST_WAITING:
                raise ValueError("Too many questions wait for their answers: send it again in a while.")
            talk.conversation.waiting = [self._read(file) for file in files]
        except ValueError as error:
            return gr.skip(), gr.skip(), notice(str(error))
        talk.message, talk.stop = {"text": text, "files": files}, Event()
        turn = [{"role": "user", "content": content} for content in (*({"path": file} for file in files), text)]
        talk.shown = [*talk.shown, *turn]
        return text_box(waiting=True), conversation(talk.shown), notice()

    def answer(
        self, image_seq_length: int | None, max_new_tokens: int, temperature: float, request: gr.Request
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Answer the message that was taken; after an error it stands in the text box again, unsent.

        Yields the text box, the messages to show with the answer so far, and the notice.
        """
        talk = self._talks.get(request.session_hash)
        if talk is None or talk.stop is None:  # nothing was taken, or it was cleared while it waited
            yield gr.skip(), gr.skip(), gr.skip()  # gradio empties what a generator without a value was to fill
            return
        text, shown_at = "", 0.0
        try:
            limit = min(int(max_new_tokens), self._longest)
            talk.conversation.set_options(image_seq_length, generation_options(limit, temperature))
            for piece in talk.conversation.ask(talk.message["text"], talk.stop):
                if self._talks.get(request.session_hash) is not talk:
                    break
                text += piece
                # Each update sends and draws all messages: one for every token would keep a browser from its buttons.
                if time.monotonic() - shown_at >= SECONDS_BETWEEN_UPDATES:
                    yield gr.skip(), [*talk.shown, {"role": "assistant", "content": text}], gr.skip()
                    shown_at = time.monotonic()
        except Exception as error:  # of the model or its libraries: the page lives on
            logger.warning("no answer", exc_info=not isinstance(error, ValueError))
            talk.shown = talk.shown[: -len(talk.message["files"]) - 1]
            talk.conversation.waiting = []
            yield text_box(value=talk.message), conversation(talk.shown), notice(str(error) or type(error).__name__)
            return
        finally:
            talk.stop, talk.used = None, time.monotonic()
        current = self._talks.get(request.session_hash)
        if current is not talk:  # cleared, and an earlier update may have come to the page after the clearing
            yield gr.skip(), conversation(current.shown if current else []), gr.skip()
        else:
            drawn = talk.conversation.drawn  # the image with the boxes of the answer, where it has any
            contents = [text or "(no answer)", *([picture(drawn)] if drawn else [])]
            talk.shown = [*talk.shown, *({"role": "assistant", "content": content} for content in contents)]
            yield text_box(), talk.shown, gr.skip()

    def take_example(self, event: gr.SelectData) -> dict[str, Any]:
        """Put an example into the text box, to be sent or changed; the browser says only which."""
        return self._examples[event.index if isinstance(event.index, int) else event.index[0]]

    def _drop_idle(self) -> None:
        """Forget conversations that nobody comes back to, the longest idle first."""
        talks = sorted(self._talks.items(), key=lambda entry: entry[1].used)
        surplus = len(talks) - MOST_TALKS + 1
        for number, (session, talk) in enumerate(talks):
            if talk.stop is None and (number < surplus or time.monotonic() - talk.used > IDLE_SECONDS):
                self._talks.pop(session, None)

    def stop(self, request: gr.Request) -> None:
        """End the answer that a page waits for."""
        talk = self._talks.get(request.session_hash)
        if talk is not None and talk.stop is not None:
            talk.stop.set()

    def leave(self, request: gr.Request) -> None:
        """End the answer that a page waits for and forget its conversation."""
        self.stop(request)
        self._talks.pop(request.session_hash, None)

    def _read(self, file: str) -> Image.Image | Clip:
        """An upload, which its name says is a video or not."""
        if Path(file).suffix[1:].lower() not in VIDEO_EXTENSIONS:
            return _read_image(file)
        try:
            return read_clip(self.processor, file)
        except (ValueError, OSError) as error:
            # Its cause, which does not name the folder of the uploads.
            raise ValueError(f"{Path(file).name} cannot be shown as a video: {error.__cause__ or error}") from error

    def clear(self, request: gr.Request) -> tuple[Any, Any, Any]:
        """Begin a new conversation: text box, no messages, no notice."""
        self.leave(request)
        return text_box(), conversation([]), notice()


def _parameters(model: PreTrainedModel) -> str:
    number = model.num_parameters()
    return f"{number / 1e9:.2f}B parameters" if number >= 1e9 else f"{number / 1e6:.1f}M parameters"


def _read_image(file: str) -> Image.Image:
    try:
        image = decode_image(Path(file).read_bytes(), min_size=(IMAGE_SIDE, IMAGE_SIDE))
    except (SampleError, OSError) as error:
        raise ValueError(f"{Path(file).name} cannot be read as an image.") from error
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    return image
