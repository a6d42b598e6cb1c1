"""Every architecture against transformers: logits, greedy tokens and round trips, at full depth and along paths."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import NUM_DRAWS, Case, case, draws, named
from families import ALL_VARIANTS, FAMILIES, LARGE, convert_, cut_family, family_config, family_hf, large_changes
from models import cpu_backend, ragged_batch, random_prompts, within_budget
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynskip import CausalLM, SamplingParams
from dynskip.engine.closed_batch import Generation
from dynskip.models.architecture import ACTIVATIONS, ROPE_TYPES
from dynskip.models.config import DecoderConfig
from dynskip.models.registry import decoder_config

LONG = [300, 1, 70, 129]
# The variant of each family that rounds in bfloat16.
BFLOAT16 = {
    "llama": "one-kv-head",
    "mistral": "window",
    "qwen2": "window",
    "qwen3": "window",
    "bloom": "three-heads",
    "gpt2": "by-depth",
}
NAMED = [named(family, name) for family, name in ALL_VARIANTS]
DRAWN = {family: draws(family) for family in FAMILIES}
CASES = [*NAMED, *(drawn for family in DRAWN.values() for drawn in family)]
# Values that have to be the plain ones.
REFUSED = {"add_cross_attention", "apply_residual_connection_post_layernorm", "qk_layernorm"}


@torch.no_grad()
def hf_logits(hf_model: Any, batch: Case, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, T, V] of transformers' model cut to each sequence's path, zero at padding."""
    logits = torch.zeros(*input_ids.shape, hf_model.config.vocab_size, dtype=hf_model.dtype)
    for seq, path in enumerate(batch.paths):
        keep = attention_mask[seq].bool()
        with cut_family(hf_model, path):
            logits[seq, keep] = hf_model(input_ids[seq, keep][None], use_cache=False).logits[0]
    return logits


class Asked:
    """A config, and the names and values of what is asked of it, those in a dict one by one."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.values: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.config, name)
        held = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        self.values |= {key: repr(item) for key, item in held.items() if not callable(item)}
        return value


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_are_distinct_and_vary_all_that_is_read(family: str) -> None:
    configs = [Asked(family_config(family, **drawn.changes)) for drawn in DRAWN[family]]
    assert len({decoder_config(config) for config in configs}) == NUM_DRAWS
    for name in {name for config in configs for name in config.values} - REFUSED - {"model_type"}:
        assert len({config.values.get(name) for config in configs}) > 1, name
    if "rope_parameters.rope_type" in configs[0].values:
        assert {config.config.rope_parameters["rope_type"] for config in configs} == set(ROPE_TYPES)


def test_draws_of_all_families_reach_every_field() -> None:
    drawn = [one for family in DRAWN.values() for one in family]
    decoders = [decoder_config(family_config(one.family, **one.changes)) for one in drawn]
    for field in fields(DecoderConfig):
        assert len({getattr(decoder, field.name) for decoder in decoders}) > 1, field.name
    assert {decoder.activation for decoder in decoders} == set(ACTIVATIONS.values())
    for one in drawn:
        assert 1 in one.lengths and {0, one.num_layers} < {len(path.layers) for path in one.paths}


@pytest.mark.parametrize("batch", CASES, ids=str)
def test_logits_along_paths_are_those_of_transformers(batch: Case) -> None:
    hf_model = batch.hf()
    inputs = ragged_batch(batch.lengths, "left")
    expected = hf_logits(hf_model, batch, *inputs)
    models = [CausalLM.from_hf(hf_model, backend=cpu_backend(backend)) for backend in ("torch", "native")]
    results = [model(*inputs, batch.paths).logits for model in models]
    results.append(models[0](*inputs, batch.paths, executor="reference").logits)
    exact = hf_logits(convert_(hf_model, torch.float64), batch, *inputs)
    for logits in results:
        within_budget(logits, expected, exact, batch.num_layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_good_as_eager(family: str) -> None:
    batch = named(family, BFLOAT16[family]) if family in BFLOAT16 else case(family, "plain", {})
    inputs = ragged_batch(batch.lengths, "left")
    ours: dict[str, list[Tensor]] = {"torch": [], "native": [], "reference": []}
    eager, exact = [], []
    for seed in range(2):
        hf_model = batch.hf(torch.bfloat16, seed)
        eager.append(hf_logits(hf_model, batch, *inputs))
        for backend in ("torch", "native"):
            model = CausalLM.from_hf(hf_model, backend=cpu_backend(backend))
            ours[backend].append(model(*inputs, batch.paths).logits)
        ours["reference"].append(model(*inputs, batch.paths, executor="reference").logits)
        exact.append(hf_logits(convert_(hf_model, torch.float64), batch, *inputs))
    for results in ours.values():
        logits = torch.cat(results)
        assert logits.dtype == torch.bfloat16
        within_budget(logits, torch.cat(eager), torch.cat(exact))


@pytest.mark.parametrize("family", LARGE)
def test_long_prompts_of_wide_heads(family: str) -> None:
    hf_model = family_hf(family, **large_changes(family))
    input_ids, attention_mask = ragged_batch(LONG, "right")

    @torch.no_grad()
    def of_transformers() -> Tensor:
        rows = zip(input_ids, attention_mask.bool(), strict=True)
        return torch.cat([hf_model(ids[keep][None], use_cache=False).logits[0] for ids, keep in rows])

    expected = of_transformers()
    models = [CausalLM.from_hf(hf_model, backend=cpu_backend(backend)) for backend in ("torch", "native")]
    results = [model(input_ids, attention_mask).logits[attention_mask.bool()] for model in models]
    convert_(hf_model, torch.float64)
    exact = of_transformers()
    for logits in results:
        within_budget(logits, expected, exact)


@pytest.mark.parametrize("batch", CASES, ids=str)
def test_greedy_tokens_along_paths_are_those_of_transformers(batch: Case) -> None:
    """Each token is the most likely one to transformers, which sees the tokens before it at once."""
    hf_model = batch.hf()
    prompts = random_prompts(batch.lengths)
    model = CausalLM.from_hf(hf_model, backend=cpu_backend("native"))
    params = [SamplingParams(max_tokens=8, ignore_eos=True)] * len(prompts)
    outputs = Generation(model, prompts, params, batch.paths).run()
    for prompt, path, output in zip(prompts, batch.paths, outputs, strict=True):
        assert len(output.token_ids) == 8
        with torch.no_grad(), cut_family(hf_model, path):
            logits = hf_model(torch.tensor([[*prompt, *output.token_ids]]), use_cache=False).logits[0]
        assert output.token_ids == logits[len(prompt) - 1 : -1].argmax(-1).tolist(), f"along {path}"


@pytest.mark.parametrize("saved", NAMED, ids=str)
def test_weights_come_back_from_a_round_trip(saved: Case, tmp_path: Path) -> None:
    hf_model = saved.hf()
    hf_model.save_pretrained(tmp_path / "theirs")
    model = CausalLM.from_pretrained(tmp_path / "theirs", dtype="float32")
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert type(again) is type(hf_model)
    state = again.state_dict()
    for name, weight in hf_model.state_dict().items():
        assert torch.equal(state[name], weight), name
    expected = CausalLM.from_hf(hf_model).state_dict()
    loaded = CausalLM.from_pretrained(tmp_path / "ours", dtype="float32").state_dict()
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())
