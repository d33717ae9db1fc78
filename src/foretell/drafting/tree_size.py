"""How large a tree to draft: the size whose tokens per step pay most at the step costs of this machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import count
from statistics import fmean
from typing import Protocol

from foretell.backbone import Backbone
from foretell.backbone.step_costs import step_costs
from foretell.contracts import Draft, Row
from foretell.errors import UsageError, is_number
from foretell.requests import SamplingParams
from foretell.trees.tree import ROOT

DEFAULT_NODES = 16
MODEST = {4: 1.5, 8: 1.7, 16: 1.85}
"""Tree size -> tokens per step assumed of a drafter that was not measured: as few as the worst measured one has."""
PROBED = 512
"""Of so many steps of one row in which no tree is thought to pay, the last two have small ones, by which costs are
learnt: the second tells what drafting takes."""


class TreeSize(Protocol):
    def __call__(self, rows: int, context: int, unread: int = 0, left: float = math.inf, share: float = 1.0) -> int:
        """Returns the nodes of each row's tree, root included.

        Args:
            context: tokens of the longest row.
            unread: committed states of all rows that the drafter reads first, through a layer of its own.
            left: tokens that the longest row may still emit.
            share: what sampling leaves of the tokens that guesses add to a greedy step.
        """
        ...


def tree_size(
    backbone: Backbone, nodes: int, tokens_per_step: Mapping[int, float], method: str, usual_cost: float,
    max_nodes: int, node_cost: float = 1.0,
) -> TreeSize:  # fmt: skip
    """Returns the rule by which a drafter chooses how large its trees are.

    The size is `nodes` if given, else the one with the most tokens per second at the step costs of this machine, and 1
    if no size pays, or not for the few tokens left: a long prompt must be read before its first draft. While the costs
    are a first reading, which may be wrong, a small tree is drafted for a single row now and then all the same. Where
    step costs cannot be known, it is 16 (one tile of the kernels).

    Args:
        tokens_per_step: of each size, greedy; if empty, modest ones are assumed, and that no tree pays is not believed.
        method: its measured drafting time counts too; usual_cost: in plain steps, until it is measured.
        max_nodes: the largest tree.
        node_cost: see `Drafter`.

    Raises:
        UsageError: `nodes` is more than the drafter's trees have.
    """
    if nodes:
        if not is_number(nodes, whole=True) or not 2 <= nodes <= max_nodes:
            raise UsageError(f"Its trees have 2 to {max_nodes} nodes, not {nodes}; choose another `nodes=`.")
        return lambda rows, context, unread=0, left=math.inf, share=1.0: nodes
    costs = step_costs(backbone)
    if costs is None:
        return lambda rows, context, unread=0, left=math.inf, share=1.0: DEFAULT_NODES
    modest = {min(size, max_nodes): tokens for size, tokens in MODEST.items()}

    @lru_cache
    def best(rows: int, context: int, share: float, learnt: int) -> tuple[int, float]:
        """The best size, and how many tokens it must be used for to make up for a state that is read before.

        Where nothing is known to be saved, reading is not held against it: what nobody has measured gets its try.
        """
        drafting = costs.drafting_of(method, rows, context)
        if drafting is None:
            drafting = usual_cost * costs.of(rows, context, 1)
        tokens = {size: 1 + share * (greedy - 1) for size, greedy in (tokens_per_step or modest).items()}
        rates = costs.rates(rows, context, tokens, drafting, node_cost)
        nodes = max(rates, key=rates.__getitem__)
        if tokens_per_step:
            nodes = costs.best_size(rows, context, tokens, drafting, node_cost)
        saved = 1 / costs.rate(rows, context, 1, 1.0) - 1 / rates[nodes] if nodes > 1 else 0.0  # seconds a token
        return nodes, costs.node(rows, context) / backbone.config.layers / saved if saved > 0 else 0.0

    held = count()

    def size(rows: int, context: int, unread: int = 0, left: float = math.inf, share: float = 1.0) -> int:
        nodes, tokens_per_state = best(rows, context // 64 * 64, round(share, 2), costs.learnt)
        nodes = nodes if unread * tokens_per_state <= left else 1
        probes = nodes == 1 and rows == 1 and costs.first and next(held) % PROBED >= PROBED - 2
        return min(modest) if probes else nodes

    return size


def size_for(size: TreeSize, rows: Sequence[Row], unread: int = 0) -> int:
    """Returns the size of the trees of a batch whose drafter has `unread` states to read first."""
    context, left = max(len(row.tokens) for row in rows), max(row.budget for row in rows)
    return size(len(rows), context, unread, left, fmean(left_by_sampling(row.params) for row in rows))


def left_by_sampling(params: SamplingParams) -> float:
    """Returns the share that sampling leaves of the tokens that guesses add to a greedy step, by experience.

    Fitted to what Medusa, Hydra++ and Kangaroo keep at temperature 1, with truncation and without (docs/log.md); below
    it, two of them keep more.
    """
    lost = 0.55 * params.temperature**2 * params.top_p**3 / (1 + 25 * params.min_p)
    if params.top_k:
        lost *= params.top_k / (params.top_k + 10)
    return max(0.0, 1 - lost)


def no_guesses(rows: Sequence[Row]) -> Draft:
    """Returns the draft of a drafter whose trees do not pay here, or no more for the tokens left: roots alone."""
    return Draft([ROOT] * len(rows), [[row.tokens[-1]] for row in rows], [[1.0] for _ in rows], held=True)
