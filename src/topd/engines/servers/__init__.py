"""Servers of one model behind HTTP: where they are, and requests that survive the loss of some."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import requests
from requests.adapters import HTTPAdapter
from transformers.utils import logging
from urllib3 import BaseHTTPResponse
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError, InvalidHeader
from urllib3.util import Retry

from topd.errors import UNREACHABLE, StoppedError, TOPDError
from topd.inputs.served import ServerSpec

logger = logging.get_logger(__name__)
T = TypeVar("T")

BUSY = (408, 429, 500, *range(502, 505), *range(520, 530))  # answers that a later try may better
OF_ONE = (400, 403, 413, 422, 451)  # answers that may concern what was asked, and nothing else
CONNECT = 10.0  # seconds
PIECE = 1 << 16  # bytes read at a time
UNSUSPECTED, UNPACKED = 64 << 20, 50  # beyond so many bytes: at most so many for each that was sent
PROBES = {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 60, "TCP_KEEPCNT": 5}
KEY = "Put its API key into an environment variable and name that in {}.api_key_env."


class RefusedError(TOPDError):
    """A request that a server does not answer, although it may answer others."""


class FailedError(RefusedError):
    """A request that a server answers with 500; another one may answer it."""


class Request(NamedTuple):
    """A path and the JSON to post there. Requests of one ``group`` go to one server."""

    path: str
    body: dict[str, Any]
    group: int | None = None


class Servers:
    """Equal servers. A request goes where fewest are under way; a server that fails is left out.

    Args:
        name: what messages call them.
        urls: where they are.
        served: key, time limit, tries.

    ``names`` are those of the model, by URL, for requests that name none.

    Every method that sends raises TOPDError where a server refuses a request (a RefusedError where
    that may be due to this request alone), and StoppedError where no server is left.
    """

    def __init__(self, name: str, urls: Sequence[str], served: ServerSpec) -> None:
        self.name, self.urls, self.served = name, tuple(urls), served
        self.session, self.names = _session(served), dict[str, str]()
        self._load = dict.fromkeys(self.urls, 0)  # requests under way at those that have not failed
        self._failures: dict[str, str] = {}
        self._errors = dict.fromkeys(self.urls, 0)  # answers of 500 since the latest of 200
        self._lock = Lock()

    def alone(self) -> Iterator[Servers]:
        """Each that has not failed, by itself."""
        for url in list(self._load):
            yield Servers(self.name, [url], self.served)

    @property
    def model(self) -> dict[str, str]:
        """The part of a request that names the model; empty where a server has but one."""
        return {"model": self.served.model} if self.served.model else {}

    def get(self, path: str) -> Any:
        """The answer, from JSON."""
        return self._parsed(self._send("GET", path))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer, from JSON."""
        return self._parsed(self._send("POST", path, body))

    def ask(self, wanted: Sequence[Request]) -> list[Any]:
        """The answers to all requests, in order, from JSON."""
        return [self._parsed(answer) for answer in self.fetch(wanted)]

    def ask_each(self, wanted: Sequence[Request]) -> list[Any]:
        """As :meth:`ask`; a request that is refused has its RefusedError in the answer's place."""

        def tried(request: Request) -> Any:
            try:
                return self._parsed(self._send("POST", *request))
            except RefusedError as error:
                return error

        return self._at_once(tried, wanted)

    def post_to_each(self, path: str, body: dict[str, Any] | None = None) -> None:
        """Send the same to every server, at the same time."""
        with ThreadPoolExecutor(len(self.urls)) as pool:
            list(pool.map(lambda url: self._answer("POST", url, path, body), list(self._load)))
        self._check_left()

    def _parsed(self, answer: bytes) -> Any:
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise TOPDError(
                f"{self.name}: {', '.join(self.urls)} answer {answer[:80]!r}, which is not JSON. "
                f"{self.served.other}"
            ) from error

    def fetch(self, wanted: Sequence[Request]) -> list[bytes]:
        """The answers to all requests, in order."""
        return self._at_once(lambda request: self._send("POST", *request), wanted)

    def _at_once(self, send: Callable[[Request], T], wanted: Sequence[Request]) -> list[T]:
        pool = ThreadPoolExecutor(self.served.concurrency)
        try:
            return list(pool.map(send, wanted))
        finally:
            pool.shutdown(cancel_futures=True)

    def _send(self, method: str, path: str, body: Any = None, group: int | None = None) -> bytes:
        failed: set[str] = set()  # servers that answer 500 to this request
        while True:
            with self._chosen(group, failed) as url:
                try:
                    answer = self._answer(method, url, path, body)
                except FailedError:
                    failed.add(url)
                    if failed.issuperset(list(self._load)):
                        raise
                    continue
            if answer is not None:
                return answer

    def _answer(
        self, method: str, url: str, path: str, body: Any, again: bool = True
    ) -> bytes | None:
        """What a server says; None if it fails, which is then left out.

        An answer that breaks off is asked for once more, as is one that does not come.
        """
        answer: requests.Response | None = None
        if body is not None and url in self.names:
            body = {"model": self.names[url], **body}
        try:
            with self.session.request(
                method,
                url + path,
                json=body,
                timeout=(CONNECT, self.served.timeout),
                allow_redirects=False,
                stream=True,
            ) as answer:  # from here on: pauses before it are not its time
                end = time.monotonic() + self.served.timeout
                content = self._content(answer, url + path, end)
        except (requests.RequestException, HTTPError, OSError) as error:
            if answer is not None and again and self.served.retries:
                return self._answer(method, url, path, body, again=False)
            self._leave_out(url, self._reason(error))
            return None
        if answer.status_code == 200:
            self._errors[url] = 0
            return content
        text = content[:300].decode(errors="replace") or answer.headers.get("Location", "")
        said = f"{path} answers {answer.status_code}: {text}"
        if answer.status_code < 500 and answer.status_code not in BUSY:
            unknown = answer.status_code in (401, 403)
            remedy = KEY.format(self.served.place) if unknown else self.served.other
            kind = RefusedError if answer.status_code in OF_ONE else TOPDError
            raise kind(f"{self.name}: {url}{said}. {remedy}")
        if answer.status_code == 500:
            self._errors[url] += 1
            if self._errors[url] <= self.served.errors_of_one:
                raise FailedError(f"{self.name}: {url}{said}.")
        self._leave_out(url, said)
        return None

    def _content(self, answer: requests.Response, url: str, end: float) -> bytes:
        """The body, as it comes: neither longer nor for longer than it may.

        Raises:
            TOPDError: it is larger than any answer, or grows too much when it is unpacked.
            OSError, HTTPError: the time limit is over, or the connection broke.
        """
        parts, size = [], 0
        while part := answer.raw.read1(PIECE, decode_content=True):
            parts.append(part)
            size += len(part)
            packed = answer.raw.tell()  # bytes that came
            if size > self.served.largest or (size > UNSUSPECTED and size > UNPACKED * packed):
                raise TOPDError(
                    f"{self.name}: {url} answers with more than {size >> 20} MiB, of which "
                    f"{packed >> 20} MiB were sent. {self.served.other}"
                )
            if time.monotonic() > end:
                raise TimeoutError("Read timed out")
        return b"".join(parts)

    @contextmanager
    def _chosen(self, group: int | None, failed: Collection[str] = ()) -> Iterator[str]:
        """The server for a request, which counts as under way meanwhile; if possible not one of
        ``failed``."""
        with self._lock:
            self._check_left()
            urls = [url for url in self._load if url not in failed] or list(self._load)
            url = (
                min(urls, key=self._load.__getitem__) if group is None else urls[group % len(urls)]
            )
            self._load[url] += 1
        try:
            yield url
        finally:
            with self._lock:
                if url in self._load:
                    self._load[url] -= 1

    def _check_left(self) -> None:
        if not self._load:
            why = "; ".join(f"{url}: {reason}" for url, reason in self._failures.items())
            raise StoppedError(
                f"{self.name}: no server is left. {why}. Start them again; a run that was under "
                "way continues with resume_from_checkpoint: last.",
                UNREACHABLE,
            )

    def _leave_out(self, url: str, reason: str) -> None:
        with self._lock:
            first = self._load.pop(url, None) is not None
            self._failures[url] = reason
        if first:
            logger.error(f"{self.name}: {url} is left out from now on. {reason}")

    def _reason(self, error: Exception) -> str:
        cause = getattr(error.args[0], "reason", error) if error.args else error
        if "Read timed out" in str(cause):
            return (
                f"no answer within its time limit, {self.served.place}.timeout "
                f"{self.served.timeout:g} s"
            )
        return f"{type(cause).__name__}: {cause}"


