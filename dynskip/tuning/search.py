"""The search: candidates are compiled, held against the reference, and only then timed, in turns with the best."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from triton.errors import TritonError

from dynskip.kernels.configs import use_configs
from dynskip.measure.device import Device, time_in_turns
from dynskip.ops.row_ops import RowOps
from dynskip.tuning.compiling import Compiler, Usage
from dynskip.tuning.space import REFINED, Constants, Limits, default_constants, tiles, variations
from dynskip.tuning.table import candidate_table
from dynskip.tuning.tasks import Task
from dynskip.tuning.workload import Workload

# A sample is long enough for the clock, and for launches to follow each other closely.
_SAMPLE_US = 1000.0
_QUICK_ROUNDS = 3
# Only those within so much of the fastest are timed once more, and no more than so many.
_MARGIN = 1.1
_NUM_FINALISTS = 5
_WORTH = 0.995


@dataclass
class Outcome:
    """What is known of a task. us: microseconds of one launch, with the best constants and with the default's.

    discarded: why candidates were not timed, and how many. num_untried: candidates for which no time was left.
    """

    task: Task
    default: Constants
    best: Constants
    us: float | None = None
    default_us: float | None = None
    num_timed: int = 0
    num_untried: int = 0
    discarded: Counter[str] = field(default_factory=Counter)


@dataclass
class Search:
    """Finds the constants with which each task runs fastest on ``device``, until ``deadline``.

    deadline: on ``now``, a clock in seconds. num_rounds: of the finalists' turns. report: told what goes on.
    keep: given what was found so far, after each stage.
    """

    device: Device
    ops: RowOps
    compiler: Compiler
    limits: Limits
    deadline: float = float("inf")
    num_rounds: int = 7
    now: Callable[[], float] = time.monotonic
    report: Callable[[str], None] = lambda text: None
    keep: Callable[[list[Outcome]], object] = lambda outcomes: None
    failure: str | None = None
    _right: dict[Task, list[Constants]] = field(default_factory=dict)

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        """What was found for each task. All tiles of all tasks come before any other constant.

        A GPU that fails in the middle, after which it answers nothing, ends the search: ``failure`` says how, and what
        was found before stands.
        """
        outcomes = [Outcome(task, default_constants(task), default_constants(task)) for task in tasks]
        for stage in ("tiles", *REFINED):
            try:
                self._run_stage(stage, outcomes)
            except RuntimeError as error:
                self.failure = f"{stage}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                break
            self.keep(outcomes)
        return outcomes

    def _run_stage(self, stage: str, outcomes: list[Outcome]) -> None:
        """Try the tiles of all tasks, or the variations of the constant ``stage``."""
        # All are compiled from the start of the stage on; each task waits for its own.
        submitted: list[tuple[Outcome, list[tuple[Constants, Future[Usage]]]]] = []
        for outcome in outcomes:
            task, best = outcome.task, outcome.best
            tried = tiles(task, self.limits) if stage == "tiles" else variations(task, best, stage, self.limits)
            candidates = [constants for constants in tried if constants != best]
            if not candidates:
                continue
            if self._out_of_time():
                outcome.num_untried += len(candidates)
                continue
            submitted.append((outcome, [(each, self.compiler.submit(task, each)) for each in candidates]))
        for outcome, compiled in submitted:
            if self._out_of_time():
                outcome.num_untried += len(compiled)
                for _, usage in compiled:
                    usage.cancel()
                continue
            self._try(outcome, [constants for constants, usage in compiled if self._fits(outcome, usage.result())])
            us = "nothing timed" if outcome.us is None else f"{outcome.us:.2f} us"
            self.report(f"{stage}: {outcome.task}: {us}")

    def _out_of_time(self) -> bool:
        return self.now() >= self.deadline

    def _fits(self, outcome: Outcome, usage: Usage) -> bool:
        if usage.complaint(self.limits.max_shared_bytes) is None:
            return True
        reason = "does not compile" if usage.error is not None else "spills"
        outcome.discarded[reason if usage.error or usage.spilled_bytes else "too much shared memory"] += 1
        return False

    def _try(self, outcome: Outcome, candidates: list[Constants]) -> None:
        """Times ``candidates`` that compute right in turns with the best and the default, and keeps the best."""
        workload = Workload(outcome.task, self.ops, self.device.device)
        baselines = [outcome.best] if outcome.best == outcome.default else [outcome.best, outcome.default]
        ready: list[tuple[Constants, Callable[[], object]]] = []
        for constants in [*baselines, *candidates]:
            if self._out_of_time() and len(ready) > len(baselines):
                outcome.num_untried += 1
                continue
            launch = self._prepare(workload, constants, outcome)
            if launch is not None:
                ready.append((constants, launch))
        new = [constants for constants, _ in ready if constants in candidates]
        outcome.num_timed += len(new)
        if not ready:
            return
        us = self._time(workload, ready, _QUICK_ROUNDS)
        ranked = sorted(range(len(ready)), key=lambda index: us[index])
        finalists = [index for index in ranked if us[index] <= min(us) * _MARGIN][:_NUM_FINALISTS]
        # The baselines take part to the end: what is written down was measured in one run of turns.
        finalists += [index for index in range(len(ready)) if ready[index][0] in baselines and index not in finalists]
        final = [ready[index] for index in finalists]
        final_us = self._time(workload, final, self.num_rounds)
        # Less than that is noise, and no reason to leave what was best before.
        handicaps = [_WORTH if constants == outcome.best else 1.0 for constants, _ in final]
        winner = min(range(len(final)), key=lambda index: final_us[index] * handicaps[index])
        outcome.best, outcome.us = final[winner][0], final_us[winner]
        for (constants, _), measured in zip(final, final_us, strict=True):
            if constants == outcome.default:
                outcome.default_us = measured

    def _prepare(self, workload: Workload, constants: Constants, outcome: Outcome) -> Callable[[], object] | None:
        """A call that runs the launches of all layers, or None if they compute wrong."""
        table = candidate_table(workload.task, constants)
        known_right = constants in self._right.setdefault(workload.task, [])
        try:
            with use_configs(table):
                complaint = None if known_right else workload.complaint()
                workspace = workload.make_workspace()
            if complaint is None:

                def launch() -> None:
                    with use_configs(table):
                        workload.launch_with(workspace)

                captured = self.device.captured(launch)
                self._right[workload.task].append(constants)
                return captured
        except TritonError as error:  # it needs what the GPU does not have
            complaint = f"{type(error).__name__}: {error}"
        self.report(f"discarded: {workload.task}: {constants}: {complaint}")
        outcome.discarded["wrong or refused"] += 1
        return None

    def _time(
        self, workload: Workload, launches: Sequence[tuple[Constants, Callable[[], object]]], num_rounds: int
    ) -> list[float]:
        """The microseconds of one launch of each."""
        num_launches = len(workload.layers)
        once_us = self.device.time(launches[0][1], 1) * 1e3
        num_repeats = max(1, min(20, round(_SAMPLE_US / max(once_us, 1.0))))
        tasks = {str(index): launch for index, (_, launch) in enumerate(launches)}
        samples = time_in_turns(self.device, tasks, num_rounds, num_repeats)
        return [samples[str(index)].ms * 1e3 / num_launches for index in range(len(launches))]
