"""Whole benchmarks of a tiny model: what is compared, what an interruption costs, what a mistake says, real peers."""

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gguf import write_gguf
from tiny_models import tiny_model

import foretell as package
from foretell.api import LLM
from foretell.bench.gguf_files import gguf_file
from foretell.bench.limits import limits, read_bandwidth, step_bytes
from foretell.bench.peers import MissingPeerError
from foretell.bench.peers.process import Peer
from foretell.bench.results import collect
from foretell.bench.run_folder import ABOUT, ROUNDS, Settings, differences, read_rounds
from foretell.bench.runner import PLAIN, Runner
from foretell.bench.suites import Question
from foretell.bench.systems import Answer, ForetellSystem, System
from foretell.conversations import Conversation, converse
from foretell.errors import ForetellError, UsageError
from foretell.loading import ModelFolder
from foretell.requests import SamplingParams

pytestmark = pytest.mark.slow

TINY = ("--dtype", "fp32", "--threads", "1")
QUESTIONS = [
    Question("a", "one", ("first", "and?")), Question("b", "two", ("second",)), Question("c", "one", ("third", "so?")),
]  # fmt: skip


@pytest.fixture(scope="module")
def llm(tiny: str) -> LLM:
    return package.load(tiny, dtype="fp32", threads=1)


def settings_of(llm: LLM, systems: list[System], **changes: Any) -> Settings:
    plain = Settings(
        model="tiny", fingerprint=llm.backbone.fingerprint, dtype="float32", suite="s", digest="d",
        questions=[q.id for q in QUESTIONS], systems=[each.name for each in systems], new_tokens=12,
    )  # fmt: skip
    return replace(plain, **changes)


def systems_of(llm: LLM) -> list[System]:
    return [
        ForetellSystem(llm, PLAIN, "plain", {}),
        ForetellSystem(llm, "prompt_lookup", "prompt_lookup", {"adapt": False}),
    ]


def test_every_answer_is_compared_and_later_turns_follow_plain_ones(llm: LLM, tmp_path: Path) -> None:
    systems = systems_of(llm)
    how = {"repeats": 2, "batches": [1, 2], "temperatures": [0.0, 1.0], "seed": 3}
    runner = Runner(llm, systems, QUESTIONS, settings_of(llm, systems, **how), tmp_path / "out", {}, lambda: 1e9)
    records = runner.run()
    assert len(records) == 2 * 2 * 2 * 5 * 2  # systems, repeats, batches, temperatures, turns of all questions
    assert all(record["same"] for record in records if record["contender"] != PLAIN)
    for temperature in (0.0, 1.0):
        params = SamplingParams(max_new_tokens=12, temperature=temperature, seed=3)
        talks = [Conversation(question.turns, line) for line, question in enumerate(QUESTIONS)]
        truth = dict(converse(llm, llm.decoder(1), talks, params))
        for record in records:
            if record["contender"] == PLAIN and record["round"][0] == temperature:
                line = [q.id for q in QUESTIONS].index(record["question"])
                assert record["ids"] == truth[line][record["turn"]].ids
    first = [record["contender"] for record in records if record["round"][:3] == (0.0, 1, 0)]
    assert first.count(PLAIN) == 5


def test_no_answer_profits_from_an_earlier_one(llm: LLM) -> None:
    ours = ForetellSystem(llm, PLAIN, "plain", {})
    prompt, params = llm.encode("the same question"), SamplingParams(max_new_tokens=4)
    for _ in range(2):
        ours.answer([prompt], params, [0])
        decoder = ours._decoder(1, 0.0)
        assert decoder._parked  # what the last one left
        assert max(decoder.cache.lengths) > 0
    submitted = decoder.submit(prompt, params)
    decoder.forget()
    events = []
    while decoder.busy:
        events += decoder.step()
    assert [event.request for event in events][-1] == submitted
    assert events[-1].statistics is not None
    assert events[-1].statistics.reused_tokens == 0


