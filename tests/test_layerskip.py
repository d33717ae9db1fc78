"""LayerSkip and DEL: whichever exit drafts, no answer changes; what they learn and count is what the papers say."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoding import (
    assert_changes_no_token,
    assert_same,
    decoder_of,
    drafts_of,
    finish,
    held_like_a_fresh_prefill,
    plainly,
    put,
    watched,
)
from random_backbones import BF16, COMPILED, FP32, same, using
from test_kangaroo import shallow, sure_backbone
from test_medusa import VOCAB, WIDTH, backbone_of, requests
from test_medusa2 import DATA, batch_of, save_tiny
from torch import Tensor
from trainables import trainable

from foretell import drafters
from foretell.backbone import Backbone
from foretell.backbone.load import assemble
from foretell.contracts import FINAL_NORM
from foretell.drafters.dynamic_exit import DEL, ExitStatistics, tokens_per_layer
from foretell.drafters.layerskip import EarlyExitTraining, LayerSkip, drop_rates, exit_scales
from foretell.drafters.prompt_lookup import WithLookup
from foretell.drafting.checkpoint import Checkpoint
from foretell.drafting.threshold import Threshold, main_chain
from foretell.errors import UsageError
from foretell.requests import SamplingParams
from foretell.train.features import ComputedFeatures
from foretell.train.loop import train
from foretell.train.trainer import Settings, Trainer

LAYERS = 5
SOME = torch.arange(0, VOCAB, 2)


def deep(dtype: torch.dtype = FP32) -> Backbone:
    return backbone_of(dtype, num_hidden_layers=LAYERS)


def always(nodes: int) -> Any:
    return lambda *_: nodes


def skipping(backbone: Backbone, exit: int, nodes: int = 16, **options: Any) -> LayerSkip:
    return watched(LayerSkip(backbone, options.pop("ids_V", None), exit, always(nodes), **options))


def dynamic(backbone: Backbone, exits: tuple[int, ...] = (1, 2, 4), nodes: int = 16, **options: Any) -> DEL:
    return watched(DEL(backbone, options.pop("ids_V", None), exits, always(nodes), **{"every": 1} | options))


# -- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_no_exit_changes_a_token(dtype: torch.dtype) -> None:
    backbone = deep(dtype)
    truth = plainly(backbone, requests())
    for number, steps in enumerate((0, 1, 3, 8)):
        for exit in range(1, LAYERS):
            chain, ids_V = bool((exit + steps) % 2), SOME if exit == 2 else None
            threshold = Threshold(0.1 * exit, adaptive=exit == 3)
            drafter = skipping(backbone, exit, 5 * exit, steps=steps, chain=chain, threshold=threshold, ids_V=ids_V)
            assert_changes_no_token(backbone, drafter, requests(), truth, number + exit // 2 + (dtype == BF16))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_exits_that_move_change_no_token(dtype: torch.dtype, rows: int) -> None:
    backbone = deep(dtype)
    truth = plainly(backbone, requests())
    for chain in (True, False):
        for ids_V in (None, SOME):
            drafter = dynamic(backbone, chain=chain, ids_V=ids_V, steps=5, every=1 if ids_V is None else 3)
            each = WithLookup(drafter) if (chain == (rows == 3)) == (dtype == FP32) else drafter
            decoder = decoder_of(backbone, each, max_rows=rows)
            for _ in range(2):
                assert_same(finish(decoder, requests()), truth)
            assert held_like_a_fresh_prefill(decoder) > 0


def test_whoever_knows_is_accepted_whole() -> None:
    """The last of three layers adds nothing: the exit before it says what the model says."""
    backbone = sure_backbone()
    request = ([1, 2, 3, 4], SamplingParams(max_new_tokens=30, ignore_eos=True))
    (out,) = finish(decoder_of(backbone, skipping(backbone, 2, chain=True, steps=4)), [request])
    assert out.statistics.acceptance_length == 5.0
    (out,) = finish(decoder_of(backbone, dynamic(backbone, (2,), steps=4)), [request])
    assert out.statistics.acceptance_length == 5.0


def test_the_adaptive_threshold_follows_decoding() -> None:
    """Chains of whoever is hardly ever right end earlier and earlier; where it is fixed, nothing moves."""
    request = ([1, 2, 3, 4], SamplingParams(max_new_tokens=40, ignore_eos=True))
    sure, unsure = (skipping(sure_backbone(), 2, chain=True, steps=4, threshold=Threshold(0.5, True)),
                    skipping(deep(), 1, chain=True, steps=4, threshold=Threshold(0.0, True)))  # fmt: skip
    still = skipping(deep(), 1, chain=True, steps=4, threshold=Threshold(0.0))
    for drafter in (sure, unsure, still):
        finish(decoder_of(drafter._backbone, drafter), [request])
    assert sure.tracker.threshold.accepted > 0.9
    assert unsure.tracker.threshold.accepted < 0.9
    assert unsure.tracker.threshold.value > 0.002
    assert still.tracker.threshold.value == 0.0


@pytest.mark.parametrize("prompt", [[1], [1, 2, 3, 4]])
def test_guesses_after_the_end_of_an_answer_do_not_count(prompt: list[int]) -> None:
    """Guesses behind the end are neither right nor wrong; those before it were right."""
    backbone = sure_backbone()
    (whole,) = plainly(backbone, [(prompt, SamplingParams(max_new_tokens=20, ignore_eos=True))])
    at = next(i for i in range(2, 20) if whole.ids[i] not in whole.ids[:i])
    request = (prompt, SamplingParams(max_new_tokens=20, ignore_eos=True, stop_ids=(whole.ids[at],)))
    told = list[tuple[int, int]]()
    fixed = skipping(backbone, 2, chain=True, steps=8)
    moving = dynamic(backbone, (2,), steps=8)
    moving.statistics.decay = 1.0
    truth = plainly(backbone, [request])
    for drafter in (fixed, moving):
        decoder = decoder_of(backbone, drafter)
        if drafter is fixed:
            put(fixed.tracker.threshold, "update", lambda kept, drafted, most: told.append((kept, drafted)))
        assert_same(finish(decoder, [request]), truth)
    assert told
    assert all(kept == drafted > 0 for kept, drafted in told)
    right, wrong = moving.statistics._counts_SC22[0, 0, :, 0].tolist()
    assert (right, wrong) == (len(prompt) - 1 + len(truth[0].ids), 0)


# -- what drafting hands over ---------------------------------------------------------------------------------------


def test_streams_below_the_exit_come_back_as_a_prefill_has_them() -> None:
    """Taps below the exit are handed on by the drafter, those of the last guess by the engine, others come later."""
    backbone = deep()
    drafter = dynamic(backbone, (1, 2, 4), steps=3)
    seen: list[dict[int, Tensor]] = []
    told = drafter.observe

    def observe(rows: Any, features: Any) -> None:
        seen.append(features.taps)
        told(rows, features)

    put(drafter, "observe", observe)
    decoder = decoder_of(backbone, drafter)
    put(drafter.statistics, "choose", lambda slots: (2, [0.0]))  # layer 4
    decoder.submit([1, 2, 3, 4, 5, 6], SamplingParams(max_new_tokens=20, ignore_eos=True))
    for _ in range(4):
        decoder.step()
    tokens = decoder._rows[0].tokens
    for tap in (1, 2, 4):
        ours = torch.cat([taps[tap] for taps in seen])
        assert torch.equal(ours, shallow(backbone, tokens[: len(ours)], tap))


def test_shadow_guesses_are_the_guesses_of_a_draft() -> None:
    """Shadow tokens of the exit that drafts are its drafts: whom it got right is whom verification accepted."""
    backbone = deep()
    drafter = dynamic(backbone, (2,), steps=4)
    drafter.statistics.decay = 1.0
    drafts = drafts_of(drafter)
    decoder = decoder_of(backbone, drafter)
    decoder.submit([1, 2, 3, 4, 5, 6], SamplingParams(max_new_tokens=25, ignore_eos=True))
    decoder.step()
    while decoder.busy:
        drafts.clear()
        before = drafter.statistics._counts_SC22[0].clone()
        (event,) = decoder.step()
        if not decoder.busy:
            break
        counts = (drafter.statistics._counts_SC22[0] - before)[0, :, 0].tolist()
        chain, accepted = main_chain(drafts[0].trees[0]), sum(event.drafted)
        assert accepted <= counts[0] <= accepted + (accepted == len(chain))  # behind a whole chain stands one more
        assert sum(counts) == accepted + 1


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("chain", [True, False], ids=["chain", "tree"])
def test_what_is_drafted_in_one_call_is_what_is_drafted_level_by_level(kernel: str, chain: bool) -> None:
    """The slow twin of the kernels' growth, with streams handed on from several exits."""
    with using(kernel):
        backbone = deep(BF16)
    drafts = []
    for slow in (False, True):
        drafter = dynamic(backbone, (1, 2, 4), nodes=12, chain=chain, steps=5)
        drafter._one_call = None if slow else drafter._one_call
        seen = drafts_of(drafter)
        decoder = decoder_of(backbone, drafter, max_rows=3)
        put(drafter.statistics, "choose", lambda slots: (2, [0.05] * len(slots)))  # layer 4
        finish(decoder, requests())
        drafts.append(seen)
    for one, other in zip(*drafts, strict=True):
        assert (one.trees, one.tokens, one.probabilities) == (other.trees, other.tokens, other.probabilities)
        assert (one.resume is None) == (other.resume is None)
        if one.resume and other.resume:
            assert one.resume.ran == other.resume.ran
            assert list(one.resume.taps) == list(other.resume.taps) == [1, 2]
            pairs = [(one.resume.hidden_Rd, other.resume.hidden_Rd)]
            pairs += [(one.resume.taps[tap], other.resume.taps[tap]) for tap in (1, 2)]
            assert all(same(a.contiguous(), b.contiguous()) for a, b in pairs)


