"""Medusa: heads that start as the output head, learn the right token and nothing else, and never change an answer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from decoding import (
    assert_changes_no_token,
    decoder_of,
    finish,
    plainly,
    watched,
)
from random_backbones import BF16, COMPILED, FP32, Model
from tiny_models import DIMENSIONS
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from trainables import trainable

from foretell import drafters
from foretell.backbone import Backbone
from foretell.contracts import FINAL_NORM
from foretell.drafters.medusa import DECAY, Medusa, MedusaHeads
from foretell.drafters.prompt_lookup import WithLookup
from foretell.drafting import checkpoint
from foretell.drafting.checkpoint import Checkpoint
from foretell.drafting.heads import side_by_side
from foretell.drafting.learning import losses
from foretell.drafting.learning.heads import RANKS
from foretell.drafting.learning.trainable import CALIBRATION_TOP_K, TrainingBatch
from foretell.drafting.vocabulary import draft_vocabulary, index_in
from foretell.errors import ForetellError, UsageError
from foretell.requests import SamplingParams
from foretell.train.data import Distilled
from foretell.train.features import ComputedFeatures
from foretell.trees.search import ENDED, MISSED, nested, tree_tokens_per_step

LLAMA = {"model_type": "llama", **DIMENSIONS}
VOCAB, WIDTH = DIMENSIONS["vocab_size"], DIMENSIONS["hidden_size"]


def backbone_of(dtype: torch.dtype = FP32, **changes: Any) -> Backbone:
    backbone = Model(LLAMA | changes).build(dtype=dtype)
    backbone.fingerprint = "tiny"
    return backbone


PAPER: dict[str, Any] = {"taps": 0, "root": False}
"""What the heads of the paper read: the final state alone."""


def random_heads(
    backbone: Backbone, heads: int, layers: int, output: str, vocabulary: int, seed: int = 0, **reads: Any
) -> MedusaHeads:
    counts = torch.arange(VOCAB).flip(0)
    module = trainable(
        Medusa, backbone, counts, heads=heads, layers=layers, output=output, draft_vocab=vocabulary, **reads
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_((parameter + noise).bfloat16())  # what a checkpoint keeps
    return module


def drafter_of(backbone: Backbone, module: MedusaHeads, paths: list[tuple[int, ...]], nodes: int = 64) -> Medusa:
    tensors, arch = module.checkpoint()
    return watched(Medusa(backbone, arch, tensors, paths, lambda *_: nodes))


def some_paths(heads: int, width: int, seed: int, count: int = 40) -> list[tuple[int, ...]]:
    """A random tree, prefixes first."""
    generator = torch.Generator().manual_seed(seed)
    paths: list[tuple[int, ...]] = []
    while len(paths) < min(count, 5 * heads):
        stems = [path for path in [(), *paths] if len(path) < heads]
        stem = stems[int(torch.randint(len(stems), (), generator=generator))]
        path = (*stem, int(torch.randint(width, (), generator=generator)))
        if path not in paths:
            paths.append(path)
    return paths


def requests(count: int = 5) -> list[tuple[list[int], SamplingParams]]:
    generator = torch.Generator().manual_seed(1)
    out = []
    for i in range(count):
        ids = torch.randint(VOCAB, (1 + 5 * i,), generator=generator).tolist()
        out.append((ids, SamplingParams(max_new_tokens=14 + 3 * i, temperature=float(i % 2), seed=i, logprobs=1)))
    return out


# -- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("output", ["shared", "tied", "own"])
@pytest.mark.parametrize(
    ("heads", "layers", "reads"),
    [(1, 1, PAPER), (3, 2, PAPER), (3, 2, {"taps": 2}), (5, 1, {"taps": 0}), (2, 1, {"taps": 1, "root": False})],
)
def test_untrained_heads_change_no_token(
    heads: int, layers: int, reads: dict[str, Any], output: str, dtype: torch.dtype
) -> None:
    backbone = backbone_of(dtype, tie_word_embeddings=output == "own")
    truth = plainly(backbone, requests())
    module = random_heads(backbone, heads, layers, output, 40, **reads)
    for seed in range(4):
        drafter = drafter_of(backbone, module, some_paths(heads, 6, seed), 12 + 10 * seed)
        assert_changes_no_token(backbone, drafter, requests(), truth, seed + len(output) + (dtype == BF16))


def test_what_is_drafted_is_what_the_heads_say(request: pytest.FixtureRequest) -> None:
    """The packed layers against the learning form, and each node against its path's head and rank."""
    backbone, exact = backbone_of(), []
    for output, layers, reads in (("shared", 1, PAPER), ("tied", 2, {"taps": 2}), ("own", 3, {"taps": 0})):
        module = random_heads(backbone, 3, layers, output, 40, **reads)
        paths = some_paths(3, 5, 4)
        drafter = drafter_of(backbone, module, paths, 12)
        decoder = decoder_of(backbone, drafter)
        decoder.submit([1, 2, 3, 4, 5], SamplingParams(max_new_tokens=20))
        decoder.step()
        row = decoder._rows[0]
        root = [backbone.embed(torch.tensor(row.tokens[-1:]))[0]] if module.embed else []
        h_PI = side_by_side(torch.stack([*drafter._states[row.slot], *root])[None])
        talk = Distilled(0, [*row.tokens, 0], [(5, len(row.tokens) + 1)])  # what comes next is what it would learn
        learnt_from = module._read(
            ComputedFeatures(backbone, [talk], module.taps).batch([0]), torch.tensor([len(row.tokens) - 2])
        )
        torch.testing.assert_close(h_PI, learnt_from, rtol=2**-7, atol=2**-7)  # features are kept in bfloat16
        exact.append((drafter, row, module, paths, h_PI))
    request.getfixturevalue("in_float32")  # features are kept in bfloat16 and were made before
    for drafter, row, module, paths, h_PI in exact:
        states_KPd = module.states(h_PI).detach()
        log_probs = [(states_KPd[k, 0] @ module.head(k).detach().T).log_softmax(-1).topk(5) for k in range(3)]
        best = [module.vocabulary_V[each.indices].tolist() for each in log_probs]
        value = {path: sum(float(log_probs[k].values[rank]) for k, rank in enumerate(path)) for path in paths}
        for grown, expected in ((False, paths[:11]), (True, sorted(paths, key=lambda path: -value[path])[:11])):
            drafter.grown = grown
            draft = drafter.draft([row])
            (tree,), (tokens,), (given,) = draft.trees, draft.tokens, cast(Any, draft.probabilities)
            guessed = {tuple(tokens[node] for node in tree.path(i)): i for i in range(len(tree))}
            assert guessed.keys() == {
                (row.tokens[-1], *(best[k][rank] for k, rank in enumerate(path))) for path in [(), *expected]
            }
            for path in expected:
                node = guessed[row.tokens[-1], *(best[k][rank] for k, rank in enumerate(path))]
                assert given[node] == pytest.approx(float(log_probs[len(path) - 1].values[path[-1]].exp()), rel=1e-3)


