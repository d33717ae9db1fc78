"""The tensors of a folder: those transformers saved, or one sentence about what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, opened, save_tiny, tiny_model

from foretell.errors import ForetellError
from foretell.loading import weights as weights_module
from foretell.loading.families import read_config
from foretell.loading.weights import fingerprint


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_weights_are_those_transformers_saved(variant: str, shard_size: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, shard_size=shard_size, **VARIANTS[variant])
    weights = opened(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    for name, tensor in model.state_dict().items():
        assert name in weights
        assert torch.equal(weights[name], tensor), name
        assert weights.dtype(name) == torch.float32


def test_writing_into_a_loaded_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    opened(tmp_path)["model.norm.weight"].zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_fingerprint_knows_the_model_and_nothing_of_its_files(tmp_path: Path) -> None:
    def of(name: str, **changes: Any) -> str:
        folder = tmp_path / name
        folder.mkdir()
        save_tiny(folder, **changes)
        return fingerprint(opened(folder), read_config(folder))

    one = of("one")
    assert one == of("sharded", shard_size="20KB")
    assert one != of("other", seed=1)
    assert one != of("tied", tie_word_embeddings=True)

    # the same bfloat16 values, once stored as bfloat16 and once as float32
    for name, dtype in (("narrow", torch.bfloat16), ("wide", torch.float32)):
        (tmp_path / name).mkdir()
        tiny_model("llama").to(torch.bfloat16).to(dtype).save_pretrained(tmp_path / name)
    narrow, wide = (fingerprint(opened(tmp_path / n), read_config(tmp_path / n)) for n in ("narrow", "wide"))
    assert narrow == wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["llama-biases", "llama-tied", "qwen3-biases"])
def test_one_number_of_any_tensor_changes_the_fingerprint(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model(**VARIANTS[variant]).to(dtype).save_pretrained(tmp_path)
    weights, config = opened(tmp_path), read_config(tmp_path)
    found = {fingerprint(weights, config)}
    for number, name in enumerate(weights.shapes, start=1):

        def change(tensors: dict[str, torch.Tensor], name: str = name, at: int = number * 7919) -> None:
            values = tensors[name].view(-1)
            values[at % len(values)] = torch.nextafter(values[at % len(values)], torch.tensor(9.0, dtype=dtype))

        before = (tmp_path / "model.safetensors").read_bytes()
        edit(tmp_path, change)
        found.add(fingerprint(opened(tmp_path), config))
        (tmp_path / "model.safetensors").write_bytes(before)
        assert len(found) == 1 + number, name
    assert fingerprint(opened(tmp_path), config) in found


def test_a_large_tensor_is_digested_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "PIECE", 100)
    tiny_model("llama").bfloat16().float().save_pretrained(tmp_path)
    config, name = read_config(tmp_path), "model.layers.1.mlp.up_proj.weight"
    whole = fingerprint(opened(tmp_path), config)
    for at in (0, 99, 100, 48 * 32 - 1):
        before = (tmp_path / "model.safetensors").read_bytes()
        edit(tmp_path, lambda t, at=at: t[name].view(-1)[at].add_(1e-6))  # less than bfloat16 can tell
        assert fingerprint(opened(tmp_path), config) != whole
        (tmp_path / "model.safetensors").write_bytes(before)
    assert fingerprint(opened(tmp_path), config) == whole


def test_numbers_in_half_precision_are_the_same_in_float32(tmp_path: Path) -> None:
    """Which bfloat16 cannot hold."""
    for name, dtype in (("half", torch.float16), ("wide", torch.float32)):
        tiny_model("llama").half().to(dtype).save_pretrained(tmp_path / name)
    half, wide = (fingerprint(opened(tmp_path / n), read_config(tmp_path / n)) for n in ("half", "wide"))
    assert half == wide


def edit(folder: Path, change: Any) -> None:
    """Rewrites model.safetensors after `change(tensors)`."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


