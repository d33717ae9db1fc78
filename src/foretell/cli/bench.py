"""`foretell bench`: drafters and peers over a suite in one interleaved run; `compare` two runs; `setup` a peer."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretell.cli.options import Base, Cache, flat
from foretell.cli.terminal import command_line, job_progress, note
from foretell.errors import ForetellError, UsageError

EPSILONS = (0.01, 0.03, 0.06, 0.09, 0.15, 0.25)
"""Thresholds of a sweep: the paper's range (arXiv 2401.10774, §4), and the published one."""

if TYPE_CHECKING:
    from foretell.api import LLM
    from foretell.bench.contenders import System
    from foretell.bench.suites import Suite


def run(
    ctx: typer.Context,
    base: Base,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the results; an interrupted run goes on.")
    ] = None,
    contenders: Annotated[
        list[str] | None,
        typer.Option(
            "--run",
            "-r",
            help="A drafter or peer, with options: medusa:nodes=16,lookup=true; repeatable. "
            "Plain decoding always runs. By default prompt_lookup and the best drafter there is.",
        ),
    ] = None,
    suite: Annotated[
        str, typer.Option("--suite", help="mini, or a file: Spec-Bench, HumanEval, GSM8K, JSON lines, text.")
    ] = "mini",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens a turn.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="How often every question is asked.")] = 1,
    batch_size: Annotated[list[int] | None, typer.Option("--batch-size", "-b", help="Rows; repeatable.")] = None,
    temperature: Annotated[list[float] | None, typer.Option("--temperature", "-t", help="Repeatable.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Ask every K-th question only.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask at most so many questions.")] = None,
    per_category: Annotated[int | None, typer.Option(min=1, help="Ask at most so many of each category.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first look: one question of each kind, 64 tokens.")] = False,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Judge code by running it (in a process with limits).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of sampled answers.")] = 0,
) -> None:
    """Measure drafters and peers over a suite of questions, in turns, and write a report.

    Every answer is compared with plain decoding's, token by token. `foretell bench compare A B` says what got worse
    between two results, `foretell bench setup PEER` installs a peer in an environment of its own.
    """
    if ctx.invoked_subcommand:
        return
    if out is None:
        raise UsageError("Say where the results go: --out DIR.")
    from foretell.bench.suites import load_suite
    from foretell.files import exists

    if quick:
        per_category, max_new_tokens, repeats = per_category or 1, min(max_new_tokens, 64), 1
    asked = load_suite(suite).chosen(every, limit, per_category)
    specs = [_spec(text, base) for text in contenders or ()]
    if exists(out / "results.json"):
        raise UsageError(f"{out} holds a finished benchmark; choose another --out, or delete it.")
    batches, temperatures = batch_size or [1], temperature or [0.0]
    if min(batches) < 1:
        raise UsageError(f"--batch-size is {min(batches)}; it must be at least 1.")
    llm = base.load()
    how = {
        "new_tokens": max_new_tokens, "repeats": repeats, "batches": batches, "temperatures": temperatures,
        "seed": seed,
    }  # fmt: skip
    _say(_measure(llm, base, out, asked, specs, how, run_code), out)


def _say(results: dict[str, Any], out: Path) -> None:
    from foretell.bench.report import main_table, quality_table, sections

    for title, rows in sections(results):
        note(f"\n{title}")
        for head, body in [main_table(rows, results["limits"]), *quality_table(rows)]:
            _print_table(head, body)
    note(f"\nIn {out}: report.html, results.md, results.json.")


def _spec(text: str, base: Base) -> tuple[str, str, Any]:
    """(text, drafter or peer, options of the drafter or parts of the peer's variant)."""
    from foretell import drafters
    from foretell.bench.contenders import parse_spec
    from foretell.bench.peers import PEERS
    from foretell.cli.options import drafter_options

    name, parts = parse_spec(text)
    if name in PEERS:
        return text, name, parts
    if name not in drafters.DRAFTERS:
        raise UsageError(
            f"Unknown drafter or peer {name!r}; the drafters are {', '.join(drafters.DRAFTERS)}, the peers "
            f"{', '.join(PEERS)}."
        )
    engine = {}
    for part in list(parts):
        key, _, value = part.partition("=")
        if key in ("lookup", "typical", "adapt"):
            engine[key] = _switch(text, key, value)
            parts.remove(part)
    return text, name, drafter_options(name, parts) | engine


def _switch(text: str, key: str, value: str) -> bool | float:
    """An option of the engine: true or false; `typical` may be a threshold instead."""
    if value.lower() in ("", "true", "false"):
        return value.lower() != "false"
    if key == "typical":
        with suppress(ValueError):
            if 0 <= (threshold := float(value)) < math.inf:
                return threshold
        raise UsageError(f"{text!r}: typical is {value!r}; it must be true, false, or a threshold of at least 0.")
    raise UsageError(f"{text!r}: {key} is {value!r}; it must be true or false.")


def _measure(
    llm: LLM,
    base: Base,
    out: Path,
    suite: Suite,
    specs: list[tuple[str, str, Any]],
    how: dict[str, Any],
    run_code: bool,
) -> dict[str, Any]:
    from foretell import drafters
    from foretell.files import sole_writer

    best = drafters.recommended(llm.backbone)
    chosen = specs or [
        ("prompt_lookup", "prompt_lookup", {}),
        *([(f"{best}:lookup=true", best, {"lookup": True})] * (best != "prompt_lookup")),
    ]
    there: list[System] = []
    try:
        missing = _contenders(llm, base, chosen, max(how["batches"]), there)
        with sole_writer(out):
            return _run(llm, base, out, suite, there, missing, how, run_code)
    finally:
        for each in there:
            each.close()


