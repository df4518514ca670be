"""YAML from anywhere, read in bounded time and memory into plain values.

Text, numbers, truth values, null, lists and mappings; dates and times are text. Numbers are those
of YAML 1.2: 1e-5 is one, 1:30 and 010 are text. Aliases and merges are allowed up to a
size, reckoned as if they were written out, before anything is made of them.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from topd.errors import TOPDError, shown

LONGEST = 1_000_000  # characters of a file
MOST = 20_000  # values, with aliases written out
DEEPEST = 50  # lists and mappings inside each other
_OTHER = ("timestamp", "set", "omap", "pairs", "binary")
_NUMBERS = {
    "int": r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)",
    "float": r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without dates, sets, bytes and longer numbers; refuses a key given twice."""

    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: made
        for tag, made in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] not in _OTHER
    }

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._flat: set[yaml.MappingNode] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if node in self._flat:  # merged into another: what it merged itself may be overridden in it
            return
        self._flat.add(node)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise yaml.constructor.ConstructorError(None, None, "a key twice", node.start_mark)
        super().flatten_mapping(node)  # only now: a merged key may be overridden

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Of 64 bits: nothing here takes longer ones, and some cannot even be shown."""
        value = super().construct_yaml_int(node) if len(node.value) <= 100 else 1 << 64
        if abs(value) >= 1 << 64:
            said = "a number beyond 64 bits"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)
        return value

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Without null bytes, which end names of files early."""
        if isinstance(node.value, str) and "\0" in node.value:
            raise yaml.constructor.ConstructorError(None, None, "a null byte", node.start_mark)
        return super().construct_scalar(node)


_PlainLoader.yaml_implicit_resolvers = {
    first: [
        pair for pair in pairs if pair[0].rpartition(":")[2] not in (*_OTHER, *_NUMBERS, "value")
    ]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in _NUMBERS.items():
    _PlainLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})\\Z"), list("-+.0123456789")
    )
_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)


def parse_yaml(place: str, text: str) -> Any:
    """A YAML text as plain values. Raises TOPDError, with the place, if it is not."""
    if len(text) > LONGEST:
        raise TOPDError(f"{place}: has more than {LONGEST} characters. Is it the right file?")
    try:
        _check_size(place, text)
        return yaml.load(text, _PlainLoader)  # noqa: S506 - a SafeLoader
    except TOPDError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise TOPDError(f"{place}: not valid YAML: {shown(error)}") from error


def _check_size(place: str, text: str) -> None:
    """Count values and depth without making any. An alias counts as all that it stands for."""
    sizes: dict[str, int] = {}
    within: list[tuple[str | None, int]] = []  # anchors of open lists and mappings, values before
    count = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                if any(anchor == event.anchor for anchor, _ in within):
                    raise TOPDError(f"{place}: &{shown(event.anchor)} contains itself. Remove it.")
                continue  # there is no such anchor: the loader says so
            count += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            within.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = within.pop()
            if anchor:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1
        if count > MOST:
            raise TOPDError(
                f"{place}: holds more than {MOST} values, aliases and merges written out. Shorten "
                "it."
            )
        if len(within) > DEEPEST:
            raise TOPDError(f"{place}: is nested more than {DEEPEST} deep. Make it flatter.")
