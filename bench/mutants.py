"""Do the tests of the core notice when it is wrong? What mutmut found, module by module.

``make mutants`` changes the core one small step at a time, runs the tests that reach the change,
and calls this. A mutant is *killed* if a test fails. One whose tests ran out of time is not, since
a busy machine is enough for that. Survivors are listed with what was changed; those that change
nothing that could be seen have their reason in ``docs/results/mutants_equivalent.json``::

    [{"function": "solve", "was": LINE, "becomes": [LINE, ...], "reason": WORDS}]

A survivor stays a survivor with a reason or without: the rate counts them all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path("docs/results")
COLUMNS = ("mutants", "killed", "timeout", "survived", "no tests", "other", "equivalent")

Mutant = dict[str, Any]


def main(
    results: Annotated[Path, typer.Option(help="Where mutants.json goes.")] = RESULTS,
    least: Annotated[float, typer.Option(help="Exit code 1 below this share of killed.")] = 0.85,
) -> None:
    """Read the folder mutants/ and write mutants.json; print the table and what survived."""
    reasons = json.loads((RESULTS / "mutants_equivalent.json").read_text())
    found = list(judged(all_mutants(), reasons))
    record = {
        "mutmut": version("mutmut"),
        "modules": {
            module: counts([m for m in found if m["module"] == module])
            for module in sorted({m["module"] for m in found})
        },
        "all": counts(found),
        "survivors": [m for m in found if m["status"] != "killed"],
        "unused_reasons": unused(found, reasons),
    }
    (results / "mutants.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table({**record["modules"], "all": record["all"]}))
    for mutant in record["survivors"]:
        if not mutant.get("reason"):
            print("{module}.{function}: {status}\n  - {was}\n  + {becomes}".format(**mutant))
    if record["all"]["rate"] < least:
        raise typer.Exit(1)


def all_mutants() -> Iterable[Mutant]:
    """Every mutant with its module, function and status; what was changed, if it was not killed.

    Raises:
        ValueError: there are some that were not tried.
    """
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code
    from mutmut.utils.file_utils import walk_mutatable_files
    from mutmut.utils.format_utils import orig_function_and_class_names_from_key

    for path in sorted(walk_mutatable_files()):
        data = SourceFileMutationData(path=path)
        data.load()
        for name, code in data.exit_code_by_key.items():
            status = status_by_exit_code[code]
            if status == "not checked":
                raise ValueError(f"{name} was not tried. Let make mutants run to its end.")
            function, owner = orig_function_and_class_names_from_key(name)
            mutant = {
                "module": path.stem,
                "function": f"{owner}.{function}" if owner else function,
                "status": status,
            }
            if status != "killed":
                mutant |= changed_lines(get_diff_for_mutant(name, path=path))
            yield mutant


def changed_lines(diff: str) -> dict[str, str]:
    """The lines that a diff takes out, and those that it puts in; each as one line."""
    lines = diff.splitlines()[3:]  # after the names and the place
    return {
        key: " ".join(line[1:].strip() for line in lines if line.startswith(sign))
        for key, sign in (("was", "-"), ("becomes", "+"))
    }


def judged(mutants: Iterable[Mutant], reasons: Sequence[Mapping[str, Any]]) -> Iterable[Mutant]:
    """The mutants, those that are equivalent with the reason."""
    for mutant in mutants:
        known = [said["reason"] for said in reasons if speaks_of(said, mutant)]
        yield {**mutant, "reason": known[0]} if known else mutant


def speaks_of(said: Mapping[str, Any], mutant: Mutant) -> bool:
    """Whether a reason is given for a survivor."""
    return (
        mutant["status"] == "survived"
        and (said["function"], said["was"]) == (mutant["function"], mutant["was"])
        and mutant["becomes"] in said["becomes"]
    )


def unused(found: Sequence[Mutant], reasons: Sequence[Mapping[str, Any]]) -> list[str]:
    """Reasons for mutants that were killed or are not there."""
    return [said["was"] for said in reasons if not any(speaks_of(said, m) for m in found)]


def counts(mutants: Sequence[Mutant]) -> dict[str, Any]:
    """How many there are of each kind, and the share that was killed."""
    seen = Counter(mutant["status"] for mutant in mutants)
    named = ("killed", "timeout", "survived", "no tests")
    return {
        "mutants": len(mutants),
        **{status: seen[status] for status in named},
        "other": sum(seen.values()) - sum(seen[status] for status in named),
        "equivalent": sum("reason" in mutant for mutant in mutants),
        "rate": seen["killed"] / len(mutants),
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a module, in Markdown."""
    lines = [f"| module | {' | '.join(COLUMNS)} | rate |", "|" + "---|" * 9]
    for name, row in rows.items():
        cells = [f"`{name}`", *(str(row[column]) for column in COLUMNS), f"{row['rate']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
