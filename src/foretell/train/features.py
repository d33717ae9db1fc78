"""What the frozen backbone computes at every token of the data: computed once and kept, or computed batch by batch.

Drafters learn from hidden states, not from text, and the backbone does not change: running it once saves most of the
time of every further epoch. A shard holds consecutive conversations of the data, in order:

    features-00007.safetensors   states.<tap> [n, d] bf16, teacher_ids [n, m] int32, teacher_p [n, m] bf16

A shard names the conversations that it is made from, and is computed again for others. States that a shard for other
taps holds are copied from there; then only the layers up to the highest missing tap are run. The teacher's distribution
after each token that precedes one the model wrote is kept as its m most probable tokens.

Legend: n tokens of a shard, m most probable tokens, d hidden width, P positions, V vocabulary, B conversations of a
batch, T tokens of the longest of them.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence, Set
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.backbone import Backbone, Nodes
from foretell.contracts import FINAL_NORM
from foretell.drafting.learning.trainable import TrainingBatch
from foretell.errors import UsageError
from foretell.files import atomic_write, sole_writer, write_errors
from foretell.train.data import Distilled, digest

TEACHER = 12
"""Most probable tokens that are kept per position."""
SHARD, PASS = 1 << 16, 1024
"""Tokens of a shard, and of one pass of the backbone, at most (a longer conversation is alone in its own)."""

_TEACHING = ("teacher_ids", "teacher_p")

BLOCK = 64
"""Logits whose maximum is compared first."""
NOT_KEPT = "keep no features, with `keep_features=False`"


class Batches(ABC):
    """Conversations with what the backbone computed for them, in batches.

    Attributes:
        data: the conversations; indices of batches count them.
        taps: the states that batches hold, besides the teacher's distribution.
        sets: index ranges of conversations that were distilled together.
    """

    backbone: Backbone
    data: Sequence[Distilled]
    taps: tuple[int, ...]
    sets: list[range]

    @abstractmethod
    def prepare(self, progress: Callable[[float], None] = lambda fraction: None) -> float:
        """Computes what is to be kept and is not there yet.

        Args:
            progress: called with the share that is done.

        Returns:
            Seconds that all of it took, in this run or earlier ones.
        """

    @abstractmethod
    def tensors(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """The states and the teacher's distribution of each conversation, by their names in a shard."""

    def batch(self, indices: Sequence[int]) -> TrainingBatch:
        """A batch of these conversations, padded on the right."""
        data, found = [self.data[i] for i in indices], self.tensors(indices)
        longest = max(len(talk.tokens) for talk in data)
        tokens_BT = torch.zeros(len(data), longest, dtype=torch.int64)
        supervised_BT = torch.zeros(len(data), longest, dtype=torch.bool)
        for row, talk in enumerate(data):
            tokens_BT[row, : len(talk.tokens)] = torch.tensor(talk.tokens)
            for start, end in talk.answers:
                supervised_BT[row, start:end] = True
        padded = {name: _pad([tensors[name] for tensors in found], longest) for name in found[0]}
        states = {tap: padded[f"states.{tap}"] for tap in self.taps}
        return TrainingBatch(
            tokens_BT, supervised_BT, states, padded["teacher_ids"].long(), padded["teacher_p"].float()
        )


