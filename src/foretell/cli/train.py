"""`foretell train METHOD`: heads for a frozen backbone, from distilled data."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretell import drafters
from foretell.cli.options import Base, Training, parse_options
from foretell.cli.terminal import command_line, interruptible, job_progress, note
from foretell.errors import ForetellError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from foretell.backbone import Backbone
    from foretell.drafters.parts import Trainable
    from foretell.train.data import Store
    from foretell.train.trainer import Report


def train(
    base: Base,
    training: Training,
    method: Annotated[str, typer.Argument(help="A drafter that can be trained: medusa, hydra, hydra++.")],
    data: Annotated[Path, typer.Option(help="Folder that `foretell distill` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the drafter; a run that was interrupted goes on in it.")],
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="key=value of the method; repeatable.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compute features batch by batch; keep none.")] = False,
    other_model: Annotated[bool, typer.Option("--other-model", help="Allow data that another model wrote.")] = False,
) -> None:
    """Train a drafter for a model on what the model wrote."""
    from foretell.backbone.files import sole_writer
    from foretell.drafters.checkpoint import Checkpoint
    from foretell.train.data import Store
    from foretell.train.features import Features
    from foretell.train.trainer import Trainer

    cls = _trainable(method)
    options = _options(method, cls, option or [])
    settings, store = training.settings(), Store.open(data)
    if not store.conversations:
        raise UsageError(f"{data} holds no conversations; distill some first.")
    llm = base.load()
    backbone = llm.backbone
    if store.manifest["fingerprint"] != backbone.fingerprint and not other_model:
        raise UsageError(
            f"{data} was written by {store.manifest['model']} (fingerprint {store.manifest['fingerprint']}), not by "
            f"this model ({backbone.fingerprint}); distill with this one, or allow it with --other-model."
        )
    module = _fresh(cls, backbone, store, options, settings.seed)
    shards = None if no_cache else data / f"features-{backbone.fingerprint}-{'-'.join(map(str, module.taps))}"
    features = Features(backbone, store.conversations, module.taps, shards)
    with sole_writer(out):
        whose = {"model": backbone.fingerprint, "dtype": str(backbone.dtype)}
        run = Trainer(module, features, settings, out / "run", options | whose)
        run.resume()  # a run that cannot be gone on with is refused before any work
        with job_progress("features, %", "") as progress:
            prepared = features.prepare(lambda fraction: progress(round(fraction * 100), 100, 0))
        with job_progress(f"training {method}", "") as progress, interruptible() as caught:
            run.run(lambda step, steps, line: progress(step, steps, 0), stop=lambda: caught)
        report = run.evaluate()
        run.log({"held_out": {"epoch": settings.epochs, **asdict(report)}})
        tensors, arch = module.checkpoint()
        checkpoint = Checkpoint(
            method=method, backbone=base.model, fingerprint=backbone.fingerprint, hidden=backbone.config.hidden,
            vocab=backbone.config.vocab, arch=arch, paths=[list(path) for path in report.paths],
            tokens_per_step={str(size): tokens for size, tokens in report.tokens_per_step.items()},
            provenance={
                "command": command_line(), "data": store.manifest,
                "settings": asdict(settings), "options": options, "accuracy": report.accuracy, "loss": report.loss,
                "seconds": round(run.seconds), "feature_seconds": round(prepared), "skipped_batches": run.skipped,
            },
        )  # fmt: skip
        checkpoint.save(out / "drafter", tensors)
    _draw(out)
    _say(report, "held-out text" if run.held_out else "training text, for none was held out", out)


def _trainable(method: str) -> Any:
    """The drafter's class, if it has something to train."""
    cls: Any = drafters.drafter_class(method)
    if not hasattr(cls, "trainable"):
        able = [name for name in drafters.DRAFTERS if hasattr(drafters.drafter_class(name), "trainable")]
        raise UsageError(f"Drafter {method!r} has nothing to train; those that have are {', '.join(able)}.")
    return cls


def _fresh(cls: Any, backbone: Backbone, store: Store, options: dict[str, Any], seed: int) -> Trainable:
    """The untrained module; what it draws follows from the seed."""
    import torch

    torch.manual_seed(seed)
    return cls.trainable(backbone, _written(store, backbone.config.vocab), **options)


def _options(method: str, cls: Any, given: list[str]) -> dict[str, Any]:
    """What the module is made with, defaults included: they are written down, and may change later."""
    parameters = dict(inspect.signature(cls.trainable).parameters)
    defaults = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
    return defaults | dict(parse_options(f"{method} training", parameters, given))


def _written(store: Store, vocab: int) -> Tensor:
    """[V]: how often the model wrote each token; refuses tokens that this model does not have."""
    import torch

    largest = max(max(each.tokens) for each in store.conversations)
    if largest >= vocab:
        raise UsageError(
            f"{store.folder} holds token {largest}, but this model's ids lie between 0 and {vocab - 1}; distill with "
            "this model."
        )
    spans = [each.tokens[start:end] for each in store.conversations for start, end in each.answers]
    return torch.bincount(torch.tensor([token for span in spans for token in span]), minlength=vocab)


def _draw(out: Path) -> None:
    """Curves of the training; the drafter is there without them too."""
    from foretell.bench.plots import training_curves

    try:
        training_curves(out / "run/log.jsonl", out / "curves.png")
    except ForetellError as error:
        note(f"note: {error}")


def _say(report: Report, text: str, out: Path) -> None:
    for k, accuracy in enumerate(report.accuracy, start=1):
        note(f"head {k}: {accuracy['top1']:.1%} first, {accuracy['top5']:.1%} among five")
    note(f"tokens per step on {text}: " + ", ".join(f"{n} nodes {t:.2f}" for n, t in report.tokens_per_step.items()))
    note(f"The drafter is in {out / 'drafter'}: use it with -o checkpoint={out / 'drafter'}")
