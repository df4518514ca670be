"""Rollouts as plain values for the fork viewer: token texts, losses, forks, windows, threads.

Every record here goes into the page as JSON and is shown as text, never as markup. Log-probs,
losses and probabilities are rounded to 1e-4, distances and masses to 1e-5; what is not finite
becomes None.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from topd.report.guided import asked_at, asked_of
from topd.report.text import counted, join_visible, plain, visible
from topd.runs.records import ForkRecord, RolloutRecord
from topd.runs.tokens import TokenTexts

ALIKE = 1e-3  # nats: the same loss, rounded
SHOWN_TARGETS = 4  # likeliest tokens of a soft target


@dataclass(frozen=True)
class Window:
    """One side of a fork: the text of each token, and its id."""

    texts: tuple[str, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class After:
    """What the student writes from the fork's prefix after an arm's updates, or before them."""

    arm: str
    distance: float | None
    window: Window


@dataclass(frozen=True)
class ForkView:
    """A candidate as the page shows it; ``loss`` is the sampled token loss, None if unknown.

    ``threads`` are (row, column, mass); ``targets`` the likeliest tokens and probabilities at each
    student position, empty where there is no soft target; ``equal`` counts the places at which
    both windows have the same token. ``asked`` says what the method does here, ``branch`` has the
    tokens that are learned in the rollout's place, if there are such. ``facts`` are more figures as
    text: name, value, explanation.
    """

    position: int
    loss: float | None
    distance: float | None
    verdict: str
    equal: int
    student: Window
    teacher: Window
    asked: str
    branch: Window | None
    facts: tuple[tuple[str, str, str], ...]
    threads: tuple[tuple[int, int, float | None], ...]
    targets: tuple[tuple[tuple[str, float | None], ...], ...]
    after: tuple[After, ...] = ()


@dataclass(frozen=True)
class RolloutView:
    """A rollout as the page shows it; log-probs in nats, empty where none was recorded.

    ``asked`` says what the method asks of it; ``weights`` are (token, weight) where that is not 1,
    ``advantages`` where that is not 0.
    """

    step: int
    number: int
    prompt: int
    finished: bool
    prompt_text: str
    texts: tuple[str, ...]
    ids: tuple[int, ...]
    student: tuple[float | None, ...]
    teacher: tuple[float | None, ...]
    asked: tuple[str, ...]
    weights: tuple[tuple[int, float | None], ...]
    advantages: tuple[tuple[int, float | None], ...]
    forks: tuple[ForkView, ...]
    whose: str = ""  # the teacher's name, where there are several
    replies: tuple[tuple[int, int], ...] = ()  # of an environment: from token, to token


@dataclass(frozen=True)
class Entry:
    """A line of the list of rollouts: enough to filter by without opening the rollout."""

    step: int
    number: int
    prompt: int
    preview: str
    words: str  # of the prompt, where it differs from the others
    forks: tuple[tuple[int, float | None, str], ...]  # position, distance, verdict


def view(rollout: RolloutRecord, tokens: TokenTexts) -> RolloutView:
    """A rollout for the page."""
    return RolloutView(
        step=rollout.step,
        number=rollout.rollout,
        prompt=rollout.prompt,
        finished=rollout.finished,
        prompt_text=join_visible(tokens.texts(rollout.prompt_ids)),
        texts=_texts(rollout.response_ids, tokens),
        ids=rollout.response_ids,
        student=tuple(
            None if rollout.is_reply(t) else _rounded(x) for t, x in enumerate(rollout.logprobs)
        ),
        teacher=tuple(_rounded(x) for x in rollout.teacher_logprobs),
        asked=asked_of(rollout) if rollout.guided else (),
        weights=tuple((t, _rounded(w)) for t, w in sorted(rollout.weights.items())),
        advantages=tuple((t, _rounded(a)) for t, a in enumerate(rollout.advantages) if a),
        forks=tuple(_fork(rollout, fork, tokens) for fork in rollout.forks),
        whose=plain(rollout.teacher or "", limit=40),
        replies=rollout.replies,
    )


def prompt_words(prompts: Sequence[str]) -> list[str]:
    """What tells each prompt from the others: its text without what all begin and end with.

    >>> prompt_words(["system A: how many apples?", "system A: how many pears?"])
    ['apples', 'pears']
    """
    different = set(prompts)
    start = _shared(different)
    end = _shared({text[start:][::-1] for text in different})
    while end and prompts[0][-end].isalnum():  # a whole word stays
        end -= 1
    found = []
    for text in prompts:
        first = text.rfind(" ", 0, start) + 1 if text[start - 1 : start].strip() else start
        found.append(plain(text[first : len(text) - end], limit=60) if len(different) > 1 else "")
    return found


def _shared(texts: Collection[str]) -> int:
    """How many characters all texts begin with."""
    first, last = min(texts, default=""), max(texts, default="")
    return next((i for i, c in enumerate(first) if last[i : i + 1] != c), len(first))


def entry(seen: RolloutView, words: str = "") -> Entry:
    """The line of the list that stands for a rollout."""
    return Entry(
        seen.step,
        seen.number,
        seen.prompt,
        plain("".join(seen.texts[:40]).replace("↵", ""), limit=90),
        words,
        tuple((fork.position, fork.distance, fork.verdict) for fork in seen.forks),
    )


def verdict_of(fork: ForkRecord) -> str:
    """``real``, ``alarm`` (high loss, near windows), or ``quiet``: neither.

    A probe's random and low-loss positions are quiet, and all of them until it has finished.
    """
    if fork.group in ("random", "low") or fork.real is None:
        return "quiet"
    return "real" if fork.real else "alarm"


def _sampled_loss(rollout: RolloutRecord, fork: ForkRecord) -> float | None:
    """log p_S - log p_T of the token, nats, as the text is shaded; None where one is not known.

    The record's ``token_loss`` is what ranked the candidates: of ``candidate_loss``, in its unit.
    """
    place = fork.position
    if min(len(rollout.logprobs), len(rollout.teacher_logprobs)) <= place:
        return None
    return rollout.logprobs[place] - rollout.teacher_logprobs[place]


def _facts(rollout: RolloutRecord, fork: ForkRecord) -> Iterator[tuple[str, str, str]]:
    """What is known of some forks only; a new column of the page is a line here."""
    if fork.rejoin is not None:
        yield "agree again", f"after {counted(fork.rejoin, 'token')}", ""
    if fork.group:
        yield "chosen as", plain(fork.group, limit=20), ""
    if fork.outcome:
        shares = (fork.outcome.before, fork.outcome.after, fork.outcome.alone)
        before, after, own = (f"{share:.0%}" for share in shares)
        yield (
            "right answers",
            f"{before} if the teacher takes over here, {after} if after this token, "
            f"{own} by the student",
            "how often the answer is right when it is continued to its end",
        )
    if fork.converged is False:
        yield "plan", "did not converge", "its mass does not fit both windows: an estimate"
    loss = _sampled_loss(rollout, fork)
    if loss is None or not abs(loss - fork.token_loss) < ALIKE:
        score = f"{fork.token_loss:.4g}" if math.isfinite(fork.token_loss) else "not finite"
        yield "candidate_loss", score, "what ranks the candidates of this run"


def _fork(rollout: RolloutRecord, fork: ForkRecord, tokens: TokenTexts) -> ForkView:
    pairs = zip(fork.student_tokens, fork.teacher_tokens, strict=False)
    branch = next((b.tokens for b in rollout.branches if b.start == fork.position), ())
    return ForkView(
        position=fork.position,
        loss=_rounded(_sampled_loss(rollout, fork)),
        distance=_rounded(fork.distance, 5),
        verdict=verdict_of(fork),
        facts=tuple(_facts(rollout, fork)),
        equal=sum(a == b for a, b in pairs),
        student=_window(fork.student_tokens, tokens),
        teacher=_window(fork.teacher_tokens, tokens),
        asked=asked_at(rollout, fork) if rollout.guided else "",
        branch=_window(branch, tokens) if branch else None,
        threads=tuple((i, j, _rounded(mass, 5)) for i, j, mass in fork.plan),
        targets=_targets(rollout, fork, tokens) if verdict_of(fork) == "real" else (),
        after=tuple(
            After(
                plain(sample.arm, limit=40),
                _rounded(sample.distance, 5),
                _window(sample.student_tokens, tokens),
            )
            for sample in fork.after
        ),
    )


def _targets(
    rollout: RolloutRecord, fork: ForkRecord, tokens: TokenTexts
) -> tuple[tuple[tuple[str, float | None], ...], ...]:
    """The likeliest tokens of the soft target at each position of the window, or nothing."""
    found = {target.position: target for target in rollout.targets}
    places = range(fork.position, fork.position + len(fork.student_tokens))
    shown = []
    for place in places:
        target = found.get(place)
        pairs = zip(target.tokens, target.probabilities, strict=True) if target else ()
        likeliest = sorted(pairs, key=lambda pair: -pair[1])[:SHOWN_TARGETS]
        shown.append(
            tuple((visible(tokens.texts([token])[0]), _rounded(p)) for token, p in likeliest)
        )
    return tuple(shown) if any(shown) else ()


def _window(ids: tuple[int, ...], tokens: TokenTexts) -> Window:
    return Window(_texts(ids, tokens), ids)


def _texts(ids: Sequence[int], tokens: TokenTexts) -> tuple[str, ...]:
    return tuple(visible(text) for text in tokens.texts(ids))


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, digits)
