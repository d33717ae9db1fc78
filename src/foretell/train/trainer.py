"""The training loop. It knows no method: a `Trainable` turns a batch into loss terms, and the trainer adds them up.

AdamW, warm-up, cosine decay, gradient accumulation. The batches and the random draws of a step follow from the seed and
the step's number alone, so that a resumed run ends with exactly the weights of a run that was never interrupted. For
the same reason it keeps the number type that it multiplied in first, unless this machine is much slower at it.

    state.pt       weights, optimizer, step; written whole or not at all, read with weights_only
    log.jsonl      losses by term, learning rate, number type of products, tokens per second: a line for the first step,
                   then one every 20 steps or 10 seconds; at the end the held-out figures
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

from foretell.drafting.learning import number_types
from foretell.drafting.learning.trainable import Trainable
from foretell.errors import ForetellError, UsageError, check_numbers
from foretell.files import atomic_write, complete_lines, one_line, write_errors
from foretell.loading.catalog import current
from foretell.train import malloc
from foretell.train.data import Distilled, digest
from foretell.train.evaluation import SIZES, Report, evaluate
from foretell.train.features import Batches

POOL = 512
"""Conversations that are shuffled together, then sorted by length so that batches carry little padding."""
MAX_HELD_OUT = 400
"""Conversations of each folder of data."""
LOG_STEPS, LOG_SECONDS = 20, 10.0
"""A line of the log is written after so many steps, or so many seconds if that is earlier."""
SEEDS = "SeedSequence"
"""How seeds of batches are made; states of earlier versions, which do not name it, used Python's hash of a tuple."""
WITHOUT_EFFECT = ("save_seconds", "started_by")
"""Settings and options that do not change what is learnt: a run may be resumed with other values of these."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Length, learning rates and batches of a training.

    Attributes:
        epochs: passes over the data.
        batch_tokens: tokens of a batch, prompts and padding included.
        accumulate: batches per step.
        learning_rate: its peak.
        warmup: share of all steps in which the rate rises to its peak.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        held_out: share of the conversations that is never trained on, at most 400 of each folder of data.
        save_seconds: time between two saved states.
        seed: of fresh weights, of the order of the data, and of what is held out.
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


class Trainer:
    """Trains a module on features; `folder` keeps its state and its log.

    Args:
        options: what the module was made with: a run can be resumed only with the same options.
        migrate: brings options and settings that an earlier version recorded under their present names.

    Attributes:
        held_out, training: indices of the conversations that are held out, and of those that are trained on.
        step: updates made so far, of `steps`.
        skipped: batches that held nothing to learn.
        seconds: time spent on steps, earlier runs included.
        number_type: type that the module multiplies in, by its name in `number_types`.
        began_in: the type that the run began in.
    """

    def __init__(
        self,
        module: Trainable,
        features: Batches,
        settings: Settings,
        folder: Path,
        options: dict[str, Any] | None = None,
        migrate: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ):
        self.device = features.backbone.device
        self.module, self.features, self.folder = module.to(self.device), features, folder
        self.settings, self.options, self.migrate = settings, options or {}, migrate
        self.held_out = [i for members in features.sets for i in _held_out(features.data, members, settings)]
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
        self.seconds = 0.0
        self.number_type = self.began_in = number_types.chosen(self.device)
        self._old_seeds = False
        self._updating = False

    def run(
        self,
        progress: Callable[[int, int], None] = lambda *_: None,
        stop: Callable[[], object] = lambda: False,
    ) -> None:
        """Trains to the end. An interruption saves the state first.

        Args:
            progress: called after each step with (steps done, all steps).
            stop: called before each step; the run ends there if the result is true.

        Raises:
            KeyboardInterrupt: `stop` returned something true.
            ForetellError: the loss is no longer finite, or the state cannot be written.
        """
        if not self.resume():
            self.save()  # fails now, not after hours, where the folder cannot be written
        self._updating = False
        malloc.keep()
        try:
            with number_types.multiply_in(self.number_type):
                self._run(progress, stop)
        finally:
            if not self._updating:  # an update that was cut off leaves weights of no step: the saved state stays
                self.save()

    def _run(self, progress: Callable[[int, int], None], stop: Callable[[], object]) -> None:
        losses: dict[str, list[float]] = {}  # of the steps since the last line of the log
        tokens, logged, saved, timed = 0, *(time.perf_counter() for _ in range(3))
        for batches in self._remaining():
            if stop():
                raise KeyboardInterrupt
            terms = self._step(batches)
            self.step += 1
            self._updating = False
            tokens += sum(len(self.features.data[i].tokens) for batch in batches for i in batch)
            for name, value in terms.items():
                losses.setdefault(name, []).append(value)
            now = time.perf_counter()
            self.seconds, timed = self.seconds + now - timed, now
            if self.step in (1, self.steps) or self.step % LOG_STEPS == 0 or now - logged >= LOG_SECONDS:
                self._log_steps(losses, tokens / (now - logged))
                losses, tokens, logged = {}, 0, time.perf_counter()
            progress(self.step, self.steps)
            if now - saved > self.settings.save_seconds:
                self.save()
                saved = time.perf_counter()

    def _log_steps(self, losses: dict[str, list[float]], tokens_per_second: float) -> None:
        """One line of the log, for the steps since the last one."""
        line = {
            "step": self.step, "epoch": round(self.step / self.steps_per_epoch, 3),
            "loss": {name: round(mean(values), 4) for name, values in losses.items()},
            "learning_rate": self.learning_rate(self.step), "products": self.number_type,
            "tokens_per_s": round(tokens_per_second),
        }  # fmt: skip
        self.log(line)

    def _step(self, batches: Sequence[Sequence[int]]) -> dict[str, float]:
        """Makes one update; returns the loss of each term, averaged over the accumulated batches."""
        self.module.train()
        self.module.begin(self.step / self.steps)
        for group, (_, rate) in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = self.learning_rate(self.step) * rate(self.step / self.steps)
        out: dict[str, float] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for number, indices in enumerate(batches):
            torch.manual_seed(self._seed(number))
            terms = self.module.losses(self.features.batch(indices).to(self.device))
            if not terms:  # nothing in it was written by the model
                self.skipped += 1
                continue
            loss = torch.stack(list(terms.values())).sum() / len(batches)
            if not torch.isfinite(loss):
                raise ForetellError(
                    f"The loss became {loss.item()} at step {self.step}; lower `learning_rate=`, with another `out=`."
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

    def _seed(self, number: int) -> int:
        """Seed of a batch of the current step, for what the module draws at random."""
        entropy = (self.settings.seed, self.step, number)
        if self._old_seeds:
            return hash(entropy) % 2**31  # runs of earlier versions go on as they began
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def learning_rate(self, step: int) -> float:
        """Rate at a step: a linear warm-up to the peak, then a cosine down to a twentieth of it."""
        peak, warm = self.settings.learning_rate, max(1, round(self.settings.warmup * self.steps))
        if step < warm:
            return peak * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))

    # -- batches --------------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> list[list[int]]:
        """Batches of one pass over the training data; seed and epoch determine them."""
        rng = np.random.default_rng((self.settings.seed, epoch))
        order = [self.training[i] for i in rng.permutation(len(self.training))]
        batches: list[list[int]] = []
        for begin in range(0, len(order), POOL):
            pool = sorted(order[begin : begin + POOL], key=lambda i: len(self.features.data[i].tokens))
            batch: list[int] = []
            for i in pool:  # ascending: each is the longest so far, and all are padded to it
                if batch and (len(batch) + 1) * len(self.features.data[i].tokens) > self.settings.batch_tokens:
                    batches.append(batch)
                    batch = []
                batch.append(i)
            batches.append(batch)
        return [batches[i] for i in rng.permutation(len(batches))]

    def _remaining(self) -> Iterator[list[list[int]]]:
        """Batches of each step from the current one to the last; epochs follow each other without a gap."""
        accumulate = self.settings.accumulate
        batches = islice(chain.from_iterable(map(self._epoch, count())), self.step * accumulate, None)
        while self.step < self.steps:
            yield list(islice(batches, accumulate))

    # -- state ----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the state whole or not at all."""
        state = {
            "module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
            "settings": asdict(self.settings) | self.options, "data": self._data, "skipped": self.skipped,
            "seconds": self.seconds, "products": self.number_type,
            "seeds": "hash" if self._old_seeds else SEEDS,
        }  # fmt: skip
        with atomic_write(self.folder / "state.pt") as partial, partial.open("wb") as file, _system_errors():
            torch.save(state, file)  # a file of our own: torch does not report a full disk

    def resume(self) -> bool:
        """Loads the saved state; returns whether there is one.

        Raises:
            UsageError: it belongs to a run with other settings, options or data, or to another method.
            ForetellError: it is damaged or cannot be read.
        """
        path = self.folder / "state.pt"
        if not path.exists():
            with write_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            return False
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            step, skipped, settings, data = (state[key] for key in ("step", "skipped", "settings", "data"))
            seconds = state.get("seconds", 0.0)  # the first version did not save them
            began_in = state.get("products", "bfloat16")  # earlier versions multiplied in no other type
            seeds = state.get("seeds", "hash")
            if began_in not in number_types.TYPES or seeds not in (SEEDS, "hash"):
                raise ValueError(began_in, seeds)
        except (PermissionError, MemoryError) as error:
            raise ForetellError(f"{path} cannot be read ({one_line(error)}); the run in it is not lost.") from error
        except Exception as error:  # a file of another origin may fail in any way, inside the unpickler or after it
            raise ForetellError(f"{path} is damaged; delete it to start anew.") from error
        self._check_same(settings, data)
        try:
            self.module.load_state_dict({_present(name): value for name, value in state["module"].items()})
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"{self.folder} holds a run of another drafter; choose another `out=`.") from error
        self.step, self.skipped, self.seconds, self.began_in = step, skipped, seconds, began_in
        self._old_seeds = seeds == "hash"
        if not number_types.measured(self.device.type).clearly_slower(began_in):
            self.number_type = began_in
        self._cut_log()
        return True

    def _check_same(self, saved: dict[str, Any], data: str) -> None:
        """Refuses to resume a run that was begun with other settings, options or data."""
        own, saved = asdict(self.settings) | self.options, self.migrate(saved)
        if "model" in saved:
            saved["model"] = current(saved["model"])
        method, own_method = saved.pop("method", None), own.pop("method", None)
        if method not in (None, own_method):  # earlier versions did not save it
            raise UsageError(f"{self.folder} holds a run of {method}; choose another `out=`.")
        names = [name for name in {**saved, **own} if name not in WITHOUT_EFFECT]
        differ = [name for name in names if saved.get(name) != own.get(name)]
        other = ", ".join(f"{name} {saved.get(name)} (not {own.get(name)})" for name in differ)
        if other or data != self._data:
            raise UsageError(
                f"{self.folder} holds a run with {other or 'other data'}; go on with the same, "
                "or choose another `out=`."
            )

    def _cut_log(self) -> None:
        """Cuts the log back to the state: lines of later steps, or half a line, will be written again."""
        path = self.folder / "log.jsonl"
        with write_errors(self.folder):
            lines = complete_lines(path)
            kept = [line for line in lines if 0 < _step_of(line) <= self.step]
            if kept != lines:
                with atomic_write(path) as partial:
                    partial.write_bytes(b"".join(line + b"\n" for line in kept))

    def log(self, line: dict[str, Any]) -> None:
        """Appends a line to the log."""
        with write_errors(self.folder), (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # -- held-out figures -----------------------------------------------------------------------------------------

    def evaluate(self, sizes: Sequence[int] = SIZES) -> Report:
        """Figures on the held-out conversations (all conversations, where none is held out)."""
        self.module.begin(self.step / self.steps)
        with number_types.multiply_in(self.number_type):
            return evaluate(self.module, self.features, self.held_out or self.training, sizes)


@contextmanager
def _system_errors() -> Iterator[None]:
    """Raises the system's error, which torch's archive writer hides behind one of its own."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _held_out(data: Sequence[Distilled], members: range, settings: Settings) -> list[int]:
    """The held-out conversations of one folder of data.

    They are the same whatever folders lie beside it, since a drafter that `--start` names may have learnt the rest.
    """
    lines = sorted({data[i].line for i in members})  # a conversation may be in several pieces
    order = np.random.default_rng(settings.seed).permutation(len(lines))
    held = {lines[i] for i in order[: min(MAX_HELD_OUT, round(settings.held_out * len(lines)))]}
    return [i for i in members if data[i].line in held]


def _step_of(line: bytes) -> int:
    """Step of a line of the log; 0 if the line is about no step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


def _present(name: str) -> str:
    """The name of a parameter as modules have it now; earlier versions called a backbone that learns `pupil`."""
    return f"student.{name.removeprefix('pupil.')}" if name.startswith("pupil.") else name
