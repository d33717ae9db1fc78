"""The border to native code: nothing that crosses it the wrong way ends the process or reads memory of others.

What could is tried in a process of its own, with limits that the system keeps: exit status and output tell.
"""

import ctypes
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_backbones import COMPILED

from foretell.backbone.cpu import library
from foretell.backbone.cpu.formats import FORMATS, WITH_INT8, PackedMatrix
from foretell.errors import ForetellError

pytestmark = [
    pytest.mark.skipif(not COMPILED, reason="needs compiled kernels"),
    pytest.mark.skipif(sys.platform != "linux", reason="limits and signals as Linux has them"),
]

SETUP = """
import gc, os, resource, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
import numpy as np
import torch
torch.set_num_threads(1)
from random_backbones import BF16, FP32, Batch, Model, build, prefilled, run, same
from tiny_models import DIMENSIONS
from foretell.backbone import Nodes
from foretell.errors import ForetellError
from foretell.trees import TokenTree, chain

def model(**changes):
    return Model({"model_type": "llama", **DIMENSIONS, "max_position_embeddings": 1 << 20, **changes})

def limit(more):
    "No more address space than is taken now, and so much; None lifts it."
    taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
    top = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (top if more is None else taken + more, top))

def tasks():
    return len(os.listdir("/proc/self/task"))
"""


