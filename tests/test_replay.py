"""Replay: decoding over states that are known takes the very steps that the engine takes with the same drafter."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import decoding
import pytest
import torch
from decoding import Output, decoder_of, finish, plainly
from test_hidden_transfer import drafter_of as transfer_of
from test_hidden_transfer import random_steps
from test_kangaroo import drafter_of as kangaroo_of
from test_kangaroo import random_adapter
from test_m2r2 import drafter_of as m2r2_of
from test_m2r2 import random_stream
from test_medusa import VOCAB, backbone_of, some_paths
from toy_drafters import Oracle
from trainables import trainable

from foretell.backbone import Backbone
from foretell.contracts import Draft, Drafter, Row
from foretell.drafters.hydra.drafter import Hydra, HydraPlus
from foretell.drafters.layerskip import LayerSkip
from foretell.drafters.medusa import Medusa
from foretell.drafters.prompt_lookup import WithLookup
from foretell.drafters.swift import Swift
from foretell.drafting.skip_plan import Plan, PlanSearch
from foretell.drafting.threshold import Threshold
from foretell.requests import SamplingParams, Statistics
from foretell.train.data import Distilled
from foretell.train.features import ComputedFeatures
from foretell.train.replay import replay, tokens_per_step_by_size
from foretell.trees import TokenTree

# features are kept in bfloat16, but the engine's drafters read float32: here nothing is rounded
pytestmark = pytest.mark.usefixtures("in_float32")

SURE = Threshold(0.0)

Drafted = list[tuple[list[int], TokenTree, list[int]]]
"""A row's tokens, and what was drafted after them, step by step."""


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def conversations(backbone: Backbone) -> list[Distilled]:
    """What the backbone says, every second time in two turns."""
    found = []
    for line in range(5):
        tokens, answers = list[int](), list[tuple[int, int]]()
        for turn in range(1 + line % 2):
            tokens = tokens + random_tokens(2 + 3 * line, 10 * line + turn)
            [log_probs] = plainly(backbone, [(tokens, SamplingParams(max_new_tokens=20 + line, ignore_eos=True))])
            answers.append((len(tokens), len(tokens) + len(log_probs.ids)))
            tokens = tokens + log_probs.ids
        found.append(Distilled(line, tokens, answers))
    return found


def drafter_of(kind: Any, backbone: Backbone, data: Sequence[Distilled], nodes: int = 16) -> Any:
    """Random heads that choose from a dozen tokens of the text, so that many of their guesses come true."""
    written = [token for told in data for start, end in told.answers for token in told.tokens[start:end]]
    counts = torch.bincount(torch.tensor(written), minlength=VOCAB)
    torch.manual_seed(0)  # what replay reads is rounded in other places: of other heads two guesses may be level
    module = trainable(kind, backbone, counts, heads=3, draft_vocab=12).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    tensors, arch = module.checkpoint()
    return kind(backbone, arch, tensors, some_paths(3, 6, 1), lambda rows, context, *_: nodes)


def watched(drafter: Drafter, monkeypatch: pytest.MonkeyPatch) -> Drafted:
    """A list that fills with all that is drafted from now on."""
    found: Drafted = []
    draft = decoding.watched(drafter).draft

    def watching(rows: Sequence[Row]) -> Draft:
        drafted = draft(rows)
        found.append((list(rows[0].tokens), drafted.trees[0], list(drafted.tokens[0])))
        return drafted

    monkeypatch.setattr(drafter, "draft", watching)
    return found


def decoded(backbone: Backbone, drafter: Drafter, told: Distilled) -> list[Output]:
    """The engine's way, each answer a request of its own."""
    outputs = []
    for start, end in told.answers:
        params = SamplingParams(max_new_tokens=end - start, ignore_eos=True)
        outputs += finish(decoder_of(backbone, drafter), [(told.tokens[:start], params)])
        assert outputs[-1].ids == told.tokens[start:end]
    return outputs


def assert_counted(found: Sequence[Statistics], outputs: Sequence[Output]) -> None:
    """Checks that replay counted what the engine did, and that guesses came true."""
    theirs = [output.statistics for output in outputs]
    for name in ("steps", "plain_steps", "new_tokens", "drafted", "accepted"):
        ours = sum(getattr(statistics, name) for statistics in found)
        assert ours == sum(getattr(statistics, name) for statistics in theirs), name
    assert by_depth(found) == by_depth(theirs)
    assert tokens_per_step(found) > 1


def by_depth(each: Sequence[Statistics]) -> list[tuple[int, ...]]:
    depths = zip_longest(*(statistics.by_depth for statistics in each), fillvalue=(0, 0))
    return [tuple(map(sum, zip(*depth, strict=True))) for depth in depths]


def tokens_per_step(each: Sequence[Statistics]) -> float:
    return sum(statistics.new_tokens for statistics in each) / sum(statistics.steps for statistics in each)


