"""The command line: each command refuses early, imports what is heavy, runs, and shows.

Nothing here imports torch before the checks of :mod:`topd.commands.early` have passed.
"""

from __future__ import annotations

import atexit
import gc
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer
from rich.markup import escape

from topd.commands import options, terminal
from topd.commands.early import (
    check_data,
    check_early,
    check_model,
    check_one_process,
    own_settings,
)
from topd.commands.options import NO_RECIPE, Quiet, RecipeFile, RunFolder
from topd.commands.terminal import faults, indented, say, summarise
from topd.errors import TOPDError, placed
from topd.runs.files import check_is_folder
from topd.runs.settings import Setting, is_current, known, matching

app = typer.Typer(
    help="On-policy distillation that looks ahead (arXiv 2606.00305).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # joins the lines of a paragraph
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
RECOMMENDED = (
    "Start with opd, the default: after stage 1 (topd warmstart) if the teacher may write answers. "
    "Take first_fork where it may write some tokens and greedy accuracy counts: "
    "docs/which-method.md has the sizes."
)
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}
# dashes and underscores alike, as in the keys of a recipe
EITHER = {"token_normalize_func": lambda name: name.replace("_", "-")}


def _settings(*classes: str) -> str:
    """What the help says of a command's settings, those of its own first."""
    ours = own_settings("TOPDConfig")
    own = [name for name in own_settings(*classes) if name not in ours]
    first = f"Settings of this command: {', '.join(own)}. " if own else ""
    return (
        f"{first}Settings, each --NAME VALUE: {', '.join(ours)}; and those of transformers' "
        "Trainer; what has no effect here is refused, or said. topd settings WORD explains those "
        "with a word in them, topd methods the methods."
    )


@app.callback()
@faults()
def main(context: typer.Context, version: options.Version = False) -> None:
    """On-policy distillation that looks ahead (arXiv 2606.00305)."""
    check_one_process(context.invoked_subcommand or "")
    # at its end Python would go through all objects of the libraries, 1.5 s of a CPU
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):  # a token that a terminal cannot show ends no command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@app.command()
def methods() -> None:
    """What a student can learn by: every value of the setting method."""
    terminal.console.print(RECOMMENDED, highlight=False)
    for name, needs, words in known().methods:
        terminal.console.print(f"[bold]{name}[/bold]", highlight=False)
        indented(words)
        indented(needs)


@app.command(context_settings=EITHER)
@faults()
def settings(
    word: Annotated[str, typer.Argument(help="In the name or the explanation; none: ours.")] = "",
) -> None:
    """Settings of a recipe with their defaults: our own, or all that have a word in them."""
    rows: Iterable[Setting] = known().settings
    if not is_current():  # of another transformers than the one that is installed
        from topd.commands import settings as classes

        rows = classes.settings()
    for name, default, words, _ in matching(word, rows):
        line = f"[bold]{escape(name)}[/bold] = {escape(default)}"
        terminal.console.print(line, highlight=False, soft_wrap=True)
        indented(words)


@app.command("import", context_settings=EITHER)
@faults()
def import_(
    config: Annotated[Path, typer.Argument(help="YAML, JSON, or the shell script that starts it.")],
    output: Annotated[Path | None, typer.Option(help="Write the recipe there.")] = None,
) -> None:
    """A configuration of TRL or verl as a recipe, key by key, or the reason why not."""
    from topd.commands.importer import import_file
    from topd.commands.recipe import read_recipe

    found = import_file(config)
    for line in found.lines:
        say(line)
    text = found.text()
    output = output and output.expanduser()
    if output is None:
        say(f"\n{text}")
    elif output.exists():
        raise TOPDError(f"--output: {output} exists. Name another file.")
    with placed(f"{config}: its recipe cannot be used"):
        # what trains may have a GPU that this machine lacks
        read_recipe(None, {**found.recipe, "use_cpu": True, "tf32": None})
    if output is None:
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TOPDError(f"--output: {output} cannot be written ({error.strerror}).") from error
    say(f"{output}: read it, then: topd train {quote(str(output))}")


@app.command(context_settings=EXTRA, epilog=_settings())
@faults()
def train(context: typer.Context, recipe: RecipeFile = NO_RECIPE, quiet: Quiet = False) -> None:
    """Train a student on its own rollouts. Any key of the recipe: --key value, --data.limit 8."""
    _train(recipe, context.args, quiet)


@app.command(context_settings=EXTRA, epilog=_settings("WarmstartConfig"))
@faults()
def warmstart(context: typer.Context, recipe: RecipeFile = NO_RECIPE, quiet: Quiet = False) -> None:
    """Stage 1: the student learns from the teacher's answers, or from those of the data."""
    _train(recipe, context.args, quiet, warmstart=True)


