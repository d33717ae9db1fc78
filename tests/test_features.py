"""Features: what the backbone computes, batch by batch or kept on disk, of these conversations and no others.

Those of decoding's own passes are compared bit for bit, which is the sharper test of what is kept where; those of the
plain pass (see test_forward.py) as closely as bfloat16 keeps them.
"""

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_backbones import BF16, FP32, KERNELS, Model, examples, same, using
from tiny_models import DIMENSIONS
from torch import Tensor
from trainables import DATA, some_data

from foretell import files as files_of_ours
from foretell.backbone import Backbone, Nodes
from foretell.contracts import FINAL_NORM
from foretell.drafting.learning.trainable import TrainingBatch
from foretell.errors import ForetellError, UsageError
from foretell.train import features as featuring
from foretell.train.data import Distilled
from foretell.train.features import NATIVE, TEACHER, ComputedFeatures, FeatureStore, JoinedFeatures
from foretell.train.forward import Forward
from foretell.trees import chain

pytestmark = pytest.mark.usefixtures("one_thread")
TAPS = (FINAL_NORM, 0, 2)
BATCHES = [(0,), (11, 3, 7), (4, 4), tuple(range(12))]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Model({"model_type": "llama", **DIMENSIONS}).build()


@pytest.fixture
def by_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets decoding's passes compute features here too."""
    monkeypatch.setattr(ComputedFeatures, "by_decoding", True)


@pytest.fixture
def by_the_plain_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ComputedFeatures, "by_decoding", False)


def fields_of(batch: TrainingBatch) -> dict[str, Tensor]:
    named = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return named | {f"states {tap}": states for tap, states in batch.states.items()}


def assert_same_batches(ours: TrainingBatch, theirs: TrainingBatch) -> None:
    a, b = fields_of(ours), fields_of(theirs)
    assert len(a) == len(b) == 4 + len(ours.states)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert same(a[name], b[name]), name


def assert_near_batches(ours: TrainingBatch, theirs: TrainingBatch) -> None:
    """Alike but for bfloat16's 8 bits; tokens that are as probable as one another may change places."""
    a, b = fields_of(ours), fields_of(theirs)
    assert a.keys() == b.keys()
    for name in a.keys() - {"teacher_ids_BTm"}:
        torch.testing.assert_close(a[name].float(), b[name].float(), rtol=2**-8, atol=1e-5, msg=name)
    ids, others, p = a["teacher_ids_BTm"], b["teacher_ids_BTm"], b["teacher_p_BTm"]
    gaps = torch.stack([(p[..., 1:-1] - p[..., 2:]).abs(), (p[..., :-2] - p[..., 1:-1]).abs()]).amin(0)
    clear = gaps > 1e-3 * p[..., 1:-1]
    assert torch.equal(ids[..., 1:-1][clear], others[..., 1:-1][clear])
    assert clear[p[..., 0] > 0].float().mean() > 0.8


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
def test_features_of_decoding_are_what_the_backbone_computes_for_each_conversation_alone(
    kernel: str, dtype: torch.dtype, by_decoding: None
) -> None:
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


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_decoding_computes_them_where_it_is_the_faster(kernel: str, dtype: torch.dtype) -> None:
    with using(kernel):
        backbone = Model({"model_type": "llama", **DIMENSIONS}).build(kernel, dtype)
        features = ComputedFeatures(backbone, DATA, TAPS)
        assert features.by_decoding == (dtype == BF16 and kernel in NATIVE)
        states, _ = alone(backbone, DATA[3].tokens)
        batch = features.batch([3])
    if features.by_decoding:
        assert all(same(batch.states[tap][0], states[tap].bfloat16()) for tap in TAPS)
    else:  # what that means is measured in test_forward.py
        assert all((batch.states[tap][0] - states[tap]).norm() < 0.01 * states[tap].norm() for tap in TAPS)


