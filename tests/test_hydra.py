"""Hydra: level by level, each node's guesses are what the learning form says after its own path; no answer changes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import assert_changes_no_token, assert_same, decoder_of, finish, plainly, shared, watched
from random_backbones import BF16, COMPILED, FP32, KERNELS, Model, build, same, using
from test_medusa import LLAMA, VOCAB, WIDTH, backbone_of, batch_of, random_heads, requests, some_paths
from torch import Tensor
from trainables import trainable

from foretell import drafters
from foretell.backbone import Backbone, Nodes
from foretell.contracts import FINAL_NORM, Row
from foretell.drafters.hydra import drafter as hydra
from foretell.drafters.hydra.drafter import BEAM, HeadInputs, Hydra, HydraPlus
from foretell.drafters.hydra.drafter import WIDTH as WIDTH_OF_A_NODE
from foretell.drafters.hydra.heads import HydraHeads
from foretell.drafters.medusa import Medusa
from foretell.drafters.prompt_lookup import WithLookup
from foretell.drafting.checkpoint import Checkpoint
from foretell.drafting.heads import side_by_side
from foretell.drafting.kernels import kernels_for
from foretell.drafting.learning.decoder_layer import DecoderLayer
from foretell.drafting.learning.heads import GuessingHeads
from foretell.drafting.learning.trainable import TrainingBatch
from foretell.drafting.options import migrated
from foretell.drafting.prefix_layer import PrefixLayer
from foretell.errors import UsageError
from foretell.requests import SamplingParams
from foretell.train.data import Distilled
from foretell.train.features import ComputedFeatures
from foretell.train.loop import train
from foretell.train.trainer import Settings, Trainer
from foretell.trees import chain
from foretell.trees.calibration import Scale
from foretell.trees.growing import GrowingTree
from foretell.trees.search import nested, tree_tokens_per_step

ODD: list[list[Scale]] = [[(0.05, 3.0)] * 3, [(1.0, 0.0), (4.0, -6.0), (0.3, 2.0)], [(20.0, 40.0)] * 3]
"""Whatever a calibration may say."""


def random_hydra(
    backbone: Backbone, plus: bool = False, heads: int = 3, vocabulary: int = 40, seed: int = 0, **options: Any
) -> HydraHeads:
    counts = torch.arange(VOCAB).flip(0)
    kind = HydraPlus if plus else Hydra
    module = trainable(kind, backbone, counts, heads=heads, draft_vocab=vocabulary, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return module.eval()


def drafter_of(
    backbone: Backbone, module: HydraHeads, paths: list[tuple[int, ...]] | None = None, nodes: int = 24,
    scales: Sequence[Scale] = (),
) -> Hydra:  # fmt: skip
    tensors, arch = module.checkpoint()
    grown = paths is None
    return watched(
        Hydra(backbone, arch, tensors, paths or [], lambda rows, context, *_: nodes, grown=grown, scales=scales)
    )


# -- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("plus", [False, True], ids=["hydra", "hydra++"])
@pytest.mark.parametrize("grown", [True, False])
def test_untrained_heads_change_no_token(grown: bool, plus: bool, dtype: torch.dtype) -> None:
    backbone = backbone_of(dtype)
    truth = plainly(backbone, requests())
    every: list[dict[str, Any]] = [{"layers": 2, "taps": 0}, {}, {"layers": 3, "linear_tail": True}]
    for seed, options in enumerate([*every, {"fuse_prefix": True}] if plus else every):
        module = random_hydra(backbone, plus, seed=seed, **options)
        drafter = drafter_of(backbone, module, None if grown else some_paths(3, 6, seed), 12 + 14 * seed)
        for turn in (0, 2):
            assert_changes_no_token(backbone, drafter, requests(), truth, turn + seed + grown + (dtype == BF16))


def test_however_far_heads_are_believed_no_token_changes() -> None:
    backbone = backbone_of()
    truth = plainly(backbone, requests())
    module, medusas = random_hydra(backbone), random_heads(backbone, 3, 1, "tied", 40)
    tensors, arch = medusas.checkpoint()
    for scales in ODD:
        medusa = Medusa(backbone, arch, tensors, some_paths(3, 6, 0), lambda rows, context, *_: 12, scales=scales)
        for drafter in (drafter_of(backbone, module, scales=scales), medusa):
            for each in (drafter, WithLookup(drafter)):
                assert_same(finish(decoder_of(backbone, each, max_rows=3), requests()), truth)


# -- drafting -------------------------------------------------------------------------------------------------------


def after_some_steps(backbone: Backbone, drafter: Hydra) -> Row:
    decoder = decoder_of(backbone, watched(drafter))
    decoder.submit([1, 2, 3, 4, 5, 6], SamplingParams(max_new_tokens=30))
    for _ in range(3):
        decoder.step()
    drafter._read(waiting(drafter, decoder._rows))
    return decoder._rows[0]


def waiting(drafter: Hydra, rows: Sequence[Row]) -> list[Row]:
    """The rows of which the drafter has not read all."""
    return drafter._unread(rows)


def states_of(backbone: Backbone, tokens: list[int], taps: tuple[int, ...]) -> dict[int, Tensor]:
    """Tapped states [1, T, d] of a text in one pass."""
    nodes, layers = Nodes.chains([0], [0], [len(tokens)]), [tap for tap in taps if tap != FINAL_NORM]
    hidden, found = backbone.run_layers(
        backbone.embed(torch.tensor(tokens)), nodes, backbone.new_cache(1, len(tokens)), taps=layers
    )
    return {tap: each[None] for tap, each in (found | {FINAL_NORM: backbone.norm(hidden)}).items()}


def log_probs_after(backbone: Backbone, module: HydraHeads, tokens: list[int], path: list[int]) -> Tensor:
    """[V]: log-probabilities of the head behind a path (the root first), written out for this path alone."""
    streams = states_of(backbone, tokens[:-1], module.taps)
    ordered = [streams[tap] for tap in reversed(module.taps)]
    if module.fuse is not None:
        following = backbone.embed(torch.tensor(tokens[1:]))[None]
        beside = [x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (*ordered[1:], following)]
        ordered = [ordered[0] + torch.cat(beside, -1) @ module.fuse.T]
    if module.prefix:
        ordered[0] = module.prefix(ordered[0])
    read = [stream[0, -1] for stream in ordered] + list(backbone.embed(torch.tensor(path)))
    state = module.states(len(path) - 1, side_by_side(torch.stack(read)[None]))[0]
    return (module.head(len(path) - 1) @ state).log_softmax(-1).detach()


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("plus", [False, True], ids=["hydra", "hydra++"])
@pytest.mark.parametrize(
    "options",
    [
        {"layers": 1}, {"layers": 3, "taps": 0}, {"linear_tail": True}, {"layers": 2, "linear_tail": True, "taps": 1},
        {"fuse_prefix": True}, {"fuse_prefix": True, "taps": 0},
    ],
    ids=str,
)  # fmt: skip
def test_each_node_is_what_the_heads_say_after_its_path(plus: bool, options: dict[str, Any]) -> None:
    if not plus:
        options = {name: value for name, value in options.items() if name != "fuse_prefix"}
    backbone = backbone_of()
    module = random_hydra(backbone, plus, **options)
    drafter = drafter_of(backbone, module, nodes=20)
    row = after_some_steps(backbone, drafter)
    draft = drafter.draft([row])
    (tree,), (tokens,), (given,) = draft.trees, draft.tokens, draft.probabilities or []
    assert len(tree) == 20
    vocabulary = module.vocabulary_V.tolist()
    values = [0.0] * 20
    for node in range(1, 20):
        path = [tokens[i] for i in tree.path(node)]
        log_p = log_probs_after(backbone, module, row.tokens, path[:-1])
        assert given[node] == pytest.approx(float(log_p[vocabulary.index(path[-1])].exp()), rel=1e-3, abs=1e-5)
        values[node] = values[tree.parents[node]] + float(log_p[vocabulary.index(path[-1])])
    # of the guesses that the root makes, none that was left out is more probable than one that was taken
    taken = {tokens[node] for node in tree.children[0]}
    log_p = log_probs_after(backbone, module, row.tokens, tokens[:1])
    best = log_p.topk(WIDTH_OF_A_NODE)
    left = [value for value, i in zip(*map(Tensor.tolist, best), strict=True) if vocabulary[i] not in taken]
    assert max(left, default=-99) <= min(values) + 1e-3


@pytest.mark.usefixtures("in_float32")
def test_a_static_tree_holds_the_paths_it_was_given() -> None:
    backbone = backbone_of()
    module, paths = random_hydra(backbone), some_paths(3, 5, 2)
    drafter = drafter_of(backbone, module, paths, 12)
    row = after_some_steps(backbone, drafter)
    draft = drafter.draft([row])
    (tree,), (tokens,) = draft.trees, draft.tokens
    guessed = {tuple(tokens[i] for i in tree.path(node)) for node in range(len(tree))}
    expected = set()
    for path in [(), *paths[:11]]:
        guesses = [row.tokens[-1]]
        for rank in path:
            best = log_probs_after(backbone, module, row.tokens, guesses).topk(5).indices
            guesses.append(int(module.vocabulary_V[best[rank]]))
        expected.add(tuple(guesses))
    assert guessed == expected


def test_the_published_tree_asks_one_ten_ten_and_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its 63 guesses, level by level: only nodes that have children are asked (github.com/zankner/Hydra)."""
    backbone = backbone_of()
    folder = saved(tmp_path / "heads", backbone, random_hydra(backbone, heads=4), "hydra")
    drafter = drafters.build("hydra", backbone, checkpoint=folder, tree="mc_sim_7b_63")
    assert isinstance(drafter, Hydra)
    asked: list[int] = []
    expand = drafter._expand

    def counted(k: int, trees: list[GrowingTree], inputs: HeadInputs) -> Any:
        asked.append(sum(len(tree.frontier) for tree in trees))
        return expand(k, trees, inputs)

    row = after_some_steps(backbone, drafter)
    monkeypatch.setattr(drafter, "_expand", counted)
    (tree,) = drafter.draft([row]).trees
    assert asked == [1, 10, 10, 1]
    assert [tree.depths.count(depth) for depth in range(5)] == [1, 10, 28, 23, 2]
    with pytest.raises(UsageError, match="Its trees have 2 to 64 nodes, not 65"):
        drafters.build("hydra", backbone, checkpoint=folder, tree="mc_sim_7b_63", nodes=65)


