"""Weights that were packed once are mapped by the next load: the same bits, from one file beside the model."""

import json
import os
from pathlib import Path

import pytest
import torch
from quantized import QUANTS, quantizable
from random_backbones import COMPILED, prefilled, same
from test_quants import MIXED, SIZES

from foretell.backbone import load as loading
from foretell.backbone.cpu.backbone import CompiledBackbone
from foretell.backbone.cpu.panel_file import PanelFile
from foretell.backbone.load import assemble
from foretell.errors import ForetellError
from foretell.loading.blocks import Blocks, save
from foretell.loading.families import model_config
from foretell.testing import random_weights

pytestmark = pytest.mark.skipif(not COMPILED, reason="panels are packed for the compiled kernels")


def stored_model(folder: Path, tied: bool, kinds: tuple[str, ...] = MIXED, seed: int = 0) -> Path:
    """A model with every quantized type, a bias where its family has one, and an embedding that may be the head."""
    sizes = {"model_type": "qwen2", **SIZES, "tie_word_embeddings": tied}
    weights = quantizable(random_weights(model_config(sizes), seed), kinds)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(sizes))
    save({name: Blocks.of(weight) for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


def compiled(folder: Path, kernel: str, dtype: str = "bf16") -> CompiledBackbone:
    backbone = assemble(folder, kernel=kernel, dtype=dtype, threads=1)
    assert isinstance(backbone, CompiledBackbone)
    return backbone


def logits(backbone: CompiledBackbone) -> torch.Tensor:
    return backbone.logits(backbone.norm(prefilled(backbone, torch.arange(9))[1]))


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_next_load_maps_what_this_one_packed(tmp_path: Path, kernel: str, dtype: str, tied: bool) -> None:
    folder = stored_model(tmp_path, tied)
    packed = logits(compiled(folder, kernel, dtype))
    (file,) = folder.glob("panels-*")
    written = file.stat().st_mtime_ns
    mapped = compiled(folder, kernel, dtype)
    assert mapped._file is not None
    assert mapped._file.mapped
    assert same(logits(mapped), packed)
    assert file.stat().st_mtime_ns == written
    assert compiled(folder, kernel, dtype).quantized == mapped.quantized


@pytest.mark.parametrize("kind", QUANTS)
def test_panels_are_as_large_as_what_is_stored(tmp_path: Path, kind: str) -> None:
    folder = stored_model(tmp_path, tied=True, kinds=(kind,))
    compiled(folder, COMPILED[0])
    (file,) = folder.glob("panels-*")
    assert file.stat().st_size <= 1.1 * (folder / "model.safetensors").stat().st_size


def _truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 64)


def _garbled(file: Path) -> None:
    file.write_bytes(b"\xff" * 4096)


def _of_other_code(file: Path) -> None:
    data = file.read_bytes()
    at = data.index(b'"source"') + 20
    file.write_bytes(data[:at] + (b"1" if data[at : at + 1] == b"0" else b"0") + data[at + 1 :])


@pytest.mark.parametrize("damage", [_truncated, _garbled, _of_other_code])
def test_a_file_that_is_not_whole_or_of_other_code_is_written_anew(tmp_path: Path, damage: object) -> None:
    folder = stored_model(tmp_path, tied=True)
    packed = logits(compiled(folder, COMPILED[0]))
    (file,) = folder.glob("panels-*")
    whole = file.read_bytes()
    assert callable(damage)
    damage(file)
    again = compiled(folder, COMPILED[0])
    assert again._file is not None
    assert not again._file.mapped
    assert same(logits(again), packed)
    assert file.read_bytes() == whole


def test_other_weights_are_packed_anew(tmp_path: Path) -> None:
    folder = stored_model(tmp_path, tied=True)
    before = logits(compiled(folder, COMPILED[0]))
    stored_model(tmp_path, tied=True, seed=1)
    os.utime(folder / "model.safetensors", ns=(1, 1))  # whatever the clock's resolution
    assert not same(logits(compiled(folder, COMPILED[0])), before)


def test_weights_without_quantized_blocks_have_no_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    weights = random_weights(model_config({"model_type": "llama", **SIZES}), 0)
    save({name: Blocks.of(weight) for name, weight in weights.items()}, tmp_path / "model.safetensors")
    compiled(tmp_path, COMPILED[0])
    assert not list(tmp_path.glob("panels-*"))


def test_where_nothing_may_be_written_a_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stored_model(tmp_path / "model", tied=True)
    (tmp_path / "file").touch()
    monkeypatch.setattr(
        loading, "_panel_file", lambda folder, *rest: PanelFile(tmp_path / "file/panels.safetensors", "source")
    )
    assert logits(compiled(folder, COMPILED[0])).isfinite().all()


def test_panels_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "panels.safetensors"
    written = PanelFile(path, "source")
    written.take("q8_0 32 32", 1152).zero_()
    written.keep()
    assert PanelFile(path, "source").take("q8_0 32 32", 1152).count_nonzero() == 0
    for name, count in (("q4_0 32 32", 1152), ("q8_0 32 32", 1088)):
        with pytest.raises(ForetellError, match="does not hold the panels of this model; delete it"):
            PanelFile(path, "source").take(name, count)
