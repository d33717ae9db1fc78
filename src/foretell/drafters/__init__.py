"""The methods: one file each, one row each in this table.

A row is "module:Class" and a line of help; the module is imported when the drafter is first used. Rows from outside:
`register` adds one, an installed package adds one by an entry point of the group `foretell.drafters`, and a file of the
user's own needs none. Command line and benchmark read `table`.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from foretell.drafting.from_file import checked, drafter_in, split
from foretell.drafting.options import parse
from foretell.errors import ForetellError, UsageError
from foretell.files import one_line

if TYPE_CHECKING:
    from foretell.backbone import Backbone
    from foretell.contracts import Drafter

DRAFTERS: dict[str, tuple[str | type[Drafter], str]] = {
    "plain": ("foretell.drafters.plain:Plain", "one token per step: the baseline"),
    "prompt_lookup": ("foretell.drafters.prompt_lookup:PromptLookup", "repeats what followed the same words before"),
    "medusa": ("foretell.drafters.medusa:Medusa", "trained heads that guess the tokens after the next"),
    "medusa2": ("foretell.drafters.medusa2:Medusa2", "Medusa's heads, trained jointly with the backbone"),
    "hydra": ("foretell.drafters.hydra.drafter:Hydra", "heads that read the guesses before theirs"),
    "hydra++": (
        "foretell.drafters.hydra.drafter:HydraPlus",
        "Hydra's heads behind a layer that attends to the whole text",
    ),
    "kangaroo": ("foretell.drafters.kangaroo:Kangaroo", "the lower layers draft, through a trained adapter"),
    "hidden_transfer": (
        "foretell.drafters.hidden_transfer:HiddenTransfer",
        "the verifying pass writes the next guesses, in rows of its own",
    ),
    "m2r2": ("foretell.drafters.m2r2:M2R2", "a fast stream beside the lower layers drafts"),
    "hamburger": (
        "foretell.drafters.hamburger.drafter:HAMburger",
        "a small decoder writes the tokens after the next from four of the model's states",
    ),
    "swift": ("foretell.drafters.swift:Swift", "drafts with sublayers left out, chosen while decoding"),
    "layerskip": ("foretell.drafters.layerskip:LayerSkip", "drafts by leaving the model at an early layer"),
    "del": ("foretell.drafters.dynamic_exit:DEL", "drafts by leaving at the layer with the best recent yield"),
}


def register(name: str, drafter: type[Drafter] | str, help: str) -> None:
    """Adds a drafter under a name: a class, or "module:Class" to be imported when it is used.

    Raises:
        UsageError: the name is taken.
    """
    if name in table():
        raise UsageError(f"A drafter named {name!r} exists already; choose another name.")
    DRAFTERS[name] = (drafter, help)


def table() -> dict[str, tuple[str | type[Drafter], str]]:
    """Returns all drafters by name: those above, the registered ones, and those of installed packages."""
    return DRAFTERS | {name: row for name, row in _installed().items() if name not in DRAFTERS}


@cache
def _installed() -> dict[str, tuple[str, str]]:
    """Rows of installed packages, from their entry points of the group `foretell.drafters`."""
    found = entry_points(group="foretell.drafters")
    return {each.name: (each.value, f"from the package {each.dist.name if each.dist else '?'}") for each in found}


def drafter_class(drafter: str | type[Drafter]) -> type[Drafter]:
    """The class behind a name, "mine.py:Class" for one in a file, or a class itself.

    Raises:
        UsageError: for an unknown name, with near ones, or what is no drafter.
        ForetellError: the file, or the package that adds the name, cannot be loaded.
    """
    if not isinstance(drafter, str):
        return checked(drafter, f"drafter={drafter!r}")
    if parts := split(drafter):
        file, name, rest = parts
        if rest:
            raise UsageError(f"Drafter {drafter!r} is not FILE.py or FILE.py:Class; correct what follows {file}.")
        return drafter_in(file, name)
    rows = DRAFTERS if drafter in DRAFTERS else table()
    if drafter not in rows:
        near = get_close_matches(drafter, rows, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"Unknown drafter {drafter!r}: {hint}the drafters are {', '.join(sorted(rows))}.")
    target = rows[drafter][0]
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    if drafter in DRAFTERS:
        return getattr(import_module(module), attribute)
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ForetellError(
            f"Drafter {drafter!r} ({rows[drafter][1]}) cannot be imported ({one_line(error)}); install that package "
            "again."
        ) from error
    return checked(found, f"Drafter {drafter!r} ({rows[drafter][1]})")


def parsed(drafter: str | type[Drafter], options: Mapping[str, Any]) -> tuple[type[Drafter], Any]:
    """Returns a drafter's class and its options, checked, as its `build` takes them.

    Raises:
        UsageError: for an unknown drafter or option, or a value that is not allowed.
    """
    cls = drafter_class(drafter)
    name = drafter if isinstance(drafter, str) else cls.__name__
    return cls, parse(cls.Options, options, f"Drafter {name!r}")


def build(drafter: str | type[Drafter], backbone: Backbone, lookup: bool = False, **options: Any) -> Drafter:
    """Makes a drafter for a backbone; `lookup` merges candidates of prompt lookup into its trees.

    Args:
        drafter: see `drafter_class`.

    Raises:
        UsageError, ForetellError: it cannot be made; the sentence names the remedy.
    """
    cls, chosen = parsed(drafter, options)
    built = cls.build(backbone, chosen)
    if not lookup:
        return built
    from foretell.drafters.prompt_lookup import prices_of, with_lookup

    sized = getattr(chosen, "nodes", 0) or getattr(chosen, "tree", "")  # a size that was given holds
    return with_lookup(built, None if sized else prices_of(backbone))


def name_of(drafter: Drafter) -> str:
    """Returns a drafter's name in the table, or that of its class, with "with lookup" where that is merged in."""
    from foretell.drafters.prompt_lookup import WithLookup

    if isinstance(drafter, WithLookup):
        return f"{name_of(drafter.inner)} with lookup"
    cls = type(drafter)
    targets = (cls, f"{cls.__module__}:{cls.__name__}")
    return next((name for name, (target, _) in table().items() if target in targets), cls.__name__)
