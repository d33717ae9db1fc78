"""Training multiplies in the number type that this machine is faster at, and everything that learns keeps to it."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Foretell
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trainables import trainable

from foretell import drafters
from foretell.api import LLM, load
from foretell.drafting.learning import number_types
from foretell.drafting.learning.trainable import Trainable, TrainingBatch
from foretell.errors import ForetellError
from foretell.train.data import Distilled
from foretell.train.features import ComputedFeatures, FeatureStore
from foretell.train.forward import Forward
from foretell.train.loop import train
from foretell.train.trainer import Settings, Trainer

TINY = {"dtype": "fp32", "threads": 1}
METHODS: dict[str, dict[str, Any]] = {
    "medusa": {"heads": 2},
    "hydra": {"heads": 2, "linear_tail": True},
    "hydra++": {"heads": 2, "linear_tail": True, "fuse_prefix": True},
    "kangaroo": {"exit": 1, "mlp": True, "output": "tied"},
    "medusa2": {"heads": 2, "rank": 4, "warm": 0.0},
    "hidden_transfer": {"steps": 2, "adapters": 3},
    "m2r2": {"exit": 2, "rank": 4, "output": "tied"},
    "layerskip": {"exit": 1, "stride": 1, "rank": 4, "period": 1, "hold": 1.0, "dropout": 0.0},
    "hamburger": {"adapt": "lora", "rank": 4, "blocks": 1},
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _measured_anew() -> Iterator[None]:
    number_types.measured.cache_clear()
    yield
    number_types.measured.cache_clear()


@pytest.fixture(scope="module")
def llm(tiny: str) -> LLM:
    return load(tiny, **TINY)


@pytest.fixture(scope="module")
def data() -> list[Distilled]:
    generator = torch.Generator().manual_seed(0)
    talks = [torch.randint(256, (30 + 5 * line,), generator=generator).tolist() for line in range(4)]
    return [Distilled(line, tokens, [(5, len(tokens))]) for line, tokens in enumerate(talks)]


def machine(monkeypatch: pytest.MonkeyPatch, **nanoseconds: float) -> list[tuple[str, int]]:
    """Lets products take so long for each number; returns which are timed, and at how many positions."""
    asked: list[tuple[str, int]] = []

    def seconds(dtype: torch.dtype, device: str, positions: int, outputs: int) -> float:
        name = str(dtype).removeprefix("torch.")
        asked.append((name, positions))
        return nanoseconds[name] * 1e-9 * positions * outputs

    monkeypatch.setattr(number_types, "_seconds", seconds)
    number_types.measured.cache_clear()
    return asked


# -- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("float32", "bfloat16", "faster", "sizes"),
    [
        (1.0, 40.0, "float32", 1),  # no units: clear at the smallest product
        (40.0, 1.0, "bfloat16", 1),
        (1.0, 2.0, "float32", 4),  # alike: at larger ones, until they take too long
        (2.0, 1.0, "bfloat16", 4),
        (10.0, 11.0, "float32", 3),
        (0.001, 0.0011, "float32", 5),  # an accelerator sees all of them
    ],
)
def test_the_faster_type_is_taken_and_slow_products_stay_small(
    monkeypatch: pytest.MonkeyPatch, float32: float, bfloat16: float, faster: str, sizes: int
) -> None:
    asked = machine(monkeypatch, float32=float32, bfloat16=bfloat16)
    assert number_types.chosen(CPU) == faster
    assert number_types.number_type(CPU) == getattr(torch, faster)
    assert asked == [(name, positions) for positions, _ in number_types.SIZES[:sizes] for name in number_types.TYPES]
    number_types.chosen(CPU)
    assert len(asked) == 2 * sizes  # measured once


def test_what_is_given_counts_and_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, float32=1, bfloat16=40)
    with number_types.multiply_in("bfloat16"):
        assert number_types.number_type(CPU) == torch.bfloat16
        with number_types.multiply_in("float32"):
            assert number_types.number_type(CPU) == torch.float32
        assert number_types.number_type(CPU) == torch.bfloat16
    assert number_types.number_type(CPU) == torch.float32


ASK = """
import time, torch
from foretell.drafting.learning.number_types import measured
torch.set_num_threads(1)
began = time.process_time()
print(measured("cpu").fastest, time.process_time() - began)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variable is of x86")
def test_without_units_float32_is_taken_within_a_second() -> None:
    """As a processor without bfloat16 would: here the library is told to do without."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, check=True, capture_output=True, text=True)
    fastest, seconds = done.stdout.split()
    assert fastest == "float32"
    assert float(seconds) < 1.0


# -- who multiplies -------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Notes the number types of matrices that are multiplied, forwards and backwards."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "linear", "attention")

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in func.overloadpacket.__name__ for name in self.NAMES):
            self.types |= {each.dtype for each in args if isinstance(each, Tensor) and each.is_floating_point()}
        return func(*args, **(kwargs or {}))


def learning(llm: LLM, method: str) -> Trainable:
    torch.manual_seed(0)
    assert llm.folder
    cls: Any = drafters.drafter_class(method)
    counts_V = torch.ones(llm.backbone.config.vocab)
    module: Trainable = trainable(cls, llm.backbone, counts_V, llm.folder.path, draft_vocab=0, **METHODS[method])
    with torch.no_grad():  # they begin as what gives most gradients no way through
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def learnt(module: Trainable, batch: TrainingBatch, name: str) -> tuple[float, Tensor, set[torch.dtype]]:
    """The loss in a number type, its gradients, and the types that were multiplied for them."""
    module.zero_grad()
    torch.manual_seed(0)
    with number_types.multiply_in(name), Products() as spy:
        loss = torch.stack([*module.losses(batch).values()]).sum()
        loss.backward()
        module.guesses(batch)
    gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients), spy.types


@pytest.mark.parametrize("method", METHODS)
def test_everything_that_learns_multiplies_in_the_chosen_type(llm: LLM, data: list[Distilled], method: str) -> None:
    module = learning(llm, method)
    batch = ComputedFeatures(llm.backbone, data, module.taps).batch(range(len(data)))
    loss, gradient, types = learnt(module, batch, "float32")
    assert types == {torch.float32}
    rounded_loss, rounded, types = learnt(module, batch, "bfloat16")
    assert torch.bfloat16 in types
    assert rounded_loss == pytest.approx(loss, rel=0.01)
    assert not torch.equal(rounded, gradient)
    assert (rounded - gradient).norm() < 0.03 * gradient.norm()


@pytest.mark.parametrize("method", METHODS)
def test_measuring_gives_the_losses_and_guesses_of_each_alone(llm: LLM, data: list[Distilled], method: str) -> None:
    module = learning(llm, method).eval()
    batch = ComputedFeatures(llm.backbone, data, module.taps).batch(range(len(data)))
    with torch.no_grad():
        losses, guesses = module.measured(batch)
        assert losses == module.losses(batch)
    for found, alone in zip(guesses, module.guesses(batch), strict=True):
        assert torch.equal(found.ranks_PK, alone.ranks_PK)
        assert torch.equal(found.log_probs_PKR, alone.log_probs_PKR)


# -- a run keeps to its type ----------------------------------------------------------------------------------------


def trainer(llm: LLM, data: list[Distilled], folder: Path) -> Trainer:
    module = learning(llm, "medusa")
    settings = Settings(epochs=30, batch_tokens=150, held_out=0)
    return Trainer(module, ComputedFeatures(llm.backbone, data, module.taps), settings, folder)


def logged(folder: Path) -> list[str]:
    return [json.loads(line)["products"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("first", "then", "goes_on"),
    [
        ((1.0, 0.5), (1.0, 1.1), "bfloat16"),  # a little slower is no reason: the same run, the same weights
        ((1.0, 0.5), (1.0, 40.0), "float32"),
        ((1.0, 40.0), (1.0, 0.5), "float32"),
        ((1.0, 40.0), (40.0, 1.0), "bfloat16"),
    ],
)
def test_a_run_keeps_its_type_unless_another_machine_is_much_slower_at_it(
    monkeypatch: pytest.MonkeyPatch, llm: LLM, data: list[Distilled], tmp_path: Path, first: tuple[float, float],
    then: tuple[float, float], goes_on: str,
) -> None:  # fmt: skip
    machine(monkeypatch, float32=first[0], bfloat16=first[1])
    begun = trainer(llm, data, tmp_path)
    began_in = min(zip(first, number_types.TYPES, strict=True))[1]
    assert begun.number_type == began_in
    with pytest.raises(KeyboardInterrupt):
        train([begun], stop=lambda: begun.step == 25)
    before = logged(tmp_path)
    assert set(before) == {began_in}
    machine(monkeypatch, float32=then[0], bfloat16=then[1])
    again = trainer(llm, data, tmp_path)
    assert again.resume()
    assert (again.began_in, again.number_type) == (began_in, goes_on)
    with Products() as spy:
        train([again])
        again.evaluate()
    assert (torch.bfloat16 in spy.types) == (goes_on == "bfloat16")
    after = logged(tmp_path)
    assert after == [*before, *[goes_on] * (len(after) - len(before))]
    assert len(after) > len(before)
    assert again.step == again.steps
    last = trainer(llm, data, tmp_path)  # a third time nothing changes
    assert last.resume()
    assert (last.began_in, last.number_type) == (goes_on, goes_on)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True], ids=["computed", "kept"])
def test_the_plain_pass_multiplies_in_the_type_of_the_run(
    monkeypatch: pytest.MonkeyPatch, tiny: str, data: list[Distilled], tmp_path: Path, kept: bool
) -> None:
    """Whatever is the faster when it runs, and whatever is given around it: the same run ends with the same weights."""
    llm = load(tiny, dtype="bf16", threads=1)
    monkeypatch.setattr(ComputedFeatures, "by_decoding", False)
    made: list[torch.dtype] = []
    init = Forward.__init__

    def noting(self: Forward, *args: Any) -> None:
        init(self, *args)
        made.append(self.dtype)

    monkeypatch.setattr(Forward, "__init__", noting)

    def begun(folder: Path) -> Trainer:
        run = trainer(llm, data, folder)
        if kept:
            run.features = FeatureStore(llm.backbone, data, run.module.taps, folder / "kept")
            run.features.multiply_in(run.number_type)
            run.features.prepare()
        return run

    machine(monkeypatch, float32=1.0, bfloat16=0.5)
    straight, cut = begun(tmp_path / "straight"), begun(tmp_path / "cut")
    train([straight])
    with pytest.raises(KeyboardInterrupt):
        train([cut], stop=lambda: cut.step == 25)
    machine(monkeypatch, float32=1.0, bfloat16=1.1)
    again = trainer(llm, data, tmp_path / "cut")
    with number_types.multiply_in("float32"):
        train([again])
        again.evaluate()
    assert set(made) == {torch.bfloat16}
    if not kept:
        ours, theirs = again.module.state_dict(), straight.module.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_of_an_earlier_version_multiplied_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, llm: LLM, data: list[Distilled], tmp_path: Path
) -> None:
    machine(monkeypatch, float32=1.0, bfloat16=1.1)
    train([trainer(llm, data, tmp_path)])
    path = tmp_path / "state.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"products": "float8"}, path)
    with pytest.raises(ForetellError, match="is damaged"):
        trainer(llm, data, tmp_path).resume()
    del state["products"]
    torch.save(state, path)
    older = trainer(llm, data, tmp_path)
    assert older.resume()
    assert older.number_type == "bfloat16"


@pytest.mark.parametrize(
    ("name", "before", "sentence"),
    [
        ("float32", "float32", "training multiplies in float32, 4.0 times as fast here as bfloat16"),
        ("bfloat16", "bfloat16", "in bfloat16, as it began, though float32 is 4.0 times as fast here"),
        ("float32", "bfloat16", "began in bfloat16 and continues in float32, 4.0 times as fast here"),
    ],
)
def test_what_is_said_of_it(name: str, before: str, sentence: str) -> None:
    assert sentence in number_types.Measured({"float32": 0.5, "bfloat16": 2.0}).explained(name, before)


def test_a_command_says_what_it_multiplies_in_and_goes_on_elsewhere(
    monkeypatch: pytest.MonkeyPatch, foretell: Foretell, tiny: str, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in ("one", "two", "three")))
    ours = ["-m", tiny, "--dtype", "fp32", "--threads", "1"]
    talks, heads = str(tmp_path / "data"), tmp_path / "heads"
    assert foretell("distill", *ours, "--prompts", str(prompts), "--out", talks, "-n", "30").code == 0
    command = ["train", "medusa", *ours, "--data", talks, "--out", str(heads), "--batch-tokens", "99", "-o", "heads=2"]
    machine(monkeypatch, float32=1.0, bfloat16=0.25)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "evaluate", lambda *_, **rest: (_ for _ in ()).throw(KeyboardInterrupt))
        ran = foretell(*command)
    assert (ran.code, "multiplies in bfloat16, 4.0 times as fast here as float32\n" in ran.err) == (130, True)
    machine(monkeypatch, float32=1.0, bfloat16=40.0)
    ran = foretell(*command)
    assert ran.code == 0
    assert "the training began in bfloat16 and continues in float32, 40.0 times as fast here\n" in ran.err
    assert json.loads((heads / "drafter/config.json").read_text())["provenance"]["products"] == "float32"
