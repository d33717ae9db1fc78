"""Several drafters trained at once: each learns, bit for bit, what it learns alone, and the backbone runs once for all.

With toys every interruption is tried; with the methods themselves, what comes out of a folder.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import save_tiny_chat
from random_backbones import Model
from tiny_models import DIMENSIONS
from torch import Tensor
from trainables import DATA, Line, Words, once

import foretell
from foretell.api import LLM
from foretell.backbone import Backbone
from foretell.contracts import FINAL_NORM
from foretell.drafting import checkpoint
from foretell.drafting.checkpoint import shipped
from foretell.drafting.learning.trainable import Trainable, TrainingBatch
from foretell.errors import ForetellError, UsageError
from foretell.train import loop, recipe
from foretell.train.data import ConversationStore, Distilled
from foretell.train.features import ComputedFeatures
from foretell.train.forward import Forward
from foretell.train.loop import train
from foretell.train.recipe import Job, Trained
from foretell.train.trainer import Settings, Trainer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


# --- toys ---------------------------------------------------------------------------------------------------


class Blurred(Words):
    """Drops a third of what it reads, at random."""

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        kept = {tap: states * (torch.rand(states.shape) > 1 / 3) for tap, states in batch.states.items()}
        return super().losses(TrainingBatch(**{**vars(batch), "states": kept}))


KINDS: list[Callable[[], Trainable]] = [Words, Blurred, Line]
Made = Callable[..., list[Trainer]]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Model({"model_type": "llama", **DIMENSIONS}).build()


@pytest.fixture
def trainers(backbone: Backbone, tmp_path: Path) -> Made:
    """Makes trainers of the toys, each in a folder of its own below this name; they share their features."""

    def make(name: str, kinds: Sequence[Callable[[], Trainable]] = KINDS, **settings: Any) -> list[Trainer]:
        given = {"epochs": 2, "batch_tokens": 60, "learning_rate": 0.01, "held_out": 0.2, "save_seconds": 0.0}
        features = ComputedFeatures(backbone, DATA, (FINAL_NORM,))
        return [
            Trainer(kind(), features, Settings(**(given | settings)), tmp_path / name / kind.__name__) for kind in kinds
        ]

    return make


def assert_same_ends(ours: Sequence[Trainer], theirs: Sequence[Trainer]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.step == b.step == b.steps > 0
        assert a.skipped == b.skipped
        mine, truth = a.module.state_dict(), b.module.state_dict()
        assert mine.keys() == truth.keys()
        assert all(torch.equal(mine[name], truth[name]) for name in truth)
        mine, truth = a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"]
        assert all(torch.equal(mine[i][name], truth[i][name]) for i in truth for name in truth[i])


@pytest.fixture
def alone(trainers: Made) -> Callable[..., list[Trainer]]:
    """Toys that were trained one after the other."""

    def trained(**settings: Any) -> list[Trainer]:
        made = trainers("alone", **settings)
        for each in made:
            train([each])
        return made

    return trained


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_together_they_learn_what_each_learns_alone(trainers: Made, alone: Made, accumulate: int) -> None:
    together, seen = trainers("together", accumulate=accumulate), list[tuple[int, int]]()
    train(together, lambda *step: seen.append(step))
    assert seen == [(step, together[0].steps) for step in range(1, together[0].steps + 1)]
    assert_same_ends(together, alone(accumulate=accumulate))


def test_the_order_in_which_they_are_named_does_not_matter(trainers: Made, alone: Made) -> None:
    together = trainers("together")
    train(together[::-1])
    assert_same_ends(together, alone())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stopped_after_any_step_they_go_on(trainers: Made, alone: Made, accumulate: int) -> None:
    straight = alone(accumulate=accumulate)
    for after in range(straight[0].steps + 1):
        name = f"cut {after}"
        made = trainers(name, accumulate=accumulate)
        if after < made[0].steps:
            with pytest.raises(KeyboardInterrupt):
                train(made, stop=lambda made=made, after=after: made[0].step == after)
        else:
            train(made)
        final, steps = trainers(name, accumulate=accumulate), list[int]()
        train(final, lambda step, *_, steps=steps: steps.append(step))
        assert steps == list(range(after + 1, straight[0].steps + 1))  # no step is made twice
        assert_same_ends(final, straight)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("place", ["begin_step", "learn", "update", "optimizer", "save"])
@pytest.mark.parametrize("which", range(len(KINDS)))
def test_interrupted_between_two_of_them_they_go_on(
    trainers: Made, alone: Made, monkeypatch: pytest.MonkeyPatch, which: int, place: str, after: bool
) -> None:
    """Some have made the step by then, others have not."""
    straight = alone(accumulate=2)
    for at in (1, 2, 4):
        made = trainers(f"cut {at}", accumulate=2)
        where: Any = made[which].optimizer if place == "optimizer" else made[which]
        name = "step" if place == "optimizer" else place
        monkeypatch.setattr(where, name, once(getattr(where, name), at, after))
        with pytest.raises(KeyboardInterrupt):
            train(made)
        final = trainers(f"cut {at}", accumulate=2)
        train(final)
        assert_same_ends(final, straight)


@pytest.mark.parametrize("ahead", [[0, 1, 0], [1, 0, 0], [3, 2, 0], [0, 5, 2]])
def test_one_that_was_saved_ahead_waits_for_the_others(
    trainers: Made, alone: Made, monkeypatch: pytest.MonkeyPatch, ahead: list[int]
) -> None:
    straight, seen = alone(), Counter[int]()
    for trainer, steps in zip(trainers("together"), ahead, strict=True):
        if steps:
            with pytest.raises(KeyboardInterrupt):
                train([trainer], stop=lambda trainer=trainer, steps=steps: trainer.step == steps)
    final = trainers("together")
    for i, each in enumerate(final):
        monkeypatch.setattr(each, "learn", lambda batch, i=i, learn=each.learn: (seen.update([i]), learn(batch)))
    train(final)
    assert [seen[i] for i in range(3)] == [straight[0].steps - steps for steps in ahead]
    assert_same_ends(final, straight)


def test_one_that_is_done_is_left_as_it_is(trainers: Made, alone: Made) -> None:
    first = trainers("together", KINDS[:1])
    train(first)
    train(together := trainers("together"))
    assert_same_ends(together, alone())


def test_the_log_of_each_tells_each_step_once(trainers: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_STEPS", 1)
    made = trainers("cut")
    monkeypatch.setattr(made[1], "update", once(made[1].update, 3))
    with pytest.raises(KeyboardInterrupt):
        train(made)
    final = trainers("cut")
    train(final)
    for each in final:
        lines = [json.loads(line)["step"] for line in (each.folder / "log.jsonl").read_text().splitlines()]
        missing = [step for step in range(1, each.steps + 1) if step not in lines]
        assert missing in ([], [3])  # interrupted between its update and the line
        assert len(lines) == len(set(lines))


def test_a_loss_that_is_no_number_ends_all_at_whole_steps(trainers: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = trainers("cut"), Counter[str]()
    losses = made[1].module.losses

    def broken(batch: TrainingBatch) -> dict[str, Tensor]:
        calls["losses"] += 1
        return {name: term * (torch.nan if calls["losses"] == 4 else 1) for name, term in losses(batch).items()}

    monkeypatch.setattr(made[1].module, "losses", broken)
    with pytest.raises(ForetellError, match=r"^The loss became nan at step 3 of .*; lower `learning_rate=`"):
        train(made)
    assert [(each.resume(), each.step)[1] for each in trainers("cut")] == [4, 3, 3]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_backbone_runs_once_for_all(trainers: Made, monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    passes, states = list[tuple[int, ...]](), Forward.states

    def counting(self: Forward, tokens_BT: Tensor, taps: Any) -> dict[int, Tensor]:
        passes.append(tuple(tokens_BT.shape))
        return states(self, tokens_BT, taps)

    monkeypatch.setattr(Forward, "states", counting)
    made = trainers("together", accumulate=accumulate)
    train(made)
    assert len(passes) == accumulate * made[0].steps


# --- methods ------------------------------------------------------------------------------------------------

JOBS: dict[str, dict[str, Any]] = {
    "medusa": {"heads": 2},
    "hydra": {"heads": 2, "linear_tail": True, "dropout": 0.2},
    "hydra++": {"heads": 2, "taps": 1},
    "kangaroo": {"exit": 1},
    "medusa2": {"heads": 2, "rank": 4, "warm": 0.3},
    "layerskip": {"exit": 1, "stride": 1, "rank": 4, "period": 1},
    "hamburger": {"adapt": "lora", "rank": 4, "blocks": 1},
}
BEGUN = ["medusa", "hydra", "hydra++", "kangaroo"]
"""Those whose weights others of their kind may begin with, for the same model."""
SHORT = Settings(epochs=2, batch_tokens=300, learning_rate=0.01)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_chat(folder)
    return foretell.load(folder, dtype="fp32", threads=1, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def data(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of random tokens, as if the model had written them."""
    about = {"model": "tiny", "fingerprint": llm.backbone.fingerprint, "settings": {}}
    store = ConversationStore.create(tmp_path_factory.mktemp("data"), about)
    generator = torch.Generator().manual_seed(0)
    for line in range(12):
        tokens = torch.randint(40, (30 + 5 * line,), generator=generator).tolist()
        store.append(line, [Distilled(line, tokens, [(4, 20), (24, len(tokens))])])
    return store.folder


