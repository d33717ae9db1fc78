"""`foretell train`: from data to a drafter that decodes, interrupted and taken up again, and every mistake one line."""

import json
import lzma
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Foretell, Ran, ids_of
from tiny_models import save_tiny
from trainables import once, trainable

from foretell.api import load
from foretell.cli import main
from foretell.drafters import drafter_class
from foretell.drafting import checkpoint
from foretell.drafting.checkpoint import Checkpoint
from foretell.train import loop
from foretell.train.data import ConversationStore, Distilled
from foretell.train.evaluation import SIZES
from foretell.train.features import ComputedFeatures
from foretell.train.replay import tokens_per_step_by_size
from foretell.train.trainer import Trainer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(scope="module")
def other(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of the same sizes with other weights."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    save_tiny(folder, vocab_size=257, max_position_embeddings=512, eos_token_id=256, tie_word_embeddings=True, seed=1)
    return str(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    path.write_text("".join(json.dumps({"turns": [word, "and?"][: 1 + i % 2]}) + "\n" for i, word in enumerate(words)))
    return str(path)


@pytest.fixture(scope="module")
def distilled(tiny: str, prompts: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of data that the tiny model wrote."""
    folder = tmp_path_factory.mktemp("data") / "data"
    with pytest.raises(SystemExit) as left:
        main(["distill", "-m", tiny, *TINY, "--prompts", prompts, "--out", str(folder), "-n", "40"])
    assert not left.value.code
    return str(folder)


@pytest.fixture
def data(distilled: str, tmp_path: Path) -> str:
    """A copy to write features into, or to spoil."""
    shutil.copytree(distilled, tmp_path / "data")
    return str(tmp_path / "data")


TINY = ("--dtype", "fp32", "--threads", "1")
FEW = ("--epochs", "8", "--batch-tokens", "300", "--lr", "0.01", "-o", "heads=3", "-o", "draft_vocab=100")


def command(model: str, data: str, out: Path, *more: str) -> list[str]:
    return ["train", "medusa", "-m", model, *TINY, "--data", data, "--out", str(out), *FEW, *more]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def replayed(model: str, data: str, folder: Path) -> dict[str, float]:
    """What a drafter earns, by tree size, in every second conversation: trees were searched in the others."""
    llm = load(model, "medusa", dtype="fp32", threads=1, checkpoint=str(folder))
    features = ComputedFeatures(llm.backbone, ConversationStore.open(Path(data)).conversations, llm.drafter.taps)
    sizes = [size for size in SIZES if size <= llm.drafter.max_nodes]
    return tokens_per_step_by_size(llm.drafter, features, range(1, len(features.data), 2), sizes, lambda done: None)


def test_from_a_model_alone_to_a_trained_drafter(
    foretell: Foretell, tiny: str, prompts: str, data: str, tmp_path: Path
) -> None:
    ran = foretell(*command(tiny, data, tmp_path / "out"))
    assert (ran.code, ran.out) == (0, "")
    drafter = tmp_path / "out" / "drafter"
    assert re.search(r"head 3: \d+\.\d% first, \d+\.\d% among five\n", ran.err)
    assert re.search(r"tokens per step on training text, for none was held out: 4 nodes [1-4]\.\d\d", ran.err)
    words = ["foretell", "chat", "--model", tiny, "--drafter", "medusa", "-o", f"checkpoint={drafter}"]
    assert ran.err.endswith(f"The drafter is in {drafter}; use it with {shlex.join(words)}\n")
    used = foretell(*words[1:], *TINY, "-n", "4", stdin=b"hi\n")
    assert (used.code, "error" in used.err) == (0, False)
    saved, tensors = checkpoint.load(drafter)
    assert saved.arch == {"heads": 3, "layers": 2, "output": "tied", "taps": [1, 2], "root": True}
    assert len(tensors["vocabulary"]) == 100
    assert saved.provenance["data"] == [ConversationStore.open(Path(data)).manifest]
    assert len(saved.calibration) == 3
    assert saved.tokens_per_step == replayed(tiny, data, drafter)
    assert {str(size) for size in saved.tokens_per_step} == saved.provenance["fixed_trees"].keys()
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path(data).glob("features-*"))  # nothing is kept unless asked for
    options = ["-m", tiny, *TINY, "--prompts", prompts, "-n", "40", "--json"]
    for sampling in ([], ["-t", "0.9", "--seed", "3"]):
        plain = foretell("generate", *options, *sampling).lines
        for rows in ("1", "3"):
            ours = foretell(
                "generate",
                *options,
                *sampling,
                "-b",
                rows,
                "-d",
                "medusa",
                "-o",
                f"checkpoint={drafter}",
                "-o",
                "nodes=4",
                "--no-adapt",
            ).lines
            assert ids_of(ours) == ids_of(plain)
            assert all(line["drafted"] for line in ours)
            if not sampling:
                assert sum(line["steps"] for line in ours) < 0.9 * sum(line["steps"] for line in plain)


def test_an_interrupted_command_ends_with_the_same_drafter(
    foretell: Foretell, tiny: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert foretell(*command(tiny, data, tmp_path / "straight")).code == 0
    monkeypatch.setattr(loop, "LOG_STEPS", 1)
    for after in (3, 5):
        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "update", once(Trainer.update, after))
            ran = foretell(*command(tiny, data, tmp_path / "cut"))
        assert ran.code == 130
        assert ran.err.endswith("interrupted; the same command goes on from here\n")
        assert "Traceback" not in ran.err
        assert not (tmp_path / "cut" / "drafter").exists()
    assert foretell(*command(tiny, data, tmp_path / "cut")).code == 0
    ours, straight = files(tmp_path / "cut" / "drafter"), files(tmp_path / "straight" / "drafter")
    assert ours["model.safetensors"] == straight["model.safetensors"]
    assert (
        checkpoint.load(tmp_path / "cut" / "drafter")[0].paths
        == checkpoint.load(tmp_path / "straight/drafter")[0].paths
    )
    assert foretell(*command(tiny, data, tmp_path / "cut")).code == 0  # nothing is left to do
    assert files(tmp_path / "cut" / "drafter")["model.safetensors"] == straight["model.safetensors"]
    ran = foretell(*command(tiny, data, tmp_path / "cut", "--seed", "1"))
    refused(ran, 2, r"holds a run with seed 0 \(not 1\); go on with the same")


@pytest.fixture(scope="module")
def trained(tiny: str, distilled: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of heads of Medusa for the tiny model."""
    folder = tmp_path_factory.mktemp("trained") / "medusa"
    with pytest.raises(SystemExit) as left:
        main(command(tiny, distilled, folder))
    assert not left.value.code
    return folder


def begun(model: str, data: str, out: Path, *more: str) -> list[str]:
    """Hydra in one step too small to change anything."""
    hardly = ("--epochs", "0.001", "--lr", "1e-8", "-o", "heads=3", "-o", "draft_vocab=100", "-o", "layers=2")
    return ["train", "hydra", "-m", model, *TINY, "--data", data, "--out", str(out), *hardly, *more]


def copied(drafter: Path, to: Path, **changes: Any) -> str:
    """The checkpoint with other words about it."""
    found, tensors = checkpoint.load(drafter)
    replace(found, **changes).save(to, tensors)
    return str(to)


def test_hydra_may_begin_with_what_medusa_has_learnt(
    foretell: Foretell, tiny: str, data: str, trained: Path, tmp_path: Path
) -> None:
    told = "foretell train medusa --seed 5"
    start = copied(trained / "drafter", tmp_path / "start", provenance={"command": told})
    ran = foretell(*begun(tiny, data, tmp_path / "out", "--start", start))
    assert (ran.code, ran.out) == (0, "")
    saved, tensors = checkpoint.load(tmp_path / "out" / "drafter")
    digest = checkpoint.fingerprint(checkpoint.load(Path(start))[1])
    assert (saved.provenance["start"], saved.provenance["started_by"]) == (digest, [told])
    assert list(saved.tokens_per_step) == list(SIZES)
    assert all(1 <= tokens <= 4 for tokens in saved.tokens_per_step.values())
    medusa = checkpoint.load(trained / "drafter")[1]
    for k in range(3):
        theirs = medusa["weight.0"][k].float()
        ours = tensors[f"first.{k}"].float()
        torch.testing.assert_close(ours[:, : theirs.shape[1]], theirs, rtol=0, atol=1e-6)
        assert theirs.abs().max() > 1e-3
        assert ours[:, theirs.shape[1] :].abs().sum() <= 1e-6 * ours.numel()  # the path says nothing yet
    torch.testing.assert_close(tensors["head"].float(), medusa["head"].float(), rtol=0, atol=1e-6)

    assert foretell(*begun(tiny, data, tmp_path / "out", "--start", start)).code == 0  # nothing is left to do
    before = files(tmp_path / "out")
    ran = foretell(*begun(tiny, data, tmp_path / "out"))
    refused(ran, 2, rf"holds a run with start {digest} \(not None\); go on with the same")
    found, tensors = checkpoint.load(trained / "drafter")
    replace(found, provenance={"command": told}).save(tmp_path / "other", tensors | {"bias": tensors["bias"] + 1})
    ran = foretell(*begun(tiny, data, tmp_path / "out", "--start", str(tmp_path / "other")))
    refused(ran, 2, rf"holds a run with start {digest} \(not \w+\); go on with the same")
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changes", "start", "more", "code", "sentence"),
    [
        ({"fingerprint": "other"}, "{start}", [], 2, r"fingerprint other\), .*, or allow it with --other-model\."),
        ({}, "./nowhere", [], 2, "here is no folder ./nowhere"),
        ({}, "{start}/..", [], 1, "holds no drafter"),
        ({}, "medusa", [], 2, "No medusa drafter comes with foretell for this model"),
        (
            {},
            "{start}",
            ["-o", "layers=1"],
            2,
            "start has 2 blocks in each head, these would have 1 block; train with -o layers=2",
        ),
        ({}, "{start}", ["-o", "taps=1"], 2, "start has other inputs than these heads; train with the same"),
        (
            {"method": "hydra++"},
            "{start}",
            [],
            2,
            r"is a hydra\+\+ drafter, with which hydra cannot begin; begin with one of medusa, medusa2, hydra, or",
        ),
        ({"arch": {}}, "{start}", [], 1, "is damaged, or of another method"),
    ],
)
def test_a_start_that_does_not_fit_is_one_sentence(
    foretell: Foretell, tiny: str, data: str, trained: Path, tmp_path: Path, changes: dict[str, Any], start: str,
    more: list[str], code: int, sentence: str,
) -> None:  # fmt: skip
    where = copied(trained / "drafter", tmp_path / "start", **changes)
    ran = foretell(*begun(tiny, data, tmp_path / "out", "--start", start.format(start=where), *more))
    refused(ran, code, sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "options"), [("hydra", {}), ("hydra++", {"linear_tail": True}), ("medusa", {"output": "own"})]
)
def test_what_is_not_said_of_a_start_is_as_it_has_it(
    foretell: Foretell, tiny: str, data: str, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    kind, llm = drafter_class(method), load(tiny, dtype="fp32", threads=1)
    odd = {"heads": 2, "layers": 3, "taps": 1} | options
    tensors, arch = trainable(
        kind, llm.backbone, torch.ones(llm.backbone.config.vocab), draft_vocab=100, **odd
    ).checkpoint()
    size = {"hidden": llm.backbone.config.hidden, "vocab": llm.backbone.config.vocab}
    made = Checkpoint(method=method, backbone=tiny, fingerprint=llm.backbone.fingerprint, arch=arch, **size)
    made.save(tmp_path / "start", tensors)
    hardly = ["--epochs", "0.001", "--lr", "1e-8", "-o", "draft_vocab=100", "--start", str(tmp_path / "start")]
    given = ["train", method, "-m", tiny, *TINY, "--data", data, "--out", str(tmp_path / "out"), *hardly]
    ran = foretell(*given)
    assert (ran.code, ran.out) == (0, ""), ran.err
    found = checkpoint.load(tmp_path / "out/drafter")[0]
    assert found.arch == arch
    assert found.provenance["options"].items() >= odd.items()
    assert foretell(*given).code == 0  # nothing is left to do


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("hidden_transfer", ["steps=2", "adapters=3", "output=tied"]),
        ("m2r2", ["exit=1", "rank=4", "output=tied"]),
        ("hamburger", ["blocks=1", "positions=1"]),
    ],
)
def test_what_drafts_in_hidden_streams_trains_and_drafts(
    foretell: Foretell, tiny: str, data: str, tmp_path: Path, method: str, options: list[str]
) -> None:
    """From data to trees whose size follows from what training measured: no option of decoding is given."""
    given = [word for option in options for word in ("-o", option)]
    ours = ["-m", tiny, *TINY, "--data", data, "--out", str(tmp_path / "out"), "--epochs", "3", "--lr", "0.01"]
    ran = foretell("train", method, *ours, *given)
    assert ran.code == 0, ran.err
    found = checkpoint.load(tmp_path / "out/drafter")[0]
    assert max(found.tokens_per_step.values()) > 1
    drafts = ["-d", method, "-o", f"checkpoint={tmp_path / 'out' / 'drafter'}", "--no-adapt"]
    say = ["generate", "hi", "-m", tiny, *TINY, "--json", "-n", "24", "--ignore-eos"]
    fast, plain = foretell(*say, *drafts), foretell(*say)
    assert fast.lines[0]["ids"] == plain.lines[0]["ids"]
    assert fast.lines[0]["steps"] < 24


