"""How large a tree to draft: the size whose tokens per step pay most at the step costs of this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

from foretell.backbone import Backbone
from foretell.backbone.step_costs import step_costs
from foretell.contracts import Draft, Row
from foretell.errors import UsageError, is_number
from foretell.trees.tree import ROOT

DEFAULT_NODES = 16
MODEST = {4: 1.5, 8: 1.7, 16: 1.85}
"""Tree size -> tokens per step, where nobody has measured what a drafter earns: as little as the least of ours."""


def tree_size(
    backbone: Backbone, nodes: int, tokens_per_step: Mapping[int, float], method: str, usual_cost: float, most: int
) -> Callable[[int, int], int]:
    """How large a tree to draft for (rows, context): `nodes` if given, else what pays most by the costs measured
    on this machine and the `tokens_per_step` of each size; 1 where no size pays. What drafting with `method` takes
    counts too, and is `usual_cost` plain steps until it is measured.

    Without `tokens_per_step` a drafter gets its try, with a tree of the size that would pay most of modest ones.
    Where costs cannot be known, trees have 16 nodes (one tile of the kernels).

    Raises:
        UsageError: `nodes` is more than the drafter's trees have.
    """
    if nodes:
        if not is_number(nodes, whole=True) or not 2 <= nodes <= most:
            raise UsageError(f"Its trees have 2 to {most} nodes, not {nodes}; choose another number of nodes.")
        return lambda rows, context: nodes
    costs = step_costs(backbone)
    if costs is None:
        return lambda rows, context: DEFAULT_NODES
    modest = {min(size, most): tokens for size, tokens in MODEST.items()}

    @cache
    def best(rows: int, context: int) -> int:
        drafting = costs.drafting.get(method, usual_cost * costs.of(rows, context, 1))
        if tokens_per_step:
            return costs.best_size(rows, context, tokens_per_step, drafting)
        rates = costs.rates(rows, context, modest, drafting)
        return max(rates, key=rates.__getitem__)

    return lambda rows, context: best(rows, context // 64 * 64)


def nothing(rows: Sequence[Row]) -> Draft:
    """The draft of a drafter whose trees do not pay here."""
    return Draft([ROOT] * len(rows), [[row.tokens[-1]] for row in rows], [[1.0] for _ in rows], held=True)
