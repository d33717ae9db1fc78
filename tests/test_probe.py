"""The probe finds arithmetic that depends on company, wherever a drafter would meet it; and its verdict is kept.

Each mutant computes as the backbone does but for one bit, in one situation, and never when a node runs alone.
"""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from random_backbones import BF16, FP32, KERNELS, Model, using
from tiny_models import DIMENSIONS, raising
from torch import Tensor

from foretell.backbone import Backbone, Nodes, canonical
from foretell.backbone.canonical import settle
from foretell.backbone.cpu import library
from foretell.backbone.eager.backbone import EagerBackbone
from foretell.backbone.load import assemble
from foretell.backbone.probe import ROWS, TREE, TWINS, probe

SIZES = DIMENSIONS | {"num_hidden_layers": 7, "max_position_embeddings": 2048}
LLAMA = Model({"model_type": "llama", **SIZES})
WINDOWS = Model({
    "model_type": "qwen2", **SIZES, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 5,
})  # fmt: skip
SEVERAL = [rows for rows in ROWS if rows > 1]

Wrong = Callable[[Nodes, range], Tensor | bool]
"""For a pass through some layers: which nodes, or whether all, come out wrong."""


def flipped(x: Tensor, which: Tensor | bool = True) -> Tensor:
    """The last bit of each row's first number, where a row is chosen."""
    x = x.clone()
    chosen = torch.as_tensor(which).expand(len(x))
    x[:, 0] = torch.where(chosen, (x[:, 0].view(torch.int32) ^ 1).view(torch.float32), x[:, 0])
    return x


def mutant(model: Model, wrong: Wrong = lambda nodes, layers: False, **methods: Any) -> Backbone:
    """A backbone whose streams are wrong where `wrong` says so; `methods` replace its own."""
    backbone = model.build()

    class Mutant(type(backbone)):  # type: ignore[misc]
        def run_layers(
            self, hidden_Md: Tensor, nodes: Nodes, cache: Any, begin: int = 0, end: int | None = None, *,
            skip: bytes | None = None, taps: Collection[int] = (),
        ) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
            out, tapped = super().run_layers(hidden_Md, nodes, cache, begin, end, skip=skip, taps=taps)
            return flipped(out, wrong(nodes, range(begin, self.config.layers if end is None else end))), tapped

    for name, method in methods.items():
        setattr(Mutant, name, method(getattr(Mutant, name)))
    backbone.__class__ = Mutant
    return backbone


def at_rows(rows: int) -> Any:
    """Makes the result of a method wrong for so many rows."""

    def replaced(method: Any) -> Any:
        def answer(self: Any, x: Tensor) -> Tensor:
            y: Tensor = method(self, x)
            wrong = len(x) == rows
            return flipped(y, wrong) if y.is_floating_point() else (y + wrong) % self.config.vocab

        return answer

    return replaced


@pytest.fixture(autouse=True)
def best_kernels() -> Any:
    with using(""):
        yield


# -- what is right -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("model", [LLAMA, WINDOWS])
def test_every_build_is_canonical(model: Model, kernel: str, dtype: torch.dtype) -> None:
    with using(kernel):
        assert probe(model.build(kernel, dtype)) is None


def test_a_mutant_that_is_never_wrong_passes() -> None:
    assert probe(mutant(LLAMA)) is None


def test_twins_hold_the_tokens_that_their_originals_hold() -> None:
    twins = TWINS[TREE].tolist()
    assert len(TREE) == max(ROWS)
    for node, twin in enumerate(twins):
        assert twins[twin] == twin
        assert [twins[each] for each in TREE.path(node)] == TREE.path(twin)


# -- mutants -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", SEVERAL)
def test_layers_that_are_wrong_with_so_many_rows(rows: int) -> None:
    backbone = mutant(LLAMA, lambda nodes, layers: len(nodes) == rows)
    assert f"with {rows} rows after 70 tokens), so that output may differ" in str(probe(backbone))


@pytest.mark.parametrize("rows", SEVERAL)
@pytest.mark.parametrize("method", ["norm", "logits", "argmax"])
def test_a_head_that_is_wrong_with_so_many_rows(method: str, rows: int) -> None:
    assert f"with {rows} rows" in str(probe(mutant(LLAMA, **{method: at_rows(rows)})))


