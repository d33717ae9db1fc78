"""What drafters learn with: the batch, what a trainer asks of a module, the loss of draft heads, a layer of one's own.

A drafter learns from conversations that the backbone itself wrote. The trainer knows no method: it hands a batch to
`Trainable.losses` and adds up the terms that come back.

Legend: B conversations, T tokens of the longest, d hidden width, P positions, K heads, V (draft) vocabulary, m most
probable tokens kept of the backbone's own distribution, R guesses of a head.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretell.backbone import Backbone
from foretell.drafting.learning.products import number_type, product
from foretell.drafting.options import option
from foretell.drafting.vocabulary import draft_vocabulary, index_in
from foretell.errors import UsageError
from foretell.loading.config import ModelConfig
from foretell.loading.tensors import ATTENTION, LAYER, bare, layer_shapes
from foretell.trees.search import ENDED, MISSED

CHUNK = 512
"""Positions whose logits exist at once."""
RANKS = 32
"""Guesses of a head that are looked at when trees are searched."""
CALIBRATION_TOP_K = 10
"""Guesses of a head whose probabilities are held against what came."""


@dataclass
class TrainingBatch:
    """Conversations side by side, padded on the right.

    Attributes:
        tokens_BT: int64; padding is 0.
        supervised_BT: bool; tokens the model wrote, the only ones worth guessing. False on padding.
        states: tap -> [B, T, d], what the backbone computed at each token.
        teacher_ids_BTm, teacher_p_BTm: the backbone's most probable tokens *after* each position whose next token
            is supervised, and their probabilities (elsewhere zeros); the rest of its distribution is left out.
    """

    tokens_BT: Tensor
    supervised_BT: Tensor
    states: dict[int, Tensor]
    teacher_ids_BTm: Tensor
    teacher_p_BTm: Tensor

    def to(self, device: torch.device) -> TrainingBatch:
        states = {tap: tensor.to(device) for tap, tensor in self.states.items()}
        rest = (self.tokens_BT, self.supervised_BT, self.teacher_ids_BTm, self.teacher_p_BTm)
        tokens, supervised, ids, p = (tensor.to(device) for tensor in rest)
        return TrainingBatch(tokens, supervised, states, ids, p)


@dataclass(frozen=True)
class Guessed:
    """What heads would have guessed over the written part of a conversation.

    Attributes:
        ranks_PK: int64 as in `trees.search`: ranks of what came.
        log_probs_PKR: of each head's first guesses, best first, R of them at most `CALIBRATION_TOP_K`.
    """

    ranks_PK: Tensor
    log_probs_PKR: Tensor


class Trainable(nn.Module):
    """The learning form of a drafter: an `nn.Module` with its own loss, made by its method's `trainable`.

    Attributes:
        taps: backbone states that `losses` reads.
    """

    taps: tuple[int, ...] = ()

    def begin(self, done: float) -> None:
        """Told before each step which share of the training is done, for what changes with it."""

    def groups(self) -> list[tuple[list[nn.Parameter], Callable[[float], float]]]:
        """What learns, and how fast relative to the trainer's rate at a share of the training."""
        return [([p for p in self.parameters() if p.requires_grad], lambda done: 1.0)]

    def save_backbone(self, base: str, out: Path) -> str:
        """Writes what it changed of the backbone `base`; returns the name of the model that it drafts for."""
        return base

    def start(self, arch: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Takes over what a checkpoint of a related drafter has learnt.

        Raises:
            UsageError: it does not fit; the sentence says "It".
        """
        raise UsageError("This drafter cannot begin with another's numbers; leave out `start=`.")

    @abstractmethod
    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Named terms, each a scalar; the trainer minimises their sum. {} where nothing is supervised.

        A term that counts for more or less than others is `weighed`.
        """

    @abstractmethod
    def guesses(self, batch: TrainingBatch) -> list[Guessed]:
        """Per conversation, what would have been guessed."""

    @abstractmethod
    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors to save, and the numbers that the drafter needs besides to make its module of them."""


class Method(Protocol):
    """What a drafter class adds when it can be trained.

    Attributes:
        Training: a frozen dataclass, the only list of what a training can be given (see `drafting.options`).
    """

    Training: ClassVar[type[Any]]

    @classmethod
    def trainable(cls, backbone: Any, training: Any, counts_V: Tensor, folder: Path | None = None) -> Trainable:
        """Returns a fresh module.

        Args:
            training: an instance of `Training`, whose values `drafting.options.parse` has checked.
            counts_V: how often each token was written in the data, for draft vocabularies.
            folder: of the backbone's files, for methods that change it.
        """
        ...


class _SoftCrossEntropy(torch.autograd.Function):
    """Gradients are made while a chunk's logits are at hand; all logits at once would be gigabytes."""

    @staticmethod
    def forward(ctx: Any, x_Pd: Tensor, weight_Vd: Tensor, ids_Pm: Tensor, p_Pm: Tensor) -> Tensor:
        dtype = number_type(x_Pd.device)
        weight = weight_Vd.to(dtype)
        grad_x = torch.empty_like(x_Pd)
        grad_weight = torch.zeros_like(weight_Vd) if ctx.needs_input_grad[1] else None
        total = x_Pd.new_zeros(())
        for at in range(0, len(x_Pd), CHUNK):
            x, ids, p = (t[at : at + CHUNK] for t in (x_Pd.to(dtype), ids_Pm, p_Pm))
            log_q = (x @ weight.T).float().log_softmax(-1)
            total -= (p * log_q.gather(-1, ids)).sum()
            slope = log_q.exp_().mul_(p.sum(-1, keepdim=True)).scatter_add_(-1, ids, -p).to(dtype)
            grad_x[at : at + CHUNK] = slope @ weight
            if grad_weight is not None:
                grad_weight += slope.T @ x
        ctx.save_for_backward(grad_x, *(() if grad_weight is None else (grad_weight,)))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, *rest = ctx.saved_tensors
        return grads[0] * grad_x, grads[0] * rest[0] if rest else None, None, None


def soft_cross_entropy(x_Pd: Tensor, weight_Vd: Tensor, ids_Pm: Tensor, p_Pm: Tensor) -> Tensor:
    """-Σ p · log softmax(x Wᵀ)[ids], summed over positions; multiplied as `products` says, summed in float32.

    Args:
        ids_Pm, p_Pm: target tokens and their probabilities; a zero probability makes its id irrelevant, and what is
            missing to one is a part of the target that is not taught.
    """
    return _SoftCrossEntropy.apply(x_Pd, weight_Vd, ids_Pm, p_Pm)


def weighed(term: Tensor, weight: float) -> Tensor:
    """The same number with `weight` times its gradient: runs of different weights learn otherwise, and log alike."""
    return term.detach() + weight * (term - term.detach())


@dataclass(frozen=True)
class HeadTraining:
    """Options of every method that trains heads over a draft vocabulary."""

    draft_vocab: int = option(8192, "The most frequent tokens, which heads choose from; 0 for all.", low=0, high=2**31)
    soft: float = option(
        0.5, "Share of the loss against the model's whole distribution instead of the written token.", low=0, high=1
    )


def draft_outputs(backbone: Backbone, counts_V: Tensor, size: int) -> tuple[Tensor, Tensor, int]:
    """What `GuessingHeads` is made from: output rows of a draft vocabulary, its token ids, and the vocabulary's size.

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


class GuessingHeads(Trainable):
    """K heads: the k-th (from 0) guesses, at position p, token p + k + `ahead` out of a draft vocabulary.

    Their loss is a cross-entropy each, weighed by decay^(k + 1), against the written token and the backbone's own
    distribution where it was written. A method says what the output matrices read.

    Args:
        head_Vd: the backbone's output rows of the draft vocabulary.
        vocabulary_V: their token ids; vocab_size: of the backbone.
        output: whose output matrices: shared (the backbone's, frozen), tied (one copy for all heads) or own.
        soft: share of the loss that is against the backbone's distribution instead of the written token.
    """

    decay = 1.0
    ahead = 2  # heads beside the output head begin where it ends; who guesses in its place begins with 1
    head_Vd: Tensor
    vocabulary_V: Tensor
    place: Tensor

    def __init__(self, head_Vd: Tensor, vocabulary_V: Tensor, vocab_size: int, *, heads: int, output: str, soft: float):
        super().__init__()
        self.heads, self.output, self.soft = heads, output, soft
        if output == "shared":
            self.register_buffer("head_Vd", head_Vd.float(), persistent=False)
        else:
            copies = heads if output == "own" else 1
            self.head_KVd = nn.Parameter(head_Vd.float().repeat(copies, 1, 1))
        self.register_buffer("vocabulary_V", vocabulary_V)
        self.register_buffer("place", index_in(vocabulary_V, vocab_size), persistent=False)

    @abstractmethod
    def read(self, batch: TrainingBatch, sources_P: Tensor) -> Tensor:
        """What the output matrices read, [K, P, d], at places of the flattened batch.

        Where a head has no token to guess any more, anything will do.
        """

    def head(self, k: int) -> Tensor:
        """Output matrix [V, d] of head k."""
        if self.output == "shared":
            return self.head_Vd
        return self.head_KVd[k if self.output == "own" else 0]

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        targets_PK, sources_P = targets(batch, self.heads, self.ahead)
        if not len(sources_P):
            return {}
        x_KPd = self.read(batch, sources_P)
        out = {}
        for k in range(self.heads):
            if (targets_PK[:, k] >= 0).any():
                term = self.term(batch, x_KPd[k], k, targets_PK[:, k], sources_P)
                out[f"head {k + 1}"] = weighed(term, self.decay ** (k + 1))
        return out

    def term(self, batch: TrainingBatch, x_Pd: Tensor, k: int, token_P: Tensor, sources_P: Tensor) -> Tensor:
        """Cross-entropy of what head k says, averaged over the places that have a token to guess."""
        live = token_P >= 0
        teacher = [
            each.flatten(0, 1)[sources_P[live] + k + self.ahead - 1]
            for each in (batch.teacher_ids_BTm, batch.teacher_p_BTm)
        ]
        ids_Pm = torch.cat([token_P[live][:, None], teacher[0]], 1)
        p_Pm = torch.cat([torch.full((len(ids_Pm), 1), 1 - self.soft, device=ids_Pm.device), self.soft * teacher[1]], 1)
        place_Pm = self.place[ids_Pm]
        p_Pm = p_Pm * (place_Pm >= 0)  # what the draft vocabulary cannot say is not taught
        taught = p_Pm.sum(1) > 0
        loss = soft_cross_entropy(x_Pd[live][taught], self.head(k), place_Pm[taught].clamp(min=0), p_Pm[taught])
        return loss / live.sum()

    @torch.no_grad()
    def guesses(self, batch: TrainingBatch) -> list[Guessed]:
        targets_PK, sources_P = targets(batch, self.heads, self.ahead)
        x_KPd, ranks_PK = self.read(batch, sources_P), torch.full_like(targets_PK, MISSED)
        log_probs_PKR = x_KPd.new_zeros(*targets_PK.shape, min(CALIBRATION_TOP_K, len(self.vocabulary_V)))
        for k in range(self.heads):
            for at in range(0, len(sources_P), CHUNK):
                logits = product(x_KPd[k, at : at + CHUNK], self.head(k))
                values, best = logits.topk(min(RANKS, logits.shape[1]))
                hit = self.vocabulary_V[best] == targets_PK[at : at + CHUNK, k, None]
                ranks_PK[at : at + CHUNK, k] = torch.where(hit.any(1), hit.int().argmax(1), MISSED)
                log_probs_PKR[at : at + CHUNK, k] = values[:, : log_probs_PKR.shape[2]] - logits.logsumexp(
                    1, keepdim=True
                )
        ranks_PK.masked_fill_(targets_PK < 0, ENDED)
        rows = sources_P // batch.tokens_BT.shape[1]
        where = [rows == row for row in range(len(batch.tokens_BT))]
        return [Guessed(ranks_PK[mine].cpu(), log_probs_PKR[mine].cpu()) for mine in where]

    def take_outputs(self, tensors: dict[str, Tensor]) -> None:
        """Takes over output matrices, for the tokens that both choose from."""
        if self.output == "shared" or "head" not in tensors:
            return
        place_V = index_in(tensors["vocabulary"].long(), len(self.place))[self.vocabulary_V.cpu()]
        if len(tensors["head"]) not in (1, len(self.head_KVd)):
            raise UsageError("It has an output matrix for each head; train with `output='own'` and as many heads.")
        head_KVd = tensors["head"].float().expand(len(self.head_KVd), -1, -1)
        with torch.no_grad():
            self.head_KVd[:, place_V >= 0] = head_KVd[:, place_V[place_V >= 0]].to(self.head_KVd.device)

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors: those of the method, the output matrices and the draft vocabulary."""
        if self.output != "shared":
            tensors = {**tensors, "head": self.head_KVd}
        return {name: tensor.detach().bfloat16() for name, tensor in tensors.items()} | {
            "vocabulary": self.vocabulary_V.int()
        }


def targets(batch: TrainingBatch, heads: int, ahead: int) -> tuple[Tensor, Tensor]:
    """Where the first head, which guesses the token so far `ahead`, has something to learn.

    Returns:
        Targets [P, K], -1 where the token is missing or not supervised; places in the flattened batch [P].
    """
    tokens_BT, supervised_BT = batch.tokens_BT, batch.supervised_BT
    targets_BTK = torch.full((*tokens_BT.shape, heads), -1, device=tokens_BT.device)
    for k in range(heads):
        shift = k + ahead
        if shift < tokens_BT.shape[1]:
            targets_BTK[:, :-shift, k] = torch.where(supervised_BT[:, shift:], tokens_BT[:, shift:], -1)
    sources = (targets_BTK[..., 0] >= 0).flatten().nonzero()[:, 0]
    return targets_BTK.flatten(0, 1)[sources], sources


class DecoderLayer(nn.Module):
    """A layer of a drafter's own while it learns, of the backbone's shape; it begins as the identity.

    Its tensors have the names that `Backbone.layer` reads. Float32, multiplied as `products` says.

    Args:
        rotation: of the backbone: positions -> cosine and sine.
        mlp: false leaves attention alone.
    """

    def __init__(self, config: ModelConfig, rotation: Callable[[Tensor], tuple[Tensor, Tensor]], mlp: bool = True):
        super().__init__()
        self.config, self.rotation, self.mlp = config, rotation, mlp
        weights: dict[str, Tensor] = {}
        for full_name, shape in layer_shapes(bare(config), LAYER if mlp else ATTENTION).items():
            name = full_name.removesuffix(".weight")
            weights[name] = torch.randn(shape) / math.sqrt(shape[-1]) if len(shape) > 1 else torch.ones(shape)
            if name in ("self_attn.o_proj", "mlp.down_proj"):
                weights[name].zero_()  # the stream starts as it came
        self.weights = nn.ParameterDict({name.replace(".", "/"): weight for name, weight in weights.items()})

    def named(self) -> dict[str, Tensor]:
        return {f"{name.replace('/', '.')}.weight": weight for name, weight in self.weights.items()}

    def forward(self, h_BTd: Tensor) -> Tensor:
        c = self.config
        x_BTd = self._norm("input_layernorm", h_BTd)
        q, k, v = (
            self._linear(f"self_attn/{name}_proj", x_BTd).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
            for name in "qkv"
        )
        cosine_TD, sine_TD = self.rotation(torch.arange(h_BTd.shape[1]))
        mixed = F.scaled_dot_product_attention(
            _rotated(q, cosine_TD, sine_TD), _rotated(k, cosine_TD, sine_TD), v, is_causal=True, enable_gqa=True
        )
        h_BTd = h_BTd + self._linear("self_attn/o_proj", mixed.transpose(1, 2).flatten(2))
        if not self.mlp:
            return h_BTd
        x_BTd = self._norm("post_attention_layernorm", h_BTd)
        gated = F.silu(self._linear("mlp/gate_proj", x_BTd)) * self._linear("mlp/up_proj", x_BTd)
        return h_BTd + self._linear("mlp/down_proj", gated)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return product(x, self.weights[name])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[name], self.config.eps)


def _rotated(x_BHTD: Tensor, cosine_TD: Tensor, sine_TD: Tensor) -> Tensor:
    one, other = x_BHTD.chunk(2, -1)
    cosine, sine = cosine_TD.to(x_BHTD), sine_TD.to(x_BHTD)
    return torch.cat([one * cosine - other * sine, other * cosine + one * sine], -1)
