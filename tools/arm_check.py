"""Checks the ARM builds of the kernels on an emulated processor; writes docs/results/arm.json.

    python tools/arm_check.py [--root ROOT] [--save]

Calls of the kernels are recorded while two builds make them here: every format of weights, 1 to 17 rows, attention,
whole layers, draft heads. Then emulated processors repeat them on the same memory, in each build that they can run, and
must leave the same bytes. The generic build repeats what the generic build for x86-64 did: both round a product, then
its sum. The others repeat what AVX2 did, which rounds both once, and the generic build's products of whole numbers.

Needs a cross compiler and an emulator (Debian: g++-aarch64-linux-gnu, qemu-user); where they are missing, one line says
so and nothing fails. With ROOT, a folder that holds a Python for ARM and foretell's libraries (see CONTRIBUTING.md),
tests of the kernels run there too, in each build; that takes hours.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import setuptools
import torch
from torch import Tensor

from foretell.backbone.cpu import library
from foretell.backbone.cpu.backbone import CompiledBackbone
from foretell.backbone.cpu.formats import FORMATS
from foretell.backbone.cpu.library import Build
from foretell.backbone.cpu.linear import PackedLinear
from foretell.bench.results import commit
from foretell.drafting.kernels import kernels_for
from foretell.loading.blocks import TYPES, Blocks
from foretell.trees import TokenTree, chain

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from quantized import QUANTS, quantizable, random_blocks, whole_numbers  # noqa: E402
from random_backbones import BF16, FP32, Batch, Model  # noqa: E402

RESULTS, REPEAT = ROOT / "docs/results/arm.json", ROOT / "tests/native/repeat.cpp"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PROCESSORS = {"max": "i8mm", "cortex-a76": "dotprod", "cortex-a53": "neon"}
"""Emulated ones, and the best build that each can run."""
TESTS = ("test_quants", "test_linears", "test_backbone", "test_cache", "test_grow")
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
         "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 70, "max_position_embeddings": 512}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": ({"model_type": "llama", **SIZES}, ()),
    "llama, quantized": ({"model_type": "llama", **SIZES}, tuple(QUANTS)),
    "qwen3, odd sizes": (
        {"model_type": "qwen3", **SIZES, "hidden_size": 70, "intermediate_size": 90, "head_dim": 24,
         "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}, (),
    ),
}  # fmt: skip


# -- recording ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A call of the kernels: its memory before and after, and the places of the pointers in it."""

    case: str
    name: str
    pointers: list[int]
    before: bytes
    after: bytes


