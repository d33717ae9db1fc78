"""Measured cost of a step on this machine, by rows, context and nodes: the other half of choosing a tree.

A larger tree accepts more and costs more; how much more depends on the processor, the batch and the context, and can
only be measured. `foretell tune` measures it once per machine, model and number type; drafters read it back. Until it
has, a first reading of less than a second stands in, and steps taken while decoding refine it: sixteen nodes may cost
1.3 plain steps or more than four.
"""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from statistics import median

import torch

from foretell.backbone.base import Backbone
from foretell.backbone.kv_cache import KVCache
from foretell.backbone.nodes import Nodes
from foretell.errors import ForetellError
from foretell.files import read_json, write_json
from foretell.loading.cache_dir import cache_folder
from foretell.trees import TokenTree

ROWS, CONTEXTS, NODES = (1, 2, 4, 8), (128, 512, 1024), (1, 4, 8, 16, 24, 32, 48, 64)
REPEATS = 9
MOST = 8.0
"""Plain steps that a step may cost and still pay: no tree earns as many tokens."""
FIRST_NODES, FIRST_CONTEXT = (1, 16, 4, 8), 256
"""Sizes that a first reading times, in this order: the first two always, the others as time allows."""
FIRST_ROUNDS, FIRST_SECONDS = 5, 0.7
"""Rounds of a first reading, and the seconds after which it stops."""
SMALL = 4
"""Nodes of a small tree."""
LEARNT, FACTOR = 0.1, 2.0
"""Share of what a step tells beyond what is known, and the most that one step may tell: others disturb it."""
SAVED = 8
"""The file is written after so many steps, and whenever there are twice as many."""


