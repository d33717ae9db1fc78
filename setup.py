"""Compiles the kernels into one shared library that Python loads with ctypes.

No header of PyTorch or Python is involved: each instruction set is one translation unit with its own flags, and
the best one is chosen at run time. Where there is no C++ compiler, `tools/build_backend.py` brings one as a package
(ziglang); where compiling fails all the same, the package installs without kernels and says so.
"""

import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/foretell/backbone/cpu/native")
COMMON = ["-O3", "-std=c++20", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]
COMMON += ["-I", str(NATIVE)]
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
X86 = {
    "kernels_avx2": AVX2,
    "kernels_avxvnni": f"{AVX2} -mavxvnni",
    "kernels_avx512": AVX512,
    "kernels_avx512vnni": f"{AVX512} -mavx512vnni",
    "kernels_avx512bf16": f"{AVX512} -mavx512vnni -mavx512bf16",
    "kernels_amx": f"{AVX512} -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16",
}
ARM = {
    "kernels_generic": "-ffp-contract=off",  # it rounds as on x86-64, where it has no fused products either
    "kernels_neon": "",
    "kernels_dotprod": "-march=armv8.2-a+dotprod",
    "kernels_i8mm": "-march=armv8.2-a+dotprod+i8mm",
}
BUILDS = {"x86_64": X86, "AMD64": X86, "aarch64": ARM, "arm64": ARM}
"""The translation units that are compiled for one instruction set of a machine, and their flags."""


def units(machine: str) -> dict[Path, list[str]]:
    """Every source file that a machine's compiler can compile, and the flags for it."""
    flags = BUILDS.get(machine, {})
    others = {*X86, *ARM} - {*flags, "kernels_generic"}
    return {p: flags.get(p.stem, "").split() for p in sorted(NATIVE.rglob("*.cpp")) if p.stem not in others}


def compile_objects(tool: list[str], machine: str, folder: Path) -> list[Path]:
    """Compiles the units, all at once."""
    folder.mkdir(parents=True, exist_ok=True)
    running, objects = [], []
    for unit, flags in units(machine).items():
        if "ziglang" in tool:  # for which an architecture is an extension of a processor
            flags = [flag.replace("-march=armv8.2-a", "-mcpu=generic+v8_2a") for flag in flags]
        objects.append(folder / f"{unit.stem}.o")
        command = [*tool, *COMMON, *flags, "-c", str(unit), "-o", str(objects[-1])]
        running.append((command, subprocess.Popen(command)))
    for command, process in running:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, command[0] + " " + command[-3])
    return objects


def compiler() -> list[str] | None:
    """$CXX, a compiler on the path, or the one that the ziglang package brings."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name.split()
    # zig compiles for the building machine unless told otherwise, and then even the generic build needs that machine
    return [sys.executable, "-m", "ziglang", "c++", "-mcpu=baseline"] if find_spec("ziglang") else None


class BuildKernels(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        try:
            self._compile(Path(self.get_ext_fullpath(ext.name)))
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"foretell: kernels were not compiled ({error}); the slower eager modules will run", file=sys.stderr)

    def _compile(self, library: Path) -> None:
        tool = compiler()
        if tool is None or sys.platform == "win32":
            raise OSError("no C++ compiler was found")
        objects = map(str, compile_objects(tool, platform.machine(), Path(self.build_temp)))
        library.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*tool, "-shared", "-s", "-o", f"{library}.new", *objects, "-lpthread"], check=True)
        os.replace(f"{library}.new", library)

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            if built.exists():
                target = Path("src", self.get_ext_filename(ext.name))
                shutil.copy(built, f"{target}.new")
                os.replace(f"{target}.new", target)  # processes that run the old one keep it


class PlatformWheel(bdist_wheel):
    """One wheel for every Python: the library is reached with ctypes and depends on the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


sources = [str(path) for path in sorted(NATIVE.rglob("*.*"))]
setup(
    ext_modules=[Extension("foretell.backbone.cpu._kernels", sources)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
