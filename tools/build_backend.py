"""setuptools, plus a C++ compiler as a build requirement where the machine has none.

`pip install foretell` on a bare machine should still compile the kernels: the ziglang package is a complete compiler
in a wheel, fetched only if no other is on the path.
"""

import os
import shutil

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def _compiler() -> list[str]:
    names = (os.environ.get("CXX", "").split() or ["c++"])[0], "c++", "g++", "clang++"
    return [] if os.name == "nt" or any(shutil.which(name) for name in names) else ["ziglang>=0.13"]


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_compiler()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *_compiler()]
