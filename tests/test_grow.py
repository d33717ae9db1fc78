"""Trees grown from probabilities, all at once or level by level, against sorting every path by hand."""

import math
from copy import deepcopy
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.errors import UsageError
from foretell.trees import from_paths
from foretell.trees.growing import Candidates, GrowingTree, reachable

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
    log_probs_BKR = -np.sort(rng.exponential(size=(3, heads, 4)).astype(np.float32), axis=2)
    if certain:
        log_probs_BKR[:, :, 0] = 0.0  # a probability of 1: no guess may come without its parent
    candidates = Candidates(paths)
    assert len(candidates) == len(paths)
    for log_probs_KR, (tree, grown, probabilities) in zip(
        log_probs_BKR, candidates.grow(log_probs_BKR, nodes), strict=True
    ):
        value = {path: sum(log_probs_KR[k, rank] for k, rank in enumerate(path)) for path in paths}
        best = sorted(value.values(), reverse=True)[: nodes - 1]
        path_of = [()]
        for node, parent in enumerate(tree.parents[1:], start=1):
            depth, rank = grown[node - 1]
            assert depth == len(path_of[parent])
            path_of.append((*path_of[parent], rank))
            assert probabilities[node] == pytest.approx(np.exp(log_probs_KR[depth, rank]), rel=1e-3)
        assert set(path_of[1:]) <= set(paths)
        assert len(set(path_of)) == len(tree) == min(nodes, len(paths) + 1)
        assert sorted((value[path] for path in path_of[1:]), reverse=True) == pytest.approx(best, abs=1e-3)


