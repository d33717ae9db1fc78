"""GGUF files of a few kilobytes, and ways to damage them.

Files hold random weights, of several families, tokenizers and types. Most damage is done to the header, with its layout
in mind: integers become extreme or each other's; entries change their kind, vanish or come twice; a tensor has another
shape or type than the model needs, in a file that is otherwise sound.
"""

from __future__ import annotations

import random
import struct
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from tiny_gguf import sentencepiece, write_gguf
from tiny_models import tiny_model

KINDS = gguf.GGUFValueType
TYPES = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class Tensor:
    """What a header says of a tensor, and its data; its row comes first in `sizes`."""

    name: bytes
    sizes: list[int]
    kind: int
    data: bytes
    offset: int

    def info(self) -> bytes:
        shape = struct.pack(f"<I{len(self.sizes)}Q", len(self.sizes), *self.sizes)
        return _string(self.name) + shape + struct.pack("<IQ", self.kind, self.offset)


@dataclass(frozen=True)
class Sample:
    """An undamaged file, and where things lie in it.

    Attributes:
        integers: (offset, bytes) of the counts, lengths, kinds, sizes and offsets in its header.
        entries: (begin, end) of each entry of its metadata; infos: of each tensor's description.
        begin: of the tensors' data.
    """

    name: str
    data: bytes
    integers: list[tuple[int, int]]
    entries: list[tuple[int, int]]
    infos: list[tuple[int, int]]
    tensors: list[Tensor]
    begin: int

    @classmethod
    def of(cls, path: Path) -> Sample:
        reader, data = gguf.GGUFReader(path), path.read_bytes()
        integers, entries, infos = [(4, 4), (8, 8), (16, 8)], [], []
        fields = [*reader.fields.values()][3:]  # without those that the library makes up of the first bytes
        for field in [*fields, *(tensor.field for tensor in reader.tensors)]:
            at = field.offset
            for part in field.parts:
                size = part.dtype.itemsize
                if part.dtype.kind in "ui" and size > 1:
                    integers += [(at + size * i, size) for i in range(len(part))]
                at += part.nbytes
            (entries if field.types else infos).append((field.offset, at))
        tensors = [
            Tensor(
                each.name.encode(), each.shape.tolist(), int(each.tensor_type),
                data[each.data_offset : each.data_offset + each.n_bytes], each.data_offset - reader.data_offset,
            )
            for each in reader.tensors
        ]  # fmt: skip
        return cls(path.stem, data, integers, entries, infos, tensors, reader.data_offset)