@pytest.mark.parametrize(
    ("has", "given", "made"), [(100, None, 100), (257, None, 257), (100, 0, 257), (100, 120, 120), (100, 99, None)]
)
def test_a_draft_vocabulary_that_is_not_given_is_that_of_the_start(
    foretell: Foretell, tiny: str, data: str, tmp_path: Path, has: int, given: int | None, made: int | None
) -> None:
    kind, llm = drafter_class("hydra++"), load(tiny, dtype="fp32", threads=1)
    module = trainable(kind, llm.backbone, torch.ones(257), draft_vocab=has, heads=2)
    tensors, arch = module.checkpoint()
    about = {"method": "hydra++", "backbone": tiny, "fingerprint": llm.backbone.fingerprint, "arch": arch}
    Checkpoint(**about, hidden=llm.backbone.config.hidden, vocab=257).save(tmp_path / "start", tensors)
    size = [] if given is None else ["-o", f"draft_vocab={given}"]
    hardly = ["--epochs", "0.001", "--lr", "1e-8", "--start", str(tmp_path / "start"), *size]
    ran = foretell("train", "hydra++", "-m", tiny, *TINY, "--data", data, "--out", str(tmp_path / "out"), *hardly)
    if made is None:
        refused(ran, 2, "start chooses from 100 tokens, more than 99; train with -o draft_vocab=100 or more")
        return
    found, ours = checkpoint.load(tmp_path / "out/drafter")
    assert len(ours["vocabulary"]) == made
    assert found.provenance["options"]["draft_vocab"] == (0 if made == 257 else made)
    assert set(tensors["vocabulary"].tolist()) <= set(ours["vocabulary"].tolist())


