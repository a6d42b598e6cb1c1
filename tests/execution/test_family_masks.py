"""Per-token masks of every architecture against transformers' layers, called one by one with masks of their own."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from families import FAMILIES, convert_, family_hf, per_token_logits
from models import NUM_LAYERS, cpu_backend, ragged_batch, random_prompts, within_budget
from torch import Tensor

from dynskip import CausalLM, SamplingParams
from dynskip.engine.closed_batch import Generation

LENGTHS = [9, 1, 12, 4]
KV_POLICIES = ("propagate", "evict", "share")
# Those whose keys know where they stand, whose scores or residuals differ, and whose heads share keys.
VARIANTS = [
    *(("llama", name) for name in ("one-kv-head", "wide-heads", "tied")),
    *(("mistral", name) for name in ("plain", "window", "window-of-one")),
    *(("qwen2", name) for name in ("plain", "window", "layer-types")),
    *(("qwen3", name) for name in ("plain", "window", "one-kv-head")),
    *(("gpt_neox", name) for name in ("plain", "sequential", "whole-heads")),
    *(("bloom", name) for name in ("plain", "three-heads")),
    *(("phi", name) for name in ("plain", "two-kv-heads")),
    *(("gpt2", name) for name in ("plain", "by-depth", "unscaled")),
]


@functools.cache
def hf_model(family: str, variant: str, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model; tests leave it as it is."""
    return convert_(family_hf(family, **FAMILIES[family][variant]), dtype)


@functools.cache
def our_model(family: str, variant: str, backend: str) -> CausalLM:
    """Ours with the same weights."""
    return CausalLM.from_hf(hf_model(family, variant), backend=cpu_backend(backend))


def masks(num_tokens: int) -> Tensor:
    """[B, T, L], bool: about half of the layers; the first and the last token of one sequence run none."""
    generator = torch.Generator().manual_seed(5)
    active = torch.rand(len(LENGTHS), num_tokens, NUM_LAYERS, generator=generator) < 0.5
    active[0, 0] = active[0, LENGTHS[0] - 1] = False
    return active


def reference_logits(model: Any, input_ids: Tensor, attention_mask: Tensor, active: Tensor, kv_policy: str) -> Tensor:
    """[B, T, V], zero at padding."""
    logits = torch.zeros(*input_ids.shape, model.config.vocab_size, dtype=model.dtype)
    for seq, keep in enumerate(attention_mask.bool()):
        logits[seq, keep] = per_token_logits(model, input_ids[seq, keep].tolist(), active[seq, keep], kv_policy)
    return logits


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_logits_along_masks_are_those_of_transformers(family: str, variant: str, kv_policy: str) -> None:
    input_ids, attention_mask = ragged_batch(LENGTHS, "left")
    active = masks(input_ids.shape[1])
    inputs = input_ids, attention_mask, active
    expected, exact = (
        reference_logits(hf_model(family, variant, dtype), *inputs, kv_policy)
        for dtype in (torch.float32, torch.float64)
    )
    models = [our_model(family, variant, backend) for backend in ("torch", "native")]
    for model in models:
        within_budget(model(*inputs, kv_policy=kv_policy).logits, expected, exact)
    within_budget(models[0](*inputs, kv_policy=kv_policy, executor="reference").logits, expected, exact)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_greedy_tokens_along_masks_are_those_of_transformers(family: str, variant: str, kv_policy: str) -> None:
    """Through the cache, which holds entries of some of the tokens: each is the most likely after those before it."""
    prompts, num_new = random_prompts(LENGTHS), 6
    active = masks(max(LENGTHS) + num_new)
    model = our_model(family, variant, "native")
    params = [SamplingParams(max_tokens=num_new, ignore_eos=True)] * len(prompts)
    outputs = Generation(model, prompts, params, active, kv_policy).run()
    for prompt, rows, output in zip(prompts, active, outputs, strict=True):
        token_ids = [*prompt, *output.token_ids[:-1]]
        logits = per_token_logits(hf_model(family, variant), token_ids, rows[: len(token_ids)], kv_policy)
        assert output.token_ids == logits[len(prompt) - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize(("family", "variant"), [("qwen3", "window"), ("bloom", "three-heads"), ("gpt2", "plain")])
def test_the_policies_differ(family: str, variant: str) -> None:
    """Or the tests above would compare one policy with itself."""
    (token_ids,) = random_prompts([12])
    logits = [per_token_logits(hf_model(family, variant), token_ids, masks(12)[0], policy) for policy in KV_POLICIES]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(logits[one], logits[other], atol=1e-2)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_layers_called_one_by_one_are_the_model(family: str, variant: str, kv_policy: str) -> None:
    """What the tests above compare with, for tokens that run every layer: transformers' own forward."""
    (token_ids,) = random_prompts([12])
    model = hf_model(family, variant)
    with torch.no_grad():
        expected = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    everything = torch.ones(len(token_ids), NUM_LAYERS, dtype=torch.bool)
    torch.testing.assert_close(per_token_logits(model, token_ids, everything, kv_policy), expected)