def _train(recipe: Path, words: list[str], quiet: bool, *, warmstart: bool = False) -> None:
    check_early(recipe, words, warmstart=warmstart)
    from topd.commands.tables import show_run
    from topd.commands.train import run_recipe
    from topd.distributed import end_ranks, rank

    folder = run_recipe(recipe, words, quiet=quiet, warmstart=warmstart)
    first = rank() == 0
    end_ranks()
    if first:
        show_run(terminal.console, folder)
        terminal.write_page(folder)
        say(f"run folder: {folder}")


@app.command(context_settings=EXTRA, epilog=_settings("ProbeConfig", "AnalysisConfig"))
@faults()
def probe(context: typer.Context, recipe: RecipeFile = NO_RECIPE, quiet: Quiet = False) -> None:
    """Where do student and teacher part, and does the token loss say so? No training."""
    check_early(recipe, context.args, config="ProbeConfig")
    from topd.commands.probe import run_probe
    from topd.commands.tables import show_probe

    folder = run_probe(recipe, context.args, console=None if quiet else terminal.console)
    summarise(folder, "probe.json", show_probe)


@app.command(context_settings=EXTRA, epilog=_settings("RepairConfig", "AnalysisConfig"))
@faults()
def repair(context: typer.Context, recipe: RecipeFile = NO_RECIPE, quiet: Quiet = False) -> None:
    """Correct the student at single forks with each loss, and measure what comes back."""
    check_early(recipe, context.args, config="RepairConfig")
    from topd.commands.repair import run_repair
    from topd.commands.tables import show_repair

    folder = run_repair(recipe, context.args, console=None if quiet else terminal.console)
    summarise(folder, "repair.json", show_repair)


@app.command(context_settings=EXTRA, epilog=_settings())
@faults()
def compare(context: typer.Context, recipe: RecipeFile = NO_RECIPE, quiet: Quiet = False) -> None:
    """Arms x seeds of one recipe, with paired intervals. Resumes where it was stopped."""
    _compare(recipe, context.args, quiet)


@app.command(context_settings=EXTRA)
@faults()
def quickstart(context: typer.Context, quiet: Quiet = False) -> None:
    """Stage 1, then three ways on from it, OPD among them: two minutes on two idle cores."""
    _compare(options.QUICKSTART, context.args, quiet)


def _compare(recipe: Path, words: list[str], quiet: bool) -> None:
    check_early(recipe, words, compare=True)
    from topd.commands.compare import run_compare
    from topd.commands.tables import show_compare

    folder = run_compare(recipe, words, console=None if quiet else terminal.console)
    summarise(folder, "compare.json", show_compare)


@app.command("eval", context_settings=EITHER)
@faults()
def evaluate_model(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or package://NAME.")],
    data: options.Problems,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file in the model's place.")] = None,
    dtype: options.Dtype = "float32",
    columns: options.Columns = "",
    split: options.Split = None,
    samples: options.Samples = 4,
    temperature: options.Temperature = 0.6,
    top_p: options.TopP = 0.95,
    max_tokens: options.MaxTokens = 1024,
    limit: options.Limit = None,
    batch_size: options.BatchSize = 16,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    chat: options.Chat = None,
    chat_template_kwargs: options.TemplateKwargs = None,
    trust: options.TrustModels = False,
    output: options.Output = "",
) -> None:
    """Verified answers on a file of problems, greedy and sampled, with intervals."""
    check_model(model)
    check_data(data)
    from topd.commands.evaluate import run_evaluation, spec_of
    from topd.commands.keys import parse_value
    from topd.inputs.models import ModelSpec

    spec = spec_of(
        data,
        columns,
        split=split,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        chat=chat,
        chat_template_kwargs=parse_value(chat_template_kwargs or "null"),
    )
    own = ModelSpec(path=model, gguf_file=gguf_file, dtype=dtype, trust_remote_code=trust)
    folder = run_evaluation(own, spec, output, terminal.console)
    say(f"results: {folder}")


@app.command(context_settings=EITHER)
@faults()
def gate(
    base: Annotated[str, typer.Argument(help="Folder, hub name, or package://NAME.")],
    candidate: Annotated[str, typer.Argument(help="The model that is to replace it.")],
    suite: Annotated[Path, typer.Option(help="YAML: problems, refusals, limits, error.")],
    dtype: options.Dtype = "float32",
    base_gguf_file: Annotated[str | None, typer.Option(help="GGUF file of the base.")] = None,
    trust: options.TrustModels = False,
    output: options.Output = "",
) -> None:
    """Did anything get worse? Paired evaluation of a suite; exit code 1 on a regression."""
    from topd.commands.keys import read_mapping

    read_mapping(suite, "problems: PATH")
    check_model(base)
    check_model(candidate)
    from topd.commands.gate import run_gate
    from topd.inputs.models import ModelSpec

    own = ModelSpec(path=base, gguf_file=base_gguf_file, dtype=dtype, trust_remote_code=trust)
    before, after = own, own.model_copy(update={"path": candidate, "gguf_file": None})
    if not run_gate(before, after, suite, output=output, console=terminal.console):
        raise typer.Exit(1)