@pytest.mark.parametrize("stop", [0, 1, 2, 4])
def test_an_interrupted_run_goes_on_behind_its_last_round(llm: LLM, tmp_path: Path, stop: int) -> None:
    def ids(records: list[dict[str, Any]]) -> list[Any]:
        return [(r["contender"], *r["round"], r["question"], r.get("ids"), r.get("same")) for r in records]

    systems = systems_of(llm)
    settings = settings_of(llm, systems)
    straight = Runner(llm, systems, QUESTIONS, settings, tmp_path / "straight", {}, lambda: 1e9).run()

    def interrupt(done: int, total: int, tokens: int) -> None:
        if done > stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Runner(llm, systems, QUESTIONS, settings, tmp_path / "cut", {}, lambda: 1e9).run(interrupt)
    with (tmp_path / "cut" / ROUNDS).open("a") as file:
        file.write('[{"contender": "pl')  # cut short in the midst of a line
    assert len(read_rounds(tmp_path / "cut")) == 2 * (stop + 1)
    calls: list[int] = []
    again = Runner(llm, systems, QUESTIONS, settings, tmp_path / "cut", {}, lambda: 1e9)
    records = again.run(lambda done, total, tokens: calls.append(done))
    assert ids(records) == ids(straight)
    assert calls == list(range(stop + 2, 6))
    assert {record["sitting"] for record in records} == ({1, 2} if stop < 4 else {1})
    about = {"contenders": {each.name: each.about for each in systems}, "weight_bytes": 4}
    results = collect(about, records, QUESTIONS, str)
    assert results["sittings"] == (2 if stop < 4 else 1)


def test_another_run_is_not_gone_on_with(llm: LLM, tmp_path: Path) -> None:
    systems = systems_of(llm)
    Runner(llm, systems, QUESTIONS, settings_of(llm, systems), tmp_path / "out", {}, lambda: 1e9)
    other = settings_of(llm, systems, new_tokens=13, repeats=2)
    with pytest.raises(UsageError, match="holds another run: its --max-new-tokens 12, now 13; its repeats 1, now 2. G"):
        Runner(llm, systems, QUESTIONS, other, tmp_path / "out", {}, lambda: 1e9)
    (tmp_path / "out" / ABOUT).write_text("{")
    with pytest.raises(ForetellError, match="is damaged; choose another --out"):
        Runner(llm, systems, QUESTIONS, settings_of(llm, systems), tmp_path / "out", {}, lambda: 1e9)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("dear")
    with pytest.raises(UsageError, match="holds other files; choose another --out"):
        Runner(llm, systems, QUESTIONS, settings_of(llm, systems), tmp_path / "full", {}, lambda: 1e9)


class Wrong(ForetellSystem):
    """Says something else from its fourth token on."""

    def answer(self, *arguments: Any) -> Any:
        answers = super().answer(*arguments)
        for answer in answers:
            answer.ids = [*answer.ids[:3], (answer.ids[3] + 1) % 256, *answer.ids[4:]]
        return answers


def test_a_run_is_not_gone_on_with_by_another_version(llm: LLM, tmp_path: Path) -> None:
    systems = systems_of(llm)
    about = {"version": "1", "commit": "a", "machine": "m", "contenders": {PLAIN: {"options": ("x",)}}}
    settings = settings_of(llm, systems)
    Runner(llm, systems, QUESTIONS, settings, tmp_path / "out", about, lambda: 1e9)
    Runner(llm, systems, QUESTIONS, settings, tmp_path / "out", about, lambda: 1e9)
    changed = about | {"commit": "b", "machine": "n"}
    with pytest.raises(UsageError, match="holds another run: its commit a, now b; its machine m, now n. Give its"):
        Runner(llm, systems, QUESTIONS, settings, tmp_path / "out", changed, lambda: 1e9)