def test_a_method_begins_with_its_own_drafters_alone(
    foretell: Foretell, tiny: str, data: str, trained: Path, tmp_path: Path
) -> None:
    ours = ["-m", tiny, *TINY, "--data", data, "--out", str(tmp_path / "out"), "--start", str(trained / "drafter")]
    ran = foretell("train", "kangaroo", *ours)
    refused(ran, 2, "is a medusa drafter, with which kangaroo cannot begin; begin with one of kangaroo, or without")


def test_medusa_cannot_begin_with_hydra(
    foretell: Foretell, tiny: str, data: str, trained: Path, tmp_path: Path
) -> None:
    start = copied(trained / "drafter", tmp_path / "start", method="hydra")
    ran = foretell(*command(tiny, data, tmp_path / "out", "--start", start))
    refused(ran, 2, "start is a hydra drafter, with which medusa cannot begin; begin with one of medusa, medusa2, or")


def test_nothing_is_lost_in_the_folder_of_a_drafter(
    foretell: Foretell, tiny: str, prompts: str, data: str, trained: Path, tmp_path: Path
) -> None:
    def left_as_it_was(sentence: str, folder: Path, *arguments: str) -> None:
        before = files(folder)
        refused(foretell(*(arguments or command(tiny, data, folder))), 2, sentence)
        assert files(folder) == before

    left_as_it_was(r"data holds other things \(conversations.jsonl, distill.json\); choose another --out", Path(data))
    out = shutil.copytree(trained, tmp_path / "out")
    distilling = ("distill", "-m", tiny, *TINY, "--prompts", prompts, "--out", str(out))
    left_as_it_was("out holds a drafter, or a run that makes one; choose another --out", out, *distilling)
    (out / "drafter/notes.txt").touch()
    left_as_it_was("drafter holds notes.txt, which would be lost; move it elsewhere", out)
    (out / "drafter/notes.txt").unlink()
    assert foretell(*command(tiny, data, out)).code == 0  # nothing is left to do
    left_as_it_was("out holds a run of medusa; choose another --out", out, *begun(tiny, data, out))
    shutil.rmtree(out / "run")
    left_as_it_was("out holds a finished medusa drafter; choose another --out, or delete it", out)
    left_as_it_was("out holds a finished medusa drafter", out, *begun(tiny, data, out))
    (out / "drafter/config.json").write_text("{")
    left_as_it_was("out holds a finished drafter; choose another --out, or delete it", out)
    (tmp_path / "empty").mkdir()
    assert foretell(*command(tiny, data, tmp_path / "empty")).code == 0


