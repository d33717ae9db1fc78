"""Drafters on disk: what is stored small is read as what it stands for."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_medusa import VOCAB, WIDTH, backbone_of
from trainables import trainable

from foretell import drafters
from foretell.drafting import checkpoint
from foretell.drafting.checkpoint import Checkpoint
from foretell.errors import ForetellError, UsageError
from foretell.loading import lora, rounded
from foretell.loading.catalog import FORMER_FINGERPRINTS, current


def test_what_ships_is_light() -> None:
    files = [file for shipped in (checkpoint.SHIPPED, lora.SHIPPED) for file in shipped.glob("*/*.safetensors")]
    sizes = [file.stat().st_size / (1 << 20) for file in files]
    assert len(sizes) >= 5
    assert max(sizes) <= 24
    assert sum(sizes) <= 96


@pytest.mark.parametrize("coarseness", [0.0, 0.1, 0.3])
def test_matrices_stored_small_are_read_as_what_they_stand_for(tmp_path: Path, coarseness: float) -> None:
    torch.manual_seed(0)
    large, stack = torch.randn(300, 400), torch.randn(3, 200, 150).bfloat16()
    large[7] = 0
    tensors = {"large": large, "stack": stack, "bias": torch.randn(4, 500), "vocabulary": torch.arange(70_000).int()}
    kind = Checkpoint(method="medusa", backbone="x", fingerprint="x", hidden=1, vocab=70_000, arch={})
    steps = checkpoint.rounding(tensors, coarseness)
    assert steps.keys() == {"large", "stack"}
    kind.save(tmp_path / "small", tensors, coarseness)
    _, back = checkpoint.load(tmp_path / "small")
    assert back.keys() == tensors.keys()
    for name in ("bias", "vocabulary"):
        assert torch.equal(back[name], tensors[name])
    for name in ("large", "stack"):
        numbers = tensors[name].float()
        rms = numbers.square().mean(-1, keepdim=True).sqrt()
        step = (numbers.abs().amax(-1, keepdim=True) / 127).maximum(coarseness * rms)
        assert ((back[name] - numbers).abs() <= 0.51 * step).all()


def test_eight_bits_of_format_1_are_read(tmp_path: Path) -> None:
    multiples, steps = torch.randint(-127, 128, (3, 20, 30), dtype=torch.int8), torch.rand(3, 20)
    save_file({"stack": multiples, "stack.scale": steps}, tmp_path / "old.safetensors")
    assert torch.equal(rounded.load(tmp_path / "old.safetensors")["stack"], multiples.float() * steps[..., None])


@pytest.mark.parametrize(
    "damage", ["no steps", "short", "another shape", "not coded", "no shape", "a tensor of floats"]
)
def test_damage_to_a_rounded_tensor_names_it(tmp_path: Path, damage: str) -> None:
    numbers, path = torch.randn(40, 50), tmp_path / "small.safetensors"
    rounded.save(path, {"matrix": numbers}, {"matrix": rounded.steps(numbers)})
    stored, about = load_file(path), {"matrix": "int8 zlib 40 50"}
    if damage == "no steps":
        del stored["matrix.scale"]
    if damage == "short":
        stored["matrix"] = stored["matrix"][:-9]
    if damage == "another shape":
        about["matrix"] = "int8 zlib 40 51"
    if damage == "not coded":
        stored["matrix"] = stored["matrix"] ^ 255
    if damage == "no shape":
        about["matrix"] = "int8 zlib"
    if damage == "a tensor of floats":
        stored["matrix"] = stored["matrix"].float()
    save_file(stored, path, about)
    with pytest.raises((KeyError, ValueError), match="matrix"):
        rounded.load(path)


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
    assert NOW in told.values()
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
