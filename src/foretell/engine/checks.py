"""Refuses requests that cannot be decoded, and drafts that would break exactness."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from foretell.contracts import Draft, Row
from foretell.errors import ContextError, UsageError
from foretell.loading.config import ModelConfig
from foretell.requests import SamplingParams
from foretell.verify import Typical


def check_request(
    prompt: Sequence[int], params: SamplingParams, config: ModelConfig, rule: Typical | None = None
) -> None:
    """Refuses a request that does not fit the model or the acceptance rule.

    Raises:
        ContextError: prompt and answer exceed the model's context.
        UsageError: a token outside the vocabulary, or sampling options that `rule` would ignore.
    """
    room, vocab = config.max_positions, config.vocab
    if not prompt:
        raise UsageError("The prompt is empty; give at least one token.")
    unknown = next((token for token in prompt if not 0 <= token < vocab), None)
    if unknown is not None:
        raise UsageError(f"The prompt holds token {unknown}; this model's ids lie between 0 and {vocab - 1}.")
    if any(not 0 <= token < vocab for token in chain(params.logit_bias, params.stop_ids)):
        raise UsageError(f"logit_bias or stop_ids name a token outside 0..{vocab - 1}.")
    if len(prompt) >= room:
        raise ContextError(
            f"A prompt of {len(prompt)} tokens leaves no room for an answer in this model's context of {room}; "
            f"shorten it to at most {room - 1} tokens."
        )
    if len(prompt) + params.max_new_tokens > room:
        raise ContextError(
            f"A prompt of {len(prompt)} tokens and {params.max_new_tokens} new ones exceed this model's context of "
            f"{room}; shorten the prompt or lower `max_new_tokens=` to at most {room - len(prompt)}."
        )
    if rule is not None:
        _check_rule(params, rule)


def _check_rule(params: SamplingParams, rule: Typical) -> None:
    """Typical acceptance takes its temperature from the rule, and draws nothing."""
    if ignored := params.truncations:
        raise UsageError(f"Typical acceptance draws no tokens and would ignore {', '.join(ignored)}; leave it out.")
    if params.temperature not in (0, rule.temperature):
        raise UsageError(
            f"temperature is {params.temperature}, but the rule of typical acceptance has {rule.temperature}; give it "
            "to the rule, as in Typical(temperature=0.7)."
        )


def check_draft(draft: Draft, rows: Sequence[Row], max_nodes: int, vocab: int) -> None:
    """Refuses a draft that would break the promise instead of merely guessing badly.

    Raises:
        UsageError: a missing tree, one beyond the slots reserved for it, a wrong root, or an unknown token.
    """
    if len(draft.trees) != len(rows):
        raise UsageError(f"The drafter gave {len(draft.trees)} trees for {len(rows)} rows.")
    for tokens, row in zip(draft.tokens, rows, strict=True):
        if len(tokens) > max_nodes:
            raise UsageError(f"The drafter gave a tree of {len(tokens)} nodes; its max_nodes allows {max_nodes}.")
        if tokens[0] != row.tokens[-1] or not 0 <= min(tokens) <= max(tokens) < vocab:
            raise UsageError(
                f"The drafter gave tokens {tokens}; the first must be the row's newest, {row.tokens[-1]}, and all must "
                f"lie in 0..{vocab - 1}."
            )
