"""`foretell train METHOD`: a drafter for a model, from what the model wrote."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretell import drafters
from foretell.cli.options import Base, Training
from foretell.cli.terminal import command_line, interruptible, job_progress, note
from foretell.errors import ForetellError, UsageError

REPLAYED = 40
"""Held-out conversations that are decoded once more for each tree size."""

ABLE = "medusa, medusa2, hydra, hydra++, kangaroo, layerskip"
Method = Annotated[str, typer.Argument(help=f"A drafter that can be trained: {ABLE}.")]

if TYPE_CHECKING:
    from torch import Tensor

    from foretell.api import LLM
    from foretell.backbone import Backbone
    from foretell.drafting.checkpoint import Checkpoint
    from foretell.drafting.learning.trainable import Trainable
    from foretell.train.data import Distilled, Store
    from foretell.train.features import Batches
    from foretell.train.trainer import Report, Trainer


def train(
    base: Base,
    training: Training,
    method: Method,
    data: Annotated[list[Path], typer.Option(help="Folder that `foretell distill` wrote; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder for the drafter; a run that was interrupted goes on in it.")],
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="key=value of the method; repeatable.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compute features batch by batch; keep none.")] = False,
    other_model: Annotated[bool, typer.Option("--other-model", help="Allow data that another model wrote.")] = False,
    start: Annotated[
        str, typer.Option(help="Begin with what a drafter has learnt: its folder, or the name of one that ships.")
    ] = "",
) -> None:
    """Train a drafter for a model on what the model wrote."""
    from foretell.drafting.options import converted, pairs
    from foretell.files import sole_writer
    from foretell.train.features import Features, Joined
    from foretell.train.trainer import Trainer

    cls = _trainable(method)
    given = converted(cls.Training, pairs(option or []), f"{method} training")
    settings, stores = training.settings(), _stores(data)
    _check_out(out, method)
    llm = base.load()
    backbone = llm.backbone
    for store in stores:
        _check(store, backbone, other_model)
    begin = _start(start, backbone, cls) if start else None
    options = cls.Training(**(_taken(cls, begin[0]) if begin else {}) | given)
    module = _module(cls, llm, stores, options, settings.seed, begin)
    begun = _begin(module, start, *begin) if begin else {}
    name = f"features-{backbone.fingerprint}-{'-'.join(map(str, module.taps)) or 'teacher'}"
    parts = [
        Features(backbone, store.conversations, module.taps, None if no_cache else store.folder / name)
        for store in stores
    ]
    features = Joined(parts) if len(parts) > 1 else parts[0]
    with sole_writer(out):
        whose = {"method": method, "model": backbone.fingerprint, "dtype": str(backbone.dtype)}
        run = Trainer(module, features, settings, out / "run", asdict(options) | whose | begun)
        run.resume()  # a run that cannot be gone on with is refused before any work
        _say_number_type(run)
        prepared = _prepare(features)
        with job_progress(f"training {method}", "") as progress, interruptible() as caught:
            run.run(lambda step, steps: progress(step, steps, 0), stop=lambda: caught)
        report = run.evaluate()
        run.log({"held_out": {"epoch": settings.epochs, **_figures(report)}})
        provenance = {
            "command": command_line(), "data": [store.manifest for store in stores],
            "settings": asdict(settings), "options": asdict(options),
            "accuracy": report.accuracy, "loss": report.loss, "seconds": round(run.seconds),
            "feature_seconds": round(prepared), "skipped_batches": run.skipped, "products": run.number_type, **begun,
        }  # fmt: skip
        checkpoint = _publish(cls, base, backbone, run, report, provenance, out)
    _draw(out)
    _say(report, checkpoint, "held-out text" if run.held_out else "training text, for none was held out")
    _say_how(base, checkpoint, out)


def _prepare(features: Batches) -> float:
    """Seconds that the features took."""
    with job_progress("features, %", "") as progress:
        return features.prepare(lambda fraction: progress(round(fraction * 100), 100, 0))


def _publish(
    cls: Any, base: Base, backbone: Backbone, run: Trainer, report: Report, provenance: dict[str, Any], out: Path
) -> Checkpoint:
    """Writes the drafter, with the tokens per step of the trees that it will draft."""
    from foretell.drafting.checkpoint import Checkpoint
    from foretell.train.features import Features
    from foretell.train.replay import by_size
    from foretell.train.trainer import SIZES

    tensors, arch = run.module.checkpoint()
    model, features, told = run.module.save_backbone(base.model, out), run.features, replayed(report.replayed)
    if model != base.model:  # a model of its own now, with states of its own
        backbone = replace(base, model=model).load().backbone
        features = Features(backbone, [features.data[i] for i in told], run.module.taps, None)
        told = list(range(len(told)))
    checkpoint = Checkpoint(
        method=cls.method, backbone=model, fingerprint=backbone.fingerprint, hidden=backbone.config.hidden,
        vocab=backbone.config.vocab, arch=arch, paths=[list(path) for path in report.paths],
        calibration=[list(scale) for scale in report.calibration],
        provenance=provenance | {"fixed_trees": report.tokens_per_step},
    )  # fmt: skip
    checkpoint.save(out / "drafter", tensors)
    drafter = cls.build(backbone, cls.Options(checkpoint=str(out / "drafter")))
    sizes = [size for size in SIZES if size <= drafter.max_nodes]
    with job_progress("replaying, %", "") as progress:
        tokens_per_step = by_size(drafter, features, told, sizes, lambda done: progress(round(done * 100), 100, 0))
    checkpoint.tokens_per_step = tokens_per_step
    checkpoint.save(out / "drafter", tensors)
    return checkpoint


def _trainable(method: str) -> Any:
    """The drafter's class, if it has something to train."""
    cls: Any = drafters.drafter_class(method)
    if not hasattr(cls, "trainable"):
        able = [name for name in drafters.table() if hasattr(drafters.drafter_class(name), "trainable")]
        raise UsageError(f"Drafter {method!r} has nothing to train; those that have are {', '.join(able)}.")
    return cls