def test_rows_drafted_together_are_drafted_as_alone() -> None:
    backbone = backbone_of()
    module = random_hydra(backbone, plus=True)
    together = decoder_of(backbone, drafter_of(backbone, module), max_rows=3)
    for ids, params in requests(3):
        together.submit([*ids, 7], params)
    for _ in range(2):
        together.step()
    drafter = together.drafter
    assert isinstance(drafter, Hydra)
    whole = drafter.draft(together._rows)
    for i, row in enumerate(together._rows):
        alone = drafter.draft([row])
        assert (alone.trees[0], alone.tokens[0]) == (whole.trees[i], whole.tokens[i])


def test_a_level_asks_no_more_than_the_beam_and_nobody_where_it_is_hardly_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = backbone_of()
    drafter = drafter_of(backbone, random_hydra(backbone), nodes=100)
    row, counts = after_some_steps(backbone, drafter), list[int]()

    def counting(top: Callable[..., Any]) -> Callable[..., Any]:
        def counted(store: Tensor, which: list[Any], *rest: Any) -> Any:
            counts.append(len(which))
            return top(store, which, *rest)

        return counted

    for level in drafter._levels:
        monkeypatch.setattr(level, "top", counting(level.top))
    for least, asked in ((0.0, [1, BEAM, BEAM]), (1.1, [1])):  # nothing is reached with more than certainty
        monkeypatch.setattr(hydra, "MIN_GAIN", least)
        counts.clear()
        drafter._by_level([row], 99)
        assert counts == asked


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("tied", [True, False], ids=["tied embedding", "embedding of its own"])
@pytest.mark.parametrize(
    "options",
    [{}, {"layers": 3}, {"linear_tail": True}, {"plus": True}, {"plus": True, "fuse_prefix": True}],
    ids=str,
)  # fmt: skip
def test_what_is_drafted_in_one_call_is_what_is_drafted_level_by_level(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], tied: bool, dtype: torch.dtype, kernel: str
) -> None:
    with using(kernel):
        backbone = backbone_of(dtype, tie_word_embeddings=tied)
    assert backbone.kernels == kernel
    module = random_hydra(backbone, seed=3, **options)
    for scales in ([], *ODD):
        drafter = drafter_of(backbone, module, scales=scales)
        assert drafter._grower
        decoder = decoder_of(backbone, drafter, max_rows=4)
        for ids, params in requests(4):
            decoder.submit([*ids, 7], params)
        for _ in range(2):
            decoder.step()
        drafter._read(waiting(drafter, decoder._rows))
        del drafter._states[decoder._rows[1].slot]  # as after a prompt of one token
        drafter._states[decoder._rows[2].slot].fill_(math.nan)
        for least, beam in ((0.0, 3), (0.1, BEAM), (0.5, BEAM)):
            monkeypatch.setattr(hydra, "MIN_GAIN", least)
            monkeypatch.setattr(hydra, "BEAM", beam)
            for count in (1, 9, 40):
                drafter.size = lambda *_, size=count + 1: size
                ours, slow = drafter.draft(decoder._rows), drafter._by_level(decoder._rows, count)
                assert (ours.trees, ours.tokens) == (slow.trees, slow.tokens)
                for one, other in zip(ours.probabilities or [], slow.probabilities or [], strict=True):
                    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.usefixtures("in_float32")
