"""The kernel seam of the eager backbone: which library multiplies, and how it is kept row-independent.

Libraries pick another algorithm for one row than for many, and the bits differ. So a call is cut into pieces of at
most 64 rows and a short piece is padded; `probe.py` checks that this is enough, and asks for more padding where not.
oneDNN's packed weights run at memory speed on CPUs but are private to PyTorch and drop gradients without a word:
they are probed for, never used for training, and `F.linear` stands behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from foretell.errors import check

if TYPE_CHECKING:
    from foretell.backbone.base import Backbone
    from foretell.backbone.cache import KVCache

MIN_ROWS, MAX_ROWS = 4, 64


class DrafterLinear(Protocol):
    def __call__(self, x_MK: Tensor) -> Tensor:
        """y [M, N] float32 = x Wᵀ + b."""
        ...

    def top(self, x_MK: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` greatest outputs of each row, greatest first: values [M, count] and their indices int64."""
        ...


class DrafterHeads(Protocol):
    def top(
        self, store_Nd: Tensor, which_BS: Sequence[Sequence[int]], count: int, states_BKd: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The `count` most probable outputs of each head, best first: log-probabilities [B, K, count] and indices.

        Args:
            store_Nd: float32, contiguous; rows read some of its N rows side by side (`side_by_side`).
            which_BS: which ones each row reads, S of them.
            states_BKd: float32; filled with what the output matrices read, if given.
        """
        ...


@dataclass(frozen=True)
class LevelDrafting:
    """Heads that draft a tree level by level: each reads states of its row, then what its path adds.

    Attributes:
        levels: one head each.
        streams: states of a row that are read; width: guesses of a node.
        vocabulary_V: int64 tokens that the heads choose from.
        scales: how far each head is believed (`trees.calibration`); none are all believed.
        grounded, chained: whether the embeddings of the path's tokens, and the state that the head above ended in,
            are read.
    """

    levels: Sequence[DrafterHeads]
    streams: int
    width: int
    vocabulary_V: NDArray[np.int64]
    scales: Sequence[tuple[float, float]]
    grounded: bool
    chained: bool


class TreeGrower(Protocol):
    def grow(
        self, roots: Sequence[int], states: Sequence[Tensor | None], count: int, beam: int, least: float
    ) -> list[tuple[list[int], list[int], list[float]]]:
        """Trees of the most probable paths, `count` nodes at most besides the root.

        Args:
            roots: newest token of each row.
            states: what the heads read of each row [S, d] float32; None makes a tree of its root alone.
            beam: nodes that a level asks at most; least: tokens that it must be able to gain.

        Returns:
            Per row parents, tokens and how probable each node is given its parent.
        """
        ...


@dataclass(frozen=True)
class LowerLayerDrafting:
    """What guesses behind the model's own lower layers.

    Attributes:
        head: output matrices alone, of one head; width: guesses of a node.
        vocabulary_V: int64 tokens that it chooses from.
        scale: how far it is believed (`trees.calibration`); None is believed.
        adapter: a layer of the drafter's own between, and its final norm; None is the backbone's norm alone.
        skip: of the adapter, see `Backbone.run_layers`.
    """

    head: DrafterHeads
    width: int
    vocabulary_V: NDArray[np.int64]
    scale: tuple[float, float] | None = None
    adapter: Backbone | None = None
    skip: bytes | None = None


@dataclass(frozen=True)
class DraftRequest:
    """A draft that is wanted of B rows; see `drafting.lower_layers.Lower`.

    Attributes:
        layers: those that draft; slots: cache rows; roots: newest tokens; budgets: tokens that may still be emitted.
        count: nodes besides the root; steps: levels; room: nodes of a row that run; all at most.
        thresholds: per row the probability below which its chain ends; none make trees.
        beam, least: of trees, see `Growing.select_frontier`.
        taps: layers whose streams are wanted of the nodes that run.
        waiting: per row states [W, d] that the adapter has still to read, or None.
    """

    layers: int
    slots: Sequence[int]
    roots: Sequence[int]
    budgets: Sequence[int]
    count: int
    steps: int
    room: int
    thresholds: Sequence[float] = ()
    beam: int = 0
    least: float = 0.0
    taps: Sequence[int] = ()
    waiting: Sequence[Tensor | None] = ()


@dataclass(frozen=True)
class DraftedTrees:
    """Trees, of which the `ran` first nodes of each passed the layers.

    Attributes:
        trees: per row parents, tokens and how probable each node is given its parent.
        hidden_Rd, taps: streams of the nodes that passed, row after row, and those after `DraftRequest.taps` layers.
    """

    trees: list[tuple[list[int], list[int], list[float]]]
    ran: list[int]
    hidden_Rd: Tensor
    taps: dict[int, Tensor]


class LowerLayerDrafter(Protocol):
    def climb(self, asked: DraftRequest, cache: KVCache, own: KVCache | None) -> DraftedTrees:
        """Drafts in one call what `drafting.lower_layers` drafts level by level.

        Args:
            cache: the engine's; own: the adapter's, which has read `waiting` too afterwards.
        """
        ...


def check_ids(ids_M: Tensor, count: int) -> None:
    """Refuses ids that are no rows of a table of `count`: behind it lies other memory.

    Raises:
        TypeError: they are not whole numbers of 64 bits.
        IndexError: one lies outside [0, count).
    """
    check(ids_M.dtype == torch.int64, f"Ids are {ids_M.dtype}; they must be torch.int64.", TypeError)
    check(ids_M.dim() == 1, f"Ids have shape {tuple(ids_M.shape)}; they must be a vector.")
    if not len(ids_M):
        return
    low, high = map(int, ids_M.aminmax())
    if low < 0 or high >= count:
        raise IndexError(f"Id {low if low < 0 else high} is outside the table; ids lie between 0 and {count - 1}.")


def normed(parts: Tensor) -> Tensor:
    """Each [..., d] divided by its root mean square, as heads read all but their first part."""
    return F.rms_norm(parts, parts.shape[-1:], eps=1e-6)


def side_by_side(parts_PSd: Tensor) -> Tensor:
    """What heads read, [P, S·d]: the first part as it is, the others divided by their root mean square."""
    return torch.cat([parts_PSd[:, 0], normed(parts_PSd[:, 1:]).flatten(1)], 1)


class Linear:
    """y [M, N] = x [M, K] Wᵀ + b, row by row independent of M; x is cast to the weight's type, y is float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, packed: bool = True):
        self.bias = None if bias is None else bias.to(weight.dtype)
        self.dtype, self.min_rows = weight.dtype, MIN_ROWS
        self.packed = _onednn_pack(weight) if packed and weight.device.type == "cpu" else None
        missing = -weight.shape[1] % 16
        if self.packed is None and missing:  # rows at odd places in memory, which MKL answers with odd sums
            weight = F.pad(weight, (0, missing))
        self.weight = weight if self.packed is None else weight[:0]

    def __call__(self, x_MK: Tensor) -> Tensor:
        x_MK = x_MK.to(self.dtype)
        pieces = [self._piece(piece).float() for piece in x_MK.split(MAX_ROWS)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def top(self, x_MK: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` greatest outputs of each row, greatest first: values [M, count] and their indices int64."""
        return self(x_MK).topk(count)

    def _piece(self, x_MK: Tensor) -> Tensor:
        rows = len(x_MK)
        wider = 0 if self.packed is not None else self.weight.shape[1] - x_MK.shape[1]
        if wider or rows < self.min_rows:
            x_MK = F.pad(x_MK, (0, wider, 0, max(0, self.min_rows - rows)))
        if self.packed is not None:
            y_MN = torch.ops.mkldnn._linear_pointwise(x_MK, self.packed, self.bias, "none", [], "")
        else:
            y_MN = F.linear(x_MK, self.weight, self.bias)
        return y_MN[:rows]


class StackedHeads:
    """Heads side by side (see `Backbone.heads`), one linear after the other."""

    def __init__(
        self,
        linear: Callable[[Tensor, Tensor | None], DrafterLinear],
        blocks: Sequence[Sequence[tuple[Tensor, Tensor]]],
        outputs: Sequence[Tensor] | DrafterHeads,
        last_linear: bool = False,
    ):
        self._bends: list[Callable[[Tensor], Tensor]] = [F.silu] * len(blocks)
        if last_linear and blocks:
            self._bends[-1] = lambda x: x
        self._blocks = [[linear(weight, bias) for weight, bias in layer] for layer in blocks]
        if isinstance(outputs, Sequence):
            self._outputs = [linear(weight, None) for weight in outputs]
        else:
            assert isinstance(outputs, StackedHeads)
            self._outputs = outputs._outputs
        self._heads = len(self._blocks[0]) if blocks else len(self._outputs)

    def top(
        self, store_Nd: Tensor, which_BS: Sequence[Sequence[int]], count: int, states_BKd: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        which = torch.tensor(which_BS, device=store_Nd.device)
        parts_BSd = store_Nd.index_select(0, which.flatten()).unflatten(0, which.shape)
        inputs, d = [side_by_side(parts_BSd)] * self._heads, store_Nd.shape[1]
        for layer, bend in zip(self._blocks, self._bends, strict=True):
            inputs = [x[:, :d] + bend(block(x)) for block, x in zip(layer, inputs, strict=True)]
        if states_BKd is not None:
            states_BKd.copy_(torch.stack(inputs, 1))
        outputs = self._outputs if len(self._outputs) > 1 else self._outputs * len(inputs)
        logits_BKV = torch.stack([output(x) for output, x in zip(outputs, inputs, strict=True)], 1)
        values, indices = logits_BKV.log_softmax(-1).topk(count)
        return values, indices


def _onednn_pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's own layout, or None where this build or processor has none for its type."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, MAX_ROWS)
        torch.ops.mkldnn._linear_pointwise(weight.new_zeros(4, weight.shape[1]), packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return packed
