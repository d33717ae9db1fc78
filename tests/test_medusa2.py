"""Medusa-2: the backbone's loss begins at nothing and is a divergence; heads and backbone learn when it is their turn.

What comes out is another model: without its adapters it is the old one bit for bit, and its heads draft for no other.
"""

import json
import math
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Foretell, Ran, ids_of
from random_backbones import prefilled, same
from tiny_models import DIMENSIONS, save_tiny
from torch import Tensor
from trainables import trainable

from foretell.backbone import Backbone
from foretell.backbone.load import assemble
from foretell.cli import main
from foretell.contracts import FINAL_NORM
from foretell.drafters.medusa import Medusa
from foretell.drafters.medusa2 import RISE, JointHeads, Medusa2
from foretell.drafting import checkpoint
from foretell.drafting.learning import losses
from foretell.drafting.learning.finetune import ADAPTED, causal
from foretell.drafting.learning.student import MIN_PROBABILITY, divergence
from foretell.drafting.learning.trainable import Trainable, TrainingBatch
from foretell.errors import ForetellError, UsageError
from foretell.loading.resolve import resolve
from foretell.train.data import Distilled
from foretell.train.features import TEACHER, ComputedFeatures
from foretell.train.loop import train
from foretell.train.trainer import Settings, Trainer

VOCAB = DIMENSIONS["vocab_size"]
HEADS = {"weights.0", "weights.1", "bias_LKd", "head_KVd"}
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
EMBEDDING = "model.embed_tokens.weight"


def talks() -> list[Distilled]:
    """Random conversations of different lengths, of two answers each."""
    generator, found = torch.Generator().manual_seed(0), []
    for line in range(8):
        tokens = torch.randint(VOCAB, (14 + 3 * line,), generator=generator).tolist()
        found.append(Distilled(line, tokens, [(3, 8), (11, len(tokens))]))
    return found


DATA = talks()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with biases and an output matrix of its own."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny(folder, attention_bias=True, mlp_bias=True)
    return folder


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return assemble(folder, dtype="fp32", threads=1)


def learning(backbone: Backbone, folder: Path, seed: int = 0, **options: Any) -> JointHeads:
    torch.manual_seed(seed)
    given = {"heads": 3, "draft_vocab": 0, "rank": 4, "warm": 0.0} | options
    return trainable(Medusa2, backbone, torch.ones(backbone.config.vocab), folder, **given)


def batch_of(backbone: Backbone, module: Trainable, data: list[Distilled] = DATA) -> TrainingBatch:
    return ComputedFeatures(backbone, data, module.taps).batch(range(len(data)))


def perturbed(module: JointHeads, size: float = 0.6) -> JointHeads:
    """With adapters that say something."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return module


def adapters_of(module: JointHeads) -> set[str]:
    return {name for name, _ in module.model.named_parameters() if "lora_" in name}


def shifted(batch: TrainingBatch) -> TrainingBatch:
    """With what the backbone said one token earlier."""
    rolled = {name: getattr(batch, name).roll(1, 1) for name in ("teacher_ids_BTm", "teacher_p_BTm")}
    return replace(batch, **rolled)


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def held(module: JointHeads, batch: TrainingBatch) -> float:
    """The backbone's loss."""
    return module.eval().losses(batch)["backbone"].item()


# --- the backbone's loss ------------------------------------------------------------------------------------


def test_the_states_are_those_that_the_features_keep(backbone: Backbone, folder: Path) -> None:
    """The same layers, tapped at the same places; bfloat16 costs a hundredth."""
    module = learning(backbone, folder).eval()
    batch = batch_of(backbone, module)
    with torch.no_grad():
        now = module.prepared(batch).states
    lengths_B = torch.tensor([len(each.tokens) for each in DATA])
    there_BT = torch.arange(batch.tokens_BT.shape[1]) < lengths_B[:, None]

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a[there_BT] - b[there_BT].float()).norm() / b[there_BT].float().norm())

    assert module.taps == (1, 2, FINAL_NORM)
    for tap in module.taps:
        assert apart(now[tap], batch.states[tap]) < 0.05
        assert all(apart(now[tap], batch.states[other]) > 0.2 for other in module.taps if other != tap)


