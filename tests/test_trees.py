"""A tree is its parents; everything else about it follows, and is held here against the definition."""

import math
import random
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_backbones import examples, trees

from foretell.errors import UsageError
from foretell.trees import Guesses, TokenTree, chain, from_paths, most_probable
from foretell.trees.tree import ROOT, merged

MEDUSA = [(0,), (0, 0), (0, 1), (0, 2), (1,), (1, 0), (1, 1), (1, 2)]


def test_the_golden_tree_of_medusa() -> None:
    """Paths in any order are sorted by (length, lexicographic); two first guesses with three each after them."""
    tree, paths = from_paths(MEDUSA[::-1])
    assert paths == [(), (0,), (1,), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert tree.parents == (-1, 0, 0, 1, 1, 1, 2, 2, 2)
    assert tree.depths == (0, 1, 1, 2, 2, 2, 2, 2, 2)
    assert (len(tree), tree.height, tree.leaves) == (9, 2, (3, 4, 5, 6, 7, 8))
    flat = [0 if not path else 1 + 10 * (len(path) - 1) + path[-1] for path in paths]  # into heads of ten ranks each
    assert flat == [0, 1, 2, 11, 12, 13, 11, 12, 13]


def test_chains() -> None:
    assert from_paths([])[0] == chain(0) == TokenTree()
    assert chain(3).parents == (-1, 0, 1, 2)


@examples(60)
@given(trees())
def test_everything_follows_from_the_parents(tree: TokenTree) -> None:
    paths = []
    for node, parent in enumerate(tree.parents):
        paths.append([node] if parent < 0 else [*paths[parent], node])
    assert [tree.path(node) for node in range(len(tree))] == paths
    assert list(tree.depths) == [len(path) - 1 for path in paths]
    assert tree.height == max(tree.depths)
    inner = {parent for parent in tree.parents if parent >= 0}
    assert list(tree.leaves) == [node for node in range(len(tree)) if node not in inner]
    assert all(tree.parents[child] == node for node, children in enumerate(tree.children) for child in children)
    assert sum(map(len, tree.children)) == len(tree) - 1


@examples(40)
@given(trees(), st.integers(0, 70))
def test_pruning_keeps_the_upper_part(tree: TokenTree, height: int) -> None:
    kept, pruned = tree.keep(height), tree.pruned(height)
    assert kept == [node for node in range(len(tree)) if len(tree.path(node)) <= height + 1]
    assert [[kept[node] for node in pruned.path(i)] for i in range(len(pruned))] == [tree.path(node) for node in kept]
    assert pruned.height == min(height, tree.height)


@st.composite
def token_trees(draw: st.DrawFn, distinct: bool = False) -> tuple[TokenTree, list[int]]:
    """Few different tokens, so that paths often agree; siblings are alike only if `distinct` is false."""
    tree = draw(trees(20))
    tokens = [0, *draw(st.lists(st.integers(0, 2), min_size=len(tree) - 1, max_size=len(tree) - 1))]
    if distinct:
        for children in tree.children:
            for rank, child in enumerate(children):
                tokens[child] = 3 * rank + tokens[child]
    return tree, tokens


@st.composite
def guesses(draw: st.DrawFn) -> Guesses:
    """Few different probabilities, so that values often tie."""
    tree, tokens = draw(token_trees())
    share = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    return Guesses(tree, tokens, [1.0, *draw(st.lists(share, min_size=len(tree) - 1, max_size=len(tree) - 1))])


def path_values(one: Guesses) -> dict[tuple[int, ...], float]:
    """HeadGuesses future -> its probability, the highest where a tree guesses it twice at a step."""
    given: dict[tuple[int, ...], float] = {}
    for node in range(len(one.tokens)):
        path = tuple(one.tokens[n] for n in one.tree.path(node))
        given[path] = max(given.get(path, 0.0), one.probabilities[node])
    return given


@examples(150)
@given(guesses(), guesses(), st.integers(1, 45))
def test_the_most_probable_futures_of_two_trees(one: Guesses, two: Guesses, size: int) -> None:
    both, found = path_values(one), most_probable(one, two, size)
    for path, p in path_values(two).items():
        both[path] = max(both.get(path, 0.0), p)
    values = path_worth(one, two)
    paths = [tuple(found.tokens[n] for n in found.tree.path(node)) for node in range(len(found.tokens))]
    assert len(set(paths)) == len(paths) == len(found.tree) == min(size, len(values))  # each once: prefixes are shared
    assert [found.probabilities[node] for node in range(len(paths))] == [both[path] for path in paths]
    chosen = [values[path] for path in paths]
    assert chosen == sorted(values.values(), reverse=True)[: len(paths)]


@examples(150)
@given(guesses(), guesses(), st.integers(1, 45), st.randoms(use_true_random=False))
def test_the_first_nodes_that_are_chosen_come_first(one: Guesses, two: Guesses, size: int, rng: random.Random) -> None:
    """The same futures as without an order, and these in the order in which they were."""
    one = replace(one, tokens=[7, *range(100, 99 + len(one.tokens))])  # siblings differ
    two = replace(two, tokens=[7, *rng.choices(range(100, 110), k=len(two.tokens) - 1)])
    first = rng.randint(1, len(one.tokens))
    (found, kept), chosen = merged(one, two, size, first), most_probable(one, two, size)
    assert path_values(found) == path_values(chosen)
    assert kept == sorted(kept)
    assert found.tokens[: len(kept)] == [one.tokens[node] for node in kept]
    assert set(kept) == {node for node in range(first) if one.tokens[node] in found.tokens[: len(kept)]}
    paths = [tuple(one.tokens[n] for n in one.tree.path(node)) for node in range(first)]
    assert len(kept) == sum(path in path_values(chosen) for path in paths)


def path_worth(one: Guesses, two: Guesses) -> dict[tuple[int, ...], float]:
    """HeadGuesses future -> how probable the whole of it is, in the union of two trees."""
    both = path_values(one)
    for path, p in path_values(two).items():
        both[path] = max(both.get(path, 0.0), p)
    return {path: math.prod(both[path[: n + 1]] for n in range(len(path))) for path in both}


def test_of_equal_guesses_those_of_the_first_tree_stay() -> None:
    one = Guesses(chain(2), [7, 1, 2], [1.0, 0.5, 1.0])
    two = Guesses(chain(2), [7, 3, 4], [1.0, 0.5, 1.0])
    assert most_probable(one, two, 3) == one
    assert most_probable(two, one, 3) == two


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TokenTree(()), "parent is -1, but parents are ()"),
        (lambda: TokenTree((0,)), "parent is -1, but parents are (0,)"),
        (lambda: TokenTree((-1, 1)), "Node 1 of a token tree names parent 1; it must be one of 0..0"),
        (lambda: TokenTree((-1, 0, -1)), "Node 2 of a token tree names parent -1; it must be one of 0..1"),
        (lambda: TokenTree((-1, 0, 3)), "Node 2 of a token tree names parent 3; it must be one of 0..1"),
        (lambda: from_paths([(0, 1)]), "path [0, 1] lacks its prefix [0]; add it"),
        (lambda: from_paths([(0,), (0, -1)]), "path [0, -1] holds a negative rank; ranks count from 0"),
        (
            lambda: most_probable(Guesses(ROOT, [1], [1.0]), Guesses(ROOT, [2], [1.0]), 4),
            "different roots cannot merge: token 1 against 2",
        ),
    ],
)
def test_what_is_no_tree_is_refused_in_one_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)) as caught:
        make()
    assert "\n" not in str(caught.value)
