"""Configs, models and checkpoints of every architecture that are refused, and forms of checkpoints that are read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import change_json, change_tensors
from families import FAMILIES, family_config, family_hf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig

from dynskip import CausalLM
from dynskip.models.registry import get_architecture

INPUT_IDS = torch.tensor([[5, 6, 7, 9, 40, 8]])
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "factor": 2.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
HALF_TURNED = LINEAR | {"partial_rotary_factor": 0.5}

# Family, a change of its config, and what the error says.
BAD_CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_parameters": LONGROPE}, "rope_type must be one of default, .* got 'longrope'"),
    ("gpt_neox", {"rope_parameters": LONGROPE}, "rope_type must be one of default, .* got 'longrope'"),
    ("llama", {"rope_parameters": HALF_TURNED}, "rope_parameters must turn all 8 values of a head, got 4"),
    ("qwen3", {"rope_parameters": {"full_attention": LINEAR}}, "must be the same for all layers, got those of full"),
    ("llama", {"rope_parameters": LINEAR | {"factor": "x"}}, "rope_parameters must be those of 'linear', .*TypeError"),
    ("gpt_neox", {"rope_parameters": LINEAR | {"factor": 0.0}}, "must be those of 'linear', .* are not finite"),
    ("llama", {"hidden_act": "tanh"}, "hidden_act must be one of relu, gelu, .* got 'tanh'"),
    ("gpt_neox", {"hidden_act": "quick_gelu"}, "hidden_act must be one of relu, gelu, .* got 'quick_gelu'"),
    ("gpt2", {"activation_function": "laplace"}, "activation_function must be one of relu, .* got 'laplace'"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm must be False, got True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention must be False, got True"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "connection_post_layernorm must be False, got True"),
    *(
        (family, {"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads 4, got 3")
        for family in ("llama", "mistral", "qwen2", "qwen3")
    ),
    ("qwen2", {"num_key_value_heads": 0}, "num_key_value_heads must be an integer of at least 1, got 0"),
    ("gpt2", {"num_attention_heads": 3}, "num_attention_heads must divide hidden_size 32, got 3"),
    ("bloom", {"num_attention_heads": 3}, "num_attention_heads must divide hidden_size 32, got 3"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 6}, "layer_types must be full_attention or .* got chunked_att"),
    ("qwen3", {"layer_types": ["window_attention"] * 6}, "layer_types must be full_attention or .* got window_att"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 6}, "sliding_window must be set where layers have one, got .*"),
    ("mistral", {"layer_types": ["full_attention"] * 6}, "layer_types must be None, got .'full_attention'"),
    ("bloom", {"pretraining_tp": 2, "slow_but_exact": True}, "slow_but_exact must be False, got True"),
    *((family, {"is_causal": False}, "is_causal must be True, got False") for family in FAMILIES),
    ("mistral", {"sliding_window": 0}, "sliding_window must be an integer of at least 1, got 0"),
    ("qwen3", {"head_dim": 0}, "head_dim must be an integer of at least 1, got 0"),
    ("gpt2", {"n_inner": 0}, "n_inner must be an integer of at least 1, got 0"),
    ("bloom", {"seq_length": 0}, "seq_length must be an integer of at least 1, got 0"),
]


@pytest.mark.parametrize(("family", "changes", "message"), BAD_CONFIGS)
def test_a_config_that_cannot_be_built(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^CausalLM: .*{message}"):
        CausalLM(family_config(family, **changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_below_one(family: str) -> None:
    for size in get_architecture(family).sizes:
        config = family_config(family)
        setattr(config, size, 0)
        with pytest.raises(ValueError, match=f"CausalLM: {size} must be an integer of at least 1, got 0"):
            CausalLM(config)


def test_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"type opt, llama, .*, got model_type 'bert'\. Other architectures"):
        CausalLM(BertConfig())
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^from_pretrained: .*type opt, llama, .*, got model_type 'bert'\."):
        CausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_class_without_a_language_modelling_head(family: str) -> None:
    for kind in (AutoModel, AutoModelForSequenceClassification):
        model = kind.from_config(family_config(family, num_hidden_layers=1))
        with pytest.raises(TypeError, match=f"head, such as .*, got {type(model).__name__}"):
            CausalLM.from_hf(model)


def twice_as_fast(hf_model: Any, name: str = "inv_freq") -> None:
    (rotary,) = (module for module in hf_model.modules() if hasattr(module, "inv_freq"))
    getattr(rotary, name).mul_(2)


# What makes a model of transformers another than plain ones of its config, and what the error says.
ODD_MODELS: list[tuple[str, str, Callable[[Any], Any], str]] = [
    ("llama", "plain", twice_as_fast, "rotary_emb.inv_freq of the model must hold the frequencies of its config"),
    ("gpt_neox", "plain", twice_as_fast, "rotary_emb.inv_freq of the model must hold the frequencies of its config"),
    (
        "llama",
        "all-heads",
        functools.partial(twice_as_fast, name="original_inv_freq"),
        "rotary_emb.original_inv_freq of the model must hold the frequencies",
    ),
    (
        "llama",
        "tied",
        lambda model: setattr(model.model.rotary_emb, "attention_scaling", 1.0),
        r"rotary_emb must have attention_scaling 1.1\d* as its config says, got 1.0",
    ),
    (
        "mistral",
        "plain",
        lambda model: setattr(model.model.layers[1].self_attn, "num_key_value_groups", 4),
        "layers.1.self_attn must have num_key_value_groups 2 as its config says, got 4",
    ),
    (
        "qwen3",
        "plain",
        lambda model: setattr(model.model.layers[1].self_attn.q_norm, "variance_epsilon", 0.1),
        "self_attn.q_norm must have variance_epsilon 1e-06 as its config says, got 0.1",
    ),
    (
        "gpt_neox",
        "plain",
        lambda model: setattr(model.gpt_neox.layers[2], "use_parallel_residual", False),
        "layers.2 must have use_parallel_residual True as its config says, got False",
    ),
    (
        "bloom",
        "plain",
        lambda model: setattr(model.transformer.h[2].self_attention, "beta", 2.0),
        "h.2.self_attention must have beta 1.0 as its config says, got 2.0",
    ),
    (
        "bloom",
        "plain",
        lambda model: setattr(model.transformer.h[2], "apply_residual_connection_post_layernorm", True),
        "h.2 must have apply_residual_connection_post_layernorm False as its config says, got True",
    ),
    (
        "gpt2",
        "plain",
        lambda model: setattr(model.transformer.h[2].attn, "scaling", 1.0),
        "h.2.attn must have scaling 0.35.* as its config says, got 1.0",
    ),
]


@pytest.mark.parametrize(("family", "variant", "change", "message"), ODD_MODELS)
def test_a_model_that_computes_something_else(
    family: str, variant: str, change: Callable[[Any], Any], message: str
) -> None:
    hf_model = family_hf(family, **FAMILIES[family][variant])
    CausalLM.from_hf(hf_model)
    change(hf_model)
    with pytest.raises(ValueError, match=f"^from_hf: .*{message}"):
        CausalLM.from_hf(hf_model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_that_a_conversion_rounded(dtype: torch.dtype) -> None:
    model = CausalLM.from_hf(family_hf("llama").to(dtype))
    assert model.dtype == dtype
    assert model.decoder_config == CausalLM.from_hf(family_hf("llama")).decoder_config


def test_frequencies_left_by_a_sequence_that_was_too_long() -> None:
    hf_model = family_hf("llama", **FAMILIES["llama"]["all-heads"])
    before = CausalLM.from_hf(hf_model).decoder_config
    with torch.no_grad():
        hf_model(torch.full((1, 80), 5))
    rotary = hf_model.model.rotary_emb
    assert not torch.equal(rotary.inv_freq, rotary.original_inv_freq)
    assert CausalLM.from_hf(hf_model).decoder_config == before


# Checkpoints.

# A tensor of each family that holds one matrix or several, stored as it is or turned.
MATRICES = {
    "opt": "model.decoder.layers.1.self_attn.k_proj.weight",
    "llama": "model.layers.1.mlp.up_proj.weight",
    "mistral": "model.layers.1.self_attn.k_proj.weight",
    "qwen2": "model.layers.1.self_attn.v_proj.bias",
    "qwen3": "model.layers.1.self_attn.k_norm.weight",
    "gpt_neox": "gpt_neox.layers.1.attention.query_key_value.weight",
    "bloom": "transformer.h.1.self_attention.query_key_value.weight",
    "gpt2": "transformer.h.1.attn.c_attn.weight",
    "phi": "model.layers.1.self_attn.dense.weight",
}


def load(folder: Path) -> CausalLM:
    return CausalLM.from_pretrained(folder, dtype="float32", backend="torch")


def same_logits(model: CausalLM, hf_model: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(INPUT_IDS).logits, hf_model(INPUT_IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_that_contradicts_its_config(family: str, tmp_path: Path) -> None:
    family_hf(family, num_hidden_layers=2).save_pretrained(tmp_path)
    name = MATRICES[family]
    tensors = load_file(tmp_path / "model.safetensors")
    shape = list(tensors[name].shape)

    def message(change: Callable[[dict[str, Tensor]], Any]) -> str:
        save_file(dict(tensors), tmp_path / "model.safetensors", metadata={"format": "pt"})
        change_tensors(tmp_path, change)
        with pytest.raises(ValueError, match=r"^from_pretrained: ") as caught:
            load(tmp_path)
        return str(caught.value)

    wrong = message(lambda held: held.update({name: held[name][:-1].contiguous()}))
    assert f"{name} of " in wrong
    assert f"must have the shape {shape} of its config, got {[shape[0] - 1, *shape[1:]]}" in wrong
    if len(shape) == 2 and shape[0] != shape[1]:
        turned = message(lambda held: held.update({name: held[name].t().contiguous()}))
        assert f"must have the shape {shape} of its config, got {shape[::-1]}" in turned
    assert f"1 missing, such as {name}" in message(lambda held: held.pop(name))
    assert f"1 more, such as {name}_scale" in message(lambda held: held.update({f"{name}_scale": torch.ones(1)}))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change_json(tmp_path / "config.json", vocab_size=100)
    with pytest.raises(ValueError, match=r"must have the shape \[100(, 32)?\] of its config, got \[101(, 32)?\]"):
        load(tmp_path)


# Names in published checkpoints of what is made from the config, not read.
PUBLISHED_BUFFERS = {
    "opt": ["decoder.version"],
    "gpt2": ["h.0.attn.bias", "h.0.attn.masked_bias"],
    "gpt_neox": ["layers.0.attention.bias", "layers.0.attention.masked_bias", "layers.0.attention.rotary_emb.inv_freq"],
    "llama": ["layers.0.self_attn.rotary_emb.inv_freq"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_saved_without_its_head(family: str, tmp_path: Path) -> None:
    """As GPT-2's own checkpoint is: names lack the prefix; a tied head is the embedding."""
    hf_model = family_hf(family, tie_word_embeddings=True)
    hf_model.base_model.save_pretrained(tmp_path)
    architecture = get_architecture(family)
    derived = {name: torch.ones(1) for name in PUBLISHED_BUFFERS.get(family, [])}
    if derived:
        change_tensors(tmp_path, lambda tensors: tensors.update(derived))
    assert not any(name.startswith(architecture.prefix) for name in load_file(tmp_path / "model.safetensors"))
    if family == "phi":  # its head has a bias, which such a checkpoint lacks
        with pytest.raises(ValueError, match=r"got 1 missing, such as lm_head\.bias"):
            load(tmp_path)
        return
    same_logits(load(tmp_path), hf_model)
    change_json(tmp_path / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=rf"got 1 missing, such as {architecture.head}\.weight"):
        load(tmp_path)


@pytest.mark.parametrize("family", ["gpt_neox", "bloom", "gpt2"])
def test_pickled_weights_in_one_file_or_in_shards(family: str, tmp_path: Path) -> None:
    hf_model = family_hf(family)
    hf_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    same_logits(load(tmp_path), hf_model)
    (tmp_path / "pytorch_model.bin").unlink()
    files = {name: f"part-{index % 3}.bin" for index, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in files if files[name] == file}, tmp_path / file)
    change_json(tmp_path / "pytorch_model.bin.index.json", metadata={}, weight_map=files)
    same_logits(load(tmp_path), hf_model)
    for path in tmp_path.glob("p*"):
        path.unlink()
    hf_model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    same_logits(load(tmp_path), hf_model)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"mlp_bias": True}),
    ],
)
def test_keys_that_a_type_does_not_know_are_not_read(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Transformers makes no biases of them either."""
    family_hf(family).save_pretrained(tmp_path)
    expected = CausalLM.from_pretrained(tmp_path, dtype="float32")(INPUT_IDS).logits
    change_json(tmp_path / "config.json", **changes)
    found = CausalLM.from_pretrained(tmp_path, dtype="float32")(INPUT_IDS).logits
    assert torch.equal(found, expected)
