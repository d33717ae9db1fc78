"""Drafters on disk: what is written in eight bits a number is read as what it stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foretell.backbone import adapters
from foretell.drafters import checkpoint
from foretell.drafters.checkpoint import Checkpoint
from foretell.errors import ForetellError


def test_what_ships_is_light() -> None:
    files = [file for shipped in (checkpoint.SHIPPED, adapters.SHIPPED) for file in shipped.glob("*/*.safetensors")]
    sizes = [file.stat().st_size / (1 << 20) for file in files]
    assert len(sizes) >= 5
    assert max(sizes) <= 36
    assert sum(sizes) <= 120


def test_eight_bits_a_number_are_read_as_what_they_stand_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    large, stack = torch.randn(300, 400), torch.randn(3, 200, 150).bfloat16()
    large[7] = 0
    tensors = {"large": large, "stack": stack, "bias": torch.randn(4, 500), "vocabulary": torch.arange(70_000).int()}
    small = checkpoint.eighths(tensors)
    assert {name for name, each in small.items() if each.dtype == torch.int8} == {"large", "stack"}
    kind = Checkpoint(method="medusa", backbone="x", fingerprint="x", hidden=1, vocab=1, arch={})
    kind.save(tmp_path / "small", small)
    _, back = checkpoint.load(tmp_path / "small")
    assert back.keys() == tensors.keys()
    for name in ("bias", "vocabulary"):
        assert torch.equal(back[name], tensors[name])
    for name in ("large", "stack"):
        step = tensors[name].float().abs().amax(-1, keepdim=True) / 127
        assert ((back[name] - tensors[name].float()).abs() <= 0.501 * step).all()
    again = checkpoint.eighths(back)
    assert all(torch.equal(again[name], small[name]) for name in ("large", "stack"))  # nothing is lost twice

    kind.save(tmp_path / "lacks", {name: each for name, each in small.items() if name != "large.scale"})
    with pytest.raises(ForetellError, match="is damaged .*large.scale"):
        checkpoint.load(tmp_path / "lacks")