def test_every_exit_is_counted_at_every_position() -> None:
    """The slow twin: each exit's guesses over the whole text, in a pass of its own; two rows side by side."""
    backbone, exits = deep(), (1, 2, 4)
    drafter = dynamic(backbone, exits, steps=4)
    drafter.statistics.decay = 1.0
    decoder = decoder_of(backbone, drafter, max_rows=2)
    for prompt in ([1, 2, 3, 4, 5, 6], list(range(3, 50))):
        decoder.submit(prompt, SamplingParams(max_new_tokens=40, ignore_eos=True))
    for _ in range(7):
        decoder.step()
    for row in decoder._rows:
        n, read = decoder.cache.lengths[row.slot], row.prompt_length - 1
        whole = backbone.logits(backbone.norm(shallow(backbone, row.tokens[:n], LAYERS))).argmax(-1)
        comes = torch.cat([whole[:read], torch.tensor(row.tokens[read + 1 : n + 1])])
        mine = slice(max(0, read - 32), n)  # of a prompt the last positions
        for i, exit in enumerate(exits):
            sure, guessed = backbone.logits(backbone.norm(shallow(backbone, row.tokens[:n], exit))).softmax(-1).max(-1)
            right = (guessed == comes)[mine]
            counts, sums = drafter.statistics._counts_SC22[row.slot, i].unbind(-1)
            assert counts.tolist() == [int(right.sum()), int((~right).sum())]
            assert sums.tolist() == pytest.approx([float(sure[mine][right].sum()), float(sure[mine][~right].sum())])
        alpha = drafter.statistics._counts_SC22[row.slot, :, 0, 0] / (n - mine.start)
        assert drafter.statistics.alpha([row.slot])[0] == pytest.approx(alpha.numpy())
    best = tokens_per_layer(
        drafter.statistics.alpha([row.slot for row in decoder._rows]),
        exits,
        LAYERS,
        cost=drafter.statistics.cost,
    )
    decoder.step()
    assert drafter.exit == exits[int(best.max(-1).sum(0).argmax())]


