"""What a step costs, and the tree that follows from it: any table of seconds, any gains, and the machine this runs on.

No test asserts how long something takes; the clock is only asked that it runs.
"""

import json
import math
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Foretell, Ran
from decoding import decoder_of, finish, watched
from hypothesis import given
from hypothesis import strategies as st
from random_backbones import BF16, FP32, Model, examples
from test_lookup import Line
from tiny_models import DIMENSIONS
from toy_drafters import RandomTrees
from trainables import trainable

import foretell as package
from foretell import drafters
from foretell.backbone import Backbone, KVCache
from foretell.backbone.step_costs import (
    CONTEXTS,
    NODES,
    ROWS,
    StepCosts,
    _step_seconds,
    costs_file,
    first_reading,
    known_costs,
    measure,
    step_costs,
)
from foretell.contracts import Draft
from foretell.drafters.medusa import Medusa
from foretell.drafters.prompt_lookup import prices_of
from foretell.drafting import checkpoint
from foretell.drafting.checkpoint import Checkpoint
from foretell.drafting.tree_size import DEFAULT_NODES, PROBED, size_for, tree_size
from foretell.engine.cost_learning import CostLearning
from foretell.errors import ForetellError, UsageError
from foretell.recommendation import Recommendation, recommend
from foretell.requests import SamplingParams

LLAMA = {"model_type": "llama", **DIMENSIONS}
TABLE = {
    1: {128: {1: 10.0, 4: 13.0, 8: 13.0, 16: 21.0}, 512: {1: 20.0, 4: 26.0, 8: 30.0, 16: 40.0}},
    4: {128: {1: 15.0, 4: 45.0, 8: 90.0, 16: 180.0}, 512: {1: 1.0, 4: 2.0, 8: 3.0, 16: 4.0}},
}


def tiny_backbone(dtype: torch.dtype = FP32, **changes: Any) -> Backbone:
    backbone = Model(LLAMA | changes).build(dtype=dtype)
    backbone.fingerprint = "tiny"
    return backbone


# --- a table of seconds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "context", "nodes", "seconds"),
    [
        (1, 128, 1, 10.0), (1, 128, 4, 13.0), (1, 128, 16, 21.0),  # as measured
        (1, 128, 2, 11.0), (1, 128, 3, 12.0), (1, 128, 6, 13.0), (1, 128, 12, 17.0), (1, 128, 15, 20.0),  # between
        (1, 128, 24, 29.0), (1, 128, 64, 69.0),  # beyond: as between the last two
        (1, 1, 1, 10.0), (1, 319, 1, 10.0), (1, 321, 1, 20.0), (1, 9999, 1, 20.0),  # the nearest context
        (4, 128, 1, 15.0), (2, 128, 1, 35 / 3), (3, 128, 4, 103 / 3), (3, 512, 1, 22 / 3),  # batches between
        (8, 512, 1, 4 / 3), (16, 128, 4, 180.0),  # beyond the largest: as many nodes in all
    ],
)  # fmt: skip
def test_seconds_between_measured_sizes(rows: int, context: int, nodes: int, seconds: float) -> None:
    assert StepCosts(TABLE).of(rows, context, nodes) == pytest.approx(seconds)


def test_nodes_beyond_what_was_measured_are_never_cheaper() -> None:
    falling = StepCosts({1: {128: {8: 4.0, 16: 3.0}}})
    assert falling.of(1, 128, 64) == 3.0
    assert StepCosts({1: {128: {1: 4.0}}}).of(1, 128, 64) == 4.0  # where nothing says more


times = st.floats(1e-4, 1.0)
sizes = st.sampled_from(NODES)
tables = st.dictionaries(
    st.integers(1, 8), st.dictionaries(st.integers(1, 2000), st.dictionaries(sizes, times, min_size=1), min_size=1),
    min_size=1,
)  # fmt: skip


@examples(50)
@given(tables, st.integers(1, 10), st.integers(0, 3000), st.integers(1, 64))
def test_interpolation_stays_between_its_neighbours(
    table: dict[int, dict[int, dict[int, float]]], rows: int, context: int, nodes: int
) -> None:
    rows = min(rows, max(table))
    nodes = min(nodes, min(max(sizes) for x in table.values() for sizes in x.values()))
    found = StepCosts(table).of(rows, context, nodes)
    around = {max((r for r in table if r <= rows), default=min(table)), min(r for r in table if r >= rows)}
    low, high = [], []
    for r in around:
        seconds = table[r][min(table[r], key=lambda c: abs(c - context))]
        below = [n for n in seconds if n <= nodes] or [min(seconds)]
        above = [n for n in seconds if n >= nodes] or [max(seconds)]
        ends = sorted([seconds[max(below)], seconds[min(above)]])
        low.append(ends[0])
        high.append(ends[1])
    assert min(low) * (1 - 1e-9) <= found <= max(high) * (1 + 1e-9)


@examples(50)
@given(
    tables, st.integers(1, 10), st.integers(0, 3000), st.dictionaries(st.integers(2, 64), st.floats(1, 5), min_size=1)
)
def test_the_best_size_is_that_of_most_tokens_per_second(
    table: dict[int, dict[int, dict[int, float]]], rows: int, context: int, tokens_per_step: dict[int, float]
) -> None:
    step = StepCosts(table)
    best = step.best_size(rows, context, tokens_per_step)
    rate = (tokens_per_step | {1: 1.0})[best] / step.of(rows, context, best)
    assert rate >= 1 / step.of(rows, context, 1)
    largest = max(nodes for x in table.values() for sizes in x.values() for nodes in sizes)
    known = [nodes for nodes in tokens_per_step if nodes <= largest]
    assert best == 1 or best in (known or tokens_per_step)  # what was not measured is not trusted
    for nodes in known or tokens_per_step:
        assert tokens_per_step[nodes] / step.of(rows, context, nodes) <= rate


