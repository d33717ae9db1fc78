"""Which tokens end an answer: all that a model's files know, however few of them one file declares."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gguf import byte_level, write_gguf
from tiny_models import save_tiny, tiny_model
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

import foretell
from foretell.loading.tokenizer import Tokenizer

MARKS = ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def model_that_says(token: int, vocab: int) -> Any:
    """Its head gives `token` the best score, whatever it reads."""
    model = tiny_model("llama", vocab_size=vocab, num_hidden_layers=1)
    layer = model.model.layers[0]
    with torch.no_grad():
        for each in (layer.mlp.down_proj, layer.self_attn.o_proj, model.lm_head):
            each.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 5.0
        model.lm_head.weight[token, 0] = 1.0
    return model


@pytest.mark.parametrize(
    ("extra", "template"),
    [
        ({}, True),  # the vocabulary and the template know <|eot_id|>
        ({}, False),  # the vocabulary does
        ({"tokenizer.ggml.eot_token_id": 4}, False),
        ({"tokenizer.ggml.eos_token_id": 4}, True),
    ],
)
def test_a_chat_file_that_declares_the_end_of_text_ends_its_turns(
    extra: dict[str, Any], template: bool, cache: Path, tmp_path: Path
) -> None:
    extra = extra | ({"tokenizer.chat_template": LLAMA3} if template else {})
    path = write_gguf(tmp_path / "chat.gguf", model_that_says(4, 300), extra=extra, tokenizer=byte_level(MARKS))
    llm = foretell.load(str(path), dtype="fp32", threads=1)
    assert set(llm.backbone.config.eos_ids) == {0, 4}
    for drafter in ("plain", "prompt_lookup"):
        llm = foretell.load(str(path), drafter, dtype="fp32", threads=1)
        result = llm.generate("hi", raw=not template, max_new_tokens=8)
        assert (result.ids, result.text, result.finish_reason) == ([4], "", "stop")


def save_tokenizer(
    folder: Path, marks: tuple[str, ...], template: str | None = None, special: bool = True, **settings: Any
) -> Tokenizer:
    """A tokenizer of 256 bytes with these marks after them."""
    folder.mkdir(exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.add_tokens([AddedToken(mark, special=special) for mark in marks])
    backend.save(str(folder / "tokenizer.json"))
    content = settings | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("marks", "settings", "template", "expected"),
    [
        (("<a>", "<b>"), {}, None, []),
        (("<a>", "<b>"), {"eos_token": "<b>"}, None, ["<b>"]),
        (("<a>", "<b>"), {"eos_token": {"content": "<b>", "lstrip": False}}, None, ["<b>"]),
        (("<a>",), {"eos_token": "<nowhere>"}, None, []),
        (("<a>",), {"eos_token": None}, None, []),
        (("<|im_start|>", "<|im_end|>", "<|endoftext|>"), {}, None, ["<|im_end|>", "<|endoftext|>"]),
        (("<a>", "<b>"), {}, "{% for m in messages %}<a>{{ m.content }}<b>\n{% endfor %}", ["<b>"]),
        (("<a>", "<b>"), {}, "{% for m in messages %}{{ m.content }} \n<b><a>{% endfor %}", ["<b>"]),
        (("<a>", "<a>>"), {}, "{% for m in messages %}{{ m.content }}<a>>{% endfor %}", ["<a>>"]),
        (("<a>",), {}, "{% for m in messages %}<a>{{ m.content }}\n### {% endfor %}", []),
        (("<a>",), {}, "{% for m in messages %}<a>{{ m.content }}{% endfor %}", []),
        (("<a>",), {}, "{% for m in messages %}{{ m.content | upper }}<a>{% endfor %}", []),
        (("<a>",), {}, "{{ raise_exception('no') }}", []),
        (("<a>",), {}, "{% nonsense", []),
    ],
)
def test_the_ends_a_tokenizer_knows(
    marks: tuple[str, ...], settings: dict[str, Any], template: str | None, expected: list[str], tmp_path: Path
) -> None:
    tokenizer = save_tokenizer(tmp_path, marks, template, **settings)
    assert [tokenizer.decode([index]) for index in tokenizer.ends] == expected


def test_a_word_that_looks_like_a_mark_is_no_end(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    assert save_tokenizer(tmp_path, ("<|end|>", "<|im_end|>"), template, special=False).ends == ()


def test_the_ends_of_all_files_of_a_folder_count(tmp_path: Path) -> None:
    """config.json or generation_config.json (which wins), the tokenizer's settings, its vocabulary, its template."""
    save_tiny(tmp_path, vocab_size=264, eos_token_id=1, num_hidden_layers=1)
    template = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"
    save_tokenizer(tmp_path, ("<end>", "<turn>", "<|eom_id|>", "<other>"), template, eos_token="<end>")
    assert foretell.load(str(tmp_path), dtype="fp32", threads=1).backbone.config.eos_ids == (1, 256, 257, 258)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 257]}')
    assert foretell.load(str(tmp_path), dtype="fp32", threads=1).backbone.config.eos_ids == (3, 257, 256, 258)