# -- what DEL counts ------------------------------------------------------------------------------------------------


def test_an_evaluation_of_the_exits_holds_for_every_steps() -> None:
    """The prompt is evaluated, then every third step; in between the choice stays, unless the rows change."""
    backbone = deep()
    drafter = dynamic(backbone, (1, 2, 4), steps=3, every=3)
    told, chosen = list[int](), list[tuple[int, ...]]()
    decoder = decoder_of(backbone, drafter, max_rows=2)
    statistics = drafter.statistics
    tell, choose = statistics.record, statistics.choose
    put(statistics, "record", lambda slots, *rest: (told.append(len(slots)), tell(slots, *rest)))
    put(statistics, "choose", lambda slots: (chosen.append(tuple(slots)), choose(slots))[1])
    decoder.submit([1, 2, 3, 4], SamplingParams(max_new_tokens=60, ignore_eos=True))
    for _ in range(10):  # the first reads the prompt
        decoder.step()
    assert len(told) == 1 + 3
    assert chosen == [(0,)] * 4
    decoder.submit([5, 6, 7], SamplingParams(max_new_tokens=60, ignore_eos=True))
    for _ in range(3):
        decoder.step()
    assert chosen[4:] == [(0, 1)] * (len(told) - 4)


@pytest.mark.parametrize(
    ("alpha", "exit", "gamma", "tpl"),
    [(0.5, 4, 2, 0.04375), (0.7, 7, 3, 0.0477925), (0.9, 16, 3, 0.0429875), (0.3, 7, 1, 1 / 30), (0.0, 5, 0, 1 / 32)],
)
def test_tokens_per_layer_are_those_of_the_formula(alpha: float, exit: int, gamma: int, tpl: float) -> None:
    grid = tokens_per_layer(np.array([alpha]), [exit], 32)[0]
    assert int(grid.argmax()) == gamma
    assert float(grid[gamma]) == pytest.approx(tpl, rel=1e-5)


