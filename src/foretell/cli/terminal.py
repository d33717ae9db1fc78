"""Everything on the terminal that is not an answer: notes and progress, on stderr, and Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretell.errors import ForetellWarning

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

ROOMY = 60
"""Columns of a terminal from which on a bar and a rate have room beside what counts."""


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Prints the library's own warnings as notes; other warnings stay as they are."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_as_note(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, ForetellWarning):
                note(f"note: {message}")
            else:
                show(message, category, *where, **more)

        warnings.showwarning = show_as_note
        yield


def program() -> str:
    """Returns what to type to run foretell here: its name, or its path where the name alone is not found."""
    path = Path(sys.argv[0])
    if path.name != "foretell":
        return f"{Path(sys.executable).name} -m foretell"
    if shutil.which("foretell"):
        return "foretell"
    with suppress(ValueError):
        path = path.absolute().relative_to(Path.cwd())
    return str(path)


def command_line() -> str:
    """Returns the command as typed, to be stored with its results; absolute paths are cut to their last part."""

    def bare(argument: str) -> str:
        head, equals, value = argument.rpartition("=")
        path = Path(value)
        return head + equals + (path.name if path.is_absolute() or ".." in path.parts else value)

    return " ".join(["foretell", *map(bare, sys.argv[1:])])


@contextmanager
def load_progress() -> Iterator[Callable[[str, float], None]]:
    """A bar per stage of fetching, converting and loading a model; plain lines where no bar can be drawn.

    Nothing appears, and rich is not imported, when there is nothing to fetch and the model loads quickly.
    """
    bar: Progress | None = None
    tasks: dict[str, int] = {}

    def report(stage: str, fraction: float) -> None:
        nonlocal bar
        if not _draws():
            if stage not in tasks:
                note(f"{stage} ...")
            tasks[stage] = 0
            return
        if bar is None:
            bar = _bar("[progress.percentage]{task.percentage:>3.0f}%")
            bar.start()
        if stage not in tasks:
            for earlier in tasks.values():  # not every stage reports its own end
                bar.update(earlier, completed=1.0)  # type: ignore[arg-type]
            tasks[stage] = bar.add_task(stage, total=1.0)
        bar.update(tasks[stage], completed=fraction)  # type: ignore[arg-type]

    try:
        yield report
    finally:
        if bar is not None:
            bar.stop()


@contextmanager
def answer_progress(count: int) -> Iterator[Callable[[int, bool], None]]:
    """Yields a callback (new tokens, whether a prompt is done) that shows prompts done, tokens per second, time left.

    Shown only if stderr is a terminal and answers go elsewhere.
    """
    if count < 2 or not _draws() or sys.stdout.isatty():
        yield lambda tokens, ended: None
        return
    began, tokens_so_far = time.perf_counter(), 0
    with _bar("{task.completed:.0f}/{task.total:.0f} prompts", rate="{task.fields[rate]}") as bar:
        task = bar.add_task("answering", total=count, rate="")

        def report(tokens: int, ended: bool) -> None:
            nonlocal tokens_so_far
            tokens_so_far += tokens
            rate = tokens_so_far / (time.perf_counter() - began)
            bar.update(task, advance=int(ended), rate=f"{rate:.0f} tokens/s")

        yield report


@contextmanager
def job_progress(name: str, unit: str, resumes: bool = True) -> Iterator[Callable[[int, int, int], None]]:
    """Yields a callback (done, total, units so far) that shows the time left, and the rate of `unit` if given.

    It draws a bar, or prints a line every half minute where none can be drawn. The first call names the total.

    Args:
        resumes: the same command continues an interrupted job; an interruption then says so.
    """
    began = time.perf_counter()

    def rate(units: int) -> str:
        return f"{units / max(1e-9, time.perf_counter() - began):.0f} {unit}" if unit else ""

    try:
        if not _draws():
            yield _lines(name, rate)
            return
        from rich.progress import MofNCompleteColumn

        with _bar(MofNCompleteColumn(), rate="{task.fields[rate]}") as bar:
            task = bar.add_task(name, total=None, rate="")
            yield lambda done, total, units: bar.update(task, completed=done, total=total, rate=rate(units))
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(*["the same command goes on from here"] * resumes) from interrupt


def _lines(name: str, rate: Callable[[int], str]) -> Callable[[int, int, int], None]:
    """Returns a callback that prints a line every half minute, and one at the end."""
    began = printed = time.perf_counter()
    first: list[tuple[int, float]] = []  # a resumed run does not begin at 0

    def time_left(done: int, total: int) -> str:
        begun, at = first[0]
        if not begun < done < total:
            return ""
        return f"about {(time.perf_counter() - at) / (done - begun) * (total - done):.0f} s left"

    def report(done: int, total: int, units: int) -> None:
        nonlocal printed
        if not first:
            first.append((done, time.perf_counter()))
        if time.perf_counter() - printed > 30 or done == total:
            printed = time.perf_counter()
            columns = f"{name}: {done}/{total}", rate(units), f"{printed - began:.0f} s", time_left(done, total)
            note(", ".join(filter(None, columns)))

    return report


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Yields a list that Ctrl-C fills instead of raising in the middle of a step; a second Ctrl-C raises."""
    caught: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, previous)


def _draws() -> bool:
    """True if stderr is a terminal that can redraw lines."""
    return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def _bar(done: str | ProgressColumn, rate: str = "") -> Progress:
    """Returns a bar of name, bar, count, rate and time left; a narrow terminal leaves out bar and rate."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    roomy = console.width >= ROOMY
    return Progress(
        TextColumn("{task.description}"), *[BarColumn()] * roomy, done, *[rate] * (roomy and bool(rate)),
        TimeRemainingColumn(),
        # redirected by rich, answers on stdout would end on stderr
        console=console, redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip
