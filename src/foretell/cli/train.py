"""`foretell train METHOD`: trains a drafter for a model on what the model wrote. `train.recipe` does the work."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foretell.cli.options import Base, Training, Weights
from foretell.cli.terminal import command_line, interruptible, job_progress, note
from foretell.errors import ForetellError, UsageError

if TYPE_CHECKING:
    from foretell.train.recipe import Job, Run, Trained

Methods = Annotated[
    list[str],
    typer.Argument(
        metavar="METHOD...",
        help="A drafter that can be trained; `foretell drafters` lists them, and the options of each. Several are "
        "trained at once, METHOD:key=value,... with options of its own.",
    ),
]


def train(
    base: Base,
    training: Training,
    methods: Methods,
    data: Annotated[list[Path], typer.Option(help="Folder that `foretell distill` wrote; repeatable.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the drafter, with several methods a folder in it for each; an interrupted run is resumed."
        ),
    ],
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="key=value of every method; `foretell drafters METHOD` lists them."),
    ] = None,
    keep_features: Annotated[
        bool,
        typer.Option("--keep-features", help="Compute the model's states once and keep them beside the data (GBs)."),
    ] = False,
    _no_cache: Annotated[
        bool, typer.Option("--no-cache", hidden=True, help="Published once, and what happens without --keep-features.")
    ] = False,
    other_model: Annotated[bool, typer.Option("--other-model", help="Allow data and starts of another model.")] = False,
    start: Annotated[
        str,
        typer.Option(
            help="Initialise with a trained drafter: its folder, or the name of one that ships; of one method of "
            "several, METHOD:start=..."
        ),
    ] = "",
) -> None:
    """Train a drafter for a model, or several at once, on what the model wrote."""
    from foretell.train import recipe

    jobs = _jobs(methods, out, option or [], start)
    with recipe.begin(
        jobs, base.model, data, settings=training.settings(), keep_features=keep_features, other_model=other_model,
        load=lambda name: replace(base, model=name, weights=_weights(base, name)).load(), command=command_line(),
    ) as begun:  # fmt: skip
        _note_number_type(begun.runs[0])
        if keep_features:
            with job_progress("features, %", "") as progress:
                begun.prepare(lambda done, total: progress(done, total, 0))
        names = ", ".join(job.method for job in jobs)
        with job_progress(f"training {names}", "") as progress, interruptible() as caught:
            begun.train(lambda done, total: progress(done, total, 0), stop=lambda: caught)
        with job_progress("measuring, %", "") as progress:
            found = begun.publish(lambda done, total: progress(done, total, 0))
    for job, trained in zip(jobs, found, strict=True):
        if len(jobs) > 1:
            note(f"{job.method}:")
        _draw(Path(job.out))
        _note_figures(trained)
        _note_command(base, trained)


def _weights(base: Base, model: str) -> Weights | None:
    """Returns the choice for a model: an adapter that was trained is merged into unpacked weights."""
    return base.weights if model == base.model else None


def _jobs(methods: list[str], out: Path, shared: list[str], start: str) -> list[Job]:
    """Returns a job for each method, which its own options may follow, `start` among them."""
    from foretell.drafting.options import pairs
    from foretell.train.checks import check_shared_out
    from foretell.train.recipe import Job

    names, jobs = [spec.partition(":")[0] for spec in methods], list[Job]()
    if twice := [name for at, name in enumerate(names) if name in names[:at]]:
        raise UsageError(f"{twice[0]} is named twice; train each method once, or once more with another `out=`.")
    if len(methods) > 1:
        check_shared_out(out)
    for method, spec in zip(names, methods, strict=True):
        settings = text.split(",") if (text := spec.partition(":")[2]) else []
        if wrong := [each for each in settings if "=" not in each[1:]]:
            raise UsageError(
                f"{spec!r} has {wrong[0]!r}, which is not key=value; write, say, {method}:draft_vocab=8192."
            )
        own = pairs(settings)
        begun_with = str(own.pop("start", start))
        folder = out / method if len(methods) > 1 else out
        jobs.append(Job(method=method, out=folder, options=pairs(shared) | own, start=begun_with))
    return jobs


def _draw(out: Path) -> None:
    """Draws the curves of the training; a failure costs nothing but the curves."""
    from foretell.bench.plots import training_curves

    try:
        training_curves(out / "run/log.jsonl", out / "curves.png")
    except ForetellError as error:
        note(f"note: {error}")


def _note_number_type(run: Run) -> None:
    from foretell.drafting.learning.number_types import measured

    trainer = run.trainer
    note(measured(trainer.device.type).explained(trainer.number_type, trainer.began_in))


def _note_figures(trained: Trained) -> None:
    for k, accuracy in enumerate(trained.report.accuracy, start=1):
        note(f"head {k}: {accuracy['top1']:.1%} first, {accuracy['top5']:.1%} among five")
    text = "held-out text" if trained.held_out else "training text, for none was held out"
    sizes = ", ".join(f"{n} nodes {tokens:.2f}" for n, tokens in trained.checkpoint.tokens_per_step.items())
    note(f"tokens per step on {text}: {sizes}")


def _note_command(base: Base, trained: Trained) -> None:
    """The command that uses the drafter."""
    words = ["foretell", "chat", *(["--model", trained.model] if trained.model != Base.model else [])]
    words += ["--weights", weights] if (weights := _weights(base, trained.model)) else []
    words += ["--cache-dir", str(base.cache_dir)] if base.cache_dir else []
    words += ["--drafter", trained.checkpoint.method, "-o", f"checkpoint={trained.folder}"]
    note(f"The drafter is in {trained.folder}; use it with {shlex.join(words)}")
