"""Draft heads in training: guesses out of a draft vocabulary, a loss for each head.

Legend: B conversations, T tokens of the longest, d hidden width, P positions, K heads, V (draft) vocabulary, R guesses
of a head.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foretell.backbone import Backbone
from foretell.drafting.learning.losses import chunk_size, draft_loss, dynamic_weights, probabilities, targets
from foretell.drafting.learning.number_types import product
from foretell.drafting.learning.trainable import CALIBRATION_TOP_K, HeadGuesses, Trainable, TrainingBatch
from foretell.drafting.options import option
from foretell.drafting.vocabulary import draft_vocabulary, index_in
from foretell.errors import UsageError
from foretell.trees.search import ENDED, MISSED

RANKS = 32
"""Guesses of a head that are ranked for the search of trees."""


@dataclass(frozen=True)
class HeadTraining:
    """Options of every method that trains heads over a draft vocabulary."""

    draft_vocab: int = option(8192, "The most frequent tokens, which heads choose from; 0 for all.", low=0, high=2**31)
    soft: float = option(
        0.5, "Share of the loss against the model's whole distribution instead of the written token.", low=0, high=1
    )
    acceptance: float = option(
        0.0, "Share of the loss that is the probability of being rejected; the rest is cross-entropy.",
        low=0, high=1, added=True,
    )  # fmt: skip


@dataclass(frozen=True)
class SeveralHeadsTraining(HeadTraining):
    """Options of every method with heads that guess tokens one after the other."""

    position_weights: str = option(
        "fixed", "Weights of the heads' losses: fixed by head, or dynamic by what is accepted now (D-PACE).",
        choices=("fixed", "dynamic"), added=True,
    )  # fmt: skip


def draft_outputs(backbone: Backbone, counts_V: Tensor, size: int) -> tuple[Tensor, Tensor, int]:
    """Returns the arguments of `GuessingHeads`: output rows of a draft vocabulary, its ids, the vocabulary's size.

    Args:
        counts_V: how often each token was written; size: tokens of the draft vocabulary, 0 for all.
    """
    vocabulary_V = draft_vocabulary(counts_V, size)
    return backbone.head_rows(vocabulary_V).cpu(), vocabulary_V, len(counts_V)


def evenly_spread(taps: int, backbone: Backbone) -> list[int]:
    """As many layers as `taps`, evenly spread over the backbone.

    Raises:
        UsageError: the backbone has fewer layers.
    """
    layers = backbone.config.layers
    if taps > layers - 1:
        raise UsageError(f"taps is {taps}; it must lie between 0 and {layers - 1} for this model of {layers} layers.")
    return [round(layers * (i + 1) / (taps + 1)) for i in range(taps)]


def learnt_rows(p_Pm: Tensor) -> Tensor | slice:
    """Selects the positions with a target in the draft vocabulary; on a GPU all, for the others have no gradient.

    Counting them would wait for the GPU, which takes longer than multiplying them.
    """
    return slice(None) if p_Pm.is_cuda else p_Pm.sum(1) > 0


class GuessingHeads(Trainable):
    """K heads: the k-th (from 0) guesses, at position p, token p + k + `ahead` out of a draft vocabulary.

    The loss of each is a cross-entropy, weighed by decay^(k + 1), against the written token and the backbone's own
    distribution at its position, or the probability that a guess is rejected by this mixture. Tokens outside the draft
    vocabulary, and those of the backbone's distribution that are not stored, are never guessed right: they have no
    gradient. Weights of `dynamic` heads follow from what is accepted at each position (`losses.dynamic_weights`).
    Subclasses compute the input of the output matrices.

    Args:
        head_Vd: the backbone's output rows of the draft vocabulary.
        vocabulary_V: their token ids; vocab_size: of the backbone.
        output: whose output matrices: shared (the backbone's, frozen), tied (one copy for all heads) or own.
        training: `soft`, `acceptance` and, where it has them, `position_weights` are read here.
    """

    decay = 1.0
    ahead = 2  # heads beside the output head; 1 for a head in its place
    head_Vd: Tensor
    vocabulary_V: Tensor
    index_V: Tensor

    def __init__(
        self, head_Vd: Tensor, vocabulary_V: Tensor, vocab_size: int, training: HeadTraining, *, heads: int, output: str
    ):  # fmt: skip
        super().__init__()
        self.heads, self.output = heads, output
        self.soft, self.acceptance, self.taught = training.soft, training.acceptance, training.soft > 0
        self.dynamic = isinstance(training, SeveralHeadsTraining) and training.position_weights == "dynamic"
        if output == "shared":
            self.register_buffer("head_Vd", head_Vd.float(), persistent=False)
        else:
            copies = heads if output == "own" else 1
            self.head_KVd = nn.Parameter(head_Vd.float().repeat(copies, 1, 1))
        self.register_buffer("vocabulary_V", vocabulary_V)
        self.register_buffer("index_V", index_in(vocabulary_V, vocab_size), persistent=False)

    @abstractmethod
    def read(self, batch: TrainingBatch, sources_P: Tensor) -> Tensor:
        """Returns the input of the output matrices, [K, P, d], at positions of the flattened batch.

        Values where a head has no token to guess are ignored.
        """

    def head(self, k: int) -> Tensor:
        """Output matrix [V, d] of head k."""
        if self.output == "shared":
            return self.head_Vd
        return self.head_KVd[k if self.output == "own" else 0]

    def prepared(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch with the states that `read` needs; those of a backbone that changes are computed now."""
        return batch

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        batch = self.prepared(batch)
        targets_PK, sources_P = targets(batch, self.heads, self.ahead)
        return self.losses_at(batch, self.read(batch, sources_P), targets_PK, sources_P) if len(sources_P) else {}

    @torch.no_grad()
    def guesses(self, batch: TrainingBatch) -> list[HeadGuesses]:
        batch = self.prepared(batch)
        targets_PK, sources_P = targets(batch, self.heads, self.ahead)
        return self.guesses_at(batch, self.read(batch, sources_P), targets_PK, sources_P)

    @torch.no_grad()
    def measured(self, batch: TrainingBatch) -> tuple[dict[str, Tensor], list[HeadGuesses]]:
        batch = self.prepared(batch)
        targets_PK, sources_P = targets(batch, self.heads, self.ahead)
        x_KPd = self.read(batch, sources_P)
        losses = self.losses_at(batch, x_KPd, targets_PK, sources_P) if len(sources_P) else {}
        return losses, self.guesses_at(batch, x_KPd, targets_PK, sources_P)

    def losses_at(
        self, batch: TrainingBatch, x_KPd: Tensor, targets_PK: Tensor, sources_P: Tensor
    ) -> dict[str, Tensor]:
        """The loss of each head that has tokens to guess, from what `read` returned."""
        live_KP = targets_PK.T >= 0
        if self.dynamic and torch.is_grad_enabled():
            weights_KP = self.dynamic_weights(x_KPd, targets_PK)
        else:
            weights_KP = torch.tensor([[self.decay ** (k + 1)] for k in range(self.heads)], device=live_KP.device)
        totals, means_K = self.mean_losses(batch, x_KPd, targets_PK, sources_P, weights_KP)
        terms = list(means_K)
        for k, total in enumerate(totals):  # one of all heads that share an output matrix; the first has targets
            terms[k] = terms[k] + (total - total.detach())
        learns_K = live_KP.any(1).tolist()
        return {f"head {k}": term for k, term in enumerate(terms, start=1) if learns_K[k - 1]}

    def dynamic_weights(self, x_KPd: Tensor, targets_PK: Tensor) -> Tensor:
        """Weights of every head at every position, [K, P]: another pass over the logits, before the losses'."""
        live_PK = targets_PK >= 0
        index_PK = torch.where(live_PK, self.index_V[targets_PK.clamp(min=0)], -1)
        p_PK = torch.stack([probabilities(x_KPd[k], self.head(k), index_PK[:, k]) for k in range(self.heads)], 1)
        return dynamic_weights(p_PK, live_PK).T

    def mean_losses(
        self, batch: TrainingBatch, x_KPd: Tensor, targets_PK: Tensor, sources_P: Tensor, weights_KP: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """The loss of each head, averaged over the positions that have a token to guess.

        Heads that share an output matrix are multiplied by it at once.

        Args:
            weights_KP: how much each head counts at each position, or [K, 1].

        Returns:
            The weighted averages, summed over heads that share an output matrix; the averages without weight and
            gradient, [K].
        """
        live_KP = targets_PK.T >= 0
        counts_K = live_KP.sum(1).clamp(min=1)
        scale_KP = (weights_KP / counts_K[:, None]).expand(live_KP.shape)
        ids_KPm, p_KPm = self.aims(batch, targets_PK, sources_P)
        totals, losses_KP = list[Tensor](), torch.zeros(live_KP.shape, device=x_KPd.device)
        for heads in [slice(k, k + 1) for k in range(self.heads)] if self.output == "own" else [slice(None)]:
            x_Pd, ids_Pm, p_Pm, scale_P = (each[heads].flatten(0, 1) for each in (x_KPd, ids_KPm, p_KPm, scale_KP))
            kept = learnt_rows(p_Pm)
            total, losses_P = draft_loss(
                x_Pd[kept], self.head(heads.start or 0), ids_Pm[kept], p_Pm[kept], scale_P[kept], self.acceptance
            )
            totals.append(total)
            losses_KP[heads].view(-1)[kept] = losses_P
        return totals, losses_KP.sum(1) / counts_K + self.acceptance  # what cannot be accepted counts as rejected

    def aims(self, batch: TrainingBatch, targets_PK: Tensor, sources_P: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what each head should guess: ids in the draft vocabulary and their probabilities, [K, P, m]."""
        live_KP = targets_PK.T >= 0
        ahead_K1 = torch.arange(self.heads, device=sources_P.device)[:, None] + self.ahead - 1
        places_KP = (sources_P + ahead_K1).clamp(max=batch.tokens_BT.numel() - 1)
        teacher_ids_KPm, teacher_p_KPm = (
            stored.flatten(0, 1)[places_KP] for stored in (batch.teacher_ids_BTm, batch.teacher_p_BTm)
        )
        index_KPm = self.index_V[torch.cat([targets_PK.T.clamp(min=0)[..., None], teacher_ids_KPm], -1)]
        written_p_KP1 = torch.full((*live_KP.shape, 1), 1 - self.soft, device=live_KP.device)
        p_KPm = torch.cat([written_p_KP1, self.soft * teacher_p_KPm], -1)
        p_KPm = p_KPm * ((index_KPm >= 0) & live_KP[..., None])  # tokens outside the draft vocabulary are not learnt
        return index_KPm.clamp(min=0), p_KPm

    def guesses_at(
        self, batch: TrainingBatch, x_KPd: Tensor, targets_PK: Tensor, sources_P: Tensor
    ) -> list[HeadGuesses]:
        """The guesses over each conversation, from what `read` returned."""
        ranks_PK = torch.full_like(targets_PK, MISSED)
        log_probs_PKR = x_KPd.new_zeros(*targets_PK.shape, min(CALIBRATION_TOP_K, len(self.vocabulary_V)))
        chunk = chunk_size(len(self.vocabulary_V), x_KPd.device)
        for k in range(self.heads):
            for at in range(0, len(sources_P), chunk):
                logits = product(x_KPd[k, at : at + chunk], self.head(k))
                values, best = logits.topk(min(RANKS, logits.shape[1]))
                hit = self.vocabulary_V[best] == targets_PK[at : at + chunk, k, None]
                ranks_PK[at : at + chunk, k] = torch.where(hit.any(1), hit.int().argmax(1), MISSED)
                log_probs_PKR[at : at + chunk, k] = values[:, : log_probs_PKR.shape[2]] - logits.logsumexp(
                    1, keepdim=True
                )
        ranks_PK.masked_fill_(targets_PK < 0, ENDED)
        rows = sources_P // batch.tokens_BT.shape[1]
        where = [rows == row for row in range(len(batch.tokens_BT))]
        return [HeadGuesses(ranks_PK[of_row].cpu(), log_probs_PKR[of_row].cpu()) for of_row in where]

    def start_outputs(self, tensors: dict[str, Tensor]) -> None:
        """Copies a checkpoint's output matrices for the tokens of both draft vocabularies."""
        if "head" not in tensors:
            return
        if self.output == "shared":
            kind = "tied" if len(tensors["head"]) == 1 else "own"
            raise UsageError(f"It has learnt output matrices; train with `output={kind!r}`.")
        index_D = index_in(tensors["vocabulary"].long(), len(self.index_V))[self.vocabulary_V.cpu()]
        if len(tensors["head"]) not in (1, len(self.head_KVd)):
            raise UsageError("It has an output matrix for each head; train with `output='own'` and as many heads.")
        head_KVd = tensors["head"].float().expand(len(self.head_KVd), -1, -1)
        with torch.no_grad():
            self.head_KVd[:, index_D >= 0] = head_KVd[:, index_D[index_D >= 0]].to(self.head_KVd.device)

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors: the given ones, the output matrices and the draft vocabulary."""
        if self.output != "shared":
            tensors = {**tensors, "head": self.head_KVd}
        return {name: tensor.detach().bfloat16() for name, tensor in tensors.items()} | {
            "vocabulary": self.vocabulary_V.int()
        }
