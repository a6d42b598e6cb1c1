"""The engine: every request becomes what it becomes alone, whatever the company, the policy and the memory."""

from __future__ import annotations

import pytest
from models import random_prompts
from streams import PATHS, Ask, drawn, engine, greedy, same, serve

from dynskip.engine.policy import POLICIES


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_that_runs_out_changes_no_bit(policy: str) -> None:
    asks = [
        Ask(prompt, (drawn(15, index, n=1 + index % 3) if index % 2 else greedy(15)), PATHS[2 + index % 2])
        for index, prompt in enumerate(random_prompts([5, 9, 3, 7, 12, 6]))
    ]
    served = engine(policy, num_slots=160, batch=9)
    outputs = serve(served, asks)
    assert served.stats().outcome.num_preempted >= 2
    assert sum(output.num_preemptions for output in outputs) == served.stats().outcome.num_preempted
    assert served.kv.peak_used > 130
    for ask, output in zip(asks, outputs, strict=True):
        assert same(output, ask.alone())
