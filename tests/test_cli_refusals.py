"""What the command line refuses: one sentence, the right exit code, nothing on stdout, and no model loaded in vain."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Foretell, Ran


def refused(ran: Ran, code: int, sentence: str) -> None:
    """One sentence on stderr, nothing on stdout, no traceback."""
    assert ran.out == ""
    assert re.fullmatch(rf"error: .*{sentence}.*\n", ran.err), ran.err
    assert ran.code == code


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "either a prompt .* or a file"),
        (["hi", "--prompts", "x.jsonl"], "either a prompt .* or a file"),
        (["hi", "--logprobs", "2"], "--logprobs needs --json"),
        (["hi", "-n", "0"], "max_new_tokens is 0; it must lie between"),
        (["hi", "-t", "-1"], r"temperature is -1.0; it must lie between"),
        (["hi", "-t", "nan"], "temperature is nan"),
        (["hi", "--top-p", "1.5"], "top_p is 1.5"),
        (["hi", "--top-k", "-1"], "top_k is -1"),
        (["hi", "--stop", ""], "stop is"),
        (["hi", "--logit-bias", "5"], "--logit-bias '5' is not ID=VALUE"),
        (["hi", "--logit-bias", "a=1"], "--logit-bias 'a=1' is not ID=VALUE"),
        (["hi", "--typical", "0.1"], "--typical '0.1' is not EPS,DELTA"),
        (["hi", "--typical", "-1,2"], "thresholds must be at least 0"),
        (["hi", "-d", "prompt_lokup"], "Unknown drafter 'prompt_lokup': did you mean 'prompt_lookup'"),
        (["hi", "-o", "nodes"], "--option 'nodes' is not key=value"),
        (["hi", "-o", "nodes=3"], "Drafter 'plain' has no option 'nodes'; it has none"),
        (
            ["hi", "-d", "prompt_lookup", "-o", "node=3"],
            "did you mean 'nodes'. It has longest, .*nodes",
        ),
        (["hi", "-d", "prompt_lookup", "-o", "nodes=many"], "is 'many'; it must be a whole number"),
        (["hi", "-d", "prompt_lookup", "-o", "dtype=fp32"], "has no option 'dtype'"),
        (["hi", "-m", "smolm"], "No model is called 'smolm'"),
        (["hi", "-m", "./nowhere"], "There is no folder ./nowhere"),
    ],
)
def test_what_could_never_work(foretell: Foretell, cache: Path, arguments: list[str], sentence: str) -> None:
    refused(foretell("generate", *arguments), 2, sentence)
    assert not cache.exists()  # nothing was fetched


EARLY = (
    ["generate", "hi", "-d", "prompt_lokup"],
    ["generate", "hi", "-m", "smolm"],
    ["generate", "hi", "-m", "./nowhere"],
    ["generate", "hi", "-m", "./nowhere.gguf"],
    ["generate", "hi", "-m", "smollm2-135m+nothing"],
    ["generate", "hi", "-m", "org/elsewhere", "--offline"],
    ["generate", "hi", "--device", "tpu"],
    ["generate", "hi", "--threads", "0"],
    ["generate", "hi", "-n", "0"],
    ["generate", "hi", "--typical", "0.1"],
    ["generate", "--prompts", "nowhere.jsonl"],
    ["generate", " "],
    ["chat", "-d", "prompt_lokup"],
    ["chat", "--system", " "],
    ["demo", "-m", "smolm"],
    ["demo", "-d", "prompt_lokup"],
    ["tune", "-d", "prompt_lokup"],
    ["tune", "--device", "tpu"],
    ["drafters", "prompt_lokup"],
    ["pull", "smolm"],
    ["rm", "smolm"],
)
"""What can be refused without a model."""


@pytest.mark.slow
def test_what_needs_no_model_is_refused_without_torch(tmp_path: Path) -> None:
    """All in one process, which the first import of torch would show."""
    code = f"""
import sys
from foretell.cli import main
for arguments in {EARLY!r}:
    try: main(arguments)
    except SystemExit as left: assert left.code in (1, 2), arguments
    assert not {{"torch", "transformers", "numpy", "huggingface_hub"}} & set(sys.modules), arguments
