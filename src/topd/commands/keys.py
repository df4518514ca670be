"""The keys of a recipe: read from YAML and the command line, and checked against known names.

Imports nothing heavy, so that a mistyped key is told at once (:mod:`topd.commands.early`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from topd.commands.yaml_text import LONGEST, parse_yaml
from topd.errors import TOPDError, shown

PARTS = ("student", "teacher", "teachers", "data", "eval_data", "evaluation", "lora", "compare")
# Settings of prompts, lengths, precision and batches that stage 1 shares, but for groups of which
# it names one itself. How long and how fast it learns is its own.
RECOMPUTED = ("activation_checkpointing", "gradient_checkpointing")  # new and old name
RECOMPUTING = (*RECOMPUTED, *(f"{name}_kwargs" for name in RECOMPUTED))
SHARED = (
    *(("max_prompt_length",), ("drop_long_prompts",), ("max_completion_length",)),
    *(("chat_template_kwargs",), ("teacher_prompt",), ("teacher_column", "teachers_mix")),
    *(("use_cpu",), ("bf16", "fp16"), ("tf32",), ("chunk_tokens",), ("score_batch_size",)),
    ("per_device_train_batch_size", "gradient_accumulation_steps"),
    RECOMPUTING,
)

STAGE_1 = "warmstart."  # before a key of stage 1
# Of a model's spec: how it is loaded and served, whichever weights it has.
HOW = ("dtype", "attn_implementation", "served", "as_text", "trust_remote_code")


def from_command_line(recipe: Path, words: Sequence[str]) -> tuple[Path | None, dict[str, Any]]:
    """The recipe file, if one was named, and the overrides, which without a file are the recipe."""
    if str(recipe).startswith("--"):
        first = [] if str(recipe) == "--" else [str(recipe)]
        return None, parse_overrides([*first, *words])
    return recipe, parse_overrides(words)


def read_content(
    path: str | Path | None,
    overrides: Mapping[str, Any],
    *,
    fields: set[str],
    stage: set[str],
    warmstart: bool = False,
) -> dict[str, Any]:
    """The content of a recipe, keys of one stage only, overrides set, names checked.

    ``fields`` are the names of the settings of stage 2, ``stage`` those of stage 1; for the others
    see :func:`~topd.commands.recipe.read_recipe`.

    Raises TOPDError: the file cannot be read, a key is unknown, or a part is missing.
    """
    content = read_mapping(packaged(path)) if path else {}
    remedy = "A recipe needs student, teacher and data."
    if not path:
        remedy = "Name a recipe, or give --student, --teacher and --data.path."
    path = Path(path or "topd")
    overrides, own = apart(overrides)
    if own and not warmstart:
        raise TOPDError(
            f"{path}: warmstart.{next(iter(own))}: is a key of stage 1, which is not run here. "
            "Leave it out, or give it to topd warmstart or topd compare."
        )
    overrides = over(overrides, own)
    first = mapping_at(path, "warmstart", content.pop("warmstart", None) or {})
    names = {*PARTS, *RECOMPUTING}
    refuse_unknown(path, first, {*stage, *names}, "warmstart.")
    refuse_unknown(path, content, {*fields, *names})
    if warmstart:
        taken = _taken(first, {**first, **overrides})
        content = {key: value for key, value in content.items() if key in taken} | first
    for key, value in overrides.items():
        for other in RECOMPUTED if key in RECOMPUTED else ():
            content.pop(other, None)
        _set(path, content, key.split("."), value)
    refuse_unknown(path, content, {*(stage if warmstart else fields), *names})
    if "teacher" in content and "teachers" in content:
        raise TOPDError(f"{path}: has teacher and teachers. Leave one of them out.")
    for part in ("student", "teacher", "data"):
        if part not in content and not (part == "teacher" and "teachers" in content):
            raise TOPDError(f"{path}: {part} is missing. {remedy}")
    return content


def _taken(named: Iterable[str], own: Mapping[str, Any]) -> set[str]:
    """The parts and settings of a recipe that stage 1 shares, but for groups of which it names one.

    Where nobody asks the teacher, what it is told is left out.

    >>> {"bf16", "tf32"} & _taken(["fp16"], {})
    {'tf32'}
    """
    taken = {*PARTS, *(key for group in SHARED for key in group if not {*named} & {*group})}
    if own.get("answers") == "data" and not own.get("kd_ratio"):
        taken.discard("teacher_prompt")
    return taken


def of_common_start(first: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What stage 1 of a comparison takes of the comparison's overrides.

    All of the parts and settings that the stages share, beside what stage 1 names itself
    (``first``, the recipe's part, or ``warmstart.KEY``), and then its own, which win.

    >>> of_common_start({"fp16": True}, {"data.limit": 8, "bf16": True, "warmstart.max_steps": 3})
    {'data.limit': 8, 'max_steps': 3}
    """
    rest, own = apart(overrides)
    named = {**first, **{part_of(key): value for key, value in own.items()}}
    taken = _taken(named, named)
    return over({key: value for key, value in rest.items() if part_of(key) in taken}, own)


