"""The drafter to use where the user names none: the fastest that ships for the model, by step costs on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from statistics import median

from foretell.backbone import Backbone
from foretell.backbone.step_costs import StepCosts, step_costs
from foretell.drafters import drafter_class
from foretell.drafting.checkpoint import shipped, tokens_per_step

USUAL = {1: 1.0, 8: 1.25, 16: 1.3}
"""Typical cost of a step by its nodes, relative to a step of one node."""
CONTEXT = 512
"""Context length, in tokens, at which drafters are compared."""


@dataclass(frozen=True)
class Recommendation:
    """The drafter to use where none is named, and why.

    Attributes:
        name: of the drafter.
        gains: drafter that ships for this model -> estimated tokens per second relative to plain decoding, best first.
        source: where the costs behind the estimates come from.
    """

    name: str
    gains: dict[str, float]
    source: str

    def __str__(self) -> str:
        if not self.gains:
            return f"{self.name}: no trained drafter comes with foretell for this model"
        others = ", ".join(f"{name} {gain:.2f}x" for name, gain in self.gains.items() if name != self.name)
        best = f"{self.name}: estimated at {self.gains[self.name]:.2f}x plain decoding by {self.source}"
        off = ", so steps stay plain where that holds" if self.gains[self.name] < 0.995 else ""
        return best + off + (f"; {others}" if others else "")


def recommend(backbone: Backbone) -> Recommendation:
    """Chooses the best drafter that needs nothing but foretell: one that ships for this backbone, else prompt lookup.

    Of several, takes the one with the highest estimated tokens per second. Step costs are those measured here, else
    typical ones; so are drafting costs, and where some are measured, those of the others are scaled alike.
    """
    folders = shipped(backbone)
    if not folders:
        return Recommendation("prompt_lookup", {}, "")
    known = step_costs(backbone)
    costs = known or StepCosts({1: {CONTEXT: USUAL}})
    plain = costs.of(1, CONTEXT, 1)
    usual = {method: drafter_class(method).usual_cost * plain for method in folders}
    measured = {method: costs.drafting_of(method, 1, CONTEXT) for method in folders}
    drafting = {method: seconds for method, seconds in measured.items() if seconds is not None}
    slower = median([seconds / usual[method] for method, seconds in drafting.items()] or [1.0])
    drafting = {method: slower * usual[method] for method in folders} | drafting

    def gain(method: str) -> float:
        node_cost = drafter_class(method).node_cost
        rates = costs.rates(1, CONTEXT, tokens_per_step(folders[method]), drafting[method], node_cost)
        return plain * max(rates.values(), default=0.0)

    gains = dict(sorted(((method, gain(method)) for method in folders), key=lambda pair: -pair[1]))
    return Recommendation(next(iter(gains)), gains, _source(backbone, known))


def _source(backbone: Backbone, costs: StepCosts | None) -> str:
    """Names the source of step costs."""
    if costs is None:
        return "what steps usually cost"
    if costs.first or backbone.costs is None or not backbone.costs.is_file():
        return "a first reading of step costs here (`foretell tune` measures them closely)"
    day = datetime.fromtimestamp(backbone.costs.stat().st_mtime).date()
    return f"the costs that `foretell tune` measured here on {day}"
