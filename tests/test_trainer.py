"""Training: an interrupted run ends with the weights of a straight one, whatever interrupted it.

The trainer knows no method, so it is tested with modules of ten lines whose optimum, or whose ranks, are known.
"""

import errno
import io
import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate, count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_backbones import Model, examples
from tiny_models import DIMENSIONS
from torch import Tensor, nn
from trainables import DATA, NEVER, Line, Told, Words, once, some_data

from foretell.backbone import Backbone
from foretell.contracts import FINAL_NORM
from foretell.drafting.learning.trainable import Trainable, TrainingBatch
from foretell.errors import ForetellError, UsageError
from foretell.train import loop
from foretell.train import trainer as training
from foretell.train.data import Distilled
from foretell.train.features import ComputedFeatures
from foretell.train.loop import train
from foretell.train.trainer import Settings, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Model({"model_type": "llama", **DIMENSIONS}).build()


class Paced(Words):
    """Learns at a quarter of the rate and slower later, and notes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[float] = []

    def begin(self, done: float) -> None:
        self.told.append(done)

    def groups(self) -> list[tuple[list[nn.Parameter], Callable[[float], float]]]:
        return [([self.table_KdV], lambda done: 0.25 - 0.2 * done)]


Made = Callable[..., Trainer]


def table(made: Trainer) -> Tensor:
    """The weights of `Words`."""
    return made.module.get_parameter("table_KdV")


def gradient_of(weights: Tensor) -> Tensor:
    assert weights.grad is not None
    return weights.grad.clone()


@pytest.fixture
def trainer(backbone: Backbone, tmp_path: Path) -> Made:
    """Makes a trainer in a folder of this name."""

    def make(
        name: str = "run", module: Trainable | None = None, data: Sequence[Distilled] = DATA, **settings: Any
    ) -> Trainer:
        given = {"epochs": 4, "batch_tokens": 60, "learning_rate": 0.01, "held_out": 0.2} | settings
        features = ComputedFeatures(backbone, data, (FINAL_NORM,))
        return Trainer(module or Words(), features, Settings(**given), tmp_path / name)

    return make


def assert_same_ends(ours: Trainer, straight: Trainer) -> None:
    assert ours.step == straight.step == straight.steps
    assert ours.skipped == straight.skipped
    a, b = ours.module.state_dict(), straight.module.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = ours.optimizer.state_dict()["state"], straight.optimizer.state_dict()["state"]
    assert all(torch.equal(a[i][name], b[i][name]) for i in b for name in b[i])


@pytest.mark.slow
def test_the_optimum_is_reached(trainer: Made) -> None:
    module = Line()
    made = trainer(module=module, epochs=100, batch_tokens=120, learning_rate=0.1, data=some_data(24))
    seen: list[tuple[int, int]] = []
    train([made], lambda *step: seen.append(step))
    assert torch.allclose(module.weight, module.truth, atol=0.03)
    assert seen == [(step, made.steps) for step in range(1, made.steps + 1)]  # some steps take half a minute
    lines = [json.loads(line) for line in (made.folder / "log.jsonl").read_text().splitlines()]
    assert lines[0]["loss"]["square"] > 1000 * lines[-1]["loss"]["square"]


# --- interrupted and taken up again -------------------------------------------------------------------------


def stopping(*after: int) -> Callable[..., None]:
    """A progress bar that is interrupted when it is called for the `after`-th time."""
    calls = iter(range(after[0], 0, -1))

    def progress(*_: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stops", [(1,), (3, 1, 1), (2, 4)], ids=str)
def test_an_interrupted_run_ends_like_a_straight_one(trainer: Made, accumulate: int, stops: tuple[int, ...]) -> None:
    straight = trainer("straight", accumulate=accumulate)
    train([straight])
    assert straight.steps > 8
    for after in stops:
        with pytest.raises(KeyboardInterrupt):
            train([trainer("cut", accumulate=accumulate)], stopping(after))
    final = trainer("cut", accumulate=accumulate)
    steps: list[int] = []
    train([final], lambda step, *_: steps.append(step))
    assert steps == list(range(sum(stops) + 1, straight.steps + 1))  # no step is done twice
    assert_same_ends(final, straight)
    assert table(final).abs().sum() > 1


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_killed_run_goes_on_from_its_last_state(
    trainer: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accumulate: int
) -> None:
    save = Trainer.save

    def keep(self: Trainer) -> None:
        save(self)
        shutil.copy(self.folder / "state.pt", tmp_path / f"{self.step}.pt")

    options = {"accumulate": accumulate, "save_seconds": 0.0}
    straight = trainer("straight", **options)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "save", keep)
        train([straight])
    assert {path.name for path in straight.folder.iterdir()} == {"state.pt", "log.jsonl"}
    for step in range(straight.steps + 1):
        (tmp_path / f"from {step}").mkdir()
        (tmp_path / f"{step}.pt").rename(tmp_path / f"from {step}" / "state.pt")
        killed = trainer(f"from {step}", **options)
        train([killed])
        assert_same_ends(killed, straight)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("place", ["losses", "clip", "optimizer", "update", "save", "batch"])
@pytest.mark.parametrize("at", [1, 4])
def test_an_interruption_in_the_midst_of_a_step_is_no_different(
    trainer: Made, monkeypatch: pytest.MonkeyPatch, place: str, at: int, after: bool
) -> None:
    straight = trainer("straight", save_seconds=0.0)
    train([straight])
    made = trainer("cut", save_seconds=0.0)
    where, name = {
        "losses": (made.module, "losses"), "clip": (torch.nn.utils, "clip_grad_norm_"),
        "optimizer": (made.optimizer, "step"), "update": (made, "update"), "save": (torch, "save"),
        "batch": (made.features, "batch"),
    }[place]  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(where, name, once(getattr(where, name), at, after))
        with pytest.raises(KeyboardInterrupt):
            train([made])
    final = trainer("cut", save_seconds=0.0)
    train([final])
    assert_same_ends(final, straight)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_run_that_is_asked_to_stop_loses_no_step(trainer: Made, after: int) -> None:
    straight = trainer("straight")
    train([straight])
    made = trainer("cut")
    with pytest.raises(KeyboardInterrupt):
        train([made], stop=lambda: made.step == after)
    final = trainer("cut")
    assert final.resume()
    assert final.step == after
    train([final])
    assert_same_ends(final, straight)


def test_the_log_tells_each_step_once_whatever_cut_it(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_STEPS", 1)

    def steps(folder: Path) -> list[int]:
        return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]

    made = trainer("cut")
    with pytest.raises(KeyboardInterrupt):
        train([made], stop=lambda: made.step == 3)
    log = made.folder / "log.jsonl"
    later = '{"step": 4, "loss": {}}\n{"held_out": {}}\n'  # logged, but never saved
    log.write_text(log.read_text() + "no line of ours\n" + later + '{"step": 5, "lo')
    final = trainer("cut")
    train([final])
    assert steps(final.folder) == list(range(1, final.steps + 1))
    log.write_text(log.read_text()[:-5])
    assert trainer("cut").resume()
    assert steps(final.folder) == list(range(1, final.steps))


class Drawing(Words):
    """Draws a number for every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        self.drawn.append(float(torch.rand(())))
        return super().losses(batch)


