"""The methods: one file each, one row each in this table.

A row is "module:Class" and a line of help; the module is imported when the drafter is first used. `register` adds
a row from outside, with nothing else to edit: command line, benchmark and server read this table.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from foretell.errors import UsageError

if TYPE_CHECKING:
    from foretell.backbone import Backbone
    from foretell.contracts import Drafter

DRAFTERS: dict[str, tuple[str | type[Drafter], str]] = {
    "plain": ("foretell.drafters.plain:Plain", "one token per step: the baseline"),
    "prompt_lookup": ("foretell.drafters.prompt_lookup:PromptLookup", "repeats what followed the same words before"),
    "medusa": ("foretell.drafters.medusa:Medusa", "trained heads that guess the tokens after the next"),
    "medusa2": ("foretell.drafters.medusa2:Medusa2", "Medusa's heads, and a backbone that learnt with them"),
    "hydra": ("foretell.drafters.hydra.drafter:Hydra", "heads that read the guesses before theirs"),
    "hydra++": (
        "foretell.drafters.hydra.drafter:HydraPlus",
        "Hydra's heads behind a layer that attends to the whole text",
    ),
    "kangaroo": ("foretell.drafters.kangaroo:Kangaroo", "the lower layers draft, through a trained adapter"),
    "swift": ("foretell.drafters.swift:Swift", "drafts with sublayers left out, chosen while decoding"),
    "layerskip": ("foretell.drafters.layerskip:LayerSkip", "drafts by leaving the model at an early layer"),
    "del": ("foretell.drafters.dynamic_exit:DEL", "leaves at whichever layer has lately paid best"),
}

USUAL = {1: 1.0, 8: 1.25, 16: 1.3}
"""Nodes -> what a step of so many costs beside one of one node, on machines that were measured."""
CONTEXT = 512
"""Tokens of the text for which the recommended drafter is chosen."""


def register(name: str, drafter: type[Drafter] | str, help: str) -> None:
    """Adds a drafter under a name: a class, or "module:Class" to be imported when it is used."""
    if name in DRAFTERS:
        raise UsageError(f"A drafter named {name!r} exists already; choose another name.")
    DRAFTERS[name] = (drafter, help)


def drafter_class(name: str) -> type[Drafter]:
    """The class behind a name.

    Raises:
        UsageError: for an unknown name, with near ones.
    """
    if name not in DRAFTERS:
        near = get_close_matches(name, DRAFTERS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"Unknown drafter {name!r}: {hint}the drafters are {', '.join(sorted(DRAFTERS))}.")
    target = DRAFTERS[name][0]
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def build(name: str, backbone: Backbone, lookup: bool = False, **options: Any) -> Drafter:
    """Makes the drafter `name` for a backbone; `lookup` merges candidates of prompt lookup into its trees.

    Raises:
        UsageError: for an unknown name or an option that it does not have.
    """
    from foretell.drafting.options import parse

    cls = drafter_class(name)
    parsed = parse(cls.Options, options, f"Drafter {name!r}")
    drafter = cls.build(backbone, parsed)
    if not lookup:
        return drafter
    from foretell.drafters.prompt_lookup import prices_of, with_lookup

    sized = getattr(parsed, "nodes", 0) or getattr(parsed, "tree", "")  # a size that was given holds
    return with_lookup(drafter, None if sized else prices_of(backbone))


def recommended(backbone: Backbone) -> str:
    """The best drafter that needs nothing but foretell: one trained for this backbone, else prompt lookup.

    Of several, the one of most tokens per second by what steps cost here, or elsewhere where that cannot be known; and
    by what drafting costs, as `foretell tune` measured, or usually where it has not measured all of them.
    """
    from foretell.backbone.step_costs import StepCosts, step_costs
    from foretell.drafting.checkpoint import shipped, tokens_per_step

    mine = shipped(backbone)
    if not mine:
        return "prompt_lookup"
    costs = step_costs(backbone) or StepCosts({1: {CONTEXT: USUAL}})
    drafting = {method: drafter_class(method).usual_cost * costs.of(1, CONTEXT, 1) for method in mine}
    if costs.drafting.keys() >= mine.keys():
        drafting = costs.drafting

    def rate(method: str) -> float:
        rates = costs.rates(1, CONTEXT, tokens_per_step(mine[method]), drafting[method])
        return max(rates.values(), default=0.0)

    return max(mine, key=rate)
