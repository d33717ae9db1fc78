"""What the frozen backbone computes at every token of the data: batch by batch, or once for all and kept on disk.

Drafters learn from hidden states, not from text. One pass of the backbone feeds every method that is trained at once.
Keeping what it computes pays where the data is read many times and the backbone is large; it takes gigabytes. A shard
holds consecutive conversations of the data, in order:

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
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretell.backbone import Backbone, Nodes
from foretell.contracts import FINAL_NORM
from foretell.drafting.learning.trainable import TrainingBatch
from foretell.errors import UsageError
from foretell.files import atomic_write, sole_writer, write_errors
from foretell.train.data import Distilled, digest
from foretell.train.forward import Forward, most_probable

TEACHER = 12
"""Most probable tokens that are kept per position."""
SHARD = 1 << 16
"""Tokens of a shard, at most (a longer conversation is alone in its own)."""
PASS = {"cpu": 1 << 10, "cuda": 1 << 14}
"""Tokens of one pass of the backbone, likewise, where conversations are not taken batch by batch; padding counts."""

_TEACHING = ("teacher_ids", "teacher_p")
NOT_KEPT = "leave out `keep_features=True`"
NATIVE = ("amx", "avx512bf16")
"""Compiled kernels that multiply bfloat16 by units of their own."""


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

    @cached_property
    def digest(self) -> str:
        """A digest of the conversations."""
        return digest(self.data)

    @abstractmethod
    def prepare(self, progress: Callable[[float], None] = lambda fraction: None) -> float:
        """Computes what is to be kept and is not there yet.

        Args:
            progress: called with the share that is done.

        Returns:
            Seconds that all of it took, in this run or earlier ones.
        """

    @abstractmethod
    def multiply_in(self, number_type: str) -> None:
        """Lets the plain pass multiply in this type (a name in `number_types`); by default, the faster one here."""

    @abstractmethod
    def tensors(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """The states and the teacher's distribution of each conversation, by their names in a shard."""

    def batch(self, indices: Sequence[int]) -> TrainingBatch:
        """A batch of these conversations, padded on the right."""
        data, found = [self.data[i] for i in indices], self.tensors(indices)
        tokens_BT, supervised_BT = side_by_side(data)
        padded = {name: _pad([tensors[name] for tensors in found], tokens_BT.shape[1]) for name in found[0]}
        states = {tap: padded[f"states.{tap}"] for tap in self.taps}
        ids_BTm, p_BTm = (padded.get(name, tokens_BT[..., None][..., :0]) for name in _TEACHING)
        return TrainingBatch(tokens_BT, supervised_BT, states, ids_BTm.long(), p_BTm.float())


