"""Drafting with no kernels of its own: linear by linear and level by level, on any backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from foretell.backbone import Backbone
from foretell.backbone.base import LinearLayer
from foretell.drafting.heads import DrafterHeads, StackedHeads
from foretell.drafting.prefix_layer import PrefixLayer
from foretell.drafting.protocols import LevelDrafting, LowerLayerDrafting


class EagerKernels:
    """See `protocols.DraftKernels`."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    def heads(
        self, blocks: Sequence[Sequence[tuple[Tensor, Tensor]]], outputs: Sequence[Tensor] | DrafterHeads,
        linear: bool = False,
    ) -> StackedHeads:  # fmt: skip
        return StackedHeads(self.backbone.linear, blocks, outputs, linear)

    def grower(self, drafting: LevelDrafting) -> None:
        return None

    def lower_layers(self, drafting: LowerLayerDrafting) -> None:
        return None

    def linear(self, weight_NK: Tensor) -> LinearLayer:
        return self.backbone.linear(weight_NK, None)

    def own_layers(self, layers: Sequence[Mapping[str, Tensor]], norm_d: Tensor | None = None) -> Backbone:
        return self.backbone.own_layers(layers, norm_d)

    def prefix_layer(self, tensors: Mapping[str, Tensor], fuse_dP: Tensor | None) -> PrefixLayer:
        return PrefixLayer(self.backbone, self.backbone.own_layers([tensors]), fuse_dP)
