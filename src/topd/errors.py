"""What goes wrong, in words, and what a command ends with. Imports nothing of ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

GIVE_DATA = (
    "Give a .jsonl, .json, .csv or .tsv file (also as .gz), a .parquet file, a folder, or a hub "
    "name."
)
RELATIVE = " (a relative path starts where the command runs)"
SHOWN = 200  # characters of a value in a message
# what a library raises at what it is given, which is then told in our words
LIBRARY_FAULTS: tuple[type[Exception], ...] = (
    *(ImportError, ValueError, TypeError, RuntimeError, LookupError, AttributeError),
    *(ArithmeticError, AssertionError),
)
NONFINITE, COLLAPSED, DISK, UNREACHABLE, TERMINATED = 3, 4, 5, 6, 75


class TOPDError(ValueError):
    """Bad input, with its place and its remedy. Derives from ValueError.

    ``exit_code`` is what a command ends with.
    """

    exit_code = 2


class StoppedError(TOPDError):
    """A run that had to stop before its end, with the reason and how to continue.

    The exit code is 3 for a loss or gradient that is not finite, 4 for a stop rule, 5 for a disk
    that takes no more, 6 for servers that do not answer, 75 for SIGTERM; 2 for another fault, in
    whose place it says that what is done was saved.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type[StoppedError], tuple[str, int]]:
        return StoppedError, (str(self), self.exit_code)  # to another process


@contextmanager
def placed(place: object) -> Iterator[None]:
    """Say the place of a fault before it."""
    try:
        yield
    except StoppedError as error:
        raise StoppedError(f"{place}: {error}", error.exit_code) from error
    except TOPDError as error:
        raise TOPDError(f"{place}: {error}") from error


def compiler_faults() -> tuple[type[Exception], ...]:
    """What compilers raise, and the kernels that they make; asked for when something was raised."""
    try:
        from triton.errors import TritonError
    except ImportError:  # no Triton, or one before it had this
        TritonError = RuntimeError  # noqa: N806
    return (*LIBRARY_FAULTS, OSError, subprocess.SubprocessError, TritonError)


def out_of_memory() -> tuple[type[Exception], ...]:
    """What torch raises where a GPU's memory runs out; asked for when something was raised."""
    torch = sys.modules.get("torch")
    return () if torch is None else (torch.OutOfMemoryError,)


def first_line(fault: Exception) -> str:
    """A library's fault with its kind, as far as fits into a message of ours."""
    return f"{type(fault).__name__}: {str(fault).strip().partition(chr(10))[0][:100]}"


def shown(value: Any) -> str:
    """A value or an error as text for a message, cut where it is long."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
