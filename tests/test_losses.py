"""The losses of draft heads: values and gradients are those of plain autograd in float64, and what they are to do.

Legend: P positions, d hidden width, V draft vocabulary, m target tokens, K heads.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_medusa import VOCAB, backbone_of, batch_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trainables import trainable

from foretell.drafters.hydra.drafter import Hydra, HydraPlus
from foretell.drafters.medusa import Medusa
from foretell.drafting.learning import heads, losses
from foretell.drafting.learning.losses import (
    MIN_CHUNK,
    SMOOTHING,
    chunk_size,
    draft_loss,
    dynamic_weights,
    probabilities,
)
from foretell.drafting.learning.number_types import multiply_in
from foretell.drafting.learning.student import divergence

pytestmark = pytest.mark.usefixtures("one_thread")


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ == "mm"
        return func(*args, **(kwargs or {}))


def twin(x_Pd: Tensor, weight_Vd: Tensor, ids_Pm: Tensor, p_Pm: Tensor, acceptance: float) -> Tensor:
    """The loss of each position, over the whole vocabulary."""
    log_q_PV = (x_Pd @ weight_Vd.T).log_softmax(-1)
    p_PV = torch.zeros_like(log_q_PV).scatter_add(-1, ids_Pm, p_Pm.double())
    accepted_PV = torch.minimum(p_PV, log_q_PV.exp())
    return -((1 - acceptance) * p_PV * log_q_PV + acceptance * accepted_PV).sum(-1)


def numbers(rows: int, vocab: int, targets: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs, output matrix, targets (a token may be named twice), their probabilities, and how much rows count."""
    generator = torch.Generator().manual_seed(seed)
    x_Pd = torch.randn(rows, 8, generator=generator).bfloat16().float()
    weight_Vd = torch.randn(vocab, 8, generator=generator).bfloat16().float()
    ids_Pm = torch.randint(vocab, (rows, targets), generator=generator)
    p_Pm = torch.rand(rows, targets, generator=generator) * (torch.rand(rows, targets, generator=generator) > 0.3)
    p_Pm = p_Pm / (p_Pm.sum(1, keepdim=True) + torch.rand(rows, 1, generator=generator))  # some of it was left out
    q_PV = (x_Pd.double() @ weight_Vd.double().T).softmax(-1)
    p_PV = torch.zeros_like(q_PV).scatter_add(-1, ids_Pm, p_Pm.double())
    clear_PV = (p_PV == 0) | ((p_PV - q_PV).abs() > 0.1 * q_PV)  # where p is q, rounding decides what the gradient is
    return x_Pd, weight_Vd, ids_Pm, p_Pm * clear_PV.all(-1, keepdim=True), torch.rand(rows, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 1200), st.integers(1, 40), st.integers(1, 6), st.integers(0, 99),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip
def test_the_chunked_loss_and_its_gradient_are_the_plain_ones(
    rows: int, vocab: int, targets: int, seed: int, acceptance: float, number_type: str
) -> None:
    x, weight, ids, p, counts = numbers(rows, vocab, targets, seed)
    x2, weight2 = (t.double().requires_grad_() for t in (x, weight))
    plain = twin(x2, weight2, ids, p, acceptance)
    (counts * plain * 0.5).sum().backward()
    x.requires_grad_()
    weight.requires_grad_()
    with multiply_in(number_type):
        loss, each_P = draft_loss(x, weight, ids, p, counts, acceptance)
    (loss * 0.5).backward()
    assert not each_P.requires_grad
    rough = number_type == "bfloat16"
    expected = (plain, (counts * plain).sum(), x2.grad, weight2.grad)
    for ours, theirs in zip((each_P, loss, x.grad, weight.grad), expected, strict=True):
        assert ours is not None
        assert theirs is not None
        # relative to the result, and for sums that cancel, to what was summed
        close = 0.02 * theirs.abs().max() + 0.01 * rows**0.5 if rough else 1e-5 * (theirs.abs().max() + rows**0.5)
        assert (ours.double() - theirs).abs().max() <= close


