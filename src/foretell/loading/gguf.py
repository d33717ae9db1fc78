"""A GGUF file, unpacked once into the folder every other tool reads: config.json, safetensors, tokenizer.

GGUF is llama.cpp's format: weights in quantized blocks under names of its own, and the tokenizer as metadata.
Each tensor is unpacked to float32 and rounded once to bfloat16, a smaller step than its quantization was;
unquantized files keep their float type. Or, if asked for, quantized types that have a row in `blocks.TYPES` keep their
blocks, all tensors become float32, or float ones are quantized.
The folder is then the model, for a float32 run too.
Tensors stream through shard by shard, so memory is bounded by a shard, not by the model.

Only q and k need more than renaming: llama.cpp rotates neighbouring pairs of head dimensions where Hugging Face
rotates halves, so Llama's q and k rows are stored interleaved and are put back. Metadata that change what
the model computes are translated or refused by name: an overlooked key would load another model.
"""

import json
import math
import re
import reprlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foretell.errors import ForetellError, ForetellWarning
from foretell.loading.blocks import TYPES, Blocks, BlockType, quantized, save, unpacked
from foretell.loading.cache_dir import Progress
from foretell.loading.choices import QUANTIZED, quantized_already
from foretell.loading.families import model_config
from foretell.loading.gguf_file import GGUFFile, metadata_errors, open_gguf
from foretell.loading.gguf_tokenizer import marks, write_tokenizer
from foretell.loading.quantize import quantized_weight, warn_of_exceptions
from foretell.loading.tensors import weight_shapes
from foretell.loading.weights import keep_fingerprint, read_weights

if TYPE_CHECKING:
    from gguf import ReaderTensor

SHARD_BYTES = 2 << 30
FLOATS = ("F32", "F16", "BF16")
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
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_OPTIONAL = ("num_key_value_heads", "head_dim", "rope_theta")  # llama.cpp insists on the others too
_READ = {  # keys read elsewhere, and those that change nothing
    *_CONFIG_KEYS.values(), "attention.value_length", "attention.scale", "rope.dimension_count",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scale_linear", "rope.scaling.finetuned", "vocab_size", "tensor_data_layout",
}  # fmt: skip
_HARMLESS: dict[str, tuple[Any, ...]] = {  # values with which a key that we do not compute changes nothing
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "logit_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "use_parallel_residual": (False,),
    "rope.scaling.alpha": (0,),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
}
_ROPE_DIVISORS = "rope_freqs.weight"
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
_EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate_inp|\w+exps?|\w+\.\d+)\.")
"""Tensors of mixtures of experts; older files number the experts instead of stacking them."""


def convert(gguf_path: Path, folder: Path, progress: Progress, choice: str) -> None:
    """Writes the model and tokenizer of a GGUF file into an existing folder.

    Args:
        choice: what becomes of the weights, see `choices`.
    """
    progress("reading", 0.0)
    with metadata_errors(gguf_path):
        file = open_gguf(gguf_path)
        _refuse_tensors(file)
        raw = _config(file)
        try:
            shapes = weight_shapes(model_config(raw))
        except ForetellError as error:
            raise ForetellError(f"{gguf_path}: {error}") from error
        names = _hf_names(file, raw["model_type"], shapes)
        if choice in QUANTIZED and any(tensor.tensor_type.name not in FLOATS for tensor in file.tensors):
            raise quantized_already(gguf_path)
        raw |= {"dtype": "float32"} if choice == "fp32" else {}
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        progress("reading the tokenizer", 0.0)
        write_tokenizer(file, folder)
    _write_weights(file, raw, names, folder, progress, choice)
    if choice == "stored":
        _tell_unpacked(file, raw["dtype"])
    if choice in QUANTIZED:
        warn_of_exceptions(shapes, choice)
    if choice == "stored" or choice in QUANTIZED:
        config = model_config(raw)
        progress("reading it back", 0.0)
        keep_fingerprint(folder, read_weights(folder, config), config)