@settings(max_examples=200, deadline=None)
@given(ranks, st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_paths_that_are_out_of_reach_are_never_grown(some: tuple[int, list[list[int]]], nodes: int, seed: int) -> None:
    heads, chosen = some
    paths = sorted({tuple(path[: n + 1]) for path in chosen for n in range(len(path))})
    log_probs_BKR = -np.sort(np.random.default_rng(seed).exponential(size=(3, heads, 4)), axis=2)
    within = Candidates(reachable(paths, nodes))
    assert within.grow(log_probs_BKR, nodes) == Candidates(paths).grow(log_probs_BKR, nodes)


def test_a_small_tree_asks_for_few_guesses() -> None:
    paths = [path for depth in (1, 2, 3) for path in product(range(4), repeat=depth)]
    assert reachable(paths, 1) == []
    assert reachable(paths, 2) == [(0,)]
    assert reachable(paths, 3) == [(0,), (1,), (0, 0)]
    assert reachable(paths, 4) == [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
    assert len(reachable(paths, 1000)) == len(paths)
    assert reachable([(0,), (3,)], 3) == [(0,), (3,)]  # a tree that names no ranks between


def test_whatever_the_heads_say_a_tree_is_a_tree() -> None:
    candidates = Candidates([(0,), (0, 0), (1,), (0, 0, 0), (1, 0)])
    for log_prob in (np.nan, -np.inf, 0.0, -1e-8, -1e30):
        for nodes in range(1, 8):
            ((tree, chosen, given),) = candidates.grow(np.full((1, 3, 2), log_prob, dtype=np.float32), nodes)
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


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.lists(st.tuples(st.floats(0.1, 4), st.floats(-4, 4)), min_size=2, max_size=2),
    st.integers(2, 16),
)  # fmt: skip
def test_scaled_heads_grow_the_tree_of_what_they_should_have_said(
    seed: int, scales: list[tuple[float, float]], nodes: int
) -> None:
    log_probs_BKR = -np.sort(np.random.default_rng(seed).exponential(size=(2, 2, 4)), axis=2)
    should = [
        [[-math.log1p(math.exp(-bias) * math.expm1(-log_probs) ** slope) for log_probs in row[k].tolist()]
         for k, (slope, bias) in enumerate(scales)]
        for row in log_probs_BKR
    ]  # fmt: skip
    candidates = Candidates([path for depth in (1, 2) for path in product(range(4), repeat=depth)])
    ours, twin = candidates.grow(log_probs_BKR, nodes, scales), candidates.grow(np.array(should), nodes)
    for (tree, chosen, ours_p), (other, theirs, twin_p) in zip(ours, twin, strict=True):
        assert (tree, chosen) == (other, theirs)
        assert ours_p == pytest.approx(twin_p, rel=1e-6)


# -- level by level ---------------------------------------------------------------------------------------------------


def random_growing(seed: int, size: int) -> GrowingTree:
    """Guesses hung anywhere, certain ones and many equally probable ones among them."""
    rng, tree = np.random.default_rng(seed), GrowingTree([100], [0])
    for node in range(1, size + 1):
        log_probs = [0.0, -0.25, -0.5, -1.0, -float(rng.exponential())][rng.integers(5)]
        tree.add(int(rng.integers(node)), 100 + node, log_probs)
    return tree


def ranked(tree: GrowingTree) -> list[int]:
    """All nodes but the root, the most probable first, of equals the older; each valued along its own path."""
    values = []
    for node in range(len(tree.parents)):
        value = 0.0
        while node:
            value += math.log(tree.cond_probs[node])
            node = tree.parents[node]
        values.append(value)
    assert tree.path_log_probs == pytest.approx(values, abs=1e-9)
    return sorted(range(1, len(values)), key=lambda node: (-tree.path_log_probs[node], node))


def words(tree: GrowingTree, node: int) -> list[int]:
    """Tokens of the path to a node."""
    return [*(words(tree, tree.parents[node]) if node else []), tree.tokens[node]]


growings = st.builds(random_growing, st.integers(0, 2**32 - 1), st.integers(0, 30))


@settings(max_examples=200, deadline=None)
@given(growings, st.integers(1, 40))
def test_the_best_nodes_are_a_tree(tree: GrowingTree, count: int) -> None:
    best = tree.best(count)
    assert best == ranked(tree)[:count]
    assert {tree.parents[node] for node in best} <= {0, *best}
    assert all(
        tree.path_log_probs[node] <= tree.path_log_probs[tree.parents[node]] for node in range(1, len(tree.parents))
    )


@settings(max_examples=200, deadline=None)
@given(growings, st.integers(1, 40), st.integers(1, 31), st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]))
def test_those_are_asked_next_who_are_new_and_among_the_best(
    tree: GrowingTree, count: int, since: int, most: int, least: float
) -> None:
    best = ranked(tree)[:count]
    tree.select_frontier(count, since, most, least)
    assert tree.min_log_prob == (min(tree.path_log_probs[node] for node in best) if len(best) == count else -math.inf)
    new = [node for node in best if node >= since][:most]
    gain = sum(math.exp(tree.path_log_probs[node]) - math.exp(tree.min_log_prob) for node in new)
    if abs(gain - least) > 1e-9:
        assert tree.frontier == (new if gain > least else [])


def test_nobody_is_asked_where_little_can_be_gained() -> None:
    tree = GrowingTree([7], [0])
    for token, p in ((1, 0.05), (2, 0.02), (3, 0.5)):
        tree.add(0, token, math.log(p))
    tree.select_frontier(4, 1, 8, 0.56)  # there is room for all
    assert tree.frontier == [3, 1, 2]
    tree.select_frontier(4, 1, 8, 0.58)
    assert tree.frontier == []
    tree.select_frontier(2, 1, 8, 0.44)  # who comes in pushes out what is 0.05 probable
    assert tree.frontier == [3, 1]
    tree.select_frontier(2, 1, 8, 0.46)
    assert tree.frontier == []
    tree.select_frontier(3, 1, 1, 0.47)  # one is asked at most, and counts alone
    assert tree.frontier == [3]
    tree.select_frontier(3, 1, 1, 0.49)
    assert tree.frontier == []


