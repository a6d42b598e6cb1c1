"""No layer, row or entry that no path needs: rows counted in the executor and, apart from it, at the backend."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from models import NUM_LAYERS, VOCAB_SIZE, random_prompts, tiny_model
from torch import Tensor

from dynskip import LLM, LayerPath, OPTForCausalLM, SamplingParams
from dynskip.engine.closed_batch import Generation
from dynskip.engine.kv_pool import KVPool

NUM_SEQS = 32
MAX_TOKENS = [1 + seq % 4 for seq in range(NUM_SEQS)]


def random_batch() -> tuple[list[list[int]], list[LayerPath], list[SamplingParams]]:
    """32 ragged prompts, 32 random paths of every budget, and outputs that end one after another."""
    prompts = random_prompts([1 + seq * 7 % 11 for seq in range(NUM_SEQS)])
    paths = [LayerPath.random(NUM_LAYERS, budget=1 + seq % NUM_LAYERS, seed=seq) for seq in range(NUM_SEQS)]
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in MAX_TOKENS]
    return prompts, paths, params


def watch_backend(model: OPTForCausalLM) -> Counter[str]:
    """Counts the rows that each launcher of the model's backend is handed from now on."""
    rows: Counter[str] = Counter()
    backend = model.backend

    def watched(name: str) -> Any:
        launcher = getattr(backend, name)

        def count(*args: Any) -> Any:
            if name in ("gather_layer_norm", "scatter_add"):
                rows[name] += args[0].shape[0] if args[1] is None else args[1].shape[0]
            else:
                rows[name] += args[0].shape[0]
            return launcher(*args)

        return count

    names = [field.name for field in dataclasses.fields(backend) if field.name != "name"]
    model._backend = dataclasses.replace(backend, **{name: watched(name) for name in names})
    return rows


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that have ended keep their entries."""
    monkeypatch.setattr(KVPool, "leave", lambda self, sequence: None)


@pytest.mark.parametrize("executor", ["compact", "reference"])
def test_rows_per_layer_are_those_of_the_paths(executor: str) -> None:
    model = tiny_model()
    handed = watch_backend(model)
    prompts, paths, params = random_batch()
    assert {layer for path in paths for layer in path.layers} == set(range(NUM_LAYERS))
    generation = Generation(model, prompts, params, paths, executor=executor)
    counts = model.executor(executor).row_counts

    counts.reset()
    generation.prefill()
    expected = [
        sum(len(p) for p, path in zip(prompts, paths, strict=True) if layer in path.layers) for layer in range(6)
    ]
    assert counts.run == expected and counts.kv == expected
    if executor == "compact":
        total = sum(expected)
        assert handed["prefill_attention"] == handed["kv_store"] == total
        assert handed["gather_layer_norm"] == handed["scatter_add"] == 2 * total
        assert handed["decode_attention"] == 0

    while generation.running:
        running = list(generation.running)
        counts.reset()
        handed.clear()
        generation.step()
        expected = [sum(layer in paths[seq].layers for seq in running) for layer in range(NUM_LAYERS)]
        assert counts.run == expected and counts.kv == expected
        if executor == "compact":
            total = sum(expected)
            assert handed["decode_attention"] == handed["kv_store"] == total
            assert handed["gather_layer_norm"] == handed["scatter_add"] == 2 * total
            assert handed["prefill_attention"] == 0
    assert generation.num_steps == max(MAX_TOKENS)


@pytest.mark.usefixtures("kept")
def test_entries_stored_are_budget_times_tokens() -> None:
    model = tiny_model()
    prompts, paths, params = random_batch()
    generation = Generation(model, prompts, params, paths)
    generation.run()
    # The last token of an output is never run.
    tokens = [len(prompt) + count - 1 for prompt, count in zip(prompts, MAX_TOKENS, strict=True)]
    expected = sum(path.budget * count for path, count in zip(paths, tokens, strict=True))
    cache = generation.cache
    assert cache.num_slots_used == cache.num_slots == expected
    lengths = [
        [count if layer in path.layers else 0 for path, count in zip(paths, tokens, strict=True)]
        for layer in range(NUM_LAYERS)
    ]
    assert cache.context_lens.tolist() == lengths
    used = cache.slot_tables[cache.slot_tables >= 0]
    assert sorted(used.tolist()) == list(range(expected))  # each entry belongs to one token in one layer


@pytest.mark.usefixtures("kept")
def test_the_reference_stores_as_many_entries() -> None:
    model = tiny_model()
    prompts, paths, params = random_batch()
    caches = []
    for executor in ("compact", "reference"):
        generation = Generation(model, prompts, params, paths, executor=executor)
        generation.run()
        caches.append(generation.cache)
    compact, reference = caches
    lengths = torch.zeros_like(compact.context_lens)
    for (layer, seq), (key, value, _) in reference.entries.items():
        assert key.shape == value.shape
        lengths[layer, seq] = key.shape[0]
    assert torch.equal(lengths, compact.context_lens)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("policy", ["propagate", "evict", "share"])
@pytest.mark.parametrize("prompt_depth", ["path", "full"])
def test_rows_and_entries_of_per_token_masks(policy: str, prompt_depth: str) -> None:
    model = tiny_model()
    prompts = random_prompts([5, 1, 7])
    max_tokens = 4
    active = torch.rand(3, 11, NUM_LAYERS, generator=torch.Generator().manual_seed(1)) < 0.5
    params = [SamplingParams(max_tokens=max_tokens, ignore_eos=True)] * 3
    generation = Generation(model, prompts, params, active, policy, prompt_depth)
    model.executor().row_counts.reset()
    generation.run()
    run, kv = [0] * NUM_LAYERS, [0] * NUM_LAYERS
    for mask, prompt in zip(active.clone(), prompts, strict=True):
        num_tokens = len(prompt) + max_tokens - 1
        if prompt_depth == "full":
            mask[: len(prompt)] = True
        for row in mask[:num_tokens].tolist():
            for layer in range(NUM_LAYERS):
                run[layer] += row[layer]
                computes = row[layer] or policy == "propagate" or (policy == "share" and not any(row[:layer]))
                kv[layer] += computes
    counts = model.executor().row_counts
    assert counts.run == run and counts.kv == kv
    assert generation.cache.num_slots_used == sum(kv)
    assert generation.cache.num_slots >= sum(kv)


@pytest.mark.usefixtures("kept")
def test_copies_of_a_prompt_share_its_rows_and_entries() -> None:
    model = tiny_model()
    prompts = random_prompts([6, 3])
    paths = [LayerPath.of(NUM_LAYERS, [0, 2]), LayerPath.of(NUM_LAYERS, [1])]
    params = [SamplingParams(max_tokens=3, n=n, temperature=1.0, seed=0, ignore_eos=True) for n in (3, 2)]
    generation = Generation(model, prompts, params, paths)
    counts = model.executor().row_counts
    counts.reset()
    generation.prefill()
    assert counts.run == [6, 3, 6, 0, 0, 0]
    counts.reset()
    generation.step()
    assert counts.run == [3, 2, 3, 0, 0, 0]
    generation.step()
    assert generation.cache.num_slots_used == generation.cache.num_slots == 2 * (6 + 3 * 2) + (3 + 2 * 2)


def test_the_model_counts_its_rows_too() -> None:
    model = tiny_model()
    input_ids = torch.tensor([random_prompts([6])[0], random_prompts([6], seed=1)[0]])
    attention_mask = torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1]])
    model.executor().row_counts.reset()
    model(input_ids, attention_mask, paths=[LayerPath.of(NUM_LAYERS, [0, 5]), LayerPath.of(NUM_LAYERS, [5])])
    assert model.executor().row_counts.run == [6, 0, 0, 0, 0, 9]


def poison(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """From now on uninitialised memory is full of NaN (integers: of a value that no index may have)."""
    poisoned: Counter[str] = Counter()

    def spoil(name: str, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu" and tensor.numel():
            poisoned[name] += 1
            tensor.fill_(torch.nan if tensor.is_floating_point() else -(2**31) if tensor.dtype == torch.int32 else 0)
        return tensor

    for name in ("empty", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _f=original, _n=name, **k: spoil(_n, _f(*a, **k)))
    original_new_empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *a, **k: spoil("new_empty", original_new_empty(self, *a, **k))
    )
    return poisoned


@pytest.mark.parametrize("policy", [None, "propagate", "evict", "share"])
def test_nothing_is_read_before_it_is_written(policy: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(tiny_model(deterministic=True))
    prompts = random_prompts([5, 1, 7])
    params = SamplingParams(max_tokens=4, logprobs=VOCAB_SIZE)
    active = torch.rand(3, 11, NUM_LAYERS, generator=torch.Generator().manual_seed(1)) < 0.5
    paths = [LayerPath.of(NUM_LAYERS, layers) for layers in ([1, 2], [0], [2, 5])] if policy is None else active
    clean = llm.generate(prompts, params, paths, kv_policy=policy)
    poisoned = poison(monkeypatch)
    spoiled = llm.generate(prompts, params, paths, kv_policy=policy)
    assert poisoned["empty"] >= 2, "the pool of keys and values must have been poisoned"
    for one, other in zip(clean, spoiled, strict=True):
        assert one.token_ids == other.token_ids and one.logprobs == other.logprobs