def test_data_of_another_model(foretell: Foretell, tiny: str, other: str, data: str, tmp_path: Path) -> None:
    ran = foretell(*command(other, data, tmp_path / "out"))
    refused(ran, 2, f"was written by {tiny} .fingerprint .*, not by this model .*; distill with this one, or allow it")
    assert not (tmp_path / "out").exists()
    assert foretell(*command(other, data, tmp_path / "out", "--other-model")).code == 0
    ran = foretell(
        "generate", "hi", "-m", tiny, *TINY, "-d", "medusa", "-o", f"checkpoint={tmp_path / 'out' / 'drafter'}"
    )
    refused(ran, 2, f"was trained for {other} .*not for this model")


def test_heads_of_another_model_to_begin_with(
    foretell: Foretell, tiny: str, other: str, data: str, trained: Path, tmp_path: Path
) -> None:
    """As wide a model with as many tokens may begin with them, if told so: their weights are the first ones."""
    start = str(trained / "drafter")
    arguments = command(other, data, tmp_path / "out", "--start", start, "--other-model")
    ran = foretell(*arguments, "--epochs", "0")
    assert ran.code == 0, ran.err
    found, tensors = checkpoint.load(tmp_path / "out/drafter")
    assert found.backbone == other
    for name, tensor in checkpoint.load(trained / "drafter")[1].items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)
    narrow = replace(checkpoint.load(trained / "drafter")[0], hidden=7)
    narrow.save(tmp_path / "narrow", tensors)
    arguments = command(other, data, tmp_path / "no", "--start", str(tmp_path / "narrow"), "--other-model")
    refused(foretell(*arguments), 2, r", which has other sizes; begin with a drafter of this one, or without --start\.")


