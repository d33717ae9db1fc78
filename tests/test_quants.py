"""Quantized weights are multiplied as they are stored: by any build, in any company, the same bits for the same row."""

import json
from pathlib import Path

import pytest
import torch
from command_line import Foretell
from decoding import answers, assert_same, decoder_of, finish, held_like_a_fresh_prefill, plainly
from hypothesis import strategies as st
from quantized import QUANTS, dequantized, quantizable, random_blocks, rounded, whole_numbers
from random_backbones import BF16, COMPILED, FP32, build, check, same, using
from test_engine import mixed_requests
from tiny_gguf import write_gguf
from tiny_models import DIMENSIONS, opened, tiny_model
from toy_drafters import RandomTrees

from foretell import drafters
from foretell.api import load
from foretell.backbone.cpu import library
from foretell.backbone.cpu.backbone import CompiledBackbone
from foretell.backbone.cpu.formats import FORMATS, PackedMatrix, format_for
from foretell.backbone.cpu.linear import PackedLinear
from foretell.backbone.load import assemble
from foretell.backbone.probe import probe
from foretell.drafters.medusa import Medusa
from foretell.drafters.medusa2 import Medusa2
from foretell.drafting.learning.finetune import trainable_model
from foretell.errors import UsageError
from foretell.loading.blocks import TYPES, Blocks, save
from foretell.loading.families import model_config, read_config
from foretell.loading.lora import merge
from foretell.loading.resolve import resolve
from foretell.loading.weights import FINGERPRINT, fingerprint, keeps_blocks, known_fingerprint
from foretell.requests import SamplingParams
from foretell.testing import random_weights
from foretell.train.start import new_module

compiled_only = pytest.mark.parametrize("kernel", COMPILED)
MIXED = ("Q4_K", "Q6_K", "Q5_0", "Q8_0", "Q4_1", "Q5_K", "Q4_0", "Q5_1")
KINDS = [*((name,) for name in QUANTS), MIXED]
SIZES = DIMENSIONS | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 32, "max_position_embeddings": 512}
CONFIG = model_config({"model_type": "llama", **SIZES})


def linear(weight: Blocks, kernel: str) -> PackedLinear:
    with using(kernel):
        return PackedLinear(weight, None, library.default(), format_for(weight, BF16))


# -- products -------------------------------------------------------------------------------------------------------


@compiled_only
@pytest.mark.parametrize("name", QUANTS)
def test_a_type_gives_back_its_numbers_and_multiplies_them(kernel: str, name: str) -> None:
    def holds(rows: int, blocks: int, outputs: int, threads: int, seed: int) -> None:
        inputs = blocks * TYPES[name].numbers
        weight = random_blocks(name, (outputs, inputs), inputs**-0.5, seed)
        truth, packed = dequantized(weight), linear(weight, kernel)
        ids = torch.randint(outputs, (5,))
        assert same(packed.matrix.rows(ids), truth[ids])
        x = torch.randn(rows, inputs) * torch.rand(rows, inputs).exp()
        y = packed(x, threads)
        torch.testing.assert_close(y.double(), rounded(x) @ truth.double().T, atol=2e-2, rtol=1e-4)
        assert same(torch.cat([packed(x[i : i + 1], 1) for i in range(rows)]), y)

    many = 3 if TYPES[name].numbers == 256 else 9
    sizes = st.integers(1, 40), st.integers(1, many), st.integers(1, 100), st.integers(1, 3)
    check(kernel, 20, holds, *sizes, st.integers(0, 99))


@pytest.mark.parametrize("name", QUANTS)
def test_whole_numbers_are_the_same_in_every_build(name: str) -> None:
    """With steps and scales of one, all is exact: the builds' sums are those of integers, bit for bit."""
    weight, x = whole_numbers(name)
    truth = x.double() @ dequantized(weight).double().T
    for kernel in COMPILED:
        assert same(linear(weight, kernel)(x, 1).double(), truth)


@pytest.mark.parametrize("extreme", [0, 255])
@pytest.mark.parametrize("name", QUANTS)
def test_nothing_overflows(name: str, extreme: int) -> None:
    """All bits set, or none, against activations of the greatest size and either sign."""
    row = TYPES[name]
    weight = random_blocks(name, (33, row.numbers), 0.01)
    data = weight.data.numpy().reshape(33, row.items)
    scales = {208, 209} if name == "Q6_K" else {0, 1} | ({2, 3} if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else set())
    data[:, [i for i in range(row.items) if i not in scales]] = extreme
    signs = torch.ones(4, row.numbers)
    signs[1], signs[2, ::2], signs[3, 1::2] = -1, -1, -1
    truth = (signs.double() * 3) @ dequantized(weight).double().T
    for kernel in COMPILED:
        torch.testing.assert_close(linear(weight, kernel)(signs * 3, 1).double(), truth, rtol=1e-5, atol=1e-4)


