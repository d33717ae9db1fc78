"""Rows that draft inside the verifying pass: which nodes of a tree get them, out of a budget.

Such a method (Hidden Transfer) inserts pseudo rows behind the nodes of a tree, and drafts the next tree from those of
the node at which the text leaves this one. Nobody knows before the pass which node that will be; rows behind all others
are lost. So a step of so many rows divides them: a drafted node earns a token now if its path comes true, and a pseudo
row earns tokens later if the text leaves the tree at its node.

How many levels a step has left for the next one is the state of a Markov chain, 0 to K. A step in state 0 has the root
alone, and can leave K levels. What a state is worth beyond state 0, in tokens, is its relative value in this chain,
whose reward is the tokens of a step. It is found on held-out guesses by policy iteration, since values choose how rows
are divided, and that decides the values. Parallel prompt decoding (arXiv 2405.18628) gives the nodes of fixed trees
their rows by such a chain; here a tree is grown at every step, and its rows divided by what its own guesses promise.

Legend: N nodes, the most probable first, K levels, S of them that a step has, R guesses of a level, P positions.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from foretell.trees.calibration import Floats, Scale, calibrated
from foretell.trees.search import Ranks

ITERATIONS = 4
MAX_STEPS = 2000
"""Steps over held-out text by which values are found."""
START, LEAST = 0.5, 1e-3
"""What the first level is thought to be worth before anything is known, and the share of it that it keeps if it turns
out worthless; each further one is worth half as much."""

Values = Sequence[float] | NDArray[np.float64]
"""What each state is worth in tokens, 0 to K; each level no more than the one before it."""
RankedPaths = tuple[list[int], list[tuple[int, int]], list[float]]
"""Parents, the (level, rank) of each node's guess, and the probability of its path; node 0 is the root."""


def most_probable_paths(log_probs_SR: Sequence[Sequence[float]], nodes: int) -> RankedPaths:
    """Returns the paths of the most probable guesses through levels, each of which guesses on its own.

    Args:
        log_probs_SR: of each level's guesses, best first.
        nodes: most nodes, root included.
    """
    parents, guesses, values = [-1], [(-1, 0)], [0.0]
    open_paths = [(-log_probs_SR[0][0], 0, 0, 0)] if len(log_probs_SR) else []  # (-value, parent, level, rank)
    while open_paths and len(parents) < nodes:
        cost, parent, level, rank = heappop(open_paths)
        if level + 1 < len(log_probs_SR):
            heappush(open_paths, (cost - log_probs_SR[level + 1][0], len(parents), level + 1, 0))
        if rank + 1 < len(log_probs_SR[level]):
            heappush(open_paths, (-values[parent] - log_probs_SR[level][rank + 1], parent, level, rank + 1))
        parents.append(parent)
        guesses.append((level, rank))
        values.append(-cost)
    return parents, guesses, np.exp(values).tolist()


def drafted_nodes(parents: Sequence[int], path_p: Sequence[float], rows: int, values: Values) -> int:
    """Returns how many of the most probable nodes to draft, root included, if pseudo rows take the rest of `rows`.

    Args:
        path_p: the probability of each node's path, falling.
    """
    gains = [float(more - less) for less, more in pairwise(values)]
    leaves, worth = list[float](), list[float]()  # probabilities of ending at each node; of all pseudo rows, ascending
    drafted, best, chosen = 0.0, -math.inf, 0
    for node, (parent, p) in enumerate(zip(parents[:rows], path_p, strict=False)):
        if node:
            for gain in gains:
                del worth[bisect_left(worth, leaves[parent] * gain)]
            leaves[parent] = max(0.0, leaves[parent] - p)
        leaves.append(p)
        for changed in (node, parent) if node else (node,):
            for gain in gains:
                insort(worth, leaves[changed] * gain)
        drafted, left = drafted + p, rows - 1 - node
        if (tokens := drafted + sum(worth[-left:] if left else ())) > best:
            best, chosen = tokens, node + 1
    return chosen


def pseudo_rows(parents: Sequence[int], path_p: Sequence[float], rows: int, values: Values) -> list[int]:
    """Returns how many pseudo rows each node of a tree gets of `rows` in all, at most K each.

    Args:
        parents, path_p: as `drafted_nodes` takes them, in any order.
    """
    leaves, counts = list(path_p), [0] * len(parents)
    for node, parent in enumerate(parents[1:], start=1):
        leaves[parent] -= path_p[node]
    gains = [float(more - less) for less, more in pairwise(values)]
    worth = [(-p * gain, node) for node, p in enumerate(leaves) for gain in gains if p * gain > 0]
    for _, node in sorted(worth)[:rows]:
        counts[node] += 1
    return counts


