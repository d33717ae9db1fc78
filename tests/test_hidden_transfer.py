"""Hidden Transfer: whatever its pseudo rows say, no answer changes; they are what the learning form says they are."""

import math
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from decoding import (
    Request,
    assert_changes_no_token,
    assert_same,
    decoder_of,
    finish,
    held_like_a_fresh_prefill,
    plainly,
    put,
    watched,
)
from hypothesis import given
from hypothesis import strategies as st
from random_backbones import BF16, FP32, KERNELS, Model, using
from test_medusa import LLAMA, VOCAB, WIDTH, backbone_of, requests
from torch import Tensor
from toy_drafters import Checker
from trainables import trainable

from foretell import drafters
from foretell.backbone import Backbone, Nodes
from foretell.contracts import Draft, Row
from foretell.drafters.hidden_transfer import DECAY, MAX_NODES, HiddenTransfer, TransferSteps
from foretell.drafters.prompt_lookup import WithLookup
from foretell.drafting.checkpoint import Checkpoint, load
from foretell.drafting.learning.pseudo_rows import Blocks
from foretell.drafting.learning.trainable import TrainingBatch
from foretell.errors import ForetellError, UsageError
from foretell.requests import SamplingParams, Statistics
from foretell.train.data import Distilled
from foretell.train.features import ComputedFeatures
from foretell.train.replay import ReplayedRow
from foretell.train.start import inherited
from foretell.trees.calibration import calibrated


