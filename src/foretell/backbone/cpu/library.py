"""The compiled kernels, reached with ctypes: one call runs any range of layers over any set of rows.

The shared library is built with the package (`native/`); where no compiler was at hand it is absent and the eager
modules serve instead. The structures below mirror `native/common.h`, and a library whose structures or argument lists
differ is refused when it is loaded.

Native code sees pointers alone: it can neither keep a tensor alive nor tell how long it is. So pointers are made in
two places only, `Described` and `call`, which hold what the pointers lead to; and every size, type and index that
native code relies on is checked before, with `errors.check`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator, Sequence
from ctypes import Array, Structure, c_double, c_int, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from foretell.errors import ForetellError, UsageError, check
from foretell.loading.tensors import SIZES, parts

LIBRARY = Path(__file__).with_name("_kernels.so")
BUILDS = ("amx", "avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2", "i8mm", "dotprod", "neon", "generic")
"""The best first; a library has those of its architecture, and "generic"."""
FULL = "The kernels found too little memory; use fewer threads, a smaller batch or a shorter prompt."


def _passed(value: Any) -> Any:
    """Returns a value as C takes it: of a tensor, an array or a structure its address, valid while that is alive."""
    if isinstance(value, (int, float)):  # a union would be built anew each time
        return value
    if value is None:
        return 0
    if isinstance(value, Tensor):
        check(value.is_cpu and value.is_contiguous(), "A tensor for the kernels lies on the CPU, contiguous.")
        return value.data_ptr()
    if isinstance(value, np.ndarray):
        check(value.flags.c_contiguous, "An array for the kernels is contiguous.")
        return value.ctypes.data
    return ctypes.addressof(value)


class Described(Structure):
    """A structure of common.h; its pointers are given as what they lead to, which lives as long as it does."""

    def __init__(self, *fields: Any):
        if len(fields) != len(self._fields_):  # ctypes would leave the rest null; made at every step, so no `check`
            raise TypeError(f"{type(self).__name__} has {len(self._fields_)} fields, not {len(fields)}.")
        super().__init__(*map(self._field, fields))
        self.held: tuple[Any, ...] = fields

    _field = staticmethod(_passed)


def table(items: Sequence[Any]) -> Array[Any] | None:
    """Returns an array of structures, or of pointers to tensors, and keeps these alive; None without items."""
    if not items:
        return None
    array: Any
    if isinstance(items[0], Structure):
        array = (type(items[0]) * len(items))(*items)
    else:
        array = (c_uint64 * len(items))(*map(_passed, items))
    array.held = items
    return array


def _numbers(names: str) -> list[tuple[str, type]]:
    return [(name, c_int64) for name in names.split()]


def _pointers(names: str) -> list[tuple[str, type]]:
    return [(name, c_void_p) for name in names.split()]


class Matrix(Described):
    _fields_ = [*_pointers("blocks scale"), *_numbers("format outputs inputs"), *_pointers("rest")]


def _layer_fields() -> Iterator[tuple[str, type]]:
    """Yields the fields of `loading.tensors.LAYER`: a matrix and its bias, or a norm."""
    for part, (tensor, *_) in parts().items():
        if tensor.is_matrix:
            yield part, Matrix
        yield f"{part}_bias" if tensor.is_matrix else part, c_void_p
    yield "window", c_int64


class Layer(Described):
    _fields_ = list(_layer_fields())

    @staticmethod
    def _field(value: Any) -> Any:
        """Matrices lie in the layer itself."""
        return value if isinstance(value, Matrix) else _passed(value)


class Model(Described):
    _fields_ = [*_numbers(" ".join(SIZES)), *_numbers("threads"), ("eps", c_double), *_pointers("layers")]


class Cache(Described):
    _fields_ = [*_pointers("keys values"), *_numbers("layer_stride"), *_pointers("starts"), *_numbers("head_stride")]


class Rows(Described):
    _fields_ = [
        *_numbers("count sequences"),
        *_pointers("sequence node cache_row length offset parents position shadow cosine sine"),
    ]  # fmt: skip

    @classmethod
    def of(cls, count: int, sequences: int, words: NDArray[np.int32], offsets: Sequence[int], *angles: Tensor) -> Rows:
        """Describes eight adjacent tables (`Nodes.words`): passing an address each would cost microseconds."""
        begin = _passed(words)
        rows = cls(count, sequences, *(begin + words.itemsize * offset for offset in offsets[:-1]), *angles)
        rows.held = (*rows.held, words)
        return rows


class Beside(Described):
    _fields_ = [*_numbers("count rank"), *_pointers("rows down up")]


class Span(Described):
    _fields_ = [*_numbers("begin end"), *_pointers("skip taps beside")]


class Heads(Described):
    _fields_ = [
        *_numbers("heads hidden inputs layers linear outputs choices threads"),
        *_pointers("weight bias output"),
    ]  # fmt: skip


class PrefixRequest(Described):
    _fields_ = [
        *_numbers("sequences"), *_pointers("cache_row length count cosine sine fuse"), *_numbers("others"),
        *_pointers("stream following embedding"),
    ]  # fmt: skip


class LevelDrafting(Described):
    _fields_ = [*_numbers("levels hidden streams width"), *_pointers("heads embedding vocabulary scales")]


class LevelRequest(Described):
    _fields_ = [
        *_numbers("rows count beam"), ("min_gain", c_double),
        *_pointers("states roots sizes parents tokens cond_probs"),
    ]  # fmt: skip


class LowerLayers(Described):
    _fields_ = [
        *_pointers("model adapter skip norm"), ("eps", c_double), *_pointers("head"), *_numbers("width"),
        *_pointers("vocabulary scale embedding"), *_numbers("rank"), *_pointers("down up"),
    ]  # fmt: skip


class DraftRequest(Described):
    _fields_ = [
        *_numbers("rows layers count steps room beam"), ("min_gain", c_double),
        *_pointers("thresholds roots budget cache_row length own_length waiting states cosine sine cache own"),
        *_pointers("sizes ran positions parents tokens cond_probs hidden tapped"),
    ]  # fmt: skip


def layout() -> set[str]:
    """Returns structures and argument lists, one line each, as `foretell_layout_text` in native.cpp writes them."""
    kinds = {type_: kind for kind, type_ in KINDS.items()}
    lines = {f"{name} {arguments}" for name, arguments in CALLS.items()}
    for structure in Described.__subclasses__():
        fields = [f"{name}@{getattr(structure, name).offset}{kinds[type_]}" for name, type_, *_ in structure._fields_]
        lines.add(f"{structure.__name__} {ctypes.sizeof(structure)}: {' '.join(fields)}")
    return lines


def _compiled_layout(lib: ctypes.CDLL) -> set[str]:
    """Returns the layout that a library was compiled with; empty for one that does not export it."""
    if not hasattr(lib, "foretell_layout_text"):
        return set()
    lib.foretell_layout_text.restype = ctypes.c_char_p
    return set(lib.foretell_layout_text().decode().splitlines())


KINDS = {"p": c_void_p, "n": c_int64, "i": c_int, "d": c_double, "s": Matrix}
"""Kinds of fields and arguments, by their letters in native.cpp."""
CALLS = {
    "sizes": "ppp", "pack": "ppp", "rows": "pppnp", "layers": "pppppppi", "norm": "pppdnnp", "linear": "ppnpppnppini",
    "heads": "ppppnnppi", "prefix_layer": "pppppnpi", "grow": "pppi", "grow_through_layers": "pppi",
    "attention": "ppppppni",
}  # fmt: skip
"""The arguments of the exported functions that `call` reaches."""


@cache
def digest() -> str:
    """Returns what changes whenever the library does; empty where it was not built."""
    return hashlib.sha256(LIBRARY.read_bytes()).hexdigest() if LIBRARY.exists() else ""


@cache
def loaded() -> ctypes.CDLL | None:
    """Returns the loaded library, or None where it was not built."""
    if not LIBRARY.exists():
        return None
    lib = ctypes.CDLL(str(LIBRARY))
    if _compiled_layout(lib) != layout():
        raise ForetellError(f"{LIBRARY} was compiled from other sources; install foretell again (pip install -e .).")
    lib.foretell_build.restype, lib.foretell_build.argtypes = c_void_p, [ctypes.c_char_p]
    lib.foretell_name.restype, lib.foretell_name.argtypes = ctypes.c_char_p, [c_void_p]
    lib.foretell_format.restype, lib.foretell_format.argtypes = c_int64, [c_void_p, ctypes.c_char_p]
    lib.foretell_message.restype = lib.foretell_last_build.restype = ctypes.c_char_p
    lib.foretell_room.restype = ctypes.c_int64
    for name, kinds in CALLS.items():
        getattr(lib, f"foretell_{name}").argtypes = [KINDS[kind] for kind in kinds]
    return lib


def require() -> ctypes.CDLL:
    """Returns the library; the caller knows that it was built."""
    lib = loaded()
    if lib is None:
        raise ForetellError("The kernels were not compiled; install foretell again where there is a C++ compiler.")
    return lib


def call(name: str, build: Build, *arguments: Any) -> None:
    """Calls `foretell_<name>` of native.cpp; tensors, arrays and structures are passed by their addresses.

    They are held until it returns, so that they may be made in the call itself.

    Raises:
        ForetellError: there was not enough memory, or the call failed otherwise; its outputs are void.
    """
    lib = require()
    status = getattr(lib, f"foretell_{name}")(build.handle, *map(_passed, arguments))
    if status == 1:
        raise ForetellError(FULL)
    if status:
        raise ForetellError(f"The kernels failed in {name}: {lib.foretell_message().decode()}; please report this.")


@dataclass(frozen=True)
class Build:
    """The kernels for one instruction set; panels of floats are laid out alike in all."""

    name: str
    handle: int


def find(name: str = "") -> Build | None:
    """Returns a build by name (see BUILDS), or the best; None if the processor cannot run it or none was compiled."""
    lib = loaded()
    handle = lib.foretell_build(name.encode()) if lib is not None else None
    return Build(lib.foretell_name(handle).decode(), handle) if lib is not None and handle else None


def default() -> Build:
    """Returns the build that `FORETELL_KERNELS` names, or the best; the caller knows that there is one."""
    name = os.environ.get("FORETELL_KERNELS", "")
    build = find(name)
    if build is None:
        raise UsageError(f"FORETELL_KERNELS is {name!r}, which cannot run here; unset it to take the best.")
    return build