def test_the_tree_is_the_best_of_all_that_could_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node of every level is asked for every token; of all these paths the most probable are drafted."""
    monkeypatch.setattr(hydra, "MIN_GAIN", 0.0)
    monkeypatch.setattr(hydra, "BEAM", 1000)
    backbone = backbone_of()
    module = random_hydra(backbone, vocabulary=5)
    drafter = drafter_of(backbone, module, nodes=25)
    row = after_some_steps(backbone, drafter)
    values, level = dict[tuple[int, ...], float](), {(row.tokens[-1],): 0.0}
    for _ in range(module.heads):
        level = {
            (*path, token): value + log_probs
            for path, value in level.items()
            for token, log_probs in enumerate(log_probs_after(backbone, module, row.tokens, list(path)).tolist())
        }
        values |= level
    assert len(values) == 5 + 25 + 125
    draft = drafter.draft([row])
    (tree,), (tokens,) = draft.trees, draft.tokens
    drafted = {tuple(tokens[i] for i in tree.path(node)) for node in range(1, len(tree))}
    assert len(drafted) == 24
    best = sorted(values.values(), reverse=True)[:24]
    assert sorted((values[path] for path in drafted), reverse=True) == pytest.approx(best, abs=1e-3)


@pytest.mark.usefixtures("in_float32")
def test_heads_that_are_hardly_believed_hang_less_below_them() -> None:
    backbone = backbone_of()
    module = random_hydra(backbone)
    drafter = drafter_of(backbone, module, nodes=8)
    doubted = drafter_of(backbone, module, nodes=8, scales=[(0.5, -1.0), (1.0, -8.0), (1.0, -8.0)])
    row = after_some_steps(backbone, drafter)
    doubted._states = drafter._states
    deep, flat = drafter.draft([row]), doubted.draft([row])
    assert flat.trees[0].height == 1 < deep.trees[0].height
    log_probs = log_probs_after(backbone, module, row.tokens, row.tokens[-1:])
    assert flat.probabilities
    for token, p in zip(flat.tokens[0][1:], flat.probabilities[0][1:], strict=True):
        log_p = float(log_probs[module.vocabulary_V.tolist().index(token)])
        assert p == pytest.approx(1 / (1 + math.e * math.expm1(-log_p) ** 0.5), rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"plus": True, "fuse_prefix": True}], ids=str)
def test_a_token_of_the_path_changes_only_what_comes_after_it(options: dict[str, Any]) -> None:
    backbone = backbone_of()
    module = random_hydra(backbone, layers=2, **options)
    tokens = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]]
    batch = batch_of(tokens, [[True] * 10])
    sources = torch.tensor([2])
    before = module.read(batch, sources).detach()
    for changed in range(3, 6):
        batch.tokens_BT = torch.tensor(tokens)
        batch.tokens_BT[0, changed] = 60
        same = (module.read(batch, sources).detach() == before).all(-1)[:, 0].tolist()
        assert same == [k < changed - 3 for k in range(3)]


# -- heads that know -------------------------------------------------------------------------------------------------


def counting_backbone() -> Backbone:
    """Says t + 1 after t: layers add nothing, and output row t + 1 is the embedding of t."""
    model = Model(LLAMA)
    weights = model.weights()
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    embedding = weights["model.embed_tokens.weight"]
    embedding -= embedding.mean(1, keepdim=True)  # what is alike in all dimensions says nothing
    embedding /= embedding.norm(dim=1, keepdim=True)
    weights["model.norm.weight"].fill_(1)
    weights["lm_head.weight"] = embedding.roll(1, 0)
    return build(model.config, weights)


def counting_heads(backbone: Backbone, plus: bool, sign: int) -> HydraHeads:
    """Four heads that add the last token's embedding to the state (or take it away), which speaks for the next."""
    kind = HydraPlus if plus else Hydra
    module = trainable(kind, backbone, torch.ones(VOCAB), layers=1, draft_vocab=0, taps=0)
    with torch.no_grad():
        module.first_bias_Kd.fill_(64)  # SiLU is the identity here
        for k, weight in enumerate(module.first):
            weight[:, (k + 1) * WIDTH : (k + 2) * WIDTH] = sign * 8 * torch.eye(WIDTH)
    return module.eval()


