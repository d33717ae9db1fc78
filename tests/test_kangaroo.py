"""Kangaroo: whatever the adapter says, no answer changes; what drafting computes is what a prefill would."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import (
    STEPS_AND_THRESHOLDS,
    assert_changes_no_token,
    assert_same,
    decoder_of,
    drafts_of,
    finish,
    held_like_a_fresh_prefill,
    plainly,
    texts_and_drafts,
    watched,
)
from random_backbones import BF16, COMPILED, FP32, KERNELS, Model, build, same, using
from test_medusa import LLAMA, VOCAB, WIDTH, backbone_of, batch_of, requests
from torch import Tensor
from trainables import trainable

from foretell import drafters
from foretell.backbone import Backbone, Nodes
from foretell.backbone.base import SKIP_MLP
from foretell.contracts import Draft
from foretell.drafters import kangaroo
from foretell.drafters.kangaroo import Kangaroo, KangarooAdapter
from foretell.drafting.checkpoint import Checkpoint
from foretell.drafting.learning.trainable import TrainingBatch
from foretell.drafting.lower_layers import MAX_TREE_NODES, EarlyExitTrees
from foretell.errors import UsageError
from foretell.requests import SamplingParams


def random_adapter(backbone: Backbone, noise: float = 0.15, seed: int = 0, **options: Any) -> KangarooAdapter:
    counts = torch.arange(VOCAB).flip(0)
    torch.manual_seed(seed)
    module = trainable(Kangaroo, backbone, counts, **{"draft_vocab": 40, "exit": 1, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return module.eval()


def test_a_start_of_another_shape_is_refused_by_what_differs() -> None:
    backbone = backbone_of()
    tensors, arch = random_adapter(backbone, mlp=True).checkpoint()
    random_adapter(backbone, mlp=True).start(arch, tensors)
    with pytest.raises(UsageError, match=r"^It has an MLP, which this adapter would lack; train with `mlp=True`\.$"):
        random_adapter(backbone).start(arch, tensors)
    with pytest.raises(UsageError, match=r"^It reads the model after layer 1, not after layer 2; train with `exit=1`"):
        random_adapter(backbone, mlp=True, exit=2).start(arch, tensors)


def drafter_of(backbone: Backbone, module: KangarooAdapter, nodes: int = 16, **options: Any) -> Kangaroo:
    tensors, arch = module.checkpoint()
    return watched(Kangaroo(backbone, arch, tensors, lambda rows, context, *_: nodes, **options))


# -- exactness ------------------------------------------------------------------------------------------------------


KINDS: list[dict[str, Any]] = [{}, {"exit": 2, "mlp": True}, {"output": "tied", "draft_vocab": 0}, {"exit": 2}]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("chained", [True, False], ids=["chain", "tree"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_untrained_adapters_change_no_token(kind: dict[str, Any], chained: bool, dtype: torch.dtype) -> None:
    """At every exit, any number of steps and any threshold."""
    backbone, seed = backbone_of(dtype), KINDS.index(kind)
    truth = plainly(backbone, requests())
    module = random_adapter(backbone, seed=seed, **kind)
    for turn, (steps, threshold) in enumerate(STEPS_AND_THRESHOLDS, seed + 2 * chained + (dtype == BF16)):
        drafter = drafter_of(backbone, module, 4 + 5 * seed, chain=chained, steps=steps, threshold=threshold)
        assert_changes_no_token(backbone, drafter, requests(), truth, turn)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_keeps_the_promise(kernel: str) -> None:
    with using(kernel):
        backbone = backbone_of(BF16)
        drafter = drafter_of(backbone, random_adapter(backbone))
        truth = plainly(backbone, requests())
        assert_same(finish(decoder_of(backbone, drafter, max_rows=2), requests()), truth)


# -- drafting -------------------------------------------------------------------------------------------------------


def shallow(backbone: Backbone, tokens: list[int], exit: int) -> Tensor:
    """Streams [T, d] of a text after `exit` layers, in one pass."""
    nodes, cache = Nodes.chains([0], [0], [len(tokens)]), backbone.new_cache(1, len(tokens))
    return backbone.run_layers(backbone.embed(torch.tensor(tokens)), nodes, cache, 0, exit)[0]


def text_batch(tokens: list[list[int]], states: dict[int, Tensor]) -> TrainingBatch:
    batch = batch_of(tokens, [[True] * len(each) for each in tokens])
    return replace(batch, states=states)


def log_probs_after(backbone: Backbone, module: KangarooAdapter, tokens: list[int]) -> Tensor:
    """Log-probabilities [V] that the learning form gives after a text."""
    states = shallow(backbone, tokens, module.exit)[None]
    batch = text_batch([tokens], {module.exit: states})
    with torch.no_grad():
        x_Pd = module.read(batch, torch.tensor([len(tokens) - 1]))[0]
        return (x_Pd @ module.head(0).T).log_softmax(-1)[0]


@pytest.mark.parametrize("chained", [True, False], ids=["chain", "tree"])
@pytest.mark.parametrize("options", [{}, {"exit": 2, "mlp": True}, {"output": "tied"}], ids=str)
def test_each_guess_is_what_the_learning_form_says_after_its_path(options: dict[str, Any], chained: bool) -> None:
    """The slow twin: every node's path is run anew, from the first token of the prompt."""
    backbone = backbone_of()
    module = random_adapter(backbone, **options)
    drafter = drafter_of(backbone, module, 12, chain=chained, steps=4, threshold=0.0)
    drafter._min_gain = 0.0  # whether a level pays is not the question
    for before, draft in texts_and_drafts(backbone, drafter, 4):
        tree, tokens, given = draft.trees[0], draft.tokens[0], (draft.probabilities or [[]])[0]
        assert tree.height > 1
        for node in range(1, len(tree)):
            path = [tokens[each] for each in tree.path(tree.parents[node])]
            log_probs = log_probs_after(backbone, module, before + path[1:])
            place = module.vocabulary_V.tolist().index(tokens[node])
            assert given[node] == pytest.approx(float(log_probs[place].exp()), rel=2e-2)
            if chained:
                assert float(log_probs[place]) >= float(log_probs.max()) - 1e-3


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("chained", [True, False], ids=["chain", "tree"])
def test_what_is_drafted_in_one_call_is_what_is_drafted_level_by_level(
    kernel: str, dtype: torch.dtype, chained: bool
) -> None:
    """The slow twin of the kernels' growth: trees, probabilities, streams and the adapter's cache, bit for bit."""
    with using(kernel):
        backbone = backbone_of(dtype)
    for seed, options in enumerate(({}, {"exit": 2, "mlp": True}, {"output": "tied"})):
        module, log_probs = random_adapter(backbone, seed=seed, **options), []
        for slow in (False, True):
            drafter = drafter_of(
                backbone, module, 6 + 6 * seed, chain=chained, steps=4, threshold=0.02, scales=[(0.9, 0.2)]
            )
            drafter._min_gain = 0.05
            if slow:
                drafter._one_call = None
            assert (drafter._one_call is None) == slow
            seen = drafts_of(drafter)
            decoder = decoder_of(backbone, drafter, max_rows=3)
            outputs = finish(decoder, requests(3))
            log_probs.append((seen, outputs, [drafter._own.read(slot) for slot in range(3)]))
        fast, slow_ = log_probs
        assert_same(fast[1], slow_[1])
        for one, other in zip(fast[0], slow_[0], strict=True):
            assert (one.trees, one.tokens) == (other.trees, other.tokens)
            pairs = zip(one.probabilities or [], other.probabilities or [], strict=True)
            assert all(ours == pytest.approx(theirs) for ours, theirs in pairs)  # libraries' logarithms differ
            assert (one.resume is None) == (other.resume is None)
            if one.resume and other.resume:
                assert (one.resume.layer, one.resume.ran) == (other.resume.layer, other.resume.ran)
                assert same(one.resume.hidden_Rd.contiguous(), other.resume.hidden_Rd)
        for ours, theirs in zip(fast[2], slow_[2], strict=True):
            assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def test_many_nodes_may_run_and_no_more_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty levels of forty would be 800; the cache has room for 64, and so have the kernels' tables."""
    backbone, ran, drafted = backbone_of(), list[int](), list[list[Draft]]()
    chosen = EarlyExitTrees.draft

    def draft(self: EarlyExitTrees, count: int, keep_chains: bool) -> Draft:
        ran.extend(map(len, self._ran))
        return chosen(self, count, keep_chains)

    monkeypatch.setattr(EarlyExitTrees, "draft", draft)
    monkeypatch.setattr(kangaroo, "BEAM", 40)
    request = ([1, 2, 3], SamplingParams(max_new_tokens=60, ignore_eos=True))
    for slow in (True, False):
        drafter = drafter_of(backbone, random_adapter(backbone, draft_vocab=0), 64, steps=20)
        drafter._min_gain = -1.0
        drafter._one_call = None if slow else drafter._one_call
        drafted.append(drafts_of(drafter))
        decoder = decoder_of(backbone, drafter)
        assert_same(finish(decoder, [request]), plainly(backbone, [request]))
        assert held_like_a_fresh_prefill(decoder) > 0
    assert max(ran) == MAX_TREE_NODES
    assert [draft.tokens for draft in drafted[0]] == [draft.tokens for draft in drafted[1]]


