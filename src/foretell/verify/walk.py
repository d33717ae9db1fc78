"""Exact verification: ask the target for its own token at a node, and descend while a child guessed it.

The target's token at a node is the argmax, or the one draw that the noise of that position selects. The walk ends
at the first token that no child holds; that token is the bonus. So the output is what plain decoding would have
written, token for token, whatever the tree was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from foretell.contracts import Draft, Row, Verdict
from foretell.errors import UsageError
from foretell.verify.logit_edits import process
from foretell.verify.sampling import sample, uniform

DAMAGED = -1
"""In the place of a token: the logits after the node are not all finite numbers (under typical acceptance: no token is
possible, or one beyond all measure)."""

Choose = Callable[[int, int, list[int]], int]
"""(row, node, path from the root to that node) -> the target's token after the node, or `DAMAGED`."""


def walk(draft: Draft, choose: Choose) -> Verdict:
    """Follows the target through each row's tree.

    Returns:
        Per row the accepted path (at least the root) and the bonus token that follows it, or `DAMAGED`.
    """
    paths, bonus = [], []
    for row, (tree, tokens) in enumerate(zip(draft.trees, draft.tokens, strict=True)):
        path = [0]
        while True:
            token = choose(row, path[-1], path)
            following = [child for child in tree.children[path[-1]] if tokens[child] == token]
            if not following:
                break
            path.append(following[0])
        paths.append(path)
        bonus.append(token)
    return Verdict(paths, bonus)


def draws(draft: Draft, rows: Sequence[Row], keys: Sequence[int], logits_MV: Tensor, starts: Sequence[int]) -> Choose:
    """The target's token at a node under each row's own sampling parameters.

    Args:
        keys: with the seed and the position they fix each row's noise.
        logits_MV: logits of all nodes, rows one after another; row b's root is at starts[b].
    """

    def choose(row: int, node: int, path: list[int]) -> int:
        state, tokens = rows[row], draft.tokens[row]
        history = state.tokens + [tokens[n] for n in path[1:]] if state.params.edits_logits else []
        if not finite(logits_MV[starts[row] + node]):
            return DAMAGED
        logits_V = process(logits_MV[starts[row] + node], state.params, history, state.prompt_length)
        if state.params.temperature == 0:
            return int(logits_V.cpu().numpy().argmax())  # the first of equals
        position = len(state.tokens) + len(path) - 1
        if state.params.seed is None:
            raise UsageError("Sampling needs a seed; SamplingParams.seeded() draws one.")
        return sample(logits_V, state.params, uniform(state.params.seed, keys[row], position))

    return choose


def finite(logits_V: Tensor) -> bool:
    """Whether all of them are finite numbers."""
    return bool(np.isfinite(logits_V.detach().float().cpu().numpy()).all())  # stays on this thread, see native.cpp