@pytest.mark.parametrize("old", [False, True], ids=["seeds of today", "seeds of a run of an earlier version"])
def test_what_a_resumed_run_draws_is_what_a_straight_one_draws(trainer: Made, tmp_path: Path, old: bool) -> None:
    def seeds_of(step: int, number: int) -> int:
        if old:
            return hash((0, step, number)) % 2**31
        return int(np.random.SeedSequence((0, step, number)).generate_state(1)[0])

    module, made = Drawing(), trainer("cut", module=Drawing(), accumulate=2)
    made.save()
    if old:
        state = torch.load(made.folder / "state.pt", weights_only=True)
        del state["seeds"]  # as earlier versions wrote it
        torch.save(state, made.folder / "state.pt")
    with pytest.raises(KeyboardInterrupt):
        train([trainer("cut", module=module, accumulate=2)], stop=lambda: len(module.drawn) == 6)
    final = trainer("cut", module=module, accumulate=2)
    train([final])
    expected = []
    for step in range(final.steps):
        for number in range(2):
            torch.manual_seed(seeds_of(step, number))
            expected.append(float(torch.rand(())))
    assert module.drawn == expected
    assert len(set(expected)) == len(expected) > 8


def test_slow_steps_are_logged_by_the_clock(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seventeen steps of four seconds: the log must show life before the last one."""
    clock = count(0.0, 4.0)
    made = trainer(epochs=3)
    assert 12 <= made.steps <= 19
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    train([made])
    lines = [json.loads(line) for line in (made.folder / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps[0] == 1
    assert steps[-1] == made.steps
    assert max(later - step for step, later in pairwise(steps)) <= 3


def test_a_state_that_cannot_be_read_is_not_called_damaged(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    train([trainer("run")])

    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(torch, "load", forbidden)
    with pytest.raises(ForetellError, match=r"state.pt cannot be read \(.*Permission denied\); the run in it is not"):
        train([trainer("run")])


def test_a_run_without_a_saved_state_begins_anew(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted inside its first update; the same trainer tries again."""
    straight, made = trainer("straight"), trainer("cut")
    train([straight])
    with monkeypatch.context() as patched:
        patched.setattr(made.optimizer, "step", once(made.optimizer.step, 1, after=True))
        with pytest.raises(KeyboardInterrupt):
            train([made])
    train([made])
    assert_same_ends(made, straight)


def test_the_batches_of_a_step_follow_from_seed_and_number(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    batch = ComputedFeatures.batch

    def spy(self: ComputedFeatures, indices: Sequence[int]) -> TrainingBatch:
        seen.append(tuple(indices))
        return batch(self, indices)

    monkeypatch.setattr(ComputedFeatures, "batch", spy)
    monkeypatch.setattr(loop, "LOG_STEPS", 1)
    train([trainer("a", seed=3)])
    straight = seen.copy()
    seen.clear()
    train([trainer("b", seed=3, learning_rate=0.5)])
    assert seen == straight
    seen.clear()
    for after in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            train([trainer("c", seed=3)], stopping(after))
    train([trainer("c", seed=3)])
    assert seen == straight
    seen.clear()
    train([trainer("d", seed=4)])
    assert seen != straight


# --- batches and learning rate ------------------------------------------------------------------------------


def planned(lengths: Sequence[int], **settings: Any) -> Trainer:
    """A trainer that never computes anything."""
    data = [Distilled(i, [0] * length, [(0, length)]) for i, length in enumerate(lengths)]
    return Trainer(
        Told(),
        SimpleNamespace(
            data=data, digest="", sets=[range(len(data))], backbone=SimpleNamespace(device=torch.device("cpu"))
        ),
        Settings(**settings),
        Path("nowhere"),
    )  # type: ignore[arg-type]


@examples(60)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 200), st.integers(1, 4), st.integers(0, 5),
    st.sampled_from([0.0, 0.03, 0.3, 0.5]),
)  # fmt: skip
def test_an_epoch_holds_each_training_conversation_once(
    lengths: list[int], batch_tokens: int, accumulate: int, seed: int, held_out: float
) -> None:
    options = {"batch_tokens": batch_tokens, "accumulate": accumulate, "seed": seed, "held_out": held_out, "epochs": 3}
    made = planned(lengths, **options)
    assert sorted(made.held_out + made.training) == list(range(len(lengths)))
    assert len(made.held_out) == round(held_out * len(lengths))
    steps = list(made.batches(0))
    assert len(steps) == made.steps
    stream = [batch for batches in steps for batch in batches]
    assert all(len(batches) == accumulate for batches in steps)
    for batch in stream:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens
    a_pass = len(stream) // 3 if accumulate == 1 else len(planned(lengths, **options | {"accumulate": 1})._epoch(0))
    for begin in range(0, len(stream) - a_pass + 1, a_pass):
        assert sorted(i for batch in stream[begin : begin + a_pass] for i in batch) == made.training
    assert abs(len(stream) - 3 * a_pass) <= max(accumulate / 2, accumulate - 1)
    for at in range(0, made.steps, 3):  # taken up at any step
        assert list(planned(lengths, **options).batches(at)) == steps[at:]


