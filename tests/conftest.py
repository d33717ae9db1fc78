"""What every test file may ask for.

Tests marked `real` need the demo model (`smollm2-135m`): it is fetched once into the cache that
FORETELL_CACHE names, or the default one. `make fast` runs without a network, one case of each test that is not `slow`.
"""

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # a core for each worker, before PyTorch counts them: threads that wait for work spin, and would take the other's
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(os.environ["PYTEST_XDIST_WORKER"][2:]) % len(_cores)]})

os.environ["FORETELL_ALL_THREADS"] = "1"  # workers share cores, and what is tested in two threads shall run in two
os.environ["FORETELL_CONFIG"] = os.devnull  # not the config file of whoever runs the tests

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from command_line import Foretell, runner, save_tiny_chat
from torch import Tensor

pytest.register_assert_rewrite("decoding", "random_backbones", "toy_drafters")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=0, help="of each test so many cases, drawn by its name; 0 runs all")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out cases of tests over many (number types, builds, methods) where `--cases` asks for few."""
    if (most := config.getoption("--cases")) < 1:
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {
        id(case)
        for name, of_test in cases.items()
        for case in Random(name).sample(of_test, min(most, len(of_test)))  # even steps would keep to one of two types
    }
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


@pytest.fixture(scope="session", autouse=True)
def interruptions_are_heard() -> None:
    """What a shell puts into the background begins with SIGINT ignored, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def readings_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A first reading of costs says little of a machine that runs tests: it is not kept where the user's would be."""
    from foretell import api
    from foretell.backbone.step_costs import costs_file
    from foretell.loading.cache_dir import cache_folder

    users, kept = cache_folder(None), tmp_path_factory.mktemp("readings")

    def elsewhere(backbone: Any, cache_dir: Any = None) -> Path:
        path = costs_file(backbone, cache_dir)
        return kept / path.name if path.is_relative_to(users) else path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "costs_file", elsewhere)
        yield


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct: config.json, bfloat16 safetensors, tokenizer."""
    from foretell.loading.resolve import resolve

    return resolve("smollm2-135m", weights="bf16").path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Idle threads spin; loading a model starts as many as there are cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, an empty hub cache, and no environment that says otherwise."""
    monkeypatch.setenv("FORETELL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("FORETELL_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def foretell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Foretell:
    """Runs the command line in this process."""
    return runner(capsys, monkeypatch)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random model that reads bytes and has a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_chat(folder)
    return str(folder)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The learning form may multiply in bfloat16, and features and checkpoints are rounded to it; here nothing is, to
    be compared closely."""
    from foretell.drafting.learning.number_types import multiply_in

    monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor)
    with multiply_in("float32"):
        yield