def test_an_argmax_that_is_wrong_for_one_row() -> None:
    assert "the most probable token" in str(probe(mutant(LLAMA, argmax=at_rows(1))))


def together(nodes: Nodes) -> bool:
    return len(nodes) > 1


def branching(nodes: Nodes) -> Tensor:
    """Nodes with several children, and their children."""
    trees = [tree for tree in nodes.trees for _ in tree.parents]
    children = [
        len(trees[m].children[node]) > 1 or (node > 0 and len(trees[m].children[trees[m].parents[node]]) > 1)
        for m, node in enumerate(nodes.node)
    ]
    return torch.tensor(children)


MUTANTS: dict[str, tuple[Model, Wrong]] = {
    "after a prefix beyond 1,024": (LLAMA, lambda n, layers: together(n) and int(n.lengths.max()) > 1024),
    "after a prefix that no block divides": (LLAMA, lambda n, layers: together(n) and bool((n.lengths % 32).any())),
    "at the beginning": (LLAMA, lambda n, layers: len(n) > 17 and int(n.lengths.max()) == 0),
    "in the second sequence": (LLAMA, lambda n, layers: torch.from_numpy(n.sequence == 1)),
    "in the first of two sequences": (LLAMA, lambda n, layers: torch.from_numpy(n.sequence < len(n.trees) - 1)),
    "of two sequences of one node each": (LLAMA, lambda n, layers: len(n) == len(n.trees) == 2),
    "with more rows than one call multiplies": (LLAMA, lambda n, layers: len(n) > 64),
    "in the first layer": (LLAMA, lambda n, layers: len(n) == 5 and 0 in layers),
    "in the middle layer": (LLAMA, lambda n, layers: len(n) == 5 and 3 in layers),
    "in the last layer": (LLAMA, lambda n, layers: len(n) == 5 and 6 in layers),
    "in a layer between": (LLAMA, lambda n, layers: together(n) and 2 in layers),
    "in layers with a window": (WINDOWS, lambda n, layers: len(n) == 5 and not {5, 6}.isdisjoint(layers)),
    "in the first layer with a window": (WINDOWS, lambda n, layers: len(n) == 5 and 5 in layers),
    "where a tree branches": (LLAMA, lambda n, layers: branching(n)),
    "of the last node of a tree": (LLAMA, lambda n, layers: torch.arange(len(n)) == (len(n) - 1 or 1)),
    "of a prompt": (LLAMA, lambda n, layers: len(n) > 17 and all(len(tree.leaves) == 1 for tree in n.trees)),
}


@pytest.mark.parametrize("where", MUTANTS)
def test_a_mutant_that_is_wrong(where: str) -> None:
    assert "depends on what else shares the pass" in str(probe(mutant(*MUTANTS[where])))


@pytest.mark.parametrize("which", [0, 1])
def test_keys_or_values_that_are_written_otherwise(which: int) -> None:
    def replaced(method: Any) -> Any:
        def answer(self: Any, x: Tensor, nodes: Nodes, cache: Any, begin: int = 0, end: Any = None, **o: Any) -> Any:
            out = method(self, x, nodes, cache, begin, end, **o)
            if len(nodes) == 3:  # after the last node has read its own
                row, slot = int(nodes.cache_rows[0]), int(nodes.lengths[0]) + 2
                cache.lengths[row] = slot + 1
                written_GD = cache.read(row)[which][begin, :, slot]
                written_GD.copy_(torch.nextafter(written_GD, torch.tensor(torch.inf)))
            return out

        return answer

    assert "with 3 rows" in str(probe(mutant(LLAMA, run_layers=replaced)))


@pytest.mark.parametrize("least", [2, 17, 40])
def test_a_library_whose_algorithm_changes_at_some_number_of_rows(least: int) -> None:
    backbone: Any = LLAMA.build("eager")
    usual = backbone.layers[0].down.__class__.__call__

    class Switching(backbone.layers[0].down.__class__):  # type: ignore[name-defined,misc]
        def __call__(self, x: Tensor) -> Tensor:
            y = usual(self, x)
            return y + 1e-6 if least <= len(x) < 64 else y

    backbone.layers[3].down.__class__ = Switching
    assert probe(backbone) is not None


