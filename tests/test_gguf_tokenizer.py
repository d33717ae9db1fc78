"""Tokenizers rebuilt from a GGUF file's metadata: the ids that llama.cpp and the original tokenizers give."""

from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import byte_level, sentencepiece, write_gguf
from tiny_models import tiny_model

from foretell.errors import ForetellError
from foretell.loading.gguf_file import open_gguf
from foretell.loading.gguf_tokenizer import SPLIT_RULES, splitter, write_tokenizer
from foretell.loading.tokenizer import Tokenizer

VOCAB = 320
TEXT = "Don't WE'LL camelCase  12345 x٣٤!?\n\n  \ty,z=1 DÉJÀ_vu 你好世界 😀🎉\r\n½ e\u0301te"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", vocab_size=VOCAB, num_hidden_layers=1)


def rebuilt(folder: Path, model: Any, **options: Any) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    write_tokenizer(open_gguf(write_gguf(folder / "tiny.gguf", model, **options)), folder)
    return Tokenizer.from_folder(folder)


def pieces(name: str, text: str) -> list[str]:
    """Where the rule cuts, in characters of the text."""
    return [text[start:end] for _, (start, end) in splitter(SPLIT_RULES[name]).pre_tokenize_str(text)]


# --- split rules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("smollm", "ab  12", ["ab", "  ", "1", "2"]),
        ("gpt-2", "x 12345 don't", ["x", " 12345", " don", "'t"]),
        ("llama-bpe", "x 12345 DON'T!\n", ["x", " ", "123", "45", " DON", "'T", "!\n"]),
        ("dbrx", "x 12345", ["x", " ", "123", "45"]),
        ("qwen2", "x 12345", ["x", " ", "1", "2", "3", "4", "5"]),
        ("seed-coder", "12!\n", ["1", "2", "!", "\n"]),
        ("tekken", "camelCase don't 12/\n", ["camel", "Case", " don", "'t", " ", "1", "2", "/\n"]),
        ("gpt-4o", "camelCase don't 1234", ["camel", "Case", " don't", " ", "123", "4"]),
        ("deepseek-coder", "a b,c 12\n你好", ["a", " b", ",", "c", " ", "1", "2", "\n", "你好"]),
    ],
)
def test_text_is_cut_where_the_rule_says(name: str, text: str, expected: list[str]) -> None:
    assert pieces(name, text) == expected


def test_rules_are_those_of_transformers_where_it_knows_them() -> None:
    theirs = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping").GGUF_PRE_TOKENIZER_SPLITS
    from tokenizers import Regex, pre_tokenizers

    both = SPLIT_RULES.keys() & theirs.keys()
    assert {"llama-bpe", "qwen2", "tekken", "gpt-4o"} <= both
    for name in both:
        split = pre_tokenizers.Split(Regex(theirs[name]), "isolated").pre_tokenize_str(TEXT)
        assert pieces(name, TEXT) == [piece for piece, _ in split], name


@pytest.mark.parametrize(
    ("pre", "sentence"),
    [
        (None, r"does not say how its tokenizer splits text \(tokenizer.ggml.pre is missing\).*safetensors"),
        ("default", "does not say how its tokenizer splits text .*is default"),
        ("klingon", "splits text by the rule 'klingon'.*not known.*safetensors"),
    ],
)
def test_an_unknown_split_is_refused(pre: str | None, sentence: str, model: Any, tmp_path: Path) -> None:
    with pytest.raises(ForetellError, match=rf"tiny\.gguf {sentence}"):
        rebuilt(tmp_path, model, tokenizer=byte_level(), extra={"tokenizer.ggml.pre": pre})


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2", "tekken"])
def test_ids_are_those_of_the_folder_in_transformers(pre: str, model: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    add = byte_level(("<e>", "<b>"), words=("Ġx", "12"), merges=("Ġ x", "1 2"), pre=pre)
    ours = rebuilt(tmp_path, model, tokenizer=add)
    model.config.save_pretrained(tmp_path)
    folder = AutoTokenizer.from_pretrained(tmp_path)
    assert folder(TEXT)["input_ids"] == ours.encode(TEXT, special=True)
    assert (folder.bos_token, folder.eos_token) == ("<b>", "<e>")
    gguf_file = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    plain = TEXT.replace("e\u0301", "é")  # the two spellings are one to Qwen
    assert gguf_file(plain, add_special_tokens=False)["input_ids"] == ours.encode(plain)


def test_qwen_composes_accents_first(model: Any, tmp_path: Path) -> None:
    for pre, same in (("qwen2", True), ("llama-bpe", False)):
        ours = rebuilt(tmp_path / pre, model, tokenizer=byte_level(pre=pre))
        assert (ours.encode("e\u0301") == ours.encode("é")) == same


@pytest.mark.parametrize(("pre", "count"), [("llama-bpe", 1), ("tekken", 1), ("gpt-2", 3), ("qwen2", 3)])
def test_a_piece_that_is_a_token_stays_whole_where_the_rule_says(
    pre: str, count: int, model: Any, tmp_path: Path
) -> None:
    ours = rebuilt(tmp_path, model, tokenizer=byte_level(words=("abc",), pre=pre))
    assert len(ours.encode("abc")) == count


# --- marks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pre", "flags", "expected"),
    [
        ("llama-bpe", {}, ["<b>", "x"]),
        ("llama-bpe", {"add_bos_token": False}, ["x"]),
        ("gpt-2", {}, ["x"]),
        ("gpt-2", {"add_bos_token": True}, ["<b>", "x"]),
        ("gpt-2", {"add_eos_token": True}, ["x", "<e>"]),
        ("tekken", {"add_eos_token": True}, ["<b>", "x", "<e>"]),
    ],
)
def test_marks_around_a_text(pre: str, flags: dict[str, bool], expected: list[str], model: Any, tmp_path: Path) -> None:
    extra = {f"tokenizer.ggml.{key}": value for key, value in flags.items()}
    ours = rebuilt(tmp_path, model, tokenizer=byte_level(("<e>", "<b>"), pre=pre), extra=extra)
    assert [ours.decode([index]) for index in ours.encode("x", special=True)] == expected
    assert ours.decode(ours.encode("x")) == "x"


