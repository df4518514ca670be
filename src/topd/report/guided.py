"""What a method asks of a rollout, in words that follow from its line of guidance.jsonl alone.

Nothing here knows a method by name: branches, soft targets, weights, caps and advantages are told
as they are recorded, so that a method from outside is told truly too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topd.report.folder import Kind, kind_of, read_logs, settings_of
from topd.report.text import counted
from topd.runs.files import read_whole
from topd.runs.records import BranchRecord, ForkRecord, GuidanceRecord, RolloutRecord

LOSSES = {
    "cross_entropy": "cross-entropy",
    "forward_kl": "KL(p_T || p_S)",
    "reverse_kl": "KL(p_S || p_T)",
}
NOTHING = "Every token loss counts once, and nothing more is asked here."
PLACES = 8  # that are named one by one


@dataclass(frozen=True)
class Verdict:
    """How a run decides that a candidate is real: the names of both outcomes, and the reasons."""

    real: str = "real divergent point"
    alarm: str = "false alarm"
    why_real: str = "By the verdict of this run."
    why_alarm: str = "By the verdict of this run."

    def name(self, verdict: str) -> str:
        """Of ``real``, ``alarm`` or ``quiet``."""
        return {"real": self.real, "alarm": self.alarm}.get(verdict, "no verdict")

    @property
    def groups(self) -> tuple[str, str]:
        """Names of all that are real, and of all false alarms."""
        return _many(self.real), _many(self.alarm)

    @property
    def told(self) -> str:
        """The rule in sentences that need nothing beside them."""
        pairs = ((self.real, self.why_real), (self.alarm, self.why_alarm))
        return " ".join(f"{name[:1].upper()}{name[1:]}: {why}" for name, why in pairs if why)

    def why(self, verdict: str) -> str:
        """The reason for ``real``, ``alarm`` or ``quiet``, in a sentence."""
        quiet = "A position for comparison, or one whose verdict is still to come."
        return {"real": self.why_real, "alarm": self.why_alarm}.get(verdict, quiet)


def rule_of(folder: Path) -> Verdict:
    """How the run of a folder decides which candidates are real. Raises TOPDError: no run."""
    kind = kind_of(folder)
    found = read_whole(folder / "probe.json").get("threshold") if kind == "probe" else None
    value = found.get("value") if isinstance(found, dict) else None
    logs = read_logs(folder) if kind == "training" else []
    several = any(key.startswith("teacher/") for log in logs for key in log)
    return verdict_rule(kind, settings_of(folder), value, several=several)


def verdict_rule(
    kind: Kind, settings: Mapping[str, Any], threshold: float | None, *, several: bool = False
) -> Verdict:
    """The rule of a run.

    Args:
        kind: of the run folder.
        settings: those in its run.json; empty where there are none.
        threshold: of a probe, the OT distance that it has measured.
        several: whether rollouts have teachers of their own, whose candidates are ranked apart.
    """
    if kind == "probe":
        return _threshold(threshold, "the upper quartile over low-loss tokens")
    share, limit = settings.get("false_alarm_share"), settings.get("ot_threshold")
    if isinstance(limit, int | float):
        return _threshold(limit, "ot_threshold")
    if not isinstance(share, int | float):
        return Verdict()
    of = "batch" if kind == "repair" else "update"
    whose = f"its teacher's candidates in this {of}" if several else f"this {of}'s candidates"
    return _quota(share, whose)


def _threshold(limit: float | None, source: str) -> Verdict:
    if limit is None:
        return Verdict()
    return Verdict(
        why_real=f"Its OT distance is at least {limit:.4g} ({source}).",
        why_alarm=f"Its OT distance is below {limit:.4g} ({source})."
        if limit > 0
        else "Its windows are the same: its OT distance is 0.",
    )


def _quota(share: float, whose: str) -> Verdict:
    if share == 0:
        all_ = "All candidates of this run are, whatever their distance."
        return Verdict("taken as real", why_real=all_, why_alarm="")  # there are none
    nearest = f"the {100 * share:.4g} % of {whose} with the smallest OT distance"
    return Verdict(
        "real divergent point by quota",
        "false alarm by quota",
        f"Not among {nearest}. That is a quota, not a finding.",
        f"Among {nearest}, or its windows are the same. That is a quota, not a finding.",
    )


def asked_of(record: RolloutRecord) -> tuple[str, ...]:
    """What the method asks of a rollout, one sentence a kind of guidance."""
    said = [*_weighed(record), *_advantages(record)]
    if record.capped:
        places = _places(record.capped)
        said.append(f"The token loss is held down to the rollout's median at {places}.")
    if record.targets:
        places = counted(len(record.targets), "token")
        said.append(f"Soft targets at {places} of the student's own windows.")
    said += _own_tokens(record)
    said += (branch_words(b, record) for b in record.branches if not _is_own(b, record))
    return tuple(said) or (NOTHING,)


def asked_at(record: RolloutRecord, fork: ForkRecord) -> str:
    """What the method asks at one candidate."""
    window = range(fork.position, fork.position + max(len(fork.student_tokens), 1))
    targets = sum(target.position in window for target in record.targets)
    at = [b for b in record.branches if b.start == fork.position]
    said = [branch_words(b, record) for b in at if not _is_own(b, record)]
    if targets:
        said.append(
            f"Soft targets at {targets} of the {len(window)} tokens of the student's window: the "
            "teacher's tokens that each is matched with."
        )
    if fork.position in record.capped:
        said.append("The token loss is held down to the rollout's median where it is above.")
    weight = record.weights.get(fork.position, 1.0)
    if weight != 1:
        said.append(f"The token loss counts {weight:.4g} times.")
    advantage = record.advantages[fork.position : fork.position + 1]
    if any(advantage):
        said.append(f"Advantage {advantage[0]:.4g} on the log-prob of the sampled token.")
    return " ".join(said) or "The method asks nothing more here than the token loss."


def branch_words(branch: BranchRecord, record: GuidanceRecord) -> str:
    """A branch in a sentence: what is learned, where, and by which loss."""
    loss = LOSSES.get(branch.loss, branch.loss)
    by = f"{loss} with it" if branch.loss == "cross_entropy" else f"{loss} along it"
    whose = "the teacher's window" if _is_window(branch, record) else "a text of the method's own"
    if branch.go_on:
        whose += ", continued by the student,"
    return (
        f"At token {branch.start} the student learns {whose} in that window's own context, by "
        f"{by}: {counted(len(branch.tokens), 'token')}."
    )


def trajectory_caption(found: Mapping[str, None]) -> str:
    """What L_traj is taken along in a run, by its :func:`ways`; empty where there are none."""
    return f"L_traj, mean over guided tokens: {'; '.join(found)}." if found else ""


def _is_window(branch: BranchRecord, record: GuidanceRecord) -> bool:
    """Whether a branch begins with what the teacher wrote at its place."""
    windows = (fork.teacher_tokens for fork in record.forks if fork.position == branch.start)
    return any(
        window[: len(branch.tokens)] == branch.tokens[: len(window)] for window in windows if window
    )


def _is_own(branch: BranchRecord, record: RolloutRecord) -> bool:
    """Whether a branch is what the rollout itself says there, and no window."""
    end = branch.start + len(branch.tokens)
    own = record.response_ids[branch.start : end] == branch.tokens
    return own and not _is_window(branch, record)


def _own_tokens(record: RolloutRecord) -> Iterator[str]:
    """Branches along the rollout's own tokens, one sentence a loss."""
    own = [branch for branch in record.branches if _is_own(branch, record)]
    for loss in dict.fromkeys(branch.loss for branch in own):
        parts = [branch for branch in own if branch.loss == loss]
        places = [b.start + i for b in parts for i in range(len(b.tokens))]
        yield f"{LOSSES.get(loss, loss)} as well, on the rollout's own {_places(places)}."


