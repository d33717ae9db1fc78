"""A GGUF file, unpacked once into the folder every other tool reads: config.json, safetensors, tokenizer.

GGUF is llama.cpp's format: weights in quantized blocks under names of its own, and the tokenizer as metadata.
Each tensor is unpacked to float32 and rounded once to bfloat16, a smaller step than its quantization was;
unquantized files keep their float type. From then on the stored folder is the model, for a float32 run too.
Tensors stream through shard by shard, so memory is bounded by a shard, not by the model.

Two things are not plain renaming. llama.cpp rotates neighbouring pairs of head dimensions where Hugging Face
rotates halves, so Llama's q and k rows are stored interleaved and are put back. And transformers rebuilds the
tokenizer from the metadata, but knows no split rule for SmolLM, which cuts every digit apart first.
"""

import json
import reprlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foretell.backbone.families import MALFORMED, model_config, weight_shapes
from foretell.backbone.files import one_line
from foretell.backbone.store import Progress
from foretell.errors import ForetellError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

CONVERTER_VERSION = 1  # part of the cache key: raise it when the output changes
SHARD_BYTES = 2 << 30
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # GGUF files of Mistral say llama

_CONFIG_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_FRACTIONS = ("rms_norm_eps", "rope_theta")
_OPTIONAL = ("num_key_value_heads", "head_dim", "rope_theta")  # llama.cpp insists on the others too
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf_path: Path, folder: Path, progress: Progress) -> None:
    """Writes the model and tokenizer of a GGUF file into an existing folder."""
    progress("reading", 0.0)
    reader = _open(gguf_path)
    raw, shapes = _describe(reader, gguf_path)
    names = _hf_names(reader, raw["model_type"], shapes, gguf_path)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    progress("reading the tokenizer", 0.0)
    _write_tokenizer(reader, gguf_path, folder)
    _write_weights(reader, raw, names, folder, progress)


def _open(gguf_path: Path) -> "GGUFReader":
    from gguf import GGUFReader

    try:
        return GGUFReader(gguf_path)
    except Exception as error:  # a truncated file fails anywhere in the parser, with any exception
        raise ForetellError(
            f"{gguf_path} is not a readable GGUF file ({one_line(error)}); delete it and fetch it again."
        ) from error


def _metadata(reader: "GGUFReader", key: str, default: Any = None) -> Any:
    found = reader.get_field(key)
    return default if found is None else found.contents()


