"""A row of a table by its name, or one of your own: ``my_module:function``."""

from __future__ import annotations

import hashlib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from topd.errors import TOPDError, first_line, out_of_memory

Row = TypeVar("Row")
Returned = TypeVar("Returned")
NAMING = ("method", "candidate_loss", "environment")  # settings whose value may be a row's name
CODE: dict[str, str] = {}  # of modules outside this package, the SHA-256 of their files


def is_outside(name: str) -> bool:
    """Whether a name stands for code outside this package."""
    return ":" in name and "://" not in name


def code_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Of settings that name code outside this package, the SHA-256 of its file at the import.

    What that file imports is not in it.
    """
    names = filter(is_outside, (str(settings.get(key)) for key in NAMING))
    return {name: CODE[module] for name in names if (module := name.partition(":")[0]) in CODE}


def row_named(key: str, name: str, table: Mapping[str, Row], kind: Callable[[Any], Row]) -> Row:
    """The row that ``name`` stands for in ``table``, or outside it as ``module:attribute``.

    Modules of the working directory and all that Python finds are known. The attribute is a row, or
    a function, of which ``kind``, the type of a row, makes one. Messages begin with ``key``.
    Raises TOPDError: there is no such row, module or attribute, or it is no function.

    >>> row_named("key", "math:pi", {}, list)
    Traceback (most recent call last):
        ...
    topd.errors.TOPDError: key: math:pi is a float. Name a function, or a list.
    """
    if name in table:
        return table[name]
    if not is_outside(name):
        raise TOPDError(unknown(key, name, table))
    found = _attribute(key, name)
    if isinstance(kind, type) and isinstance(found, kind):
        return cast(Row, found)
    if not callable(found) or isinstance(found, type):
        raise TOPDError(
            f"{key}: {name} is a {type(found).__name__}. Name a function, or a "
            f"{getattr(kind, '__name__', kind)}."
        )
    return kind(found)


def unknown(key: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is in no table."""
    return f"{key}: {name!r} is not one of {', '.join(known)}, nor my_module:function. Choose one."


def called(key: str, function: Callable[..., Returned], *args: Any) -> Returned:
    """What a row's function returns; where one from outside this package fails, whose it was.

    That a GPU's memory has run out is nobody's fault here, and passes as it is.

    Raises:
        TOPDError: it raised an exception; the traceback of its code is the error's note.
    """
    try:
        return function(*args)
    except TOPDError:
        raise
    except out_of_memory():
        raise
    except Exception as error:
        own = function.func if isinstance(function, partial) else function
        module = getattr(own, "__module__", None) or "builtins"
        if module.partition(".")[0] == "topd":
            raise
        inner = error.__traceback__ and error.__traceback__.tb_next  # without this frame
        lines = [  # not those of a decorator from elsewhere
            f"{frame.f_code.co_filename}, line {line}"
            for frame, line in traceback.walk_tb(inner)
            if frame.f_globals.get("__name__") == module
        ]
        fault = TOPDError(
            f"{key}: {module}:{getattr(own, '__name__', own)} raised {first_line(error)} "
            f"({lines[-1] if lines else 'when it was called'}). Correct it there."
        )
        said = traceback.format_tb(inner) + traceback.format_exception_only(error)
        fault.add_note("".join(said).rstrip())
        raise fault from error


def _attribute(key: str, name: str) -> Any:
    module, _, attribute = name.partition(":")
    here, fresh = str(Path.cwd()), module not in sys.modules
    sys.path.insert(0, here)  # as python -m has it; a console script does not
    try:
        found = importlib.import_module(module)
    except out_of_memory():
        raise
    except (Exception, SystemExit) as error:  # whatever the code of the module does
        raise TOPDError(
            f"{key}: {name}: {module!r} cannot be imported ({type(error).__name__}: {error}). Is "
            f"{module}.py in {here} or installed?"
        ) from error
    finally:
        sys.path.remove(here)
    place = getattr(found, "__file__", None) or module
    if (fresh or module not in CODE) and Path(place).is_file():
        CODE[module] = hashlib.sha256(Path(place).read_bytes()).hexdigest()
    if not hasattr(found, attribute):
        raise TOPDError(f"{key}: {name}: {place} has no {attribute!r}.")
    return getattr(found, attribute)
