"""A conversation in the browser: several images in a message, streamed answers, a stop that ends the generation.

The page is gradio's, served from this machine alone: no analytics, no fonts or scripts from elsewhere, and a policy
header that keeps the browser from loading any, whatever a model writes. One answer is generated at a time; others
wait in a queue. Each open page has a `Conversation` here; what the browser holds is for the eye only.
"""

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

from ..processing.images import decode_image
from ..processing.sample_error import SampleError
from .demo_page import chat_area, find_examples, gr, notice, start, text_box
from .terminal import Conversation, generation_options, load_model

MOST_NEW_TOKENS = 4096
SECONDS_BETWEEN_UPDATES = 0.1
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
    """Serve the page until the process is interrupted.

    Args:
        model (`str`): hub id or folder of a model with its processor, or the `output_dir` of a training.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): address to listen on, by default this machine's own.
        port (`int`, *optional*, defaults to 7860): port to listen on.
        image_seq_length (`int`, *optional*): tokens per image at the start; the processor's where not given.
        max_new_tokens (`int`, *optional*, defaults to 512): longest answer at the start.
        examples (`str`, *optional*): folder of images to offer; `NAME.txt` beside `NAME.jpg` has the question.

    Raises:
        ValueError: if an option is out of its range, the model cannot be loaded or the folder has no image.
        OSError: if the port is taken.
    """
    generation_options(max_new_tokens, 0.0)
    offered = find_examples(examples) if examples else []
    loaded, processor = load_model(model, image_seq_length)
    demo = Demo(loaded, processor, model)
    page = demo.build(image_seq_length, max_new_tokens, offered)
    start(page, host, port)
    print(f"{page.local_url} (Ctrl-C ends)", flush=True)
    page.block_thread()


@dataclass
class _Talk:
    """What one open page is at."""

    conversation: Conversation
    message: dict[str, Any] = field(default_factory=dict)  # as it was typed, to be given back after an error
    shown: History = field(default_factory=list)  # before that message
    stop: Event | None = None  # of the answer that is awaited


