"""The engine with every architecture: whatever the company, the memory and the prefixes, each request as it is alone."""

from __future__ import annotations

import functools

import pytest
import torch
from families import FAMILIES, family_hf
from models import cpu_backend, random_prompts
from streams import PATHS, Ask, Parity, drawn, engine, greedy, same, serve

from dynskip import CausalLM

BACKENDS = ["torch", "native"]
# One variant of each architecture but OPT, in which keys are shared, windowed, placed or scaled in its own way.
VARIANTS = [
    ("llama", "one-kv-head"),
    ("mistral", "window"),
    ("qwen2", "layer-types"),
    ("qwen3", "window"),
    ("gpt_neox", "plain"),
    ("gpt_neox", "sequential"),
    ("bloom", "three-heads"),
    ("gpt2", "by-depth"),
]
# Fewer entries than the requests below want at a time.
FEW_SLOTS = 220


@functools.cache
def model(
    family: str, variant: str, backend: str, dtype: torch.dtype = torch.float32, deterministic: bool = True
) -> CausalLM:
    hf_model = family_hf(family, dtype=dtype, **FAMILIES[family][variant])
    return CausalLM.from_hf(hf_model, backend=cpu_backend(backend), deterministic=deterministic)


def asks() -> list[Ask]:
    """Requests of one prefix and of others, along paths and by a controller of each key-value policy."""
    (common,) = random_prompts([18])
    prompts = [common + tail for tail in ([5], [6, 7], [8, 9, 10])] + random_prompts([5, 9, 3, 12, 2, 7], seed=1)
    ways = [(PATHS[2], {}), (PATHS[2], {}), (PATHS[2], {}), (PATHS[1], {}), (PATHS[3], {}), (PATHS[0], {})]
    ways += [(Parity(), {"kv_policy": kv_policy}) for kv_policy in ("propagate", "evict", "share")]
    return [
        Ask(prompt, drawn(9, index, n=2) if index % 3 == 1 else greedy(9), path, options)
        for index, (prompt, (path, options)) in enumerate(zip(prompts, ways, strict=True))
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_each_request_has_the_bits_it_has_alone(family: str, variant: str, backend: str, dtype: torch.dtype) -> None:
    """Beside others, after a preemption, with the entries of another's prefix."""
    served = engine("cohort", FEW_SLOTS, model=model(family, variant, backend, dtype), batch=8, max_prefill_tokens=16)
    outputs = serve(served, asks())
    stats = served.stats()
    assert stats.outcome.num_preempted and stats.num_shared_tokens
    for ask, output in zip(asks(), outputs, strict=True):
        assert same(output, ask.alone(model=model(family, variant, backend, dtype), max_prefill_tokens=16))


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_shared_prefixes_and_preemption_change_no_token(family: str, variant: str) -> None:
    """Without deterministic mode, in which a prefix is shared to its last token, and in float64, so that none is tied."""
    wide = model(family, variant, "torch", torch.float64, deterministic=False)
    tight = engine("lockstep", FEW_SLOTS, model=wide, batch=8, max_prefill_tokens=16)
    outputs = serve(tight, asks())
    stats = tight.stats()
    assert stats.outcome.num_preempted and stats.num_shared_tokens
    for ask, output in zip(asks(), outputs, strict=True):
        alone = ask.alone(model=wide, batch=1)
        assert [sample.token_ids for sample in output.samples] == [sample.token_ids for sample in alone.samples]
