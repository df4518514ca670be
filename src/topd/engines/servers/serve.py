"""vLLM servers with the settings that the served engine needs. vLLM runs in an environment of its
own: it is not imported here, and its Python may be another.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import requests

from topd.errors import TOPDError

Kind = Literal["completions", "pooling", "rollouts"]
MODULE = "vllm.entrypoints.openai.api_server"  # not the vllm command, which CPU builds lack
ASK = (
    "import importlib.util as i, torch; "
    "print(int(i.find_spec('vllm') is not None), int(torch.accelerator.is_available()))"
)
SETTINGS: dict[Kind, list[str]] = {
    # the model's own log-probs, those of temperature 1
    "completions": ["--enable-prefix-caching", "--logprobs-mode", "raw_logprobs"],
    "pooling": [
        *("--runner", "pooling", "--convert", "embed"),
        *("--pooler-config", json.dumps({"task": "token_embed"})),
    ],
    "rollouts": [
        *("--enable-prefix-caching", "--logprobs-mode", "raw_logprobs"),
        *("--worker-extension-cls", "topd_worker.Weights"),
    ],
}
STOP = 30.0  # seconds that a server has to end
SHARE = "0.45"  # of a GPU's memory, where two servers have it; vLLM takes 0.9 for one


def command(
    kind: Kind, model: str, host: str, port: int, extra: Sequence[str], *, python: str, cpu: bool
) -> list[str]:
    """How to start a server.

    On a CPU blocks of 128 tokens would leave short prefixes uncached. The two servers of a teacher
    have the same GPUs, so each takes a share of them, unless ``extra`` says another.
    """
    shared = kind != "rollouts" and not cpu
    return [
        *(python, "-m", MODULE, "--model", model, "--host", host, "--port", str(port)),
        *("--generation-config", "vllm"),
        *SETTINGS[kind],
        *(["--block-size", "32"] if cpu and kind != "pooling" else []),
        *(["--gpu-memory-utilization", SHARE] if shared else []),
        *extra,
    ]


def environment(kind: Kind) -> dict[str, str]:
    """This process's, and what a server of rollouts needs: our worker class, the update calls."""
    if kind != "rollouts":
        return dict(os.environ)
    paths = [str(Path(__file__).parent / "worker"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    return {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path}


def has_accelerator(python: str) -> bool:
    """Whether vLLM of this Python has more than a CPU. Raises TOPDError if there is no vLLM."""
    try:
        found = subprocess.run([python, "-c", ASK], capture_output=True, text=True)  # noqa: S603
    except OSError as error:
        raise TOPDError(f"--python: {python} cannot be run ({error.strerror}).") from error
    words = found.stdout.split()
    if words[:1] != ["1"]:
        raise TOPDError(
            f"--python: {python} has no vLLM. Install it in an environment of its own, and name "
            "that one's python: --python PATH/bin/python."
        )
    return words[1] == "1"


@contextmanager
def serving(
    servers: Mapping[str, tuple[Kind, Sequence[str]]], *, patience: float
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Servers by URL, from their start until all answer; ended with the context.

    One is started after another, since a server measures how much of a GPU's memory is free. Raises
    TOPDError if one ends, or does not answer within ``patience`` seconds.
    """
    running: list[subprocess.Popen[bytes]] = []
    try:
        for url, (kind, words) in servers.items():
            running.append(
                subprocess.Popen(  # noqa: S603
                    words, env=environment(kind), stdout=sys.stderr, start_new_session=True
                )
            )
            _await(url, running, patience)
        yield running
    finally:
        for process in running:
            process.terminate()
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # vLLM's own children outlive a crash


def _await(url: str, running: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    """Until the latest server answers. Raises TOPDError if it does not, or any has ended."""
    deadline = time.monotonic() + patience
    while not _healthy(url):
        for code in (process.poll() for process in running):
            if code is not None:
                raise TOPDError(f"{url}: vLLM ended with code {code}. Its log above says why.")
        if time.monotonic() > deadline:
            raise TOPDError(f"{url}: does not answer after {patience:.0f} s.")
        time.sleep(0.5)


def _healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def recipe_lines(urls: Mapping[Kind, str]) -> str:
    """What belongs below teacher or student in a recipe.

    >>> print(recipe_lines({"completions": "http://here:8000", "pooling": "http://here:8001"}))
      dtype: bfloat16
      served: {completions: "http://here:8000", pooling: "http://here:8001"}
    """
    if "rollouts" in urls:
        weights = Path(tempfile.gettempdir()) / "topd-weights"
        return f'  served: {{completions: "{urls["rollouts"]}", weights: "{weights}"}}'
    served = ", ".join(f'{kind}: "{url}"' for kind, url in urls.items())
    return f"  dtype: bfloat16\n  served: {{{served}}}"


def run_servers(
    kinds: Sequence[Kind],
    model: str,
    extra: Sequence[str],
    *,
    host: str,
    port: int,
    python: str,
    patience: float,
    ready: Callable[[str], None],
) -> None:
    """Run a server a kind on ports from ``port`` on until the process is told to end.

    ``ready`` is given what a recipe says of them, once they answer. Raises TOPDError if a server
    ends by itself.
    """
    cpu = not has_accelerator(python)
    place = f"[{host}]" if ":" in host else host  # IPv6
    urls = {kind: f"http://{place}:{port + i}" for i, kind in enumerate(kinds)}
    servers = {
        urls[kind]: (kind, command(kind, model, host, port + i, extra, python=python, cpu=cpu))
        for i, kind in enumerate(kinds)
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as a Ctrl-C: the servers end too
    with suppress(KeyboardInterrupt), serving(servers, patience=patience) as running:
        ready(recipe_lines(urls))
        while all(process.poll() is None for process in running):
            time.sleep(0.5)
        raise TOPDError("a server ended; its log above says why. The others are ended too.")
