"""Run folders written by hand, with numbers that a test can name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

WORDS = [" so", " the", " sum", " is", " two", " three", ".", " then", " and", " thus"]
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>document.title = 'owned'</script>",
    "<!--<script>",
    "\"'><img src=x onerror=\"document.title='owned'\">",
    "javascript:alert(1)",
    "\u202egnp.exe\u2066",
    "a\ud800b",
    "\x1b[31mred\x00",
    "x" * 100_000,
    "{{ 7 * 7 }}${7*7}$\\frac",
    "\n\n\t\r",
    "东京 🙂 é",
]


def lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def fork(position: int, distance: float, real: bool, n: int = 3, **changes: Any) -> dict[str, Any]:
    """A candidate whose windows of n tokens are matched one to one, in order."""
    return {
        "position": position,
        "token_loss": 2.5,
        "distance": distance,
        "real": real,
        "teacher_tokens": list(range(n)),
        "student_length": n,
        "plan": [[i, i, 1 / n] for i in range(n)],
        **changes,
    }


def rollout(step: int, number: int, prompt: int, ids: Sequence[int]) -> dict[str, Any]:
    """Log-probs -0.5 of the student and -0.5 - t/10 of the teacher: the loss at t is t/10."""
    return {
        "step": step,
        "rollout": number,
        "prompt": prompt,
        "prompt_ids": [0, 1],
        "teacher_prompt_ids": [0, 1],
        "response_ids": list(ids),
        "logprobs": [-0.5] * len(ids),
        "teacher_logprobs": [-0.5 - t / 10 for t in range(len(ids))],
        "finished": True,
        "text": "only for reading",
    }


def guidance(
    step: int, number: int, prompt: int, forks: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Soft targets at every position of the real forks: token 4 with 3/4, token 5 with 1/4."""
    targets = [
        {"position": f["position"] + i, "tokens": [4, 5], "probabilities": [0.75, 0.25]}
        for f in forks
        if f["real"]
        for i in range(f["student_length"])
    ]
    return {
        "step": step,
        "rollout": number,
        "prompt": prompt,
        "forks": list(forks),
        "weights": {},
        "capped": [],
        "targets": targets,
    }


def log(step: int) -> dict[str, float]:
    """What the trainer logs after an update; every number differs from update to update."""
    return {
        "step": step,
        "loss": 1.0 / step,
        "reverse_kl": 0.5 / step,
        "entropy": 2.0 + step / 7,
        "topd/trajectory_loss": 9.0 / step,
        "topd/mean_ot": 0.6 - step / 100,
        "topd/false_alarm_share": 0.25,
        "completions/mean_length": 90.0 + step,
        "completions/clipped_ratio": 0.125,
        "completions/repeated_4gram_share": 0.0625,
        "seconds/rollouts": 2.0,
        "seconds/learning": 1.0 + step,
    }


def tokens(words: Sequence[str]) -> list[dict[str, Any]]:
    return [{"id": i, "text": word} for i, word in enumerate(words)]


def training(
    folder: Path, *, rollouts: int = 6, length: int = 12, prompts: int = 3, words: Any = WORDS
) -> Path:
    """A run of two rollouts an update over ``prompts`` prompts, again and again.

    Each has a real divergent point at 2 (OT 0.5 + n/1000) and, if even, a false alarm at 6 (0.1).
    The first four tokens depend on the prompt alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, guided = [], []
    for n in range(rollouts):
        prompt, step, number = n % prompts, n // 2, n % 2
        ids = [
            (prompt + t + (n // prompts * 3 if t >= 4 else 0)) % len(words) for t in range(length)
        ]
        forks = [fork(2, 0.5 + n / 1000, True)]
        if n % 2 == 0:
            forks.append(fork(6, 0.1, False))
        rows.append(rollout(step, number, prompt, ids))
        guided.append(guidance(step, number, prompt, forks))
    lines(folder / "rollouts.jsonl", rows)
    lines(folder / "guidance.jsonl", guided)
    lines(folder / "tokens.jsonl", tokens(words))
    lines(folder / "metrics.jsonl", [log(step) for step in range(1, max(rollouts // 2, 1) + 1)])
    models = {side: {"name": f"models/{side}-of-test"} for side in ("student", "teacher")}
    (folder / "manifest.json").write_text(json.dumps({"models": models, "seed": 7}))
    (folder / "run.json").write_text(json.dumps({"recipe": {}, "config": {"method": "topd"}}))
    return folder


POSITIONS = {"high": (0.9, 0.7, 0.1, 0.5), "random": (0.3, 0.4), "low": (0.2, 0.1, 0.3)}


def probe(folder: Path) -> Path:
    """A probe of one rollout with nine positions; the third high-loss one is a false alarm."""
    training(folder, rollouts=1, length=12)
    for name in ("metrics.jsonl", "guidance.jsonl"):
        (folder / name).unlink()
    rows, position = [], 0
    for group, distances in POSITIONS.items():
        for distance in distances:
            rows.append(
                {
                    "rollout": 0,
                    "prompt": position % 3,
                    "position": position,
                    "group": group,
                    "token_loss": 4.0 - position / 4,
                    "distance": distance,
                    "real": group == "high" and distance > 0.25,
                    "rejoin": 2 if distance < 0.6 else None,
                    "student_tokens": [1, 2],
                    "teacher_tokens": [1, 3],
                    "plan": [[0, 0, 0.5], [1, 1, 0.5]],
                    "later_key": "ignored",
                }
            )
            position += 1
    lines(folder / "positions.jsonl", rows)
    summary = {
        "pearson": {"value": 0.126, "low": 0.1, "high": 0.15},
        "threshold": 0.25,
        "verdict": "Token loss is a weak guide for this pair.",
        "pairs": [{"student": " so", "teacher": " thus", "count": 12}],
    }
    (folder / "probe.json").write_text(json.dumps({"summary": summary}))
    return folder


SAMPLES = {"before": (0.5, 0.6, 0.7), "opd": (0.4, 0.5, 0.3), "topd": (0.1, 0.2, 0.3)}


def repair(folder: Path) -> Path:
    """Three samples, each in a rollout of its own at token 2; the teacher writes 0, 1, 2."""
    training(folder, rollouts=3)
    for name in ("metrics.jsonl", "guidance.jsonl"):
        (folder / name).unlink()
    rows = [{**rollout(0, i, i, [i + t for t in range(6)])} for i in range(3)]
    lines(folder / "rollouts.jsonl", rows)
    samples = []
    for i in range(3):
        place = {"sample": i, "rollout": i, "prompt": i, "position": 2}
        for arm, distances in SAMPLES.items():
            record = {**place, "arm": arm, "distance": distances[i], "student_tokens": [0, i, 2]}
            if arm == "before":
                record |= {"found": 0.8 + i / 100, "teacher_tokens": [0, 1, 2]}
            samples.append(record)
    lines(folder / "samples.jsonl", samples)
    arms = {arm: {"mean": sum(d) / 3, "low": min(d), "high": max(d)} for arm, d in SAMPLES.items()}
    (folder / "repair.json").write_text(json.dumps({"arms": arms, "samples": 3}))
    return folder


def compare(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arms = {"opd": 0.40, "topd": 0.46}
    summary = {
        arm: {
            "greedy": {"mean": mean, "low": mean - 0.03, "high": mean + 0.04},
            "pass@1": {"mean": mean - 0.1, "low": mean - 0.12, "high": mean - 0.08},
            "greedy_vs_opd": {"mean": mean - 0.4, "low": mean - 0.42, "high": mean - 0.38},
            "seconds": 100.0,
            "teacher_tokens": 5000,
        }
        for arm, mean in arms.items()
    }
    content = {"family": "sums", "arms": list(arms), "seeds": [1, 2], "baseline": "opd"}
    (folder / "compare.json").write_text(json.dumps({**content, "summary": summary}))
    lines(
        folder / "results.jsonl",
        [
            {
                "arm": arm,
                "seed": seed,
                "greedy": mean,
                "pass@1": mean - 0.1,
                "seconds": 100.0,
                "teacher_tokens": 5000,
                "curve": [
                    {
                        "step": s,
                        "seconds": 9.0 * s,
                        "greedy": mean * s / 4 + seed / 100,
                        "pass@1": 0.1,
                    }
                    for s in (2, 4)
                ],
            }
            for arm, mean in arms.items()
            for seed in (1, 2)
        ],
    )
    return folder


def interval(mean: float, low: float, high: float, level: float = 0.95) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high, "problems": 4, "level": level}


def answer(problem: int, sample: int | None, right: bool, text: str, **more: Any) -> dict[str, Any]:
    return {
        "problem": problem,
        "sample": sample,
        "ids": [1, 2, 3],
        "text": text,
        "verified": right,
        "finished": True,
        **more,
    }


def evaluation(folder: Path) -> Path:
    """Of four problems the first is solved, greedily and in one of two samples; one is cut off."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "greedy": interval(0.25, 0.006, 0.806),
        "pass@1": interval(0.125, 0.003, 0.7),
        "pass@2": interval(0.25, 0.006, 0.806),
        "greedy_length": interval(3.0, 1.4, 3.0),
        "mean_length": interval(3.0, 1.4, 3.0),
        "greedy_truncated": interval(0.25, 0.006, 0.806),
        "truncated": interval(0.0, 0.0, 0.602),
    }
    settings = {
        "model": {"path": "runs/first/student", "dtype": "float32"},
        "data": {"path": "data/test.jsonl", "samples": 2, "max_tokens": 3},
    }
    content = {"problems": 4, "samples": 2, "figures": figures, "settings": settings}
    (folder / "evaluation.json").write_text(json.dumps(content))
    rows = [
        answer(i, sample, i == 0 and sample != 1, f"answer {i}", finished=(i, sample) != (3, None))
        for i in range(4)
        for sample in (None, 0, 1)
    ]
    lines(folder / "responses.jsonl", rows)
    return folder


def gate(folder: Path) -> Path:
    """Accuracy is worse, the length within its limit, calibration open; row 2 is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = [
        ("accuracy", 0.2, 0.5, interval(0.3, 0.1, 0.5), 0.02, "worse"),
        ("length", 10.0, 9.0, interval(-0.1, -0.2, 0.1), 0.25, "within"),
        ("calibration", 0.1, 0.11, interval(0.01, -0.2, 0.3), 0.02, "open"),
    ]
    names = ("name", "base", "candidate", "harm", "limit", "verdict")
    content = {
        "passed": False,
        "figures": [dict(zip(names, figure, strict=True)) for figure in figures],
        "remarks": ["open: 4 prompts do not tell."],
        "lost": [2],
        "suite": {"problems": {"path": "data/test.jsonl"}, "strict": False},
        "models": {"base": {"path": "org/base"}, "candidate": {"path": "runs/first/student"}},
    }
    (folder / "gate.json").write_text(json.dumps(content))
    for role in ("base", "candidate"):
        right = role == "base"
        lines(folder / f"{role}_problems.jsonl", [answer(2, None, right, f"{role} says")])
    return folder


KINDS = {make.__name__: make for make in (training, probe, repair, compare, evaluation, gate)}