@pytest.mark.parametrize("plus", [False, True], ids=["hydra", "hydra++"])
@pytest.mark.parametrize(("sign", "each_step"), [(1, 5), (-1, 1)], ids=["always right", "always wrong"])
def test_heads_that_know_are_accepted_to_their_full_depth(plus: bool, sign: int, each_step: int) -> None:
    backbone = counting_backbone()
    request = ([5, 6, 7], SamplingParams(max_new_tokens=25, ignore_eos=True))
    drafter = drafter_of(backbone, counting_heads(backbone, plus, sign), nodes=16)
    output = finish(decoder_of(backbone, drafter), [request])[0]
    assert output.ids == [(8 + i) % VOCAB for i in range(25)]
    assert output.statistics.steps == 25 / each_step
    assert output.statistics.accepted == 25 - output.statistics.steps
    assert_same([output], plainly(backbone, [request]))


# -- the layer before the heads --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cuts", [[11], [4, 7], [1] * 11, [5, 1, 3, 2]])
def test_the_layer_reads_states_in_any_chunks(kernel: str, cuts: list[int]) -> None:
    with using(kernel):
        backbone = backbone_of()
        module = random_hydra(backbone, plus=True)
        drafter = drafter_of(backbone, module)
        assert module.prefix
        assert drafter._prefix
        states = torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(1))
        drafter.bind(backbone.new_cache(2, 4))
        found, begin = [], 0
        for count in cuts:
            found.append(drafter._prefix([1], [count], states[begin : begin + count]))
            begin += count
        torch.testing.assert_close(torch.cat(found), module.prefix(states[None])[0].detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_one_call_is_the_layer_verb_by_verb(kernel: str, dtype: torch.dtype, tied: bool, fused: bool) -> None:
    """Ragged rows that join late, in any order of slots; and bit for bit the same however many come at once."""
    with using(kernel):
        backbone = Model(LLAMA | {"tie_word_embeddings": tied}).build(kernel, dtype, 2)
        module = random_hydra(backbone, plus=True, fuse_prefix=fused, taps=2)
        assert module.prefix
        tensors = {name: each.to(dtype) for name, each in module.prefix.named().items()}
        fuse = module.fuse.to(dtype) if module.fuse is not None else None
        kernels = kernels_for(backbone)
        ours, alone = (kernels.prefix_layer(tensors, fuse) for _ in range(2))
        twin = PrefixLayer(backbone, kernels.own_layers([tensors]), None if fuse is None else kernels._rounded(fuse))
        unrounded = PrefixLayer(backbone, backbone.own_layers([tensors]), fuse)
        assert type(ours) is not PrefixLayer
        generator = torch.Generator().manual_seed(3)
        for layer in (ours, alone, twin, unrounded):
            layer.cache = layer.layer.new_cache(2, 4)
        for rows, counts in (([1], [5]), ([4, 1], [3, 1]), ([1, 4, 0], [2, 1, 7]), ([0, 1], [1, 1])):
            total = sum(counts)
            states, *others = torch.randn(1 + 2 * fused, total, WIDTH, generator=generator).unbind()
            following = torch.randint(VOCAB, (total,), generator=generator).tolist() if fused else []
            found = ours(rows, counts, states, others, following)
            one_by_one, at = [], 0
            for row, count in zip(rows, counts, strict=True):
                for i in range(at, at + count):
                    one_by_one.append(alone([row], [1], *_at(i, states, others, following)))
                at += count
            assert same(torch.cat(one_by_one), found)
            truth = twin(rows, counts, states, others, following)
            # bfloat16 rounds what the norms give a last bit apart
            torch.testing.assert_close(found, truth, **({} if dtype == FP32 else {"rtol": 2e-2, "atol": 2e-2}))
            difference = found - unrounded(rows, counts, states, others, following)
            assert difference.norm() < 0.03 * found.norm()
            assert [ours.length(row) for row in range(5)] == [twin.length(row) for row in range(5)]
        for layer in (ours, twin):
            layer.begin(1, 3, 4)
        assert [ours.length(row) for row in range(6)] == [8, 3, 0, 0, 4, 0]


def _at(i: int, states: Tensor, others: list[Tensor], following: list[int]) -> tuple[Tensor, list[Tensor], list[int]]:
    return states[i : i + 1], [each[i : i + 1] for each in others], following[i : i + 1]


def test_a_fresh_layer_is_the_identity() -> None:
    backbone = backbone_of()
    states = torch.randn(1, 9, WIDTH)
    assert torch.equal(DecoderLayer(backbone.config, backbone.rotation)(states), states)


@pytest.mark.parametrize("fused", [False, True])
def test_a_request_that_begins_like_an_earlier_one_is_drafted_like_a_new_one(fused: bool) -> None:
    backbone = backbone_of()
    module = random_hydra(backbone, plus=True, fuse_prefix=fused)
    first, second = [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 9, 9, 9, 2]
    used, fresh = (decoder_of(backbone, drafter_of(backbone, module)) for _ in range(2))
    finish(used, [(first, SamplingParams(max_new_tokens=20))])
    drafts = []
    for decoder in (used, fresh):
        decoder.submit(second, SamplingParams(max_new_tokens=20))
        decoder.step()
        drafts.append(decoder.drafter.draft(decoder._rows))
    assert used._rows[0].reused > 0
    assert drafts[0] == drafts[1]


# -- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plus", [False, True], ids=["hydra", "hydra++"])
def test_fresh_heads_say_what_the_output_head_says(plus: bool) -> None:
    backbone = backbone_of()
    kind = HydraPlus if plus else Hydra
    module = trainable(kind, backbone, torch.ones(VOCAB), layers=3, draft_vocab=0)
    batch = batch_of([[3, 1, 4, 1, 5, 9]], [[True] * 6])
    read = module.read(batch, torch.tensor([0, 1, 2]))
    assert all(torch.equal(each, batch.states[FINAL_NORM][0, :3]) for each in read)


@pytest.mark.parametrize("plus", [False, True], ids=["hydra", "hydra++"])
def test_gradients_reach_every_part_and_nothing_else(plus: bool) -> None:
    backbone = backbone_of()
    before = backbone.head_rows(torch.arange(VOCAB)).clone()
    options = {"linear_tail": True, "fuse_prefix": True} if plus else {}
    module = random_hydra(backbone, plus, layers=2, vocabulary=0, **options).train()
    torch.stack(list(module.losses(batch_of([[(7 * i) % VOCAB for i in range(20)]], [[True] * 20])).values())).sum().backward()  # fmt: skip  # noqa: E501
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    assert any(name.startswith("prefix") for name, _ in module.named_parameters()) == plus
    torch.optim.AdamW(module.parameters(), lr=0.1).step()
    assert torch.equal(backbone.head_rows(torch.arange(VOCAB)), before)


@pytest.mark.parametrize("plus", [False, True], ids=["hydra", "hydra++"])
@pytest.mark.parametrize("options", [{}, {"acceptance": 0.9}, {"position_weights": "dynamic"}], ids=str)
def test_a_cyclic_sequence_is_learnt_one_head_one_step_further(plus: bool, options: dict[str, Any]) -> None:
    backbone, cycle = backbone_of(), [11, 3, 42, 7, 29, 60, 18]
    tokens = [cycle[i % 7] for i in range(60)]
    batch = batch_of([tokens], [[True] * 60])
    batch.states |= states_of(backbone, tokens, (FINAL_NORM, 1, 2))
    kind = HydraPlus if plus else Hydra
    module = trainable(kind, backbone, torch.ones(VOCAB), heads=3, draft_vocab=0, taps=1, soft=0.0, **options)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0)
    for _ in range(60):
        optimizer.zero_grad()
        torch.stack(list(module.losses(batch).values())).sum().backward()
        optimizer.step()
    ranks = [each.ranks_PK.numpy() for each in module.eval().guesses(batch)]
    assert tree_tokens_per_step(ranks, nested(ranks, 4)) > 3.6
    drafter = drafter_of(backbone, module, nodes=4)
    drafter.bind(backbone.new_cache(1, 64))
    for i in range(20, 27):
        states = states_of(backbone, tokens[:i], module.taps)
        drafter.reset([Told(tokens[: i + 1])])
        drafter.observe([Told(tokens[: i + 1])], Committed(i, {tap: each[0] for tap, each in states.items()}))
        draft = drafter.draft([Told(tokens[: i + 1])])
        assert draft.tokens[0] == tokens[i : i + 4]
        assert draft.trees[0] == chain(3)