def test_data_beyond_one_pool_is_seen_once_an_epoch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "POOL", 16)
    lengths = [1 + (7 * i) % 53 for i in range(100)]
    made = planned(lengths, batch_tokens=120, epochs=5, held_out=0.1)
    counts = [len(made._epoch(epoch)) for epoch in range(5)]
    assert len(set(counts)) > 1  # pools fall differently in each epoch
    stream = [batch for batches in list(made.batches(0)) for batch in batches]
    for size in counts[:-1]:
        assert sorted(i for batch in stream[:size] for i in batch) == made.training
        del stream[:size]
    assert abs(len(stream) - counts[0]) <= sum(abs(size - counts[0]) for size in counts)


def test_batches_hold_alike_lengths_in_a_new_order_each_epoch() -> None:
    lengths = [1 + (7 * i) % 53 for i in range(200)]
    made = planned(lengths, batch_tokens=300)
    first, second = made._epoch(0), made._epoch(1)
    assert first != second
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in first)
    assert padded < 1.1 * sum(lengths[i] for i in made.training)
    assert [max(lengths[i] for i in batch) for batch in first] != sorted(max(lengths[i] for i in b) for b in first)


def test_what_is_measured_is_spread_over_what_was_held_out(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(module=Told(), data=told(*[[0] * 12] * 20), held_out=0.5)
    seen, shares = list[int](), list[float]()
    batch = made.features.batch
    monkeypatch.setattr(made.features, "batch", lambda members: (seen.extend(members), batch(members))[1])
    assert len(made.held_out) > 3
    for most in (2, 400):
        monkeypatch.setattr("foretell.train.trainer.MAX_MEASURED", most)
        made.evaluate((2,), shares.append)
        assert seen == (made.held_out if most == 400 else [made.held_out[0], made.held_out[len(made.held_out) // 2]])
        assert shares == sorted(shares)
        assert shares[-1] == 1
        seen.clear()
        shares.clear()


def test_at_most_four_hundred_conversations_are_held_out() -> None:
    made = planned([1] * 2000, held_out=0.5)
    assert len(made.held_out) == 400
    assert not set(made.held_out) & set(made.training)
    assert planned([1] * 2000, held_out=0.5, seed=1).held_out != made.held_out


@pytest.mark.parametrize(("epochs", "warmup"), [(100, 0.05), (100, 0.0), (3, 0.3), (1, 1.0), (40, 0.5), (0.01, 0.1)])
def test_the_learning_rate_warms_up_and_follows_a_cosine(epochs: float, warmup: float) -> None:
    made = planned([4] * 20, batch_tokens=16, epochs=epochs, warmup=warmup, learning_rate=0.4, held_out=0.0)
    rates = [made.learning_rate(step) for step in range(made.steps)]
    warm = max(1, round(warmup * made.steps))
    assert made.steps == max(1, round(5 * epochs))
    assert rates[:warm] == pytest.approx([0.4 * (i + 1) / warm for i in range(warm)])
    assert max(rates) == pytest.approx(0.4)
    falling = rates[warm - 1 :]
    assert all(b <= a for a, b in pairwise(falling))
    assert min(falling) >= 0.4 * 0.05
    assert made.learning_rate(made.steps) == pytest.approx(0.4 * 0.05) or warm == made.steps
    if warm < made.steps:  # half-way down it is the mean of both ends
        middle = [made.learning_rate(warm + i) for i in range(made.steps - warm + 1)]
        assert [a + b for a, b in zip(middle, middle[::-1], strict=True)] == pytest.approx([0.4 * 1.05] * len(middle))


def test_steps_use_the_rate_of_their_number(trainer: Made) -> None:
    made = trainer(warmup=0.3)
    used: list[float] = []
    made.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    train([made])
    assert used == [made.learning_rate(step) for step in range(made.steps)]


def test_a_module_says_how_fast_its_parts_learn_and_is_told_how_far_it_is(trainer: Made) -> None:
    module, later, used = Paced(), Paced(), list[float]()
    straight = trainer("straight", module=module)
    straight.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    train([straight])
    told = [step / straight.steps for step in range(straight.steps)]
    assert used == [
        straight.learning_rate(step) * (0.25 - 0.2 * (step / straight.steps)) for step in range(straight.steps)
    ]
    assert module.told == told
    cut = trainer("cut", module=Paced())
    with pytest.raises(KeyboardInterrupt):
        train([cut], stop=lambda: cut.step == 3)
    final = trainer("cut", module=later)
    train([final])
    assert later.told == told[3:]
    assert_same_ends(final, straight)


@pytest.mark.parametrize("clip", [100.0, 0.01])
def test_accumulated_batches_weigh_alike_and_gradients_are_clipped(
    trainer: Made, monkeypatch: pytest.MonkeyPatch, clip: float
) -> None:
    made, seen = trainer(accumulate=3, clip=clip, epochs=0.6), list[Tensor]()
    assert made.steps == 1
    [batches] = list(made.batches(0))
    slow = Words()
    for batch in batches:
        torch.stack(list(slow.losses(made.features.batch(batch)).values())).sum().backward()
    mean = gradient_of(slow.table_KdV) / 3
    assert 0.01 < mean.norm() < 100
    weights = table(made)
    monkeypatch.setattr(made.optimizer, "step", lambda: seen.append(gradient_of(weights)))
    train([made])
    [gradient] = seen
    assert torch.allclose(gradient, mean * min(1, clip / mean.norm()), rtol=1e-4, atol=1e-8)


def test_weight_decay_shrinks_what_learns(trainer: Made) -> None:
    """AdamW's first step written out: the moments are the gradient and its square, so what counts is its sign."""
    made = trainer(epochs=0.01, weight_decay=4.0, clip=1e6)
    assert made.steps == 1
    [[batch]] = list(made.batches(0))
    with torch.no_grad():
        table(made).copy_(torch.randn(table(made).shape, generator=torch.Generator().manual_seed(0)))
    slow = Words()
    slow.load_state_dict(made.module.state_dict())
    torch.stack(list(slow.losses(made.features.batch(batch)).values())).sum().backward()
    before, gradient, rate = slow.table_KdV.detach(), gradient_of(slow.table_KdV), made.learning_rate(0)
    train([made])
    expected = before * (1 - rate * 4.0) - rate * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(table(made).detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_module_knows_whether_it_learns(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = Told(), list[bool]()
    made = trainer(module=module, data=told(*[[0] * 12] * 8), epochs=1)
    losses = module.losses

    def spy(batch: TrainingBatch) -> dict[str, Tensor]:
        seen.append(module.training)
        assert torch.is_grad_enabled() == module.training
        return losses(batch)

    monkeypatch.setattr(module, "losses", spy)
    made.evaluate((2,))
    assert seen == [False]
    train([made])
    assert seen == [False] + [True] * made.steps


# --- what can go wrong --------------------------------------------------------------------------------------

MUTE = [Distilled(each.line, each.tokens, []) for each in DATA]


def test_data_with_nothing_to_learn_is_skipped_and_counted(trainer: Made) -> None:
    made = trainer(data=MUTE, weight_decay=0.1)
    with torch.no_grad():
        table(made).fill_(0.5)
    train([made])
    assert made.skipped == made.steps > 8
    assert (table(made) == 0.5).all()
    lines = (made.folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [{}, {}]  # of the first step and of the last


@pytest.mark.parametrize("accumulate", [1, 3])
def test_batches_with_nothing_to_learn_do_no_harm(trainer: Made, accumulate: int) -> None:
    data = [*DATA[:6], *MUTE[6:]]
    options: dict[str, Any] = {"batch_tokens": 1, "accumulate": accumulate, "held_out": 0.0, "epochs": 6}
    made = trainer(data=data, **options)
    train([made])
    assert made.skipped == 6 * 6
    assert table(made).isfinite().all()
    assert table(made).any()
    for place in ("update", "batch"):  # an interruption amidst a step counts none of it twice
        again = trainer("again", data=data, **options)
        where = again if place == "update" else again.features
        setattr(where, place, once(getattr(where, place), 4))
        with pytest.raises(KeyboardInterrupt):
            train([again])
    again = trainer("again", data=data, **options)
    train([again])
    assert_same_ends(again, made)


def test_a_term_that_some_batches_lack_is_logged_as_the_mean_of_the_others(
    trainer: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [Distilled(i, [9] * 6, [(1, 6)] if i else []) for i in range(3)]
    made = trainer(module=Told(), data=data, batch_tokens=1, accumulate=3, epochs=1, held_out=0.0)
    losses = made.module.losses
    monkeypatch.setattr(made.module, "losses", lambda batch: losses(batch) if batch.supervised_BT.any() else {})
    train([made])
    [line] = [json.loads(line) for line in (made.folder / "log.jsonl").read_text().splitlines()]
    assert line["loss"] == {"tokens": 9.0}


def test_the_logged_loss_is_the_mean_of_its_steps(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_STEPS", 4)
    seen: list[float] = []
    made = trainer(epochs=3)
    losses = made.module.losses

    def spy(batch: TrainingBatch) -> dict[str, Tensor]:
        terms = losses(batch)
        seen.append(terms["head 1"].item())
        return terms

    monkeypatch.setattr(made.module, "losses", spy)
    train([made])
    lines = [json.loads(line) for line in (made.folder / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == [1, *range(4, made.steps, 4), made.steps]
    assert made.steps % 4
    for line, begin, end in zip(lines, [0, *steps], steps, strict=False):
        part = seen[begin:end]
        assert line["loss"]["head 1"] == pytest.approx(sum(part) / len(part), abs=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(trainer: Made, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer()
    losses, calls = made.module.losses, Counter[str]()

    def broken(batch: TrainingBatch) -> dict[str, Tensor]:
        calls["losses"] += 1
        return {name: term * (bad if calls["losses"] == 4 else 1) for name, term in losses(batch).items()}

    monkeypatch.setattr(made.module, "losses", broken)
    with pytest.raises(
        ForetellError,
        match=f"^The loss became {bad} at step 3 of {made.folder}; lower `learning_rate=`, with another `out=`.$",
    ):
        train([made])
    assert table(made).isfinite().all()
    saved = trainer()
    assert saved.resume()
    assert saved.step == 3


class Rough(Words):
    """Its fourth loss is finite, but has no finite gradient."""

    calls = 0

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        self.calls += 1
        root = {"root": (0 * self.table_KdV.sum()).sqrt()}  # 0, of slope 0 times infinity
        return super().losses(batch) | (root if self.calls == 4 else {})


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "with another"])
def test_a_gradient_that_is_no_number_ends_the_run(trainer: Made, alone: bool) -> None:
    made, beside = trainer(module=Rough()), trainer("beside")
    also = "" if alone else ", or train the others without it"
    with pytest.raises(
        ForetellError,
        match=f"^The norm of the gradient became nan at step 3 of {made.folder}; lower `learning_rate=`, with another "
        f"`out=`{also}.$",
    ):
        train([made] if alone else [beside, made])
    assert table(made).isfinite().all()
    saved = trainer(module=Rough())
    assert saved.resume()
    assert saved.step == 3


def test_a_damaged_state_is_one_sentence_and_stays(trainer: Made) -> None:
    made = trainer()
    train([made])
    path = made.folder / "state.pt"
    whole = path.read_bytes()
    torch.save({"step": 3}, path)
    other = path.read_bytes()
    torch.save([1, 2], path)
    damages = [b"", b"nonsense", other, path.read_bytes(), b"\0" * len(whole)]
    for damage in [*damages, *(whole[:cut] for cut in range(1, len(whole), len(whole) // 20))]:
        path.write_bytes(damage)
        with pytest.raises(ForetellError, match=r"state\.pt is damaged; delete it to start anew\.$") as error:
            train([trainer()])
        assert "\n" not in str(error.value)
        assert path.read_bytes() == damage
    path.write_bytes(whole)
    assert trainer().resume()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"learning_rate": 0.02}, r"holds a run with learning_rate 0\.01 \(not 0\.02\); go on with the same"),
        ({"seed": 1, "epochs": 9}, r"with epochs 4 \(not 9\), seed 0 \(not 1\); go on with the same, or .*`out=`"),
        ({"data": DATA[:-1]}, "holds a run with other data; go on with the same"),
        ({"data": [*DATA[:-1], Distilled(11, DATA[11].tokens, [(0, 1)])]}, "holds a run with other data"),
        ({"module": Line()}, "holds a run of another drafter; choose another `out=`"),
        ({"module": Words(7)}, "holds a run of another drafter; choose another `out=`"),
    ],
)
def test_another_run_is_not_gone_on_with(trainer: Made, options: dict[str, Any], sentence: str) -> None:
    made = trainer()
    train([made])
    before = {path.name: path.read_bytes() for path in made.folder.iterdir()}
    with pytest.raises(UsageError, match=sentence) as error:
        train([trainer(**options)])
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in made.folder.iterdir()} == before


def test_a_run_goes_on_with_other_settings_that_change_nothing_of_what_is_learnt(trainer: Made) -> None:
    straight, cut = trainer("straight"), trainer("cut")
    train([straight])
    cut.options = {"start": "f00d", "started_by": ["foretell train medusa --out here"]}
    with pytest.raises(KeyboardInterrupt):
        train([cut], stop=lambda: cut.step == 2)
    final = trainer("cut", save_seconds=0.0)
    final.options = {"start": "f00d", "started_by": ["foretell train medusa --out elsewhere"]}
    train([final])
    assert_same_ends(final, straight)
    other = trainer("cut")
    other.options = {"start": "beef"}
    with pytest.raises(UsageError, match=r"holds a run with start f00d \(not beef\); go on"):
        other.resume()


@pytest.mark.parametrize("room", [0, 1000, 5000])
def test_a_full_disk_ends_the_run_and_keeps_the_last_state(
    trainer: Made, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    straight, made = trainer("straight"), trainer("cut")
    train([straight])
    with pytest.raises(KeyboardInterrupt):
        train([made], stopping(1))
    opens = Path.open

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return Full() if mode == "wb" else opens(path, mode, *args, **options)

    before = (made.folder / "state.pt").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(ForetellError, match="enough disk space in .*cut"):
            train([trainer("cut")])
    assert (made.folder / "state.pt").read_bytes() == before
    final = trainer("cut")
    train([final])
    assert_same_ends(final, straight)


def test_a_state_that_outgrows_what_files_may_hold_is_one_sentence(trainer: Made) -> None:
    made = trainer()
    made.save()
    path = made.folder / "state.pt"
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(ForetellError, match=r"^Cannot write to .*run \(.*File too large\); choose another folder"):
            made.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [each.name for each in made.folder.iterdir()] == ["state.pt"]


def test_a_run_of_another_method_is_named_first(trainer: Made) -> None:
    made = trainer()
    made.options = {"method": "medusa", "heads": 4}
    made.save()
    other = trainer(seed=1)
    other.options = {"method": "hydra", "taps": 2}
    with pytest.raises(UsageError, match=r"run holds a run of medusa; choose another `out=`\.$"):
        other.resume()
    made.options = {"heads": 4}  # as earlier versions wrote it
    made.save()
    with pytest.raises(UsageError, match=r"holds a run with seed 0 \(not 1\), heads 4 \(not None\), taps None"):
        other.resume()
    same = trainer()
    same.options = {"method": "medusa", "heads": 4}
    assert same.resume()


def test_a_folder_that_cannot_be_is_found_out_at_once(trainer: Made, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    seen: list[int] = []
    with pytest.raises(ForetellError, match="annot write to .*file/run"):
        train([trainer("file/run")], lambda step, *_: seen.append(step))
    assert not seen


def allocated_too_much(kind: str) -> BaseException:
    """Memory that ran out: as an accelerator says it, as a CPU does, and as Python does."""
    if kind == "accelerator":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nGPU 0 has 1.00 MiB free")
    if kind == "CPU":
        with pytest.raises(RuntimeError) as caught:
            torch.empty(1 << 60, dtype=torch.uint8)
        return caught.value
    return MemoryError()


@pytest.mark.parametrize("kind", ["accelerator", "CPU", "Python"])
@pytest.mark.parametrize("place", ["losses", "batch", "optimizer"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_batch_that_does_not_fit_is_one_sentence_that_says_which_may(
    trainer: Made, monkeypatch: pytest.MonkeyPatch, kind: str, place: str, at: int
) -> None:
    straight, made = trainer("straight", accumulate=2, save_seconds=0.0), trainer("cut", accumulate=2, save_seconds=0.0)
    train([straight])
    where, name = {
        "losses": (made.module, "losses"), "batch": (made.features, "batch"), "optimizer": (made.optimizer, "step")
    }[place]  # fmt: skip
    error = allocated_too_much(kind)
    monkeypatch.setattr(where, name, once(getattr(where, name), at, error=error))
    with pytest.raises(UsageError) as refusal:
        train([made])
    batches = next(made.batches((at - 1) // 2 if place != "optimizer" else at - 1))
    sizes = [len(batch) * max(len(DATA[i].tokens) for i in batch) for batch in batches]
    which, size = ((at - 1) % 2, sizes[(at - 1) % 2]) if place != "optimizer" else (sizes.index(max(sizes)), max(sizes))
    if len(batches[which]) == 1:
        what, remedy = "conversation", r"distill shorter ones \(`max_new_tokens=`\), and train on them alone"
    else:
        what, remedy = "batch", f"train with `batch_tokens={size // 2}`, `accumulate=4` and another `out=`"
    assert re.fullmatch(
        rf"A {what} of {size} tokens does not fit into the memory of cpu \([^\n]{{6,200}}\); {remedy}\.",
        str(refusal.value),
    )
    if kind == "accelerator":
        assert "(CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has 1.00 MiB free)" in str(refusal.value)
    final = trainer("cut", accumulate=2)  # where there is more memory
    train([final])
    assert_same_ends(final, straight)


@pytest.mark.parametrize(("batch_tokens", "what"), [(1000, "A batch of"), (1, "A conversation of")])
def test_what_does_not_fit_is_a_batch_or_one_conversation(
    trainer: Made, monkeypatch: pytest.MonkeyPatch, batch_tokens: int, what: str
) -> None:
    made = trainer(batch_tokens=batch_tokens)
    monkeypatch.setattr(made.module, "losses", once(made.module.losses, 1, error=MemoryError()))
    with pytest.raises(UsageError, match=what):
        train([made])


def test_another_error_of_the_library_is_none_of_memory(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    made, error = trainer(), RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(made.module, "losses", once(made.module.losses, 2, error=error))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train([made])


def test_no_epochs_train_nothing_and_are_measured(trainer: Made) -> None:
    module = Paced()
    with torch.no_grad():
        module.table_KdV.copy_(torch.randn(module.table_KdV.shape, generator=torch.Generator().manual_seed(0)))
    before = module.table_KdV.detach().clone()
    made, calls = trainer(module=module, epochs=0), list[tuple[int, int]]()
    assert made.steps == 0
    for _ in range(2):  # and again: nothing is left to do
        train([made], lambda *step: calls.append(step), stop=lambda: calls.append((-1, -1)))
        assert calls == []
        assert (made.step, made.done) == (0, 0.0)
        assert torch.equal(table(made), before)
        assert {path.name for path in made.folder.iterdir()} == {"state.pt"}
        made = trainer(module=module, epochs=0)
    told_so = trainer("told", module=Told(), data=told(*[[0] * 12] * 6), held_out=0.0, epochs=0)
    train([told_so])
    assert told_so.evaluate((2,)).tokens_per_step == {2: 2.0}
    with pytest.raises(UsageError, match=r"holds a run with epochs 0 \(not 4\); go on with the same"):
        train([trainer(module=Paced())])


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", -1.0), ("batch_tokens", 0), ("accumulate", 0), ("learning_rate", 11.0), ("learning_rate", math.nan),
     ("warmup", 1.5), ("held_out", 0.6), ("save_seconds", -1.0), ("seed", -1)],
)  # fmt: skip
def test_settings_are_checked(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value}; it must lie between"):
        Settings(**{name: value})  # type: ignore[arg-type]


# --- held-out figures ---------------------------------------------------------------------------------------


def told(*ranks: Sequence[int]) -> list[Distilled]:
    """Conversations whose written tokens are these ranks, after a prompt of one token."""
    return [Distilled(i, [9, *each], [(1, 1 + len(each))]) for i, each in enumerate(ranks)]


def test_the_figures_of_guesses_that_are_always_right(trainer: Made) -> None:
    made = trainer(module=Told(), data=told(*[[0] * 12] * 6), held_out=0.0)
    report = made.evaluate(sizes=(2, 3, 4, 5))
    assert report.tokens_per_step == {2: 2.0, 3: 3.0, 4: 4.0}  # three heads: there is no fifth node
    assert report.paths == [(0,), (0, 0), (0, 0, 0)]
    assert [(head["top1"], head["top5"]) for head in report.accuracy] == [(1, 1)] * 3  # of the tokens that there are
    assert report.loss == {"tokens": 0.0}
    assert report.replayed == [1, 3, 5]


def test_a_tree_is_not_measured_on_the_text_it_was_searched_in(trainer: Made) -> None:
    texts = [[1] * 12 if i % 2 else [0] * 12 for i in range(8)]
    report = trainer(module=Told(), data=told(*texts), held_out=0.0).evaluate(sizes=(2, 4))
    assert report.tokens_per_step == {2: 1.0, 4: 1.0}
    assert report.loss == {"tokens": pytest.approx(0.5)}
    assert [head["top1"] for head in report.accuracy] == pytest.approx([0.5] * 3)


@pytest.mark.parametrize("searched", [0, NEVER])
def test_heads_are_held_against_the_text_that_trees_are_searched_in(trainer: Made, searched: int) -> None:
    """Ten guesses of 1/10 each: just right where one of them always comes, too much where none does."""
    texts = [[NEVER - searched if i % 2 else searched] * 12 for i in range(8)]
    report = trainer(module=Told(), data=told(*texts), held_out=0.0).evaluate(sizes=(2,))
    assert report.replayed == [1, 3, 5, 7]
    if searched == NEVER:
        assert report.calibration[0][1] < -0.3
        assert report.calibration[1:] == [(1.0, 0.0)] * 2  # never reached
    else:
        assert report.calibration == [pytest.approx((1.0, 0.0), abs=1e-4)] * 3


def test_only_held_out_conversations_are_measured(trainer: Made) -> None:
    made = trainer(module=Told(), data=told(*[[0] * 12] * 20), held_out=0.5)
    assert made.evaluate((2,)).tokens_per_step == {2: 2.0}
    wrong = [[30] * 12 if i in made.training else [0] * 12 for i in range(20)]
    assert trainer(module=Told(), data=told(*wrong), held_out=0.5).evaluate((2,)).tokens_per_step == {2: 2.0}


def test_larger_trees_earn_more_in_text_of_one_pattern(trainer: Made) -> None:
    pattern = [0, 0, 1, 0, 2, 0, 0, 3, 1, 0, 0, 5]
    report = trainer(module=Told(), data=told(*[pattern * 3] * 4), held_out=0.0).evaluate()
    tokens_per_step = list(report.tokens_per_step.values())
    assert list(report.tokens_per_step) == [4, 8, 12, 16, 24]  # of the sizes, those that so few patterns fill
    assert 1 < tokens_per_step[0] < tokens_per_step[-1] <= 4
    assert tokens_per_step == sorted(tokens_per_step)


def test_guesses_that_never_come_true_earn_nothing(trainer: Made) -> None:
    report = trainer(module=Told(), data=told(*[[NEVER] * 9] * 3), held_out=0.0).evaluate((2, 4))
    assert (report.paths, report.tokens_per_step) == ([], {})
    assert [(head["top1"], head["top5"]) for head in report.accuracy] == [(0, 0)] * 3


@pytest.mark.parametrize("size", [1, 2, 9])
def test_figures_of_very_few_conversations_are_sane(trainer: Made, size: int) -> None:
    texts = [[0, 1] * 8] * size
    report = trainer(module=Told(), data=told(*texts), held_out=0.5 if size > 2 else 0.0).evaluate((2, 3))
    assert list(report.tokens_per_step) == [2, 3]
    assert 1 <= report.tokens_per_step[2] <= report.tokens_per_step[3] <= 3


def test_a_folder_holds_out_the_same_with_others_beside_it(backbone: Backbone, tmp_path: Path) -> None:
    def made(*sets: Sequence[Distilled]) -> Trainer:
        ends = list(accumulate(map(len, sets), initial=0))
        data = [talk for each in sets for talk in each]
        features = ComputedFeatures(backbone, data, (FINAL_NORM,), [range(*each) for each in pairwise(ends)])
        return Trainer(Words(), features, Settings(held_out=0.25), tmp_path)

    one, other = some_data(20), some_data(8, seed=1)
    alone, second, both = made(one), made(other), made(one, other)
    assert both.held_out == [*alone.held_out, *(20 + i for i in second.held_out)]
    assert sorted(both.held_out + both.training) == list(range(28))
    assert (len(alone.held_out), len(second.held_out)) == (5, 2)


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_takes_the_memory_that_the_step_before_gave_up() -> None:
    """Counted in a process of its own: pages that the system had to clear."""
    script = """if True:
        import resource, sys, torch
        from foretell.train import malloc
        kept = sys.argv[1] == "keep" and malloc.keep()
        counts = []
        for _ in range(40):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.empty(100 << 20, dtype=torch.uint8).fill_(1)
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        print(int(kept), sorted(counts[20:])[10])  # the first steps still find their places
    """
    (kept, told), (_, as_it_was) = (
        map(
            int,
            subprocess.run(
                [sys.executable, "-c", script, how], capture_output=True, text=True, check=True
            ).stdout.split(),
        )
        for how in ("keep", "leave")
    )
    assert kept == (platform.libc_ver()[0] == "glibc")  # others are left as they are
    if kept:
        assert told < 20 < as_it_was  # 100 MiB are 25,600 pages, or 50 huge ones
