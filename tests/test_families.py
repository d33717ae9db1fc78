"""Our reading of a config against transformers': same frequencies, tensors and windows, or a refusal."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import save_tiny_chat
from tiny_models import DIMENSIONS, ROPES, VARIANTS, save_tiny, tiny_config, tiny_model

from foretell.errors import ForetellError
from foretell.loading.families import FAMILIES, model_config, read_config
from foretell.loading.tensors import LAYER, parts, weight_shapes


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_of_transformers_is_expected_with_its_shape(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del theirs["lm_head.weight"]
    assert weight_shapes(model_config(model.config)) == theirs


def test_tensors_that_are_fused_fit_together_in_every_family() -> None:
    """A row names numbers and switches of `ModelConfig`; one of a part has a bias only if all have."""
    for family in FAMILIES:
        config = model_config({"model_type": family, **DIMENSIONS})
        for tensors in parts(config).values():
            assert all(tensor.is_matrix for tensor in tensors) or len(tensors) == 1
            assert len({tensor.shape(config)[1:] for tensor in tensors}) == 1
            assert len({(tensor.bias, tensor.only_if) for tensor in tensors}) == 1
    assert len({tensor.name for tensor in LAYER}) == len(LAYER)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_config_reads_as_the_config_in_memory(variant: str, tmp_path: Path) -> None:
    config = tiny_config(**VARIANTS[variant])
    config.save_pretrained(tmp_path)
    assert read_config(tmp_path) == model_config(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_windows_are_those_of_the_layers(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers]
    if model.config.model_type == "mistral":
        windows = [model.config.sliding_window] * len(windows)
    assert model_config(model.config).windows == tuple(window or 0 for window in windows)


def test_a_window_of_w_sees_w_positions_itself_included() -> None:
    """What `windows` promises, shown on transformers: a token reaches w positions, its own included."""
    model = tiny_model("mistral", sliding_window=4, num_hidden_layers=1)
    ids = torch.arange(10)[None]
    other = ids.clone()
    other[0, 5] = 40
    changed = (model(ids).logits != model(other).logits).any(-1)[0].tolist()
    assert changed == [False] * 5 + [True] * 4 + [False]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ROPES)
def test_rope_is_bit_equal_to_transformers(family: str, rope: str) -> None:
    model = tiny_model(family, rope_parameters=dict(ROPES[rope]))
    rotary = model.model.rotary_emb
    ours = model_config(model.config)
    assert torch.equal(torch.tensor(ours.inv_freq), rotary.inv_freq)
    assert ours.rope_scale == rotary.attention_scaling


@pytest.mark.parametrize("rope", ROPES)
def test_the_older_spelling_of_rope_settings_reads_the_same(rope: str) -> None:
    settings = dict(ROPES[rope])
    new = {"model_type": "llama", **DIMENSIONS, "rope_parameters": settings}
    theta = settings.pop("rope_theta")
    settings["type"] = settings.pop("rope_type")
    old = {"model_type": "llama", **DIMENSIONS, "rope_scaling": settings, "rope_theta": theta}
    new["rope_parameters"] = dict(ROPES[rope])
    assert model_config(old) == model_config(new)


SCALED: list[tuple[dict[str, Any], int]] = [
    # Qwen's card: the config declares the context without the scaling, and the scaling beside it
    ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
    ({"rope_type": "yarn", "factor": 4.0}, 512),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),  # Qwen3: 40,960, of 32,768
    ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 128),
    ({"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 33}, 128),
    ({"type": "linear", "factor": 4.0}, 512),  # Vicuna 1.5 16k
    (dict(ROPES["llama3"], factor=32.0), 128),  # Llama 3.2 declares less than the product
    (dict(ROPES["llama3"], original_max_position_embeddings=128), 1024),
    ({"rope_type": "default"}, 128),
]


@pytest.mark.parametrize(("settings", "context"), SCALED)
def test_the_context_is_what_the_scaling_gives(settings: dict[str, Any], context: int) -> None:
    raw = {"model_type": "qwen2", **DIMENSIONS, "rope_scaling": settings, "rope_theta": 10_000.0}
    assert model_config(raw).max_positions == context


def test_answers_beyond_the_declared_context_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import foretell

    save_tiny_chat(tmp_path)  # declares 512 positions
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    prompt = torch.randint(256, (600,), generator=torch.Generator().manual_seed(0))
    ours = foretell.load(str(tmp_path), dtype="fp32", threads=1)
    result = ours.generate([prompt.tolist()], max_new_tokens=8, ignore_eos=True)[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = theirs.generate(prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 600:]
    assert result.ids == expected.tolist()


def test_divisors_that_are_the_same_for_every_length_are_those_of_transformers() -> None:
    divisors = [1.0, 1.5, 4.0, 8.0]
    settings = {
        "rope_type": "longrope", "short_factor": divisors, "long_factor": divisors, "rope_theta": 10_000.0,
        "original_max_position_embeddings": 32, "attention_factor": 1.25,
    }  # fmt: skip
    model = tiny_model("llama", rope_parameters=dict(settings))
    ours = model_config(model.config)
    assert torch.equal(torch.tensor(ours.inv_freq), model.model.rotary_emb.inv_freq)
    assert (ours.rope_scale, ours.max_positions) == (1.25, 128)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_out_keys_get_the_defaults_of_transformers(family: str) -> None:
    from transformers import AutoConfig

    required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    given = {key: DIMENSIONS[key] for key in required} | {"num_attention_heads": 32, "hidden_size": 64}
    full = AutoConfig.for_model(family, **given)
    full.dtype = "float32"
    assert model_config({"model_type": family, **given}) == model_config(full)


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    tiny_config("llama", eos_token_id=7).save_pretrained(tmp_path)
    assert read_config(tmp_path).eos_ids == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert read_config(tmp_path).eos_ids == (3, 5)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert read_config(tmp_path).eos_ids == (7,)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mamba"}, "'mamba' is not supported.*llama.*mistral.*qwen2.*qwen3"),
    ({"model_type": None}, "None is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'.*'silu'"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'.*length of the text.*exact"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'.*length of the text.*exact"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}, "'longrope'.*length"),
    ({"rope_scaling": {"type": "su", "factor": 2.0}}, "'su'.*length of the text.*use a model without it"),
    ({"rope_scaling": {"type": "yarn", "factor": "big"}}, "invalid|wrong kind"),
    ({"rope_scaling": {"rope_type": "spiral"}}, "'spiral' is not supported.*yarn"),
    ({"rope_scaling": "linear"}, "needs rope_scaling as an object.*'linear'"),
    ({"rope_parameters": [1]}, r"needs rope_parameters as an object.*\[1\]"),
    ({"rope_theta": -1.0}, "rope_theta of config.json is -1.0; it must be a positive"),
    ({"rope_theta": 10**400}, "wrong kind"),
    ({"rope_theta": {}, "rope_scaling": {"rope_theta": {"base": 1}}}, "wrong kind"),
    ({"rope_scaling": {"rope_type": ["linear"]}}, "'linear'.* is not supported"),
    ({"eos_token_id": [2, "end"]}, "wrong kind"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 rope settings.*invalid"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantized .gptq.*original"),
    ({"num_key_value_heads": 3}, "4 attention heads, 3 key heads"),
    ({"head_dim": 7}, "head_dim 7.*even"),
    ({"hidden_size": None}, "needs hidden_size"),
    ({"vocab_size": -1}, "vocab_size.*-1"),
    ({"num_hidden_layers": "three"}, "num_hidden_layers.*'three'"),
    ({"rms_norm_eps": "small"}, "wrong kind.*small"),
    ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types.*3 layers.*1 entries"),
    ({"model_type": "qwen3", "layer_types": ["chunked"] * 3}, "layer_types.*chunked"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSALS)
def test_refusals_are_one_sentence(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    raw = {"model_type": "llama", **DIMENSIONS, **changes}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ForetellError, match=sentence) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)
    assert re.match(rf"{tmp_path}: [A-Z].*\.$|{tmp_path}/config.json holds .*\.$", str(caught.value))


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", "[" * 100_000])
def test_a_broken_config_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ForetellError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ForetellError, match=r"no config\.json"):
        read_config(tmp_path)


def test_reading_a_plain_config_does_not_import_transformers(tmp_path: Path) -> None:
    import subprocess
    import sys

    save_tiny(tmp_path)
    code = (
        "import sys, pathlib; from foretell.loading.families import read_config; "
        "read_config(pathlib.Path(sys.argv[1])); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
