"""Every field of `DecoderConfig` counts: with another value our model is not transformers', or is not built."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, convert_, family_hf
from models import NUM_LAYERS, VARIANTS, ragged_batch, random_prompts, within_budget

from dynskip import LLM, CausalLM, LayerPath, SamplingParams
from dynskip.models import registry
from dynskip.models.config import DecoderConfig, Rotary

# What a field does not change, and why.
WITHOUT_COMPUTATION = {"architecture": "a name, by which a checkpoint is read and written"}
# A sequence that is longer is refused; see the test of the limit.
LIMITS = {"max_positions"}

Change = Callable[[DecoderConfig], Any]


def to(value: Any) -> Change:
    return lambda config: value


def turned(**changes: Any) -> Change:
    """The same rotation but for ``changes``."""
    return lambda config: dataclasses.replace(config.rotary, **changes)


# Field, family, variant, and another value: of fields that weights follow from, the model is not built.
NOT_BUILT: list[tuple[str, str, str, Change]] = [
    ("num_layers", "llama", "plain", to(NUM_LAYERS - 1)),
    ("num_layers", "gpt2", "plain", to(NUM_LAYERS + 1)),
    ("num_heads", "qwen3", "plain", to(2)),
    ("num_heads", "llama", "plain", to(8)),
    ("num_kv_heads", "mistral", "plain", to(4)),
    ("num_kv_heads", "qwen2", "plain", to(1)),
    ("head_size", "llama", "wide-heads", to(8)),
    ("ffn_size", "gpt_neox", "plain", to(64)),
    ("ffn_size", "gpt2", "inner", to(128)),
    ("vocab_size", "bloom", "plain", to(100)),
    ("embedding_size", "opt", "pre-norm", to(16)),
    ("embedding_size", "opt", "pre-norm-projected", to(32)),
    ("norm_affine", "opt", "pre-norm", to(False)),
    ("norm_affine", "opt", "no-affine", to(True)),
    ("final_norm", "opt", "post-norm", to(True)),
    ("final_norm", "llama", "plain", to(False)),
    ("position_offset", "opt", "pre-norm", to(0)),
    ("qkv_bias", "qwen2", "plain", to(False)),
    ("qkv_bias", "llama", "plain", to(True)),
    ("out_bias", "qwen2", "plain", to(True)),
    ("out_bias", "gpt2", "plain", to(False)),
    ("mlp_bias", "llama", "biases", to(False)),
    ("head_bias", "gpt_neox", "plain", to(True)),
    ("is_head_tied", "gpt_neox", "plain", to(True)),
    ("is_head_tied", "gpt2", "plain", to(False)),
    ("norm", "llama", "plain", to("layer")),
    ("norm", "gpt2", "plain", to("rms")),
    ("embedding_norm", "bloom", "plain", to(False)),
    ("qk_norm", "qwen3", "plain", to(False)),
    ("qk_norm", "qwen2", "plain", to(True)),
    ("shared_norm", "gpt_neox", "plain", to(True)),
    ("gated", "llama", "plain", to(False)),
    ("max_positions", "gpt2", "plain", to(63)),
]
# The same of weights that the architecture has no name for.
WITHOUT_NAME: list[tuple[str, str, str, Change]] = [
    ("hidden_size", "bloom", "plain", to(64)),
    ("embedding_norm", "gpt2", "plain", to(True)),
    ("rotary", "llama", "plain", to(None)),
    ("alibi", "bloom", "plain", to(False)),
    ("qk_norm", "gpt2", "plain", to(True)),
]
# The same of fields that weights do not know of: logits are others.
OTHER_LOGITS: list[tuple[str, str, str, Change]] = [
    ("norm_eps", "llama", "plain", to(1e-2)),
    ("norm_eps", "bloom", "eps", to(1e-5)),
    ("norm_eps", "qwen3", "plain", to(1e-2)),
    ("norm_first", "opt", "post-norm", to(True)),
    ("norm_first", "gpt_neox", "sequential", to(False)),
    ("activation", "llama", "plain", to("gelu")),
    ("activation", "gpt2", "plain", to("gelu")),
    ("activation", "opt", "gelu", to("relu")),
    ("norm", "opt", "no-affine", to("rms")),
    ("parallel", "gpt_neox", "plain", to(False)),
    ("parallel", "gpt2", "plain", to(True)),
    ("rotary", "llama", "plain", lambda config: Rotary.plain(8, 500000.0)),
    ("rotary", "gpt_neox", "plain", lambda config: Rotary.plain(8, 10000.0)),
    ("rotary", "llama", "tied", turned(scaling=1.0)),
    ("alibi", "llama", "plain", to(True)),
    ("window", "mistral", "window", to(0)),
    ("window", "mistral", "window", to(4)),
    ("window", "llama", "plain", to(3)),
    ("window_layers", "qwen2", "layer-types", to(None)),
    ("window_layers", "qwen3", "window", to((0,))),
    ("attention_scale", "gpt2", "unscaled", to(None)),
    ("attention_scale", "bloom", "plain", to(1.0)),
    ("scale_by_depth", "gpt2", "by-depth", to(False)),
    ("scale_by_depth", "llama", "plain", to(True)),
]


def variant_of(family: str, variant: str, dtype: torch.dtype = torch.float32) -> Any:
    return convert_(family_hf(family, **(VARIANTS if family == "opt" else FAMILIES[family])[variant]), dtype)


def with_field(hf_model: Any, field: str, change: Change, monkeypatch: pytest.MonkeyPatch) -> CausalLM:
    """Our model with the weights of ``hf_model``, and one field of its config changed."""
    read = registry.decoder_config

    def changed(config: Any) -> DecoderConfig:
        decoder = read(config)
        value = change(decoder)
        assert value != getattr(decoder, field), "the value is another"
        return dataclasses.replace(decoder, **{field: value})

    for module in ("dynskip.causal_lm", "dynskip.models.source"):
        monkeypatch.setattr(f"{module}.decoder_config", changed)
    return CausalLM.from_hf(hf_model, backend="torch")


def named(cases: list[tuple[str, str, str, Change]]) -> list[Any]:
    return [pytest.param(*case, id="-".join(case[:3])) for case in cases]


def test_every_field_is_changed() -> None:
    changed = {field for field, *_ in (*NOT_BUILT, *WITHOUT_NAME, *OTHER_LOGITS)} | WITHOUT_COMPUTATION.keys() | LIMITS
    assert changed == {field.name for field in dataclasses.fields(DecoderConfig)}


@pytest.mark.parametrize(("field", "family", "variant", "change"), named(NOT_BUILT))
def test_a_model_is_not_built(
    field: str, family: str, variant: str, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"^from_hf: .*the model must (hold|have) .* its config"):
        with_field(variant_of(family, variant), field, change, monkeypatch)


@pytest.mark.parametrize(("field", "family", "variant", "change"), named(WITHOUT_NAME))
def test_an_architecture_has_no_such_part(
    field: str, family: str, variant: str, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match=f"{family} has no (project_in|project_out|embed|q_norm)"):
        with_field(variant_of(family, variant), field, change, monkeypatch)


@pytest.mark.parametrize(("field", "family", "variant", "change"), named(OTHER_LOGITS))
def test_logits_are_others(
    field: str, family: str, variant: str, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_model = variant_of(family, variant)
    input_ids, _ = ragged_batch([12, 12], "left")
    models = CausalLM.from_hf(hf_model, backend="torch"), with_field(hf_model, field, change, monkeypatch)
    with torch.no_grad():
        eager, exact = (
            model(input_ids, use_cache=False).logits for model in (hf_model, variant_of(family, variant, torch.float64))
        )
    for executor in ("compact", "reference"):
        plain, other = (model(input_ids, executor=executor).logits for model in models)
        within_budget(plain, eager, exact)
        with pytest.raises(AssertionError, match=r"error .* allowed .* floor"):
            within_budget(other, eager, exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_is_no_longer_than_its_positions(family: str) -> None:
    changes = {"seq_length": 64} if family == "bloom" else {}
    model = CausalLM.from_hf(family_hf(family, **changes), backend="torch")
    assert model.decoder_config.max_positions == 64
    (longest,) = random_prompts([64])
    path = LayerPath.of(NUM_LAYERS, [2])
    assert model(torch.tensor([longest]), paths=path).logits.isfinite().all()
    with pytest.raises(ValueError, match="sequence 0 must fit 64 positions, got 65 tokens"):
        model(torch.tensor([[*longest, 5]]), paths=path)
    llm = LLM(model)
    (output,) = llm.generate([longest[:60]], SamplingParams(max_tokens=4, ignore_eos=True), path)
    assert len(output.token_ids) == 4
    with pytest.raises(ValueError, match="must fit 64 positions, got 60 prompt and 5 new tokens"):
        llm.generate([longest[:60]], SamplingParams(max_tokens=5), path)
