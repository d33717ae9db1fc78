"""`foretell models`, `pull` and `rm`: which models can be loaded by name, and what they take on disk."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foretell.cli.options import Cache
from foretell.cli.terminal import load_progress, note
from foretell.errors import UsageError
from foretell.loading.cache_dir import CachedModel
from foretell.loading.choices import WEIGHTS, chosen

if TYPE_CHECKING:
    from foretell.loading.catalog import Entry

Name = Annotated[str, typer.Argument(help="A name from `foretell models`.")]


@dataclass(frozen=True)
class _Row:
    name: str
    bytes: int
    licence: str | None
    source: str
    cached: bool
    path: str | None
    problem: str = ""


def models(
    cache: Cache,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """List the models that can be loaded by name: the catalogue's, and what is in foretell's and in the hub's cache.

    A model that is not here yet is fetched when it is first used, or by `foretell pull`. A hub id (org/name), a local
    folder or a .gguf file works as well, by its own name.
    """
    rows = _rows(cache.cache_dir)
    if as_json:
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        _print(rows)


def pull(
    cache: Cache,
    model: Annotated[str, typer.Argument(help="A catalogue name, a hub id, a .gguf file; + an adapter.")],
    weights: Annotated[str | None, typer.Option(help=f"{', '.join(WEIGHTS)}: as the model will be loaded.")] = None,
) -> None:
    """Fetch a model, so that it loads without a network; a GGUF file is converted, an adapter is merged, and float
    weights are quantized if --weights says so.
    """
    from foretell.loading.resolve import check_name, resolve

    check_name(model, weights=weights, cache_dir=cache.cache_dir, offline=False)  # before torch is imported
    from foretell.backbone.load import default_weights

    with load_progress() as progress:
        found = resolve(
            model,
            weights=weights or default_weights(None, None),
            cache_dir=cache.cache_dir,
            offline=False,
            progress=progress,
        )
    size = sum(file.stat().st_size for file in found.path.iterdir() if file.is_file())
    note(f"{model} is ready: {size / 1e6:,.0f} MB in {found.path}")


def rm(
    cache: Cache,
    model: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a model from foretell's cache; it is fetched or converted again when it is next used.

    Models in the hub's cache are shared with other programs and stay; so does every folder and file of yours.
    """
    from foretell.loading.cache_dir import cache_folder, remove, stored_models
    from foretell.loading.catalog import CATALOG, here

    names = {model, model.lower(), str(Path(model).expanduser().resolve())}
    named = [stored for stored in stored_models(cache.cache_dir) if stored.name in names]
    ours = [stored for stored in named if not stored.shared]
    if not ours:
        raise UsageError(_why_not(model, bool(named), cache_folder(cache.cache_dir)))
    size = f"{sum(stored.bytes for stored in ours) / 1e6:,.0f} MB"
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"Deleting {model} ({size}) needs a yes; give --yes.")
        typer.confirm(f"Delete {model} ({size}) from {ours[0].path.parent}?", abort=True, err=True)
    for stored in ours:
        remove(stored)
    note(f"{model} is deleted: {size} are free again.")
    if (entry := CATALOG.get(model.lower())) and (gguf := here(entry, cache_folder(cache.cache_dir))):
        note(f"The GGUF file that it was converted from stays: {gguf}")


def _why_not(model: str, in_hub: bool, cache: Path) -> str:
    """Returns the reason that a model cannot be deleted."""
    if in_hub:
        return (
            f"{model} is in the hub's cache, which other programs share; delete it with "
            f"`hf cache rm model/{model.partition('@')[0]}`."
        )
    if Path(model).expanduser().exists():
        return f"{model} is a file or folder of yours, and nothing made from it is in {cache}; delete it yourself."
    return f"{model} is not in {cache}; `foretell models` lists what is."


def _rows(cache_dir: Path | None) -> list[_Row]:
    from foretell.loading.cache_dir import stored_models
    from foretell.loading.catalog import CATALOG, shipped_adapters

    found = stored_models(cache_dir)
    stored = [
        _Row(model.name, model.bytes, model.licence, _source(model), not model.problem, str(model.path), model.problem)
        for model in found
    ]
    here = {model.name for model in found if not model.problem and _usual(model)}
    bases = {name: (name, "catalog") for name in CATALOG} | {
        f"{base}+{adapter}": (base, "catalog, with an adapter") for adapter, base in shipped_adapters().items()
    }
    absent = [
        _Row(name, _bytes(CATALOG[base], name), CATALOG[base].licence, source, False, None)
        for name, (base, source) in bases.items()
        if name not in here
    ]
    return sorted(stored + absent, key=lambda row: (not row.source.startswith("catalog"), row.name))


def _bytes(entry: Entry, name: str) -> int:
    """Returns about how large a model of the catalogue will be: an adapter is merged into unpacked weights."""
    return entry.download_bytes if name == entry.name else entry.unpacked_bytes


def _usual(model: CachedModel) -> bool:
    """Returns whether it loads without `--weights`."""
    return model.weights == chosen(None, model.source)


def _source(model: CachedModel) -> str:
    return model.source + ("" if _usual(model) else f", --weights {model.weights}")


def _print(rows: list[_Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "size", "licence", "from", "on disk", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"  # a name cut short could not be typed
    for row in rows:
        size = f"{row.bytes / 1e6:,.0f} MB"
        state = "yes" if row.cached else row.problem or "no"
        table.add_row(row.name, size, row.licence or "see its card", row.source, state)
    console = Console()
    console.print(table)
    if total := sum(row.bytes for row in rows if row.path):
        print(f"On disk: {total / 1e6:,.0f} MB.")
