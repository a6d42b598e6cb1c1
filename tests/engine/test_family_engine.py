"""The engine with every architecture: each request as it is alone, whatever the company, memory and prefixes."""

from __future__ import annotations

import pytest
import torch
from cases import Case, all_cases, deepest
from families import FAMILIES
from models import cpu_backend, random_prompts
from streams import Ask, Parity, drawn, engine, greedy, same, serve

from dynskip import CausalLM, LayerPath

# In every way those in which keys are shared, windowed, placed or scaled in their own way; every other in one.
IN_EVERY_WAY = {
    "opt": (),
    "llama": ("one-kv-head",),
    "mistral": ("window",),
    "qwen2": ("layer-types",),
    "qwen3": ("window",),
    "gpt_neox": ("plain", "sequential"),
    "bloom": ("three-heads",),
    "phi": ("two-kv-heads",),
    "gpt2": ("by-depth",),
}
CASES = [case for family in FAMILIES for case in all_cases(family)]
WAYS = [("torch", "float32"), ("native", "float32"), ("native", "bfloat16")]
CASES_AND_WAYS = [
    (case, *way)
    for index, case in enumerate(CASES)
    for way in (
        WAYS
        if case.name in IN_EVERY_WAY.get(case.family, ()) or case.name == deepest(case.family).name
        else WAYS[index % len(WAYS) :][:1]
    )
]
# Of each layer: fewer entries than the requests below want at a time.
FEW_SLOTS = 28


def model(config: Case, backend: str, dtype: torch.dtype = torch.float32, deterministic: bool = True) -> CausalLM:
    return CausalLM.from_hf(config.hf(dtype), backend=cpu_backend(backend), deterministic=deterministic)


def asks(num_layers: int) -> list[Ask]:
    """Requests of one prefix and of others, along paths and by a controller of each key-value policy."""
    (common,) = random_prompts([18])
    prompts = [common + tail for tail in ([5], [6, 7])] + random_prompts([3, 9, 2, 7, 4], seed=1)
    half, two = LayerPath.uniform(num_layers, num_layers // 2), LayerPath.of(num_layers, sorted({1, num_layers - 2}))
    ways = [(half, {}), (half, {}), (two, {}), (LayerPath.full(num_layers), {})]
    ways += [(Parity(), {"kv_policy": kv_policy}) for kv_policy in ("propagate", "evict", "share")]
    return [
        Ask(prompt, drawn(6, index, n=2) if index == 2 else greedy(6), path, options)
        for index, (prompt, (path, options)) in enumerate(zip(prompts, ways, strict=True))
    ]


@pytest.mark.parametrize(("config", "backend", "dtype"), CASES_AND_WAYS, ids=str)
def test_each_request_has_the_bits_it_has_alone(config: Case, backend: str, dtype: str) -> None:
    """Beside others, after a preemption, with the entries of another's prefix."""
    ours = model(config, backend, getattr(torch, dtype))
    served = engine("cohort", FEW_SLOTS * config.num_layers, model=ours, batch=8, max_prefill_tokens=16)
    outputs = serve(served, asks(config.num_layers))
    stats = served.stats()
    assert stats.outcome.num_preempted and stats.num_shared_tokens >= 16
    for ask, output in zip(asks(config.num_layers), outputs, strict=True):
        assert same(output, ask.alone(model=ours, max_prefill_tokens=16))


@pytest.mark.parametrize("config", [config for config, way, _ in CASES_AND_WAYS if way == "torch"], ids=str)
def test_shared_prefixes_and_preemption_change_no_token(config: Case) -> None:
    """Without deterministic mode, in which a prefix is shared to its last token."""
    wide = model(config, "torch", torch.float64, deterministic=False)
    tight = engine("cohort", FEW_SLOTS * config.num_layers, model=wide, batch=8, max_prefill_tokens=16)
    outputs = serve(tight, asks(config.num_layers))
    stats = tight.stats()
    assert stats.outcome.num_preempted and stats.num_shared_tokens >= 16
    for ask, output in zip(asks(config.num_layers), outputs, strict=True):
        alone = ask.alone(model=wide, batch=1)
        assert [sample.token_ids for sample in output.samples] == [sample.token_ids for sample in alone.samples]
