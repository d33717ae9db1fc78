"""`foretell drafters`: the methods, what ships for which model, and the options of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from foretell.drafting.options import OptionHelp


def drafters(
    name: Annotated[str | None, typer.Argument(help="A drafter, whose options are listed.")] = None,
) -> None:
    """List the drafters, or one drafter's options."""
    if name is None:
        _print_methods()
    else:
        show_options(name)


def show_options(name: str) -> None:
    """Prints the options of a drafter, and those of its training."""
    from foretell.drafters import drafter_class
    from foretell.drafters import table as all_drafters
    from foretell.drafting.options import described

    cls: Any = drafter_class(name)
    print(f"{name}: {all_drafters()[name][1]}" if name in all_drafters() else name)
    _print_options(f"Options of --drafter {name}, each as -o NAME=VALUE", described(cls.Options))
    if training := getattr(cls, "Training", None):
        _print_options(f"Options of `foretell train {name}`, each as -o NAME=VALUE", described(training))


def _print_methods() -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from foretell.drafters import drafter_class
    from foretell.drafters import table as all_drafters
    from foretell.drafting.checkpoint import SHIPPED
    from foretell.files import read_json

    ships: dict[str, list[str]] = {name: [] for name in all_drafters()}
    for config in sorted(SHIPPED.glob("*/config.json")):
        raw = read_json(config)
        ships[raw["method"]].append(raw["backbone"])
    table = Table("drafter", "guesses with", "training", "ships for", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].overflow = "fold"  # a name cut short could not be typed
    for name, (_, help) in all_drafters().items():
        trained = "needed" if hasattr(drafter_class(name), "Training") else "none"
        table.add_row(name, help.replace("[", "\\["), trained, "\n".join(dict.fromkeys(ships[name])))
    Console().print(table)
    print("`foretell drafters NAME` lists a drafter's options; `foretell train` makes one for your own model.")


def _print_options(title: str, options: list[OptionHelp]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not options:
        print(f"\n{title}: none")
        return
    table = Table("name", "value", "default", "", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].overflow = "fold"
    for option in options:
        table.add_row(*(Text(text) for text in (option.name, option.type, option.default or "-", option.help)))
    print(f"\n{title}")
    Console().print(table)
