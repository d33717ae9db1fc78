"""`foretell models`: what can be loaded by name, and what is here already."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True)
class _Row:
    name: str
    bytes: int
    licence: str | None
    source: str
    cached: bool
    path: str | None


def models(
    cache_dir: Annotated[
        Path | None, typer.Option("--cache-dir", help="Where fetched models are kept; else FORETELL_CACHE.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """List the models that can be loaded by name.

    Catalogue models are fetched and converted when first used; a hub id (org/name), a local folder or a .gguf
    file works as well, by its own name.
    """
    rows = _rows(cache_dir)
    if as_json:
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        _print(rows)


def _rows(cache_dir: Path | None) -> list[_Row]:
    from foretell.files import read_json
    from foretell.loading import lora
    from foretell.loading.cache_dir import cached_models
    from foretell.loading.catalog import CATALOG

    cached = [
        _Row(model.name, model.bytes, model.licence, model.source, True, str(model.path))
        for model in cached_models(cache_dir)
    ]
    here = {row.name for row in cached}
    absent = [
        _Row(entry.name, entry.stored_bytes, entry.licence, "catalog", False, None)
        for entry in CATALOG.values()
        if entry.name not in here
    ]
    for config in lora.SHIPPED.glob(f"*/{lora.CONFIG}"):
        base = CATALOG[read_json(config)["base_model_name_or_path"]]
        name = f"{base.name}+{config.parent.name}"
        if name not in here:
            absent.append(_Row(name, base.stored_bytes, base.licence, "catalog, with an adapter", False, None))
    return sorted(cached + absent, key=lambda row: (row.source != "catalog", row.name))


def _print(rows: list[_Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "size", "licence", "from", "cached", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"  # a name cut short could not be typed
    for row in rows:
        size = f"{row.bytes / 1e6:,.0f} MB"
        table.add_row(row.name, size, row.licence or "see its card", row.source, "yes" if row.cached else "no")
    Console().print(table)