def test_plain_features_are_the_plain_pass_over_the_batch(backbone: Backbone, by_the_plain_pass: None) -> None:
    features, forward = ComputedFeatures(backbone, DATA, TAPS), Forward(backbone)
    for indices in BATCHES:
        batch = features.batch(indices)
        states = forward.states(batch.tokens_BT, TAPS)
        for row, index in enumerate(indices):
            talk, end = DATA[index], len(DATA[index].tokens)
            assert all(same(batch.states[tap][row, :end], states[tap][row, :end]) for tap in TAPS)
            told = torch.zeros(batch.tokens_BT.shape[1], dtype=torch.bool)  # the model wrote what comes next
            for start, stop in talk.answers:
                told[max(start, 1) - 1 : stop - 1] = True
            ids, p = forward.most_probable_next(states[FINAL_NORM][row], TEACHER)
            assert torch.equal(batch.teacher_ids_BTm[row], ids * told[:, None])
            torch.testing.assert_close(batch.teacher_p_BTm[row], p * told[:, None])


def test_a_vocabulary_smaller_than_what_is_kept_of_the_teacher(tmp_path: Path) -> None:
    backbone = Model({"model_type": "llama", **DIMENSIONS, "vocab_size": 5}).build()
    data = [Distilled(0, [1, 2, 3, 4, 0, 1], [(2, 6)])]
    kept = FeatureStore(backbone, data, TAPS, tmp_path)
    kept.prepare()
    for features in (ComputedFeatures(backbone, data, TAPS), kept):
        batch = features.batch([0])
        assert batch.teacher_ids_BTm.shape == (1, 6, 5)
        assert batch.teacher_p_BTm[0, 1:5].sum(-1) == pytest.approx(torch.ones(4), rel=2**-7)


@pytest.mark.parametrize("exact", [True, False], ids=["by decoding", "by the plain pass"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("shard", "at_once"), [(1, 1), (40, 16), (64, 1000), (1 << 16, 1024)])
def test_kept_features_are_those_made_on_the_fly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int, at_once: int, dtype: torch.dtype, exact: bool
) -> None:
    backbone = Model({"model_type": "llama", **DIMENSIONS}).build(dtype=dtype)
    monkeypatch.setattr(ComputedFeatures, "by_decoding", exact)
    fresh = ComputedFeatures(backbone, DATA, TAPS)
    truth = {indices: fresh.batch(indices) for indices in BATCHES}
    monkeypatch.setattr(featuring, "SHARD", shard)
    monkeypatch.setitem(featuring.PASS, "cpu", at_once)
    for _ in range(2):  # computed, and read again
        features = FeatureStore(backbone, DATA, TAPS, tmp_path / "kept")
        features.prepare()
        for indices, batch in truth.items():
            if exact:
                assert_same_batches(features.batch(indices), batch)
            elif dtype == FP32:  # they are rounded to be kept
                assert_near_batches(features.batch(indices), batch)
            else:  # products of other shapes are rounded otherwise on their way
                kept = features.batch(indices)
                for tap in TAPS:
                    error, norm = (kept.states[tap] - batch.states[tap]).float(), batch.states[tap].float().norm()
                    assert error.norm() <= 0.02 * norm
    names = [path.name for path in sorted((tmp_path / "kept").glob("[!.]*"))]
    assert names == [f"features-{number:05d}.safetensors" for number in range(len(names))]
    total = sum(len(each.tokens) for each in DATA)
    assert (len(names) == 1) == (shard > total)
    assert len(names) <= min(len(DATA), 2 * total / shard + 1)


