"""Float weights are quantized while loading: close to the floats, exact to decode with, and kept as any model is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from command_line import Foretell, save_tiny_chat
from decoding import answers, assert_same, decoder_of, finish, plainly
from hypothesis import given
from hypothesis import strategies as st
from quantized import dequantized
from random_backbones import COMPILED, examples, same
from safetensors.torch import load_file, save_file
from test_adapters import save_adapter
from test_cli_refusals import refused
from test_engine import mixed_requests
from test_loading import make_snapshot
from tiny_gguf import write_gguf
from tiny_models import opened, raising, save_tiny, tiny_model
from torch import Tensor
from toy_drafters import RandomTrees

from foretell.backbone.load import assemble
from foretell.drafting.checkpoint import find
from foretell.errors import ForetellError, ForetellWarning, UsageError
from foretell.loading import catalog
from foretell.loading import gguf as gguf_files
from foretell.loading.blocks import TYPES
from foretell.loading.cache_dir import cached_models
from foretell.loading.families import read_config
from foretell.loading.quantize import quantize
from foretell.loading.resolve import resolve

Q4_K, Q8_0 = TYPES["Q4_K"], TYPES["Q8_0"]
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 64}
MATRIX = "model.layers.1.self_attn.q_proj.weight"
DISTRIBUTIONS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(6, 512),
    "heavy tails": lambda: torch.distributions.StudentT(torch.tensor(4.0)).sample((6, 512)),
    "positive": lambda: torch.rand(6, 512),
    "negative": lambda: -torch.rand(6, 512),
    "far from zero": lambda: 3 + torch.rand(6, 512),
    "blocks of many sizes": lambda: torch.randn(6, 16, 32).mul(torch.linspace(0.05, 1, 16)[None, :, None]).flatten(1),
}


def error(weight: Tensor, kind: str) -> Tensor:
    """What the reference library reads back, less the weight."""
    return dequantized(quantize(weight, TYPES[kind])) - weight


# -- numbers --------------------------------------------------------------------------------------------------------


@examples(30)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(1e-3, 400), st.integers(0, 99))
def test_eight_bits_are_off_by_half_a_step(outputs: int, blocks: int, size: float, seed: int) -> None:
    weight = size * torch.randn(outputs, 32 * blocks, generator=torch.Generator().manual_seed(seed))
    steps = weight.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True) / 127
    off = error(weight, "Q8_0").unflatten(1, (-1, 32)).abs()
    assert (off <= 0.51 * steps + 127 * 2**-25).all()  # steps below 2^-14 are multiples of 2^-24


def test_errors_are_no_larger_than_those_of_the_reference_library() -> None:
    """It does not write Q4_K, which is off by less than four bits in Q4_1, and by more than five bits in Q5_1."""
    weight = torch.randn(40, 768)

    def theirs(name: str) -> float:
        kind = gguf.GGMLQuantizationType[name]
        return float(np.linalg.norm(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind) - weight.numpy()))

    assert error(weight, "Q8_0").norm() <= theirs("Q8_0")
    assert theirs("Q5_1") < error(weight, "Q4_K").norm() < theirs("Q4_1")


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_four_bits_are_near_the_best_that_counts_allow(name: str) -> None:
    """Against all 4,096 pairs of counts for each block, by the same weighted error."""
    torch.manual_seed(3)
    weight = DISTRIBUTIONS[name]()
    blocks = quantize(weight, Q4_K)
    ours = best = 0.0
    for data, x_256, y_256 in zip(
        blocks.data.view(-1, 144).numpy(), weight.view(-1, 256), dequantized(blocks).view(-1, 256), strict=True
    ):
        scale, least = (float(unit) * torch.arange(64.0) for unit in data[:4].view(np.float16))
        for x, y in zip(x_256.view(8, 32), y_256.view(8, 32), strict=True):
            share = x.abs() + 1.5 * x.abs().mean()
            q = ((x + least[None, :, None]) / scale[:, None, None].clamp(min=1e-30)).round().clamp(0, 15)
            off = q * scale[:, None, None] - least[None, :, None] - x
            best += float((share * off.square()).sum(2).min())
            ours += float((share * (y - x).square()).sum())
    assert ours <= 1.05 * best


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize(
    ("weight", "allowed"),
    [
        (torch.zeros(2, 256), 0.0),
        (torch.full((2, 256), 0.37), 1e-3),
        (torch.full((2, 256), -0.37), 1e-3),
        (-1 - torch.rand(2, 256), 0.04),
        (torch.tensor([65504.0, -65504.0]).repeat(2, 128), 1e-3),
        (15000 * torch.randn(2, 256, generator=torch.Generator().manual_seed(1)).clamp(-4, 4), 0.08),
        (1e-4 * torch.randn(2, 256, generator=torch.Generator().manual_seed(1)), 0.08),
        (1e-20 * torch.ones(2, 256), 1.0),  # below float16's smallest scale: zeros
        (torch.cat([1e-3 * torch.ones(2, 255), 60000 * torch.ones(2, 1)], 1), 1e-3),
    ],
    ids=["zeros", "alike", "alike, negative", "negative", "largest", "large", "small", "tiny", "one outlier"],
)
def test_what_is_unusual_is_quantized_too(kind: str, weight: Tensor, allowed: float) -> None:
    """The allowed error is relative to the largest number."""
    off = error(weight, kind)
    assert off.isfinite().all()
    assert float(off.abs().max()) <= allowed * float(weight.abs().max())


def test_blocks_do_not_depend_on_what_is_summed_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(200, 512, generator=torch.Generator().manual_seed(0))
    whole = [quantize(weight, kind).data for kind in (Q8_0, Q4_K)]
    monkeypatch.setattr("foretell.loading.quantize.PIECE", 768)
    assert all(same(quantize(weight, kind).data, data) for kind, data in zip((Q8_0, Q4_K), whole, strict=True))


# -- models ---------------------------------------------------------------------------------------------------------


def tiny_folder(folder: Path, **changes: Any) -> Path:
    """A model and a tokenizer whose matrices divide by blocks of 256, if not changed."""
    save_tiny_chat(folder)
    (folder / "model.safetensors").unlink()
    save_tiny(folder, **(SIZES | {"vocab_size": 257, "max_position_embeddings": 512, "eos_token_id": 256} | changes))
    return folder


@pytest.mark.parametrize("choice", ["q8_0", "q4_k"])
def test_a_quantized_folder_holds_the_model_in_blocks(cache: Path, tmp_path: Path, choice: str) -> None:
    source = tiny_folder(tmp_path / "source", shard_size="500KB")
    found = resolve(str(source), weights=choice)
    floats, kept = opened(source), opened(found.path)
    assert (found.name, found.source, found.weights) == (str(source), "folder", choice)
    assert len(list(source.glob("model-*.safetensors"))) == len(list(found.path.glob("model-*.safetensors"))) > 1
    for name, shape in floats.shapes.items():
        stored = kept.blocks(name)
        assert stored.type.name == (choice.upper() if len(shape) == 2 else "F32"), name
        off = (kept[name] - floats[name]).norm() / floats[name].norm()
        assert off < {"F32": 1e-12, "Q8_0": 0.01, "Q4_K": 0.08}[stored.type.name], name
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (found.path / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("choice", ["q8_0", "q4_k"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_drafts_and_verifies_exactly(cache: Path, tmp_path: Path, choice: str, tied: bool, dtype: str) -> None:
    source = tiny_folder(tmp_path / "source", tie_word_embeddings=tied)
    folder = resolve(str(source), weights=choice).path
    backbone = assemble(folder, dtype=dtype, threads=1)
    assert backbone.quantized == (choice if COMPILED else "")
    requests = mixed_requests(2, 257)
    truth = plainly(backbone, requests)
    drafter = RandomTrees(257, answers=answers(requests, truth), seed=1)
    assert_same(finish(decoder_of(backbone, drafter, max_rows=3), requests), truth)


@pytest.mark.skipif(not COMPILED, reason="there is one kernel only")
@pytest.mark.parametrize("choice", ["q8_0", "q4_k"])
def test_every_kernel_reads_the_same_numbers(cache: Path, tmp_path: Path, choice: str) -> None:
    folder = resolve(str(tiny_folder(tmp_path / "source")), weights=choice).path
    ids = torch.arange(40)
    compiled, eager = (assemble(folder, dtype="fp32", threads=1, kernel=kernel) for kernel in (None, "eager"))
    ours, theirs = (each.logits(each.norm(each.embed(ids))) for each in (compiled, eager))
    assert same(compiled.embed(ids), eager.embed(ids))
    assert compiled.fingerprint == eager.fingerprint
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.02  # activations in eight bits


def test_another_quantization_is_another_backbone(cache: Path, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source")
    folders = [resolve(str(source), weights=choice).path for choice in ("bf16", "q8_0", "q4_k")]
    assert folders[0] == source
    backbones = [assemble(folder, threads=1) for folder in folders]
    assert len({backbone.fingerprint for backbone in backbones}) == 3
    with pytest.raises(UsageError, match="No medusa drafter comes with foretell for this model"):
        find("medusa", backbones[1])


def test_matrices_that_fill_no_blocks_get_smaller_ones_and_a_note(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny(source, hidden_size=96, intermediate_size=256, head_dim=20)
    with pytest.warns(ForetellWarning) as notes:
        folder = resolve(str(source), weights="q4_k").path
    assert [str(note.message) for note in notes] == [
        "q4_k needs inputs that 256 divides: embed_tokens, q_proj, k_proj, v_proj, gate_proj, up_proj, lm_head become "
        "q8_0; o_proj stay as they are."
    ]
    layer = "model.layers.0."
    kinds = {name: opened(folder).blocks(f"{name}.weight").type.name for name in (
        f"{layer}mlp.down_proj", f"{layer}mlp.up_proj", f"{layer}self_attn.o_proj", "lm_head",
    )}  # fmt: skip
    assert list(kinds.values()) == ["Q4_K", "Q8_0", "F32", "Q8_0"]
    assert assemble(folder, threads=1).quantized == ("q4_k, q8_0" if COMPILED else "")


@pytest.mark.parametrize("wild", [torch.nan, -torch.inf, 1e6])
def test_a_tensor_that_is_not_finite_is_refused_by_name(cache: Path, tmp_path: Path, wild: float) -> None:
    source = tiny_folder(tmp_path / "source")
    weights = {name: weight.clone() for name, weight in load_file(source / "model.safetensors").items()}
    weights[MATRIX][3, 77] = wild
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ForetellError, match=rf"{MATRIX} holds (nan|inf|1e\+06), but .* at most 65,504"):
        resolve(str(source), weights="q8_0")
    assert not cached_models()


# -- GGUF files, adapters, names ------------------------------------------------------------------------------------


def quantized_file(folder: Path) -> str:
    model = tiny_model("llama", intermediate_size=64)
    return str(write_gguf(folder / "tiny.gguf", model, gguf.GGMLQuantizationType.Q8_0))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("choice", ["q8_0", "q4_k"])
def test_a_float_file_becomes_the_blocks_of_its_folder(cache: Path, tmp_path: Path, kind: str, choice: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", **SIZES), gguf.GGMLQuantizationType[kind])
    direct = opened(resolve(str(path), weights=choice).path)
    through = opened(resolve(str(resolve(str(path)).path), weights=choice).path)
    assert direct.blocks(MATRIX).type.name == choice.upper()
    assert all(same(direct.blocks(name).data, through.blocks(name).data) for name in direct.shapes)


def test_an_index_counts_the_bytes_of_its_shards(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_files, "SHARD_BYTES", 300_000)
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", **SIZES))
    for weights in ("bf16", "q8_0"):
        folder = resolve(str(path), weights=weights).path
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        tensors = {name: data for shard in folder.glob("model*.safetensors") for name, data in load_file(shard).items()}
        assert index["metadata"]["total_size"] == sum(data.nbytes for data in tensors.values())
        assert index["weight_map"].keys() == tensors.keys()


@pytest.mark.parametrize("choice", ["q8_0", "q4_k"])
def test_what_is_quantized_is_not_quantized_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    again = r"holds quantized weights, which lose more by being quantized again; load it with `weights='stored'`"
    path = str(quantized_file(tmp_path))
    with pytest.raises(UsageError, match=rf"tiny\.gguf {again}"):
        resolve(path, weights=choice)
    monkeypatch.setattr(catalog, "fetch", raising(AssertionError()))
    with pytest.raises(UsageError, match=f"smollm2-135m {again}"):
        resolve("smollm2-135m", weights=choice)
    assert not cached_models()
    kept = str(resolve(path, weights="stored").path)
    with pytest.raises(UsageError, match=again):
        resolve(kept, weights=choice)


def test_float32_unpacks_exactly(cache: Path, tmp_path: Path) -> None:
    path = str(quantized_file(tmp_path))
    exact, stored, rounded = (opened(resolve(path, weights=weights).path) for weights in ("fp32", "stored", "bf16"))
    for name in exact.shapes:
        assert exact.dtype(name) == torch.float32
        if "norm" not in name:
            assert same(exact[name], dequantized(stored.blocks(name)))
            assert not same(exact[name], rounded[name].float())
    assert read_config(resolve(path, weights="fp32").path).dtype == "float32"


@pytest.mark.slow
def test_an_adapter_is_merged_before(cache: Path, tmp_path: Path) -> None:
    base, adapter = tiny_folder(tmp_path / "base"), tmp_path / "mine"
    save_adapter(base, adapter)
    merged = resolve(f"{base}+{adapter}")
    quantized = resolve(f"{base}+{adapter}", weights="q4_k")
    floats, kept = opened(merged.path), opened(quantized.path)
    assert all(
        same(kept.blocks(name).data, quantize(floats[name], Q4_K).data)
        for name in (MATRIX, "model.layers.0.mlp.down_proj.weight", "lm_head.weight")
    )
    assert not same(floats[MATRIX], opened(base)[MATRIX])
    listed = {model.weights: model for model in cached_models()}
    assert listed.keys() == {"bf16", "q4_k"}
    assert {model.name for model in listed.values()} == {f"{base}+{adapter}"}
    assert listed["q4_k"].path == quantized.path
    gguf_base = quantized_file(tmp_path)
    save_adapter(resolve(gguf_base, weights="fp32").path, tmp_path / "other")
    exact = opened(resolve(f"{gguf_base}+{tmp_path / 'other'}", weights="fp32").path)
    assert exact.dtype(MATRIX) == torch.float32


def test_a_copy_is_made_once_for_each_state_of_the_files(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_folder(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    first = resolve("source", weights="q8_0").path
    marks = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert resolve(str(source), weights="q8_0").path == first != resolve(str(source), weights="q4_k").path
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == marks
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    changed = resolve(str(source), weights="q8_0").path
    assert changed != first
    assert read_config(changed).eps == 0.5


def test_copies_are_listed_and_deleted(
    foretell: Foretell, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = make_snapshot(tmp_path / "hub", "org/owl")
    source = tiny_folder(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    assert foretell("pull", "org/owl", "--weights", "q8_0").code == 0
    assert foretell("pull", "./source", "--weights", "q4_k").code == 0
    rows = {(row["name"], row["source"]) for row in foretell("models", "--json").lines if row["path"]}
    assert rows == {("org/owl", "hub"), ("org/owl", "hub, --weights q8_0"), (str(source), "folder, --weights q4_k")}
    assert foretell("rm", "org/owl", "--yes").code == foretell("rm", "./source", "--yes").code == 0
    assert [(model.name, model.path) for model in cached_models()] == [("org/owl", snapshot)]
    refused(foretell("rm", "org/owl", "--yes"), 2, "in the hub's cache, which other programs share")
    assert (source / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_command_line_loads_quantized_weights(foretell: Foretell, cache: Path, tmp_path: Path) -> None:
    source = str(tiny_folder(tmp_path / "source"))
    for choice in ("q8_0", "q4_k"):
        ran = foretell("generate", "hello", "-m", source, "-n", "5", "--weights", choice, "--json")
        assert ran.code == 0
        ran = foretell("generate", "hello", "-m", source, "-n", "3", "--weights", choice, "--kernel", "eager")
        assert "no weights of this model are multiplied as they are stored" in " ".join(ran.err.split())
    ran = foretell("generate", "hello", "-m", "smollm2-135m", "--weights", "q4_k")
    refused(ran, 2, "smollm2-135m holds quantized weights.*load it with --weights stored")
    refused(
        foretell("pull", source, "--weights", "q9"), 2, "weights is 'q9'; it must be stored, bf16, fp32, q8_0 or q4_k"
    )