def ways(record: GuidanceRecord) -> Iterator[str]:
    """What L_traj is taken along by one line of guidance."""
    if record.targets:
        yield "KL from the soft targets to the student, along the student's own window"
    for branch in record.branches:
        after = " and what the student wrote after it" if branch.go_on else ""
        loss = LOSSES.get(branch.loss, branch.loss)
        if _is_window(branch, record):
            yield f"{loss} along the teacher's window{after}, in that window's own context"
        else:
            yield f"{loss} on tokens that the method chose"


def _learnable(record: RolloutRecord) -> list[int]:
    """The tokens that no environment wrote: what it wrote is never learned."""
    return [t for t in range(len(record.response_ids)) if not record.is_reply(t)]


def _weighed(record: RolloutRecord) -> Iterator[str]:
    """Weights other than 1, of the tokens that can be learned."""
    own = _learnable(record)
    weights = {t: record.weights[t] for t in own if t in record.weights}
    if not weights:
        return
    values, places = list(weights.values()), list(weights)
    kept = [t for t in own if weights.get(t, 1.0) != 0]
    kept_values = {weights.get(t, 1.0) for t in kept}
    if not kept:
        yield "No token loss counts."
    elif 0 in values and len(kept_values) == 1:
        (value,) = kept_values
        yield (
            f"{len(kept)} of {counted(len(own), 'token')} count, {value:.4g} times each; the other "
            "token losses count nothing."
        )
    elif len(set(values)) == 1 and places == [t for t in own if t >= places[0]]:
        yield f"Token losses count {values[0]:.4g} times from token {places[0]} on."
    else:
        yield (
            f"Token losses are weighted: {min(values):.4g} to {max(values):.4g} at "
            f"{len(values)} of {counted(len(own), 'token')}."
        )


def _advantages(record: RolloutRecord) -> Iterator[str]:
    found = [value for value in record.advantages if value]
    if found:
        low, high = f"{min(found):.4g}", f"{max(found):.4g}"
        yield (
            f"Advantage {low if low == high else f'{low} to {high}'} on the log-prob of "
            f"{len(found)} of {counted(len(_learnable(record)), 'token')}; these were sampled, and "
            "below 0 they are made less likely."
        )


def _places(places: Sequence[int]) -> str:
    """The first of them one by one, the others as a number.

    >>> _places([5, 3])
    'token 3, 5'
    """
    named = ", ".join(map(str, sorted(places)[:PLACES]))
    return f"token {named}" + (f" and {len(places) - PLACES} more" * (len(places) > PLACES))


def _many(name: str) -> str:
    """The plural of a verdict's name.

    >>> _many("false alarm by quota")
    'false alarms by quota'
    """
    return re.sub(r"(point|alarm)\b", r"\1s", name, count=1)