@dataclass
class StepCosts:
    """Measured costs of steps and of drafting.

    Attributes:
        seconds: of a step: rows -> context -> nodes a row -> seconds.
        drafting: seconds that drafting takes besides, by drafter and rows.
        first: True for a first reading, which `learn` refines and `foretell tune` replaces.
        learnt: steps that it was refined by in this process.
    """

    seconds: dict[int, dict[int, dict[int, float]]]
    drafting: dict[str, dict[int, float]] = field(default_factory=dict)
    first: bool = False
    learnt: int = field(default=0, compare=False)

    def of(self, rows: int, context: int, nodes: float) -> float:
        """Returns seconds of a step of `nodes` a row: interpolated between sizes, extrapolated beyond the last two.

        Contexts are the nearest measured. Batches are interpolated; beyond the largest, the nodes of all rows count.
        """
        seconds = self.seconds  # another thread may replace it
        most = max(seconds)
        if rows > most:
            rows, nodes = most, nodes * rows / most
        around = _around(seconds, rows)
        return sum(share * _between(_nearest(seconds[r], context), nodes) for r, share in around)

    def node(self, rows: int, context: int) -> float:
        """Returns the seconds that each node of a small tree adds to a step."""
        return (self.of(rows, context, SMALL) - self.of(rows, context, 1)) / (rows * (SMALL - 1))

    def drafting_of(self, method: str, rows: int, context: int) -> float | None:
        """Returns seconds that a drafter takes for so many rows; None if nothing is known of it.

        Where only another batch was measured, drafting is taken to grow from that one to this as a step of small trees
        does: both multiply some nodes of every row with the same matrices.
        """
        known = self.drafting.get(method)
        if not known:
            return None
        nearest = min(known, key=lambda r: abs(r - rows))
        return known[nearest] * self.of(rows, context, SMALL) / self.of(nearest, context, SMALL)

    def best_size(
        self, rows: int, context: int, tokens_per_step: Mapping[int, float], drafting: float = 0.0,
        node_cost: float = 1.0,
    ) -> int:  # fmt: skip
        """Returns the tree size of the most tokens per second, given the tokens per step of each size.

        It is 1, the root alone, where plain steps give at least as many.
        """
        rates = self.rates(rows, context, tokens_per_step, drafting, node_cost)
        best = max(rates, key=rates.__getitem__)
        return best if rates[best] > self.rate(rows, context, 1, 1.0) else 1

    def rates(
        self, rows: int, context: int, tokens_per_step: Mapping[int, float], drafting: float = 0.0,
        node_cost: float = 1.0,
    ) -> dict[int, float]:  # fmt: skip
        """Returns tokens per second by tree size, of the sizes up to the largest measured one, or of all if none is.

        Args:
            node_cost: of the nodes besides the root, on average, as a share of one that runs through all layers.
        """
        most = max(nodes for at in self.seconds.values() for sizes in at.values() for nodes in sizes)
        known = {n: tokens for n, tokens in tokens_per_step.items() if n <= most} or tokens_per_step
        return {n: self.rate(rows, context, 1 + (n - 1) * node_cost, tokens, drafting) for n, tokens in known.items()}

    def rate(self, rows: int, context: int, nodes: float, tokens: float, drafting: float = 0.0) -> float:
        """Returns tokens per second of a row, given tokens per step and seconds of drafting per step."""
        return tokens / (self.of(rows, context, nodes) + drafting)

    def learn(
        self, rows: int, context: int, nodes: float, step: float, drafting: float = 0.0, method: str = "",
        usual: float = 0.0,
    ) -> None:  # fmt: skip
        """Refines a first reading by a step with guesses.

        Seconds stay those of the machine as it was first read: only relations to plain steps are learnt, for those
        hold while other processes come and go.

        Args:
            nodes: of a row. step, drafting: in plain steps of as many rows, taken just before. method: the drafter.
            usual: its `Drafter.usual_cost`, where nothing is known of it.
        """
        if not self.first or nodes <= 1 or rows > max(ROWS):
            return
        # tables are replaced, not changed: threads may be reading them
        seconds = dict(self.seconds if len(self.seconds) > 1 else {r: self._estimated(r) for r in ROWS})
        near = 1 << round(math.log2(max(context, FIRST_CONTEXT // 2)))
        for r, _ in _around(seconds, rows):
            sizes = {size: self.of(r, near, size) for size in sorted(FIRST_NODES)}
            seconds[r] = {**seconds[r], near: dict(seconds[r].get(near) or sizes)}
        known = StepCosts(seconds, self.drafting)
        plain = known.of(rows, near, 1)
        told = min(FACTOR, max(1 / FACTOR, step * plain / known.of(rows, near, nodes))) ** LEARNT
        for r, of_batch in _around(seconds, rows):
            sizes = seconds[r][near]
            for size, of_size in _around(sizes, nodes):
                if size > 1:
                    sizes[size] *= told ** (of_batch * of_size)
        self.seconds = seconds
        if method:
            taken = drafting * plain
            before = known.drafting_of(method, rows, near) or usual * plain or taken
            learnt = before + (min(taken, FACTOR * before) - before) * LEARNT
            self.drafting = {**self.drafting, method: {**self.drafting.get(method, {}), rows: learnt}}
        self.learnt += 1

    def _estimated(self, rows: int) -> dict[int, dict[int, float]]:
        """Returns what `of` says of a batch, at the contexts of the smallest one that was measured."""
        first = self.seconds[min(self.seconds)]
        return {context: {size: self.of(rows, context, size) for size in sizes} for context, sizes in first.items()}

    def over(self, older: StepCosts | None) -> StepCosts:
        """Returns these costs, and the older ones of other batch sizes and drafters."""
        if older is None or older.first:
            return self
        return StepCosts({**older.seconds, **self.seconds}, {**older.drafting, **self.drafting})

    def save(self, path: Path) -> None:
        """Writes the file; of processes that write at the same time, the last one's stays, complete."""
        write_json(path, {"seconds": self.seconds, "drafting": self.drafting, "first": self.first}, shared=True)

    @classmethod
    def load(cls, path: Path) -> StepCosts | None:
        """Reads the file; None if it does not exist.

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
            drafting = {
                str(name): {int(r): float(s) for r, s in (of if isinstance(of, dict) else {1: of}).items()}
                for name, of in raw.get("drafting", {}).items()  # older files have one row's seconds alone
            }
            if not seconds or not all(y and all(y.values()) for y in seconds.values()):
                raise ValueError("nothing was measured")
            if not all(0 < s < math.inf for y in seconds.values() for x in y.values() for s in x.values()):
                raise ValueError("no time")
            if not all(0 <= s < math.inf for x in drafting.values() for s in x.values()):
                raise ValueError("no time")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ForetellError(f"{path} is damaged; delete it and run foretell tune again.") from error
        return cls(seconds, drafting, raw.get("first") is True)


def costs_file(backbone: Backbone, cache_dir: str | Path | None = None) -> Path:
    """Returns the file for the costs of this backbone on this machine."""
    parts = (
        platform.node(), processor(), backbone.kernels + backbone.quantized, str(backbone.dtype), str(backbone.device),
        str(backbone.threads), backbone.fingerprint,
    )  # fmt: skip
    return cache_folder(cache_dir) / "costs" / f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.json"


def step_costs(backbone: Backbone) -> StepCosts | None:
    """Returns the costs that `foretell tune` measured, else a first reading, taken now and stored.

    None for a backbone without a file to store it in (see `foretell.load`).

    Raises:
        ForetellError: the file is damaged.
    """
    path = backbone.costs
    if path is None:
        return None
    if known := known_costs(backbone):
        return known
    state, found = _state(path), StepCosts.load(path)
    if found is None:
        return _keep(path, first_reading(backbone))
    _readings[path] = found, state
    return found


def known_costs(backbone: Backbone) -> StepCosts | None:
    """Returns the costs by which this process chooses trees, if it does: one object for all of its drafters.

    Where another process has written the file since, that object takes its costs over.

    Raises:
        ForetellError: the file is damaged.
    """
    path = backbone.costs
    if path is None or path not in _readings:
        return None
    found, known = _readings[path]
    if (state := _state(path)) != known:
        if written := StepCosts.load(path):
            found.seconds, found.drafting, found.first = written.seconds, written.drafting, written.first
            found.learnt += 1
        _readings[path] = found, state
    return found


def save_learnt(backbone: Backbone, costs: StepCosts) -> None:
    """Writes refined costs now and then, for other processes to begin with."""
    if backbone.costs and costs.learnt >= SAVED and not costs.learnt & (costs.learnt - 1):
        _keep(backbone.costs, costs)


def _keep(path: Path, costs: StepCosts) -> StepCosts:
    with suppress(ForetellError):  # where nothing may be written, the next process reads again
        costs.save(path)
    _readings[path] = costs, _state(path)
    return costs


def _state(path: Path) -> tuple[int, ...]:
    """Returns what changes whenever a file is replaced; nothing if there is none."""
    with suppress(OSError):
        stat = path.stat()
        return stat.st_ino, stat.st_mtime_ns, stat.st_size
    return ()


_readings: dict[Path, tuple[StepCosts, tuple[int, ...]]] = {}
"""The costs that this process has read, by their files, and the state of those."""


def first_reading(backbone: Backbone) -> StepCosts:
    """Measures one row quickly: sizes take turns, until the time is up or each has had its rounds.

    Of a large model two steps may take longer than that; the sizes between them then cost what lies between.
    """
    most = max(FIRST_NODES)
    context = FIRST_CONTEXT if FIRST_CONTEXT + most <= backbone.config.max_positions else 1
    cache = _cache_of_zeros(backbone, 1, context + most)
    times: dict[int, list[float]] = {size: [] for size in FIRST_NODES}
    spent = _step_seconds(backbone, cache, 1, 1, context)  # warms up
    for size in chain.from_iterable(repeat(FIRST_NODES, FIRST_ROUNDS)):
        if spent >= FIRST_SECONDS and all(times[needed] for needed in FIRST_NODES[:2]):
            break
        took = _step_seconds(backbone, cache, size, 1, context)
        times[size].append(took)
        spent += took
    return StepCosts({1: {context: {size: median(times[size]) for size in sorted(times) if times[size]}}}, first=True)


def measure(
    backbone: Backbone,
    rows: Sequence[int] = ROWS,
    contexts: Sequence[int] = CONTEXTS,
    nodes: Sequence[int] = NODES,
    repeats: int = REPEATS,
    progress: Callable[[float], None] = lambda fraction: None,
    most: float = math.inf,
) -> StepCosts:
    """Times steps over random tokens; sizes take turns, and the median of the rounds counts.

    Args:
        most: sizes beyond one that costs more plain steps than this are left out: such costs need no precision.
    """
    contexts = [c for c in contexts if c + max(nodes) <= backbone.config.max_positions] or [1]
    cache = _cache_of_zeros(backbone, max(rows), max(contexts) + max(nodes))
    seconds: dict[int, dict[int, dict[int, float]]] = {}
    done = 0
    for count in rows:
        for context in contexts:

            def step(size: int, count: int = count, context: int = context) -> float:
                return _step_seconds(backbone, cache, size, count, context)

            times: dict[int, list[float]] = {size: [] for size in _warm_up(step, nodes, most)}
            for _ in range(repeats):
                for size, measured in times.items():
                    measured.append(step(size))
                done += 1
                progress(done / (len(rows) * len(contexts) * repeats))
            seconds.setdefault(count, {})[context] = {size: median(t) for size, t in times.items()}
    return StepCosts(seconds)


def _warm_up(step: Callable[[int], float], sizes: Sequence[int], most: float) -> list[int]:
    """Takes a step of each size; returns those up to the first that twice costs more than `most` of the smallest."""
    kept, first = [sizes[0]], step(sizes[0])
    for size in sizes[1:]:
        kept.append(size)
        if step(size) > most * first and step(size) > most * first:
            break
    return kept


def _nearest(contexts: Mapping[int, dict[int, float]], context: int) -> dict[int, float]:
    return contexts[min(contexts, key=lambda c: abs(c - context))]


def _around(known: Mapping[int, object], number: float) -> list[tuple[int, float]]:
    """Returns the known numbers on both sides of one, and their shares in it; beyond them all the nearest alone."""
    below = max((n for n in known if n <= number), default=min(known))
    above = min((n for n in known if n >= number), default=max(known))
    if below == above:
        return [(below, 1.0)]
    share = (number - below) / (above - below)
    return [(below, 1 - share), (above, share)]


def _between(sizes: Mapping[int, float], nodes: float) -> float:
    """Returns the seconds of a size between those that are known, or beyond them as between the last two."""
    last = max(sizes)
    if nodes > last and len(sizes) > 1:
        before = sorted(sizes)[-2]
        return sizes[last] + max(0.0, sizes[last] - sizes[before]) * (nodes - last) / (last - before)
    return sum(share * sizes[size] for size, share in _around(sizes, nodes))


def bush(size: int) -> TokenTree:
    """Returns a tree of the shape that heads draft: four children a node."""
    return TokenTree((-1, *((i - 1) // 4 for i in range(1, size))))


def _cache_of_zeros(backbone: Backbone, rows: int, slots: int) -> KVCache:
    """Returns a cache whose slots can be read unwritten.

    From what else may lie there come logits that are no numbers, and looking for the greatest of those takes longer.
    """
    cache = backbone.new_cache(rows, slots)
    cache.keys.zero_()
    cache.values.zero_()
    return cache


def _step_seconds(backbone: Backbone, cache: KVCache, size: int, rows: int, context: int) -> float:
    nodes = Nodes([bush(size)] * rows, list(range(rows)), [context] * rows)
    tokens = torch.arange(size * rows) % backbone.config.vocab
    began = time.perf_counter()
    backbone.argmax(backbone.forward(tokens, nodes, cache)).tolist()
    return time.perf_counter() - began


def processor() -> str:
    """Returns the processor's model name; empty if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()
