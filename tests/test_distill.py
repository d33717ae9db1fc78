"""Data that the model writes itself: a line is whole or not there, and no interruption changes what is written.

The truth is plain decoding, one turn at a time; a store is held against what was appended to it.
"""

import errno
import json
import lzma
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from command_line import Foretell

import foretell as package
from foretell.api import LLM, Result
from foretell.conversations import MAX_TURNS, Conversation
from foretell.engine import SpeculativeDecoder, run
from foretell.errors import ForetellError, UsageError
from foretell.files import read_json, sole_writer, write_json
from foretell.loading.catalog import FORMER_FINGERPRINTS
from foretell.requests import Request, SamplingParams
from foretell.train import distill as distilling
from foretell.train import prompts as prompting
from foretell.train.data import CONVERSATIONS, MANIFEST, ConversationStore, Distilled
from foretell.train.distill import (
    MIN_DISTINCT,
    MIN_TOKENS,
    distill,
    next_tasks,
    unfit,
)
from foretell.train.prompts import FOREIGN, LANGUAGES, cut, read_prompts, tasks, user_turn, write_prompts

pytestmark = pytest.mark.slow

END = 256
"""The tiny model's end of turn; its other tokens are bytes, the first 94 of them printable ASCII."""
READABLE = dict.fromkeys(range(94, END), -100.0)
"""Forbids what is not ASCII: text of such tokens is read back as the same tokens."""


@pytest.fixture(scope="module")
def llm(tiny: str) -> LLM:
    return package.load(tiny, dtype="fp32", threads=1)


# --- the store ----------------------------------------------------------------------------------------------

ABOUT: dict[str, Any] = {"model": "tiny", "fingerprint": "f00d", "vocab": 257, "settings": {"seed": 0}}
FOUND: dict[int, list[Distilled | str]] = {
    3: [Distilled(3, [1, 2, 3, 4, 5], [(2, 5)])],
    0: ["too long"],
    7: ["empty", Distilled(7, [9, 8, 7, 6], [(1, 2), (3, 4)]), Distilled(7, [9, 8, 1], [(2, 3)])],
    1: ["repetitive", "empty"],
    2: [Distilled(2, [256, 0], [(0, 2)])],
}


def filled(folder: Path, found: dict[int, list[Distilled | str]]) -> ConversationStore:
    store = ConversationStore.create(folder, dict(ABOUT))
    for line, each in found.items():
        store.append(line, iter(each))
    return store


def contents(store: ConversationStore) -> tuple[list[Distilled], Counter[str], set[int]]:
    return list(store.conversations), Counter(store.dropped), set(store.lines)


def one_sentence(error: pytest.ExceptionInfo[ForetellError]) -> None:
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    store = filled(tmp_path / "data", FOUND)
    expected = [each for found in FOUND.values() for each in found if isinstance(each, Distilled)]
    dropped = {"too long": 1, "empty": 2, "repetitive": 1}
    assert contents(store) == contents(ConversationStore.open(tmp_path / "data")) == (expected, dropped, set(FOUND))
    assert [each.written for each in expected] == [3, 2, 1, 2]
    again = ConversationStore.create(tmp_path / "data", dict(ABOUT))
    again.append(11, [Distilled(11, [5, 6], [(1, 2)])])
    assert contents(ConversationStore.open(tmp_path / "data")) == contents(again)


