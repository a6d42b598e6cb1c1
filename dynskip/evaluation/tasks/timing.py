"""Milliseconds per generated token along paths, measured in turns: items of the task "time"."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynskip.engine.closed_batch import Generation
from dynskip.evaluation.stats.intervals import Interval, bootstrap, medians
from dynskip.evaluation.stats.knapsack import Integers
from dynskip.evaluation.stats.oracle_controls import dealt
from dynskip.evaluation.sweep.context import Context
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, Option, WorkItem
from dynskip.evaluation.tasks.path_families import Member
from dynskip.host import cpu_model
from dynskip.llm import LLM
from dynskip.measure.timing import Task, interleave
from dynskip.paths import LayerPath
from dynskip.routing.routes import Paths
from dynskip.sampling import SamplingParams

_NUM_STEPS = 8
_NUM_WARM_STEPS = 2


@dataclass(frozen=True, slots=True)
class Part:
    """``count`` sequences of a batch that run ``path`` with the weights of ``checkpoint``."""

    checkpoint: str
    path: str
    count: int


def batches_alone(members: Sequence[Member], batch: int) -> dict[str, list[Part]]:
    """By budget a batch of each member's path alone."""
    return {str(member.budget): [Part(member.checkpoint.hash, member.path, batch)] for member in members}


def mixed_batch(members: Sequence[Member], choices: Integers, batch: int) -> list[Part]:
    """A batch whose paths are as frequent as in ``choices``, columns of ``members``, to the nearest sequence."""
    counts = dealt(choices, len(members), batch)
    parts = (Part(member.checkpoint.hash, member.path, num) for member, num in zip(members, counts, strict=True))
    return [part for part in parts if part.count]


def time_item(setup: Setup, batches: Mapping[str, Sequence[Part]]) -> WorkItem:
    """The item that times decode steps of the batches, by label, in turns."""
    text = json.dumps({label: [[p.checkpoint, p.path, p.count] for p in parts] for label, parts in batches.items()})
    return machine_item(setup, "time", text, dtype=setup.dtype, rounds=setup.timed_rounds)


def machine_item(setup: Setup, task: str, path: str, **options: Option) -> WorkItem:
    """The one item of a task that measures the machine of ``setup``; on another machine it is another item."""
    measured = setup.timed_on or machine_name(setup.device)
    options |= {"device": setup.device, "machine": measured, "template": setup.template}
    named = tuple(sorted(options.items()))
    return WorkItem(task, setup.checkpoint.hash, path, setup.data_hash, setup.split, 0, 0, named)


def machine_name(device: str) -> str:
    """What does the work, as text."""
    if device == "cpu":
        return re.sub(r"\s+", " ", cpu_model())
    import torch

    return str(torch.cuda.get_device_name(device))


def run_time(item: WorkItem, context: Context) -> dict[str, Any]:
    """By label, round by round, the milliseconds per generated token of a decode step: its time over its sequences.

    Parts with different weights run one after another, as a server that holds them all would run them.
    """
    rows = context.prompts(context.setup.checkpoint.hash, item.split).rows

    def task(parts: Sequence[Part]) -> Any:
        llms = [context.llm(checkpoint) for checkpoint in dict.fromkeys(part.checkpoint for part in parts)]
        batches = [(llm, [part for part in parts if context.llm(part.checkpoint) is llm]) for llm in llms]

        def run() -> float:
            first, total_ms = 0, 0.0
            for llm, own in batches:
                paths = [
                    LayerPath.parse(part.path, llm.model.num_layers, llm.model)
                    for part in own
                    for _ in range(part.count)
                ]
                prompts = [list(rows[(first + seq) % len(rows)].prompt_ids) for seq in range(len(paths))]
                first += len(paths)
                total_ms += decode_ms(llm, prompts, paths)
            return total_ms / first

        return run

    batches = {
        label: [Part(checkpoint, path, int(count)) for checkpoint, path, count in parts]
        for label, parts in json.loads(item.path).items()
    }
    return timed_in_turns({label: task(parts) for label, parts in batches.items()}, context.setup.timed_rounds)


def timed_in_turns(tasks: Mapping[str, Task], num_rounds: int) -> dict[str, Any]:
    """The result of an item that times ``tasks``, each of which says its own milliseconds per token."""
    samples = interleave(tasks, num_rounds)
    return {"ms_per_token": {label: [round(ms, 6) for (ms,) in sample.rounds] for label, sample in samples.items()}}


def decode_ms(
    llm: LLM, prompts: Sequence[Sequence[int]], paths: Paths, kv_policy: str | None = None, prompt_depth: str = "path"
) -> float:
    """The milliseconds of one decode step of a batch: the mean of a few after the first ones.

    paths, kv_policy, prompt_depth: as in ``LLM.generate``.
    """
    num_tokens = 1 + _NUM_WARM_STEPS + _NUM_STEPS
    params = [SamplingParams(max_tokens=num_tokens + 1, ignore_eos=True)] * len(prompts)
    generation = Generation(llm.model, prompts, params, paths, kv_policy, prompt_depth)
    generation.prefill()
    for _ in range(_NUM_WARM_STEPS):
        generation.step()
    # Choosing tokens brings them to the host, so that the clock is read when a device is done.
    start = time.perf_counter()
    for _ in range(_NUM_STEPS):
        generation.step()
    elapsed_ms = (time.perf_counter() - start) * 1e3 / _NUM_STEPS
    generation.retire()
    return elapsed_ms


def read_timings(store: ItemStore, item: WorkItem, baseline: str) -> dict[str, dict[str, Interval]]:
    """By metric and label: milliseconds per token, how many times faster than ``baseline``, and how many fewer.

    Medians over rounds with their intervals; a comparison is made round by round.
    """
    times = {label: np.array(rounds, dtype=np.float64) for label, rounds in store.result(item)["ms_per_token"].items()}
    measured = {
        "ms_per_token": times,
        "speedup": {label: times[baseline] / rounds for label, rounds in times.items()},
        "ms_saved": {label: times[baseline] - rounds for label, rounds in times.items()},
    }
    return {
        metric: {label: bootstrap(medians, values, batched=True) for label, values in by_label.items()}
        for metric, by_label in measured.items()
    }
