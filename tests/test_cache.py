"""The cache's verbs against a twin made of Python lists, and a committed cache against a fresh prefill, bit for bit."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_backbones import (
    DTYPES,
    FP32,
    KERNELS,
    Batch,
    Model,
    batches,
    examples,
    models,
    one_by_one,
    run,
    same,
    using,
)
from tiny_models import DIMENSIONS

from foretell.backbone import KVCache, Nodes
from foretell.errors import ForetellError
from foretell.trees import TokenTree


def new(rows: int = 3, slots: int = 0) -> KVCache:
    return KVCache(2, rows, 2, slots, 4, FP32, torch.device("cpu"))


class Written:
    """What a pass would write: slots that carry a number of their own, the same in keys, values and the twin."""

    def __init__(self) -> None:
        self.next = 1

    def write(self, cache: KVCache, row: int, count: int) -> list[int]:
        marks = list(range(self.next, self.next + count))
        self.next += count
        start = cache.lengths[row]
        for slot, mark in enumerate(marks, start):
            keys, values = cache.room(row)
            keys[:, :, slot], values[:, :, slot] = mark, -mark
        return marks


def holds(cache: KVCache, row: int, marks: list[int]) -> bool:
    keys, values = cache.read(row)
    assert keys.shape == values.shape == (2, 2, len(marks), 4)
    expected = torch.tensor(marks, dtype=FP32)[None, None, :, None].expand_as(keys)
    return torch.equal(keys, expected) and torch.equal(values, -expected)


paths = st.lists(st.integers(1, 4), max_size=6).map(
    lambda steps: [0, *torch.tensor(steps).cumsum(0).tolist()] if steps else [0]
)
verbs = st.one_of(
    st.tuples(st.just("commit"), st.dictionaries(st.integers(0, 2), paths, min_size=1)),
    st.tuples(st.just("rollback"), st.integers(0, 2), st.floats(0, 1)),
    st.tuples(st.just("reserve"), st.dictionaries(st.integers(0, 4), st.integers(0, 300))),
    st.tuples(st.just("release"), st.lists(st.integers(0, 2))),
    st.tuples(st.just("trim")),
)


@examples(100)
@given(st.lists(verbs, max_size=12))
def test_any_sequence_of_verbs_keeps_what_a_list_would(sequence: list[Any]) -> None:
    """Rows of lists: commit appends the path's marks, rollback cuts, release empties, reserve and trim change nothing.

    No two rows share a slot of the pool, and a row's room is never less than what was reserved.
    """
    cache, written = new(), Written()
    twin: list[list[int]] = [[], [], []]
    for verb, *details in sequence:
        if verb == "commit":
            chosen = details[0]
            cache.reserve({row: cache.lengths[row] + path[-1] + 1 for row, path in chosen.items()})
            for row, path in chosen.items():
                marks = written.write(cache, row, path[-1] + 1)
                twin[row] += [marks[node] for node in path]
            cache.commit(list(chosen), list(chosen.values()))
        elif verb == "rollback":
            row, length = details[0], int(details[1] * len(twin[details[0]]))
            cache.rollback(row, length)
            del twin[row][length:]
        elif verb == "reserve":
            cache.reserve(details[0])
            assert all(cache.capacity[row] >= slots for row, slots in details[0].items())
        elif verb == "release":
            cache.release(details[0])
            for row in details[0]:
                twin[row] = []
        else:
            cache.trim()
            assert cache.keys.shape[2] == sum(cache.capacity)
        rooms = sorted((cache.start(row), cache.capacity[row]) for row in range(cache.rows) if cache.capacity[row])
        ends = [start + slots for start, slots in rooms]
        assert all(end <= start for end, (start, _) in zip(ends, rooms[1:], strict=False))
        assert not ends or ends[-1] <= cache.keys.shape[2]
        assert cache.lengths[:3] == [len(marks) for marks in twin]
        assert all(holds(cache, row, marks) for row, marks in enumerate(twin))


def test_a_row_cannot_be_rolled_forward() -> None:
    cache = new(1, 8)
    cache.commit([0], [range(5)])
    for length in (-1, 6):
        with pytest.raises(ForetellError, match=f"back to {length} slots: it holds 5"):
            cache.rollback(0, length)
    assert cache.lengths == [5]


def test_growing_by_one_slot_at_a_time_copies_seldom() -> None:
    cache, copies = new(2), 0
    for slots in range(1, 3000):
        before = cache.keys
        cache.reserve({1: slots})
        copies += cache.keys is not before
    assert copies < 20
    cache.reserve({1: 10})
    assert cache.capacity[1] >= 2999  # never shrinks
    assert cache.bytes == 2 * cache.keys.numel() * 4


def test_one_long_row_does_not_size_the_others() -> None:
    cache = new(8)
    cache.reserve({0: 30_000} | dict.fromkeys(range(1, 8), 100))
    assert cache.keys.shape[2] < 31_000 + 8 * 128


def test_room_that_was_given_back_is_taken_again_and_freed() -> None:
    cache, written = new(3), Written()
    cache.reserve({0: 1000, 1: 64, 2: 64})
    marks = written.write(cache, 1, 5)
    cache.commit([1], [range(5)])
    cache.release([0])
    pool = cache.keys
    cache.reserve({2: 500})
    assert cache.keys is pool  # row 2 moved into the gap
    assert cache.bytes > 1000 * 2 * 2 * 2 * 4 * 4
    cache.release([2])
    cache.trim()
    assert cache.keys.shape[2] == 64
    assert holds(cache, 1, marks)
    cache.release([1])
    cache.trim()
    assert cache.bytes == 0


def test_a_pass_outside_its_room_is_refused() -> None:
    cache = new(2, 64)
    cache.check([0, 1], [64, 1])
    with pytest.raises(ValueError, match="Cache row 0 has 64 slots, not 65"):
        cache.check([0], [65])
    for row in (2, -1):
        with pytest.raises(IndexError, match="A row is not in the cache, which has 2"):
            cache.check([row], [1])


@pytest.mark.parametrize("kernel", KERNELS)
def test_after_commits_the_cache_is_that_of_a_fresh_prefill(kernel: str) -> None:
    """Trees verified, paths chosen at random and committed, again and again, in every row at once."""

    def holds(model: Model, dtype: torch.dtype, batch: Batch, data: st.DataObject) -> None:
        backbone = model.build(kernel, dtype)
        cache = batch.prefill(backbone)
        history = [tokens.tolist() for tokens in batch.tokens(backbone.config.vocab)[0]]
        for step in range(3):
            guesses = Batch(batch.trees, batch.lengths, batch.slots, batch.seed + step).tokens(backbone.config.vocab)[1]
            nodes = Nodes(batch.trees, batch.slots, [cache.lengths[slot] for slot in batch.slots])
            cache.reserve(dict(zip(batch.slots, nodes.ends, strict=True)))
            run(backbone, torch.cat(guesses), nodes, cache)
            chosen = [tree.path(data.draw(st.integers(0, len(tree) - 1), "node")) for tree in batch.trees]
            cache.commit(batch.slots, chosen)
            for tokens, ids, path in zip(history, guesses, chosen, strict=True):
                tokens += ids[path].tolist()
        for slot, tokens in zip(batch.slots, history, strict=True):
            fresh, _ = one_by_one(backbone, torch.tensor(tokens))
            for ours, theirs in zip(cache.read(slot), fresh.read(0), strict=True):
                assert same(ours, theirs)

    with using(kernel):
        examples(3 if kernel == "eager" else 15)(given(models(), DTYPES, batches(), st.data())(holds))()


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_was_rolled_back_is_forgotten(kernel: str) -> None:
    """Other tokens are read after a rollback, and nothing of the first ones shows."""
    with using(kernel):
        backbone = Model({"model_type": "llama", **DIMENSIONS}).build(kernel)
        cache = backbone.new_cache(1, 40)
        run(backbone, torch.arange(30), Nodes.chains([0], [0], [30]), cache)
        cache.commit([0], [range(30)])
        cache.rollback(0, 11)
        tree = TokenTree((-1, 0, 0, 2))
        run(backbone, torch.tensor([60, 61, 62, 63]), Nodes([tree], [0], [11]), cache)
        cache.commit([0], [[0, 2, 3]])
        fresh, _ = one_by_one(backbone, torch.tensor([*range(11), 60, 62, 63]))
        assert same(cache.read(0)[0], fresh.read(0)[0])
        assert same(cache.read(0)[1], fresh.read(0)[1])


def test_a_growth_that_fails_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, written, usual, calls = new(2, 8), Written(), torch.empty, []
    marks = written.write(cache, 1, 4)
    cache.commit([1], [range(4)])

    def second_fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return usual(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", second_fails)
    before = cache.keys, cache.values, list(cache.capacity)
    with pytest.raises(ForetellError, match=r"A cache of \d+ tokens takes .* GB"):
        cache.reserve({0: 5000})
    assert cache.keys is before[0]
    assert cache.values is before[1]
    assert cache.capacity == before[2]
    assert holds(cache, 1, marks)
    cache.reserve({0: 5000})
    assert cache.capacity[0] >= 5000
    assert holds(cache, 1, marks)
