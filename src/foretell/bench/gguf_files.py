"""GGUF files for the peers that read them: a model's original file, and the same weights in other types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foretell.errors import ForetellError
from foretell.files import atomic_write
from foretell.loading import ModelFolder
from foretell.loading.cache_dir import cache_folder
from foretell.loading.catalog import CATALOG, fetch, here, kept_folder
from foretell.loading.gguf_file import open_gguf

OTHER_TYPES = ("q8_0", "bf16")


def gguf_file(folder: ModelFolder, kind: str, cache_dir: Path | None = None) -> Path:
    """Returns the model as GGUF: the original file for any `kind` not in `OTHER_TYPES`, else one converted once.

    Raises:
        ForetellError: the model did not come as GGUF.
    """
    cache = cache_folder(cache_dir)
    source = _source(folder, cache)
    if kind not in OTHER_TYPES:
        return source
    target = kept_folder(cache) / f"{source.stem}.{kind}.gguf"
    if not target.is_file():
        with atomic_write(target, 2 * source.stat().st_size) as partial:
            _convert(source, partial, kind)
    return target


def _source(folder: ModelFolder, cache: Path) -> Path:
    if folder.source == "gguf":
        return Path(folder.name).expanduser()
    entry = CATALOG.get(folder.name.lower())
    if entry is None:
        raise ForetellError(f"{folder.name} did not come as GGUF; give its .gguf file as --model to compare on it.")
    if (path := here(entry, cache)) is None:
        kept_folder(cache).mkdir(parents=True, exist_ok=True)
        path = fetch(entry, cache, kept_folder(cache), lambda stage, fraction: None)
    return path


def _convert(source: Path, target: Path, kind: str) -> None:
    """Unpacks every quantized tensor and packs it again as `kind`; copies all others and the metadata."""
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

    types: dict[str, tuple[Any, Any]] = {
        "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
        "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    }
    wanted, file_type = types[kind]
    file = open_gguf(source)
    writer = GGUFWriter(target, str(file.get("general.architecture")))
    for name, field in file.readers[0].fields.items():
        if name.startswith(("GGUF.", "split.")) or name in ("general.architecture", "general.file_type"):
            continue
        sub_type = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_file_type(file_type)
    for tensor in file.tensors:
        values = tensor.data
        if tensor.tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            writer.add_tensor(tensor.name, values, raw_dtype=tensor.tensor_type)
        else:
            unpacked = quants.dequantize(values, tensor.tensor_type)
            writer.add_tensor(tensor.name, quants.quantize(unpacked, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
