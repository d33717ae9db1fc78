"""Medusa: heads beside the output head guess the tokens after the next one, each on its own.

Head k reads the state that the output head reads at position t and guesses token t + k + 1 (the output head itself
guesses t + 1): one to a few residual blocks h + SiLU(W h + b), then an output matrix. A tree of their most probable
guesses is verified at once; by default it is chosen anew at each step by their probabilities (`trees.growing`).
Medusa, arXiv 2401.10774, §3.1-3.3; heads learn while the backbone is frozen (Medusa-1), with the loss Σ 0.8^k · CE,
here against the written token and the backbone's own distribution where it was written.

Optional inputs of the heads: the token just chosen, t + 1, which is known when drafts are made (Hydra's idea, arXiv
2402.05109, for all heads at once, so that trees of ranks still serve); and intermediate streams, which hold more about
the tokens to come than the last state does (as in EAGLE-3, arXiv 2503.01840).

Three choices of output matrix: `shared`, the backbone's own, frozen and not stored; `tied`, one copy that all heads
train together; `own`, one copy each, as in the paper. Any of them may be cut down to a draft vocabulary: verification
uses the whole one.

Legend: B rows, K heads, d hidden width, I width of a head's input, P positions, V draft vocabulary, m teacher
tokens, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from foretell.backbone import Backbone, KVCache
from foretell.contracts import FINAL_NORM, Draft, Drafter, Features, Row
from foretell.drafting.checkpoint import (
    CheckpointOptions,
    Loaded,
    check_shapes,
    check_tree,
    damage_named,
    find,
    output_shape,
    read_scales,
)
from foretell.drafting.heads import side_by_side
from foretell.drafting.kernels import kernels_for
from foretell.drafting.learning.heads import GuessingHeads, SeveralHeadsTraining, draft_outputs, evenly_spread
from foretell.drafting.learning.number_types import number_type
from foretell.drafting.learning.trainable import TrainingBatch
from foretell.drafting.options import option, stored_options
from foretell.drafting.tree_size import TreeSize, no_guesses, size_for, tree_size
from foretell.errors import UsageError
from foretell.trees.growing import Candidates, reachable
from foretell.trees.published import published
from foretell.trees.tree import ROOT, TokenTree

DECAY = 0.8
"""Weight of a head's loss relative to the head before it (§3.1)."""