@pytest.mark.parametrize("exact", [True, False], ids=["by decoding", "by the plain pass"])
def test_what_is_kept_for_other_taps_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    backbone = Model({"model_type": "llama", **DIMENSIONS}).build()
    monkeypatch.setattr(ComputedFeatures, "by_decoding", exact)
    compared = assert_same_batches if exact else assert_near_batches
    monkeypatch.setattr(featuring, "SHARD", 40)
    backbone.fingerprint = "f00d"
    kept = FeatureStore(backbone, DATA, (2, FINAL_NORM), tmp_path / "features-f00d-2--1")
    kept.prepare()
    ran: list[int] = []

    def spied(where: Any, name: str, layers: Callable[..., int]) -> None:
        function = getattr(where, name)

        def spy(*args: Any, **options: Any) -> Any:
            ran.append(layers(*args))
            return function(*args, **options)

        monkeypatch.setattr(where, name, spy)

    spied(backbone, "run_layers", lambda hidden_Md, nodes, cache, begin, end: end)
    spied(Forward, "run_layer", lambda forward, index, *rest: index + 1)
    for where, name in ((backbone, "logits"), (Forward, "most_probable_next")):
        spied(where, name, lambda *args: -1)
    for taps, layers in (((1,), {1}), ((), set()), ((1, 2, FINAL_NORM), set())):  # all is there by now
        ran.clear()
        features = FeatureStore(backbone, DATA, taps, tmp_path / f"features-f00d-{taps}")
        features.prepare()
        assert set(ran) - {0} == layers
        fresh = ComputedFeatures(backbone, DATA, taps)
        compared(features.batch([0, 11, 3]), fresh.batch([0, 11, 3]))
    other = FeatureStore(backbone, DATA[1:], (1,), tmp_path / "features-f00d-other")  # nothing is kept of these
    other.prepare()
    compared(other.batch([2]), ComputedFeatures(backbone, DATA[1:], (1,)).batch([2]))
    monkeypatch.setattr(backbone, "fingerprint", "beef")  # nor of this model
    ran.clear()
    FeatureStore(backbone, DATA, (1,), tmp_path / "features-beef-1").prepare()
    assert {-1, backbone.config.layers} <= set(ran)


def test_several_folders_are_as_one(backbone: Backbone, tmp_path: Path, by_decoding: None) -> None:
    three, fractions = [DATA[:5], DATA[5:6], DATA[6:]], list[float]()
    joined = JoinedFeatures([FeatureStore(backbone, data, TAPS, tmp_path / str(i)) for i, data in enumerate(three)])
    joined.prepare(fractions.append)
    assert fractions == sorted(fractions)
    assert {1 / 3, 2 / 3, 1.0} <= set(fractions)
    assert len(set(fractions)) > len(DATA)  # a folder may take minutes
    assert joined.data == DATA
    assert joined.sets == [range(5), range(5, 6), range(6, 12)]
    whole = ComputedFeatures(backbone, DATA, TAPS)
    for indices in [*BATCHES, (11, 3, 5, 7)]:
        assert_same_batches(joined.batch(indices), whole.batch(indices))


