"""``topd import``: a configuration of TRL or verl as a recipe, key by key, or the reason why not.

Read are YAML and JSON, as ``trl`` and TrlParser take them or nested as verl's, and shell scripts
that start either (:mod:`topd.commands.importer.shell`). Every key ends as one of

==========  ==========================================================================
kept        the recipe has it under its own name
translated  under another name, which is told, or in another unit; the note says what differs
left out    it says where and how fast something runs, not what is learned, or is off
unknown     a key, or a value of it, that has no counterpart here; look at it
refused     it changes what is learned and a recipe cannot say it: there is no recipe
==========  ==========================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from topd.commands.importer.rules import LISTS, guessed, trl_defaults, trl_kind, trl_rule, typed
from topd.commands.importer.shell import commands_of
from topd.commands.importer.verl import DISTILLS, verl_defaults, verl_rule
from topd.commands.keys import parse_value
from topd.commands.yaml_text import LONGEST, parse_yaml
from topd.config import TOPDConfig
from topd.errors import TOPDError, placed

LONG = 300
UNSET = "it has a variable that the file does not set"
DEFAULT = "its default there"
_CLASSES = {
    **{"gkd": " (GKDConfig)", "gold": " (GOLDConfig)", "distillation": " (DistillationConfig)"},
    "iw_opd": " (IWOPDConfig, or a DistillationConfig that has lmbda)",
    "verl": "",
}
Outcome: TypeAlias = Literal["kept", "translated", "left out", "unknown", "refused"]
_STARTED = re.compile(r"(?:^|[/.])(?:(gkd|gold|iw_opd)\w*|(distillation))(?:\.py)?$")
_DOTTED = re.compile(r"^\+{0,2}([a-z_]\w*(?:\.[\w-]+)+)=(.*)$", re.DOTALL)
_TAKEN_OUT = re.compile(r"~[a-z_]\w*(?:\.[\w-]+)+(?:=.*)?")
_MAPPED = re.compile(r"(?<=\w):(?=[\w{\['\"])(?=.*\}$)")  # {a:1} of Hydra is {a: 1}


@dataclass(frozen=True)
class Line:
    """What became of a key of the other framework."""

    key: str
    value: Any
    outcome: Outcome
    note: str = ""
    names: tuple[str, ...] = ()  # in the recipe, where others

    def __str__(self) -> str:
        names = f" -> {', '.join(self.names)}" if self.names else ""
        note = f": {self.note}" if self.note else ""
        return f"{self.outcome:<10}  {self.said}{names}{note}"

    @property
    def said(self) -> str:
        """Key and value in one line, which a comment of YAML is."""
        text = " ".join(f"{self.key} = {self.value}".split())
        return text if len(text) <= LONG else f"{text[:LONG]}..."


@dataclass
class Imported:
    """A recipe in the making, and what became of every key."""

    framework: Literal["TRL", "verl"]
    kind: str = "verl"  # whose defaults it has
    recipe: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)

    @property
    def refused(self) -> list[Line]:
        """Why there is no recipe; none if there is one."""
        return [line for line in self.lines if line.outcome == "refused"]

    @property
    def unknown(self) -> list[Line]:
        """Keys that have no counterpart here, and may matter."""
        return [line for line in self.lines if line.outcome == "unknown" and not line.note]

    def text(self) -> str:
        """The recipe as YAML, with what differs as comments. Raises TOPDError if it was refused."""
        if self.refused:
            reasons = " ".join(f"{line.key}: {line.note}." for line in self.refused)
            raise TOPDError(
                f"no recipe says what this {self.framework} configuration says. {reasons}"
            )
        notes = [f"# {line.key}: {line.note}" for line in self.lines if line.note]
        for line in self.unknown:
            of_script = line.key.startswith("$")  # a variable
            notes.append(f"# {line.said}{'' if of_script else ': no counterpart here'}")
        head = f"# Imported from a {self.framework} configuration{_CLASSES[self.kind]}"
        head += "; see what differs:" if notes else ""
        body = yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True)
        return "\n".join([head, *notes, "", body])


def import_file(path: Path) -> Imported:
    """Read a configuration. Raises TOPDError: it cannot be read, or is neither TRL's nor verl's."""
    try:
        text = path.read_text(encoding="utf-8-sig")[: LONGEST + 1]
    except (OSError, UnicodeDecodeError) as error:
        raise TOPDError(f"{path}: cannot be read: {error}.") from error
    if path.suffix in (".yaml", ".yml", ".json"):
        content = parse_yaml(str(path), text)
        if not isinstance(content, dict):
            raise TOPDError(f"{path}: must be a mapping of keys to values.")
        return imported(str(path), content)
    with placed(path):
        kind, arguments = training_of(text)
    return imported(str(path), arguments, kind=kind)


def imported(place: str, content: Mapping[str, Any], *, kind: str | None = None) -> Imported:
    """Every key by the rules of its framework. Raises TOPDError if it is of neither.

    ``kind``: whose defaults a configuration of TRL has, ``gkd``'s, ``gold``'s, ``iw_opd``'s or
    ``distillation``'s; None: not known.
    """
    content = {str(key): value for key, value in content.items()}
    # in verl before 0.8 distillation was a part of actor_rollout_ref
    before = "actor_rollout_ref.distillation."
    flat = {k.replace(before, "distillation."): v for k, v in _flat(content)}
    framework = _framework(flat)
    if framework == "verl":
        return _ruled(Imported("verl"), flat, verl_rule, verl_defaults(flat))
    if framework is None:
        raise TOPDError(
            f"{place}: is neither a distillation of TRL's, which has teacher_model_name_or_path, "
            "nor verl's, which has actor_rollout_ref. Give the file that its command line or "
            "--config names."
        )
    content = {key: typed(key, value) for key, value in content.items()}
    by_keys = trl_kind(content)
    former = kind == "distillation" and (by_keys == "iw_opd" or "lmbda" in content)
    named, kind = kind, "iw_opd" if former else kind or by_keys
    found = Imported("TRL", kind or "distillation")
    if named is None and (note := guessed(by_keys, content)):
        found.lines.append(Line("class", _CLASSES[found.kind].strip(" ()"), "unknown", note))
    own = {"distillation_objective": "iw_opd"} if named == "iw_opd" else {}
    return _ruled(found, content, trl_rule, {**trl_defaults(found.kind, content), **own})


def _framework(content: Mapping[str, Any]) -> Literal["TRL", "verl"] | None:
    """Whose a distillation is; None: it is none."""
    if any(key.startswith(("actor_rollout_ref.", "distillation.")) for key in content):
        return "verl"
    return "TRL" if "teacher_model_name_or_path" in content else None


def _ruled(
    found: Imported,
    content: Mapping[str, Any],
    rule: Callable[[str, Any, Mapping[str, Any]], tuple[str, str, dict[str, Any]]],
    defaults: Mapping[str, Any],
) -> Imported:
    given = {key for key, value in content.items() if value is not None or key not in defaults}
    content = {**defaults, **{key: content[key] for key in content if key in given}}
    for key, value in content.items():
        outcome, note, changes = rule(key, value, content)
        default = key not in given
        for name, new in changes.items():
            _refuse_variable(key, name, new)
            _set(found.recipe, name, new)
        if changes and "$" in str(value):
            note = f"{note}; {UNSET}" if note else UNSET
        if default:
            note = f"{note} ({DEFAULT})" if note else DEFAULT
        if not default or outcome == "refused" or changes:
            names = tuple(
                name.replace("/", ".").replace("|", "/") for name in changes if name != key
            )
            found.lines.append(Line(key, value, outcome, note, names))  # type: ignore[arg-type]
    for part in ("student", "data"):
        if part not in found.recipe and not found.refused:
            found.lines.append(Line(part, None, "refused", f"no {part} is named"))
    if not {"teacher", "teachers"} & set(found.recipe):
        found.lines.append(Line("teacher", None, "refused", "no teacher is named"))
    if found.framework == "verl":
        _finish_verl(found, content)
    return found


def _refuse_variable(key: str, name: str, value: Any) -> None:
    """Raises TOPDError for a variable where a setting is a number."""
    of_lora = name.startswith("lora/") and not name.endswith("modules")
    number = isinstance(getattr(TOPDConfig, name, None), int | float) or of_lora
    if number and isinstance(value, str) and "$" in value:
        raise TOPDError(
            f"{key}: {value!r} is a variable that the file does not set. Write its value in its "
            "place, and import again."
        )


def _finish_verl(found: Imported, content: Mapping[str, Any]) -> None:
    """What follows from several keys: is it distillation at all, and how large is an update?"""
    estimator = str(content.get("algorithm.adv_estimator", ""))
    on = content.get("distillation.enabled") is True
    if not on and not content.get(DISTILLS) and not re.search("opd|distill", estimator):
        reason = "it is not on: this trains by rewards"
        found.lines.append(Line("distillation.enabled", False, "refused", reason))
    loss = "distillation.distillation_loss."  # use_policy_loss: before verl 0.8
    older = content.get(f"{loss}use_policy_loss", True)
    rewards = content.get(f"{loss}use_task_rewards", older)
    if on and rewards is not False:
        reason = "rewards of the task are added to the loss (its default there)"
        found.lines.append(Line("use_task_rewards", rewards, "refused", reason))
    given = found.recipe.pop("teachers", {})
    teachers = {name.replace("|", "/"): path for name, path in given.items()}
    if len(teachers) == 1:
        found.recipe["teacher"] = next(iter(teachers.values()))
        single = [f"teachers.{name}" for name in teachers]
        found.lines = [
            replace(line, names=("teacher",)) if [*line.names] == single else line
            for line in found.lines
        ]
        found.recipe.pop("teacher_column", None)
    elif teachers:
        named = content.get("distillation.teacher_key", "data_source")
        found.recipe |= {"teachers": teachers, "teacher_column": named}


def _set(recipe: dict[str, Any], name: str, value: Any) -> None:
    *before, last = name.split("/")
    for part in before:
        recipe = recipe.setdefault(part, {})
    recipe[last] = value


def _flat(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def training_of(script: str) -> tuple[str | None, dict[str, Any]]:
    """The training that a shell script starts: whose trainer it is, if known, and its arguments.

    Those are ``--key value``, ``--key=value`` and ``a.b=value``, from after the trainer's name.
    Raises TOPDError if there are several trainings.

    >>> training_of("LR=${LR:-1e-6}\\nA=0 run gkd.py --learning_rate $LR \\\\\\n  --bf16")
    ('gkd', {'learning_rate': 1e-06, 'bf16': True})
    """
    found = [_training(*command) for command in commands_of(script)]
    distilled = [(kind, arguments) for kind, arguments in found if _framework(arguments)]
    if any(one != distilled[0] for one in distilled):
        raise TOPDError(f"it starts {len(distilled)} trainings. Give a file that has one of them.")
    return max(distilled or found, key=lambda one: len(one[1]), default=(None, {}))


def _training(
    words: Sequence[str], guessed: Mapping[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    begin = next((i for i in range(len(words)) if _starts(words, i)), 0)
    started = _STARTED.search(words[begin])
    found: dict[str, Any] = {
        f"${name}": f"{value}, of one branch of an if, case or &&"
        for name, value in guessed.items()
    }
    for i, word in enumerate(words[begin:], begin):
        before, after = words[i - 1] if i else "", [*words, "--"][i + 1]
        if dotted := _DOTTED.match(word):
            found[dotted[1]] = parse_value(_MAPPED.sub(": ", dotted[2]))
        elif word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")  # which are the same there
            bare = not equals and after[:2] == "--"
            off = bare and key[:3] == "no_" and key != "no_cuda"  # --no_x of a x that is on
            given = parse_value(value if equals else "true" if bare else after)
            found[key.removeprefix("no_") if off else key] = False if off else given
            if key in LISTS and not equals:
                found[key] = [*takewhile(lambda one: one[:2] != "--", words[i + 1 :])]
        elif _TAKEN_OUT.fullmatch(word) and not before.startswith("--"):
            found[word] = "taken out of the configuration"
        elif word[:1] == "$" and len(word) > 2 and not before.startswith("--"):
            found[word] = "not set by the file"
    return started and (started[1] or started[2]), found


def _starts(words: Sequence[str], i: int) -> bool:
    """Whether this word is what is started: before it are the launcher and its options."""
    before, word = words[i - 1] if i else "", words[i]
    module = before == "-m" and not word.startswith(("torch.", "accelerate"))
    return module or Path(before).name == "trl" or (word.endswith(".py") and "=" not in word)
