"""GGUF files written here, unpacked, and held against the model they were made from."""

import json
import os
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

from foretell.backbone import gguf_convert
from foretell.backbone.families import model_config, read_config
from foretell.backbone.loading import resolve
from foretell.backbone.store import cached_models
from foretell.backbone.tokenizer import Tokenizer
from foretell.backbone.weights import read_weights
from foretell.errors import ForetellError

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
    weights = opened(resolve(str(write_gguf(tmp_path / "tiny.gguf", model, kind))).path)
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
    monkeypatch.setattr(gguf_convert, "SHARD_BYTES", 20_000)
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
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.type = 'yarn'.*original"),
        ({"extra_tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, "rope_freqs.weight .*no place"),
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
        ("rope.dimension_count", [8, 8], "metadata of the wrong kind"),
        ("rope.dimension_count", "all", "metadata of the wrong kind"),
        ("tokenizer.ggml.eos_token_id", "end", "metadata of the wrong kind"),
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


def test_a_quantization_that_cannot_be_unpacked(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "dequantize", raising(NotImplementedError("no")))
    with pytest.raises(ForetellError, match="stored as F32, which the gguf library cannot unpack"):
        resolve(str(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))))


@pytest.mark.parametrize("keep", [0, 3, 30, 500, 3000, -64])
def test_a_truncated_gguf_is_named_and_leaves_nothing(keep: int, cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ForetellError, match=r"tiny\.gguf is not a readable GGUF file.*fetch it again") as caught:
        resolve(str(path))
    assert "\n" not in str(caught.value)
    assert list((cache / "models").iterdir()) == []
