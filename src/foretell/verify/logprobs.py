"""What is reported beside chosen tokens, from the logits that chose them."""

from __future__ import annotations

from torch import Tensor

from foretell.requests import TokenLogprob


def logprobs(
    logits_MV: Tensor, start: int, path: list[int], tokens: list[int], count: int | None
) -> list[TokenLogprob]:
    """Of each emitted token and its `count` strongest rivals, from the logits that chose it (before any edits)."""
    if count is None:
        return []
    out = []
    for node, token in zip(path, tokens, strict=True):
        log_p_V = logits_MV[start + node].float().log_softmax(-1)
        top = log_p_V.topk(min(count, len(log_p_V))) if count else None
        rivals = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        out.append(TokenLogprob(token, float(log_p_V[token]), rivals))
    return out
