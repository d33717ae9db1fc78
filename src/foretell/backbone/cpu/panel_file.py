"""Packed weights of a model in one file beside it, so that the next load maps what this one packed.

Packing a gigabyte takes seconds and a second copy of it. A mapped file is read by the page, when a step first needs it;
processes share its pages, and a system short of memory may drop them.

    panels-<build>-<dtype>.safetensors     the matrices in the order in which they are packed, "0 q4_k 1536 1536" ...

A file is used by the very code that packed it, and while the weights are unchanged; otherwise it is written anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from foretell.errors import ForetellError
from foretell.files import atomic_write

LINE = 64
"""Bytes of a cache line: panels begin at one."""


class PanelFile:
    """The panels of one model, taken matrix by matrix.

    Attributes:
        mapped: whether they are there; otherwise the caller fills them, and `keep` writes the file.
    """

    def __init__(self, path: Path, source: str):
        self.path, self._source = path, source
        self._found = _read(path, source)
        self._taken: dict[str, Tensor] = {}
        self.mapped = self._found is not None

    def take(self, name: str, count: int) -> Tensor:
        """Returns the bytes of the next matrix; without a file, of any content.

        Args:
            name: tells its format and shape.

        Raises:
            ForetellError: the file holds another matrix there.
        """
        key = f"{len(self._taken)} {name}"
        panels = torch.empty(count, dtype=torch.uint8) if self._found is None else self._found.get(key)
        if panels is None or len(panels) != count:
            raise ForetellError(f"{self.path} does not hold the panels of this model; delete it and load it again.")
        self._taken[key] = panels
        return panels

    def keep(self) -> None:
        """Writes the file, unless it was there or nothing may be written here: then the next load packs again."""
        if self._found is None:
            with suppress(ForetellError):
                _write(self.path, self._taken, self._source)


def _read(path: Path, source: str) -> dict[str, Tensor] | None:
    """Returns the tensors of a whole file made from this source, mapped; else None."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    with suppress(SafetensorError, OSError):
        file = safe_open(path, framework="pt")
        if (file.metadata() or {}).get("source") == source:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return None


def _write(path: Path, panels: Mapping[str, Tensor], source: str) -> None:
    """Writes a safetensors file whose numbers begin at a cache line; the library's own writer copies all of them."""
    header: dict[str, object] = {"__metadata__": {"source": source}}
    end = 0
    for name, tensor in panels.items():
        begin, end = end, end + len(tensor)
        header[name] = {"dtype": "U8", "shape": [len(tensor)], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % LINE)
    with atomic_write(path, needed_bytes=8 + len(text) + end, shared=True) as partial, partial.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in panels.values():
            out.write(tensor.numpy().data)
        out.flush()
        os.fsync(out.fileno())  # or a crash might leave the name, and zeros