class Demo:
    """The page and what its controls do.

    Args:
        model (`PreTrainedModel`): answers.
        processor (`ProcessorMixin`): has the chat template.
        name (`str`): title of the page.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, name: str):
        self.model = model
        self.processor = processor
        self.name = name
        self._talks: dict[str | None, _Talk] = {}

    def build(
        self, image_seq_length: int | None, max_new_tokens: int, examples: list[dict[str, Any]] | None = None
    ) -> "gr.Blocks":
        """Lay out the page.

        Args:
            image_seq_length (`int`, *optional*): tokens per image at the start.
            max_new_tokens (`int`): longest answer at the start.
            examples (`list[dict]`, *optional*): from [`find_examples`].

        Returns:
            `gr.Blocks`.
        """
        # Uploads are deleted after a day.
        with gr.Blocks(title=self.name, analytics_enabled=False, delete_cache=(3600, 86400), fill_height=True) as page:
            gr.Markdown(
                f"<h1>{html.escape(self.name)}</h1><p>{_parameters(self.model)} on "
                f"{self.model.device.type.upper()} · answers may be wrong</p>",
                elem_classes="title",
            )
            with gr.Row(equal_height=False):
                with gr.Column(scale=4, min_width=320):
                    outputs = chat_area(examples)
                with gr.Column(scale=1, min_width=280):
                    settings = self._settings(image_seq_length, max_new_tokens)
                    clear = gr.Button("New conversation", elem_id="clear")
            self._connect(*outputs, settings, clear)
            page.unload(self.leave)
        return page

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
        taken = message.submit(self.take, [message, chat], outputs, **quick)
        taken.then(self.answer, [chat, *settings], outputs, **{**quick, "concurrency_limit": 1})
        message.stop(self.stop, **quick)
        chat.example_select(_take_example, None, message, **quick)
        gr.on([clear.click, chat.clear], self.clear, None, outputs, **quick)

    def _settings(self, image_seq_length: int | None, max_new_tokens: int) -> list["gr.components.Component"]:
        """Controls of an answer, in the order of the arguments of `answer`."""
        side = getattr(self.model.config, "patches_per_side", None)
        budget = image_seq_length or getattr(self.processor, "image_seq_length", None)
        longest = max(MOST_NEW_TOKENS, max_new_tokens)
        return [
            gr.Dropdown(
                [(f"{n * n} tokens", n * n) for n in range(1, (side or 0) + 1)],
                value=budget,
                label="Tokens per image",
                info="More show finer detail and take longer.",
                visible=side is not None,
                elem_id="budget",
            ),
            gr.Slider(1, longest, max_new_tokens, step=1, label="Max new tokens", elem_id="max-new-tokens"),
            gr.Slider(0, 2, 0, step=0.05, label="Temperature", elem_id="temperature"),
        ]

    def take(self, message: dict[str, Any], history: History, request: gr.Request) -> tuple[Any, Any, Any]:
        """Move a message from the text box to the conversation, if it can be sent.

        Args:
            message (`dict`): text and paths of images.
            history (`list[dict]`): messages shown so far.
            request (`gr.Request`): tells the browser's page.

        Returns:
            `tuple`: text box, messages and notice.
        """
        talk = self._talks.setdefault(request.session_hash, _Talk(Conversation(self.model, self.processor, None, {})))
        text, files = message["text"].strip(), message["files"]
        try:
            if talk.stop is not None:
                raise ValueError("The last answer is still being written: wait for it, or stop it.")
            if not text:
                raise ValueError("Write a question to go with the image." if files else "Write a question.")
            talk.conversation.waiting = [_read_image(file) for file in files]
        except ValueError as error:
            return gr.skip(), gr.skip(), notice(str(error))
        talk.message, talk.shown, talk.stop = {"text": text, "files": files}, history, Event()
        turn = [{"role": "user", "content": content} for content in (*({"path": file} for file in files), text)]
        return text_box(waiting=True), [*history, *turn], notice()

    def answer(
        self,
        history: History,
        image_seq_length: int | None,
        max_new_tokens: int,
        temperature: float,
        request: gr.Request,
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Answer the message that was taken.

        Args:
            history (`list[dict]`): messages shown, the last of them the user's.
            image_seq_length (`int`, *optional*): tokens per image.
            max_new_tokens (`int`): longest answer.
            temperature (`float`): of sampling.
            request (`gr.Request`): tells the browser's page.

        Yields:
            `tuple`: text box, messages with the answer so far, and notice. After an error the message stands in the
            text box again.
        """
        talk = self._talks.get(request.session_hash)
        if talk is None or talk.stop is None:  # nothing was taken, or it was cleared while it waited
            yield gr.skip(), gr.skip(), gr.skip()  # gradio empties what a generator without a value was to fill
            return
        text, shown_at = "", 0.0
        try:
            talk.conversation.set_options(image_seq_length, generation_options(int(max_new_tokens), temperature))
            for piece in talk.conversation.ask(talk.message["text"], talk.stop):
                if self._talks.get(request.session_hash) is not talk:  # cleared: the page shows something else now
                    yield gr.skip(), gr.skip(), gr.skip()
                    return
                text += piece
                # Each update sends and draws all messages: one for every token would keep a browser from its buttons.
                if time.monotonic() - shown_at >= SECONDS_BETWEEN_UPDATES:
                    yield gr.skip(), [*history, {"role": "assistant", "content": text}], gr.skip()
                    shown_at = time.monotonic()
        except Exception as error:  # of the model or its libraries: the page lives on
            logger.warning("no answer", exc_info=not isinstance(error, ValueError))
            talk.stop = None
            yield text_box(value=talk.message), talk.shown, notice(str(error) or type(error).__name__)
            return
        talk.stop = None
        if self._talks.get(request.session_hash) is talk:
            yield text_box(), [*history, {"role": "assistant", "content": text or "(no answer)"}], gr.skip()

    def stop(self, request: gr.Request) -> None:
        """End the answer that a page waits for.

        Args:
            request (`gr.Request`): tells the browser's page.
        """
        talk = self._talks.get(request.session_hash)
        if talk is not None and talk.stop is not None:
            talk.stop.set()

    def leave(self, request: gr.Request) -> None:
        """End the answer that a page waits for and forget its conversation.

        Args:
            request (`gr.Request`): tells the browser's page.
        """
        self.stop(request)
        self._talks.pop(request.session_hash, None)

    def clear(self, request: gr.Request) -> tuple[Any, History, Any]:
        """Begin a new conversation.

        Args:
            request (`gr.Request`): tells the browser's page.

        Returns:
            `tuple`: text box, no messages and no notice.
        """
        self.leave(request)
        return text_box(), [], notice()


def _take_example(event: gr.SelectData) -> dict[str, Any]:
    """Put an example into the text box, to be sent or changed."""
    return {"text": event.value["text"], "files": [file["path"] for file in event.value["files"]]}


def _parameters(model: PreTrainedModel) -> str:
    number = model.num_parameters()
    return f"{number / 1e9:.2f}B parameters" if number >= 1e9 else f"{number / 1e6:.1f}M parameters"


def _read_image(file: str) -> Image.Image:
    try:
        return decode_image(Path(file).read_bytes())
    except SampleError as error:
        raise ValueError(f"{Path(file).name} cannot be read as an image.") from error
