"""SWIFT: whatever is skipped, no answer changes; plans are what the search says they are, and it begins anew."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoding import (
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
from random_backbones import BF16, FP32, prefilled, same
from test_medusa import backbone_of, requests

from foretell import drafters
from foretell.backbone import Backbone, Nodes
from foretell.contracts import Draft, Row
from foretell.drafters import swift
from foretell.drafters.prompt_lookup import WithLookup
from foretell.drafters.swift import Swift, siblings
from foretell.drafting import skip_plan
from foretell.drafting.skip_plan import Plan, PlanSearch
from foretell.drafting.threshold import Threshold, main_chain
from foretell.errors import ForetellError, UsageError
from foretell.loading.catalog import FORMER_FINGERPRINTS
from foretell.requests import SamplingParams

LAYERS = 6
NOTHING = Plan((), ())


def deep(dtype: torch.dtype = FP32) -> Backbone:
    return backbone_of(dtype, num_hidden_layers=LAYERS)


def swift_of(backbone: Backbone, plan: Plan | None = None, search: bool = False, **options: Any) -> Swift:
    return watched(Swift(backbone, PlanSearch(backbone.config.layers, 0.5, plan, enabled=search), **options))


def random_plan(seed: int) -> Plan:
    rng = random.Random(seed)
    attention, mlp = (tuple(layer for layer in range(1, LAYERS - 1) if rng.random() < 0.5) for _ in range(2))
    return Plan(attention, mlp)


# -- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_no_plan_changes_a_token(dtype: torch.dtype, rows: int) -> None:
    backbone = deep(dtype)
    truth = plainly(backbone, requests())
    for seed, (steps, threshold) in enumerate([(0, 0.8), (1, 0.8), (4, 0.0), (8, 0.1), (25, 1.0)]):
        plan = random_plan(seed) if seed else NOTHING
        drafter = swift_of(backbone, plan, steps=steps, nodes=6 + 4 * seed, threshold=Threshold(threshold, seed == 3))
        for each in (drafter, WithLookup(drafter)):
            decoder = decoder_of(backbone, each, max_rows=rows)
            assert decoder.lossless
            assert_same(finish(decoder, requests()), truth)
            assert held_like_a_fresh_prefill(decoder) > 0


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_searching_changes_no_token(dtype: torch.dtype) -> None:
    backbone = deep(dtype)
    truth = plainly(backbone, requests())
    drafter = swift_of(backbone, search=True, window=4, threshold=Threshold(0.0), steps=3)
    decoder = decoder_of(backbone, drafter, max_rows=3)
    for _ in range(3):
        assert_same(finish(decoder, requests()), truth)
    assert drafter.search.trials > 30
    assert held_like_a_fresh_prefill(decoder) > 0


# -- drafting -------------------------------------------------------------------------------------------------------


def test_a_chain_is_what_the_model_writes_without_these_sublayers() -> None:
    """The slow twin: the whole model reads the committed tokens, then the rest of it writes on, token by token."""
    backbone, plan = deep(), random_plan(3)
    drafter = swift_of(backbone, plan, steps=5, nodes=40, threshold=Threshold(0.0))
    for text, draft in texts_and_drafts(backbone, drafter, 4):
        tree, tokens, given = draft.trees[0], draft.tokens[0], (draft.probabilities or [[]])[0]
        chain = main_chain(tree)
        cache, _ = prefilled(backbone, text[:-1])
        cache.reserve({0: len(text) + 8})
        newest = text[-1]
        for node in chain:
            nodes = Nodes.chains([0], [cache.lengths[0]], [1])
            hidden, _ = backbone.run_layers(
                backbone.embed(torch.tensor([newest])), nodes, cache, skip=plan.bits(LAYERS)
            )
            cache.commit([0], [[0]])
            probabilities = backbone.logits(backbone.norm(hidden))[0].softmax(-1)
            newest = int(probabilities.argmax())
            assert tokens[node] == newest
            assert given[node] == pytest.approx(float(probabilities.max()), rel=2e-2)


def test_siblings_stand_where_the_model_was_unsure() -> None:
    assert [siblings(p) for p in (0.99, 0.95, 0.81, 0.8, 0.6, 0.5, 0.1, 0.0)] == [3, 5, 5, 8, 8, 10, 10, 10]
    backbone = deep()
    drafter = swift_of(backbone, random_plan(1), steps=4, nodes=64, threshold=Threshold(0.0))
    seen = drafts_of(drafter)
    request = ([1, 2, 3, 4], SamplingParams(max_new_tokens=30, ignore_eos=True))
    finish(decoder_of(backbone, drafter), [request])
    for draft in seen[:-4]:  # the last ones end with the budget
        tree, (given,) = draft.trees[0], draft.probabilities or []
        chain = main_chain(tree)
        assert chain[:-1] == list(range(1, len(chain)))  # the chain takes the first slots
        assert len(tree) == 1 + sum(siblings(given[node]) for node in chain)
        assert {tree.parents[node] for node in range(1, len(tree))} == {0, *chain[:-1]}  # a comb


def test_nothing_skipped_is_accepted_whole() -> None:
    backbone = deep()
    drafter = swift_of(backbone, NOTHING, steps=4, nodes=40, threshold=Threshold(0.0))
    request = ([1, 2, 3, 4], SamplingParams(max_new_tokens=30, ignore_eos=True))
    (out,) = finish(decoder_of(backbone, drafter), [request])
    assert out.statistics.acceptance_length == 5.0


def test_matchness_is_one_without_skips_and_leaves_the_cache_alone() -> None:
    backbone = deep(BF16)
    drafter = swift_of(backbone, NOTHING, window=8)
    decoder = decoder_of(backbone, drafter)
    decoder.submit([1, 2, 3, 4, 5, 6], SamplingParams(max_new_tokens=30, ignore_eos=True))
    while len(decoder._rows[0].tokens if decoder._rows else []) < 18:
        decoder.step()
    (row,) = decoder._rows
    before = [tensor.clone() for tensor in decoder.cache.read(row.slot)]
    assert drafter.matchness(NOTHING, row) > 0.85  # eight bits a number may turn a near tie
    for seed in range(5):
        assert 0 <= drafter.matchness(random_plan(seed), row) <= 1
    for one, other in zip(before, decoder.cache.read(row.slot), strict=True):
        assert same(one, other)


# -- the search -----------------------------------------------------------------------------------------------------


def test_candidates_skip_as_many_as_they_should_and_never_first_or_last() -> None:
    for layers, ratio in ((30, 0.45), (6, 0.5), (40, 0.45), (30, 0.0), (4, 1.0)):
        search = PlanSearch(layers, ratio)
        rng, best = np.random.default_rng(0), -1.0
        assert search.candidate() == search.plan  # a search begins by scoring what is at hand
        search.record(0.1)
        for _ in range(60):
            plan = search.candidate()
            assert len(plan.attention) + len(plan.mlp) == int(2 * (layers - 2) * ratio)
            assert not {0, layers - 1} & (set(plan.attention) | set(plan.mlp))
            bits = plan.bits(layers)
            assert len(bits) == layers
            assert sum(bin(each).count("1") for each in bits) == int(2 * (layers - 2) * ratio)
            search.record(float(rng.random()) * 0.9)
            assert search.score >= best
            best = search.score
    assert PlanSearch(40).skipped == 34  # as in the reference


def test_the_search_finds_what_matters() -> None:
    """Skipping the MLP of layer 2 is all that hurts: it must end among the kept, and the sampler must help."""
    search = PlanSearch(12, 0.5, seed=3)
    for _ in range(200):
        plan = search.candidate()
        search.record(0.9 - 0.3 * (2 in plan.mlp) - 0.02 * len(set(plan.attention) & {1, 2, 3, 4}))
    assert 2 not in search.plan.mlp
    assert len(set(search.plan.attention) & {1, 2, 3, 4}) <= 1


def test_a_search_ends_when_it_is_good_enough_or_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    search = PlanSearch(8)
    search.candidate()
    assert search.record(0.96)
    assert not search.searching
    for name, most in (("TOLERANCE", 7), ("TRIALS", 7)):
        with monkeypatch.context() as patch:
            patch.setattr(skip_plan, name, most)
            search = PlanSearch(8)
            while search.searching:
                search.candidate()
                search.record(0.5)
            assert search.trials == most + 1 + (name == "TOLERANCE")


def drafting(search: PlanSearch, right: float, steps: int, rng: random.Random) -> int:
    """Steps of chains of five whose guesses are right so often, until the search begins; `steps` at most."""
    for step in range(steps):
        kept = next((i for i in range(5) if rng.random() >= right), 5)
        search.record_acceptance(kept, 5)
        if search.searching:
            return step
    return steps


@pytest.mark.parametrize("right", [0.3, 0.6, 0.9, 0.98])
def test_chance_does_not_begin_the_search_anew_and_another_text_does(right: float) -> None:
    for seed in range(5):
        rng, search = random.Random(seed), PlanSearch(8)
        search.candidate()
        search.record(0.99)
        assert drafting(search, right, 3000, rng) == 3000
        kept = search.plan
        if right > 0.5:
            assert drafting(search, right - 0.35, 300, rng) < 150
            assert search.score == -1.0
            assert search.candidate() == kept
    quiet = PlanSearch(8, plan=kept, score=0.9, enabled=False)
    assert drafting(quiet, right, 500, rng) == drafting(quiet, 0.0, 500, rng) == 500


def test_a_text_that_changes_is_noticed_while_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USUAL", "RECENT"):
        monkeypatch.setattr(skip_plan, name, 8)
    monkeypatch.setattr(skip_plan, "SURE", 0)
    backbone = deep()
    drafter = swift_of(backbone, search=True, window=4, steps=4, nodes=40, threshold=Threshold(0.0))
    drafter.search = PlanSearch(LAYERS, 0.5, NOTHING, 1.0)
    request = ([1, 2, 3, 4], SamplingParams(max_new_tokens=60, ignore_eos=True))
    decoder = decoder_of(backbone, drafter)
    finish(decoder, [request])
    assert not drafter.search.searching
    drafter.search.plan = Plan(tuple(range(1, LAYERS - 1)), tuple(range(1, LAYERS - 1)))  # the text it errs on
    finish(decoder, [request])
    assert drafter.search.trials > 0


@pytest.mark.parametrize("lookup", [False, True])
def test_what_is_accepted_is_counted_by_its_tokens(lookup: bool) -> None:
    """Nothing is skipped, so every guess of a chain is right, whatever lookup adds to the tree."""
    backbone, told = deep(), list[tuple[int, int]]()
    drafter = swift_of(backbone, NOTHING, steps=3, nodes=24, threshold=Threshold(0.0))
    put(drafter.search, "record_acceptance", lambda kept, drafted: told.append((kept, drafted)))
    request = ([1, 2, 3] * 6, SamplingParams(max_new_tokens=40, ignore_eos=True))
    finish(decoder_of(backbone, WithLookup(drafter) if lookup else drafter), [request])
    assert len(told) > 5
    assert all(kept == known for kept, known in told)


def test_candidates_come_every_so_often_and_run_on_the_longest_answer() -> None:
    backbone = deep()
    drafter = swift_of(backbone, search=True, window=4, every=3, threshold=Threshold(0.0), steps=2)
    rounds, scored = [list[tuple[int, list[int]]]() for _ in range(2)]
    draft, matchness = drafter.draft, drafter.matchness

    def noted(rows: Sequence[Row]) -> Draft:
        rounds.append((drafter._round + 1, [len(row.tokens) - row.prompt_length for row in rows]))
        return draft(rows)

    def score(plan: Plan, row: Row) -> float:
        scored.append((drafter._round, [len(row.tokens) - row.prompt_length]))
        return matchness(plan, row)

    put(drafter, "draft", noted)
    put(drafter, "matchness", score)
    finish(decoder_of(backbone, drafter, max_rows=3), requests())
    assert scored == [(number, [max(lengths)]) for number, lengths in rounds if number % 3 == 0 and max(lengths) > 4]
    assert any(len(lengths) > 1 and max(lengths) > lengths[0] for _, lengths in rounds)  # not always the first row


def test_the_adaptive_threshold_is_told_while_decoding() -> None:
    backbone = deep()
    request = ([1, 2, 3, 4], SamplingParams(max_new_tokens=40, ignore_eos=True))
    for plan, nodes in ((NOTHING, 5), (random_plan(2), 40)):
        drafter = swift_of(backbone, plan, steps=8, nodes=nodes, threshold=Threshold(0.0, adaptive=True))
        finish(decoder_of(backbone, drafter), [request])
        if plan == NOTHING:  # all is accepted, and four guesses are all that the tree has room for
            assert drafter.tracker.threshold.accepted > 0.9
            assert drafter.tracker.threshold.value > 0.0
        else:
            assert drafter.tracker.threshold.accepted < 0.9
            assert drafter.tracker.threshold.value > 0.002


# -- plans in files -------------------------------------------------------------------------------------------------


def test_a_plan_is_kept_and_used_again(tmp_path: Path) -> None:
    backbone, path = deep(), tmp_path / "plan.json"
    drafter = drafters.build("swift", backbone, plan=str(path), window=4, ratio=0.5, threshold=0.0)
    assert isinstance(drafter, Swift)
    request = ([1, 2, 3, 4], SamplingParams(max_new_tokens=60, ignore_eos=True))
    finish(decoder_of(backbone, drafter), [request])
    assert Plan.load(path, backbone) == (drafter.search.plan, pytest.approx(drafter.search.score, abs=1e-4))
    again = drafters.build("swift", backbone, plan=str(path), search=False)
    assert isinstance(again, Swift)
    assert again.search.plan == drafter.search.plan
    assert not again.search.searching


def test_a_plan_in_a_file_makes_room_for_better_ones_only(tmp_path: Path) -> None:
    backbone, path = deep(), tmp_path / "plan.json"
    Plan((1,), (2,)).save(path, backbone, 0.99)
    drafter = drafters.build("swift", backbone, plan=str(path), window=4, threshold=0.0)
    assert isinstance(drafter, Swift)
    drafter.search._restart()
    request = ([1, 2, 3, 4], SamplingParams(max_new_tokens=60, ignore_eos=True))
    finish(decoder_of(backbone, drafter), [request])
    assert drafter.search.trials > 0
    assert Plan.load(path, backbone)[1] >= 0.99


def test_what_a_search_needs_is_asked_for_at_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = deep()
    with pytest.raises(UsageError, match="There is no plan"):
        drafters.build("swift", backbone, plan=str(tmp_path / "plan.json"), search=False)
    with pytest.raises(ForetellError, match="No plan can be kept in"):
        drafters.build("swift", backbone, plan=str(tmp_path / "no" / "plan.json"))
    monkeypatch.setattr(swift, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs optuna"):
        drafters.build("swift", backbone)
    Plan((1,), (2,)).save(tmp_path / "plan.json", backbone, 0.9)
    drafter = drafters.build("swift", backbone, plan=str(tmp_path / "plan.json"))
    assert isinstance(drafter, Swift)
    assert not drafter.search.enabled


def test_plans_that_do_not_fit_are_one_sentence(tmp_path: Path) -> None:
    backbone, path = deep(), tmp_path / "plan.json"
    Plan((1,), (2,)).save(path, backbone, 0.9)
    other = deep()
    other.fingerprint = "another"
    with pytest.raises(UsageError, match="was found for another model"):
        drafters.build("swift", other, plan=str(path))
    with pytest.raises(UsageError, match="was found for another model"):
        drafters.build("swift", backbone_of(), plan=str(path))
    raw = json.loads(path.read_text())
    former, other.fingerprint = next(iter(FORMER_FINGERPRINTS.items()))
    path.write_text(json.dumps(raw | {"backbone": former}))  # written before fingerprints covered every tensor
    drafters.build("swift", other, plan=str(path), search=False)
    for broken in ({"attention": [0]}, {"mlp": [LAYERS - 1]}, {"attention": "x"}, {"matchness": None}):
        path.write_text(json.dumps(raw | broken))
        with pytest.raises(ForetellError, match="plan"):
            drafters.build("swift", backbone, plan=str(path))
    path.write_text("{")
    with pytest.raises(ForetellError):
        drafters.build("swift", backbone, plan=str(path))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"threshold": 2.0}, "threshold is 2.0; it must lie between 0 and 1"),
        ({"ratio": -0.1}, "ratio is -0.1; it must lie between 0 and 1"),
        ({"steps": 64}, "steps is 64"),
        ({"window": 0}, "window is 0"),
        ({"nodes": 1}, "2 to 64 nodes, not 1"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        drafters.build("swift", deep(), **options)


def test_a_model_without_inner_layers_has_nothing_to_skip() -> None:
    with pytest.raises(UsageError, match="A model of 2 layers"):
        drafters.build("swift", backbone_of(num_hidden_layers=2))


# -- the threshold --------------------------------------------------------------------------------------------------


def test_the_threshold_follows_acceptance() -> None:
    threshold = Threshold(0.6, adaptive=True)
    threshold.update(5, 5, 8)
    assert threshold.accepted == 0.5
    assert threshold.value == pytest.approx(0.601)
    for _ in range(10):
        threshold.update(5, 5, 8)
    assert threshold.value < 0.601  # accepted nine times in ten, and short: longer drafts pay
    before = threshold.value
    threshold.update(8, 8, 8)
    assert threshold.value == pytest.approx(before)  # none could have been longer
    fixed = Threshold(0.6)
    fixed.update(0, 5, 8)
    assert fixed.value == 0.6
