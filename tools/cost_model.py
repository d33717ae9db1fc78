"""Predicts what drafting with a model's own layers would gain at other sizes, from measurements of the demo model.

A step of a large model is bound by reading its weights, with one node or sixteen, and calls cost nothing in comparison.
Then a level of drafts costs the share c of a step's bytes that it reads, and with t tokens and n levels per step, as
measured on the demo model, the speed-up is t / (1 + n · c). Conversely: the accuracy that single guesses need, at the
best length of chains, for a given speed-up. For docs/own-layers.md and docs/hidden-streams.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Size:
    """A Llama by its layers, widths and vocabulary; weights of two bytes, draft heads of one."""

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
    def all_weights(self) -> int:
        return self.layers * self.layer + self.head

    def kangaroo(self) -> float:
        """Returns the cost of a level: the lower layers, an adapter of a layer's size, 8,192 output rows."""
        return (self.exit * self.layer + self.layer + 8192 * self.hidden) / self.all_weights

    def beside(self, layers: float, rank: int) -> float:
        """Returns the cost of a level of M2R2: layers, adapters beside them in eight bits, 8,192 output rows."""
        return (layers * (self.layer + 2 * self.hidden * rank) + 8192 * self.hidden) / self.all_weights

    def transfer(self, layers: float, rank: int, steps: int = 3) -> float:
        """Returns what Hidden Transfer reads besides a step: projections, adapters of `layers`, 8,192 output rows."""
        own = steps * 2 * self.hidden**2 + layers * 2 * self.hidden * rank
        return (own + 8192 * self.hidden) / self.all_weights

    def leaving(self, layers: float) -> float:
        """Returns the cost of a token from an exit: its layers and as many rows."""
        return (layers * self.layer + 8192 * self.hidden) / self.all_weights

    def skipping(self, share: float) -> float:
        """Returns the cost of a token without a share of the sublayers, with the whole output matrix in int8."""
        return ((1 - share) * self.layers * self.layer + self.head / 2) / self.all_weights


SIZES = (
    Size("SmolLM2-135M", 30, 576, 1536, 192, 49152, 2),
    Size("Llama-3.2-1B", 16, 2048, 8192, 512, 128256, 1),
    Size("Llama-2-7B", 32, 4096, 11008, 4096, 32000, 2),
    Size("Llama-2-13B", 40, 5120, 13824, 5120, 32000, 3),
    Size("Llama-2-70B", 80, 8192, 28672, 1024, 32000, 5),
)


def gain(tokens: float, levels: float, cost: float) -> float:
    """Returns the speed-up of steps with this many tokens and levels of drafts, each level at a share of a step."""
    return tokens / (1 + levels * cost)


def chain_gain(right: float, cost: float, longest: int = 25) -> float:
    """Returns the best speed-up over lengths of chains, each guess right with this probability."""
    return max(gain(sum(right**i for i in range(length + 1)), length, cost) for length in range(longest + 1))


def needed(aim: float, cost: float) -> float:
    """Returns the probability that a guess must be right with for a speed-up; above 1 if no accuracy suffices."""
    return next((p / 1000 for p in range(1001) if chain_gain(p / 1000, cost) >= aim), 1.001)


def table(tokens: float, levels: float) -> list[str]:
    """Returns Markdown, given the measured tokens and levels per step of Kangaroo's trees."""
    rows: list[tuple[str, Callable[[Size], str]]] = [
        ("a level of `kangaroo`, of a step", lambda size: f"{size.kangaroo():.1%}"),
        ("`kangaroo` with this page's tokens and levels", lambda size: f"{gain(tokens, levels, size.kangaroo()):.2f}×"),
        ("a token of `swift`, 45 % skipped", lambda size: f"{size.skipping(0.45):.0%}"),
        ("it must be right for 1.3×", lambda size: _share(needed(1.3, size.skipping(0.45)))),
        ("a token of `del` from a fifth of the layers", lambda size: f"{size.leaving(size.layers / 5):.0%}"),
        ("it must be right for 2×", lambda size: _share(needed(2.0, size.leaving(size.layers / 5)))),
    ]
    return _markdown(rows)


def hidden_streams(transfer_tokens: float, stream_tokens: float, levels: float) -> list[str]:
    """Returns Markdown, given the measured tokens per step of Hidden Transfer, and those and the levels of M2R2."""
    rows: list[tuple[str, Callable[[Size], str]]] = [
        ("`hidden_transfer` with these tokens", lambda s: f"{gain(transfer_tokens, 1, _transfer(s)):.2f}×"),
        ("tokens per step that it needs for 1.9×", lambda s: f"{1.9 * (1 + _transfer(s)):.2f}"),
        ("tokens per step that it needs for 3×", lambda s: f"{3 * (1 + _transfer(s)):.2f}"),
        ("a level of `m2r2` from a tenth of the layers", lambda s: f"{s.beside(s.layers / 10, s.hidden // 2):.1%}"),
        (
            "`m2r2` with these tokens and levels",
            lambda s: f"{gain(stream_tokens, levels, s.beside(s.layers / 10, s.hidden // 2)):.2f}×",
        ),
        *(
            (f"a guess of {name} of the layers must be right for 2.8×", partial(_right_for, 2.8, part))
            for name, part in (("a quarter", 4), ("an eighth", 8), ("a sixteenth", 16))
        ),
    ]
    return _markdown(rows)


def _transfer(size: Size) -> float:
    return size.transfer(size.layers / 2, size.hidden // 9)


def _right_for(aim: float, part: int, size: Size) -> str:
    return _share(needed(aim, size.beside(size.layers / part, size.hidden // 2)))


def _markdown(rows: list[tuple[str, Callable[[Size], str]]]) -> list[str]:
    lines = ["| | " + " | ".join(size.name for size in SIZES) + " |", "|---" * (len(SIZES) + 1) + "|"]
    return [*lines, *(f"| {name} | {' | '.join(map(cell, SIZES))} |" for name, cell in rows)]


def _share(p: float) -> str:
    return f"{p:.0%}" if p <= 1 else "never"


if __name__ == "__main__":
    print("\n".join([*table(2.08, 2.5), "", *hidden_streams(1.8, 2.0, 2.3)]))
