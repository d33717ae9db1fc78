"""HAMburger's grafts in training: on a frozen model they learn to draft, with the model to read and write segments.

On a frozen model, every written position is a macro step: the micro-step decoder reads its features and the true tokens
after it, and guesses the tokens after those. With the model, the text of each answer is cut into segments by the
frozen model's entropies, a segment enters as one vector at the position of its last token, and the state in front of it
has to write its tokens and say which one ends it: CE(all tokens) + 0.5 · BCE(stop) (HAMburger, arXiv 2505.20438).

Ours: the blocks and the merger's output start at zero, so that a fresh micro step repeats its token and a fresh segment
is the mean of its tokens; a share of the cross-entropy is against the frozen model's own distribution; embedding and
output matrix stay as they are; the model learns by low-rank adapters, unless it learns whole; of a conversation of
several turns the last answer alone is cut, as decoding reads earlier ones again, token by token.

Legend: B conversations, T tokens of the longest, C segments of the longest, G segments of all, S tokens of a segment, d
hidden width, P positions, K heads, m most probable tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretell.backbone import Backbone
from foretell.contracts import FINAL_NORM
from foretell.drafters.hamburger.segments import RULES, SURE, entropies, entropy_at, segment
from foretell.drafting.learning.decoder_layer import DecoderLayer
from foretell.drafting.learning.finetune import ADAPTATIONS
from foretell.drafting.learning.heads import GuessingHeads, HeadTraining
from foretell.drafting.learning.losses import draft_loss, targets, weighed
from foretell.drafting.learning.number_types import product
from foretell.drafting.learning.student import TrainableBackbone
from foretell.drafting.learning.trainable import HeadGuesses, TrainingBatch
from foretell.drafting.options import option, stored_options
from foretell.errors import UsageError

HEAD = 32
"""Width of a head of the merger."""
STOP_WEIGHT = 0.5
"""Weight of the stop head's loss beside that of the tokens."""


@dataclass(frozen=True)
class HAMburgerTraining(HeadTraining):
    """See `HAMburger.Training`."""

    adapt: str = option(
        "none", "What of the model is trained: none of it (it can then only verify), adapters, or all of it.",
        choices=("none", *ADAPTATIONS),
    )  # fmt: skip
    rank: int = option(16, "Rank of the adapters; their scale α/r is 1/2.", low=1, high=1024)
    slower: float = option(0.5, "Learning rate of the model relative to the grafts'.", low=0, high=100)
    most: int = option(4, "Tokens of a macro step, at most.", low=2, high=16, stored=True)
    blocks: int = option(4, "Blocks of the micro-step decoder.", low=1, high=64, stored=True)
    output: str = option(
        "shared", "Output matrix of drafts of a frozen model: its own, or a trained copy. One that learns has its own.",
        choices=("shared", "tied"), stored=True,
    )  # fmt: skip
    rule: str = option("falling", "How texts are cut into segments.", choices=RULES)
    positions: float = option(
        0.25, "With none of the model: share of the written positions that learn in a step.", low=0.01, high=1
    )


