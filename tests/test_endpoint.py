"""Answers from an endpoint: a server of the same model writes what the model itself would, and trouble costs nothing.

The servers are real ones, in this process. What they say is what a tiny model says to the same request, or a script.
"""

import json
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from command_line import Foretell, Ran, save_tiny_chat
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import foretell as package
from foretell.api import LLM
from foretell.cli import main
from foretell.conversations import Conversation
from foretell.errors import ForetellError, UsageError
from foretell.requests import SamplingParams
from foretell.results import Result
from foretell.train import endpoint as module
from foretell.train.agreement import FLOOR, MIN_CONVERSATIONS, Agreement
from foretell.train.data import ConversationStore
from foretell.train.endpoint import (
    CONNECT_RETRIES,
    KEY,
    MAX_WAIT,
    MIN_WAIT,
    PATIENCE,
    SECONDS,
    TIMEOUT_RETRIES,
    Endpoint,
    patiently,
    turn_end,
)

pytestmark = pytest.mark.slow

END = 256
TINY = ("--dtype", "fp32", "--threads", "1")
MODELS, CHAT = "/v1/models", "/v1/chat/completions"

TALKS = [
    ["one"], ["two", "and then?", "and?"], ["three three three"], ["four", "go on"], ["x" * 600], ["five"],
    ["hello", "y" * 600, "never asked"], ["six", "so?"],
]  # fmt: skip
"""The fifth is too long to be asked; of the seventh the second turn is, which the server finds out."""
SILENT = {4}
ASKED = set(range(len(TALKS))) - SILENT
OTHER = "--other-model"


# --- a server -----------------------------------------------------------------------------------------------

Say = Callable[[str, dict[str, Any]], tuple[Any, ...]]
"""From path and request to status and reply, an object or bytes, and perhaps the seconds to wait before the next."""


class Handler(BaseHTTPRequestHandler):
    server: "Served"

    def do_GET(self) -> None:
        self.reply({})

    def do_POST(self) -> None:
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body: dict[str, Any]) -> None:
        with self.server.lock:
            self.server.keys.append(self.headers["Authorization"])
            self.server.asked += [body] if self.path == CHAT else []
        with nullcontext() if self.server.at_once else self.server.lock:
            status, said, *wait = self.server.say(self.path, body)
        data = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for each in wait:
            self.send_header("Retry-After", str(each))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing: what is on stderr is compared."""


class Served(ThreadingHTTPServer):
    """Answers one request at a time, or all `at_once`.

    `asked` is what chats asked, `keys` what every request showed for a key.
    """

    request_queue_size = 64
    at_once = False

    def __init__(self, say: Say):
        super().__init__(("127.0.0.1", 0), Handler)
        self.say, self.lock = say, threading.Lock()
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    def handle_error(self, *given: Any) -> None:
        """Reports what is wrong here, but not a client that no longer waits for its reply."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*given)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


Serve = Callable[[Say], Served]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers that last as long as the test."""
    started: list[Served] = []

    def start(say: Say) -> Served:
        server = Served(say)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are repeated at once, past any proxy, and without a key of the person who runs the tests."""
    monkeypatch.setattr(module, "MAX_WAIT", 0.001)
    monkeypatch.delenv(KEY, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


def reply(text: str | None, reason: str | None = "stop") -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}]}


