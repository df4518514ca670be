"""Text joined to token ids at drawn borders: ``python -m bench.border SPEC...``.

SPEC is a path or the fields of a model as YAML: ``{path: package://NAME, gguf_file: ...}``.
Every border is between two tokens of a drawn text; another drawn text comes after it.
"""

import random
from typing import Annotated

import typer

from topd.commands.yaml_text import parse_yaml
from topd.inputs.border import Border
from topd.inputs.models import ModelSpec

PARTS = [
    *("so the answer is", " 12", "\n", "\n\n", "  ", "\t", ".", ",", " =", "x", "+", "'s", "don't"),
    *(
        "é",
        "ü",
        " naïve",
        "東京",
        "🙂",
        "👩‍🔬",
        "π ≈ 3.14",
        "Ω",
        "def f(x):\n    return",
        "\\boxed{7}",
    ),
]


def main(
    specs: list[str], borders: Annotated[int, typer.Option(help="Of each tokenizer.")] = 10_000
) -> None:
    """Count borders whose join does not read as what was written; exits with 1 if there are any."""
    wrong = 0
    for spec in specs:
        given = parse_yaml("spec", spec) if spec.startswith("{") else {"path": spec}
        found = counted(Border(ModelSpec(**given).load_tokenizer()), borders)
        print(given["path"], ", ".join(f"{number} {name}" for name, number in found.items()))
        wrong += found["wrong"] + found["lost"]
    raise typer.Exit(int(wrong > 0))


def counted(border: Border, borders: int) -> dict[str, int]:
    """Of so many borders: inside a character, without tokens (lost), and read otherwise (wrong)."""
    rng, inside, lost, wrong = random.Random(0), 0, 0, 0
    for _ in range(borders):
        own, more = ("".join(rng.choices(PARTS, k=rng.randint(1, 12))) for _ in range(2))
        ids = tuple(border.tokenizer("a" + own, add_special_tokens=False)["input_ids"])
        before = ids[: rng.randint(1, len(ids))]
        known, found = border.text(before), border.ids(before, more)
        inside += known is None
        lost += known is not None and found is None
        read = [border.tokenizer.decode([*before, *(found or ())])]
        read += [border.tokenizer.decode(before) + more]
        wrong += found is not None and read[0] != read[1]
    return {"borders": borders, "inside a character": inside, "lost": lost, "wrong": wrong}


if __name__ == "__main__":
    typer.run(main)