def test_marks_spelled_with_other_letters_than_bytes_are_one_token(model: Any, tmp_path: Path) -> None:
    """DeepSeek's: transformers' reader cuts them into pieces."""
    add = byte_level(("<e>", "<b>", "<｜User｜>"), user_defined=("<think>", "  "), pre="deepseek-r1-qwen")
    ours = rebuilt(tmp_path, model, tokenizer=add)
    ids = ours.encode("<｜User｜>a<think>  b")
    assert [ours.decode([index]) for index in ids] == ["<｜User｜>", "a", "<think>", "  ", "b"]
    assert ours.decode(ids, skip_special=True) == "a<think>  b"


def test_tokens_that_only_pad_the_vocabulary_are_no_text(model: Any, tmp_path: Path) -> None:
    ours = rebuilt(tmp_path, model, tokenizer=byte_level(("<e>",)))
    assert ours.decode([VOCAB - 1]) == ""
    assert len(ours.encode(f"[PAD{VOCAB - 1}]")) > 1


def test_named_templates_without_a_default_are_kept(model: Any, tmp_path: Path) -> None:
    named = {"tokenizer.chat_templates": ["rag"], "tokenizer.chat_template.rag": "{{ 1 }}"}
    rebuilt(tmp_path, model, tokenizer=byte_level(), extra=named)
    assert '"name": "rag"' in (tmp_path / "tokenizer_config.json").read_text()
    assert not (tmp_path / "chat_template.jinja").exists()


# --- sentencepiece ------------------------------------------------------------------------------------------

WORDS = ("▁t", "he", "▁the", "is", "▁is", "▁▁", "ab", "bc")


def spelled(tokenizer: Tokenizer, text: str, special: bool = False) -> list[str]:
    return [str(tokenizer._backend.id_to_token(index)) for index in tokenizer.encode(text, special)]


def test_the_best_score_is_joined_first(model: Any, tmp_path: Path) -> None:
    ours = rebuilt(tmp_path, model, tokenizer=sentencepiece(WORDS))
    assert spelled(ours, "the is", special=True) == ["<s>", "▁the", "▁is"]
    assert spelled(ours, "abc") == ["▁", "ab", "c"]
    assert spelled(ours, "é") == ["▁", "<0xC3>", "<0xA9>"]
    assert ours.decode(ours.encode("the  é is")) == "the  é is"


def test_a_space_goes_before_every_stretch_of_text(model: Any, tmp_path: Path) -> None:
    """As llama.cpp has it, and the tokenizers published with Llama 2, Vicuna and TinyLlama."""
    ours = rebuilt(tmp_path / "yes", model, tokenizer=sentencepiece(WORDS, marks=("[I]",)))
    assert spelled(ours, "<s>the[I]is") == ["<s>", "▁the", "[I]", "▁is"]
    assert spelled(ours, " the") == ["▁", "▁the"]
    bare = rebuilt(
        tmp_path / "no", model, tokenizer=sentencepiece(WORDS, marks=("[I]",)),
        extra={"tokenizer.ggml.add_space_prefix": False},
    )  # fmt: skip
    assert spelled(bare, "<s>the[I]is the") == ["<s>", "t", "he", "[I]", "is", "▁the"]
    assert bare.decode(bare.encode(" the")) == " the"


def test_sentencepiece_ids_are_those_of_transformers(model: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = rebuilt(tmp_path, model, tokenizer=sentencepiece(WORDS))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    for text in ("the is", "this  is\nthe abc", "é!"):
        assert theirs(text)["input_ids"] == ours.encode(text, special=True)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "extra", "sentence"),
    [
        ("bytes", {"model": "t5"}, "tokenizer of the kind 't5'; the kinds are"),
        ("bytes", {"tokens": None}, r"has no tokens"),
        ("bytes", {"tokens": ["a", "b", "a"]}, "the token 'a' twice"),
        ("bytes", {"token_type": [1, 3]}, f"2 token types for {VOCAB} tokens"),
        ("bytes", {"merges": None}, "no merges"),
        ("bytes", {"merges": ["x yz"]}, "tokenizer inside .* cannot be read .*yz.*safetensors"),
        ("bytes", {"eos_token_id": 5000}, f"eos_token_id = 5000, but its tokens are 0 to {VOCAB - 1}"),
        ("bytes", {"add_eos_token": True}, "asks for a eos token around every text but names none"),
        ("sentences", {"scores": None}, "no scores of its tokens"),
        ("sentences", {"scores": [-1000.0] * VOCAB}, "no scores of its tokens"),
        ("sentences", {"remove_extra_whitespaces": True}, "tokenizer.ggml.remove_extra_whitespaces, which is not"),
    ],
)
def test_what_cannot_be_read_is_named(
    kind: str, extra: dict[str, Any], sentence: str, model: Any, tmp_path: Path
) -> None:
    add = byte_level() if kind == "bytes" else sentencepiece(WORDS)
    with pytest.raises(ForetellError, match=sentence) as caught:
        rebuilt(tmp_path, model, tokenizer=add, extra={f"tokenizer.ggml.{key}": extra[key] for key in extra})
    assert "\n" not in str(caught.value) and "tiny.gguf" in str(caught.value)
