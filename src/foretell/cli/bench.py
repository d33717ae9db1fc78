"""`foretell bench`: measures drafters and peers over a suite in one interleaved run; `compare`, `sweep`, `setup`."""

from __future__ import annotations

import math
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretell.cli.options import Base, Cache, flat
from foretell.cli.terminal import command_line, job_progress, load_progress, note
from foretell.errors import ForetellError, UsageError

EPSILONS = (0.01, 0.03, 0.06, 0.09, 0.15, 0.25)
"""Thresholds of a sweep: the paper's range (arXiv 2401.10774, §4), and the published one."""

if TYPE_CHECKING:
    from foretell.api import LLM
    from foretell.bench.suites import Suite
    from foretell.bench.systems import System

SuiteName = Annotated[
    str, typer.Option("--suite", help="mini, humaneval, or a file: Spec-Bench, HumanEval, GSM8K, JSON lines, text.")
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", "-n", min=1, help="Limit of a turn; by default 128, for HumanEval 512."),
]
RunCode = Annotated[
    bool,
    typer.Option("--run-code", help="Run the code that the model writes, in a process with limits, to judge it."),
]


def run(
    ctx: typer.Context,
    base: Base,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for the results; an interrupted run resumes there. By default bench-1, bench-2, ...: "
            "the first without finished results.",
        ),
    ] = None,
    systems: Annotated[
        list[str] | None,
        typer.Option(
            "--run",
            "-r",
            help="A drafter or peer, with options: medusa:nodes=16,lookup=true; repeatable. "
            "Plain decoding always runs. By default prompt_lookup and the fastest drafter that comes with foretell.",
        ),
    ] = None,
    suite: SuiteName = "mini",
    max_new_tokens: MaxNewTokens = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times that every question is answered.")] = 1,
    batch_size: Annotated[list[int] | None, typer.Option("--batch-size", "-b", help="Rows; repeatable.")] = None,
    temperature: Annotated[list[float] | None, typer.Option("--temperature", "-t", help="Repeatable.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Use every K-th question only.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many questions.")] = None,
    per_category: Annotated[int | None, typer.Option(min=1, help="Use at most this many of each category.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look, under a minute: the 4 shortest questions, 24 tokens.")
    ] = False,
    run_code: RunCode = False,
    seed: Annotated[int, typer.Option(help="Seed of sampled answers.")] = 0,
) -> None:
    """Measure drafters and peers over a suite of questions, in turns, and write a report.

    Every answer is compared with plain decoding's, token by token. `foretell bench compare A B` shows what got worse
    between two results, `foretell bench setup PEER` installs a peer in an environment of its own.
    """
    if ctx.invoked_subcommand:
        return
    specs, folder = [_spec(text) for text in systems or ()], _folder(out)
    from foretell.bench.suites import QUICK_TOKENS

    chosen = _load(suite, base).chosen(every, limit, per_category)
    new_tokens = max_new_tokens or chosen.new_tokens
    if quick:
        chosen, new_tokens, repeats = chosen.quick(), min(new_tokens, QUICK_TOKENS), 1
    if chosen.has_code:
        _explain_code(run_code, quick)
    batches, temperatures = batch_size or [1], temperature or [0.0]
    if min(batches) < 1:
        raise UsageError(f"--batch-size is {min(batches)}; it must be at least 1.")
    llm = base.load()
    how = {
        "new_tokens": new_tokens, "repeats": repeats, "batches": batches, "temperatures": temperatures,
        "seed": seed,
    }  # fmt: skip
    _print(_measure(llm, base, folder, chosen, specs, how, run_code), folder)


def _load(suite: str, base: Base) -> Suite:
    from foretell.bench.suites import load_suite

    with load_progress() as progress:
        return load_suite(suite, base.cache_dir, base.offline, progress)


def _explain_code(run_code: bool, quick: bool) -> None:
    """Prints what becomes of the code that the model writes.

    Raises:
        UsageError: it shall be run, but is cut short, or this system cannot limit a process.
    """
    from foretell.bench import sandbox

    if run_code and quick:
        raise UsageError("--quick cuts answers short, so no code can be judged; leave out --run-code.")
    if not run_code:
        note("note: pass@1 is left out, since the model's code is not run; --run-code runs it.")
    elif not sandbox.finishes(("",)):
        raise UsageError("This system cannot limit a process as --run-code needs; leave it out, or measure on Linux.")
    elif not sandbox.without_network():
        note("note: this system does not let a process leave the network; the model's code is refused sockets instead.")


