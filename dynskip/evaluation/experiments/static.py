"""Static budgets: ROUGE-L at each budget and the time of a token there (arXiv 2410.20022, section 3.1)."""

from __future__ import annotations

from typing import Any

from dynskip.evaluation.stats.intervals import bootstrap_mean
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.path_families import DESCRIPTIONS, Member, families, greedy, greedy_items
from dynskip.evaluation.tasks.timing import Part, read_timings, time_item


def plan(setup: Setup, _: ItemStore) -> list[WorkItem]:
    """The items: greedy generations of every family, then the times of their paths in turns."""
    found = families(setup)
    items = [item for members in found.values() for item in greedy_items(setup, members)]
    return [
        *items,
        *(time_item_of(setup, members, setup.timed_batch) for members in found.values()),
        *(time_item_of(setup, members, 1) for members in found.values()),
    ]


def time_item_of(setup: Setup, members: list[Member], batch: int) -> WorkItem:
    """The item that times every member of a family at one batch size."""
    batches = {str(member.budget): [Part(member.checkpoint.hash, member.path, batch)] for member in members}
    return time_item(setup, batches)


def summarise(setup: Setup, store: ItemStore) -> dict[str, Any]:
    """The section: ROUGE-L, length and milliseconds per token by family and budget, and the loss against full depth."""
    rows: list[dict[str, Any]] = []
    for family, members in families(setup).items():
        generations = greedy(setup, store, members)
        scores, lengths = generations.rouge_l, generations.num_tokens
        timings = {
            suffix: (batch, read_timings(store, time_item_of(setup, members, batch), str(setup.num_layers)))
            for suffix, batch in (("", setup.timed_batch), ("_single", 1))
        }
        mean = bootstrap_mean(scores, resamples=setup.resamples)
        loss = bootstrap_mean(scores - scores[:, -1:], resamples=setup.resamples)
        length = bootstrap_mean(lengths, resamples=setup.resamples)
        for column, member in enumerate(members):
            labels = {"family": family, "budget": member.budget, "path": member.path}
            rows.append(mean.at(column).row(metric="rouge_l", **labels))
            rows.append(loss.at(column).row(metric="rouge_l - full", **labels))
            rows.append(length.at(column).row(metric="num_tokens", **labels))
            rows += [
                by_budget[str(member.budget)].row(metric=metric + suffix, batch=batch, **labels)
                for suffix, (batch, measured) in timings.items()
                for metric, by_budget in measured.items()
            ]
    notes = [
        "Greedy, ROUGE-L F by rouge_score without stemmer, intervals by bootstrap over sequences.",
        f"ms_per_token is the time of a decode step of {setup.timed_batch} sequences over {setup.timed_batch}; "
        "ms_per_token_single that of one sequence. Prompts are not in it. Paths are timed in turns.",
        *(f"{family}: {DESCRIPTIONS[family]}." for family in families(setup)),
    ]
    return {"n": setup.prompts, "seeds": 1, "rows": rows, "notes": notes}
