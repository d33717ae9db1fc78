"""Where drafting has run the first nodes of each tree, and others follow: states stay with their nodes."""

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from random_backbones import examples
from torch import Tensor

from foretell.contracts import Resume

counts = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4)


def states(names: Sequence[tuple[int, int]], offset: int = 0) -> Tensor:
    """One state per (row, node), which names both."""
    return torch.tensor([[offset + 100.0 * row + node] * 2 for row, node in names]).reshape(len(names), 2)


@examples(100)
@given(counts)
def test_the_engines_nodes_follow_those_that_drafting_ran_in_each_row(sizes: list[tuple[int, int]]) -> None:
    first = [(row, node) for row, (ran, _) in enumerate(sizes) for node in range(ran)]
    others = [(row, node) for row, (ran, more) in enumerate(sizes) for node in range(ran, ran + more)]
    every = [(row, node) for row, (ran, more) in enumerate(sizes) for node in range(ran + more)]
    resume = Resume(3, [ran for ran, _ in sizes], states(first), {1: states(first, 7)})
    joined = resume.joined([more for _, more in sizes], states(others), {1: states(others, 7), 2: states(others)})
    assert joined.layer == 3
    assert joined.ran == [ran + more for ran, more in sizes]
    assert torch.equal(joined.hidden_Rd, states(every))
    assert list(joined.taps) == [1]
    assert torch.equal(joined.taps[1], states(every, 7))


@examples(100)
@given(counts, st.data())
def test_some_nodes_are_kept_in_a_new_order(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    first = [(row, node) for row, (ran, _) in enumerate(sizes) for node in range(ran)]
    chosen = [data.draw(st.permutations(range(ran)))[: data.draw(st.integers(0, ran))] for ran, _ in sizes]
    kept = Resume(2, [ran for ran, _ in sizes], states(first), {0: states(first, 5)}).kept(chosen)
    names = [(row, node) for row, nodes in enumerate(chosen) for node in nodes]
    assert (kept.layer, kept.ran) == (2, list(map(len, chosen)))
    assert torch.equal(kept.hidden_Rd, states(names))
    assert torch.equal(kept.taps[0], states(names, 5))
