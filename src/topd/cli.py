"""The command line. Heavy imports wait for a command."""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    help="On-policy distillation that looks ahead (arXiv 2606.00305).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, under runs/.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; see recipes/.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Log lines instead of progress bars.")]
Columns = Annotated[str, typer.Option(help="prompt=NAME,answer=NAME, if the format is unknown.")]
Samples = Annotated[int, typer.Option(help="Responses a problem, besides the greedy one.")]
Temperature = Annotated[float, typer.Option(help="Of the samples.")]
TopP = Annotated[float, typer.Option(help="Of the samples.")]
MaxTokens = Annotated[int, typer.Option(help="Longest response.")]
Limit = Annotated[int | None, typer.Option(help="Take the first problems only.")]
BatchSize = Annotated[int, typer.Option(help="Responses at a time; changes no result.")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")]
Chat = Annotated[bool | None, typer.Option("--chat/--no-chat", help="Chat template, if there.")]
TemplateKwargs = Annotated[
    str, typer.Option(help="Of the chat template, e.g. '{enable_thinking: false}'.")
]
Output = Annotated[str, typer.Option(help="Folder of the results; by default below runs/.")]
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


# dashes and underscores alike, as in the keys of a recipe
EITHER = {"token_normalize_func": lambda name: name.replace("_", "-")}


def _settings_line() -> str:
    """The names of our own settings, read from the source: help must not wait for torch."""
    tree = ast.parse((Path(__file__).parent / "config.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    names = [
        node.target.id
        for node in classes["TOPDConfig"].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    return (
        f"Settings, each --NAME VALUE: {', '.join(names)}; and those of transformers' Trainer. "
        "topd settings WORD explains those with a word in them, topd methods the methods."
    )


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.print(f"topd {version('topd')}", highlight=False)
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
]


SETTINGS = _settings_line()


@app.callback()
def main(version: Version = False) -> None:
    """On-policy distillation that looks ahead (arXiv 2606.00305)."""


@app.command()
def methods() -> None:
    """What a student can learn by: every value of the setting method."""
    with _faults():
        from topd.commands.settings import RECOMMENDED, method_rows

        console.print(RECOMMENDED, highlight=False)
        for name, needs, words in method_rows():
            console.print(f"[bold]{name}[/bold]  {needs}", highlight=False)
            console.print(f"    {words}", markup=False, highlight=False)


@app.command(context_settings=EITHER)
def settings(
    word: Annotated[str, typer.Argument(help="In the name or the explanation; none: ours.")] = "",
) -> None:
    """Settings of a recipe with their defaults: our own, or all that have a word in them."""
    with _faults():
        from topd.commands.settings import setting_rows

        for name, default, words, _ in setting_rows(word):
            line = f"[bold]{escape(name)}[/bold] = {escape(default)}"
            console.print(line, highlight=False, soft_wrap=True)
            console.print(f"    {words}", markup=False, highlight=False)


@app.command(context_settings=EXTRA, epilog=SETTINGS)
def train(context: typer.Context, recipe: RecipeFile, quiet: Quiet = False) -> None:
    """Train a student on its own rollouts. Any key of the recipe: --key value, --data.limit 8."""
    _run(recipe, context.args, quiet, warmstart=False)


@app.command(context_settings=EXTRA, epilog=SETTINGS)
def warmstart(context: typer.Context, recipe: RecipeFile, quiet: Quiet = False) -> None:
    """Stage 1: the student learns from the teacher's answers, or from those of the data."""
    _run(recipe, context.args, quiet, warmstart=True)


@app.command(context_settings=EXTRA, epilog=SETTINGS)
def probe(context: typer.Context, recipe: RecipeFile, quiet: Quiet = False) -> None:
    """Where do student and teacher part, and does the token loss say so? No training."""
    with _faults():
        _check(recipe, context.args, "ProbeConfig")
        from topd.commands.probe import run_probe
        from topd.commands.tables import show_probe

        folder = run_probe(recipe, context.args, console=None if quiet else console)
    show_probe(console, _summary(folder, "probe.json"))
    _page(folder)


@app.command(context_settings=EXTRA, epilog=SETTINGS)
def repair(context: typer.Context, recipe: RecipeFile, quiet: Quiet = False) -> None:
    """Correct the student at single forks with each loss, and measure what comes back."""
    with _faults():
        _check(recipe, context.args, "RepairConfig")
        from topd.commands.repair import run_repair
        from topd.commands.tables import show_repair

        folder = run_repair(recipe, context.args, console=None if quiet else console)
    show_repair(console, _summary(folder, "repair.json"))
    _page(folder)


@app.command(context_settings=EXTRA, epilog=SETTINGS)
def compare(context: typer.Context, recipe: RecipeFile, quiet: Quiet = False) -> None:
    """Arms x seeds of one recipe, with paired intervals. Goes on where it was stopped."""
    _compare(recipe, context.args, quiet)


@app.command(context_settings=EXTRA)
def quickstart(context: typer.Context, quiet: Quiet = False) -> None:
    """Stage 1, then three ways on from it, OPD among them: two minutes on two idle cores."""
    _compare(Path(__file__).parent / "testbed" / "quickstart.yaml", context.args, quiet)


def _compare(recipe: Path, words: list[str], quiet: bool) -> None:
    with _faults():
        _check(recipe, words)
        from topd.commands.compare import run_compare
        from topd.commands.tables import show_compare

        folder = run_compare(recipe, words, console=None if quiet else console)
    show_compare(console, _summary(folder, "compare.json"))
    _page(folder)


def _page(folder: Path) -> None:
    """Write the report of a run and say where it is."""
    with _faults():
        from topd.report import write_report

        page = write_report(folder)
    console.print(f"report: {page}", soft_wrap=True, markup=False, highlight=False)


def _summary(folder: Path, name: str) -> dict[str, Any]:
    console.print(f"run folder: {folder}", soft_wrap=True, markup=False, highlight=False)
    return json.loads((folder / name).read_text(encoding="utf-8"))


@app.command("eval", context_settings=EITHER)
def evaluate_model(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or package://NAME.")],
    data: Annotated[str, typer.Argument(help="JSONL: GSM8K, MATH-500, AIME, HMMT, or --columns.")],
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file in the model's place.")] = None,
    dtype: Dtype = "float32",
    columns: Columns = "",
    samples: Samples = 4,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    max_tokens: MaxTokens = 1024,
    limit: Limit = None,
    batch_size: BatchSize = 16,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    chat: Chat = None,
    template_kwargs: TemplateKwargs = "{}",
    output: Output = "",
) -> None:
    """Verified answers on a file of problems, greedy and sampled, with intervals."""
    with _faults():
        from topd.commands.early import check_data, check_model

        check_model(model)
        check_data(data)
        from topd.commands.evaluate import run_evaluation, spec_of
        from topd.commands.keys import parse_overrides
        from topd.inputs.models import ModelSpec

        spec = spec_of(
            data,
            columns,
            samples=samples,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            chat=chat,
        )
        kwargs = parse_overrides(["--kwargs", template_kwargs])["kwargs"]
        source = ModelSpec(path=model, gguf_file=gguf_file, dtype=dtype)
        folder = run_evaluation(source, spec, kwargs, output, console)
    console.print(f"results: {folder}", soft_wrap=True, markup=False, highlight=False)


@app.command(context_settings=EITHER)
def gate(
    base: Annotated[str, typer.Argument(help="Folder, hub name, or package://NAME.")],
    candidate: Annotated[str, typer.Argument(help="The model that is to replace it.")],
    suite: Annotated[Path, typer.Option(help="YAML: problems, refusals, limits, error.")],
    dtype: Dtype = "float32",
    base_gguf_file: Annotated[str | None, typer.Option(help="GGUF file of the base.")] = None,
    output: Output = "",
) -> None:
    """Did anything get worse? Paired evaluation of a suite; exit code 1 on a regression."""
    with _faults():
        from topd.commands.early import check_model
        from topd.commands.keys import read_mapping

        read_mapping(suite, "problems: PATH")
        for model in (base, candidate):
            check_model(model)
        from topd.commands.gate import run_gate
        from topd.inputs.models import ModelSpec

        before = ModelSpec(path=base, gguf_file=base_gguf_file, dtype=dtype)
        after = ModelSpec(path=candidate, dtype=dtype)
        good = run_gate(before, after, suite, output=output, console=console)
    if not good:
        raise typer.Exit(1)


@app.command(context_settings=EITHER)
def report(
    run: RunFolder,
    rollouts: Annotated[int, typer.Option(min=1, help="Most rollouts in the page.")] = 1000,
) -> None:
    """Write RUN/report.html: figures and the fork viewer, one file that needs no network."""
    with _faults():
        _check_run(run)
        from topd.report import write_report

        path = write_report(run, rollouts=rollouts)
    console.print(f"report: {path}", soft_wrap=True, markup=False, highlight=False)


@app.command(context_settings=EITHER)
def show(
    run: RunFolder,
    rollout: Annotated[int, typer.Option(min=0, help="Line of rollouts.jsonl, from 0.")] = 0,
) -> None:
    """Show a rollout and its forks in the terminal."""
    with _faults():
        from topd.report.terminal import show as show_rollout

        show_rollout(run, rollout, console)


class Format(StrEnum):
    """Of pictures."""

    SVG = "svg"
    PNG = "png"
    PDF = "pdf"


@app.command(context_settings=EITHER)
def figures(
    run: RunFolder,
    format: Annotated[Format, typer.Option(help="Of the files.")] = Format.PDF,
    output: Annotated[Path | None, typer.Option(help="Folder; by default RUN/figures.")] = None,
) -> None:
    """Write the figures of a run as files, for a paper."""
    with _faults():
        from topd.report.paper import write_figures

        paths = write_figures(run, output or run / "figures", format=format.value)
    for path in paths:
        console.print(str(path), soft_wrap=True, markup=False, highlight=False)


Tolerance = Annotated[float, typer.Option(min=0, help="By how much a number may differ.")]
TrustCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code of the run's models and method.")
]
OwnTeacher = Annotated[
    list[str] | None,
    typer.Option(metavar="URL", help="Your server of a served teacher; the run's is not asked."),
]
OwnPooling = Annotated[
    list[str] | None, typer.Option(metavar="URL", help="Your server of its last hidden states.")
]
OwnKey = Annotated[str | None, typer.Option(help="Environment variable with their API key.")]


@app.command(context_settings=EITHER)
def audit(
    run: RunFolder,
    updates: Annotated[
        int, typer.Option(min=0, help="Updates whose decisions are re-derived; 0: no models.")
    ] = 3,
    seed: Annotated[
        int | None, typer.Option(help="Which updates; by default a random one, which is printed.")
    ] = None,
    tolerance: Tolerance = 1e-4,
    trust: TrustCode = False,
    served_teacher: OwnTeacher = None,
    served_pooling: OwnPooling = None,
    api_key_env: OwnKey = None,
) -> None:
    """Was this run's folder changed? Checks chain, files, models, data; samples decisions."""
    with _faults():
        _check_run(run)
        from topd.commands.audit import Trust, audit_run

        allowed = Trust(trust, served_teacher or (), served_pooling or (), api_key_env)
        found = audit_run(run, updates=updates, seed=seed, tolerance=tolerance, trust=allowed)
    _report_findings(found.checked, found.faults)


@app.command(context_settings=EITHER)
def replay(
    run: RunFolder,
    step: Annotated[int, typer.Option(min=0, help="Number of the update, from 0.")],
    tolerance: Tolerance = 0.0,
    trust: TrustCode = False,
    served_teacher: OwnTeacher = None,
    served_pooling: OwnPooling = None,
    api_key_env: OwnKey = None,
) -> None:
    """Repeat an update from the checkpoint before it and compare it with the records."""
    with _faults():
        _check_run(run)
        from topd.commands.audit import Trust, replay_step

        allowed = Trust(trust, served_teacher or (), served_pooling or (), api_key_env)
        found = replay_step(run, step, tolerance=tolerance, trust=allowed)
    _report_findings(found.checked, found.faults)


def _check_run(folder: Path) -> None:
    from topd.commands.early import check_run

    check_run(folder)


def _report_findings(checked: list[str], faults: list[str]) -> None:
    """Exit code 1 if there are faults."""
    for line in checked:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    for fault in faults:
        errors.print(fault, style="bold red", soft_wrap=True, markup=False, highlight=False)
    if faults:
        raise typer.Exit(1)
    console.print("no fault found", style="green")


ServedModel = Annotated[str, typer.Argument(metavar="MODEL", help="As in the recipe.")]
Host = Annotated[str, typer.Option(help="Address to listen at.")]
Port = Annotated[int, typer.Option(help="Of the first server; a second has the next one.")]
Python = Annotated[str, typer.Option(help="A Python that has vLLM; by default this one.")]
Patience = Annotated[float, typer.Option(help="Seconds until the servers must answer.")]


@app.command("serve-teacher", context_settings=EXTRA)
def serve_teacher(
    context: typer.Context,
    model: ServedModel,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    python: Python = "",
    patience: Patience = 3600,
) -> None:
    """Serve a teacher with vLLM, as a recipe's teacher.served wants it; Ctrl-C ends it.

    Further options go to both of its servers, e.g. --tensor-parallel-size 4 --max-model-len 16384
    --gpu-memory-utilization 0.45. VLLM_API_KEY in the environment becomes their API key; it guards
    paths below /v1 only, so keep them on loopback or a private network.
    """
    kinds = ("completions", "pooling")
    _serve("teacher", kinds, model, context.args, host, port, python, patience)


@app.command("serve-student", context_settings=EXTRA)
def serve_student(
    context: typer.Context,
    model: ServedModel,
    host: Host = "127.0.0.1",
    port: Port = 8010,
    python: Python = "",
    patience: Patience = 3600,
) -> None:
    """Serve a student's rollouts with vLLM, as a recipe's student.served wants it; Ctrl-C ends it.

    Whoever reaches the server can change its weights, key or no key: keep it on loopback or a
    private network. Further options go to vLLM.
    """
    _serve("student", ("rollouts",), model, context.args, host, port, python, patience)


def _serve(
    role: str,
    kinds: tuple[Any, ...],
    model: str,
    extra: list[str],
    host: str,
    port: int,
    python: str,
    patience: float,
) -> None:
    """Run servers, and print the part of a recipe that uses them once they answer."""
    from topd.engines.serve import run_servers

    with _faults():
        run_servers(
            kinds,
            model,
            extra,
            host=host,
            port=port,
            python=python or sys.executable,
            patience=patience,
            ready=lambda lines: print(f"{role}:\n  path: {model}\n{lines}", flush=True),
        )


@contextmanager
def _faults() -> Iterator[None]:
    """A fault ends with one message and its exit code: 2 for bad input, else see StoppedError."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # one set of bars, ours
    from topd.errors import TOPDError

    try:
        yield
    except TOPDError as error:
        errors.print(f"error: {error}", style="bold red", markup=False, highlight=False)
        raise typer.Exit(error.exit_code) from error


def _check(
    recipe: Path, words: list[str], config: str = "TOPDConfig", *, warmstart: bool = False
) -> None:
    """What can be refused before the heavy imports."""
    from topd.commands.early import check_early

    check_early(recipe, words, config=config, warmstart=warmstart)


def _run(path: Path, words: list[str], quiet: bool, *, warmstart: bool) -> None:
    with _faults():
        _check(path, words, warmstart=warmstart)
        from topd.commands.train import run_recipe
        from topd.distributed import end_ranks, rank

        folder = run_recipe(path, words, quiet=quiet, warmstart=warmstart)
        number = rank()
        end_ranks()
    if number > 0:  # the first one shows what came of it
        return
    logs = read_logs(folder)
    if logs:
        show_table(logs)
        show_change(logs)
    _page(folder)
    console.print(f"run folder: {folder}", soft_wrap=True, markup=False, highlight=False)


def read_logs(folder: Path) -> list[dict[str, float]]:
    """The logged updates of a run folder, in order."""
    with open(folder / "metrics.jsonl", encoding="utf-8") as file:
        return [entry for entry in map(json.loads, file) if "loss" in entry]


def show_change(logs: list[dict[str, float]]) -> None:
    """Print the divergence of the first and the last fifth of the updates, with intervals.

    The intervals are 95 % t-intervals over updates. Each update has prompts of its own, so this
    shows the trend in training; it is no evaluation.
    """
    from topd.statistics import t_reach

    count = len(logs) // 5
    if count < 2:
        return
    name = next(key for key in ("reverse_kl", "forward_kl", "jsd") if key in logs[0])
    for label, part in (("first", logs[:count]), ("last", logs[-count:])):
        values = [entry[name] for entry in part]
        mean, half = sum(values) / count, t_reach(values)
        console.print(f"{name}, {label} {count} updates: {mean:.4f} +- {half:.4f} nats a token")


def show_table(logs: list[dict[str, float]], *, lines: int = 12) -> None:
    """Print the updates of a run, at most ``lines`` of them, evenly spaced."""
    spaced = {round(i * (len(logs) - 1) / max(lines - 1, 1)) for i in range(lines)}
    table = Table(title=None)
    columns = [
        ("step", "step", "{:.0f}"),
        ("loss", "loss", "{:.4f}"),
        ("reverse KL", "reverse_kl", "{:.4f}"),
        ("forward KL", "forward_kl", "{:.4f}"),
        ("forks found", "topd/real_divergent_points", "{:.0f}"),
        ("false alarms", "topd/false_alarm_share", "{:.0%}"),
        ("mean OT", "topd/mean_ot", "{:.3f}"),
        ("length", "completions/mean_length", "{:.0f}"),
    ]
    shown = [column for column in columns if any(column[1] in entry for entry in logs)]
    for title, _, _ in shown:
        table.add_column(title, justify="right")
    for i in sorted(spaced):
        table.add_row(*(f.format(logs[i][key]) if key in logs[i] else "-" for _, key, f in shown))
    console.print(table)
