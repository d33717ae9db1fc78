"""The tensors of a model folder, checked by name and shape before the first one is read.

Only safetensors are opened: a pickle runs code when it is loaded. Files are memory-mapped, so opening a model
costs its headers, and a tensor is read when it is asked for. `fingerprint` reads them all.
"""

import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foretell.errors import ForetellError
from foretell.files import one_line, read_json, write_json
from foretell.loading.blocks import TYPES, Blocks, quantized, stored_type
from foretell.loading.config import ModelConfig
from foretell.loading.tensors import weight_shapes

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINGERPRINT = "fingerprint.json"
PIECE = 1 << 22
"""Numbers that are hashed at once."""
_BARE = ("embed_tokens", "layers", "norm", "rotary_emb")
"""Modules of a base model: saved without an output head, their names lack "model."."""
# old Llama checkpoints store the rotary frequencies; they follow from the config
_DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True)
class _Stored:
    """Location of a tensor."""

    file: Any  # open
    name: str  # in that file
    path: Path

    def blocks(self) -> Blocks:
        return Blocks(TYPES[self.type()], self.file.get_tensor(self.name))

    def type(self) -> str:
        return stored_type(self.file, self.name)

    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())


class Weights:
    """A read-only mapping from Hugging Face tensor names to tensors, read when asked for.

    A tied model answers `lm_head.weight` with its embedding.
    """

    def __init__(self, stored: dict[str, _Stored], shapes: dict[str, tuple[int, ...]], tied: bool) -> None:
        self._stored = stored
        self.shapes = shapes
        self.tied = tied

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.blocks(name).floats()

    def blocks(self, name: str) -> Blocks:
        """Returns a tensor as it is stored."""
        return self._stored[self._source(name)].blocks()

    def files(self) -> list[list[str]]:
        """Returns the names of its tensors, file by file."""
        found: dict[Path, list[str]] = {}
        for name in self.shapes:
            found.setdefault(self._stored[name].path, []).append(name)
        return list(found.values())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._source(name) in self.shapes

    def dtype(self, name: str) -> torch.dtype:
        """Returns the type a tensor is stored in."""
        return TYPES[self._stored[self._source(name)].type()].dtype

    def _source(self, name: str) -> str:
        return EMBEDDING if self.tied and name == HEAD else name


def read_weights(folder: Path, config: ModelConfig) -> Weights:
    """Opens a folder's safetensors and checks that they are exactly the tensors the config describes."""
    folder = Path(folder)
    found: list[_Stored] = []
    for path, promised in _files(folder).items():
        handle = _open(path)
        held = set(handle.keys())
        if missing := (promised or held) - held:
            raise ForetellError(
                f"{path} lacks {min(missing)}, which the index says it holds; delete the folder and fetch it again."
            )
        found += [_Stored(handle, name, path) for name in promised or held]

    found.sort(key=lambda tensor: tensor.name == standard_name(tensor.name))  # of two the standard name wins
    stored = {standard_name(tensor.name): tensor for tensor in found}
    if config.tied and EMBEDDING not in stored and HEAD in stored:  # the shared tensor may be stored under either name
        stored[EMBEDDING] = stored.pop(HEAD)
    shapes = weight_shapes(config)
    for name, shape in shapes.items():
        _check(name, shape, stored, folder)
    _refuse_unused(stored, shapes, config)
    return Weights(stored, shapes, config.tied)


def standard_name(name: str) -> str:
    """Returns a tensor's name in a model with an output head, even if it was saved without one."""
    return f"model.{name}" if name.split(".")[0] in _BARE else name


def fingerprint(weights: Weights, config: ModelConfig) -> str:
    """Returns sixteen hex digits that identify a backbone; trained heads, cached features and costs are bound to them.

    They cover the dimensions and every number of every tensor that the config asks for. The same numbers are the same
    backbone, in whatever shards and float type they are stored; a fine-tune, an adapter or another quantization is
    another one. Numbers of quantized blocks are rounded as they are when a GGUF file is unpacked, so that a file kept
    as it is and the same file unpacked are one backbone. Reads about a gigabyte of floats a second, without holding
    the interpreter's lock.
    """
    digest, unpacked = hashlib.blake2b(_dimensions(config).encode(), digest_size=8), getattr(torch, config.dtype)
    for name, shape in sorted(weights.shapes.items()):
        digest.update(f"{name} {shape}".encode())
        blocks = weights.blocks(name)
        for values in blocks.pieces(PIECE):
            kind, numbers = _canonical(values.to(unpacked) if blocks.type.quantized else values)
            digest.update(kind)
            digest.update(numbers.data)
    return digest.hexdigest()


def known_fingerprint(folder: Path, weights: Weights, config: ModelConfig) -> str:
    """Returns the fingerprint that `keep_fingerprint` wrote, while its files are unchanged; else computes it."""
    if not keeps_blocks(folder):
        return fingerprint(weights, config)
    with suppress(ForetellError):  # there is none, or it is damaged
        kept = read_json(folder / FINGERPRINT)
        if kept.get("of") == state(folder, config) and isinstance(kept.get("fingerprint"), str):
            return str(kept["fingerprint"])
    with suppress(ForetellError):  # where nothing may be written, the next load computes it again
        return keep_fingerprint(folder, weights, config)
    return fingerprint(weights, config)


