"""GGUF files written as llama.cpp's converter writes them, from a transformers model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<end>' }}{% endfor %}"

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path: Path,
    model: Any,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
    blocks: dict[str, gguf.GGMLQuantizationType] | None = None,
    skip: str | None = None,
    tokenizer: Callable[[gguf.GGUFWriter, int], None] | None = None,
    **options: Any,
) -> Path:
    """Writes the model with its matrices in `kind`; returns the file, or the first of its parts.

    Args:
        extra: metadata to add or to change; None leaves a key out.
        blocks: stores tensors of these GGUF names as random blocks of small numbers, of types it could not round to.
        skip: leaves out one tensor of that GGUF name; "all" leaves out every one.
        tokenizer: adds the tokenizer for a vocabulary of this size.
        options: of the writer, such as `split_max_tensors`.
    """
    config, family = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, family, **options)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    (tokenizer or _add_tokenizer)(writer, config.vocab_size)
    for key, value in (extra or {}).items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            kinds = gguf.GGUFValueType
            plain = kinds.UINT32 if type(value) is int and value >= 0 else kinds.get_type(value)
            writer.add_key_value(key, value, plain)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values, gguf_name = tensor.numpy(), _gguf_name(name)
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            values = _permute(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if skip in (gguf_name, "all"):
            continue
        if other := (blocks or {}).get(gguf_name):
            shape = gguf.quant_shape_to_byte_shape(values.shape, other)
            # a scale of bytes below 32 is less than 2 ** -7
            data = np.random.default_rng(0).integers(0, 32, shape, np.uint8)
            writer.add_tensor(gguf_name, data, raw_dtype=other)
            continue
        stored = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name, gguf.quantize(values, stored), raw_dtype=stored)
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"), default=path)


def _gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{_NAMES[part]}.{kind}"
    return f"{_NAMES[stem]}.{kind}"


def _permute(values: np.ndarray, heads: int) -> np.ndarray:
    """`permute` of llama.cpp's convert_hf_to_gguf.py: halves become neighbouring pairs."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _add_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789", "Ġ", "Ċ", ":", ".", "ab", "Ġa", "<end>"]
    tokens = [*letters, *(f"<unused{index}>" for index in range(vocab - len(letters)))]
    special = [3 if token.startswith("<") else 1 for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(special)
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_eos_token_id(tokens.index("<end>"))
    writer.add_bos_token_id(tokens.index("<end>"))
    writer.add_chat_template(TEMPLATE)


def byte_level(
    marks: tuple[str, ...] = (),
    words: tuple[str, ...] = (),
    merges: tuple[str, ...] = (),
    pre: str = "llama-bpe",
    user_defined: tuple[str, ...] = (),
) -> Callable[[gguf.GGUFWriter, int], None]:
    """A tokenizer of marks (control tokens), all bytes, "th" and other words, and what fills the vocabulary."""

    def add(writer: gguf.GGUFWriter, vocab: int) -> None:
        from tokenizers import pre_tokenizers

        tokens = [*marks, *user_defined, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", *words]
        types = [3] * len(marks) + [4] * len(user_defined) + [1] * (len(tokens) - len(marks) - len(user_defined))
        padding = [f"[PAD{index}]" for index in range(len(tokens), vocab)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([*tokens, *padding])
        writer.add_token_types(types + [5] * len(padding))
        writer.add_token_merges(["t h", *merges])
        if marks:
            writer.add_eos_token_id(0)
            writer.add_bos_token_id(min(1, len(marks) - 1))

    return add


def sentencepiece(words: tuple[str, ...], marks: tuple[str, ...] = ()) -> Callable[[gguf.GGUFWriter, int], None]:
    """A tokenizer whose `words` are listed with the best score first."""

    def add(writer: gguf.GGUFWriter, vocab: int) -> None:
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        ordinary = [*words, *(letter for letter in "▁abcdefghijklmnopqrstuvwxyz" if letter not in words)]
        tokens = ["<unk>", "<s>", "</s>", *marks, *bytes_, *ordinary]
        types = [2, 3, 3, *([3] * len(marks)), *([6] * 256), *([1] * len(ordinary))]
        padding = [f"[PAD{index}]" for index in range(len(tokens), vocab)]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([*tokens, *padding])
        writer.add_token_types(types + [5] * len(padding))
        scores = [0.0] * (len(tokens) - len(ordinary)) + [-float(rank) for rank in range(len(ordinary))]
        writer.add_token_scores(scores + [-1000.0] * len(padding))

    return add
