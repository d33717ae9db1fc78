"""The recipe of training from plain Python: a notebook trains, interrupts and resumes without the command line."""

import json
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import save_tiny_chat

import foretell
from foretell.api import LLM
from foretell.drafting import checkpoint
from foretell.drafting.checkpoint import Checkpoint
from foretell.errors import UsageError
from foretell.requests import SamplingParams
from foretell.train import recipe
from foretell.train.data import ConversationStore
from foretell.train.distill import distill
from foretell.train.evaluation import SIZES
from foretell.train.prompts import read_prompts
from foretell.train.recipe import MAX_REPLAYED, Begun, Job, Trained, to_replay
from foretell.train.trainer import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = Settings(epochs=8, batch_tokens=300, learning_rate=0.01)
SMALL = {"heads": 3, "draft_vocab": 100}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_chat(folder)
    return foretell.load(folder, dtype="fp32", threads=1)


@pytest.fixture
def data(llm: LLM, tmp_path: Path) -> Path:
    """A folder of data that the model wrote, made in plain Python too."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(8)))
    about = {"model": "tiny", "fingerprint": llm.backbone.fingerprint, "settings": {}}
    store = ConversationStore.create(tmp_path / "data", about)
    distill(llm, read_prompts(prompts), store, SamplingParams(max_new_tokens=40), rows=4)
    return store.folder


def trained(llm: LLM | str, data: Path, out: Path, **more: Any) -> Trained:
    return recipe.run("medusa", llm, data, out, settings=FEW, options=SMALL, **more)


def begun(method: str, llm: LLM, data: Path, out: Path, options: dict[str, Any]) -> AbstractContextManager[Begun]:
    return recipe.begin([Job(method=method, out=out, options=options)], llm, data, settings=FEW)


def test_a_drafter_is_trained_in_plain_python(
    llm: LLM, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    saved: list[Path] = []
    save = Checkpoint.save

    def saving(self: Checkpoint, folder: Path, *tensors: Any) -> None:
        saved.append(folder)
        save(self, folder, *tensors)

    monkeypatch.setattr(Checkpoint, "save", saving)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "load", None)  # the tree sizes are measured on the tensors in memory
        found = trained(
            llm, data, tmp_path / "out", progress=lambda step, *done: seen.setdefault(step, []).append(done)
        )
    assert saved == [found.folder] == [tmp_path / "out/drafter"]
    assert found.model == str(llm.folder and llm.folder.name)
    assert not found.held_out  # a folder of eight conversations has none to spare
    assert list(seen) == ["features", "training", "replay"]
    for done in seen.values():
        counts = [count for count, _ in done]
        assert counts == sorted(counts)
        assert done[-1][0] == done[-1][1]
        assert len({total for _, total in done}) == 1
    assert len(seen["training"]) == 1 + seen["training"][-1][1]
    written, _ = checkpoint.load(found.folder)
    assert written.tokens_per_step == found.checkpoint.tokens_per_step
    assert list(written.tokens_per_step) == [size for size in SIZES if size in written.tokens_per_step]
    assert (written.arch["heads"], written.backbone) == (3, found.model)
    assert written.provenance["options"] == vars(foretell.drafters.drafter_class("medusa").Training(**SMALL))
    assert written.provenance["accuracy"] == found.report.accuracy

    own = foretell.load(found.model, "medusa", checkpoint=found.folder, dtype="fp32", threads=1)
    options: dict[str, Any] = {"max_new_tokens": 40, "adapt": False}
    drafted, plain = own.generate("number 1", **options), llm.generate("number 1", **options)
    assert drafted.ids == plain.ids
    assert drafted.statistics.steps < 0.9 * plain.statistics.steps


def test_an_interrupted_run_is_resumed_by_the_same_call(llm: LLM, data: Path, tmp_path: Path) -> None:
    straight = trained(llm, data, tmp_path / "straight")
    steps: list[int] = []

    def note(step: str, done: int, total: int) -> None:
        steps.extend([done] if step == "training" else [])

    def interrupting(step: str, done: int, total: int) -> None:
        if step == "training" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(llm, data, tmp_path / "cut", progress=interrupting)
    assert not (tmp_path / "cut/drafter").exists()
    resumed = trained(llm, [data], tmp_path / "cut", progress=note)
    assert steps == list(range(4, steps[-1] + 1))  # no step is made twice
    assert steps[-1] > 8
    ours, theirs = ((made.folder / "model.safetensors").read_bytes() for made in (resumed, straight))
    assert ours == theirs
    assert resumed.checkpoint.paths == straight.checkpoint.paths
    assert resumed.checkpoint.tokens_per_step == straight.checkpoint.tokens_per_step


def test_a_step_of_the_recipe_may_be_stopped(llm: LLM, data: Path, tmp_path: Path) -> None:
    """The command line stops between two steps, so that none is lost."""
    with begun("medusa", llm, data, tmp_path / "out", options=SMALL) as run:
        run.prepare()
        with pytest.raises(KeyboardInterrupt):
            run.train(stop=lambda: run.runs[0].trainer.step == 2)
    with begun("medusa", llm, data, tmp_path / "out", options=SMALL) as run:
        assert run.runs[0].trainer.step == 2


@pytest.mark.parametrize("method", ["hydra", "hydra++"])
def test_a_run_of_an_earlier_version_is_resumed(method: str, llm: LLM, data: Path, tmp_path: Path) -> None:
    """The settings are those that an earlier version saved, options that are gone or renamed among them."""
    out = tmp_path / "out"
    saved = {
        "epochs": 8, "batch_tokens": 300, "accumulate": 1, "learning_rate": 0.01, "warmup": 0.05, "weight_decay": 0.0,
        "clip": 1.0, "held_out": 0.03, "save_seconds": 300.0, "seed": 0, "heads": 3, "layers": 0, "output": "tied",
        "draft_vocab": 100, "soft": 0.5, "taps": 2, "grounded": True, "tied": False, "linear": False, "chained": False,
        "fused": False, "dropout": 0.0, "method": method, "model": llm.backbone.fingerprint,
        "dtype": str(llm.backbone.dtype),
    }  # fmt: skip
    with begun(method, llm, data, out, options=SMALL) as run:
        run.prepare()
        with pytest.raises(KeyboardInterrupt):
            run.train(stop=lambda: run.runs[0].trainer.step == 2)
    state = torch.load(out / "run/state.pt", weights_only=True)
    torch.save(state | {"settings": saved}, out / "run/state.pt")
    for options in (SMALL, SMALL | {"layers": "0", "grounded": "true", "linear": "false"}):
        with begun(method, llm, data, out, options=options) as run:
            assert run.runs[0].trainer.step == 2
    torch.save(state | {"settings": saved | {"grounded": False}}, out / "run/state.pt")
    with (
        pytest.raises(UsageError, match=r"holds a run with grounded False \(not None\); go on"),
        begun(method, llm, data, out, options=SMALL),
    ):
        raise AssertionError


def never_loaded(name: str) -> LLM:
    raise AssertionError("a mistake must not cost the loading of a model")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "medsua"}, "Unknown drafter 'medsua': did you mean 'medusa'"),
        ({"method": "plain"}, "Drafter 'plain' has nothing to train; those that have are medusa, medusa2, hydra"),
        ({"options": {"head": 2}}, "medusa training has no option 'head'; did you mean 'heads'"),
        ({"options": {"heads": "many"}}, "Option 'heads' of medusa training is 'many'"),
        ({"data": []}, "No data is given"),
    ],
)
def test_mistakes_are_refused_before_a_model_is_loaded(
    data: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    given = {"method": "medusa", "options": {}, "data": data} | changes
    job = Job(method=given["method"], out=tmp_path / "out", options=given["options"])
    with pytest.raises(UsageError, match=sentence), recipe.begin([job], "tiny", given["data"], load=never_loaded):
        pass
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_name_is_refused(llm: LLM, data: Path, tmp_path: Path) -> None:
    nameless = LLM(llm.backbone, llm.tokenizer, llm.drafter)
    with pytest.raises(UsageError, match=r"a model that foretell\.load has loaded"):
        trained(nameless, data, tmp_path / "out")


@pytest.mark.parametrize("count", [0, 1, 39, 40, 41, 95, 1000])
def test_conversations_to_replay_are_spread_evenly(count: int) -> None:
    found = to_replay(range(count))
    assert len(found) == min(count, MAX_REPLAYED)
    assert found == sorted(set(found))
    if count:
        gaps = {later - place for place, later in pairwise([*found, count])}
        assert found[0] == 0
        assert max(gaps) - min(gaps) <= 1
