"""The memory of keys and values serves one closed batch after the other."""

from __future__ import annotations

import gc

import torch
from models import tiny_model

from dynskip import Engine, SamplingParams
from dynskip.engine.closed_batch import Generation
from dynskip.execution.compact import CompactExecutor

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


def test_memory_serves_the_next_batch_and_what_is_in_use_does_not() -> None:
    model = tiny_model()
    prompts = [[3, 4, 5], [6, 7]]
    first = Generation(model, prompts, [PARAMS] * 2)
    wanted = [sequence.token_ids for sequence in first.run()]
    second = Generation(model, prompts, [PARAMS] * 2)
    assert second.cache is first.cache
    second.prefill()
    del first  # it has given its memory away already
    gc.collect()
    third = Generation(model, prompts, [PARAMS] * 2)
    assert third.cache is not second.cache
    for generation in (third, second):
        assert [sequence.token_ids for sequence in generation.run()] == wanted


def test_a_batch_that_is_let_go_of_half_way_leaves_its_memory() -> None:
    model = tiny_model()
    generation = Generation(model, [[3, 4, 5]], [PARAMS])
    generation.prefill()
    cache = generation.cache
    del generation
    gc.collect()
    again = Generation(model, [[3, 4, 5]], [PARAMS])
    assert again.cache is cache and again.cache.num_slots_used == 0
    alone = Generation(tiny_model(), [[3, 4, 5]], [PARAMS])
    assert [s.token_ids for s in again.run()] == [s.token_ids for s in alone.run()]


def test_a_batch_that_needs_more_has_memory_of_its_own_and_an_engine_takes_it_back() -> None:
    model = tiny_model()
    executor = model.executor("compact")
    assert isinstance(executor, CompactExecutor)
    Generation(model, [[3]], [PARAMS]).run()
    (small,) = executor._retired
    large = Generation(model, [[3] * 9] * 3, [PARAMS] * 3)
    assert large.cache is not small and not executor._retired
    large.run()
    assert executor._retired == [large.cache]
    with Engine(model, policy="lockstep") as engine:
        assert not executor._retired
        assert engine.kv.cache is not large.cache


def test_what_is_left_in_memory_harms_nobody() -> None:
    model = tiny_model()
    first = Generation(model, [[3, 4, 5]] * 2, [PARAMS] * 2)
    wanted = first.run()[0].token_ids
    with torch.no_grad():
        first.cache.k_cache.fill_(torch.nan)
        first.cache.v_cache.fill_(torch.nan)
    second = Generation(model, [[3, 4, 5]] * 2, [PARAMS] * 2)
    assert second.cache is first.cache
    assert second.run()[0].token_ids == wanted
