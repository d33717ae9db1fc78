"""Where pip is sent for torch: to PyTorch's index of CPU builds, if there is no GPU and the index answers in time."""

import platform
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def cpu_index(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    import cpu_index

    return cpu_index


@pytest.fixture
def index() -> Iterator[str]:
    """A server that lists torch under /whl, refuses /none, and never answers /slow."""
    asleep = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/slow"):
                asleep.wait(30)
            self.send_response(404 if self.path.startswith("/none") else 200)
            self.end_headers()
            self.wfile.write(b'<a href="torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl">')

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    asleep.set()
    server.shutdown()
    server.server_close()


def test_an_index_that_does_not_answer_in_time_is_not_used(cpu_index: Any, index: str) -> None:
    assert cpu_index.answers(f"{index}/whl")
    assert not cpu_index.answers(f"{index}/none")
    began = time.perf_counter()
    assert not cpu_index.answers(f"{index}/slow", 0.2)
    assert time.perf_counter() - began < 5
    assert not cpu_index.answers("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("system", "gpu", "wanted"),
    [("Linux", None, True), ("Linux", "/usr/bin/nvidia-smi", False), ("Darwin", None, False)],
)
def test_it_is_wanted_on_linux_without_a_gpu(
    cpu_index: Any, monkeypatch: pytest.MonkeyPatch, system: str, gpu: str | None, wanted: bool
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(shutil, "which", lambda name: gpu)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert cpu_index.wanted() == wanted
