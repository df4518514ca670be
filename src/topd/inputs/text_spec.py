"""A teacher that gives only text: what a recipe says of it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from topd.inputs.served import ServerSpec, api_url

OF_TEXT = ("path", "text", "tokenizer", "chat_template")
OURS = (
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "seed",
    "stream",
    "echo",
    "n",
    "logprobs",
    "stop",  # its text would be learned as an end
    "stop_token_ids",
    "suffix",
)


class TextSpec(ServerSpec):
    """Servers of an OpenAI-style completions API, which continue a text.

    ``url`` is where they are, one or several: of a host, or with the path of its API; ``model`` the
    name to ask for. ``chat``: ask ``/chat/completions``, with the text so far as the beginning of
    the assistant's message, which is what a server without completions needs. ``limit`` is what it
    calls the most tokens that it may write. ``extra`` is sent with every request, e.g.
    ``{top_k: -1}``. ``logprobs``: it tells those of a prompt's tokens (``echo``), and splits a text
    as the student's tokenizer does. See :class:`~topd.inputs.served.ServerSpec` for the rest.
    """

    place: ClassVar[str] = "text"
    other: ClassVar[str] = (
        "teacher.text wants the URL of an OpenAI-style completions server and the name of a model "
        "there."
    )
    largest: ClassVar[int] = 64 << 20

    url: tuple[str, ...] = Field(min_length=1)
    chat: bool = False
    logprobs: bool = False
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra: dict[str, Any] = Field(default_factory=dict)

    @field_validator("url", mode="before")
    @classmethod
    def _several(cls, urls: Any) -> Any:
        """A single URL stands for a list of it."""
        return (urls,) if isinstance(urls, str) else urls

    @field_validator("url")
    @classmethod
    def _urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(api_url(url) for url in urls))

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
            if name in extra:
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