def fit_values(
    ranks: Sequence[Ranks], log_probs: Sequence[Floats], scales: Sequence[Scale], rows: int
) -> tuple[list[float], float]:
    """Returns what each state is worth to steps of `rows` rows, and their tokens per step by the chain.

    Args:
        ranks: per text [P, K] as in `trees.search`: rank of the token at p + k + 2 among the guesses of level k at p.
        log_probs: per text [P, K, R], of these guesses; scales: their calibration, or none.
    """
    start_K = START * 0.5 ** np.arange(ranks[0].shape[1])
    values = np.concatenate([[0.0], np.cumsum(start_K)])
    texts = [(of_text, _calibrated(guessed, scales)) for of_text, guessed in zip(ranks, log_probs, strict=True)]
    grown: dict[tuple[int, int, int], RankedPaths] = {}  # they do not depend on values
    for _ in range(ITERATIONS):
        values, _ = _relative_values(*_chain(texts, rows, values, grown))
    if (
        values[-1] < LEAST * start_K.sum()
    ):  # rows that guess nothing right still have to be written, or nothing would ever be drafted
        values = np.concatenate([[0.0], np.cumsum(LEAST * start_K)])
    return values.tolist(), _relative_values(*_chain(texts, rows, values, grown))[1]


def _calibrated(log_probs_PKR: Floats, scales: Sequence[Scale]) -> Floats:
    found = [calibrated(log_probs_PKR[:, k], scale) for k, scale in enumerate(scales)]
    return np.stack(found, 1) if found else log_probs_PKR


def _chain(
    texts: Sequence[tuple[Ranks, Floats]], rows: int, values: NDArray[np.float64],
    grown: dict[tuple[int, int, int], RankedPaths],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # fmt: skip
    """Mean tokens of a step in each state, and how often each state follows, at the places where steps begin."""
    states = len(values)
    rewards, moves, steps = np.zeros(states), np.zeros((states, states)), 0
    for number, (ranks_PK, log_probs_PKR) in enumerate(texts):
        place = state = 0
        while place < len(ranks_PK) and steps < MAX_STEPS:
            ends = list[tuple[int, int]]()
            for s in range(states):
                if (number, place, s) not in grown:
                    grown[number, place, s] = most_probable_paths(log_probs_PKR[place, :s].tolist(), rows)
                ends.append(step(grown[number, place, s], ranks_PK[place], rows, values))
            for s, (tokens, left) in enumerate(ends):
                rewards[s] += tokens
                moves[s, left] += 1
            steps += 1
            tokens, state = ends[state]
            place += tokens
    return rewards / max(1, steps), moves / max(1, steps)


def step(paths: RankedPaths, ranks_K: NDArray[np.integer], rows: int, values: Values) -> tuple[int, int]:
    """Returns the tokens of one step, bonus included, and the levels that it leaves.

    Args:
        paths: the most probable ones, `rows` of them; ranks_K: of the true tokens.
    """
    parents, guesses, path_p = paths
    count = drafted_nodes(parents, path_p, rows, values)
    counts = pseudo_rows(parents[:count], path_p[:count], rows - count, values)
    nodes = {(parents[node], *guesses[node]): node for node in range(1, count)}
    node = accepted = 0
    while accepted < len(ranks_K) and (node, accepted, int(ranks_K[accepted])) in nodes:
        node = nodes[node, accepted, int(ranks_K[accepted])]
        accepted += 1
    return accepted + 1, counts[node]


def _relative_values(rewards: NDArray[np.float64], moves: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Solves value + mean = reward + the next state's value, with value 0 for state 0 (Howard 1960).

    Each level is worth no less than nothing, and no more than the one before it.
    """
    states = len(rewards)
    equations = np.eye(states) - moves
    equations[:, 0] = 1.0  # in the place of state 0's value: the mean
    found = np.linalg.lstsq(equations, rewards, rcond=None)[0]
    gains = np.minimum.accumulate(np.maximum(np.diff(np.concatenate([[0.0], found[1:]])), 0.0))
    return np.concatenate([[0.0], np.cumsum(gains)]), float(found[0])