class Again(Retry):
    """Tries with pauses, those that a server asks for too; none is longer than ``backoff_max``."""

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        """The pause that an answer asks for, seconds; None if it cannot be read, as 0.5 or 1s."""
        try:
            asked = super().get_retry_after(response)
        except InvalidHeader:
            return None
        return None if asked is None else min(asked, self.backoff_max)


class Kept(HTTPAdapter):
    """Connections with TCP keep-alive.

    Routers forget one that is silent for minutes, as while it waits for a long answer.
    """

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """Add the sockets' options, as far as the system has them."""
        known = {getattr(socket, name): n for name, n in PROBES.items() if hasattr(socket, name)}
        sockets = [
            *HTTPConnection.default_socket_options,
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            *[(socket.IPPROTO_TCP, option, value) for option, value in known.items()],
        ]
        super().init_poolmanager(*args, socket_options=sockets, **options)


def _session(served: ServerSpec) -> requests.Session:
    """Connections that are kept; tries with growing pauses, a read that timed out once more."""
    session = requests.Session()
    again = Again(
        total=served.retries,
        read=min(1, served.retries),
        status_forcelist=BUSY,
        raise_on_status=False,  # the last answer says why
        allowed_methods=None,
        backoff_factor=0.5,
        backoff_jitter=0.5,
    )
    adapter = Kept(pool_maxsize=served.concurrency, max_retries=again)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    session.auth = _signed(served.api_key)
    return session


def _signed(key: str | None) -> Callable[[requests.PreparedRequest], requests.PreparedRequest]:
    """As an auth hook, before which no .netrc comes."""

    def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if key:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    return sign
