"""How Hydra's heads learn: their loss and its gradient written out, what dropout does, and where answers end."""

from typing import Any

import pytest
import torch
from test_medusa import VOCAB, WIDTH, backbone_of, batch_of
from torch import Tensor
from torch.nn import functional as F
from trainables import trainable

from foretell.backbone import Backbone
from foretell.drafters.hydra.drafter import Hydra, HydraPlus
from foretell.drafters.hydra.heads import HydraHeads
from foretell.drafting.learning.losses import targets
from foretell.drafting.learning.trainable import TrainingBatch
from foretell.trees.search import ENDED

pytestmark = pytest.mark.usefixtures("one_thread", "in_float32")


def fresh(backbone: Backbone, plus: bool = False, vocabulary: int = 30, **options: Any) -> HydraHeads:
    kind = HydraPlus if plus else Hydra
    return trainable(kind, backbone, torch.arange(VOCAB).flip(0), heads=3, draft_vocab=vocabulary, **options)


def perturbed(module: HydraHeads) -> HydraHeads:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return module


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def gradients(loss: Tensor, module: HydraHeads) -> list[Tensor]:
    """Of all that learns."""
    return list(torch.autograd.grad(loss, [each for each in module.parameters() if each.numel()]))


# --- the loss -----------------------------------------------------------------------------------------------

TOKENS = [torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 5, 12)]


def some_batch() -> TrainingBatch:
    return batch_of(TOKENS, [[i > 2 for i in range(len(row))] for row in TOKENS])


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def streams_of(module: HydraHeads, backbone: Backbone, batch: TrainingBatch) -> list[Tensor]:
    """What heads read of the states, [B, T, d] each: of the layer before them, only what goes in is written out."""
    streams = [batch.states[tap].double() for tap in reversed(module.taps)]
    if module.fuse is not None:
        following_BTd = torch.stack([backbone.embed(row) for row in batch.tokens_BT.roll(-1, 1)]).double()
        beside = [norm(x) for x in (*streams[1:], following_BTd)]
        streams = [streams[0] + torch.cat(beside, -1) @ module.fuse.double().T]
    if module.prefix:
        streams[0] = module.prefix(streams[0].float()).double()
    return [streams[0], *map(norm, streams[1:])]


def log_probs(module: HydraHeads, backbone: Backbone, read: list[Tensor], path: list[int]) -> list[Tensor]:
    """Log-probabilities of each head down a path of tokens, the root first."""
    found = []
    for k, token in enumerate(path):
        read = [*read, norm(backbone.embed(torch.tensor([token]))[0].double())]
        x = torch.cat(read)
        out = x[:WIDTH]
        x = out = out + F.silu(module.first[k].double() @ x + module.first_bias_Kd[k])
        for layer in range(module.layers - 1):
            out = out + F.silu(module.deep_KLdd[k, layer].double() @ out + module.deep_bias_KLd[k, layer])
        if module.last_Kdd is not None and module.last_bias_Kd is not None:
            out = out + module.last_Kdd[k].double() @ out + module.last_bias_Kd[k]
        found.append((module.head(k).double() @ out).log_softmax(-1))
    return found


def written_out(module: HydraHeads, backbone: Backbone, batch: TrainingBatch) -> dict[str, Tensor]:
    """The loss of each head, position by position."""
    place = {token: i for i, token in enumerate(module.vocabulary_V.tolist())}
    streams, terms = streams_of(module, backbone, batch), [list[Tensor]() for _ in range(3)]
    for b, row in enumerate(TOKENS):
        for t in range(1, len(row) - 2):  # where the first head has something to guess: the answer begins at 3
            path = row[t + 1 : t + 4][: len(row) - t - 2]
            for k, log_q in enumerate(log_probs(module, backbone, [stream[b, t] for stream in streams], path)):
                target = t + k + 2
                teacher = zip(batch.teacher_ids_BTm[b, target - 1], batch.teacher_p_BTm[b, target - 1], strict=True)
                wanted = [(row[target], 1 - module.soft), *((int(i), module.soft * float(p)) for i, p in teacher)]
                terms[k].append(-sum((p * log_q[place[i]] for i, p in wanted if i in place), log_q.new_zeros(())))
    return {f"head {k + 1}": torch.stack(each).mean() for k, each in enumerate(terms)}


