"""`foretell demo`: one question answered twice, without and with a drafter, and how much faster the second is.

One answer of each is shown; the terminal slows those runs, so they are not measured. The measured runs follow, nothing
of them shown, in turns, so that a busy machine slows both alike; their medians are printed.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from foretell.cli.options import Base, Loading, flag
from foretell.cli.speculation_notes import verdict
from foretell.cli.terminal import note, program
from foretell.errors import UsageError

if TYPE_CHECKING:
    from foretell.api import LLM, Result

QUESTION = """Review this Python code, then show it with your corrections:

```python
class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("insufficient funds")
        self.balance -= amount

    def transfer(self, other, amount):
        self.withdraw(amount)
        other.deposit(amount)
```"""
"""An edit: the answer repeats much of the question, as summaries do, so drafting gains more than elsewhere."""
REPEATS, PATIENCE = 3, 8.0
"""How many runs of each are measured; none begins after PATIENCE seconds."""


@dataclass(frozen=True, kw_only=True)
class DemoLoading(Loading):
    """Model and drafter of the demo; by default a drafter that ships with foretell."""

    drafter: str = flag("", "The drafter; by default the best that comes with foretell, with lookup.", "-d")


@dataclass
class _Side:
    """One way of decoding, and its runs."""

    name: str
    llm: LLM
    runs: list[Result] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Median tokens per second of decoding: the prompt is read equally fast either way."""
        return median(s.new_tokens / (s.seconds - s.prefill_seconds) for s in (run.statistics for run in self.runs))


def demo(
    loading: DemoLoading,
    question: Annotated[
        str | None, typer.Argument(help="What to answer; by default an edit of a short program.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=2, help="Maximum number of tokens.")
    ] = 200,
) -> None:
    """See and measure what drafting changes, on this machine.

    Answers one question plainly, then with the drafter, and compares.
    Exits with 1 if the two answers differ though the drafter promises that they do not.
    """
    from foretell.prompt_files import check_text

    loading.check()
    text = QUESTION if question is None else question
    check_text(text, "the question")
    sides = _sides(loading)
    ids = sides[0].llm.encode(text)
    for side in sides:  # first calls are slow: caches grow, pages are touched
        side.llm.generate([ids], max_new_tokens=min(16, max_new_tokens))
    print(f"\n{text}\n" if question is None else "")
    for side in sides:
        _show(side, ids, max_new_tokens)
    _measure(sides, ids, max_new_tokens)
    same = _report(sides)
    _print_next_steps(loading, sides[1])
    if not same and sides[1].llm.drafter.lossless:
        raise typer.Exit(1)


def _sides(loading: Loading) -> list[_Side]:
    """Plain and drafted decoding by one backbone, so that nothing else differs."""
    from foretell import drafters
    from foretell.api import LLM
    from foretell.drafters.prompt_lookup import WithLookup
    from foretell.recommendation import recommend

    if loading.option and not loading.drafter:
        raise UsageError("--option is for a drafter; name it with --drafter.")
    if loading.drafter:
        name, drafted = loading.drafter, loading.load()
        plain = LLM(drafted.backbone, drafted.tokenizer, drafters.build("plain", drafted.backbone), drafted.folder)
    else:
        plain = Base.load(loading)
        recommendation = recommend(plain.backbone)
        name = recommendation.name
        note(f"Chosen for this model and machine: {recommendation}.")
        drafter = drafters.build(name, plain.backbone, lookup=True)
        drafted = LLM(plain.backbone, plain.tokenizer, drafter, plain.folder)
    lookup = " with lookup" if isinstance(drafted.drafter, WithLookup) else ""
    return [_Side("plain", plain), _Side(f"{name}{lookup}", drafted)]


def _show(side: _Side, ids: list[int], max_new_tokens: int) -> None:
    """Streams an answer; tokens that the drafter guessed are green and underlined if the terminal can show that."""
    marks = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    guessed = "  (the tokens it guessed are underlined)" if marks and side.name != "plain" else ""
    print(f"--- {side.name}{guessed}")
    for event in side.llm.stream(ids, max_new_tokens=max_new_tokens):
        for text, drafted in event.pieces:
            print(f"\x1b[4;32m{text}\x1b[0m" if marks and drafted else text, end="", flush=True)
    print("\n")


def _measure(sides: list[_Side], ids: list[int], max_new_tokens: int) -> None:
    note("measuring ...")
    began = time.perf_counter()
    while len(sides[0].runs) < REPEATS and (not sides[0].runs or time.perf_counter() - began < PATIENCE):
        for side in sides:
            side.runs += side.llm.generate([ids], max_new_tokens=max_new_tokens)


def _report(sides: list[_Side]) -> bool:
    """Prints the comparison; returns whether every run gave the same ids."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    plain = sides[0]
    table = Table("", "tokens/s", "tokens per step", "steps", "speed-up", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for side in sides:
        last = side.runs[-1].statistics
        table.add_row(
            side.name, f"{side.rate:.1f}", f"{last.acceptance_length:.2f}", str(last.steps),
            f"{side.rate / plain.rate:.2f}x",
        )  # fmt: skip
    same = all(run.ids == plain.runs[0].ids for side in sides for run in side.runs)
    Console().print(table)
    b, count = plain.llm.backbone, len(plain.runs)
    runs = "one run" if count == 1 else f"median of {count} runs"
    print(f"{len(plain.runs[0].ids)} tokens: " + ("the same ids both ways." if same else "the ids DIFFER."))
    print(
        f"Decoding only, {runs} each, measured now on {b.device} with {b.threads} threads, {b.kernels} kernels, "
        f"{b.arithmetic}."
    )
    drafted = sides[1]
    if sentence := verdict(drafted.rate / plain.rate, drafted.runs[-1].statistics, b):
        print(sentence)
    return same


def _print_next_steps(loading: Loading, drafted: _Side) -> None:
    """Prints commands to try next, as they work in this shell."""
    name, _, lookup = drafted.name.partition(" ")
    words = [*(["-m", loading.model] if loading.model != Base.model else []), "-d", name]
    words += [word for text in loading.option or () for word in ("-o", text)] + ["--lookup"] * bool(lookup)
    options, foretell = shlex.join(words), program()
    print("\nNext:")
    print(f"  {foretell} chat {options}")
    print(f'  {foretell} generate {options} --stats "Why is the sky blue?"')
    print(f"  {foretell} tune      measures this machine more closely; trees and drafters are then chosen by it")
    print(f"  {foretell} --help    lists the other commands")
