"""Random models of a few thousand weights, saved by transformers: the truth our reading is held against."""

from pathlib import Path
from typing import Any

import torch

from foretell.loading.families import read_config
from foretell.loading.weights import Weights, read_weights

DIMENSIONS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}

# every switch a family has, turned both ways
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-one-kv-head": {"model_type": "llama", "num_key_value_heads": 1},
    "llama-wide-heads": {"model_type": "llama", "head_dim": 16},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-window": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-biases": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    "qwen3-window": {
        "model_type": "qwen3", "head_dim": 16, "use_sliding_window": True, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}  # fmt: skip

ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32,
    },
}  # fmt: skip


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A transformers config of the family with tiny dimensions."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **(DIMENSIONS | changes))


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random transformers model; biases and norms are random too, so that leaving one out is noticed."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def save_tiny(folder: Path, model_type: str = "llama", shard_size: str = "1GB", **changes: Any) -> Any:
    """Saves a random model into a folder; returns the transformers model."""
    model = tiny_model(model_type, **changes)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def opened(folder: Path) -> Weights:
    """The checked tensors of a model folder."""
    return read_weights(folder, read_config(folder))


def raising(error: BaseException) -> Any:
    """A stand-in for a function: whatever it is called with, it raises this."""

    def answer(*args: Any, **options: Any) -> None:
        raise error

    return answer