@pytest.mark.parametrize("lookup", [False, True], ids=["alone", "with lookup"])
@pytest.mark.parametrize("kind", [Medusa, Hydra, HydraPlus])
def test_replay_takes_the_steps_that_the_engine_takes(
    kind: type[Drafter], lookup: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = backbone_of()
    data = conversations(backbone)
    heads = drafter_of(kind, backbone, data)
    drafter = WithLookup(heads) if lookup else heads
    drafted = watched(drafter, monkeypatch)
    outputs = [output for told in data for output in decoded(backbone, drafter, told)]
    by_the_engine = drafted.copy()
    drafted.clear()
    done: list[int] = []
    found = replay(drafter, ComputedFeatures(backbone, data, drafter.taps), range(len(data)), done.append)
    assert drafted == by_the_engine
    assert_counted(found, outputs)
    assert done == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("lookup", [False, True], ids=["alone", "with lookup"])
@pytest.mark.parametrize("kind", ["kangaroo", "layerskip", "swift", "hidden_transfer", "m2r2"])
def test_replay_runs_the_layers_that_drafting_runs(kind: str, lookup: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept features are rounded, and so is what an adapter reads of them: its guesses are nearly the engine's."""
    backbone = backbone_of(num_hidden_layers=4)
    data = conversations(backbone)
    own: dict[str, Any] = {
        "kangaroo": lambda: kangaroo_of(backbone, random_adapter(backbone, draft_vocab=0), steps=3),
        "layerskip": lambda: LayerSkip(backbone, None, 3, lambda rows, context, *_: 12, chain=True, steps=4),
        "hidden_transfer": lambda: transfer_of(backbone, random_steps(backbone, draft_vocab=0, noise=0.02), 12),
        "m2r2": lambda: m2r2_of(backbone, random_stream(backbone, exit=3, draft_vocab=0, noise=0.02), steps=3),
        "swift": lambda: Swift(backbone, PlanSearch(4, plan=Plan((), (2,)), enabled=False), steps=4, threshold=SURE),
    }
    drafter: Drafter = own[kind]()
    drafter = WithLookup(drafter) if lookup else drafter
    drafted = watched(drafter, monkeypatch)
    outputs = [output for told in data for output in decoded(backbone, drafter, told)]
    by_the_engine = drafted.copy()
    drafted.clear()
    found = replay(drafter, ComputedFeatures(backbone, data, drafter.taps), range(len(data)))
    assert drafted == by_the_engine
    assert_counted(found, outputs)


@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 13, 20])
def test_a_drafter_that_is_always_right_and_one_that_never_is(length: int) -> None:
    """After an answer's last token comes no bonus."""
    tokens = random_tokens(4 + length)
    stored = ComputedFeatures(backbone_of(), [Distilled(0, tokens, [(4, 4 + length)])], ())
    for shift, each_step in ((0, 6), (1, 1)):  # five guesses and the bonus; the bonus alone
        oracle = Oracle({tuple(tokens[:4]): tokens[4:]}, VOCAB, length=5, shift=shift)
        [found] = replay(oracle, stored, [0])
        assert (found.steps, found.new_tokens) == (-(-length // each_step), length)


def test_an_answer_without_a_prompt_is_skipped() -> None:
    backbone = backbone_of()
    tokens = random_tokens(24)
    answers = [[(0, 6), (9, 24)], [(9, 24)], [(0, 24)]]
    stored = ComputedFeatures(backbone, [Distilled(i, tokens, spans) for i, spans in enumerate(answers)], (1, 2, -1))
    drafter = drafter_of(HydraPlus, backbone, stored.data)
    both, second, first = replay(drafter, stored, range(3))
    assert both == second
    assert second.new_tokens == 15
    assert first == Statistics()


@pytest.mark.parametrize("kind", [Medusa, Hydra])
def test_each_size_is_replayed_alone_and_the_drafter_is_unchanged(kind: type[Drafter]) -> None:
    backbone = backbone_of()
    data = conversations(backbone)
    drafter = drafter_of(kind, backbone, data)
    stored, rule, fractions = ComputedFeatures(backbone, data, drafter.taps), drafter.size, list[float]()
    found = tokens_per_step_by_size(drafter, stored, [3, 1], [2, 4, 12], fractions.append)
    assert drafter.size is rule
    assert list(found) == [2, 4, 12]
    for size, tokens in found.items():
        alone = replay(drafter_of(kind, backbone, data, size), stored, [1, 3])
        assert tokens == pytest.approx(tokens_per_step(alone), abs=1e-4)
    assert len(set(found.values())) > 1
    assert fractions == pytest.approx([i / 6 for i in range(1, 7)])  # two conversations of each size


def test_a_batch_is_made_once_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of()
    data, made = conversations(backbone), list[int]()
    drafter = drafter_of(Medusa, backbone, data)
    features = ComputedFeatures(backbone, data, drafter.taps)
    batch = features.batch
    monkeypatch.setattr(features, "batch", lambda indices: (made.extend(indices), batch(indices))[1])
    found = tokens_per_step_by_size(drafter, features, [3, 1], [2, 4, 12])
    assert made == [3, 1]
    assert found == tokens_per_step_by_size(drafter, ComputedFeatures(backbone, data, drafter.taps), [3, 1], [2, 4, 12])