def _folder(out: Path | None) -> Path:
    """Returns where the results go.

    Raises:
        UsageError: the folder that was named holds a finished run.
    """
    from foretell.bench.run_folder import RESULTS
    from foretell.files import exists

    if out is None:
        out = next(path for number in count(1) if not exists((path := Path(f"bench-{number}")) / RESULTS))
        note(f"The results go to {out}; --out names another folder.")
    elif exists(out / RESULTS):
        raise UsageError(f"{out} holds a finished benchmark; choose another --out, or delete it.")
    return out


def _print(results: dict[str, Any], out: Path) -> None:
    from foretell.bench.report import main_table, quality_table, sections

    for title, rows in sections(results):
        note(f"\n{title}")
        for head, body in [main_table(rows, results["limits"]), *quality_table(rows)]:
            _print_table(head, body)
    note(f"\nIn {out}: report.html, results.md, results.json.")


def _spec(text: str) -> tuple[str, str, Any]:
    """Returns (text, drafter or peer, options of the drafter or parts of the peer's variant)."""
    from foretell import drafters
    from foretell.bench.peers import PEERS
    from foretell.cli.options import drafter_options
    from foretell.drafting.from_file import split

    name, _, rest = text.partition(":")
    own = split(text)
    if own:  # a drafter in a file
        name, rest = ":".join(filter(None, own[:2])), own[2].removeprefix(":")
    parts = [part for part in rest.split(",") if part]
    if name in PEERS:
        return text, name, parts
    if not own and name not in drafters.table():
        raise UsageError(
            f"Unknown drafter or peer {name!r}; the drafters are {', '.join(drafters.table())}, the peers "
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
    """Parses an option of the engine: true or false; `typical` may be a threshold instead."""
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
    from foretell.files import sole_writer

    systems: list[System] = []
    try:
        missing = _start(llm, base, specs or _default_specs(llm, out), max(how["batches"]), systems)
        with sole_writer(out):
            return _run(llm, base, out, suite, systems, missing, how, run_code)
    finally:
        for system in systems:
            system.close()


def _default_specs(llm: LLM, out: Path) -> list[tuple[str, str, Any]]:
    """Returns what runs when nothing is named: the systems of the run to be resumed, else the defaults; prints why."""
    from foretell.bench.run_folder import begun
    from foretell.bench.systems import default_specs

    found = begun(out)
    if found is None:
        texts, reason = default_specs(llm.backbone)
    else:
        texts = [name for name in found["settings"]["contenders"] if name != "plain"]
        reason = f"{out} holds an unfinished run of them."
    note(f"Systems: {', '.join(['plain', *texts])}. {reason} --run names others.")
    return [_spec(text) for text in texts]


def _run(
    llm: LLM, base: Base, out: Path, suite: Suite, systems: list[System], missing: dict[str, str],
    how: dict[str, Any], run_code: bool,
) -> dict[str, Any]:  # fmt: skip
    from foretell import __version__
    from foretell.bench.limits import read_bandwidth, step_bytes
    from foretell.bench.report import write_report
    from foretell.bench.results import collect, commit, machine, write_results
    from foretell.bench.run_folder import Settings
    from foretell.bench.runner import Runner

    settings = Settings(
        model=base.model, fingerprint=llm.backbone.fingerprint, dtype=llm.backbone.arithmetic,
        suite=suite.name, digest=suite.digest, questions=[question.id for question in suite.questions],
        systems=[system.name for system in systems], **how,
    )  # fmt: skip
    about = {
        "machine": machine(llm.backbone), "version": __version__, "commit": commit(), "command": command_line(),
        "contenders": {system.name: system.about for system in systems}, "missing": missing,
        "weight_bytes": step_bytes(llm.backbone), "probe_seconds": round(llm.backbone.probe_seconds, 2),
    }  # fmt: skip
    runner = Runner(llm, systems, suite.questions, settings, out, about, lambda: read_bandwidth(llm.backbone))
    note(
        f"{len(runner.left())} rounds of up to {settings.new_tokens} tokens for each of {len(systems)} systems: about "
        f"{runner.estimate():.0f} s, if all are as fast as plain decoding."
    )
    with job_progress("measuring", "tokens/s") as progress:
        records = runner.run(progress)
    for name, reason in runner.failed.items():
        note(f"note: {name}: {reason}")
    about["missing"] = missing | runner.failed
    decode = lambda ids: llm.tokenizer.decode(ids, skip_special=True)  # noqa: E731
    results = collect({"settings": settings.to_json(), **about}, records, suite.questions, decode, run_code)
    write_report(out, results)
    write_results(out, results)  # last: its presence marks the run as finished
    return results


def _start(llm: LLM, base: Base, specs: list[tuple[str, str, Any]], rows: int, systems: list[System]) -> dict[str, str]:
    """Adds each system that can run, plain first; returns why others cannot."""
    from foretell.bench.peers import PEERS, MissingPeerError
    from foretell.bench.peers.process import Peer
    from foretell.bench.systems import ForetellSystem

    systems.append(ForetellSystem(llm, "plain", "plain", {}))
    missing: dict[str, str] = {}
    for text, name, options in specs:
        if text in [system.name for system in systems]:
            continue
        try:
            if name in PEERS:
                systems.append(Peer(llm, text, name, options, rows=rows, cache_dir=base.cache_dir))
            else:
                systems.append(ForetellSystem(llm, text, name, options))
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
    """Compare two results: what got slower, or has fewer tokens per step, beyond noise; exit code 1 if anything did."""
    from foretell.bench.compare import compare as changes
    from foretell.bench.results import read_results

    found = list(changes(read_results(before), read_results(after)))
    if not found:
        raise ForetellError("The two results have no system and setting in common; nothing can be compared.")
    for change in found:
        print(change)
    if any(change.worse for change in found):
        raise typer.Exit(1)


def sweep(
    base: Base,
    out: Annotated[Path, typer.Option("--out", help="Folder for the results; an interrupted run resumes there.")],
    drafter: Annotated[str, typer.Option("--drafter", "-d", help="The drafter, with options as in --run.")] = "",
    epsilon: Annotated[list[float] | None, typer.Option(min=0, help="A threshold to try; repeatable.")] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="Temperature of plain decoding and of the rule.")
    ] = 0.7,
    suite: Annotated[
        str, typer.Option("--suite", help="As for foretell bench; one with references is scored.")
    ] = "mini",
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many questions.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Limit of a turn.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of sampled answers.")] = 0,
) -> None:
    """Sweep the threshold of typical acceptance, which is lossy: speed against quality.

    Exact verification and plain decoding run too. The report plots tokens per second and each score against ε.
    """
    from foretell.recommendation import recommend

    if temperature <= 0:
        raise UsageError(f"--temperature is {temperature}; typical acceptance needs one above 0.")
    folder, chosen = _folder(out), _load(suite, base).chosen(1, limit, None)
    if drafter and "typical" in _spec(drafter)[2]:  # refused before anything is loaded
        raise UsageError(f"--drafter {drafter} has a threshold already; leave `typical` out.")
    llm = base.load()
    name = drafter or recommend(llm.backbone).name
    join = "," if ":" in name else ":"
    specs = [_spec(name), *(_spec(f"{name}{join}typical={e:g}") for e in epsilon or EPSILONS)]
    how = {
        "new_tokens": max_new_tokens, "repeats": 1, "batches": [1], "temperatures": [temperature], "seed": seed,
    }  # fmt: skip
    _print(_measure(llm, base, folder, chosen, specs, how, run_code=False), folder)


def setup(cache: Cache, peer: Annotated[str, typer.Argument(help="transformers, llama.cpp or vllm.")]) -> None:
    """Install a peer in an environment of its own, in the cache folder."""
    from foretell.bench.peers import set_up

    set_up(peer, cache.cache_dir, note)


app = typer.Typer(add_completion=False, rich_markup_mode="rich")
app.callback(invoke_without_command=True)(flat(run))
app.command()(compare)
app.command()(flat(sweep))
app.command()(flat(setup))
