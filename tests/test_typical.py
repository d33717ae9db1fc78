"""Typical acceptance against its definition, and the ends of its thresholds."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_backbones import drafts, examples
from torch import Tensor
from toy_drafters import union

from foretell.contracts import Draft, Verdict
from foretell.errors import UsageError
from foretell.trees import TokenTree, chain
from foretell.verify import Typical, typical, walk

VOCAB = 5


def typical_twin(tree: TokenTree, tokens: list[int], logits: Tensor, rule: Typical) -> tuple[list[int], int]:
    """Every node's path judged from scratch; of the longest accepted ones the most probable, then the first."""
    best: tuple[int, float, int] = (0, 0.0, 0)
    for node in range(1, len(tree)):
        path, score, passes = tree.path(node), 0.0, True
        for parent, child in pairwise(path):
            p = (logits[parent].double() / rule.temperature).softmax(0).tolist()
            entropy = -sum(x * math.log(x) for x in p if x > 0)
            x = p[tokens[child]]
            passes = passes and x > min(rule.epsilon, rule.delta * math.exp(-entropy))
            score += math.log(x) if x > 0 else -math.inf
        if passes:
            best = max(best, (len(path) - 1, round(score, 4), -node))
    return tree.path(-best[2]), int(logits[-best[2]].argmax())


rules = st.builds(
    Typical, st.sampled_from([0.0, 0.09, 0.3, 2.0]), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.3, 0.7, 1.0])
)


@examples(150)
@given(drafts(16, VOCAB), rules, st.integers(0, 999))
def test_typical_acceptance_is_its_definition(draft: Draft, rule: Typical, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(len(tree), VOCAB, generator=generator) for tree in draft.trees]
    verdict = typical(draft, logits, rule)
    for row, (tree, tokens) in enumerate(zip(draft.trees, draft.tokens, strict=True)):
        path, bonus = typical_twin(tree, tokens, logits[row], rule)
        assert len(verdict.paths[row]) == len(path)
        assert [tokens[n] for n in verdict.paths[row]] == [tokens[n] for n in path]
        assert tree.path(verdict.paths[row][-1]) == verdict.paths[row]
        if verdict.paths[row] == path:
            assert verdict.bonus[row] == bonus
        else:  # alike siblings may tie; the first is taken
            assert verdict.paths[row][-1] < path[-1]


@examples(40)
@given(drafts(16, VOCAB), st.integers(0, 999))
def test_the_ends_of_the_thresholds(draft: Draft, seed: int) -> None:
    pairs = [union(tree, ids, chain(0), ids) for tree, ids in zip(draft.trees, draft.tokens, strict=True)]
    draft = Draft([tree for tree, _ in pairs], [ids for _, ids in pairs])  # siblings differ, so paths are unique
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.rand(len(tree), VOCAB, generator=generator).argsort(1).float() for tree in draft.trees]
    none = typical(draft, logits, Typical(epsilon=1.5, delta=VOCAB + 1.0, temperature=1.0))
    assert none.paths == [[0]] * len(logits)
    assert none.bonus == [int(x[0].argmax()) for x in logits]
    everything = typical(draft, logits, Typical(epsilon=0.0, temperature=1.0))
    assert [len(path) - 1 for path in everything.paths] == [tree.height for tree in draft.trees]
    cold = typical(draft, logits, Typical(temperature=1e-2))
    assert cold == walk(draft, [x.argmax(1).tolist() for x in logits])


def test_an_impossible_guess_is_never_typical() -> None:
    logits_NV = torch.tensor([[0.0, -math.inf, 0.0], [0.0, 0.0, 0.0]])
    verdict = typical(Draft([chain(1)], [[0, 1]]), [logits_NV], Typical(epsilon=0.0, delta=0.0))
    assert verdict == Verdict([[0]], [0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epsilon": -0.1}, "at least 0, not ε=-0.1"),
        ({"delta": math.nan}, "at least 0, not ε=0.09, δ=nan"),
        ({"temperature": 0.0}, "temperature above 0.*not 0.0"),
        ({"temperature": 101.0}, "at most 100.*not 101.0"),
    ],
)
def test_thresholds_out_of_range_are_refused(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Typical(**options)
