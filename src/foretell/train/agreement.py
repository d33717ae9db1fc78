"""Whether answers that came from elsewhere are the local model's: it reads the first ones and compares.

Legend: M positions of prompt and answer, P positions of the answer, V vocabulary, d hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foretell.api import LLM
from foretell.backbone import Nodes
from foretell.results import Result

MIN_CONVERSATIONS, MIN_TOKENS = 8, 32
"""Answers that the local model reads, and tokens that they must hold, before the verdict is final."""
MAX_ANSWER, MAX_PROMPT = 256, 2048
"""Tokens of an answer that are read at most, and of a prompt beyond which the answer is not read."""
FLOOR = 0.8
"""Agreement of the same model, at least: its arithmetic elsewhere costs a few per cent. Few other models reach it."""


@dataclass
class Agreement:
    """Counts how often answers take the token that the local model ranks first.

    All tokens of its own greedy answers are such. At temperature T it would write that token with probability max p_T
    only, so the count is compared with the sum of these. (With top-p it writes it more often, so the test is a mild
    one.)

    Attributes:
        conversations, tokens: how much was read.
        chosen: tokens that are the most probable ones.
        expected, variance: of `chosen`, if the local model had sampled the answers.
    """

    conversations: int = 0
    tokens: int = 0
    chosen: int = 0
    expected: float = 0.0
    variance: float = 0.0

    @property
    def share(self) -> float:
        return self.chosen / self.expected

    @property
    def complete(self) -> bool:
        """True if enough answers were read."""
        return self.conversations >= MIN_CONVERSATIONS and self.tokens >= MIN_TOKENS

    @property
    def poor(self) -> bool:
        """True if another model wrote the answers: agreement is more than two standard deviations below `FLOOR`."""
        return self.tokens >= MIN_TOKENS and self.chosen + 2 * self.variance**0.5 < FLOOR * self.expected

    def add(self, llm: LLM, turn: str, reply: Result, temperature: float) -> None:
        """Reads the answer to a first turn in one pass of the model, until enough was read."""
        if self.complete:
            return
        prompt = llm.encode([{"role": "user", "content": turn}])
        answer = reply.ids[: max(0, min(MAX_ANSWER, llm.backbone.config.max_positions - len(prompt)))]
        if not answer or len(prompt) > MAX_PROMPT:
            return
        backbone, count = llm.backbone, len(prompt) + len(answer) - 1
        tokens = torch.tensor([*prompt, *answer])
        states_Md = backbone.forward(tokens[:-1], Nodes.chains([0], [0], [count]), backbone.new_cache(1, count))
        logits_PV = backbone.logits(states_Md[len(prompt) - 1 :]).float().cpu()
        p_P = (logits_PV / temperature).softmax(-1).amax(-1) if temperature else torch.ones(len(answer))
        self.conversations += 1
        self.tokens += len(answer)
        self.chosen += int((logits_PV.argmax(-1) == tokens[len(prompt) :]).sum())
        self.expected += float(p_P.sum())
        self.variance += float((p_P * (1 - p_P)).sum())
