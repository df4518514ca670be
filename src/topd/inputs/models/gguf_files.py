"""A GGUF file is parsed once a process: transformers parses it again for each thing in it.

Parsing takes seconds, for a vocabulary is read string by string. What is read stays memory-mapped,
as plain arrays: each slice of numpy's own memory map costs several times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

Key = tuple[str, int, int]


def unchanged(path: Path) -> Key:
    """What is the same as long as a file is: its place, time and size; a hub's name has no file."""
    if not path.exists():
        return str(path), 0, 0
    found = path.resolve()
    state = found.stat()
    return str(found), state.st_mtime_ns, state.st_size


@contextmanager
def parsed_once() -> Iterator[None]:
    """Inside, the gguf package gives what it has parsed before, as long as the file is the same.

    Its map of tensor names, made again for every module of a model otherwise, is kept too. Without
    the package nothing is changed, and transformers says what is missing.
    """
    try:
        import gguf
    except ImportError:
        yield
        return
    kept = gguf.GGUFReader, gguf.get_tensor_name_map
    given: Any = gguf
    given.GGUFReader, given.get_tensor_name_map = _kept(*kept)
    try:
        yield
    finally:
        given.GGUFReader, given.get_tensor_name_map = kept


def _plain(reader: Any) -> Any:
    """A reader whose file is a plain array over the memory map."""

    class Plain(reader):
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(np.ndarray)

    return Plain


@cache
def _kept(
    reader: Callable[..., Any], names: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two, each of which remembers what it made."""
    read: dict[Key, Any] = {}
    reader = _plain(reader)

    def once(path: Any) -> Any:
        key = unchanged(Path(path))
        if key not in read:
            read[key] = reader(path)
        return read[key]

    return once, cache(names)