def _stores(data: list[Path]) -> list[Store]:
    from foretell.train.data import Store

    if len({folder.resolve() for folder in data}) < len(data):
        raise UsageError("--data names a folder twice; give each once, and more --epochs to learn it longer.")
    stores = [Store.open(folder) for folder in data]
    for store in stores:
        if not store.conversations:
            raise UsageError(f"{store.folder} holds no conversations; distill some first.")
    return stores


def _check_out(out: Path, method: str) -> None:
    """Refuses a folder in which a drafter, or anything else, would be lost."""
    from foretell.files import read_json, write_errors

    with write_errors(out):
        names, inside = ([each.name for each in _visible(folder)] for folder in (out, out / "drafter"))
    theirs = ""
    if "config.json" in inside:
        with suppress(ForetellError):  # a damaged one is a drafter all the same
            theirs = str(read_json(out / "drafter/config.json").get("method", ""))
    if "run" not in names and "drafter" in names:
        kind = f"{theirs} drafter" if theirs else "drafter"
        raise UsageError(f"{out} holds a finished {kind}; choose another --out, or delete it.")
    if "run" not in names and names:
        some = ", ".join(names[:3]) + (", …" if names[3:] else "")
        raise UsageError(f"{out} holds other things ({some}); choose another --out.")
    if theirs not in ("", method):
        raise UsageError(f"{out} holds a run of {theirs}; choose another --out.")
    if others := sorted({*inside} - {"config.json", "model.safetensors"}):
        raise UsageError(
            f"{out / 'drafter'} holds {', '.join(others)}, which would be lost; move it elsewhere, or choose another "
            "--out."
        )


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder, if it is one, but for locks and what an interruption left."""
    return sorted(each for each in folder.iterdir() if each.name[0] != ".") if folder.is_dir() else []


def _check(store: Store, backbone: Backbone, other_model: bool) -> None:
    """Refuses what another model wrote, unless it is wanted."""
    model, writer = store.manifest["model"], store.manifest["fingerprint"]
    if writer != backbone.fingerprint and not other_model:
        raise UsageError(
            f"{store.folder} was written by {model} (fingerprint {writer}), not by this model "
            f"({backbone.fingerprint}); distill with this one, or allow it with --other-model."
        )
    largest, vocab = max(max(each.tokens) for each in store.conversations), backbone.config.vocab
    if largest >= vocab:
        raise UsageError(
            f"{store.folder} holds token {largest}, but this model's ids lie between 0 and {vocab - 1}; distill with "
            "this model."
        )


def _module(
    cls: Any, llm: LLM, stores: Sequence[Store], options: Any, seed: int,
    begin: tuple[Checkpoint, dict[str, Tensor]] | None,
) -> Trainable:  # fmt: skip
    """What is to learn; what a fresh one draws follows from the seed."""
    import torch

    counts_V, folder = (
        written((each for store in stores for each in store.conversations), llm.backbone.config.vocab),
        llm.folder.path if llm.folder else None,
    )
    if begin:  # what it has not learnt to choose from, it has not learnt to leave alone
        counts_V[begin[1]["vocabulary"].long()] += counts_V.sum()
    torch.manual_seed(seed)
    return cls.trainable(llm.backbone, options, counts_V, folder)


def _start(start: str, backbone: Backbone, cls: Any) -> tuple[Checkpoint, dict[str, Tensor]]:
    """The drafter to begin with."""
    from foretell.drafting.checkpoint import load, shipped

    folder = shipped(backbone).get(start, Path(start).expanduser())
    if not folder.is_dir():
        lacks = f"No {start} drafter comes with foretell for this model" if start in drafters.DRAFTERS else ""
        raise UsageError(f"{lacks or f'There is no folder {start}'}; begin with the folder of a drafter.")
    checkpoint, tensors = load(folder / "drafter" if (folder / "drafter/config.json").is_file() else folder)
    able = getattr(cls, "STARTS", (checkpoint.method,))
    if checkpoint.method not in able:
        raise UsageError(
            f"{start} is a {checkpoint.method} drafter, with which {cls.method} cannot begin; begin with one of "
            f"{', '.join(able)}, or without --start."
        )
    if checkpoint.fingerprint != backbone.fingerprint:
        raise UsageError(
            f"{start} was trained for {checkpoint.backbone} (fingerprint {checkpoint.fingerprint}), not for this model "
            f"({backbone.fingerprint}); begin with a drafter of this one, or without --start."
        )
    if "vocabulary" not in tensors:
        raise ForetellError(f"{start} is damaged, or of another method: it lacks a draft vocabulary.")
    return checkpoint, tensors


def _taken(cls: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """Options that a drafter was made with, as far as what begins with it has them too."""
    from foretell.drafting.options import renamed

    names = {each.name for each in fields(cls.Training)}
    theirs = {name: value for name, value in renamed(cls.Training, checkpoint.arch).items() if name in names}
    return theirs | ({"taps": len(theirs["taps"])} if "taps" in theirs else {})


def _begin(module: Trainable, start: str, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Lets the module begin with what another drafter has learnt; says which, and by what commands it had learnt."""
    from foretell.drafting.checkpoint import fingerprint
    from foretell.files import one_line

    try:
        module.start(checkpoint.arch, tensors)
    except UsageError as error:
        raise UsageError(str(error).replace("It", start, 1)) from error
    except (KeyError, RuntimeError) as error:
        raise ForetellError(f"{start} is damaged, or of another method: {one_line(error)}.") from error
    earlier = checkpoint.provenance.get("started_by", [])
    return {
        "start": fingerprint(tensors), "started_by": [*earlier, checkpoint.provenance.get("command", checkpoint.method)]
    }  # fmt: skip