def features_of(layers: int) -> tuple[int, ...]:
    """The taps of a micro-step decoder: after a quarter, half and three quarters of the layers, and the final norm."""
    return (*((layers * quarter + 2) // 4 for quarter in (1, 2, 3)), FINAL_NORM)


def merger_heads(d: int) -> int:
    """Heads of the merger's attention: of width 32, or one where the model's width is no multiple of that."""
    return 1 if d % HEAD else d // HEAD


class Merger(nn.Module):
    """Makes one vector of the embeddings of a segment: their mean, and what it reads of them by attention."""

    def __init__(self, d: int, most: int):
        super().__init__()
        wide = d + d // 2
        self.heads = merger_heads(d)
        self.pos_Sp = nn.Parameter(nn.init.xavier_normal_(torch.empty(most, d // 2)))
        self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(wide, d), nn.Linear(wide, d)
        self.out = nn.Linear(d, d)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, embedded_GSd: Tensor, sizes_G: Tensor) -> Tensor:
        """Returns [G, d]; of a segment of one token its embedding.

        Args:
            embedded_GSd: what lies beyond a segment's size is ignored.
        """
        within_GS = torch.arange(embedded_GSd.shape[1], device=sizes_G.device) < sizes_G[:, None]
        mean_Gd = (embedded_GSd * within_GS[..., None]).sum(1) / sizes_G[:, None]
        placed = self.pos_Sp[: embedded_GSd.shape[1]].expand(len(embedded_GSd), -1, -1)
        read_GSw = torch.cat([embedded_GSd, placed], -1)
        q, k, v = (
            _linear(part, x).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for part, x in ((self.q, mean_Gd[:, None]), (self.k, read_GSw), (self.v, read_GSw))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=within_GS[:, None, None])
        merged_Gd = mean_Gd + _linear(self.out, mixed.transpose(-3, -2).flatten(1))
        return torch.where(sizes_G[:, None] == 1, embedded_GSd[:, 0], merged_Gd)


class StopHead(nn.Module):
    """Says after each token of a micro step whether the segment ends with it: a logit."""

    def __init__(self, d: int):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, 1)

    def forward(self, x_Pd: Tensor) -> Tensor:
        x_Pd = _linear(self.first, x_Pd)
        for layer in (self.second, self.third):
            x_Pd = _linear(layer, F.silu(x_Pd))
        return x_Pd[:, 0]


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return product(x, layer.weight) + layer.bias


class MicroDrafts(GuessingHeads):
    """The micro-step decoder in training: head k (from 0) guesses, at position p, token p + k + 2, given those before.

    Args:
        head_Vd, vocabulary_V, vocab_size: see `GuessingHeads`.
        training: see `HAMburgerTraining`.
        backbone: its shape, rotation and embedding are used.
    """

    def __init__(
        self, head_Vd: Tensor, vocabulary_V: Tensor, vocab_size: int, training: HAMburgerTraining, *,
        backbone: Backbone,
    ):  # fmt: skip
        super().__init__(head_Vd, vocabulary_V, vocab_size, training, heads=training.most - 1, output=training.output)
        self.options, self.taps, self.most = training, features_of(backbone.config.layers), training.most
        self.embed: Callable[[Tensor], Tensor] = backbone.embed
        blocks = [DecoderLayer(backbone.config, backbone.rotation) for _ in range(training.blocks)]
        self.blocks: Sequence[DecoderLayer] = cast("Sequence[DecoderLayer]", nn.ModuleList(blocks))

    def micro(self, features_GFd: Tensor, embedded_GKd: Tensor) -> Tensor:
        """Returns what the output head reads after each of a macro step's tokens, [G, K, d]."""
        x_GNd = torch.cat([features_GFd, embedded_GKd], 1)
        for block in self.blocks:
            x_GNd = block(x_GNd)
        return x_GNd[:, features_GFd.shape[1] :]

    def embedded(self, tokens: Tensor) -> Tensor:
        """Embeddings of tokens in any arrangement."""
        return self.embed(tokens.flatten().cpu()).to(tokens.device).unflatten(0, tokens.shape)

    def read(self, batch: TrainingBatch, sources_P: Tensor) -> Tensor:
        features_PFd = torch.stack([batch.states[tap].float().flatten(0, 1)[sources_P] for tap in self.taps], 1)
        tokens = batch.tokens_BT.flatten()
        after_PK = sources_P[:, None] + 1 + torch.arange(self.heads, device=sources_P.device)
        # beyond the end of the text nothing is guessed
        return self.micro(features_PFd, self.embedded(tokens[after_PK.clamp(max=len(tokens) - 1)])).transpose(0, 1)

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        targets_PK, sources_P = targets(batch, self.heads, self.ahead)
        if self.training:  # a macro step costs more than the pass that gave its features
            kept_P = torch.rand(len(sources_P), device=sources_P.device) < self.options.positions
            targets_PK, sources_P = targets_PK[kept_P], sources_P[kept_P]
        return self.losses_at(batch, self.read(batch, sources_P), targets_PK, sources_P) if len(sources_P) else {}

    def parts(self) -> dict[str, Tensor]:
        """The trained tensors by their names in a checkpoint."""
        return {
            f"micro.{index}.{name}": weight
            for index, block in enumerate(self.blocks)
            for name, weight in block.named().items()
        }

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.stored(self.parts()), {"heads": self.heads} | stored_options(self.options)

    @torch.no_grad()
    def start(self, arch: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if (arch["most"], arch["blocks"]) != (self.most, self.options.blocks):
            raise UsageError(
                f"It is made with other options; train with `most={arch['most']}` and `blocks={arch['blocks']}`."
            )
        for name, weight in self.parts().items():
            if name in tensors:  # those of a frozen model have no merger and no stop head
                weight.copy_(tensors[name])
        self.start_outputs(tensors)


@dataclass
class Segments:
    """The segments of a batch of conversations, one after the other.

    Attributes:
        conversation_G, begin_G, size_G: of each; begin is the index of its first token. Tokens that the model did not
            write are segments of their own.
        written_G: whether the model wrote it.
    """

    conversation_G: Tensor
    begin_G: Tensor
    size_G: Tensor
    written_G: Tensor

    @classmethod
    def of(cls, tokens_BT: Tensor, sizes: Sequence[Sequence[int]], written: Sequence[Sequence[bool]]) -> Segments:
        """Returns given segments.

        Args:
            sizes, written: per conversation, of all its segments in order.

        Raises:
            UsageError: a conversation has fewer tokens.
        """
        for each in sizes:
            if sum(each) > tokens_BT.shape[1] or min(each, default=1) < 1:
                raise UsageError(
                    f"Segments of {sum(each)} tokens do not fit a text of {tokens_BT.shape[1]}; cut them at its end."
                )
        flat = [
            (b, begin, size, wrote)
            for b, (of_b, written_b) in enumerate(zip(sizes, written, strict=True))
            for begin, size, wrote in zip(accumulate(of_b, initial=0), of_b, written_b, strict=False)
        ]
        columns = [torch.tensor(column, device=tokens_BT.device) for column in zip(*flat, strict=True)]
        return cls(*columns)


class MacroSteps(MicroDrafts):
    """The model and all its grafts in training; its drafts are measured as those of `MicroDrafts`, on text as it is.

    Args:
        model: a transformers model, with peft's adapters or without; folder: where it was read from.
        rest: see `MicroDrafts`.
    """

    def __init__(self, model: nn.Module, folder: Path, *rest: Any, backbone: Backbone):
        super().__init__(*rest, backbone=backbone)
        d, vocab = backbone.config.hidden, backbone.config.vocab
        self.merger, self.stop = Merger(d, self.most), StopHead(d)
        self.student = TrainableBackbone(model, folder)
        self.output_Vd: Tensor
        self.register_buffer("output_Vd", backbone.head_rows(torch.arange(vocab)).cpu(), persistent=False)
        self.least = entropy_at(SURE, vocab)

    def groups(self) -> list[tuple[list[nn.Parameter], Callable[[float], float]]]:
        of_model = set(map(id, self.student.learns))
        grafts = [p for p in self.parameters() if p.requires_grad and id(p) not in of_model]
        return [(grafts, lambda done: 1.0), (list(self.student.learns), lambda done: self.options.slower)]

    def start_outputs(self, tensors: dict[str, Tensor]) -> None:
        """Leaves a copy that grafts of the frozen model have learnt: what they write goes through the model's own."""

    def prepared(self, batch: TrainingBatch) -> TrainingBatch:
        return replace(batch, states=self.student.states(batch.tokens_BT, self.taps))

    def measured(self, batch: TrainingBatch) -> tuple[dict[str, Tensor], list[HeadGuesses]]:
        return self.losses(batch), self.guesses(batch)  # one reads segments, the other text as it is

    # -- segments ---------------------------------------------------------------------------------------------------

    def segments(self, batch: TrainingBatch) -> Segments:
        """Cuts the last answer of each conversation by the entropies of the frozen model, whose states the batch holds.

        What comes before it is a prompt, as in decoding: a slot for each token, and none of them learns.
        """
        sizes, written = list[list[int]](), list[list[bool]]()
        for final_Td, written_T in zip(batch.states[FINAL_NORM], batch.supervised_BT.tolist(), strict=True):
            end = max((t + 1 for t, wrote in enumerate(written_T) if wrote), default=0)
            begin = next((t + 1 for t in range(end - 1, -1, -1) if not written_T[t]), 0)
            begin = min(max(begin, 1), end)  # nothing comes before the first token
            entropy_P = entropies(final_Td[max(begin - 1, 0) : max(end - 1, 0)], self.output_Vd)
            cut = segment(entropy_P.tolist(), self.most, self.options.rule, self.least)
            sizes.append([1] * begin + cut)
            written.append([False] * begin + [True] * len(cut))
        return Segments.of(batch.tokens_BT, sizes, written)

    def fused(self, tokens_BT: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """The model's input: a vector for each segment [B, C, d], its position [B, C], and where there is one.

        Padding comes last.
        """
        step_S = torch.arange(self.most, device=tokens_BT.device)
        place_GS = (segments.begin_G[:, None] + step_S).clamp(max=tokens_BT.shape[1] - 1)
        tokens_GS = tokens_BT[segments.conversation_G[:, None], place_GS]
        merged_Gd = self.merger(self.embedded(tokens_GS), segments.size_G)
        count_B = segments.conversation_G.bincount(minlength=len(tokens_BT))
        there_BC = torch.arange(int(count_B.max()), device=tokens_BT.device) < count_B[:, None]
        input_BCd = merged_Gd.new_zeros(*there_BC.shape, merged_Gd.shape[1])
        position_BC = torch.zeros_like(there_BC, dtype=torch.int64)
        input_BCd[there_BC] = merged_Gd
        position_BC[there_BC] = segments.begin_G + segments.size_G - 1
        return input_BCd, position_BC, there_BC

    def steps(self, tokens_BT: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the macro steps that write segments; returns states of all their tokens, in order, for both heads.

        Returns:
            What output and stop head read for each token, [P, d]; its place in the flattened batch, [P]; whether it is
            the last of its segment.
        """
        input_BCd, position_BC, there_BC = self.fused(tokens_BT, segments)
        states = self.student.states_of(input_BCd, position_BC, there_BC, self.taps)
        features_GFd = torch.stack([states[tap].float()[there_BC] for tap in self.taps], 1)
        written_G = segments.written_G.nonzero()[:, 0]
        features_GFd = features_GFd[written_G - 1]  # the state in front of it writes it
        size_G, begin_G = segments.size_G[written_G], segments.begin_G[written_G]
        step_S = torch.arange(self.most, device=tokens_BT.device)
        place_GS = segments.conversation_G[written_G, None] * tokens_BT.shape[1] + begin_G[:, None] + step_S
        within_GS = step_S < size_G[:, None]
        x_GSd = features_GFd.new_zeros(*within_GS.shape, features_GFd.shape[-1])
        x_GSd[:, 0] = features_GFd[:, -1]
        several_G = (size_G > 1).nonzero()[:, 0]
        tokens_GK = tokens_BT.flatten()[place_GS[several_G, :-1].clamp(max=tokens_BT.numel() - 1)]
        x_GSd = x_GSd.index_put(
            (several_G[:, None], step_S[1:]), self.micro(features_GFd[several_G], self.embedded(tokens_GK))
        )
        return x_GSd[within_GS], place_GS[within_GS], (step_S == size_G[:, None] - 1)[within_GS]

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        if not batch.supervised_BT[:, 1:].any():
            return {}
        x_Pd, place_P, last_P = self.steps(batch.tokens_BT, self.segments(batch))
        ids_Pm = torch.cat([
            batch.tokens_BT.flatten()[place_P, None], batch.teacher_ids_BTm.flatten(0, 1)[place_P - 1]
        ], 1)  # fmt: skip
        p_Pm = torch.cat([
            torch.full((len(place_P), 1), 1 - self.soft, device=x_Pd.device),
            self.soft * batch.teacher_p_BTm.flatten(0, 1)[place_P - 1],
        ], 1)  # fmt: skip
        scale_P = torch.full_like(p_Pm[:, 0], 1 / len(p_Pm))
        text, _ = draft_loss(x_Pd, self.output_Vd, ids_Pm, p_Pm, scale_P, self.acceptance)
        text = text + self.acceptance  # as in `GuessingHeads`: what cannot be accepted counts as rejected
        stop = F.binary_cross_entropy_with_logits(self.stop(x_Pd), last_P.float())
        return {"text": text, "stop": weighed(stop, STOP_WEIGHT)}

    # -- the result -------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Tensor]:
        found = super().parts() | {f"merger.{name}": weight for name, weight in self.merger.named_parameters()}
        return found | {f"stop.{name}": weight for name, weight in self.stop.named_parameters()}

    def save_backbone(self, base: str, out: Path) -> str:
        return self.student.save(base, out)
