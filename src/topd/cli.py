"""The command line: its words and their help. :mod:`topd.commands.verbs` does what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from topd.commands import options, verbs
from topd.commands.early import own_settings
from topd.commands.options import NO_RECIPE, Quiet, RecipeFile, RunFolder

app = typer.Typer(
    help="On-policy distillation that looks ahead (arXiv 2606.00305).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # joins the lines of a paragraph
    pretty_exceptions_enable=False,
)
PROBLEMS = (
    "JSONL, JSON, CSV, TSV or Parquet: GSM8K, MATH-500, AIME, HMMT, or another with --columns."
)
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}
# dashes and underscores alike, as in the keys of a recipe
EITHER = {"token_normalize_func": lambda name: name.replace("_", "-")}


def _settings(*classes: str) -> str:
    """What the help says of a command's settings, those of its own first."""
    known = own_settings("TOPDConfig")
    own = [name for name in own_settings(*classes) if name not in known]
    first = f"Settings of this command: {', '.join(own)}. " if own else ""
    return (
        f"{first}Settings, each --NAME VALUE: {', '.join(known)}; and those of transformers' "
        "Trainer. topd settings WORD explains those with a word in them, topd methods the methods."
    )


@app.callback()
def main(version: options.Version = False) -> None:
    """On-policy distillation that looks ahead (arXiv 2606.00305)."""


@app.command()
def methods() -> None:
    """What a student can learn by: every value of the setting method."""
    verbs.methods()


@app.command(context_settings=EITHER)
def settings(
    word: Annotated[str, typer.Argument(help="In the name or the explanation; none: ours.")] = "",
) -> None:
    """Settings of a recipe with their defaults: our own, or all that have a word in them."""
    verbs.settings(word)


@app.command("import", context_settings=EITHER)
def import_(
    config: Annotated[Path, typer.Argument(help="YAML, JSON, or the shell script that starts it.")],
    output: Annotated[Path | None, typer.Option(help="Write the recipe there.")] = None,
) -> None:
    """A configuration of TRL or verl as a recipe, key by key, or the reason why not."""
    verbs.import_config(config, output)


@app.command(context_settings=EXTRA, epilog=_settings())
def train(context: typer.Context, recipe: RecipeFile = NO_RECIPE, quiet: Quiet = False) -> None:
    """Train a student on its own rollouts. Any key of the recipe: --key value, --data.limit 8."""
    verbs.train(recipe, context.args, quiet)


@app.command(context_settings=EXTRA, epilog=_settings("WarmstartConfig"))
def warmstart(context: typer.Context, recipe: RecipeFile = NO_RECIPE, quiet: Quiet = False) -> None:
    """Stage 1: the student learns from the teacher's answers, or from those of the data."""
    verbs.train(recipe, context.args, quiet, warmstart=True)


@app.command(context_settings=EXTRA, epilog=_settings("ProbeConfig", "AnalysisConfig"))
def probe(context: typer.Context, recipe: RecipeFile = NO_RECIPE, quiet: Quiet = False) -> None:
    """Where do student and teacher part, and does the token loss say so? No training."""
    verbs.probe(recipe, context.args, quiet)


@app.command(context_settings=EXTRA, epilog=_settings("RepairConfig", "AnalysisConfig"))
def repair(context: typer.Context, recipe: RecipeFile = NO_RECIPE, quiet: Quiet = False) -> None:
    """Correct the student at single forks with each loss, and measure what comes back."""
    verbs.repair(recipe, context.args, quiet)


@app.command(context_settings=EXTRA, epilog=_settings())
def compare(context: typer.Context, recipe: RecipeFile = NO_RECIPE, quiet: Quiet = False) -> None:
    """Arms x seeds of one recipe, with paired intervals. Resumes where it was stopped."""
    verbs.compare(recipe, context.args, quiet)