def test_tokens_per_layer_of_the_certain_are_a_sum() -> None:
    grid = tokens_per_layer(np.array([0.8, 1.0]), [8, 8], 32)
    assert float(grid[0, 4]) == pytest.approx(0.052525, rel=1e-4)
    assert grid[1].tolist() == pytest.approx([(g + 1) / (32 + 8 * g) for g in range(18)])


def test_counts_decay_and_rows_are_apart() -> None:
    statistics = ExitStatistics([1, 3], 4, torch.device("cpu"), decay=0.5)
    assert statistics.choose([0]) == (None, [0.0])
    right = torch.tensor([[True, True], [False, True], [True, True]])  # [T, C]
    sure = torch.tensor([[0.9, 0.8], [0.2, 0.6], [0.5, 0.7]])
    statistics.record([0] * 3, right, sure)
    assert statistics.alpha([0]).tolist() == [[pytest.approx(2 / 3), 1.0]]
    at, halfway = statistics.choose([0, 5])
    assert (at, halfway) == (0, [pytest.approx((0.7 + 0.2) / 2), 0.0])
    one = ExitStatistics([3], 4, torch.device("cpu"))
    one.record([0] * 3, right[:, 1:], sure[:, 1:])
    assert one.choose([0]) == (0, [0.0])  # it was never wrong
    statistics.record([0], ~right[:1], sure[:1])
    assert statistics._counts_SC22[0, ..., 0].tolist() == [[1.0, 1.5], [1.5, 1.0]]
    assert np.isnan(statistics.alpha([0, 1])).tolist() == [[False, False], [True, True]]
    last = ExitStatistics([1, 3], 4, torch.device("cpu"), decay=0.0)
    last.record([0] * 3, right, sure)
    last.record([0], right[:1], sure[:1])
    assert last._counts_SC22[0, ..., 0].tolist() == [[1.0, 0.0], [1.0, 0.0]]
    statistics.forget([0])
    assert statistics.choose([0])[0] is None


def test_rows_recorded_together_count_as_rows_recorded_alone() -> None:
    together, apart = (ExitStatistics([1, 3], 4, torch.device("cpu"), decay=0.5) for _ in range(2))
    torch.manual_seed(0)
    for slots in ([2, 2, 0], [0], [0, 0, 2, 1]):
        right, sure = torch.rand(len(slots), 2) < 0.5, torch.rand(len(slots), 2)
        together.record(slots, right, sure)
        for slot in dict.fromkeys(slots):
            mine = torch.tensor(slots) == slot
            apart.record([slot] * int(mine.sum()), right[mine], sure[mine])
    assert torch.allclose(together._counts_SC22, apart._counts_SC22)
    assert together._counts_SC22.any(-1).any(-1).all()