@pytest.mark.parametrize("last", FOUND)
def test_an_append_cut_anywhere_leaves_what_was_there_before(tmp_path: Path, last: int) -> None:
    before = contents(filled(tmp_path, {line: each for line, each in FOUND.items() if line != last}))
    path = tmp_path / CONVERSATIONS
    earlier = path.read_bytes()
    ConversationStore.open(tmp_path).append(last, FOUND[last])
    whole = path.read_bytes()
    for size in range(len(earlier), len(whole)):
        path.write_bytes(whole[:size])
        assert contents(ConversationStore.open(tmp_path)) == before
        assert path.read_bytes() == whole[:size]  # who only reads may read while another writes
        assert contents(ConversationStore.create(tmp_path, dict(ABOUT))) == before
        assert path.read_bytes() == earlier  # cut off, so that the next append begins a line
    ConversationStore.create(tmp_path, dict(ABOUT)).append(last, FOUND[last])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        b'{"line": 0, "drop', b"[]", b"null", b"17", b"", b"\x00\x00\xff\xfe", b'{"dropped": "empty"}', b'{"line": 0}',
        b'{"line": [], "dropped": 1}', b'{"line": 0, "tokens": [1]}',
        b'{"line": 0, "tokens": [1], "answers": [[0]]}', b'{"line": 0, "tokens": [1], "answers": 5}',
        b'{"line": 0, "tokens": [1, 2], "answers": [[2, 1]]}', b'{"line": 0, "tokens": [1, 2], "answers": [[0, 3]]}',
        b'{"line": 0, "tokens": [1, 2], "answers": [[-1, 1]]}', b'{"line": 0, "tokens": [], "answers": []}',
        b'{"line": 0, "tokens": [1.5], "answers": [[0, 1]]}', b'{"line": 0, "tokens": [-3], "answers": [[0, 1]]}',
        b'{"line": Infinity, "tokens": [1], "answers": [[0, 1]]}', b"[" * 100_000, b'{"line": 0, "tok\xff": 1}',
        b'{"line": "x", "tokens": [1], "answers": [[0, 1]]}', b'{"line": 0, "tokens": 3, "answers": [[0, 1]]}',
    ],
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    whole = contents(filled(tmp_path, FOUND))
    path = tmp_path / CONVERSATIONS
    lines = path.read_bytes().splitlines()
    assert lines[1] == b'{"line": 0, "dropped": "too long"}'
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:], b""]))
    with pytest.raises(ForetellError, match=rf"{CONVERSATIONS}, line 2 is damaged; delete the line") as error:
        ConversationStore.open(tmp_path)
    one_sentence(error)
    path.write_bytes(b"\n".join([lines[0], *lines[2:], b""]))  # what the sentence advises
    assert contents(ConversationStore.open(tmp_path)) == (whole[0], whole[1] - Counter({"too long": 1}), whole[2] - {0})


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"fingerprint": "beef"}, r"was begun with fingerprint f00d \(not beef\); go on with the same"),
        (
            {"settings": {"seed": 1, "write": 9}},
            r"begun with seed 0 \(not 1\), write None \(not 9\); go on with the same",
        ),
    ],
)
def test_a_folder_begun_otherwise_is_refused(tmp_path: Path, changed: dict[str, Any], sentence: str) -> None:
    filled(tmp_path, FOUND).write_manifest()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=sentence) as error:
        ConversationStore.create(tmp_path, ABOUT | changed)
    one_sentence(error)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert (
        ConversationStore.create(tmp_path, ABOUT | {"command": "another way to say it"}).manifest.get("command") is None
    )


def test_data_from_before_fingerprints_covered_every_tensor_are_the_catalogue_models(tmp_path: Path) -> None:
    former, now = next(iter(FORMER_FINGERPRINTS.items()))
    for told, ours in ((former, now), (f"not {former} but big", f"not {now} but big")):
        folder = tmp_path / told
        filled(folder, FOUND)
        write_json(folder / MANIFEST, {"format": 1, **ABOUT, "fingerprint": told})
        assert ConversationStore.open(folder).manifest["fingerprint"] == ours
        with pytest.raises(UsageError, match=rf"begun with fingerprint {ours} \(not beef\)"):
            ConversationStore.create(folder, ABOUT | {"fingerprint": "beef"})
        ConversationStore.create(folder, ABOUT | {"fingerprint": ours}).write_manifest()
        assert read_json(folder / MANIFEST)["fingerprint"] == ours


def test_the_manifest_counts_what_is_there(tmp_path: Path) -> None:
    store = ConversationStore.create(tmp_path, dict(ABOUT))
    nothing = {"conversations": 0, "tokens": 0, "written": 0, "dropped": {}}
    assert read_json(tmp_path / MANIFEST) == {"format": 1, **ABOUT, "counts": nothing, "seconds": 0}
    for line, each in FOUND.items():
        store.append(line, each)
    store.write_manifest(7.6)
    store.write_manifest(2.0)  # a second run
    counts = {"conversations": 4, "tokens": 14, "written": 8, "dropped": {"too long": 1, "empty": 2, "repetitive": 1}}
    assert read_json(tmp_path / MANIFEST) == {"format": 1, **ABOUT, "counts": counts, "seconds": 10}
    assert {path.name for path in tmp_path.iterdir()} == {MANIFEST, CONVERSATIONS}