def _refuse_tensors(file: GGUFFile) -> None:
    """Refuses experts, and types that cannot be unpacked: one tensor of each type is tried."""
    for tensor in file.tensors:
        if _EXPERTS.match(tensor.name):
            raise ForetellError(
                f"{file.path} has the tensor {tensor.name} of a mixture of experts, which is not supported yet; "
                "use a dense model."
            )
    for kind, tensor in {tensor.tensor_type.name: tensor for tensor in reversed(file.tensors)}.items():
        try:
            unpacked(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
        except NotImplementedError as error:
            raise ForetellError(
                f"{file.path} stores {tensor.name} as {kind}, which the gguf library cannot unpack; "
                "use a file quantized another way."
            ) from error


def _tell_unpacked(file: GGUFFile, dtype: str) -> None:
    """Warns of tensors whose type has no row in `TYPES`, so that they are not kept as they are stored."""
    kinds = [tensor.tensor_type.name for tensor in file.tensors if tensor.tensor_type.name not in TYPES]
    if kinds:
        types = " or ".join(sorted(set(kinds)))
        warnings.warn(
            f"{len(kinds)} of {len(file.tensors)} tensors of {file.path.name} are stored as {types}, "
            f"which cannot be multiplied as it is: they are unpacked to {dtype}, with its size and speed.",
            ForetellWarning,
            stacklevel=2,
        )


def _config(file: GGUFFile) -> dict[str, Any]:
    """The config.json that the metadata describe."""
    architecture = file.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ForetellError(
            f"{file.path} holds a model of architecture {reprlib.repr(architecture)}; "
            f"the supported ones are {', '.join(ARCHITECTURES)}."
        )
    tensors = {tensor.name: tensor for tensor in file.tensors}
    if "token_embd.weight" not in tensors:
        raise ForetellError(f"{file.path} has no tensor token_embd.weight, so it is not a whole language model.")
    dimensions = _dimensions(file, architecture)
    head_dim = dimensions.get("head_dim") or max(1, dimensions["hidden_size"] // dimensions["num_attention_heads"])
    _refuse_unsupported_keys(file, architecture, head_dim)
    rotated = f"{architecture}.rope.dimension_count"
    if file.get(rotated) is not None and _positive(file, rotated) != head_dim:
        dimensions["partial_rotary_factor"] = file.get(rotated) / head_dim
    if rope := _rope(file, architecture, head_dim, dimensions["max_position_embeddings"]):
        dimensions["rope_scaling"] = rope
    embedding, ids = tensors["token_embd.weight"], marks(file)
    tokens, rows = len(file.strings("tokenizer.ggml.tokens")), int(embedding.shape[-1])
    if tokens > rows:
        raise ForetellError(
            f"{file.path} has {tokens} tokens but an embedding of {rows} rows; use the original safetensors checkpoint."
        )
    # a chat model may end its turn with a token of its own beside the end of the text
    ends = sorted({ids[name] for name in ("eos", "eot", "eom") if name in ids})
    return dimensions | {
        "model_type": architecture,
        "architectures": [f"{architecture.capitalize()}ForCausalLM"],
        "dtype": {"F32": "float32", "F16": "float16"}.get(embedding.tensor_type.name, "bfloat16"),
        "hidden_act": "silu",
        "vocab_size": rows,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ends or None,
        "pad_token_id": ids.get("pad"),
    }


def _dimensions(file: GGUFFile, architecture: str) -> dict[str, Any]:
    """The numbers of the config, each a positive one; some models keep a list with an entry per layer."""
    found: dict[str, Any] = {}
    for hf_key, key in _CONFIG_KEYS.items():
        if file.get(f"{architecture}.{key}") is None and hf_key in _OPTIONAL:
            continue
        found[hf_key] = _positive(file, f"{architecture}.{key}", fraction=hf_key in _FRACTIONS)
    found.setdefault("num_key_value_heads", found["num_attention_heads"])
    room = dict.fromkeys(_WIDTHS, max(int(max(tensor.shape)) for tensor in file.tensors))
    for hf_key, most in (room | {"num_hidden_layers": len(file.tensors)}).items():
        if found.get(hf_key, 0) > most:  # a config of this size would fill the memory before it were compared
            raise ForetellError(
                f"{file.path} has {architecture}.{_CONFIG_KEYS[hf_key]} = {found[hf_key]}, more than its tensors have "
                "room for; fetch it again."
            )
    return found


def _positive(file: GGUFFile, key: str, fraction: bool = False) -> Any:
    value = file.get(key)
    kinds = (int, float) if fraction else (int,)
    if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < math.inf:
        raise file.wrong(key, value, "one positive number")
    return value


def _refuse_unsupported_keys(file: GGUFFile, architecture: str, head_dim: int) -> None:
    """Every other key of the architecture must have a value that changes nothing."""
    values = {key: file.get(f"{architecture}.{key}") for key in file.keys(f"{architecture}.")}
    wrong = {key: value for key, value in values.items() if key not in _READ and value not in _HARMLESS.get(key, ())}
    if values.get("attention.value_length", head_dim) != head_dim:
        wrong["attention.value_length"] = values["attention.value_length"]
    scale = values.get("attention.scale") or head_dim**-0.5
    if not math.isclose(scale, head_dim**-0.5, rel_tol=1e-5):
        wrong["attention.scale"] = scale
    for key, value in wrong.items():
        raise ForetellError(
            f"{file.path} has {architecture}.{key} = {reprlib.repr(value)}, which is not supported here or not known, "
            "so its answers could be wrong; use the original safetensors checkpoint."
        )


def _rope(file: GGUFFile, architecture: str, head_dim: int, context: int) -> dict[str, Any] | None:
    """The rope_scaling of config.json, if the frequencies are scaled."""
    prefix = f"{architecture}.rope.scaling"
    names = {tensor.name for tensor in file.tensors}
    divided = architecture == "llama" and _ROPE_DIVISORS in names
    kind = file.get(f"{prefix}.type", "linear")  # an older file has a factor alone
    factor_key = f"{prefix}.factor" if file.get(f"{prefix}.factor") else f"{architecture}.rope.scale_linear"
    if kind == "linear" and file.get(factor_key, 0) in (0, 1):
        kind = "none"
    odd = [f"the tensor {name}" for name in sorted(names) if name.startswith("rope_factors_")]
    if kind not in ("none", "linear", "yarn") or (divided and kind != "none"):
        odd.append(f"{prefix}.type = {reprlib.repr(kind)}" + f" beside {_ROPE_DIVISORS}" * divided)
    if odd:
        raise ForetellError(
            f"{file.path} has {odd[0]}, a scaling of the rope that is not supported; "
            "use the original safetensors checkpoint."
        )
    if kind != "none":
        rope = {"rope_type": kind, "factor": _positive(file, factor_key, fraction=True)}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = file.get(f"{prefix}.original_context_length") or context
            betas = {beta: file.get(f"{prefix}.yarn_{beta}") for beta in ("beta_fast", "beta_slow")}
            rope |= {beta: value for beta, value in betas.items() if value is not None}
        return rope
    divisors = _rope_divisors(file, head_dim) if divided else [1.0]
    if set(divisors) == {1.0}:
        return None
    # transformers has no kind with divisors of its own; this one has two lists of them, here alike
    return {
        "rope_type": "longrope", "short_factor": divisors, "long_factor": divisors, "attention_factor": 1.0,
        "factor": 1.0, "original_max_position_embeddings": context,
    }  # fmt: skip


def _rope_divisors(file: GGUFFile, head_dim: int) -> list[float]:
    """Divisors of the frequencies, one each: how converters write down the scaling of Llama 3.1."""
    tensor = next(tensor for tensor in file.tensors if tensor.name == _ROPE_DIVISORS)
    divisors: list[float] = _values(tensor).flatten().tolist()
    if len(divisors) != head_dim // 2 or not all(0 < divisor < math.inf for divisor in divisors):
        raise ForetellError(
            f"{file.path} needs {head_dim // 2} positive numbers in {_ROPE_DIVISORS}, one for each frequency, but it "
            f"holds {reprlib.repr(divisors)}; fetch the file again."
        )
    return divisors


def _hf_names(file: GGUFFile, model_type: str, expected: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """GGUF name -> Hugging Face name; a tensor without a place is refused, not ignored."""
    names: dict[str, str] = {}
    for tensor in file.tensors:
        if tensor.name == _ROPE_DIVISORS and model_type == "llama":
            continue  # it is in config.json
        name = _TOP_NAMES.get(tensor.name)
        if tensor.name.startswith("blk.") and tensor.name.count(".") == 3:
            _, layer, part, kind = tensor.name.split(".")
            name = f"model.layers.{layer}.{_LAYER_NAMES.get(part)}.{kind}"
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if name not in expected or expected[name] != shape or tensor.name in names:
            raise ForetellError(
                f"{file.path} has a tensor {tensor.name} of shape {shape} that a {model_type} model "
                "of these dimensions has no place for; use the original safetensors checkpoint."
            )
        names[tensor.name] = name
    if missing := expected.keys() - names.values():
        raise ForetellError(f"{file.path} lacks {min(missing)}; the file is incomplete: fetch it again.")
    return names


def _write_weights(
    file: GGUFFile, raw: dict[str, Any], names: dict[str, str], folder: Path, progress: Progress, choice: str
) -> None:
    """Saves the tensors in the file's order, in as few shards as SHARD_BYTES of floats or kept blocks allow."""
    dtype, keep = getattr(torch, raw["dtype"]), choice == "stored"
    stored = [tensor for tensor in file.tensors if tensor.name in names]
    shards = list(_shards(stored, dtype, keep))
    done, total, index = 0, 0, {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors: dict[str, Blocks] = {}
        for tensor in shard:
            name, weight = names[tensor.name], _stored(tensor, raw, dtype, keep)
            tensors[name] = quantized_weight(name, weight, choice) if choice in QUANTIZED else weight
            done += 1
            progress("converting", done / len(names))
        save(tensors, folder / file_name)
        index.update(dict.fromkeys(tensors, file_name))
        total += sum(weight.data.nbytes for weight in tensors.values())
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def _shards(tensors: "list[ReaderTensor]", dtype: torch.dtype, keep: bool) -> "Iterator[list[ReaderTensor]]":
    shard: list[ReaderTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + _bytes(tensor, dtype, keep) > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += _bytes(tensor, dtype, keep)
    yield shard


def _bytes(tensor: "ReaderTensor", dtype: torch.dtype, keep: bool) -> int:
    return int(tensor.n_bytes if _kept(tensor, keep) else tensor.n_elements * dtype.itemsize)


def _kept(tensor: "ReaderTensor", keep: bool) -> BlockType | None:
    """The type whose blocks are kept. Those of a vector are not: some vectors are put into another order."""
    return quantized(tensor.tensor_type.name) if keep and len(tensor.shape) > 1 else None


def _stored(tensor: "ReaderTensor", raw: dict[str, Any], dtype: torch.dtype, keep: bool) -> Blocks:
    """Returns a tensor with the rows Hugging Face expects: floats of this type, or the blocks of a quantized type."""
    kind = _kept(tensor, keep)
    values = torch.from_numpy(tensor.data.copy()) if kind else _values(tensor).to(dtype)
    part = tensor.name.split(".")[-2]
    if raw["model_type"] == "llama" and part in ("attn_q", "attn_k"):
        heads = raw["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        # llama.cpp pairs (0, 1), (2, 3), ..; Hugging Face pairs (0, half), (1, half + 1), ..
        values = values.reshape(heads, -1, 2, *values.shape[1:]).transpose(1, 2).flatten(0, 2)
    values = values.contiguous()
    return Blocks(kind, values) if kind else Blocks.of(values)


def _values(tensor: "ReaderTensor") -> torch.Tensor:
    return torch.from_numpy(unpacked(tensor.data, tensor.tensor_type.name).copy())