def test_the_exit_that_pays_best_is_chosen() -> None:
    statistics = ExitStatistics([2, 4, 8], 32, torch.device("cpu"))

    def told(slot: int, *shares: float) -> None:
        right = torch.stack([torch.arange(100) < 100 * share for share in shares], 1)
        statistics.record([slot] * 100, right, torch.full((100, 3), 0.5))

    told(0, 0.1, 0.7, 0.8)
    assert statistics.choose([0])[0] == 1
    told(1, 0.1, 0.2, 0.99)
    assert statistics.choose([1])[0] == 2
    assert statistics.choose([0, 1])[0] == 2  # of a batch the best for all together
    assert statistics.choose([0, 7])[0] == 1  # of whom nothing is known does not count
    told(2, 0.5, 0.5, 0.5)
    assert statistics.choose([2])[0] == 0
    told(3, 0.55, 0.6, 0.78)
    assert statistics.choose([3])[0] == 0
    dear = ExitStatistics([2, 4, 8], 32, torch.device("cpu"), cost=12.0)
    dear._counts_SC22 = statistics._counts_SC22
    assert dear.choose([3])[0] == 2  # where a guess costs much besides its layers, it had better be right


def test_a_chain_ends_where_its_exit_is_unsure() -> None:
    backbone = deep()
    drafter = dynamic(backbone, (2,), steps=8)
    drafts = drafts_of(drafter)
    decoder = decoder_of(backbone, drafter)
    decoder.submit([1, 2, 3, 4, 5, 6], SamplingParams(max_new_tokens=40, ignore_eos=True))
    ended = 0
    while decoder.busy:
        (threshold,) = drafter.statistics.choose([0])[1]
        budget = decoder._rows[0].budget if decoder._rows else 40
        decoder.step()
        (given,) = drafts[-1].probabilities or []
        if budget > 9 and len(drafts) > 1:
            assert all(p >= threshold for p in given[1:-1])
            assert given[-1] < threshold or len(given) == 9
            ended += len(given) < 9
    assert ended


# -- learning -------------------------------------------------------------------------------------------------------


