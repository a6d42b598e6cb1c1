"""The interface of a scheduling policy, and the policies by name."""

from __future__ import annotations

from typing import Protocol

from dynskip.arguments import shown
from dynskip.costs.step_costs import StepCosts
from dynskip.scheduler.groups import PathGroup, PathGroups
from dynskip.scheduler.sequence import SequenceState

POLICIES = ("cohort", "lockstep", "by_path")
# Rows of a step, and resident sequences, that an engine keeps lists for.
MAX_BATCH = 2**16
MAX_POOL = 2**20

# The rows of one path in a decode step.
Part = tuple[PathGroup, list[SequenceState]]


class Policy(Protocol):
    """Says who becomes resident, and who of the resident steps.

    name: as in ``POLICIES``. batch: most rows of a decode step. pool: most resident sequences.
    """

    name: str
    batch: int
    pool: int

    def next_group(self, groups: PathGroups, step: int) -> PathGroup | None:
        """The path whose head is admitted next; None: nobody more in this step. A place in the pool is free."""
        ...

    def choose(self, groups: PathGroups, step: int) -> list[Part]:
        """Who decodes in step ``step``: at most ``batch`` running sequences, by path, the oldest of each path first."""
        ...


def make_policy(
    name: str, costs: StepCosts | None, batch: int, pool: int | None = None, max_wait: int | None = None
) -> Policy:
    """The policy of that name.

    costs: what steps take; only `cohort` asks.
    pool: most resident sequences, by default 4 x batch for `cohort`; the others keep resident only what steps.
    max_wait: W of `cohort`: no resident sequence waits more steps than that for its next token.
    """
    from dynskip.scheduler.policies.by_path import ByPath
    from dynskip.scheduler.policies.cohort import Cohort
    from dynskip.scheduler.policies.lockstep import Lockstep

    if name == "cohort":
        if costs is None:
            raise ValueError("make_policy: costs must be given for cohort, got None. Measure or model them.")
        return Cohort(costs, batch, 4 * batch if pool is None else pool, max_wait)
    if max_wait is not None:
        raise ValueError(f"make_policy: max_wait must be left out for {name}, got {max_wait}. Use policy cohort.")
    if pool not in (None, batch):
        raise ValueError(f"make_policy: pool must be {batch}, the batch, for {name}, got {pool}. Use policy cohort.")
    if name == "lockstep":
        return Lockstep(batch)
    if name == "by_path":
        return ByPath(batch)
    raise ValueError(f"make_policy: name must be one of {', '.join(POLICIES)}, got {name!r}.")


def check_limits(name: str, batch: int, pool: int) -> None:
    """Raise ValueError where a policy of that name cannot work with ``batch`` and ``pool``."""
    if batch < 1:
        raise ValueError(f"{name}: batch must be at least 1, got {shown(batch)}.")
    if batch > MAX_BATCH:
        raise ValueError(f"{name}: batch must be at most {MAX_BATCH}, got {shown(batch)}.")
    if pool < batch:
        raise ValueError(f"{name}: pool must be at least the batch, {batch}, got {shown(pool)}.")
    if pool > MAX_POOL:
        raise ValueError(f"{name}: pool must be at most {MAX_POOL}, got {shown(pool)}.")
