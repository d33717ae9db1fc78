"""Draft vocabularies: heads choose among the most frequent tokens, verification among all.

Legend: V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draft_vocabulary(counts_V: Tensor, size: int) -> Tensor:
    """The `size` most frequent tokens, ascending [D] int64 (all of them for 0); ties go to the smaller id."""
    if not size or size >= len(counts_V):
        return torch.arange(len(counts_V))
    return counts_V.argsort(descending=True, stable=True)[:size].sort().values


def index_in(vocabulary_D: Tensor, vocab_size: int) -> Tensor:
    """[V] int64: index of each token in a draft vocabulary, -1 where it is not in it."""
    index_V = torch.full((vocab_size,), -1)
    index_V[vocabulary_D] = torch.arange(len(vocabulary_D))
    return index_V
