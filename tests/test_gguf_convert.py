"""GGUF files written here, unpacked, and held against the model they were made from."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from tiny_gguf import write_gguf
from tiny_models import VARIANTS, opened, raising, tiny_model

from foretell.errors import ForetellError, UsageError
from foretell.loading.cache_dir import CONVERTER_VERSION, cached_models
from foretell.loading.families import model_config, read_config
from foretell.loading.resolve import resolve
from foretell.loading.tokenizer import Tokenizer
from foretell.loading.weights import read_weights

F32, F16, Q8 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0"))


@pytest.mark.parametrize(
    "variant", ["llama", "llama-tied", "llama-biases", "llama-wide-heads", "qwen2", "qwen3", "qwen3-biases"]
)
def test_a_gguf_file_gives_back_the_model_it_was_made_from(variant: str, cache: Path, tmp_path: Path) -> None:
    model = tiny_model(**VARIANTS[variant])
    path = write_gguf(tmp_path / "tiny.gguf", model)
    stages: list[str] = []
    found = resolve(str(path), progress=lambda stage, fraction: stages.append(stage))
    assert found.source == "gguf"
    assert "converting" in stages
    config, original = read_config(found.path), model_config(model.config)
    # GGUF keeps eps as float32 and brings end tokens of its own
    assert replace(config, eps=original.eps, eos_ids=original.eos_ids) == replace(original, dtype="float32")
    weights = read_weights(found.path, config)
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    assert (found.path / "chat_template.jinja").is_file()
    assert [m.name for m in cached_models()] == [str(path)]

    # the second time nothing is converted, and a changed file is another model
    assert resolve(str(path), progress=raising(AssertionError())).path == found.path
    os.utime(path, ns=(1, 1))
    assert resolve(str(path)).path != found.path


@pytest.mark.parametrize(("kind", "dtype"), [(F32, torch.float32), (F16, torch.float16), (Q8, torch.bfloat16)])
def test_a_gguf_model_keeps_the_precision_it_has(kind: Any, dtype: torch.dtype, cache: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = tiny_model("llama", **changes)
    weights = opened(resolve(str(write_gguf(tmp_path / "tiny.gguf", model, kind)), weights="bf16").path)
    name = "model.layers.2.mlp.down_proj.weight"
    values = model.state_dict()[name].numpy()
    stored = torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind).astype(np.float32))
    assert weights.dtype(name) == dtype
    assert torch.equal(weights[name], stored.to(dtype))


def test_digits_are_cut_apart_as_smollm_was_trained(cache: Path, tmp_path: Path) -> None:
    """Two spaces before a digit are one run of spaces, not a space and a spaced digit."""
    folder = resolve(str(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama")))).path
    backend = Tokenizer.from_folder(folder)._backend
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("ab  12")]
    assert pieces == ["ab", "ĠĠ", "1", "2"]


@pytest.mark.parametrize(("links", "code"), [(True, False), (False, False), (True, True)])
def test_whatever_lies_beside_a_gguf_file_is_not_read(
    links: bool, code: bool, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers prefers a folder's tokenizer.json to the one inside the GGUF file it is asked for."""
    if not links:
        monkeypatch.setattr(Path, "symlink_to", raising(OSError("no links here")))
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")
    folders = tmp_path / "alone", tmp_path / "beside"
    for folder in folders:
        folder.mkdir()
    foreign = tokenizers.Tokenizer(tokenizers.models.WordLevel({"foreign": 0, "?": 1}, unk_token="?"))
    foreign.save(str(folders[1] / "tokenizer.json"))
    (folders[1] / "chat_template.jinja").write_text("foreign")
    settings: dict[str, Any] = {"model_type": "qwen2", "eos_token": "foreign"}
    if code:
        settings["auto_map"] = {"AutoConfig": "evil.Config", "AutoTokenizer": [None, "evil.Tokenizer"]}
        (folders[1] / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        monkeypatch.setattr("builtins.input", lambda question: "y")
    for name in ("config.json", "tokenizer_config.json"):
        (folders[1] / name).write_text(json.dumps(settings))
    alone, beside = (resolve(str(write_gguf(folder / "tiny.gguf", tiny_model("llama")))).path for folder in folders)
    assert alone != beside
    for name in names:
        assert (alone / name).read_text() == (beside / name).read_text(), name
    assert Tokenizer.from_folder(beside).encode("ab c") == [40, 36, 2]
    assert not (tmp_path / "ran").exists()
    assert [path for path in beside.iterdir() if path.is_dir()] == []


def test_large_models_are_written_in_shards(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foretell.loading.gguf.SHARD_BYTES", 20_000)
    model = tiny_model("llama")
    folder = resolve(str(write_gguf(tmp_path / "tiny.gguf", model))).path
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    weights = opened(folder)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())

    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(12)[None]
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)


