"""One module in training, of any method: a `Trainable` turns a batch into loss terms, and the trainer adds them up.

AdamW, warm-up, cosine decay, gradient accumulation. The batches and the random draws of a step follow from the seed and
the step's number alone, so that a resumed run ends with the weights of a run that was never interrupted, to the bit on
a processor. For the same reason it keeps the number type that it multiplied in first, unless this machine is much
slower at it.

    state.pt       weights, optimizer, step; written whole or not at all, read with weights_only
    log.jsonl      losses by term, learning rate, number type of products, tokens per second: a line for the first step,
                   then one every 20 steps or 10 seconds; at the end the held-out figures
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foretell.drafting.learning import number_types
from foretell.drafting.learning.trainable import Trainable, TrainingBatch
from foretell.errors import ForetellError, UsageError, check_numbers
from foretell.files import atomic_write, complete_lines, one_line, write_errors
from foretell.loading.catalog import current
from foretell.train.data import Distilled
from foretell.train.evaluation import SIZES, Report, evaluate, spread
from foretell.train.features import Batches
from foretell.train.forward import attention_on

POOL, POOLED_TOKENS = 512, 64
"""Conversations that are shuffled together, at least 512 and one for every 64 tokens of a batch; then they are sorted
by length, so that batches carry little padding."""
MAX_HELD_OUT = 400
"""Conversations of each folder of data."""
MAX_MEASURED = 400
"""Conversations of all folders: to measure more would take longer than a short training."""
SEEDS = "SeedSequence"
"""How seeds of batches are made; states of earlier versions, which do not name it, used Python's hash of a tuple."""
WITHOUT_EFFECT = ("save_seconds", "started_by")
"""Settings and options that do not change what is learnt: a run may be resumed with other values of these."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Length, learning rates and batches of a training.

    Attributes:
        epochs: passes over the data; 0 trains nothing, and measures what the training starts with.
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
            ("epochs", 0, 1e4), ("batch_tokens", 1, 1 << 24), ("accumulate", 1, 4096), ("learning_rate", 1e-9, 10),
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
        seconds: time spent on the steps of this module, earlier runs included, and with it the passes of the backbone
            and the work of all modules that are trained beside it.
        number_type: type that the module multiplies in, by its name in `number_types`.
        began_in: the type that the run began in.
        updating: true inside an update, whose interruption leaves weights of no step.
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
        self.held_out = [i for members in features.sets for i in held_out_of(features.data, members, settings)]
        self.training = sorted(set(range(len(features.data))).difference(self.held_out))
        self._data = features.digest
        self.steps_per_epoch = len(self._epoch(0)) / settings.accumulate
        self.steps = max(1, round(settings.epochs * self.steps_per_epoch)) if settings.epochs else 0
        self.groups = module.groups()
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters, _ in self.groups], lr=settings.learning_rate, betas=(0.9, 0.98),
            weight_decay=settings.weight_decay, fused=True,
        )  # fmt: skip
        self.step = 0
        self.skipped = 0
        self.seconds = 0.0
        self.number_type = self.began_in = number_types.chosen(self.device)
        self.updating = False
        self._old_seeds = False
        self._terms: list[dict[str, Tensor]] = []  # of the batches since the last update
        self._logged: dict[str, list[Tensor]] = {}  # of the steps since the last line of the log

    # -- one step -------------------------------------------------------------------------------------------------

    @property
    def done(self) -> float:
        """Share of the training that is done."""
        return self.step / max(1, self.steps)

    def begin_step(self) -> None:
        """Prepares module and learning rates for the batches of the current step."""
        self.module.train()
        self.module.begin(self.done)
        for group, (_, rate) in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = self.learning_rate(self.step) * rate(self.done)
        self._terms = []
        self.optimizer.zero_grad(set_to_none=True)

    def learn(self, batch: TrainingBatch) -> None:
        """Adds the gradient of the step's next batch."""
        with number_types.multiply_in(self.number_type):
            torch.manual_seed(self._seed(len(self._terms)))
            terms = self.module.losses(batch)
            if terms:  # else nothing in it was written by the model
                (torch.stack(list(terms.values())).sum() / self.settings.accumulate).backward()
            self._terms.append({name: term.detach() for name, term in terms.items()})

    def update(self, alone: bool = True) -> None:
        """Makes the update of a step, whose batches were learnt.

        Args:
            alone: whether no others are trained beside this one.

        Raises:
            ForetellError: a loss or a gradient is not finite; the weights are as they were.
        """
        losses = [torch.stack(list(terms.values())).sum() for terms in self._terms if terms]
        if losses:
            norms = [torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip) for parameters, _ in self.groups]
            self._check_finite(losses, [norm.to(losses[0]) for norm in norms], alone)
            self.updating = True
            self.optimizer.step()
        for name in {name: None for terms in self._terms for name in terms}:
            found = [terms[name] for terms in self._terms if name in terms]
            self._logged.setdefault(name, []).append(torch.stack(found).mean())
        self.skipped += sum(not terms for terms in self._terms)
        self.step += 1
        self.updating = False

    def _check_finite(self, losses: list[Tensor], norms: list[Tensor], alone: bool) -> None:
        """Refuses losses, or norms of gradients, that are not finite; their device is waited for here, once a step."""
        if torch.stack(losses + norms).isfinite().all():
            return
        named = [("loss", loss) for loss in losses] + [("norm of the gradient", norm) for norm in norms]
        name, wrong = next((name, value.item()) for name, value in named if not value.isfinite())
        raise ForetellError(
            f"The {name} became {wrong} at step {self.step} of {self.folder}; lower `learning_rate=`, with another "
            f"`out=`{'' if alone else ', or train the others without it'}."
        )

    def log_steps(self, tokens_per_second: float) -> None:
        """One line of the log, for the steps since the last one."""
        line = {
            "step": self.step, "epoch": round(self.step / self.steps_per_epoch, 3),
            "loss": {name: round(torch.stack(each).mean().item(), 4) for name, each in self._logged.items()},
            "learning_rate": self.learning_rate(self.step), "products": self.number_type,
            "tokens_per_s": round(tokens_per_second),
        }  # fmt: skip
        self._logged = {}
        self.log(line)

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
        together = max(POOL, self.settings.batch_tokens // POOLED_TOKENS)
        for begin in range(0, len(order), together):
            pool = sorted(order[begin : begin + together], key=lambda i: len(self.features.data[i].tokens))
            batch: list[int] = []
            for i in pool:  # ascending: each is the longest so far, and all are padded to it
                if batch and (len(batch) + 1) * len(self.features.data[i].tokens) > self.settings.batch_tokens:
                    batches.append(batch)
                    batch = []
                batch.append(i)
            batches.append(batch)
        return [batches[i] for i in rng.permutation(len(batches))]

    def batches(self, step: int) -> Iterator[list[list[int]]]:
        """Batches of each step from this one to the last; epochs follow each other without a gap."""
        accumulate = self.settings.accumulate
        batches = islice(chain.from_iterable(map(self._epoch, count())), step * accumulate, None)
        for _ in range(step, self.steps):
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

    def evaluate(
        self, sizes: Sequence[int] = SIZES, progress: Callable[[float], None] = lambda fraction: None
    ) -> Report:
        """Figures on at most `MAX_MEASURED` held-out conversations, or on learnt ones where none is held out."""
        self.module.begin(self.done)
        self.features.multiply_in(self.number_type)
        with number_types.multiply_in(self.number_type), attention_on(self.device):
            measured = spread(self.held_out or self.training, MAX_MEASURED)
            return evaluate(self.module, self.features, measured, sizes, progress)


@contextmanager
def _system_errors() -> Iterator[None]:
    """Raises the system's error, which torch's archive writer hides behind one of its own."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def held_out_of(data: Sequence[Distilled], members: range, settings: Settings) -> list[int]:
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