def test_at_the_start_the_model_says_what_it_said(backbone: Backbone, folder: Path) -> None:
    """The teacher was computed by other code in another precision: nearly nothing is what it is apart."""
    module = learning(backbone, folder)
    batch = batch_of(backbone, module)
    assert abs(held(module, batch)) < 1e-3 < 5e-3 < held(module, shifted(batch))
    assert held(perturbed(module), batch) > 5e-3


def test_at_the_start_nothing_pulls_at_the_model(backbone: Backbone, folder: Path, in_float32: None) -> None:
    module = learning(backbone, folder, dropout=0.0).train()
    batch = batch_of(backbone, module)
    logits_BTV = (
        module.prepared(batch).states[FINAL_NORM].detach() @ causal(module.model).get_output_embeddings().weight.T
    )
    p_BTm, ids_BTm = logits_BTV.detach().softmax(-1).topk(TEACHER)
    itself = replace(batch, teacher_ids_BTm=ids_BTm, teacher_p_BTm=p_BTm)

    def pull(batch: TrainingBatch) -> float:
        module.model.zero_grad()
        term = module.losses(batch)["backbone"]
        term.backward()
        return max(float(p.grad.abs().max()) for p in module.backbone if p.grad is not None)

    assert pull(itself) < 1e-2 * pull(shifted(itself))


