"""Adapters that are refused: for what they ask beside two factors a matrix, for damage, for bases of other shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import CONFIG, WEIGHTS, adapted_llama, change_factors, load
from checkpoints import PEFT_WARNS, change_json
from families import family_hf
from models import tiny_hf
from torch import Tensor

from dynskip import CausalLM

pytestmark = [PEFT_WARNS]

Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj.lora_"


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path]:
    """The folder of a tiny Llama, and that of its adapter."""
    return adapted_llama(tmp_path)[1:]


def _without_b(held: dict[str, Tensor]) -> None:
    del held[f"{Q_PROJ}B.weight"]


def _without_q(held: dict[str, Tensor]) -> None:
    for factor in "AB":
        del held[f"{Q_PROJ}{factor}.weight"]


def _of_values(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(held: dict[str, Tensor]) -> None:
        held[f"{Q_PROJ}A.weight"][0, 0] = value

    return change


def _renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(held: dict[str, Tensor]) -> None:
        for key in [key for key in held if old in key]:
            held[key.replace(old, new)] = held.pop(key)

    return change


def _plus(key: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda held: held.update({key: torch.ones(shape)})


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, r"must be of peft_type LORA, got 'IA3'\. Merge it"),
    "no kind": ({"peft_type": None}, r"must be of peft_type LORA, got None"),
    "DoRA": ({"use_dora": True}, r"must be of plain LoRA, got use_dora True\. Merge it"),
    "biases": ({"bias": "lora_only"}, r"must be of plain LoRA, got bias 'lora_only'"),
    "biases of B": ({"lora_bias": True}, r"got lora_bias True"),
    "modules": ({"modules_to_save": ["lm_head"]}, r"got modules_to_save \['lm_head'\]"),
    "layers twice": ({"layer_replication": [[0, 4], [2, 5]]}, r"got layer_replication \[\[0, 4\], \[2, 5\]\]"),
    "tokens": ({"trainable_token_indices": [3]}, r"got trainable_token_indices \[3\]"),
    "activated": ({"alora_invocation_tokens": [3]}, r"got alora_invocation_tokens \[3\]"),
    "QALoRA": ({"use_qalora": True}, r"got use_qalora True"),
    "parameters": ({"target_parameters": ["experts"]}, r"got target_parameters \['experts'\]"),
    "what is to come": ({"use_better_lora": {"a": 1}}, r"got use_better_lora \{'a': 1\}"),
    "a base of its own": ({"init_lora_weights": "pissa_niter_4"}, r"got init_lora_weights 'pissa_niter_4'\. Merge"),
    "no rank": ({"r": 0}, r"must have ranks of at least 1, got r 0 of model\.layers\.0\.mlp\.down_proj"),
    "a rank in words": ({"r": "four"}, r"must have ranks of at least 1, got r 'four'"),
    "another rank": ({"r": 8}, r"must hold lora_A of .*down_proj in the shape \[8, 48\], .* rank 8 .* got \[4, 48\]"),
    "no number": ({"lora_alpha": None}, r"must have a number for lora_alpha, got None of"),
    "NaN": ({"lora_alpha": float("nan")}, r"must have a number for lora_alpha, got nan of"),
    "a list of patterns": ({"alpha_pattern": [1]}, r"got alpha_pattern \[1\]"),
    "a bad pattern": ({"rank_pattern": {"(": 1}}, r"must have patterns of names, got .*: .*unterminated|missing"),
    "more targets": ({"target_modules": ["q_proj", "embed_tokens"]}, None),
}
FACTORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "one factor": (_without_b, r"must hold both factors of model.layers.1.self_attn.q_proj, got lora_A only"),
    "a module short": (_without_q, r"hold factors of all its target_modules, got none of model.layers.1.self_attn.q"),
    "NaN": (_of_values(float("nan")), r"layers\.1\.self_attn\.q_proj\.lora_A\.weight must hold finite numbers only"),
    "infinity": (_of_values(float("inf")), r"must hold finite numbers only, got NaN or infinity\. It is damaged"),
    "nothing": (dict.clear, r"must hold factors of at least one matrix, got none"),
    "an embedding": (_plus("base_model.model.model.embed_tokens.lora_embedding_A", 4, 101), r"lora_A and lora_B of m"),
    "a whole matrix": (_plus("base_model.model.lm_head.weight", 101, 32), r"only, got base_model.model.lm_head.weight"),
    "a magnitude": (_plus(f"{Q_PROJ}magnitude_vector", 32), r"only, got .*lora_magnitude_vector\. Merge it"),
    "another prefix": (_renamed("base_model.model.", "model."), r"must hold lora_A and lora_B of matrices only, got m"),
    "a module that is none": (
        _renamed("self_attn.q_proj", "self_attn.qkv"),
        r"must adapt matrices of .*base, got model\.layers\.0\.self_attn\.qkv\.",
    ),
    "a norm": (_renamed("self_attn.q_proj", "input_layernorm"), r"must adapt matrices of .*layers\.0\.input_layernorm"),
    "a layer too many": (_renamed("layers.5", "layers.6"), r"must adapt matrices of .*, got model\.layers\.6\.mlp"),
    "another size": (
        lambda held: held.update({f"{Q_PROJ}B.weight": torch.ones(48, 4)}),
        r"lora_B of model.layers.1.self_attn.q_proj in the shape \[32, 4\], by its rank 4 and .*base, got \[48, 4\]",
    ),
    "one dimension": (lambda held: held.update({f"{Q_PROJ}A.weight": torch.ones(4)}), r"\[4, 32\], .* got \[4\]"),
    "whole numbers": (
        lambda held: held.update({f"{Q_PROJ}A.weight": torch.ones(4, 32, dtype=torch.int8)}),
        r"lora_A\.weight must be float32, bfloat16, float16, float64, got int8",
    ),
}


def refused(base: Path, adapter: Path, message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message) as caught:
        load(base, adapter)
    assert str(caught.value).startswith("from_pretrained: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("mistake", CONFIGS)
def test_a_config_that_asks_for_more(mistake: str, llama: tuple[Path, Path]) -> None:
    base, adapter = llama
    changes, message = CONFIGS[mistake]
    change_json(adapter / CONFIG, **changes)
    if message is None:  # what the file holds counts, and all that is named is there
        load(base, adapter)
    else:
        refused(base, adapter, message)


@pytest.mark.parametrize("mistake", FACTORS)
def test_factors_that_do_not_fit(mistake: str, llama: tuple[Path, Path]) -> None:
    base, adapter = llama
    change, message = FACTORS[mistake]
    change_factors(adapter, change)
    refused(base, adapter, message)


def test_factors_of_what_is_no_matrix_of_its_own(llama: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = llama
    family_hf("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    pairs = {f"base_model.model.{name}": name for name in ("lm_head", "model.embed_tokens")}
    for module, name in pairs.items():
        factors = {f"{module}.lora_A.weight": torch.ones(4, 32), f"{module}.lora_B.weight": torch.ones(101, 4)}
        change_factors(adapter, lambda held, factors=factors: (held.clear(), held.update(factors)))
        tied = " The head is the embedding" if name == "lm_head" else ""
        refused(tmp_path / "tied", adapter, rf"must adapt matrices of .*tied, got {name}\.{tied}")


def test_another_base(llama: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = llama
    change_json(adapter / CONFIG, base_model_name_or_path="some/model")
    tiny_hf().save_pretrained(tmp_path / "opt")
    refused(tmp_path / "opt", adapter, r"got model\.layers\.0\.mlp\.down_proj\. It was made for 'some/model'")
    family_hf("llama", hidden_size=64).save_pretrained(tmp_path / "wide")
    refused(tmp_path / "wide", adapter, r"shape \[64, 4\], .* got \[32, 4\]\. It was made for 'some/model'")
    family_hf("llama", num_hidden_layers=7).save_pretrained(tmp_path / "deep")
    refused(tmp_path / "deep", adapter, r"all its target_modules, got none of model\.layers\.6\.mlp\.down_proj")


def test_files_that_are_not_there_or_damaged(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = llama
    with pytest.raises(TypeError, match=r"from_pretrained: adapter must be a folder, got int"):
        load(base, 3)  # type: ignore[arg-type]  # what is refused
    refused(
        base, tmp_path / "nowhere", r"adapter must be a folder, got '.*nowhere', which is none\.", FileNotFoundError
    )
    refused(base, adapter / CONFIG, r"adapter must be a folder", FileNotFoundError)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(base, "~/adapter").config.adapter == str(adapter)
    whole = (adapter / WEIGHTS).read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        (adapter / WEIGHTS).write_bytes(whole[:size])
        refused(base, adapter, r"must hold readable adapter_model.safetensors, got: .*Copy it again")
    (adapter / WEIGHTS).unlink()
    refused(base, adapter, r"must hold adapter_model.safetensors, got none\. Save it", FileNotFoundError)
    (adapter / WEIGHTS).write_bytes(whole)
    for text in ("{", "\x00", "[" * 10**5):
        (adapter / CONFIG).write_text(text)
        refused(base, adapter, r"must hold JSON in adapter_config.json, got: ")
    (adapter / CONFIG).write_bytes(b"\xff\xfe{}")
    refused(base, adapter, r"must hold JSON in adapter_config.json, got: ")
    (adapter / CONFIG).write_text("[1]")
    refused(base, adapter, r"must hold a JSON object in adapter_config.json, got a list")
    (adapter / CONFIG).unlink()
    refused(base, adapter, r"must hold adapter_config.json, got none", FileNotFoundError)


def test_an_adapter_is_no_model(llama: tuple[Path, Path]) -> None:
    _, adapter = llama
    refused(adapter, adapter, r"got an adapter \(adapter_config.json\)\. Name its base as the model, and a folder")
    with pytest.raises(ValueError, match=r"must hold one whole model, got an adapter"):
        CausalLM.from_pretrained(adapter)
