"""Options of the commands `chat` and `demo`."""

from dataclasses import dataclass

from ..options import option

_MODEL = "hub id or folder of a model, or a training's output_dir"


@dataclass(frozen=True)
class ChatOptions:
    """The options of `open-qwen2vl chat`."""

    model: str = option(help=_MODEL, positional=True, metavar="MODEL")
    image: tuple[str, ...] | None = option(
        None, help="image of the first message; may be repeated", metavar="FILE", form="repeated"
    )
    video: tuple[str, ...] | None = option(
        None, help="video of the first message, for Qwen2-VL; may be repeated", metavar="FILE", form="repeated"
    )
    image_seq_length: int | None = option(None, help="tokens per image (default: the processor's)", metavar="N")
    max_new_tokens: int = option(512, help="longest answer", metavar="N")
    temperature: float = option(0.0, help="of sampling; 0 takes the likeliest token", metavar="X")
    save: str | None = option(
        None, help="image to draw the boxes of the newest answer on, of the last image of the conversation",
        metavar="FILE.png"
    )  # fmt: skip


@dataclass(frozen=True)
class DemoOptions:
    """The options of `open-qwen2vl demo`."""

    model: str = option(help=_MODEL, positional=True, metavar="MODEL")
    host: str = option("127.0.0.1", help="address to listen on; 0.0.0.0 lets others in", metavar="HOST")
    port: int = option(7860, help="port to listen on", metavar="N")
    image_seq_length: int | None = option(
        None, help="tokens per image at the start (default: the processor's)", metavar="N"
    )
    max_new_tokens: int = option(512, help="longest answer at the start", metavar="N")
    examples: str | None = option(
        None, help="images to offer; FILE.txt beside an image has the question to ask of it", metavar="DIR"
    )
