"""Penalties and biases: edits of logits before a token is chosen, along each path of a tree as in plain decoding.

The history of a node is the row's tokens and the guesses on its path: a penalty treats a guessed token exactly as the
same token committed. Repetition penalty as in CTRL (arXiv 1909.05858), over prompt and output;
presence and frequency penalties as in the OpenAI API, over the output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foretell.requests import SamplingParams


def process(logits_V: Tensor, params: SamplingParams, history: Sequence[int], prompt_length: int) -> Tensor:
    """Returns edited logits [V] for the token after `history`; the input is not modified."""
    if not params.edits_logits:
        return logits_V
    logits_V = logits_V.clone()
    if params.repetition_penalty != 1 and history:
        seen = torch.tensor(sorted(set(history)), device=logits_V.device)
        values = logits_V[seen]
        penalty = params.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    output = history[prompt_length:]
    if (params.presence_penalty or params.frequency_penalty) and output:
        ids, counts = torch.tensor(output, device=logits_V.device).unique(return_counts=True)
        logits_V[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits_V.device)
        logits_V[ids] += torch.tensor(list(params.logit_bias.values()), device=logits_V.device)
    return logits_V
