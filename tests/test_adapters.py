"""BASE+ADAPTER: the sum is W + (α/r)·B·A and nothing else, made once, and a model of its own from then on.

The truth is that sum taken rank by rank in float64, and what peft makes of its own adapter.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import raising, save_tiny
from torch import Tensor

import foretell as package
from foretell.errors import ForetellError
from foretell.loading import lora, rounded
from foretell.loading.cache_dir import MANIFEST, cached_models
from foretell.loading.families import read_config
from foretell.loading.resolve import resolve
from foretell.loading.weights import fingerprint, read_weights

PLACES = ["q_proj", "down_proj"]
CHANGED = {f"model.layers.{i}.{place}.weight" for i in range(3) for place in ("self_attn.q_proj", "mlp.down_proj")}
RANK, ALPHA = 4, 6


def save_adapter(base: str | Path, folder: Path, size: float = 0.2, seed: int = 1, **changes: Any) -> Any:
    """A random adapter as peft saves it; returns the model with it worked in, by peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": PLACES, "task_type": "CAUSAL_LM"} | changes
    adapted = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape))
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().eval()


def summed(base: Path, adapter: Path, scale: float) -> dict[str, Tensor]:
    """The slow obvious way: weight by weight, rank by rank, in float64."""
    changes = load_file(adapter / lora.TENSORS)
    out = {}
    for name, weight in load_file(base / "model.safetensors").items():
        total, place = weight.double(), f"base_model.model.{name.removesuffix('.weight')}"
        if f"{place}.lora_A.weight" in changes:
            a_RI, b_OR = (changes[f"{place}.lora_{side}.weight"].double() for side in "AB")
            for rank in range(len(a_RI)):
                total = total + scale * torch.outer(b_OR[:, rank], a_RI[rank])
        out[name] = total.to(weight.dtype)
    return out