# -- what is done about it, and what is kept ---------------------------------------------------------------------------


class Probes:
    """Stands in for the probe: says what it is told to, by how far calls are padded, and counts."""

    def __init__(self, needed: int = 0):
        self.needed, self.asked = needed, 0

    def __call__(self, backbone: Any, *_: object) -> str | None:
        self.asked += 1
        return None if backbone.layers[0].down.min_rows >= self.needed else "It depends."


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verdict counts as one that took long."""
    monkeypatch.setattr(canonical, "MIN_STORED_SECONDS", 0.0)


@pytest.mark.parametrize(("needed", "rows", "asked"), [(0, 4, 1), (5, 16, 2), (64, 64, 3), (65, 4, 3)])
@pytest.mark.usefixtures("kept")
def test_calls_are_padded_as_far_as_it_helps_and_the_verdict_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: int, rows: int, asked: int
) -> None:
    probes = Probes(needed)
    monkeypatch.setattr(canonical, "probe", probes)
    for _ in range(2):
        backbone: Any = EagerBackbone(LLAMA.config, LLAMA.weights().__getitem__, FP32, torch.device("cpu"), 1)
        verdict = settle(backbone, tmp_path)
        assert verdict.nondeterminism == ("It depends." if needed > 64 else None)
        assert backbone.layers[0].down.min_rows == backbone._head.min_rows == rows
        assert verdict.seconds > 0
        assert probes.asked == asked  # the second time nothing is probed


@pytest.mark.usefixtures("kept")
def test_a_verdict_holds_for_what_it_was_found_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = Probes()
    monkeypatch.setattr(canonical, "probe", probes)

    def asked() -> int:
        before = probes.asked
        settle(backbone, tmp_path)
        return probes.asked - before

    backbone: Any = LLAMA.build("eager")
    backbone.fingerprint = "one"
    assert [asked(), asked()] == [1, 0]
    for name, value in (("fingerprint", "two"), ("threads", 7), ("kernels", "abacus"), ("dtype", BF16)):
        with monkeypatch.context() as changed:
            changed.setattr(backbone, name, value)
            assert [asked(), asked()] == [1, 0], name
    for place, name in ((canonical, "processor"), (canonical, "code"), (torch.backends.cpu, "get_cpu_capability")):
        with monkeypatch.context() as changed:
            changed.setattr(place, name, lambda: "another")
            assert [asked(), asked()] == [1, 0], name
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert [asked(), asked()] == [1, 0]


@pytest.mark.usefixtures("kept")
def test_a_cache_that_cannot_be_used_costs_no_more_than_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = Probes()
    monkeypatch.setattr(canonical, "probe", probes)
    backbone = LLAMA.build("eager")
    (tmp_path / "file").touch()
    for _ in range(2):
        settle(backbone, tmp_path / "file" / "cache")
        assert backbone.nondeterminism is None
    assert probes.asked == 2
    settle(backbone, tmp_path)
    [path] = (tmp_path / "probes").iterdir()
    for damage in ("{", "[]", "{}", '{"nondeterminism": null}'):
        path.write_text(damage)
        settle(backbone, tmp_path)
        assert json.loads(path.read_text()).keys() == {"nondeterminism", "rows", "seconds"}
    assert probes.asked == 7


def test_a_verdict_that_took_no_time_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canonical, "probe", Probes())
    settle(LLAMA.build("eager"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("kept")
def test_a_model_that_is_loaded_is_probed(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = assemble(Path(tiny), threads=1, cache_dir=tmp_path)
    assert backbone.nondeterminism is None
    assert len(list((tmp_path / "probes").iterdir())) == 1
    monkeypatch.setattr(canonical, "probe", raising(AssertionError("it was known")))
    again = assemble(Path(tiny), threads=1, cache_dir=tmp_path)
    assert (again.nondeterminism, again.probe_seconds) == (None, backbone.probe_seconds)


def test_another_compilation_is_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels.so").write_bytes(b"one")
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "kernels.so")
    monkeypatch.setattr(canonical, "digest", library.digest.__wrapped__)
    before = canonical.code.__wrapped__()
    assert canonical.code.__wrapped__() == before
    (tmp_path / "kernels.so").write_bytes(b"two")
    assert canonical.code.__wrapped__() != before