@pytest.mark.parametrize(
    ("changes", "described"),
    [
        ({"questions": ["b"]}, "its questions are 3 (a, b, c), these 1 (b)"),
        ({"systems": [PLAIN, "x"]}, "its systems plain, prompt_lookup, now plain, x"),
        ({"batches": [1, 2]}, "its batch sizes 1, now 1, 2"),
    ],
)
def test_a_difference_is_described_once_with_both_values(llm: LLM, changes: dict[str, Any], described: str) -> None:
    settings = settings_of(llm, systems_of(llm))
    runs = [
        {"settings": each.to_json(), "contenders": {name: {"options": {}} for name in each.systems}}
        for each in (settings, replace(settings, **changes))
    ]
    assert list(differences(*runs)) == [described]
    changed = runs[0] | {"contenders": {PLAIN: {"options": {}}, "prompt_lookup": {"options": {"nodes": 8}}}}
    assert list(differences(runs[0], changed)) == ["prompt_lookup had another options"]


def test_an_estimate_counts_the_rounds_that_are_left(llm: LLM, tmp_path: Path) -> None:
    systems = systems_of(llm)

    def fixed(prompts: list[list[int]], params: SamplingParams, keys: list[int]) -> list[Answer]:
        seconds = len(prompts[0]) * 1.0 + 10.0 * (params.max_new_tokens - 1)  # 1 s a token of the prompt, 10 s a step
        return [Answer([0], seconds, [], prefill_seconds=len(prompts[0]) * 1.0)]

    runner = Runner(llm, systems, QUESTIONS, settings_of(llm, systems), tmp_path / "out", {}, lambda: 1e9)
    runner.plain.answer = fixed  # type: ignore[assignment]
    encoded = {text: len(llm.encode(text)) for question in QUESTIONS for text in question.turns}
    read = 2 * (encoded["first"] + encoded["third"]) + encoded["and?"] + encoded["so?"] + encoded["second"] + 2 * 12
    assert runner.estimate() == pytest.approx(2 * (read + 10.0 * (5 * 12 + 6)), abs=0.1)  # two systems; six to warm up
    done = [record | {"ids": []} for turn in (0, 1) for record in [{"round": [0.0, 1, 0, 0, turn]}]]
    runner.records = done
    read -= 2 * encoded["first"] + encoded["and?"] + 12
    assert runner.estimate() == pytest.approx(2 * (read + 10.0 * (3 * 12 + 6)), abs=0.1)
    runner.records = [{"round": list(each.key)} for each in runner.rounds()]
    assert runner.estimate() == pytest.approx(0, abs=0.1)


def test_what_cannot_be_asked_is_found_out_before_anything_is_written(llm: LLM, tmp_path: Path) -> None:
    systems = systems_of(llm)
    for questions, how, sentence in (
        ([Question("long", "one", ("x" * 600,))], {}, "Question long, turn 1, has .* tokens, and 12 new ones exceed"),
        (QUESTIONS, {"temperatures": [-1.0]}, "temperature is -1.0"),
    ):
        with pytest.raises(UsageError, match=sentence):
            Runner(llm, systems, questions, settings_of(llm, systems, **how), tmp_path / "o", {}, lambda: 1e9)
        assert not (tmp_path / "o").exists()


def test_a_peer_that_fails_in_the_midst_takes_no_further_part(llm: LLM, tmp_path: Path) -> None:
    class Failing(ForetellSystem):
        calls = 0

        def answer(self, *given: Any) -> Any:
            self.calls += 1
            if self.calls == 3:  # one to warm up, one answer
                raise MissingPeerError("it is tired.")
            return super().answer(*given)

    systems = [*systems_of(llm), Failing(llm, "peer", "plain", {})]
    settings = settings_of(llm, systems)
    runner = Runner(llm, systems, QUESTIONS, settings, tmp_path / "out", {}, lambda: 1e9)
    records = runner.run()
    assert [sum(r["contender"] == name for r in records) for name in settings.systems] == [5, 5, 1]
    assert list(runner.failed) == ["peer"]
    assert re.fullmatch(
        r"It ended at question .; its figures are of the rounds before\. it is tired\.", runner.failed["peer"]
    )
    about = {"contenders": {each.name: each.about for each in systems}, "weight_bytes": 4}
    assert [row["answers"] for row in collect(about, records, QUESTIONS, str)["table"]] == [5, 5, 1]