@pytest.mark.parametrize("exact", [True, False], ids=["by decoding", "by the plain pass"])
def test_padding_holds_nothing_and_only_answers_are_supervised(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    monkeypatch.setattr(ComputedFeatures, "by_decoding", exact)
    batch = ComputedFeatures(backbone, DATA, TAPS).batch(range(12))
    longest = max(len(each.tokens) for each in DATA)
    assert batch.tokens_BT.shape == batch.supervised_BT.shape == (12, longest)
    for row, each in enumerate(DATA):
        written = {position for start, end in each.answers for position in range(start, end)}
        assert batch.supervised_BT[row].nonzero()[:, 0].tolist() == sorted(written)
        assert batch.tokens_BT[row, : len(each.tokens)].tolist() == each.tokens
        for tensor in fields_of(batch).values():
            assert not tensor[row, len(each.tokens) :].any()


class CountedPasses(ComputedFeatures):
    """Counts how often each conversation is run through the backbone."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.computed = Counter[int]()

    def each(self, data: Sequence[Distilled], *asked: Any) -> Iterator[dict[str, Tensor]]:
        for talk, tensors in zip(data, super().each(data, *asked), strict=True):
            self.computed[talk.line] += 1
            yield tensors


class Counting(FeatureStore):
    """Says how often each conversation was run through the backbone."""

    def __init__(self, backbone: Backbone, data: Sequence[Distilled], taps: Sequence[int], folder: Path):
        super().__init__(backbone, data, taps, folder)
        self._computed = self._counted = CountedPasses(backbone, data, taps)

    @property
    def computed(self) -> Counter[int]:
        return self._counted.computed


def test_preparing_goes_on_where_it_was(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_decoding: None
) -> None:
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
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_decoding: None, changed: list[Distilled]
) -> None:
    """More was distilled since, a damaged line was answered again: the shards there are not of this data."""
    monkeypatch.setattr(featuring, "SHARD", 100)
    FeatureStore(backbone, DATA, TAPS, tmp_path).prepare()
    features = FeatureStore(backbone, changed, TAPS, tmp_path)
    features.prepare()
    indices = range(len(changed))
    assert_same_batches(features.batch(indices), ComputedFeatures(backbone, changed, TAPS).batch(indices))


def test_features_of_another_number_type_are_never_read(tmp_path: Path, by_decoding: None) -> None:
    for dtype in (BF16, FP32):
        backbone = Model({"model_type": "llama", **DIMENSIONS}).build(dtype=dtype)
        features = FeatureStore(backbone, DATA, TAPS, tmp_path)
        features.prepare()
        assert_same_batches(features.batch([1, 2]), ComputedFeatures(backbone, DATA, TAPS).batch([1, 2]))


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_damaged_shard_is_made_again(backbone: Backbone, tmp_path: Path, by_decoding: None, size: int) -> None:
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
        patched.setattr(ComputedFeatures, "each", None)
        with pytest.raises(ForetellError, match=r"0 MB are free\); free some, or leave out `keep_features=True`"):
            FeatureStore(backbone, DATA, TAPS, tmp_path).prepare()  # before any work
    (tmp_path / "file").touch()
    with pytest.raises(ForetellError, match="annot write to .*file"):
        FeatureStore(backbone, DATA, TAPS, tmp_path / "file").prepare()


@examples(100)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 100), st.booleans())
def test_stretches_hold_what_one_pass_may(lengths: list[int], size: int, padded: bool) -> None:
    found = list(featuring._stretches(lengths, size, padded))
    assert [i for begin, end in found for i in range(begin, end)] == list(range(len(lengths)))

    def tokens(begin: int, end: int) -> int:
        part = lengths[begin:end]
        return len(part) * max(part) if padded else sum(part)

    assert all(end == begin + 1 or tokens(begin, end) <= size for begin, end in found)
    assert all(tokens(begin, end + 1) > size for begin, end in found if end < len(lengths))  # and no less


@pytest.mark.parametrize("exact", [True, False], ids=["by decoding", "by the plain pass"])
def test_a_pass_counts_the_padding_that_it_computes(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    monkeypatch.setattr(ComputedFeatures, "by_decoding", exact)
    monkeypatch.setitem(featuring.PASS, "cpu", 60)
    sizes, pad = list[int](), featuring.side_by_side
    monkeypatch.setattr(featuring, "side_by_side", lambda data: (sizes.append(len(data)), pad(data))[1])
    talks = [Distilled(i, [1] * length, [(1, length)]) for i, length in enumerate([30, 2, 2, 2, 2, 2, 30])]
    made = list(ComputedFeatures(backbone, talks, TAPS).each(talks, TAPS, True))
    assert [len(each["teacher_ids"]) for each in made] == [len(talk.tokens) for talk in talks]
    assert sizes == ([] if exact else [2, 4, 1])


def test_empty_data_is_refused(backbone: Backbone) -> None:
    with pytest.raises(UsageError, match="holds no conversations; distill some first"):
        ComputedFeatures(backbone, [], TAPS)
