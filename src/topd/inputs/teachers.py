"""Several teachers: which there are, and which of them a row of the data asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

from torch import nn
from transformers import PreTrainedModel

from topd.errors import TOPDError
from topd.inputs.models import LOADED, ModelSource, ModelSpec, source_of
from topd.inputs.self_teacher import WORD

Mix: TypeAlias = Literal["column", "mean"]
MOST = 256  # numbers of teachers that bfloat16 tells apart


class Teachers:
    """Several teachers by name, for ``teacher_model``.

    >>> Teachers({"math": "model-a", "code": {"path": "model-b", "dtype": "bfloat16"}}).names
    ('math', 'code')

    Args:
        sources: name to path, :class:`~topd.inputs.models.ModelSpec`, its fields, or a model.
            Names with the same source share one model.

    Attributes:
        distinct: the sources, each once: what is loaded.
        places: name to place among the distinct ones.

    Raises:
        TOPDError: fewer than two names, a name that is empty, or a source that is none, or self.
    """

    def __init__(self, sources: Mapping[str, ModelSource | Mapping[str, Any]]) -> None:
        if not isinstance(sources, Mapping) or not 2 <= len(sources) <= MOST:
            raise TOPDError(
                "teachers: give 2 to 256 by name, e.g. {math: PATH, code: PATH}. A single one is "
                "a teacher."
            )
        if not all(isinstance(name, str) and name.strip() for name in sources):
            raise TOPDError("teachers: a name is a word such as math.")
        self.sources = {name: _spec(name, source) for name, source in sources.items()}
        if any(getattr(source, "path", None) == WORD for source in self.sources.values()):
            raise TOPDError("teachers: self is not one of several. Give it alone: teacher: self.")
        distinct: list[ModelSource] = []
        self.places: dict[str, int] = {}
        for name, source in self.sources.items():
            spec = isinstance(source, ModelSpec)
            known = (k for k, o in enumerate(distinct) if source is o or (spec and source == o))
            self.places[name] = next(known, len(distinct))
            if self.places[name] == len(distinct):
                distinct.append(source)
        self.distinct = tuple(distinct)

    @property
    def names(self) -> tuple[str, ...]:
        """In the order given."""
        return tuple(self.sources)

    @property
    def path(self) -> str:
        """All of them in a few words, for messages and pages."""
        return ", ".join(
            f"{name}: {getattr(source, 'path', type(source).__name__)}"
            for name, source in self.sources.items()
        )

    def model_dump(self) -> dict[str, Any]:
        """Name to fields, for run.json."""
        return {
            name: source.model_dump() if isinstance(source, ModelSpec) else str(source)
            for name, source in self.sources.items()
        }


def _spec(name: str, source: ModelSource | Mapping[str, Any]) -> ModelSource:
    found = source_of(f"teachers.{name}", source)
    return found if isinstance(found, (ModelSpec, *LOADED)) else ModelSpec(path=str(found))


@dataclass(frozen=True)
class Routes:
    """Which teacher reads which row: that of its ``column``, or all, by the mean.

    ``places`` are names and their places among the loaded teachers. None of them: a single teacher.
    """

    places: Mapping[str, int]
    mix: Mix = "column"
    column: str = "teacher"

    @property
    def shares(self) -> tuple[float, ...]:
        """Of every loaded teacher the share of the names that are its own; they sum to 1."""
        own = list(self.places.values())
        return tuple(own.count(k) / len(own) for k in range(max(own) + 1))

    def name_of(self, index: int, row: Mapping[str, Any]) -> str | None:
        """The teacher that a row asks for; None with the mean. Raises TOPDError, with the row."""
        if self.mix == "mean":
            return None
        name = row.get(self.column)
        if not isinstance(name, str) or name not in self.places:
            has = ", ".join(sorted(map(str, row)))
            given = f"is {name!r}" if self.column in row else f"is missing: it has {has}"
            raise TOPDError(
                f"data row {index}: column {self.column!r} {given}. It must name one of the "
                f"teachers {', '.join(self.places)}. Correct the row, or set teacher_column."
            )
        return name

    def check_named(self, named: Sequence[str | None]) -> None:
        """Refuse a teacher that no row asks for. Raises TOPDError."""
        idle = [name for name in self.places if name not in named]
        if idle and self.mix == "column":
            raise TOPDError(
                f"teachers: {', '.join(idle)} is named by no row of the data (column "
                f"{self.column!r}). Leave it out, or give it rows."
            )


NO_ROUTES = Routes({})  # one teacher


class TeacherSet(nn.Module):
    """The distinct teachers, loaded, as one module: one fingerprint, one move to the device."""

    def __init__(self, teachers: Teachers, models: Sequence[PreTrainedModel]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.config = SimpleNamespace(_name_or_path=teachers.path)
