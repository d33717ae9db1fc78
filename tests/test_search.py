"""Which tree to draft: nested search against brute force, replay against decoding written out, the published trees."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.errors import UsageError
from foretell.trees import from_paths
from foretell.trees.published import published, published_trees
from foretell.trees.search import MISSED, Path, Ranks, accepted_P, nested, replay

texts = st.integers(1, 3).flatmap(
    lambda heads: st.lists(
        st.lists(st.tuples(*[st.sampled_from([0, 0, 0, 1, 2, MISSED])] * heads), min_size=1, max_size=20).map(np.array),
        min_size=1, max_size=3,
    )
)  # fmt: skip


def value(ranks: list[Ranks], path: Path) -> int:
    """How often a path came true, counted by hand."""
    return sum(all(row[k] == rank for k, rank in enumerate(path)) for each in ranks for row in each.tolist())


@settings(max_examples=150, deadline=None)
@given(texts, st.integers(2, 12))
def test_the_search_finds_the_most_frequent_paths(ranks: list[Ranks], nodes: int) -> None:
    found = nested(ranks, nodes)
    heads = ranks[0].shape[1]
    every = [path for depth in range(1, heads + 1) for path in product(range(3), repeat=depth)]
    best = sorted((value(ranks, path) for path in every), reverse=True)
    assert [value(ranks, path) for path in found] == [v for v in best[: nodes - 1] if v]
    for size in range(1, len(found) + 1):
        from_paths(found[:size])  # refuses a path without its prefix


def decode(ranks: Ranks, paths: list[Path]) -> list[int]:
    """Slow twin of replay: tokens of each step, following the tree from the root."""
    emitted, p = [], 0
    while p < len(ranks):
        path: Path = ()
        while len(path) < ranks.shape[1] and (*path, int(ranks[p, len(path)])) in paths:
            path = (*path, int(ranks[p, len(path)]))
        emitted.append(len(path) + 1)
        p += len(path) + 1
    return emitted


@settings(max_examples=150, deadline=None)
@given(texts, st.integers(1, 12))
def test_replay_is_decoding_step_by_step(ranks: list[Ranks], nodes: int) -> None:
    paths = nested(ranks, nodes)
    steps = [tokens for each in ranks for tokens in decode(each, paths)]
    assert replay(ranks, paths) == sum(steps) / len(steps)
    for each in ranks:
        walked = [
            len(decode(each[p : p + 1], paths)) and decode(each[p : p + 1], paths)[0] - 1 for p in range(len(each))
        ]
        assert accepted_P(each, paths).tolist() == walked


def test_a_larger_tree_never_earns_less_on_its_own_positions() -> None:
    rng = np.random.default_rng(0)
    ranks = [rng.geometric(0.5, (200, 4)) - 1 for _ in range(3)]
    paths = nested(ranks, 64)
    assert len(paths) == 63
    means = [np.concatenate([accepted_P(each, paths[:n]) for each in ranks]).mean() for n in range(64)]
    assert means == sorted(means)
    counts = [value(ranks, path) for path in paths]
    assert counts == sorted(counts, reverse=True)
    assert means[-1] == pytest.approx(sum(counts) / 600)  # 1 + Σ joint frequency, the bonus left out


def test_texts_in_which_nothing_came_true_give_no_paths() -> None:
    ranks = [np.full((5, 2), MISSED)]
    assert nested(ranks, 8) == []
    assert replay(ranks, []) == 1.0


def test_the_nine_published_trees_are_whole() -> None:
    assert len(published_trees()) == 9
    depths = {"mc_sim_7b_63": [10, 28, 23, 2], "vicuna_7b_stage2": [10, 23, 23, 7], "zephyr_stage2": [10, 27, 23, 3]}
    for name in published_trees():
        paths = published(name)
        assert len(paths) == 63
        tree, _ = from_paths(paths)
        assert len(tree) == 64
        if name in depths:
            assert [sum(len(path) == depth for path in paths) for depth in (1, 2, 3, 4)] == depths[name]


def test_an_unknown_tree_is_named_with_a_near_one() -> None:
    with pytest.raises(UsageError, match=r"'vicuna_7b_stage3': did you mean 'vicuna_7b_stage"):
        published("vicuna_7b_stage3")