@compiled_only
@pytest.mark.parametrize("name", QUANTS)
@pytest.mark.parametrize("wild", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_spoils_itself_alone(kernel: str, name: str, wild: float) -> None:
    packed, x = linear(random_blocks(name, (40, 512)), kernel), torch.randn(6, 512)
    y = packed(x, 1)
    x[2, 77] = wild
    z = packed(x, 1)
    assert z[2].isnan().all()
    rest = [0, 1, 3, 4, 5]
    assert same(z[rest], y[rest])
    assert packed.argmax(x, 1).tolist()[2] == -1


@compiled_only
def test_zeros_are_multiplied_to_zeros(kernel: str) -> None:
    for name in QUANTS:
        assert not linear(random_blocks(name, (32, 256)), kernel)(torch.zeros(3, 256), 1).any()


@compiled_only
def test_matrices_of_different_types_follow_one_another(kernel: str) -> None:
    parts = [
        random_blocks("Q4_K", (64, 256)),
        random_blocks("Q6_K", (32, 256), seed=1),
        Blocks.of(torch.randn(40, 256)),
    ]
    with using(kernel):
        best, rest = library.default(), None
        for weight in reversed(parts[1:]):
            rest = PackedMatrix(weight, format_for(weight, BF16), best, rest)
        joined = PackedLinear(parts[0], torch.randn(136), best, format_for(parts[0], BF16), rest)
        x = torch.randn(5, 256)
        y = joined(x, 2)
        assert joined.bias is not None
        alone = torch.cat([PackedLinear(each, None, best, format_for(each, BF16))(x, 1) for each in parts], 1)
        assert same(y, alone + joined.bias[:136])
        with pytest.raises(ValueError, match="begins within a panel"):
            PackedMatrix(parts[2], FORMATS["bf16"], best, rest)


# -- models ---------------------------------------------------------------------------------------------------------


def of_blocks(kinds: tuple[str, ...], dtype: torch.dtype, kernel: str = "", seed: int = 0) -> CompiledBackbone:
    weights = quantizable(random_weights(CONFIG, seed), kinds)
    backbone = build(CONFIG, weights, kernel, dtype)
    assert isinstance(backbone, CompiledBackbone)
    return backbone


@compiled_only
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "+".join(kinds))
def test_every_type_keeps_the_promise(kernel: str, dtype: torch.dtype, kinds: tuple[str, ...]) -> None:
    """Any trees, any sampling: what plain decoding writes, token for token, and its cache's bytes.

    Each type alone in one number type, in ragged batches in the other, and the other way round in the next build.
    """
    with using(kernel):
        backbone = of_blocks(kinds, dtype)
        assert backbone.quantized == ", ".join(sorted(kind.lower() for kind in kinds))
        assert kinds != MIXED or probe(backbone) is None
        requests = mixed_requests(2, CONFIG.vocab)[:: 8 if kernel == "generic" else 2]
        truth = plainly(backbone, requests)
        rows = 1 if (KINDS.index(kinds) + COMPILED.index(kernel) + (dtype == BF16)) % 2 else 4
        drafter = RandomTrees(CONFIG.vocab, answers=answers(requests, truth), seed=rows)
        decoder = decoder_of(backbone, drafter, max_rows=rows)
        assert_same(finish(decoder, requests), truth)
        assert held_like_a_fresh_prefill(decoder) > 0


@compiled_only
def test_a_model_of_blocks_is_near_its_numbers_in_floats(kernel: str) -> None:
    with using(kernel):
        backbone = of_blocks(MIXED, FP32)
        assert backbone.read
        floats = {name: Blocks.of(backbone.read(name)).floats(FP32) for name in random_weights(CONFIG, 0)}
        twin = build(CONFIG, floats, "", FP32)
        ids = torch.arange(40)
        (ours,), (theirs,) = ([each.logits(each.norm(each.embed(ids)))] for each in (backbone, twin))
        assert same(backbone.embed(ids), twin.embed(ids))
        assert (ours - theirs).norm() / theirs.norm() < 0.02


# -- files ----------------------------------------------------------------------------------------------------------