def assert_same_guesses(ours: GuessingHeads, theirs: GuessingHeads, batch: TrainingBatch, heads: int = 3) -> None:
    for mine, right in zip(ours.eval().guesses(batch), theirs.eval().guesses(batch), strict=True):
        assert torch.equal(mine.ranks_PK[:, :heads], right.ranks_PK[:, :heads])
        torch.testing.assert_close(mine.log_probs_PKR[:, :heads], right.log_probs_PKR[:, :heads], rtol=1e-4, atol=1e-4)


def some_batch() -> TrainingBatch:
    tokens = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(4)).tolist()
    return batch_of(tokens, [[True] * 20] * 2)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("plus", [False, True], ids=["hydra", "hydra++"])
@pytest.mark.parametrize(
    ("layers", "output", "root"),
    [(1, "tied", True), (2, "tied", True), (1, "shared", True), (2, "tied", False)],
)
def test_begun_with_medusas_heads_it_guesses_what_they_guess(plus: bool, layers: int, output: str, root: bool) -> None:
    backbone, batch = backbone_of(), some_batch()
    medusa = random_heads(backbone, 3, layers, output, 40, root=root)
    kind = HydraPlus if plus else Hydra
    module = trainable(kind, backbone, torch.arange(VOCAB).flip(0), heads=3, layers=2, draft_vocab=40)
    with pytest.raises(AssertionError):
        assert_same_guesses(module, medusa, batch)
    tensors, arch = medusa.checkpoint()
    module.start(arch, tensors)
    assert_same_guesses(module, medusa, batch)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {"plus": True}), ({"plus": True}, {"plus": True}), ({}, {"layers": 3}), ({"heads": 2}, {"heads": 3}),
        ({"heads": 3}, {"heads": 2}), ({"layers": 3}, {"layers": 3}), ({}, {"linear_tail": True}),
        ({"linear_tail": True}, {"linear_tail": True}),
        ({"plus": True, "fuse_prefix": True}, {"plus": True, "fuse_prefix": True}),
    ],
    ids=str,
)  # fmt: skip
def test_begun_with_related_heads_it_guesses_what_they_guess(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    backbone, batch = backbone_of(), some_batch()
    learnt = random_hydra(backbone, **theirs)
    options = {"heads": 3} | {name: value for name, value in ours.items() if name != "plus"}
    kind = HydraPlus if "plus" in ours else Hydra
    module = trainable(kind, backbone, torch.arange(VOCAB).flip(0), draft_vocab=40, **options)
    heads = min(learnt.heads, module.heads)
    with pytest.raises(AssertionError):
        assert_same_guesses(module, learnt, batch, heads)
    tensors, arch = learnt.checkpoint()
    module.start(arch, tensors)
    assert_same_guesses(module, learnt, batch, heads)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"taps": 1}, {"taps": 2}), ({"taps": 2}, {"taps": 0}), ({"layers": 2}, {"layers": 1}),
        ({"linear_tail": True}, {}), ({"plus": True}, {}),
        ({"plus": True, "fuse_prefix": True}, {"plus": True}),
    ],
    ids=str,
)  # fmt: skip
def test_heads_of_other_options_are_no_beginning(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    backbone = backbone_of()
    tensors, arch = random_hydra(backbone, **theirs).checkpoint()
    with pytest.raises(UsageError, match=r"^It [^\n]* train with [^\n]*\.$"):
        random_hydra(backbone, **ours).start(arch, tensors)


def test_a_beginning_of_more_blocks_says_what_to_train_with() -> None:
    backbone = backbone_of()
    tensors, arch = random_hydra(backbone, layers=2).checkpoint()
    with pytest.raises(UsageError) as error:
        random_hydra(backbone, layers=1).start(arch, tensors)
    assert str(error.value) == "It has 2 blocks in each head, these would have 1 block; train with `layers=2`."


FORMER = {"output": "tied", "grounded": True, "tied": False, "chained": False}
"""What earlier versions wrote besides; options of other values are gone."""


def former(arch: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The numbers of a checkpoint under the names of earlier versions."""
    rest = {name: value for name, value in arch.items() if name not in ("linear_tail", "fuse_prefix")}
    return rest | FORMER | {"linear": arch["linear_tail"], "fused": arch.get("fuse_prefix", False)} | changes


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("options", [{}, {"plus": True, "fuse_prefix": True, "linear_tail": True}], ids=str)
def test_a_checkpoint_of_an_earlier_version_is_read(options: dict[str, Any]) -> None:
    backbone = backbone_of()
    module = random_hydra(backbone, **options)
    tensors, arch = module.checkpoint()
    drafters = [Hydra(backbone, each, tensors, [], lambda rows, context, *_: 9) for each in (arch, former(arch))]
    rows = [after_some_steps(backbone, drafter) for drafter in drafters]
    assert drafters[0].draft([rows[0]]) == drafters[1].draft([rows[1]])
    fresh = random_hydra(backbone, seed=5, **options)
    fresh.start(former(arch), tensors)
    assert_same_guesses(fresh, module, some_batch())


@pytest.mark.parametrize("name", FORMER)
def test_a_checkpoint_of_an_option_that_is_gone_says_so(name: str) -> None:
    backbone = backbone_of()
    tensors, arch = random_hydra(backbone).checkpoint()
    other = former(arch, **{name: "own" if name == "output" else not FORMER[name]})
    with pytest.raises(UsageError, match=f"^It was trained with {name}=(own|true|false), which this version no longer"):
        Hydra(backbone, other, tensors, [], lambda rows, context, *_: 9)


@pytest.mark.parametrize(
    ("layers", "reads", "ours"),
    [(2, {"taps": 1}, {"layers": 2}), (2, {}, {"layers": 1})],
    ids=str,
)
def test_medusas_heads_of_other_options_are_no_beginning(
    layers: int, reads: dict[str, Any], ours: dict[str, Any]
) -> None:
    backbone = backbone_of()
    tensors, arch = random_heads(backbone, 3, layers, "tied", 40, **reads).checkpoint()
    with pytest.raises(UsageError, match=r"^It [^\n]* train with [^\n]*\.$"):
        random_hydra(backbone, **ours).start(arch, tensors)


def test_a_run_with_dropout_taken_up_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    backbone = backbone_of()
    generator = torch.Generator().manual_seed(2)
    data = [Distilled(i, torch.randint(VOCAB, (20,), generator=generator).tolist(), [(4, 20)]) for i in range(8)]

    def made(folder: str) -> Trainer:
        torch.manual_seed(7)
        module = trainable(HydraPlus, backbone, torch.ones(VOCAB), draft_vocab=0, dropout=0.3)
        settings = Settings(epochs=2, batch_tokens=40, held_out=0, save_seconds=0)
        return Trainer(module, ComputedFeatures(backbone, data, module.taps), settings, tmp_path / folder)

    straight = made("straight")
    train([straight])
    cut = made("cut")
    with pytest.raises(KeyboardInterrupt):
        train([cut], stop=lambda: cut.step == 3)
    torch.manual_seed(99)  # whatever has been drawn in between
    final = made("cut")
    train([final])
    assert final.step == straight.step > 3
    for ours, theirs in zip(final.module.parameters(), straight.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", [Hydra, HydraPlus])
def test_a_run_of_an_earlier_version_is_resumed(method: type[Hydra], tmp_path: Path) -> None:
    backbone = backbone_of()
    data = [Distilled(i, list(range(1, 20)), [(4, 19)]) for i in range(8)]
    former = {
        "heads": 4, "layers": 0, "output": "tied", "draft_vocab": 8192, "soft": 0.5, "taps": 2, "grounded": True,
        "tied": False, "linear": False, "chained": False, "fused": False, "dropout": 0.0, "method": method.method,
    }  # fmt: skip

    def made(options: dict[str, Any]) -> Trainer:
        module = trainable(method, backbone, torch.ones(VOCAB), draft_vocab=0)
        features, settings = ComputedFeatures(backbone, data, module.taps), Settings(batch_tokens=40, held_out=0)
        return Trainer(module, features, settings, tmp_path, options, partial(migrated, method.Training))

    run = made(former)
    run.migrate = dict
    with pytest.raises(KeyboardInterrupt):
        train([run], stop=lambda: run.step == 2)
    present = asdict(method.Training()) | {"method": method.method}
    resumed = made(present)
    assert resumed.resume()
    assert resumed.step == 2
    for name, value, sentence in (
        ("grounded", False, r"grounded False \(not None\)"), ("layers", 5, r"layers 5 \(not \d\)"),
        ("linear", True, r"linear_tail True \(not False\)"),
    ):  # fmt: skip
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        torch.save(state | {"settings": state["settings"] | {name: value}}, tmp_path / "state.pt")
        with pytest.raises(UsageError, match=sentence):
            made(present).resume()
        torch.save(state, tmp_path / "state.pt")


class Told:
    """A row of which a drafter needs the tokens only."""

    slot = reused = prompt_length = 0
    params = SamplingParams()
    budget = 99

    def __init__(self, tokens: list[int]):
        self.tokens = tokens


class Committed:
    def __init__(self, count: int, taps: dict[int, Tensor]):
        self.counts, self.taps, self.extra, self.paths = [count], taps, None, []


# -- checkpoints and mistakes ----------------------------------------------------------------------------------------


def saved(folder: Path, backbone: Backbone, module: HydraHeads, method: str, scales: Sequence[Scale] = ()) -> str:
    tensors, arch = module.checkpoint()
    Checkpoint(
        method=method, backbone="tiny", fingerprint=backbone.fingerprint, hidden=WIDTH, vocab=VOCAB, arch=arch,
        paths=[[0], [0, 0], [1]], calibration=[list(scale) for scale in scales],
    ).save(folder, tensors)  # fmt: skip
    return str(folder)


@pytest.mark.parametrize("plus", [False, True], ids=["hydra", "hydra++"])
def test_a_checkpoint_drafts_as_before(tmp_path: Path, plus: bool) -> None:
    backbone = backbone_of(BF16)
    module = random_hydra(backbone, plus, layers=2, linear_tail=plus)
    name, scales = "hydra++" if plus else "hydra", [(0.7, -1.0), (0.5, 0.5), (1.0, -2.0)]
    folder = saved(tmp_path / "heads", backbone, module, name, scales)
    built = drafters.build(name, backbone, checkpoint=folder, nodes=24)
    direct = drafter_of(backbone, module, scales=scales)
    assert isinstance(built, Hydra)
    rows = [after_some_steps(backbone, each) for each in (built, direct)]
    assert rows[0].tokens == rows[1].tokens
    assert built.draft([rows[0]]) == direct.draft([rows[1]])
    assert built.parameters == direct.parameters == sum(p.numel() for p in module.parameters())
    other = "hydra" if plus else "hydra++"
    with pytest.raises(UsageError, match=r"holds a hydra.* drafter, not hydra"):
        drafters.build(other, backbone, checkpoint=str(tmp_path / "heads"))


def test_a_layer_of_another_shape_is_refused(tmp_path: Path) -> None:
    backbone = backbone_of()
    folder = saved(tmp_path / "heads", backbone, random_hydra(backbone, plus=True), "hydra++")
    wide = backbone_of(intermediate_size=96)
    with pytest.raises(UsageError, match="own layer has not this model's shape; train a drafter for this model"):
        drafters.build("hydra++", wide, checkpoint=folder, any_backbone=True)
    shallow = backbone_of(num_hidden_layers=1)
    with pytest.raises(UsageError, match="heads reads layer 2, but this model has 1"):
        drafters.build("hydra++", shallow, checkpoint=folder, any_backbone=True)


def test_engines_may_share_a_drafter() -> None:
    backbone = backbone_of()
    drafter = shared(drafter_of(backbone, random_hydra(backbone, plus=True)))
    three, one = decoder_of(backbone, drafter, max_rows=3), decoder_of(backbone, drafter)
    for _ in range(2):
        for decoder in (three, one):
            assert_same(finish(decoder, requests()), plainly(backbone, requests()))


def test_an_interruption_before_the_layer_read_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of()
    drafter = drafter_of(backbone, random_hydra(backbone, plus=True))
    decoder = decoder_of(backbone, drafter)
    request = ([1, 2, 3, 4, 5, 6], SamplingParams(max_new_tokens=20))
    number = decoder.submit(*request)
    decoder.step()
    with monkeypatch.context() as patched:
        patched.setattr(drafter, "observe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            decoder.step()
    assert drafter._prefix
    assert drafter._prefix.length(0) < decoder.cache.lengths[0]
    decoder.cancel(number)
    assert decoder.cache.lengths[0] == 0  # nothing that the layer has not read is kept for a request to come
    assert_same(finish(decoder, [request]), plainly(backbone, [request]))
    assert drafter._prefix.length(0) == decoder.cache.lengths[0]


@pytest.mark.parametrize("fused", [False, True])
def test_rows_that_come_and_go_keep_what_their_own_layer_read(fused: bool) -> None:
    """Five requests of other lengths in three slots: whenever a slot's states are read they are those of its tokens.

    They are read where the drafter guesses, which it does now and then only.
    """
    backbone = backbone_of(FP32)
    module = random_hydra(backbone, plus=True, fuse_prefix=fused)
    drafter = drafter_of(backbone, module, nodes=6)
    drafter.size = lambda rows, context, *_: 1 if context // 5 % 2 else 6
    waited = 0
    decoder = decoder_of(backbone, drafter, max_rows=3)
    for i in range(5):
        decoder.submit(list(range(1 + i, 9 + 2 * i)), SamplingParams(max_new_tokens=4 + 5 * i, ignore_eos=True))
    slots, steps = set(), 0
    while decoder.busy:
        decoder.step()
        for row in decoder._rows:
            held = decoder.cache.lengths[row.slot]
            assert drafter._prefix
            assert drafter._prefix.length(row.slot) == held
            waited = max(waited, drafter._prefix.waiting(row.slot))
            if held < row.prompt_length - 1 or steps % 2:
                steps += 1
                continue
            drafter._read(waiting(drafter, [row]))
            alone = drafter_of(backbone, module, nodes=6)
            other = decoder_of(backbone, alone)
            other.submit(row.tokens, SamplingParams(max_new_tokens=1))
            other._admit()
            other._prefill(other._rows)  # all but the newest
            assert other.cache.lengths[0] == held
            alone._read(waiting(alone, other._rows))
            assert (drafter._states[row.slot] - alone._states[0]).abs().max() < 1e-4
            slots.add(row.slot)
            steps += 1
    assert len(slots) == 3
    assert steps > 40
    assert waited > 3


def test_what_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    backbone = backbone_of()
    tensors, arch = random_hydra(backbone).checkpoint()
    for paths, sentence in (
        ([(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)], "deeper than the 3 heads"), ([(40,)], "rank beyond the 40 tokens"),
        ([(0, 1)], "lacks its prefix"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=sentence):
            Hydra(backbone, arch, tensors, paths, lambda rows, context, *_: 8)
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"chained": True}, "no longer has the option 'chained'"), ({"heads": 0}, "heads is 0"),
            ({"soft": 2}, "soft is 2"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ]  # fmt: skip
    for options, sentence in mistakes:
        with pytest.raises(UsageError, match=sentence):
            trainable(Hydra, backbone, torch.ones(VOCAB), **options)


@pytest.mark.parametrize("kernel", COMPILED)
def test_both_forms_of_the_heads_agree(kernel: str) -> None:
    """The packed heads share the first level's output matrix; the eager ones do as well."""
    with using(kernel):
        packed = backbone_of()
    with using("eager"):
        eager = backbone_of()
    module = random_hydra(packed, plus=True)
    drafts = []
    for backbone in (packed, eager):
        drafter = drafter_of(backbone, module, nodes=12)
        drafts.append(drafter.draft([after_some_steps(backbone, drafter)]))
    assert drafts[0].trees == drafts[1].trees
    assert drafts[0].tokens == drafts[1].tokens
