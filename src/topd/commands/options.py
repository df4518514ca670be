"""The arguments and options of the command line, each with its help. Imports nothing heavy."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

QUICKSTART = Path(__file__).parents[1] / "testbed" / "quickstart.yaml"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"topd {version('topd')}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, under runs/.")]
NO_RECIPE = Path("--")  # as if options began at once
RecipeFile = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        show_default=False,
        help="YAML file; see recipes/. Or none: --student MODEL --teacher MODEL --data.path FILE.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Log lines instead of progress bars.")]
Problems = Annotated[
    str,
    typer.Argument(
        help="JSONL, JSON, CSV, TSV or Parquet: GSM8K, MATH-500, AIME, HMMT, or another with "
        "--columns."
    ),
]
Columns = Annotated[str, typer.Option(help="prompt=NAME,answer=NAME, if the format is unknown.")]
Split = Annotated[str | None, typer.Option(help="Of data with several: the one to evaluate on.")]
Samples = Annotated[int, typer.Option(help="Responses a problem, besides the greedy one.")]
Temperature = Annotated[float, typer.Option(help="Of the samples.")]
TopP = Annotated[float, typer.Option(help="Of the samples.")]
MaxTokens = Annotated[int, typer.Option(help="Longest response.")]
Limit = Annotated[int | None, typer.Option(help="Take the first problems only.")]
BatchSize = Annotated[int, typer.Option(help="Responses at a time; changes no result.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"],
    typer.Option(metavar="<str>", help="Of the weights: float32, bfloat16 or float16."),
]
Chat = Annotated[bool | None, typer.Option("--chat/--no-chat", help="Chat template, if there.")]
TemplateKwargs = Annotated[
    str | None,
    typer.Option(
        help="As in a recipe, e.g. '{enable_thinking: false}'; by default those of the run."
    ),
]
Output = Annotated[
    str,
    typer.Option("--output", "--output-dir", help="Folder of the results; by default below runs/."),
]
Updates = Annotated[
    int, typer.Option(min=0, help="Updates whose decisions are re-derived; 0: no models.")
]
UpdatesSeed = Annotated[
    int | None, typer.Option(help="Which updates; by default a random one, which is printed.")
]
Tolerance = Annotated[float, typer.Option(min=0, help="By how much a number may differ.")]
TrustCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code of the run's models and method.")
]
TrustModels = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code of the models' repositories.")
]
OwnTeacher = Annotated[
    list[str] | None,
    typer.Option(metavar="URL", help="Your server of a served teacher; the run's is not asked."),
]
OwnPooling = Annotated[
    list[str] | None, typer.Option(metavar="URL", help="Your server of its last hidden states.")
]
OwnKey = Annotated[str | None, typer.Option(help="Environment variable with their API key.")]
ServedModel = Annotated[str, typer.Argument(metavar="MODEL", help="As in the recipe.")]
Host = Annotated[str, typer.Option(help="Address to listen at.")]
Port = Annotated[int, typer.Option(help="Of the first server; a second has the next one.")]
Python = Annotated[str, typer.Option(help="A Python that has vLLM; by default this one.")]
Patience = Annotated[float, typer.Option(help="Seconds until the servers must answer.")]
Format = Annotated[Literal["svg", "png", "pdf"], typer.Option(help="Of the files.")]
