"""What the scorer `mlm-filter` asks: the wording of each metric, and the model's chat template around it.

A prompt is cut in two. The head ends at the last special token before the text (that of the image, in most templates):
no text can change it, so the processor makes it, with the image, once for all metrics. The tail is tokenised alone,
and special tokens' strings in it, as a caption may have them, stay text.
"""

import functools
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import BatchFeature

from ...options import load_yaml
from .score_tokens import ScoreTokens

PAIR, CONVERSATION = "{caption}", "{conversation}"
_SHIPPED = {PAIR: "prompts.yaml", CONVERSATION: "conversation_prompts.yaml"}
_TEXT = "\ue000"  # private use: stands for a user's text to see where the chat template puts it


class ChatPrompts:
    """How a processor's chat template lays out one turn of a user, an image and a text; or a `ValueError`."""

    def __init__(self, processor: Any):
        self._processor, self._tokenizer = processor, processor.tokenizer
        template = processor.chat_template or self._tokenizer.chat_template
        self._template = template.get("default") if isinstance(template, dict) else template
        if not self._template:
            raise ValueError("it has no chat template, without which it cannot be asked")
        tokenizer = self._tokenizer
        self.pad = next((id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id) if id is not None), 0)
        prompt = self._render([{"type": "image"}, {"type": "text", "text": _TEXT}])
        self._head = self._until_text(prompt)
        if self._head == self._until_text(self._render([{"type": "text", "text": _TEXT}])):
            raise ValueError("its chat template does not put the image before the text")
        self._head_ids = tokenizer(self._head, add_special_tokens=False)["input_ids"]
        self._prompt = prompt

    @functools.cached_property
    def score_tokens(self) -> ScoreTokens:
        """The numbers 0 to 100 behind a prompt; a `ValueError` if the tokenizer cannot write them."""
        return ScoreTokens(self._tokenizer, self._prompt)

    def head(self, images: list[Image.Image]) -> BatchFeature:
        """The processor's output for the beginning of each prompt, one image each, padded at the left."""
        bos = self._tokenizer.bos_token
        return self._processor(
            images=[[image] for image in images],
            text=[self._head] * len(images),
            add_special_tokens=not (bos and self._head.startswith(bos)),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )

    def tails(self, texts: list[str]) -> list[list[int]]:
        """Ids of the rest of each prompt, up to the answer; a `ValueError` if a text changes what stands before."""
        content = [[{"type": "image"}, {"type": "text", "text": text}] for text in texts]
        prompts = self._tokenizer.apply_chat_template(
            [[{"role": "user", "content": own}] for own in content],
            chat_template=self._template,
            add_generation_prompt=True,
            return_dict=False,
            sanitize_control_tokens=True,
        )
        start = len(self._head_ids)
        if any(ids[:start] != self._head_ids for ids in prompts):
            raise ValueError("the chat template puts something of the text before the image")
        return [ids[start:] for ids in prompts]

    def _render(self, content: list[dict[str, str]]) -> str:
        return self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._template,
            add_generation_prompt=True,
            tokenize=False,
        )

    def _until_text(self, prompt: str) -> str:
        tokens = [token.content for token in self._tokenizer.added_tokens_decoder.values()]
        tokens = sorted((token for token in tokens if not token.isspace()), key=len, reverse=True)
        before = prompt[: prompt.index(_TEXT)]
        return before[
            : max((match.end() for match in re.finditer("|".join(map(re.escape, tokens)), before)), default=0)
        ]


def read_prompts(path: str | None, metrics: Sequence[str], about: str = PAIR) -> dict[str, str]:
    """The texts of metrics (or `("all",)`) of a YAML file, or of ours; a `ValueError` names file and key.

    `about` is what stands in each for what is asked about: `PAIR` or `CONVERSATION`.
    """
    file = Path(path) if path is not None else files(__package__) / _SHIPPED[about]
    where = f"--prompts {path}" if path is not None else _SHIPPED[about]
    content = load_yaml(f"{where}: not a YAML file", file)
    texts = content.get("metrics") if isinstance(content, dict) else None
    if not isinstance(texts, dict) or not texts:
        raise ValueError(f"{where}: needs the key metrics with a text for each metric")
    for name, text in texts.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", str(name)) or name == "all":
            raise ValueError(f"{where}: metrics.{name}: a metric's name has letters, digits, _ and - and is not 'all'")
        if not isinstance(text, str) or about not in text:
            raise ValueError(f"{where}: metrics.{name}: must be a text with {about} in it")
    chosen = list(texts) if list(metrics) == ["all"] else list(dict.fromkeys(metrics))
    unknown = [name for name in chosen if name not in texts]
    if unknown or not chosen:
        raise ValueError(
            f"--metric {', '.join(unknown)}: {where} has {', '.join(map(str, texts))}, or all of them: all"
        )
    return {str(name): texts[name] for name in chosen}