NORM = "model.layers.1.input_layernorm.weight"
BROKEN_TENSORS = {
    f"lacks the tensor {NORM} of shape .32,.*fetch it again": lambda t: t.pop(NORM),
    rf"{NORM} has shape .31,. in .*model\.safetensors.*asks for .32,": lambda t: t.update({NORM: torch.ones(31)}),
    f"{NORM} in .* stored as I8; the supported types": lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)}),
    "holds model.layers.0.extra.weight, which a llama model": lambda t: t.update(
        {"model.layers.0.extra.weight": torch.ones(1)}
    ),
}


@pytest.mark.parametrize("sentence", BROKEN_TENSORS)
def test_tensors_that_do_not_fit_the_config(sentence: str, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    edit(tmp_path, BROKEN_TENSORS[sentence])
    with pytest.raises(ForetellError, match=sentence):
        opened(tmp_path)


def bare(name: str) -> str:
    """As a base model's own save_pretrained writes it."""
    return name.removeprefix("model.")


@pytest.mark.parametrize("tied", [False, True])
def test_names_that_transformers_understands_are_understood(tied: bool, tmp_path: Path) -> None:
    """A base model saved without its head, one whose names are mixed, a shared tensor under the head's name only."""
    from transformers import AutoModelForCausalLM

    model = save_tiny(tmp_path, tie_word_embeddings=tied)
    whole = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    first, extra = "model.embed_tokens.weight", {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    by_name = {
        "bare": {bare(name): tensor for name, tensor in whole.items()} | extra,
        "mixed": {bare(name) if "layers.1" in name else name: tensor for name, tensor in whole.items()},
    }
    if tied:
        by_name["head only"] = {"lm_head.weight" if name == first else name: whole[name] for name in whole}
        by_name["bare, and a head"] = by_name["bare"] | {"lm_head.weight": whole[first].clone()}
    for name, tensors in by_name.items():
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        theirs, weights = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), opened(tmp_path)
        for each, tensor in model.state_dict().items():
            assert torch.equal(weights[each], tensor), (name, each)
            assert torch.equal(theirs[each], tensor), (name, each)
            assert each in weights
        assert weights.dtype("lm_head.weight") == torch.float32
        assert fingerprint(weights, read_config(tmp_path)) == fingerprint_of(model, tmp_path / name)


def fingerprint_of(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return fingerprint(opened(folder), read_config(folder))


@pytest.mark.parametrize(
    "prefix", ["language_model.", "model.language_model.", "module.", "_orig_mod.", "transformer."]
)
def test_a_model_within_another_is_named(prefix: str, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    rename = {"model.language_model.": lambda name: prefix + bare(name)}.get(prefix, lambda name: prefix + name)
    edit(tmp_path, lambda t: [t.update({rename(name): t.pop(name)}) for name in list(t)])
    with pytest.raises(
        ForetellError, match=rf"has {prefix}.* instead of model\.embed_tokens\.weight: .*save_pretrained"
    ):
        opened(tmp_path)


def test_a_base_model_without_a_head_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    edit(tmp_path, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ForetellError, match=r"a base model without an output head \(lm_head.weight\).*tie_word_emb"):
        opened(tmp_path)


def test_harmless_extra_tensors_are_allowed(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    extra = ("medusa_head.0.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    edit(tmp_path, lambda tensors: tensors.update({name: torch.ones(1) for name in extra}))
    opened(tmp_path)


def test_a_tied_model_with_another_head_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, tie_word_embeddings=True)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    opened(tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ForetellError, match="tie_word_embeddings to false"):
        opened(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ForetellError, match=r"model\.safetensors is damaged or incomplete.*delete it"):
        opened(tmp_path)


def test_a_corrupt_header_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)
    with pytest.raises(ForetellError, match="damaged"):
        opened(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, shard_size="20KB")
    next(iter(tmp_path.glob("model-00002*"))).unlink()
    with pytest.raises(ForetellError, match=r"model-00002.* is missing"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../b"}}'],
)
def test_a_malformed_index_is_named(index: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ForetellError, match=r"index\.json"):
        opened(tmp_path)


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    save_tiny(tmp_path, shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(ForetellError, match="lacks model.ghost.weight, which the index says"):
        opened(tmp_path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ForetellError, match="only pickled weights.*save_pretrained"):
        opened(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ForetellError, match=r"no model\.safetensors"):
        opened(tmp_path)