def test_a_prompt_of_one_token_is_drafted_after_its_first_step() -> None:
    backbone = backbone_of()
    module = random_heads(backbone, 2, 1, "shared", 0)
    decoder = decoder_of(backbone, drafter_of(backbone, module, [(0,), (0, 0)]))
    ids = [([5], SamplingParams(max_new_tokens=12))]
    output = finish(decoder, ids)[0]
    assert output.ids == plainly(backbone, ids)[0].ids
    assert output.statistics.plain_steps == 2  # the first, and the last, which may emit one token only


def test_heads_that_no_path_came_true_for_draft_nothing() -> None:
    backbone = backbone_of()
    ids = [([5, 6, 7], SamplingParams(max_new_tokens=6))]
    output = finish(decoder_of(backbone, drafter_of(backbone, random_heads(backbone, 2, 1, "shared", 0), [])), ids)[0]
    assert output.ids == plainly(backbone, ids)[0].ids
    assert output.statistics.drafted == 0


# -- learning -------------------------------------------------------------------------------------------------------


def batch_of(tokens: list[list[int]], supervised: list[list[bool]], seed: int = 0, teacher: int = 3) -> TrainingBatch:
    """Random states and a random teacher."""
    generator = torch.Generator().manual_seed(seed)
    B, T = len(tokens), max(map(len, tokens))
    pad: Callable[[list[Any], Any], list[Any]] = lambda row, value: row + [value] * (T - len(row))  # noqa: E731
    p_BTm = torch.rand(B, T, teacher, generator=generator)
    ids_BTm = torch.stack([torch.randperm(VOCAB, generator=generator)[:teacher] for _ in range(B * T)])
    return TrainingBatch(
        torch.tensor([pad(row, 0) for row in tokens]),
        torch.tensor([pad(row, False) for row in supervised]),
        {tap: torch.randn(B, T, WIDTH, generator=generator) for tap in (FINAL_NORM, 1, 2)},
        ids_BTm.unflatten(0, (B, T)),
        p_BTm / p_BTm.sum(-1, keepdim=True) * 0.9,
    )