@app.command(context_settings=EXTRA)
def quickstart(context: typer.Context, quiet: Quiet = False) -> None:
    """Stage 1, then three ways on from it, OPD among them: two minutes on two idle cores."""
    verbs.compare(options.QUICKSTART, context.args, quiet)


@app.command("eval", context_settings=EITHER)
def evaluate_model(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or package://NAME.")],
    data: Annotated[str, typer.Argument(help=PROBLEMS)],
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
    output: options.Output = "",
) -> None:
    """Verified answers on a file of problems, greedy and sampled, with intervals."""
    verbs.evaluate(
        {"path": model, "gguf_file": gguf_file, "dtype": dtype},
        data,
        columns,
        output,
        split=split,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        chat=chat,
        chat_template_kwargs=chat_template_kwargs,
    )


@app.command(context_settings=EITHER)
def gate(
    base: Annotated[str, typer.Argument(help="Folder, hub name, or package://NAME.")],
    candidate: Annotated[str, typer.Argument(help="The model that is to replace it.")],
    suite: Annotated[Path, typer.Option(help="YAML: problems, refusals, limits, error.")],
    dtype: options.Dtype = "float32",
    base_gguf_file: Annotated[str | None, typer.Option(help="GGUF file of the base.")] = None,
    output: options.Output = "",
) -> None:
    """Did anything get worse? Paired evaluation of a suite; exit code 1 on a regression."""
    before = {"path": base, "gguf_file": base_gguf_file, "dtype": dtype}
    verbs.gate(before, {"path": candidate, "dtype": dtype}, suite, output)


@app.command(context_settings=EITHER)
def report(
    run: RunFolder,
    rollouts: Annotated[int, typer.Option(min=1, help="Most rollouts in the page.")] = 1000,
    watch: Annotated[bool, typer.Option("--watch", help="Follow a run until it ends.")] = False,
) -> None:
    """Write RUN/report.html: figures and the fork viewer, one file that needs no network."""
    (verbs.watch if watch else verbs.report)(run, rollouts=rollouts)


@app.command(context_settings=EITHER)
def show(
    run: RunFolder,
    rollout: Annotated[int, typer.Option(min=0, help="Line of rollouts.jsonl, from 0.")] = 0,
) -> None:
    """Show a rollout and its forks in the terminal."""
    verbs.show(run, rollout)


@app.command(context_settings=EITHER)
def figures(
    run: RunFolder,
    format: options.Format = "pdf",
    output: Annotated[Path | None, typer.Option(help="Folder; by default RUN/figures.")] = None,
) -> None:
    """Write the figures of a run as files, for a paper."""
    verbs.figures(run, output, format)


@app.command(context_settings=EITHER)
def audit(
    run: RunFolder,
    updates: Annotated[
        int, typer.Option(min=0, help="Updates whose decisions are re-derived; 0: no models.")
    ] = 3,
    seed: Annotated[
        int | None, typer.Option(help="Which updates; by default a random one, which is printed.")
    ] = None,
    tolerance: options.Tolerance = 1e-4,
    trust: options.TrustCode = False,
    served_teacher: options.OwnTeacher = None,
    served_pooling: options.OwnPooling = None,
    api_key_env: options.OwnKey = None,
) -> None:
    """Was this run's folder changed? Checks chain, files, models, data; samples decisions."""
    trusted = (trust, served_teacher or (), served_pooling or (), api_key_env)
    verbs.audit(run, trusted, updates=updates, seed=seed, tolerance=tolerance)


@app.command(context_settings=EITHER)
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
    trusted = (trust, served_teacher or (), served_pooling or (), api_key_env)
    verbs.replay(run, trusted, step=step, tolerance=tolerance)


@app.command("serve-teacher", context_settings=EXTRA)
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
    verbs.serve("teacher", model, context.args, host, port, python, patience)


@app.command("serve-student", context_settings=EXTRA)
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
    verbs.serve("student", model, context.args, host, port, python, patience)
