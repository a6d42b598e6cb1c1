"""Every architecture against transformers: logits, greedy tokens and round trips, at full depth and along paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import ALL_VARIANTS, FAMILIES, NUM_DRAWS, cut_family, draws, family_hf
from models import NUM_LAYERS, cpu_backend, ragged_batch, random_prompts, stored_state, within_budget
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynskip import LLM, CausalLM, LayerPath, SamplingParams

LENGTHS = [7, 1, 12, 4]
PATHS = [
    LayerPath.of(NUM_LAYERS, [1, 2, 5]),
    LayerPath.full(NUM_LAYERS),
    LayerPath.of(NUM_LAYERS, [0]),
    LayerPath.of(NUM_LAYERS, [0, 3, 4, 5]),
]
CASES = [pytest.param(family, FAMILIES[family][name], id=f"{family}-{name}") for family, name in ALL_VARIANTS]
CASES += [
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
        logits[seq, keep] = cut_family(hf_model, path)(input_ids[seq, keep][None], use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_logits_along_paths_are_those_of_transformers(family: str, changes: dict[str, Any]) -> None:
    hf_model = family_hf(family, **changes)
    input_ids, attention_mask = ragged_batch(LENGTHS, "left")
    expected = hf_logits(hf_model, input_ids, attention_mask)
    exact = hf_logits(family_hf(family, dtype=torch.float64, **changes), input_ids, attention_mask)
    model = CausalLM.from_hf(hf_model, backend="torch")
    for executor in ("reference",):
        logits = model(input_ids, attention_mask, PATHS, executor=executor).logits
        within_budget(logits, expected, exact)