def test_several_folders_are_trained_on(foretell: Foretell, tiny: str, data: str, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "more")
    kept = ("--data", str(tmp_path / "more"), "--keep-features")
    assert foretell(*command(tiny, data, tmp_path / "out", *kept)).code == 0
    saved, _ = checkpoint.load(tmp_path / "out/drafter")
    assert saved.provenance["data"] == [ConversationStore.open(Path(data)).manifest] * 2
    for folder in (Path(data), tmp_path / "more"):
        assert len(list(folder.glob("features-*/[!.]*"))) == 1
    ran = foretell(*command(tiny, data, tmp_path / "twice", "--data", f"{data}/../data"))
    refused(ran, 2, "--data names a folder twice; give each once")


def test_data_with_tokens_the_model_has_not(foretell: Foretell, tiny: str, data: str, tmp_path: Path) -> None:
    ConversationStore.open(Path(data)).append(99, [Distilled(99, [1, 2, 300, 4, 5], [(2, 5)])])
    ran = foretell(*command(tiny, data, tmp_path / "out", "--other-model"))
    refused(ran, 2, "token 300.* 256")
    assert not (tmp_path / "out").exists()


def refused(ran: Ran, code: int, sentence: str) -> None:
    """One sentence on stderr, nothing on stdout, no traceback."""
    assert ran.out == ""
    assert re.fullmatch(rf"error: .*{sentence}.*\n", ran.err), ran.err
    assert ran.code == code


@pytest.mark.parametrize(
    ("method", "arguments", "code", "sentence"),
    [
        ("plain", [], 2, "Drafter 'plain' has nothing to train; those that have are medusa"),
        ("medsua", [], 2, "Unknown drafter 'medsua': did you mean 'medusa'"),
        ("medusa", ["--data", "./nowhere"], 1, "nowhere holds no distilled data"),
        ("medusa", ["--data", "{empty}"], 2, "holds no conversations; distill some first"),
        ("medusa", ["-m", "./nowhere"], 2, "here is no folder ./nowhere"),
        ("medusa", ["-o", "heads"], 2, "--option 'heads' is not key=value"),
        ("medusa", ["-o", "heads=many"], 2, "Option 'heads' of medusa training is 'many'; it must be a whole number"),
        (
            "medusa",
            ["-o", "head=2"],
            2,
            "did you mean 'heads'. It has .*heads, layers, output",
        ),
        ("medusa", ["-o", "backbone=x"], 2, "edusa training has no option 'backbone'"),
        ("medusa", ["-o", "output=mine"], 2, "output is 'mine'; it must be shared, tied or own"),
        ("medusa", ["-o", "heads=0"], 2, "heads is 0; it must lie between 1 and 16"),
        ("medusa", ["-o", "soft=1.5"], 2, "soft is 1.5; it must lie between 0 and 1"),
        ("medusa", ["--epochs", "-1"], 2, "epochs is -1.0; it must lie between"),
        ("medusa", ["--lr", "100"], 2, "learning_rate is 100.0"),
        ("medusa", ["--lr", "nan"], 2, "learning_rate is nan"),
        ("medusa", ["--batch-tokens", "0"], 2, "batch_tokens is 0"),
        ("medusa", ["--held-out", "0.9"], 2, "held_out is 0.9"),
        ("medusa", ["--out", "{file}"], 1, "annot write to .*file"),
        ("medusa", ["--epochs", "0"], 2, "--epochs 0 trains nothing; name with --start a drafter to measure, or train"),
        ("medusa", ["hydra", "medusa:heads=2"], 2, "medusa is named twice; train each method once, or once more with"),
        ("medusa", ["hydra:heads"], 2, "'hydra:heads' has 'heads', which is not key=value; write, say, hydra:draft_v"),
        ("medusa", ["hydra:heads=2,=3"], 2, "'hydra:heads=2,=3' has '=3', which is not key=value"),
        ("medusa", ["hydra", "--out", "{empty}"], 2, r"empty holds other things \(conversations.jsonl, distill.json\)"),
        ("medusa", ["hydra", "--out", "{finished}"], 2, "finished holds a drafter, or a run .*; choose another --out"),
    ],
)
def test_mistakes_are_one_line(
    foretell: Foretell, tiny: str, data: str, tmp_path: Path, cache: Path, method: str, arguments: list[str], code: int,
    sentence: str,
) -> None:  # fmt: skip
    empty = ConversationStore.create(tmp_path / "empty", {"model": "m", "fingerprint": "f", "settings": {}})
    empty.append(0, ["too long"])
    (tmp_path / "file").touch()
    (tmp_path / "finished/drafter").mkdir(parents=True)
    names = {name: str(tmp_path / name) for name in ("empty", "file", "finished")}
    before = files(Path(data))
    given = [argument.format(**names) for argument in arguments]
    refused(
        foretell("train", method, "-m", tiny, *TINY, "--data", data, "--out", str(tmp_path / "out"), *given),
        code,
        sentence,
    )
    assert not (tmp_path / "out").exists()
    assert files(Path(data)) == before  # no features were computed in vain