class ComputedFeatures(Batches):
    """Features that are computed when they are asked for.

    Compiled kernels with units for bfloat16 run decoding's own passes faster than PyTorch runs its layers. Elsewhere a
    `Forward` computes, whose states differ from decoding's by what the number type rounds.

    Args:
        data, sets: see `Batches`; by default all were distilled together.
        teacher: leaves its distribution empty if false, and the layers above the highest tap out.
    """

    def __init__(
        self, backbone: Backbone, data: Sequence[Distilled], taps: Sequence[int], sets: Sequence[range] = (),
        teacher: bool = True,
    ):  # fmt: skip
        if not data:
            raise UsageError("The data holds no conversations; distill some first.")
        self.backbone, self.data, self.taps, self.teacher = backbone, data, tuple(taps), teacher
        self.sets = list(sets) or [range(len(data))]
        self._number_type = ""
        self._forward: Forward | None = None

    def multiply_in(self, number_type: str) -> None:
        if number_type != self._number_type:
            self._number_type, self._forward = number_type, None

    def prepare(self, progress: Callable[[float], None] = lambda fraction: None) -> float:
        return 0.0

    @property
    def by_decoding(self) -> bool:
        """True if decoding's own passes compute them, bit for bit."""
        return self.backbone.kernels in NATIVE and self.backbone.dtype == torch.bfloat16

    @property
    def forward(self) -> Forward:
        """The pass in plain PyTorch, made when it is needed first."""
        self._forward = self._forward or Forward(self.backbone, self._number_type)
        return self._forward

    def batch(self, indices: Sequence[int]) -> TrainingBatch:
        if self.by_decoding:
            return super().batch(indices)
        return self._padded([self.data[i] for i in indices], self.taps, self.teacher)

    def tensors(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        return list(self.each([self.data[i] for i in indices], self.taps, self.teacher))

    def each(self, data: Sequence[Distilled], taps: Collection[int], teacher: bool) -> Iterator[dict[str, Tensor]]:
        """Yields what is asked for of each conversation, in order, by its names in a shard."""
        lengths, size = [len(talk.tokens) for talk in data], PASS[self.backbone.device.type]
        for begin, end in _stretches(lengths, size, padded=not self.by_decoding):
            part = data[begin:end]
            yield from self._decoded(part, taps, teacher) if self.by_decoding else self._unpadded(part, taps, teacher)

    def _padded(self, data: Sequence[Distilled], taps: Collection[int], teacher: bool) -> TrainingBatch:
        """A batch in plain PyTorch, on the backbone's device; without the teacher's distribution if not asked for."""
        tokens_BT, supervised_BT = (each_BT.to(self.backbone.device) for each_BT in side_by_side(data))
        lengths_B = torch.tensor([len(talk.tokens) for talk in data], device=tokens_BT.device)
        padding_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) >= lengths_B[:, None]
        wanted = {*taps, FINAL_NORM} if teacher else set(taps)
        states = self.forward.states(tokens_BT, wanted)
        m = min(TEACHER, self.backbone.config.vocab) if teacher else 0
        ids_BTm = tokens_BT.new_zeros(*tokens_BT.shape, m)
        p_BTm = torch.zeros(*tokens_BT.shape, m, device=tokens_BT.device)
        if teacher:
            before_BT = torch.zeros_like(supervised_BT)
            before_BT[:, :-1] = supervised_BT[:, 1:]
            ids_BTm[before_BT], p_BTm[before_BT] = self.forward.most_probable_next(states[FINAL_NORM][before_BT], m)
        states = {tap: states[tap].masked_fill_(padding_BT[..., None], 0) for tap in taps}
        return TrainingBatch(tokens_BT, supervised_BT, states, ids_BTm, p_BTm)

    def _unpadded(self, data: Sequence[Distilled], taps: Collection[int], teacher: bool) -> Iterator[dict[str, Tensor]]:
        made = self._padded(data, taps, teacher)
        stored = {f"states.{tap}": states.bfloat16() for tap, states in made.states.items()}
        if teacher:
            stored |= zip(_TEACHING, (made.teacher_ids_BTm.int(), made.teacher_p_BTm.bfloat16()), strict=True)
        stored = {name: tensor.cpu() for name, tensor in stored.items()}
        for row, talk in enumerate(data):
            yield {name: tensor[row, : len(talk.tokens)] for name, tensor in stored.items()}

    def _decoded(self, data: Sequence[Distilled], taps: Collection[int], teacher: bool) -> Iterator[dict[str, Tensor]]:
        """Yields the same by decoding's own passes."""
        states = decoded_states(self.backbone, data, {*taps, FINAL_NORM} if teacher else taps)
        made = _teacher(self.backbone, states[FINAL_NORM], _before_written(data)) if teacher else {}
        made |= {f"states.{tap}": states[tap].bfloat16().cpu() for tap in taps}
        counts = [len(talk.tokens) for talk in data]
        for start, count in zip(accumulate(counts, initial=0), counts, strict=False):
            yield {name: tensor[start : start + count] for name, tensor in made.items()}