def test_dearer_nodes_make_smaller_trees() -> None:
    tokens_per_step = {4: 1.6, 8: 1.8, 16: 2.2}
    step = StepCosts(TABLE)
    assert [step.best_size(rows, context, tokens_per_step) for rows in TABLE for context in TABLE[rows]] == [8, 4, 1, 1]
    assert step.best_size(1, 128, {4: 1.6, 8: 1.8, 16: 9.0}) == 16
    assert step.best_size(1, 128, {4: 1.3}) == 1  # a plain step earns as much
    assert step.best_size(1, 128, {4: 1.6}, drafting=4.0) == 1


def test_nodes_that_pass_some_layers_only_are_priced_so() -> None:
    """Eight nodes of half a cost are as dear as four and a half."""
    step, tokens_per_step = StepCosts(TABLE), {4: 1.6, 8: 1.8, 16: 2.2}
    halved = step.rates(1, 128, tokens_per_step, node_cost=0.5)
    assert halved == {n: tokens / step.of(1, 128, (n + 1) / 2) for n, tokens in tokens_per_step.items()}
    assert step.best_size(1, 128, tokens_per_step, node_cost=0.5) == max(halved, key=halved.__getitem__)
    assert step.best_size(1, 128, {4: 1.3}, node_cost=0.01) == 4


def test_what_is_saved_is_loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    @examples(25)
    @given(tables)
    def check(table: dict[int, dict[int, dict[int, float]]]) -> None:
        path = tmp_path_factory.mktemp("costs") / "deep" / "costs.json"
        StepCosts(table).save(path)
        assert StepCosts.load(path) == StepCosts(table)
        StepCosts(TABLE).save(path)  # replaces
        assert StepCosts.load(path) == StepCosts(TABLE)
        assert [each.name for each in path.parent.iterdir()] == ["costs.json"]

    check()


def test_what_was_never_measured_is_none(tmp_path: Path) -> None:
    assert StepCosts.load(tmp_path / "costs.json") is None


def test_drafting_that_takes_long_makes_larger_trees_and_another_drafter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens_per_step = {4: 1.8, 16: 2.8}
    slow = StepCosts(TABLE, {"hydra": {1: 20.0}})
    assert [slow.best_size(1, 128, tokens_per_step, drafting) for drafting in (0.0, 5.0, 20.0)] == [4, 16, 1]
    assert slow.rate(1, 128, 16, 2.4, 20.0) == pytest.approx(2.4 / 41)
    assert slow.over(StepCosts({9: TABLE[1]}, {"hydra": {1: 1.0}, "medusa": {2: 2.0}})) == StepCosts(
        {9: TABLE[1], **TABLE}, {"hydra": {1: 20.0}, "medusa": {2: 2.0}}
    )
    backbone = tiny_backbone()
    backbone.costs = tmp_path / "costs.json"
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "trained")
    assert recommend(backbone).name == "prompt_lookup"
    assert not backbone.costs.exists()  # nothing to choose from, nothing to measure
    monkeypatch.setattr("foretell.backbone.step_costs._step_seconds", lambda *_: 1.0)
    for method, tokens in (("medusa", 2.0), ("hydra", 2.4), ("kangaroo", 2.5)):
        config = {"fingerprint": "tiny", "method": method, "tokens_per_step": {"8": tokens}}
        (tmp_path / "trained" / method).mkdir(parents=True)
        (tmp_path / "trained" / method / "config.json").write_text(json.dumps(config))
    assert recommend(backbone).name == "hydra"  # kangaroo's few tokens more cost more than they are worth
    for drafting, best in (({"hydra": 9.0}, "hydra"), ({"hydra": 9.0, "medusa": 1.0}, "medusa"),
                           ({"hydra": 6.0, "medusa": 1.0}, "hydra")):  # fmt: skip
        drafting |= {"kangaroo": 9.0} if "medusa" in drafting else {}
        StepCosts(TABLE, {method: {1: seconds} for method, seconds in drafting.items()}).save(backbone.costs)
        assert recommend(backbone).name == best


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "17", "{}", '{"seconds": 5}', '{"seconds": null}', '{"seconds": [1]}', '{"seconds": {}}',
        '{"seconds": {"1": {}}}', '{"seconds": {"1": {"128": {}}}}', '{"seconds": {"1": {"128": {"1": "fast"}}}}',
        '{"seconds": {"1": {"128": {"1": null}}}}', '{"seconds": {"one": {"128": {"1": 1}}}}',
        '{"seconds": {"1": {"128": {"1": 0}}}}', '{"seconds": {"1": {"128": {"1": -1}}}}',
        '{"seconds": {"1": {"128": {"1": NaN}}}}', '{"seconds": {"1": {"128": {"1": 1}, "512": {}}}}',
        '{"seconds": {"1": {"128": {"1": Infinity}}}}', '{"seconds": {"1": 5}}', "\ufffd\0",
        '{"seconds": {"1": {"128": {"1": 1}}}, "drafting": {"medusa": -1}}',
        '{"seconds": {"1": {"128": {"1": 1}}}, "drafting": {"medusa": "long"}}',
        '{"seconds": {"1": {"128": {"1": 1}}}, "drafting": 3}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(content)
    with pytest.raises(ForetellError, match=r"costs\.json (is damaged; delete it|cannot be read|must hold)") as error:
        StepCosts.load(path)
    assert "\n" not in str(error.value)


def test_a_file_cut_anywhere_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    StepCosts(TABLE).save(path)
    whole = path.read_bytes()
    for size in range(len(whole.rstrip())):
        path.write_bytes(whole[:size])
        with pytest.raises(ForetellError, match=r"costs\.json"):
            StepCosts.load(path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ForetellError, match="annot write to .*file"):
        StepCosts(TABLE).save(tmp_path / "file" / "costs.json")


# --- this machine -------------------------------------------------------------------------------------------