def test_drop_rates_and_scales_are_those_of_the_paper() -> None:
    rates = drop_rates(32, 1.0)
    assert [round(rates[layer], 4) for layer in (0, 8, 16, 24, 31)] == [0.0, 0.1959, 0.4301, 0.7102, 1.0]
    assert exit_scales(4, 0.5) == [0.0, 0.5, 1.5, 4.5]
    assert exit_scales(4, 0.5, "uniform") == [0.5, 0.5, 0.5, 1.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tiny(folder, num_hidden_layers=LAYERS)
    return folder


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return assemble(folder, dtype="fp32", threads=1)


def learner(backbone: Backbone, folder: Path, **options: Any) -> EarlyExitTraining:
    torch.manual_seed(0)
    given = {"draft_vocab": 0, "rank": 4, "stride": 1, "deepest": 4, "exit": 2} | options
    return trainable(LayerSkip, backbone, torch.ones(backbone.config.vocab), folder, **given)


def test_shares_add_up_and_rotate(backbone: Backbone, folder: Path) -> None:
    module = learner(backbone, folder, period=2, shape="cumulative").train()
    turns = {tuple(module.training_exits()) for _ in range(30)}
    assert turns == {(1, 3), (2, 4)}
    for exits in turns:
        shares = module.shares(exits)
        assert sum(shares) == pytest.approx(1.0)
        assert shares == sorted(shares)  # the later, the more
    assert module.eval().training_exits() == [1, 2, 3, 4]
    gradual = learner(backbone, folder, curriculum="gradual").train()
    found = []
    for done in (0.0, 0.2, 0.3, 0.45, 0.55):
        gradual.begin(done)
        found.append(gradual.training_exits())
    assert found == [[], [4], [3, 4], [2, 3, 4], [1, 2, 3, 4]]


def test_exits_learn_what_the_head_says_of_their_stream(backbone: Backbone, folder: Path) -> None:
    """Written out: cross-entropy against the teacher, of the norm and head over the stream of a pass of our own."""
    module = learner(backbone, folder).eval()
    batch = batch_of(backbone, module)
    with torch.no_grad():
        terms = module.losses(batch)
    assert list(terms) == ["exit 1", "exit 2", "exit 3", "exit 4", "backbone"]
    assert abs(float(terms["backbone"])) < 1e-3
    for exit in (1, 2, 3, 4):
        total, places = 0.0, 0
        for row, each in enumerate(DATA):
            log_probs = backbone.logits(backbone.norm(shallow(backbone, each.tokens, exit))).log_softmax(-1)
            for start, end in each.answers:
                for p in range(start - 1, end - 1):
                    ids, weights = batch.teacher_ids_BTm[row, p], batch.teacher_p_BTm[row, p]
                    total -= float((log_probs[p, ids] * weights).sum())
                    places += 1
        assert float(terms[f"exit {exit}"]) == pytest.approx(total / places, rel=1e-2)


def test_layers_are_dropped_as_often_as_they_should(backbone: Backbone, folder: Path) -> None:
    module = learner(backbone, folder).train()
    tokens_BT = torch.randint(VOCAB, (400, 2))
    torch.manual_seed(0)
    with torch.no_grad():
        states = module.student.states(tokens_BT, range(1, LAYERS + 1), [0.0, 0.3, 1.0, 0.0, 0.0])
        gone = [(states[tap] == states[tap - 1]).all(-1).all(-1) for tap in range(2, LAYERS + 1)]
        assert float(gone[0].float().mean()) == pytest.approx(0.3, abs=0.06)  # whole conversations
        assert [bool(each.all()) for each in gone[1:]] == [True, False, False]
        twice = [module.eval().student.states(tokens_BT[:3], [LAYERS])[LAYERS] for _ in range(2)]
    assert torch.equal(*twice)


def test_training_makes_exits_better_and_leaves_the_text(backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    module = learner(backbone, folder, dropout=0.0, period=1, rank=16, adapt="full")
    features = ComputedFeatures(backbone, DATA, module.taps)
    trainer = Trainer(
        module, features, Settings(epochs=30, batch_tokens=512, learning_rate=3e-3, held_out=0), tmp_path / "run"
    )
    before = trainer.evaluate().loss
    train([trainer])
    after = trainer.evaluate().loss
    assert all(after[f"exit {exit}"] < before[f"exit {exit}"] - 0.04 for exit in (1, 2, 3, 4))
    assert after["backbone"] < 0.01
    name = module.save_backbone(str(folder), tmp_path)
    changed = assemble(Path(name), dtype="fp32", threads=1)
    request = ([1, 2, 3, 4], SamplingParams(max_new_tokens=12, ignore_eos=True))
    drafter = skipping(changed, 2, chain=True)
    assert_same(finish(decoder_of(changed, drafter), [request]), plainly(changed, [request]))


def test_a_checkpoint_says_where_to_exit(backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    module = learner(backbone, folder, draft_vocab=20)
    tensors, arch = module.checkpoint()
    checkpoint = Checkpoint("layerskip", "tiny", backbone.fingerprint, WIDTH, VOCAB, arch)
    checkpoint.save(tmp_path / "drafter", tensors)
    fixed = drafters.build("layerskip", backbone, checkpoint=str(tmp_path), nodes=16)
    moving = drafters.build("del", backbone, checkpoint=str(tmp_path), nodes=16)
    assert isinstance(fixed, LayerSkip)
    assert isinstance(moving, DEL)
    assert fixed.exit == 2
    assert moving.exits == [1, 2, 3, 4]
    assert moving.taps == (1, 2, 3, 4, FINAL_NORM)
    assert len(fixed._vocabulary_V) == 20
    truth = plainly(backbone, requests())
    for each in (fixed, moving):
        assert_same(finish(decoder_of(backbone, each, max_rows=2), requests()), truth)


# -- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("layerskip", {"exit": LAYERS}, "The exit is layer 5; this model can leave after layer 1 to 4"),
        ("layerskip", {"exit": -1}, "The exit is layer -1"),
        ("layerskip", {"threshold": 1.01}, "threshold is 1.01; it must lie between 0 and 1"),
        ("layerskip", {"steps": -1}, "steps is -1"),
        ("layerskip", {"nodes": 100}, "2 to 64 nodes, not 100"),
        ("del", {"stride": LAYERS}, "stride is 5; it must lie between 1 and 4"),
        ("del", {"steps": 64}, "steps is 64"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        drafters.build(name, deep(), **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shape": "square"}, "shape is 'square'; it must be uniform or cumulative"),
        ({"curriculum": "none"}, "curriculum is 'none'; it must be rotational or gradual"),
        ({"adapt": "some"}, "adapt is 'some'; it must be lora or full"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"exit": 9}, "The exit is layer 9"),
        ({"deepest": 5}, "The exit is layer 5"),
    ],
)
def test_training_that_cannot_be_is_one_sentence(
    backbone: Backbone, folder: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        learner(backbone, folder, **options)


def test_a_threshold_of_nan_never_gets_here() -> None:
    with pytest.raises(UsageError, match="threshold is nan"):
        drafters.build("layerskip", deep(), threshold=math.nan)
