"""Prompt lookup against a twin that scans the whole text, and its merging with another drafter's trees."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.contracts import Draft, Drafter
from foretell.drafters.prompt_lookup import FOLLOWS, PromptLookup, WithLookup, follows, with_lookup
from foretell.requests import SamplingParams
from foretell.trees import Guesses, TokenTree, chain


@dataclass
class Line:
    """What a drafter sees of a row."""

    tokens: list[int]
    slot: int = 0
    prompt_length: int = 1
    reused: int = 0
    params: SamplingParams = field(default_factory=SamplingParams)
    budget: int = 99


texts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def places(tokens: list[int], longest: int, shortest: int, count: int) -> list[tuple[int, int]]:
    """(where to copy from, tokens that match before it): longest matches first, then the latest.

    Matches are told apart as far as the table does, but for the choice of places as far as `longest` alone.
    """
    found = []
    for at in range(1, len(tokens)):
        lengths = (n for n in range(min(at, len(FOLLOWS)), 0, -1) if tokens[at - n : at] == tokens[-n:])
        match = next(lengths, 0)
        if match >= shortest:
            found.append((at, match))
    chosen = sorted(found, key=lambda each: (-min(each[1], longest), -each[0]))[:count]
    return sorted(chosen, key=lambda each: -each[1])


def every_guess(tokens: list[int], lookup: PromptLookup) -> dict[tuple[int, ...], float]:
    """Each continuation that some place suggests -> its probability, written out by definition."""
    copied = places(tokens, lookup.longest, lookup.shortest, lookup.candidates)
    futures = {tuple(tokens[at : at + n]) for at, _ in copied for n in range(1, len(tokens) - at + 1)}

    def value(future: tuple[int, ...]) -> float:
        out = 1.0
        for depth in range(len(future)):
            alive = [(at, m) for at, m in copied if tuple(tokens[at : at + depth]) == future[:depth]]
            continuations = [(tokens[at + depth], m + depth) for at, m in alive if at + depth < len(tokens)]
            rivals = list(dict.fromkeys(token for token, _ in continuations))
            match = next(m for token, m in continuations if token == future[depth])
            out *= follows(match, rivals.index(future[depth]))
        return out

    return {future: value(future) for future in futures}


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(1, 4), st.integers(0, 2), st.integers(1, 6), st.integers(2, 12), st.sampled_from([0.01, 0.1]))
def test_the_most_probable_continuations_are_drafted(
    tokens: list[int], shortest: int, more: int, candidates: int, nodes: int, least: float
) -> None:
    lookup = PromptLookup(shortest + more, shortest, candidates, nodes, least)
    lookup.reset([Line(tokens)])
    found = lookup.guesses(Line(tokens))
    twin = {future: value for future, value in every_guess(tokens, lookup).items() if value >= least}
    futures = [tuple(found.tokens[n] for n in found.tree.path(node)[1:]) for node in range(1, len(found.tokens))]
    assert len(set(futures)) == len(futures) == min(nodes - 1, len(twin))
    values = [math.prod(found.probabilities[n] for n in found.tree.path(node)) for node in range(1, len(found.tokens))]
    assert values == pytest.approx([twin[future] for future in futures])
    assert values == pytest.approx(sorted(twin.values(), reverse=True)[: len(values)])


@settings(max_examples=50, deadline=None)
@given(texts, st.integers(1, 39))
def test_a_text_that_grows_is_looked_up_like_a_new_one(tokens: list[int], first: int) -> None:
    grown, fresh = PromptLookup(), PromptLookup()
    grown.reset([Line(tokens)])
    fresh.reset([Line(tokens)])
    for length in range(min(first, len(tokens)), len(tokens) + 1, 3):
        grown.guesses(Line(tokens[:length]))
    assert grown.guesses(Line(tokens)) == fresh.guesses(Line(tokens))


def test_longer_matches_are_surer_and_rivals_less_sure() -> None:
    for row, further in itertools.pairwise(FOLLOWS):
        assert row[0] <= further[0]
    for row in FOLLOWS:
        assert list(row) == sorted(row, reverse=True)
    assert follows(99, 99) == FOLLOWS[-1][-1]


class Says(Drafter):
    """Drafts what it was told."""

    def __init__(self, tree: TokenTree, tokens: list[int], given: list[float] | None):
        self.last = tree, tokens, given

    def draft(self, rows: Any) -> Draft:
        tree, tokens, given = self.last
        return Draft([tree] * len(rows), [tokens] * len(rows), [given] * len(rows) if given else None)


def merged(inner: Says, tokens: list[int], **lookup: Any) -> Guesses:
    drafter, line = WithLookup(inner, **lookup), Line(tokens)
    drafter.reset([line])
    draft = drafter.draft([line])
    if draft.probabilities is None:
        assert draft.tokens == inner.draft([line]).tokens, "nothing was looked up"
        draft.probabilities = [[1.0] * len(ids) for ids in draft.tokens]
    return Guesses(draft.trees[0], draft.tokens[0], draft.probabilities[0])


TEXT = [5, 6, 7, 8, 9, 5, 6, 7]
"""8, 9, 5, 6, 7 will follow, says lookup."""


def test_sure_guesses_of_either_fill_the_tree() -> None:
    sure = Says(chain(3), [7, 1, 2, 3], [1.0, 0.99, 0.99, 0.99])
    assert merged(sure, TEXT).tokens == [7, 1, 2, 3]
    unsure = Says(chain(3), [7, 1, 2, 3], [1.0, 0.3, 0.3, 0.3])
    assert merged(unsure, TEXT).tokens == [7, 8, 9, 5]
    agreeing = Says(chain(3), [7, 8, 4, 3], [1.0, 0.9, 0.1, 0.1])
    assert merged(agreeing, TEXT) == Guesses(chain(3), [7, 8, 9, 5], [1.0, 0.9, follows(4, 0), follows(5, 0)])


def test_without_probabilities_lookup_takes_half() -> None:
    found = merged(Says(chain(5), [7, 1, 2, 3, 4, 0], None), TEXT)
    assert found.tokens == [7, 1, 2, 8, 9, 5]
    assert found.tree.parents == (-1, 0, 1, 0, 3, 4)
    nothing = merged(Says(chain(5), [3, 1, 2, 3, 4, 0], None), [1, 2, 3])
    assert nothing.tokens == [3, 1, 2, 3, 4, 0]


def test_a_drafter_that_guesses_nothing_leaves_all_to_lookup() -> None:
    line = Line(TEXT)
    alone = PromptLookup()
    alone.reset([line])
    for known in ([1.0], None):
        assert merged(Says(chain(0), [7], known), TEXT).tokens == alone.guesses(line).tokens
    assert with_lookup(alone) is alone