def test_gguf_files_we_cannot_be_exact_with(cache: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"extra_tensors": {"mystery.weight": np.ones(4, np.float32)}}, "mystery.weight .*no place"),
        ({"extra": {"llama.rope.dimension_count": 4}}, "partial_rotary_factor 0.5"),
        ({"skip": "blk.1.attn_norm.weight"}, r"lacks model.layers.1.input_layernorm.weight"),
        ({"skip": "token_embd.weight"}, "no tensor token_embd.weight"),
    ]
    for number, (options, sentence) in enumerate(cases):
        path = write_gguf(tmp_path / f"{number}.gguf", model, **options)
        with pytest.raises(ForetellError, match=sentence):
            resolve(str(path))
    assert list((cache / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("embedding_length", None, "llama.embedding_length = None where one positive number is needed"),
        ("attention.head_count", None, "llama.attention.head_count = None where"),
        ("attention.head_count", [4, 4, 4], r"llama.attention.head_count = \[4, 4, 4\] where"),
        ("attention.head_count", [4] * 99, r"llama.attention.head_count = \[4, 4, .*\.\.\.\] where"),
        ("attention.head_count_kv", [2, 2, 2], r"llama.attention.head_count_kv = \[2, 2, 2\] where"),
        ("attention.head_count_kv", 3, "4 attention heads, 3 key heads"),
        ("attention.head_count", 0, "llama.attention.head_count = 0 where"),
        ("block_count", "three", "llama.block_count = 'three' where"),
        ("rope.freq_base", "far", "llama.rope.freq_base = 'far' where"),
        ("attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon = None where"),
        ("rope.dimension_count", [8, 8], r"rope.dimension_count = \[8, 8\] where"),
        ("rope.dimension_count", "all", "rope.dimension_count = 'all' where"),
        ("rope.dimension_count", 0, "rope.dimension_count = 0 where"),
        ("tokenizer.ggml.eos_token_id", "end", "eos_token_id = 'end', but its tokens are 0 to 63"),
        ("tokenizer.ggml.tokens", 5, "tokenizer.ggml.tokens = 5 where a list of strings"),
    ],
)
def test_missing_or_odd_metadata_are_one_sentence(
    key: str, value: Any, sentence: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = key if key.startswith("tokenizer.") else f"llama.{key}"
    change_metadata(monkeypatch, key, value)
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), extra={key: 1})
    with pytest.raises(ForetellError, match=rf"tiny\.gguf.*{sentence}") as caught:
        resolve(str(path))
    assert "\n" not in str(caught.value)
    assert list((cache / "models").iterdir()) == []


