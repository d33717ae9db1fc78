"""Which tree to draft: nested search against brute force, replay against decoding written out, the published trees."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.errors import UsageError
from foretell.trees import from_paths
from foretell.trees.published import published, published_trees
from foretell.trees.search import ENDED, MISSED, Path, Ranks, accepted_P, nested, tree_tokens_per_step


def ended(ranks: list[tuple[int, ...]]) -> Ranks:
    """An answer's ranks, those of the tokens beyond its end left out."""
    ranks_PK = np.array(ranks)
    P, K = ranks_PK.shape
    ranks_PK[np.arange(P)[:, None] + np.arange(K) >= P] = ENDED
    return ranks_PK


def answers_of(heads: int, most: int) -> st.SearchStrategy[list[Ranks]]:
    """The answers of one text."""
    rows = st.tuples(*[st.sampled_from([0, 0, 0, 1, 2, MISSED])] * heads)
    return st.lists(st.lists(rows, min_size=1, max_size=20).map(ended), min_size=1, max_size=most)


texts = st.integers(1, 3).flatmap(
    lambda heads: st.lists(answers_of(heads, 1).map(np.concatenate), min_size=1, max_size=3)
)
talks = st.integers(2, 4).flatmap(lambda heads: st.lists(answers_of(heads, 3), min_size=1, max_size=3))


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
    """Slow twin of replay: tokens of each step over one answer, following the tree from the root."""
    emitted: list[int] = []
    while sum(emitted) < len(ranks):
        p = sum(emitted)
        path: Path = ()
        while len(path) < ranks.shape[1] and (*path, int(ranks[p, len(path)])) in paths:
            path = (*path, int(ranks[p, len(path)]))
        emitted.append(min(len(path) + 1, len(ranks) - p))  # behind the last token comes no bonus
    return emitted


@settings(max_examples=150, deadline=None)
@given(talks, st.integers(1, 12))
def test_replay_is_decoding_step_by_step(talks: list[list[Ranks]], nodes: int) -> None:
    """Answer by answer, though the ranks of a text come without borders."""
    joined = [np.concatenate(answers) for answers in talks]
    paths = nested(joined, nodes)
    steps = [tokens for answers in talks for each in answers for tokens in decode(each, paths)]
    assert sum(steps) == sum(map(len, joined))
    assert tree_tokens_per_step(joined, paths) == sum(steps) / len(steps)


@settings(max_examples=50, deadline=None)
@given(texts, st.integers(1, 12))
def test_guesses_are_accepted_as_far_as_the_tree_knows_them(ranks: list[Ranks], nodes: int) -> None:
    paths = nested(ranks, nodes)
    for each in ranks:
        known = [[k for k in range(each.shape[1] + 1) if not k or tuple(row[:k].tolist()) in paths] for row in each]
        assert accepted_P(each, paths).tolist() == list(map(max, known))


@pytest.mark.parametrize(("lengths", "steps"), [([5, 5], 4), ([6, 6], 4), ([30, 30, 30], 24), ([4], 1), ([1, 1], 2)])
def test_no_step_goes_beyond_the_end_of_an_answer(lengths: list[int], steps: int) -> None:
    """Three heads that are always right: four tokens a step, and what is left at the end."""
    ranks = np.concatenate([ended([(0, 0, 0)] * length) for length in lengths])
    assert tree_tokens_per_step([ranks], [(0,), (0, 0), (0, 0, 0)]) == sum(lengths) / steps
    assert tree_tokens_per_step([ranks], []) == 1.0


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
    assert tree_tokens_per_step(ranks, []) == 1.0


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