def keep_fingerprint(folder: Path, weights: Weights, config: ModelConfig) -> str:
    """Returns the fingerprint, and writes it into the model's folder: quantized blocks are slow to unpack."""
    mark = fingerprint(weights, config)
    write_json(folder / FINGERPRINT, {"of": state(folder, config), "fingerprint": mark}, shared=True)
    return mark


def keeps_blocks(folder: Path) -> bool:
    """Returns whether a folder holds quantized blocks, which other libraries cannot read."""
    files = map(_open, folder.glob("model*.safetensors"))
    return any(quantized(kind) for file in files for kind in (file.metadata() or {}).values())


def state(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Returns what changes whenever the weights do, without reading them: sizes and times of their files."""
    files = {path.name: path.stat() for path in sorted(folder.glob("model*.safetensors"))}
    return {"dimensions": _dimensions(config)} | {
        name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()
    }


def _dimensions(config: ModelConfig) -> str:
    dimensions = (
        config.family, config.hidden, config.layers, config.heads, config.kv_heads, config.head_dim,
        config.mlp, config.vocab, config.tied,
    )  # fmt: skip
    return repr(dimensions)


def _canonical(values_N: torch.Tensor) -> tuple[bytes, NDArray[Any]]:
    """Returns the same bits for the same numbers: of bfloat16 if it represents all of them, else of float32."""
    if values_N.dtype == torch.bfloat16:
        return b"bf16", values_N.view(torch.int16).numpy()
    bits_N = values_N.numpy().astype(np.float32, copy=False).view(np.uint32)
    return (b"fp32", bits_N) if (bits_N & 0xFFFF).any() else (b"bf16", (bits_N >> 16).astype(np.uint16))


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """Returns the safetensors files, each with the tensors that the index lists; None where there is no index."""
    single, index_path = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index_path.is_file():
        weight_map = read_json(index_path).get("weight_map")
        # a shard outside the folder would be a path made up by whoever wrote the index
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) and name == Path(name).name for name in weight_map.values()
        ):
            raise ForetellError(
                f"{index_path} must hold a weight_map from tensor names to file names; delete it and fetch it again."
            )
        files: dict[Path, set[str] | None] = {folder / name: set() for name in weight_map.values()}
        for tensor_name, file_name in weight_map.items():
            files[folder / file_name].add(tensor_name)  # type: ignore[union-attr]
        return files
    if single.is_file():
        return {single: None}
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise ForetellError(
            f"{folder} holds only pickled weights, which can run code when loaded; convert it once with "
            "transformers (from_pretrained, then save_pretrained), or use a revision with safetensors."
        )
    raise ForetellError(f"{folder} has no model.safetensors, so there are no weights to load; fetch the model again.")


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ForetellError(f"{path} is missing; delete the folder and fetch the model again.") from None
    except (SafetensorError, OSError) as error:
        raise ForetellError(
            f"{path} is damaged or incomplete ({one_line(error)}); delete it and fetch the model again."
        ) from error


def _check(name: str, shape: tuple[int, ...], stored: dict[str, _Stored], folder: Path) -> None:
    if name not in stored:
        raise _lacking(name, shape, stored, folder)
    kind, found, path = stored[name].type(), stored[name].shape(), stored[name].path
    if found != (TYPES[kind].stored_shape(shape) if kind in TYPES else shape):
        raise ForetellError(
            f"{name} has shape {found} in {path}, but config.json asks for {shape}; "
            "they do not belong together: fetch the model again."
        )
    if kind not in TYPES:
        raise ForetellError(
            f"{name} in {path} is stored as {kind}; the supported types are "
            f"{', '.join(TYPES)}, so use the original unquantized checkpoint."
        )


def _lacking(name: str, shape: tuple[int, ...], stored: dict[str, _Stored], folder: Path) -> ForetellError:
    if name == HEAD:
        return ForetellError(
            f"{folder} holds a base model without an output head ({HEAD}), so it cannot write; use the checkpoint for "
            "text generation, or set tie_word_embeddings to true in its config.json if the embedding is the head."
        )
    elsewhere = next((other for other in stored if other.endswith(f".{name.removeprefix('model.')}")), None)
    if elsewhere is not None:
        return ForetellError(
            f"{stored[elsewhere].path} has {elsewhere} instead of {name}: it holds a larger model, or was saved from "
            "within a wrapper; save the language model alone with transformers (save_pretrained)."
        )
    return ForetellError(
        f"{folder} lacks the tensor {name} of shape {shape}; its config.json and its weights do not "
        "belong together, or the download is incomplete: fetch it again."
    )


def _refuse_unused(stored: dict[str, _Stored], shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Refuses layers that the config does not have; ignores extra heads, which change no output."""
    for name in stored.keys() - shapes.keys():
        if name == HEAD and config.tied:
            # transformers unties the two when they differ, whatever the config says
            if not torch.equal(stored[HEAD].blocks().floats(), stored[EMBEDDING].blocks().floats()):
                raise ForetellError(
                    f"{stored[HEAD].path} has an lm_head.weight of its own although config.json ties it to the "
                    "embedding; set tie_word_embeddings to false there."
                )
        elif name.startswith("model.") and not _DERIVED.fullmatch(name):
            raise ForetellError(
                f"{stored[name].path} holds {name}, which a {config.family} model with this config.json has no "
                "place for; fetch the original checkpoint."
            )
