"""An endpoint of OpenAI's form (`/v1/chat/completions`): that of vLLM, of `transformers serve`, or of a service.

Connections, retries with backoff and `Retry-After` are those of the package `openai`; the key is what `OPENAI_API_KEY`
says, and stands in no message. What is wrong with the endpoint ends the work, what is wrong with one request is its
own: [`EndpointError`] and [`AnswerError`].
"""

import base64
import io
import os
import threading
from typing import Any, NamedTuple
from urllib.parse import urlsplit

RETRIES = 5  # of a request that failed on its way, was turned away (429) or met a fault of the server (5xx)
TIMEOUT = 600.0  # seconds until an answer
MOST_REFUSED = 20  # requests one after the other that may have no answer, before the endpoint is to blame


class Answer(NamedTuple):
    """What an endpoint answered."""

    text: str
    is_whole: bool  # False where it ends for want of tokens


class EndpointError(ValueError):
    """The endpoint cannot be used: it is not there, or refuses everything."""


class AnswerError(Exception):
    """One request has no answer; `reason` is `refused_request` or `bad_answer`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class Endpoint:
    """Asks one model of an endpoint; may be called by several threads at a time."""

    def __init__(self, url: str, model: str | None = None, retries: int = RETRIES, timeout: float = TIMEOUT):
        """`url` ends where `/chat/completions` begins, as `http://host:8000/v1`; `model` is its only one if None.

        Raises:
            EndpointError: if no model is named and the endpoint does not list exactly one.
        """
        try:
            import openai
        except ImportError as error:
            raise ValueError('--endpoint needs openai: pip install "open-qwen2vl[curate]"') from error
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            raise ValueError(f"--endpoint {url}: must begin with http:// or https://")
        if "@" in parts.netloc or "=" in parts.query:
            shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
            raise ValueError(
                f"--endpoint {shown}: the URL holds a user or a key, which would stand in results and logs: set "
                "OPENAI_API_KEY"
            )
        self._key = os.environ.get("OPENAI_API_KEY") or "no-key-is-set"  # a server of one's own asks for none
        self._client = openai.OpenAI(base_url=url, api_key=self._key, max_retries=retries, timeout=timeout)
        self._errors, self._url = openai, url
        self._lock = threading.Lock()
        self._refused = 0  # requests since the last answer
        self.model = model or self._only_model()

    def _only_model(self) -> str:
        try:
            names = [model.id for model in self._client.models.list().data]
        except self._errors.APIConnectionError as error:
            raise EndpointError(f"--endpoint {self._url}: {self._shown(error.__cause__ or error)}") from error
        except (AttributeError, TypeError) as error:
            reason = "its answer is no list of models in OpenAI's form"
            raise EndpointError(f"--endpoint {self._url}: {reason}; --endpoint-model names one") from error
        except (self._errors.OpenAIError, ValueError) as error:
            reason = f"it does not list its models ({self._shown(error)})"
            raise EndpointError(f"--endpoint {self._url}: {reason}; --endpoint-model names one") from error
        if len(names) != 1:
            listed = f"{len(names)} models ({', '.join(names[:8])})" if names else "no model"
            raise EndpointError(f"--endpoint {self._url} lists {listed}: --endpoint-model names one")
        return names[0]

    def ask(self, messages: list[dict[str, Any]], **settings: Any) -> Answer:
        """The answer to messages of OpenAI's form; `settings` are those of the request, as `temperature`.

        Raises:
            EndpointError: if it cannot be reached, does not know the key or the model, still has a fault after all
                retries, or has given no answer to `MOST_REFUSED` requests one after the other.
            AnswerError: if it refuses this request (400, 413, 422), or what it gives back is no answer.
        """
        openai = self._errors
        try:
            completion = self._client.chat.completions.create(model=self.model, messages=messages, **settings)
            return self._read(completion)
        except openai.APIStatusError as error:
            if error.status_code in (400, 413, 422):
                raise self._no_answer("refused_request", self._shown(error)) from error
            raise EndpointError(f"--endpoint {self._url}: {self._shown(error)}") from error
        except openai.APIConnectionError as error:
            raise EndpointError(f"--endpoint {self._url}: {self._shown(error.__cause__ or error)}") from error
        except (openai.OpenAIError, ValueError, AttributeError, TypeError, IndexError) as error:
            if isinstance(error, EndpointError):
                raise
            is_another = isinstance(error, AttributeError | IndexError)  # what they say is about our own code
            detail = "its answer is not of OpenAI's form" if is_another else self._shown(error)
            raise self._no_answer("bad_answer", f"no chat completion: {detail}") from error

    def _read(self, completion: Any) -> Answer:
        choice = completion.choices[0]
        text = choice.message.content
        if not isinstance(text, str):
            raise TypeError(f"its content is a {type(text).__name__}")
        with self._lock:
            self._refused = 0
        return Answer(text, choice.finish_reason != "length")

    def _no_answer(self, reason: str, detail: str) -> Exception:
        with self._lock:
            self._refused += 1
            if self._refused < MOST_REFUSED:
                return AnswerError(reason, detail)
        return EndpointError(
            f"--endpoint {self._url}: no answer to {MOST_REFUSED} requests one after the other, the last one: {detail}"
        )

    def _shown(self, error: BaseException) -> str:
        """An error in one line, without the key, which some servers name."""
        return " ".join(f"{type(error).__name__}: {error}".replace(self._key, "KEY").split())[:500]


def image_part(image: Any) -> dict[str, Any]:
    """A part of a message that shows an image: the bytes of a JPEG, PNG or WebP file, or a picture of Pillow."""
    if isinstance(image, bytes):
        kind = "png" if image[:4] == b"\x89PNG" else "webp" if image[8:12] == b"WEBP" else "jpeg"
    else:
        buffer, kind = io.BytesIO(), "png"
        image.save(buffer, "PNG")
        image = buffer.getvalue()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(image).decode()}"}}