def test_a_difference_is_found_and_weighed(llm: LLM, tmp_path: Path) -> None:
    systems = [systems_of(llm)[0], Wrong(llm, "wrong", "plain", {})]
    question = [Question("a", "one", ("first",), "number", "7")]
    settings = settings_of(llm, systems, questions=["a"])
    records = Runner(llm, systems, question, settings, tmp_path / "out", {}, lambda: 1e9).run()
    wrong = next(record for record in records if record["contender"] == "wrong")
    plain = next(record for record in records if record["contender"] == PLAIN)
    assert not wrong["same"]
    assert wrong["divergence"]["at"] == 3
    prompt = llm.encode([{"role": "user", "content": "first"}])
    result = llm.generate([*prompt, *plain["ids"][:3]], max_new_tokens=1, logprobs=100)
    said = dict(result.logprobs[0].top)  # type: ignore[union-attr]
    if wrong["ids"][3] in said:
        margin = said[plain["ids"][3]] - said[wrong["ids"][3]]
        assert wrong["divergence"]["margin"] == pytest.approx(margin, abs=1e-3)
    about = {"contenders": {each.name: each.about for each in systems}, "weight_bytes": 4}
    decode = lambda ids: llm.tokenizer.decode(ids, skip_special=True)  # noqa: E731
    rows = collect(about, records, question, decode)["table"]
    assert [set(row["quality"]) for row in rows] == [{"exact_match"}, {"exact_match", "agreement_rouge_l"}]
    assert (rows[1]["same"], rows[1]["compared"]) == (0, 1)


def test_the_bound_counts_the_weights_of_a_step(llm: LLM) -> None:
    c = llm.backbone.config
    layer = 2 * c.hidden * c.q_width + 2 * c.hidden * c.kv_width + 3 * c.hidden * c.mlp + 2 * c.hidden
    embeddings = c.vocab * c.hidden  # tied or not, one of the two is read
    assert step_bytes(llm.backbone) == 4 * (c.layers * layer + embeddings + c.hidden)
    assert read_bandwidth(llm.backbone) > 0


def test_the_bound_follows_from_the_median_bandwidth_of_a_run() -> None:
    found = limits(200, [1e3, 9e9, 4e3])
    assert found == {"read_bytes_per_s": 4e3, "weight_bytes": 200, "plain_tokens_per_s": 20}


# -- peers -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_transformers_says_the_same_in_float32(llm: LLM, tiny: str, tmp_path: Path) -> None:
    systems: list[System] = [systems_of(llm)[0]]
    for name, parts in (("transformers", []), ("transformers:prompt_lookup", ["prompt_lookup"])):
        systems.append(Peer(llm, name, "transformers", parts, rows=2, cache_dir=tmp_path))
    settings = settings_of(llm, systems)
    try:
        records = Runner(llm, systems, QUESTIONS, settings, tmp_path / "out", {}, lambda: 1e9).run()
        pair = systems[1].answer(
            [llm.encode("one"), llm.encode("a longer one")], SamplingParams(max_new_tokens=6), [0, 1]
        )
    finally:
        for each in systems:
            each.close()
    assert len(records) == 15
    assert all(record["same"] for record in records if record["contender"] != PLAIN)
    assert all(sum(n for n, _ in record["arrivals"]) == record["new_tokens"] for record in records)
    peaks = {c.name: max(r["peak_bytes"] for r in records if r["contender"] == c.name) for c in systems}
    assert all(10**8 < peaks[c.name] < 10**10 for c in systems[1:])  # PyTorch alone takes more than the former
    singles = [llm.generate(text, max_new_tokens=6).ids for text in ("one", "a longer one")]
    assert [answer.ids for answer in pair] == singles


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux tells a process's state in a file")
@pytest.mark.slow
def test_a_peer_is_stopped_while_others_answer(llm: LLM, tmp_path: Path) -> None:
    peer = Peer(llm, "transformers", "transformers", [], rows=1, cache_dir=tmp_path)
    try:
        for _ in range(2):
            assert eventually_stopped(peer._process.pid)
            assert peer.answer([[1, 2]], SamplingParams(max_new_tokens=2, ignore_eos=True), [0])
    finally:
        peer.close()
    assert peer._process.poll() == 0