def samples(folder: Path) -> list[Sample]:
    """Writes undamaged files."""
    small: dict[str, Any] = {"num_hidden_layers": 2}
    two_heads = small | {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    wide = two_heads | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    types = (TYPES.Q4_K, TYPES.Q6_K, TYPES.IQ4_XS, TYPES.MXFP4, TYPES.Q5_K, TYPES.IQ2_XXS, TYPES.Q3_K)
    mixed = {f"blk.0.{part}.weight": kind for part, kind in zip(parts, types, strict=True)}
    files: dict[str, tuple[Any, dict[str, Any]]] = {
        "floats": (
            tiny_model("llama", **small),
            {"extra_tensors": {"rope_freqs.weight": np.array([1, 1, 2, 4], np.float32)}},
        ),
        "blocks": (
            tiny_model("llama", vocab_size=320, **two_heads),
            {"kind": TYPES.Q4_0, "tokenizer": sentencepiece(("▁t", "he", "▁the"), marks=("[I]",))},
        ),
        "halves": (
            tiny_model("qwen2", tie_word_embeddings=True, **small),
            {"kind": TYPES.F16, "extra": {"split.count": 1, "split.no": 0}},
        ),
        "heads": (
            tiny_model("qwen3", head_dim=16, **two_heads),
            {"kind": TYPES.Q8_0, "extra": {"qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 2.0}},
        ),
        "types": (tiny_model("llama", attention_bias=True, **wide), {"blocks": mixed}),
    }
    return [Sample.of(write_gguf(folder / f"{name}.gguf", model, **how)) for name, (model, how) in files.items()]


def damaged(sample: Sample, rng: random.Random) -> bytes:
    """Returns the file with one piece of damage, or a few."""
    if rng.random() < 0.5:  # where entries move, the places of the others are not known any more
        return rng.choice((other_value, other_value, without_entry, twice, other_info, other_tensors))(sample, rng)
    data = sample.data
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice((flipped, overwritten, extreme, extreme, extreme, copied, cut, spliced))(sample, data, rng)
    return data


# -- bytes -------------------------------------------------------------------------------------------------------------


def flipped(sample: Sample, data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 8) if out else 0):
        out[_place(sample, out, rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwritten(sample: Sample, data: bytes, rng: random.Random) -> bytes:
    at, size = _place(sample, data, rng), rng.randint(1, 16)
    return data[:at] + rng.randbytes(size) + data[at + size :]


def extreme(sample: Sample, data: bytes, rng: random.Random) -> bytes:
    """Overwrites an integer with one from the edges of what its bytes can hold."""
    at, size = rng.choice(sample.integers)
    return _put(data, at, _extreme(rng, 8 * size, data[at : at + size]).to_bytes(size, "little"))


def copied(sample: Sample, data: bytes, rng: random.Random) -> bytes:
    """Overwrites an integer with another one of the file."""
    (at, size), (source, width) = rng.choice(sample.integers), rng.choice(sample.integers)
    return _put(data, at, data[source : source + width].ljust(8, b"\0")[:size])


def cut(sample: Sample, data: bytes, rng: random.Random) -> bytes:
    return data[: _place(sample, data, rng)]


def spliced(sample: Sample, data: bytes, rng: random.Random) -> bytes:
    """Takes bytes out, or puts some in."""
    at, size = _place(sample, data, rng), rng.choice((1, 4, 8, 32, rng.randint(1, 200)))
    inserted = rng.choice((b"", rng.randbytes(size), bytes(size), data[at : at + size]))
    return data[:at] + inserted + data[at + (0 if inserted else size) :]


def _place(sample: Sample, data: bytes | bytearray, rng: random.Random) -> int:
    """Returns a place in what is left of the file, in the header more often than not."""
    end = sample.begin if rng.random() < 0.8 else len(data)
    return rng.randrange(max(1, min(end, len(data))))


def _put(data: bytes, at: int, written: bytes) -> bytes:
    return data[:at] + written + data[at + len(written) :] if at + len(written) <= len(data) else data


def _extreme(rng: random.Random, bits: int, now: bytes = b"") -> int:
    edges = [1 << power for power in (7, 8, 15, 16, 20, 31, 32, 40, 53, 60, 63, 64)]
    near = int.from_bytes(now, "little")
    choices = [*range(17), *edges, *(edge - 1 for edge in edges), near + 1, near - 1, 2 * near, near // 2]
    return rng.choice(choices) % (1 << bits)


# -- entries -----------------------------------------------------------------------------------------------------------


def other_value(sample: Sample, rng: random.Random) -> bytes:
    """Gives an entry a value of any kind, or another entry's."""
    (begin, end), (other, after) = rng.choice(sample.entries), rng.choice(sample.entries)
    value = rng.choice((encoded(_value(rng)), sample.data[_behind_name(sample, other) : after]))
    return _with_header(sample, begin, end, sample.data[begin : _behind_name(sample, begin)] + value)


def without_entry(sample: Sample, rng: random.Random) -> bytes:
    return _counted(_with_header(sample, *rng.choice(sample.entries), b""), 16, -1)


def twice(sample: Sample, rng: random.Random) -> bytes:
    """Repeats an entry or a tensor's description."""
    entry = rng.random() < 0.5
    begin, end = rng.choice(sample.entries if entry else sample.infos)
    return _counted(_with_header(sample, end, end, sample.data[begin:end]), 16 if entry else 8, 1)


def _behind_name(sample: Sample, begin: int) -> int:
    return begin + 8 + int.from_bytes(sample.data[begin : begin + 8], "little")


def _with_header(sample: Sample, begin: int, end: int, written: bytes, data: bytes | None = None) -> bytes:
    """Returns the file with other bytes in its header, and its data behind it, aligned."""
    header = sample.data[:begin] + written + sample.data[end : sample.infos[-1][1]]
    return _aligned(header) + (sample.data[sample.begin :] if data is None else data)


def _aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % gguf.GGUF_DEFAULT_ALIGNMENT)


def _counted(data: bytes, at: int, more: int) -> bytes:
    return _put(data, at, (int.from_bytes(data[at : at + 8], "little") + more).to_bytes(8, "little"))


def _value(rng: random.Random) -> Any:
    """Returns a value of any kind, or a list."""
    numbers = (0, 1, -1, 5, 1 << 31, (1 << 63) - 1, 0.0, 0.5, -1.0, 1e30, float("nan"), float("inf"), True, False)
    texts = (
        "",
        "x",
        "default",
        "llama",
        "gpt2",
        "yarn",
        "linear",
        "a b",
        "{{ messages }}",
        "{% for",
        "é" * 99,
        b"\xff",
    )
    one, length = rng.choice((rng.choice(numbers), rng.choice(texts))), rng.choice((0, 1, 2, 3, 64, 320))
    lists = [one] * length, [f"{i}" for i in range(length)], [rng.choice((0.0, 0.5, -1.0)) for _ in range(length)]
    return rng.choice((one, one, one, *lists, [[1] * length] * 2))


def encoded(value: Any) -> bytes:
    """Returns a value of the metadata as a file has it: its kind, then its bytes."""
    match value:
        case list():
            items = [encoded(item) for item in value]
            kind, of_items = struct.pack("<I", KINDS.ARRAY), (items or [encoded(0)])[0][:4]
            return b"".join((kind, of_items, struct.pack("<Q", len(items)), *(item[4:] for item in items)))
        case bool():
            return struct.pack("<I?", KINDS.BOOL, value)
        case int():
            return struct.pack("<Iq", KINDS.INT64, value)
        case float():
            return struct.pack("<Id", KINDS.FLOAT64, value)
    return struct.pack("<I", KINDS.STRING) + _string(value)


def _string(text: str | bytes) -> bytes:
    content = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(content)) + content


# -- tensors -----------------------------------------------------------------------------------------------------------

NAMES = ("blk.0.ffn_gate_exps.weight", "blk.0.attn_q", "blk.9.attn_q.weight", "", "blk.", "output.weight",
         "rope_freqs.weight", "blk.00.attn_q.weight", "blk.0.attn_q.bias", "a\nb", "ü" * 300)  # fmt: skip


def other_info(sample: Sample, rng: random.Random) -> bytes:
    """Gives a tensor another name, shape or type than its data have, or leaves it out."""
    index = rng.randrange(len(sample.tensors))
    (begin, end), tensor = sample.infos[index], sample.tensors[index]
    sizes = tensor.sizes
    wrong = [_extreme(rng, 64) for _ in range(rng.choice((0, 1, 2, 3, 4, 5, 40)))]
    lies: list[dict[str, Any]] = [
        {"name": rng.choice(NAMES).encode()},
        {"kind": rng.choice([*TYPES])},
        {"sizes": rng.choice((wrong, sizes[::-1], [*sizes, 1], [*sizes, 1, 1, 1], [1 << 32, 1 << 32, *sizes]))},
    ]
    if rng.random() < 0.1:
        return _counted(_with_header(sample, begin, end, b""), 8, -1)
    return _with_header(sample, begin, end, replace(tensor, **rng.choice(lies)).info())


def other_tensors(sample: Sample, rng: random.Random) -> bytes:
    """Gives tensors other shapes and types, and as much data as these take; or another's name, or another order."""
    tensors = list(sample.tensors)
    for _ in range(rng.randint(1, 2)):
        index = rng.randrange(len(tensors))
        tensor, other = tensors[index], rng.choice(tensors)
        kind = rng.choice((tensor.kind, other.kind, *(kind for kind in TYPES if rng.random() < 0.2)))
        sizes = rng.choice((tensor.sizes, tensor.sizes, other.sizes, tensor.sizes[::-1], [*tensor.sizes, 2]))
        numbers, size = gguf.GGML_QUANT_SIZES[TYPES(kind)]
        if sizes[0] % numbers == 0:
            length = int(np.prod(sizes)) // numbers * size
            data = (tensor.data * (length // len(tensor.data) + 1))[:length]
            tensors[index] = replace(tensor, sizes=sizes, kind=kind, data=data)
    if rng.random() < 0.2:
        names = [tensor.name for tensor in tensors]
        rng.shuffle(names)
        tensors = [replace(tensor, name=name) for tensor, name in zip(tensors, names, strict=True)]
    infos, data = b"", b""
    for tensor in tensors:
        infos += replace(tensor, offset=len(data)).info()
        data += _aligned(tensor.data)
    return _with_header(sample, sample.infos[0][0], sample.infos[-1][1], infos, data)
