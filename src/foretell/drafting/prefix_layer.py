"""A drafter's own layer before its heads: it attends to all committed states of a row, and is asked once a step.

It keeps keys and values of its own. A fused one reads more than those states: W·[other streams; the embedding of the
token after each] is added to them, each part divided by its root mean square (EAGLE-3's fusion, arXiv 2503.01840,
§3.1).

Legend: M newly committed states, row after row, d hidden width, P parts that are fused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from foretell.backbone.base import Backbone
from foretell.backbone.nodes import Nodes
from foretell.drafting.heads import normed


class PrefixLayer:
    """Verb by verb; a backbone may have one that does the same in one call.

    Args:
        backbone: whose embedding, and whose kernels.
        layer: the layer, as `Backbone.layer` gives it.
        fuse_dP: W [d, P·d] of a fused one.
    """

    def __init__(self, backbone: Backbone, layer: Backbone, fuse_dP: Tensor | None):
        self.layer, self._embed = layer, backbone.embed
        self._fuse = None if fuse_dP is None else backbone.linear(fuse_dP, None)
        self.fused, self.cache = fuse_dP is not None, layer.new_cache(1, 1)

    def attached(self, rows: int) -> PrefixLayer:
        """The same layer with an empty cache of its own."""
        own = copy.copy(self)
        own.cache = self.layer.new_cache(rows, 0)
        return own

    def begin(self, row: int, reused: int, room: int) -> None:
        """Keeps `reused` states of a row at most (an interruption may have kept them from coming here), with room for
        so many in all."""
        length = min(reused, self.length(row))
        if not length and row < self.cache.rows:
            self.cache.release([row])
        self.cache.reserve({row: room})
        self.cache.rollback(row, length)

    def length(self, row: int) -> int:
        """States of a row that it has read."""
        return self.cache.lengths[row] if row < self.cache.rows else 0

    def __call__(
        self, rows: Sequence[int], counts: Sequence[int], states_Md: Tensor, others: Sequence[Tensor] = (),
        following: Sequence[int] = (),
    ) -> Tensor:  # fmt: skip
        """What the layer makes of newly committed states, `counts[i]` of cache row `rows[i]`: [M, d] float32.

        Args:
            others: P - 1 streams [M, d] that a fused layer reads, too; following: the token after each state.
        """
        self.cache.reserve({row: self.length(row) + count for row, count in zip(rows, counts, strict=True)})
        lengths = [self.cache.lengths[row] for row in rows]
        stream_Md = self._run(rows, lengths, counts, states_Md, others, following)
        self.cache.commit(rows, [range(count) for count in counts])
        return stream_Md

    def _run(
        self, rows: Sequence[int], lengths: Sequence[int], counts: Sequence[int], states_Md: Tensor,
        others: Sequence[Tensor], following: Sequence[int],
    ) -> Tensor:  # fmt: skip
        if self._fuse:
            parts = [*others, self._embed(torch.tensor(following))]
            states_Md = states_Md + self._fuse(torch.cat([normed(part) for part in parts], 1))
        return self.layer.run_layers(states_Md, Nodes.chains(rows, lengths, counts), self.cache)[0]
