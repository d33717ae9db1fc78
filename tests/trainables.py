"""Modules that learn: of a method, made from options by name as the command line makes them, and toys of ten lines
whose optimum, or whose ranks, are known; and data for them."""

import math
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tiny_models import DIMENSIONS
from torch import Tensor, nn

from foretell.backbone import Backbone
from foretell.contracts import FINAL_NORM
from foretell.drafting.learning.trainable import HeadGuesses, Trainable, TrainingBatch
from foretell.drafting.options import parse
from foretell.train.data import Distilled
from foretell.trees.search import ENDED, MISSED

VOCAB, WIDTH = DIMENSIONS["vocab_size"], DIMENSIONS["hidden_size"]
NEVER = VOCAB - 1


def trainable(kind: Any, backbone: Backbone, counts_V: Tensor, folder: Path | None = None, **options: Any) -> Any:
    return kind.trainable(backbone, parse(kind.Training, options), counts_V, folder)


def some_data(size: int = 12, longest: int = 30, seed: int = 0) -> list[Distilled]:
    """Conversations of random tokens, of which one or two spans are answers."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    found = []
    for line in range(size):
        length = number(4, longest)
        tokens = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        cuts = sorted({number(0, length - 1) for _ in range(4)} | {length})
        cuts = cuts[len(cuts) % 2 :]
        found.append(Distilled(line, tokens, [(cuts[i], cuts[i + 1]) for i in range(0, len(cuts), 2)]))
    return found


DATA = some_data()


class Toy(Trainable):
    """What the trainer itself never asks for."""

    def guesses(self, batch: TrainingBatch) -> list[HeadGuesses]:
        raise NotImplementedError

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        raise NotImplementedError


class Line(Toy):
    """Linear regression on the states of what was written; `truth` is its only optimum."""

    taps = (FINAL_NORM,)
    truth: Tensor

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.register_buffer("truth", torch.linspace(-1, 1, width))

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        x_Pd = batch.states[FINAL_NORM][batch.supervised_BT].float()
        if not len(x_Pd):
            return {}
        wrong_P = x_Pd @ self.weight - x_Pd @ self.truth
        return {"square": wrong_P.square().mean(), "nothing": self.weight.sum() * 0}


class Words(Toy):
    """Guesses the token after the next from the state, and the one after it from the same, by two tables."""

    taps = (FINAL_NORM,)

    def __init__(self, vocab: int = VOCAB):
        super().__init__()
        self.table_KdV = nn.Parameter(torch.zeros(2, WIDTH, vocab))

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        out = {}
        for k in range(2):
            live = batch.supervised_BT[:, k + 2 :]
            if live.any():
                logits = batch.states[FINAL_NORM][:, : -(k + 2)][live].float() @ self.table_KdV[k]
                out[f"head {k + 1}"] = nn.functional.cross_entropy(logits, batch.tokens_BT[:, k + 2 :][live])
        return out


class Told(Toy):
    """Its ranks are the tokens of the data, `NEVER` being none; it gives ten guesses 1/10 each. Nothing is learnt."""

    taps = (FINAL_NORM,)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        return {"tokens": self.weight.sum() * 0 + batch.tokens_BT[batch.supervised_BT].float().mean()}

    def guesses(self, batch: TrainingBatch) -> list[HeadGuesses]:
        found = []
        for tokens, supervised in zip(batch.tokens_BT, batch.supervised_BT, strict=True):
            ranks = torch.where(tokens == NEVER, MISSED, tokens)[supervised]
            ahead = torch.cat([ranks, torch.full((2,), ENDED)])
            ranks_PK = torch.stack([ahead[k : k + len(ranks)] for k in range(3)], 1)
            found.append(HeadGuesses(ranks_PK, torch.full((*ranks_PK.shape, 10), math.log(0.1))))
        return found


def once(function: Any, at: int, after: bool = False, error: BaseException | None = None) -> Any:
    """Raises at its n-th call, before or after doing what the function does, and never again; an interruption, or an
    error that is given."""
    calls = count(1)

    def call(*args: Any, **options: Any) -> Any:
        number = next(calls)
        if number == at and not after:
            raise error or KeyboardInterrupt
        found = function(*args, **options)
        if number == at:
            raise error or KeyboardInterrupt
        return found

    return call
