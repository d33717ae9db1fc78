"""What a user reads: the text of answers, streamed or whole, where the tokenizer is of sentencepiece's kind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import Foretell
from tiny_models import save_tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

import foretell as package
from foretell.api import LLM, Result

WORDS = ["▁", "▁▁▁▁", "▁the", "▁is", "is", "x", ":", "▁x", *(f"<0x{byte:02X}>" for byte in b"\n\xf0\x9f\x98\x80")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer like Llama-2's: <s> before every text, byte tokens, the first space dropped."""
    folder = tmp_path_factory.mktemp("llama")
    vocab = {piece: index for index, piece in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens([AddedToken(mark) for mark in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    save_tiny(folder, eos_token_id=2)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return package.load(folder, dtype="fp32", threads=1)


def ids_of(llm: LLM, *pieces: str) -> list[int]:
    return [llm.tokenizer._backend.token_to_id(piece) for piece in pieces]


def written(llm: LLM, prompt: list[int], piece: str, count: int = 1, **options: Any) -> Result:
    """What the model writes when it can only write this."""
    [token] = ids_of(llm, piece)
    given = {"max_new_tokens": count, "logit_bias": {token: 1000}, "ignore_eos": True} | options
    whole, pieces = llm.generate([prompt], **given)[0], list(llm.stream(prompt, **given))
    assert whole.text == "".join(event.text for event in pieces)
    assert whole.ids == [token for event in pieces for token in event.tokens]
    return whole


def test_a_text_that_is_gone_on_with_keeps_its_spaces(llm: LLM) -> None:
    prompt = ids_of(llm, "<s>", "▁x", "is")
    assert written(llm, prompt, "▁the").text == " the"
    assert written(llm, prompt, "▁▁▁▁").text == "    "
    assert written(llm, prompt, "▁the", 3).text == " the the the"
    assert written(llm, ids_of(llm, "<s>"), "▁the", 2).text == "the the"  # nothing stands before it
    stopped = written(llm, prompt, "▁the", 3, stop=(" the",))
    assert (stopped.text, stopped.finish_reason, len(stopped.ids)) == ("", "stop", 1)


def test_bytes_that_are_no_character_read_as_decoding_reads_them(llm: LLM) -> None:
    """The decoder reads a run of byte tokens together: one byte too few, and none of it is a character."""
    prompt = ids_of(llm, "<s>", "x")
    assert written(llm, prompt, "<0xF0>", 3).text == "\ufffd" * 3
    begun = [*prompt, *ids_of(llm, "<0xF0>", "<0x9F>", "<0x98>")]
    assert written(llm, begun, "<0x80>", 1).text == "\U0001f600"
    assert written(llm, begun, "<0x80>", 2).text == "\ufffd" * 2
    assert written(llm, prompt, "<0x0A>", 3).text == "\n\n\n"
    stopped = written(llm, prompt, "<0x0A>", 3, stop=("\n\n",))
    assert (stopped.text, len(stopped.ids)) == ("", 2)


def test_a_special_token_may_be_a_stop_string(llm: LLM, tiny: str, foretell: Foretell) -> None:
    prompt = ids_of(llm, "<s>", "x")
    for options in ({}, {"stop": ("zzz",)}):
        assert len(written(llm, prompt, "</s>", 4, **options).ids) == 4
    stopped = written(llm, prompt, "</s>", 4, stop=("zzz", "</s>"))
    assert (stopped.ids, stopped.text, stopped.finish_reason) == ([2], "", "stop")
    command = ("generate", "hi", "-m", tiny, "-n", "4", "--ignore-eos", "--logit-bias", "256=1000", "--json")
    [line] = foretell(*command, "--stop", "<|end|>").lines
    assert (line["ids"], line["text"], line["finish_reason"]) == ([256], "", "stop")
    ran = foretell(*command, "--stop", "<|end|>\n")
    assert (ran.code, ran.out) == (2, "")
    assert "The stop string '<|end|>\\n' holds '<|end|>', a special token" in ran.err


def test_a_second_start_mark_is_left_out_and_said_once(folder: Path, foretell: Foretell, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("<s>xx", "xx", "<s>xx", "<s>xxx")))
    ran = foretell("generate", "--prompts", str(lines), "-m", str(folder), "--raw", "-n", "2", "--json")
    # a text without a mark begins with a space more
    assert [line["prompt_tokens"] for line in ran.lines] == [3, 4, 3, 4]
    note = "note: The prompt begins with <s>, which is put before every raw prompt; it is given to the model once.\n"
    assert ran.err.count(note) == 1


def test_a_conversation_with_named_templates_only(tiny: str, foretell: Foretell, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "named")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "rag", "template": settings["chat_template"]}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for verb, *more in (["chat"], ["generate", "hi"]):
        ran = foretell(verb, *more, "-m", str(folder))
        assert ran.code in (1, 2)
        assert "has chat templates named rag, but none named default, so it cannot" in ran.err
