"""GGUF files that are cut short or say of themselves what cannot be: one sentence each, no memory for their lies."""

import re
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from command_line import Foretell
from tiny_gguf import sentencepiece, write_gguf
from tiny_models import opened, raising, tiny_model

import foretell as package
from foretell.errors import ForetellError, ForetellWarning
from foretell.loading.blocks import TYPES
from foretell.loading.gguf_file import open_gguf
from foretell.loading.gguf_reader import Reader
from foretell.loading.gguf_tokenizer import write_tokenizer
from foretell.loading.resolve import resolve

pytestmark = pytest.mark.slow

KINDS, VALUES = gguf.GGMLQuantizationType, gguf.GGUFValueType
TOOLS = Path(__file__).parents[1] / "tools"
WIDE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_hidden_layers": 1,
}  # fmt: skip


@pytest.fixture
def damage(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    import gguf_damage

    return gguf_damage


@pytest.fixture
def fuzz(damage: ModuleType) -> ModuleType:
    import fuzz_gguf

    return fuzz_gguf


# --- at random ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited by what Linux says of it")
@pytest.mark.filterwarnings("ignore::foretell.errors.ForetellWarning")
def test_damaged_files_load_or_are_refused_in_one_sentence(fuzz: ModuleType, tmp_path: Path) -> None:
    outcomes, findings = fuzz.run(tmp_path, 1, range(300))
    assert findings == []
    assert outcomes["loaded"] > 20
    assert len(outcomes) > 25


def test_the_fuzz_tells_a_sentence_from_a_finding(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(error: BaseException) -> str:
        monkeypatch.setattr(package, "load", raising(error))
        return str(fuzz.outcome(tmp_path / "x1.gguf", tmp_path / "cache", fuzz.random.Random(0))[0])

    sentence = f"{tmp_path}/x1.gguf has llama.b = [1, 2] where 3 are needed; see blk.0.attn_q.weight."
    assert told(ForetellError(sentence)) == "FILE has KEY = … where N are needed; see TENSOR."
    assert told(ForetellError("Two\nlines.")) == told(ForetellError("no end")) == "FINDING: not one sentence"
    assert told(ForetellError("Much." * 200)) == "FINDING: not one sentence"
    full = ForetellError("It is not readable.")
    full.__cause__ = MemoryError()
    assert told(full) == "FINDING: memory"
    assert told(KeyError("x")) == "FINDING: KeyError"


# --- the header ---------------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    """The sentence that refuses to open a file, for which a megabyte of memory has to do."""
    tracemalloc.start()
    try:
        with pytest.raises(ForetellError) as caught:
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.startswith(str(path))
    return sentence.removeprefix(str(path))


def entry(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def array(kind: int, length: int) -> bytes:
    return entry("a", VALUES.ARRAY, struct.pack("<IQ", kind, length))


ONE = struct.pack("<I", 1)


@pytest.mark.parametrize(
    ("entries", "keys", "tensors", "sentence"),
    [
        (array(VALUES.UINT8, 1 << 60), 1, 0, r"ends after 4096 bytes, but its header promises 1152921504606847\d+\)"),
        (array(VALUES.FLOAT64, 1 << 63), 1, 0, r"ends after 4096 bytes, but its header promises \d{20}\)"),
        (array(VALUES.STRING, 1 << 60), 1, 0, "array of 1152921504606846976 values of the type STRING"),
        (array(VALUES.STRING, 1000), 1, 0, r"ends after 4096 bytes, but its header promises 4097\)"),
        (array(VALUES.ARRAY, 2), 1, 0, "array of 2 values of the type ARRAY"),
        (array(99, 2), 1, 0, "99 is not a valid GGUFValueType|99.* is not a valid GGUFValueType"),
        (entry("a", VALUES.STRING, struct.pack("<Q", 1 << 62)), 1, 0, r"its header promises \d{19}\)"),
        (struct.pack("<Q", (1 << 64) - 1), 1, 0, r"its header promises \d{20}\)"),
        (entry("a\nb", VALUES.UINT32, ONE), 1, 0, r"a key of the name 'a\\nb'"),
        (entry("a" * 200, VALUES.UINT32, ONE), 1, 0, r"a key of the name 'a+\.\.\.a+'"),
        (entry("a", VALUES.UINT32, ONE) * 2, 2, 0, "Duplicate a|holds only metadata"),  # older libraries let it pass
        (b"", (1 << 64) - 1, 0, r"Duplicate|header promises 4\d{3}\)"),
        (b"", 0, (1 << 64) - 1, r"header promises 4\d{3}\)"),
        (struct.pack("<Q1sI", 1, b"x", (1 << 32) - 1), 0, 1, r"header promises 343597\d+\)"),
    ],
)
def test_a_header_that_promises_too_much(
    entries: bytes, keys: int, tensors: int, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes((b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + entries).ljust(4096, b"\0"))
    assert re.search(sentence, refusal(path))


@pytest.mark.parametrize(
    ("first", "sentence"),
    [(b"GGUX", "magic invalid"), (b"GGUF\x09\0\0\0", "version 9"), (b"", "cannot mmap an empty file")],
)
def test_files_of_another_kind(first: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(first and first.ljust(64, b"\0"))
    assert re.search(rf"is not a readable GGUF file \(.*{sentence}.*\); delete it and fetch it again", refusal(path))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sizes": [1 << 32, 1 << 32]}, r"it ends after \d+ bytes, within blk.1.attn_norm.weight"),
        ({"sizes": [1 << 63, 2]}, "within blk.1.attn_norm.weight"),
        ({"sizes": [(1 << 64) - 1, (1 << 64) - 1]}, "within blk.1.attn_norm.weight"),
        ({"sizes": []}, r"blk.1.attn_norm.weight has the shape \[\]"),
        ({"sizes": [0]}, r"blk.1.attn_norm.weight has the shape \[0\]"),
        ({"sizes": [32, 1, 1, 1, 1]}, r"blk.1.attn_norm.weight has the shape \[1, 1, 1, 1, 32\]"),
        ({"sizes": [16]}, r"blk.1.ffn_norm.weight begins at byte \d+ of the tensors instead of \d+"),
        ({"offset": 0}, "blk.1.attn_norm.weight begins at byte 0 of the tensors instead of"),
        ({"offset": (1 << 64) - 32}, "begins at byte 18446744073709551584 of the tensors instead of"),
        ({"offset": 26145}, "begins at byte 26145 of the tensors instead of"),
        ({"kind": KINDS.Q4_K}, "blk.1.attn_norm.weight has rows of 32 numbers, but blocks of Q4_K hold 256"),
        ({"name": b"token_embd.weight"}, "duplicated tensor with name token_embd.weight"),
        ({"name": b""}, "a tensor or a key of the name ''"),
        ({"name": b"blk.0\n"}, r"a tensor or a key of the name 'blk.0\\n'"),
        ({"name": b"\xff"}, "can't decode byte 0xff"),
        ({"kind": 99}, "stores blk.1.attn_norm.weight as type 99, which the gguf library does not know; update"),
    ],
)
def test_tensors_that_are_not_where_the_header_says(
    changes: dict[str, Any], sentence: str, damage: ModuleType, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", num_hidden_layers=2))
    sample = damage.Sample.of(path)
    index = next(i for i, tensor in enumerate(sample.tensors) if tensor.name == b"blk.1.attn_norm.weight")
    (begin, end), tensor = sample.infos[index], sample.tensors[index]
    path.write_bytes(damage._with_header(sample, begin, end, replace(tensor, **changes).info()))
    assert re.search(sentence, refusal(path))


@pytest.mark.parametrize("endianess", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_a_sound_file_is_read_as_the_library_reads_it(endianess: Any, tmp_path: Path) -> None:
    values = {"x.floats": [0.5, -1.0], "x.strings": ["", "ü"], "x.flags": [True, False], "x.numbers": [-1, 1 << 20]}
    options: dict[str, Any] = {"kind": KINDS.Q4_0, "extra": values, "endianess": endianess}
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", intermediate_size=64), **options)
    ours, theirs = Reader(path), gguf.GGUFReader(path)
    assert {key: field.contents() for key, field in ours.fields.items()} == {
        key: field.contents() for key, field in theirs.fields.items()
    }
    assert {key: ours.fields[key].contents() for key in values} == values
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (one.name, one.tensor_type, one.data_offset) == (other.name, other.tensor_type, other.data_offset)
        assert one.data.dtype == other.data.dtype and np.array_equal(one.data, other.data)


def test_strings_take_a_few_hundred_bytes_each(tmp_path: Path) -> None:
    path, count = tmp_path / "tiny.gguf", 20_000
    entries = array(VALUES.STRING, count) + bytes(8 * count)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entries + bytes(64))
    tracemalloc.start()
    Reader(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500 * count


# --- what the header says of the model ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
     "attention.key_length"],
)  # fmt: skip
@pytest.mark.parametrize("value", [1 << 12, (1 << 32) - 1])
def test_dimensions_beyond_every_tensor_are_refused_before_they_are_used(
    key: str, value: int, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foretell.loading.gguf.model_config", raising(AssertionError("would fill the memory")))
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), extra={f"llama.{key}": value})
    with pytest.raises(ForetellError, match=rf"llama\.{key} = {value}, more than its tensors have room for"):
        resolve(str(path))


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"llama.rope.freq_base": float("inf")}, "rope.freq_base = inf where one positive number"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon = nan where one positive number"),
        (
            {"llama.attention.head_count": 48, "llama.attention.key_length": None},
            "needs head_dim as a positive whole number, but it is 0",
        ),
        ({"general.architecture": [f"{i}" for i in range(300)]}, r"architecture \['0', '1', .*, \.\.\.\]; the"),
        ({"tokenizer.ggml.tokens": "abc"}, "tokenizer.ggml.tokens = 'abc' where a list of strings is needed"),
        ({"tokenizer.ggml.tokens": [1, 2]}, r"tokens = \[1, 2\] where a list of strings"),
        ({"tokenizer.ggml.token_type": ["a"] * 64}, r"token_type = \['a', .*\.\.\.\] where a list of numbers"),
        ({"tokenizer.ggml.merges": "a b"}, "merges = 'a b' where a list of strings"),
        ({"tokenizer.ggml.merges": ["a b", "ab"]}, r"has 'ab' among its merges .* not two tokens and a space"),
        ({"tokenizer.ggml.pre": [1, 2]}, r"pre = \[1, 2\] where a text is needed"),
        ({"tokenizer.ggml.eos_token_id": True}, "eos_token_id = True, but its tokens are 0 to 63"),
        ({"tokenizer.ggml.eos_token_id": list(range(99))}, r"eos_token_id = \[0, .*\.\.\.\], but its"),
        ({"tokenizer.ggml.tokens": ["x" * 999] * 2}, r"the token 'x+\.\.\.x+' twice"),
        ({"tokenizer.chat_template": 5}, "tokenizer.chat_template = 5 where a text is needed"),
    ],
)
def test_metadata_of_another_kind_are_named(extra: dict[str, Any], sentence: str, cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), extra=extra)
    with pytest.raises(ForetellError, match=sentence) as caught:
        resolve(str(path))
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    assert list((cache / "models").iterdir()) == []


