"""Where a model is served, or writes text: what a recipe says of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from topd.errors import TOPDError

OF_TEXT = ("path", "text", "tokenizer", "chat_template")  # keys that go with text
OURS = (  # keys of a request; the text of a stop would be learned as an end
    *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed"),
    *("stream", "echo", "n", "logprobs", "stop", "stop_token_ids", "suffix"),
)


def server_url(url: str) -> str:
    """The URL without a last slash and /v1. Raises ValueError for what is not a server's."""
    return _checked(url).removesuffix("/v1")


def api_url(url: str) -> str:
    """The URL that paths of an OpenAI-style API follow: a host's has /v1, a path is as given.

    Raises ValueError for what is not a server's.

    >>> api_url("http://localhost:8000"), api_url("https://host.example/api/v4/chat/completions")
    ('http://localhost:8000/v1', 'https://host.example/api/v4')
    """
    base = _checked(url).removesuffix("/completions").removesuffix("/chat")
    return base if urlsplit(base).path else f"{base}/v1"


def _checked(url: str) -> str:
    """The URL without a last slash. Raises ValueError for what is not a server's."""
    url = url.strip()
    if "@" in url or "?" in url or "#" in url:  # not shown: it may hold a secret
        raise ValueError(
            "only http://HOST:PORT/PATH is wanted. api_key_env names the variable with a key"
        )
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is not a number
        good = False
    if not good:
        raise ValueError(f"{url!r} is not the URL of a server. Write http://HOST:PORT")
    return url.rstrip("/")


def _urls(change: Callable[[str], str]) -> AfterValidator:
    """Each as ``change`` writes it, and once."""
    return AfterValidator(lambda urls: tuple(dict.fromkeys(map(change, urls))))


_SEVERAL = BeforeValidator(lambda urls: (urls,) if isinstance(urls, str) else urls)
ServerURLs: TypeAlias = Annotated[tuple[str, ...], _SEVERAL, _urls(server_url)]  # one, or several
TextURLs: TypeAlias = Annotated[tuple[str, ...], Field(min_length=1), _SEVERAL, _urls(api_url)]


class ServerSpec(BaseModel):
    """What is said of every kind of server.

    ``model`` is the name to ask for. ``api_key_env`` names the environment variable with the API
    key. A request may take ``timeout`` seconds and is tried ``retries`` times more where a server
    is busy or away; ``concurrency`` of them are under way at once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    place: ClassVar[str] = "served"  # the key in a recipe
    largest: ClassVar[int] = 2 << 30  # bytes of an answer
    errors_of_one: ClassVar[int] = 0  # answers of 500 in a row that may be due to what was asked
    other: ClassVar[str] = "Give the URL of a vLLM server, started as topd serve-teacher does."

    model: str | None = None
    api_key_env: str | None = None
    timeout: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    retries: int = Field(default=3, ge=0)
    concurrency: int = Field(default=64, ge=1)

    @property
    def api_key(self) -> str | None:
        """The API key, without white space around it.

        Raises TOPDError if the environment does not have it, or no request can.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key.isprintable() or any(ord(c) > 0xFF for c in key):  # not shown: it is a secret
            raise TOPDError(
                f"{self.place}.api_key_env: the environment variable {self.api_key_env} holds "
                "characters that no request can carry (control characters, or none of Latin-1). "
                "Put the servers' API key there, and nothing else."
            )
        if not key:
            raise TOPDError(
                f"{self.place}.api_key_env: the environment variable {self.api_key_env} is not "
                "set. Put the servers' API key there."
            )
        return key


class ServedSpec(ServerSpec):
    """vLLM servers of a model, as ``topd serve-teacher`` starts them.

    ``completions`` are the URLs of servers that write and tell log-probs, ``pooling`` of those that
    give last hidden states; several of a kind share the load. ``model`` is needed where it is not
    the recipe's path. A student's servers take its weights from the folder ``weights``, which they
    share with the training. Log-probs of a probe may differ by ``tolerance`` nats a token, in the
    mean; with ``check_whole`` they are also compared with those of the whole model, which is read
    once for that. See :class:`ServerSpec` for the rest.
    """

    completions: ServerURLs
    pooling: ServerURLs = ()
    weights: str | None = None
    tolerance: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    check_whole: bool = False

    @field_validator("completions")
    @classmethod
    def _some(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        if not urls:
            raise ValueError("no server. Give its URL, e.g. http://127.0.0.1:8000")
        return urls


class TextSpec(ServerSpec):
    """Servers of an OpenAI-style completions API, which continue a text.

    ``url`` is where they are, one or several: of a host, or with the path of its API; ``model`` the
    name to ask for. ``chat``: ask ``/chat/completions``, with the text so far as the beginning of
    the assistant's message, which is what a server without completions needs. ``limit`` is what it
    calls the most tokens that it may write. ``extra`` is sent with every request, e.g.
    ``{top_k: -1}``; what is None there is not sent, ``seed`` too. ``logprobs``: it tells those of a
    prompt's tokens (``echo``), and splits a text as the student's tokenizer does. See
    :class:`ServerSpec` for the rest.
    """

    place: ClassVar[str] = "text"
    other: ClassVar[str] = (
        "teacher.text wants the URL of an OpenAI-style completions server and the name of a model "
        "there."
    )
    largest: ClassVar[int] = 64 << 20
    errors_of_one: ClassVar[int] = 8  # llama.cpp: text that its parser of chats cannot read

    url: TextURLs
    chat: bool = False
    logprobs: bool = False
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _no_chat(self) -> TextSpec:
        if self.limit != "max_tokens" and not self.chat:
            raise ValueError(
                f"limit: {self.limit} is a name of chat APIs. Set chat: true, or leave limit out"
            )
        if self.chat and self.logprobs:
            raise ValueError(
                "logprobs: no chat API tells those of a prompt. Leave chat out, or logprobs"
            )
        return self

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for name in OURS:
            if name in extra and (name, extra[name]) != ("seed", None):
                raise ValueError(f"{name} is set by TOPD. Leave it out")
        return extra


class ByText(BaseModel):
    """The part of a model's spec that says that it is asked for text alone.

    ``text`` says where such a teacher is; no ``path`` is needed then. ``as_text`` has a teacher in
    this process write text too, so that its vocabulary may be another than the student's.
    """

    text: TextSpec | None = None
    as_text: bool = False

    @model_validator(mode="before")
    @classmethod
    def _named(cls, content: Any) -> Any:
        """A teacher at a URL is called by its model: a run may continue where its place changed."""
        text = content.get("text") if isinstance(content, dict) else None
        if text is None or "path" in content:
            return content
        known = text if isinstance(text, dict) else dict(text)
        return {**content, "path": str(known.get("model") or "a model behind a URL")}

    @model_validator(mode="after")
    def _nothing_else(self) -> ByText:
        """Of a teacher at a URL no weights are read."""
        if self.text is not None:
            for name, field in type(self).model_fields.items():
                if name not in OF_TEXT and getattr(self, name) != field.default:
                    raise ValueError(f"{name} has no effect with text. Leave it out")
        if self.as_text and getattr(self, "served", None) is not None:
            raise ValueError(
                "as_text is for a model in this process. Name the servers in text: {url: ...}"
            )
        return self

    @property
    def by_text(self) -> bool:
        """Whether nothing but text is asked of the model."""
        return self.text is not None or self.as_text
