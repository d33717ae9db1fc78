"""The seam for stored types: a quantized one is a row, here GGUF's Q8_0, and keeps its blocks up to the kernels."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from random_backbones import COMPILED, same, using
from tiny_gguf import write_gguf
from tiny_models import opened, tiny_model

from foretell.backbone.cpu import library
from foretell.backbone.cpu.backbone import _interleave
from foretell.backbone.cpu.formats import FORMATS, Format, Numbers, PackedMatrix, exact_format, format_for
from foretell.backbone.load import assemble
from foretell.errors import ForetellError
from foretell.loading import blocks
from foretell.loading.blocks import TYPES, Blocks, BlockType
from foretell.loading.families import read_config
from foretell.loading.resolve import resolve
from foretell.loading.weights import fingerprint

Q8 = gguf.GGMLQuantizationType.Q8_0
SIZES: dict[str, Any] = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
MATRIX = "model.layers.1.self_attn.q_proj.weight"
compiled_only = pytest.mark.parametrize("kernel", COMPILED)


def unpacked(data: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(data.reshape(1, -1).numpy(), Q8)).reshape(*data.shape[:-1], -1)


ROW = BlockType("Q8_0", torch.uint8, numbers=32, items=34, decode=unpacked)


def quantized(weight: torch.Tensor) -> Blocks:
    return Blocks(ROW, torch.from_numpy(gguf.quantize(weight.numpy(), Q8)))


@pytest.fixture
def kept(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a converted GGUF file whose blocks are kept."""
    monkeypatch.setitem(TYPES, "Q8_0", ROW)
    return resolve(str(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", **SIZES), Q8)), weights="stored").path


@pytest.fixture
def floats(kept: Path, tmp_path: Path) -> Path:
    """The same numbers in float32."""
    weights, folder = opened(kept), tmp_path / "floats"
    folder.mkdir()
    (folder / "config.json").write_bytes((kept / "config.json").read_bytes())
    blocks.save({name: Blocks.of(weights[name].float()) for name in weights.shapes}, folder / "model.safetensors")
    return folder


def test_a_quantized_row_keeps_its_blocks_in_the_folder(kept: Path) -> None:
    weights, values = opened(kept), tiny_model("llama", **SIZES).state_dict()[MATRIX]
    stored = weights.blocks(MATRIX)
    assert (stored.type, stored.data.dtype, stored.shape) == (ROW, torch.uint8, tuple(values.shape))
    assert same(stored.data, quantized(values).data)  # the rows in the order of Hugging Face
    assert same(weights[MATRIX], unpacked(stored.data))
    assert weights.dtype("model.norm.weight") == torch.bfloat16  # floats are rounded to the folder's type as ever


def test_a_file_is_converted_anew_once_its_type_has_a_row(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(kept.parents[2] / "tiny.gguf")
    monkeypatch.delitem(TYPES, "Q8_0")
    before = resolve(path, weights="stored").path
    assert opened(before).blocks(MATRIX).type is TYPES["BF16"]
    monkeypatch.setitem(TYPES, "Q8_0", ROW)
    assert resolve(path, weights="stored").path == kept != before


def test_blocks_have_the_fingerprint_of_their_numbers_in_bfloat16(kept: Path, floats: Path) -> None:
    weights = opened(floats)
    blocks.save({name: Blocks.of(weights[name].bfloat16()) for name in weights.shapes}, floats / "model.safetensors")
    one, other = (fingerprint(opened(folder), read_config(folder)) for folder in (kept, floats))
    assert one == other


@pytest.mark.parametrize("kernel", ["eager", *COMPILED])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_blocks_without_a_format_are_multiplied_as_floats(
    kernel: str, dtype: str, kept: Path, floats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FORMATS, "q8_0")
    one, other = (assemble(folder, kernel=kernel, dtype=dtype, threads=1) for folder in (kept, floats))
    assert same(*(backbone.logits(backbone.norm(backbone.embed(torch.arange(9)))) for backbone in (one, other)))


@compiled_only
def test_a_format_that_keeps_blocks_gets_them(
    kernel: str, kept: Path, floats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them: fused and interleaved, but for an embedding that is only read."""
    seen: list[Blocks] = []

    def numbers(weight: Blocks) -> Numbers:
        seen.append(weight)
        return weight.floats(torch.bfloat16), None

    monkeypatch.setitem(FORMATS, "q8_0", Format("bf16", torch.bfloat16, numbers, stored="Q8_0"))
    one, other = (assemble(folder, kernel=kernel, dtype="bf16", threads=1) for folder in (kept, floats))
    config = read_config(kept)
    assert [weight.type for weight in seen] == [ROW] * (4 * config.layers + 1)
    assert seen[0].shape == (config.q_width + 2 * config.kv_width, config.hidden)
    assert same(*(backbone.logits(backbone.norm(backbone.embed(torch.arange(9)))) for backbone in (one, other)))


@pytest.mark.parametrize("rows", [torch.cat, _interleave])
def test_rows_of_blocks_are_moved_as_rows_of_numbers(rows: Callable[[list[torch.Tensor]], torch.Tensor]) -> None:
    pair = [quantized(torch.randn(40, 64)) for _ in range(2)]  # rows of zeros fill 40 up to 64
    joined = Blocks.join(pair, rows)
    assert joined.type is ROW
    assert same(joined.floats(), rows([weight.floats() for weight in pair]))


def test_weights_of_different_types_are_joined_as_floats_that_hold_both() -> None:
    one, other = quantized(torch.randn(8, 32)), torch.randn(8, 32).bfloat16()
    joined = Blocks.join([one, Blocks.of(other)])
    assert joined.type is TYPES["F32"]
    assert same(joined.floats(), torch.cat([one.floats(), other.float()]))


def test_pieces_are_whole_blocks_in_order() -> None:
    weight = quantized(torch.randn(4, 64))
    pieces = list(weight.pieces(100))
    assert [len(piece) for piece in pieces] == [96, 96, 64]
    assert same(torch.cat(pieces), weight.floats().flatten())


def test_blocks_that_do_not_fill_the_shape_are_refused(kept: Path) -> None:
    path = kept / "model.safetensors"
    weights = opened(kept)
    stored = {name: weights.blocks(name) for name in weights.shapes}
    stored[MATRIX] = replace(stored[MATRIX], data=stored[MATRIX].data[:, :-1].clone())
    blocks.save(stored, path)
    with pytest.raises(ForetellError, match=rf"{MATRIX} has shape \(32, 33\)"):
        opened(kept)


def test_the_format_of_plain_floats_is_that_of_the_model() -> None:
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for stored in (torch.float32, torch.float16, torch.bfloat16):
            weight = Blocks.of(torch.zeros(2, 2, dtype=stored))
            assert format_for(weight, dtype) is exact_format(dtype) is FORMATS[name]
            assert format_for(weight, dtype, packed=False) is FORMATS[f"{name}_rows"]
    with pytest.raises(TypeError, match=r"not torch\.float16"):
        format_for(Blocks.of(torch.zeros(2, 2).half()))
    with pytest.raises(TypeError, match=r"weights are .* not torch\.int8"):
        Blocks.of(torch.zeros(2, 2, dtype=torch.int8))


@compiled_only
def test_rows_that_differ_between_python_and_the_kernels_are_refused(kernel: str) -> None:
    """The kernels would read beyond the end of what they are given."""
    weight, right = torch.randn(40, 8), FORMATS["bf16"]
    wrong = {
        "1280 bytes to be packed, the other reads 640 ": replace(right, numbers=FORMATS["fp32"].numbers),
        "320 bytes to be packed, the other reads 640 ": replace(right, numbers=FORMATS["int8"].numbers),
        "320 bytes that stay as they are, the other reads 640 ": replace(
            FORMATS["bf16_rows"], numbers=FORMATS["int8"].numbers
        ),
        "640 bytes that stay as they are, .* makes panels of 4096": replace(right, packed=False),
        "640 bytes to be packed, .* makes panels of 0": replace(FORMATS["bf16_rows"], packed=True),
    }
    with using(kernel):
        for sentence, row in wrong.items():
            with pytest.raises(ValueError, match=f"formats.py and formats.inc differ: .*{sentence}"):
                PackedMatrix(weight, row, library.default())