def test_fresh_heads_say_what_the_output_head_says() -> None:
    for output in ("shared", "tied", "own"):
        for backbone in (backbone_of(), backbone_of(tie_word_embeddings=True)):
            module = trainable(Medusa, backbone, torch.ones(VOCAB), layers=2, output=output, draft_vocab=0)
            states = torch.randn(4, WIDTH)
            h_PI = side_by_side(torch.stack([states, *torch.randn(3, 4, WIDTH)], 1))
            assert all(torch.equal(each, states) for each in module.states(h_PI))
            for k in range(module.heads):
                torch.testing.assert_close(states @ module.head(k).T, backbone.logits(states))


@pytest.mark.parametrize("reads", [PAPER, {"taps": 2}])
def test_the_loss_is_the_one_of_the_paper_written_out(reads: dict[str, Any]) -> None:
    """Shifts, masks, the teacher, the draft vocabulary, and 0.8^k in the gradient: position by position in float64."""
    backbone = backbone_of()
    module = random_heads(backbone, 3, 2, "own", 30, **reads)
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (9, 5, 12)]
    batch = batch_of(tokens, [[i > 2 for i in range(len(row))] for row in tokens])
    ours = module.losses(batch)
    for k in range(3):
        terms = []
        for b, row in enumerate(tokens):
            for t in range(len(row) - 2):  # where the first head has a target
                target = t + 2 + k
                if target >= len(row) or not batch.supervised_BT[b, target] or not batch.supervised_BT[b, t + 2]:
                    continue
                x = inputs = batch.states[FINAL_NORM][b, t].double()
                if reads is not PAPER:
                    others = [
                        batch.states[2][b, t],
                        batch.states[1][b, t],
                        backbone.embed(torch.tensor([row[t + 1]]))[0],
                    ]
                    inputs = torch.cat([x, *(each.double() / each.double().pow(2).mean().sqrt() for each in others)])
                for weight, bias in zip(module.weights, module.bias_LKd, strict=True):
                    x = inputs = x + F.silu(inputs @ weight[k].double().T + bias[k].double())
                log_q = (x @ module.head(k).double().T).log_softmax(-1)
                wanted = {row[target]: 1 - module.soft}
                for token, p in zip(
                    batch.teacher_ids_BTm[b, target - 1].tolist(),
                    batch.teacher_p_BTm[b, target - 1].tolist(),
                    strict=True,
                ):
                    wanted[token] = wanted.get(token, 0.0) + module.soft * p
                place = {token: i for i, token in enumerate(module.vocabulary_V.tolist())}
                terms.append(-sum(p * log_q[place[token]] for token, p in wanted.items() if token in place))
        twin, term = sum(terms) / len(terms), ours[f"head {k + 1}"]
        assert term.item() == pytest.approx(twin.item(), rel=0.02)  # ours multiplies in bfloat16
        pulls = [torch.autograd.grad(each, module.weights[0], retain_graph=True)[0][k] for each in (term, twin)]
        assert (pulls[0] - DECAY ** (k + 1) * pulls[1]).norm() < 0.03 * pulls[0].norm()


