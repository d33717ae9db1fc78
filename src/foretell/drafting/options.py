"""What trained drafters share when they draft: how large a tree, which tokens to choose from, what heads read.

Legend: V (draft) vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from foretell.backbone import Backbone
from foretell.backbone.step_costs import step_costs
from foretell.contracts import Draft, Row
from foretell.errors import UsageError, check_numbers, is_number
from foretell.trees import from_paths
from foretell.trees.calibration import Scale
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
            raise UsageError(f"Its trees have 2 to {most} nodes, not {nodes}; choose another -o nodes=.")
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


def read_scales(calibration: Sequence[Sequence[float]], heads: int) -> list[Scale]:
    """A checkpoint's calibration (see `trees.calibration`); refuses one of other heads."""
    scales = [(float(slope), float(bias)) for slope, bias in calibration]
    if len(scales) not in (0, heads):
        raise UsageError(f"The drafter is calibrated for {len(scales)} heads, but has {heads}; train it again.")
    return scales


def check_shapes(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuses tensors that are not what a config names: kernels would read past their ends.

    Raises:
        KeyError: naming one.
    """
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            raise KeyError(name)


def output_shape(arch: dict[str, Any], d: int, choices: int) -> dict[str, tuple[int, ...]]:
    """Of a checkpoint's output matrices; empty where they are the backbone's."""
    copies = {"own": arch["heads"], "tied": 1}
    return {} if arch["output"] == "shared" else {"head": (copies[arch["output"]], choices, d)}


def check_options(backbone: Backbone, output: str, **numbers: float) -> None:
    """Refuses what heads cannot be made with; `numbers` are options of these names, those that a method has."""
    if output not in ("shared", "tied", "own"):
        raise UsageError(f"output is {output!r}; it must be shared, tied or own.")
    ranges = {
        "heads": (1, 16), "layers": (1, 8), "soft": (0, 1), "draft_vocab": (0, 2**31),
        "taps": (0, min(8, backbone.config.layers - 1)), "dropout": (0, 0.9),
    }  # fmt: skip
    check_numbers(SimpleNamespace(**numbers), [(name, *ranges[name]) for name in numbers])


def check_exit(exit: int, backbone: Backbone) -> int:
    """Refuses an exit that leaves no layer to draft with, or none to verify with."""
    most = backbone.config.layers - 1
    if not is_number(exit, whole=True) or not 1 <= exit <= most:
        raise UsageError(f"The exit is layer {exit}; this model can leave after layer 1 to {most}.")
    return exit


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


class Reading:
    """What heads read while a draft is made: rows of one store, so that levels share what they have in common.

    Attributes:
        parts: by (row of the batch, node): which of the store's rows are read there.
        ended: by the same: which one holds the state that the head ended in.
    """

    def __init__(self, width: int, device: torch.device):
        self.store_Nd, self.used = torch.empty(64, width, device=device), 0
        self.parts: dict[tuple[int, int], list[int]] = {}
        self.ended: dict[tuple[int, int], int] = {}

    def room(self, count: int) -> tuple[Tensor, range]:
        """So many rows to be filled, and their numbers."""
        if self.used + count > len(self.store_Nd):
            larger = self.store_Nd.new_empty(2 * (self.used + count), self.store_Nd.shape[1])
            larger[: self.used] = self.store_Nd[: self.used]
            self.store_Nd = larger
        numbers = range(self.used, self.used + count)
        self.used += count
        return self.store_Nd[numbers.start : numbers.stop], numbers

    def add(self, states_Fd: Tensor) -> range:
        rows_Fd, numbers = self.room(len(states_Fd))
        rows_Fd.copy_(states_Fd)
        return numbers