@pytest.fixture(scope="module")
def alone_in(llm: LLM, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder for each method, trained alone."""
    out = tmp_path_factory.mktemp("alone")
    for method, options in JOBS.items():
        recipe.run(method, llm, data, out / method, settings=SHORT, options={"draft_vocab": 40} | options)
    return out


def jobs(out: Path, methods: Sequence[str] = tuple(JOBS)) -> list[Job]:
    return [Job(method=each, out=out / each, options={"draft_vocab": 40} | JOBS[each]) for each in methods]


def assert_same_folders(ours: Path, alone_in: Path, methods: Sequence[str] = tuple(JOBS)) -> None:
    """The weights, the trees and the figures; of a changed backbone what changes it."""
    for method in methods:
        a, b = ours / method, alone_in / method
        names = sorted(str(path.relative_to(b)) for path in b.rglob("*.safetensors"))
        assert names == sorted(str(path.relative_to(a)) for path in a.rglob("*.safetensors"))
        for name in names:
            assert (a / name).read_bytes() == (b / name).read_bytes(), (method, name)
        found, truth = (checkpoint.load(folder / "drafter")[0] for folder in (a, b))
        for name in ("arch", "paths", "calibration", "tokens_per_step"):
            assert getattr(found, name) == getattr(truth, name), (method, name)
        for name in ("accuracy", "loss", "options", "settings", "skipped_batches"):
            assert found.provenance[name] == truth.provenance[name], (method, name)


def test_methods_learn_together_what_each_learns_alone(llm: LLM, data: Path, alone_in: Path, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    found = recipe.run_all(
        jobs(tmp_path), llm, data, settings=SHORT, progress=lambda name, *at: seen.setdefault(name, []).append(at)
    )
    assert [(each.checkpoint.method, each.folder) for each in found] == [
        (method, tmp_path / method / "drafter") for method in JOBS
    ]
    assert_same_folders(tmp_path, alone_in)
    assert found[0].checkpoint.provenance["together"] == list(JOBS)
    for done in seen.values():  # one bar for all
        counts = [count for count, _ in done]
        assert counts == sorted(counts)
        assert done[-1][0] == done[-1][1]
        assert len({total for _, total in done}) == 1
    for each in (found[0], found[3]):  # and they draft
        ours = foretell.load(
            each.model, each.checkpoint.method, checkpoint=each.folder, dtype="fp32", threads=1,
            cache_dir=llm.loading["cache_dir"],
        )  # fmt: skip
        assert ours.generate("hi", max_new_tokens=12).ids == llm.generate("hi", max_new_tokens=12).ids


def stopped_at(step: int, several: list[Job], llm: LLM, data: Path) -> None:
    with recipe.begin(several, llm, data, settings=SHORT) as begun, pytest.raises(KeyboardInterrupt):
        begun.train(stop=lambda: begun.runs[0].trainer.step == step)


def test_methods_that_were_interrupted_are_resumed_together_or_alone(
    llm: LLM, data: Path, alone_in: Path, tmp_path: Path
) -> None:
    for after in (1, 4):
        stopped_at(after, jobs(tmp_path), llm, data)
    assert not list(tmp_path.glob("*/drafter"))
    hydra = jobs(tmp_path, ["hydra"])
    recipe.run_all(hydra, llm, data, settings=SHORT)  # one that was begun with others goes on alone, to its end
    with recipe.begin(jobs(tmp_path), llm, data, settings=SHORT) as begun:
        steps = {run.cls.method: run.trainer.step for run in begun.runs}
    assert steps == dict.fromkeys(JOBS, 4) | {"hydra": begun.runs[0].trainer.steps}
    recipe.run_all(jobs(tmp_path), llm, data, settings=SHORT)
    assert_same_folders(tmp_path, alone_in)


def test_methods_that_were_begun_alone_go_on_together(llm: LLM, data: Path, alone_in: Path, tmp_path: Path) -> None:
    few = ["hydra++", "kangaroo"]
    stopped_at(3, jobs(tmp_path, ["kangaroo"]), llm, data)
    recipe.run_all(jobs(tmp_path, few), llm, data, settings=SHORT)
    assert_same_folders(tmp_path, alone_in, few)


def test_kept_features_hold_what_all_of_them_read(llm: LLM, data: Path, tmp_path: Path) -> None:
    own, few = shutil.copytree(data, tmp_path / "data"), ["medusa", "kangaroo"]
    recipe.run_all(jobs(tmp_path / "together", few), llm, own, settings=SHORT, keep_features=True)
    assert len(list(own.glob("features-*/*.safetensors"))) == 1
    for method in few:
        recipe.run_all(jobs(tmp_path / "alone", [method]), llm, own, settings=SHORT, keep_features=True)
    assert_same_folders(tmp_path / "together", tmp_path / "alone", few)


def test_each_begins_with_its_own_start(llm: LLM, data: Path, alone_in: Path, tmp_path: Path) -> None:
    """Without epochs what comes out is what they began with, and its figures."""
    methods = ["medusa", "hydra", "hydra++", "kangaroo"]

    def measured(out: Path, starts: Path) -> list[Trained]:
        begun = [
            Job(method=each, out=out / each, start=str(starts / each), options={"draft_vocab": 40}) for each in methods
        ]
        return recipe.run_all(begun, llm, data, settings=Settings(epochs=0))

    once, twice = measured(tmp_path / "once", alone_in), measured(tmp_path / "twice", tmp_path / "once")
    for method, first, second in zip(methods, once, twice, strict=True):
        before, theirs = checkpoint.load(alone_in / method / "drafter")
        for trained in (first, second):
            kept, tensors = checkpoint.load(trained.folder)
            assert kept.arch == before.arch
            assert tensors.keys() == theirs.keys()
            assert all(torch.equal(tensors[name], theirs[name]) for name in theirs)
            assert kept.provenance["start"] == checkpoint.fingerprint(theirs)
            assert kept.tokens_per_step == pytest.approx(before.tokens_per_step, rel=0.1)  # that was not rounded yet
        for name in ("paths", "tokens_per_step", "calibration"):
            assert getattr(first.checkpoint, name) == getattr(second.checkpoint, name)
        assert first.report == second.report


@pytest.mark.real
def test_what_ships_can_be_begun_with(demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each drafter of the demo model, all in one pass of the backbone; and a step of training moves them all a little.

    Guesses from states of the plain pass come true no less often after that step than those from decoding's before it.
    """
    llm = foretell.load(demo_folder, threads=1)
    about = {"model": "smollm2-135m", "fingerprint": llm.backbone.fingerprint, "settings": {}}
    store = ConversationStore.create(tmp_path / "data", about)
    for line, question in enumerate(["Why is the sky blue?", "List five colours.", "Count from one to twenty."]):
        prompt = llm.tokenizer.chat([{"role": "user", "content": question}])
        answer = llm.generate(question, max_new_tokens=32, ignore_eos=True).ids
        store.append(line, [Distilled(line, prompt + answer, [(len(prompt), len(prompt + answer))])])
    names = shipped(llm.backbone)

    def begun(name: str, settings: Settings) -> tuple[list[Trained], list[dict[str, Tensor]]]:
        jobs = [Job(method=each, out=tmp_path / name / each, start=each) for each in BEGUN]
        found = recipe.run_all(jobs, llm, store.folder, settings=settings)
        return found, [checkpoint.load(names[each.checkpoint.method])[1] for each in found]

    monkeypatch.setattr(recipe, "SIZES", (8, 16))  # all others are measured where they are fast
    monkeypatch.setattr(ComputedFeatures, "by_decoding", True)
    decoded, theirs = begun("as it ships", Settings(epochs=0))
    for trained, shipped_tensors in zip(decoded, theirs, strict=True):
        kept, tensors = checkpoint.load(trained.folder)
        assert tensors.keys() == shipped_tensors.keys()
        for name, tensor in shipped_tensors.items():  # what ships is kept in fewer bits, and read as float32
            assert torch.equal(tensors[name], tensor.to(tensors[name].dtype)), (kept.method, name)
    monkeypatch.setattr(ComputedFeatures, "by_decoding", False)
    moved, _ = begun("a step on", Settings(epochs=0.01, batch_tokens=512, learning_rate=1e-4))
    for trained, shipped_tensors in zip(moved, theirs, strict=True):
        _, tensors = checkpoint.load(trained.folder)
        far = [float((tensors[name].float() - tensor.float()).abs().max()) for name, tensor in shipped_tensors.items()]
        assert 0 < max(far) < 0.02
    before, after = [[max(each.checkpoint.tokens_per_step.values()) for each in found] for found in (decoded, moved)]
    assert min(before) > 1.2
    assert sum(after) > 0.95 * sum(before)


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outs", "sentence"),
    [
        ([], r"^Each drafter that is trained needs an `out=` of its own\.$"),
        (["a", "a"], r"^Each drafter that is trained needs an `out=` of its own\.$"),
        (["a", "b/../a"], r"^Each drafter that is trained needs an `out=` of its own\.$"),
    ],
)
def test_each_needs_a_folder_of_its_own(llm: LLM, data: Path, tmp_path: Path, outs: list[str], sentence: str) -> None:
    (tmp_path / "b").mkdir()
    several = [Job(method=method, out=tmp_path / out) for method, out in zip(["medusa", "hydra"], outs, strict=False)]
    with pytest.raises(UsageError, match=sentence):
        recipe.run_all(several, llm, data)
    assert not (tmp_path / "a").exists()


