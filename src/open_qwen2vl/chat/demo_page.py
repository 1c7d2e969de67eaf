"""How the demo's page looks and how it is served: from this machine alone, with nothing from elsewhere."""

import html
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

try:
    import gradio as gr
except ImportError as error:
    raise ValueError('the demo needs gradio: pip install "open-qwen2vl[demo]"') from error

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# gradio's page has inline scripts and styles; nothing may come from, or go to, another machine.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    "frame-ancestors 'self'"
)
STYLE = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
.title h1 { margin: .2rem 0 0; font-size: 1.5rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
.title p { margin: .15rem 0 0; opacity: .7; font-size: .9rem; }
.notice { padding: .6rem .9rem !important; border-radius: 8px; background: #fbe9e7; color: #8c1d18; }
.notice * { color: inherit !important; }
.empty { padding: 1rem; text-align: center; }
.empty p { opacity: .7; }
#chat .message-buttons-right { display: none; }
@media (max-width: 720px) { .gradio-container main { padding: .6rem !important; } }
"""
EMPTY = (
    '<div class="empty"><h2>Ask about an image</h2>'
    "<p>Add one or more with the paper clip, by drag and drop or by pasting.</p></div>"
)


def start(page: "gr.Blocks", host: str, port: int | None) -> None:
    """Start serving a page, in threads of its own, on any free port where `port` is None; OSError if it is taken."""
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        show_error=True,
        max_file_size="64mb",
        footer_links=[],
        ssr_mode=False,
        quiet=True,
        theme=gr.themes.Default(
            primary_hue="blue", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
        ),
        css=STYLE,
        app_kwargs={"middleware": [Middleware(_Guard, host=host)]},
    )


def find_examples(folder: str) -> list[dict[str, Any]]:
    """Images of a folder with their questions, as gradio's chatbot takes examples; ValueError if there is none."""
    images = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"--examples {folder}: no image there ({', '.join(IMAGE_SUFFIXES)})")
    examples = []
    for image in images:
        question = image.with_suffix(".txt")
        text = question.read_text(encoding="utf-8").strip() if question.exists() else "What is shown in the image?"
        examples.append({"text": text, "files": [str(image)]})
    return examples


def chat_area(
    examples: list[dict[str, Any]] | None,
) -> tuple["gr.MultimodalTextbox", "gr.Chatbot", "gr.Markdown"]:
    """Lay out the conversation: text box, messages, and the notice between them."""
    chat = gr.Chatbot(
        show_label=False,
        label="Conversation",
        height="62vh",
        min_height=320,
        placeholder=EMPTY,
        examples=examples or None,
        autoscroll=False,  # many examples would be shown from their end; a conversation scrolls
        # What a model writes is shown as it is: no HTML, no images that it names.
        render_markdown=False,
        buttons=["copy"],
        allow_file_downloads=False,
        elem_id="chat",
    )
    trouble = gr.Markdown(visible=False, elem_id="notice", elem_classes="notice")
    message = gr.MultimodalTextbox(
        file_types=["image", "video"],
        file_count="multiple",
        placeholder="Ask something",
        show_label=False,
        label="Message",
        max_lines=8,
        autofocus=True,
        elem_id="message",
    )
    return message, chat, trouble


def text_box(waiting: bool = False, value: dict[str, Any] | None = None) -> "gr.MultimodalTextbox":
    """The text box with another state: a stop button while an answer is awaited, and a message to begin with."""
    return gr.MultimodalTextbox(value=value, submit_btn=not waiting, stop_btn=waiting)


def conversation(messages: list[dict[str, Any]]) -> "gr.Chatbot":
    """The chat with other messages, which scrolls to the last of them; the examples where there are none."""
    return gr.Chatbot(value=messages, autoscroll=bool(messages))


def picture(image: Image.Image) -> dict[str, str]:
    """An image as content of a message; its file lies among the uploads, which are deleted after a day."""
    return {"path": gr.processing_utils.save_pil_to_cache(image, gr.utils.get_upload_folder(), format="png")}


def notice(text: str = "") -> "gr.Markdown":
    """What went wrong, between conversation and text box; nothing without a text."""
    return gr.Markdown(value=f'<div role="alert">{html.escape(text)}</div>', visible=bool(text))


class _Guard:
    """Adds the policy to every response; on loopback it refuses what another site's page sends (DNS rebinding).

    Such a page reaches this server under its own name, which stands in `Host` and `Origin`.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], host: str):
        self.app = app
        self.names = {*LOOPBACK, host} if host in LOOPBACK or host.startswith("127.") else None

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def send_with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        if scope["type"] in ("http", "websocket") and not self._may(scope["headers"]):
            if scope["type"] == "http":
                await PlainTextResponse("a page of another site asked", 403)(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        await self.app(scope, receive, send_with_policy)

    def _may(self, headers: list[tuple[bytes, bytes]]) -> bool:
        if self.names is None:
            return True
        hosts = ["//" + value.decode("latin-1") for name, value in headers if name == b"host"]
        origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
        return bool(hosts) and all(_host_name(url) in self.names for url in (*hosts, *origins))


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
