"""Opens a GGUF file, or says why it is not a model that can be loaded.

Large models come in parts (`x-00001-of-00003.gguf`): the first has all the metadata, every one some of the tensors.
"""

import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretell.errors import ForetellError, UsageError
from foretell.files import one_line
from foretell.loading.families import MALFORMED

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_NO_MODELS = {  # what general.type may say, beside "model"
    "adapter": "an adapter; name the model it changes, and the adapter as PEFT saves it: BASE+ADAPTER",
    "mmproj": "the part of a model that reads images or sound; name the file with its language model",
    "imatrix": "statistics for quantizing a model; name the model's own file",
}


@dataclass(frozen=True)
class GGUFFile:
    """The metadata and the tensors of one model."""

    path: Path  # for errors; the first part
    readers: "list[GGUFReader]"

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key.

        Raises:
            ForetellError: it holds text that cannot be read.
        """
        found = self.readers[0].get_field(key)
        try:
            return default if found is None else found.contents()
        except UnicodeDecodeError as error:
            raise ForetellError(
                f"{self.path} has {key} in another encoding than UTF-8 ({one_line(error)}); fetch it again."
            ) from error

    def text(self, key: str) -> str | None:
        """The text of a metadata key; anything else is a ForetellError, here and below."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, value, "a text")
        return value

    def strings(self, key: str) -> list[str]:
        """The strings of a metadata key; none where it is absent."""
        return self._list(key, str, "a list of strings")

    def numbers(self, key: str) -> list[Any]:
        """The numbers of a metadata key; none where it is absent."""
        return self._list(key, (int, float), "a list of numbers")

    def _list(self, key: str, kinds: type | tuple[type, ...], needed: str) -> list[Any]:
        values = self.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, kinds) for value in values):
            raise self.wrong(key, values, needed)
        return values

    def wrong(self, key: str, value: Any, needed: str) -> ForetellError:
        """Makes the error for a value of the wrong kind."""
        return ForetellError(
            f"{self.path} has {key} = {reprlib.repr(value)} where {needed} is needed; "
            "use the original safetensors checkpoint."
        )

    def keys(self, prefix: str) -> list[str]:
        """The metadata keys that begin with `prefix`, without it."""
        return [key.removeprefix(prefix) for key in self.readers[0].fields if key.startswith(prefix)]

    @cached_property
    def tensors(self) -> "list[ReaderTensor]":
        """The tensors of all parts, in the order of the file."""
        return [tensor for reader in self.readers for tensor in reader.tensors]


@contextmanager
def metadata_errors(path: Path) -> Iterator[None]:
    """Turns what metadata of an unexpected kind make the code raise into a sentence that names the file."""
    try:
        yield
    except MALFORMED as error:
        raise ForetellError(
            f"{path} has metadata of the wrong kind ({one_line(error)}); use the original safetensors checkpoint."
        ) from error


def parts(path: Path) -> list[Path]:
    """The files a model is split into by the name of the first; the file itself where it is whole.

    Raises:
        UsageError: this is another part than the first.
    """
    named = _PART.fullmatch(path.name)
    if named is None:
        return [path]
    stem, number, count = named[1], int(named[2]), int(named[3])
    paths = [path.with_name(f"{stem}-{part:05}-of-{count:05}{path.suffix}") for part in range(1, count + 1)]
    if number != 1:
        raise UsageError(f"{path} is part {number} of a model; name the first, {path.with_name(paths[0].name)}.")
    return paths


def open_gguf(path: Path) -> GGUFFile:
    """Opens a file and every further part of it.

    Raises:
        ForetellError: it is damaged, a part is missing, or it holds no language model.
    """
    first = _read(path)
    file = GGUFFile(path, [first])
    _refuse_other_kinds(file)
    paths, count = parts(path), file.get("split.count", 1)
    if count > 1 and count != len(paths):
        raise ForetellError(
            f"{path} is one of {count} parts, but its name does not say so; give them back their names, "
            f"such as {path.stem}-00001-of-{count:05}.gguf."
        )
    for number, part in enumerate(paths[1:], start=1):
        if not part.is_file():
            raise ForetellError(f"{part} is missing, one of the {len(paths)} parts of this model; fetch it too.")
        reader = _read(part)
        field = reader.get_field("split.no")
        if field is None or field.contents() != number:
            raise ForetellError(f"{part} is not part {number + 1} of the model of {path}; fetch it again.")
        file.readers.append(reader)
    expected = file.get("split.tensors.count", len(file.tensors))
    if count > 1 and len(file.tensors) != expected:
        raise ForetellError(
            f"The parts of {path} hold {len(file.tensors)} tensors instead of {expected}, so they do not belong "
            "together; fetch them again."
        )
    if not file.tensors:
        what = "only a vocabulary" if file.get("tokenizer.ggml.tokens") else "only metadata"
        raise ForetellError(f"{path} holds {what}, no weights; name the file with the model.")
    return file


def _read(path: Path) -> "GGUFReader":
    from gguf import GGUFEndian

    from foretell.loading.gguf_reader import Reader

    try:
        reader = Reader(path)
    except ForetellError:
        raise
    except Exception as error:  # a damaged file fails anywhere in the parser, with any exception
        raise ForetellError(
            f"{path} is not a readable GGUF file ({one_line(error)}); delete it and fetch it again."
        ) from error
    if reader.endianess != GGUFEndian.LITTLE:
        raise ForetellError(
            f"{path} was written for big-endian machines; fetch the little-endian file, or convert this one with "
            "gguf-convert-endian."
        )
    return reader


def _refuse_other_kinds(file: GGUFFile) -> None:
    kind = str(file.get("general.type", "model"))
    if kind in _NO_MODELS:
        raise ForetellError(f"{file.path} holds {_NO_MODELS[kind]}.")
    if (number := file.get("split.no", 0)) > 0:
        raise ForetellError(f"{file.path} is part {number + 1} of a model; name the first part.")
