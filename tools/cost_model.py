"""What drafting with a model's own layers would gain at other sizes, from what was measured here.

A step of a large model is bound by reading its weights, whether it carries one node or sixteen, and calls cost nothing
beside it. Then a level of drafts costs the bytes that it reads, c of a step, and with the tokens per step t and the
levels n measured on the demo model the speed-up is t / (1 + n · c). Turned round: how often must single guesses be
right, at the best length of chains, for a speed-up that is aimed at? For docs/own-layers.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A Llama of so many layers, widths and tokens; weights in two bytes, draft heads in one."""

    name: str
    layers: int
    hidden: int
    mlp: int
    kv: int
    vocab: int
    exit: int  # a fifteenth of the layers, as in the demo model's Kangaroo, or as published

    @property
    def layer(self) -> int:
        return 2 * (2 * self.hidden**2 + 2 * self.hidden * self.kv + 3 * self.hidden * self.mlp)

    @property
    def head(self) -> int:
        return 2 * self.vocab * self.hidden

    @property
    def whole(self) -> int:
        return self.layers * self.layer + self.head

    def kangaroo(self) -> float:
        """A level: the lower layers, an adapter of a layer's size, 8,192 rows of an output matrix."""
        return (self.exit * self.layer + self.layer + 8192 * self.hidden) / self.whole

    def leaving(self, layers: float) -> float:
        """A token from an exit, through as many rows."""
        return (layers * self.layer + 8192 * self.hidden) / self.whole

    def skipping(self, share: float) -> float:
        """A token from the whole model without a share of its sublayers, through the whole output matrix in a byte."""
        return ((1 - share) * self.layers * self.layer + self.head / 2) / self.whole


SIZES = (
    Size("SmolLM2-135M", 30, 576, 1536, 192, 49152, 2),
    Size("Llama-3.2-1B", 16, 2048, 8192, 512, 128256, 1),
    Size("Llama-2-7B", 32, 4096, 11008, 4096, 32000, 2),
    Size("Llama-2-13B", 40, 5120, 13824, 5120, 32000, 3),
    Size("Llama-2-70B", 80, 8192, 28672, 1024, 32000, 5),
)


def gain(tokens: float, levels: float, cost: float) -> float:
    """Speed-up of steps that earn so many tokens for so many levels of drafts."""
    return tokens / (1 + levels * cost)


def chain_gain(right: float, cost: float, longest: int = 25) -> float:
    """The best speed-up of chains whose single guesses are right so often."""
    return max(gain(sum(right**i for i in range(length + 1)), length, cost) for length in range(longest + 1))


def needed(aim: float, cost: float) -> float:
    """How often single guesses of chains must be right for a speed-up; above 1 where no guess is good enough."""
    return next((p / 1000 for p in range(1001) if chain_gain(p / 1000, cost) >= aim), 1.001)


def table(tokens: float, levels: float) -> list[str]:
    """Markdown, with the tokens per step and levels that Kangaroo's trees had here."""
    rows: list[tuple[str, Callable[[Size], str]]] = [
        ("a level of `kangaroo`, of a step", lambda size: f"{size.kangaroo():.1%}"),
        ("`kangaroo` with this page's tokens and levels", lambda size: f"{gain(tokens, levels, size.kangaroo()):.2f}×"),
        ("a token of `swift`, 45 % skipped", lambda size: f"{size.skipping(0.45):.0%}"),
        ("it must be right for 1.3×", lambda size: _share(needed(1.3, size.skipping(0.45)))),
        ("a token of `del` from a fifth of the layers", lambda size: f"{size.leaving(size.layers / 5):.0%}"),
        ("it must be right for 2×", lambda size: _share(needed(2.0, size.leaving(size.layers / 5)))),
    ]
    lines = ["| | " + " | ".join(size.name for size in SIZES) + " |", "|---" * (len(SIZES) + 1) + "|"]
    return [*lines, *(f"| {name} | {' | '.join(map(cell, SIZES))} |" for name, cell in rows)]


def _share(p: float) -> str:
    return f"{p:.0%}" if p <= 1 else "never"


if __name__ == "__main__":
    print("\n".join(table(2.08, 2.5)))
