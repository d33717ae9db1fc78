"""The nine trees that Medusa was published with, by name, as rank paths.

`published.json` is data from the repository FasterDecoding/Medusa (Apache-2.0, medusa/model/medusa_choices.py), each
found for one of its models. They serve published checkpoints; for your own heads, `trees.search` finds better ones.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from foretell.errors import UsageError


@cache
def published_trees() -> dict[str, list[tuple[int, ...]]]:
    """Name -> rank paths, prefixes first."""
    raw = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return {name: sorted(map(tuple, paths), key=lambda path: (len(path), path)) for name, paths in raw.items()}


def published(name: str) -> list[tuple[int, ...]]:
    """Returns a published tree by name.

    Raises:
        UsageError: the name is unknown; the sentence suggests a near one.
    """
    trees = published_trees()
    if name not in trees:
        near = get_close_matches(name, trees, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"Unknown tree {name!r}: {hint}the published trees are {', '.join(trees)}.")
    return trees[name]
