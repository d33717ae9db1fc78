"""What trained drafters share when they draft: how large a tree, which tokens to choose from, checks of both.

Legend: V (draft) vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from foretell.backbone import Backbone
from foretell.backbone.costs import StepCosts
from foretell.errors import UsageError, check_numbers
from foretell.trees import from_paths

DEFAULT_NODES = 16


def tree_size(backbone: Backbone, nodes: int, tokens_per_step: dict[int, float]) -> Callable[[int, int], int]:
    """How large a tree to draft for (rows, context): `nodes` if given, else what pays most by the costs measured
    on this machine and the `tokens_per_step` of each size, else 16 (one tile of the kernels).
    """
    if nodes:
        if not 2 <= nodes <= 256:
            raise UsageError(f"A tree has 2 to 256 nodes, not {nodes}.")
        return lambda rows, context: nodes
    costs = StepCosts.load(backbone.costs) if backbone.costs else None
    if costs is None or not tokens_per_step:
        return lambda rows, context: DEFAULT_NODES

    @cache
    def best(rows: int, context: int) -> int:
        return costs.best_size(rows, context, tokens_per_step)

    return lambda rows, context: best(rows, context // 64 * 64)


def check_tree(paths: Sequence[Sequence[int]], heads: int, choices: int) -> None:
    """Refuses rank paths that heads choosing from so many tokens cannot fill.

    Raises:
        UsageError: naming what is wrong with them.
    """
    tree, ordered = from_paths(paths)
    if tree.height > heads or any(path[-1] >= choices for path in ordered[1:]):
        raise UsageError(
            f"The tree is deeper than the {heads} heads, or names a rank beyond the {choices} tokens they choose from; "
            "take another tree."
        )


def check_scales(scales: Sequence[object], heads: int) -> None:
    """Refuses a calibration of other heads (see `trees.calibration`)."""
    if len(scales) not in (0, heads):
        raise UsageError(f"The drafter is calibrated for {len(scales)} heads, but has {heads}; train it again.")


def check_options(backbone: Backbone, output: str, **numbers: float) -> None:
    """Refuses what heads cannot be made with; `numbers` are options of these names, those that a method has."""
    if output not in ("shared", "tied", "own"):
        raise UsageError(f"output is {output!r}; it must be shared, tied or own.")
    ranges = {
        "heads": (1, 16), "layers": (1, 8), "soft": (0, 1), "draft_vocab": (0, 2**31),
        "taps": (0, min(8, backbone.config.layers - 1)), "dropout": (0, 0.9),
    }  # fmt: skip
    check_numbers(SimpleNamespace(**numbers), [(name, *ranges[name]) for name in numbers])


def spread(taps: int, backbone: Backbone) -> list[int]:
    """So many layers, evenly spread."""
    return [round(backbone.config.layers * (i + 1) / (taps + 1)) for i in range(taps)]


def draft_vocabulary(counts_V: Tensor, size: int) -> Tensor:
    """The `size` most frequent tokens, ascending [V'] int64 (all of them for 0); ties go to the smaller id."""
    if not size or size >= len(counts_V):
        return torch.arange(len(counts_V))
    return counts_V.argsort(descending=True, stable=True)[:size].sort().values


def places(vocabulary_V: Tensor, whole: int) -> Tensor:
    """[whole] int64: where each token stands in a draft vocabulary, -1 where it does not."""
    place = torch.full((whole,), -1)
    place[vocabulary_V] = torch.arange(len(vocabulary_V))
    return place