class FeatureStore(Batches):
    """Features of one distilled folder.

    Args:
        folder: keeps the shards; None computes every batch anew.
    """

    def __init__(self, backbone: Backbone, data: Sequence[Distilled], taps: Sequence[int], folder: Path | None = None):
        if not data:
            raise UsageError("The data holds no conversations; distill some first.")
        self.backbone, self.data, self.taps, self.folder = backbone, data, tuple(taps), folder
        self.sets = [range(len(data))]
        self._shards = list(_stretches([len(talk.tokens) for talk in data], SHARD))
        self._place = {i: (s, i - begin) for s, (begin, end) in enumerate(self._shards) for i in range(begin, end)}
        self._open: dict[int, dict[str, Tensor]] = {}

    def prepare(self, progress: Callable[[float], None] = lambda fraction: None) -> float:
        """Computes the shards that are missing, or of other conversations."""
        if self.folder is None or not self._stale():
            return self._seconds()
        from safetensors.torch import save_file

        with sole_writer(self.folder):
            stale = self._stale()
            with write_errors(self.folder, sum(map(self._bytes, stale)), NOT_KEPT):
                pass  # a full disk is reported before the work, not during it
            for done, number in enumerate(stale):
                began = time.perf_counter()
                shared = self._shared(number)
                data, made = self.data[slice(*self._shards[number])], list[dict[str, Tensor]]()
                for tensors in self._compute(data, set(shared)):
                    progress((done + len(made) / len(data)) / len(stale))
                    made.append(tensors)
                tensors = _joined(made) | shared
                about = self._wanted(number) | {"seconds": str(round(time.perf_counter() - began, 1))}
                with atomic_write(self._path(number), self._bytes(number), NOT_KEPT) as partial:
                    save_file(tensors, partial, about)
                progress((done + 1) / len(stale))
        return self._seconds()

    def _bytes(self, number: int) -> int:
        """Size of a shard's tensors."""
        c = self.backbone.config
        tokens = sum(len(talk.tokens) for talk in self.data[slice(*self._shards[number])])
        return tokens * (len(self.taps) * c.hidden * 2 + min(TEACHER, c.vocab) * (4 + 2))

    def _wanted(self, number: int) -> dict[str, str]:
        """Metadata of a shard that is up to date."""
        return {"data": digest(self.data[slice(*self._shards[number])]), "dtype": str(self.backbone.dtype)}

    def _stale(self) -> list[int]:
        """Shards that are missing, or of other data."""
        return [
            number
            for number in range(len(self._shards))
            if not (self._wanted(number).items() <= _about(self._path(number)).items())
        ]

    def _shared(self, number: int) -> dict[str, Tensor]:
        """Tensors of a shard that a folder for other taps holds."""
        from safetensors import safe_open

        assert self.folder is not None
        shared: dict[str, Tensor] = {}
        for folder in sorted(self.folder.parent.glob(f"features-{self.backbone.fingerprint}-*")):
            path = folder / self._path(number).name
            if self._wanted(number).items() <= _about(path).items():
                with safe_open(path, "pt") as file:
                    names = set(file.keys()) & set(self._names())
                    shared |= {name: file.get_tensor(name) for name in names.difference(shared)}
        return shared

    def _names(self) -> list[str]:
        """Names of a shard's tensors."""
        return [*(f"states.{tap}" for tap in self.taps), *_TEACHING]

    def _seconds(self) -> float:
        kept = range(len(self._shards)) if self.folder else ()
        return sum(float(_about(self._path(number)).get("seconds", 0)) for number in kept)

    def tensors(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        if self.folder is None:
            return list(self._compute([self.data[i] for i in indices]))
        return [self._read(i) for i in indices]

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"features-{number:05d}.safetensors"

    def _read(self, index: int) -> dict[str, Tensor]:
        """A conversation's slice of its shard. Shards are mapped into memory, not read."""
        from safetensors.torch import load_file

        shard, place = self._place[index]
        if shard not in self._open:
            self._open[shard] = load_file(self._path(shard))
        begin = self._shards[shard][0]
        start = sum(len(talk.tokens) for talk in self.data[begin : begin + place])
        end = start + len(self.data[index].tokens)
        return {name: tensor[start:end] for name, tensor in self._open[shard].items()}

    def _compute(self, data: Sequence[Distilled], known: Set[str] = frozenset()) -> Iterator[dict[str, Tensor]]:
        """Yields the tensors of each conversation, without those that are `known`."""
        backbone = self.backbone
        taps_left = [tap for tap in self.taps if f"states.{tap}" not in known]
        layers = [tap for tap in taps_left if tap != FINAL_NORM]
        all_layers = FINAL_NORM in taps_left or not known >= set(_TEACHING)
        if not taps_left and not all_layers:
            yield from ({} for _ in data)
            return
        for begin, end in _stretches([len(talk.tokens) for talk in data], PASS):
            part = data[begin:end]
            counts = [len(talk.tokens) for talk in part]
            cache = backbone.new_cache(len(part), max(counts))
            nodes = Nodes.chains(list(range(len(part))), [0] * len(part), counts)
            tokens = torch.tensor([token for talk in part for token in talk.tokens])
            highest = backbone.config.layers if all_layers else max(layers, default=0)
            hidden, taps = backbone.run_layers(backbone.embed(tokens), nodes, cache, 0, highest, taps=layers)
            made: dict[str, Tensor] = {}
            if all_layers:
                taps[FINAL_NORM] = backbone.norm(hidden)
                made = _teacher(backbone, taps[FINAL_NORM], _before_written(part))
            made |= {f"states.{tap}": taps[tap].bfloat16().cpu() for tap in taps_left}
            for i, count in enumerate(counts):
                start = sum(counts[:i])
                yield {name: tensor[start : start + count] for name, tensor in made.items()}


class JoinedFeatures(Batches):
    """Features of several distilled folders, one after the other."""

    def __init__(self, parts: Sequence[FeatureStore]):
        self.backbone, self.taps = parts[0].backbone, parts[0].taps
        self.data = [talk for part in parts for talk in part.data]
        self._parts, ends = parts, list(accumulate(len(part.data) for part in parts))
        self.sets = [range(end - len(part.data), end) for part, end in zip(parts, ends, strict=True)]

    def prepare(self, progress: Callable[[float], None] = lambda fraction: None) -> float:
        def share_of(index: int) -> Callable[[float], None]:
            return lambda done: progress((index + done) / len(self._parts))

        return sum(part.prepare(share_of(index)) for index, part in enumerate(self._parts))

    def tensors(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        found: dict[int, dict[str, Tensor]] = {}
        for part, members in zip(self._parts, self.sets, strict=True):
            if own := [i for i in indices if i in members]:
                found |= zip(own, part.tensors([i - members.start for i in own]), strict=True)
        return [found[i] for i in indices]


def _before_written(data: Sequence[Distilled]) -> list[int]:
    """Positions, among the tokens of all of `data`, whose next token the model wrote."""
    positions: list[int] = []
    begin = 0
    for talk in data:
        for start, end in talk.answers:
            positions += range(begin + max(start, 1) - 1, begin + end - 1)
        begin += len(talk.tokens)
    return positions


def _teacher(backbone: Backbone, states_Pd: Tensor, positions: Sequence[int]) -> dict[str, Tensor]:
    """The most probable next tokens [P, m] int32 and their probabilities bf16; zeros except at `positions`."""
    m = min(TEACHER, backbone.config.vocab)
    ids_Pm, p_Pm = (
        torch.zeros(len(states_Pd), m, dtype=torch.int32),
        torch.zeros(len(states_Pd), m, dtype=torch.bfloat16),
    )
    for part in torch.tensor(positions, dtype=torch.int64).split(256):
        logits_PV = backbone.logits(states_Pd[part.to(states_Pd.device)])
        values, ids = most_probable(logits_PV, m)
        best = values[:, :1]
        total = logits_PV.sub_(best).exp_().sum(-1, keepdim=True)  # in place: logits are large, and not needed any more
        ids_Pm[part], p_Pm[part] = ids.int().cpu(), ((values - best).exp() / total).to(p_Pm.dtype).cpu()
    return {"teacher_ids": ids_Pm, "teacher_p": p_Pm}


def most_probable(logits_PV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same as `topk`, several times faster: the largest values lie in the `count` blocks of the largest maxima."""
    missing = -logits_PV.shape[1] % BLOCK
    padded_PV = F.pad(logits_PV, (0, missing), value=-torch.inf) if missing else logits_PV  # padding copies all logits
    blocks_PCK = padded_PV.unflatten(1, (-1, BLOCK))
    if blocks_PCK.shape[1] <= count:
        return logits_PV.topk(count)
    chosen_Pm = blocks_PCK.amax(-1).topk(count).indices
    candidates_PmK = blocks_PCK.gather(1, chosen_Pm[..., None].expand(-1, -1, BLOCK))
    values_Pm, index_Pm = candidates_PmK.flatten(1).topk(count)
    return values_Pm, chosen_Pm.gather(1, index_Pm // BLOCK) * BLOCK + index_Pm % BLOCK


def _about(path: Path) -> dict[str, str]:
    """Metadata of a shard; empty if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _stretches(lengths: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Consecutive [begin, end) whose lengths add up to at most `size`; a longer one stands alone."""
    begin = total = 0
    for i, length in enumerate(lengths):
        if total and total + length > size:
            yield begin, i
            begin, total = i, 0
        total += length
    yield begin, len(lengths)


def _joined(found: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.cat([tensors[name] for tensors in found]) for name in found[0]}


def _pad(tensors: list[Tensor], longest: int) -> Tensor:
    out = tensors[0].new_zeros(len(tensors), longest, *tensors[0].shape[1:])
    for row, tensor in enumerate(tensors):
        out[row, : len(tensor)] = tensor
    return out