@settings(max_examples=200, deadline=None)
@given(growings, st.integers(1, 40), st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_of_many_guesses_those_are_added_that_matter(
    tree: GrowingTree, count: int, asked: int, most: int, seed: int
) -> None:
    """Against adding them all."""
    rng, since = np.random.default_rng(seed), len(tree.parents)
    tree.select_frontier(count, 0, asked, 0.0)
    tree.frontier = tree.frontier or [0]
    log_probs_AR = -np.sort(
        rng.choice([0.0, 0.25, 0.5, 1.0, 2.0, *rng.exponential(size=3)], (len(tree.frontier), 5)), axis=1
    )
    tokens_AR = (1000 + np.arange(log_probs_AR.size)).reshape(log_probs_AR.shape).tolist()
    whole = deepcopy(tree)
    for node, log_probs, tokens in zip(tree.frontier, log_probs_AR.tolist(), tokens_AR, strict=True):
        for each, token in zip(log_probs, tokens, strict=True):
            whole.add(node, token, each)
    tree.extend(log_probs_AR, tokens_AR, count)
    assert len(tree.parents) <= min(len(whole.parents), since + count)
    assert [words(tree, node) for node in tree.best(count)] == [words(whole, node) for node in whole.best(count)]
    for each in (tree, whole):
        each.select_frontier(count, since, most, 0.0)
    assert tree.min_log_prob == whole.min_log_prob
    assert [words(tree, node) for node in tree.frontier] == [words(whole, node) for node in whole.frontier]


@settings(max_examples=100, deadline=None)
@given(ranks, st.integers(0, 2**32 - 1))
def test_a_static_tree_is_filled_with_the_guesses_that_its_paths_name(
    some: tuple[int, list[list[int]]], seed: int
) -> None:
    shape, ordered = from_paths({tuple(path[: n + 1]) for path in some[1] for n in range(len(path))})
    log_probs_NR = -np.sort(np.random.default_rng(seed).exponential(size=(len(shape), 4)), axis=1)

    def token(path: tuple[int, ...]) -> int:
        return int("9" + "".join(map(str, path)))

    tree = GrowingTree([9], [0])
    while tree.frontier:
        log_probs_AR = log_probs_NR[tree.frontier]
        tree.fill(
            shape, ordered, log_probs_AR, [[token((*ordered[node], r)) for r in range(4)] for node in tree.frontier]
        )
    assert tuple(tree.parents) == shape.parents
    assert tree.tokens == [token(path) for path in ordered]
    p = [math.exp(log_probs_NR[shape.parents[node], ordered[node][-1]]) for node in range(1, len(shape))]
    assert tree.cond_probs == pytest.approx([1.0, *p])


@settings(max_examples=100, deadline=None)
@given(growings, st.integers(0, 40))
def test_a_cut_keeps_paths_and_probabilities(tree: GrowingTree, count: int) -> None:
    best = tree.best(count)
    cut, tokens, given = tree.cut(best)
    assert len(cut) == len(tokens) == len(given) == len(best) + 1
    kept = {tuple(tokens[i] for i in cut.path(node)): p for node, p in enumerate(given)}
    assert kept == {tuple(words(tree, node)): tree.cond_probs[node] for node in [0, *best]}
    whole, tokens, given = tree.cut(range(1, len(tree.parents)))
    assert (list(whole.parents), tokens, given) == (tree.parents, tree.tokens, tree.cond_probs)


def test_what_is_too_probable_counts_as_certain_and_what_is_no_number_as_hopeless() -> None:
    tree = GrowingTree([7], [0])
    for log_probs in (math.nan, 0.5, -math.inf):
        tree.add(0, 1, log_probs)
    assert (tree.path_log_probs, tree.cond_probs) == ([0.0, -math.inf, 0.0, -math.inf], [1.0, 0.0, 1.0, 0.0])
    ((_, chosen, _),) = Candidates([(0,), (1,)]).grow(np.array([[[math.nan, -3.0]]]), 2)
    assert chosen == [(0, 1)]
    for log_probs in (math.nan, 1e-8, -math.inf, -1e30):
        tree = GrowingTree([7], [0])
        tree.extend(np.full((1, 3), log_probs, dtype=np.float32), [[1, 2, 3]], 2)
        cut, _, given = tree.cut(tree.best(2))
        assert cut.parents in ((-1,), (-1, 0, 0))
        assert all(0 <= p <= 1 for p in given)
