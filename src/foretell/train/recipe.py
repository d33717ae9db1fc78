"""The recipe of training: from folders of distilled conversations to a drafter on disk, in a few lines of Python.

    import foretell
    from foretell.train import recipe
    llm = foretell.load("MODEL")
    trained = recipe.run("medusa", llm, "data", "heads", options={"heads": 3}, progress=print)
    llm = foretell.load(trained.model, "medusa", checkpoint=trained.folder)

`run_all` trains several drafters at once: the backbone, most of the work, then runs once for all of them, and each
learns what it would learn alone, to the bit on a processor. It takes four steps, which may be called one by one:
`begin` refuses what cannot work, locks the folders and resumes runs that were interrupted there; `Begun.prepare`
computes the features that are to be kept; `Begun.train` trains; `Begun.publish` measures the drafters and writes them.

    heads/run                     the trainer's state and log
    heads/drafter                 the drafter (`drafting.checkpoint`)
    heads/adapter, heads/model    the changed backbone, where the method changes it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretell import api
from foretell.api import LLM
from foretell.backbone import Backbone
from foretell.drafting.checkpoint import Checkpoint
from foretell.drafting.learning.method import TrainableMethod
from foretell.drafting.learning.trainable import Trainable
from foretell.drafting.options import converted, migrated
from foretell.errors import UsageError
from foretell.files import sole_writer
from foretell.train.checks import Data, check_data, check_out, method_class, open_data
from foretell.train.data import ConversationStore, Distilled
from foretell.train.evaluation import SIZES, Report, spread
from foretell.train.features import Batches, ComputedFeatures, FeatureStore, JoinedFeatures
from foretell.train.loop import train
from foretell.train.memory import fits
from foretell.train.replay import tokens_per_step_by_size
from foretell.train.start import inherited, initialise, new_module, read_start
from foretell.train.trainer import Settings, Trainer

MAX_REPLAYED = 40
"""Held-out conversations that are decoded again for each tree size."""

Progress = Callable[[int, int], None]
"""Called with (done, total) of one step of the recipe."""


def quiet(*_: Any) -> None:
    """Shows nothing."""


def never() -> bool:
    """Stops nothing."""
    return False


@dataclass(frozen=True, kw_only=True)
class Job:
    """A drafter to train.

    Attributes:
        method: a drafter that can be trained (`trainable_methods`).
        out: folder for the drafter.
        options: of the method, by name; those that are left out have their defaults, or the values of `start`.
        start: initialises with a trained drafter: its folder, or the name of one that ships for this model.
    """

    method: str
    out: str | Path
    options: Mapping[str, Any] = field(default_factory=dict)
    start: str = ""


@dataclass(frozen=True)
class Trained:
    """Results of a training.

    Attributes:
        folder: of the drafter: its option `checkpoint`.
        model: the model that it drafts for; another than was trained on, where the method changes the backbone.
        checkpoint: as it was written to `folder`.
        report: held-out figures, or figures of the training text where nothing was held out.
        held_out: whether anything was held out.
    """

    folder: Path
    model: str
    checkpoint: Checkpoint
    report: Report
    held_out: bool


def run(
    method: str,
    model: LLM | str | Path,
    data: Data | Sequence[Data],
    out: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    start: str = "",
    settings: Settings | None = None,
    keep_features: bool = False,
    other_model: bool = False,
    progress: Callable[[str, int, int], None] = quiet,
) -> Trained:
    """Trains a drafter. The same call resumes a run that was interrupted, and ends with the same drafter (to the bit
    on a processor).

    Args:
        method, out, options, start: see `Job`.
        model, data, settings, keep_features, other_model, progress: see `run_all`.
    """
    [trained] = run_all(
        [Job(method=method, out=out, options=options or {}, start=start)], model, data, settings=settings,
        keep_features=keep_features, other_model=other_model, progress=progress,
    )  # fmt: skip
    return trained


def run_all(
    jobs: Sequence[Job],
    model: LLM | str | Path,
    data: Data | Sequence[Data],
    *,
    settings: Settings | None = None,
    keep_features: bool = False,
    other_model: bool = False,
    progress: Callable[[str, int, int], None] = quiet,
) -> list[Trained]:
    """Trains several drafters at once, each as if it were alone, to the bit on a processor.

    The same call resumes a run that was interrupted.

    Args:
        model: the model to draft for, or its name.
        data: folders that `foretell distill` wrote, or open ones.
        settings: how long and how fast they learn.
        keep_features: computes the features once and keeps them beside the data, instead of at every batch. They are
            rounded to bfloat16, and read again whatever number type they were multiplied in.
        other_model: accepts data that another model wrote, and heads of another one to begin with.
        progress: called with (step of the recipe, done, total).

    Raises:
        UsageError, ForetellError: one sentence that names what is wrong and the remedy.
        KeyboardInterrupt: after the states were saved.
    """

    def of(step: str) -> Progress:
        return lambda done, total: progress(step, done, total)

    with begin(jobs, model, data, settings=settings, keep_features=keep_features, other_model=other_model) as begun:
        begun.prepare(of("features"))
        begun.train(of("training"))
        return begun.publish(of("replay"))


@contextmanager
def begin(
    jobs: Sequence[Job],
    model: LLM | str | Path,
    data: Data | Sequence[Data],
    *,
    settings: Settings | None = None,
    keep_features: bool = False,
    other_model: bool = False,
    load: Callable[[str], LLM] | None = None,
    command: str = "",
) -> Iterator[Begun]:
    """Checks everything, and holds the locks of the folders while its block runs; see `run_all`.

    Args:
        load: loads a model by its name: the one to train for, once all else is checked, and a changed one, where a
            method changes the backbone. By default as `model` was loaded.
        command: kept with the drafters, as the command that made them.
    """
    settings = settings or Settings()
    if not settings.epochs and not all(job.start for job in jobs):
        raise UsageError("`epochs=0` trains nothing; name with `start=` a drafter to measure, or train longer.")
    classes = [method_class(job.method) for job in jobs]
    given = [
        converted(cls.Training, job.options, f"{job.method} training") for cls, job in zip(classes, jobs, strict=True)
    ]
    for job in jobs:
        check_out(Path(job.out), job.method)
    if not jobs or len({Path(job.out).resolve() for job in jobs}) < len(jobs):
        raise UsageError("Each drafter that is trained needs an `out=` of its own.")
    stores = open_data(data)
    llm = model if isinstance(model, LLM) else (load or api.load)(str(model))
    if llm.folder is None:
        raise UsageError("Training needs a model that foretell.load has loaded: the drafter keeps its name.")
    for store in stores:
        check_data(store, llm, other_model)
    counts_V = token_counts((talk for store in stores for talk in store.conversations), llm.backbone.config.vocab)
    fresh = [
        _Fresh.of(job, cls, options, llm, counts_V, settings.seed, other_model)
        for job, cls, options in zip(jobs, classes, given, strict=True)
    ]
    features = features_of(llm.backbone, stores, [each.module for each in fresh], keep_features)
    others = {"together": [job.method for job in jobs]} if len(jobs) > 1 else {}
    with ExitStack() as locks:
        runs = []
        for each in fresh:
            locks.enter_context(sole_writer(each.out))
            trainer = each.trainer(llm.backbone, features, settings)
            trainer.resume()  # what cannot be resumed is refused before any work
            provenance = {
                "command": command, "data": [store.manifest for store in stores], "settings": asdict(settings),
                "options": asdict(each.options), **each.started, **others,
            }  # fmt: skip
            runs.append(Run(
                each.cls, llm, llm.folder.name, trainer, each.out, provenance,
                load or partial(api.load, **llm.loading | {"weights": None}),
            ))  # fmt: skip
        yield Begun(runs)


@dataclass
class _Fresh:
    """A module before its training, and where its weights came from."""

    cls: type[TrainableMethod]
    out: Path
    options: Any
    module: Trainable
    started: dict[str, Any]

    @classmethod
    def of(
        cls, job: Job, method: type[TrainableMethod], given: Mapping[str, Any], llm: LLM, counts_V: Tensor, seed: int,
        other_model: bool,
    ) -> _Fresh:  # fmt: skip
        origin = read_start(job.start, llm.backbone, method, other_model) if job.start else None
        options = method.Training(**(inherited(method, *origin) if origin else {}) | dict(given))
        module = new_module(method, llm, counts_V, options, seed, origin)
        started = initialise(module, job.start, *origin) if origin else {}
        return cls(method, Path(job.out), options, module, started)

    def trainer(self, backbone: Backbone, features: Batches, settings: Settings) -> Trainer:
        identity = {
            "method": self.cls.method,
            "model": backbone.fingerprint,
            "dtype": str(backbone.dtype) + backbone.quantized,
        }
        return Trainer(
            self.module, features, settings, self.out / "run", asdict(self.options) | identity | self.started,
            partial(migrated, self.cls.Training),
        )  # fmt: skip


@dataclass
class Begun:
    """Trainings in progress that share the passes of the backbone; made by `begin`."""

    runs: list[Run]

    def prepare(self, progress: Progress = quiet) -> None:
        """Computes the features that are to be kept and are not there yet; `progress` counts per cent."""
        progress(0, 100)
        trainer = self.runs[0].trainer
        trainer.features.multiply_in(trainer.number_type)
        with fits(trainer.device, "A pass of the backbone", "free some of it, or leave out `keep_features=True`"):
            seconds = trainer.features.prepare(lambda fraction: progress(round(fraction * 100), 100))
        progress(100, 100)
        for run in self.runs:
            run.provenance["feature_seconds"] = round(seconds)

    def train(self, progress: Progress = quiet, stop: Callable[[], object] = never) -> None:
        """Trains to the end, or raises KeyboardInterrupt between two steps once `stop` returns something true."""
        trainers = [run.trainer for run in self.runs]
        progress(min(trainer.step for trainer in trainers), trainers[0].steps)
        train(trainers, progress, stop)

    def publish(self, progress: Progress = quiet) -> list[Trained]:
        """Measures the drafters on held-out text, and writes them; `progress` counts per cent."""
        found: list[Trained] = []
        for run in self.runs:
            with fits(run.trainer.device, "The measuring of the drafter", "free some of it, and do the same again"):
                found.append(
                    run.publish(lambda done, total: progress((len(found) * total + done) // len(self.runs), total))
                )
        return found


@dataclass
class Run:
    """A training in progress, whose folder `out` is locked; one of `Begun`.

    Attributes:
        model: the name of the model that is trained on.
        load: loads a model by its name.
        provenance: what the checkpoint will say about its making.
    """

    cls: type[TrainableMethod]
    llm: LLM
    model: str
    trainer: Trainer
    out: Path
    provenance: dict[str, Any]
    load: Callable[[str], LLM]

    def publish(self, progress: Progress = quiet) -> Trained:
        """Measures the drafter on held-out text, and writes it; `progress` counts per cent."""
        trainer, module, backbone = self.trainer, self.trainer.module, self.llm.backbone
        progress(0, 100)
        report = trainer.evaluate(progress=lambda fraction: progress(round(fraction * 50), 100))
        figures = {name: value for name, value in asdict(report).items() if name != "replayed"}
        trainer.log({"held_out": {"epoch": trainer.settings.epochs, **figures}})
        tensors, arch = module.checkpoint()
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        model, features, indices = self.model, trainer.features, to_replay(report.replayed)
        if (changed := module.save_backbone(model, self.out)) != model:  # its states are others now
            model, backbone = changed, self.load(changed).backbone
            features = ComputedFeatures(backbone, [features.data[i] for i in indices], module.taps)
            features.multiply_in(trainer.number_type)
            indices = list(range(len(indices)))
        checkpoint = Checkpoint(
            method=self.cls.method, backbone=model, fingerprint=backbone.fingerprint, hidden=backbone.config.hidden,
            vocab=backbone.config.vocab, arch=arch, paths=[list(path) for path in report.paths],
            calibration=[list(scale) for scale in report.calibration], fitted=report.fitted,
            provenance=self.provenance | {
                "accuracy": report.accuracy, "loss": report.loss, "seconds": round(trainer.seconds),
                "skipped_batches": trainer.skipped, "products": trainer.number_type,
                "fixed_trees": report.tokens_per_step,
            },
        )  # fmt: skip
        drafter = self.cls.build(backbone, self.cls.Options(), (checkpoint, tensors))
        sizes = [size for size in SIZES if size <= drafter.max_nodes]
        checkpoint.tokens_per_step = tokens_per_step_by_size(
            drafter, features, indices, sizes, lambda fraction: progress(50 + round(fraction * 50), 100)
        )
        checkpoint.save(self.out / "drafter", tensors)
        return Trained(self.out / "drafter", model, checkpoint, report, bool(trainer.held_out))


# -- the modules that learn, and what they read ---------------------------------------------------------------


def features_of(
    backbone: Backbone, stores: Sequence[ConversationStore], modules: Sequence[Trainable], keep: bool
) -> Batches:
    """Returns what the modules read of the backbone, computed batch by batch or kept beside the data."""
    taps = tuple(sorted({tap for module in modules for tap in module.taps}))
    if not keep:
        data = [talk for store in stores for talk in store.conversations]
        ends = list(accumulate(len(store.conversations) for store in stores))
        sets = [range(*each) for each in pairwise([0, *ends])]
        return ComputedFeatures(backbone, data, taps, sets, any(module.taught for module in modules))
    name = f"features-{backbone.fingerprint}-{'-'.join(map(str, taps)) or 'teacher'}"
    kept = [FeatureStore(backbone, store.conversations, taps, store.folder / name) for store in stores]
    return JoinedFeatures(kept) if len(kept) > 1 else kept[0]


def token_counts(conversations: Iterable[Distilled], vocab_size: int) -> Tensor:
    """[V]: how often the model wrote each token."""
    spans = (talk.tokens[start:end] for talk in conversations for start, end in talk.answers)
    return torch.bincount(torch.tensor([token for span in spans for token in span]), minlength=vocab_size)


def to_replay(held_out: Sequence[int]) -> list[int]:
    """At most `MAX_REPLAYED` of the held-out conversations, evenly spread over all folders of data."""
    return spread(held_out, MAX_REPLAYED)
