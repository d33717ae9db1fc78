"""The gguf library's reader, held to the length of the file.

The library maps a file and trusts its header: what lies beyond the end is silently shorter, and an array that claims
2^60 numbers is read until memory is full. Here every read lies within the file, an array of numbers is one read, and
tensors follow one another without gaps, as llama.cpp asks.

Methods with the library's names are its steps. Whatever they raise means that the file is damaged.
"""

import math
import reprlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType
from numpy.typing import NDArray

from foretell.errors import ForetellError

MAX_STRINGS = 1 << 21
"""The longest array of strings that is read: each takes some 300 bytes of memory. Large vocabularies have 2^18."""
MAX_NAME = 128
MAX_DIMENSIONS = 4


class Reader(GGUFReader):
    """The header and the mapped tensors of a file.

    Raises:
        ForetellError: a tensor is stored in a type that the library does not know.
        Exception: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(path)

    @cached_property
    def _mapped(self) -> NDArray[np.uint8]:
        """The file as a plain array: views of a memmap take several times the memory and the time."""
        return np.asarray(self.data)

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> NDArray[Any]:
        kind = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
        end = offset + int(count) * kind.itemsize
        if end > self._mapped.size:
            raise ValueError(f"it ends after {self._mapped.size} bytes, but its header promises {end}")
        return self._mapped[offset:end].view(kind)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        raw_kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        kind, at, items = GGUFValueType(raw_kind[0]), orig_offs + 12, list[NDArray[Any]]()
        if number := self.gguf_scalar_to_np.get(kind):
            items.append(self._get(at, number, count[0]))
            at += items[0].nbytes
        elif kind == GGUFValueType.STRING and count[0] <= MAX_STRINGS:
            for _ in range(count[0]):
                length, text = self._get_str(at)
                at += length.nbytes + text.nbytes
                items.append(text)
        else:
            raise ValueError(f"its metadata hold an array of {count[0]} values of the type {kind.name}")
        places = list(range(2, 2 + len(items)))
        return at - orig_offs, [raw_kind, count, *items], places, [GGUFValueType.ARRAY, kind]

    def _build_fields(self, offs: int, count: int) -> int:
        offs = super()._build_fields(offs, count)
        for name in self.fields:
            _check_name(name)
        return offs

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        begin = 0
        for field in fields:
            _check_name(field.name)
            *_, sizes, raw_type, offset = field.parts
            end = begin + self._bytes(field.name, sizes.tolist(), int(raw_type[0]))
            if offset[0] != begin:
                raise ValueError(f"{field.name} begins at byte {offset[0]} of the tensors instead of {begin}")
            if start_offs + end > self._mapped.size:
                raise ValueError(f"it ends after {self._mapped.size} bytes, within {field.name}")
            begin = end + -end % int(self.alignment)
        super()._build_tensors(start_offs, fields)

    def _bytes(self, name: str, sizes: list[int], raw_type: int) -> int:
        """Returns the length of a tensor; the length of its rows comes first in `sizes`."""
        if not 0 < len(sizes) <= MAX_DIMENSIONS or 0 in sizes:
            raise ValueError(f"{name} has the shape {reprlib.repr(sizes[::-1])}")
        try:
            kind = GGMLQuantizationType(raw_type)
        except ValueError:
            raise ForetellError(
                f"{self.path} stores {name} as type {raw_type}, which the gguf library does not know; "
                "update the library, or use a file quantized another way."
            ) from None
        numbers, size = GGML_QUANT_SIZES[kind]
        if sizes[0] % numbers:
            raise ValueError(f"{name} has rows of {sizes[0]} numbers, but blocks of {kind.name} hold {numbers}")
        return math.prod(sizes) // numbers * size


def _check_name(name: str) -> None:
    """Refuses names that no sentence could quote."""
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise ValueError(f"it has a tensor or a key of the name {reprlib.repr(name)}")