def _figures(report: Report) -> dict[str, Any]:
    return {name: value for name, value in asdict(report).items() if name != "replayed"}


def written(talks: Iterable[Distilled], vocab: int) -> Tensor:
    """[V]: how often the model wrote each token."""
    import torch

    spans = (each.tokens[start:end] for each in talks for start, end in each.answers)
    return torch.bincount(torch.tensor([token for span in spans for token in span]), minlength=vocab)


def replayed(told: list[int]) -> list[int]:
    """Those of the held-out conversations that are decoded once more, of every folder of data."""
    return told[:: max(1, len(told) // REPLAYED)][:REPLAYED]


def _draw(out: Path) -> None:
    """Curves of the training; the drafter is there without them too."""
    from foretell.bench.plots import training_curves

    try:
        training_curves(out / "run/log.jsonl", out / "curves.png")
    except ForetellError as error:
        note(f"note: {error}")


def _say_number_type(run: Trainer) -> None:
    from foretell.drafting.learning.products import measured

    note(measured(run.device.type).said(run.number_type, run.began_in))


def _say(report: Report, checkpoint: Checkpoint, text: str) -> None:
    for k, accuracy in enumerate(report.accuracy, start=1):
        note(f"head {k}: {accuracy['top1']:.1%} first, {accuracy['top5']:.1%} among five")
    note(
        f"tokens per step on {text}: " + ", ".join(f"{n} nodes {t:.2f}" for n, t in checkpoint.tokens_per_step.items())
    )


def _say_how(base: Base, checkpoint: Checkpoint, out: Path) -> None:
    """The command that uses the drafter."""
    words = ["foretell", "chat", *(["--model", checkpoint.backbone] if checkpoint.backbone != Base.model else [])]
    words += ["--cache-dir", str(base.cache_dir)] if base.cache_dir else []
    words += ["--drafter", checkpoint.method, "-o", f"checkpoint={out / 'drafter'}"]
    note(f"The drafter is in {out / 'drafter'}; use it with {shlex.join(words)}")