def test_without_a_count_of_key_heads_there_are_as_many_as_heads(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_metadata(monkeypatch, "llama.attention.head_count_kv", None)
    model = tiny_model("llama", num_key_value_heads=4)
    weights = opened(resolve(str(write_gguf(tmp_path / "tiny.gguf", model))).path)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(weights[name], model.state_dict()[name])


def change_metadata(monkeypatch: pytest.MonkeyPatch, key: str, value: Any) -> None:
    """From now on GGUF files are written with another value of this key, or without it."""
    real = gguf.GGUFWriter.add_key_value

    def add(writer: Any, name: str, given: Any, kind: Any, **options: Any) -> None:
        if name != key:
            real(writer, name, given, kind, **options)
        elif value is not None and key not in writer.kv_data[0]:
            real(writer, name, value, gguf.GGUFValueType.get_type(value))

    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", add)


# --- the rope -----------------------------------------------------------------------------------------------

LLAMA31 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def rope_of_transformers(folder: Path) -> tuple[torch.Tensor, float]:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.from_pretrained(folder)
    kind = config.rope_parameters["rope_type"]
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


def test_rope_freqs_divide_the_frequencies(cache: Path, tmp_path: Path) -> None:
    """Converters write Llama 3.1's scaling as divisors; the frequencies come back, and transformers reads them too."""
    truth = model_config(tiny_model("llama", head_dim=16, rope_parameters=dict(LLAMA31)).config)
    model = tiny_model("llama", head_dim=16)
    plain = torch.tensor(model_config(model.config).inv_freq)
    divisors = (plain / torch.tensor(truth.inv_freq)).numpy()
    assert divisors.min() == 1 and divisors.max() == 8
    path = write_gguf(tmp_path / "tiny.gguf", model, extra_tensors={"rope_freqs.weight": divisors})
    folder = resolve(str(path)).path
    config = read_config(folder)
    assert torch.allclose(torch.tensor(config.inv_freq), torch.tensor(truth.inv_freq), rtol=1e-6)
    inv_freq, scale = rope_of_transformers(folder)
    assert torch.equal(torch.tensor(config.inv_freq), inv_freq)
    assert (config.rope_scale, scale, config.max_positions) == (1.0, 1.0, 128)
    opened(folder)  # the tensor is in the config, not among the weights


def test_divisors_of_one_are_no_scaling(cache: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = write_gguf(tmp_path / "tiny.gguf", model, extra_tensors={"rope_freqs.weight": np.ones(4, np.float32)})
    folder = resolve(str(path)).path
    assert read_config(folder).inv_freq == model_config(model.config).inv_freq
    assert "rope_scaling" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("divisors", [np.ones(3, np.float32), np.array([1, 1, 0, 1], np.float32)])
def test_divisors_that_cannot_be(divisors: np.ndarray, cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), extra_tensors={"rope_freqs.weight": divisors})
    with pytest.raises(ForetellError, match="needs 4 positive numbers in rope_freqs.weight"):
        resolve(str(path))


YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64}, YARN),
        ({"scaling.type": "yarn", "scaling.factor": 4.0}, YARN | {"original_max_position_embeddings": 128}),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64,
             "scaling.yarn_beta_fast": 16.0, "scaling.yarn_beta_slow": 2.0},
            YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
        ),
        ({"scaling.type": "linear", "scaling.factor": 4.0, "scaling.finetuned": True}, LINEAR),
        ({"scaling.factor": 4.0}, LINEAR),
        ({"scale_linear": 4.0}, LINEAR),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scaled_ropes_are_those_of_transformers(
    family: str, keys: dict[str, Any], rope: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    extra = {f"{family}.rope.{key}": value for key, value in keys.items()}
    config = read_config(resolve(str(write_gguf(tmp_path / "tiny.gguf", tiny_model(family), extra=extra))).path)
    truth = tiny_model(family, rope_parameters=dict(rope)).model.rotary_emb
    assert torch.equal(torch.tensor(config.inv_freq), truth.inv_freq)
    assert config.rope_scale == truth.attention_scaling
    assert config.max_positions == rope.get("original_max_position_embeddings", 128) * 4


@pytest.mark.parametrize("keys", [{"scaling.type": "none", "scaling.factor": 4.0}, {"scaling.factor": 1.0}, {}])
def test_what_scales_nothing_is_the_plain_rope(keys: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    extra = {f"llama.rope.{key}": value for key, value in keys.items()}
    config = read_config(resolve(str(write_gguf(tmp_path / "tiny.gguf", model, extra=extra))).path)
    assert (config.inv_freq, config.max_positions) == (model_config(model.config).inv_freq, 128)


# --- keys that would change what the model computes ---------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.sliding_window", 16),
        ("attention.causal", False),
        ("attention.value_length", 16),
        ("attention.scale", 0.5),
        ("attention.clamp_kqv", 8.0),
        ("logit_scale", 0.25),
        ("residual_scale", 0.5),
        ("embedding_scale", 12.0),
        ("expert_count", 8),
        ("final_logit_softcapping", 30.0),
        ("rope.scaling.yarn_attn_factor", 1.5),
        ("rope.scaling.attn_factor", 1.5),
        ("rope.scaling.yarn_log_multiplier", 0.5),
        ("a.key.of.tomorrow", 1),
    ],
)
def test_a_key_that_is_not_computed_is_refused_by_name(key: str, value: Any, cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), extra={f"llama.{key}": value})
    with pytest.raises(ForetellError, match=rf"llama\.{key} = {value}, which is not supported .*safetensors"):
        resolve(str(path))