def eventually_stopped(pid: int) -> bool:
    for _ in range(100):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(0.05)
    return False


def test_peers_that_are_not_there_say_how_to_get_them(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(
        MissingPeerError, match=r"llama.cpp is not installed; foretell bench setup llama.cpp installs it"
    ):
        Peer(llm, "llama.cpp", "llama.cpp", [], rows=1, cache_dir=tmp_path)
    with pytest.raises(UsageError, match="transformers has no variant 'medusa'; it has prompt_lookup, early_exit"):
        Peer(llm, "transformers:medusa", "transformers", ["medusa"], rows=1, cache_dir=tmp_path)
    with pytest.raises(UsageError, match="names the variants prompt_lookup and early_exit; run them one by one"):
        Peer(llm, "x", "transformers", ["prompt_lookup", "early_exit"], rows=1, cache_dir=tmp_path)
    with pytest.raises(UsageError, match="no option 'nodes'; it has prompt_lookup_num_tokens"):
        Peer(llm, "x", "transformers", ["prompt_lookup", "nodes=3"], rows=1, cache_dir=tmp_path)


@pytest.mark.slow
def test_a_peer_that_fails_says_why(llm: LLM, tmp_path: Path) -> None:
    peer = Peer(llm, "transformers", "transformers", [], rows=1, cache_dir=tmp_path)
    try:
        with pytest.raises(MissingPeerError, match="transformers failed: "):
            peer.answer([[10**6]], SamplingParams(max_new_tokens=2), [0])
        assert len(peer.answer([[1, 2]], SamplingParams(max_new_tokens=2, ignore_eos=True), [0])[0].ids) == 2
        peer._process.kill()
        with pytest.raises(MissingPeerError, match="ended unexpectedly"):
            peer.answer([[1]], SamplingParams(max_new_tokens=2), [0])
    finally:
        peer.close()


@pytest.mark.parametrize("kind", ["q8_0", "bf16"])
def test_a_gguf_file_in_another_type_holds_the_same_model(tmp_path: Path, kind: str) -> None:
    import gguf

    model = tiny_model("llama", hidden_size=64, intermediate_size=96)
    path = write_gguf(tmp_path / "model.Q4_1.gguf", model, gguf.GGMLQuantizationType.Q4_1)
    folder = ModelFolder(str(path), tmp_path, "gguf")
    assert gguf_file(folder, "q4_1", tmp_path) == path
    other = gguf_file(folder, kind, tmp_path / "cache")
    options = {"dtype": "fp32", "weights": "bf16", "threads": 1, "cache_dir": tmp_path / "c"}
    ours, theirs = (package.load(each, **options) for each in (path, other))
    tokens = torch.arange(64)
    a, b = (each.backbone.head_rows(tokens) for each in (ours, theirs))
    assert (a - b).abs().max() <= (0.01 * a.abs().max() if kind == "q8_0" else 0)  # what we read is bfloat16 too
    assert gguf.GGUFReader(other).tensors[0].tensor_type.name.lower() == kind
    assert theirs.encode("a b", raw=True) == ours.encode("a b", raw=True)
    with pytest.raises(ForetellError, match="did not come as GGUF; give its .gguf file"):
        gguf_file(ModelFolder("org/name", tmp_path, "hub"), "q4_1", tmp_path)
