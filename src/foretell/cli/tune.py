"""`foretell tune`: what a step costs on this machine, and which tree is the best by that."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretell.cli.options import Loading
from foretell.cli.terminal import job_progress, note
from foretell.errors import ForetellError

if TYPE_CHECKING:
    from foretell.api import LLM
    from foretell.backbone.step_costs import StepCosts
    from foretell.contracts import Drafter

PROMPT, NEW_TOKENS, RUNS = "Explain how rain forms, step by step.", 48, 3
"""What is decoded, and how often, to measure how long drafting takes."""


def tune(
    loading: Loading,
    quick: Annotated[bool, typer.Option("--quick", help="Batch 1 only, fewer repeats.")] = False,
) -> None:
    """Measure what steps and drafting cost here; drafters choose their trees by it from then on.

    Two things are measured: steps of every size, batch and context, and then how long each drafter takes to draft: the
    one given, and those that come with foretell for this model.
    """
    loading.check()
    from foretell.backbone.step_costs import MOST, REPEATS, ROWS, StepCosts, costs_file, measure
    from foretell.recommendation import recommend

    llm = loading.load()
    with job_progress("measuring steps, %", "", resumes=False) as progress:
        costs = measure(
            llm.backbone,
            rows=(1,) if quick else ROWS,
            repeats=5 if quick else REPEATS,
            progress=lambda fraction: progress(round(fraction * 100), 100, 0),
            most=MOST,
        )
    path = costs_file(llm.backbone, loading.cache_dir)
    older, before = None, ""
    with suppress(ForetellError):  # a damaged table is replaced
        older = StepCosts.load(path)
        before = recommend(llm.backbone).name if older else ""
    costs.over(older).save(path)  # an interruption from here on loses the times of drafting only
    llm.backbone.costs = None  # drafters built now guess, whether that pays or not
    tokens_per_step, node_cost = llm.drafter.tokens_per_step, llm.drafter.node_cost
    own = _measure_drafting(llm, loading, costs)
    costs.over(older).save(path)
    _print_table(costs, own, tokens_per_step, node_cost)
    note(f"Kept in {path}; -o nodes=N overrides it.")
    llm.backbone.costs = path
    after = recommend(llm.backbone)
    changed = f" (until now {before})" if before not in ("", after.name) else ""
    note(f"Used where no drafter is named{changed}: {after}.")


def _measure_drafting(llm: LLM, loading: Loading, costs: StepCosts) -> float:
    """Adds to `costs` the seconds a step that each drafter takes; returns those of the one given, 0 for a plain one."""
    from foretell import drafters
    from foretell.drafting.checkpoint import shipped

    timed: list[tuple[str, Mapping[str, Any]]] = [(name, {}) for name in shipped(llm.backbone)]
    if llm.drafter.tokens_per_step:
        timed.append((loading.drafter, {"lookup": loading.lookup, **loading.drafter_options()}))
    seconds = 0.0
    with job_progress("measuring drafting", "", resumes=False) as progress:
        for i, (name, options) in enumerate(timed):
            drafter, runs = drafters.build(name, llm.backbone, **options), []
            for run in range(RUNS):
                runs.append(_drafting(llm, drafter))
                progress(i * RUNS + run + 1, len(timed) * RUNS, 0)
            seconds = median(runs)
            costs.drafting.setdefault(name, {1: seconds})  # where two are of one method, what ships counts
    return seconds


def _drafting(llm: LLM, drafter: Drafter) -> float:
    """Seconds a step that a drafter takes in one answer."""
    from foretell.api import LLM

    other, raw = LLM(llm.backbone, llm.tokenizer, drafter), not llm.tokenizer.has_chat_template
    statistics = other.generate([PROMPT], raw=raw, max_new_tokens=NEW_TOKENS, adapt=False)[0].statistics
    return statistics.draft_seconds / max(1, statistics.steps)


def _print_table(costs: StepCosts, drafting: float, tokens_per_step: Mapping[int, float], node_cost: float) -> None:
    """Prints milliseconds of a step by nodes; for a drafter that has trees, its best size and what it should gain."""
    from rich.console import Console
    from rich.table import Table

    from foretell.backbone.step_costs import StepCosts

    sizes = sorted({size for contexts in costs.seconds.values() for seconds in contexts.values() for size in seconds})
    names = ["batch", "context", "ms", *map(str, sizes[1:]), *(["tree", "gain"] if tokens_per_step else [])]
    table = Table(*names, box=None, padding=(0, 1, 0, 0))  # narrow enough that nothing is cut in a pipe
    left_off, own = list[str](), StepCosts(costs.seconds, {"own": {1: drafting}})
    for rows, contexts in costs.seconds.items():
        for context, seconds in contexts.items():
            cells = [
                f"{seconds[1] * 1e3:.1f}",
                *(f"{seconds[n] / seconds[1]:.2f}" if n in seconds else "" for n in sizes[1:]),
            ]
            if tokens_per_step:
                seconds_of_drafting = own.drafting_of("own", rows, context) or 0.0
                rates = costs.rates(rows, context, tokens_per_step, seconds_of_drafting, node_cost)
                gains = {nodes: rate * seconds[1] for nodes, rate in rates.items()}
                best = max(gains, key=gains.__getitem__)
                if gains[best] <= 1:
                    left_off.append(
                        f"batch {rows}, context {context}: tree of {best} nodes, gain {gains[best]:.2f}: left off"
                    )
                cells += [str(best) if gains[best] > 1 else "off", f"{gains[best]:.2f}"]
            table.add_row(str(rows), str(context), *cells)
    Console().print(table)
    note("ms: a step of one node; 4, 8, ...: a step of so many nodes, relative to it.")
    if tokens_per_step:
        note(
            "tree: the number of nodes that pays most; gain: tokens per second with them, relative to plain decoding; "
            f"drafting, {drafting * 1e3:.1f} ms a step at batch 1, is taken to grow with the batch as small trees do."
        )
    if left_off:
        note("Where the best tree gains nothing, speculation is left off and plain steps are taken:")
        for line in left_off:
            note(f"  {line}")