@pytest.mark.parametrize("sum_of_p", [None, 1.01], ids=["a part", "rounded to more than one"])
def test_the_backbones_loss_is_the_divergence_written_out(
    backbone: Backbone, folder: Path, in_float32: None, sum_of_p: float | None
) -> None:
    """Over the teacher's tokens, and all others as one; token by token in float64."""
    module = perturbed(learning(backbone, folder)).eval()
    batch = batch_of(backbone, module)
    if sum_of_p:
        sums = batch.teacher_p_BTm.sum(-1, keepdim=True).clamp(min=1e-9)
        batch = replace(batch, teacher_p_BTm=batch.teacher_p_BTm / sums * sum_of_p)
    with torch.no_grad():
        states_BTd = module.prepared(batch).states[FINAL_NORM].double()
        weight_Vd = causal(module.model).get_output_embeddings().weight.double()
    terms = []
    for b, talk in enumerate(DATA):
        for t in range(len(talk.tokens) - 1):
            if not any(start <= t + 1 < end for start, end in talk.answers):
                continue
            q = (states_BTd[b, t] @ weight_Vd.T).softmax(-1).tolist()
            p = dict(zip(batch.teacher_ids_BTm[b, t].tolist(), batch.teacher_p_BTm[b, t].tolist(), strict=True))
            assert len(p) == TEACHER
            p = {token: each / max(1.0, sum(p.values())) for token, each in p.items()}
            told, left = sum(p.values()), 1 - sum(q[token] for token in p)
            rest = max(MIN_PROBABILITY, 1 - told)
            assert (rest > 0.1) == (sum_of_p is None)
            terms.append(sum(each * math.log(each / q[token]) for token, each in p.items()))
            terms[-1] += rest * math.log(rest / left)
    assert len(terms) == sum(each.written for each in DATA)
    assert held(module, batch) == pytest.approx(sum(terms) / len(terms), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("positions", [3, 2 * losses.MIN_CHUNK + 5])
def test_the_divergence_has_the_gradient_that_autograd_finds(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own is made with the logits at hand, in bfloat16; the twin is the formula, in float64."""
    monkeypatch.setitem(losses.LOGITS, "cpu", 1)
    torch.manual_seed(0)
    weight_Vd, x_Pd = torch.randn(VOCAB, 16), torch.randn(positions, 16)
    p_Pm, ids_Pm = (torch.randn(positions, VOCAB)).softmax(-1).topk(TEACHER)
    exact_Pd = x_Pd.double().requires_grad_()
    log_q_PV = (exact_Pd @ weight_Vd.double().T).log_softmax(-1)
    told = log_q_PV.gather(1, ids_Pm).exp()
    rest_p, rest_q = 1 - p_Pm.double().sum(1), 1 - told.sum(1)
    truth = (p_Pm * (p_Pm.double().log() - told.log())).sum() + (rest_p * (rest_p.log() - rest_q.log())).sum()
    truth.backward()
    x_Pd.requires_grad_()
    loss = divergence(x_Pd, weight_Vd, ids_Pm, p_Pm)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-2)
    assert x_Pd.grad is not None
    assert exact_Pd.grad is not None
    assert (x_Pd.grad - 3 * exact_Pd.grad).norm() < 1e-2 * (3 * exact_Pd.grad).norm()


def test_without_its_adapters_the_model_is_what_it_was(backbone: Backbone, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = learning(backbone, folder)
    batch = batch_of(backbone, module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        total(module.train().losses(batch)).backward()
        optimizer.step()
    module.eval()
    fresh: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model: Any = module.model
    with torch.no_grad():
        truth, on = fresh(input_ids=batch.tokens_BT).logits, model(input_ids=batch.tokens_BT).logits
        with model.disable_adapter():
            off = model(input_ids=batch.tokens_BT).logits
    assert torch.equal(off, truth)
    assert not torch.equal(on, truth)


# --- who learns, when, and how fast -------------------------------------------------------------------------


def reached(module: JointHeads, batch: TrainingBatch) -> tuple[set[str], set[str]]:
    """Names of what learns something from a batch: of the heads, and of the backbone."""
    module.zero_grad()
    module.model.zero_grad()
    total(module.train().losses(batch)).backward()
    heads = {name for name, p in module.named_parameters() if not name.startswith("student.") and moved(p)}
    return heads, {name for name, p in module.model.named_parameters() if moved(p)}


def moved(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def test_the_heads_learn_alone_and_then_the_adapters_too(backbone: Backbone, folder: Path) -> None:
    module = learning(backbone, folder, warm=0.5)
    batch = batch_of(backbone, module)
    assert len(adapters_of(module)) == 2 * 3 * len(ADAPTED)
    for done in (0.0, 0.49):
        module.begin(done)
        assert module.alone
        assert reached(module, batch) == (HEADS, set())
        assert list(module.losses(batch)) == ["head 1", "head 2", "head 3"]
        assert "backbone" in module.eval().losses(batch)  # measured all the same
    for done in (0.5, 1.0):
        module.begin(done)
        assert not module.alone
        assert reached(module, batch) == (HEADS, {name for name in adapters_of(module) if "lora_B" in name})
        assert list(module.losses(batch)) == ["head 1", "head 2", "head 3", "backbone"]
    assert reached(perturbed(module), batch) == (HEADS, adapters_of(module))
    frozen = [p for name, p in module.model.named_parameters() if "lora_" not in name]
    assert not any(p.requires_grad for p in frozen)
    assert all(p.grad is None for p in frozen)


def test_heads_alone_leave_the_backbone_as_it_is(backbone: Backbone, folder: Path) -> None:
    module = learning(backbone, folder, warm=1.0)
    before = [p.detach().clone() for p in module.backbone]
    batch = batch_of(backbone, module)
    optimizer = torch.optim.AdamW([{"params": params} for params, _ in module.groups()], lr=0.01, weight_decay=0.1)
    total(module.train().losses(batch)).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, module.backbone, strict=True))
    assert module.weights[0].any()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_whole_backbone_learns_all_but_its_embedding(tmp_path: Path, tied: bool) -> None:
    save_tiny(tmp_path, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    backbone = assemble(tmp_path, dtype="fp32", threads=1)
    module = learning(backbone, tmp_path, adapt="full", warm=0.5)
    batch = batch_of(backbone, module)
    everything = {name for name, _ in module.model.named_parameters()}
    assert {"lm_head.weight" in everything, EMBEDDING in everything} == {not tied, True}
    module.begin(0.0)
    assert reached(module, batch) == (HEADS, set())
    module.begin(0.5)
    assert reached(module, batch) == (HEADS, everything - {EMBEDDING, "lm_head.weight"})
    before = module.model.get_parameter(EMBEDDING).detach().clone()
    torch.optim.AdamW(module.parameters(), lr=0.1).step()
    assert torch.equal(module.model.get_parameter(EMBEDDING), before)


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_the_backbone_is_slower_biases_included(backbone: Backbone, folder: Path, adapt: str) -> None:
    module = learning(backbone, folder, adapt=adapt, slower=0.1, warm=0.2)
    (heads, one), (theirs, slower) = module.groups()
    assert [one(done) for done in (0.0, 0.5, 1.0)] == [1.0] * 3
    rates = [slower(done) for done in (0.0, module.warm, module.warm + RISE / 2, module.warm + RISE, 1.0)]
    assert rates == pytest.approx([0.0, 0.01, 0.06, 0.1, 0.1])  # its moments are empty when it begins
    names = {id(p): name for name, p in module.model.named_parameters()}
    assert {names[id(p)] for p in theirs} == {n for n, p in module.model.named_parameters() if p.requires_grad}
    biases = {name for name in names.values() if "q_proj" in name and name.endswith("bias")}
    assert len(biases) == 3
    assert biases & {names[id(p)] for p in theirs} == (biases if adapt == "full" else set())
    assert not set(map(id, heads)) & names.keys()
    together = [*map(id, heads), *map(id, theirs)]
    assert sorted(together) == sorted(id(p) for p in module.parameters() if p.requires_grad)


def test_a_module_that_is_moved_takes_its_backbone_along(backbone: Backbone, folder: Path) -> None:
    """And it is the same parameters that learn: the trainer moves the module, then asks for its groups."""
    module = learning(backbone, folder)
    module.to(torch.float64)
    assert {p.dtype for p in module.model.parameters()} == {torch.float64}
    learns = [id(p) for p in module.model.parameters() if p.requires_grad]
    assert [id(p) for p in module.backbone] == learns


@pytest.mark.parametrize(
    ("schedule", "done", "expected"),
    [
        ("constant", 0.0, 1.0), ("constant", 0.19, 1.0), ("constant", 0.2, 0.3), ("constant", 1.0, 0.3),
        ("sine", 0.19, 1.0), ("sine", 0.2, 0.3 * math.sin(math.pi * 0.1)), ("sine", 0.5, 0.3 / math.sqrt(2)),
        ("sine", 1.0, 0.3),
    ],
)  # fmt: skip
def test_the_heads_weight_follows_its_schedule(
    backbone: Backbone, folder: Path, schedule: str, done: float, expected: float
) -> None:
    """λ0, relative to the backbone's loss (while there is none, it is one), times 0.8^k of head k = 1, 2, 3.

    It weighs what is learnt. What is told of a head is its plain loss, the same at any weight.
    """
    module = perturbed(learning(backbone, folder, schedule=schedule, weight=0.3, warm=0.2)).eval()
    batch, theirs = batch_of(backbone, module), list(module.backbone)[-1]

    def told_and_pulls() -> list[tuple[Tensor, Tensor]]:
        terms = module.losses(batch)
        assert list(terms) == ["head 1", "head 2", "head 3", "backbone"]
        of_heads, of_backbone = sum(terms[f"head {k}"] for k in (1, 2, 3)), terms["backbone"]
        (pull_LKd,) = torch.autograd.grad(of_heads, module.bias_LKd, retain_graph=True)  # each row is one head's
        pulls = [*pull_LKd.unbind(1), torch.autograd.grad(of_backbone, theirs, retain_graph=True)[0]]
        return list(zip(terms.values(), pulls, strict=True))

    module.begin(0.0)
    module.decay = 1.0  # and no weight is any but one
    plain = told_and_pulls()
    del module.decay
    module.begin(done)
    assert module.heads_weight() == pytest.approx(expected)
    weights = [expected * 0.8, expected * 0.8**2, expected * 0.8**3, 1.0]
    for weight, (term, pull), (plain_term, plain_pull) in zip(weights, told_and_pulls(), plain, strict=True):
        assert torch.equal(term, plain_term)
        assert plain_pull.any()
        torch.testing.assert_close(pull, weight * plain_pull)


def test_nothing_supervised_is_no_loss(backbone: Backbone, folder: Path) -> None:
    module = learning(backbone, folder)
    mute = [Distilled(each.line, each.tokens, []) for each in DATA]
    assert module.train().losses(batch_of(backbone, module, mute)) == {}
    assert [len(each.ranks_PK) for each in module.guesses(batch_of(backbone, module, mute))] == [0] * len(DATA)


def cyclic(backbone: Backbone, folder: Path, hold: bool, **options: Any) -> tuple[float, float, float]:
    """Learns one rotation of seven tokens: how often the heads are right before and after, and how far the model is."""
    cycle = [11, 3, 42, 7, 29, 60, 18]
    module = learning(backbone, folder, soft=0.0, warm=0.25, dropout=0.0, **options)
    batch = batch_of(backbone, module, [Distilled(0, [cycle[i % 7] for i in range(60)], [(1, 60)])])

    def right() -> float:
        return float((module.eval().guesses(batch)[0].ranks_PK[:-2] == 0).float().mean())

    before = right()
    groups = [{"params": parameters, "lr": 0.02 * rate(1.0)} for parameters, rate in module.groups()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    for step in range(80):
        module.begin(step / 80)
        terms = module.train().losses(batch)
        optimizer.zero_grad()
        total({name: term for name, term in terms.items() if hold or name != "backbone"}).backward()
        optimizer.step()
    return before, right(), held(module, batch)


def test_heads_learn_while_the_model_stays_near_what_it_was(backbone: Backbone, folder: Path) -> None:
    """One rotation: the model itself has no reason to say it, and must not learn to."""
    before, after, near = cyclic(backbone, folder, hold=True)
    _, _, far = cyclic(backbone, folder, hold=False)
    assert before < 0.5 < 0.9 < after
    assert 0 < near < far
    assert near < 0.1


@pytest.mark.parametrize("options", [{"acceptance": 0.9}, {"position_weights": "dynamic"}], ids=str)
def test_heads_learn_by_other_losses_too(backbone: Backbone, folder: Path, options: dict[str, Any]) -> None:
    before, after, _ = cyclic(backbone, folder, hold=True, **options)
    assert before < 0.5 < 0.9 < after


# --- interrupted and taken up again -------------------------------------------------------------------------


def trainer(backbone: Backbone, folder: Path, out: Path, seed: int = 0, **options: Any) -> Trainer:
    module = learning(backbone, folder, seed, **({"warm": 0.3} | options))
    settings = Settings(epochs=4, batch_tokens=60, learning_rate=0.01, held_out=0.0)
    return Trainer(module, ComputedFeatures(backbone, DATA, module.taps), settings, out)


@pytest.mark.parametrize(("adapt", "dropout"), [("lora", 0.0), ("lora", 0.3), ("full", 0.0)])
def test_an_interrupted_run_ends_like_a_straight_one(
    backbone: Backbone, folder: Path, tmp_path: Path, adapt: str, dropout: float
) -> None:
    """Whatever the fresh module is like that takes it up: the state holds all that learns, and dropout is seeded."""
    options: dict[str, Any] = {"adapt": adapt, "dropout": dropout}
    straight = trainer(backbone, folder, tmp_path / "straight", **options)
    train([straight])
    assert straight.steps > 12
    for after, seed in ((2, 0), (9, 7)):  # while the heads learn alone, and later
        cut = trainer(backbone, folder, tmp_path / "cut", seed, **options)
        with pytest.raises(KeyboardInterrupt):
            train([cut], stop=lambda cut=cut, after=after: cut.step == after)
    path = tmp_path / "cut/state.pt"
    state = torch.load(path, weights_only=True)
    former = {name.replace("student.", "pupil."): value for name, value in state["module"].items()}
    assert former.keys() != state["module"].keys()
    torch.save(state | {"module": former}, path)  # as earlier versions named what learns
    final = trainer(backbone, folder, tmp_path / "cut", 9, **options)
    torch.manual_seed(99)  # whatever has been drawn in between
    train([final])
    assert final.step == straight.step == straight.steps
    ours, theirs = final.module, straight.module
    assert isinstance(ours, JointHeads)
    assert isinstance(theirs, JointHeads)
    for a, b in (
        (ours.state_dict(), theirs.state_dict()),
        (ours.model.state_dict(), theirs.model.state_dict()),
    ):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    states, truth = (each.optimizer.state_dict()["state"] for each in (final, straight))
    assert states.keys() == truth.keys()
    assert all(torch.equal(states[i][name], truth[i][name]) for i in truth for name in truth[i])
    fresh = learning(backbone, folder, adapt=adapt)
    assert all(not torch.equal(a, b) for a, b in zip(ours.backbone, fresh.backbone, strict=True))


def test_adapters_drop_what_they_read_while_they_learn(backbone: Backbone, folder: Path) -> None:
    def states(module: JointHeads, seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return module.prepared(batch).states[FINAL_NORM]

    plain, module = (perturbed(learning(backbone, folder, dropout=dropout)) for dropout in (0.0, 0.3))
    batch = batch_of(backbone, module)
    module.train()
    assert torch.equal(states(module, 1), states(module, 1))
    assert not torch.equal(states(module, 1), states(module, 2))
    assert torch.equal(states(module.eval(), 1), states(plain.train(), 2))


def test_figures_of_a_finished_run_that_is_opened_again_are_the_same(
    backbone: Backbone, folder: Path, tmp_path: Path
) -> None:
    made = trainer(backbone, folder, tmp_path / "run")
    train([made])
    figures = made.evaluate()
    again = trainer(backbone, folder, tmp_path / "run", seed=5)
    train([again])
    assert again.evaluate() == figures


# --- what comes out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_what_is_saved_is_the_model_that_learnt(
    backbone: Backbone, folder: Path, cache: Path, tmp_path: Path, adapt: str
) -> None:
    made = trainer(backbone, folder, tmp_path / "out" / "run", adapt=adapt)
    train([made])
    module: Any = made.module.eval()
    before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    name = module.save_backbone(str(folder), tmp_path / "out")
    after = module.model.state_dict()
    assert all(same(after[key], before[key]) for key in before | after)  # it may go on learning
    assert name == (f"{folder}+{tmp_path / 'out'}" if adapt == "lora" else str(tmp_path / "out" / "model"))
    assert not (tmp_path / "out" / "adapter" / "README.md").exists()
    tokens = torch.tensor(DATA[-1].tokens)
    ours = assemble(resolve(name).path, dtype="fp32", threads=1)
    with torch.no_grad():
        if adapt == "full":  # a whole one is rounded when it is saved
            module.model.to(torch.bfloat16).float()
        theirs = module.model(input_ids=tokens[None]).logits[0]
    logits, unchanged = (each.logits(each.norm(prefilled(each, tokens)[1])) for each in (ours, backbone))
    torch.testing.assert_close(logits, theirs, atol=1e-4, rtol=1e-4)
    assert (logits - unchanged).abs().max() > 1e-2
    assert ours.fingerprint != backbone.fingerprint
    assert torch.equal(ours.embed(tokens).bfloat16(), backbone.embed(tokens).bfloat16())


def test_the_heads_are_medusas_and_may_begin_with_them(backbone: Backbone, folder: Path) -> None:
    medusa = trainable(Medusa, backbone, torch.ones(VOCAB), heads=3, draft_vocab=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in medusa.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).bfloat16())
    tensors, arch = medusa.checkpoint()
    module = learning(backbone, folder)
    module.start(arch, tensors)
    ours, log_probs = module.checkpoint()
    assert log_probs == arch
    assert ours.keys() == tensors.keys() == {"weight.0", "weight.1", "bias", "head", "vocabulary"}
    assert all(torch.equal(ours[name], tensors[name]) for name in tensors)
    with pytest.raises(UsageError, match="It is made with other options; train with the same"):
        learning(backbone, folder, heads=2).start(arch, tensors)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"adapt": "half"}, r"adapt is 'half'; it must be lora or full\."),
        ({"schedule": "cosine"}, r"schedule is 'cosine'; it must be constant or sine\."),
        ({"rank": 0}, r"rank is 0; it must lie between 1 and 1024\."),
        ({"rank": 2.5}, r"'rank' of .* is 2\.5; it must be a whole number\."),
        ({"weight": -1}, "weight is -1; it must lie between"),
        ({"weight": math.nan}, "weight is nan; it must lie between"),
        ({"slower": 101.0}, "slower is 101.0; it must lie between"),
        ({"warm": 1.5}, "warm is 1.5; it must lie between 0 and 1"),
        ({"dropout": 0.95}, "dropout is 0.95; it must lie between"),
        ({"output": "mine"}, "output is 'mine'; it must be shared, tied or own"),
        ({"heads": 0}, "heads is 0; it must lie between"),
        ({"taps": 3}, "taps is 3; it must lie between 0 and 2"),
    ],
)
def test_options_are_checked(backbone: Backbone, folder: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as refusal:
        learning(backbone, folder, **options)
    assert "\n" not in str(refusal.value)


def test_what_it_needs_is_said_in_one_sentence(
    backbone: Backbone, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ForetellError, match=r"^Medusa-2 changes the backbone, and needs the folder of its files\.$"):
        trainable(Medusa2, backbone, torch.ones(VOCAB))
    monkeypatch.setitem(sys.modules, "peft", None)
    sentence = r"^Adapters need peft \(pip install 'foretell\[train\]'\); without it use `adapt='full'`\.$"
    with pytest.raises(UsageError, match=sentence):
        learning(backbone, folder)
    assert learning(backbone, folder, adapt="full").groups()[1][0]


# --- the command line ---------------------------------------------------------------------------------------

TINY = ("--dtype", "fp32", "--threads", "1")
FEW = (
    "--epochs", "8", "--batch-tokens", "300", "--lr", "0.01", "-o", "heads=3", "-o", "draft_vocab=100", "-o", "rank=4",
)  # fmt: skip


def command(model: str, where: Path, out: Path, *more: str) -> list[str]:
    kept = ["--cache-dir", str(where / "cache"), "--data", str(where / "data"), "--out", str(out)]
    return ["train", "medusa2", "-m", model, *TINY, *kept, *FEW, *more]


@pytest.fixture(scope="module")
def trained(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the tiny model wrote (data), what Medusa-2 made of it (out), and a cache of its own."""
    where = tmp_path_factory.mktemp("trained")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    lines = [json.dumps({"turns": [word, "and?"][: 1 + i % 2]}) for i, word in enumerate(words)]
    (where / "prompts.jsonl").write_text("\n".join(lines))
    prompts = ["--prompts", str(where / "prompts.jsonl"), "-n", "40", "--out", str(where / "data")]
    for arguments in (["distill", "-m", tiny, *TINY, *prompts], command(tiny, where, where / "out")):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert not left.value.code
    return where


def refused(ran: Ran, code: int, sentence: str) -> None:
    """One sentence on stderr, nothing on stdout, no traceback."""
    assert ran.out == ""
    assert re.fullmatch(rf"error: .*{sentence}.*\n", ran.err), ran.err
    assert ran.code == code


def assert_lossless(foretell: Foretell, model: str, where: Path, drafter: Path) -> None:
    """The heads change no token of the changed model's own."""
    options = ["-m", model, *TINY, "--cache-dir", str(where / "cache"), "--prompts", str(where / "prompts.jsonl")]
    for sampling in ([], ["-t", "0.9", "--seed", "3"]):
        plain = foretell("generate", *options, "-n", "40", "--json", *sampling).lines
        heads = ["-d", "medusa2", "-o", f"checkpoint={drafter}", "-o", "nodes=4", "--no-adapt", "-b", "3"]
        ours = foretell("generate", *options, "-n", "40", "--json", *sampling, *heads).lines
        assert len(plain) == 8
        assert ids_of(ours) == ids_of(plain)
        assert all(line["drafted"] for line in ours)


def test_from_a_model_alone_to_a_changed_one_with_heads(
    foretell: Foretell, tiny: str, trained: Path, cache: Path
) -> None:
    out, model = trained / "out", f"{tiny}+{trained / 'out'}"
    saved, tensors = checkpoint.load(out / "drafter")
    assert (saved.method, saved.backbone) == ("medusa2", model)
    assert saved.arch == {"heads": 3, "layers": 2, "output": "tied", "taps": [1, 2], "root": True}
    assert tensors.keys() == {"weight.0", "weight.1", "bias", "head", "vocabulary"}
    assert saved.tokens_per_step
    assert saved.provenance["loss"].keys() == {"head 1", "head 2", "head 3", "backbone"}
    base = assemble(Path(tiny), dtype="fp32", threads=1, cache_dir=trained / "cache")
    assert saved.fingerprint not in ("", base.fingerprint)
    assert sorted(path.name for path in (out / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert_lossless(foretell, model, trained, out / "drafter")
    assert_lossless(foretell, model, trained, out)  # the folder that the command was given will do
    assert not cache.exists()  # all of it in the one that was named


def test_its_heads_draft_for_no_other_model(foretell: Foretell, tiny: str, trained: Path) -> None:
    drafter = f"checkpoint={trained / 'out' / 'drafter'}"
    whose = re.escape(f"{tiny}+{trained / 'out'}")
    ran = foretell("generate", "hi", "-m", tiny, *TINY, "-d", "medusa2", "-o", drafter)
    sentence = (
        rf"was trained for {whose} \(fingerprint \w+\), not for this model \(\w+\); use --model {whose}, train one"
    )
    refused(ran, 2, rf"{sentence} for this model, or allow it with -o any_backbone=true")
    ran = foretell("generate", "hi", "-m", tiny, *TINY, "-d", "medusa", "-o", drafter)
    refused(ran, 2, "holds a medusa2 drafter, not medusa; use --drafter medusa2")
    ran = foretell("generate", "hi", "-m", tiny, *TINY, "-d", "medusa2")
    refused(
        ran,
        2,
        r"No medusa2 drafter comes with foretell for this model \(one does for smollm2-135m\+medusa2\); train one",
    )


def test_the_same_command_again_ends_with_the_same(
    foretell: Foretell, tiny: str, trained: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(trained / "out", tmp_path / "out")
    names = ("drafter/model.safetensors", "adapter/adapter_model.safetensors")
    before = [(out / name).read_bytes() for name in names]
    for name in names:
        (out / name).unlink()
    assert foretell(*command(tiny, trained, out)).code == 0  # nothing is left to learn
    assert [(out / name).read_bytes() for name in names] == before
    ran = foretell(*command(tiny, trained, out, "-o", "weight=0.5"))
    assert ran.code == 2
    assert re.search(r"holds a run with weight 0\.2 \(not 0\.5\); go on with the same", ran.err)


def test_a_backbone_that_learnt_whole_is_a_folder(foretell: Foretell, tiny: str, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = foretell(*command(tiny, trained, out, "-o", "adapt=full", "--epochs", "2"))
    assert ran.code == 0, ran.err
    assert checkpoint.load(out / "drafter")[0].backbone == str(out / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / "model" / name).read_bytes() == (Path(tiny) / name).read_bytes()
    assert_lossless(foretell, str(out / "model"), trained, out / "drafter")
    words = shlex.split(ran.err.splitlines()[-1].partition("use it with ")[2])
    kept = ["--cache-dir", str(trained / "cache")]
    drafter = ["--drafter", "medusa2", "-o", f"checkpoint={out / 'drafter'}"]
    assert words == ["foretell", "chat", "--model", str(out / "model"), *kept, *drafter]
    assert foretell(*words[1:], *TINY, "-n", "4", stdin=b"hi\n").code == 0
    for folder in (out, out / "drafter"):
        ran = foretell("generate", "hi", "-m", tiny, *TINY, "-d", "medusa2", "-o", f"checkpoint={folder}")
        refused(
            ran, 2, rf"was trained for {re.escape(str(out / 'model'))} .*; use --model {re.escape(str(out / 'model'))},"
        )


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("adapt=half", "adapt is 'half'; it must be lora or full"),
        ("schedule=cosine", "schedule is 'cosine'; it must be constant or sine"),
        ("rank=0", "rank is 0; it must lie between 1 and 1024"),
        ("rank=many", "Option 'rank' of medusa2 training is 'many'; it must be a whole number"),
        (
            "ranks=4",
            "edusa2 training has no option 'ranks'; did you mean 'rank'. It has .*heads, .*adapt, rank",
        ),
        ("folder=/", "edusa2 training has no option 'folder'"),
    ],
)
def test_mistakes_are_one_line(
    foretell: Foretell, tiny: str, trained: Path, tmp_path: Path, option: str, sentence: str
) -> None:
    refused(foretell(*command(tiny, trained, tmp_path / "out", "-o", option)), 2, sentence)
    assert not (tmp_path / "out").exists()
