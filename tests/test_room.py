"""How many threads there is room for: fewer where they keep losing their cores, more when a core is idle."""

import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools
from random_backbones import COMPILED

pytestmark = pytest.mark.skipif(not COMPILED, reason="needs a compiler")

ROOT = Path(__file__).parents[1]
NONE, UNKNOWN, STEP = -1, -2, 0.021  # a call as long as a window


class Room:
    """A `Room` in a process of its own: calls in, verdicts out."""

    def __init__(self, program: Path):
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def call(self, lost: list[int], idle: int = NONE, seconds: float = STEP) -> tuple[int, int, int]:
        """Returns for how many threads there is room then, which is to move, and to which core."""
        assert self.process.stdin and self.process.stdout
        print(len(lost), seconds, idle, *lost, file=self.process.stdin, flush=True)
        most, thread, core = map(int, self.process.stdout.readline().split())
        return most, thread, core

    def until(self, most: int, lost: list[int], idle: int) -> float:
        """Returns after how many seconds there is room for so many."""
        return next(n for n in range(1, 10_000) if self.call(lost, idle)[0] == most) * STEP

    def calls(self, count: int, lost: list[int], idle: int = NONE) -> list[tuple[int, int, int]]:
        return [self.call(lost, idle) for _ in range(count)]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("room") / "room"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        patch.chdir(ROOT)
        setup = runpy.run_path("setup.py")
        source = ROOT / "tests/native/room.cpp"
        subprocess.run([*setup["compiler"](), *setup["COMMON"], source, "-o", out, "-lpthread"], check=True)
    return out


@pytest.fixture
def room(program: Path) -> Iterator[Room]:
    room = Room(program)
    yield room
    room.process.kill()


def test_threads_that_keep_losing_their_cores_become_fewer(room: Room) -> None:
    quiet, crowded = [0, 1, 0, 0], [0, 0, 50, 0]
    assert {most for most, _, _ in room.calls(3, crowded)} == {room.call(quiet)[0]}, "a moment of it decides nothing"
    assert [most for most, _, _ in room.calls(4, crowded)][-1] == 3
    assert room.call([0, 0, 50]) == (3, 0, NONE), "nor does it twice"


def test_many_threads_that_lose_theirs_now_and_then_are_no_crowd(room: Room) -> None:
    assert {most for most, _, _ in room.calls(400, [1] * 16)} == {room.call([0] * 16)[0]}


def test_threads_come_back_when_a_core_is_idle(room: Room) -> None:
    room.calls(4, [0, 50])
    assert {most for most, _, _ in room.calls(100, [0], NONE)} == {1}, "two seconds, and no core to have"
    assert room.until(2, [0], idle=1) < 1.1


def test_where_nobody_knows_time_alone_brings_them_back(room: Room) -> None:
    room.calls(4, [0, 50], UNKNOWN)
    assert room.until(2, [0], UNKNOWN) == pytest.approx(1.0, abs=2 * STEP)


def test_no_wait_lasts_forever(room: Room) -> None:
    """What the system tells of its cores may be wrong."""
    room.calls(4, [0, 50])
    assert room.until(2, [0], NONE) == pytest.approx(64, rel=0.05)


def test_disturbances_far_apart_do_not_add_up(room: Room) -> None:
    """Each wait is twice as long as the one before, unless the thread that came back could stay."""
    for waited in (1.0, 2.0, 4.0):
        room.calls(4, [0, 50])
        assert room.until(2, [0], idle=1) == pytest.approx(waited, abs=3 * STEP)
    room.calls(250, [0, 0])  # on cores of their own, which are never idle
    room.calls(4, [0, 50])
    assert room.until(2, [0], idle=1) == pytest.approx(1.0, abs=3 * STEP)


def test_threads_on_one_core_move_before_they_become_fewer(room: Room) -> None:
    every = room.call([0, 0, 0])[0]
    assert room.calls(4, [5, 4, 20], idle=7)[-1] == (every, 2, 7), "who loses it most often"
    assert room.calls(4, [20, 4, 5], idle=7)[-1] == (every, 0, 7)
    assert room.calls(4, [20, 4, 5], idle=7)[-1] == (2, 0, NONE), "moving did not help"