def _run(
    llm: LLM, base: Base, out: Path, suite: Suite, there: list[System], missing: dict[str, str],
    how: dict[str, Any], run_code: bool,
) -> dict[str, Any]:  # fmt: skip
    from foretell import __version__
    from foretell.bench.limits import read_bandwidth, step_bytes
    from foretell.bench.report import write_report
    from foretell.bench.results import collect, commit, machine, write_results
    from foretell.bench.runner import Runner, Settings

    settings = Settings(
        model=base.model, fingerprint=llm.backbone.fingerprint, dtype=str(llm.backbone.dtype).removeprefix("torch."),
        suite=suite.name, digest=suite.digest, questions=[question.id for question in suite.questions],
        contenders=[each.name for each in there], **how,
    )  # fmt: skip
    about = {
        "machine": machine(llm.backbone), "version": __version__, "commit": commit(), "command": command_line(),
        "contenders": {each.name: each.about for each in there}, "missing": missing,
        "weight_bytes": step_bytes(llm.backbone), "probe_seconds": round(llm.backbone.probe_seconds, 2),
    }  # fmt: skip
    runner = Runner(llm, there, suite.questions, settings, out, about, lambda: read_bandwidth(llm.backbone))
    with job_progress("measuring", "tokens/s") as progress:
        records = runner.run(progress)
    for name, reason in runner.failed.items():
        note(f"note: {name}: {reason}")
    about["missing"] = missing | runner.failed
    decode = lambda ids: llm.tokenizer.decode(ids, skip_special=True)  # noqa: E731
    results = collect({"settings": asdict(settings), **about}, records, suite.questions, decode, run_code)
    write_report(out, results)
    write_results(out, results)  # last: it says that the run is finished
    return results


def _contenders(
    llm: LLM, base: Base, chosen: list[tuple[str, str, Any]], rows: int, there: list[System]
) -> dict[str, str]:
    """Adds those that are there, plain first; says why others are not."""
    from foretell.bench.contenders import ForetellSystem
    from foretell.bench.peers import PEERS, MissingPeerError, Peer

    there.append(ForetellSystem(llm, "plain", "plain", {}))
    missing: dict[str, str] = {}
    for text, name, options in chosen:
        if text in [each.name for each in there]:
            continue
        try:
            if name in PEERS:
                there.append(Peer(llm, text, name, options, rows=rows, cache_dir=base.cache_dir))
            else:
                there.append(ForetellSystem(llm, text, name, options))
        except MissingPeerError as error:
            missing[text] = str(error)
            note(f"note: {error}")
    return missing


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print(
            "  ".join(
                cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def compare(
    before: Annotated[Path, typer.Argument(help="A result folder.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Say what got slower or is accepted less, beyond noise; exit code 1 if anything did."""
    from foretell.bench.compare import compare as changes
    from foretell.bench.results import read_results

    found = list(changes(read_results(before), read_results(after)))
    if not found:
        raise ForetellError("The two results have no contender and setting in common; nothing can be compared.")
    for change in found:
        print(change)
    if any(change.worse for change in found):
        raise typer.Exit(1)


def sweep(
    base: Base,
    out: Annotated[Path, typer.Option("--out", help="Folder for the results; an interrupted run goes on.")],
    drafter: Annotated[str, typer.Option("--drafter", "-d", help="What guesses, with options as in --run.")] = "",
    epsilon: Annotated[list[float] | None, typer.Option(min=0, help="A threshold to try; repeatable.")] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="Of plain decoding, and of the rule.")
    ] = 0.7,
    suite: Annotated[
        str, typer.Option("--suite", help="As of foretell bench; one with references is scored.")
    ] = "mini",
    limit: Annotated[int | None, typer.Option(min=1, help="Ask at most so many questions.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens a turn.")] = 128,
    seed: Annotated[int, typer.Option(help="Of sampled answers.")] = 0,
) -> None:
    """Sweep the threshold of typical acceptance, which is lossy: what speed costs in quality.

    Exact verification, and plain decoding, run beside. The report plots tokens per second and each score against ε.
    """
    from foretell import drafters
    from foretell.bench.suites import load_suite
    from foretell.files import exists

    if temperature <= 0:
        raise UsageError(f"--temperature is {temperature}; typical acceptance needs one above 0.")
    if exists(out / "results.json"):
        raise UsageError(f"{out} holds a finished benchmark; choose another --out, or delete it.")
    asked = load_suite(suite).chosen(1, limit, None)
    if drafter and "typical" in _spec(drafter, base)[2]:  # refused before anything is loaded
        raise UsageError(f"--drafter {drafter} has a threshold already; leave `typical` out.")
    llm = base.load()
    what = drafter or drafters.recommended(llm.backbone)
    join = "," if ":" in what else ":"
    specs = [_spec(what, base), *(_spec(f"{what}{join}typical={e:g}", base) for e in epsilon or EPSILONS)]
    how = {
        "new_tokens": max_new_tokens, "repeats": 1, "batches": [1], "temperatures": [temperature], "seed": seed,
    }  # fmt: skip
    _say(_measure(llm, base, out, asked, specs, how, run_code=False), out)


def setup(cache: Cache, peer: Annotated[str, typer.Argument(help="transformers, llama.cpp or vllm.")]) -> None:
    """Install a peer in an environment of its own, in the cache folder."""
    from foretell.bench.peers import set_up

    set_up(peer, cache.cache_dir, note)


app = typer.Typer(add_completion=False, rich_markup_mode="rich")
app.callback(invoke_without_command=True)(flat(run))
app.command()(compare)
app.command()(flat(sweep))
app.command()(flat(setup))