@pytest.mark.parametrize(
    ("manifest", "sentence"),
    [
        ('{"format": 2, "fingerprint": "f00d"}', "has data format 2 where this version reads 1"),
        ("{}", "has data format None where"),
        ('{"format": 1, "fing', f"{MANIFEST} cannot be read"),
        ("[1]", f"{MANIFEST} must hold a JSON object"),
        (None, f"holds no distilled data .no {MANIFEST}.; make some with foretell distill"),
    ],
)
def test_a_folder_that_is_no_data_is_refused(tmp_path: Path, manifest: str | None, sentence: str) -> None:
    filled(tmp_path, FOUND)
    if manifest is None:
        (tmp_path / MANIFEST).unlink()
    else:
        (tmp_path / MANIFEST).write_text(manifest)
    with pytest.raises(ForetellError, match=sentence) as error:
        ConversationStore.open(tmp_path)
    one_sentence(error)


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Appending to a file stops after so many characters, as a full disk stops it."""
    opens = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = opens(path, mode, *args, **options)
        if "a" in mode:
            writes = file.write

            def write(text: str) -> None:
                writes(text[:after])
                file.flush()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(file, "write", write, raising=False)
        return file

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize("after", [0, 1, 30, 70])
def test_a_full_disk_costs_the_append_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    store = filled(tmp_path, {line: FOUND[line] for line in (3, 0)})
    before = contents(store)
    with monkeypatch.context() as patched:
        fill_the_disk(patched, after)
        with pytest.raises(ForetellError, match=f"enough disk space in {tmp_path}") as error:
            store.append(7, FOUND[7])
    one_sentence(error)
    assert contents(store) == before  # it claims nothing that is not on the disk
    assert contents(ConversationStore.open(tmp_path)) == before


# --- answers ------------------------------------------------------------------------------------------------

TALKS = [
    Conversation(("one",), 0), Conversation(("two", "and then?", "and?"), 2), Conversation(("three three three",), 3),
    Conversation(("four", "go on"), 4), Conversation(("x" * 500,), 5), Conversation(("five",), 9),
]  # fmt: skip
GREEDY = SamplingParams(max_new_tokens=14)
WARM = SamplingParams(max_new_tokens=14, temperature=0.8, seed=5)
ENDING = SamplingParams(max_new_tokens=14, temperature=0.8, seed=0, logit_bias={**READABLE, END: 2.5})
"""Text that is read back as it was, most of it with an end of turn."""


def answered(
    llm: LLM, folder: Path, params: SamplingParams, talks: Sequence[Conversation] = TALKS, rows: int = 3, **options: Any
) -> ConversationStore:
    store = ConversationStore.create(folder, ABOUT | {"fingerprint": llm.backbone.fingerprint})
    distill(llm, talks, store, params, rows=rows, **options)
    return store


def as_set(store: ConversationStore) -> tuple[Any, ...]:
    """What was written, in whatever order."""
    written = {(each.line, tuple(each.tokens), tuple(each.answers)) for each in store.conversations}
    assert len(written) == len(store.conversations)
    return written, store.dropped, store.lines


def interrupting(after: int) -> Callable[..., None]:
    """A progress bar that is interrupted when it is called for the `after`-th time."""
    calls = iter(range(after, 0, -1))

    def progress(*_: int) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lines of all requests from now on."""
    lines: list[int] = []
    submit = SpeculativeDecoder.submit

    def spy(self: SpeculativeDecoder, prompt: list[int], params: SamplingParams, key: int) -> int:
        lines.append(key // MAX_TURNS)
        return submit(self, prompt, params, key)

    monkeypatch.setattr(SpeculativeDecoder, "submit", spy)
    return lines


@pytest.mark.parametrize("params", [GREEDY, WARM, ENDING], ids=["greedy", "warm", "ending"])
@pytest.mark.parametrize("stops", [(1,), (2, 30), (43, 1, 1), (3, 17, 8, 11)], ids=str)
def test_interruptions_change_nothing_that_is_written(
    llm: LLM, tmp_path: Path, asked: list[int], params: SamplingParams, stops: tuple[int, ...]
) -> None:
    straight = answered(llm, tmp_path / "straight", params)
    assert straight.lines == {talk.line for talk in TALKS}
    found: set[int] = set()
    for after in stops:
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            answered(llm, tmp_path / "cut", params, progress=interrupting(after))
        assert not found & set(asked)  # nothing is answered twice
        assert found <= (found := ConversationStore.open(tmp_path / "cut").lines)
    asked.clear()
    final = answered(llm, tmp_path / "cut", params, rows=2)
    assert set(asked) == straight.lines - found - {5}  # too long to ask
    assert as_set(final) == as_set(ConversationStore.open(tmp_path / "cut")) == as_set(straight)
    lines = [json.loads(line)["line"] for line in (tmp_path / "cut" / CONVERSATIONS).read_bytes().splitlines()]
    assert Counter(lines) == Counter(
        json.loads(line)["line"] for line in (tmp_path / "straight" / CONVERSATIONS).read_bytes().splitlines()
    )


def test_progress_counts_conversations_and_tokens(llm: LLM, tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []
    store = answered(llm, tmp_path, GREEDY, progress=lambda *counts: seen.append(counts))
    assert seen == sorted(seen)
    assert {total for _, total, _ in seen} == {len(TALKS)}
    assert seen[-1] == (len(TALKS), len(TALKS), sum(each.written for each in store.conversations))


def turn_by_turn(llm: LLM, talk: Conversation, params: SamplingParams) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt and answer of each turn, by plain decoding of one request at a time."""
    messages: list[dict[str, str]] = []
    for number, turn in enumerate(talk.turns):
        messages.append({"role": "user", "content": turn})
        prompt, reply = llm.encode(messages), Result()
        if params.temperature == 0 and not params.logit_bias:
            reply = llm.generate([messages], max_new_tokens=params.max_new_tokens)[0]
        else:
            key = talk.line * MAX_TURNS + number
            for _, event in run(llm.decoder(1), [Request(prompt, params, key)]):
                reply.add(event)
        yield prompt, reply.ids
        messages.append({"role": "assistant", "content": reply.text})


def in_answers(store: ConversationStore, line: int) -> list[tuple[list[int], list[int]]]:
    """What stands before each answer, and the answer."""
    found = [each for each in store.conversations if each.line == line]
    return [(each.tokens[:start], each.tokens[start:end]) for each in found for start, end in each.answers]


@pytest.mark.parametrize("params", [GREEDY, WARM, ENDING], ids=["greedy", "warm", "ending"])
def test_answers_are_what_plain_decoding_writes_turn_by_turn(llm: LLM, tmp_path: Path, params: SamplingParams) -> None:
    store = answered(llm, tmp_path, params)
    sequences = Counter(each.line for each in store.conversations)
    for talk in TALKS:
        if talk.line != 5:
            written = [each for each in turn_by_turn(llm, talk, params) if len(each[1]) >= MIN_TOKENS]
            assert in_answers(store, talk.line) == written
            if params is ENDING:  # the template only appends: one sequence holds all turns
                assert sequences[talk.line] == min(1, len(written))
    if params is ENDING:
        assert any(each.tokens[end - 1] == END for each in store.conversations for _, end in each.answers)
        assert max(len(each.answers) for each in store.conversations) > 1
    if params is WARM:  # the random bytes are no UTF-8; read back, they are other tokens, and a new sequence begins
        assert sequences[2] == 3


def test_an_answer_that_reads_back_otherwise_ends_its_sequence(llm: LLM, tmp_path: Path) -> None:
    """The first answer survives being read back, the second does not."""
    letter, byte = llm.tokenizer.encode("q")[0], llm.tokenizer.encode("é")[0]
    talk = Conversation(("a", "b", "c", "d"), 1)
    replies = [Result([letter] * 4, "qqqq"), Result([byte] * 4, "\ufffd" * 4), Result([letter] * 3, "qqq"),
               Result([letter] * 4 + [END], "qqqq")]  # fmt: skip
    found = list(distilling._kept(llm, talk, replies, keep_repetitive=False))
    one = len(llm.tokenizer.encode("u:a<|end|>a:"))
    before = llm.tokenizer.encode("u:a<|end|>a:qqqq<|end|>u:b<|end|>a:")
    two = len(before)
    assert found[0] == Distilled(1, [*before, *[byte] * 4], [(one, one + 4), (two, two + 4)])
    assert found[1] == "empty"
    assert isinstance(found[2], Distilled)
    assert found[2].tokens[: two + 4] != found[0].tokens
    assert [found[2].tokens[start:end] for start, end in found[2].answers] == [[letter] * 4 + [END]]
    assert len(found) == 3


def test_what_does_not_fit_is_dropped_and_counted(llm: LLM, tmp_path: Path) -> None:
    room = llm.backbone.config.max_positions - GREEDY.max_new_tokens
    frame = len(llm.encode("x")) - 1
    talks = [
        Conversation(("x" * (room - frame),), 0),
        Conversation(("x" * (room - frame + 1),), 1),
        Conversation(("hello", "y" * 600, "never asked"), 2),
        Conversation(("hello",), 3),
    ]
    store = answered(llm, tmp_path, GREEDY, talks)
    assert store.lines == {0, 1, 2, 3}
    assert store.dropped == {"too long": 2}
    assert [len(in_answers(store, line)) for line in range(4)] == [1, 0, 1, 1]
    assert in_answers(store, 2)[0] == next(turn_by_turn(llm, talks[2], GREEDY))  # up to where it was too long


@pytest.mark.parametrize(
    ("bias", "length", "reason"),
    [({END: 100.0}, 40, "empty"), ({7: 100.0}, 60, "repetitive"), ({7: 100.0}, MIN_TOKENS - 1, "empty")],
)
def test_answers_not_worth_learning_from_are_dropped_and_counted(
    llm: LLM, tmp_path: Path, bias: dict[int, float], length: int, reason: str
) -> None:
    talks = [Conversation(("one", "two"), 0), Conversation(("three",), 1)]
    params = SamplingParams(max_new_tokens=length, logit_bias=bias)
    store = answered(llm, tmp_path, params, talks)
    assert as_set(store) == (set(), {reason: 3}, {0, 1})
    assert as_set(ConversationStore.open(tmp_path)) == as_set(store)


def test_answers_in_circles_are_kept_on_demand(llm: LLM, tmp_path: Path) -> None:
    talks = [Conversation(("one", "two"), 0), Conversation(("three",), 1)]
    for token, length, answers in ((7, 60, 3), (END, 40, 0)):
        store = ConversationStore.create(tmp_path / str(token), dict(ABOUT))
        params = SamplingParams(max_new_tokens=length, logit_bias={token: 100.0})
        distill(llm, talks, store, params, rows=3, keep_repetitive=True)
        assert sum(len(each.answers) for each in store.conversations) == answers
        assert store.dropped == ({} if answers else {"empty": 3})


def circle(period: int, length: int) -> list[int]:
    return [i % period for i in range(length)]


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([], "empty"), ([1, 2, 3], "empty"), ([1, 2, 3, 4], None), ([5] * MIN_TOKENS, None),
        ([5] * 52, None),  # 23 4-grams in its second half: too short to judge
        ([5] * 53, "repetitive"),
        (list(range(500)), None), ([*range(100), *[5] * 100], "repetitive"), ([*[5] * 100, *range(100)], None),
        (circle(28, 200), "repetitive"), (circle(30, 200), None),  # 97 4-grams in 100 tokens, three in ten is 29.1
    ],
)  # fmt: skip
def test_answers_in_circles_are_unfit(ids: list[int], reason: str | None) -> None:
    assert unfit(ids) == reason
    half = ids[len(ids) // 2 :]
    grams = Counter(zip(half, half[1:], half[2:], half[3:], strict=False))
    if reason == "repetitive":
        assert len(grams) < MIN_DISTINCT * grams.total()


# --- prompts from nothing -----------------------------------------------------------------------------------


def test_the_prefix_begins_every_chat(llm: LLM) -> None:
    prefix, ends = user_turn(llm)
    assert llm.tokenizer.decode(prefix) == "u:"
    assert ends == {"stop_ids": (END,)}
    for text in ("hello", " spaced ", "\nnew line", "::", "é", "a:b<|end|>"):
        chat = llm.tokenizer.chat([{"role": "user", "content": text}])
        assert chat[: len(prefix)] == prefix
        assert llm.tokenizer.decode(chat[len(prefix) :]).startswith(text)


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("[INST] {} [/INST]", {"stop": ("[/INST]",)}), ("User: {}\nModel:", {"stop": ("Model:",)}),
        ("{}<|end|>[/INST]", {"stop_ids": (END,)}), ("Q: {}", {"stop": ()}),
    ],
)  # fmt: skip
def test_a_turn_ends_where_the_template_ends_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, template: str, ends: dict[str, Any]
) -> None:
    monkeypatch.setattr(llm.tokenizer, "render_chat", lambda messages: template.format(messages[0]["content"]))
    prefix, found = user_turn(llm)
    assert found == ends
    assert llm.tokenizer.decode(prefix) == template.partition("{}")[0]


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """Makes some tokens likelier where the model writes prompts."""

    def favour(bias: dict[int, float]) -> None:
        monkeypatch.setattr(prompting, "SamplingParams", partial(SamplingParams, logit_bias=bias))

    return favour


ENDS_SOON = {END: 3.0}


def test_prompts_are_different_and_can_be_asked(
    llm: LLM, tmp_path: Path, talkative: Callable[[dict[int, float]], None]
) -> None:
    talkative(ENDS_SOON)
    seen: list[tuple[int, int, int]] = []
    write_prompts(llm, 12, tmp_path / "p.jsonl", seed=1, rows=4, progress=lambda *counts: seen.append(counts))
    prompts = [each.turns[0] for each in read_prompts(tmp_path / "p.jsonl")]
    assert len(set(prompts)) == len(prompts) == 12
    assert all(len(text) >= 8 and text == text.strip() for text in prompts)
    assert [done for done, _, _ in seen] == list(range(1, 13))
    assert {total for _, total, _ in seen} == {12}
    for seed, same in ((1, True), (2, False)):
        write_prompts(llm, 12, tmp_path / f"{seed}.jsonl", seed=seed, rows=4)
        assert ((tmp_path / f"{seed}.jsonl").read_bytes() == (tmp_path / "p.jsonl").read_bytes()) == same


@pytest.mark.parametrize("cut", [0, 1, 15])
def test_writing_prompts_goes_on_where_it_was(
    llm: LLM, tmp_path: Path, talkative: Callable[[dict[int, float]], None], cut: int
) -> None:
    talkative(ENDS_SOON)
    path = tmp_path / "p.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_prompts(llm, 12, path, seed=1, rows=4, progress=interrupting(5))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - cut])  # a kill may have cut the last line
    kept = data.splitlines()[: 5 if cut == 0 else 4]
    write_prompts(llm, 12, path, seed=1, rows=4)
    assert path.read_bytes().splitlines()[: len(kept)] == kept
    prompts = [each.turns[0] for each in read_prompts(path)]
    assert len(set(prompts)) == len(prompts) == 12
    done = path.read_bytes()
    write_prompts(llm, 12, path, seed=1, rows=4)
    assert path.read_bytes() == done
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize(
    "bias", [{END: -100.0}, {END: 100.0}], ids=["never ends a turn", "ends it at once"]
)  # fmt: skip
def test_a_model_that_writes_no_turns_is_refused(
    llm: LLM, tmp_path: Path, talkative: Callable[[dict[int, float]], None], bias: dict[int, float]
) -> None:
    talkative(bias)
    with pytest.raises(
        ForetellError, match="does not write user turns of its own.*give it prompts with `prompts=`"
    ) as e:
        write_prompts(llm, 3, tmp_path / "p.jsonl", seed=0, rows=2)
    one_sentence(e)


def test_a_model_that_writes_one_turn_only_is_refused(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(decoder: Any, requests: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for index, _ in enumerate(requests):
            yield index, package.requests.Event(index, [1], [False], "the same again", finish_reason="stop")

    monkeypatch.setattr(prompting, "run", run)
    with pytest.raises(ForetellError, match="give it prompts with `prompts=`") as error:
        write_prompts(llm, 3, tmp_path / "p.jsonl", seed=0, rows=2)
    one_sentence(error)
    assert [each.turns for each in read_prompts(tmp_path / "p.jsonl")] == [("the same again",)]


# --- tasks --------------------------------------------------------------------------------------------------

TEXTS = [
    ("What is a tree?", "A tree is a plant. It grows for years."),
    (FOREIGN.format(target="German", text="trees"), "Ein Baum ist eine Pflanze. Er hat Wurzeln."),
    ("Name a bird.", "An owl is a bird. It flies at night."),
]


def test_tasks_are_about_the_texts_and_nothing_else() -> None:
    found = tasks(TEXTS, 300, Random(5), 70)
    assert [each.line for each in found] == list(range(70, 370))
    assert found == tasks(TEXTS, 300, Random(5), 70)
    assert found != tasks(TEXTS, 300, Random(6), 70)
    turns = [each.turns[0] for each in found]
    assert all(any(part in turn for pair in TEXTS for part in pair) for turn in turns)
    assert not any("{" in turn for turn in turns)
    back = [turn for turn in turns if turn.startswith("Translate German to English: ")]
    assert back and all(TEXTS[1][1] in turn for turn in back)  # only what was written in German is called German
    assert not any(turn.startswith(f"Translate {language} ") for turn in turns for language in LANGUAGES[1:])
    for asked, answer in TEXTS:
        question = [turn for turn in turns if f"Question: {asked}" in turn]
        assert question and all(answer in turn for turn in question)  # the passage that answers is among those given


@pytest.mark.parametrize(
    ("text", "longest", "expected"),
    [
        (" One. Two. ", 99, "One. Two."),
        ("One. Two. Three.", 10, "One. Two."),
        ("One? Two! Three.", 11, "One? Two!"),
        ("no end at all", 5, "no en"),
        ("One.\nTwo", 6, "One."),
    ],
)
def test_texts_are_cut_between_sentences(text: str, longest: int, expected: str) -> None:
    assert cut(text, longest) == expected


def test_tasks_come_from_long_straight_first_answers(llm: LLM, tmp_path: Path) -> None:
    words = llm.encode("a plain text of many different letters, long enough to ask about: 0123456789", raw=True)
    circle = llm.encode("round and " * 12, raw=True)
    store = ConversationStore.create(tmp_path, dict(ABOUT))
    asked = [Conversation((f"prompt {line}", "and?"), line) for line in range(5)]
    answers = {0: words[:20], 1: circle, 2: words, 4: words}
    for line, answer in answers.items():
        start = len(llm.encode([{"role": "user", "content": f"prompt {line}"}]))
        store.append(line, [Distilled(line, [*range(start), *answer, 1, 1], [(start, start + len(answer))])])
    store.append(3, ["empty"])
    found = next_tasks(llm, store, asked[:4], 40, 0)  # line 4 belongs to a later wave
    assert len(found) == 40
    assert all("a plain text of many" in each.turns[0] or "prompt 2" in each.turns[0] for each in found)
    assert found == next_tasks(llm, store, asked[3::-1], 40, 0)
    later = next_tasks(llm, store, [*asked, *found], 3, 0)
    assert min(each.line for each in later) > max(each.line for each in found)
    assert next_tasks(llm, store, asked[:2], 4, 0) == []


# --- foretell distill ---------------------------------------------------------------------------------------

TINY = ("--dtype", "fp32", "--threads", "1")
"""One thread: idle ones spin."""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"turns": ["two", "and?"]}\n{"prompt": "three"}\n{"prompt": "four"}\n')
    return path


def test_the_command_writes_a_folder_that_the_library_reads(
    foretell: Foretell, tiny: str, llm: LLM, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    command = ("distill", "-m", tiny, *TINY, "--prompts", str(prompts), "--out", str(out), "-n", "14")
    ran = foretell(*command, "-b", "2")
    assert (ran.code, ran.out) == (0, "")
    store = ConversationStore.open(out)
    counts = store.manifest["counts"]
    assert f"{counts['conversations']} conversations, {counts['written']} tokens written; dropped: none" in ran.err
    assert counts["written"] == sum(each.written for each in store.conversations) > 0
    assert store.manifest["model"] == tiny
    assert store.manifest["vocab"] == 257
    assert store.manifest["fingerprint"] == llm.backbone.fingerprint
    for talk in read_prompts(prompts):
        assert in_answers(store, talk.line) == list(turn_by_turn(llm, talk, GREEDY))
    before = (out / CONVERSATIONS).read_bytes()
    assert foretell(*command).code == 0  # nothing is left to do
    assert (out / CONVERSATIONS).read_bytes() == before
    some = ("--every", "2", "--limit", "2", "--out", str(tmp_path / "some"))
    assert foretell(*command, *some).code == 0
    asked = [talk.line for talk in read_prompts(prompts)][::2]
    expected = {each.line: each for each in store.conversations if each.line in asked}
    assert {
        each.line: each for each in ConversationStore.open(tmp_path / "some").conversations
    } == expected  # a line's own noise
    refused = foretell(*command, "-t", "0.8")
    assert refused.code == 2
    assert re.fullmatch(
        r"error: .*was begun with temperature 0\.0 \(not 0\.8\); go on with the same, or .*\.\n", refused.err
    )


def test_an_interrupted_command_goes_on(
    foretell: Foretell, tiny: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("distill", "-m", tiny, *TINY, "--prompts", str(prompts), "-n", "14", "-t", "0.7", "-b", "2")
    assert foretell(*command, "--out", str(tmp_path / "straight")).code == 0
    append = ConversationStore.append

    def interrupted(store: ConversationStore, line: int, found: Any) -> None:
        if len(store.lines) == 2:
            raise KeyboardInterrupt
        append(store, line, found)

    with monkeypatch.context() as patched:
        patched.setattr(ConversationStore, "append", interrupted)
        ran = foretell(*command, "--out", str(tmp_path / "cut"))
    assert (ran.code, ran.err.strip()) == (130, "interrupted; the same command goes on from here")
    assert len(ConversationStore.open(tmp_path / "cut").lines) == 2
    assert ConversationStore.open(tmp_path / "cut").manifest["counts"]["conversations"] > 0  # counted all the same
    assert foretell(*command, "--out", str(tmp_path / "cut")).code == 0
    cut, straight = ConversationStore.open(tmp_path / "cut"), ConversationStore.open(tmp_path / "straight")
    assert as_set(cut) == as_set(straight)
    assert cut.manifest["counts"] == straight.manifest["counts"]


def test_packed_data_is_read_as_it_is(foretell: Foretell, tiny: str, prompts: Path, tmp_path: Path) -> None:
    command = ("distill", "-m", tiny, *TINY, "--prompts", str(prompts), "-n", "14", "--out", str(tmp_path / "data"))
    assert foretell(*command).code == 0
    plain, path = ConversationStore.open(tmp_path / "data"), tmp_path / "data/conversations.jsonl"
    packed = path.with_name("conversations.jsonl.xz")
    packed.write_bytes(lzma.compress(path.read_bytes()))
    path.unlink()
    assert ConversationStore.open(tmp_path / "data") == plain
    ran = foretell(*command)
    assert ran.code == 2
    assert re.fullmatch(r"error: .*conversations\.jsonl\.xz is packed; unpack it with xz -d to add to it\.\n", ran.err)
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ForetellError, match=r"conversations\.jsonl\.xz is damaged .*; copy it again"):
        ConversationStore.open(tmp_path / "data")


def test_two_processes_do_not_write_one_folder(foretell: Foretell, tiny: str, prompts: Path, tmp_path: Path) -> None:
    with sole_writer(tmp_path / "busy"):
        ran = foretell("distill", "-m", tiny, *TINY, "--prompts", str(prompts), "--out", str(tmp_path / "busy"))
    assert ran.code == 2
    assert re.fullmatch(r"error: Another process is writing to .*busy; wait until it is done, or .*\.\n", ran.err)
    assert not (tmp_path / "busy/conversations.jsonl").exists()


def test_without_prompts_the_model_writes_them(foretell: Foretell, tiny: str, prompts: Path, tmp_path: Path) -> None:
    options = ("-m", tiny, *TINY, "--write", "2", "-n", "8", "-b", "4")
    assert foretell("distill", *options, "--out", str(tmp_path / "alone")).code == 0
    store = ConversationStore.open(tmp_path / "alone")
    written = read_prompts(tmp_path / "alone" / "prompts.jsonl")
    assert len(written) == len(store.lines) == 2
    both = ("--prompts", str(prompts), "--limit", "1", "--out", str(tmp_path / "both"))
    assert foretell("distill", *options, *both).code == 0
    assert len(ConversationStore.open(tmp_path / "both").lines) == 3
    assert read_prompts(tmp_path / "both" / "prompts.jsonl") == [
        Conversation(each.turns, each.line, each.where.replace("alone", "both"), each.record) for each in written
    ]
    assert (
        store.lines < ConversationStore.open(tmp_path / "both").lines
    )  # its own prompts keep their noise beside a file's


def test_tasks_are_answered_after_what_they_are_about(
    foretell: Foretell, tiny: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (
        "distill",
        "-m",
        tiny,
        *TINY,
        "--prompts",
        str(prompts),
        "-n",
        "60",
        "-b",
        "2",
        "-t",
        "1",
        "--tasks",
        "5",
    )
    assert foretell(*command, "--out", str(tmp_path / "straight")).code == 0
    straight = ConversationStore.open(tmp_path / "straight")
    assert len(straight.lines) == 4 + 5
    append = ConversationStore.append
    for stop in (2, 5, 8):  # among the prompts, the first tasks and the last ones

        def interrupted(store: ConversationStore, line: int, found: Any, stop: int = stop) -> None:
            if len(store.lines) == stop:
                raise KeyboardInterrupt
            append(store, line, found)

        with monkeypatch.context() as patched:
            patched.setattr(ConversationStore, "append", interrupted)
            assert foretell(*command, "--out", str(tmp_path / f"cut{stop}")).code == 130
        assert foretell(*command, "--out", str(tmp_path / f"cut{stop}")).code == 0
        assert as_set(ConversationStore.open(tmp_path / f"cut{stop}")) == as_set(straight)


@pytest.mark.parametrize("tasks", ["1", "3"])
def test_where_no_answer_is_long_enough_no_tasks_are_made(
    foretell: Foretell, tiny: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: str
) -> None:
    monkeypatch.setattr(distilling, "MIN_TASK_TOKENS", 41)
    options = ("--prompts", str(prompts), "-n", "41", "--tasks", tasks, "--out", str(tmp_path / "data"))
    monkeypatch.setattr(distilling, "unfit", lambda ids: "empty")  # none is
    ran = foretell("distill", "-m", tiny, *TINY, *options)
    assert (ran.code, ran.out) == (0, "")
    assert ran.err.count("note: no tasks were made: no answer is long enough (41 tokens)\n") == 1
    assert len(ConversationStore.open(tmp_path / "data").lines) == 4


def test_a_model_without_a_chat_template_is_refused(
    foretell: Foretell, tiny: str, prompts: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(tiny, tmp_path / "bare")
    (bare / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    ran = foretell("distill", "-m", str(bare), *TINY, "--prompts", str(prompts), "--out", str(tmp_path / "data"))
    assert (ran.code, ran.out) == (2, "")
    sentence = r"error: .*bare has no chat template; distill needs .* add chat_template\.jinja to its folder\.\n"
    assert re.fullmatch(sentence, ran.err)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--limit", "3"], 2, "--limit .* for the lines of a file; give --prompts"),
        (["--every", "2", "--write", "3"], 2, "--every .* for the lines of a file; give --prompts"),
        (["--prompts", "nowhere.jsonl"], 1, "Cannot read nowhere.jsonl: .*; check the path"),
        (["--prompts", "{empty}"], 1, "holds no prompts"),
        (["--prompts", "{broken}"], 1, "line 2 is not valid JSON"),
        (["--prompts", "{fine}", "-t", "-1"], 2, "temperature is -1.0; it must lie between"),
        (["--prompts", "{fine}", "-n", "0"], 2, "max_new_tokens is 0"),
        (["--prompts", "{fine}", "-n", "39", "--tasks", "2"], 2, "39 tokens are too short to make tasks from; raise"),
        (["--prompts", "{fine}", "-n", "512"], 2, "512 tokens leave no room for a prompt .* context of 512; lower"),
        (["--prompts", "{fine}", "--top-p", "2"], 2, "top_p is 2.0"),
        (["--prompts", "{fine}", "-m", "./nowhere"], 2, "here is no folder ./nowhere"),
        (["--prompts", "{fine}", "--out", "{fine}"], 1, "annot write to .*fine.jsonl"),
    ],
)
def test_mistakes_are_one_line(
    foretell: Foretell, tiny: str, cache: Path, tmp_path: Path, arguments: list[str], code: int, sentence: str
) -> None:
    for name, text in (("fine", '{"prompt": "a"}\n'), ("empty", "\n"), ("broken", '{"prompt": "a"}\n{"pro')):
        (tmp_path / f"{name}.jsonl").write_text(text)
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("fine", "empty", "broken")}
    given = [argument.format(**files) for argument in arguments]
    ran = foretell("distill", "-m", tiny, *TINY, "--out", str(tmp_path / "data"), *given)
    assert (ran.code, ran.out) == (code, "")
    assert re.fullmatch(rf"error: .*{sentence}.*\n", ran.err), ran.err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("arguments", [["--write", "-1"], ["--batch-size", "0"], ["-t", "warm"], []])
def test_what_the_parser_refuses(foretell: Foretell, tmp_path: Path, arguments: list[str]) -> None:
    given = ["--out", str(tmp_path / "data"), *arguments] if arguments else []
    ran = foretell("distill", *given)
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err
    assert not (tmp_path / "data").exists()


def test_a_full_disk_is_one_line(
    foretell: Foretell, tiny: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("distill", "-m", tiny, *TINY, "--prompts", str(prompts), "--out", str(tmp_path / "data"), "-n", "8")
    with monkeypatch.context() as patched:
        fill_the_disk(patched, 40)
        ran = foretell(*command)
    assert (ran.code, ran.out) == (1, "")
    assert re.fullmatch(r"error: .*enough disk space in .*data .*\n", ran.err)
    assert foretell(*command).code == 0
    assert len(ConversationStore.open(tmp_path / "data").lines) == 4


# --- the demo model -----------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_demo_model_answers_itself(demo_folder: Path, tmp_path: Path) -> None:
    llm = package.load(demo_folder, threads=1)
    prefix, ends = user_turn(llm)
    assert ends == {"stop_ids": (llm.tokenizer.encode("<|im_end|>")[0],)}
    for text in ("Why?", "two\n\nlines", "1 + 1"):
        assert llm.encode(text)[: len(prefix)] == prefix
    params = SamplingParams(max_new_tokens=12)
    talk = Conversation(("What is the capital of France?", "And of Italy?"), 4)
    store = answered(llm, tmp_path, params, [talk, Conversation(("Hi",), 6)], rows=2)
    assert in_answers(store, 4) == list(turn_by_turn(llm, talk, params))
