"""Copies a trained drafter into the package: its tensors stored small, its curves, its adapter if it has one.

python tools/ship.py FOLDER         the folder that `foretell train` wrote
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import foretell
from foretell.drafting import checkpoint
from foretell.loading import lora

COARSENESS = 0.1
"""Matrices are rounded to a tenth of a row's root mean square, in 5.4 bits a number; coarser, and drafts get worse."""
IMAGES = Path(__file__).parents[1] / "docs/images"


def ship(folder: Path) -> Path:
    """Copies the drafter of a training's folder; returns its folder in the package."""
    found, tensors = checkpoint.load(folder / "drafter")
    base, _, adapter = found.backbone.partition("+")
    if adapter:  # its name in the package is the method's, whatever the folder was called
        found.backbone = f"{base}+{found.method}"
        target = lora.SHIPPED / found.method
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder / "adapter", target)
        lora.store_small(target, COARSENESS)
        found.fingerprint = foretell.load(found.backbone, drafter="plain").backbone.fingerprint  # of the rounded sum
    name = f"{found.method}-{base}"
    found.save(checkpoint.SHIPPED / name, tensors, COARSENESS)
    shutil.copyfile(folder / "curves.png", IMAGES / f"{name}.png")
    return checkpoint.SHIPPED / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(f"shipped: {ship(parser.parse_args().folder)}")


if __name__ == "__main__":
    main()
