"""Generates, forks, and generates again in the child; prints what each child has seen. Its argument: CPU threads."""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from models import NUM_LAYERS, tiny_model, word_tokenizer

from dynskip import LLM, AsyncLLM, Engine, SamplingParams
from dynskip.costs.step_costs import StepCosts
from dynskip.execution.threads import ForkWarning
from dynskip.ops.native import unavailable_reason

COSTS = replace(StepCosts.h200(), num_layers=NUM_LAYERS)
PROMPTS = [list(range(3, 40)), [9, 10], [11] * 20]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


def work(model: object) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The tokens that `LLM.generate` and an engine make of the prompts."""
    engine = Engine(model, costs=COSTS, batch=4)
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(prompt, PARAMS, request_id=index)
    served = sorted(engine.run(), key=lambda output: output.request_id)
    generated = LLM(model, word_tokenizer()).generate(PROMPTS, PARAMS)
    return [tuple(o.token_ids) for o in generated], [tuple(o.token_ids) for o in served]


def in_child(function: Callable[[], object]) -> None:
    """Print in a forked process what ``function`` returns, or the traceback of its exception."""
    sys.stdout.flush()
    process_id = os.fork()
    if process_id == 0:
        try:
            print(function(), flush=True)
        except BaseException:
            print(traceback.format_exc(), flush=True)
        finally:
            os._exit(0)
    os.waitpid(process_id, 0)


def compare(models: dict[str, object], known: dict[str, object]) -> str:
    """Whether the child's tokens are the parent's, how many threads it uses, and how often it was told."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = {name: work(model) for name, model in models.items()}
    told = [warning for warning in caught if issubclass(warning.category, ForkWarning)]
    torch.ones(4_000_000).add_(1)  # large enough for all threads
    different = [name for name in models if found[name] != known[name]]
    return f"{len(models)} models, different: {different}, threads: {torch.get_num_threads()}, told: {len(told)}"


def ask_for_threads(model: object) -> object:
    """What a child gets that asks for more threads."""
    torch.set_num_threads(2)
    return work(model)


async def ask(served: AsyncLLM) -> object:
    """What a child gets of an AsyncLLM that its parent has made."""
    return await served.generate(PROMPTS[0], PARAMS)


def main(num_threads: int) -> None:
    """Work, fork, work."""
    torch.set_num_threads(num_threads)
    backends = ["torch", *([] if unavailable_reason() else ["native"])]
    models = {
        f"{backend} {dtype}": tiny_model(seed=1, dtype=dtype, backend=backend, deterministic=True)
        for backend in backends
        for dtype in (torch.float32, torch.bfloat16)
    }
    torch.ones(4_000_000).add_(1)
    known = {name: work(model) for name, model in models.items()}
    in_child(lambda: compare(models, known))
    in_child(lambda: ask_for_threads(models["torch torch.float32"]))
    served = AsyncLLM(LLM(models["torch torch.float32"], word_tokenizer()), costs=COSTS, batch=4)
    in_child(lambda: asyncio.run(ask(served)))
    in_child(lambda: f"closed: {asyncio.run(served.close())}")
    asyncio.run(served.close())


if __name__ == "__main__":
    main(int(sys.argv[1]))