def random_steps(backbone: Backbone, noise: float = 0.15, seed: int = 0, **options: Any) -> TransferSteps:
    counts = torch.arange(VOCAB).flip(0)
    torch.manual_seed(seed)
    module = trainable(HiddenTransfer, backbone, counts, **{"draft_vocab": 40, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
            parameter.copy_(parameter.bfloat16())  # what a checkpoint keeps
    return module.eval()


def drafter_of(backbone: Backbone, module: TransferSteps, nodes: int = 12, **options: Any) -> HiddenTransfer:
    tensors, arch = module.checkpoint()
    values = {nodes: [1.2 * (1 - 0.5**k) for k in range(len(arch["layers"]) + 1)]}  # 0, 0.6, 0.9, ...
    return watched(HiddenTransfer(backbone, arch, tensors, lambda rows, context, *_: nodes, values=values, **options))


KINDS: list[dict[str, Any]] = [
    {}, {"layers": (0,)}, {"layers": (2,), "steps": 1}, {"layers": (0, 1, 2)}, {"layers": (1, 1, 2, 2), "steps": 4},
    {"rank": 3, "draft_vocab": 0, "output": "tied"}, {"layers": (1,), "adapters": 5},
    {"layers": (0, 1, 2), "adapters": 33},
]  # fmt: skip
"""Pseudo rows after the embedding, after the last but one layer, and after several."""


# -- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_random_projections_change_no_token(kind: dict[str, Any], dtype: torch.dtype) -> None:
    backbone = backbone_of(dtype)
    truth = plainly(backbone, requests())
    module = random_steps(backbone, **kind)
    for turn, nodes in enumerate((2, 5, 9, MAX_NODES), KINDS.index(kind) + 3 * (dtype == BF16)):
        assert_changes_no_token(backbone, drafter_of(backbone, module, nodes), requests(), truth, turn)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_keeps_the_promise(kernel: str) -> None:
    with using(kernel):
        backbone = Model(LLAMA).build(kernel, BF16)
        truth = plainly(backbone, requests())
        drafter = drafter_of(backbone, random_steps(backbone))
        assert_same(finish(decoder_of(backbone, drafter, max_rows=2), requests()), truth)


def test_states_of_real_rows_do_not_change_by_a_bit() -> None:
    """Those of every layer that a drafter can tap, as a prefill without pseudo rows computes them."""
    for kind in KINDS:
        backbone = backbone_of(BF16)
        checker = Checker(drafter_of(backbone, random_steps(backbone, **kind)), backbone)
        finish(decoder_of(backbone, checker, max_rows=2), requests())
        assert checker.checked > 100


# -- what pseudo rows are -------------------------------------------------------------------------------------------


def text_batch(backbone: Backbone, tokens: Sequence[int], module: TransferSteps, written: int = 1) -> TrainingBatch:
    talk = Distilled(0, [*tokens], [(written, len(tokens))])
    return ComputedFeatures(backbone, [talk], module.taps).batch([0])


def states_after_steps(backbone: Backbone, drafter: HiddenTransfer, steps: int) -> Iterator[tuple[list[int], Tensor]]:
    """Yields a row's tokens after each step that left something to draft from, and what it left."""
    decoder = decoder_of(backbone, drafter)
    decoder.submit([1, 2, 3, 4, 5, 6], SamplingParams(max_new_tokens=60, ignore_eos=True))
    for _ in range(steps):
        decoder.step()
        if 0 in drafter._states:
            yield list(decoder._rows[0].tokens), drafter._states[0]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.usefixtures("in_float32")
def test_pseudo_rows_of_decoding_are_those_of_training(kind: dict[str, Any], window: int) -> None:
    """At every step of a text, from whatever tree it was verified in; windows count positions in both."""
    backbone = backbone_of(FP32, **({"model_type": "mistral", "sliding_window": window} if window else {}))
    module, compared = random_steps(backbone, **kind), 0
    for nodes in (4, 12):
        for tokens, states_Sd in states_after_steps(backbone, drafter_of(backbone, module, nodes), 12):
            source = torch.tensor([len(tokens) - 2])  # the newest token is the next root
            with torch.no_grad():
                x_KPd = module.read(text_batch(backbone, tokens, module), source)
            torch.testing.assert_close(states_Sd, x_KPd[: len(states_Sd), 0], rtol=1e-3, atol=1e-3)
            compared += len(states_Sd)
    assert compared > 10


def test_lookup_beside_it_leaves_its_pseudo_rows_as_they_are() -> None:
    """Through the adapters too: each step's are those of training, after the text so far."""
    backbone = backbone_of(FP32)
    module, compared = random_steps(backbone, layers=(1,), adapters=5), 0
    decoder = decoder_of(backbone, WithLookup(drafter_of(backbone, module)))
    drafter = cast(Any, decoder.drafter).inner
    decoder.submit([1, 2, 3, 4, 5, 6], SamplingParams(max_new_tokens=60, ignore_eos=True))
    for _ in range(12):
        decoder.step()
        if 0 in drafter._states:
            tokens, states_Sd = list(decoder._rows[0].tokens), drafter._states[0]
            with torch.no_grad():
                x_KPd = module.read(text_batch(backbone, tokens, module), torch.tensor([len(tokens) - 2]))
            torch.testing.assert_close(states_Sd, x_KPd[: len(states_Sd), 0], rtol=1e-3, atol=1e-3)
            compared += len(states_Sd)
    assert compared > 10


def test_what_is_drafted_is_what_the_levels_say() -> None:
    """Each node's token and probability, against the output matrix and the calibration by hand."""
    backbone = backbone_of()
    module, scales = random_steps(backbone), [(0.8, -0.1), (0.9, 0.2), (0.7, 0.0)]
    drafter = drafter_of(backbone, module, 12, scales=scales)
    checked = 0
    for tokens, states_Sd in states_after_steps(backbone, drafter, 10):
        row = ReplayedRow(tokens, 6, 40)
        draft = drafter.draft([row])
        (tree,), (ids,), (p,) = draft.trees, draft.tokens, cast(Any, draft.probabilities)
        log_probs_SV = (states_Sd @ module.head(0).T).log_softmax(-1)
        for node in range(1, len(tree)):
            level = tree.depths[node] - 1
            index = module.index_V[ids[node]]
            expected = calibrated(log_probs_SV[level, index].numpy(), scales[level])
            assert p[node] == pytest.approx(math.exp(expected), rel=1e-3)
            checked += 1
    assert checked > 10


def test_later_tokens_do_not_reach_a_pseudo_row() -> None:
    """A source's rows know the text up to it; those of other sources, and of later steps, do not matter to them."""
    backbone = backbone_of()
    for kind in KINDS:
        module = random_steps(backbone, **kind)
        tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
        with torch.no_grad():
            both = module.read(text_batch(backbone, tokens, module), torch.tensor([4, 7]))
            other = module.read(text_batch(backbone, [*tokens[:5], 7, 7, 7, 7, 7, 7, 7], module), torch.tensor([4]))
        torch.testing.assert_close(both[:, 0], other[:, 0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(both[:, 0], both[:, 1], atol=1e-2)


def test_isolated_steps_do_not_know_the_steps_before_them() -> None:
    backbone = backbone_of()
    module = random_steps(backbone, layers=(1,))
    batch, sources = text_batch(backbone, [3, 1, 4, 1, 5, 9, 2, 6], module), torch.tensor([4])
    changed = random_steps(backbone, layers=(1,))
    with torch.no_grad():
        changed.bias_Kd[0] += 1.0  # the first step's rows are others
        ours, theirs = module.read(batch, sources), changed.read(batch, sources)
        assert not torch.allclose(ours[1], theirs[1], atol=1e-3)
        module.isolated = changed.isolated = True
        ours, theirs = module.read(batch, sources), changed.read(batch, sources)
    assert not torch.allclose(ours[0], theirs[0], atol=1e-3)
    assert torch.equal(ours[1:], theirs[1:])


@given(st.integers(0, 1000))
def test_blocks_hold_every_source_once(seed: int) -> None:
    """Also of conversations without sources, and with more than fit into a block."""
    rng = random.Random(seed)
    tokens = rng.choice([5, 64, 200])
    every = sorted(rng.sample(range(4 * tokens), rng.randint(1, 4 * tokens)))
    blocks = Blocks.of(torch.tensor(every), tokens)
    found = (blocks.conversation_X[:, None] * tokens + blocks.position_XS)[blocks.filled_XS]
    assert found.tolist() == every
    assert (blocks.filled_XS.sum(1) > 0).all()


# -- training -------------------------------------------------------------------------------------------------------


def test_fresh_projections_are_the_identity() -> None:
    """With a full rank or a low one: the pseudo row of a source is its own stream, moved on."""
    backbone = backbone_of()
    batch = text_batch(backbone, [3, 1, 4, 1, 5, 9, 2, 6], random_steps(backbone))
    fresh = [trainable(HiddenTransfer, backbone, torch.arange(VOCAB), rank=rank) for rank in (0, 3)]
    for module in fresh:
        assert torch.equal(module.matrices(), torch.eye(WIDTH).repeat(3, 1, 1))
    with torch.no_grad():
        whole, low = (module.read(batch, torch.tensor([2, 3])) for module in fresh)
    assert torch.equal(whole, low)


@pytest.mark.parametrize(("rank", "adapters"), [(0, 0), (3, 0), (0, 3)])
def test_only_projections_and_adapters_learn_and_they_learn(rank: int, adapters: int) -> None:
    backbone, counts = backbone_of(), torch.arange(VOCAB).flip(0)
    module = trainable(HiddenTransfer, backbone, counts, draft_vocab=40, rank=rank, layers=(2,), adapters=adapters)
    names = {"down_Krd", "up_Kdr", "bias_Kd"} if rank else {"weight_Kdd", "bias_Kd"}
    names |= {"adapter_down_Lrd", "adapter_up_Ldr"} if adapters else set()
    assert {name for name, each in module.named_parameters() if each.requires_grad} == names
    generator = torch.Generator().manual_seed(0)
    talks = [Distilled(i, torch.randint(VOCAB, (30,), generator=generator).tolist(), [(5, 30)]) for i in range(4)]
    batch = ComputedFeatures(backbone, talks, module.taps).batch(range(4))
    optimizer, seen = torch.optim.Adam(module.parameters(), lr=0.02), []
    for _ in range(60):
        optimizer.zero_grad()
        terms = module.losses(batch)
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        optimizer.step()
        seen.append({name: term.item() for name, term in terms.items()})
    assert all(seen[-1][name] < 0.95 * seen[0][name] for name in seen[0])
    assert list(seen[0]) == ["head 1", "head 2", "head 3"]


@pytest.mark.usefixtures("in_float32")
def test_gradients_are_those_of_finite_differences() -> None:
    """Through frozen layers, attention to earlier steps, and both forms of the projection."""
    backbone = backbone_of()
    for kind in ({"layers": (1,)}, {"layers": (1, 2, 2), "rank": 3}, {"layers": (0, 1, 2), "adapters": 3}):
        module = random_steps(backbone, **kind)
        batch = text_batch(backbone, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], module, written=3)
        total = lambda module=module, batch=batch: torch.stack(list(module.losses(batch).values())).sum()  # noqa: E731
        total().backward()
        generator = torch.Generator().manual_seed(1)
        for parameter in module.parameters():
            direction = torch.randn(parameter.shape, generator=generator)
            assert parameter.grad is not None
            slope = float((parameter.grad * direction).sum())
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.add_(direction, alpha=sign * 1e-3)
                    ends.append(weighed_total(module, batch))
                    parameter.add_(direction, alpha=-sign * 1e-3)
            assert slope == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=0.05, abs=2e-3)


def weighed_total(module: TransferSteps, batch: TrainingBatch) -> float:
    """The loss whose gradient is taken: each step's mean with its weight."""
    return sum(DECAY ** (k + 1) * term.item() for k, term in enumerate(module.losses(batch).values()))


# -- rows of a step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lookup", [False, True])
def test_a_step_runs_no_more_rows_than_it_may(monkeypatch: pytest.MonkeyPatch, lookup: bool) -> None:
    """And each emits from one token to one more than there are steps, unless lookup adds to the tree."""
    backbone, sizes = backbone_of(), list[int]()
    module = random_steps(backbone, layers=(1,))
    ran = backbone.run_layers

    def counted(hidden: Tensor, nodes: Nodes, *rest: Any, **options: Any) -> Any:
        sizes.append(len(nodes))
        return ran(hidden, nodes, *rest, **options)

    for nodes in (2, 5, 12):
        transfer = drafter_of(backbone, module, nodes)
        decoder = decoder_of(backbone, WithLookup(transfer, nodes=nodes) if lookup else transfer)
        decoder.submit([1, 2, 3, 4] * 5, SamplingParams(max_new_tokens=40, ignore_eos=True))
        decoder.step()
        found = Statistics()
        monkeypatch.setattr(backbone, "run_layers", counted)
        sizes.clear()
        while decoder.busy:
            for event in decoder.step():
                assert 1 <= len(event.tokens) <= (nodes if lookup else 4)
                found = event.statistics or found
        monkeypatch.undo()
        assert max(sizes) <= nodes
        assert 0 < found.inserted <= nodes * found.steps - found.drafted - found.steps
        assert max(sizes) == nodes or nodes == 5  # the root alone with three levels may be worth more than a guess


def test_a_batch_drafts_what_each_of_its_rows_drafts_alone() -> None:
    """No row drafts from the pseudo rows of another; exactness would not notice."""
    backbone = backbone_of()
    module = random_steps(backbone, layers=(0, 1, 2), adapters=5)

    def drafted(together: Sequence[Request]) -> list[list[tuple[int, list[int]]]]:
        """Of each request its trees: the length of the text, and the tokens."""
        drafter, found = drafter_of(backbone, module, 9), dict[int, list[tuple[int, list[int]]]]()
        draft = drafter.draft

        def noted(rows: Sequence[Row]) -> Draft:
            result = draft(rows)
            for row, tokens in zip(rows, result.tokens, strict=True):
                found.setdefault(row.tokens[0], []).append((len(row.tokens), tokens))
            return result

        put(drafter, "draft", noted)
        finish(decoder_of(backbone, drafter, max_rows=3), together)
        return [found[prompt[0]] for prompt, _ in together]

    texts = [([i, 7 + i, 5, 4, 3][: 3 + i % 3], SamplingParams(max_new_tokens=12 + 3 * i)) for i in range(5)]
    alone = [drafted([text])[0] for text in texts]
    assert drafted(texts) == alone
    assert sum(len(tokens) > 1 for trees in alone for _, tokens in trees) > 20


def test_without_pseudo_rows_it_is_plain_decoding() -> None:
    """It never drafts, and leaves the cache that plain decoding leaves."""
    backbone = backbone_of()
    drafter = drafter_of(backbone, random_steps(backbone))
    put(drafter, "at_cut", lambda layer, hidden_Md, nodes, draft: drafter._place(nodes, draft))
    decoder = decoder_of(backbone, drafter)
    outputs = finish(decoder, requests())
    assert_same(outputs, plainly(backbone, requests()))
    assert sum(output.statistics.drafted for output in outputs) == 0
    assert held_like_a_fresh_prefill(decoder) > 0


def test_plain_steps_insert_nothing() -> None:
    """A governor that holds speculation back pays for no pseudo rows; the next draft starts from none."""
    backbone = backbone_of()
    drafter = drafter_of(backbone, random_steps(backbone, layers=(1,)))
    decoder = decoder_of(backbone, drafter)
    decoder.submit([1, 2, 3, 4], SamplingParams(max_new_tokens=30, ignore_eos=True))
    decoder.step()
    decoder.step()
    assert drafter._states
    put(decoder.governor, "speculate", lambda rows: False)
    decoder.step()
    assert not drafter._states
    put(decoder.governor, "speculate", lambda rows: True)
    decoder.step()
    assert len(drafter._states[0]) == 3


def test_pseudo_rows_that_overflow_harm_nobody() -> None:
    """The step is run again without them, as one with wrong guesses that overflow is."""
    backbone = backbone_of()
    module = random_steps(backbone, layers=(1,))
    with torch.no_grad():
        module.bias_Kd.fill_(float("inf"))
    drafter = drafter_of(backbone, module)
    decoder = decoder_of(backbone, drafter, max_rows=2)
    assert_same(finish(decoder, requests()), plainly(backbone, requests()))
    assert held_like_a_fresh_prefill(decoder) > 0


def test_the_governor_knows_what_pseudo_rows_cost() -> None:
    """The first step verifies no guess, but is not a plain one."""
    backbone = backbone_of()
    drafter, seen = drafter_of(backbone, random_steps(backbone, layers=(2,))), list[float]()
    decoder = decoder_of(backbone, drafter)
    put(decoder.governor, "record", lambda rows, guesses, seconds, tokens: seen.append(guesses))
    decoder.submit([1, 2, 3, 4], SamplingParams(max_new_tokens=8, ignore_eos=True))
    decoder.step()
    assert seen == [3 * (backbone.config.layers - 2) / backbone.config.layers]


# -- bad input ------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    backbone = backbone_of()
    most = backbone.config.layers - 1
    for options, sentence in (
        ({"layers": (9,)}, f"Pseudo rows begin after layers 9, 9, 9; name layers from 0 to {most}, ascending."),
        ({"layers": (-1,)}, f"Pseudo rows begin after layers -1, -1, -1; name layers from 0 to {most}, ascending."),
        ({"layers": (2, 1, 3)}, f"Pseudo rows begin after layers 2, 1, 3; name layers from 0 to {most}, ascending."),
        ({"layers": (1, 2)}, "layers names 2 layers for 3 steps; name one, or 3 of them."),
        ({"steps": 0}, "steps is 0; it must lie between 1 and 8."),
    ):
        with pytest.raises(UsageError, match=re.escape(sentence)):
            trainable(HiddenTransfer, backbone, torch.arange(VOCAB), **options)


def saved(backbone: Backbone, module: TransferSteps, folder: Path, **changes: Any) -> str:
    tensors, arch = module.checkpoint()
    about: dict[str, Any] = {
        "method": "hidden_transfer", "backbone": "tiny", "fingerprint": "tiny", "hidden": WIDTH, "vocab": VOCAB,
        "arch": arch, "fitted": {"values": {8: [0.0, 0.5, 0.7, 0.8]}},
    }  # fmt: skip
    Checkpoint(**about | changes).save(folder, tensors)
    return str(folder)


def test_a_checkpoint_is_read_back(tmp_path: Path) -> None:
    backbone = backbone_of(BF16)
    for number, (rank, adapters, output) in enumerate(((0, 0, "shared"), (3, 0, "tied"), (0, 4, "shared"))):
        options = {"rank": rank, "adapters": adapters, "output": output}
        module = random_steps(backbone, **options)
        folder = saved(backbone, module, tmp_path / str(number))
        drafter = drafters.build("hidden_transfer", backbone, checkpoint=folder, nodes=8)
        assert_same(finish(decoder_of(backbone, drafter), requests()), plainly(backbone, requests()))
        again = trainable(HiddenTransfer, backbone, torch.arange(VOCAB).flip(0), draft_vocab=40, **options)
        tensors, arch = module.checkpoint()
        again.start(arch, tensors)
        assert torch.equal(again.matrices(), module.matrices())
        assert same_tensors(again.checkpoint()[0], tensors)


def test_a_start_gives_its_own_steps(tmp_path: Path) -> None:
    """What is not said of a training is as the checkpoint that it starts with has it."""
    backbone = backbone_of(BF16)
    module = random_steps(backbone, layers=(1, 2), steps=2, adapters=4, output="tied")
    options = inherited(HiddenTransfer, *load(Path(saved(backbone, module, tmp_path))))
    again = trainable(HiddenTransfer, backbone, torch.arange(VOCAB).flip(0), **options)
    tensors, arch = module.checkpoint()
    again.start(arch, tensors)
    assert again.checkpoint()[1] == arch
    assert same_tensors(again.checkpoint()[0], tensors)


def same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


ARCH = {"heads": 3, "layers": [1, 1, 1], "rank": 0, "adapters": 0, "output": "shared"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fitted": {}}, "is damaged (at 'values')"),
        ({"fitted": {"values": {8: [0.0, 1.0]}}}, "is damaged (at values)"),
        ({"fitted": {"values": {"eight": [0.0, 1.0, 2.0, 3.0]}}}, "is damaged"),
        ({"arch": ARCH | {"heads": 2, "layers": [1, 1]}}, "is damaged (at 'weight')"),
        ({"arch": ARCH | {"rank": 5}}, "is damaged (at 'down')"),
        ({"arch": ARCH | {"adapters": 5}}, "is damaged (at 'adapter_down')"),
        ({"arch": ARCH | {"output": "tied"}}, "is damaged (at 'head')"),
        ({"arch": ARCH | {"layers": [1, 1, 99]}}, "Pseudo rows begin after layers 1, 1, 99"),
        ({"hidden": WIDTH + 1}, "was trained for a model of width"),
        ({"fingerprint": "other"}, "was trained for tiny (fingerprint other), not for this model"),
        ({"method": "medusa"}, "holds a medusa drafter, not hidden_transfer"),
        ({"calibration": [[1.0, 0.0]]}, "The drafter is calibrated for 1 heads, but has 3"),
    ],
    ids=str,
)
def test_damage_is_one_sentence(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    backbone = backbone_of(BF16)
    folder = saved(backbone, random_steps(backbone), tmp_path / "made", **changes)
    with pytest.raises(ForetellError, match=re.escape(sentence)):
        drafters.build("hidden_transfer", backbone, checkpoint=folder, nodes=8)


def test_more_rows_than_trees_have_are_refused(tmp_path: Path) -> None:
    backbone = backbone_of(BF16)
    folder = saved(backbone, random_steps(backbone), tmp_path / "made")
    with pytest.raises(UsageError, match=f"Its trees have 2 to {MAX_NODES} nodes, not 99"):
        drafters.build("hidden_transfer", backbone, checkpoint=folder, nodes=99)


def test_a_start_of_another_shape_is_refused() -> None:
    backbone = backbone_of()
    tensors, arch = random_steps(backbone, layers=(1,)).checkpoint()
    with pytest.raises(UsageError, match=r"^It is made with other options; train with `layers=1,1,1`, `steps=3`"):
        random_steps(backbone, layers=(2,)).start(arch, tensors)