@app.command(context_settings=EITHER)
@faults()
def report(
    run: RunFolder,
    rollouts: Annotated[
        int | None,
        typer.Option(min=1, help="Most rollouts in the page; by itself 1,000, fewer of long ones."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow a run until it ends.")] = False,
) -> None:
    """Write RUN/report.html: figures and the fork viewer, one file that needs no network."""
    check_is_folder(run)
    if not watch:
        from topd.report import write_report

        say(f"report: {write_report(run, rollouts=rollouts)}")
        return
    from topd.report.follow import follow

    try:
        follow(run, rollouts=rollouts, say=say)
    except KeyboardInterrupt:
        say("no longer watching; the run continues. The page stays as it is.")


@app.command(context_settings=EITHER)
@faults()
def show(
    run: RunFolder,
    rollout: Annotated[int, typer.Option(min=0, help="Line of rollouts.jsonl, from 0.")] = 0,
) -> None:
    """Show a rollout and its forks in the terminal."""
    from topd.report.terminal import show as show_rollout

    show_rollout(run, rollout, terminal.console)


@app.command(context_settings=EITHER)
@faults()
def figures(
    run: RunFolder,
    format: options.Format = "pdf",
    output: Annotated[Path | None, typer.Option(help="Folder; by default RUN/figures.")] = None,
) -> None:
    """Write the figures of a run as files, for a paper."""
    from topd.report.paper import write_figures

    for path in write_figures(run, (output or run / "figures").expanduser(), format=format):
        say(path)


@app.command(context_settings=EITHER)
@faults()
def audit(
    run: RunFolder,
    updates: options.Updates = 3,
    seed: options.UpdatesSeed = None,
    tolerance: options.Tolerance = 1e-4,
    trust: options.TrustCode = False,
    served_teacher: options.OwnTeacher = None,
    served_pooling: options.OwnPooling = None,
    api_key_env: options.OwnKey = None,
) -> None:
    """Was this run's folder changed? Checks chain, files, models, data; samples decisions."""
    check_is_folder(run)
    from topd.commands.audit import Trust, audit_run

    allowed = Trust(trust, served_teacher or (), served_pooling or (), api_key_env)
    found = audit_run(run, updates=updates, seed=seed, tolerance=tolerance, trust=allowed)
    terminal.show_faults(found)


@app.command(context_settings=EITHER)
@faults()
def replay(
    run: RunFolder,
    step: Annotated[int, typer.Option(min=0, help="Number of the update, from 0.")],
    tolerance: options.Tolerance = 0.0,
    trust: options.TrustCode = False,
    served_teacher: options.OwnTeacher = None,
    served_pooling: options.OwnPooling = None,
    api_key_env: options.OwnKey = None,
) -> None:
    """Repeat an update from the checkpoint before it and compare it with the records."""
    check_is_folder(run)
    from topd.commands.audit import Trust, replay_step

    allowed = Trust(trust, served_teacher or (), served_pooling or (), api_key_env)
    terminal.show_faults(replay_step(run, step, tolerance=tolerance, trust=allowed))


@app.command("serve-teacher", context_settings=EXTRA)
@faults()
def serve_teacher(
    context: typer.Context,
    model: options.ServedModel,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    python: options.Python = "",
    patience: options.Patience = 3600,
) -> None:
    """Serve a teacher with vLLM, as a recipe's teacher.served wants it; Ctrl-C ends it.

    Further options go to both of its servers, e.g. --tensor-parallel-size 4 --max-model-len 16384.
    Both have the same GPUs: 45 % of the memory each, or --gpu-memory-utilization. VLLM_API_KEY in
    the environment becomes their API key; it guards paths below /v1 only, so keep them on loopback
    or a private network.
    """
    _serve("teacher", model, context.args, host=host, port=port, python=python, patience=patience)


@app.command("serve-student", context_settings=EXTRA)
@faults()
def serve_student(
    context: typer.Context,
    model: options.ServedModel,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8010,
    python: options.Python = "",
    patience: options.Patience = 3600,
) -> None:
    """Serve a student's rollouts with vLLM, as a recipe's student.served wants it; Ctrl-C ends it.

    Whoever reaches the server can change its weights, key or no key: keep it on loopback or a
    private network. Further options go to vLLM.
    """
    _serve("student", model, context.args, host=host, port=port, python=python, patience=patience)


def _serve(role: str, model: str, extra: Sequence[str], *, python: str, **listening: Any) -> None:
    """Run the servers of a role, and print the part of a recipe that uses them once they answer."""
    from topd.engines.servers.serve import run_servers

    run_servers(
        ("completions", "pooling") if role == "teacher" else ("rollouts",),
        model,
        extra,
        python=python or sys.executable,
        ready=lambda lines: print(f"{role}:\n  path: {model}\n{lines}", flush=True),
        **listening,
    )
