"""The supported model families, and how a Hugging Face config becomes a `ModelConfig`.

Llama, Mistral, Qwen2 and Qwen3 are one architecture with a few switches: which projections carry a bias,
whether queries and keys are normed, which layers look through a sliding window. A family is therefore one row
of `FAMILIES`: its switches, and the defaults its config class fills in for keys a config.json leaves out.
Weight names and shapes follow from the config alone (`tensors.py`).

transformers is the truth these numbers are tested against, but importing it costs most of a second, so
config.json is read directly; only scaled ropes call its formulas.
"""

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foretell.errors import ForetellError
from foretell.files import one_line, read_json
from foretell.loading.config import ModelConfig

Raw = Mapping[str, Any]  # a parsed config.json
# errors of arithmetic and look-ups on a value of an unexpected type
MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)


def _full_attention(raw: Raw, layers: int) -> tuple[int, ...]:
    """Every layer sees everything before it; Llama ignores a `sliding_window` key, as transformers does."""
    return (0,) * layers


def _one_window(raw: Raw, layers: int) -> tuple[int, ...]:
    """Mistral: one window for all layers, or null for none."""
    return (int(raw["sliding_window"] or 0),) * layers


def _upper_windows(raw: Raw, layers: int) -> tuple[int, ...]:
    """Qwen: layers from `max_window_layers` up have a window, unless `layer_types` says otherwise."""
    window = int(raw["sliding_window"] or 0) if raw["use_sliding_window"] else 0
    kinds = raw.get("layer_types")
    if kinds is None:
        return tuple(window if layer >= raw["max_window_layers"] else 0 for layer in range(layers))
    if len(kinds) != layers or not {"full_attention", "sliding_attention"}.issuperset(kinds):
        raise ForetellError(
            f"The layer_types must name full_attention or sliding_attention for each of the {layers} layers, "
            f"but config.json has {len(kinds)} entries of the kinds {', '.join(sorted(set(kinds)))}."
        )
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


@dataclass(frozen=True, slots=True)
class Family:
    """Differences of one family from the common architecture."""

    members: str  # for people
    defaults: Raw  # keys a config.json may leave out, as the family's config class fills them in
    qkv_bias: bool | None = False  # None: config.json decides, by `attention_bias`
    out_bias: bool | None = False  # likewise
    mlp_bias: bool | None = False  # likewise, by `mlp_bias`
    qk_norm: bool = False
    windows: Callable[[Raw, int], tuple[int, ...]] = field(default=_full_attention)


_COMMON = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False, "eos_token_id": None,
}  # fmt: skip
_QWEN = _COMMON | {
    "max_position_embeddings": 32768, "num_key_value_heads": 32,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": Family(
        members="Llama, SmolLM2, TinyLlama, Vicuna",
        defaults=_COMMON | {"max_position_embeddings": 2048, "eos_token_id": 2},
        qkv_bias=None, out_bias=None, mlp_bias=None,
    ),
    "mistral": Family(
        members="Mistral",
        defaults=_COMMON | {
            "max_position_embeddings": 4096 * 32, "num_key_value_heads": 8, "sliding_window": 4096, "eos_token_id": 2,
        },
        windows=_one_window,
    ),
    "qwen2": Family(members="Qwen2, Qwen2.5", defaults=_QWEN, qkv_bias=True, windows=_upper_windows),
    "qwen3": Family(
        members="Qwen3 (dense)", defaults=_QWEN | {"head_dim": 128},
        qkv_bias=None, out_bias=None, qk_norm=True, windows=_upper_windows,
    ),
}  # fmt: skip


def supported() -> str:
    """Lists the families in one line, for help texts and errors."""
    return ", ".join(f"{name} ({family.members})" for name, family in FAMILIES.items())


def read_config(folder: Path) -> ModelConfig:
    """Reads config.json, and generation_config.json for the end tokens, from a model folder."""
    raw = read_json(folder / "config.json")
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    try:
        return model_config(raw, generation)
    except ForetellError as error:
        raise ForetellError(f"{folder}: {error}") from error
    except MALFORMED as error:
        raise ForetellError(f"{folder / 'config.json'} holds a value of the wrong kind: {one_line(error)}.") from error


