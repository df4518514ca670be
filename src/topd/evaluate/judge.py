"""Mathematical equality of two answers, asked of math-verify in a process that can be killed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path

from transformers.utils import logging

from topd.errors import TOPDError
from topd.evaluate import equality

logger = logging.get_logger(__name__)

STARTING = 120.0  # seconds, on a busy machine
SHOWN = 80  # characters of an answer in a warning


class Judge:
    """Asks a child process, and kills it when it takes longer than ``seconds``.

    The child starts with the first question and serves all that follow, from any thread. It ends
    with this object, with the process, or with :meth:`close`. A forked process needs a judge of
    its own.
    """

    def __init__(self, seconds: float = 15.0) -> None:
        self.seconds = seconds
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def equal(self, gold: str, claim: str) -> bool:
        """Whether the claim is mathematically the reference; False, and a warning, if too late.

        Args:
            gold: the reference, as math-verify reads it: LaTeX in ``\\boxed{}`` or text.
            claim: the answer of a model. It may be anything.

        Raises:
            TOPDError: math-verify is not installed.
        """
        with self._lock:
            reply = _ask(self._running(), json.dumps([gold, claim]), self.seconds)
            if not reply:
                logger.warning(f"answer not compared in {self.seconds:g} s: {claim[:SHOWN]!r}")
                self._stop()
        return reply == "true"

    def close(self) -> None:
        """End the child process."""
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[str]:
        if self._child is None:
            child = self._child = subprocess.Popen(  # noqa: S603 - our own file
                # -P: the modules beside that file must not stand in for the library's
                [sys.executable, "-P", str(Path(equality.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
            )
            self._end = weakref.finalize(self, _end, child)
            if _ask(child, None, STARTING) != "ready":
                self._stop()
                raise TOPDError("math-verify does not start. pip install math-verify.")
        return self._child

    def _stop(self) -> None:
        if self._child is not None:
            self._end()
            self._child = None


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()


def _ask(child: subprocess.Popen[str], question: str | None, seconds: float) -> str:
    """One line out, one line in; empty if the child has died or was killed for being late."""
    assert child.stdin is not None
    assert child.stdout is not None
    watch = threading.Timer(seconds, child.kill)
    watch.daemon = True
    watch.start()
    try:
        if question is not None:
            child.stdin.write(question + "\n")
            child.stdin.flush()
        return child.stdout.readline().strip()
    except OSError:  # its end of the pipe is closed
        return ""
    finally:
        watch.cancel()
