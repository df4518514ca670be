"""Where a model is served: what a recipe says of it."""

from __future__ import annotations

import os
from typing import Any, ClassVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from topd.errors import TOPDError


class ServerSpec(BaseModel):
    """What is said of every kind of server.

    ``model`` is the name to ask for. ``api_key_env`` names the environment variable with the API
    key. A request may take ``timeout`` seconds and is tried ``retries`` times more where a server
    is busy or away; ``concurrency`` of them are under way at once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    place: ClassVar[str] = "served"  # the key in a recipe
    largest: ClassVar[int] = 2 << 30  # bytes of an answer
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
    give last hidden states; several of a kind share the load. ``model`` is the name to ask for,
    where it is not that of the recipe's path. A student's servers take its weights from the folder
    ``weights``, which they share with the training. Log-probs of a
    probe may differ by ``tolerance`` nats a token, in the mean; with ``check_whole`` they are also
    compared with those of the whole model, which is read once for that. See :class:`ServerSpec` for
    the rest.
    """

    completions: tuple[str, ...]
    pooling: tuple[str, ...] = ()
    weights: str | None = None
    tolerance: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    check_whole: bool = False

    @field_validator("completions", "pooling", mode="before")
    @classmethod
    def _several(cls, urls: Any) -> Any:
        """A single URL stands for a list of it."""
        return (urls,) if isinstance(urls, str) else urls

    @field_validator("completions", "pooling")
    @classmethod
    def _urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(server_url(url) for url in urls))

    @field_validator("completions")
    @classmethod
    def _some(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        if not urls:
            raise ValueError("no server. Give its URL, e.g. http://127.0.0.1:8000")
        return urls


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
