"""Every architecture against transformers: logits, greedy tokens and round trips, at full depth and along paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import ALL_VARIANTS, FAMILIES, LARGE, NUM_DRAWS, convert_, cut_family, draws, family_hf, large_changes
from models import NUM_LAYERS, cpu_backend, ragged_batch, random_prompts, within_budget
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynskip import CausalLM, LayerPath, SamplingParams
from dynskip.engine.closed_batch import Generation

LENGTHS = [7, 1, 12, 4]
PATHS = [
    LayerPath.of(NUM_LAYERS, [1, 2, 5]),
    LayerPath.full(NUM_LAYERS),
    LayerPath.of(NUM_LAYERS, [0]),
    LayerPath.of(NUM_LAYERS, [0, 3, 4, 5]),
]
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
NAMED = [pytest.param(family, FAMILIES[family][name], id=f"{family}-{name}") for family, name in ALL_VARIANTS]
DRAWN = [
    pytest.param(family, changes, id=f"{family}-draw{index}")
    for family in FAMILIES
    for index, changes in zip(range(NUM_DRAWS), draws(family), strict=True)
]


@torch.no_grad()
def hf_logits(hf_model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, T, V] of transformers' model cut to each sequence's path, zero at padding."""
    logits = torch.zeros(*input_ids.shape, hf_model.config.vocab_size, dtype=hf_model.dtype)
    for seq, path in enumerate(PATHS):
        keep = attention_mask[seq].bool()
        with cut_family(hf_model, path):
            logits[seq, keep] = hf_model(input_ids[seq, keep][None], use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize(("family", "changes"), NAMED + DRAWN)
def test_logits_along_paths_are_those_of_transformers(family: str, changes: dict[str, Any]) -> None:
    hf_model = family_hf(family, **changes)
    input_ids, attention_mask = ragged_batch(LENGTHS, "left")
    expected = hf_logits(hf_model, input_ids, attention_mask)
    models = [CausalLM.from_hf(hf_model, backend=cpu_backend(backend)) for backend in ("torch", "native")]
    results = [model(input_ids, attention_mask, PATHS).logits for model in models]
    results.append(models[0](input_ids, attention_mask, PATHS, executor="reference").logits)
    exact = hf_logits(convert_(hf_model, torch.float64), input_ids, attention_mask)
    for logits in results:
        within_budget(logits, expected, exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_good_as_eager(family: str) -> None:
    changes = FAMILIES[family][BFLOAT16[family]] if family in BFLOAT16 else {}
    input_ids, attention_mask = ragged_batch(LENGTHS, "left")
    ours: dict[str, list[Tensor]] = {"torch": [], "native": [], "reference": []}
    eager, exact = [], []
    for seed in range(2):
        hf_model = family_hf(family, seed=seed, dtype=torch.bfloat16, **changes)
        eager.append(hf_logits(hf_model, input_ids, attention_mask))
        for backend in ("torch", "native"):
            model = CausalLM.from_hf(hf_model, backend=cpu_backend(backend))
            ours[backend].append(model(input_ids, attention_mask, PATHS).logits)
        ours["reference"].append(model(input_ids, attention_mask, PATHS, executor="reference").logits)
        exact.append(hf_logits(convert_(hf_model, torch.float64), input_ids, attention_mask))
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


@pytest.mark.parametrize(("family", "changes"), NAMED + DRAWN)
def test_greedy_tokens_along_paths_are_those_of_transformers(family: str, changes: dict[str, Any]) -> None:
    """Each token is the most likely one to transformers, which sees the tokens before it at once."""
    hf_model = family_hf(family, **changes)
    prompts = random_prompts(LENGTHS)
    model = CausalLM.from_hf(hf_model, backend=cpu_backend("native"))
    params = [SamplingParams(max_tokens=8, ignore_eos=True)] * len(prompts)
    outputs = Generation(model, prompts, params, PATHS).run()
    for prompt, path, output in zip(prompts, PATHS, outputs, strict=True):
        assert len(output.token_ids) == 8
        with torch.no_grad(), cut_family(hf_model, path):
            logits = hf_model(torch.tensor([[*prompt, *output.token_ids]]), use_cache=False).logits[0]
        assert output.token_ids == logits[len(prompt) - 1 : -1].argmax(-1).tolist(), f"{family}, along {path}"


@pytest.mark.parametrize(("family", "changes"), NAMED)
def test_weights_come_back_from_a_round_trip(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    hf_model = family_hf(family, **changes)
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