def test_every_size_is_measured() -> None:
    backbone, seen = tiny_backbone(max_position_embeddings=1024), list[float]()
    found = measure(backbone, rows=(1, 3), contexts=(20, 600), nodes=(1, 5, 17), repeats=2, progress=seen.append)
    assert {rows: {context: list(x) for context, x in y.items()} for rows, y in found.seconds.items()} == {
        rows: {context: [1, 5, 17] for context in (20, 600)} for rows in (1, 3)
    }
    assert all(0 < s < math.inf for y in found.seconds.values() for x in y.values() for s in x.values())
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_whole_steps_of_the_asked_sizes_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: sizes take turns, and the slow first round does not count."""
    backbone, seen = tiny_backbone(), list[tuple[int, int, int]]()
    step, clock = _step_seconds, iter([100.0] * 2 + [1.0, 2.0, 5.0, 6.0, 3.0, 4.0])

    def spy(backbone: Backbone, cache: Any, size: int, rows: int, context: int) -> float:
        seen.append((size, rows, context))
        assert step(backbone, cache, size, rows, context) > 0
        return next(clock)

    monkeypatch.setattr("foretell.backbone.step_costs._step_seconds", spy)
    found = measure(backbone, rows=(2,), contexts=(9,), nodes=(1, 7), repeats=3)
    assert seen == [(1, 2, 9), (7, 2, 9)] * 4
    assert found == StepCosts({2: {9: {1: 3.0, 7: 4.0}}})  # medians


def test_sizes_beyond_one_that_cannot_pay_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One slow step does not leave any out, a second one does; by default all are timed."""
    times = {1: 1.0, 4: 5.0, 8: 9.0, 16: 30.0}
    slow = [9.0]  # the first step of 4 nodes, by chance
    monkeypatch.setattr(
        "foretell.backbone.step_costs._step_seconds",
        lambda backbone, cache, size, rows, context: slow.pop() if size == 4 and slow else times[size],
    )
    found = measure(tiny_backbone(), rows=(1,), contexts=(9,), nodes=tuple(times), repeats=1, most=8)
    assert found.seconds == {1: {9: {1: 1.0, 4: 5.0, 8: 9.0}}}
    assert found.of(1, 9, 16) == 17.0  # two more nodes, two more seconds
    assert list(measure(tiny_backbone(), rows=(1,), contexts=(9,), nodes=(1, 8, 16)).seconds[1][9]) == [1, 8, 16]


