"""Our tokenizer against transformers': the same ids for the same text and the same messages."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from foretell.errors import ForetellError, ForetellWarning
from foretell.loading.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<start>system\nbe kind<end>\n' }}{% endif %}"
    "{{'<start>' + message['role'] + '\n' + message['content'] + '<end>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)

# what the templates of real families do, each in a few lines
TEMPLATES = {
    "chatml": CHATML,
    "bos and trim": """
{{- bos_token }}
{%- for message in messages %}
    {{- '<start>' + message['role'] + '<end>' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start>assistant<end>' }}
{%- endif %}
""",
    "date": "{{ strftime_now('%Y %B') }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "json": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
    "namespace": """
{%- set ns = namespace(last=0, seen=false) %}
{%- for m in messages %}{% if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{% set ns.seen = true %}{% endif %}{% endfor %}
{{- ns.last }}{{ ns.seen }}{{ messages[ns.last].content }}
""",
    "loop controls": "{% for m in messages %}{{ m.content }}{% if m.name %}{% break %}{% endif %}{%endfor%}",
    "generation": """
{% for m in messages %}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% set x = 1 %}{% endgeneration %}{% endif %}
{{ m.content }}{{ x is defined }}
{% endfor %}
""",
    "no tools": "{% if tools %}tools{% endif %}{{ documents is none }}{{ messages[0].content }}",
    "name": "{% for m in messages %}{{ m.name is defined }}{{ m.content }}{% endfor %}",
}

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello  there 12"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": " <&> \"quoted\" 'é' \n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "name": None},
        {"role": "user", "content": "three <end> <start>", "name": "kim"},
    ],
    [{"role": "user", "content": "日本語 🙂 \t tab"}],
]


def save_tokenizer(folder: Path, template: Any = CHATML, **settings: Any) -> None:
    """A byte-level BPE tokenizer with three marks, and a post-processor that puts BOS in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "he", "ll", "hell", "Ġo"])}
    backend = Backend(models.BPE(vocab, [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "o")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, normalized=False) for mark in ("<bos>", "<start>", "<end>")])
    backend.add_tokens(["<think>"])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    backend.enable_truncation(4)  # a leftover of training that must not cut prompts
    backend.enable_padding(length=6)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": {"content": "<end>", "__type": "AddedToken"},
        "chat_template": template,
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def their_chat(tokenizer: Any, messages: list[dict[str, Any]], add_generation_prompt: bool) -> list[int]:
    return tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_is_bit_equal_to_transformers(template: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, TEMPLATES[template])
    ours, reference = Tokenizer.from_folder(tmp_path), theirs(tmp_path)
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            assert ours.chat(messages, prompt) == their_chat(reference, messages, prompt)


def test_encode_and_decode_are_those_of_transformers(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    ours, reference = Tokenizer.from_folder(tmp_path), theirs(tmp_path)
    for text in ("", "hello", " hello  12 <end>x<think>", "日本語 🙂 \n\n", "a" * 50):
        for special in (False, True):
            ids = reference(text, add_special_tokens=special, truncation=False)["input_ids"]
            assert ours.encode(text, special) == ids
            for skip in (False, True):
                assert ours.decode(ids, skip) == reference.decode(
                    ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
                )
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("text", ["\ud800", "half a pair \udfff here"])
def test_half_a_surrogate_pair_is_one_sentence(text: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    with pytest.raises(ForetellError, match=r"The text holds '\\ud\w+', which is no character.*UTF-8\.") as caught:
        ours.encode(text)
    str(caught.value).encode()  # the sentence itself can be printed
    with pytest.raises(ForetellError, match="no character"):
        ours.chat([{"role": "user", "content": text}])
    with pytest.raises(TypeError):  # a mistake in a program stays what it is
        ours.encode(None)  # type: ignore[arg-type]


def test_where_templates_are_kept(tmp_path: Path) -> None:
    def said() -> str:
        return Tokenizer.from_folder(tmp_path).render_chat([{"role": "user", "content": "hi"}])

    save_tokenizer(tmp_path, "one")
    assert said() == "one"
    assert Tokenizer.from_folder(tmp_path).has_chat_template
    save_tokenizer(tmp_path, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}])
    assert said() == "two"
    save_tokenizer(tmp_path, {"tool_use": "no", "default": "by name"})
    assert said() == "by name"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert said() == "three"


@pytest.mark.parametrize("named", [[("tool_use", "x"), ("rag", "y")], [("rag", "y")]])
def test_named_templates_without_a_default_are_named(named: list[tuple[str, str]], tmp_path: Path) -> None:
    """transformers refuses them too, with a list of the names."""
    for template in (dict(named), [{"name": name, "template": text} for name, text in named]):
        save_tokenizer(tmp_path, template)
        ours = Tokenizer.from_folder(tmp_path)
        assert not ours.has_chat_template
        names = ", ".join(sorted(name for name, _ in named))
        sentence = f"has chat templates named {names}, but none named default, so it cannot read messages; .*`raw=True`"
        with pytest.raises(ForetellError, match=sentence):
            ours.chat(CONVERSATIONS[0])
        with pytest.raises(ValueError, match="no default specified"):
            their_chat(theirs(tmp_path), CONVERSATIONS[0], True)