@pytest.fixture(scope="module")
def adapter(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter for the tiny model."""
    folder = tmp_path_factory.mktemp("adapter") / "mine"
    save_adapter(tiny, folder)
    return folder


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    """The same adapter, to be spoilt."""
    return shutil.copytree(adapter, tmp_path / "copy")


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Copies: what is loaded is mapped, and the file will be written over."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def tell(folder: Path, **changes: Any) -> None:
    """Changes what an adapter says of itself."""
    path = folder / lora.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- the sum ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rslora", [False, True], ids=["by the rank", "by its root"])
@pytest.mark.slow
def test_the_sum_is_the_one_written_out(tiny: str, tmp_path: Path, rslora: bool, dtype: torch.dtype) -> None:
    base, folder, target = (tmp_path / name for name in ("base", "adapter", "sum"))
    shutil.copytree(tiny, base)
    weights = {name: weight.to(dtype) for name, weight in tensors_of(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    theirs = save_adapter(base, folder, use_rslora=rslora).state_dict()
    target.mkdir()
    fractions: list[float] = []
    lora.merge(base, folder, target, lambda stage, fraction: fractions.append(fraction))
    ours = load_file(target / "model.safetensors")
    truth = summed(base, folder, ALPHA / (RANK**0.5 if rslora else RANK))
    assert ours.keys() == truth.keys() == weights.keys()
    for name, weight in ours.items():
        assert weight.dtype == dtype
        assert torch.equal(weight, truth[name]), name
        assert torch.equal(weight, weights[name]) == (name not in CHANGED), name
        if dtype == torch.float32:
            torch.testing.assert_close(weight, theirs[name])
    assert fractions == [1.0]


def test_all_that_is_no_weight_is_copied(tiny: str, adapter: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / MANIFEST).write_text('{"name": "another"}')
    (base / "original").mkdir()
    target = tmp_path / "sum"
    target.mkdir()
    lora.merge(base, adapter, target, lambda *_: None)
    assert {path.name for path in target.iterdir()} == {path.name for path in Path(tiny).iterdir()}
    for path in target.iterdir():
        assert (path.read_bytes() == (base / path.name).read_bytes()) == (path.name != "model.safetensors"), path.name


def test_an_adapter_of_zeros_changes_no_bit(tiny: str, cache: Path, tmp_path: Path) -> None:
    save_adapter(tiny, tmp_path / "zero", size=0.0)
    folder = resolve(f"{tiny}+{tmp_path / 'zero'}").path
    ours, base = (load_file(each / "model.safetensors") for each in (folder, Path(tiny)))
    assert all(torch.equal(ours[name], base[name]) for name in base)
    one, other = (
        fingerprint(read_weights(each, read_config(each)), read_config(each)) for each in (folder, Path(tiny))
    )
    assert one == other


def test_an_adapter_of_one_matrix_makes_another_model(tiny: str, cache: Path, tmp_path: Path) -> None:
    save_adapter(tiny, tmp_path / "out", target_modules=["o_proj"], layers_to_transform=[1], size=1e-3)
    folder = resolve(f"{tiny}+{tmp_path / 'out'}").path
    one, other = (
        fingerprint(read_weights(each, read_config(each)), read_config(each)) for each in (folder, Path(tiny))
    )
    assert one != other


@pytest.mark.parametrize("coarseness", [0.0, 0.1])
def test_a_rounded_adapter_is_the_one_that_its_numbers_stand_for(
    tiny: str, copy: Path, cache: Path, tmp_path: Path, coarseness: float
) -> None:
    exact = merged(f"{tiny}+{copy}")
    lora.store_small(copy, coarseness)
    ours, small = merged(f"{tiny}+{copy}"), (copy / lora.TENSORS).stat().st_size
    plain = shutil.copytree(copy, tmp_path / "plain")
    save_file(rounded.load(copy / lora.TENSORS), plain / lora.TENSORS, {"format": "pt"})
    assert small < (plain / lora.TENSORS).stat().st_size
    theirs, base = merged(f"{tiny}+{plain}"), load_file(Path(tiny) / "model.safetensors")
    assert ours.keys() == theirs.keys() == exact.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in (name for name in ours if not torch.equal(exact[name], base[name])):
        change = exact[name].double() - base[name].double()
        assert 0 < (ours[name].double() - exact[name].double()).norm() < 0.08 * change.norm(), name


def test_a_base_in_several_files_stays_in_them(cache: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "whole")
    save_tiny(tmp_path / "shards", shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    save_adapter(tmp_path / "whole", tmp_path / "adapter")
    whole, shards = (resolve(f"{tmp_path / name}+{tmp_path / 'adapter'}").path for name in ("whole", "shards"))
    ours, truth = (read_weights(folder, read_config(folder)) for folder in (shards, whole))
    assert all(torch.equal(ours[name], truth[name]) for name in truth.shapes)


# --- other formats ------------------------------------------------------------------------------------------


def merged(name: str) -> dict[str, Tensor]:
    return tensors_of(resolve(name).path / "model.safetensors")


def save_mlx(folder: Path, parameters: Any, tensors: dict[str, Tensor], **config: Any) -> Path:
    """As mlx-lm saves one: A [columns, rank] and B [rank, rows], beside all that its trainer was told."""
    folder.mkdir()
    about = {"model": "org/base", "num_layers": 3, "iters": 600, "seed": 0, "lora_parameters": parameters, **config}
    (folder / lora.CONFIG).write_text(json.dumps({"fine_tune_type": "lora"} | about))
    save_file(tensors, folder / "adapters.safetensors", {"format": "mlx"})
    return folder


def mlx_tensors(tiny: str, embedding: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(3)
    out = {}
    for name, weight in load_file(Path(tiny) / "model.safetensors").items():
        (rows, columns), place = weight.shape if weight.dim() == 2 else (0, 0), name.removesuffix(".weight")
        if name in CHANGED or (embedding and "embed_tokens" in name):
            sizes = (rows, columns) if "embed_tokens" in name else (columns, rows)
            out |= {
                f"{place}.lora_a": torch.randn(sizes[0], RANK) / 4,
                f"{place}.lora_b": torch.randn(RANK, sizes[1]) / 4,
            }
    return out


@pytest.mark.parametrize("embedding", [False, True])
def test_adapters_of_mlx(tiny: str, cache: Path, tmp_path: Path, embedding: bool) -> None:
    """Its own sum, `LoRALinear.fuse`: W + (scale·Bᵀ)·Aᵀ; of an embedding W + scale·A·B."""
    tensors = mlx_tensors(tiny, embedding)
    parameters = {"rank": RANK, "scale": 1.5, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    ours = merged(f"{tiny}+{save_mlx(tmp_path / 'mlx', parameters, tensors)}")
    for name, weight in load_file(Path(tiny) / "model.safetensors").items():
        place, total = name.removesuffix(".weight"), weight.double()
        if f"{place}.lora_a" in tensors:
            a, b = (tensors[f"{place}.lora_{side}"].double() for side in "ab")
            total = total + 1.5 * (a @ b if "embed_tokens" in name else b.T @ a.T)
        assert torch.equal(ours[name], total.to(weight.dtype)), name
        assert torch.equal(ours[name], weight) == (f"{place}.lora_a" not in tensors)


@pytest.mark.parametrize(
    ("parameters", "changes", "odd", "sentence"),
    [
        ({}, {"fine_tune_type": "dora"}, {}, r"is no plain LoRA adapter \(fine_tune_type dora\); fuse it with mlx_lm"),
        ({}, {"fine_tune_type": "full"}, {}, r"\(fine_tune_type full\); fuse it with mlx_lm.fuse and name that folder"),
        ({"alpha": 16}, {}, {}, r"\(alpha beside scale\); fuse it with mlx_lm.fuse"),
        ({}, {}, {"model.layers.0.mlp.up_proj.m": torch.ones(3)}, r"\(model.layers.0.mlp.up_proj.m\); fuse it with"),
        ({"scale": None}, {}, {}, r"is damaged \("),
        ({}, {"lora_parameters": None}, {}, r"is damaged \("),
        ({}, {}, {"model.layers.0.mlp.up_proj.lora_a": torch.ones(3, 4)}, r"is damaged \("),
    ],
)
def test_adapters_of_mlx_that_are_no_plain_sum_are_named(
    tiny: str, cache: Path, tmp_path: Path, parameters: Any, changes: Any, odd: Any, sentence: str
) -> None:
    given = {"rank": RANK, "scale": 1.5, "dropout": 0.0} | parameters
    save_mlx(tmp_path / "mlx", given, mlx_tensors(tiny) | odd, **changes)
    assert re.search(sentence, refusal(f"{tiny}+{tmp_path / 'mlx'}"))
    assert not list(cache.glob("models/*"))


def test_an_adapter_in_a_pickle_is_read_if_it_holds_nothing_else(tiny: str, copy: Path, cache: Path) -> None:
    truth, name = merged(f"{tiny}+{copy}"), f"{tiny}+{copy}"
    tensors, path = tensors_of(copy / lora.TENSORS), copy / "adapter_model.bin"
    (copy / lora.TENSORS).unlink()
    torch.save(tensors, path)
    ours = merged(name)
    assert all(torch.equal(ours[each], weight) for each, weight in truth.items())
    shutil.rmtree(cache)
    torch.save({**tensors, "more": Harmful()}, path)
    assert re.search(r"damaged, or would run code of its own when loaded .*as safetensors with peft", refusal(name))
    assert not Harmful.ran
    for other in (
        {**tensors, "step": 3},
        [1, 2],
        tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"],
    ):
        torch.save(other, path)
        assert "is damaged (it holds objects that are not tensors)" in refusal(name)
    path.write_bytes(path.read_bytes()[:100])
    assert f"The adapter {copy} is damaged" in refusal(name)


class Harmful:
    ran = False

    def __reduce__(self) -> Any:
        return _run, ()


def _run() -> None:
    Harmful.ran = True


def test_an_adapter_on_a_model_whose_names_are_bare(tiny: str, adapter: Path, cache: Path, tmp_path: Path) -> None:
    truth, base = merged(f"{tiny}+{adapter}"), shutil.copytree(tiny, tmp_path / "bare")
    tensors = {name.removeprefix("model."): each for name, each in tensors_of(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    folder = resolve(f"{base}+{adapter}").path
    ours = read_weights(folder, read_config(folder))
    assert all(torch.equal(ours[name], weight) for name, weight in truth.items())


def test_a_trainers_folder_names_its_checkpoints(tiny: str, adapter: Path, cache: Path, tmp_path: Path) -> None:
    for step in (90, 500, 1000):
        shutil.copytree(adapter, tmp_path / "run" / f"checkpoint-{step}")
    last = tmp_path / "run" / "checkpoint-1000"
    assert f"several training checkpoints; name one, such as {tiny}+{last}." in refusal(f"{tiny}+{tmp_path / 'run'}")
    assert merged(f"{tiny}+{last}").keys() == merged(f"{tiny}+{adapter}").keys()
    for folder in (adapter, last):
        assert f"{folder} holds an adapter and no model; add it to the model it is for: BASE+{folder}." in refusal(
            str(folder)
        )
    assert f"for: BASE+{last}." in refusal(str(tmp_path / "run"))


# --- a model of its own -------------------------------------------------------------------------------------


def test_a_sum_is_a_model_of_its_own(tiny: str, adapter: Path, cache: Path, tmp_path: Path) -> None:
    name = f"{tiny}+{adapter}"
    theirs = save_adapter(tiny, tmp_path / "again")  # the same seed: the same adapter
    base, ours = (package.load(each, dtype="fp32", threads=1) for each in (tiny, name))
    assert ours.backbone.fingerprint != base.backbone.fingerprint
    assert ours.folder is not None
    assert (ours.folder.name, ours.folder.source) == (name, "adapter")
    for text in ("hello", "a longer one, and another"):
        prompt = ours.encode(text)
        truth = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
        told, before = (each.generate([prompt], max_new_tokens=24, logprobs=0)[0] for each in (ours, base))
        assert told.ids == truth
        assert told.logprobs != before.logprobs
    [listed] = cached_models()
    assert (listed.name, listed.source, listed.path) == (name, "adapter", ours.folder.path)


def test_transformers_opens_the_sum_too(tiny: str, adapter: Path, cache: Path) -> None:
    """Medusa-2 may learn on top of it."""
    from transformers import AutoModelForCausalLM

    folder = resolve(f"{tiny}+{adapter}").path
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(theirs[name], weight) for name, weight in load_file(folder / "model.safetensors").items())


def test_a_sum_is_made_once(tiny: str, adapter: Path, cache: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve(f"{tiny}+{adapter}").path
    monkeypatch.setattr(lora, "merge", raising(AssertionError("made again")))
    assert resolve(f"{tiny}+{adapter}", offline=True).path == first
    assert resolve(f"{tiny}+{adapter}", progress=raising(AssertionError("nothing to wait for"))).path == first
    tell(copy, lora_alpha=ALPHA + 1)
    with pytest.raises(AssertionError, match="made again"):
        resolve(f"{tiny}+{copy}")
    assert [each.path for each in cached_models()] == [first]


def test_a_base_that_has_changed_is_added_to_anew(tiny: str, adapter: Path, cache: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny, tmp_path / "base")
    name = f"{base}+{adapter}"
    before = load_file(resolve(name).path / "model.safetensors")
    norm = "model.norm.weight"
    weights = {each: weight + 1 if each == norm else weight for each, weight in before.items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_file(resolve(name).path / "model.safetensors")[norm], before[norm] + 1)


def test_a_run_of_medusa_2_is_an_adapter_too(tiny: str, adapter: Path, cache: Path, tmp_path: Path) -> None:
    """It lies in a folder of that name, beside the heads."""
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    ours = resolve(f"{tiny}+{tmp_path / 'run'}").path / "model.safetensors"
    assert ours.read_bytes() == (resolve(f"{tiny}+{adapter}").path / "model.safetensors").read_bytes()


def test_a_plus_in_a_folders_own_name_is_a_letter(tiny: str, cache: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "one+two")
    found = resolve(str(folder))
    assert (found.path, found.source) == (folder, "folder")
    assert not cache.exists()


def test_what_is_added_to_may_hold_a_plus_itself(tiny: str, adapter: Path, cache: Path, tmp_path: Path) -> None:
    """A folder so called, or a sum: Medusa-2 learns on both, and names what comes out in the same way."""
    base = shutil.copytree(tiny, tmp_path / "one+two")
    truth = load_file(resolve(f"{tiny}+{adapter}").path / "model.safetensors")
    ours = load_file(resolve(f"{base}+{adapter}").path / "model.safetensors")
    assert all(torch.equal(ours[name], weight) for name, weight in truth.items())
    twice = load_file(resolve(f"{tiny}+{adapter}+{adapter}").path / "model.safetensors")
    weights = load_file(Path(tiny) / "model.safetensors")
    for name in CHANGED:
        torch.testing.assert_close(twice[name] - weights[name], 2 * (truth[name] - weights[name]))


# --- refusals -----------------------------------------------------------------------------------------------


def refusal(name: str) -> str:
    with pytest.raises(ForetellError) as refused:
        resolve(name)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "", "{tiny}"])
def test_adapters_that_are_not_there(tiny: str, cache: Path, name: str) -> None:
    name = name.format(tiny=tiny)
    for base in (tiny, "smollm2-135m"):
        sentence = refusal(f"{base}+{name}")
        assert f"There is no adapter {name!r} to add to {base}; name a folder with adapter_config.json" in sentence
    assert not cache.exists()  # nothing was fetched


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"use_dora": True}, "(use_dora)"),
        ({"peft_type": "IA3"}, "(IA3)"),
        ({"peft_type": None}, "(None)"),
        ({"modules_to_save": ["lm_head"]}, "(modules_to_save)"),
        ({"rank_pattern": {"q_proj": 2}}, "(rank_pattern)"),
        ({"alpha_pattern": {"q_proj": 2}}, "(alpha_pattern)"),
        ({"bias": "all"}, ""),
        ({"alora_invocation_tokens": [1, 2]}, "(alora_invocation_tokens)"),
        ({"what_comes_next": {"rank": 2}}, "(what_comes_next)"),
    ],
)
def test_adapters_of_another_kind(tiny: str, copy: Path, cache: Path, changes: dict[str, Any], what: str) -> None:
    tell(copy, **changes)
    sentence = refusal(f"{tiny}+{copy}")
    assert f"{copy} is no plain LoRA adapter" in sentence
    assert f"{what}" in sentence
    assert "merge it with peft and name that folder" in sentence
    assert not list(cache.glob("models/*"))


def test_what_is_no_change_of_a_matrix_is_not_left_out_in_silence(tiny: str, copy: Path, cache: Path) -> None:
    """Embeddings and biases have adapters too; without theirs the sum would be another model than was trained."""
    tensors, place = tensors_of(copy / lora.TENSORS), "base_model.model.model."
    half = f"{place}layers.1.mlp.down_proj.lora_A.weight"
    assert half in tensors
    for odd in (
        {**tensors, f"{place}embed_tokens.lora_embedding_A": torch.ones(3)},
        {**tensors, f"{place}layers.0.self_attn.q_proj.lora_B.bias": torch.ones(32)},
        {name: tensor for name, tensor in tensors.items() if name != half},
    ):
        save_file(odd, copy / lora.TENSORS, {"format": "pt"})
        refusal(f"{tiny}+{copy}")
        assert not list(cache.glob("models/*"))


def test_adapters_of_another_model(tiny: str, cache: Path, tmp_path: Path) -> None:
    sizes = {"vocab_size": 257, "max_position_embeddings": 512, "eos_token_id": 256, "tie_word_embeddings": True}
    for name, changes in (("wide", {"hidden_size": 64}), ("deep", {"num_hidden_layers": 5})):
        save_tiny(tmp_path / name, **(sizes | changes))
        save_adapter(tmp_path / name, tmp_path / f"for {name}")
    wide, deep = tmp_path / "for wide", tmp_path / "for deep"
    assert f"{wide} was made for a model of other sizes (model.layers." in refusal(f"{tiny}+{wide}")
    lacks = f"{deep} changes model.layers.3.mlp.down_proj.weight, which {tiny} lacks; add it to the model it is for."
    assert refusal(f"{tiny}+{deep}") == lacks
    assert not list(cache.glob("models/*"))


def test_damaged_adapters(tiny: str, copy: Path, cache: Path) -> None:
    name, weights, config = f"{tiny}+{copy}", copy / lora.TENSORS, copy / lora.CONFIG
    whole, said, tensors = weights.read_bytes(), config.read_text(), tensors_of(weights)
    for cut in (0, 7, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        assert f"The adapter {copy} is damaged (" in refusal(name)
    weights.write_bytes(whole)
    tell(copy, r=64)
    assert f"The adapter {copy} is damaged (r is 64, but model.layers." in refusal(name)
    config.write_text(said)
    del tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
    save_file(tensors, weights, {"format": "pt"})
    assert f"The adapter {copy} is damaged (" in refusal(name)
    weights.write_bytes(whole)
    for changes in ({"r": None}, {"r": "many"}, {"lora_alpha": {}}):
        tell(copy, **changes)
        assert f"The adapter {copy} is damaged (" in refusal(name)
        config.write_text(said)
    config.write_text(said[:-9])
    assert "adapter_config.json cannot be read" in refusal(name)
    config.write_text(said)
    weights.unlink()
    assert f"The adapter {copy} cannot be read (" in refusal(name)
    assert not list(cache.glob("models/*"))
    weights.write_bytes(whole)
    resolve(name)