@pytest.mark.parametrize("longest", [64, 192, 600, 4096])
def test_contexts_beyond_the_model_are_left_out(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    monkeypatch.setattr("foretell.backbone.step_costs._step_seconds", lambda *_: 1.0)
    found = measure(tiny_backbone(max_position_embeddings=longest), rows=(1,), repeats=1)
    fitting = [context for context in CONTEXTS if context + 64 <= longest]
    assert list(found.seconds[1]) == (fitting or [1])
    assert all(list(x) == list(NODES) for x in found.seconds[1].values())


def test_costs_belong_to_a_model_a_type_a_machine_and_its_threads(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = tiny_backbone()
    found = [costs_file(base)]
    assert found == [costs_file(tiny_backbone())]
    assert found[0].parent == cache / "costs"
    assert costs_file(base, tmp_path / "mine") == tmp_path / "mine" / "costs" / found[0].name
    found.append(costs_file(tiny_backbone(BF16)))
    for name, value in (("fingerprint", "other"), ("threads", 7), ("kernels", "abacus")):
        backbone = tiny_backbone()
        setattr(backbone, name, value)
        found.append(costs_file(backbone))
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    found.append(costs_file(base))
    monkeypatch.setattr("foretell.backbone.step_costs.processor", lambda: "abacus")
    found.append(costs_file(base))
    assert len(set(found)) == len(found) == 7


# --- a first reading ----------------------------------------------------------------------------------------


def machine_of(
    monkeypatch: pytest.MonkeyPatch, relative: tuple[float, ...], plain: float = 0.01, backbone: Backbone | None = None
) -> Backbone:
    """A backbone on a machine where steps of 1, 4, 8 and 16 nodes take so many times `plain` seconds."""
    seconds = dict(zip((1, 4, 8, 16), (plain * each for each in relative), strict=True))
    monkeypatch.setattr(
        "foretell.backbone.step_costs._step_seconds", lambda b, cache, size, rows, context: seconds[size]
    )
    monkeypatch.setattr("foretell.backbone.step_costs._readings", {})
    backbone = backbone or tiny_backbone()
    backbone.costs = costs_file(backbone)
    return backbone


def test_a_first_reading_takes_turns_and_its_medians_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, step = list[int](), _step_seconds
    clock = iter([9.0, *(0.001 * (turn + size) for turn in (0, 100, 5, 2, 1) for size in (1, 16, 4, 8))])

    def spy(backbone: Backbone, cache: Any, size: int, rows: int, context: int) -> float:
        seen.append(size)
        assert (rows, context) == (1, 256)
        assert step(backbone, cache, size, rows, context) > 0
        return next(clock)

    monkeypatch.setattr("foretell.backbone.step_costs.FIRST_SECONDS", 99.0)
    monkeypatch.setattr("foretell.backbone.step_costs._step_seconds", spy)
    found = first_reading(tiny_backbone(max_position_embeddings=512))
    assert seen == [1] + [1, 16, 4, 8] * 5
    assert found.first
    assert {n: round(s, 4) for n, s in found.seconds[1][256].items()} == {1: 0.003, 4: 0.006, 8: 0.01, 16: 0.018}


@pytest.mark.parametrize(
    ("plain", "timed", "between"),
    [
        (0.001, {1: 5, 4: 5, 8: 5, 16: 5}, 1.8),
        (0.03, {1: 3, 4: 2, 8: 2, 16: 3}, 1.8),  # the demo model without wide registers: 1 s would be too long
        (0.5, {1: 1, 16: 1}, 1.64),  # billions of weights: two sizes, and what lies between
        (5.0, {1: 1, 16: 1}, 1.64),
    ],
)
def test_a_first_reading_keeps_to_its_time(
    plain: float, timed: dict[int, int], between: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    relative, seen = {1: 1.0, 4: 1.8, 8: 2.9, 16: 4.2}, list[int]()
    monkeypatch.setattr(
        "foretell.backbone.step_costs._step_seconds", lambda b, c, size, *_: seen.append(size) or plain * relative[size]
    )
    found = first_reading(tiny_backbone())
    assert seen.pop(0) == 1  # warms up
    assert {size: seen.count(size) for size in sorted(set(seen))} == timed
    assert list(found.seconds[1][1]) == list(timed)
    assert found.of(1, 1, 4) == pytest.approx(plain * between)


def test_a_reading_is_taken_once_and_kept_until_tune_replaces_it(
    cache: Path, tiny: str, foretell: Foretell, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = package.load(tiny, dtype="fp32", threads=1).backbone
    assert backbone.costs is not None
    for relative in ((1, 2, 3, 4), (1, 1, 1, 1)):  # another process would read other costs, if it did
        with monkeypatch.context() as context:
            first = step_costs(machine_of(context, relative, backbone=backbone))
        assert first == StepCosts({1: {256: {1: 0.01, 4: 0.02, 8: 0.03, 16: 0.04}}}, first=True)
        assert first == StepCosts.load(backbone.costs)
    assert foretell("tune", "--quick", "-m", tiny, "--dtype", "fp32", "--threads", "1").code == 0
    tuned = step_costs(backbone)
    assert tuned is not None
    assert not tuned.first
    assert {rows: list(x) for rows, x in tuned.seconds.items()} == {1: [128]}


def test_where_nothing_can_be_kept_a_process_reads_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, taken = machine_of(monkeypatch, (1, 2, 3, 4)), list[int]()
    (tmp_path / "file").touch()
    backbone.costs = tmp_path / "file" / "costs.json"
    monkeypatch.setattr(
        "foretell.backbone.step_costs.first_reading", lambda b: taken.append(1) or StepCosts(TABLE, first=True)
    )
    for _ in range(3):
        assert tree_size(backbone, 0, TOKENS_PER_STEP, "medusa", 0.0, 64)(1, 128) == 8
    assert taken == [1]


def test_a_reading_is_taken_only_where_a_tree_is_chosen_by_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone(num_hidden_layers=3)
    backbone.costs = costs_file(backbone)
    heads, taken = str(untrained(backbone, tmp_path / "heads")), list[int]()
    monkeypatch.setattr("foretell.backbone.step_costs._readings", {})
    monkeypatch.setattr(
        "foretell.backbone.step_costs.first_reading", lambda b: taken.append(1) or StepCosts(TABLE, first=True)
    )
    for name, options in (
        ("plain", {}), ("prompt_lookup", {"nodes": 8}), ("medusa", {"checkpoint": heads, "nodes": 5}),
        ("medusa", {"checkpoint": heads, "nodes": 5, "lookup": True}), ("layerskip", {"chain": True}), ("del", {}),
    ):  # fmt: skip
        drafters.build(name, backbone, **options)
        assert not taken, name
    drafters.build("prompt_lookup", backbone)
    drafters.build("medusa", backbone, checkpoint=heads, lookup=True)
    assert taken == [1]


def test_processes_that_read_at_once_leave_one_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace = tmp_path / "costs.json", Path.replace

    def second(partial: Path, target: Path) -> Path:
        """What another process writes between our writing and our renaming."""
        monkeypatch.setattr(Path, "replace", replace)
        StepCosts(TABLE).save(path)
        assert StepCosts.load(path) == StepCosts(TABLE)
        return partial.replace(target)

    monkeypatch.setattr(Path, "replace", second)
    StepCosts(TABLE, first=True).save(path)
    assert StepCosts.load(path) == StepCosts(TABLE, first=True)
    assert [each.name for each in tmp_path.iterdir()] == ["costs.json"]


# --- what decoding adds to a first reading ------------------------------------------------------------------


def wrong_reading() -> StepCosts:
    """Says that sixteen nodes cost 1.3 plain steps."""
    return StepCosts({1: {256: {1: 0.01, 4: 0.011, 8: 0.012, 16: 0.013}}}, first=True)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("context", [40, 256, 1500])
def test_costs_come_near_those_of_the_steps_taken(rows: int, context: int) -> None:
    costs, noise = wrong_reading(), random.Random(0)
    truth = {4: 1.4, 8: 2.1, 16: 3.8}
    for _ in range(300):
        nodes = noise.choice(list(truth))
        disturbed = 8.0 if noise.random() < 0.05 else noise.uniform(0.85, 1.15)
        costs.learn(rows, context, nodes, truth[nodes] * disturbed, 0.4 * disturbed, "hydra")
    for nodes, step in truth.items():
        assert costs.of(rows, context, nodes) / costs.of(rows, context, 1) == pytest.approx(step, rel=0.2)
    assert costs.learnt == 300
    assert costs.drafting["hydra"].keys() == {rows}
    assert costs.drafting["hydra"][rows] / costs.of(rows, context, 1) == pytest.approx(0.4, rel=0.2)


def test_drafting_for_a_batch_takes_more_as_steps_of_small_trees_do(tmp_path: Path) -> None:
    costs = StepCosts(TABLE, {"hydra": {1: 26.0}, "medusa": {4: 9.0}})
    assert costs.drafting_of("hydra", 1, 128) == 26.0
    assert costs.drafting_of("hydra", 4, 128) == pytest.approx(26 * 45 / 13)
    assert costs.drafting_of("medusa", 1, 128) == pytest.approx(9 * 13 / 45)
    assert costs.drafting_of("kangaroo", 1, 128) is None
    costs.save(tmp_path / "costs.json")
    assert StepCosts.load(tmp_path / "costs.json") == costs
    older = json.loads((tmp_path / "costs.json").read_text()) | {"drafting": {"hydra": 26.0}}  # of one row
    (tmp_path / "costs.json").write_text(json.dumps(older))
    assert StepCosts.load(tmp_path / "costs.json") == StepCosts(TABLE, {"hydra": {1: 26.0}})


def test_a_batch_between_two_is_learnt_by_both() -> None:
    costs = wrong_reading()
    for _ in range(300):
        costs.learn(3, 256, 16, 3.0)
    assert costs.of(3, 256, 16) / costs.of(3, 256, 1) == pytest.approx(3.0, rel=0.01)
    assert costs.of(2, 256, 16) / costs.of(2, 256, 1) > wrong_reading().of(2, 256, 16) / wrong_reading().of(2, 256, 1)
    assert costs.of(8, 256, 16) == wrong_reading().of(8, 256, 16)


@pytest.mark.parametrize("context", [186, 740, 1500])
def test_a_context_between_two_is_learnt_where_it_is_kept(context: int) -> None:
    costs = wrong_reading()
    for _ in range(300):
        costs.learn(1, context, 16, 1.6)
    assert max(sizes[16] / sizes[1] for sizes in costs.seconds[1].values()) == pytest.approx(1.6, rel=0.01)


def test_a_batch_that_is_learnt_changes_no_other() -> None:
    costs = wrong_reading()
    for _ in range(100):
        costs.learn(8, 256, 16, 9.0)
    assert set(costs.seconds) == set(ROWS)
    for rows in (1, 2, 4):
        relative = costs.of(rows, 256, 16) / costs.of(rows, 256, 1)
        assert relative == pytest.approx(wrong_reading().of(rows, 256, 16) / wrong_reading().of(rows, 256, 1))
    assert costs.of(8, 256, 16) / costs.of(8, 256, 1) == pytest.approx(9.0, rel=0.01)
    costs.learn(64, 256, 16, 9.0)  # larger than any that is kept
    assert set(costs.seconds) == set(ROWS)


def test_a_step_between_two_sizes_teaches_both_and_a_larger_one_the_largest() -> None:
    costs, before = wrong_reading(), wrong_reading()
    costs.learn(1, 256, 12, 4.0)
    changed = {n: costs.of(1, 256, n) > before.of(1, 256, n) for n in (1, 4, 8, 16)}
    assert changed == {1: False, 4: False, 8: True, 16: True}
    costs, before = wrong_reading(), wrong_reading()
    costs.learn(1, 256, 40, 40.0)
    assert [n for n in (1, 4, 8, 16) if costs.of(1, 256, n) != before.of(1, 256, n)] == [16]


@examples(50)
@given(st.integers(1, 9), st.integers(0, 5000), st.floats(1, 64), st.floats(1e-3, 1e3), st.floats(0, 1e3))
def test_whatever_a_step_says_costs_can_be_saved(
    rows: int, context: int, nodes: float, step: float, drafting: float
) -> None:
    costs = wrong_reading()
    for _ in range(3):
        costs.learn(rows, context, nodes, step, drafting, "hydra")
    assert all(0 < s < math.inf for y in costs.seconds.values() for x in y.values() for s in x.values())
    with tempfile.TemporaryDirectory() as folder:
        costs.save(Path(folder) / "costs.json")
        assert StepCosts.load(Path(folder) / "costs.json") == costs


def test_what_tune_measured_is_left_alone() -> None:
    tuned = StepCosts(TABLE, {"hydra": {1: 1.0}})
    tuned.learn(1, 128, 8, 9.0, 9.0, "hydra")
    assert tuned == StepCosts(TABLE, {"hydra": {1: 1.0}})
    assert not tuned.learnt


class OneStepInTwo:
    """A backbone and its drafter, on a machine where a step of n nodes takes n seconds and drafting half a second."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("foretell.backbone.step_costs._readings", {})
        self.backbone = tiny_backbone()
        self.backbone.costs = path
        wrong_reading().save(path)
        drafter = RandomTrees(1)
        drafter.method = "hydra"
        self.learning = CostLearning(self.backbone, drafter)

    def steps(self, rows: int, nodes: int, count: int, slowness: float = 1.0) -> None:
        for _ in range(count):
            self.learning.record(rows, 256, nodes * rows, slowness * nodes, 0.5 * slowness if nodes > 1 else 0.0)


def test_steps_are_compared_with_plain_ones_just_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = OneStepInTwo(tmp_path / "costs.json", monkeypatch)
    machine.steps(1, 1, 3)
    machine.steps(1, 8, 50)
    assert known_costs(machine.backbone) is None  # nobody chooses by them: nothing is read for this
    costs = step_costs(machine.backbone)
    assert costs is not None
    machine.steps(1, 8, 50)
    assert not costs.learnt  # too long after plain ones
    for slowness in (1.0, 3.0, 0.5) * 20:  # the machine changes, the relation does not
        machine.steps(1, 1, 3, slowness)
        machine.steps(1, 8, 20, slowness)
    assert costs.learnt == 60 * 16
    assert costs.of(1, 256, 8) / costs.of(1, 256, 1) == pytest.approx(8.0, rel=1e-3)
    assert costs.drafting["hydra"][1] / costs.of(1, 256, 1) == pytest.approx(0.5, rel=1e-3)
    machine.steps(2, 8, 20)  # no plain steps of two rows
    machine.steps(1, 1, 3)
    for context in (100, 2000):  # of another request
        machine.learning.record(1, context, 8, 8.0, 0.5)
    assert costs.learnt == 60 * 16


def test_another_process_begins_with_what_was_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = OneStepInTwo(tmp_path / "costs.json", monkeypatch)
    costs = step_costs(machine.backbone)
    assert costs is not None
    for _ in range(20):
        machine.steps(1, 1, 3)
        machine.steps(1, 16, 16)
    assert step_costs(machine.backbone) is costs  # writing it did not replace it
    monkeypatch.setattr("foretell.backbone.step_costs._readings", {})
    other = step_costs(machine.backbone)
    assert other is not None
    assert other.first
    assert other.of(1, 256, 16) / other.of(1, 256, 1) == pytest.approx(16.0, rel=0.01)
    StepCosts(TABLE).save(tmp_path / "costs.json")  # `foretell tune`
    assert step_costs(machine.backbone) is other  # drafters that hold it follow
    assert other == StepCosts(TABLE)


def test_a_tree_thought_not_to_pay_is_tried_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foretell.backbone.step_costs._readings", {})
    for first, sizes in ((True, [1] * (PROBED - 2) + [4, 4]), (False, [1] * PROBED)):
        backbone = tiny_backbone()
        backbone.costs = tmp_path / f"{first}.json"
        StepCosts({1: {256: {1: 1.0, 4: 4.0, 16: 16.0}}}, first=first).save(backbone.costs)
        size = tree_size(backbone, 0, TOKENS_PER_STEP, "medusa", 0.1, 64)
        assert [size(1, 100 + step) for step in range(2 * PROBED)] == sizes * 2
        assert {size(2, 100) for _ in range(2 * PROBED)} == {1}  # more rows have more to read for it


def test_trees_follow_what_is_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = OneStepInTwo(tmp_path / "costs.json", monkeypatch)
    size = tree_size(machine.backbone, 0, {4: 1.9, 8: 2.3, 16: 2.8}, "hydra", 0.1, 64)
    prices = prices_of(machine.backbone)
    assert prices is not None
    assert size(1, 256) == 16
    assert prices(1, 256)[15] == pytest.approx(0.013)
    for _ in range(20):
        machine.steps(1, 1, 3)
        machine.steps(1, 16, 16)
    assert size(1, 256) == 8  # sixteen plain steps for sixteen nodes; eight were never taken
    assert prices(1, 256)[15] == pytest.approx(0.16, rel=0.01)


def test_an_engine_learns_what_its_steps_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = OneStepInTwo(tmp_path / "costs.json", monkeypatch)
    drafter = drafters.build("prompt_lookup", machine.backbone)
    costs = step_costs(machine.backbone)
    assert costs is not None
    finish(decoder_of(machine.backbone, drafter), [([1, 2, 3] * 5, SamplingParams(max_new_tokens=64, ignore_eos=True))])
    assert costs.learnt


def test_costs_are_read_from_a_cache_that_holds_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote may hold none, and those cost more."""
    backbone, seen = tiny_backbone(), set[bool]()
    new_cache = backbone.new_cache

    def unwritten(rows: int, slots: int) -> KVCache:
        cache = new_cache(rows, slots)
        for tensor in (cache.keys, cache.values):
            tensor.fill_(math.nan)
        return cache

    def seconds(backbone: Backbone, cache: KVCache, *_: int) -> float:
        seen.add(bool(cache.keys.isfinite().all() and cache.values.isfinite().all()))
        return 0.01

    monkeypatch.setattr(backbone, "new_cache", unwritten)
    monkeypatch.setattr("foretell.backbone.step_costs._step_seconds", seconds)
    first_reading(backbone)
    measure(backbone, (1, 2), (128,), (1, 4), repeats=1)
    assert seen == {True}


# --- the tree that follows ----------------------------------------------------------------------------------

TOKENS_PER_STEP = {4: 1.6, 8: 1.8, 16: 2.2}


def test_a_drafter_takes_the_size_that_pays_most(cache: Path) -> None:
    backbone = tiny_backbone()
    assert tree_size(backbone, 0, TOKENS_PER_STEP, "medusa", 0.15, 64)(1, 128) == DEFAULT_NODES  # costs cannot be known
    step = StepCosts(TABLE, {"medusa": {1: 0.0}})
    backbone.costs = costs_file(backbone)
    step.save(backbone.costs)
    size = tree_size(backbone, 0, TOKENS_PER_STEP, "medusa", 0.15, 64)
    for rows in range(1, 7):
        for context in range(0, 640, 64):
            assert size(rows, context) == step.best_size(rows, context, TOKENS_PER_STEP)
            assert size(rows, context + 63) == size(rows, context)  # asked anew at each block of 64 only
    assert {size(rows, context) for rows in (1, 4) for context in (128, 512)} == {1, 4, 8}
    assert tree_size(backbone, 0, {16: 2.2}, "hydra", 0.0, 64)(1, 128) == 16
    assert tree_size(backbone, 0, {16: 2.2}, "hydra", 0.5, 64)(1, 128) == 1  # five seconds more
    assert tree_size(backbone, 24, TOKENS_PER_STEP, "medusa", 0.15, 64)(1, 128) == 24  # who says how many gets as many


def test_few_tokens_are_not_worth_reading_a_long_prompt_for(tmp_path: Path) -> None:
    """A state costs a layer's share of a node, and a token saves the difference of the rates."""
    backbone = tiny_backbone()
    backbone.costs = tmp_path / "costs.json"
    StepCosts({1: {256: {1: 1.0, 4: 1.6, 16: 4.0}}}).save(backbone.costs)
    size = tree_size(backbone, 0, {4: 3.2}, "hydra++", 0.4, 64)
    state, saved = 0.2 / backbone.config.layers, 1 - 2.0 / 3.2
    for left in (1, 10, 100):
        enough = int(left * saved / state)
        assert [size(1, 256, unread, left) for unread in (0, enough, enough + 1)] == [4, 4, 1]
    assert size(1, 256, 10**6) == 4
    for always in (tree_size(backbone, 8, {}, "hydra++", 0.4, 64), tree_size(tiny_backbone(), 0, {}, "", 0.4, 64)):
        assert always(1, 256, 10**6, 1) == always(1, 256)  # who says how many gets as many


@pytest.mark.parametrize(
    ("relative", "known", "unknown"),
    [
        ((1.0, 1.1, 1.2, 1.3), 16, 16),  # tiles: nodes are nearly free
        ((1.0, 1.8, 2.9, 4.2), 4, 4),
        ((1.0, 3.0, 5.0, 8.0), 1, 4),  # nothing pays; what nobody has measured gets its try
    ],
)
def test_trees_follow_what_steps_cost(
    cache: Path, relative: tuple[float, ...], known: int, unknown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = machine_of(monkeypatch, relative)
    tokens_per_step = {
        4: 2.25,
        8: 2.67,
        16: 2.99,
        64: 9.9,
    }  # Hydra++'s, and a size not in a first reading
    assert tree_size(backbone, 0, tokens_per_step, "hydra++", 0.15, 64)(1, 128) == known
    assert tree_size(backbone, 0, {}, "layerskip", 0.5, 64)(1, 128) == unknown
    assert tree_size(backbone, 0, {}, "medusa", 0.15, 3)(1, 128) == 3  # its trees have no more


def test_rows_that_sample_get_smaller_trees(tmp_path: Path) -> None:
    """Guesses add less to a step that samples: 0.80 of a greedy one's at temperature 0.6, 0.45 at 1."""
    backbone = tiny_backbone()
    backbone.costs = tmp_path / "costs.json"
    StepCosts({rows: {256: {1: 1.0, 4: 1.25, 16: 2.0}} for rows in (1, 2)}, {"hydra": {1: 0.1, 2: 0.1}}).save(
        backbone.costs
    )
    size = tree_size(backbone, 0, {4: 2.0, 16: 3.4}, "hydra", 0.1, 64)

    def of(*temperatures: float, **truncation: Any) -> int:
        sampled = [SamplingParams(temperature=temperature, **truncation) for temperature in temperatures]
        return size_for(size, [Line([5] * 256, params=params) for params in sampled])

    # four nodes make 1 + share tokens in 1.35 plain steps, sixteen 1 + 2.4 share in 2.1
    assert [size(1, 256, share=share) for share in (0.34, 0.36, 0.65, 0.67, 1.0)] == [1, 4, 4, 16, 16]
    assert [of(temperature) for temperature in (0.0, 0.6, 1.0, 2.0)] == [16, 16, 4, 1]
    assert [of(1.0, **each) for each in ({"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"top_k": 400})] == [
        16,
        16,
        16,
        4,
    ]
    assert [of(0.0, 1.0), of(0.0, 2.0), of(2.0, 2.0)] == [16, 4, 1]  # of a batch the mean counts
    assert (
        size_for(tree_size(backbone, 8, {}, "hydra", 0.1, 64), [Line([5], params=SamplingParams(temperature=9))]) == 8
    )


@pytest.mark.parametrize("nodes", [-1, 1, 65])
def test_sizes_that_no_tree_has(cache: Path, nodes: int) -> None:
    with pytest.raises(UsageError, match=f"Its trees have 2 to 64 nodes, not {nodes}"):
        tree_size(tiny_backbone(), nodes, TOKENS_PER_STEP, "medusa", 0.15, 64)


def untrained(backbone: Backbone, folder: Path) -> Path:
    """A Medusa checkpoint whose tree earns what `TOKENS_PER_STEP` says."""
    module = trainable(Medusa, backbone, torch.arange(backbone.config.vocab), heads=2, draft_vocab=40)
    tensors, arch = module.checkpoint()
    paths = [*([i] for i in range(8)), *([0, i] for i in range(8))]
    Checkpoint(
        "medusa", "tiny", backbone.fingerprint, backbone.config.hidden, backbone.config.vocab, arch, paths,
        {str(size): tokens for size, tokens in TOKENS_PER_STEP.items()},
    ).save(folder, tensors)  # fmt: skip
    return folder


@pytest.mark.parametrize(("options", "nodes"), [({}, None), ({"nodes": 5}, 5)])
def test_medusa_drafts_that_tree(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], nodes: int | None
) -> None:
    backbone = tiny_backbone()
    backbone.costs = costs_file(backbone)
    StepCosts(TABLE).save(backbone.costs)
    drafter = drafters.build("medusa", backbone, checkpoint=str(untrained(backbone, tmp_path / "heads")), **options)
    expected = nodes or StepCosts(TABLE).best_size(1, 128, TOKENS_PER_STEP, 1.5)  # Medusa's usual share of a plain step
    assert drafter.size(1, 130) == expected
    drafted, draft = set[int](), drafter.draft

    def spy(rows: Any) -> Draft:
        found = draft(rows)
        drafted.update(map(len, found.trees))
        return found

    monkeypatch.setattr(watched(drafter), "draft", spy)
    finish(decoder_of(backbone, drafter), [([1, 2, 3], SamplingParams(max_new_tokens=9, ignore_eos=True))])
    assert drafted == {expected}


# --- foretell tune ------------------------------------------------------------------------------------------


def test_tune_measures_prints_and_keeps(
    foretell: Foretell, tiny: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foretell.backbone.step_costs.MOST", math.inf)  # on a busy machine a size may cost more
    ran = foretell("tune", "--quick", "-m", tiny, "--dtype", "fp32", "--threads", "1")
    assert ran.code == 0
    backbone = package.load(tiny, dtype="fp32", threads=1).backbone
    path = costs_file(backbone)
    assert [path] == list((cache / "costs").iterdir())
    assert f"Kept in {path}; -o nodes=N overrides it.\n" in ran.err
    kept = StepCosts.load(path)
    assert kept is not None
    assert {rows: list(x) for rows, x in kept.seconds.items()} == {1: [128]}  # the model reads 512 tokens
    assert list(kept.seconds[1][128]) == list(NODES)
    head, row = ran.out.splitlines()
    assert head.split() == ["batch", "context", "ms", *map(str, NODES[1:])]
    seconds = kept.seconds[1][128]
    relative = [f"{seconds[n] / seconds[1]:.2f}" for n in NODES[1:]]
    assert row.split() == ["1", "128", f"{seconds[1] * 1e3:.1f}", *relative]
    drafter = drafters.build("medusa", backbone, checkpoint=str(untrained(backbone, tmp_path / "heads")))
    assert drafter.size(1, 100) == kept.best_size(1, 64, TOKENS_PER_STEP, 0.15 * kept.of(1, 64, 1))


def test_a_quick_look_keeps_what_is_known_of_other_batches(
    foretell: Foretell, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = costs_file(package.load(tiny, dtype="fp32", threads=1).backbone)
    StepCosts({1: {128: {1: 9.0}}, 8: {128: {1: 1.0, 64: 2.0}}}).save(path)
    assert foretell("tune", "--quick", "-m", tiny, "--dtype", "fp32", "--threads", "1").code == 0
    kept = StepCosts.load(path)
    assert kept is not None
    assert kept.seconds[8] == {128: {1: 1.0, 64: 2.0}}
    assert kept.seconds[1][128][1] < 9.0


def test_tune_says_which_tree_a_drafter_will_take(foretell: Foretell, tiny: str, cache: Path, tmp_path: Path) -> None:
    backbone = package.load(tiny, dtype="fp32", threads=1).backbone
    heads = untrained(backbone, tmp_path / "heads")
    options = ("-m", tiny, "--dtype", "fp32", "--threads", "1", "-d", "medusa", "-o", f"checkpoint={heads}")
    ran = foretell("tune", "--quick", *options)
    assert ran.code == 0
    kept = StepCosts.load(costs_file(backbone))
    assert kept is not None
    assert kept.drafting.keys() == {"medusa"}
    assert kept.drafting["medusa"][1] > 0  # it drafted, though it may not pay
    head, row = ran.out.splitlines()
    assert head.split()[-2:] == ["tree", "gain"]
    best = kept.best_size(1, 128, TOKENS_PER_STEP, kept.drafting["medusa"][1])
    assert row.split()[-2] == (str(best) if best > 1 else "off")
    assert (": left off" in ran.err) == (best == 1)


@pytest.mark.parametrize(("tokens", "size"), [(9.0, 16), (1.01, 1)])
def test_tune_says_where_no_tree_pays(
    foretell: Foretell,
    tiny: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokens: float,
    size: int,
) -> None:
    monkeypatch.setattr("foretell.backbone.step_costs._step_seconds", lambda b, c, size, *_: 0.01 * (1 + size / 16))
    monkeypatch.setattr(sys.modules[__name__], "TOKENS_PER_STEP", {16: tokens})
    heads = untrained(package.load(tiny, dtype="fp32", threads=1).backbone, tmp_path / "heads")
    ran = foretell(
        "tune", "--quick", "-m", tiny, "--dtype", "fp32", "--threads", "1", "-d", "medusa", "-o", f"checkpoint={heads}"
    )
    kept = StepCosts.load(next((cache / "costs").iterdir()))
    assert kept is not None
    gain = f"{tokens * 0.010625 / (0.02 + kept.drafting['medusa'][1]):.2f}"
    assert ran.out.splitlines()[1].split()[-2:] == [str(size) if size > 1 else "off", gain]
    assert (f"batch 1, context 128: tree of 16 nodes, gain {gain}: left off\n" in ran.err) == (size == 1)


def test_tune_says_when_another_drafter_becomes_the_recommended_one(
    foretell: Foretell, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = package.load(tiny, dtype="fp32", threads=1).backbone
    monkeypatch.setattr("foretell.backbone.step_costs._step_seconds", lambda b, c, size, *_: 0.01 * (1 + size / 16))
    options = ("tune", "--quick", "-m", tiny, "--dtype", "fp32", "--threads", "1")
    first = foretell(*options).err.splitlines()[-1]
    assert first.startswith("Used where no drafter is named: prompt_lookup: no trained drafter comes with foretell")
    chosen = iter(("kangaroo", "hydra++"))
    monkeypatch.setattr(
        "foretell.recommendation.recommend",
        lambda backbone: Recommendation(name := next(chosen), {name: 1.2}, "measuring"),
    )
    last = foretell(*options).err.splitlines()[-1]
    assert last.startswith("Used where no drafter is named (until now kangaroo): hydra++: estimated at 1.20x plain")
    assert StepCosts.load(costs_file(backbone)) is not None


def test_a_recommendation_below_plain_says_that_steps_stay_plain() -> None:
    assert str(Recommendation("medusa", {"medusa": 0.96, "hydra": 0.9}, "measuring")) == (
        "medusa: estimated at 0.96x plain decoding by measuring, so steps stay plain where that holds; hydra 0.90x"
    )


def test_tune_needs_no_chat_template(foretell: Foretell, tiny: str, cache: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare)
    (bare / "tokenizer_config.json").write_text("{}")
    heads = untrained(package.load(str(bare), dtype="fp32", threads=1).backbone, tmp_path / "heads")
    options = ("-m", str(bare), "--dtype", "fp32", "--threads", "1", "-d", "medusa", "-o", f"checkpoint={heads}")
    assert foretell("tune", "--quick", *options).code == 0
    kept = StepCosts.load(next((cache / "costs").iterdir()))
    assert kept is not None
    assert kept.drafting.keys() == {"medusa"}


def refused(ran: Ran, code: int, sentence: str) -> None:
    assert ran.out == ""
    assert re.fullmatch(rf"error: .*{sentence}.*\n", ran.err), ran.err
    assert ran.code == code


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["-d", "medsua"], 2, "Unknown drafter 'medsua': did you mean 'medusa'"),
        (["-o", "nodes=5"], 2, "Drafter 'plain' has no option 'nodes'"),
        (
            ["-d", "medusa"],
            2,
            r"No medusa drafter comes with foretell for this model \(one does for smollm2-135m\); train one",
        ),
        (["-m", "./nowhere"], 2, "here is no folder ./nowhere"),
        (["--cache-dir", "{file}"], 1, "annot write to .*file"),
    ],
)
def test_mistakes_are_one_line(
    foretell: Foretell, tiny: str, cache: Path, tmp_path: Path, arguments: list[str], code: int, sentence: str
) -> None:
    (tmp_path / "file").touch()
    given = [argument.format(file=tmp_path / "file") for argument in arguments]
    ran = foretell("tune", "--quick", "-m", tiny, "--dtype", "fp32", "--threads", "1", *given)
    last = ran.err.splitlines(keepends=True)[-1]  # what was measured before is reported
    refused(Ran(ran.code, ran.out, last), code, sentence)
    assert "Traceback" not in ran.err
    assert not list(cache.glob("costs/*"))  # a slow probe may have kept its verdict


def test_damaged_costs_are_one_line_wherever_they_are_read(
    foretell: Foretell, tiny: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = package.load(tiny, dtype="fp32", threads=1).backbone
    heads, path = untrained(backbone, tmp_path / "heads"), costs_file(backbone)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"seconds": {"1": {}}}))
    options = ("-m", tiny, "--dtype", "fp32", "--threads", "1", "-n", "4")
    ran = foretell("generate", "hi", *options, "-d", "medusa", "-o", f"checkpoint={heads}")
    refused(ran, 1, f"{path} is damaged; delete it and run foretell tune again")
    shutil.copytree(heads, tmp_path / "trained/heads")
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "trained")
    assert foretell("tune", "--quick", *options[:-2]).code == 0  # which mends it, though what ships would read it
    mended = StepCosts.load(path)
    assert mended is not None
    assert mended.drafting.keys() == {"medusa"}
    assert foretell("generate", "hi", *options, "-d", "medusa", "-o", f"checkpoint={heads}").code == 0
