"""What a stream of requests would cost in full batches of one path each: the bound that schedules are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynskip.costs.step_costs import StepCosts
from dynskip.paths import LayerPath
from dynskip.simulation.workload import Request, at_full_depth


@dataclass(frozen=True)
class Ideal:
    """Milliseconds of a stream's decode steps and prefills, were every batch full and of one path."""

    decode_ms: float
    prefill_ms: float

    @staticmethod
    def of(costs: StepCosts, requests: Sequence[Request], batch: int, prefill_tokens: int) -> Ideal:
        """The ideal for batches of ``batch`` rows and prefills of ``prefill_tokens``: head and KV reads included."""
        rows: dict[LayerPath, tuple[float, float]] = {}
        decode_ms = prefill_ms = 0.0
        for request in requests:
            path = request.path
            if path not in rows:
                num_prompts = max(1, prefill_tokens // request.num_prompt)
                num_tokens = num_prompts * request.num_prompt
                prompt_ms = costs.prefill_ms([(path, num_tokens)], num_prompts) / num_tokens
                rows[path] = (costs.path_ms(path, batch) / batch, prompt_ms)
            row_ms, prompt_ms = rows[path]
            # The first token comes from the prefill; the step of each further one reads all that came before it.
            num_steps = request.num_output - 1
            num_read = num_steps * request.num_prompt + num_steps * (num_steps + 1) // 2
            decode_ms += num_steps * row_ms + path.budget * num_read * costs.decode.kv_ms_per_entry
            prefill_ms += request.num_prompt * prompt_ms
        return Ideal(decode_ms, prefill_ms)

    @staticmethod
    def speedups(costs: StepCosts, requests: Sequence[Request], batch: int, prefill_tokens: int) -> tuple[float, float]:
        """How much faster than at full depth the stream can be: its decode steps, and decode steps with prefills.

        By what the model takes: whatever a stream takes besides counts against the schedule.
        """
        costs = costs.of_model()
        ours = Ideal.of(costs, requests, batch, prefill_tokens)
        full = Ideal.of(costs, at_full_depth(requests), batch, prefill_tokens)
        decode = full.decode_ms / ours.decode_ms if ours.decode_ms else 1.0
        return decode, (full.decode_ms + full.prefill_ms) / (ours.decode_ms + ours.prefill_ms)


def least_decode_ms(costs: StepCosts, requests: Sequence[Request], batch: int) -> float:
    """Milliseconds below which no schedule can bring the decode steps of ``requests``, whatever it knows beforehand.

    A layer is read at least as often as the longest sequence that runs it steps; and a row never costs less of a layer
    than in the best step of at most ``batch`` rows. The ideal knows only the second.
    """
    layer, head = costs.decode.layer, costs.decode.head
    layer_row_ms = min(layer.at(rows) / rows for rows in range(1, batch + 1))
    rest = [head.at(rows) + costs.step_ms + rows * costs.step_row_ms for rows in range(1, batch + 1)]
    rest_row_ms = min(ms / rows for rows, ms in enumerate(rest, start=1))
    num_rows, longest = [0] * costs.num_layers, [0] * costs.num_layers
    num_read = 0
    for request in requests:
        num_steps = request.num_output - 1
        num_read += request.path.budget * (num_steps * request.num_prompt + num_steps * (num_steps + 1) // 2)
        for index in request.path.layers:
            num_rows[index] += num_steps
            longest[index] = max(longest[index], num_steps)
    least = sum(max(most * layer.at(1), rows * layer_row_ms) for most, rows in zip(longest, num_rows, strict=True))
    steps = [request.num_output - 1 for request in requests]
    least += max(max(steps, default=0) * rest[0], sum(steps) * rest_row_ms)
    return least + num_read * costs.decode.kv_ms_per_entry
