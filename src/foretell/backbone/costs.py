"""What a step costs on this machine, by rows, context and nodes: the other half of choosing a tree.

A larger tree accepts more and costs more; how much more depends on the processor, the batch and the context, and can
only be measured. `foretell tune` measures it once per machine, model and number type; drafters read it back.
"""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from foretell.backbone.base import Backbone
from foretell.backbone.cache import KVCache
from foretell.backbone.files import read_json, write_json
from foretell.backbone.nodes import Nodes
from foretell.backbone.store import cache_folder
from foretell.errors import ForetellError
from foretell.trees import TokenTree

ROWS, CONTEXTS, NODES = (1, 2, 4, 8), (128, 512, 1024), (1, 4, 8, 16, 24, 32, 48, 64)
REPEATS = 9


@dataclass
class StepCosts:
    """Seconds of a step: rows -> context -> nodes a row -> seconds; and what drafting for it takes besides, of one row,
    by drafter."""

    seconds: dict[int, dict[int, dict[int, float]]]
    drafting: dict[str, float] = field(default_factory=dict)

    def of(self, rows: int, context: int, nodes: int) -> float:
        """Seconds of a step; between measured sizes by interpolation, rows and contexts from the nearest measured."""
        at = self.seconds[min(self.seconds, key=lambda r: abs(r - rows))]
        sizes = at[min(at, key=lambda c: abs(c - context))]
        below = max((n for n in sizes if n <= nodes), default=min(sizes))
        above = min((n for n in sizes if n >= nodes), default=max(sizes))
        share = (nodes - below) / (above - below) if above > below else 0.0
        return sizes[below] * (1 - share) + sizes[above] * share

    def best_size(self, rows: int, context: int, tokens_per_step: Mapping[int, float], drafting: float = 0.0) -> int:
        """The tree size of the most tokens per second, where `tokens_per_step` says what each size earns."""
        return max(tokens_per_step, key=lambda n: self.rate(rows, context, n, tokens_per_step[n], drafting))

    def rate(self, rows: int, context: int, nodes: int, tokens: float, drafting: float = 0.0) -> float:
        """Tokens per second of a row whose steps earn so many, where drafting takes so many seconds a step."""
        return tokens / (self.of(rows, context, nodes) + drafting)

    def over(self, older: StepCosts | None) -> StepCosts:
        """These, and what is known of other batch sizes and drafters."""
        if older is None:
            return self
        return StepCosts({**older.seconds, **self.seconds}, {**older.drafting, **self.drafting})

    def save(self, path: Path) -> None:
        write_json(path, {"seconds": self.seconds, "drafting": self.drafting})

    @classmethod
    def load(cls, path: Path) -> StepCosts | None:
        """What was saved; None where nothing was.

        Raises:
            ForetellError: the file is damaged.
        """
        if not path.is_file():
            return None
        try:
            raw = read_json(path)
            seconds = {
                int(r): {int(c): {int(n): float(s) for n, s in x.items()} for c, x in y.items()}
                for r, y in raw["seconds"].items()
            }
            drafting = {str(name): float(s) for name, s in raw.get("drafting", {}).items()}
            if not seconds or not all(y and all(y.values()) for y in seconds.values()):
                raise ValueError("nothing was measured")
            if not all(0 < s < math.inf for y in seconds.values() for x in y.values() for s in x.values()):
                raise ValueError("no time")
            if not all(0 <= s < math.inf for s in drafting.values()):
                raise ValueError("no time")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ForetellError(f"{path} is damaged; delete it and run foretell tune again.") from error
        return cls(seconds, drafting)


def costs_file(backbone: Backbone, cache_dir: str | Path | None = None) -> Path:
    """Where the costs of this backbone on this machine are kept."""
    parts = (
        platform.node(), processor(), backbone.kernels, str(backbone.dtype), str(backbone.device),
        str(backbone.threads), backbone.fingerprint,
    )  # fmt: skip
    return cache_folder(cache_dir) / "costs" / f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.json"


def measure(
    backbone: Backbone,
    rows: Sequence[int] = ROWS,
    contexts: Sequence[int] = CONTEXTS,
    nodes: Sequence[int] = NODES,
    repeats: int = REPEATS,
    progress: Callable[[float], None] = lambda fraction: None,
) -> StepCosts:
    """Times whole steps over random tokens; sizes take turns, and the median of the rounds counts."""
    contexts = [c for c in contexts if c + max(nodes) <= backbone.config.max_positions] or [1]
    cache = backbone.new_cache(max(rows), max(contexts) + max(nodes))
    seconds: dict[int, dict[int, dict[int, float]]] = {}
    done = 0
    for count in rows:
        for context in contexts:
            times: dict[int, list[float]] = {size: [] for size in nodes}
            for turn in range(repeats + 1):
                for size, measured in times.items():
                    took = _step_seconds(backbone, cache, size, count, context)
                    if turn:  # the first warms up
                        measured.append(took)
                done += 1
                progress(done / (len(rows) * len(contexts) * (repeats + 1)))
            seconds.setdefault(count, {})[context] = {size: median(t) for size, t in times.items()}
    return StepCosts(seconds)


def bush(size: int) -> TokenTree:
    """A tree of the shape that heads draft: four children a node."""
    return TokenTree((-1, *((i - 1) // 4 for i in range(1, size))))


def _step_seconds(backbone: Backbone, cache: KVCache, size: int, rows: int, context: int) -> float:
    nodes = Nodes([bush(size)] * rows, list(range(rows)), [context] * rows)
    tokens = torch.arange(size * rows) % backbone.config.vocab
    began = time.perf_counter()
    backbone.argmax(backbone.forward(tokens, nodes, cache)).tolist()
    return time.perf_counter() - began


def processor() -> str:
    """The name of its kind; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()
