"""The rows that a device finds for all layers at once are those that the host finds layer by layer."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from models import NUM_LAYERS, ragged_batch, tiny_model

from dynskip import LayerPath
from dynskip.engine.closed_batch import Generation
from dynskip.execution.kv_cache import EntryIndex
from dynskip.routing import plan
from dynskip.routing.flat_rows import FlatRows
from dynskip.routing.plan import KVPolicy, LayerPlan, Plan
from dynskip.sampling import SamplingParams

CPU = torch.device("cpu")


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


def same_plans(one: LayerPlan, other: LayerPlan) -> None:
    assert one.run.num_rows == other.run.num_rows
    assert one.kv is one.run and one.entries is one.run and other.kv is other.run
    for name in ("row_ids", "seq_ids", "ranks", "cu_seqlens"):
        assert same(getattr(one.run, name), getattr(other.run, name)), name
    assert same(one.key_ranks, other.key_ranks)


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    st.integers(0, 10**6),
)
def test_they_are_those_of_the_plan(counts: list[int], num_layers: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(sum(counts), num_layers, generator=generator) < share
    step = Plan.per_token(active, counts, KVPolicy.EVICT)
    assert step.active is not None
    flat = FlatRows.of(step.active, step.rows.seq_ids, step.rows.cu_seqlens, CPU)
    expected = step.all_layers(CPU)
    for layer in range(num_layers):
        same_plans(LayerPlan.of_flat(flat, layer, sum(counts)), expected[layer])
    cache_ids = torch.randperm(len(counts) + 2, generator=generator)[: len(counts)]
    index = EntryIndex.of_flat(flat, cache_ids, len(counts) + 2)
    for name, value in vars(EntryIndex.of(expected, 0, cache_ids, len(counts) + 2)).items():
        found = getattr(index, name)
        assert same(found, value) if isinstance(value, torch.Tensor) else found == value, name


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many entries were found flat, each time: on a CPU, which otherwise does not."""
    found: list[int] = []
    of = FlatRows.of

    def record(*arguments: Any) -> FlatRows:
        flat = of(*arguments)
        found.append(flat.indptr[-1])
        return flat

    monkeypatch.setattr(FlatRows, "of", staticmethod(record))
    return found


@pytest.mark.parametrize(("kv_policy", "used"), [("evict", True), ("propagate", False), ("share", False)])
def test_logits_are_the_same_bit_for_bit(
    kv_policy: str, used: bool, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    batch = ragged_batch([7, 1, 12], "right")
    mask = torch.rand(3, 12, NUM_LAYERS, generator=torch.Generator().manual_seed(3)) < 0.5
    logits = model(*batch, mask, kv_policy=kv_policy).logits
    assert bool(asked) == used
    monkeypatch.setattr(plan.Plan, "flat", lambda self, device: None)
    assert torch.equal(logits, model(*batch, mask, kv_policy=kv_policy).logits)


def test_texts_are_the_same_and_the_rows_of_a_step_are_found_once(
    asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    paths = [LayerPath.full(NUM_LAYERS), LayerPath.random(NUM_LAYERS, 3, 0), LayerPath.of(NUM_LAYERS, [], True)]
    prompts = [[5, 6, 7, 8], [9], [10, 11]]
    params = [SamplingParams(max_tokens=5, ignore_eos=True)] * 3

    def texts() -> list[list[int]]:
        return [sequence.token_ids for sequence in Generation(model, prompts, params, paths).run()]

    ours = texts()
    assert asked == [NUM_LAYERS * 4 + 3 * 1, NUM_LAYERS + 3], "the prompts, and the decode steps, which are all alike"
    monkeypatch.setattr(plan.Plan, "flat", lambda self, device: None)
    assert texts() == ours


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    step = Plan.per_token(torch.rand(300, 6) < 0.5, [100, 200], KVPolicy.EVICT)
    assert step.active is not None
    arguments = (step.active.pin_memory(), step.rows.seq_ids.pin_memory(), step.rows.cu_seqlens.pin_memory())
    cuda = torch.device("cuda", 0)
    FlatRows.of(*arguments, cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flat = FlatRows.of(*arguments, cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = step.all_layers(CPU)
    for layer in range(6):
        same_plans(LayerPlan.of_flat(flat, layer, 300), expected[layer].to(cuda))
