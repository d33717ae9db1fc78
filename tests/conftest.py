"""What every test file may ask for.

Tests marked `real` need the demo model (`smollm2-135m`): it is fetched once into the cache that
FORETELL_CACHE names, or the default one. `pytest -m "not real"` runs without a network and in seconds.
"""

from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real: needs the demo model, fetched on first use")


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct: config.json, bfloat16 safetensors, tokenizer."""
    from foretell.backbone.loading import resolve

    return resolve("smollm2-135m").path