def test_what_memory_does_not_suffice_for_is_one_line(
    foretell: Foretell, tiny: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory.")
    given = command(tiny, data, tmp_path / "out", "--keep-features")
    for where, name, sentence in (
        (ComputedFeatures, "each", r"A pass of the backbone does not fit into .*; free some of it, or leave out --k"),
        (Trainer, "learn", r"A batch of \d+ tokens does not fit into .*; train with --batch-tokens \d+, --acc"),
        (Trainer, "evaluate", r"The measuring of the drafter does not fit into .*; free some of it, and do the same"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(where, name, once(getattr(where, name), 1, error=error))
            ran = foretell(*given)
        assert ran.code == 2
        assert re.fullmatch(rf"error: {sentence}.*", ran.err.splitlines()[-1]), ran.err
        assert "Traceback" not in ran.err
    assert foretell(*given).code == 0


def test_no_epochs_measure_what_training_would_start_with(
    foretell: Foretell, tiny: str, data: str, trained: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    ours = ["-m", tiny, *TINY, "--data", data, "--out", str(tmp_path / "out"), "--epochs", "0", "--no-cache"]
    ran = foretell("train", "medusa", *ours, "--start", str(trained / "drafter"))
    assert ran.code == 0, ran.err
    assert not [each for each in recwarn if "legend" in str(each.message) or "artists" in str(each.message).lower()]
    found, tensors = checkpoint.load(tmp_path / "out/drafter")
    before, learnt = checkpoint.load(trained / "drafter")
    assert torch.equal(tensors["weight.0"], learnt["weight.0"])
    assert found.tokens_per_step == before.tokens_per_step
    assert "--no-cache" not in foretell("train", "--help").out


def test_several_methods_share_a_folder(foretell: Foretell, tiny: str, data: str, tmp_path: Path) -> None:
    few = ["-m", tiny, *TINY, "--data", data, "--out", str(tmp_path / "out"), "--epochs", "1", "--lr", "0.01"]
    for methods in (["medusa:heads=2", "hydra"], ["medusa:heads=2", "hydra"], ["kangaroo:exit=1", "hydra++"]):
        ran = foretell("train", *methods, *few)
        assert ran.code == 0, ran.err
    made = sorted(path.name for path in (tmp_path / "out").glob("*"))
    assert made == ["hydra", "hydra++", "kangaroo", "medusa"]
    assert checkpoint.load(tmp_path / "out/medusa/drafter")[0].arch["heads"] == 2


@pytest.mark.parametrize(
    ("methods", "more", "sentence"),
    [
        (["medusa", "plain"], [], "Drafter 'plain' has nothing to train"),
        (["medusa", "hydra "], [], "Unknown drafter 'hydra ': did you mean 'hydra'"),
        (["medusa,hydra"], [], "Unknown drafter 'medusa,hydra': did you mean 'medusa'"),
        (["medusa", "heads=2"], [], "Unknown drafter 'heads=2'"),
        ([":heads=2"], [], "Unknown drafter '': the drafters are"),
        (
            ["medusa", "hydra", "medusa"],
            [],
            "medusa is named twice; train each method once, or once more with another --out",
        ),
        (["medusa:heads=2", "medusa:heads=3"], [], "medusa is named twice"),
        (["hydra", "medusa:heads"], [], "'heads', which is not key=value"),
        (["hydra", "medusa:heads=2,,layers=1"], [], "'', which is not key=value"),
        (["hydra", "medusa:head=2"], [], "medusa training has no option 'head'; did you mean 'heads'"),
        (["hydra", "medusa:heads=2:layers=1"], [], "Option 'heads' of medusa training is '2:layers=1'; it must be a"),
        (["medusa", "medusa2"], ["-o", "rank=2"], "medusa training has no option 'rank'"),  # -o is of all of them
        (["hydra", "medusa:start=./nowhere"], [], "There is no folder ./nowhere; begin with the folder of a drafter"),
        (["hydra", "medusa:start=hydra"], [], "No hydra drafter comes with foretell for this model"),
        (
            ["hydra", "kangaroo:start={trained}"],
            [],
            "is a medusa drafter, with which kangaroo cannot begin; begin with",
        ),
        (["hydra", "layerskip:start={trained}"], [], "is a medusa drafter, with which layerskip cannot begin"),
        (["hydra", "medusa"], ["--out", "{file}"], "annot write to .*file"),
        (["hydra", "medusa"], ["--out", "{trained}/.."], r"medusa/run holds a run with .*epochs 8\.0 \(not 4\.0\)"),
    ],
)
def test_mistakes_in_several_methods_are_one_line(
    foretell: Foretell, tiny: str, data: str, trained: Path, tmp_path: Path, methods: list[str], more: list[str],
    sentence: str,
) -> None:  # fmt: skip
    (tmp_path / "file").touch()
    given = [argument.format(trained=trained, file=tmp_path / "file") for argument in more]
    several = [method.format(trained=trained) for method in methods]
    before = files(trained)
    ran = foretell("train", *several, "-m", tiny, *TINY, "--data", data, "--out", str(tmp_path / "out"), *given)
    refused(ran, 1 if "file" in sentence else 2, sentence)
    assert not (tmp_path / "out").exists()
    assert files(trained) == before


def test_two_methods_at_once_from_data_to_drafters_that_decode(
    foretell: Foretell, tiny: str, prompts: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--epochs", "8", "--batch-tokens", "300", "--lr", "0.01", "-o", "draft_vocab=100")
    common = ["-m", tiny, *TINY, "--data", data, *few]
    methods = {"medusa": "heads=3", "hydra++": "heads=2,linear_tail=true,fuse_prefix=true"}
    for method, options in methods.items():
        assert foretell("train", f"{method}:{options}", *common, "--out", str(tmp_path / "alone" / method)).code == 0
    several = [f"{method}:{options}" for method, options in methods.items()]
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "update", once(Trainer.update, 6))  # the second's third
        ran = foretell("train", *several, *common, "--out", str(out))
    assert (ran.code, ran.out) == (130, "")
    assert ran.err.endswith("interrupted; the same command goes on from here\n")
    ran = foretell("train", *several, *common, "--out", str(out))
    assert (ran.code, ran.out) == (0, ""), ran.err
    assert re.search(r"^training medusa, hydra\+\+: ", ran.err, re.MULTILINE)
    assert sorted(path.name for path in out.iterdir()) == ["hydra++", "medusa"]
    for method in methods:
        drafter, alone = out / method / "drafter", tmp_path / "alone" / method / "drafter"
        assert (drafter / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
        saved, truth = checkpoint.load(drafter)[0], checkpoint.load(alone)[0]
        assert (saved.paths, saved.tokens_per_step) == (truth.paths, truth.tokens_per_step)
        assert saved.provenance["together"] == list(methods)
        assert (out / method / "curves.png").exists()
        words = ["foretell", "chat", "--model", tiny, "--drafter", method, "-o", f"checkpoint={drafter}"]
        assert f"The drafter is in {drafter}; use it with {shlex.join(words)}\n" in ran.err
        assert f"\n{method}:\n" in ran.err
        options = ["-m", tiny, *TINY, "--prompts", prompts, "-n", "40", "--json"]
        plain = foretell("generate", *options).lines
        ours = foretell(
            "generate", *options, "-d", method, "-o", f"checkpoint={drafter}", "-o", "nodes=4", "--no-adapt"
        )
        assert ids_of(ours.lines) == ids_of(plain)
        assert all(line["drafted"] for line in ours.lines)


def test_no_epochs_measure_what_a_start_gives(
    foretell: Foretell, tiny: str, data: str, trained: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    out = tmp_path / "out"
    given = command(tiny, data, out, "--epochs", "0", "--start", str(trained))
    for _ in range(2):  # and again: nothing is left to do
        ran = foretell(*given)
        assert (ran.code, ran.out) == (0, "")
        assert "tokens per step on training text" in ran.err
        assert not [str(each.message) for each in recwarn if "legend" in str(each.message)]
        saved, tensors = checkpoint.load(out / "drafter")
        before, theirs = checkpoint.load(trained / "drafter")
        assert all(torch.equal(tensors[name], theirs[name]) for name in tensors.keys() | theirs.keys())
        assert (saved.paths, saved.tokens_per_step) == (before.paths, before.tokens_per_step)
    refused(
        foretell(*command(tiny, data, out, "--start", str(trained))), 2, r"holds a run with epochs 0\.0 \(not 8\.0\)"
    )


def test_a_start_that_knows_more_tokens_than_are_asked_for(
    foretell: Foretell, tiny: str, data: str, trained: Path, tmp_path: Path
) -> None:
    ran = foretell(*command(tiny, data, tmp_path / "out", "-o", "draft_vocab=99", "--start", str(trained)))
    refused(ran, 2, "chooses from 100 tokens, more than 99; train with -o draft_vocab=100 or more")
    assert not (tmp_path / "out").exists()
    for enough in ("100", "101", "0"):
        out = str(tmp_path / enough)
        given = ("--epochs", "0", "-o", f"draft_vocab={enough}", "--start", str(trained), "--out", out)
        assert foretell(*command(tiny, data, tmp_path / "out", *given)).code == 0


def cut_short(content: bytes) -> bytes:
    """One line in the midst ends early."""
    lines = content.splitlines(keepends=True)
    lines[3] = lines[3][:20] + b"\n"
    return b"".join(lines)


def joined_lines(content: bytes) -> bytes:
    lines = content.splitlines()
    return b"\n".join([*lines[:3], lines[3] + lines[4], *lines[5:]]) + b"\n"


def zeros(content: bytes) -> bytes:
    """A block that was never written."""
    middle = len(content) // 2
    return content[:middle] + bytes(100) + content[middle + 100 :]


@pytest.mark.parametrize("damage", [cut_short, joined_lines, zeros])
def test_data_that_is_damaged_in_its_midst_is_one_line(
    foretell: Foretell, tiny: str, data: str, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = Path(data) / "conversations.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    ran = foretell(*command(tiny, data, tmp_path / "out"))
    refused(ran, 1, r"conversations\.jsonl, line \d is damaged; delete the line, and distill will answer it again")
    assert not (tmp_path / "out").exists()


def truncated(packed: bytes) -> bytes:
    return packed[: len(packed) // 2]


def flipped(packed: bytes) -> bytes:
    middle = len(packed) // 2
    return packed[:middle] + bytes([packed[middle] ^ 255]) + packed[middle + 1 :]


def emptied(packed: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncated, flipped, emptied])
def test_packed_data_that_is_damaged_is_one_line(
    foretell: Foretell, tiny: str, data: str, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = Path(data) / "conversations.jsonl"
    packed = path.with_name("conversations.jsonl.xz")
    packed.write_bytes(lzma.compress(path.read_bytes()))
    path.unlink()
    assert foretell(*command(tiny, data, tmp_path / "whole", "--epochs", "0.001")).code == 0
    packed.write_bytes(damage(packed.read_bytes()))
    ran = foretell(*command(tiny, data, tmp_path / "out"))
    refused(ran, 1, r"conversations\.jsonl\.xz is damaged \(.*\); copy it again")
    assert not (tmp_path / "out").exists()


def test_memory_that_runs_out_is_one_line(
    foretell: Foretell, tiny: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "learn", once(Trainer.learn, 3, error=error))
        ran = foretell(*command(tiny, data, tmp_path / "out"))
    refusal = r"error: A batch of [12]\d\d tokens does not fit into the memory of cpu \(CUDA out .*\)"
    remedy = r"train with --batch-tokens \d\d\d?, --accumulate 2 and another --out"
    assert ran.code == 2
    assert re.search(rf"^{refusal}; {remedy}\.$", ran.err, re.MULTILINE)
    assert "Traceback" not in ran.err
    smaller = ("--batch-tokens", "150", "--accumulate", "2", "--out", str(tmp_path / "smaller"))
    assert foretell(*command(tiny, data, tmp_path / "out", *smaller)).code == 0


def test_training_does_without_plots(
    foretell: Foretell, tiny: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = foretell(*command(tiny, data, tmp_path / "out"))
    assert ran.code == 0
    assert "Plots need matplotlib; pip install 'foretell[train]'" in ran.err
    assert ran.err.endswith(f"-o checkpoint={tmp_path / 'out' / 'drafter'}\n")
    assert not (tmp_path / "out" / "curves.png").exists()


def test_what_learning_begins_with_keeps_its_draft_vocabulary(
    foretell: Foretell, tiny: str, data: str, trained: Path, tmp_path: Path
) -> None:
    """A token that it never chose from was never pushed down either: it would take half of what is said."""
    found, tensors = checkpoint.load(trained / "drafter")
    rare, head = torch.arange(1, tensors["head"].shape[1], 2), tensors["head"][:, 1::2]
    found.save(tmp_path / "rare", tensors | {"vocabulary": rare.int(), "head": head})
    few = ("-o", f"draft_vocab={len(rare)}")
    ran = foretell(*begun(tiny, data, tmp_path / "out", *few, "--start", str(tmp_path / "rare")))
    assert (ran.code, ran.out) == (0, "")
    _, ours = checkpoint.load(tmp_path / "out" / "drafter")
    assert torch.equal(ours["vocabulary"].long(), rare)
    torch.testing.assert_close(ours["head"].float(), head.float(), rtol=0, atol=1e-6)

    found.save(tmp_path / "none", {name: each for name, each in tensors.items() if name != "vocabulary"})
    ran = foretell(*begun(tiny, data, tmp_path / "new", "--start", str(tmp_path / "none")))
    refused(ran, 1, "is damaged, or of another method: it lacks a draft vocabulary")
