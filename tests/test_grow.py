"""Trees grown from probabilities, against sorting every path by hand."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.errors import UsageError
from foretell.trees.grow import Candidates

ranks = st.integers(1, 3).flatmap(
    lambda heads: st.tuples(
        st.just(heads), st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=heads), min_size=1)
    )
)


@settings(max_examples=200, deadline=None)
@given(ranks, st.integers(2, 20), st.integers(0, 2**32 - 1), st.booleans())
def test_the_most_probable_paths_make_the_tree(
    some: tuple[int, list[list[int]]], nodes: int, seed: int, certain: bool
) -> None:
    heads, chosen = some
    paths = list(dict.fromkeys(tuple(path[: n + 1]) for path in chosen for n in range(len(path))))
    rng = np.random.default_rng(seed)
    said_BKR = -np.sort(rng.exponential(size=(3, heads, 4)).astype(np.float32), axis=2)
    if certain:
        said_BKR[:, :, 0] = 0.0  # a probability of 1: no guess may come without its parent
    candidates = Candidates(paths)
    assert len(candidates) == len(paths)
    for said_KR, (tree, grown, probabilities) in zip(said_BKR, candidates.grow(said_BKR, nodes), strict=True):
        value = {path: sum(said_KR[k, rank] for k, rank in enumerate(path)) for path in paths}
        best = sorted(value.values(), reverse=True)[: nodes - 1]
        said = [()]
        for node, parent in enumerate(tree.parents[1:], start=1):
            depth, rank = grown[node - 1]
            assert depth == len(said[parent])
            said.append((*said[parent], rank))
            assert probabilities[node] == pytest.approx(np.exp(said_KR[depth, rank]), rel=1e-3)
        assert set(said[1:]) <= set(paths)
        assert len(set(said)) == len(tree) == min(nodes, len(paths) + 1)
        assert sorted((value[path] for path in said[1:]), reverse=True) == pytest.approx(best, abs=1e-3)


def test_whatever_the_heads_say_a_tree_is_a_tree() -> None:
    candidates = Candidates([(0,), (0, 0), (1,), (0, 0, 0), (1, 0)])
    for said in (np.nan, -np.inf, 0.0, -1e-8, -1e30):
        for nodes in range(1, 8):
            ((tree, chosen, given),) = candidates.grow(np.full((1, 3, 2), said, dtype=np.float32), nodes)
            assert len(tree) == len(chosen) + 1 == len(given) == min(nodes, 6)
            depths = [head + 1 for head, _ in chosen]
            assert list(tree.depths) == [0, *depths]  # nobody hangs under another parent than its own
            assert all(0 <= p <= 1 for p in given)


def test_no_paths_give_the_root_alone() -> None:
    candidates = Candidates([])
    assert (len(candidates), candidates.heads, candidates.width) == (0, 0, 0)
    assert candidates.grow(np.zeros((2, 1, 1)), 5)[1][0].parents == (-1,)
    with pytest.raises(UsageError, match=r"path \[2, 0\] lacks its prefix \[2\]"):
        Candidates([(0,), (2, 0)])


def test_sure_heads_get_a_chain_and_unsure_ones_a_bush() -> None:
    candidates = Candidates([path for depth in (1, 2, 3) for path in product(range(4), repeat=depth)])
    sure, unsure = np.log([0.97, 0.01, 0.01, 0.01]), np.log([0.25] * 4)
    chain, bush = candidates.grow(np.stack([[sure] * 3, [unsure] * 3]), 4)
    assert chain[0].parents == (-1, 0, 1, 2)
    assert bush[0].parents == (-1, 0, 0, 0)
    assert (candidates.heads, candidates.width) == (3, 4)