def test_a_mistake_in_one_of_them_begins_none(llm: LLM, data: Path, alone_in: Path, tmp_path: Path) -> None:
    good = Job(method="medusa", out=tmp_path / "medusa")
    for wrong, sentence in (
        (Job(method="plain", out=tmp_path / "b"), "Drafter 'plain' has nothing to train"),
        (Job(method="hydra", out=tmp_path / "b", options={"heads": 0}), "heads is 0; it must lie between"),
        (Job(method="hydra", out=tmp_path / "b", options={"head": 2}), "no option 'head'; did you mean 'heads'"),
        (Job(method="hydra", out=tmp_path / "b", start="./nowhere"), "There is no folder ./nowhere"),
        (Job(method="hydra", out=alone_in / "medusa"), "holds a run of medusa; choose another `out=`"),
        (Job(method="hydra", out=data), "holds other things"),
    ):
        with pytest.raises(UsageError, match=sentence):
            recipe.run_all([good, wrong], llm, data)
        assert not list(tmp_path.iterdir())


def test_two_processes_never_write_to_one_folder(llm: LLM, data: Path, tmp_path: Path) -> None:
    with (
        recipe.begin(jobs(tmp_path, ["medusa", "hydra"]), llm, data, settings=SHORT),
        pytest.raises(UsageError, match="Another process is writing to .*hydra; wait until it is done"),
    ):
        recipe.run_all(jobs(tmp_path, ["kangaroo", "hydra"]), llm, data, settings=SHORT)
    recipe.run_all(jobs(tmp_path, ["hydra"]), llm, data, settings=SHORT)
