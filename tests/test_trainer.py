"""Training: features are what the backbone computes, and an interrupted run ends with the weights of a straight one.

The trainer knows no method, so most of this is tested with modules of ten lines whose optimum, or whose ranks, are
known.
"""

import errno
import io
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Foretell, Ran, ids_of
from hypothesis import given
from hypothesis import strategies as st
from random_backbones import BF16, FP32, KERNELS, Model, examples, same, using
from tiny_models import DIMENSIONS, save_tiny
from torch import Tensor, nn
from trainables import trainable

from foretell import files as files_of_ours
from foretell.api import load
from foretell.backbone import Backbone, Nodes
from foretell.cli import main
from foretell.contracts import FINAL_NORM
from foretell.drafters import drafter_class
from foretell.drafting import checkpoint
from foretell.drafting.checkpoint import Checkpoint
from foretell.drafting.learning.trainable import HeadGuesses, Trainable, TrainingBatch
from foretell.errors import ForetellError, UsageError
from foretell.train import features as featuring
from foretell.train import trainer as training
from foretell.train.data import ConversationStore, Distilled
from foretell.train.evaluation import SIZES
from foretell.train.features import TEACHER, FeatureStore, JoinedFeatures
from foretell.train.replay import tokens_per_step_by_size
from foretell.train.trainer import Settings, Trainer
from foretell.trees import chain
from foretell.trees.search import ENDED, MISSED

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB, WIDTH = DIMENSIONS["vocab_size"], DIMENSIONS["hidden_size"]
TAPS = (FINAL_NORM, 0, 2)
NEVER = VOCAB - 1


def some_data(size: int = 12, longest: int = 30, seed: int = 0) -> list[Distilled]:
    """Conversations of random tokens, of which one or two spans are answers."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    found = []
    for line in range(size):
        length = number(4, longest)
        tokens = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        cuts = sorted({number(0, length - 1) for _ in range(4)} | {length})
        cuts = cuts[len(cuts) % 2 :]
        found.append(Distilled(line, tokens, [(cuts[i], cuts[i + 1]) for i in range(0, len(cuts), 2)]))
    return found


DATA = some_data()


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Model({"model_type": "llama", **DIMENSIONS}).build()


# --- features -----------------------------------------------------------------------------------------------


def fields_of(batch: TrainingBatch) -> dict[str, Tensor]:
    named = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return named | {f"states {tap}": states for tap, states in batch.states.items()}


def assert_same_batches(ours: TrainingBatch, theirs: TrainingBatch) -> None:
    a, b = fields_of(ours), fields_of(theirs)
    assert len(a) == len(b) == 4 + len(ours.states)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert same(a[name], b[name]), name


def alone(backbone: Backbone, tokens: list[int]) -> tuple[dict[int, Tensor], Tensor]:
    """The slow obvious way, token by token: tapped states [T, d] and logits [T, V]."""
    cache = backbone.new_cache(1, len(tokens))
    rows: dict[int, list[Tensor]] = {tap: [] for tap in TAPS}
    for token in tokens:
        nodes = Nodes([chain(0)], [0], [cache.lengths[0]])
        embedded = backbone.embed(torch.tensor([token]))
        hidden, taps = backbone.run_layers(embedded, nodes, cache, taps=[t for t in TAPS if t != FINAL_NORM])
        cache.commit([0], [[0]])
        for tap, states in (taps | {FINAL_NORM: backbone.norm(hidden)}).items():
            rows[tap].append(states)
    found = {tap: torch.cat(states) for tap, states in rows.items()}
    return found, backbone.logits(found[FINAL_NORM])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernel", dict.fromkeys([KERNELS[0], "eager"]))
def test_features_are_what_the_backbone_computes_for_each_conversation_alone(kernel: str, dtype: torch.dtype) -> None:
    with using(kernel):
        backbone = Model({"model_type": "llama", **DIMENSIONS}).build(kernel, dtype)
        indices = [5, 0, 11, 3]
        batch = ComputedFeatures(backbone, DATA, TAPS).batch(indices)
        for row, index in enumerate(indices):
            tokens = DATA[index].tokens
            states, logits = alone(backbone, tokens)
            for tap in TAPS:
                assert same(batch.states[tap][row, : len(tokens)], states[tap].bfloat16())
            ids, p = batch.teacher_ids_BTm[row, : len(tokens)], batch.teacher_p_BTm[row, : len(tokens)]
            told = torch.zeros(len(tokens), dtype=torch.bool)  # the model wrote what comes next
            for start, end in DATA[index].answers:
                told[max(start, 1) - 1 : end - 1] = True
            assert not ids[~told].any() and not p[~told].any()
            ids, p, logits = ids[told], p[told], logits[told]
            assert same(logits.gather(-1, ids), torch.sort(logits, -1, True).values[:, :TEACHER])
            truth = logits.double().softmax(-1)
            assert torch.allclose(p.double(), truth.gather(-1, ids), rtol=2**-8, atol=0)  # bf16 has 8 bits
            assert (p.diff() <= 0).all()


@pytest.mark.parametrize(("shard", "at_once"), [(1, 1), (40, 16), (64, 1000), (1 << 16, 1024)])
def test_cached_features_are_those_made_on_the_fly(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int, at_once: int
) -> None:
    fresh = ComputedFeatures(backbone, DATA, TAPS)
    truth = {indices: fresh.batch(indices) for indices in [(0,), (11, 3, 7), (4, 4), tuple(range(12))]}
    monkeypatch.setattr(featuring, "SHARD", shard)
    monkeypatch.setattr(featuring, "PASS", at_once)
    for folder in (tmp_path / "cache", tmp_path / "cache", None):  # computed, read again, computed in other passes
        features = FeatureStore(backbone, DATA, TAPS, folder)
        features.prepare()
        for indices, batch in truth.items():
            assert_same_batches(features.batch(indices), batch)
    names = [path.name for path in sorted((tmp_path / "cache").glob("[!.]*"))]
    assert names == [f"features-{number:05d}.safetensors" for number in range(len(names))]
    total = sum(len(each.tokens) for each in DATA)
    assert (len(names) == 1) == (shard > total)
    assert len(names) <= min(len(DATA), 2 * total / shard + 1)


def test_what_is_kept_for_other_taps_is_not_computed_again(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(featuring, "SHARD", 40)
    backbone.fingerprint = "f00d"
    kept = FeatureStore(backbone, DATA, (2, FINAL_NORM), tmp_path / "features-f00d-2--1")
    kept.prepare()
    ran: list[int] = []
    run, read_out = backbone.run_layers, backbone.logits

    def run_layers(hidden_Md: Tensor, nodes: Any, cache: Any, begin: int, end: int, **options: Any) -> Any:
        ran.append(end)
        return run(hidden_Md, nodes, cache, begin, end, **options)

    def logits(states_Md: Tensor) -> Tensor:
        ran.append(-1)
        return read_out(states_Md)

    monkeypatch.setattr(backbone, "run_layers", run_layers)
    monkeypatch.setattr(backbone, "logits", logits)
    for taps, layers in (((1,), {1}), ((), set()), ((1, 2, FINAL_NORM), set())):  # all is there by now
        ran.clear()
        features = FeatureStore(backbone, DATA, taps, tmp_path / f"features-f00d-{taps}")
        features.prepare()
        assert set(ran) == layers
        fresh = ComputedFeatures(backbone, DATA, taps)
        assert_same_batches(features.batch([0, 11, 3]), fresh.batch([0, 11, 3]))
    other = FeatureStore(
        backbone, DATA[1:], (1,), tmp_path / "features-f00d-other"
    )  # of these conversations nothing is kept
    other.prepare()
    assert_same_batches(other.batch([2]), ComputedFeatures(backbone, DATA[1:], (1,)).batch([2]))
    monkeypatch.setattr(backbone, "fingerprint", "beef")  # nor of this model
    ran.clear()
    FeatureStore(backbone, DATA, (1,), tmp_path / "features-beef-1").prepare()
    assert set(ran) == {-1, backbone.config.layers}


@pytest.mark.parametrize("kept", [True, False])
def test_several_folders_are_as_one(backbone: Backbone, tmp_path: Path, kept: bool) -> None:
    three, fractions = [DATA[:5], DATA[5:6], DATA[6:]], list[float]()
    joined = JoinedFeatures([
        FeatureStore(backbone, data, TAPS, tmp_path / str(i) if kept else None) for i, data in enumerate(three)
    ])  # fmt: skip
    joined.prepare(fractions.append)
    if kept:
        assert fractions == sorted(fractions)
        assert {1 / 3, 2 / 3, 1.0} <= set(fractions)
        assert len(set(fractions)) > len(DATA)  # a folder may take minutes
    else:
        assert fractions == []
    assert joined.data == DATA
    assert joined.sets == [range(5), range(5, 6), range(6, 12)]
    whole = ComputedFeatures(backbone, DATA, TAPS)
    for indices in [(0,), (11, 3, 5, 7), (4, 4), tuple(range(12))]:
        assert_same_batches(joined.batch(indices), whole.batch(indices))


def test_a_folder_holds_out_the_same_with_others_beside_it(backbone: Backbone, tmp_path: Path) -> None:
    def made(*sets: Sequence[Distilled]) -> Trainer:
        features = JoinedFeatures([ComputedFeatures(backbone, data, (FINAL_NORM,)) for data in sets])
        return Trainer(Words(), features, Settings(held_out=0.25), tmp_path)

    one, other = some_data(20), some_data(8, seed=1)
    alone, second, both = made(one), made(other), made(one, other)
    assert both.held_out == [*alone.held_out, *(20 + i for i in second.held_out)]
    assert sorted(both.held_out + both.training) == list(range(28))
    assert (len(alone.held_out), len(second.held_out)) == (5, 2)


def test_padding_holds_nothing_and_only_answers_are_supervised(backbone: Backbone) -> None:
    batch = ComputedFeatures(backbone, DATA, TAPS).batch(range(12))
    longest = max(len(each.tokens) for each in DATA)
    assert batch.tokens_BT.shape == batch.supervised_BT.shape == (12, longest)
    for row, each in enumerate(DATA):
        written = {position for start, end in each.answers for position in range(start, end)}
        assert batch.supervised_BT[row].nonzero()[:, 0].tolist() == sorted(written)
        assert batch.tokens_BT[row, : len(each.tokens)].tolist() == each.tokens
        for tensor in fields_of(batch).values():
            assert not tensor[row, len(each.tokens) :].any()


class Counting(FeatureStore):
    """Says how often each conversation was run through the backbone."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.computed = Counter[int]()

    def _compute(self, data: Sequence[Distilled], *known: Any) -> Any:
        self.computed.update(each.line for each in data)
        return super()._compute(data, *known)


