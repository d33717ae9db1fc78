"""The training loop. It knows no method: a `Trainable` turns a batch into loss terms, and this adds them up.

AdamW, warm-up, cosine decay, gradient accumulation. What a step sees is a function of the seed and its number alone,
so that a run taken up again from its last state ends with the very weights of one that was never interrupted. For the
same reason it keeps multiplying in the number type that it began in, unless another machine is much slower at it.

    state.pt       weights, optimizer, step: written beside and renamed, read with weights_only
    log.jsonl      one line per report: loss by term, learning rate, number type of products, tokens per second;
                   held-out figures
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, count, islice
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from foretell.drafting.learning import products
from foretell.drafting.learning.trainable import Trainable
from foretell.errors import ForetellError, UsageError, check_numbers
from foretell.files import atomic_write, complete_lines, one_line, write_errors
from foretell.loading.catalog import current
from foretell.train import malloc
from foretell.train.data import Distilled, digest
from foretell.train.features import Batches
from foretell.trees.calibration import Floats, Scale, fit
from foretell.trees.search import ENDED, Ranks, nested, replay

SIZES = (4, 8, 12, 16, 24, 32, 48, 64)
"""Tree sizes whose tokens per step are reported."""
CANDIDATES = 128
"""Nodes of all paths kept: trees grown at every step choose among them."""
POOL = 512
"""Conversations that are shuffled, then sorted by length so that batches carry little padding."""
REPORT = 20
"""Steps per line of the log."""
UNLEARNT = ("save_seconds", "started_by")
"""Settings and options that do not change what is learnt: a run goes on with others of these."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Numbers of a run.

    Attributes:
        epochs: passes over the data.
        batch_tokens: tokens (prompts included) of a batch; accumulate: batches per step.
        learning_rate: at its peak; warmup: share of all steps that lead up to it.
        held_out: share of the conversations that is never trained on, at most 400 of each folder of data.
        save_seconds: time between saved states.
    """

    epochs: float = 4.0
    batch_tokens: int = 8192
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    held_out: float = 0.03
    save_seconds: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = (
            ("epochs", 1e-3, 1e4), ("batch_tokens", 1, 1 << 24), ("accumulate", 1, 4096), ("learning_rate", 1e-9, 10),
            ("warmup", 0, 1), ("weight_decay", 0, 10), ("clip", 1e-6, 1e6), ("held_out", 0, 0.5),
            ("save_seconds", 0, 1e6), ("seed", 0, 2**31),
        )  # fmt: skip
        check_numbers(self, ranges, whole=("batch_tokens", "accumulate", "seed"))


@dataclass
class Report:
    """Held-out figures of a module.

    Attributes:
        loss: mean of each term.
        accuracy: per head, the share of positions whose token was among the head's best 1, 2, 3, 5, 10.
        paths: those that came true most often, most frequent first; any beginning is a tree.
        tokens_per_step: tree size -> tokens per step of fixed trees by replay.
        calibration: per head, as `trees.calibration` fits it.
        replayed: the conversations that no tree was searched on.
    """

    loss: dict[str, float]
    accuracy: list[dict[str, float]]
    paths: list[tuple[int, ...]]
    tokens_per_step: dict[int, float]
    calibration: list[Scale]
    replayed: list[int]


class Trainer:
    """Trains a module on features; `folder` keeps its state and its log.

    Args:
        options: what the module was made with: a run is gone on with only by a module of the same.

    Attributes:
        number_type: what the module multiplies in, by name as in `products`; began_in: what it did before `resume`.
    """

    def __init__(
        self,
        module: Trainable,
        features: Batches,
        settings: Settings,
        folder: Path,
        options: dict[str, Any] | None = None,
    ):
        self.device = features.backbone.device
        self.module, self.features, self.folder = module.to(self.device), features, folder
        self.settings, self.options = settings, options or {}
        self.held_out = [i for those in features.sets for i in _held_out(features.data, those, settings)]
        self.training = sorted(set(range(len(features.data))).difference(self.held_out))
        self._data = digest(features.data)
        self.steps_per_epoch = len(self._epoch(0)) / settings.accumulate
        self.steps = max(1, round(settings.epochs * self.steps_per_epoch))
        self.groups = module.groups()
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters, _ in self.groups], lr=settings.learning_rate, betas=(0.9, 0.98),
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        self.step = 0
        self.skipped = 0
        self.seconds = 0.0  # of all runs that led here
        self.number_type = self.began_in = products.chosen(self.device)
        self._updating = False

    def run(
        self,
        progress: Callable[[int, int], None] = lambda *_: None,
        stop: Callable[[], object] = lambda: False,
    ) -> None:
        """Trains to the end, or until `stop` says so between two steps. An interruption saves the state first.

        Args:
            progress: called after each step with its number and how many there are.

        Raises:
            KeyboardInterrupt: `stop` said so.
        """
        if not self.resume():
            self.save()  # a folder that cannot be written is found out now
        self._updating = False
        malloc.keep()
        try:
            with products.multiply_in(self.number_type):
                self._run(progress, stop)
        finally:
            if not self._updating:  # else the weights are those of no step, and the last saved state counts
                self.save()

    def _run(self, progress: Callable[[int, int], None], stop: Callable[[], object]) -> None:
        found: dict[str, list[float]] = {}  # of each term, in the steps that had it
        tokens, began, saved = 0, time.perf_counter(), time.perf_counter()
        timed = began
        for batches in self._remaining():
            if stop():
                raise KeyboardInterrupt
            self.module.train()
            self.module.begin(self.step / self.steps)
            for group, (_, rate) in zip(self.optimizer.param_groups, self.groups, strict=True):
                group["lr"] = self.learning_rate(self.step) * rate(self.step / self.steps)
            terms = self._step(batches)
            tokens += sum(len(self.features.data[i].tokens) for batch in batches for i in batch)
            self.step += 1
            self.seconds, timed = self.seconds + time.perf_counter() - timed, time.perf_counter()
            self._updating = False
            for name, value in terms.items():
                found.setdefault(name, []).append(value)
            if self.step % REPORT == 0 or self.step == self.steps:
                speed = tokens / (time.perf_counter() - began)
                line = {
                    "step": self.step, "epoch": round(self.step / self.steps_per_epoch, 3),
                    "loss": {name: round(mean(values), 4) for name, values in found.items()},
                    "learning_rate": self.learning_rate(self.step), "products": self.number_type,
                    "tokens_per_s": round(speed),
                }  # fmt: skip
                self.log(line)
                found, tokens, began = {}, 0, time.perf_counter()
            progress(self.step, self.steps)
            if time.perf_counter() - saved > self.settings.save_seconds:
                self.save()
                saved = time.perf_counter()

    def _step(self, batches: Sequence[Sequence[int]]) -> dict[str, float]:
        """One update; the loss of each term, averaged over the accumulated batches."""
        out: dict[str, float] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for number, indices in enumerate(batches):
            torch.manual_seed(hash((self.settings.seed, self.step, number)) % 2**31)  # what a module draws, too
            terms = self.module.losses(self.features.batch(indices).to(self.device))
            if not terms:  # nothing in it was written by the model
                self.skipped += 1
                continue
            loss = torch.stack(list(terms.values())).sum() / len(batches)
            if not torch.isfinite(loss):
                raise ForetellError(
                    f"The loss became {loss.item()} at step {self.step}; lower --lr, with another --out."
                )
            loss.backward()
            for name, term in terms.items():
                out[name] = out.get(name, 0.0) + term.item() / len(batches)
        if out:
            for parameters, _ in self.groups:
                torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
            self._updating = True
            self.optimizer.step()
        return out

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a twentieth."""
        peak, warm = self.settings.learning_rate, max(1, round(self.settings.warmup * self.steps))
        if step < warm:
            return peak * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))

    # -- batches --------------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> list[list[int]]:
        """Batches of one pass over the training data, a function of seed and epoch."""
        rng = np.random.default_rng((self.settings.seed, epoch))
        order = [self.training[i] for i in rng.permutation(len(self.training))]
        batches: list[list[int]] = []
        for at in range(0, len(order), POOL):
            pool = sorted(order[at : at + POOL], key=lambda i: len(self.features.data[i].tokens))
            batch: list[int] = []
            for i in pool:  # ascending: the newest is the longest, and all are padded to it
                if batch and (len(batch) + 1) * len(self.features.data[i].tokens) > self.settings.batch_tokens:
                    batches.append(batch)
                    batch = []
                batch.append(i)
            batches.append(batch)
        return [batches[i] for i in rng.permutation(len(batches))]

    def _remaining(self) -> Iterator[list[list[int]]]:
        """Batches of each step from the current one to the last: one epoch after the other, `accumulate` at a time."""
        accumulate = self.settings.accumulate
        batches = islice(chain.from_iterable(map(self._epoch, count())), self.step * accumulate, None)
        while self.step < self.steps:
            yield list(islice(batches, accumulate))

    # -- state ----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the state beside the old one, then takes its place."""
        state = {
            "module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
            "settings": asdict(self.settings) | self.options, "data": self._data, "skipped": self.skipped,
            "seconds": self.seconds, "products": self.number_type,
        }  # fmt: skip
        with atomic_write(self.folder / "state.pt") as partial, partial.open("wb") as file, _system_errors():
            torch.save(state, file)  # into our file: torch itself does not say that a disk is full

    def resume(self) -> bool:
        """Takes up the saved state, if there is one.

        Raises:
            UsageError: it was made with other settings, by another module or from other data.
        """
        path = self.folder / "state.pt"
        if not path.exists():
            with write_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            return False
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            step, skipped, settings, data = (state[key] for key in ("step", "skipped", "settings", "data"))
            seconds = state.get("seconds", 0.0)  # not in runs of the first version
            began_in = state.get("products", "bfloat16")  # earlier versions knew no other
            if began_in not in products.TYPES:
                raise ValueError(began_in)
        except (PermissionError, MemoryError) as error:
            raise ForetellError(f"{path} cannot be read ({one_line(error)}); the run in it is not lost.") from error
        except Exception as error:  # a foreign file may fail in any way, inside the unpickler or after it
            raise ForetellError(f"{path} is damaged; delete it to start anew.") from error
        ours = asdict(self.settings) | self.options
        if "model" in settings:
            settings["model"] = current(settings["model"])
        method, our_method = settings.pop("method", None), ours.pop("method", None)
        if method not in (None, our_method):  # earlier versions did not write it down
            raise UsageError(f"{self.folder} holds a run of {method}; choose another --out.")
        names = [name for name in {**settings, **ours} if name not in UNLEARNT]
        differ = [name for name in names if settings.get(name) != ours.get(name)]
        other = ", ".join(f"{name} {settings.get(name)} (not {ours.get(name)})" for name in differ)
        if other or data != self._data:
            raise UsageError(
                f"{self.folder} holds a run with {other or 'other data'}; go on with the same, or choose another --out."
            )
        try:
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"{self.folder} holds a run of another drafter; choose another --out.") from error
        self.step, self.skipped, self.seconds, self.began_in = step, skipped, seconds, began_in
        if not products.measured(self.device.type).clearly_slower(began_in):
            self.number_type = began_in
        self._forget_later_lines()
        return True

    def _forget_later_lines(self) -> None:
        """Cuts the log back to the state: what was logged after it was saved, or half written, comes again."""
        path = self.folder / "log.jsonl"
        with write_errors(self.folder):
            lines = complete_lines(path)
            kept = [line for line in lines if 0 < _step_of(line) <= self.step]
            if kept != lines:
                with atomic_write(path) as partial:
                    partial.write_bytes(b"".join(line + b"\n" for line in kept))

    def log(self, line: dict[str, Any]) -> None:
        with write_errors(self.folder), (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # -- held-out figures -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, sizes: Sequence[int] = SIZES) -> Report:
        """Figures on the conversations that were held out (all of them where none was).

        Trees are searched, and heads calibrated, on one half of the held-out conversations; the other is replayed.
        """
        with products.multiply_in(self.number_type):
            return self._evaluate(sizes)

    def _evaluate(self, sizes: Sequence[int]) -> Report:
        self.module.eval()
        self.module.begin(self.step / self.steps)
        indices = self.held_out or self.training
        sums: dict[str, float] = {}
        ranks: list[Ranks] = []
        log_probs: list[Floats] = []
        for at in range(0, len(indices), 8):
            batch = self.features.batch(indices[at : at + 8]).to(self.device)
            for name, term in self.module.losses(batch).items():
                sums[name] = sums.get(name, 0.0) + term.item() * len(indices[at : at + 8]) / len(indices)
            for each in self.module.guesses(batch):
                ranks.append(each.ranks_PK.numpy())
                log_probs.append(each.log_probs_PKR.numpy())
        one, other = (slice(0, None, 2), slice(1, None, 2)) if len(ranks) > 1 else (slice(None), slice(None))
        paths = nested(ranks[one], CANDIDATES)
        tokens_per_step = {n: round(replay(ranks[other], paths[: n - 1]), 4) for n in sizes if n <= len(paths) + 1}
        return Report(sums, _accuracy(ranks), paths, tokens_per_step, fit(log_probs[one], ranks[one]), indices[other])


@contextmanager
def _system_errors() -> Iterator[None]:
    """Brings out the system's error that torch's archive covers with one of its own as it is given up."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _held_out(data: Sequence[Distilled], those: range, settings: Settings) -> list[int]:
    """A folder of data keeps back the same conversations with others beside it: a drafter that another begins with
    may have learnt the rest."""
    lines = sorted({data[i].line for i in those})  # a conversation may be in several pieces
    order = np.random.default_rng(settings.seed).permutation(len(lines))
    held = {lines[i] for i in order[: min(400, round(settings.held_out * len(lines)))]}
    return [i for i in those if data[i].line in held]


def _step_of(line: bytes) -> int:
    """Of a line of the log; 0 if it is none of a step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


def _accuracy(ranks: Sequence[Ranks]) -> list[dict[str, float]]:
    """Per head: share of the tokens there were that are among its first 1, 2, 3, 5 and 10."""
    heads = [head[head != ENDED] for head in np.concatenate(ranks).T]
    return [
        {f"top{n}": round(float((head < n).mean()), 4) if len(head) else 0.0 for n in (1, 2, 3, 5, 10)}
        for head in heads
    ]
