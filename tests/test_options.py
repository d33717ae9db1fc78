"""Options of methods: one dataclass is read alike from the command line, from Python, from checkpoints and by help."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from foretell import drafters
from foretell.drafting.options import (
    OptionHelp,
    converted,
    described,
    migrated,
    option,
    pairs,
    parse,
    renamed,
    stored_options,
)
from foretell.errors import UsageError


@dataclass(frozen=True)
class Table:
    nodes: int = option(16, "Tree size.", low=2, high=64, stored=True)
    rate: float = option(0.5, "A share.", low=0, high=1)
    grown: bool = option(True, "Whether trees grow.")
    shape: str = option("wide", "Of trees.", choices=("wide", "deep", "flat"))
    folder: str = option("", "A folder.", former="path")
    exits: tuple[int, ...] = option((1, 2), "Layers.", low=1)
    limit: int | None = option(None, "Most tokens; none for no limit.", low=1)


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({}, {}),
        ({"nodes": "8", "rate": "0.25", "grown": "False", "shape": "deep", "exits": "3,5", "limit": "7"},
         {"nodes": 8, "rate": 0.25, "grown": False, "shape": "deep", "exits": (3, 5), "limit": 7}),
        ({"nodes": 8, "rate": 1, "grown": False, "exits": [4], "folder": Path("a/b"), "limit": None},
         {"nodes": 8, "rate": 1.0, "grown": False, "exits": (4,), "folder": "a/b", "limit": None}),
        ({"path": "x", "limit": "none"}, {"folder": "x", "limit": None}),
        ({"folder": "16"}, {"folder": "16"}),
    ],
)  # fmt: skip
def test_texts_and_values_become_the_types_of_their_options(given: dict[str, Any], values: dict[str, Any]) -> None:
    assert converted(Table, given) == values
    assert parse(Table, given) == Table(**values)
    assert all(type(getattr(parse(Table, given), name)) is type(value) for name, value in values.items())


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"node": 3}, "Drafter 'x' has no option 'node'; did you mean 'nodes'? It has nodes, rate, .*limit."),
        ({"zzz": 3}, "Drafter 'x' has no option 'zzz'; it has nodes, rate, .*limit."),
        ({"nodes": "many"}, "Option 'nodes' of drafter 'x' is 'many'; it must be a whole number."),
        ({"nodes": 2.0}, "Option 'nodes' of drafter 'x' is 2.0; it must be a whole number."),
        ({"nodes": True}, "Option 'nodes' of drafter 'x' is True; it must be a whole number."),
        ({"nodes": None}, "Option 'nodes' of drafter 'x' is None; it must be a whole number."),
        ({"nodes": 65}, "nodes is 65; it must lie between 2 and 64."),
        ({"nodes": "1"}, "nodes is 1; it must lie between 2 and 64."),
        ({"rate": math.nan}, "rate is nan; it must lie between 0 and 1."),
        ({"grown": "yes"}, "Option 'grown' of drafter 'x' is 'yes'; it must be true or false."),
        ({"grown": 1}, "Option 'grown' of drafter 'x' is 1; it must be true or false."),
        ({"shape": "tall"}, "shape is 'tall'; it must be wide, deep or flat."),
        ({"folder": 3}, "Option 'folder' of drafter 'x' is 3; it must be text."),
        ({"exits": "1,a"}, "Option 'exits' of drafter 'x' is '1,a'; it must be whole numbers."),
        ({"exits": [0]}, "exits is .*; it must be at least 1."),
    ],
)
def test_what_is_no_option_is_one_sentence(given: Mapping[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=f"^{sentence.replace('?', '[?]')}$"):
        parse(Table, given, "Drafter 'x'")


def test_options_are_listed_for_help_and_kept_in_checkpoints() -> None:
    listed = described(Table)
    assert listed[0] == OptionHelp("nodes", "int", "16", "Tree size.")
    assert [(each.type, each.default) for each in listed[1:]] == [
        ("float", "0.5"), ("true|false", "true"), ("wide|deep|flat", "wide"), ("text", ""), ("int,int,...", "1,2"),
        ("int", "none"),
    ]  # fmt: skip
    assert stored_options(Table(nodes=4)) == {"nodes": 4}
    assert renamed(Table, {"path": 1, "any-thing": 2}) == {"folder": 1, "any_thing": 2}


@dataclass(frozen=True)
class Changed:
    """As an earlier version had it with `deep`, 0 by default, and with `tied` and `output`."""

    REMOVED: ClassVar[Mapping[str, Any]] = {"tied": True, "output": "own"}
    layers: int = option(2, "Blocks.", low=1, former="deep", unset=0)
    width: int = option(0, "Of a block.", low=0)
    share: float = option(0.5, "Of a loss.", added=True)


@pytest.mark.parametrize("zero", [0, "0"])
@pytest.mark.parametrize("true", [True, "true"])
def test_what_earlier_versions_had_is_read(zero: Any, true: Any) -> None:
    former = {"deep": zero, "tied": true, "output": "own", "width": zero, "of-others": 0}
    assert migrated(Changed, former) == {"layers": 2, "width": zero, "of_others": 0, "share": 0.5}
    assert migrated(Changed, former | {"share": 0.1})["share"] == 0.1
    del former["of-others"]
    assert converted(Changed, former) == {"layers": 2, "width": 0}
    assert [each.name for each in described(Changed)] == ["layers", "width", "share"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"tied": "false"}, "Drafter 'x' no longer has the option 'tied': it is always true."),
        ({"tied": 1}, "Drafter 'x' no longer has the option 'tied': it is always true."),
        ({"output": "shared"}, "Drafter 'x' no longer has the option 'output': it is always own."),
        ({"layers": False}, "Option 'layers' of drafter 'x' is False; it must be a whole number."),
        ({"layers": -1}, "layers is -1; it must be at least 1."),
    ],
)
def test_other_values_of_what_is_gone_are_refused(given: Mapping[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(Changed, given, "Drafter 'x'")
    assert str(error.value) == sentence
    assert migrated(Changed, given) == given | {"share": 0.5}  # so that a recorded one is named where it differs


def test_key_value_texts() -> None:
    assert pairs(["a=1", "b-c==2", "d="]) == {"a": "1", "b-c": "=2", "d": ""}
    for text in ("a", "=1"):
        with pytest.raises(UsageError, match="is not key=value"):
            pairs([text])


@pytest.mark.parametrize("name", drafters.DRAFTERS)
def test_every_method_lists_its_options(name: str) -> None:
    cls: Any = drafters.drafter_class(name)
    for table in (cls.Options, *([cls.Training] if hasattr(cls, "trainable") else [])):
        assert all(each.help and each.name not in ("kind", "self") for each in described(table))
        assert parse(table, {each.name: each.default for each in described(table)}) == table()  # as it is shown


def test_former_names_of_shipped_options_are_read() -> None:
    plus: Any = drafters.drafter_class("hydra++")
    assert parse(plus.Training, {"linear": True, "fused": "true"}) == plus.Training(linear_tail=True, fuse_prefix=True)
    for method in ("hydra", "hydra++"):
        cls: Any = drafters.drafter_class(method)
        options = {"layers": "0", "output": "tied", "grounded": "true", "tied": "false", "chained": "false"}
        assert parse(cls.Training, options | {"fused": "false"}) == cls.Training()
        with pytest.raises(UsageError, match="no longer has the option 'grounded': it is always true"):
            parse(cls.Training, {"grounded": "false"})
    lookup: Any = drafters.drafter_class("prompt_lookup")
    assert parse(lookup.Options, {"least": "0.1"}) == lookup.Options(min_probability=0.1)