def test_preparing_goes_on_where_it_was(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(featuring, "SHARD", 50)
    first = Counting(backbone, DATA, TAPS, tmp_path)

    def stop(fraction: float) -> None:
        if any(tmp_path.glob("[!.]*")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.prepare(stop)
    done = list(tmp_path.glob("[!.]*"))
    assert len(done) == 1
    (tmp_path / ".features-00001.safetensors.partial").write_bytes(b"half")  # what a kill leaves
    second, fractions = Counting(backbone, DATA, TAPS, tmp_path), list[float]()
    second.prepare(fractions.append)
    assert first.computed + second.computed == Counter(range(12))  # each once
    assert len(fractions) > 2
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    third = Counting(backbone, DATA, TAPS, tmp_path)
    third.prepare()
    assert not third.computed
    assert_same_batches(third.batch(range(12)), ComputedFeatures(backbone, DATA, TAPS).batch(range(12)))


@pytest.mark.parametrize("changed", [DATA[:-1], [*DATA, *some_data(5, seed=1)], DATA[::-1], some_data(seed=2)])
def test_features_of_other_data_are_never_read(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: list[Distilled]
) -> None:
    """More was distilled since, a damaged line was answered again: the shards there are not of this data."""
    monkeypatch.setattr(featuring, "SHARD", 100)
    FeatureStore(backbone, DATA, TAPS, tmp_path).prepare()
    features = FeatureStore(backbone, changed, TAPS, tmp_path)
    features.prepare()
    indices = range(len(changed))
    assert_same_batches(features.batch(indices), ComputedFeatures(backbone, changed, TAPS).batch(indices))


def test_features_of_another_number_type_are_never_read(tmp_path: Path) -> None:
    for dtype in (BF16, FP32):
        backbone = Model({"model_type": "llama", **DIMENSIONS}).build(dtype=dtype)
        features = FeatureStore(backbone, DATA, TAPS, tmp_path)
        features.prepare()
        assert_same_batches(features.batch([1, 2]), ComputedFeatures(backbone, DATA, TAPS).batch([1, 2]))


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_damaged_shard_is_made_again(backbone: Backbone, tmp_path: Path, size: int) -> None:
    FeatureStore(backbone, DATA, TAPS, tmp_path).prepare()
    [shard] = tmp_path.glob("[!.]*")
    shard.write_bytes(shard.read_bytes()[:size])
    features = FeatureStore(backbone, DATA, TAPS, tmp_path)
    features.prepare()
    assert_same_batches(features.batch([1, 2]), ComputedFeatures(backbone, DATA, TAPS).batch([1, 2]))


def test_a_full_disk_leaves_no_shard(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def full(tensors: Any, path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise safetensors.SafetensorError(f"Error while serializing: {os.strerror(errno.ENOSPC)} (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(ForetellError, match="enough disk space in .*free some"):
            FeatureStore(backbone, DATA, TAPS, tmp_path).prepare()
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}  # half a shard would keep the disk full
    with monkeypatch.context() as patched:
        patched.setattr(files_of_ours, "_free_bytes", lambda folder: 10**4)
        patched.setattr(FeatureStore, "_compute", None)
        with pytest.raises(
            ForetellError, match=r"0 MB are free\); free some, or keep no features, with `keep_features=False`"
        ):
            FeatureStore(backbone, DATA, TAPS, tmp_path).prepare()  # before any work
    (tmp_path / "file").touch()
    with pytest.raises(ForetellError, match="annot write to .*file"):
        FeatureStore(backbone, DATA, TAPS, tmp_path / "file").prepare()


def test_empty_data_is_refused(backbone: Backbone) -> None:
    with pytest.raises(UsageError, match="holds no conversations; distill some first"):
        ComputedFeatures(backbone, [], TAPS)


# --- modules whose best is known ----------------------------------------------------------------------------


class Toy(Trainable):
    """What the trainer itself never asks for."""

    def guesses(self, batch: TrainingBatch) -> list[HeadGuesses]:
        raise NotImplementedError

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        raise NotImplementedError


class Line(Toy):
    """Linear regression on the states of what was written; `truth` is its only optimum."""

    taps = (FINAL_NORM,)
    truth: Tensor

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.register_buffer("truth", torch.linspace(-1, 1, width))

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        x_Pd = batch.states[FINAL_NORM][batch.supervised_BT].float()
        if not len(x_Pd):
            return {}
        wrong_P = x_Pd @ self.weight - x_Pd @ self.truth
        return {"square": wrong_P.square().mean(), "nothing": self.weight.sum() * 0}


class Words(Toy):
    """Guesses the token after the next from the state, and the one after it from the same, by two tables."""

    taps = (FINAL_NORM,)

    def __init__(self, vocab: int = VOCAB):
        super().__init__()
        self.table_KdV = nn.Parameter(torch.zeros(2, WIDTH, vocab))

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        out = {}
        for k in range(2):
            live = batch.supervised_BT[:, k + 2 :]
            if live.any():
                logits = batch.states[FINAL_NORM][:, : -(k + 2)][live].float() @ self.table_KdV[k]
                out[f"head {k + 1}"] = nn.functional.cross_entropy(logits, batch.tokens_BT[:, k + 2 :][live])
        return out


class Told(Toy):
    """Its ranks are the tokens of the data, `NEVER` being none; it gives ten guesses 1/10 each. Nothing is learnt."""

    taps = (FINAL_NORM,)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        return {"tokens": self.weight.sum() * 0 + batch.tokens_BT[batch.supervised_BT].float().mean()}

    def guesses(self, batch: TrainingBatch) -> list[HeadGuesses]:
        found = []
        for tokens, supervised in zip(batch.tokens_BT, batch.supervised_BT, strict=True):
            ranks = torch.where(tokens == NEVER, MISSED, tokens)[supervised]
            ahead = torch.cat([ranks, torch.full((2,), ENDED)])
            ranks_PK = torch.stack([ahead[k : k + len(ranks)] for k in range(3)], 1)
            found.append(HeadGuesses(ranks_PK, torch.full((*ranks_PK.shape, 10), math.log(0.1))))
        return found


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


def test_the_optimum_is_reached(trainer: Made) -> None:
    module = Line()
    made = trainer(module=module, epochs=100, batch_tokens=120, learning_rate=0.1, data=some_data(24))
    seen: list[tuple[int, int]] = []
    made.run(lambda *step: seen.append(step))
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
    straight.run()
    assert straight.steps > 8
    for after in stops:
        with pytest.raises(KeyboardInterrupt):
            trainer("cut", accumulate=accumulate).run(stopping(after))
    final = trainer("cut", accumulate=accumulate)
    steps: list[int] = []
    final.run(lambda step, *_: steps.append(step))
    assert steps == list(range(sum(stops) + 1, straight.steps + 1))  # no step is done twice
    assert_same_ends(final, straight)
    assert table(final).abs().sum() > 1


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
        straight.run()
    assert {path.name for path in straight.folder.iterdir()} == {"state.pt", "log.jsonl"}
    for step in range(straight.steps + 1):
        (tmp_path / f"from {step}").mkdir()
        (tmp_path / f"{step}.pt").rename(tmp_path / f"from {step}" / "state.pt")
        killed = trainer(f"from {step}", **options)
        killed.run()
        assert_same_ends(killed, straight)


def once(function: Any, at: int, after: bool = False) -> Any:
    """Raises at its n-th call, before or after doing what the function does, and never again."""
    calls = count(1)

    def call(*args: Any, **options: Any) -> Any:
        number = next(calls)
        if number == at and not after:
            raise KeyboardInterrupt
        found = function(*args, **options)
        if number == at:
            raise KeyboardInterrupt
        return found

    return call


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("place", ["losses", "clip", "optimizer", "save", "batch"])
@pytest.mark.parametrize("at", [1, 4])
def test_an_interruption_in_the_midst_of_a_step_is_no_different(
    trainer: Made, monkeypatch: pytest.MonkeyPatch, place: str, at: int, after: bool
) -> None:
    straight = trainer("straight", save_seconds=0.0)
    straight.run()
    made = trainer("cut", save_seconds=0.0)
    where, name = {
        "losses": (made.module, "losses"), "clip": (torch.nn.utils, "clip_grad_norm_"),
        "optimizer": (made.optimizer, "step"), "save": (torch, "save"), "batch": (made.features, "batch"),
    }[place]  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(where, name, once(getattr(where, name), at, after))
        with pytest.raises(KeyboardInterrupt):
            made.run()
    final = trainer("cut", save_seconds=0.0)
    final.run()
    assert_same_ends(final, straight)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_run_that_is_asked_to_stop_loses_no_step(trainer: Made, after: int) -> None:
    straight = trainer("straight")
    straight.run()
    made = trainer("cut")
    with pytest.raises(KeyboardInterrupt):
        made.run(stop=lambda: made.step == after)
    final = trainer("cut")
    assert final.resume()
    assert final.step == after
    final.run()
    assert_same_ends(final, straight)


def test_the_log_tells_each_step_once_whatever_cut_it(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOG_STEPS", 1)

    def steps(folder: Path) -> list[int]:
        return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]

    made = trainer("cut")
    with pytest.raises(KeyboardInterrupt):
        made.run(stop=lambda: made.step == 3)
    log = made.folder / "log.jsonl"
    later = '{"step": 4, "loss": {}}\n{"held_out": {}}\n'  # logged, but never saved
    log.write_text(log.read_text() + "no line of ours\n" + later + '{"step": 5, "lo')
    final = trainer("cut")
    final.run()
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
        trainer("cut", module=module, accumulate=2).run(stop=lambda: len(module.drawn) == 6)
    final = trainer("cut", module=module, accumulate=2)
    final.run()
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
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    made.run()
    lines = [json.loads(line) for line in (made.folder / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps[0] == 1
    assert steps[-1] == made.steps
    assert max(later - step for step, later in pairwise(steps)) <= 3


def test_a_state_that_cannot_be_read_is_not_called_damaged(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer("run").run()

    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(torch, "load", forbidden)
    with pytest.raises(ForetellError, match=r"state.pt cannot be read \(.*Permission denied\); the run in it is not"):
        trainer("run").run()


def test_a_run_without_a_saved_state_begins_anew(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted inside its first update; the same trainer tries again."""
    straight, made = trainer("straight"), trainer("cut")
    straight.run()
    with monkeypatch.context() as patched:
        patched.setattr(made.optimizer, "step", once(made.optimizer.step, 1, after=True))
        with pytest.raises(KeyboardInterrupt):
            made.run()
    made.run()
    assert_same_ends(made, straight)


def test_the_batches_of_a_step_follow_from_seed_and_number(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    batch = FeatureStore.batch

    def spy(self: FeatureStore, indices: Sequence[int]) -> TrainingBatch:
        seen.append(tuple(indices))
        return batch(self, indices)

    monkeypatch.setattr(FeatureStore, "batch", spy)
    monkeypatch.setattr(training, "LOG_STEPS", 1)
    trainer("a", seed=3).run()
    straight = seen.copy()
    seen.clear()
    trainer("b", seed=3, learning_rate=0.5).run()
    assert seen == straight
    seen.clear()
    for after in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            trainer("c", seed=3).run(stopping(after))
    trainer("c", seed=3).run()
    assert seen == straight
    seen.clear()
    trainer("d", seed=4).run()
    assert seen != straight


# --- batches and learning rate ------------------------------------------------------------------------------


def planned(lengths: Sequence[int], **settings: Any) -> Trainer:
    """A trainer that never computes anything."""
    data = [Distilled(i, [0] * length, [(0, length)]) for i, length in enumerate(lengths)]
    return Trainer(
        Told(),
        SimpleNamespace(data=data, sets=[range(len(data))], backbone=SimpleNamespace(device=torch.device("cpu"))),
        Settings(**settings),
        Path("nowhere"),
    )  # type: ignore[arg-type]


def every_step(made: Trainer) -> list[list[list[int]]]:
    found = []
    for batches in made._remaining():
        found.append(batches)
        made.step += 1
    return found


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
    steps = every_step(made)
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
        later = planned(lengths, **options)
        later.step = at
        assert every_step(later) == steps[at:]


def test_data_beyond_one_pool_is_seen_once_an_epoch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "POOL", 16)
    lengths = [1 + (7 * i) % 53 for i in range(100)]
    made = planned(lengths, batch_tokens=120, epochs=5, held_out=0.1)
    counts = [len(made._epoch(epoch)) for epoch in range(5)]
    assert len(set(counts)) > 1  # pools fall differently in each epoch
    stream = [batch for batches in every_step(made) for batch in batches]
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
    made.run()
    assert used == [made.learning_rate(step) for step in range(made.steps)]


def test_a_module_says_how_fast_its_parts_learn_and_is_told_how_far_it_is(trainer: Made) -> None:
    module, later, used = Paced(), Paced(), list[float]()
    straight = trainer("straight", module=module)
    straight.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    straight.run()
    told = [step / straight.steps for step in range(straight.steps)]
    assert used == [
        straight.learning_rate(step) * (0.25 - 0.2 * (step / straight.steps)) for step in range(straight.steps)
    ]
    assert module.told == told
    cut = trainer("cut", module=Paced())
    with pytest.raises(KeyboardInterrupt):
        cut.run(stop=lambda: cut.step == 3)
    final = trainer("cut", module=later)
    final.run()
    assert later.told == told[3:]
    assert_same_ends(final, straight)


@pytest.mark.parametrize("clip", [100.0, 0.01])
def test_accumulated_batches_weigh_alike_and_gradients_are_clipped(
    trainer: Made, monkeypatch: pytest.MonkeyPatch, clip: float
) -> None:
    made, seen = trainer(accumulate=3, clip=clip, epochs=0.6), list[Tensor]()
    assert made.steps == 1
    [batches] = list(islice(made._remaining(), 1))
    slow = Words()
    for batch in batches:
        torch.stack(list(slow.losses(made.features.batch(batch)).values())).sum().backward()
    mean = gradient_of(slow.table_KdV) / 3
    assert 0.01 < mean.norm() < 100
    weights = table(made)
    monkeypatch.setattr(made.optimizer, "step", lambda: seen.append(gradient_of(weights)))
    made.run()
    [gradient] = seen
    assert torch.allclose(gradient, mean * min(1, clip / mean.norm()), rtol=1e-4, atol=1e-8)


def test_weight_decay_shrinks_what_learns(trainer: Made) -> None:
    """AdamW's first step written out: the moments are the gradient and its square, so what counts is its sign."""
    made = trainer(epochs=0.01, weight_decay=4.0, clip=1e6)
    assert made.steps == 1
    [[batch]] = list(islice(made._remaining(), 1))
    with torch.no_grad():
        table(made).copy_(torch.randn(table(made).shape, generator=torch.Generator().manual_seed(0)))
    slow = Words()
    slow.load_state_dict(made.module.state_dict())
    torch.stack(list(slow.losses(made.features.batch(batch)).values())).sum().backward()
    before, gradient, rate = slow.table_KdV.detach(), gradient_of(slow.table_KdV), made.learning_rate(0)
    made.run()
    expected = before * (1 - rate * 4.0) - rate * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(table(made).detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_module_knows_whether_it_learns(trainer: Made) -> None:
    module, seen = Told(), list[bool]()
    made = trainer(module=module, data=told(*[[0] * 12] * 8), epochs=1)
    losses = module.losses

    def spy(batch: TrainingBatch) -> dict[str, Tensor]:
        seen.append(module.training)
        assert torch.is_grad_enabled() == module.training
        return losses(batch)

    module.losses = spy  # type: ignore[method-assign]
    made.evaluate((2,))
    assert seen == [False]
    made.run()
    assert seen == [False] + [True] * made.steps


# --- what can go wrong --------------------------------------------------------------------------------------

MUTE = [Distilled(each.line, each.tokens, []) for each in DATA]


def test_data_with_nothing_to_learn_is_skipped_and_counted(trainer: Made) -> None:
    made = trainer(data=MUTE, weight_decay=0.1)
    with torch.no_grad():
        table(made).fill_(0.5)
    made.run()
    assert made.skipped == made.steps > 8
    assert (table(made) == 0.5).all()
    lines = (made.folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [{}, {}]  # of the first step and of the last


@pytest.mark.parametrize("accumulate", [1, 3])
def test_batches_with_nothing_to_learn_do_no_harm(trainer: Made, accumulate: int) -> None:
    data = [*DATA[:6], *MUTE[6:]]
    options: dict[str, Any] = {"batch_tokens": 1, "accumulate": accumulate, "held_out": 0.0, "epochs": 6}
    made = trainer(data=data, **options)
    made.run()
    assert made.skipped == 6 * 6
    assert table(made).isfinite().all()
    assert table(made).any()
    again = trainer("again", data=data, **options)
    with pytest.raises(KeyboardInterrupt):
        again.run(stopping(1))
    assert trainer("again", data=data, **options).resume()


def test_the_logged_loss_is_the_mean_of_its_steps(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOG_STEPS", 4)
    seen: list[float] = []
    step = Trainer._step

    def spy(self: Trainer, batches: Any) -> dict[str, float]:
        terms = step(self, batches)
        seen.append(terms["head 1"])
        return terms

    monkeypatch.setattr(Trainer, "_step", spy)
    made = trainer(epochs=3)
    made.run()
    lines = [json.loads(line) for line in (made.folder / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == [1, *range(4, made.steps, 4), made.steps]
    assert made.steps % 4
    for line, begin, end in zip(lines, [0, *steps], steps, strict=False):
        part = seen[begin:end]
        assert line["loss"]["head 1"] == pytest.approx(sum(part) / len(part), abs=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(trainer: Made, bad: float) -> None:
    made = trainer()
    losses, calls = made.module.losses, Counter[str]()

    def broken(batch: TrainingBatch) -> dict[str, Tensor]:
        calls["losses"] += 1
        return {name: term * (bad if calls["losses"] == 4 else 1) for name, term in losses(batch).items()}

    made.module.losses = broken  # type: ignore[method-assign]
    with pytest.raises(
        ForetellError, match=f"^The loss became {bad} at step 3; lower `learning_rate=`, with another `out=`.$"
    ):
        made.run()
    assert table(made).isfinite().all()
    saved = trainer()
    assert saved.resume()
    assert saved.step == 3


def test_a_damaged_state_is_one_sentence_and_stays(trainer: Made) -> None:
    made = trainer()
    made.run()
    path = made.folder / "state.pt"
    whole = path.read_bytes()
    torch.save({"step": 3}, path)
    other = path.read_bytes()
    torch.save([1, 2], path)
    damages = [b"", b"nonsense", other, path.read_bytes(), b"\0" * len(whole)]
    for damage in [*damages, *(whole[:cut] for cut in range(1, len(whole), len(whole) // 20))]:
        path.write_bytes(damage)
        with pytest.raises(ForetellError, match=r"state\.pt is damaged; delete it to start anew\.$") as error:
            trainer().run()
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
    made.run()
    before = {path.name: path.read_bytes() for path in made.folder.iterdir()}
    with pytest.raises(UsageError, match=sentence) as error:
        trainer(**options).run()
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in made.folder.iterdir()} == before


def test_a_run_goes_on_with_other_settings_that_change_nothing_of_what_is_learnt(trainer: Made) -> None:
    straight, cut = trainer("straight"), trainer("cut")
    straight.run()
    cut.options = {"start": "f00d", "started_by": ["foretell train medusa --out here"]}
    with pytest.raises(KeyboardInterrupt):
        cut.run(stop=lambda: cut.step == 2)
    final = trainer("cut", save_seconds=0.0)
    final.options = {"start": "f00d", "started_by": ["foretell train medusa --out elsewhere"]}
    final.run()
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
    straight.run()
    with pytest.raises(KeyboardInterrupt):
        made.run(stopping(1))
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
            trainer("cut").run()
    assert (made.folder / "state.pt").read_bytes() == before
    final = trainer("cut")
    final.run()
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
        trainer("file/run").run(lambda step, *_: seen.append(step))
    assert not seen


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0.0), ("batch_tokens", 0), ("accumulate", 0), ("learning_rate", 11.0), ("learning_rate", math.nan),
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


# --- foretell train -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of the same sizes with other weights."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    save_tiny(folder, vocab_size=257, max_position_embeddings=512, eos_token_id=256, tie_word_embeddings=True, seed=1)
    return str(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    path.write_text("".join(json.dumps({"turns": [word, "and?"][: 1 + i % 2]}) + "\n" for i, word in enumerate(words)))
    return str(path)


@pytest.fixture(scope="module")
def distilled(tiny: str, prompts: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of data that the tiny model wrote."""
    folder = tmp_path_factory.mktemp("data") / "data"
    with pytest.raises(SystemExit) as left:
        main(["distill", "-m", tiny, *TINY, "--prompts", prompts, "--out", str(folder), "-n", "40"])
    assert not left.value.code
    return str(folder)


@pytest.fixture
def data(distilled: str, tmp_path: Path) -> str:
    """A copy to write features into, or to spoil."""
    shutil.copytree(distilled, tmp_path / "data")
    return str(tmp_path / "data")


TINY = ("--dtype", "fp32", "--threads", "1")
FEW = ("--epochs", "8", "--batch-tokens", "300", "--lr", "0.01", "-o", "heads=3", "-o", "draft_vocab=100")


def command(model: str, data: str, out: Path, *more: str) -> list[str]:
    return ["train", "medusa", "-m", model, *TINY, "--data", data, "--out", str(out), *FEW, *more]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def replayed(model: str, data: str, folder: Path) -> dict[str, float]:
    """What a drafter earns, by tree size, in every second conversation: trees were searched in the others."""
    llm = load(model, "medusa", dtype="fp32", threads=1, checkpoint=str(folder))
    features = FeatureStore(llm.backbone, ConversationStore.open(Path(data)).conversations, llm.drafter.taps)
    sizes = [size for size in SIZES if size <= llm.drafter.max_nodes]
    return tokens_per_step_by_size(llm.drafter, features, range(1, len(features.data), 2), sizes, lambda done: None)


def test_from_a_model_alone_to_a_trained_drafter(
    foretell: Foretell, tiny: str, prompts: str, data: str, tmp_path: Path
) -> None:
    ran = foretell(*command(tiny, data, tmp_path / "out"))
    assert (ran.code, ran.out) == (0, "")
    drafter = tmp_path / "out" / "drafter"
    assert re.search(r"head 3: \d+\.\d% first, \d+\.\d% among five\n", ran.err)
    assert re.search(r"tokens per step on training text, for none was held out: 4 nodes [1-4]\.\d\d", ran.err)
    words = ["foretell", "chat", "--model", tiny, "--drafter", "medusa", "-o", f"checkpoint={drafter}"]
    assert ran.err.endswith(f"The drafter is in {drafter}; use it with {shlex.join(words)}\n")
    used = foretell(*words[1:], *TINY, "-n", "4", stdin=b"hi\n")
    assert (used.code, "error" in used.err) == (0, False)
    saved, tensors = checkpoint.load(drafter)
    assert saved.arch == {"heads": 3, "layers": 2, "output": "tied", "taps": [1, 2], "root": True}
    assert len(tensors["vocabulary"]) == 100
    assert saved.provenance["data"] == [ConversationStore.open(Path(data)).manifest]
    assert len(saved.calibration) == 3
    assert saved.tokens_per_step == replayed(tiny, data, drafter)
    assert {str(size) for size in saved.tokens_per_step} == saved.provenance["fixed_trees"].keys()
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted(Path(data).glob("features-*/[!.]*"))] == ["features-00000.safetensors"]
    options = ["-m", tiny, *TINY, "--prompts", prompts, "-n", "40", "--json"]
    for sampling in ([], ["-t", "0.9", "--seed", "3"]):
        plain = foretell("generate", *options, *sampling).lines
        for rows in ("1", "3"):
            ours = foretell(
                "generate",
                *options,
                *sampling,
                "-b",
                rows,
                "-d",
                "medusa",
                "-o",
                f"checkpoint={drafter}",
                "-o",
                "nodes=4",
                "--no-adapt",
            ).lines
            assert ids_of(ours) == ids_of(plain)
            assert all(line["drafted"] for line in ours)
            if not sampling:
                assert sum(line["steps"] for line in ours) < 0.9 * sum(line["steps"] for line in plain)


def test_an_interrupted_command_ends_with_the_same_drafter(
    foretell: Foretell, tiny: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert foretell(*command(tiny, data, tmp_path / "straight")).code == 0
    monkeypatch.setattr(training, "LOG_STEPS", 1)
    for after in (3, 5):
        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "_step", once(Trainer._step, after))
            ran = foretell(*command(tiny, data, tmp_path / "cut", "--no-cache"))
        assert ran.code == 130
        assert ran.err.endswith("interrupted; the same command goes on from here\n")
        assert "Traceback" not in ran.err
        assert not (tmp_path / "cut" / "drafter").exists()
    assert foretell(*command(tiny, data, tmp_path / "cut")).code == 0
    ours, straight = files(tmp_path / "cut" / "drafter"), files(tmp_path / "straight" / "drafter")
    assert ours["model.safetensors"] == straight["model.safetensors"]
    assert (
        checkpoint.load(tmp_path / "cut" / "drafter")[0].paths
        == checkpoint.load(tmp_path / "straight/drafter")[0].paths
    )
    assert foretell(*command(tiny, data, tmp_path / "cut")).code == 0  # nothing is left to do
    assert files(tmp_path / "cut" / "drafter")["model.safetensors"] == straight["model.safetensors"]
    ran = foretell(*command(tiny, data, tmp_path / "cut", "--seed", "1"))
    refused(ran, 2, r"holds a run with seed 0 \(not 1\); go on with the same")


@pytest.fixture(scope="module")
def trained(tiny: str, distilled: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of heads of Medusa for the tiny model."""
    folder = tmp_path_factory.mktemp("trained") / "medusa"
    with pytest.raises(SystemExit) as left:
        main(command(tiny, distilled, folder, "--no-cache"))
    assert not left.value.code
    return folder


def begun(model: str, data: str, out: Path, *more: str) -> list[str]:
    """Hydra in one step too small to change anything."""
    hardly = ("--epochs", "0.001", "--lr", "1e-8", "-o", "heads=3", "-o", "draft_vocab=100", "-o", "layers=2")
    return ["train", "hydra", "-m", model, *TINY, "--data", data, "--out", str(out), *hardly, *more]


def copied(drafter: Path, to: Path, **changes: Any) -> str:
    """The checkpoint with other words about it."""
    found, tensors = checkpoint.load(drafter)
    replace(found, **changes).save(to, tensors)
    return str(to)


def test_hydra_may_begin_with_what_medusa_has_learnt(
    foretell: Foretell, tiny: str, data: str, trained: Path, tmp_path: Path
) -> None:
    told = "foretell train medusa --seed 5"
    start = copied(trained / "drafter", tmp_path / "start", provenance={"command": told})
    ran = foretell(*begun(tiny, data, tmp_path / "out", "--start", start))
    assert (ran.code, ran.out) == (0, "")
    saved, tensors = checkpoint.load(tmp_path / "out" / "drafter")
    digest = checkpoint.fingerprint(checkpoint.load(Path(start))[1])
    assert (saved.provenance["start"], saved.provenance["started_by"]) == (digest, [told])
    assert list(saved.tokens_per_step) == list(SIZES)
    assert all(1 <= tokens <= 4 for tokens in saved.tokens_per_step.values())
    medusa = checkpoint.load(trained / "drafter")[1]
    for k in range(3):
        theirs = medusa["weight.0"][k].float()
        ours = tensors[f"first.{k}"].float()
        torch.testing.assert_close(ours[:, : theirs.shape[1]], theirs, rtol=0, atol=1e-6)
        assert theirs.abs().max() > 1e-3
        assert ours[:, theirs.shape[1] :].abs().sum() <= 1e-6 * ours.numel()  # the path says nothing yet
    torch.testing.assert_close(tensors["head"].float(), medusa["head"].float(), rtol=0, atol=1e-6)

    assert foretell(*begun(tiny, data, tmp_path / "out", "--start", start)).code == 0  # nothing is left to do
    before = files(tmp_path / "out")
    ran = foretell(*begun(tiny, data, tmp_path / "out"))
    refused(ran, 2, rf"holds a run with start {digest} \(not None\); go on with the same")
    found, tensors = checkpoint.load(trained / "drafter")
    replace(found, provenance={"command": told}).save(tmp_path / "other", tensors | {"bias": tensors["bias"] + 1})
    ran = foretell(*begun(tiny, data, tmp_path / "out", "--start", str(tmp_path / "other")))
    refused(ran, 2, rf"holds a run with start {digest} \(not \w+\); go on with the same")
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changes", "start", "more", "code", "sentence"),
    [
        ({"fingerprint": "other"}, "{start}", [], 2, r"was trained for .* \(fingerprint other\), not for this model"),
        ({}, "./nowhere", [], 2, "here is no folder ./nowhere"),
        ({}, "{start}/..", [], 1, "holds no drafter"),
        ({}, "medusa", [], 2, "No medusa drafter comes with foretell for this model"),
        (
            {},
            "{start}",
            ["-o", "layers=1"],
            2,
            "start has 2 blocks in each head, these would have 1 block; train with -o layers=2",
        ),
        ({}, "{start}", ["-o", "taps=1"], 2, "start has other inputs than these heads; train with the same"),
        (
            {"method": "hydra++"},
            "{start}",
            [],
            2,
            r"is a hydra\+\+ drafter, with which hydra cannot begin; begin with one of medusa, medusa2, hydra, or",
        ),
        ({"arch": {}}, "{start}", [], 1, "is damaged, or of another method"),
    ],
)
def test_a_start_that_does_not_fit_is_one_sentence(
    foretell: Foretell, tiny: str, data: str, trained: Path, tmp_path: Path, changes: dict[str, Any], start: str,
    more: list[str], code: int, sentence: str,
) -> None:  # fmt: skip
    where = copied(trained / "drafter", tmp_path / "start", **changes)
    ran = foretell(*begun(tiny, data, tmp_path / "out", "--start", start.format(start=where), *more))
    refused(ran, code, sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "options"), [("hydra", {}), ("hydra++", {"linear_tail": True}), ("medusa", {"output": "own"})]
)
def test_what_is_not_said_of_a_start_is_as_it_has_it(
    foretell: Foretell, tiny: str, data: str, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    kind, llm = drafter_class(method), load(tiny, dtype="fp32", threads=1)
    odd = {"heads": 2, "layers": 3, "taps": 1} | options
    tensors, arch = trainable(
        kind, llm.backbone, torch.ones(llm.backbone.config.vocab), draft_vocab=100, **odd
    ).checkpoint()
    size = {"hidden": llm.backbone.config.hidden, "vocab": llm.backbone.config.vocab}
    made = Checkpoint(method=method, backbone=tiny, fingerprint=llm.backbone.fingerprint, arch=arch, **size)
    made.save(tmp_path / "start", tensors)
    hardly = ["--epochs", "0.001", "--lr", "1e-8", "-o", "draft_vocab=100", "--start", str(tmp_path / "start")]
    given = ["train", method, "-m", tiny, *TINY, "--data", data, "--out", str(tmp_path / "out"), *hardly]
    ran = foretell(*given)
    assert (ran.code, ran.out) == (0, ""), ran.err
    found = checkpoint.load(tmp_path / "out/drafter")[0]
    assert found.arch == arch
    assert found.provenance["options"].items() >= odd.items()
    assert foretell(*given).code == 0  # nothing is left to do


def test_medusa_cannot_begin_with_hydra(
    foretell: Foretell, tiny: str, data: str, trained: Path, tmp_path: Path
) -> None:
    start = copied(trained / "drafter", tmp_path / "start", method="hydra")
    ran = foretell(*command(tiny, data, tmp_path / "out", "--start", start))
    refused(ran, 2, "start is a hydra drafter, with which medusa cannot begin; begin with one of medusa, medusa2, or")


def test_nothing_is_lost_in_the_folder_of_a_drafter(
    foretell: Foretell, tiny: str, prompts: str, data: str, trained: Path, tmp_path: Path
) -> None:
    def left_as_it_was(sentence: str, folder: Path, *arguments: str) -> None:
        before = files(folder)
        refused(foretell(*(arguments or command(tiny, data, folder))), 2, sentence)
        assert files(folder) == before

    left_as_it_was(r"data holds other things \(conversations.jsonl, distill.json\); choose another --out", Path(data))
    out = shutil.copytree(trained, tmp_path / "out")
    distilling = ("distill", "-m", tiny, *TINY, "--prompts", prompts, "--out", str(out))
    left_as_it_was("out holds a drafter, or a run that makes one; choose another --out", out, *distilling)
    (out / "drafter/notes.txt").touch()
    left_as_it_was("drafter holds notes.txt, which would be lost; move it elsewhere", out)
    (out / "drafter/notes.txt").unlink()
    assert foretell(*command(tiny, data, out)).code == 0  # nothing is left to do
    left_as_it_was("out holds a run of medusa; choose another --out", out, *begun(tiny, data, out))
    shutil.rmtree(out / "run")
    left_as_it_was("out holds a finished medusa drafter; choose another --out, or delete it", out)
    left_as_it_was("out holds a finished medusa drafter", out, *begun(tiny, data, out))
    (out / "drafter/config.json").write_text("{")
    left_as_it_was("out holds a finished drafter; choose another --out, or delete it", out)
    (tmp_path / "empty").mkdir()
    assert foretell(*command(tiny, data, tmp_path / "empty")).code == 0


def test_data_of_another_model(foretell: Foretell, tiny: str, other: str, data: str, tmp_path: Path) -> None:
    ran = foretell(*command(other, data, tmp_path / "out"))
    refused(ran, 2, f"was written by {tiny} .fingerprint .*, not by this model .*; distill with this one, or allow it")
    assert not (tmp_path / "out").exists()
    assert foretell(*command(other, data, tmp_path / "out", "--other-model")).code == 0
    ran = foretell(
        "generate", "hi", "-m", tiny, *TINY, "-d", "medusa", "-o", f"checkpoint={tmp_path / 'out' / 'drafter'}"
    )
    refused(ran, 2, f"was trained for {other} .*not for this model")


def test_several_folders_are_trained_on(foretell: Foretell, tiny: str, data: str, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "more")
    assert foretell(*command(tiny, data, tmp_path / "out", "--data", str(tmp_path / "more"))).code == 0
    saved, _ = checkpoint.load(tmp_path / "out/drafter")
    assert saved.provenance["data"] == [ConversationStore.open(Path(data)).manifest] * 2
    for folder in (Path(data), tmp_path / "more"):
        assert len(list(folder.glob("features-*/[!.]*"))) == 1
    ran = foretell(*command(tiny, data, tmp_path / "twice", "--data", f"{data}/../data"))
    refused(ran, 2, "--data names a folder twice; give each once")


def test_data_with_tokens_the_model_has_not(foretell: Foretell, tiny: str, data: str, tmp_path: Path) -> None:
    ConversationStore.open(Path(data)).append(99, [Distilled(99, [1, 2, 300, 4, 5], [(2, 5)])])
    ran = foretell(*command(tiny, data, tmp_path / "out", "--other-model"))
    refused(ran, 2, "token 300.* 256")
    assert not (tmp_path / "out").exists()


def refused(ran: Ran, code: int, sentence: str) -> None:
    """One sentence on stderr, nothing on stdout, no traceback."""
    assert ran.out == ""
    assert re.fullmatch(rf"error: .*{sentence}.*\n", ran.err), ran.err
    assert ran.code == code


@pytest.mark.parametrize(
    ("method", "arguments", "code", "sentence"),
    [
        ("plain", [], 2, "Drafter 'plain' has nothing to train; those that have are medusa"),
        ("medsua", [], 2, "Unknown drafter 'medsua': did you mean 'medusa'"),
        ("medusa", ["--data", "./nowhere"], 1, "nowhere holds no distilled data"),
        ("medusa", ["--data", "{empty}"], 2, "holds no conversations; distill some first"),
        ("medusa", ["-m", "./nowhere"], 2, "here is no folder ./nowhere"),
        ("medusa", ["-o", "heads"], 2, "--option 'heads' is not key=value"),
        ("medusa", ["-o", "heads=many"], 2, "Option 'heads' of medusa training is 'many'; it must be a whole number"),
        (
            "medusa",
            ["-o", "head=2"],
            2,
            "did you mean 'heads'. It has .*heads, layers, output",
        ),
        ("medusa", ["-o", "backbone=x"], 2, "edusa training has no option 'backbone'"),
        ("medusa", ["-o", "output=mine"], 2, "output is 'mine'; it must be shared, tied or own"),
        ("medusa", ["-o", "heads=0"], 2, "heads is 0; it must lie between 1 and 16"),
        ("medusa", ["-o", "soft=1.5"], 2, "soft is 1.5; it must lie between 0 and 1"),
        ("medusa", ["--epochs", "0"], 2, "epochs is 0.0; it must lie between"),
        ("medusa", ["--lr", "100"], 2, "learning_rate is 100.0"),
        ("medusa", ["--lr", "nan"], 2, "learning_rate is nan"),
        ("medusa", ["--batch-tokens", "0"], 2, "batch_tokens is 0"),
        ("medusa", ["--held-out", "0.9"], 2, "held_out is 0.9"),
        ("medusa", ["--out", "{file}"], 1, "annot write to .*file"),
    ],
)
def test_mistakes_are_one_line(
    foretell: Foretell, tiny: str, data: str, tmp_path: Path, cache: Path, method: str, arguments: list[str], code: int,
    sentence: str,
) -> None:  # fmt: skip
    empty = ConversationStore.create(tmp_path / "empty", {"model": "m", "fingerprint": "f", "settings": {}})
    empty.append(0, ["too long"])
    (tmp_path / "file").touch()
    names = {"empty": str(tmp_path / "empty"), "file": str(tmp_path / "file")}
    before = files(Path(data))
    given = [argument.format(**names) for argument in arguments]
    refused(
        foretell("train", method, "-m", tiny, *TINY, "--data", data, "--out", str(tmp_path / "out"), *given),
        code,
        sentence,
    )
    assert not (tmp_path / "out").exists()
    assert files(Path(data)) == before  # no features were computed in vain


def test_training_does_without_plots(
    foretell: Foretell, tiny: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = foretell(*command(tiny, data, tmp_path / "out"))
    assert ran.code == 0
    assert "Plots need matplotlib; pip install 'foretell[train]'" in ran.err
    assert ran.err.endswith(f"-o checkpoint={tmp_path / 'out' / 'drafter'}\n")
    assert not (tmp_path / "out" / "curves.png").exists()


@given(st.integers(1, 9), st.integers(1, 900), st.integers(1, 20), st.integers(0, 99))
def test_the_most_probable_tokens_are_those_of_a_whole_sort(rows: int, vocab: int, count: int, seed: int) -> None:
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    count = min(count, vocab)
    values, ids = featuring.most_probable(logits, count)
    assert torch.equal(values, logits.sort(descending=True).values[:, :count])
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == count for row in ids.tolist())


def test_what_learning_begins_with_keeps_its_draft_vocabulary(
    foretell: Foretell, tiny: str, data: str, trained: Path, tmp_path: Path
) -> None:
    """A token that it never chose from was never pushed down either: it would take half of what is said."""
    found, tensors = checkpoint.load(trained / "drafter")
    rare, head = torch.arange(1, tensors["head"].shape[1], 2), tensors["head"][:, 1::2]
    found.save(tmp_path / "rare", tensors | {"vocabulary": rare.int(), "head": head})
    few = ("-o", f"draft_vocab={len(rare)}")
    ran = foretell(*begun(tiny, data, tmp_path / "out", *few, "--start", str(tmp_path / "rare")))
    assert (ran.code, ran.out) == (0, "")
    _, ours = checkpoint.load(tmp_path / "out" / "drafter")
    assert torch.equal(ours["vocabulary"].long(), rare)
    torch.testing.assert_close(ours["head"].float(), head.float(), rtol=0, atol=1e-6)

    found.save(tmp_path / "none", {name: each for name, each in tensors.items() if name != "vocabulary"})
    ran = foretell(*begun(tiny, data, tmp_path / "new", "--start", str(tmp_path / "none")))
    refused(ran, 1, "is damaged, or of another method: it lacks a draft vocabulary")


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