def model_config(source: Any, generation: Raw | None = None) -> ModelConfig:
    """Builds a `ModelConfig` from a transformers config or a parsed config.json.

    Args:
        source: a mapping, or anything with `to_dict` (every transformers config).
        generation: generation_config.json; its end tokens win over the config's, as in `generate`.
    """
    given: Raw = source if isinstance(source, Mapping) else source.to_dict()
    family_name = given.get("model_type")
    if family_name not in FAMILIES:
        raise ForetellError(f"The model_type {family_name!r} is not supported; the families are: {supported()}.")
    family = FAMILIES[family_name]
    raw = {**family.defaults, **given}
    _refuse_unsupported(raw)

    hidden, heads, layers = (_size(raw, key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    kv_heads = _size(raw, "num_key_value_heads", heads)
    head_dim = _size(raw, "head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise ForetellError(
            f"The config.json has {heads} attention heads, {kv_heads} key heads and head_dim {head_dim}, "
            "but heads must be a multiple of key heads and head_dim must be even."
        )
    settings = _rope_settings(raw)
    inv_freq, rope_scale = _rope(raw, settings, head_dim)
    eos = (generation or {}).get("eos_token_id")
    eos = raw["eos_token_id"] if eos is None else eos
    return ModelConfig(
        family=family_name,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=_size(raw, "intermediate_size"),
        vocab=_size(raw, "vocab_size"),
        eps=float(raw["rms_norm_eps"]),
        tied=bool(raw["tie_word_embeddings"]),
        max_positions=_context(raw, settings),
        inv_freq=inv_freq,
        rope_scale=rope_scale,
        attention_bias=_switch(family.qkv_bias, raw["attention_bias"]),
        out_bias=_switch(family.out_bias, raw["attention_bias"]),
        mlp_bias=_switch(family.mlp_bias, raw["mlp_bias"]),
        qk_norm=family.qk_norm,
        windows=family.windows(raw, layers),
        eos_ids=tuple(int(end) for end in (eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos])),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
    )


def _rope_settings(raw: Raw) -> Raw:
    """Reads the rope settings of config.json: rope_parameters of transformers 5, rope_scaling of older versions."""
    for key in ("rope_scaling", "rope_parameters"):
        if raw.get(key) and not isinstance(raw[key], Mapping):
            raise ForetellError(
                f"The config.json needs {key} as an object such as {{}}, but it is {reprlib.repr(raw[key])}; "
                "take it from the original checkpoint."
            )
    settings: Raw = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    return {**settings, "kind": settings.get("rope_type") or settings.get("type") or "default"}


def _rope(raw: Raw, settings: Raw, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Returns inverse frequencies, with any scaling applied, and the factor on cos and sin."""
    kind = settings["kind"]
    theta = float(settings.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    part = settings.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if part != 1.0:
        raise ForetellError(f"A partial_rotary_factor {part} is not supported: every head dimension must rotate.")
    if not 0 < theta < math.inf:
        raise ForetellError(f"The rope_theta of config.json is {theta}; it must be a positive number.")
    if kind == "dynamic":
        raise ForetellError(
            "Rope scaling 'dynamic' changes every frequency with the length of the text, so cached keys "
            "could not stay exact; remove it from config.json to use the model's original context length."
        )
    if kind in ("longrope", "su") and settings.get("short_factor", 0) != settings.get("long_factor", 1):
        raise ForetellError(
            f"Rope scaling {kind!r} changes every frequency with the length of the text, so cached keys "
            "could not stay exact; use a model without it."
        )
    if kind == "default":
        import torch  # here, because names are checked before torch is worth its import

        # float32 tensor arithmetic, because that is how transformers rounds these
        inv_freq = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
        return tuple(inv_freq.tolist()), 1.0
    if kind not in ("linear", "llama3", "yarn", "longrope"):
        raise ForetellError(f"Rope scaling {kind!r} is not supported; the kinds are default, linear, llama3 and yarn.")
    return _scaled_rope(raw, kind)


def _context(raw: Raw, settings: Raw) -> int:
    """Returns the number of positions that the model supports.

    Model cards tell people to add YaRN and leave max_position_embeddings as it was, so what the scaling gives counts
    if it is more. For llama3 the product means little (Llama 3.2: 8,192 times 32): it counts where nothing was raised.
    """
    declared, kind = _size(raw, "max_position_embeddings"), settings["kind"]
    if kind not in ("linear", "llama3", "yarn"):
        return declared
    given = raw.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
    original = int(given or declared)
    if kind == "llama3" and declared > original:
        return declared
    return max(declared, int(original * float(settings.get("factor") or 1)))


def _scaled_rope(raw: Raw, kind: str) -> tuple[tuple[float, ...], float]:
    """Applies the formulas of transformers itself, for configs that scale their frequencies."""
    import torch
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # the settings are edited in place by transformers, so it gets its own copy
    settings = json.loads(json.dumps({key: value for key, value in raw.items() if key != "model_type"}, default=str))
    try:
        config = AutoConfig.for_model(raw["model_type"], **settings)
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    except Exception as error:  # its validators raise many kinds; all of them mean the settings are wrong
        raise ForetellError(f"The {kind} rope settings of config.json are invalid: {one_line(error)}.") from error
    return tuple(inv_freq.float().tolist()), float(scale)


def _refuse_unsupported(raw: Raw) -> None:
    if raw["hidden_act"] != "silu":
        raise ForetellError(f"The hidden_act {raw['hidden_act']!r} is not supported; it must be 'silu'.")
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else "unknown"
        raise ForetellError(
            f"The weights are quantized ({method}), which is not supported; use the original float checkpoint."
        )


def _size(raw: Raw, key: str, default: int | None = None) -> int:
    """Returns a positive whole number from the config, or its default where it is absent or null."""
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ForetellError(f"The config.json needs {key} as a positive whole number, but it is {reprlib.repr(value)}.")
    return value


def _switch(fixed: bool | None, configured: Any) -> bool:
    return bool(configured) if fixed is None else fixed
