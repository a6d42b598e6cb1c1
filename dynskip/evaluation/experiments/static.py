"""Static budgets: ROUGE-L at each budget and the time of a token there (arXiv 2410.20022, section 3.1)."""

from __future__ import annotations

from typing import Any

from dynskip.evaluation.stats.intervals import bootstrap_mean
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.path_families import DESCRIPTIONS, families, family_generations, family_items
from dynskip.evaluation.tasks.timing import batches_alone, read_timings, time_item


def plan(setup: Setup, _: ItemStore) -> list[WorkItem]:
    """The items: greedy generations of every family, then the times of their paths in turns."""
    found = families(setup).values()
    return [
        *(item for members in found for item in family_items(setup, members)),
        *(time_item(setup, batches_alone(members, batch)) for batch in (setup.timed_batch, 1) for members in found),
    ]


def summarise(setup: Setup, store: ItemStore) -> dict[str, Any]:
    """The section: ROUGE-L, length and milliseconds per token by family and budget, and the loss against full depth."""
    rows: list[dict[str, Any]] = []
    for family, members in families(setup).items():
        generations = family_generations(setup, store, members)
        scores, lengths = generations.rouge_l, generations.num_tokens
        tables = {"rouge_l": scores, "rouge_l - full": scores - scores[:, -1:], "num_tokens": lengths}
        means = {metric: bootstrap_mean(table, resamples=setup.resamples) for metric, table in tables.items()}
        timed = [
            (metric + suffix, batch, by_budget)
            for suffix, batch in (("", setup.timed_batch), ("_single", 1))
            for item in [time_item(setup, batches_alone(members, batch))]
            for metric, by_budget in read_timings(store, item, str(setup.num_layers)).items()
        ]
        for column, member in enumerate(members):
            labels = {"family": family, "budget": member.budget, "path": member.path}
            rows += [mean.at(column).row(metric=metric, **labels) for metric, mean in means.items()]
            for metric, batch, by_budget in timed:
                rows.append(by_budget[str(member.budget)].row(metric=metric, batch=batch, **labels))
    notes = [
        "Greedy, ROUGE-L F by rouge_score without stemmer, intervals by bootstrap over sequences.",
        f"ms_per_token is the time of a decode step of {setup.timed_batch} sequences over {setup.timed_batch}; "
        "ms_per_token_single that of one sequence. Prompts are not in it. Paths are timed in turns.",
        *(f"{family}: {DESCRIPTIONS[family]}." for family in families(setup)),
    ]
    return {"n": setup.prompts, "seeds": 1, "rows": rows, "notes": notes}
