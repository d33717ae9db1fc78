"""Costs of steps, refined while decoding: a step with guesses is compared with plain steps taken just before it.

The governor takes some plain steps whenever it compares. Those that follow within a few steps ran on the same machine,
however busy it was, so that their relation can be learnt where seconds could not.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from foretell.backbone import Backbone
from foretell.backbone.step_costs import FIRST_CONTEXT, known_costs, save_learnt
from foretell.contracts import Drafter

PLAIN, NEAR = 3, 16
"""Plain steps that are compared with, and steps after the last of them that are."""
ALIKE = 0.2
"""Steps are not compared where their contexts differ by more than this share: another request's may."""


class CostLearning:
    """Passes what steps cost to the table by which this process chooses trees, if it does."""

    def __init__(self, backbone: Backbone, drafter: Drafter):
        self._backbone, self._drafter = backbone, drafter
        self._rows = self._context = 0  # of the plain steps
        self._plain: deque[float] = deque(maxlen=PLAIN)
        self._since = 0  # steps since the last plain one
        self._drafted = False  # whether the drafter drafted in the step before

    def record(self, rows: int, context: int, nodes: float, verifying: float, drafting: float) -> None:
        """Records a step.

        Args:
            context: the mean of the rows. nodes: of all rows. verifying, drafting: seconds; 0 drafting teaches nothing.
        """
        drafted, self._drafted = self._drafted, nodes > rows and drafting > 0
        if rows != self._rows or abs(context - self._context) > ALIKE * (self._context + FIRST_CONTEXT):
            self._plain.clear()
        if nodes == rows:
            self._since, self._rows, self._context = 0, rows, context
            self._plain.append(verifying)
            return
        self._since += 1
        costs = known_costs(self._backbone)
        if costs is None or len(self._plain) < PLAIN or self._since > NEAR or not (unit := median(self._plain)):
            return
        # a first draft reads all that was committed since the drafter drafted last
        method = self._drafter.method if drafting and drafted else ""
        usual = self._drafter.usual_cost
        costs.learn(rows, context, nodes / rows, verifying / unit, drafting / unit, method, usual)
        save_learnt(self._backbone, costs)