"""
    environment = os.environ | {"FORETELL_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert len(re.findall("^error: ", ran.stderr, re.MULTILINE)) == len(EARLY)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--threads", "0"], "threads is 0"),
        (["--device", "tpu"], "Unknown device 'tpu'"),
        (["--kernel", "zzz"], "kernel.* 'zzz'"),
        (["--logit-bias", "257=1"], "outside 0..256"),
        (["--stop-id", "-1"], "outside 0..256"),
        (["-n", "600"], "exceed this model's context of 512"),
        (["-d", "prompt_lookup", "-o", "nodes=1"], "nodes in 2..256"),
    ],
)
def test_what_this_model_cannot(foretell: Foretell, tiny: str, arguments: list[str], sentence: str) -> None:
    refused(foretell("generate", "hi", "-m", tiny, *arguments), 2, sentence)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "holds no prompts"),
        (b"\n  \n", "holds no prompts"),
        (b'{"prompt": "ok"}\n{"prompt": ', r"line 2 is not valid JSON \(Expecting value\)"),
        (b"[" * 5000, "line 1 is not valid JSON"),
        (b'["ok"]', "line 1 is a list, not an object"),
        (b"3", "line 1 is a number, not an object"),
        (b'{"text": "ok"}', "line 1 has neither `prompt` nor `turns`"),
        (b'{"prompt": "ok", "turns": ["ok"]}', "line 1 has both"),
        (b'{"prompt": 3}', "`prompt` holds a number; it must be a string"),
        (b'{"prompt": null}', "`prompt` holds null"),
        (b'{"prompt": " "}', "line 1: the prompt is empty"),
        (b'{"prompt": "\\ud800"}', "which is no character"),
        (b'{"turns": "ok"}', "`turns` is a string; it must be a list"),
        (b'{"turns": []}', "`turns` has 0 entries"),
        (b'{"turns": ["ok", {}]}', "`turns` holds an object; it must be a list of strings"),
        (b'{"turns": ["ok", ""]}', "line 1: the prompt is empty"),
        (b'{"prompt": "\xff"}', "is not UTF-8"),
    ],
)
def test_a_file_is_checked_before_a_model_is_loaded(
    foretell: Foretell, cache: Path, tmp_path: Path, content: bytes, sentence: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    refused(foretell("generate", "--prompts", str(path)), 1, sentence)
    refused(foretell("generate", "--prompts", "-", stdin=content), 1, sentence)
    assert not cache.exists()


def test_prompts_that_cannot_be_read(foretell: Foretell, cache: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "none.jsonl")
    refused(foretell("generate", "--prompts", missing), 1, "Cannot read .*none.jsonl: No such file")
    refused(foretell("generate", "--prompts", str(tmp_path)), 1, "Is a directory")
    refused(foretell("generate", "  "), 1, "the prompt is empty")
    refused(foretell("generate", "\udcff"), 1, "which is no character")
    turns = b'{"turns": ["a", "b"]}'
    refused(foretell("generate", "--prompts", "-", "--raw", stdin=turns), 1, "line 1: raw text has no turns")


def test_a_long_line_is_refused_before_anything_is_answered(foretell: Foretell, tiny: str) -> None:
    lines = '{"prompt": "short"}\n{"prompt": "' + "long " * 200 + '"}\n'
    ran = foretell("generate", "--prompts", "-", "-m", tiny, "-n", "4", stdin=lines.encode())
    refused(ran, 2, "stdin, line 2: A prompt of .* leaves no room for an answer")


@pytest.mark.parametrize("arguments", [["nonsense"], ["generate", "--foo"], ["generate", "hi", "--dtype", "f8"]])
def test_usage_errors_are_typers_own(foretell: Foretell, arguments: list[str]) -> None:
    ran = foretell(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "Usage: foretell" in ran.err
    assert "Traceback" not in ran.err


def test_chat_needs_a_template(foretell: Foretell, tiny: str, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for file in Path(tiny).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "tokenizer_config.json").write_text("{}")
    refused(foretell("chat", "-m", str(folder), stdin=b"hi\n"), 2, "has no chat template")
    refused(foretell("chat", "--logprobs", "1", stdin=b"hi\n"), 2, "--logprobs is for")