def spoken_by(llm: LLM) -> Say:
    """What the model says, as such servers say it."""

    def say(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == MODELS:
            return 200, {"object": "list", "data": [{"id": "tiny"}, {"id": "other"}]}
        assert path == CHAT
        params = {"max_new_tokens": body["max_tokens"], "temperature": body["temperature"], "top_p": body["top_p"]}
        try:
            result = llm.generate([body["messages"]], **params, seed=body.get("seed", 0))[0]
        except UsageError as error:
            return 400, {"error": {"message": str(error)}}
        return reply(result.text, result.finish_reason)

    return say


def scripted(chat: Callable[[dict[str, Any]], tuple[Any, ...]]) -> Say:
    """A server of the model "tiny" that answers chats by a script: as another model would, to be sure."""
    return lambda path, body: (200, {"data": [{"id": "tiny"}]}) if path == MODELS else chat(body)


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with an output matrix that prefers the first 94 bytes, printable ASCII, and the end of turn.

    Of random bytes most make no whole character, and what is read back for them are other tokens.
    """
    folder = tmp_path_factory.mktemp("readable")
    save_tiny_chat(folder)
    model = tiny_model("llama", vocab_size=END + 1, max_position_embeddings=512, eos_token_id=END)
    with torch.no_grad():
        model.lm_head.weight[94:END] = 0.0
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llm(readable: str) -> LLM:
    return package.load(readable, dtype="fp32", threads=1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in TALKS))
    return str(path)


@pytest.fixture(scope="module")
def local(readable: str, prompts: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the model itself answers, greedily."""
    folder = tmp_path_factory.mktemp("local") / "data"
    with pytest.raises(SystemExit) as left:
        main(command(readable, prompts, folder))
    assert not left.value.code
    return folder


def command(model: str, prompts: str, out: Path, server: str = "", *more: str) -> list[str]:
    asked = ["--endpoint", server] if server else []
    return ["distill", "-m", model, *TINY, "--prompts", prompts, "--out", str(out), "-n", "14", *asked, *more]


def written(folder: Path) -> tuple[Any, ...]:
    """What was kept, in whatever order, and what was dropped."""
    store = ConversationStore.open(folder)
    found = {(each.line, tuple(each.tokens), tuple(each.answers)) for each in store.conversations}
    assert len(found) == len(store.conversations)
    return found, store.dropped, store.lines


def refused(ran: Ran, code: int, sentence: str) -> None:
    """One sentence on stderr, nothing on stdout, no traceback."""
    assert ran.out == ""
    assert re.fullmatch(rf"error: .*{sentence}.*\n", ran.err), ran.err
    assert ran.code == code


# --- what is written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["1", "3", "32"])
def test_an_endpoint_writes_what_the_model_itself_would(
    foretell: Foretell, readable: str, prompts: str, local: Path, llm: LLM, serve: Serve, tmp_path: Path, rows: str
) -> None:
    """Every token: this model's text is ASCII, a token a letter, and is read back as the tokens that it was."""
    server = serve(spoken_by(llm))
    ran = foretell(*command(readable, prompts, tmp_path / "data", server.url, "-b", rows))
    assert (ran.code, ran.out) == (0, "")
    found, dropped, lines = written(tmp_path / "data")
    assert (found, dropped, lines) == written(local)
    assert lines == set(range(len(TALKS)))
    assert dropped["too long"] == 2
    assert sum(len(answers) for _, _, answers in found) > 6
    assert sorted(len(body["messages"]) for body in server.asked) == [1] * 7 + [3] * 4 + [5]
    for body in server.asked:
        assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("tiny", 14, 0.0, 1.0)
        assert [each["role"] for each in body["messages"]] == ["user", "assistant", "user", "assistant", "user"][
            : len(body["messages"])
        ]
        [talk] = [talk for talk in TALKS if talk[0] == body["messages"][0]["content"]]
        said = [each["content"] for each in body["messages"] if each["role"] == "user"]
        assert said == talk[: len(said)]
    settings = ConversationStore.open(tmp_path / "data").manifest["settings"]
    assert settings["served"] == "tiny"
    assert "endpoint" not in settings  # the same model may be served elsewhere when the run goes on


def test_the_mark_that_ends_a_turn_is_put_back(llm: LLM, serve: Serve) -> None:
    q, accented = llm.tokenizer.encode("q"), llm.tokenizer.encode("é")
    said: dict[str, tuple[str | None, str]] = {
        "ended": ("qqqq", "stop"), "cut": ("qqqq", "length"), "bytes": ("é", "stop"), "nothing": (None, "length"),
    }  # fmt: skip
    server = serve(scripted(lambda body: reply(*said[body["messages"][-1]["content"]])))
    talks = [Conversation((turn,), line) for line, turn in enumerate(said)]
    endpoint = Endpoint(server.url, "tiny")
    heard: list[str] = []
    params = SamplingParams(max_new_tokens=5)
    answers = endpoint.converse(llm, talks, params, rows=2, on_reply=lambda each: heard.append(each.text))
    found = {index: [(each.ids, each.text, each.finish_reason) for each in replies] for index, replies in answers}
    assert turn_end(llm) == [END]
    assert len(accented) == 2
    assert found == {
        0: [([*q * 4, END], "qqqq", "stop")], 1: [(q * 4, "qqqq", "length")], 2: [([*accented, END], "é", "stop")],
        3: [([], "", "length")],
    }  # fmt: skip
    assert sorted(heard) == ["", "qqqq", "qqqq", "é"]


def test_a_request_that_does_not_fit_ends_its_conversation_alone(
    foretell: Foretell, readable: str, prompts: str, serve: Serve, tmp_path: Path
) -> None:
    """At the second turn here; what was answered before it is kept."""
    full = (400, b"that is over the MAXIMUM")
    server = serve(scripted(lambda body: full if len(body["messages"]) > 1 else reply("abcdef")))
    assert foretell(*command(readable, prompts, tmp_path / "data", server.url, OTHER)).code == 0
    found, dropped, lines = written(tmp_path / "data")
    assert lines == set(range(len(TALKS)))
    assert {line: len(answers) for line, _, answers in found} == dict.fromkeys(lines - SILENT, 1)
    assert dropped == {"too long": sum(len(talk) > 1 for talk in TALKS) + len(SILENT)}
    assert len(server.asked) == 7 + 4


def test_seeds_are_sent_where_something_is_sampled(
    foretell: Foretell, readable: str, prompts: str, serve: Serve, tmp_path: Path
) -> None:
    def seeds(name: str, *more: str) -> dict[str, set[Any]]:
        server = serve(scripted(lambda body: reply("abcdef")))
        assert foretell(*command(readable, prompts, tmp_path / name, server.url, OTHER, *more)).code == 0
        sent: dict[str, set[Any]] = {}
        for body in server.asked:
            assert ("seed" in body) == bool(more)
            assert (body["temperature"], body["top_p"]) == ((0.8, 0.9) if more else (0.0, 1.0))
            sent.setdefault(body["messages"][0]["content"], set()).add(body.get("seed"))
        assert sent.keys() == {talk[0] for line, talk in enumerate(TALKS) if line not in SILENT}
        return sent

    assert set.union(*seeds("greedy").values()) == {None}
    warm = ("-t", "0.8", "--top-p", "0.9", "--seed")
    one, again, other = (seeds(name, *warm, seed) for name, seed in (("one", "5"), ("again", "5"), ("other", "6")))
    assert one == again
    assert len(set.union(*one.values())) == len(one) == 7  # a seed for each line, the same for all its turns
    assert not set.union(*one.values()) & set.union(*other.values())
    assert all(0 <= seed < 2**31 for seed in set.union(*one.values(), *other.values()))


@pytest.mark.parametrize("key", [None, "sk-secret"])
def test_the_key_of_the_environment_is_sent_and_kept_nowhere(
    foretell: Foretell, readable: str, prompts: str, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    key: str | None,
) -> None:  # fmt: skip
    if key:
        monkeypatch.setenv(KEY, key)
    server = serve(scripted(lambda body: reply("abcdef")))
    ran = foretell(*command(readable, prompts, tmp_path / "data", server.url, OTHER))
    assert ran.code == 0
    assert len(server.keys) == 1 + len(server.asked) == 1 + 13  # the list of models was asked for too
    assert set(server.keys) == {key and f"Bearer {key}"}
    assert not any(b"sk-secret" in path.read_bytes() for path in (tmp_path / "data").iterdir())
    assert "sk-secret" not in ran.err


def test_the_model_that_is_named_is_asked(
    foretell: Foretell, readable: str, prompts: str, local: Path, llm: LLM, serve: Serve, tmp_path: Path
) -> None:
    server = serve(spoken_by(llm))
    address = f"{server.url}/"  # with a stroke at its end, too
    assert foretell(*command(readable, prompts, tmp_path / "data", address, "--served", "other")).code == 0
    assert {body["model"] for body in server.asked} == {"other"}
    assert written(tmp_path / "data") == written(local)


# --- trouble ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_trouble_that_passes_is_waited_for(
    foretell: Foretell, readable: str, prompts: str, local: Path, llm: LLM, serve: Serve, tmp_path: Path, status: int
) -> None:
    tried, real = Counter[str](), spoken_by(llm)

    def say(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        request = json.dumps([path, body])
        tried[request] += 1
        return real(path, body) if tried[request] == 3 else (status, b"one moment")

    ran = foretell(*command(readable, prompts, tmp_path / "data", serve(say).url, "-b", "3"))
    assert (ran.code, ran.out) == (0, "")
    assert set(tried.values()) == {3}  # twice in vain
    assert written(tmp_path / "data") == written(local)


def test_trouble_that_does_not_pass_ends_the_run(
    foretell: Foretell, readable: str, prompts: str, serve: Serve, tmp_path: Path
) -> None:
    server = serve(lambda path, body: (503, b"one\nmoment"))
    ran = foretell(*command(readable, prompts, tmp_path / "data", server.url))
    sentence = r"does not answer as an OpenAI-compatible server does \(503 one moment\); check the address and "
    refused(ran, 1, f"{re.escape(server.url)} {sentence}{KEY}")
    assert len(server.keys) == 1 + CONNECT_RETRIES
    assert not (tmp_path / "data").exists()


def settled() -> None:
    """What had been asked is waited for by nobody; then nothing more is asked."""
    for each in threading.enumerate():
        if each.name == "endpoint":
            each.join(20)
            assert not each.is_alive()


def test_so_many_are_asked_side_by_side(
    foretell: Foretell, readable: str, prompts: str, serve: Serve, tmp_path: Path
) -> None:
    """The server answers nobody until three have asked; a fourth would find them answered, and wait in vain."""
    meeting, last = threading.Barrier(3), {TALKS[line][0] for line in (0, 2, 5)}

    def chat(body: dict[str, Any]) -> tuple[int, Any]:
        meeting.wait(20)
        return reply("abcdef")

    alone = tmp_path / "prompts.jsonl"
    alone.write_text("".join(json.dumps({"prompt": f"{turn} {part}"}) + "\n" for turn in last for part in "ab"))
    server = serve(scripted(chat))
    server.at_once = True
    ran = foretell(*command(readable, str(alone), tmp_path / "data", server.url, OTHER, "-b", "3"))
    assert (ran.code, ran.out) == (0, "")
    assert len(written(tmp_path / "data")[0]) == len(server.asked) == 6
    assert not meeting.broken


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that are waited between requests, none of which pass, and which chance makes no longer."""
    found: list[float] = []

    class Hasty(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            found.append(timeout)
            return self.is_set()

    monkeypatch.setattr(module, "Event", Hasty)
    monkeypatch.setattr(module, "MAX_WAIT", MAX_WAIT)
    monkeypatch.setattr(module, "random", lambda: 0.0)
    return found


def asked_once(llm: LLM, server: Served) -> list[list[Result]]:
    """The replies to one conversation of one turn."""
    endpoint = Endpoint(server.url, "tiny", other_model=True)
    talks = [Conversation(("one",), 0)]
    return [replies for _, replies in endpoint.converse(llm, talks, SamplingParams(max_new_tokens=5), rows=1)]


def test_a_rate_limit_is_waited_out_for_two_minutes(
    llm: LLM, serve: Serve, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The waits grow, and differ by chance; never are they longer in all."""
    server = serve(scripted(lambda body: (429, b"slowly")))
    for chance in (0.0, 0.5, 1.0):
        waits.clear()
        server.asked.clear()
        monkeypatch.setattr(module, "random", lambda chance=chance: chance)
        with pytest.raises(ForetellError, match=r"\(429 slowly\)"):
            asked_once(llm, server)
        assert len(server.asked) == 1 + len(waits)
        assert waits[:-1] == [min(MIN_WAIT * 2**i, MAX_WAIT) * (1 + chance / 4) for i in range(len(waits) - 1)]
        assert sum(waits) == pytest.approx(PATIENCE)
        assert len(waits) >= 12
    assert PATIENCE == 120


def test_the_wait_that_a_server_asks_for_is_kept(
    llm: LLM, serve: Serve, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is the longer one; chance makes it longer only. A date, which some send, is not read."""
    monkeypatch.setattr(module, "random", lambda: 1.0)
    left: list[Any] = [60, "2.5", 0, "Wed, 21 Oct 2026 07:28:00 GMT"]
    server = serve(scripted(lambda body: (429, b"slowly", left.pop(0)) if left else reply("qq")))
    [[answer]] = asked_once(llm, server)
    assert (answer.text, waits) == ("qq", [1.25 * seconds for seconds in (60, 2.5, 2, 4)])


def test_waits_that_a_server_asks_for_are_bounded_in_all(llm: LLM, serve: Serve, waits: list[float]) -> None:
    server = serve(scripted(lambda body: (429, b"slowly", 50)))
    with pytest.raises(ForetellError, match=r"\(429 slowly, to be asked again after 50 s\)"):
        asked_once(llm, server)
    assert waits == [50, 50]


def test_a_long_wait_is_named_in_the_error(llm: LLM, serve: Serve, waits: list[float]) -> None:
    server = serve(scripted(lambda body: (429, b"your day is over", PATIENCE + 1)))
    with pytest.raises(
        ForetellError, match=r"\(429 your day is over, to be asked again after 121.0 s\); check .* goes on"
    ):
        asked_once(llm, server)
    assert (waits, len(server.asked)) == ([], 1)  # it is not waited for


def test_a_server_that_hangs_is_given_up(
    llm: LLM, serve: Serve, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.1)
    over = threading.Event()
    server = serve(scripted(lambda body: (200 + over.wait(20), b"too late")))
    server.at_once = True
    with pytest.raises(ForetellError, match=r"does not answer as .* \(.*timed out"):
        asked_once(llm, server)
    over.set()
    assert len(server.asked) == 1 + TIMEOUT_RETRIES
    assert len(waits) == TIMEOUT_RETRIES


@pytest.mark.parametrize("seconds", [SECONDS, 10.0])
def test_patience_is_bounded_in_all(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a request that takes so long to fail each time, as far as its timeout allows; by a clock of its own."""
    clock, tries = [0.0], list[float]()
    request: Any = None

    class Passing(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            clock[0] += timeout or 0.0
            return False

    def hang(timeout: openai.Timeout) -> None:
        assert timeout.read is not None
        tries.append(min(seconds, timeout.read))
        clock[0] += tries[-1]
        raise openai.APITimeoutError(request)

    monkeypatch.setattr(module, "monotonic", lambda: clock[0])
    with pytest.raises(openai.APITimeoutError):
        patiently(hang, Passing())
    assert 2 <= len(tries) <= 1 + TIMEOUT_RETRIES
    assert clock[0] <= SECONDS + PATIENCE == 720


def test_a_closed_run_asks_no_more(llm: LLM, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation that waits to be repeated is not, once the answers are no longer wanted."""
    monkeypatch.setattr(module, "MIN_WAIT", 20.0)
    monkeypatch.setattr(module, "MAX_WAIT", 20.0)
    meeting = threading.Barrier(2)

    def chat(body: dict[str, Any]) -> tuple[int, Any]:
        meeting.wait(20)
        return (503, b"one moment") if body["messages"][0]["content"] == "0" else reply("qq")

    server = serve(scripted(chat))
    server.at_once = True
    talks = [Conversation((str(line),), line) for line in range(2)]
    answers = Endpoint(server.url, "tiny").converse(llm, talks, SamplingParams(max_new_tokens=5), rows=2)
    assert next(answers)[0] == 1
    answers.close()
    for thread in threading.enumerate():
        if thread.name == "endpoint":
            thread.join(10)
            assert not thread.is_alive()
    assert len(server.asked) == 2


@pytest.mark.parametrize("quick", [(403, b"no"), (200, b"nonsense")])
def test_a_failure_costs_no_answer_that_was_under_way(
    foretell: Foretell, readable: str, prompts: str, serve: Serve, tmp_path: Path, quick: tuple[int, bytes]
) -> None:
    """When all are asked one fails at once; the others are answered after it, later turns and all."""
    failing, meeting = TALKS[2][0], threading.Barrier(len(ASKED))

    def chat(body: dict[str, Any]) -> tuple[int, Any]:
        if len(body["messages"]) == 1:
            meeting.wait(20)
        if body["messages"][0]["content"] == failing:
            return quick
        time.sleep(0.3)
        return reply("abcdef")

    server = serve(scripted(chat))
    server.at_once = True
    ran = foretell(*command(readable, prompts, tmp_path / "data", server.url, OTHER, "-b", "7"))
    refused(ran, 1, f"{quick[0]} {quick[1].decode()}")
    found, dropped, lines = written(tmp_path / "data")
    assert lines == set(range(len(TALKS))) - {2}
    assert {line: len(answers) for line, _, answers in found} == {line: len(TALKS[line]) for line in ASKED - {2}}
    assert dropped == {"too long": 1}
    server.asked.clear()
    server.say = scripted(lambda body: reply("abcdef"))
    assert foretell(*command(readable, prompts, tmp_path / "data", server.url, OTHER, "-b", "7")).code == 0
    assert [body["messages"][0]["content"] for body in server.asked] == [failing]


def test_after_a_failure_nothing_new_is_asked(llm: LLM, serve: Serve) -> None:
    """Two at a time: beside the one that fails another is answered, and yielded before the error is raised."""
    meeting = threading.Barrier(2)

    def chat(body: dict[str, Any]) -> tuple[int, Any]:
        meeting.wait(20)
        if body["messages"][0]["content"] == "0":
            return 403, b"no"
        time.sleep(0.3)
        return reply("qqqq")

    server = serve(scripted(chat))
    server.at_once = True
    talks = [Conversation((str(line),), line) for line in range(9)]
    answers = Endpoint(server.url, "tiny").converse(llm, talks, SamplingParams(max_new_tokens=5), rows=2)
    assert next(answers)[0] == 1
    with pytest.raises(ForetellError, match=r"\(403 no\)"):
        next(answers)
    assert len(server.asked) == 2


# --- what is dropped ----------------------------------------------------------------------------------------

BAD = {"error": {"message": "Invalid 'messages[0].content': not allowed here"}}
DROPS: list[tuple[tuple[int, Any], str]] = [
    ((400, BAD), "rejected"),
    ((400, {"error": {"message": "Unsupported parameter: top_p"}}), "rejected"),
    ((422, {"detail": "no such role"}), "rejected"),
    ((413, b"too large"), "rejected"),
    ((400, {"error": {"message": "This model's Context window is 4096 tokens"}}), "too long"),
    ((422, b"the prompt is too long"), "too long"),
    ((413, b"over the maximum"), "too long"),
    (reply("I cannot help with that", "content_filter"), "unfinished"),
    (reply("look(it, up)", "tool_calls"), "unfinished"),
    (reply("well", None), "unfinished"),
]


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize(("said", "reason"), DROPS)
def test_what_the_server_will_not_answer_is_dropped_alone(
    foretell: Foretell, readable: str, prompts: str, serve: Serve, tmp_path: Path, said: tuple[int, Any], reason: str,
    turn: int,
) -> None:  # fmt: skip
    """With the reason, and never asked again; what was answered before is kept."""

    def chat(body: dict[str, Any]) -> tuple[int, Any]:
        asked = [each["content"] for each in body["messages"] if each["role"] == "user"]
        return said if asked == TALKS[1][: turn + 1] else reply("abcdef")

    server = serve(scripted(chat))
    given = command(readable, prompts, tmp_path / "data", server.url, OTHER, "-b", "3")
    ran = foretell(*given)
    assert (ran.code, ran.out) == (0, "")
    found, dropped, lines = written(tmp_path / "data")
    assert lines == set(range(len(TALKS)))
    kept = {line: len(TALKS[line]) for line in ASKED} | {1: turn}
    assert {line: len(answers) for line, _, answers in found} == {line: count for line, count in kept.items() if count}
    assert dropped == Counter(["too long", reason])
    assert ConversationStore.open(tmp_path / "data").manifest["counts"]["dropped"] == dict(dropped)
    assert all(f"{count} {name}" in ran.err for name, count in dropped.items())
    server.asked.clear()
    assert foretell(*given).code == 0
    assert not server.asked


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    ("said", "words"),
    [
        ((400, b"Unsupported parameter: top_p"), "400 Unsupported parameter: top_p"),
        ((422, b"no"), "422 no"),
        ((400, b"the context is 16"), "400 the context is 16"),
        (reply("no", "content_filter"), "finish_reason 'content_filter'"),
    ],
)
def test_a_server_that_answers_nothing_ends_the_run(
    foretell: Foretell, readable: str, prompts: str, serve: Serve, tmp_path: Path, said: tuple[int, Any], words: str,
    rows: int,
) -> None:  # fmt: skip
    """One sentence, and nothing is dropped for it: mended, it is asked for the same again."""

    def chat(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.05)
        return said

    server = serve(scripted(chat))
    given = command(readable, prompts, tmp_path / "data", server.url, OTHER, "-b", str(rows))
    first = max(3, rows)
    sentence = rf"answers none of the first {first} prompts \(the last: {words}\); fix .* then give the same command"
    refused(foretell(*given), 1, f"{re.escape(server.url)} {sentence}")
    assert first <= len(server.asked) < len(ASKED) + (rows > 1)  # what was under way when the last of them came
    assert written(tmp_path / "data") == (set(), {"too long": 1}, SILENT)
    server.say = scripted(lambda body: reply("abcdef"))
    assert foretell(*given).code == 0
    assert written(tmp_path / "data")[1:] == ({"too long": 1}, set(range(len(TALKS))))


def test_two_rejections_and_nothing_else_are_no_broken_server(
    foretell: Foretell, readable: str, serve: Serve, tmp_path: Path
) -> None:
    """Else a run that has only such prompts left would never end."""
    two = tmp_path / "prompts.jsonl"
    two.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    server = serve(scripted(lambda body: (400, BAD)))
    assert foretell(*command(readable, str(two), tmp_path / "data", server.url)).code == 0
    assert written(tmp_path / "data") == (set(), {"rejected": 2}, {0, 1})


# --- whose answers they are ---------------------------------------------------------------------------------


def test_another_model_is_refused_unless_it_is_wanted(
    foretell: Foretell, readable: str, prompts: str, serve: Serve, tmp_path: Path, llm: LLM
) -> None:
    """After the answers to a few prompts; what was written stays, says whose it is, and is gone on with."""

    def say(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.02)
        return (200, {"data": [{"id": "big"}]}) if path == MODELS else reply("abcdef")

    server = serve(say)
    many = tmp_path / "prompts.jsonl"
    many.write_text("".join(json.dumps({"prompt": f"say {line}"}) + "\n" for line in range(40)))
    given = command(readable, str(many), tmp_path / "data", server.url, "-b", "2")
    sentence = (
        rf"seems to serve another model \(big\): the local one agrees with its answers [0-9]+% as often as with its "
        rf"own, where {FLOOR:.0%} is the least for the same model; serve the same one, or allow it with --other-model"
    )
    refused(foretell(*given), 1, f"{re.escape(server.url)} {sentence}")
    before = written(tmp_path / "data")
    assert MIN_CONVERSATIONS <= len(before[2]) == len(server.asked) < 40
    manifest = ConversationStore.open(tmp_path / "data").manifest
    assert manifest["model"] == "big"
    assert manifest["fingerprint"] == f"not {llm.backbone.fingerprint} but big"  # training asks for --other-model too
    assert foretell(*given, OTHER).code == 0
    after = written(tmp_path / "data")
    assert after[0] > before[0]
    assert after[2] == set(range(40))
    assert len(server.asked) == 40
    assert ConversationStore.open(tmp_path / "data").manifest["fingerprint"] == manifest["fingerprint"]


def test_a_short_run_is_judged_at_its_end(
    foretell: Foretell, readable: str, prompts: str, serve: Serve, tmp_path: Path
) -> None:
    server = serve(scripted(lambda body: reply("abcdef")))
    ran = foretell(*command(readable, prompts, tmp_path / "data", server.url))
    assert ran.code == 1
    assert f"\nerror: {server.url} seems to serve another model (tiny)" in ran.err  # after the progress of all of it
    assert written(tmp_path / "data")[2] == set(range(len(TALKS)))


def test_the_same_model_is_known_by_its_fingerprint(readable: str, llm: LLM, local: Path) -> None:
    assert ConversationStore.open(local).manifest["fingerprint"] == llm.backbone.fingerprint


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_agreement_is_with_what_the_model_itself_would_write(llm: LLM, readable: str, temperature: float) -> None:
    """All of its greedy answers; of sampled ones as many tokens as chance allows. Against transformers' reading."""
    twin = AutoModelForCausalLM.from_pretrained(readable)
    turns = [f"say {line}" for line in range(MIN_CONVERSATIONS)]
    own = llm.generate(turns, max_new_tokens=60, temperature=temperature, seed=3)
    found, chosen, expected = Agreement(), 0, 0.0
    for turn, answer in zip(turns, own, strict=True):
        found.add(llm, turn, answer, temperature)
        prompt = llm.encode(turn)
        with torch.no_grad():
            logits_PV = twin(torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
        chosen += int((logits_PV.argmax(-1) == torch.tensor(answer.ids)).sum())
        expected += float((logits_PV / (temperature or 1e-6)).softmax(-1).amax(-1).sum())
    assert (found.conversations, found.tokens) == (MIN_CONVERSATIONS, sum(len(each.ids) for each in own))
    assert (found.chosen, found.expected) == (chosen, pytest.approx(expected, rel=1e-4))
    assert not found.poor
    if not temperature:
        assert (found.share, found.variance) == (1.0, 0.0)
    else:
        assert 0 < found.expected < found.tokens
        assert abs(found.chosen - found.expected) < 4 * found.variance**0.5
    enough = Agreement(**vars(found))
    enough.add(llm, turns[0], own[0], temperature)
    assert enough == found  # no more passes than are needed


def test_chance_is_on_the_side_of_sampled_answers() -> None:
    assert Agreement(8, 100, 79, 100.0, 0.0).poor
    assert not Agreement(8, 100, 80, 100.0, 0.0).poor
    assert not Agreement(8, 100, 35, 50.0, 25.0).poor
    assert Agreement(8, 100, 29, 50.0, 25.0).poor
    assert not Agreement(8, 31, 0, 31.0, 0.0).poor  # too few to tell


@pytest.mark.parametrize("rows", ["1", "3"])
def test_a_run_that_broke_off_asks_for_nothing_twice(
    foretell: Foretell, readable: str, prompts: str, local: Path, llm: LLM, serve: Serve, tmp_path: Path, rows: str
) -> None:
    real, answered = spoken_by(llm), list[str]()

    def tired(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        answered.extend([path] if path == CHAT else [])
        return real(path, body) if len(answered) <= 6 else (401, b"your credit is used up")

    server = serve(tired)
    given = command(readable, prompts, tmp_path / "data", server.url, "-b", rows)
    refused(foretell(*given), 1, r"\(401 your credit is used up\).*; check .* then give the same command: it goes on")
    settled()
    done = ConversationStore.open(tmp_path / "data").lines
    assert SILENT < done < set(range(len(TALKS)))
    server.say = real
    server.asked.clear()
    assert foretell(*given).code == 0
    asked = Counter(body["messages"][0]["content"] for body in server.asked if len(body["messages"]) == 1)
    assert asked == Counter(talk[0] for line, talk in enumerate(TALKS) if line not in done)
    assert written(tmp_path / "data") == written(local)
    server.asked.clear()
    assert foretell(*given).code == 0  # nothing is left to do
    assert not server.asked


def test_an_interruption_asks_for_nothing_more(
    foretell: Foretell, readable: str, prompts: str, local: Path, llm: LLM, serve: Serve, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Wherever it comes: here between two answers, while the main thread writes one down."""
    server, append = serve(spoken_by(llm)), ConversationStore.append
    given = command(readable, prompts, tmp_path / "data", server.url, "-b", "2")

    def interrupted(store: ConversationStore, line: int, found: Any) -> None:
        if len(store.lines) == 2:  # one of them was too long to ask
            raise KeyboardInterrupt
        append(store, line, found)

    with monkeypatch.context() as patched:
        patched.setattr(ConversationStore, "append", interrupted)
        ran = foretell(*given)
    assert (ran.code, ran.err.strip()) == (130, "interrupted; the same command goes on from here")
    settled()
    done = ConversationStore.open(tmp_path / "data").lines
    assert len(done) == 2
    server.asked.clear()
    assert foretell(*given).code == 0
    assert {body["messages"][0]["content"] for body in server.asked} == {
        talk[0] for line, talk in enumerate(TALKS) if line not in done
    }
    assert written(tmp_path / "data") == written(local)


def test_data_begun_otherwise_is_not_gone_on_with(
    foretell: Foretell, readable: str, prompts: str, serve: Serve, tmp_path: Path
) -> None:
    server = serve(scripted(lambda body: reply("abcdef")))
    assert foretell(*command(readable, prompts, tmp_path / "data", server.url, OTHER)).code == 0
    before = written(tmp_path / "data")
    ran = foretell(*command(readable, prompts, tmp_path / "data"))
    refused(ran, 2, r"was begun with .*served tiny \(not None\); go on")
    assert written(tmp_path / "data") == before


@pytest.mark.parametrize(
    ("models", "arguments", "sentence"),
    [
        ((401, b"who\nare you?"), [], r"does not answer as .* does \(401 who are you\?\); check the address and"),
        ((404, b"no such page"), [], r"does not answer as .* does \(404 no such page\); check the address"),
        ((200, {"data": [{"id": "one"}, {"id": "two"}]}), ["--served", "three"], "not serve three; it serves one, two"),
        ((200, {"data": []}), [], "does not serve a model; it serves none"),
        ((200, b"<html>\nwelcome</html>"), [], "answered with something else: 200 <html> welcome</html>"),
        ((200, {"models": []}), [], "answered with something else: "),
        ((200, {"data": [1]}), [], "answered with something else: "),
        ((200, ["one"]), [], "answered with something else: "),
        ((400, {"error": {}}), [], r"does not answer as .* does \(400 "),
    ],
)
def test_what_is_no_such_server_is_one_sentence(
    foretell: Foretell, readable: str, prompts: str, serve: Serve, tmp_path: Path, models: tuple[int, Any],
    arguments: list[str], sentence: str,
) -> None:  # fmt: skip
    server = serve(lambda path, body: models)
    refused(foretell(*command(readable, prompts, tmp_path / "data", server.url, *arguments)), 1, sentence)
    assert len(server.keys) == 1  # it would not pass: asked once
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "said",
    [
        b"nonsense\nof a proxy",
        {"choices": []},
        {"choices": [{}]},
        {"choices": [{"message": {}, "finish_reason": ""}]},
        7,
    ],
)
def test_answers_that_are_none_are_one_sentence(
    foretell: Foretell, readable: str, prompts: str, serve: Serve, tmp_path: Path, said: Any
) -> None:
    server = serve(scripted(lambda body: (200, said)))
    ran = foretell(*command(readable, prompts, tmp_path / "data", server.url))
    refused(ran, 1, f"{re.escape(server.url)} answered with something else: ")
    assert ConversationStore.open(tmp_path / "data").lines == SILENT


def test_a_server_that_is_not_there_is_one_sentence(
    foretell: Foretell, readable: str, prompts: str, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    ran = foretell(*command(readable, prompts, tmp_path / "data", address))
    refused(ran, 1, f"{re.escape(address)} does not answer as .*; check the address and {KEY}")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--served", "tiny"], "--served is about the model of an endpoint; give --endpoint URL as well"),
        (["--other-model"], "--other-model is about the model of an endpoint; give --endpoint URL as well"),
        (["--endpoint", "localhost:8000"], "The endpoint 'localhost:8000' is not a URL; give one such as http://"),
        (["--endpoint", "file:///v1"], "The endpoint 'file:///v1' is not a URL"),
        (["--endpoint", "http://localhost:many/v1"], "The endpoint 'http://localhost:many/v1' is not a URL"),
        (["--endpoint", "http:///v1"], "The endpoint 'http:///v1' is not a URL"),
    ],
)
def test_mistakes_are_one_line(
    foretell: Foretell, readable: str, prompts: str, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    refused(foretell(*command(readable, prompts, tmp_path / "data", "", *arguments)), 2, sentence)
    assert not (tmp_path / "data").exists()


def test_a_library_caller_hears_of_it_too(llm: LLM, serve: Serve) -> None:
    """The error of one conversation ends all of them, and the endpoint can be used again."""
    broken = [True]
    server = serve(scripted(lambda body: (403, b"no") if broken[0] else reply("qq", "length")))
    endpoint = Endpoint(server.url)
    assert endpoint.connect() == "tiny"
    talks, params = [Conversation((str(line),), line) for line in range(400)], SamplingParams(max_new_tokens=5)
    with pytest.raises(ForetellError, match=r"\(403 no\)"):
        list(endpoint.converse(llm, talks, params, rows=2))
    assert len(server.asked) < len(talks)
    broken[0] = False
    assert {index for index, _ in endpoint.converse(llm, talks[:9], params, rows=2)} == set(range(9))