def test_gradients_reach_the_heads_and_nothing_else() -> None:
    backbone = backbone_of()
    before = backbone.head_rows(torch.arange(VOCAB)).clone()
    tokens = [[(7 * i) % VOCAB for i in range(20)]]
    for output in ("shared", "tied", "own"):
        module = trainable(Medusa, backbone, torch.ones(VOCAB), output=output, draft_vocab=0, layers=2)
        torch.stack(list(module.losses(batch_of(tokens, [[True] * 20])).values())).sum().backward()
        names = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
        assert names == {"weights.0", "weights.1", "bias_LKd"} | ({"head_KVd"} if output != "shared" else set())
        assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())  # type: ignore[union-attr]
        assert not module.head(0).requires_grad or output != "shared"
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        optimizer.step()
        assert torch.equal(backbone.head_rows(torch.arange(VOCAB)), before)


@pytest.mark.parametrize(
    "options", [{}, {"acceptance": 0.9}, {"acceptance": 0.5, "soft": 0.0, "position_weights": "dynamic"}], ids=str
)
def test_a_cyclic_sequence_is_learnt_one_head_one_step_further(options: dict[str, Any]) -> None:
    """Head k must say t + k + 1: off by one anywhere and it learns another rotation."""
    backbone, cycle = backbone_of(), [11, 3, 42, 7, 29, 60, 18]
    tokens = [cycle[i % 7] for i in range(60)]
    states = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(5))  # a state says which token it is of
    batch = batch_of([tokens], [[True] * 60])
    batch.states[FINAL_NORM] = states[torch.tensor(tokens)][None]
    batch.teacher_ids_BTm = torch.tensor([*tokens[1:], 0])[None, :, None]
    batch.teacher_p_BTm = torch.ones(1, 60, 1)
    module = trainable(Medusa, backbone, torch.ones(VOCAB), heads=3, output="tied", draft_vocab=0, **PAPER, **options)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0)
    for _ in range(60):
        optimizer.zero_grad()
        torch.stack(list(module.losses(batch).values())).sum().backward()
        optimizer.step()
    drafter = drafter_of(backbone, module, [(0,), (0, 0), (0, 0, 0)])
    for i, token in enumerate(cycle):
        log_probs = drafter._guesses(states[token][None, None], 1)[1][0, :, 0].tolist()
        assert log_probs == [cycle[(i + k) % 7] for k in (2, 3, 4)]
    ranks = [each.ranks_PK.numpy() for each in module.guesses(batch)]
    assert (ranks[0][:-2] == 0).all()
    assert tree_tokens_per_step(ranks, nested(ranks, 4)) > 3.8  # four tokens a step, but at the end of the text


def test_nothing_supervised_is_no_loss_and_no_rank() -> None:
    module = trainable(Medusa, backbone_of(), torch.ones(VOCAB))
    batch = batch_of([[1, 2, 3, 4]], [[False] * 4])
    assert module.losses(batch) == {}
    assert [(len(each.ranks_PK), each.log_probs_PKR.shape) for each in module.guesses(batch)] == [(0, (0, 4, 10))]


def test_a_short_conversation_teaches_only_the_heads_that_it_reaches() -> None:
    module = trainable(Medusa, backbone_of(), torch.ones(VOCAB), heads=4, draft_vocab=0)
    losses = module.losses(batch_of([[1, 2, 3, 4]], [[True] * 4]))
    assert list(losses) == ["head 1", "head 2"]
    assert all(torch.isfinite(loss) for loss in losses.values())
    ranks = module.guesses(batch_of([[1, 2, 3, 4]], [[True] * 4]))[0].ranks_PK
    assert ranks.shape == (2, 4)
    assert (ranks[:, 2:] == ENDED).all()


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("vocabulary", [6, 40])
def test_what_would_have_been_guessed_position_by_position(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "MIN_CHUNK", 4)
    monkeypatch.setitem(losses.LOGITS, "cpu", 1)
    module = random_heads(backbone_of(), 3, 1, "own", vocabulary)
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (9, 5, 12)]
    batch = batch_of(tokens, [[i > 2 for i in range(len(row))] for row in tokens])
    found = module.guesses(batch)
    ended = missed = 0
    for b, row in enumerate(tokens):
        sources = [p for p in range(len(row) - 2) if p + 2 > 2]  # where the first head guesses what was written
        assert len(found[b].ranks_PK) == len(found[b].log_probs_PKR) == len(sources)
        for place, p in enumerate(sources):
            read = module.read(batch, torch.tensor([b * batch.tokens_BT.shape[1] + p])).detach()
            for k in range(3):
                log_probs = (read[k, 0] @ module.head(k).detach().T).log_softmax(-1)
                order = [module.vocabulary_V[i].item() for i in log_probs.argsort(descending=True)]
                token = row[p + 2 + k] if p + 2 + k < len(row) else None
                rank = order.index(token) if token in order else MISSED
                rank = ENDED if token is None else rank if rank < RANKS else MISSED
                assert found[b].ranks_PK[place, k] == rank
                ended, missed = ended + (rank == ENDED), missed + (rank == MISSED)
                best = log_probs.sort(descending=True).values[: min(CALIBRATION_TOP_K, vocabulary)]
                torch.testing.assert_close(found[b].log_probs_PKR[place, k], best, rtol=1e-4, atol=1e-4)
    assert ended
    assert missed


