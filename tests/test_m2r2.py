"""M2R2: whatever the fast stream says, no answer changes; without adapters it is the slow stream, bit for bit."""

import math
import re
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
    put,
    texts_and_drafts,
    watched,
)
from random_backbones import BF16, COMPILED, FP32, KERNELS, Batch, Model, run, same, using
from test_medusa import LLAMA, VOCAB, WIDTH, backbone_of, requests
from torch import Tensor
from trainables import trainable

from foretell import drafters
from foretell.backbone import Backbone, KVCache, Nodes
from foretell.backbone.cpu.backbone import CompiledBackbone
from foretell.drafters.m2r2 import M2R2, FastStream
from foretell.drafting.checkpoint import Checkpoint
from foretell.drafting.learning.trainable import TrainingBatch
from foretell.drafting.lower_layers import MAX_TREE_NODES
from foretell.errors import ForetellError, UsageError
from foretell.requests import SamplingParams
from foretell.train.data import ConversationStore, Distilled
from foretell.train.features import ComputedFeatures
from foretell.train.forward import Forward
from foretell.train.recipe import features_of
from foretell.trees import TokenTree, chain
from foretell.trees.calibration import calibrated
from foretell.verify import Typical


def random_stream(backbone: Backbone, noise: float = 0.15, seed: int = 0, **options: Any) -> FastStream:
    counts = torch.arange(VOCAB).flip(0)
    torch.manual_seed(seed)
    module = trainable(M2R2, backbone, counts, **{"draft_vocab": 40, "exit": 1, "rank": 4, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
            parameter.copy_(parameter.bfloat16())  # what a checkpoint keeps
    return module.eval()


def drafter_of(backbone: Backbone, module: FastStream, nodes: int = 16, **options: Any) -> M2R2:
    tensors, arch = module.checkpoint()
    return watched(M2R2(backbone, arch, tensors, lambda rows, context, *_: nodes, **options))


# -- exactness ------------------------------------------------------------------------------------------------------


KINDS: list[dict[str, Any]] = [{}, {"exit": 2, "rank": 9}, {"output": "tied", "draft_vocab": 0}]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("chained", [True, False], ids=["chain", "tree"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_random_adapters_change_no_token(kind: dict[str, Any], chained: bool, dtype: torch.dtype) -> None:
    """At every exit, any number of steps and any threshold."""
    backbone, seed = backbone_of(dtype), KINDS.index(kind)
    truth = plainly(backbone, requests())
    module = random_stream(backbone, seed=seed, **kind)
    for turn, (steps, threshold) in enumerate(STEPS_AND_THRESHOLDS, seed + 2 * chained + (dtype == BF16)):
        drafter = drafter_of(backbone, module, 4 + 5 * seed, chain=chained, steps=steps, threshold=threshold)
        assert_changes_no_token(backbone, drafter, requests(), truth, turn)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_keeps_the_promise(kernel: str) -> None:
    with using(kernel):
        backbone = Model(LLAMA).build(kernel, BF16)
        truth = plainly(backbone, requests())
        drafter = drafter_of(backbone, random_stream(backbone, exit=2))
        assert_same(finish(decoder_of(backbone, drafter, max_rows=2), requests()), truth)


# -- the two streams ------------------------------------------------------------------------------------------------


TREES = [chain(3), TokenTree((-1, 0, 0, 1, 1, 2)), chain(0)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_shadows_of_the_same_stream_are_their_nodes_bit_for_bit(kernel: str, dtype: torch.dtype) -> None:
    """At every layer, in batches of trees of which some nodes ran before; and they leave no trace in the cache."""
    with using(kernel):
        backbone, batch = Model(LLAMA).build(kernel, dtype), Batch(TREES, [5, 40, 0], [2, 0, 1])
        caches, first = [batch.prefill(backbone) for _ in range(2)], [2, 0, 0]
        _, guesses = batch.tokens(VOCAB)
        for cache in caches:  # the first nodes of one tree, as an earlier level ran them
            run(backbone, guesses[0][:2], Nodes([chain(1)], [2], [5]), cache)
        embedded = backbone.embed(torch.cat([ids[start:] for ids, start in zip(guesses, first, strict=True)]))
        plain, both = (Nodes(TREES, batch.slots, batch.lengths, first, shadows=each) for each in (False, True))
        slow, fast = (torch.from_numpy((both.shadow == which).nonzero()[0]) for which in (0, 1))
        doubled = torch.empty(len(both), WIDTH)
        doubled[slow] = doubled[fast] = embedded
        alone, taps = backbone.run_layers(embedded, plain, caches[0], taps=[1, 2])
        together, tapped = backbone.run_layers(doubled, both, caches[1], taps=[1, 2])
        for ours, truth in ((together, alone), *((tapped[tap], taps[tap]) for tap in taps)):
            assert same(ours[slow], truth)
            assert same(ours[fast], truth)
        assert_written_alike(caches, both)
        doubled[fast] = -embedded  # another stream reads the nodes' keys and values, and changes neither
        again, _ = backbone.run_layers(doubled, both, caches[1])
        assert same(again[slow], alone)
        assert not torch.allclose(again[fast], alone, atol=1e-2)
        assert_written_alike(caches, both)


def assert_written_alike(caches: list[KVCache], nodes: Nodes) -> None:
    """Every slot up to the last node's."""
    for row, end in zip(nodes.rows, nodes.ends, strict=True):
        for one, other in zip(caches[0].room(row), caches[1].room(row), strict=True):
            assert same(one[:, :, :end], other[:, :, :end])


def test_rows_cannot_be_inserted_behind_shadows() -> None:
    """Which of its two rows an inserted one would follow is not said."""
    with pytest.raises(ValueError, match=r"^Nodes with shadows cannot be extended\.$"):
        Nodes([chain(1)], [0], [5], shadows=True).extended([[1]])


def test_a_stream_without_adapters_is_the_slow_one() -> None:
    """In decoding bit for bit, and in training."""
    backbone = backbone_of()
    module = random_stream(backbone, exit=2)
    with torch.no_grad():
        module.up_Edr.zero_()
    drafter, seen = drafter_of(backbone, module), list[bool]()
    drafter._one_call, run = None, drafter._run  # level by level

    def compared(embedded_Fd: Tensor, nodes: Nodes, layers: int) -> Tensor:
        slow_Fd = run(embedded_Fd, nodes, layers)
        assert drafter._fast_Fd is not None
        seen.append(same(slow_Fd, drafter._fast_Fd))
        return slow_Fd

    put(drafter, "_run", compared)
    finish(decoder_of(backbone, drafter, max_rows=2), requests())
    assert len(seen) > 10
    assert all(seen)
    batch = text_batch(backbone, [3, 1, 4, 1, 5, 9, 2, 6], module)
    with torch.no_grad():
        streams = module.streams(batch.states[0].float())
        slow = batch.states[0].float().clone()
        for index, fast in enumerate(streams):
            module.frozen.run_layer(index, slow, *module.frozen.angles(slow.shape[1]))
            torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def text_batch(backbone: Backbone, tokens: list[int], module: FastStream, written: int = 1) -> TrainingBatch:
    talk = Distilled(0, [*tokens], [(written, len(tokens))])
    return ComputedFeatures(backbone, [talk], module.taps).batch([0])


def log_probs_after(backbone: Backbone, module: FastStream, tokens: list[int]) -> Tensor:
    """Log-probabilities [V] that the learning form gives after a text."""
    batch = text_batch(backbone, tokens, module)
    with torch.no_grad():
        x_Pd = module.read(batch, torch.tensor([len(tokens) - 1]))[0]
        return (x_Pd @ module.head(0).T).log_softmax(-1)[0]


@pytest.mark.parametrize("chained", [True, False], ids=["chain", "tree"])
@pytest.mark.parametrize("options", [{}, {"exit": 2}, {"output": "tied"}], ids=str)
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.usefixtures("in_float32")
def test_what_is_drafted_is_what_the_learning_form_says(options: dict[str, Any], chained: bool, window: int) -> None:
    """Each node's token and probability, after the text of its path."""
    backbone = backbone_of(FP32, **({"model_type": "mistral", "sliding_window": window} if window else {}))
    module, scale = random_stream(backbone, **options), (0.8, -0.1)
    drafter = drafter_of(backbone, module, 12, chain=chained, scales=[scale])
    checked = 0
    for text, draft in texts_and_drafts(backbone, drafter, 6):
        (tree,), (ids,), probabilities = draft.trees, draft.tokens, draft.probabilities
        assert probabilities is not None
        for node in range(1, len(tree)):
            path = [ids[each] for each in tree.path(tree.parents[node])]
            log_probs_V = log_probs_after(backbone, module, [*text[:-1], *path])
            given = float(log_probs_V[module.index_V[ids[node]]])
            expected = given if chained else float(calibrated(torch.tensor(given).numpy(), scale))
            assert probabilities[0][node] == pytest.approx(math.exp(expected), rel=2e-3)
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("chained", [True, False], ids=["chain", "tree"])
def test_what_is_drafted_in_one_call_is_what_is_drafted_level_by_level(
    kernel: str, dtype: torch.dtype, chained: bool
) -> None:
    """The slow twin of the kernels' growth: trees, and the slow streams bit for bit; libraries' exponentials differ."""
    with using(kernel):
        backbone = backbone_of(dtype)
    for seed, options in enumerate(({}, {"exit": 2, "rank": 9}, {"output": "tied"})):
        module, found = random_stream(backbone, seed=seed, **options), []
        for slow in (False, True):
            drafter = drafter_of(
                backbone, module, 6 + 6 * seed, chain=chained, steps=4, threshold=0.02, scales=[(0.9, 0.2)]
            )
            drafter._min_gain = 0.05
            if slow:
                drafter._one_call = None
            assert (drafter._one_call is None) == slow
            seen = drafts_of(drafter)
            found.append((seen, finish(decoder_of(backbone, drafter, max_rows=3), requests(3))))
        (fast, outputs), (slowly, others) = found
        assert_same(outputs, others)
        for one, other in zip(fast, slowly, strict=True):
            assert (one.trees, one.tokens) == (other.trees, other.tokens)
            pairs = zip(one.probabilities or [], other.probabilities or [], strict=True)
            assert all(ours == pytest.approx(theirs, rel=1e-4 if dtype == FP32 else 2e-2) for ours, theirs in pairs)
            assert (one.resume is None) == (other.resume is None)
            if one.resume and other.resume:
                assert (one.resume.layer, one.resume.ran) == (other.resume.layer, other.resume.ran)
                assert same(one.resume.hidden_Rd.contiguous(), other.resume.hidden_Rd)


def test_guesses_of_the_last_layer_are_always_right() -> None:
    """If the layers above the exit add nothing, the slow stream is the model's own, and so is the fast one."""
    backbone = backbone_of()
    module = random_stream(backbone, exit=2, draft_vocab=0)
    with torch.no_grad():
        module.up_Edr.zero_()
    original = backbone.run_layers

    def without_last(
        hidden: Tensor, nodes: Nodes, cache: Any, begin: int = 0, end: int | None = None, **rest: Any
    ) -> Any:
        last = backbone.config.layers
        end = last if end is None else end
        skip = bytes([0] * (last - 1) + [3])
        return original(hidden, nodes, cache, begin, end, skip=skip, **rest)

    put(backbone, "run_layers", without_last)
    chained = drafter_of(backbone, module, chain=True, steps=3)
    chained._one_call = None
    for output in finish(decoder_of(backbone, chained), requests())[::2]:  # the greedy ones
        assert output.statistics.accepted > 8
        assert output.statistics.accepted >= output.statistics.drafted - 3  # the last may lie past the end


# -- leaving at the exit, which is lossy ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.usefixtures("in_float32")
def test_where_every_guess_is_trusted_the_fast_stream_writes_the_text(rows: int) -> None:
    """Each accepted token is the learning form's best after the text before it; each other token is the model's."""
    backbone = backbone_of()
    module = random_stream(backbone, exit=2, draft_vocab=0)
    decoder = decoder_of(backbone, drafter_of(backbone, module, chain=True, steps=3, trust=0.0), max_rows=rows)
    assert not decoder.lossless
    asked = [(ids, params) for ids, params in requests() if not params.temperature]
    for (ids, _), output in zip(asked, finish(decoder, asked), strict=True):
        assert not output.statistics.exact
        assert sum(output.drafted) >= 0.7 * len(output.ids)  # three of four, but for the first and the last step
        text = [*ids]
        for token, drafted in zip(output.ids, output.drafted, strict=True):
            if drafted:
                assert token == module.vocabulary_V[log_probs_after(backbone, module, text).argmax()]
            else:
                (alone,) = plainly(backbone, [(text, SamplingParams(max_new_tokens=1, temperature=0.0))])
                assert token == alone.ids[0]
            text.append(token)


@pytest.mark.parametrize("chained", [True, False], ids=["chain", "tree"])
def test_what_is_not_trusted_is_verified(chained: bool) -> None:
    """Above 1 nothing is trusted, and rows that draw their tokens or edit logits never leave early."""
    backbone, asked = backbone_of(), requests()
    asked += [(asked[2][0], SamplingParams(max_new_tokens=20, **each)) for each in ({}, {"repetition_penalty": 1.3})]
    truth = plainly(backbone, asked)
    leave = {number for number, (_, params) in enumerate(asked) if params.plain_greedy}
    assert leave == {0, 2, 4, 5}
    for trust in (0.0, 1.0):
        module = random_stream(backbone, exit=2)
        decoder = decoder_of(backbone, drafter_of(backbone, module, chain=chained, trust=trust), max_rows=3)
        outputs = finish(decoder, asked)
        assert held_like_a_fresh_prefill(decoder) > 0
        for number, (ours, right) in enumerate(zip(outputs, truth, strict=True)):
            if trust == 1 or number not in leave:
                assert_same([ours], [right])
            else:
                assert ours.ids != right.ids


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [0.0, 0.5])
def test_only_adapters_learn_and_they_learn(alignment: float) -> None:
    backbone = backbone_of()
    options = {"draft_vocab": 40, "exit": 2, "rank": 8, "alignment": alignment}
    module = trainable(M2R2, backbone, torch.arange(VOCAB).flip(0), **options)
    assert {name for name, each in module.named_parameters() if each.requires_grad} == {"down_Erd", "up_Edr"}
    generator = torch.Generator().manual_seed(0)
    talks = [Distilled(i, torch.randint(VOCAB, (30,), generator=generator).tolist(), [(5, 30)]) for i in range(4)]
    batch = ComputedFeatures(backbone, talks, module.taps).batch(range(4))
    optimizer, seen = torch.optim.Adam(module.parameters(), lr=0.02), []
    for _ in range(60):
        optimizer.zero_grad()
        terms = module.losses(batch)
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        seen.append({name: term.item() for name, term in terms.items()})
    assert list(seen[0]) == (["head 1", "alignment"] if alignment else ["head 1"])
    assert all(seen[-1][name] < 0.97 * seen[0][name] for name in seen[0])


def test_the_alignment_is_to_the_layers_that_the_rate_names() -> None:
    backbone = backbone_of()  # of three layers
    module = random_stream(backbone, exit=2, alignment=1.0)
    assert module.ahead_of == [2, 3]
    assert module.taps == (0, 2, 3)
    batch = text_batch(backbone, [3, 1, 4, 1, 5, 9, 2, 6], module, written=2)
    with torch.no_grad():
        terms, streams = module.losses(batch), module.streams(batch.states[0].float())
    apart = [
        1 - torch.nn.functional.cosine_similarity(streams[i][0, 2:], batch.states[layer][0, 2:].float(), dim=-1).mean()
        for i, layer in enumerate((2, 3))
    ]
    assert float(terms["alignment"]) == pytest.approx(float(sum(apart)) / 2, rel=1e-4)


@pytest.mark.parametrize("by_decoding", [False, True])
def test_hard_targets_need_no_layers_above_the_exit(by_decoding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `soft=0` the teacher's distribution is left out; losses and gradients are those beside it."""
    monkeypatch.setattr(ComputedFeatures, "by_decoding", by_decoding)
    backbone, talks = backbone_of(), [Distilled(0, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [(2, 10)])]
    store, modules = ConversationStore(Path("data"), {}, talks), [random_stream(backbone, soft=s) for s in (0, 0, 0.5)]
    assert [module.taught for module in modules] == [False, False, True]
    alone, together = features_of(backbone, [store], modules[:1], False), features_of(backbone, [store], modules, False)
    with monkeypatch.context() as patch:
        for kind, name in ((Forward, "run_layer"), (CompiledBackbone, "logits")):
            patch.setattr(kind, name, lambda *arguments: pytest.fail("no layer is needed"))
        untaught = alone.batch([0])
    taught = together.batch([0])
    assert not untaught.teacher_p_BTm.any()
    assert taught.teacher_p_BTm.any()
    losses = [module.losses(batch)["head 1"] for module, batch in zip(modules, (untaught, taught, taught), strict=True)]
    assert losses[0].item() == losses[1].item() != losses[2].item()
    torch.stack(losses).sum().backward()
    for ours, beside, other in zip(*(module.parameters() for module in modules), strict=True):
        assert ours.grad is not None
        assert torch.equal(ours.grad, beside.grad)
        assert not torch.equal(ours.grad, other.grad)


# -- bad input ------------------------------------------------------------------------------------------------------


def saved(backbone: Backbone, module: FastStream, folder: Path, **changes: Any) -> str:
    tensors, arch = module.checkpoint()
    about: dict[str, Any] = {
        "method": "m2r2", "backbone": "tiny", "fingerprint": "tiny", "hidden": WIDTH, "vocab": VOCAB, "arch": arch,
    }  # fmt: skip
    Checkpoint(**about | changes).save(folder, tensors)
    return str(folder)


def test_a_checkpoint_is_read_back(tmp_path: Path) -> None:
    backbone = backbone_of(BF16)
    module = random_stream(backbone, exit=2, output="tied")
    drafter = drafters.build("m2r2", backbone, checkpoint=saved(backbone, module, tmp_path / "made"), nodes=8)
    seen = drafts_of(drafter)
    assert_same(finish(decoder_of(backbone, drafter), requests()), plainly(backbone, requests()))
    assert any(len(draft.trees[0]) > 1 for draft in seen)
    lossy = drafters.build("m2r2", backbone, checkpoint=str(tmp_path / "made"), trust=0.9)
    assert (drafter.lossless, drafter.trust, lossy.lossless, lossy.trust) == (True, None, False, 0.9)
    with pytest.raises(UsageError, match="trust is 2; it must lie between 0 and 1"):
        drafters.build("m2r2", backbone, checkpoint=str(tmp_path / "made"), trust=2)
    with pytest.raises(UsageError, match=f"Its trees have 2 to {MAX_TREE_NODES} nodes, not 99"):
        drafters.build("m2r2", backbone, checkpoint=str(tmp_path / "made"), nodes=99)
    with pytest.raises(UsageError, match=r"takes none of lookup's; leave it out\.$"):
        drafters.build("m2r2", backbone, checkpoint=str(tmp_path / "made"), trust=0.9, lookup=True)
    with pytest.raises(UsageError, match="^Typical acceptance verifies every guess; leave it out, or"):
        decoder_of(backbone, lossy, rule=Typical())
    again = random_stream(backbone, exit=2, output="tied", seed=1)
    tensors, arch = module.checkpoint()
    again.start(arch, tensors)
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), module.parameters(), strict=True))
    with pytest.raises(UsageError, match=r"^It is made with other options; train with `exit=2`, `rank=4`\.$"):
        random_stream(backbone).start(arch, tensors)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arch": {"exit": 2, "rank": 5, "output": "shared", "heads": 1}}, "is damaged (at 'down')"),
        ({"arch": {"exit": 9, "rank": 4, "output": "shared", "heads": 1}}, "The exit is layer 9; this model can leave"),
        ({"arch": {"rank": 4, "output": "shared"}}, "is damaged (at 'exit')"),
        ({"hidden": WIDTH + 1}, "was trained for a model of width"),
        ({"fingerprint": "other"}, "was trained for tiny (fingerprint other), not for this model"),
        ({"method": "kangaroo"}, "holds a kangaroo drafter, not m2r2"),
    ],
    ids=str,
)
def test_damage_is_one_sentence(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    backbone = backbone_of(BF16)
    folder = saved(backbone, random_stream(backbone), tmp_path / "made", **changes)
    with pytest.raises(ForetellError, match=re.escape(sentence)):
        drafters.build("m2r2", backbone, checkpoint=folder, nodes=8)


def test_an_exit_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^The exit is layer 3; this model can leave after layer 1 to 2\.$"):
        trainable(M2R2, backbone_of(), torch.arange(VOCAB), exit=3)
