"""Segments of a text: runs of tokens that the model could hardly have written otherwise share one slot.

A token joins the segment before it where the model was nearly sure of it; HAMburger's released rule (`falling`) also
takes a token that is much surer than the least sure one of the segment. Prompts are not segmented. HAMburger,
arXiv 2505.20438; rules and thresholds are those of its code, where `falling` is called decreasing_v2, `ratio`
decreasing, and `sure` small_group, or sliding with another threshold.

Legend: P positions, V vocabulary, d hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foretell.drafting.learning.losses import chunk_size
from foretell.drafting.learning.number_types import number_type

RULES = ("falling", "ratio", "sure")
LITTLE = 0.05
"""Entropy in nats below which a token joins any segment (`falling`)."""
SHARE = 0.3
"""Share of a segment's greatest entropy below which a token joins it (`falling`, `ratio`)."""
SURE = 0.95
"""Probability of the likeliest token whose entropy, all others being equal, is the threshold of `sure`."""


def segment(entropies: Sequence[float], most: int, rule: str = "falling", least: float = math.inf) -> list[int]:
    """Returns the sizes of the segments of a text, in order.

    Args:
        entropies: of the model's distribution of each token, in nats.
        most: tokens of a segment, at most.
        rule: one of `RULES`.
        least: the threshold of `sure`; see `entropy_at`.
    """
    sizes: list[int] = []
    greatest = 0.0
    for entropy in entropies:
        if rule == "sure":
            joins = max(greatest, entropy) < least
        else:
            joins = entropy < SHARE * greatest or (rule == "falling" and entropy < LITTLE)
        if sizes and sizes[-1] < most and joins:
            sizes[-1] += 1
            greatest = max(greatest, entropy)
        else:
            sizes.append(1)
            greatest = entropy
    return sizes


def entropy_at(probability: float, vocab: int) -> float:
    """Returns the entropy in nats where one token has this probability and all others are equally likely."""
    rest = 1 - probability
    return -probability * math.log(probability) - (rest * math.log(rest / (vocab - 1)) if rest > 0 else 0.0)


@torch.no_grad()
def entropies(states_Pd: Tensor, head_Vd: Tensor) -> Tensor:
    """Returns the entropy in nats of softmax(x Wᵀ) at each position, [P] float32, multiplied as `number_types` says.

    Args:
        states_Pd: after the final norm.
    """
    dtype, chunk = number_type(states_Pd.device), chunk_size(len(head_Vd), states_Pd.device)
    weight_Vd, found = head_Vd.to(dtype), [states_Pd.new_zeros(0, dtype=torch.float32)]
    for at in range(0, len(states_Pd), chunk):
        log_p_PV = torch.log_softmax(states_Pd[at : at + chunk].to(dtype) @ weight_Vd.T, -1, dtype=torch.float32)
        found.append(-(log_p_PV.exp() * log_p_PV).sum(-1))
    return torch.cat(found)
