"""The policies of the scheduler by name."""

from __future__ import annotations

from dynskip.costs.step_costs import StepCosts
from dynskip.scheduler.policies.by_path import ByPath
from dynskip.scheduler.policies.cohort import Cohort
from dynskip.scheduler.policies.policy import Lockstep, Policy

POLICIES = ("cohort", "lockstep", "by_path")


def make_policy(
    name: str, costs: StepCosts | None, batch: int, pool: int | None = None, max_wait: int | None = None
) -> Policy:
    """The policy of that name.

    costs: what steps take; only `cohort` asks.
    pool: most resident sequences, by default 4 x batch for `cohort`; the others keep resident only what steps.
    max_wait: W of `cohort`: no resident sequence waits more steps than that for its next token.
    """
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