def test_a_start_mark_that_is_written_already_is_not_put_before_it(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, TEMPLATES["bos and trim"])  # a template that writes the mark itself
    ours = Tokenizer.from_folder(tmp_path)
    [bos] = ours.encode("<bos>")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours.encode_raw("hello") == [bos, *ours.encode("hello")]
        assert ours.encode_raw("hello<bos><bos>") == [bos, *ours.encode("hello<bos><bos>")]
    with pytest.warns(ForetellWarning, match="The prompt begins with <bos>, .*; it is given to the model once"):
        assert ours.encode_raw("<bos>hello") == [bos, *ours.encode("hello")]
    with pytest.warns(ForetellWarning):
        assert ours.encode_raw("<bos><bos>hello") == [bos, bos, *ours.encode("hello")]  # as it is written
    with pytest.warns(ForetellWarning):
        assert ours.encode_raw(ours.render_chat(CONVERSATIONS[0])) == ours.chat(CONVERSATIONS[0])


def test_a_tokenizer_that_puts_no_mark_before_leaves_two_alone(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole | {"post_processor": None}))
    ours = Tokenizer.from_folder(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours.encode_raw("<bos><bos>hello") == ours.encode("<bos><bos>hello")


def test_a_folder_without_template_says_raw(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, None)
    ours = Tokenizer.from_folder(tmp_path)
    assert not ours.has_chat_template
    with pytest.raises(ForetellError, match="has no chat template.*`raw=True`"):
        ours.chat(CONVERSATIONS[0])


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (
            "{{ raise_exception('roles must\nalternate') }}",
            r"refuses these messages \(roles must alternate\).*`raw=",
        ),
        ("{{ messages[0].content + 1 }}", "refuses these messages"),
        ("{{ messages[9].content.strip() }}", "refuses these messages"),
        ("{% if %}", "not valid Jinja.*`raw=True`"),
        # a template is a stranger's program: nothing of Python may be within its reach
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses these messages.*unsafe"),
        ("{% set n = namespace(__class__=1) %}", "refuses these messages"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "refuses these messages"),
        ("{{ messages.append(1) }}", "refuses these messages.*unsafe"),
        # and it may fail in any way that a program can
        ("{{ 1 / (messages | length - 1) }}", "refuses these messages .division by zero"),
        ("{{ 10.0 ** (400 * messages | length) }}", "refuses these messages .*out of range"),
        ("{{ 'é'.encode().decode('ascii') }}", "refuses these messages .*ascii"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses these messages .*recursion"),
        ("{{ messages[0].nothing.at.all }}", "refuses these messages .*no attribute"),
        ("{{ 'x' * 10 ** 18 }}", "refuses these messages .MemoryError"),
        ("{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}", "not valid Jinja.*`raw=True`"),
        ({"default": {}}, "must hold chat_template as text, but it holds a dict"),
        (3, "must hold chat_template as text, but it holds a int"),
        ([{"name": "default", "template": 3}], "must hold chat_template as text, but it holds a int"),
        ([{"template": "x"}, "y"], "has no chat template"),
    ],
)
def test_templates_that_refuse_or_misbehave(template: Any, sentence: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, template)
    with pytest.raises(ForetellError, match=sentence) as caught:
        Tokenizer.from_folder(tmp_path).chat(CONVERSATIONS[0])
    assert "\n" not in str(caught.value)


def test_a_template_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(ForetellError, match=r"chat_template\.jinja cannot be read .*fetch the model again"):
        Tokenizer.from_folder(tmp_path)


def test_an_empty_conversation_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    with pytest.raises(ForetellError, match="The conversation is empty"):
        Tokenizer.from_folder(tmp_path).chat([])


def test_without_tokenizer_json_transformers_rebuilds_it(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in whole["model"]["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    ours, reference = Tokenizer.from_folder(tmp_path), theirs(tmp_path)
    text = "hello othello 12"
    assert ours.encode(text) == reference(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
@pytest.mark.slow
def test_code_that_comes_with_a_folder_is_never_run(where: str, tmp_path: Path) -> None:
    """transformers would ask on stdin whether to run it, and a pipe may well say yes."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"}
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / where).write_text(json.dumps({"auto_map": auto_map, "model_type": "evil"}))
    code = """
import pathlib, sys
from foretell.loading.tokenizer import Tokenizer
from foretell.errors import ForetellError
try:
    Tokenizer.from_folder(pathlib.Path(sys.argv[1]))
except ForetellError as error:
    print(error)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", code, str(folder)]
    ran = subprocess.run(command, input="y\n" * 9, check=True, capture_output=True, text=True, env=environment)
    assert not (tmp_path / "ran").exists()
    assert ran.stdout.count("\n") == 1  # one sentence and no question
    assert "has no tokenizer.json" in ran.stdout
    if where == "tokenizer_config.json":
        assert "such code is never run; use a model that comes with a tokenizer.json." in ran.stdout


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "has no tokenizer.json.*fetch"),
        ({"tokenizer.json": "{"}, "tokenizer.json is damaged.*fetch"),
        ({"tokenizer.json": '{"version": "1.0"}'}, "tokenizer.json is damaged"),
        ({"tokenizer.model": "junk"}, "transformers cannot rebuild one"),
        ({"tokenizer_config.json": "["}, "tokenizer_config.json cannot be read"),
    ],
)
def test_broken_folders_are_one_sentence(files: dict[str, str], sentence: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ForetellError, match=sentence) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


# --- the demo model -----------------------------------------------------------------------------------------


@pytest.mark.real
def test_demo_chat_is_bit_equal_to_transformers(demo_folder: Path) -> None:
    ours, reference = Tokenizer.from_folder(demo_folder), theirs(demo_folder)
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            assert ours.chat(messages, prompt) == their_chat(reference, messages, prompt)
    text = ours.decode(ours.chat(CONVERSATIONS[0]))
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.real
def test_demo_text_round_trips(demo_folder: Path) -> None:
    ours, reference = Tokenizer.from_folder(demo_folder), theirs(demo_folder)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        ids = ours.encode(text)
        assert ids == reference(text)["input_ids"]
        assert ours.decode(ids) == text