def test_tokens_outside_the_draft_vocabulary_are_not_taught_and_never_drafted() -> None:
    backbone, counts = backbone_of(), torch.zeros(VOCAB)
    counts[10:20] = 5
    module = trainable(Medusa, backbone, counts, draft_vocab=10, soft=0.0)
    assert module.vocabulary_V.tolist() == list(range(10, 20))
    assert sum(each.item() for each in module.losses(batch_of([[1, 2, 3, 4, 5]], [[True] * 5])).values()) == 0.0
    drafter = drafter_of(backbone, module, [(r,) for r in range(8)])
    assert set(drafter._guesses(torch.randn(3, 4, WIDTH), 8)[1].flatten().tolist()) <= set(range(10, 20))


def test_a_draft_vocabulary_holds_the_most_frequent_tokens() -> None:
    counts = torch.tensor([3, 9, 3, 0, 7])
    assert draft_vocabulary(counts, 3).tolist() == [0, 1, 4]  # of equals, the smaller id
    assert draft_vocabulary(counts, 0).tolist() == draft_vocabulary(counts, 9).tolist() == [0, 1, 2, 3, 4]
    assert index_in(torch.tensor([1, 4]), 5).tolist() == [-1, 0, -1, -1, 1]


def test_heads_begin_with_what_others_have_learnt() -> None:
    backbone = backbone_of()
    tokens = [[(5 * i) % VOCAB for i in range(20)]]
    batch = batch_of(tokens, [[True] * 20])
    for output in ("shared", "tied", "own"):
        learnt, fresh = (random_heads(backbone, 3, 2, output, 30, seed) for seed in (0, 1))
        (theirs,), (before,) = learnt.guesses(batch), fresh.guesses(batch)
        assert not torch.equal(theirs.log_probs_PKR, before.log_probs_PKR)
        tensors, arch = learnt.checkpoint()
        fresh.start(arch, tensors)
        (ours,) = fresh.guesses(batch)
        assert torch.equal(ours.ranks_PK, theirs.ranks_PK)
        assert torch.equal(ours.log_probs_PKR, theirs.log_probs_PKR)