class Memory:
    """Everything that a structure leads to, as one block that begins with it; pointers become places in the block."""

    def __init__(self, root: ctypes.Structure):
        self._found: dict[int, int] = {}
        pointers: set[int] = set()
        self._visit(root, pointers)
        begin = ctypes.addressof(root)
        self._stretches = [(begin, begin + self._found.pop(begin))]
        for address, size in sorted(self._found.items()):
            last, end = self._stretches[-1]
            if len(self._stretches) > 1 and address <= end:
                self._stretches[-1] = (last, max(end, address + size))
            else:
                self._stretches.append((address, address + size))
        self._places, self._size = [], 0
        for address, end in self._stretches:  # aligned as they are
            self._places.append(self._size if address == begin else -(-self._size // 64) * 64 + address % 64)
            self._size = self._places[-1] + end - address
        self.pointers = sorted(self._place(each) for each in pointers if ctypes.c_uint64.from_address(each).value)

    def _visit(self, value: Any, pointers: set[int]) -> None:
        if isinstance(value, (Tensor, np.ndarray)):
            self._add(library._passed(value), value.nbytes)
        elif isinstance(value, (ctypes.Structure, ctypes.Array)):
            self._add(ctypes.addressof(value), ctypes.sizeof(value))
            pointers |= {ctypes.addressof(value) + place for place in pointers_of(type(value))}
            for each in value.held:
                self._visit(each, pointers)

    def _add(self, address: int, size: int) -> None:
        if address:
            self._found[address] = max(size, self._found.get(address, 0))

    def _place(self, address: int) -> int:
        for (begin, end), place in zip(self._stretches, self._places, strict=True):
            if begin <= address < end:
                return place + address - begin
        raise ValueError("A pointer leads to memory that nobody holds.")

    def copy(self) -> bytes:
        block = bytearray(self._size)
        for (begin, end), place in zip(self._stretches, self._places, strict=True):
            block[place : place + end - begin] = ctypes.string_at(begin, end - begin)
        for place in self.pointers:
            address = int.from_bytes(block[place : place + 8], "little")
            block[place : place + 8] = self._place(address).to_bytes(8, "little")
        return bytes(block)


def pointers_of(kind: Any) -> Iterator[int]:
    """Yields the places of the pointers in a structure or an array."""
    if issubclass(kind, ctypes.Structure):
        for name, field, *_ in kind._fields_:
            yield from (getattr(kind, name).offset + place for place in pointers_of(field))
    elif issubclass(kind, ctypes.Array):
        inner = list(pointers_of(kind._type_))
        yield from (i * ctypes.sizeof(kind._type_) + place for i in range(kind._length_) for place in inner)
    elif kind in (ctypes.c_void_p, ctypes.c_uint64):
        yield 0


class Recorder:
    """Stands in for `library.call`, and keeps what it did."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.case = ""
        for module in list(sys.modules.values()):
            if module is not library and getattr(module, "call", None) is library.call:
                module.call = self  # type: ignore[attr-defined]

    def __call__(self, name: str, build: Build, *values: Any) -> None:
        kinds = {"p": ctypes.c_void_p, "d": ctypes.c_double}
        fields = [(f"argument_{i}", kinds.get(kind, ctypes.c_int64)) for i, kind in enumerate(library.CALLS[name][1:])]
        arguments = type("Arguments", (ctypes.Structure,), {"_fields_": fields})(*map(library._passed, values))
        arguments.held = values
        memory = Memory(arguments)
        before = memory.copy()
        library.call(name, build, *values)
        self.calls.append(Call(self.case, name, memory.pointers, before, memory.copy()))


def record() -> dict[str, list[Call]]:
    """Makes the calls that builds for ARM have to repeat, in the build that they have to agree with."""
    recorder, recorded = Recorder(), {}
    for build in filter(None, map(library.find, ("generic", "avx2"))):
        torch.manual_seed(0)
        recorder.calls = recorded[build.name] = []
        for name in (*QUANTS, "bf16", "fp32", "int8"):
            record_products(recorder, name, build)
        for name, (raw, kinds) in MODELS.items():
            for dtype in (FP32, BF16):
                recorder.case = f"{name}, {'fp32' if dtype is FP32 else 'bf16'}"
                record_model(raw, kinds, dtype, build)
    for name in QUANTS:  # by the generic build, for the others
        recorder.case = f"{name.lower()} in whole numbers"
        weight, x_MK = whole_numbers(name)
        PackedLinear(weight, None, library.find("generic"), FORMATS[name.lower()])(x_MK, 1)
    return recorded


def record_products(recorder: Recorder, name: str, build: Build) -> None:
    """A format: rows of a weight, and linears of 1 to 17 rows, whose sizes fill no panel."""
    recorder.case = name.lower()
    inputs = 3 * TYPES[name].numbers if name in QUANTS else 75
    quantized = name in QUANTS
    weight = random_blocks(name, (70, inputs), inputs**-0.5) if quantized else Blocks.of(torch.randn(70, inputs))
    linear = PackedLinear(weight, torch.randn(70), build, FORMATS[recorder.case])
    linear.matrix.rows(torch.randint(70, (5,)))
    for rows in range(1, 18):
        linear(torch.randn(rows, inputs) * torch.rand(rows, inputs).exp(), 1 + rows % 2)
    linear.top(torch.randn(9, inputs), 3, 2)


def record_model(raw: dict[str, Any], kinds: tuple[str, ...], dtype: torch.dtype, build: Build) -> None:
    """Trees after two prompts in one pass, attention alone, the output matrix, and draft heads."""
    model = Model(raw)
    weights = quantizable(model.weights(), kinds) if kinds else model.weights()
    backbone = CompiledBackbone(model.config, weights.__getitem__, dtype, 2, build)
    batch, config = Batch([TokenTree((-1, 0, 0, 1, 1, 2)), chain(3)], [40, 33], [1, 0]), model.config
    cache, states = batch.together(backbone)
    backbone.attention(torch.randn(len(batch.nodes()), config.heads, config.head_dim).to(dtype), batch.nodes(), cache)
    backbone.argmax(backbone.norm(torch.cat(states)))
    d = config.hidden
    blocks = [[(torch.randn(d, d) / d, torch.randn(d)) for _ in range(2)] for _ in range(2)]
    heads = kernels_for(backbone).heads(blocks, [torch.randn(70, d) / d])
    heads.top(torch.cat(states), [[0], [4], [8]], 5)


# -- repeating ------------------------------------------------------------------------------------------------------


def compile_for_arm(folder: Path) -> tuple[Path, Path]:
    """Returns the program that repeats calls (`tests/native/repeat.cpp`), and the library that Python loads."""
    program, shared = folder / "repeat", folder / "_kernels.so"
    setuptools.setup = lambda **_: None
    with chdir(ROOT):
        setup = runpy.run_path("setup.py")
        objects = setup["compile_objects"]([COMPILER], "aarch64", folder)
        others = [path for path in objects if path.stem != "native"]  # the program includes its source
        subprocess.run([COMPILER, *setup["COMMON"], "-static", REPEAT, *others, "-o", program], check=True)
        subprocess.run([COMPILER, "-shared", "-o", shared, *objects], check=True)
    return program, shared


def builds_of(program: Path, processor: str) -> list[str]:
    """The builds that an emulated processor chooses among, the best first."""
    listed = subprocess.run([EMULATOR, "-cpu", processor, program], check=True, stdout=subprocess.PIPE, text=True)
    builds = listed.stdout.split()
    if builds[0] != PROCESSORS[processor]:
        raise SystemExit(f"ARM check: FAILED, {processor} takes {builds[0]} for the best build.")
    return builds


def repeat(calls: Sequence[Call], program: Path, processor: str, build: str) -> dict[str, int]:
    """Repeats recorded calls in one build; counts those of each case that leave other bytes."""
    recorded, memories = program.with_name("calls"), program.with_name("memories")
    with recorded.open("wb") as out:
        for call in calls:
            out.write(f"{call.name} {len(call.pointers)} {len(call.before)}\n".encode())
            out.write(np.array(call.pointers, dtype=np.uint64).tobytes() + call.before)
    with recorded.open("rb") as source, memories.open("wb") as target:
        subprocess.run([EMULATOR, "-cpu", processor, program, build], stdin=source, stdout=target, check=True)
    with memories.open("rb") as left:
        return dict(Counter(call.case for call in calls if left.read(len(call.after)) != call.after))


def run_tests(root: Path, shared: Path) -> dict[str, str]:
    """Runs tests in an emulated Python; returns how each file ended."""
    folder = shared.parent
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(shared, folder / "src/foretell/backbone/cpu")
    python = folder / "python"  # some tests start it again
    python.write_text(f'#!/bin/sh\nexec {EMULATOR} -L {root} -0 "$0" {root}/usr/bin/python3 "$@"\n')
    python.chmod(0o755)
    # CI: hypothesis does not mind slowness then
    variables = os.environ | {"QEMU_CPU": "max", "PYTHONPATH": str(folder / "src"), "CI": "1"}
    ended = {}
    for name in TESTS:
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not real and not slow", f"tests/{name}.py"]
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        ended[name] = re.sub(r" in [\d.]+s.*", "", done.stdout.strip().splitlines()[-1].strip("= "))
        print(f"{name}: {ended[name]}", flush=True)
        if done.returncode:
            raise SystemExit(f"ARM check: FAILED\n{done.stdout}")
    return ended


def version(tool: str) -> str:
    return subprocess.run([tool, "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="run tests too, in the Python of this folder")
    parser.add_argument("--save", action="store_true", help="write docs/results/arm.json")
    args = parser.parse_args()
    missing = [tool for tool in (COMPILER, EMULATOR) if not shutil.which(tool)]
    if missing:
        print(f"ARM check: not run, for there is no {' and no '.join(missing)} here.")
        return
    if not library.find("avx2"):
        print("ARM check: not run, for this processor has no AVX2 to compare with.")
        return
    os.environ["FORETELL_ALL_THREADS"] = "1"  # draft heads add up by threads, and promise no bits
    recorded, builds, tests = record(), list[dict[str, Any]](), dict[str, str]()
    with tempfile.TemporaryDirectory() as name:
        program, shared = compile_for_arm(Path(name))
        for processor in PROCESSORS:
            for build in builds_of(program, processor):
                like = "generic" if build == "generic" else "avx2"
                differ = repeat(recorded[like], program, processor, build)
                builds.append({"processor": processor, "build": build, "like": like, "differ": differ})
                print(f"{processor}, {build}: {len(recorded[like])} calls of {like}, other bytes {differ}", flush=True)
        if any(row["differ"] for row in builds):
            raise SystemExit("ARM check: FAILED")
        if args.root:
            tests = run_tests(args.root.resolve(), shared)
    print("ARM check: passed.")
    if args.save:
        result = {
            "command": "python tools/arm_check.py --save" + (" --root ROOT" if args.root else ""), "commit": commit(),
            "compiler": version(COMPILER), "emulator": version(EMULATOR),
            "calls": {name: Counter(call.case for call in calls) for name, calls in recorded.items()},
            "builds": builds, "tests": tests,
        }  # fmt: skip
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
