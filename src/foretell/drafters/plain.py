"""One token per step: a tree that is only its root. The truth that every other drafter must reproduce."""

from __future__ import annotations

from collections.abc import Sequence

from foretell.contracts import Draft, Drafter, Row
from foretell.trees.tree import ROOT


class Plain(Drafter):
    """Guesses nothing."""

    @property
    def max_nodes(self) -> int:
        return 1

    def draft(self, rows: Sequence[Row]) -> Draft:
        return Draft([ROOT] * len(rows), [[row.tokens[-1]] for row in rows])