def test_keys_with_values_that_change_nothing_are_fine(cache: Path, tmp_path: Path) -> None:
    extra = {
        "attention.sliding_window": 0, "attention.causal": True, "attention.value_length": 8, "expert_count": 0,
        "attention.scale": 8**-0.5, "logit_scale": 1.0, "vocab_size": 64, "rope.scaling.attn_factor": 1.0,
        "tensor_data_layout": "Meta AI original pth", "rope.dimension_count": 8,
    }  # fmt: skip
    model = tiny_model("llama")
    path = write_gguf(tmp_path / "tiny.gguf", model, extra={f"llama.{key}": extra[key] for key in extra})
    assert opened(resolve(str(path)).path).shapes


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"extra": {"llama.rope.scaling.type": "longrope"}}, "rope.scaling.type = 'longrope', a scaling of the rope"),
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.factor|scale_linear = None where one positive"),
        ({"extra_tensors": {"rope_factors_long.weight": np.ones(4, np.float32)}}, "tensor rope_factors_long.weight"),
        (
            {
                "extra": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0},
                "extra_tensors": {"rope_freqs.weight": np.ones(4, np.float32)},
            },
            "'yarn' beside rope_freqs.weight",
        ),
        ({"extra": {"tokenizer.ggml.tokens": [f"t{i}" for i in range(70)]}}, "70 tokens but an embedding of 64"),
    ],
)
def test_ropes_and_vocabularies_that_cannot_be_had(
    options: dict[str, Any], sentence: str, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(ForetellError, match=rf"tiny\.gguf has .*({sentence})"):
        resolve(str(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), **options)))


def test_rope_freqs_have_no_place_in_qwen(cache: Path, tmp_path: Path) -> None:
    """llama.cpp reads the tensor for Llama alone."""
    path = write_gguf(
        tmp_path / "tiny.gguf", tiny_model("qwen2"), extra_tensors={"rope_freqs.weight": np.ones(4, np.float32)}
    )
    with pytest.raises(ForetellError, match="rope_freqs.weight .*no place"):
        resolve(str(path))