def test_text_that_is_no_utf8_is_named(damage: ModuleType, cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    template = struct.pack("<Q", len("tokenizer.chat_template")) + b"tokenizer.chat_template"
    data = path.read_bytes()
    at = data.index(template) + len(template) + 12
    path.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    with pytest.raises(ForetellError, match="tokenizer.chat_template in another encoding than UTF-8 .*0xff"):
        resolve(str(path))


def test_an_embedding_of_one_dimension_has_no_place(damage: ModuleType, cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", tie_word_embeddings=True))
    sample = damage.Sample.of(path)
    index = next(i for i, tensor in enumerate(sample.tensors) if tensor.name == b"token_embd.weight")
    flat = replace(sample.tensors[index], sizes=[64 * 32]).info()
    path.write_bytes(damage._with_header(sample, *sample.infos[index], flat))
    with pytest.raises(ForetellError, match=r"token_embd.weight of shape \(2048,\) .*no place for"):
        resolve(str(path))


def test_a_token_as_long_as_a_book_is_not_copied_at_each_of_its_letters(tmp_path: Path) -> None:
    words = ("a" * 5000, "b" * 5000)
    model = tiny_model("llama", vocab_size=320, num_hidden_layers=1)
    file = open_gguf(write_gguf(tmp_path / "tiny.gguf", model, tokenizer=sentencepiece(words)))
    tracemalloc.start()
    write_tokenizer(file, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize(
    "name",
    ["blk.0.ffn_gate_inp.weight", "blk.0.ffn_gate_exps.weight", "blk.1.ffn_down_exps.weight",
     "blk.0.ffn_up_shexp.weight", "blk.0.ffn_gate_inp_shexp.weight", "blk.0.ffn_gate.3.weight"],
)  # fmt: skip
@pytest.mark.parametrize("architecture", ["llama", "qwen3moe"])
def test_mixtures_of_experts_are_refused_by_name(name: str, architecture: str, cache: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "extra": {"general.architecture": architecture, "llama.expert_count": 2},
        "extra_tensors": {name: np.ones((2, 48, 32), np.float32)},
    }
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), **options)
    with pytest.raises(ForetellError, match=rf"tiny\.gguf has the tensor {name} of a mixture of experts, which is not"):
        resolve(str(path))


# --- types --------------------------------------------------------------------------------------------------


def can_be_unpacked(kind: gguf.GGMLQuantizationType) -> bool:
    _, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


WITHOUT_ROW = [kind for kind in gguf.GGML_QUANT_SIZES if kind.name not in TYPES and can_be_unpacked(kind)]
UNKNOWN = [kind for kind in gguf.GGML_QUANT_SIZES if not can_be_unpacked(kind)]


@pytest.mark.parametrize("kind", WITHOUT_ROW, ids=lambda kind: kind.name)
@pytest.mark.parametrize("weights", ["bf16", "stored"])
def test_a_type_without_a_row_is_unpacked_and_that_is_said(
    kind: gguf.GGMLQuantizationType, weights: str, cache: Path, tmp_path: Path
) -> None:
    blocks = {"blk.0.ffn_up.weight": kind, "blk.0.attn_output.weight": kind, "blk.0.ffn_down.weight": KINDS.Q4_K}
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", **WIDE), blocks=blocks)
    with warnings.catch_warnings(record=True) as notes:
        folder = resolve(str(path), weights=weights).path
    found = opened(folder)
    data = {tensor.name: tensor.data for tensor in Reader(path).tensors}
    for gguf_name, part in (("ffn_up", "mlp.up_proj"), ("attn_output", "self_attn.o_proj")):
        truth = torch.from_numpy(gguf.dequantize(data[f"blk.0.{gguf_name}.weight"], kind))
        assert found.dtype(f"model.layers.0.{part}.weight") == torch.float32
        assert torch.equal(found[f"model.layers.0.{part}.weight"], truth)
    told = [str(note.message) for note in notes if issubclass(note.category, ForetellWarning)]
    sentence = f"2 of 12 tensors of tiny.gguf are stored as {kind.name}, which cannot be multiplied as it is: "
    sentence += "they are unpacked to float32, with its size and speed."
    assert (told == [sentence]) == (weights == "stored")


@pytest.mark.parametrize("kind", UNKNOWN, ids=lambda kind: kind.name)
@pytest.mark.parametrize("weights", ["bf16", "stored"])
def test_a_type_that_cannot_be_unpacked_is_refused_by_name(
    kind: gguf.GGMLQuantizationType, weights: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foretell.loading.gguf._write_weights", raising(AssertionError("too late")))
    blocks = {"blk.0.ffn_up.weight": kind}
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", **WIDE), blocks=blocks)
    with pytest.raises(
        ForetellError, match=rf"tiny\.gguf stores blk\.0\.ffn_up\.weight as {kind.name}, which .*unpack"
    ):
        resolve(str(path), weights=weights)


def test_quantized_vectors_are_unpacked(cache: Path, tmp_path: Path) -> None:
    """The rows of Llama's q and k are put into another order, and so are their biases: not within blocks."""
    model = tiny_model("llama", attention_bias=True)
    path = write_gguf(tmp_path / "tiny.gguf", model, blocks={"blk.0.attn_q.bias": KINDS.Q8_0})
    one, other = (opened(resolve(str(path), weights=weights).path) for weights in ("bf16", "stored"))
    name = "model.layers.0.self_attn.q_proj.bias"
    assert one[name].unique().numel() > 1
    assert torch.equal(one[name], other[name])


# --- the command line ---------------------------------------------------------------------------------------


def with_infinite_scales(path: Path) -> None:
    data = bytearray(path.read_bytes())
    output = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "output.weight")
    for block in range(output.data_offset, output.data_offset + output.n_bytes, 34):
        data[block : block + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage_it", "sentence"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:9000]),
            r"it ends after 9000 bytes, within \w+.*fetch it again",
        ),
        (with_infinite_scales, "logits are not finite numbers: its weights are damaged"),
    ],
)
@pytest.mark.parametrize("weights", ["bf16", "stored"])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_the_command_line_prints_one_sentence(
    damage_it: Callable[[Path], None], sentence: str, weights: str, foretell: Foretell, cache: Path, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", intermediate_size=64), KINDS.Q8_0)
    damage_it(path)
    ran = foretell("generate", "hi", "-m", str(path), "-n", "2", "--weights", weights)
    assert ran.code == 1
    errors = [line for line in ran.err.splitlines() if not line.startswith("note: ") and "%" not in line]
    assert re.search(sentence, ran.err) and "Traceback" not in ran.err
    assert len([line for line in errors if line.startswith("error: ")]) == 1