def outcome(code: str, *flags: str) -> str:
    """What a process prints that runs the code after `SETUP`; it must end well."""
    command = [sys.executable, *flags, "-c", SETUP + code, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return done.stdout


NATIVE = Path(library.__file__).parent / "native"
HEADER = (NATIVE / "common.h").read_text()


def test_every_structure_that_python_fills_is_compared_with_its_twin_in_c() -> None:
    structures = {structure.__name__ for structure in library.Described.__subclasses__()}
    compared = {line.split()[0] for line in library.layout() if ":" in line}
    assert compared == structures
    assert structures | {"Kernels"} == set(re.findall(r"^struct (\w+) {", HEADER, re.MULTILINE))  # Kernels: C alone


def test_a_structure_is_given_whole() -> None:
    with pytest.raises(TypeError, match="Span has 5 fields, not 2"):
        library.Span(0, 1)


def test_every_exported_call_is_compared_with_its_twin_in_c() -> None:
    exported = set(re.findall(r"^int foretell_(\w+)\(", (NATIVE / "native.cpp").read_text(), re.MULTILINE))
    assert exported == set(library.CALLS)


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines, and what it gives to `setuptools.setup`."""
    given = dict[str, Any]()
    monkeypatch.setattr(pytest.importorskip("setuptools"), "setup", given.update)
    monkeypatch.chdir(Path(__file__).parents[1])
    return runpy.run_path("setup.py") | given


def test_every_machine_compiles_its_builds(setup: dict[str, Any]) -> None:
    def builds(machine: str) -> set[str]:
        return {path.stem.removeprefix("kernels_") for path in setup["units"](machine) if "kernels_" in path.stem}

    assert builds("x86_64") | builds("aarch64") == set(library.BUILDS)
    assert builds("x86_64") & builds("aarch64") == builds("riscv64") == {"generic"}
    assert (builds("AMD64"), builds("arm64")) == (builds("x86_64"), builds("aarch64"))


def test_builds_with_products_of_eight_bits_on_both_sides_are_known(setup: dict[str, Any]) -> None:
    assert {name.removeprefix("kernels_") for name, flags in setup["X86"].items() if "-mavx512vnni" in flags} == set(
        WITH_INT8
    )


def test_one_wheel_serves_every_python(setup: dict[str, Any]) -> None:
    """The library is reached with ctypes: the wheel names the platform, and no interpreter."""
    setuptools = pytest.importorskip("setuptools")
    wheel = setup["cmdclass"]["bdist_wheel"](setuptools.Distribution({"ext_modules": setup["ext_modules"]}))
    wheel.ensure_finalized()
    python, abi, platform = wheel.get_tag()
    assert (python, abi) == ("py3", "none")
    assert platform != "any"


def test_every_weight_format_has_a_row_on_either_side() -> None:
    rows = re.findall(r'(?:^    {|QUANTS\()"(\w+)", ', (NATIVE / "products" / "formats.inc").read_text(), re.MULTILINE)
    assert set(rows) == set(FORMATS)


def test_weights_that_do_not_meet_these_activations_are_refused() -> None:
    """Their panels would be read beyond their end: the kernels look at the format themselves."""
    x, out, build = torch.zeros(1, 8), torch.zeros(1, 40), library.default()
    for name, bf16 in (("fp32", 1), ("bf16", 0), ("int8", 0), ("fp32_rows", 0)):
        matrix = PackedMatrix(torch.randn(40, 8), FORMATS[name], build).about
        with pytest.raises(ForetellError, match=r"failed in linear: weights of this format do not meet activations"):
            library.call("linear", build, x, 1, matrix, None, out, 0, None, None, 0, 2, bf16)


def swapped(fields: list[tuple[str, type]]) -> list[tuple[str, type]]:
    return [fields[1], fields[0], *fields[2:]]


def longer(fields: list[tuple[str, type]]) -> list[tuple[str, type]]:
    return [*fields, ("one_more", ctypes.c_int64)]


def retyped(fields: list[tuple[str, type]]) -> list[tuple[str, type]]:
    return [(fields[0][0], ctypes.c_double), *fields[1:]]


def renamed(fields: list[tuple[str, type]]) -> list[tuple[str, type]]:
    return [("other", fields[0][1]), *fields[1:]]


@pytest.mark.parametrize("change", [swapped, longer, retyped, renamed])
@pytest.mark.parametrize("name", ["Layer", "Rows"])
def test_a_structure_that_differs_from_the_compiled_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[list[tuple[str, type]]], list[tuple[str, type]]]
) -> None:
    others = [each for each in library.Described.__subclasses__() if each.__name__ != name]
    twin = type(name, (ctypes.Structure,), {"_fields_": change(getattr(library, name)._fields_)})
    monkeypatch.setattr(library.Described, "__subclasses__", lambda: [*others, twin])
    with pytest.raises(ForetellError, match=r"was compiled from other sources; install foretell again"):
        library.loaded.__wrapped__()


def test_a_call_that_differs_from_the_compiled_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library.CALLS, "norm", library.CALLS["norm"][:-1])
    with pytest.raises(ForetellError, match="other sources"):
        library.loaded.__wrapped__()


def test_a_library_too_old_to_describe_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "LIBRARY", Path("libm.so.6"))
    monkeypatch.setattr(Path, "exists", lambda path: True)
    with pytest.raises(ForetellError, match="other sources"):
        library.loaded.__wrapped__()


GUARDS = """
from foretell.drafting.kernels import kernels_for
from foretell.drafting.protocols import DraftRequest, LevelDrafting, LowerLayerDrafting
from foretell.backbone.cpu.linear import PackedLinear

backbone, other = model().build("", BF16, 2), model(hidden_size=64, head_dim=16).build("", FP32, 2)
tokens, d = torch.arange(4), 32
hidden, nodes, cache = backbone.embed(tokens), Nodes.chains([0], [0], [4]), backbone.new_cache(1, 8)
kernels = kernels_for(backbone)
heads = kernels.heads([], [torch.randn(40, d)])
stacked = kernels.heads([[(torch.randn(d, 2 * d), torch.zeros(d))]], heads)
store, block, vocabulary = torch.randn(5, d), [(torch.randn(d, d), torch.zeros(d))], np.arange(40)
levels = [kernels.heads([[(torch.randn(d, 2 * d), torch.zeros(d))]], heads)]
grower = kernels.grower(LevelDrafting(levels, 1, 4, vocabulary, ()))
lower_drafter = kernels.lower_layers(LowerLayerDrafting(heads, 4, vocabulary))
norms = {f"{name}_layernorm.weight": torch.ones(d) for name in ("input", "post_attention")}
projections = {f"self_attn.{x}_proj.weight": torch.randn(n, d) for x, n in zip("qkvo", (32, 16, 16, 32))}
mlp = {"mlp.gate_proj.weight": torch.randn(48, d), "mlp.up_proj.weight": torch.randn(48, d),
       "mlp.down_proj.weight": torch.randn(d, 48)}
prefix = kernels.prefix_layer(norms | projections | mlp, torch.randn(d, d))
prefix = prefix.attached(1)
prefix.begin(0, 0, 8)
linear = PackedLinear(torch.randn(40, d))

def draft(roots=(1,), budgets=(9,), slots=(0,), count=3, steps=2, room=4, layers=2, cache=cache, **more):
    request = DraftRequest(layers, slots, roots, budgets, count, steps, room, beam=2, **more)
    return lower_drafter.grow_through_layers(request, cache, None)

def level(**changes):
    fields = dict(levels=levels, streams=1, width=4, vocabulary_V=vocabulary, scales=())
    return kernels.grower(LevelDrafting(**{**fields, **changes}))

backbone.run_layers(hidden, nodes, cache)
heads.top(store, [[0], [4]], 40), stacked.top(store, [[0, 1]], 3), draft(), level()
grower.grow([1], [torch.randn(1, d)], 4, 2, 0.0)
prefix([0], [2], torch.randn(2, d), (), [1, 2])

attempts = {
    "cache too short": lambda: backbone.run_layers(hidden, nodes, backbone.new_cache(1, 0)),
    "cache of fewer rows": lambda: backbone.run_layers(hidden, Nodes.chains([1], [0], [4]), cache),
    "row before the first": lambda: backbone.run_layers(hidden, Nodes.chains([-1], [0], [4]), cache),
    "cache of another type": lambda: backbone.run_layers(hidden, nodes, model().build("", FP32).new_cache(1, 8)),
    "cache of another model": lambda: backbone.run_layers(hidden, nodes, other.new_cache(1, 8)),
    "too few states": lambda: backbone.run_layers(hidden[:3], nodes, cache),
    "states of another width": lambda: backbone.run_layers(torch.zeros(4, 16), nodes, cache),
    "states of another type": lambda: backbone.run_layers(hidden.double(), nodes, cache),
    "layers that are not there": lambda: backbone.run_layers(hidden, nodes, cache, 0, 9),
    "layers before the first": lambda: backbone.run_layers(hidden, nodes, cache, -2, 1),
    "a tap that is not there": lambda: backbone.run_layers(hidden, nodes, cache, taps=[7]),
    "a skip plan too short": lambda: backbone.run_layers(hidden, nodes, cache, skip=bytes(1)),
    "committed slots before the first": lambda: Nodes.chains([0], [-3], [4]),
    "nodes before the first": lambda: Nodes([chain(3)], [0], [0], [-2]),
    "a position before the first": lambda: Nodes([chain(1)], [0], [0], positions=torch.tensor([0, -5])),
    "too few positions": lambda: Nodes([chain(1)], [0], [0], positions=torch.tensor([0])),
    "an id behind the vocabulary": lambda: backbone.embed(torch.tensor([64])),
    "an id before the vocabulary": lambda: backbone.embed(torch.tensor([-1])),
    "ids of another type": lambda: backbone.embed(torch.tensor([1.0])),
    "rows of a packed matrix": lambda: linear.matrix.rows(torch.tensor([40])),
    "norm of another width": lambda: backbone.norm(torch.zeros(2, 31)),
    "norm of another type": lambda: backbone.norm(torch.zeros(2, 32).half()),
    "linear of another width": lambda: linear(torch.zeros(2, 31), 1),
    "linear of another type": lambda: linear(torch.zeros(2, 32).half(), 1),
    "more best outputs than outputs": lambda: linear.top(torch.zeros(2, 32), 41, 1),
    "a bias too short": lambda: PackedLinear(torch.randn(40, d), torch.zeros(39)),
    "queries of another type": lambda: backbone.attention(torch.zeros(4, 4, 8), nodes, cache),
    "which behind the states": lambda: heads.top(store, [[5]], 1),
    "which before the states": lambda: heads.top(store, [[-1]], 1),
    "too few states named": lambda: stacked.top(store, [[0]], 1),
    "count above choices": lambda: heads.top(store, [[0]], 41),
    "store of another type": lambda: heads.top(store.double(), [[0]], 1),
    "blocks of another width": lambda: kernels.heads([[(torch.randn(16, d), torch.zeros(16))]], heads),
    "a bias of blocks too short": lambda: kernels.heads([[(torch.randn(d, d), torch.zeros(8))]], heads),
    "matrices of two widths": lambda: kernels.heads([block * 2], [torch.randn(40, d), torch.randn(30, d)]),
    "matrices of other kernels": lambda: kernels_for(other).heads([block], heads),
    "a vocabulary beyond the embedding": lambda: level(vocabulary_V=vocabulary + 30),
    "a vocabulary too short": lambda: level(vocabulary_V=vocabulary[:39]),
    "more guesses than choices": lambda: level(width=41),
    "levels that read more": lambda: level(streams=2),
    "a root behind the vocabulary": lambda: grower.grow([64], [torch.randn(1, d)], 4, 2, 0.0),
    "too few streams": lambda: grower.grow([1], [torch.randn(1, 16)], 4, 2, 0.0),
    "states of too few rows": lambda: grower.grow([1, 2], [torch.randn(1, d)], 4, 2, 0.0),
    "lower layers: no room": lambda: draft(cache=backbone.new_cache(1, 0)),
    "lower layers: no such row": lambda: draft(slots=(1,)),
    "lower layers: no such layer": lambda: draft(layers=4),
    "lower layers: no such tap": lambda: draft(taps=[3]),
    "lower layers: a root behind the vocabulary": lambda: draft(roots=(64,)),
    "lower layers: no budget": lambda: draft(budgets=()),
    "lower layers: a chain longer than its room": lambda: draft(steps=5, thresholds=[0.0]),
    "lower layers: too few thresholds": lambda: draft(slots=(0, 0), roots=(1, 1), budgets=(9, 9), thresholds=[0.0]),
    "prefix: states of another width": lambda: prefix([0], [1], torch.randn(1, 16), (), [1]),
    "prefix: too few tokens": lambda: prefix([0], [2], torch.randn(2, d), (), [1]),
    "prefix: a token behind the vocabulary": lambda: prefix([0], [1], torch.randn(1, d), (), [64]),
    "prefix: streams that are not fused": lambda: prefix([0], [1], torch.randn(1, d), [torch.randn(1, d)], [1]),
}
for name, attempt in attempts.items():
    try:
        attempt()
    except (ForetellError, IndexError, TypeError, ValueError):
        continue
    print(name)
"""


@pytest.mark.slow
def test_every_guard_of_memory_raises_also_where_asserts_do_not_run() -> None:
    assert outcome(GUARDS, "-O") == ""  # else the names of what nobody refused


@pytest.mark.slow
def test_fewer_threads_than_wanted_are_enough() -> None:
    """Where no thread starts one works alone; where some do they share; the bits are those of one."""
    found = outcome("""
tokens = torch.arange(40)
alone = prefilled(model().build("", BF16, 1), tokens)[1]
many = model().build("", BF16, 9)
before = tasks()
limit(4 << 20)  # less than the stack of a thread
first = prefilled(many, tokens)[1]
print(tasks() - before, same(first, alone))
limit(30 << 20)  # three stacks at most
some = prefilled(many, tokens)[1]
print(0 < tasks() - before < 8, same(some, alone))
limit(None)
print(same(prefilled(many, tokens)[1], alone), tasks() - before)
""")
    assert found.split() == ["0", "True", "True", "True", "True", "8"]


@pytest.mark.slow
def test_memory_that_runs_out_is_an_error_and_not_the_end() -> None:
    """In front of the team, and in one of its threads while the others wait for it; afterwards all is as before."""
    found = outcome("""
def attempt(backbone, tokens, nodes, cache):
    try:
        return run(backbone, tokens, nodes, cache)
    except ForetellError as error:
        return str(error)

wide = model(intermediate_size=8192, num_hidden_layers=1).build("", FP32, 3)
tokens, nodes, cache = torch.arange(64).repeat(32), Nodes.chains([0], [0], [2048]), wide.new_cache(1, 2048)
run(wide, tokens[:40], Nodes.chains([0], [0], [40]), cache)
wide.rotations(2048)
limit(40 << 20)  # what the layers need at once is 80 MB
print(attempt(wide, tokens, nodes, cache))
limit(None)
alone = model(intermediate_size=8192, num_hidden_layers=1).build("", FP32, 1)
print(same(run(wide, tokens, nodes, cache), run(alone, tokens, nodes, alone.new_cache(1, 2048))))

deep, slots = model(head_dim=64, num_hidden_layers=2).build("", FP32, 3), 200_000
cache, last = deep.new_cache(1, slots), Nodes.chains([0], [slots - 1], [1])
cache.keys.zero_(), cache.values.zero_()
run(deep, tokens[:40], Nodes.chains([0], [0], [40]), cache)
deep.rotations(slots)
limit(20 << 20)  # what each thread packs of so long a row is 100 MB
print(attempt(deep, tokens[:1], last, cache))
limit(None)
again = run(deep, tokens[:1], last, cache)
print(same(again, run(deep, tokens[:1], last, cache)), bool(again.isfinite().all()))
""")
    sentence = "The kernels found too little memory; use fewer threads, a smaller batch or a shorter prompt."
    assert found.splitlines() == [sentence, "True", sentence, "True True"]


@pytest.mark.slow
def test_an_interrupt_in_a_native_call_ends_it_and_nothing_else() -> None:
    found = outcome("""
from decoding import decoder_of, finish
from foretell.requests import SamplingParams
from foretell.drafters.prompt_lookup import PromptLookup
backbone = model().build("", BF16, 2)
decoder = decoder_of(backbone, PromptLookup())
request = [1, 2, 3] * 700, SamplingParams(max_new_tokens=40, ignore_eos=True)
truth = finish(decoder, [request])[0].ids
inside = threading.Event()
call, main = backbone.run_layers, threading.get_ident()

def told(*arguments, **options):
    inside.set()
    return call(*arguments, **options)

def interrupt():
    inside.wait()
    time.sleep(0.01)
    signal.pthread_kill(main, signal.SIGINT)

backbone.run_layers = told
threading.Thread(target=interrupt).start()
try:
    for _ in range(100):
        number = decoder.submit(*request)
        while decoder.busy:
            decoder.step()
except KeyboardInterrupt:
    print("interrupted")
decoder.cancel(number)
backbone.run_layers = call
print(finish(decoder, [request])[0].ids == truth)
signals = [line.split()[1] for task in os.listdir("/proc/self/task") if int(task) != os.getpid()
           for line in open(f"/proc/self/task/{task}/status") if line.startswith("SigBlk")]
print(any(int(each, 16) >> (signal.SIGINT - 1) & 1 for each in signals))
""")
    assert found.split() == ["interrupted", "True", "True"]


@pytest.mark.slow
def test_a_fork_in_the_middle_of_a_call_leaves_parent_and_child_right() -> None:
    found = outcome("""
backbone = model().build("", BF16, 3)
batch = Batch([chain(5)], [400], [0])
before = batch.together(backbone)[1][0]
done = threading.Event()

def busy():
    while not done.is_set():
        batch.together(backbone)

thread = threading.Thread(target=busy)
thread.start()
for _ in range(5):
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(0 if same(batch.together(backbone)[1][0], before) else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
done.set()
thread.join()
print(same(batch.together(backbone)[1][0], before))
""")
    assert found.split() == ["0"] * 5 + ["True"]


@pytest.mark.slow
def test_threads_that_share_a_core_become_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two on one core hold each other up at every barrier; alone, one of them computes the same."""
    monkeypatch.delenv("FORETELL_ALL_THREADS")
    shown = outcome("""
from foretell.backbone.cpu import library
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
backbone, ids = model(num_hidden_layers=8).build(threads=2), torch.arange(40)
before, steps = prefilled(backbone, ids)[1], 0
while library.require().foretell_room() > 1 and steps < 20_000:
    prefilled(backbone, ids)
    steps += 1
print(library.require().foretell_room(), same(prefilled(backbone, ids)[1], before))
""")
    assert shown.split() == ["1", "True"]