@pytest.mark.parametrize("acceptance", [0.0, 0.9])
@pytest.mark.parametrize("rows", [MIN_CHUNK - 1, MIN_CHUNK, 3 * MIN_CHUNK + 7, 2048])
def test_chunks_of_any_size_give_the_same(rows: int, acceptance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk in (MIN_CHUNK, 100, 10_000):
        monkeypatch.setitem(losses.LOGITS, "cpu", 30 * chunk)
        assert chunk_size(30, torch.device("cpu")) == chunk
        x, weight, ids, p, counts = numbers(rows, 30, 4, 1)
        x.requires_grad_()
        weight.requires_grad_()
        with multiply_in("float32"):
            loss, _ = draft_loss(x, weight, ids, p, counts, acceptance)
        loss.backward()
        found.append((loss.detach(), x.grad, weight.grad))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


def test_logits_that_exist_at_once_are_bounded() -> None:
    gpu, processor = torch.device("cuda"), torch.device("cpu")
    assert chunk_size(12288, gpu) == 8192
    assert chunk_size(49152, gpu) == 2048
    assert chunk_size(12288, processor) == 2048
    assert chunk_size(49152, processor) == 512
    assert chunk_size(1 << 21, gpu) == chunk_size(1 << 19, processor) == MIN_CHUNK


@pytest.mark.parametrize("acceptance", [0.0, 0.9])
def test_nothing_is_multiplied_for_gradients_that_nobody_asks_for(
    acceptance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, ids, p, counts = numbers(70, 30, 4, 1)
    x.requires_grad_()
    weight.requires_grad_()
    with multiply_in("float32"):
        asked = draft_loss(x, weight, ids, p, counts, acceptance)
        kl = divergence(x, weight.detach(), ids[:, :1], p[:, :1])
        monkeypatch.setattr(losses, "_slope", None)
        with torch.no_grad(), Products() as spy:
            found = draft_loss(x, weight, ids, p, counts, acceptance)
            assert spy.count == 1
            assert torch.equal(divergence(x, weight.detach(), ids[:, :1], p[:, :1]), kl)
            assert spy.count == 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, asked, strict=True))


@pytest.mark.usefixtures("in_float32")
def test_a_head_without_tokens_leaves_the_names_of_the_others() -> None:
    """Head 2 guesses the token three ahead, and the model wrote every second one."""
    batch = batch_of([[1, 2, 3, 4, 5, 6]], [[False, False, False, True, False, True]])
    assert list(rejecting(0.0).losses(batch)) == ["head 1", "head 3"]


def test_the_acceptance_is_how_often_a_drawn_guess_is_accepted() -> None:
    """Of tokens that p gives more than q, q; of the others, p."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    ids, p = torch.tensor([[0, 1, 0]]), torch.tensor([[0.1, 0.6, 0.1]])
    with multiply_in("float32"):
        loss, _ = draft_loss(logits, torch.eye(3), ids, p, torch.ones(1), 1.0)
    assert -loss.item() == pytest.approx(0.2 + 0.3)


def rejecting(soft: float, **options: Any) -> Any:
    return trainable(Hydra, backbone_of(), torch.arange(VOCAB), heads=3, draft_vocab=30, soft=soft, **options)


TOKENS = [torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (29, 5, 42)]


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("soft", [0.0, 0.5, 1.0])
def test_the_loss_of_a_head_is_what_the_written_token_and_the_teacher_would_reject(soft: float) -> None:
    """Half of the tokens lie outside the draft vocabulary: there all is rejected."""
    batch = batch_of(TOKENS, [[i > 2 for i in range(len(row))] for row in TOKENS])
    module = rejecting(soft, acceptance=1.0)
    terms = module.losses(batch)
    targets_PK, sources_P = losses.targets(batch, 3, module.ahead)
    x_KPd = module.read(batch, sources_P)
    for k in range(3):
        rejected = []
        for place, source in enumerate(sources_P.tolist()):
            token = int(targets_PK[place, k])
            if token < 0:
                continue
            q = (x_KPd[k, place].double() @ module.head(k).double().T).softmax(-1)
            p = torch.zeros(VOCAB, dtype=torch.double)
            p[token] += 1 - soft
            at = source + k + module.ahead - 1
            p.index_add_(
                0, batch.teacher_ids_BTm.flatten(0, 1)[at], soft * batch.teacher_p_BTm.flatten(0, 1)[at].double()
            )
            rejected.append(1 - torch.minimum(p[module.vocabulary_V], q).sum())
        assert terms[f"head {k + 1}"].item() == pytest.approx(torch.stack(rejected).mean().item(), rel=1e-5)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("options", [{}, {"acceptance": 0.9}, {"position_weights": "dynamic"}], ids=str)
def test_positions_that_teach_nothing_may_be_multiplied_too(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, which is not asked how many there are."""
    batch = batch_of(TOKENS, [[i > 2 and i % 9 > 1 for i in range(len(row))] for row in TOKENS])
    module = rejecting(0.0, **options)

    def found() -> list[Tensor]:
        terms = module.losses(batch)
        total = torch.stack(list(terms.values())).sum()
        learning = [each for each in module.parameters() if each.numel()]
        return [*terms.values(), *torch.autograd.grad(total, learning)]

    without = found()
    monkeypatch.setattr(heads, "learnt_rows", lambda p_Pm: slice(None))
    torch.testing.assert_close(found(), without, rtol=1e-5, atol=1e-6)


# --- dynamic weights ----------------------------------------------------------------------------------------


