"""Log-probabilities of chosen tokens and of the most probable ones, from the logits before any edits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from foretell.requests import TokenLogprob


def logprobs(logits_NV: Tensor, path: Sequence[int], tokens: Sequence[int], count: int | None) -> list[TokenLogprob]:
    """Reports the tokens that followed the nodes of a path, each with the `count` most probable ones.

    Args:
        logits_NV: of one row's nodes.
        count: None reports nothing.
    """
    if count is None:
        return []
    reports = []
    for node, token in zip(path, tokens, strict=True):
        log_p_V = logits_NV[node].float().log_softmax(-1)
        top = log_p_V.topk(min(count, len(log_p_V)))
        most_probable = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        reports.append(TokenLogprob(token, float(log_p_V[token]), most_probable))
    return reports