@pytest.mark.parametrize(
    ("plus", "options"),
    [
        (False, {"soft": 0.0}), (False, {"layers": 3, "linear_tail": True, "taps": 1}), (False, {"taps": 0}),
        (True, {"soft": 1.0}), (True, {"fuse_prefix": True, "linear_tail": True}),
    ],
    ids=str,
)  # fmt: skip
def test_the_loss_and_its_gradient_are_those_written_out(plus: bool, options: dict[str, Any]) -> None:
    """In float64: shifts, masks, the teacher's share, the draft vocabulary; every head counts alike."""
    backbone, batch = backbone_of(), some_batch()
    module = perturbed(fresh(backbone, plus, **options)).train()
    ours, twin = module.losses(batch), written_out(module, backbone, batch)
    assert ours.keys() == twin.keys()
    for name in twin:
        assert ours[name].item() == pytest.approx(twin[name].item(), rel=1e-4)
    for mine, truth in zip(gradients(total(ours), module), gradients(total(twin), module), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-3, atol=1e-5)
        assert truth.any()


def test_a_head_teaches_itself_alone() -> None:
    module = perturbed(fresh(backbone_of()))
    batch = some_batch()
    targets_PK, sources_P = targets(batch, 3, module.ahead)
    for k in range(3):
        module.zero_grad()
        only = torch.tensor([[float(head == k)] for head in range(3)])
        (total,), _ = module.mean_losses(batch, module.read(batch, sources_P), targets_PK, sources_P, only)
        total.backward()
        reached = [each.grad is not None and bool(each.grad.any()) for each in module.first]
        assert reached == [head == k for head in range(3)]


def test_the_second_head_has_nothing_to_guess_at_the_end_of_each_answer() -> None:
    """As replay finds the borders of answers, even where the third head already guesses the next one."""
    tokens = list(range(15))
    batch = batch_of([tokens], [[3 <= i < 8 or 9 <= i < 14 for i in tokens]])
    ranks_PK = fresh(backbone_of(), vocabulary=0).eval().guesses(batch)[0].ranks_PK
    assert len(ranks_PK) == 5 + 5
    assert (ranks_PK[:, 1] == ENDED).nonzero().flatten().tolist() == [4, 9]
    assert ranks_PK[4, 2] != ENDED


# --- dropout ------------------------------------------------------------------------------------------------

DRAWS, SHARE = 3000, 0.4


def read_alike(module: HydraHeads) -> Tensor:
    """[K, P, d]: what the output matrices read at positions that are all the same."""
    batch = batch_of([[7] * (DRAWS + 4)], [[True] * (DRAWS + 4)])
    batch.states = {tap: states[:, :1].expand_as(states) for tap, states in batch.states.items()}
    with torch.no_grad():
        return module.read(batch, torch.arange(DRAWS))


def noisy(which: str, dropout: float) -> HydraHeads:
    """Fresh heads, but for one part: alone it depends on what is dropped before it."""
    options = {"layers": 2, "linear_tail": True, "dropout": dropout}
    fused = {"fuse_prefix": True} if which == "fuse" else {}
    module = fresh(backbone_of(), which == "fuse", **options, **fused)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if which in ("first", "deep"):  # so far up, SiLU is a straight line, and a mean stays one
            (module.first_bias_Kd if which == "first" else module.deep_bias_KLd).fill_(30.0)
        for name, parameter in module.named_parameters():
            if which != "output" and name.startswith(which) and "bias" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


@pytest.mark.parametrize("which", ["output", "first", "deep", "last", "fuse"])
def test_dropout_blurs_what_each_part_reads_and_keeps_its_mean(which: str) -> None:
    still_KPd = read_alike(noisy(which, 0.0).train())
    torch.testing.assert_close(still_KPd, still_KPd[:, :1].expand_as(still_KPd), rtol=1e-4, atol=1e-4)
    drawn_KPd = read_alike(noisy(which, SHARE).train())
    left_KPd = drawn_KPd != 0
    assert float((~left_KPd).float().mean()) == pytest.approx(SHARE, abs=0.01)  # the output matrix's own
    kept_KPd = drawn_KPd * (1 - SHARE)
    counts_Kd = left_KPd.sum(1)
    mean_Kd = kept_KPd.sum(1) / counts_Kd
    spread_Kd = ((kept_KPd - mean_Kd[:, None]).square() * left_KPd).sum(1).div(counts_Kd).sqrt()
    assert ((mean_Kd - still_KPd[:, 0]).abs() <= 5 * spread_Kd / counts_Kd.sqrt() + 1e-4).all()
    if which == "output":
        assert spread_Kd.max() < 1e-4
    else:
        assert spread_Kd.min() > 0.1


def test_heads_that_do_not_learn_draw_nothing() -> None:
    module = noisy("first", SHARE).eval()
    before = torch.get_rng_state()
    read_KPd = read_alike(module)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(read_KPd, read_alike(noisy("first", 0.0).train()))
    assert not torch.equal(read_alike(module.train()), read_alike(module))
