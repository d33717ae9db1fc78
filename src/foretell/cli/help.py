"""Help in a user's words: what an option takes is N, X, TEXT or PATH instead of the parser's names for its types."""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

WORDS = {bool: "", int: "N", float: "X", str: "TEXT", Path: "PATH"}


def plain(command: Any) -> Any:
    """Gives every option of a click command and of its subcommands such a word, and --help the short -h.

    Returns:
        The command, changed in place.
    """
    hints = get_type_hints(command.callback, include_extras=True) if command.callback else {}
    command.context_settings["help_option_names"] = ["--help", "-h"]
    context = command.make_context(command.name, [], resilient_parsing=True)
    for param in command.get_params(context):
        word = _word(hints.get(param.name, bool))  # what has no parameter of its own is a flag, such as --help
        if param.param_type_name == "option" and param.metavar is None and word is not None:
            param.metavar = word
        elif param.param_type_name == "argument":
            param.metavar = param.name.upper().replace("_", "-") if param.metavar is None else param.metavar
            param.display_type_rich = lambda ctx: None  # its name says what it is
        if hasattr(param, "min"):
            param.min = param.max = None  # only what help shows, as x>=1; values are checked by their type
    for inner in getattr(command, "commands", {}).values():
        plain(inner)
    return command


def _word(hint: Any) -> str | None:
    """Returns the placeholder of a type in help; None for a list of choices, which the parser shows better."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Annotated, list):
        return _word(inner[0])
    if origin in (Union, UnionType):
        return _word(next(member for member in inner if member is not NoneType))
    return None if origin is Literal else WORDS.get(hint, "TEXT")
