"""The library tokenizers raises ``Exception`` itself, which nobody can catch by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_SYSTEM = re.compile(r"\(os error (\d+)\)")


@contextmanager
def named_faults() -> Iterator[None]:
    """Give a bare ``Exception`` a name: OSError with its number where it has one, else ValueError.

    >>> with named_faults():
    ...     raise Exception("No space left on device (os error 28)")
    Traceback (most recent call last):
    OSError: [Errno 28] No space left on device (os error 28)
    """
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        number = _SYSTEM.search(str(error))
        if number:
            raise OSError(int(number[1]), str(error)) from error
        raise ValueError(str(error)) from error