def _describe(reader: "GGUFReader", gguf_path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The config.json of the file and the tensors it must hold; whatever the metadata are, an error names the file."""
    try:
        raw = _config(reader, gguf_path)
        try:
            return raw, weight_shapes(model_config(raw))
        except ForetellError as error:
            raise ForetellError(f"{gguf_path}: {error}") from error
    except MALFORMED as error:
        raise ForetellError(
            f"{gguf_path} has metadata of the wrong kind ({one_line(error)}); use the original safetensors checkpoint."
        ) from error


def _dimensions(reader: "GGUFReader", architecture: str, gguf_path: Path) -> dict[str, Any]:
    """The numbers of the config, each a positive one; some models keep a list with an entry per layer."""
    found: dict[str, Any] = {}
    for hf_key, key in _CONFIG_KEYS.items():
        value = _metadata(reader, f"{architecture}.{key}")
        if value is None and hf_key in _OPTIONAL:
            continue
        kinds = (int, float) if hf_key in _FRACTIONS else (int,)
        if not isinstance(value, kinds) or isinstance(value, bool) or not value > 0:
            raise ForetellError(
                f"{gguf_path} has {architecture}.{key} = {reprlib.repr(value)} where one positive number is needed; "
                "use the original safetensors checkpoint."
            )
        found[hf_key] = value
    found.setdefault("num_key_value_heads", found["num_attention_heads"])
    return found


def _config(reader: "GGUFReader", gguf_path: Path) -> dict[str, Any]:
    """The config.json that the metadata describe."""
    architecture = _metadata(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise ForetellError(
            f"{gguf_path} holds a model of architecture {architecture!r}; "
            f"the supported ones are {', '.join(ARCHITECTURES)}."
        )
    for key, plain in (("rope.scaling.type", "none"), ("attention.sliding_window", 0), ("expert_count", 0)):
        if (value := _metadata(reader, f"{architecture}.{key}", plain)) != plain:
            raise ForetellError(
                f"{gguf_path} has {architecture}.{key} = {value!r}, which GGUF files describe too loosely to "
                "be exact; use the original safetensors checkpoint."
            )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise ForetellError(f"{gguf_path} has no tensor token_embd.weight, so it is not a whole language model.")
    dimensions = _dimensions(reader, architecture, gguf_path)
    rotated = _metadata(reader, f"{architecture}.rope.dimension_count")
    head_dim = dimensions.get("head_dim") or dimensions["hidden_size"] // dimensions["num_attention_heads"]
    if rotated not in (None, head_dim):
        dimensions["partial_rotary_factor"] = rotated / head_dim
    # a chat model may end its turn with a token of its own beside the end of the text
    ends = [_metadata(reader, f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    embedding = tensors["token_embd.weight"]
    return dimensions | {
        "model_type": architecture,
        "architectures": [f"{architecture.capitalize()}ForCausalLM"],
        "dtype": {"F32": "float32", "F16": "float16"}.get(embedding.tensor_type.name, "bfloat16"),
        "hidden_act": "silu",
        "vocab_size": int(embedding.shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "bos_token_id": _metadata(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({end for end in ends if end is not None}) or None,
        "pad_token_id": _metadata(reader, "tokenizer.ggml.padding_token_id"),
    }


def _hf_names(
    reader: "GGUFReader", model_type: str, expected: dict[str, tuple[int, ...]], gguf_path: Path
) -> dict[str, str]:
    """GGUF name -> Hugging Face name; a tensor without a place is refused, not ignored."""
    names: dict[str, str] = {}
    for tensor in reader.tensors:
        name = _TOP_NAMES.get(tensor.name)
        if tensor.name.startswith("blk.") and tensor.name.count(".") == 3:
            _, layer, part, kind = tensor.name.split(".")
            name = f"model.layers.{layer}.{_LAYER_NAMES.get(part)}.{kind}"
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if name not in expected or expected[name] != shape:
            raise ForetellError(
                f"{gguf_path} has a tensor {tensor.name} of shape {shape} that a {model_type} model "
                "of these dimensions has no place for; use the original safetensors checkpoint."
            )
        names[tensor.name] = name
    if missing := expected.keys() - names.values():
        raise ForetellError(f"{gguf_path} lacks {min(missing)}; the file is incomplete: fetch it again.")
    return names


def _write_weights(
    reader: "GGUFReader", raw: dict[str, Any], names: dict[str, str], folder: Path, progress: Progress
) -> None:
    """Saves the tensors in the reader's order, in as few shards as SHARD_BYTES allows."""
    from safetensors.torch import save_file

    dtype = getattr(torch, raw["dtype"])
    shards = list(_shards(reader.tensors, dtype.itemsize))
    done, index = 0, {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for tensor in shard:
            tensors[names[tensor.name]] = _unpack(tensor, raw).to(dtype)
            done += 1
            progress("converting", done / len(names))
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file_name))
    if len(shards) > 1:
        total = sum(int(tensor.n_elements) * dtype.itemsize for tensor in reader.tensors)
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def _shards(tensors: "list[ReaderTensor]", itemsize: int) -> "Iterator[list[ReaderTensor]]":
    shard: list[ReaderTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + int(tensor.n_elements) * itemsize > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += int(tensor.n_elements) * itemsize
    yield shard


def _unpack(tensor: "ReaderTensor", raw: dict[str, Any]) -> torch.Tensor:
    """One tensor in float32, with the rows Hugging Face expects."""
    from gguf import dequantize

    try:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    except NotImplementedError as error:
        raise ForetellError(
            f"{tensor.name} is stored as {tensor.tensor_type.name}, which the gguf library cannot unpack; "
            "use a file quantized another way."
        ) from error
    part = tensor.name.split(".")[-2]
    if raw["model_type"] == "llama" and part in ("attn_q", "attn_k"):
        heads = raw["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        # llama.cpp pairs (0, 1), (2, 3), ..; Hugging Face pairs (0, half), (1, half + 1), ..
        values = values.reshape(heads, -1, 2, *values.shape[1:]).transpose(1, 2).flatten(0, 2)
    return values.contiguous()


def _write_tokenizer(reader: "GGUFReader", gguf_path: Path, folder: Path) -> None:
    """The tokenizer of the file itself: transformers prefers any tokenizer.json beside it, so it gets it alone."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder) as alone:  # in the cache: a copy may be large
        _link(gguf_path, Path(alone) / "model.gguf")
        try:
            split_rule = _metadata(reader, "tokenizer.ggml.pre")
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf", trust_remote_code=False)
        except Exception as error:  # from a missing key to a kind of tokenizer transformers cannot rebuild
            raise ForetellError(
                f"The tokenizer inside {gguf_path} cannot be read ({one_line(error)}); "
                "use the original safetensors checkpoint."
            ) from error
    if split_rule == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(folder)


def _link(source: Path, link: Path) -> None:
    """Another name for a file, or a copy where the system knows no links."""
    try:
        link.symlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, link)
