"""`foretell tune`: what a step costs on this machine, and which tree that makes the best."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretell.cli.options import Loading, drafter_options
from foretell.cli.terminal import job_progress, note
from foretell.errors import ForetellError

if TYPE_CHECKING:
    from foretell.api import LLM
    from foretell.backbone.step_costs import StepCosts
    from foretell.contracts import Drafter

PROMPT, NEW_TOKENS = "Explain how rain forms, step by step.", 48
"""What is decoded to see how long drafting takes."""


def tune(
    loading: Loading,
    quick: Annotated[bool, typer.Option("--quick", help="Batch 1 only, fewer repeats.")] = False,
) -> None:
    """Measure what steps and drafting cost here; drafters choose their trees by it from then on."""
    from foretell import drafters
    from foretell.backbone.step_costs import REPEATS, ROWS, StepCosts, costs_file, measure
    from foretell.drafting.checkpoint import shipped

    llm = loading.load()
    with job_progress("measuring steps, %", "", resumes=False) as progress:
        costs = measure(
            llm.backbone,
            rows=(1,) if quick else ROWS,
            repeats=5 if quick else REPEATS,
            progress=lambda fraction: progress(round(fraction * 100), 100, 0),
        )
    path = costs_file(llm.backbone, loading.cache_dir)
    older = None
    with suppress(ForetellError):  # a damaged table is mended
        older = StepCosts.load(path)
    costs.over(older).save(path)  # an interruption from here on loses no more than drafting
    llm.backbone.costs = None  # drafters built now guess, whether that pays or not
    tokens_per_step, own = llm.drafter.tokens_per_step, 0.0
    timed: list[tuple[str, Mapping[str, Any]]] = [(name, {}) for name in shipped(llm.backbone)]
    if tokens_per_step:
        options = drafter_options(loading.drafter, loading.option)
        timed.append((loading.drafter, {"lookup": loading.lookup, **options}))
    with job_progress("measuring drafting", "", resumes=False) as progress:
        for done, (name, given) in enumerate(timed, start=1):
            own = _drafting(llm, drafters.build(name, llm.backbone, **given))  # the last is the one asked for
            costs.drafting.setdefault(name, own)  # what ships is meant where both are of one method
            progress(done, len(timed), 0)
    costs.over(older).save(path)
    _table(costs, own, tokens_per_step)
    note(f"Kept in {path}; -o nodes=N overrides it.")


def _drafting(llm: LLM, drafter: Drafter) -> float:
    """Seconds a step that a drafter takes."""
    from foretell.api import LLM

    other, raw = LLM(llm.backbone, llm.tokenizer, drafter), not llm.tokenizer.has_chat_template
    found = [other.generate([PROMPT], raw=raw, max_new_tokens=NEW_TOKENS, adapt=False)[0].statistics for _ in range(3)]
    return median(each.draft_seconds / max(1, each.steps) for each in found)


def _table(costs: StepCosts, drafting: float, tokens_per_step: Mapping[int, float]) -> None:
    """Milliseconds of a step by nodes; with a drafter that has trees, its best size and what it should gain."""
    from rich.console import Console
    from rich.table import Table

    sizes = list(next(iter(next(iter(costs.seconds.values())).values())))
    names = ["batch", "context", "ms", *map(str, sizes[1:]), *(["tree", "gain"] if tokens_per_step else [])]
    table = Table(*names, box=None, padding=(0, 1, 0, 0))  # narrow enough that nothing is cut in a pipe
    sizes_that_pay: list[int] = []
    for rows, contexts in costs.seconds.items():
        for context, seconds in contexts.items():
            cells = [f"{seconds[1] * 1e3:.1f}", *(f"{seconds[n] / seconds[1]:.2f}" for n in sizes[1:])]
            if tokens_per_step:
                best = costs.best_size(rows, context, tokens_per_step, drafting)
                gain = (
                    costs.rate(rows, context, best, tokens_per_step[best], drafting) * seconds[1] if best > 1 else 1.0
                )
                cells += [str(best), f"{gain:.2f}"]
                sizes_that_pay.append(best)
            table.add_row(str(rows), str(context), *cells)
    Console().print(table)
    note("ms: a step of one node; 4, 8, ...: a step of so many nodes, relative to it.")
    if tokens_per_step:
        note(
            "tree: the nodes that pay most; gain: tokens per second with them, relative to one node; drafting, "
            f"{drafting * 1e3:.1f} ms a step, is counted as for one row."
        )
        if 1 in sizes_that_pay:
            note("tree 1: no tree pays there, so that the drafter guesses nothing and plain steps are taken.")