@pytest.mark.parametrize("place", range(12))
def test_interrupted_anywhere_while_drafting_it_goes_on_and_says_what_it_lacks(place: int) -> None:
    """The answer stays right; the next request that begins alike is drafted like a new one."""
    backbone = backbone_of()
    module = random_adapter(backbone)
    drafter = drafter_of(backbone, module, 12)
    drafter._one_call = None if place % 2 else drafter._one_call
    decoder = decoder_of(backbone, drafter)
    request = ([1, 2, 3, 4, 5], SamplingParams(max_new_tokens=25, ignore_eos=True))
    decoder.submit(*request)
    for _ in range(3):
        decoder.step()
    left = place

    def interrupted(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename == kangaroo.__file__ and event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return interrupted

    sys.settrace(interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            decoder.step()
    finally:
        sys.settrace(None)
    ids: list[int] = []
    while decoder.busy:
        for event in decoder.step():
            ids += event.tokens
    right = plainly(backbone, [request])[0].ids
    assert ids == right[len(right) - len(ids) :]
    fresh = drafter_of(backbone, module, 12)
    ours, theirs = drafts_of(drafter), drafts_of(fresh)
    finish(decoder, [request])
    finish(decoder_of(backbone, fresh), [request])
    assert [draft.tokens for draft in ours] == [draft.tokens for draft in theirs]


def test_what_was_drafted_is_what_verification_would_compute() -> None:
    """Streams and lower keys of the nodes that ran are those of a fresh pass over their path, bit for bit."""
    backbone = backbone_of(BF16)
    drafter = drafter_of(backbone, random_adapter(backbone, exit=2), 24)
    drafter._min_gain = 0.0  # whether a level pays is not the question
    for before, draft in texts_and_drafts(backbone, drafter, 4):
        resume = draft.resume
        assert resume is not None
        assert resume.layer == 2
        assert 1 < resume.ran[0] < len(draft.trees[0])
        for node in range(resume.ran[0]):
            path = [draft.tokens[0][each] for each in draft.trees[0].path(node)]
            assert same(resume.hidden_Rd[node], shallow(backbone, before + path[1:], 2)[-1])


def test_the_adapter_has_read_what_is_committed() -> None:
    """Its keys are those of one pass over all states; in between, it lags behind by what was committed last."""
    backbone = backbone_of()
    module = random_adapter(backbone)
    drafter = drafter_of(backbone, module, 8)
    decoder = decoder_of(backbone, drafter, max_rows=2)
    for prompt in ([1, 2, 3, 4, 5, 6], [9, 8, 7]):
        decoder.submit(prompt, SamplingParams(max_new_tokens=40, ignore_eos=True))
    for _ in range(6):
        decoder.step()
        for row in decoder._rows:
            n, own = decoder.cache.lengths[row.slot], drafter._own.lengths[row.slot]
            assert drafter._known(row.slot) == n
            twin = drafter._adapter.new_cache(1, n)
            states = shallow(backbone, row.tokens[:n], 1)
            drafter._adapter.run_layers(states, Nodes.chains([0], [0], [n]), twin, skip=bytes([SKIP_MLP]))
            twin.commit([0], [range(n)])
            twin.rollback(0, own)
            for ours, theirs in zip(drafter._own.read(row.slot), twin.read(0), strict=True):
                assert same(ours, theirs)


@pytest.mark.parametrize(("threshold", "drafted"), [(0.0, 5), (1.0, 1)])
def test_a_chain_ends_where_the_adapter_is_unsure(threshold: float, drafted: int) -> None:
    backbone = backbone_of()
    drafter = drafter_of(backbone, random_adapter(backbone), chain=True, steps=5, threshold=threshold)
    seen = drafts_of(drafter)
    request = ([1, 2, 3, 4], SamplingParams(max_new_tokens=12, ignore_eos=True))
    finish(decoder_of(backbone, drafter), [request])
    assert len(seen[0].tokens[0]) - 1 == drafted
    for draft in seen:
        (given,) = draft.probabilities or []
        assert all(p >= threshold for p in given[1:-1])  # the one behind which it ends is kept


def sure_backbone(dtype: torch.dtype = FP32) -> Backbone:
    """Its last layer adds nothing: who leaves before it knows what it will say."""
    model = Model(LLAMA)
    weights = model.weights()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.2.{name}.weight"].zero_()
    return build(model.config, weights, dtype=dtype)


def test_an_adapter_that_knows_is_accepted_whole_and_one_that_errs_never() -> None:
    backbone = sure_backbone()
    knows = random_adapter(backbone, 0.0, exit=2, draft_vocab=0)
    request = ([1, 2, 3, 4], SamplingParams(max_new_tokens=30, ignore_eos=True))
    truth = plainly(backbone, [request])
    for chained in (True, False):
        drafter = drafter_of(backbone, knows, 24, chain=chained, steps=4, threshold=0.0)
        drafter._min_gain = 0.0
        (out,) = finish(decoder_of(backbone, drafter), [request])
        assert out.ids == truth[0].ids
        assert all(kept == offered for offered, kept in out.statistics.by_depth)
        assert out.statistics.acceptance_length == (5.0 if chained else 1.0 + len(out.statistics.by_depth))
    errs = random_adapter(backbone, 0.0, exit=2, draft_vocab=0, output="tied")
    with torch.no_grad():
        errs.head_KVd.neg_()
    drafter = drafter_of(backbone, errs, chain=True, steps=4, threshold=0.0)
    (out,) = finish(decoder_of(backbone, drafter), [request])
    assert out.ids == truth[0].ids
    assert out.statistics.accepted == 0


def test_nothing_is_drafted_that_the_budget_could_not_emit() -> None:
    backbone = backbone_of()
    for chained in (True, False):
        drafter = drafter_of(backbone, random_adapter(backbone), chain=chained, steps=6, threshold=0.0)
        seen = drafts_of(drafter)
        for budget in (1, 2, 3):
            seen.clear()
            request = ([1, 2, 3, 4], SamplingParams(max_new_tokens=budget, ignore_eos=True))
            assert_same(finish(decoder_of(backbone, drafter), [request]), plainly(backbone, [request]))
            assert seen[0].trees[0].height <= budget - 1


# -- the same request again, and interruptions ----------------------------------------------------------------------


def test_a_request_that_begins_like_an_earlier_one_is_drafted_like_a_new_one() -> None:
    backbone = backbone_of()
    module = random_adapter(backbone)
    once, again = drafter_of(backbone, module), drafter_of(backbone, module)
    decoder = decoder_of(backbone, once)
    prompt = list(range(1, 30))
    finish(decoder, [(prompt, SamplingParams(max_new_tokens=9, ignore_eos=True))])
    longer = ([*prompt[:20], 5, 6, 7], SamplingParams(max_new_tokens=9, ignore_eos=True))
    first, second = drafts_of(once), drafts_of(again)
    (ours,) = finish(decoder, [longer])
    (new,) = finish(decoder_of(backbone, again), [longer])
    assert ours.statistics.reused_tokens > 0
    assert ours.ids == new.ids
    assert [draft.tokens for draft in first] == [draft.tokens for draft in second]


def test_an_interruption_before_the_adapter_was_told_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of()
    module = random_adapter(backbone)
    drafter = drafter_of(backbone, module)
    decoder = decoder_of(backbone, drafter)
    request = ([1, 2, 3, 4, 5], SamplingParams(max_new_tokens=20, ignore_eos=True))
    decoder.submit(*request)
    decoder.step()
    with monkeypatch.context() as patch:

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(drafter, "observe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoder.step()
    while decoder.busy:
        decoder.step()
    (out,) = finish(decoder, [request])
    assert out.ids == plainly(backbone, [request])[0].ids
    fresh, seen, theirs = drafter_of(backbone, module), drafts_of(drafter), []
    theirs = drafts_of(fresh)
    finish(decoder, [request])
    finish(decoder_of(backbone, fresh), [request])
    assert [draft.tokens for draft in seen] == [draft.tokens for draft in theirs]


# -- learning -------------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_is_the_early_exit() -> None:
    backbone = backbone_of()
    module = random_adapter(backbone, 0.0, draft_vocab=0)
    tokens = [1, 2, 3, 4, 5]
    states = backbone.norm(shallow(backbone, tokens, 1))
    wanted = backbone.logits(states)[-1].log_softmax(-1)
    assert torch.allclose(log_probs_after(backbone, module, tokens), wanted, atol=1e-3)


def test_the_adapter_is_of_the_size_that_the_paper_counts() -> None:
    """4 d² + 2 d where every head has its own key and value head (§4.1)."""
    backbone = backbone_of(num_key_value_heads=4)
    module = random_adapter(backbone)
    assert sum(p.numel() for p in module.parameters()) == 4 * WIDTH**2 + 2 * WIDTH
    assert drafter_of(backbone, module).parameters == 4 * WIDTH**2 + 2 * WIDTH


def test_the_loss_of_one_who_says_what_the_backbone_says_is_its_entropy() -> None:
    backbone = sure_backbone()
    module = random_adapter(backbone, 0.0, exit=2, draft_vocab=0)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    streams = shallow(backbone, tokens, 2)
    p = backbone.logits(backbone.norm(streams)).softmax(-1)
    batch = text_batch([tokens], {2: streams[None]})
    batch = replace(batch, teacher_ids_BTm=torch.arange(VOCAB).expand(1, 8, VOCAB), teacher_p_BTm=p[None])
    loss = module.losses(batch)["head 1"].detach()
    entropy = -(p * p.log()).sum(-1)[:-1].mean()  # nothing follows the last
    assert float(loss) == pytest.approx(float(entropy), rel=5e-3)


def test_gradients_reach_the_adapter_and_nothing_else() -> None:
    backbone = backbone_of()
    module = random_adapter(backbone)
    tokens = torch.randint(0, VOCAB, (2, 12)).tolist()
    batch = text_batch(tokens, {1: torch.randn(2, 12, WIDTH)})
    torch.stack(list(module.losses(batch).values())).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert module.head_Vd.grad is None


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [({}, {}), ({"mlp": True}, {"mlp": True}), ({"output": "tied"}, {"output": "tied"}), ({}, {"mlp": True})],
    ids=str,
)
def test_it_may_begin_with_another_of_its_kind(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """An MLP that the other lacks says nothing before it has learnt."""
    backbone, tokens = backbone_of(), [1, 2, 3, 4, 5]
    other = random_adapter(backbone, draft_vocab=0, **theirs)
    tensors, arch = other.checkpoint()
    module = random_adapter(backbone, 0.0, seed=1, draft_vocab=0, **ours)
    before = log_probs_after(backbone, module, tokens)
    module.start(arch, tensors)
    made, _ = module.checkpoint()
    assert all(torch.equal(made[name], tensors[name]) for name in tensors)
    wanted, found = (log_probs_after(backbone, each, tokens) for each in (other, module))
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.05)  # a checkpoint is rounded
    assert (before - wanted).abs().max() > 0.3


def test_of_a_smaller_vocabulary_it_keeps_the_outputs_and_adds_the_models() -> None:
    backbone = backbone_of()
    tensors, arch = random_adapter(backbone, draft_vocab=20, output="tied").checkpoint()
    module = random_adapter(backbone, 0.0, draft_vocab=40, output="tied")
    fresh = module.checkpoint()[0]
    module.start(arch, tensors)
    made, few = module.checkpoint()[0], tensors["vocabulary"].tolist()
    known = torch.tensor([token in few for token in made["vocabulary"].tolist()])
    assert known.sum() == 20
    theirs = [few.index(token) for token in made["vocabulary"][known].tolist()]
    assert torch.equal(made["head"][:, known], tensors["head"][:, theirs])
    assert torch.equal(made["head"][:, ~known], fresh["head"][:, ~known])
    assert not torch.equal(made["head"][:, known], fresh["head"][:, known])


@pytest.mark.parametrize(
    ("theirs", "ours", "sentence"),
    [
        ({"exit": 2}, {}, r"^It reads the model after layer 2, not after layer 1; train with `exit=2`\.$"),
        ({"mlp": True}, {"mlp": False}, r"^It has an MLP, which this adapter would lack; train with `mlp=True`\.$"),
    ],
)
def test_another_of_other_parts_is_no_beginning(theirs: dict[str, Any], ours: dict[str, Any], sentence: str) -> None:
    backbone = backbone_of()
    tensors, arch = random_adapter(backbone, **theirs).checkpoint()
    module = random_adapter(backbone, **ours)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(UsageError, match=sentence):
        module.start(arch, tensors)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# -- what cannot be -------------------------------------------------------------------------------------------------


def saved(backbone: Backbone, folder: Path, **options: Any) -> Path:
    tensors, arch = random_adapter(backbone, **options).checkpoint()
    Checkpoint("kangaroo", "tiny", backbone.fingerprint, WIDTH, VOCAB, arch).save(folder, tensors)
    return folder


def test_a_checkpoint_drafts_as_before(tmp_path: Path) -> None:
    backbone = backbone_of(BF16)
    module = random_adapter(backbone)
    folder = saved(backbone, tmp_path / "drafter")
    loaded = drafters.build("kangaroo", backbone, checkpoint=str(folder), nodes=16)
    ours = drafter_of(backbone, module)
    assert isinstance(loaded, Kangaroo)
    one, other = drafts_of(loaded), drafts_of(ours)
    request = ([1, 2, 3, 4], SamplingParams(max_new_tokens=20, ignore_eos=True))
    for each in (loaded, ours):
        finish(decoder_of(backbone, each), [request])
    assert [draft.tokens for draft in one] == [draft.tokens for draft in other]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"threshold": 1.5}, "threshold is 1.5; it must lie between 0 and 1"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"steps": 64}, "steps is 64; it must lie between 0 and 63"),
        ({"nodes": 65}, "2 to 64 nodes, not 65"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    backbone = backbone_of()
    folder = saved(backbone, tmp_path / "drafter")
    with pytest.raises(UsageError, match=sentence):
        drafters.build("kangaroo", backbone, checkpoint=str(folder), **options)


@pytest.mark.parametrize("exit", [-1, 3, 30])
def test_an_exit_out_of_range_is_one_sentence(exit: int) -> None:
    with pytest.raises(UsageError, match=f"The exit is layer {exit}; this model can leave after layer 1 to 2"):
        random_adapter(backbone_of(), exit=exit)


def test_an_adapter_of_another_model_is_one_sentence(tmp_path: Path) -> None:
    folder = saved(backbone_of(), tmp_path / "drafter")
    with pytest.raises(UsageError, match="was trained for a model of width 32"):
        drafters.build("kangaroo", backbone_of(hidden_size=48), checkpoint=str(folder))
    with pytest.raises(UsageError, match="this model's shape"):
        drafters.build("kangaroo", backbone_of(num_key_value_heads=1), checkpoint=str(folder))
