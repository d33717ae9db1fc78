"""Hidden Transfer and M2R2 with LoRA inside the matrices of the layers that their streams pass, in place of adapters
beside these layers: forms that learn here, to be compared, and cannot draft.

The model's own rows pass the matrices as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from foretell import drafters
from foretell.backbone import Backbone
from foretell.drafters.hidden_transfer import HiddenTransfer, TransferSteps, check_layers
from foretell.drafters.m2r2 import M2R2, FastStream
from foretell.drafting.learning.frozen_layers import FrozenLayers
from foretell.drafting.learning.heads import draft_outputs
from foretell.drafting.learning.number_types import product
from foretell.drafting.options import option


class LoraLayers(FrozenLayers):
    """Frozen layers whose matrices grow by up · down for all rows but those of `run_layer`."""

    def __init__(self, plain: FrozenLayers, lora: nn.ParameterDict):
        self.__dict__.update(plain.__dict__)
        self._plain, self._lora = plain, lora

    def run_layer(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return self._plain.run_layer(*arguments)

    def linear(self, index: int, name: str, x_MK: Tensor) -> Tensor:
        y_MN, key = super().linear(index, name, x_MK), _key(index, name)
        if f"{key} down" not in self._lora:
            return y_MN
        return y_MN + product(product(x_MK, self._lora[f"{key} down"]), self._lora[f"{key} up"]).to(y_MN.dtype)


def _key(index: int, name: str) -> str:
    return f"{index} {name.replace('.', ' ')}"


def lora_parameters(backbone: Backbone, layers: range, names: tuple[str, ...], rank: int) -> nn.ParameterDict:
    """Fresh LoRA of these matrices of each layer; they add nothing yet."""
    c, found = backbone.config, nn.ParameterDict()
    widths = {"q": c.q_width, "k": c.kv_width, "v": c.kv_width, "gate": c.mlp, "up": c.mlp}
    inputs = {"o": c.q_width, "down": c.mlp}
    for index in layers:
        for name in names:
            short = name.partition(".")[2].removesuffix("_proj")
            fan_in = inputs.get(short, c.hidden)
            down = nn.init.normal_(nn.Parameter(Tensor(rank, fan_in)), std=fan_in**-0.5)
            found[f"{_key(index, name)} down"] = down
            found[f"{_key(index, name)} up"] = nn.Parameter(Tensor(widths.get(short, c.hidden), rank).zero_())
    return found


class LoraSteps(TransferSteps):
    def __init__(self, *arguments: Any, layers: tuple[int, ...], backbone: Backbone):
        super().__init__(*arguments, layers=layers, backbone=backbone)
        names = tuple(f"self_attn.{name}_proj" for name in "qkvo")
        names += tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
        self.lora = lora_parameters(backbone, range(layers[0], backbone.config.layers), names, arguments[-1].lora)

    @cached_property
    def frozen(self) -> FrozenLayers:
        return LoraLayers(FrozenLayers(self._backbone, self.layers[0]), self.lora)


class LoraTransfer(HiddenTransfer):
    method = "hidden_transfer_lora"

    @dataclass(frozen=True)
    class Training(HiddenTransfer.Training):
        lora: int = option(8, "Rank of LoRA.")

    @classmethod
    def trainable(cls, backbone: Backbone, training: Training, counts_V: Tensor, folder: Any = None) -> TransferSteps:
        outputs = draft_outputs(backbone, counts_V, training.draft_vocab)
        layers = check_layers((training.layers or ())[:1] * training.steps, backbone)
        return LoraSteps(*outputs, training, layers=layers, backbone=backbone)


class LoraStream(FastStream):
    def __init__(self, *arguments: Any, exit: int, backbone: Backbone):
        super().__init__(*arguments, exit=exit, backbone=backbone)
        self.down_Erd.requires_grad_(False), self.up_Edr.requires_grad_(False)  # they add nothing, and stay so
        names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        self.lora = lora_parameters(backbone, range(exit), names, arguments[-1].lora)

    @cached_property
    def frozen(self) -> FrozenLayers:
        return LoraLayers(FrozenLayers(self._backbone, end=self.exit), self.lora)


class LoraM2R2(M2R2):
    method = "m2r2_lora"

    @dataclass(frozen=True)
    class Training(M2R2.Training):
        lora: int = option(32, "Rank of LoRA.")

    @classmethod
    def trainable(cls, backbone: Backbone, training: Training, counts_V: Tensor, folder: Any = None) -> FastStream:
        outputs = draft_outputs(backbone, counts_V, training.draft_vocab)
        return LoraStream(*outputs, training, exit=training.exit, backbone=backbone)


def register() -> None:
    for drafter in (LoraTransfer, LoraM2R2):
        drafters.register(drafter.method, drafter, "LoRA, to be compared")