class FeatureStore(Batches):
    """Features of one distilled folder, kept beside it.

    Args:
        folder: keeps the shards.
    """

    def __init__(self, backbone: Backbone, data: Sequence[Distilled], taps: Sequence[int], folder: Path):
        self.backbone, self.data, self.taps, self.folder = backbone, data, tuple(taps), folder
        self.sets = [range(len(data))]
        self._computed = ComputedFeatures(backbone, data, taps)
        self._shards = list(_stretches([len(talk.tokens) for talk in data], SHARD))
        self._place = {i: (s, i - begin) for s, (begin, end) in enumerate(self._shards) for i in range(begin, end)}
        self._open: dict[int, dict[str, Tensor]] = {}

    def multiply_in(self, number_type: str) -> None:
        self._computed.multiply_in(number_type)

    def prepare(self, progress: Callable[[float], None] = lambda fraction: None) -> float:
        """Computes the shards that are missing, or of other conversations."""
        if not self._stale():
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
                taps = [tap for tap in self.taps if f"states.{tap}" not in shared]
                for tensors in self._computed.each(data, taps, not shared.keys() >= set(_TEACHING)):
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
        numbers = str(self.backbone.dtype) + self.backbone.quantized
        return {"data": digest(self.data[slice(*self._shards[number])]), "dtype": numbers}

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
        return sum(float(_about(self._path(number)).get("seconds", 0)) for number in range(len(self._shards)))

    def tensors(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        return [self._read(i) for i in indices]

    def _path(self, number: int) -> Path:
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


class JoinedFeatures(Batches):
    """Features of several distilled folders, one after the other."""

    def __init__(self, parts: Sequence[FeatureStore]):
        self.backbone, self.taps = parts[0].backbone, parts[0].taps
        self.data = [talk for part in parts for talk in part.data]
        self._parts, ends = parts, list(accumulate(len(part.data) for part in parts))
        self.sets = [range(end - len(part.data), end) for part, end in zip(parts, ends, strict=True)]

    def multiply_in(self, number_type: str) -> None:
        for part in self._parts:
            part.multiply_in(number_type)

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


def decoded_states(backbone: Backbone, data: Sequence[Distilled], taps: Collection[int]) -> dict[int, Tensor]:
    """The states [n, d] float32 of conversations, one after the other, by one of decoding's own passes."""
    counts, layers = [len(talk.tokens) for talk in data], [tap for tap in taps if tap != FINAL_NORM]
    cache = backbone.new_cache(len(data), max(counts))
    nodes = Nodes.chains(list(range(len(data))), [0] * len(data), counts)
    tokens = torch.tensor([token for talk in data for token in talk.tokens])
    highest = backbone.config.layers if FINAL_NORM in taps else max(layers, default=0)
    hidden, states = backbone.run_layers(backbone.embed(tokens), nodes, cache, 0, highest, taps=layers)
    return states | ({FINAL_NORM: backbone.norm(hidden)} if FINAL_NORM in taps else {})


def side_by_side(data: Sequence[Distilled]) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] int64, padded on the right with 0, and which of them the model wrote [B, T]."""
    longest = max(len(talk.tokens) for talk in data)
    tokens_BT = torch.zeros(len(data), longest, dtype=torch.int64)
    supervised_BT = torch.zeros(len(data), longest, dtype=torch.bool)
    for row, talk in enumerate(data):
        tokens_BT[row, : len(talk.tokens)] = torch.as_tensor(talk.tokens)
        for start, end in talk.answers:
            supervised_BT[row, start:end] = True
    return tokens_BT, supervised_BT


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
    ids_Pm, p_Pm = (torch.zeros(len(states_Pd), m, dtype=dtype) for dtype in (torch.int32, torch.bfloat16))
    for part in torch.tensor(positions, dtype=torch.int64).split(256):
        logits_PV = backbone.logits(states_Pd[part.to(states_Pd.device)])
        values, ids = most_probable(logits_PV, m)
        best = values[:, :1]
        total = logits_PV.sub_(best).exp_().sum(-1, keepdim=True)  # in place: logits are large, and not needed any more
        ids_Pm[part], p_Pm[part] = ids.int().cpu(), ((values - best).exp() / total).to(p_Pm.dtype).cpu()
    return {"teacher_ids": ids_Pm, "teacher_p": p_Pm}


def _about(path: Path) -> dict[str, str]:
    """Metadata of a shard; empty if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _stretches(lengths: Sequence[int], size: int, padded: bool = False) -> Iterator[tuple[int, int]]:
    """Consecutive [begin, end) whose lengths add up to at most `size`; a longer one stands alone.

    Args:
        padded: counts each as long as the longest of its stretch.
    """
    begin = total = longest = 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if total and ((i - begin + 1) * longest if padded else total + length) > size:
            yield begin, i
            begin, total, longest = i, 0, length
        total += length
    yield begin, len(lengths)


def _joined(found: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.cat([tensors[name] for tensors in found]) for name in found[0]}


def _pad(tensors: list[Tensor], longest: int) -> Tensor:
    out = tensors[0].new_zeros(len(tensors), longest, *tensors[0].shape[1:])
    for row, tensor in enumerate(tensors):
        out[row, : len(tensor)] = tensor
    return out
