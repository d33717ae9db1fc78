"""The command line: one verb, one file, one row in this table.

A verb's module is imported when the verb is typed, so that `foretell --help` and `--version` answer before torch could
be loaded. A user's mistake is one line on stderr and an exit code: 1 could not be done, 2 could never work as typed,
130 interrupted, 141 the reader of the output has left. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from foretell import __version__
from foretell.cli import terminal
from foretell.errors import ForetellError

VERBS: dict[str, tuple[str, str]] = {
    "generate": ("foretell.cli.generate:generate", "Answer a prompt, or a file of prompts."),
    "chat": ("foretell.cli.chat:chat", "Talk with a model."),
    "demo": ("foretell.cli.demo:demo", "See and measure what drafting changes, on this machine."),
    "distill": ("foretell.cli.distill:distill", "Let the model write training data."),
    "train": ("foretell.cli.train:train", "Train a drafter for a model."),
    "bench": ("foretell.cli.bench:app", "Measure drafters and peers over a suite."),
    "tune": ("foretell.cli.tune:tune", "Measure what steps and drafting cost here."),
    "drafters": ("foretell.cli.drafters:drafters", "List the drafters, or one drafter's options."),
    "models": ("foretell.cli.models:models", "List the models that can be loaded by name."),
    "pull": ("foretell.cli.models:pull", "Fetch a model, so that it loads without a network."),
    "rm": ("foretell.cli.models:rm", "Delete a model from foretell's cache."),
    "config": ("foretell.cli.config:config", "Show the config file's path and the defaults in force."),
}
"""Verb -> ("module:function", one line of help)."""


def load_verb(verb: str) -> Any:
    """Returns the command of a verb: its groups of options as single options, the registered drafters in its help."""
    from foretell.cli.help import plain
    from foretell.cli.options import drafter_table, flat

    module, _, name = VERBS[verb][0].partition(":")
    target = getattr(import_module(module), name)
    if isinstance(target, typer.Typer):  # a verb with commands of its own
        return plain(typer.main.get_command(target))
    function = flat(target)
    paragraphs = (function.__doc__ or "").split("\n\n")
    one = typer.Typer(add_completion=False, rich_markup_mode="rich")
    one.command(
        verb,
        help="\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs),  # typer keeps line breaks
        epilog=drafter_table() if "drafter" in function.__annotations__ else None,
    )(function)
    return plain(typer.main.get_command(one))


class Verbs(TyperGroup):
    """Holds a stub per verb, for the list in `--help`; the verb that was typed takes its stub's place."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        if not name:
            return name, None, rest
        command = load_verb(name)
        if not ctx.resilient_parsing:  # a broken config file does not stop a shell from completing words
            from foretell.cli.defaults import of_verb
            from foretell.cli.options import shared_options

            ctx.default_map = {name: of_verb(name, command, VERBS, shared_options())}
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ForetellError as mistake:
            from foretell.cli.wording import note_error

            note_error(mistake)
            raise typer.Exit(mistake.exit_code) from mistake
        except BrokenPipeError as leaving:
            raise typer.Exit(_reader_left()) from leaving
        except KeyboardInterrupt as interrupt:
            terminal.note("\n" + "; ".join(["interrupted", *map(str, interrupt.args)]))
            raise typer.Exit(130) from interrupt


def app() -> Any:
    """Returns the whole command line."""
    from foretell.cli.help import plain

    def foretell(
        version: Annotated[
            bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version.")
        ] = False,
    ) -> None:
        """A language model decodes several tokens per forward pass, with no second model.

        Try: foretell demo
        """

    outer = typer.Typer(cls=Verbs, no_args_is_help=True, rich_markup_mode="rich")
    outer.callback()(foretell)
    group = plain(typer.main.get_command(outer))
    for verb, (_, help) in VERBS.items():
        group.add_command(TyperCommand(name=verb, help=help))
    return group


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits; `arguments` default to those the process was started with."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an answer may hold characters that this terminal lacks
    try:
        try:
            with terminal.warnings_as_notes():
                app().main(arguments, prog_name="foretell")
        finally:
            sys.stdout.flush()  # here, where a closed pipe can still be answered
    except BrokenPipeError:
        sys.exit(_reader_left())


def _reader_left() -> int:
    """Returns the exit code of a program whose reader has left (`| head`), and silences Python's last flush."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _version(wanted: bool) -> None:
    if wanted:
        print(f"foretell {__version__}")
        raise typer.Exit()
