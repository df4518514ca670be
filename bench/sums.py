"""The word problems of recipes/smollm2_sums.yaml, made again: ``python -m bench.sums``.

Eight kinds of sentences with one step each. No problem of the test file is in the training file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import typer

NAMES = "Ann Ben Carla Dan Eva Finn Grace Hugo Ida Jack Kim Leo Mia Noah Olga Paul".split()  # noqa: SIM905
THINGS = "apples pens books coins shells stickers marbles cards cookies stamps".split()  # noqa: SIM905
KINDS = (
    ("{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?", "+"),
    ("{name} finds {a} {things} on Monday and {b} {things} on Tuesday. How many {things} does "
     "{name} find in all?", "+"),
    ("There are {a} {things} in a red box and {b} {things} in a blue box. How many {things} are "
     "there in all?", "+"),
    ("{name} has {a} {things} and gives {b} of them away. How many {things} are left?", "-"),
    ("{name} had {a} {things} and lost {b} of them. How many {things} does {name} still have?",
     "-"),
    ("{name} needs {a} {things} and has {b}. How many more {things} does {name} need?", "-"),
    ("{name} has {a} bags with {b} {things} in each. How many {things} is that?", "*"),
    ("A shop packs {b} {things} in each box. How many {things} are in {a} boxes?", "*"),
)  # fmt: skip
FILES = {"train": 160, "test": 40}


def problems(seed: int) -> Iterator[dict[str, str]]:
    """Rows with ``prompt``, ``answer`` and ``solution``, kind after kind, no two alike."""
    draw, seen, made = random.Random(seed), set[str](), 0
    while True:
        words, sign = KINDS[made % len(KINDS)]
        least, most = (2, 9) if sign == "*" else (3, 20)
        b, a = sorted(draw.randint(least, most) for _ in range(2))
        prompt = words.format(name=draw.choice(NAMES), things=draw.choice(THINGS), a=a, b=b)
        if prompt in seen or (sign == "-" and a == b):
            continue
        seen.add(prompt)
        made += 1
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        answer = f"#### {value}"
        yield {"prompt": prompt, "answer": answer, "solution": f"{a} {sign} {b} = {value}"}


def main(folder: Path = Path("recipes/sums"), seed: int = 1) -> None:
    """Write FOLDER/train.jsonl and FOLDER/test.jsonl."""
    folder.mkdir(exist_ok=True)
    rows = problems(seed)
    for name, count in FILES.items():
        lines = [json.dumps(next(rows)) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
