"""Notes on speculation: one sentence where it was held back, or was slower than plain decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foretell.cli.terminal import note

if TYPE_CHECKING:
    from foretell.backbone import Backbone
    from foretell.requests import Statistics


def note_held_back(sums: Statistics, backbone: Backbone) -> None:
    """Prints a note if speculation was held back."""
    if sentence := held_back(sums, backbone):
        note(sentence)


def held_back(sums: Statistics, backbone: Backbone) -> str:
    """Returns one sentence if speculation was held back, else an empty text."""
    if not sums.suspended_steps:
        return ""
    return f"Speculation was held back in {_steps(sums)}, where it does not pay on this machine{_remedy(backbone)}."


def verdict(speed: float, sums: Statistics, backbone: Backbone) -> str:
    """Returns one sentence if speculation was slower than plain decoding or was held back, else an empty text.

    Args:
        speed: tokens per second, relative to plain decoding's.
        sums: statistics of the answer that was decoded with a drafter.
    """
    if round(speed, 2) >= 1:
        return held_back(sums, backbone)
    slower = f"Speculation does not pay for this answer on this machine ({speed:.2f} times plain decoding's speed): "
    if sums.suspended_steps:
        done = f"plain steps were taken instead in {_steps(sums)}"
    elif not sums.drafted:
        return slower + "nothing was guessed, so both ways took plain steps."
    else:
        done = "the answer is too short, or the loss too small, for plain steps to have been taken instead"
    return f"{slower}{done}{_remedy(backbone)}."


def _steps(sums: Statistics) -> str:
    return f"{sums.suspended_steps} of {sums.steps} steps"


def _remedy(backbone: Backbone) -> str:
    """Names `foretell tune`, unless it has run."""
    from foretell.backbone.step_costs import StepCosts

    costs = StepCosts.load(backbone.costs) if backbone.costs else None
    tuned = costs is not None and not costs.first
    return "" if tuned else "; `foretell tune` measures steps more closely, and trees are chosen by it"
