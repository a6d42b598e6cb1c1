"""The part of ``dynskip demo`` that serves one stream of mixed depths by two policies, side by side."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynskip.cli.demo_common import aligned, demo_path, prompt_ids
from dynskip.cli.options import UserError

if TYPE_CHECKING:
    from dynskip.llm import LLM
    from dynskip.measure.streams import Job, Served
    from dynskip.scheduler.outcome import Outcome

POLICIES = ("lockstep", "cohort")
# The budgets of arXiv 2410.20022 and their shares, as parts of the layers: of 24, a mean of 5.6.
MIX = (("uniform", 1 / 6, 74), ("uniform", 1 / 3, 18), ("uniform", 1 / 2, 6), ("full", 1, 2))
BATCH = 16
_MEAN_TOKENS = 16
_MAX_TOKENS = 48
# Turns are short, so that what disturbs one policy disturbs the other.
_TURN_S = 0.1

_OPENINGS = [
    "Write a short poem about",
    "Give me three facts about",
    "Explain to a child what is special about",
    "Name a song that reminds you of",
    "What would you ask an expert on",
    "Describe in one sentence",
    "Tell me a joke about",
    "How would you draw",
    "Why do people like",
    "Make up a riddle whose answer is",
    "Write the first line of a story about",
    "What is the history of",
    "List the colours of",
    "Compare an old clock with",
    "Suggest a name for a boat that carries",
    "What could go wrong with",
]
_TOPICS = [
    "the first snow",
    "tomatoes on a balcony",
    "a quiet village",
    "red leaves",
    "the night train",
    "a bakery at dawn",
    "wild bees",
    "the sea in winter",
    "an empty theatre",
    "sourdough bread",
    "a lighthouse",
    "mountain weather",
    "a paper kite",
    "the market on Saturday",
    "lost umbrellas",
    "a garden wall",
]


@dataclass(frozen=True)
class Serving:
    """One stream under both policies.

    paths: how many requests took each path. mean_layers: of the requests. num_same: how many got the same tokens from
    both policies in the deterministic mode. outcomes: by policy; None where some got others, so that nothing was timed.
    """

    num_requests: int
    num_layers: int
    paths: dict[str, int]
    mean_layers: float
    batch: int
    num_same: int
    outcomes: dict[str, Outcome] | None

    @property
    def same_tokens(self) -> bool:
        """Whether the policies agree on all tokens of all requests."""
        return self.num_same == self.num_requests


def run_serving(model: str | None, num_requests: int, backend: str, progress: bool) -> Serving:
    """Serve the stream: first for its tokens, in the deterministic mode, then for its time, the policies in turns."""
    from dynskip.llm import LLM
    from dynskip.measure.calibration import known_step_costs
    from dynskip.measure.streams import Served, take_turns

    llm = LLM(model, backend=backend)
    if llm.tokenizer is None:
        raise UserError("--model must come with a tokenizer for texts")
    jobs, names = draw_jobs(llm, num_requests)
    costs = known_step_costs(llm.model, num_rows=BATCH, prompt_len=16)

    def serve(title: str, deterministic: bool) -> list[Served]:
        runs = [
            Served(policy, llm.model, jobs, costs, _TURN_S, policy=policy, batch=BATCH, deterministic=deterministic)
            for policy in POLICIES
        ]
        take_turns(runs, (lambda: _show(title, runs)) if progress else None)
        return runs

    def close(runs: Sequence[Served]) -> None:
        for run in runs:
            run.engine.close()

    checked = serve("check", deterministic=True)
    lockstep, cohort = (run.token_ids for run in checked)
    num_same = sum(lockstep[request_id] == cohort[request_id] for request_id in lockstep)
    close(checked)
    outcomes = None
    if num_same == num_requests:
        timed = serve("time", deterministic=False)
        outcomes = {run.name: run.outcome for run in timed}
        close(timed)
    if progress:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return Serving(
        num_requests=num_requests,
        num_layers=llm.model.num_layers,
        paths=names,
        mean_layers=sum(job.request.path.budget for job in jobs) / num_requests,
        batch=BATCH,
        num_same=num_same,
        outcomes=outcomes,
    )


def draw_jobs(llm: LLM, num_requests: int) -> tuple[list[Job], dict[str, int]]:
    """The requests of the mix, each with a prompt of its own as long as there are some, and how many took each path."""
    from dynskip.measure.streams import Job
    from dynskip.simulation.workload import Request, Workload

    num_layers = llm.model.num_layers
    mix = [(*demo_path(num_layers, kind, share, 0), weight) for kind, share, weight in MIX]
    workload = Workload(num_requests, tuple((path, weight) for _, path, weight in mix), mean_output=_MEAN_TOKENS)
    prompts = [f"{opening} {topic}." for topic in _TOPICS for opening in _OPENINGS]
    jobs = []
    for index, request in enumerate(workload.draw()):
        prompt = prompt_ids(llm, prompts[index % len(prompts)])
        num_output = min(request.num_output, _MAX_TOKENS)
        jobs.append(Job(prompt, Request(0.0, request.path, len(prompt), num_output)))
    return jobs, {name: sum(job.request.path == path for job in jobs) for name, path, _ in mix}


def serving_page(serving: Serving) -> str:
    """The table of both policies, and why they differ."""
    width = min(shutil.get_terminal_size().columns, 120)
    mix = ", ".join(f"{count} {name}" for name, count in serving.paths.items())
    head = (
        f"SERVING: {serving.num_requests} requests, {mix}: a mean of {serving.mean_layers:.1f} of {serving.num_layers} "
        f"layers; at most {serving.batch} rows step at once"
    )
    lines = [*textwrap.wrap(head, width), ""]
    same = f"{serving.num_same} of {serving.num_requests} requests get the same tokens from both policies"
    if serving.outcomes is None:
        return "\n".join([*lines, *textwrap.wrap(f"{same}: DIFFERENT TOKENS, so nothing was timed.", width)]) + "\n"
    lines += [*textwrap.wrap(f"{same}, bit for bit in the deterministic mode. Then, in turns:", width), ""]
    above = ("", "tokens", "decode", "prefill", "rows", "mean", "union of", "first", "")
    names = ("", "a second", "s", "s", "a step", "layers", "layers", "token s", "speed-up")
    rows: list[tuple[str, ...]] = [above, names]
    first = serving.outcomes["lockstep"].tokens_per_s
    for name, outcome in serving.outcomes.items():
        seconds = [f"{value:.2f}" for value in (outcome.decode_s, outcome.prefill_s)]
        sizes = [f"{value:.1f}" for value in (outcome.rows, outcome.layers, outcome.union)]
        ratio = f"{outcome.tokens_per_s / first:.2f}x"
        rows.append((name, f"{outcome.tokens_per_s:,.0f}", *seconds, *sizes, f"{outcome.ttft_s[0]:.2f}", ratio))
    return "\n".join([*lines, *aligned(rows), "", *textwrap.wrap(_explanation(serving.outcomes), width)]) + "\n"


def _explanation(outcomes: dict[str, Outcome]) -> str:
    lockstep, cohort = outcomes["lockstep"], outcomes["cohort"]
    return (
        f"In lock-step whoever is resident steps, and a step reads every layer that any of its rows runs: "
        f"{lockstep.union:.1f} layers, for rows that run {lockstep.layers:.1f}. The cohort keeps more requests "
        f"resident than step at once, and lets those step whose paths go together: {cohort.union:.1f} layers for "
        f"{cohort.rows:.1f} rows.{_rest(lockstep, cohort)}"
    )


def _rest(lockstep: Outcome, cohort: Outcome) -> str:
    """What a layer takes and what no path saves, if steps are so much for each layer read and the same for the rest."""
    lockstep_ms, cohort_ms = (1e3 * outcome.decode_s / outcome.num_decode_steps for outcome in (lockstep, cohort))
    if lockstep.union == cohort.union:
        return ""
    layer_ms = (lockstep_ms - cohort_ms) / (lockstep.union - cohort.union)
    rest_ms = lockstep_ms - lockstep.union * layer_ms
    if layer_ms <= 0 or rest_ms <= 0:
        return ""  # the machine was busier in the turns of one
    return (
        f" By these two lines a layer takes {layer_ms:.2f} ms, and {rest_ms:.2f} ms of a step are what no path saves: "
        "head, choice of tokens, bookkeeping."
    )


def _show(title: str, runs: Sequence[Served]) -> None:
    """One line on stderr, over the last one: how far each policy is, and how fast."""
    parts = []
    for run in runs:
        pace = f"{run.outcome.tokens_per_s:6,.0f} tokens/s, union {run.outcome.union:4.1f}"
        parts.append(f"{run.name} {run.progress:4.0%} {pace}")
    line = f"{title}: {' | '.join(parts)}"
    print(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K", end="", file=sys.stderr, flush=True)
