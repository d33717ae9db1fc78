"""Drafters on disk: what is written in eight bits a number is read as what it stands for."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_medusa import VOCAB, WIDTH, backbone_of
from trainables import trainable

from foretell import drafters
from foretell.drafting import checkpoint
from foretell.drafting.checkpoint import Checkpoint
from foretell.errors import ForetellError, UsageError
from foretell.loading import lora
from foretell.loading.catalog import FORMER_FINGERPRINTS, current


def test_what_ships_is_light() -> None:
    files = [file for shipped in (checkpoint.SHIPPED, lora.SHIPPED) for file in shipped.glob("*/*.safetensors")]
    sizes = [file.stat().st_size / (1 << 20) for file in files]
    assert len(sizes) >= 5
    assert max(sizes) <= 36
    assert sum(sizes) <= 120


def test_eight_bits_a_number_are_read_as_what_they_stand_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    large, stack = torch.randn(300, 400), torch.randn(3, 200, 150).bfloat16()
    large[7] = 0
    tensors = {"large": large, "stack": stack, "bias": torch.randn(4, 500), "vocabulary": torch.arange(70_000).int()}
    small = checkpoint.in_int8(tensors)
    assert {name for name, each in small.items() if each.dtype == torch.int8} == {"large", "stack"}
    kind = Checkpoint(method="medusa", backbone="x", fingerprint="x", hidden=1, vocab=70_000, arch={})
    kind.save(tmp_path / "small", small)
    _, back = checkpoint.load(tmp_path / "small")
    assert back.keys() == tensors.keys()
    for name in ("bias", "vocabulary"):
        assert torch.equal(back[name], tensors[name])
    for name in ("large", "stack"):
        step = tensors[name].float().abs().amax(-1, keepdim=True) / 127
        assert ((back[name] - tensors[name].float()).abs() <= 0.501 * step).all()
    again = checkpoint.in_int8(back)
    assert all(torch.equal(again[name], small[name]) for name in ("large", "stack"))  # nothing is lost twice

    kind.save(tmp_path / "lacks", {name: each for name, each in small.items() if name != "large.scale"})
    with pytest.raises(ForetellError, match="is damaged .*large.scale"):
        checkpoint.load(tmp_path / "lacks")


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_all_who_may_read_its_config_may_read_its_tensors(tmp_path: Path, mask: int) -> None:
    kind = Checkpoint(method="medusa", backbone="x", fingerprint="x", hidden=1, vocab=9, arch={})
    before = os.umask(mask)
    try:
        kind.save(tmp_path / "heads", {"bias": torch.zeros(3)})
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "heads").iterdir()}
    assert modes == dict.fromkeys(["config.json", "model.safetensors"], 0o666 & ~mask)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 9999])
def test_a_config_that_is_none_is_damage_that_nothing_can_be_fetched_for(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ForetellError, match=r"is damaged \(.+\); copy or train it again\.$") as error:
        checkpoint.load(tmp_path)
    assert "\n" not in str(error.value)
    assert "fetch" not in str(error.value)


DAMAGES: dict[str, dict[str, Any]] = {
    "no numbers of a module": {"arch": []}, "none at all": {"arch": None}, "a path without ranks": {"paths": [[]]},
    "a path of words": {"paths": [["a"]]}, "no list of paths": {"paths": None}, "ranks in no list": {"paths": [1]},
    "a rank below the first": {"paths": [[-1]]}, "a scale of one number": {"calibration": [[1.0]] * 3},
    "a scale that is none": {"calibration": [[float("nan"), 0.0]] * 3}, "scales of words": {"calibration": ["ab"] * 3},
    "no scales": {"calibration": None}, "a size that is none": {"tokens_per_step": {"a": 1.0}},
    "sizes in a list": {"tokens_per_step": [1]}, "tokens of no number": {"tokens_per_step": {"8": "x"}},
    "a width of none": {"hidden": "wide"}, "no vocabulary": {"vocab": 0},
}  # fmt: skip
TAPS: list[Any] = [["a"], None, 3, [-7, 1], [1.0, 2.0]]
IDS = {"too large": [1, VOCAB], "far too large": [1, 10**9], "negative": [-1, 2], "twice the same": [3, 3],
       "out of order": [5, 4], "no numbers": [1.0, 2.0]}  # fmt: skip


@pytest.mark.parametrize("method", ["medusa", "hydra", "hydra++"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_config_that_no_training_wrote_is_one_sentence(tmp_path: Path, method: str, damage: dict[str, Any]) -> None:
    refused_as_damaged(tmp_path, method, damage)


@pytest.mark.parametrize("method", ["medusa", "hydra", "hydra++"])
def test_numbers_of_a_module_that_it_cannot_have_are_one_sentence(tmp_path: Path, method: str) -> None:
    arch = fresh(method).checkpoint()[1]
    for taps in TAPS:
        refused_as_damaged(tmp_path, method, {"arch": arch | {"taps": taps}})
    for name in arch:
        refused_as_damaged(tmp_path, method, {"arch": {key: value for key, value in arch.items() if key != name}})
    if method == "hydra++":
        refused_as_damaged(tmp_path, method, {"arch": arch | {"prefix": False}})


@pytest.mark.parametrize("method", ["medusa", "hydra"])
@pytest.mark.parametrize("ids", IDS.values(), ids=list(IDS))
def test_a_draft_vocabulary_of_other_tokens_never_reaches_the_kernels(
    tmp_path: Path, method: str, ids: list[float]
) -> None:
    rest = torch.arange(VOCAB - 38, VOCAB, dtype=torch.tensor(ids).dtype)
    refused_as_damaged(tmp_path, method, {}, {"vocabulary": torch.cat([torch.tensor(ids), rest])})


@pytest.mark.parametrize("method", ["medusa", "hydra"])
def test_weights_that_are_no_numbers_are_one_sentence(tmp_path: Path, method: str) -> None:
    head = fresh(method).checkpoint()[0]["head"].clone()
    head[0, 3, 5] = math.nan
    refused_as_damaged(tmp_path, method, {}, {"head": head})


FORMER, NOW = next(iter(FORMER_FINGERPRINTS.items()))


def test_a_drafter_from_before_belongs_to_the_catalogue_model_and_to_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = backbone_of()
    tensors, arch = fresh("medusa").checkpoint()
    kind = Checkpoint("medusa", "tiny", FORMER, WIDTH, VOCAB, arch, [[0]])
    kind.save(tmp_path / "heads", tensors)
    backbone.fingerprint = NOW
    assert checkpoint.find("medusa", backbone, str(tmp_path / "heads"))[0].fingerprint == NOW
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path)
    assert checkpoint.shipped(backbone) == {"medusa": tmp_path / "heads"}
    for other in (FORMER, "another"):  # FORMER: of another model, in which nobody looked at o_proj
        backbone.fingerprint = other
        assert checkpoint.shipped(backbone) == {}
        with pytest.raises(UsageError, match=rf"fingerprint {NOW}\), not for this model \({other}\)"):
            checkpoint.find("medusa", backbone, str(tmp_path / "heads"))


def test_what_ships_has_todays_fingerprints() -> None:
    told = {file: json.loads(file.read_text())["fingerprint"] for file in checkpoint.SHIPPED.glob("*/config.json")}
    assert set(told.values()) == set(FORMER_FINGERPRINTS.values())
    assert all(current(each) == each for each in told.values())


def fresh(method: str) -> Any:
    counts = torch.arange(VOCAB).flip(0)
    return trainable(drafters.drafter_class(method), backbone_of(), counts, heads=3, draft_vocab=40)


def refused_as_damaged(folder: Path, method: str, damage: dict[str, Any], other: dict[str, Any] | None = None) -> None:
    """The checkpoint of fresh heads is taken, and with this damage is not."""
    backbone = backbone_of()
    tensors, arch = fresh(method).checkpoint()
    good: dict[str, Any] = {"arch": arch, "paths": [[0], [0, 0]], "calibration": [[1.0, 0.0]] * 3}
    good |= {"hidden": WIDTH, "vocab": VOCAB, "tokens_per_step": {"8": 1.5}}
    for change, tensor in (({}, {}), (damage, other or {})):
        kind = Checkpoint(method=method, backbone="tiny", fingerprint=backbone.fingerprint, **(good | change))
        kind.save(folder / "heads", tensors | tensor)
        if not (change or tensor):
            drafters.build(method, backbone, checkpoint=str(folder / "heads"))
    with pytest.raises(ForetellError, match="is damaged .*; copy or train it again") as error:
        drafters.build(method, backbone, checkpoint=str(folder / "heads"))
    assert "\n" not in str(error.value)
