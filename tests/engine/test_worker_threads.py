"""Steps leave PyTorch's own threads asleep: those spin for milliseconds behind a loop, on cores that a step wants."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dynskip.ops import native

SCRIPT = textwrap.dedent(
    """
    import os, time
    import torch
    torch.set_num_threads(2)
    before = {*os.listdir("/proc/self/task")}
    torch.zeros(100_000).add_(1)
    (worker,) = {*os.listdir("/proc/self/task")} - before

    def num_wakes():
        time.sleep(0.05)  # it spins no longer than that
        return int(open(f"/proc/self/task/{worker}/schedstat").read().split()[2])

    from dynskip import LLM, CausalLM, Engine, LayerPath, SamplingParams
    from transformers import OPTConfig, OPTForCausalLM

    model = LLM("opt-mini", dtype="bfloat16").model
    for policy in ("cohort", "lockstep"):
        engine = Engine(model, policy=policy, batch=6)
        for index in range(24):
            prompt = [2, *range(20 + index, 30 + 3 * index)]
            params = SamplingParams(max_tokens=2 + index % 9, ignore_eos=True, temperature=index % 2, seed=index)
            path = LayerPath.uniform(24, (4, 8, 12, 24)[index % 4])
            engine.add_request(prompt, params, path, draft=LayerPath.uniform(24, 2) if index % 8 == 3 else None)
        engine.step()
        asleep = num_wakes()
        while engine.has_unfinished:
            engine.step()
        print(policy, num_wakes() - asleep)
    # Entries beyond 32,768, from which on most loops are parallel, by single tokens: long prompts may run op by op.
    config = OPTConfig(num_hidden_layers=24, hidden_size=32, ffn_dim=32, num_attention_heads=1, vocab_size=128)
    model = CausalLM.from_hf(OPTForCausalLM(config).bfloat16())
    engine = Engine(model, policy="lockstep", batch=4)
    for n in (1, 2):
        engine.add_request([2, 9, 8], SamplingParams(max_tokens=1500, ignore_eos=True, temperature=1.0, seed=n, n=n))
    engine.step()
    asleep = num_wakes()
    while engine.has_unfinished:
        engine.step()
    print("long", num_wakes() - asleep)
    asleep = num_wakes()
    torch.ones(2).repeat_interleave(torch.tensor([2, 2]))
    print("control", num_wakes() - asleep)
    """
)


@pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="this system does not count how often threads run"
)
def test_no_step_wakes_the_threads_of_pytorch() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True, timeout=120
    )
    wakes = {name: int(count) for name, count in map(str.split, done.stdout.splitlines())}
    assert wakes["control"] > 0, "it would be seen"
    assert wakes["cohort"] == wakes["lockstep"] == wakes["long"] == 0