def accepted(p_K: Tensor, live_K: list[bool]) -> Tensor:
    """Expected number of accepted guesses of the heads that have a token to guess."""
    reached, total = torch.ones((), dtype=torch.double), torch.zeros((), dtype=torch.double)
    for p, live in zip(p_K, live_K, strict=True):
        if live:
            reached = reached * p
            total = total + reached
    return total


def slopes(p_K: list[float], live_K: list[bool]) -> list[float]:
    """Of `accepted` in log p, as autograd finds them."""
    logs_K = torch.tensor([SMOOTHING + (1 - SMOOTHING) * p for p in p_K], dtype=torch.double).log().requires_grad_()
    (found,) = torch.autograd.grad(accepted(logs_K.exp(), live_K), logs_K, allow_unused=True)
    return found.tolist()


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=6))
def test_dynamic_weights_are_the_slopes_of_the_accepted_length(heads_K: list[tuple[float, bool]]) -> None:
    p_K, live_K = [p for p, _ in heads_K], [live for _, live in heads_K]
    found = dynamic_weights(torch.tensor([p_K]), torch.tensor([live_K]))[0]
    wanted = slopes(p_K, live_K) if any(live_K) else [0.0] * len(p_K)
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("chunk", [4, 2048])
def test_the_probability_of_a_token_at_each_position(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "MIN_CHUNK", chunk)
    monkeypatch.setitem(losses.LOGITS, "cpu", 1)
    x_Pd, weight_Vd, ids_Pm, *_ = numbers(11, 30, 1, 0)
    index_P = torch.where(torch.arange(11) % 3 > 0, ids_Pm[:, 0], -1)
    q_PV = (x_Pd.double() @ weight_Vd.double().T).softmax(-1)
    wanted = [float(q_PV[i, token]) if token >= 0 else 0.0 for i, token in enumerate(index_P.tolist())]
    with multiply_in("float32"):
        assert probabilities(x_Pd, weight_Vd, index_P).tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("method", [Medusa, Hydra, HydraPlus])
@pytest.mark.parametrize("acceptance", [0.0, 0.9])
def test_dynamic_weights_change_gradients_alone(method: Any, acceptance: float) -> None:
    """The loss of each position by itself, times its weight, in float64; logged values are those of fixed weights."""
    batch = batch_of(TOKENS, [[i > 2 and i % 9 > 1 for i in range(len(row))] for row in TOKENS])
    options = {"heads": 3, "draft_vocab": 30, "acceptance": acceptance}
    fixed, dynamic = (
        trainable(method, backbone_of(), torch.arange(VOCAB), **options, position_weights=weights)
        for weights in ("fixed", "dynamic")
    )
    with torch.no_grad():
        for parameter in dynamic.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    fixed.load_state_dict(dynamic.state_dict())
    terms, usual = dynamic.losses(batch), fixed.losses(batch)
    assert {k: v.item() for k, v in terms.items()} == {k: v.item() for k, v in usual.items()}
    with torch.no_grad():  # in evaluation
        assert {k: v.item() for k, v in dynamic.losses(batch).items()} == {k: v.item() for k, v in usual.items()}

    targets_PK, sources_P = losses.targets(batch, 3, dynamic.ahead)
    x_KPd = dynamic.read(batch, sources_P)
    index_PK = dynamic.index_V[targets_PK.clamp(min=0)]
    q_PKV = torch.stack([(x_KPd[k].double() @ dynamic.head(k).double().T).softmax(-1) for k in range(3)], 1)
    total = torch.zeros((), dtype=torch.double)
    for place, source in enumerate(sources_P.tolist()):
        live_K = (targets_PK[place] >= 0).tolist()
        inside_K = (index_PK[place] >= 0).tolist()
        p_K = [q_PKV[place, k, index_PK[place, k]].item() * inside_K[k] for k in range(3)]
        for k, slope in enumerate(slopes(p_K, live_K)):
            if live_K[k]:
                at = source + k + dynamic.ahead - 1
                p_V = torch.zeros(VOCAB, dtype=torch.double)
                p_V[targets_PK[place, k]] += 0.5
                p_V.index_add_(
                    0, batch.teacher_ids_BTm.flatten(0, 1)[at], 0.5 * batch.teacher_p_BTm.flatten(0, 1)[at].double()
                )
                q_V, p_V = q_PKV[place, k], p_V[dynamic.vocabulary_V]
                loss = -((1 - acceptance) * p_V * q_V.log() + acceptance * torch.minimum(p_V, q_V)).sum()
                total = total + slope * loss / (targets_PK[:, k] >= 0).sum()
    learning = [each for each in dynamic.parameters() if each.numel()]
    ours = torch.autograd.grad(torch.stack(list(terms.values())).sum(), learning)
    for mine, truth in zip(ours, torch.autograd.grad(total, learning), strict=True):
        assert truth.any()
        torch.testing.assert_close(mine, truth, rtol=1e-3, atol=1e-6)
