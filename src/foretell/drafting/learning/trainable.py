"""What a drafter learns from, and what a trainer calls: the batch, and the module with its losses.

A drafter learns from conversations that the backbone itself wrote. The trainer knows no method: it hands a batch to
`Trainable.losses` and adds up the terms that it returns.

Legend: B conversations, T tokens of the longest, d hidden width, P positions, K heads, m most probable tokens stored of
the backbone's own distribution, R guesses of a head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foretell.errors import UsageError
from foretell.trees.calibration import Floats, Scale
from foretell.trees.search import Ranks

CALIBRATION_TOP_K = 10
"""Guesses of a head whose probabilities are calibrated."""


@dataclass
class TrainingBatch:
    """Conversations side by side, padded on the right.

    Attributes:
        tokens_BT: int64; padding is 0.
        supervised_BT: bool; tokens the model wrote, the only ones worth guessing. False on padding.
        states: tap -> [B, T, d], what the backbone computed at each token.
        teacher_ids_BTm, teacher_p_BTm: the backbone's most probable tokens *after* each position whose next token
            is supervised, and their probabilities (zeros elsewhere); the rest of its distribution is left out.
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
class HeadGuesses:
    """Guesses of the heads over the written part of a conversation.

    Attributes:
        ranks_PK: int64 as in `trees.search`: ranks of the true tokens.
        log_probs_PKR: of each head's first guesses, best first, at most `CALIBRATION_TOP_K` of them.
    """

    ranks_PK: Tensor
    log_probs_PKR: Tensor


class Trainable(nn.Module):
    """A drafter in training: a module with its own loss, made by its method's `trainable`.

    Attributes:
        taps: backbone states that `losses` reads.
        taught: whether it reads the teacher's distribution, for which all layers are run.
    """

    taps: tuple[int, ...] = ()
    taught: bool = True

    def begin(self, done: float) -> None:
        """Called before each step with training progress in [0, 1]."""

    def groups(self) -> list[tuple[list[nn.Parameter], Callable[[float], float]]]:
        """Trainable parameters, and their learning rate relative to the trainer's at a given progress."""
        return [([p for p in self.parameters() if p.requires_grad], lambda done: 1.0)]

    def save_backbone(self, base: str, out: Path) -> str:
        """Writes the changes of the backbone `base`; returns the name of the model that it drafts for."""
        return base

    def start(self, arch: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Starts from a checkpoint of a related drafter.

        Raises:
            UsageError: it does not fit; the sentence begins with "It".
        """
        raise UsageError("This drafter cannot start from another's weights; train it without a start.")

    @abstractmethod
    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Returns named scalar terms, whose sum is minimized; {} if nothing is supervised.

        Terms are logged as they are; `losses.weighed` gives one another weight in the gradient alone.
        """

    @abstractmethod
    def guesses(self, batch: TrainingBatch) -> list[HeadGuesses]:
        """Returns the guesses over each conversation."""

    def measured(self, batch: TrainingBatch) -> tuple[dict[str, Tensor], list[HeadGuesses]]:
        """Returns both; a module whose losses and guesses read the same computes that once."""
        return self.losses(batch), self.guesses(batch)

    def fitted(self, ranks: Sequence[Ranks], log_probs: Sequence[Floats], scales: Sequence[Scale]) -> dict[str, Any]:
        """Returns what a method fits to held-out guesses besides calibration and trees (`Checkpoint.fitted`).

        Args:
            ranks, log_probs: per conversation, as in `HeadGuesses`; scales: calibration of each head.
        """
        return {}

    @abstractmethod
    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the tensors to save, and the options and sizes that give the module its shape (`Checkpoint.arch`)."""
