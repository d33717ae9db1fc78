"""Division of a step's rows between drafted nodes and pseudo rows, against enumeration and against decoding itself."""

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretell.trees.calibration import calibrated
from foretell.trees.pseudo_rows import drafted_nodes, fit_values, most_probable_paths, pseudo_rows, step
from foretell.trees.search import ENDED, MISSED

seeds = st.integers(0, 10_000)


def some_levels(rng: np.random.Generator, levels: int, width: int) -> np.ndarray:
    """Log-probabilities [S, R] of levels, best first, each adding up to less than 1."""
    p = rng.dirichlet(np.full(width + 1, 0.6), size=levels)[:, :width]
    return np.log(-np.sort(-p, axis=1) + 1e-9)


def rising(rng: np.random.Generator, levels: int) -> list[float]:
    """Values of states 0 to K, each level worth no more than the one before it."""
    return [0.0, *np.cumsum(-np.sort(-rng.random(levels))).tolist()]


@given(seeds)
def test_paths_are_the_most_probable_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = some_levels(rng, int(rng.integers(1, 4)), int(rng.integers(1, 5)))
    nodes = int(rng.integers(1, 12))
    parents, guesses, path_p = most_probable_paths(levels.tolist(), nodes)
    every = [
        math.exp(sum(levels[level, rank] for level, rank in enumerate(ranks)))
        for depth in range(1, len(levels) + 1)
        for ranks in product(range(levels.shape[1]), repeat=depth)
    ]
    assert path_p == pytest.approx([1.0, *sorted(every, reverse=True)[: nodes - 1]])
    assert parents[0] == -1
    for node in range(1, len(parents)):
        level, rank = guesses[node]
        assert parents[node] < node
        assert level == guesses[parents[node]][0] + 1
        assert path_p[node] == pytest.approx(path_p[parents[node]] * math.exp(levels[level, rank]))
    assert len(set(zip(parents, guesses, strict=True))) == len(parents)


def test_no_levels_are_the_root_alone() -> None:
    assert most_probable_paths([], 8) == ([-1], [(-1, 0)], [1.0])


def worth(parents: list[int], path_p: list[float], counts: list[int], values: list[float]) -> float:
    """Tokens that a step is expected to emit besides the bonus, and what it leaves behind; by the definition."""
    total = 0.0
    for node, count in enumerate(counts):
        stays = path_p[node] - sum(p for p, parent in zip(path_p, parents, strict=True) if parent == node)
        total += (path_p[node] if node else 0.0) + max(0.0, stays) * values[count]
    return total


@given(seeds)
def test_no_other_division_among_the_most_probable_nodes_is_worth_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels, rows = int(rng.integers(1, 4)), int(rng.integers(2, 7))
    values = rising(rng, levels)
    given_levels = some_levels(rng, int(rng.integers(0, levels + 1)), 3).tolist()
    parents, _, path_p = most_probable_paths(given_levels, rows)
    count = drafted_nodes(parents, path_p, rows, values)
    counts = pseudo_rows(parents[:count], path_p[:count], rows - count, values)
    assert len(counts) == count
    assert count + sum(counts) <= rows
    assert max(counts) <= levels
    ours = worth(parents[:count], path_p[:count], counts, values)
    for nodes in range(1, min(rows, len(parents)) + 1):
        every = [(n, k) for n in range(nodes) for k in range(levels)]
        for places in combinations(every, min(rows - nodes, len(every))):
            other = [sum(node == n for node, _ in places) for n in range(nodes)]
            assert worth(parents[:nodes], path_p[:nodes], other, values) <= ours + 1e-9


def some_texts(seed: int, levels: int = 3, texts: int = 8, length: int = 200) -> tuple[list, list]:
    """Guesses whose probabilities are right: ranks are drawn from them."""
    rng = np.random.default_rng(seed)
    ranks, log_probs = [], []
    for _ in range(texts):
        of_text = np.stack(
            [some_levels(rng, levels, 5) * (1 + 0.2 * np.arange(levels)[:, None]) for _ in range(length)]
        )
        drawn = np.full((length, levels), MISSED)
        for place, k in product(range(length), range(levels)):
            p = np.exp(of_text[place, k])
            rank = int(rng.choice(6, p=np.array([*p, max(0.0, 1 - p.sum())]) / max(p.sum(), 1.0)))
            drawn[place, k] = rank if rank < 5 else MISSED
        for k in range(1, levels):
            drawn[length - k :, k] = ENDED
        ranks.append(drawn)
        log_probs.append(of_text)
    return ranks, log_probs


def walked(ranks: list, log_probs: list, rows: int, values: list[float]) -> float:
    """Tokens per step of decoding the texts with these values."""
    steps = tokens = 0
    for of_text, guessed in zip(ranks, log_probs, strict=True):
        place = state = 0
        while place < len(of_text):
            paths = most_probable_paths(guessed[place, :state].tolist(), rows)
            emitted, state = step(paths, of_text[place], rows, values)
            place, steps = place + emitted, steps + 1
        tokens += len(of_text)
    return tokens / steps


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4, 8, 16])
def test_the_chain_tells_the_tokens_per_step_of_decoding(rows: int) -> None:
    ranks, log_probs = some_texts(rows)
    values, expected = fit_values(ranks, log_probs, [], rows)
    assert len(values) == 4
    assert values[0] == 0.0
    gains = np.diff(values)
    assert (gains >= 0).all()
    assert (np.diff(gains) <= 1e-12).all()
    assert expected == pytest.approx(walked(ranks, log_probs, rows, values), rel=0.05)
    # no worse than giving pseudo rows nothing, or everything
    for others in ([0.0, 1e-6, 2e-6, 3e-6], [0.0, 10.0, 20.0, 30.0]):
        assert walked(ranks, log_probs, rows, values) >= walked(ranks, log_probs, rows, others) - 0.02


def test_values_are_of_calibrated_guesses() -> None:
    ranks, log_probs = some_texts(1, texts=2, length=24)
    scales = [(0.5, -1.0), (1.5, 0.5), (2.0, 0.0)]
    by_hand = [np.stack([calibrated(each[:, k], scale) for k, scale in enumerate(scales)], 1) for each in log_probs]
    assert fit_values(ranks, log_probs, scales, 8) == fit_values(ranks, by_hand, [], 8)
    assert fit_values(ranks, log_probs, scales, 8) != fit_values(ranks, log_probs, [], 8)


def test_levels_that_are_never_right_are_worth_next_to_nothing() -> None:
    """But not nothing: a drafter whose rows had no worth would leave none, and never draft again."""
    ranks, log_probs = some_texts(1, texts=1, length=24)
    values, tokens = fit_values([np.full_like(each, MISSED) for each in ranks], log_probs, [], 8)
    assert tokens == pytest.approx(1.0)
    assert 0 < values[1] < values[3] < 1e-2
    assert pseudo_rows([-1], [1.0], 8, values) == [3]
    assert pseudo_rows([-1, 0], [1.0, 1.0], 8, [0.0, 1.0, 1.0, 1.0]) == [
        0,
        1,
    ]  # neither a node that is not left nor a level