def tiny_file(folder: Path, **changes: int) -> str:
    import gguf

    model = tiny_model(
        "llama", **({"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2} | changes)
    )
    return str(write_gguf(folder / "tiny.gguf", model, gguf.GGMLQuantizationType.Q4_0))


def test_a_file_is_one_backbone_kept_or_unpacked(cache: Path, tmp_path: Path) -> None:
    path = tiny_file(tmp_path)
    kept, unpacked = (resolve(path, weights=weights).path for weights in ("stored", "bf16"))
    assert unpacked != kept == resolve(path).path
    marks = [fingerprint(opened(folder), read_config(folder)) for folder in (kept, unpacked)]
    assert marks[0] == marks[1]
    backbones = [assemble(folder, threads=1, dtype="bf16") for folder in (kept, unpacked)]
    assert [backbone.quantized for backbone in backbones] == ["q4_0", ""]
    assert "as stored (q4_0)" in backbones[0].arithmetic
    assert [backbone.fingerprint for backbone in backbones] == marks


def test_a_kept_fingerprint_holds_for_unchanged_files(cache: Path, tmp_path: Path) -> None:
    folder = resolve(tiny_file(tmp_path), weights="stored").path
    weights, config = opened(folder), read_config(folder)
    mark = fingerprint(weights, config)
    file = folder / FINGERPRINT
    written = file.read_text()
    file.write_text(written.replace(mark, "0" * 16))
    assert known_fingerprint(folder, weights, config) == "0" * 16  # read, not computed
    (folder / "model.safetensors").touch()
    assert known_fingerprint(folder, weights, config) == mark
    for damaged in ("", "{}", "[]", '{"of": 1}'):
        file.write_text(damaged)
        assert known_fingerprint(folder, weights, config) == mark
    file.unlink()
    assert known_fingerprint(folder, weights, config) == mark


def test_what_cannot_be_kept_is_refused(cache: Path, tmp_path: Path) -> None:
    path = tiny_file(tmp_path)
    with pytest.raises(UsageError, match="weights is 'q9'; it must be stored, bf16, fp32, q8_0 or q4_k"):
        resolve(path, weights="q9")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="merged into unpacked weights"):
        resolve(f"{path}+{tmp_path / 'lora'}", weights="stored")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_fingerprint_rounds_blocks_as_unpacking_does(tmp_path: Path, dtype: str) -> None:
    weights = {name: Blocks.of(weight) for name, weight in quantizable(random_weights(CONFIG, 0), MIXED).items()}
    floats = {name: Blocks.of(weight.floats(getattr(torch, dtype))) for name, weight in weights.items()}
    kept = floats | {name: weight for name, weight in weights.items() if weight.type.quantized}
    marks = []
    for name, stored in (("kept", kept), ("unpacked", floats)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, "dtype": dtype}))
        save(stored, folder / "model.safetensors")
        marks.append(fingerprint(opened(folder), read_config(folder)))
        assert keeps_blocks(folder) == (name == "kept")
    assert marks[0] == marks[1]


def test_who_cannot_read_blocks_says_so(cache: Path, tmp_path: Path) -> None:
    folder = resolve(tiny_file(tmp_path), weights="stored").path
    with pytest.raises(UsageError, match="keeps quantized weights, and adapters are merged into unpacked ones"):
        merge(folder, tmp_path, tmp_path / "out", lambda stage, fraction: None)
    with pytest.raises(UsageError, match="keeps quantized weights, which cannot be trained"):
        trainable_model(folder, "full", 0, 0.0)


def test_a_method_that_adapts_the_model_gets_unpacked_weights(cache: Path, tmp_path: Path) -> None:
    llm = load(tiny_file(tmp_path), threads=1)
    assert llm.folder is not None
    assert keeps_blocks(llm.folder.path)
    counts_V = torch.ones(llm.backbone.config.vocab)
    for method in (Medusa2, Medusa):
        options = method.Training(heads=1, draft_vocab=0)
        module = new_module(method, llm, counts_V, options, 0, None)
        assert sum(each.numel() for each in module.parameters())
    kept, unpacked = sorted(folder.name for folder in (cache / "models").iterdir() if not folder.name.startswith("."))
    assert kept != unpacked


def test_a_listing_tells_what_is_kept_from_what_is_unpacked(foretell: Foretell, cache: Path, tmp_path: Path) -> None:
    path = tiny_file(tmp_path)
    for weights in ("stored", "bf16"):
        assert foretell("pull", path, "--weights", weights).code == 0
    rows = [json.loads(line) for line in foretell("models", "--json").out.splitlines()]
    assert sorted(row["source"] for row in rows if row["path"]) == ["gguf", "gguf, --weights bf16"]
    ran = foretell("generate", "hello", "-m", path, "-n", "3", "--weights", "stored", "--kernel", "eager")
    assert ran.code == 0
    assert "no weights of this model are multiplied as they are stored" in " ".join(ran.err.split())


@pytest.mark.real
def test_the_demo_model_as_it_is_stored_drafts_and_verifies_exactly() -> None:
    """Four- and eight-bit weights, trained heads that fit by fingerprint, batches, sampling, prompt lookup."""
    llm = load(weights="stored")
    assert isinstance(llm.backbone, CompiledBackbone) or not COMPILED
    assert llm.backbone.quantized == ("q4_1, q8_0" if COMPILED else "")
    said = [
        "Why is the sky blue?",
        "Write a haiku about rain.",
        "def add(a, b):",
        "List three fruits, then list them again.",
    ]
    requests = [
        (llm.encode(text), SamplingParams(max_new_tokens=48, temperature=0.8 * (i % 2), seed=i, logprobs=1))
        for i, text in enumerate(said)
    ]
    truth = plainly(llm.backbone, requests)
    for rows, (name, lookup) in enumerate(
        (("hydra++", True), ("medusa", False), ("hydra", False), ("kangaroo", True)), 1
    ):
        drafter = drafters.build(name, llm.backbone, lookup=lookup, nodes=12)
        outputs = finish(decoder_of(llm.backbone, drafter, max_rows=rows), requests)
        assert_same(outputs, truth, name)
        accepted = sum(len(output.ids) for output in outputs) / sum(output.statistics.steps for output in outputs)
        assert accepted > 1.4, name
