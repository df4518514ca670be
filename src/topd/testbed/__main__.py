"""``python -m topd.testbed FAMILY ROLE``: make the tiny models that come with the package again."""

from pathlib import Path
from typing import Annotated

import typer

from topd.testbed import FAMILIES, SCHEME, family_of, weights_of
from topd.testbed.models import Role, make


def _known(family: str) -> str:
    if family not in FAMILIES:
        raise typer.BadParameter(f"{family!r} is not one of {', '.join(FAMILIES)}.")
    return family


def main(
    family: Annotated[str, typer.Argument(help=", ".join(FAMILIES), callback=_known)],
    role: Annotated[Role, typer.Argument()],
    output: Annotated[Path | None, typer.Option(help="Folder; the package's own if none.")] = None,
) -> None:
    """Train a model of the testbed from scratch: some minutes on one core."""
    place = f"{SCHEME}{family}/{role}"
    folder = output or weights_of(place)
    make(family_of(place), role, folder)
    typer.echo(f"{folder}")


if __name__ == "__main__":
    typer.run(main)