def test_of_other_draft_vocabularies_the_tokens_that_both_have_are_taken() -> None:
    backbone = backbone_of()
    learnt = random_heads(backbone, 3, 1, "tied", 20)
    counts = (torch.arange(VOCAB) - 20).abs().neg()
    for output in ("tied", "own"):
        fresh = trainable(Medusa, backbone, counts, heads=3, layers=1, output=output, draft_vocab=15)
        assert fresh.vocabulary_V.tolist() == list(range(13, 28))
        tensors, arch = learnt.checkpoint()
        before = fresh.head_KVd.detach().clone()
        fresh.start(arch, tensors)
        for i, token in enumerate(fresh.vocabulary_V.tolist()):
            theirs = learnt.head_KVd[0, token] if token < 20 else before[0, i]
            for k in range(3):
                assert torch.equal(fresh.head(k)[i], theirs)
    shared = trainable(Medusa, backbone, counts, heads=3, layers=1, output="shared", draft_vocab=20)
    with pytest.raises(UsageError, match=r"^It has learnt output matrices; train with `output='tied'`\.$"):
        shared.start(arch, tensors)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"layers": 2}, {"layers": 1}), ({"layers": 1}, {"layers": 2}), ({"heads": 2}, {"heads": 3}),
        ({"taps": 1}, {"taps": 2}), ({"root": False}, {"root": True}),
    ],
    ids=str,
)  # fmt: skip
def test_heads_of_other_options_are_no_beginning(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    backbone = backbone_of()
    learnt, fresh = (trainable(Medusa, backbone, torch.ones(VOCAB), **options) for options in (theirs, ours))
    tensors, arch = learnt.checkpoint()
    with pytest.raises(UsageError, match=r"^It is made with other options; train with the same .*`root=`\.$"):
        fresh.start(arch, tensors)


# -- checkpoints ----------------------------------------------------------------------------------------------------


def saved(folder: Path, backbone: Backbone, module: MedusaHeads, **changes: Any) -> Path:
    tensors, arch = module.checkpoint()
    c = backbone.config
    numbers = {
        "method": "medusa", "backbone": "tiny", "fingerprint": backbone.fingerprint, "hidden": c.hidden,
        "vocab": c.vocab, "arch": arch, "paths": [[0], [0, 0], [1]], "tokens_per_step": {"2": 1.5, "4": 1.9},
    }  # fmt: skip
    Checkpoint(**(numbers | changes)).save(folder, tensors)
    return folder


@pytest.mark.parametrize("output", ["shared", "tied", "own"])
def test_a_checkpoint_comes_back_whole(tmp_path: Path, output: str) -> None:
    backbone = backbone_of()
    module = random_heads(backbone, 3, 2, output, 20)
    folder = saved(tmp_path / "heads", backbone, module, provenance={"command": "foretell train"})
    found, tensors = checkpoint.load(folder)
    assert (found.backbone, found.paths, found.provenance) == (
        "tiny",
        [[0], [0, 0], [1]],
        {"command": "foretell train"},
    )
    assert set(tensors) == set(module.checkpoint()[0])
    for name, tensor in module.checkpoint()[0].items():
        assert torch.equal(tensor, tensors[name])
    built = drafters.build("medusa", backbone, checkpoint=str(folder))
    direct = drafter_of(backbone, module, [(0,), (0, 0), (1,)])
    assert built.taps == module.taps
    states = torch.randn(5, 4, WIDTH)
    for ours, theirs in zip(cast(Medusa, built)._guesses(states, 3), direct._guesses(states, 3), strict=True):
        assert (ours == theirs).all()
    saved(folder, backbone, random_heads(backbone, 3, 2, output, 20, seed=9))  # a second one takes its place
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads"]


def refusal(backbone: Backbone, **options: Any) -> str:
    with pytest.raises(ForetellError) as refused:
        drafters.build("medusa", backbone, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_heads_of_another_model_are_refused_unless_told_otherwise(tmp_path: Path) -> None:
    backbone = backbone_of()
    folder = str(saved(tmp_path / "heads", backbone, random_heads(backbone, 2, 1, "tied", 20)))
    other = backbone_of()
    other.fingerprint = "other"
    assert "trained for tiny (fingerprint tiny), not for this model (other)" in refusal(other, checkpoint=folder)
    drafters.build("medusa", other, checkpoint=folder, any_backbone=True)
    shallow = backbone_of(num_hidden_layers=1)
    deep = saved(tmp_path / "deep", backbone, random_heads(backbone, 2, 1, "tied", 20))
    raw = json.loads((deep / "config.json").read_text())
    for tap, fits in ((1, True), (2, False)):
        raw["arch"] |= {"taps": [tap], "root": False}
        tensors = checkpoint.load(deep)[1]
        tensors["weight.0"] = torch.zeros(2, WIDTH, 2 * WIDTH)
        checkpoint.Checkpoint(**raw).save(deep, tensors)
        if fits:
            drafters.build("medusa", shallow, checkpoint=str(deep), any_backbone=True)
        else:
            sentence = refusal(shallow, checkpoint=str(deep), any_backbone=True)
            assert "deep reads layer 2, but this model has 1; train a drafter" in sentence
    wide = backbone_of(hidden_size=64)
    assert "model of width 32 and 64 tokens, but this one has 64 and 64" in refusal(
        wide, checkpoint=folder, any_backbone=True
    )


def test_of_two_shipped_checkpoints_the_better_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of()
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path)
    for name, tokens in (("a", 1.5), ("b", 2.5), ("c", 2.0)):
        saved(tmp_path / name, backbone, random_heads(backbone, 2, 1, "tied", 20), tokens_per_step={"8": tokens})
    assert checkpoint.shipped(backbone) == {"medusa": tmp_path / "b"}


def test_what_cannot_be_drafted_with_is_refused(tmp_path: Path) -> None:
    backbone = backbone_of()
    module = random_heads(backbone, 2, 1, "tied", 20)
    good = saved(tmp_path / "good", backbone, module)
    assert "No medusa drafter comes with foretell for this model" in refusal(backbone)
    assert "here is no folder" in refusal(backbone, checkpoint=str(tmp_path / "nothing"))
    assert "holds no drafter" in refusal(backbone, checkpoint=str(tmp_path))
    drafters.build("medusa", backbone, checkpoint=str(saved(tmp_path / "out/drafter", backbone, module).parent))
    assert "deeper than the 2 heads" in refusal(backbone, checkpoint=str(good), tree="vicuna_7b_stage2")
    deep = saved(tmp_path / "deep", backbone, module, paths=[[0], [0, 0], [0, 0, 0]])
    assert "deeper than the 2 heads" in refusal(backbone, checkpoint=str(deep))
    wide = saved(tmp_path / "wide", backbone, module, paths=[[20]])
    assert "a rank beyond the 20 tokens" in refusal(backbone, checkpoint=str(wide))
    assert "holds a hydra drafter, not medusa" in refusal(
        backbone, checkpoint=str(saved(tmp_path / "hydra", backbone, module, method="hydra"))
    )
    assert "format 99" in refusal(backbone, checkpoint=str(saved(tmp_path / "new", backbone, module, format=99)))
    assert "nodes, not 1; choose another" in refusal(backbone, checkpoint=str(good), nodes=1)
    with pytest.raises(UsageError, match="must be shared, tied or own"):
        trainable(Medusa, backbone, torch.ones(VOCAB), output="none")
    for broken in ({"heads": 3, "layers": 1, "output": "tied"}, {"heads": 2, "layers": 1, "output": "own"}, {}):
        folder = saved(tmp_path / "broken", backbone, module, arch=broken)
        assert "broken is damaged (at " in refusal(backbone, checkpoint=str(folder))
    weights = good / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (0, 7, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        assert "is damaged" in refusal(backbone, checkpoint=str(good))
    weights.unlink()
    assert "is damaged" in refusal(backbone, checkpoint=str(good))
    (good / "config.json").write_text('{"format": 1, "method": "medusa"}')
    assert "is damaged" in refusal(backbone, checkpoint=str(good))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    backbone = backbone_of()
    folder = saved(tmp_path / "heads", backbone, random_heads(backbone, 2, 1, "tied", 20))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(tensors: dict[str, Tensor], path: Path, about: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ForetellError, match="not enough disk space"):
        saved(folder, backbone, random_heads(backbone, 3, 1, "tied", 20))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]


class Woken(TorchDispatchMode):
    """Operations that wake PyTorch's team of threads however little there is to do."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).split(".")[1] in ("index", "index_put", "index_put_", "topk", "sort", "argmax"):
            self.found.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", COMPILED)
def test_no_operation_of_a_step_wakes_another_team_of_threads(kernel: str) -> None:
    """Its threads then spin for milliseconds on the cores that the kernels want: a step took half as long again."""
    backbone = Model(LLAMA).build(kernel, FP32)
    drafter = WithLookup(drafter_of(backbone, random_heads(backbone, 3, 2, "tied", 40), some_paths(3, 5, 4), 12))
    with Woken() as woken:
        torch.arange(3)[torch.tensor([1])]
        assert woken.found == {"aten.index.Tensor"}
        woken.found.clear()
        asked = [(ids, SamplingParams(max_new_tokens=40, temperature=i % 2)) for i, (ids, _) in enumerate(requests())]
        outputs = finish(decoder_of(backbone, drafter, max_rows=3), asked)
    assert sum(output.statistics.accepted for output in outputs) > 0  # something was committed out of its place
    assert woken.found == set()