def apart(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Overrides of a recipe, and of its part for stage 1, by the keys that they have there.

    >>> apart({"max_steps": 8, "warmstart.max_steps": 3})
    ({'max_steps': 8}, {'max_steps': 3})
    """
    rest: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, value in overrides.items():
        into = own if key.startswith(STAGE_1) else rest
        into[key.removeprefix(STAGE_1)] = value
    return rest, own


def over(overrides: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides and then later ones, which are set after them and win."""
    return {**{key: value for key, value in overrides.items() if key not in later}, **later}


def part_of(key: str) -> str:
    """The part or setting that a dotted key belongs to.

    >>> part_of("data.limit")
    'data'
    """
    return key.partition(".")[0]


def packaged(path: str | Path) -> Path:
    """A path, or the recipe of that name in the installed package where there is no such file."""
    path = Path(path)
    inside = Path(__file__).parents[1] / path
    return inside if not path.exists() and path.parts[0] == "recipes" else path


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """``--key value`` and ``--key=value`` as a mapping; values are YAML, a lone key is true.

    Dashes in a key stand for underscores, but not in the names of a comparison's arms.

    >>> parse_overrides(["--data.limit", "8", "--bf16", "--learning-rate=1e-5"])
    {'data.limit': 8, 'bf16': True, 'learning_rate': 1e-05}
    """
    found: dict[str, Any] = {}
    key = None
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key if key.startswith("compare.") else key.replace("-", "_")
            found[key] = parse_value(value, key) if equals else True
            key = None if equals else key
        elif key is None:
            raise TOPDError(f"command line: {word!r} stands alone. Write --key value.")
        else:
            found[key] = parse_value(word, key)
            key = None
    return found


def parse_value(word: str, key: str = "") -> Any:
    """A value of the command line, which is YAML, but for comments: a prompt may have a ``#``.

    A prompt, by its ``key``, is text, whatever it looks like.

    >>> parse_value("1e-5"), parse_value("# Task"), parse_value("a #1")
    (1e-05, '# Task', 'a #1')
    >>> parse_value("Hint: 7", "teacher_prompt"), parse_value("share: 7")
    ('Hint: 7', {'share': 7})
    """
    try:
        value = parse_yaml("command line", word)
    except TOPDError:
        return word  # text that is no YAML, a template for instance
    quoted = word[:1] in ("'", '"')
    if key.endswith("teacher_prompt") and value is not None:  # YAML would join its lines
        return value if quoted and isinstance(value, str) else word
    cut = re.search(r"(^|\s)#", word) and not quoted
    return word if cut and (value is None or isinstance(value, str)) else value


def read_mapping(path: Path, begin: str = "student: PATH") -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises TOPDError if it does not."""
    try:
        with open(path, encoding="utf-8") as file:
            content = parse_yaml(str(path), file.read(LONGEST + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise TOPDError(f"{path}: cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise TOPDError(f"{path}: must be a mapping of keys to values. Begin with {begin}.")
    return content


def _set(path: Path, content: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = content.get(key)
        if isinstance(inner, str):  # student: PATH is short for student: {path: PATH}
            inner = {"path": inner}
        content[key] = dict(mapping_at(path, key, inner or {}))
        content = content[key]
    if isinstance(value, str) and (keys[:-1] == ["teachers"] or keys in (["student"], ["teacher"])):
        value = elsewhere(content.get(keys[-1]), value)
    content[keys[-1]] = value


def elsewhere(model: Any, path: str) -> Any:
    """Another path for a model: loaded and served as the recipe says, if it says so.

    Which weights it has, and how they are spoken to, the new path says. A repository's code is not
    trusted because another's was: only that of a folder on this machine.

    >>> elsewhere({"path": "a", "revision": "b", "dtype": "bfloat16"}, "c")
    {'dtype': 'bfloat16', 'path': 'c'}
    """
    if not isinstance(model, Mapping) or path == "self":
        return path
    kept = {key: model[key] for key in HOW if key in model}
    if not Path(path).expanduser().is_dir():
        kept.pop("trust_remote_code", None)
    return {**kept, "path": path}


def mapping_at(path: Path, place: str, value: Any) -> dict[str, Any]:
    """The value, which must be a mapping. Raises TOPDError."""
    if not isinstance(value, dict):
        raise TOPDError(
            f"{path}: {place} must be a mapping of keys to values (given: {shown(value)})."
        )
    return value


ALIASES = {  # names of other trainers
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
    "output": "output_dir",
    "lambda": "trajectory_weight",
    "window": "window_length",
}


EXPLAINED = {  # where the keys of a section are
    **dict.fromkeys(("", STAGE_1), "topd settings WORD finds them"),
    "lora.": "See peft.LoraConfig",
}


def refuse_unknown(
    path: Path, content: Mapping[str, Any], known: set[str], section: str = ""
) -> None:
    """Raises TOPDError for a key that is not among those known, with the nearest one."""
    for key in content:
        if key not in known:
            alias = ALIASES.get(str(key))
            near = (
                [alias] if alias in known else difflib.get_close_matches(str(key)[:100], known, n=1)
            )
            where = EXPLAINED.get(section) or f"It has {', '.join(sorted(known))}"
            hint = f" Did you mean {near[0]}?" if near else f" {where}."
            place = f" in {section[:-1]}" if section else ""
            raise TOPDError(f"{path}: unknown key {shown(key)}{place}.{hint}")
