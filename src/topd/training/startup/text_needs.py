"""What a run asks of a teacher that gives only text, and what it cannot have: said at the start."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from topd.config import TOPDConfig
from topd.errors import TOPDError
from topd.inputs.text_models import is_by_text
from topd.methods import METHODS, method_named
from topd.types import NEEDS, Needs

BY_LOGPROBS = ("sampled", "spans")


def gives(teacher: object, args: TOPDConfig) -> Needs:
    """What a source of a teacher gives: one in this process log-probs, if asked, by spans."""
    if not is_by_text(teacher):
        return "distributions"
    if teacher.as_text and args.token_loss == "spans":
        return "logprobs"
    return "logprobs" if teacher.text and teacher.text.logprobs else "windows"


def check_gives(teachers: Sequence[object], args: TOPDConfig) -> None:
    """Refuse settings that need more of a teacher than it gives, all of them in one message.

    Raises TOPDError.
    """
    if args.token_loss == "spans" and not all(getattr(t, "as_text", False) for t in teachers):
        raise TOPDError(
            "token_loss: spans is for a teacher in this process that is read by text (as_text: "
            "true), as one with another tokenizer is. Of other teachers, served or not, every "
            "token's log-prob is its own: set token_loss: full, sampled or none."
        )
    given: Needs = min(
        [gives(teacher, args) for teacher in teachers], key=NEEDS.index, default=NEEDS[-1]
    )
    if given == "distributions":
        return
    if len(teachers) > 1:
        raise TOPDError(
            "teachers: one that gives only text does not go with others. Name it alone, in teacher."
        )
    spans = getattr(teachers[0], "as_text", False) and args.token_loss != "spans"
    found = _of_answers(args) if args.learns_from_answers else _of_rollouts(args, given, spans)
    found += _of_chat(teachers[0], args)
    if found:
        why, remedies = zip(*found, strict=True)
        raise TOPDError(
            f"teacher: gives only text, no distributions: {'; '.join(why)}. Set "
            f"{', '.join(remedies)}."
        )


def _of_chat(teacher: object, args: TOPDConfig) -> list[tuple[str, str]]:
    """A chat server's own template gets what every request has in ``extra``, and no more."""
    text, kwargs = getattr(teacher, "text", None), args.chat_template_kwargs
    asked = getattr(args, "answers", "teacher") != "data"
    if not (asked and kwargs and text and text.chat) or "chat_template_kwargs" in text.extra:
        return []
    return [
        (
            "chat_template_kwargs do not reach a chat server's own template",
            f"teacher.text.extra: {{chat_template_kwargs: {json.dumps(kwargs)}}}",
        )
    ]


def _of_answers(args: TOPDConfig) -> list[tuple[str, str]]:
    found = []
    if args.kd_ratio > 0:
        found.append(("kd_ratio is a share of a divergence from it", "kd_ratio: 0.0"))
    if args.top_k:
        found.append(("top_k is not in its API", "top_k: 0 (and teacher.text.extra)"))
    return found + _of_evaluations(args)


def _of_evaluations(args: TOPDConfig) -> list[tuple[str, str]]:
    asked = {"eval_strategy": args.eval_strategy != "no", "eval_on_start": args.eval_on_start}
    off = {"eval_strategy": "no (evaluation: in a recipe)", "eval_on_start": "false"}
    return [
        (f"{name} measures a divergence", f"{name}: {off[name]}") for name in asked if asked[name]
    ]


def _of_rollouts(args: TOPDConfig, given: Needs, spans: bool = False) -> list[tuple[str, str]]:
    """Why not, and the remedy, of each; ``spans``: log-probs of spans are to be had, if asked."""
    method, options = method_named(args.method), args.method_options
    lacks = NEEDS.index(method.needs) > NEEDS.index(given)
    known: dict[str, Any] = options if isinstance(options, dict) else {}
    enough = method.by_windows and known.items() >= method.by_windows.items()
    found: list[tuple[str, str]] = []
    if lacks and method.by_windows and not enough:
        shown = ", ".join(f"{k}: {v}" for k, v in method.by_windows.items())
        found.append((f"method {args.method} compares them", f"method_options: {{{shown}}}"))
    elif lacks and not enough:
        return _with_another(args, given, spans)
    tells = given == "logprobs"
    told = args.token_loss == "none" or (tells and args.token_loss in BY_LOGPROBS)
    if method.needs != "nothing" and not told:
        asked = "sampled" if tells else "spans" if spans and args.loss_temperature == 1 else ""
        words = [asked] if asked and method.of_tokens else [asked, "none"]  # it needs token losses
        instead = f"token_loss: {' or '.join(filter(None, words))}"
        found.append((f"token_loss {args.token_loss} is taken over them", instead))
        if not asked and (args.look_ahead_every, args.look_ahead_until) != (1, None):
            always = "look_ahead_every: 1, look_ahead_until: null"
            found.append(("updates that do not look ahead would learn nothing", always))
    if tells and args.loss_temperature != 1:
        found.append(("log-probs come at temperature 1", "temperature: 1"))
    if method.looks_ahead:
        if args.embedding == "teacher":
            found.append(("it has no embeddings for embedding: teacher", "embedding: student"))
        if NEEDS.index(args.detector.needs) > NEEDS.index(given):
            needs = f"candidate_loss {args.candidate_loss} needs {args.detector.needs}"
            found.append((needs, "candidate_loss: entropy, student_nll or rewritten"))
        if args.window_rejoin:
            found.append(("window_rejoin has no effect", "window_rejoin: 0"))
    return found + _of_evaluations(args)


def _with_another(args: TOPDConfig, given: Needs, spans: bool) -> list[tuple[str, str]]:
    """What to set where a method needs more than is given, with all that this needs besides."""
    needs = method_named(args.method).needs
    why, other = f"method {args.method} needs {needs}", copy.copy(args)
    if spans and needs == "logprobs":
        other.token_loss = "spans"
        by_windows = "(or a method by windows: docs/how-to/text-teacher.md)"
        return [(why, f"token_loss: spans {by_windows}"), *_of_rollouts(other, "logprobs")]
    enough = {n: m for n, m in METHODS.items() if NEEDS.index(m.needs) <= NEEDS.index(given)}
    fit = [name for name, method in enough.items() if method.needs != "nothing"]  # no control
    for name in args.brought:
        setattr(other, name, TOPDConfig.__dataclass_fields__[name].default)
    other.method_options = {}
    other.method = next(name for name in fit if enough[name].looks_ahead)
    rest = _of_rollouts(other, given, spans)
    return [(why, f"method: {' or '.join(fit)}"), *rest]