# --- files that are no model, or only a part of one ---------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"extra": {"general.type": "adapter"}}, "holds an adapter; name the model it changes.*BASE.ADAPTER"),
        ({"extra": {"general.type": "mmproj"}}, "reads images or sound; name the file with its language model"),
        ({"extra": {"general.type": "imatrix"}}, "statistics for quantizing"),
        ({"skip": "all"}, "holds only a vocabulary, no weights"),
        ({"endianess": gguf.GGUFEndian.BIG}, "written for big-endian machines.*gguf-convert-endian"),
        ({"extra": {"general.architecture": "gemma3"}}, "architecture 'gemma3'; the supported ones are llama"),
    ],
)
def test_files_that_are_no_model_we_can_open(
    options: dict[str, Any], sentence: str, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(ForetellError, match=rf"tiny\.gguf {sentence}|tiny\.gguf .*{sentence}"):
        resolve(str(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), **options)))


def test_a_model_in_parts_is_one_model(cache: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    first = write_gguf(tmp_path / "tiny.gguf", model, split_max_tensors=10)
    assert first.name == "tiny-00001-of-00003.gguf"
    folder = resolve(str(first)).path
    weights = opened(folder)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    third = tmp_path / "tiny-00003-of-00003.gguf"
    os.utime(third, ns=(1, 1))
    assert resolve(str(first)).path != folder  # any part may change
    with pytest.raises(UsageError, match=r"part 3 of a model; name the first, .*tiny-00001-of-00003\.gguf"):
        resolve(str(third))
    with pytest.raises(UsageError, match=r"name the one to load, such as .*tiny-00001-of-00003\.gguf"):
        resolve(str(tmp_path))


def test_parts_that_are_missing_or_do_not_belong_together(cache: Path, tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), split_max_tensors=10)
    second, third = (tmp_path / f"tiny-0000{number}-of-00003.gguf" for number in (2, 3))
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(first.read_bytes())
    other = tmp_path / "other.gguf"
    other.write_bytes(second.read_bytes())
    with pytest.raises(ForetellError, match=r"alone\.gguf is one of 3 parts, but its name.*alone-00001-of-00003"):
        resolve(str(alone))
    with pytest.raises(ForetellError, match=r"other\.gguf is part 2 of a model; name the first"):
        resolve(str(other))
    kept = third.read_bytes()
    third.write_bytes(second.read_bytes())
    with pytest.raises(ForetellError, match=r"tiny-00003-of-00003\.gguf is not part 3 of the model"):
        resolve(str(first))
    third.unlink()
    with pytest.raises(ForetellError, match=r"tiny-00003-of-00003\.gguf is missing, one of the 3 parts"):
        resolve(str(first))
    third.write_bytes(kept)
    (tmp_path / "more").mkdir()
    foreign = write_gguf(tmp_path / "more" / "tiny.gguf", tiny_model("llama", num_hidden_layers=2), split_max_tensors=7)
    (foreign.parent / "tiny-00002-of-00003.gguf").replace(second)
    with pytest.raises(ForetellError, match=r"hold \d+ tensors instead of 30, so they do not belong together"):
        resolve(str(first))


def test_a_model_of_an_older_converter_is_converted_anew(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    with monkeypatch.context() as patch:
        for module in ("resolve", "cache_dir"):
            patch.setattr(sys.modules[f"foretell.loading.{module}"], "CONVERTER_VERSION", CONVERTER_VERSION - 1)
        old = resolve(str(path)).path
        assert [each.path for each in cached_models()] == [old]
    assert cached_models() == []  # what a listing names loads without a network
    new = resolve(str(path)).path
    assert [each.path for each in cached_models()] == [new] != [old]


def test_a_quantization_that_cannot_be_unpacked(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "dequantize", raising(NotImplementedError("no")))
    with pytest.raises(ForetellError, match=r"tiny\.gguf stores token_embd.weight as F32, which .* cannot unpack"):
        resolve(str(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))))


@pytest.mark.parametrize("keep", [0, 3, 30, 500, 3000, -64])
def test_a_truncated_gguf_is_named_and_leaves_nothing(keep: int, cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ForetellError, match=r"tiny\.gguf is not a readable GGUF file.*fetch it again") as caught:
        resolve(str(path))
    assert "\n" not in str(caught.value)
    assert list((cache / "models").iterdir()) == []