class MedusaHeads(GuessingHeads):
    """The heads in training; float32, multiplied as `number_types` says.

    Args:
        head_Vd, vocabulary_V, vocab_size: see `GuessingHeads`.
        training: see `Medusa.Training`.
        taps: layers whose streams are read beside the final state.
        embed: the backbone's embedding, if the token just chosen is read too.
    """

    decay = DECAY

    def __init__(
        self, head_Vd: Tensor, vocabulary_V: Tensor, vocab_size: int, training: Medusa.Training, *,
        taps: Sequence[int] = (), embed: Callable[[Tensor], Tensor] | None = None,
    ):  # fmt: skip
        heads, layers = training.heads, training.layers
        super().__init__(head_Vd, vocabulary_V, vocab_size, training, heads=heads, output=training.output)
        d = head_Vd.shape[1]
        self.options, self.layers, self.taps, self.embed = training, layers, (*taps, FINAL_NORM), embed
        widths = [d * (len(self.taps) + (embed is not None)), *[d] * (layers - 1)]
        # zeros, the bias too: every head starts as the output head
        self.weights = nn.ParameterList([torch.zeros(heads, d, width) for width in widths])
        self.bias_LKd = nn.Parameter(torch.zeros(layers, heads, d))

    def read(self, batch: TrainingBatch, sources_P: Tensor) -> Tensor:
        return self.states(self._read(batch, sources_P))

    def states(self, h_PI: Tensor) -> Tensor:
        """The input of the output matrices [K, P, d]; `h_PI` as `side_by_side` gives it."""
        x_KPI = h_PI.expand(self.heads, *h_PI.shape)
        out_KPd = x_KPI[..., : self.bias_LKd.shape[-1]]
        dtype = number_type(h_PI.device)
        for weight_KdI, bias_Kd in zip(self.weights, self.bias_LKd, strict=True):
            product = torch.bmm(x_KPI.to(dtype), weight_KdI.mT.to(dtype)).float()
            out_KPd = x_KPI = out_KPd + F.silu(product + bias_Kd[:, None])
        return out_KPd

    def _read(self, batch: TrainingBatch, sources: Tensor) -> Tensor:
        """The heads' input at positions of the flattened batch."""
        inputs = [batch.states[tap].flatten(0, 1)[sources].float() for tap in reversed(self.taps)]
        if self.embed:
            inputs.append(self.embed(batch.tokens_BT.flatten()[sources + 1]))
        return side_by_side(torch.stack(inputs, 1))

    @torch.no_grad()
    def start(self, arch: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        ours = self.checkpoint()[0]
        names = [name for name in ours if name not in ("head", "vocabulary")]
        others = arch["taps"] != list(self.taps[:-1]) or arch["root"] != (self.embed is not None)
        if others or any(name not in tensors or tensors[name].shape != ours[name].shape for name in names):
            raise UsageError(
                "It is made with other options; train with the same `heads=`, `layers=`, `taps=` and `root=`."
            )
        for layer, weight in enumerate(self.weights):
            weight.copy_(tensors[f"weight.{layer}"])
        self.bias_LKd.copy_(tensors["bias"])
        self.start_outputs(tensors)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {f"weight.{layer}": weight for layer, weight in enumerate(self.weights)}
        tensors["bias"] = self.bias_LKd
        return self.stored(tensors), stored_options(self.options) | {"taps": list(self.taps[:-1])}


class Medusa(Drafter):
    """Drafts with trained heads.

    Args:
        arch, tensors: as `MedusaHeads.checkpoint` gave them.
        paths: rank paths, prefixes first, from which every tree is chosen.
        size: (rows, context) -> nodes of the tree to draft, root included; 1 drafts nothing.
        tokens_per_step: tree size -> tokens per step on held-out text.
        grown: whether each step takes its most probable paths; else the tree of n nodes is always the first n - 1.
        scales: calibration of each head.
    """

    method = "medusa"
    STARTS = ("medusa", "medusa2")  # methods whose checkpoints a training may start from

    @dataclass(frozen=True)
    class Options(CheckpointOptions):
        tree: str = option("", "A published tree by name, drafted as it is; by default the one found in training.")
        grown: bool = option(True, "Choose the most probable guesses at each step; false takes fixed trees.")

    @dataclass(frozen=True)
    class Training(SeveralHeadsTraining):
        heads: int = option(4, "Number of heads; head k guesses the token k + 1 ahead.", low=1, high=16, stored=True)
        layers: int = option(2, "Residual blocks of each head.", low=1, high=8, stored=True)
        output: str = option(
            "tied", "Output matrix: the model's own, one trained copy for all heads, or one for each.",
            choices=("shared", "tied", "own"), stored=True,
        )  # fmt: skip
        taps: int = option(2, "Intermediate layers whose streams are read too; 0 as in the paper.", low=0, high=8)
        root: bool = option(True, "Read the token just chosen too; false as in the paper.", stored=True)

    def __init__(
        self,
        backbone: Backbone,
        arch: dict[str, Any],
        tensors: dict[str, Tensor],
        paths: Sequence[Sequence[int]],
        size: TreeSize,
        tokens_per_step: dict[int, float] | None = None,
        grown: bool = True,
        scales: Sequence[Sequence[float]] = (),
    ):
        check_shapes(tensors, _shapes(arch, backbone.config.hidden, len(tensors["vocabulary"])))
        self._scales = read_scales(scales, arch["heads"])
        self.tokens_per_step, self.size, self.grown, self.paths = (
            tokens_per_step or {},
            size,
            grown,
            [tuple(path) for path in paths],
        )
        self.taps = (*arch["taps"], FINAL_NORM)
        self._embed = backbone.embed if arch["root"] else None
        self._vocabulary_V = tensors["vocabulary"].numpy().astype(np.int64)
        check_tree(self.paths, arch["heads"], len(self._vocabulary_V))
        self._candidates: dict[tuple[int, bool], Candidates] = {}
        blocks = [
            list(zip(tensors[f"weight.{layer}"], tensors["bias"][layer].float(), strict=True))
            for layer in range(arch["layers"])
        ]
        shared = arch["output"] == "shared"
        outputs = backbone.head_rows(tensors["vocabulary"].long())[None] if shared else tensors["head"]
        self._heads = kernels_for(backbone).heads(blocks, list(outputs))
        self.parameters = sum(tensor.numel() for name, tensor in tensors.items() if name != "vocabulary")
        self._states: dict[int, list[Tensor]] = {}  # slot -> of the newest token but one: state, then streams [d]

    @classmethod
    def build(cls, backbone: Backbone, options: Options, loaded: Loaded | None = None) -> Medusa:
        """See `Drafter.build`, and `TrainableMethod.build` for `loaded`."""
        found, tensors = loaded or find(cls.method, backbone, options.checkpoint, options.any_backbone)
        paths = published(options.tree) if options.tree else found.paths
        tokens_per_step = {} if options.tree else found.tokens_per_step
        most = len(paths) + 1
        nodes = options.nodes or (most if options.tree else 0)
        size = tree_size(backbone, nodes, tokens_per_step, cls.method, cls.usual_cost, most)
        with damage_named(options.checkpoint or f"The {cls.method} drafter that ships with foretell"):
            return cls(backbone, found.arch, tensors, paths, size, tokens_per_step, options.grown, found.calibration)

    @classmethod
    def trainable(
        cls, backbone: Backbone, training: Training, counts_V: Tensor, folder: Path | None = None
    ) -> MedusaHeads:
        """Returns fresh heads; see `TrainableMethod`."""
        return MedusaHeads(
            *draft_outputs(backbone, counts_V, training.draft_vocab), training,
            taps=evenly_spread(training.taps, backbone), embed=backbone.embed if training.root else None,
        )  # fmt: skip

    @property
    def max_nodes(self) -> int:
        return len(self.paths) + 1

    def bind(self, cache: KVCache) -> None:
        self._states = {}

    def reset(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._states.pop(row.slot, None)

    def observe(self, rows: Sequence[Row], features: Features) -> None:
        end = 0
        for row, count in zip(rows, features.counts, strict=True):
            end += count
            self._states[row.slot] = [features.taps[tap][end - 1] for tap in reversed(self.taps)]

    def draft(self, rows: Sequence[Row]) -> Draft:
        nodes = size_for(self.size, rows)
        if nodes == 1:
            return no_guesses(rows)
        trees: list[TokenTree] = [ROOT] * len(rows)
        tokens = [[row.tokens[-1]] for row in rows]
        probabilities = [[1.0] for _ in rows]
        ready = [i for i, row in enumerate(rows) if row.slot in self._states]  # not after a prompt of one token
        if ready and self.paths:
            read_BSd = torch.stack([torch.stack(self._states[rows[i].slot]) for i in ready])
            if self._embed:
                roots_Bd = self._embed(torch.tensor([tokens[i][0] for i in ready]))
                read_BSd = torch.cat([read_BSd, roots_Bd[:, None]], 1)
            paths = self._candidates_for(nodes)
            log_probs_BKR, guesses_BKR = self._guesses(read_BSd, paths.width)
            grown_trees = paths.grow(log_probs_BKR, nodes, self._scales)
            for i, guesses_KR, grown in zip(ready, guesses_BKR.tolist(), grown_trees, strict=True):
                trees[i], chosen, probabilities[i] = grown
                tokens[i] += [guesses_KR[head][rank] for head, rank in chosen]
        return Draft(trees, tokens, probabilities)

    def _candidates_for(self, nodes: int) -> Candidates:
        """Candidates for trees of `nodes` nodes."""
        key = nodes, self.grown
        if key not in self._candidates:
            self._candidates[key] = Candidates(reachable(self.paths, nodes) if self.grown else self.paths[: nodes - 1])
        return self._candidates[key]

    def _guesses(self, read_BSd: Tensor, width: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Each head's most probable tokens, best first: log-probabilities and ids [B, K, R]."""
        which_BS = np.arange(len(read_BSd) * read_BSd.shape[1]).reshape(len(read_BSd), -1).tolist()
        log_probs_BKR, best_BKR = (
            found.cpu().numpy() for found in self._heads.top(read_BSd.flatten(0, 1), which_BS, width)
        )
        return log_probs_BKR, self._vocabulary_V[best_BKR]


def _shapes(arch: dict[str, Any], d: int, choices: int) -> dict[str, tuple[int, ...]]:
    """Expected shape of each checkpoint tensor."""
    heads, layers, inputs = arch["heads"], arch["layers"], 1 + len(arch["taps"]) + arch["root"]
    shapes: dict[str, tuple[int, ...]] = {f"weight.{i}": (heads, d, d if i else inputs * d) for i in range(layers)}
    return shapes | {"bias": (layers, heads, d)} | output_shape(arch, d, choices)
