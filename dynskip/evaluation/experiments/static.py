"""Static budgets: ROUGE-L, log-likelihood and the time of a token at each budget (arXiv 2410.20022, section 3.1).

Beside uniform paths stand the rules that others propose, by the log-likelihood of references: early exit, random
layers, the layers of most influence, and a path that was searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dynskip.data.closed_labels import MOST_LABELS
from dynskip.evaluation.experiments.losses import paired_loss, score_rows
from dynskip.evaluation.stats.decisions import false_discovery, mean_p
from dynskip.evaluation.stats.intervals import Floats, bootstrap_mean
from dynskip.evaluation.sweep.checkpoints import Checkpoint
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.label_matches import match_items, read_matches, without_reading
from dynskip.evaluation.tasks.likelihoods import (
    likelihood_items,
    member_items,
    member_likelihoods,
    read_likelihoods,
)
from dynskip.evaluation.tasks.path_families import DESCRIPTIONS, Member, families, family_generations, family_items
from dynskip.evaluation.tasks.rivals import influence_items, read_influence, rival_paths
from dynskip.evaluation.tasks.strategies import is_drawn
from dynskip.evaluation.tasks.timing import batches_alone, read_timings, time_item


def plan(setup: Setup, store: ItemStore) -> list[WorkItem]:
    """The items: greedy generations and likelihoods of every family, those along the paths of other rules, which the
    influence of layers decides on, and the times of paths in turns."""
    found = families(setup).values()
    items = [item for members in found for item in (*member_items(setup, members), *match_items(setup, members))]
    if not setup.likelihood_only:
        items += [item for members in found for item in family_items(setup, members)]
        items += [
            time_item(setup, batches_alone(members, batch)) for batch in (setup.timed_batch, 1) for members in found
        ]
    for checkpoint in setup.weights_compared.values():
        influence = influence_items(setup, checkpoint)
        items += influence
        if not store.missing(influence):
            items += _rival_items(setup, store, checkpoint)
    return items


def summarise(setup: Setup, store: ItemStore) -> dict[str, Any]:
    """The section: scores, length and milliseconds per token by family and budget, the loss against full depth, and
    the rules for the layers of a budget against each other."""
    rows: list[dict[str, Any]] = []
    for family, members in families(setup).items():
        if not setup.likelihood_only:
            rows += _text_rows(setup, store, family, members)
        rows += _likelihood_rows(setup, store, family, members)
        if setup.labels_hash is not None:
            matches = read_matches(setup, store, members)
            rows += score_rows(setup, "label_match", matches, None, setup.margin_match, family, members)
    if setup.labels_hash is not None:
        member = families(setup)["paths"][-1]
        for rule, found in without_reading(setup, store, member).items():
            rows.append(bootstrap_mean(found, resamples=setup.resamples).row(metric="label_match", rule=rule))
    if setup.backbone is not None:
        rows += _tuning_rows(setup, store)
    for weights, checkpoint in setup.weights_compared.items():
        rows += _rival_rows(setup, store, weights, checkpoint)
    notes = [
        *([] if setup.likelihood_only else ["Greedy, ROUGE-L F by rouge_score without stemmer."]),
        "BCa intervals by bootstrap over sequences.",
        "nats: minus the log-likelihood of a token of the reference, teacher-forced, over all tokens; smaller is "
        f"better. On {setup.num_likelihoods} references; rules for layers on {num_rule_prompts(setup)}.",
        *_notes_on_labels(setup),
        "p_equivalent: of two one-sided t-tests that the paired difference to full depth lies within the margin: "
        f"{setup.margin_rouge_l:g} ROUGE-L, {setup.margin_nats:g} nats a token, {setup.margin_match:g} of the labels. "
        "verdict: equivalent where it is below "
        "0.05, else lower or higher where the interval leaves zero out, else open.",
        "Rules for the layers of a budget (rule_nats, and rule_nats - uniform, paired): early exit, random layers "
        f"(random-first keeps layer 0; drawn for each reference anew, the mean of {setup.seeds} draws), the layers of "
        "most influence (1 - cosine of input and output, measured on rows of the validation split), a searched path "
        "where one was given. q: p of the difference, adjusted by Benjamini and Hochberg for all rules, budgets and "
        "weights.",
        f"ms_per_token is the time of a decode step of {setup.timed_batch} sequences over {setup.timed_batch}; "
        "ms_per_token_single that of one sequence. Prompts are not in it. Paths are timed in turns.",
        "nats - backbone: minus the nats of the weights before any tuning along the same path, paired.",
        *(f"{family}: {DESCRIPTIONS[family]}." for family in families(setup)),
    ]
    _add_q(rows, "rule_nats - uniform")
    return {"n": setup.num_judged, "n_nats": setup.num_likelihoods, "seeds": 1, "rows": rows, "notes": notes}


def _text_rows(setup: Setup, store: ItemStore, family: str, members: Sequence[Member]) -> list[dict[str, Any]]:
    """ROUGE-L and length of greedy texts, and the time of their tokens."""
    generations = family_generations(setup, store, members)
    rows = score_rows(setup, "rouge_l", generations.rouge_l, None, setup.margin_rouge_l, family, members)
    lengths = bootstrap_mean(generations.num_tokens, resamples=setup.resamples)
    timed = [
        (metric + suffix, batch, by_budget)
        for suffix, batch in (("", setup.timed_batch), ("_single", 1))
        for item in [time_item(setup, batches_alone(members, batch))]
        for metric, by_budget in read_timings(store, item, str(setup.num_layers)).items()
    ]
    for column, member in enumerate(members):
        labels = {"family": family, "budget": member.budget, "path": member.path}
        rows.append(lengths.at(column).row(metric="num_tokens", **labels))
        for metric, batch, by_budget in timed:
            rows.append(by_budget[str(member.budget)].row(metric=metric, batch=batch, **labels))
    return rows


def _likelihood_rows(setup: Setup, store: ItemStore, family: str, members: Sequence[Member]) -> list[dict[str, Any]]:
    found = member_likelihoods(setup, store, members)
    return score_rows(setup, "nats", -found.scores, found.num_tokens, setup.margin_nats, family, members)


def _tuning_rows(setup: Setup, store: ItemStore) -> list[dict[str, Any]]:
    """By budget the nats of the model minus those of its backbone along the same path, paired."""
    found = families(setup)
    tuned, backbone = (member_likelihoods(setup, store, found[family]) for family in ("paths", "backbone"))
    rows = []
    for column, member in enumerate(found["paths"]):
        labels = {"family": "paths", "budget": member.budget, "path": member.path}
        difference = backbone.scores[:, column] - tuned.scores[:, column]
        loss = paired_loss(difference, tuned.num_tokens, setup.margin_nats, setup.resamples)
        rows.append(loss.row_of("nats - backbone", labels))
    return rows


def _notes_on_labels(setup: Setup) -> list[str]:
    if setup.labels_hash is None:
        return []
    return [
        f"label_match: the share of {setup.label_prompts} T0 rows whose right label is the likeliest of its "
        f"template's; templates with at most {MOST_LABELS} labels, rows of 15 % of the passages, chosen by their text. "
        "Of rule chance the label is drawn, of rule majority it is the one that is right most often in the same rows."
    ]


def _rival_items(setup: Setup, store: ItemStore, checkpoint: Checkpoint) -> list[WorkItem]:
    names = _distinct(_rivals(setup, store, checkpoint))
    return [item for some in _apart(names) for item in _items_along(setup, checkpoint, some)]


def _items_along(setup: Setup, checkpoint: Checkpoint, names: Sequence[str]) -> list[WorkItem]:
    return likelihood_items(setup, checkpoint, names, num_rows=num_rule_prompts(setup))


def _apart(names: Sequence[str]) -> list[list[str]]:
    """Paths that all references run, and those that each draws: items of their own, for they share no states."""
    drawn = [name for name in names if is_drawn(name)]
    return [[name for name in names if not is_drawn(name)], drawn]


def num_rule_prompts(setup: Setup) -> int:
    """On how many prompts rules for the layers of a budget are compared."""
    return setup.rule_prompts or setup.num_likelihoods


def _rivals(setup: Setup, store: ItemStore, checkpoint: Checkpoint) -> dict[str, dict[int, list[str]]]:
    return rival_paths(setup, read_influence(store, influence_items(setup, checkpoint)))


def _distinct(rules: dict[str, dict[int, list[str]]]) -> list[str]:
    each = (path for by_budget in rules.values() for paths in by_budget.values() for path in paths)
    return list(dict.fromkeys(["full", *each]))


def _rival_rows(setup: Setup, store: ItemStore, weights: str, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    rules = _rivals(setup, store, checkpoint)
    columns: dict[str, Floats] = {}
    for names in _apart(_distinct(rules)):
        found = read_likelihoods(store, _items_along(setup, checkpoint, names))
        columns |= dict(zip(names, (found.nats / found.num_tokens[:, None]).T, strict=True))
    tokens = found.num_tokens
    rows = [
        bootstrap_mean(columns["full"], tokens, resamples=setup.resamples).row(
            metric="rule_nats", weights=weights, rule="full", budget=setup.num_layers
        )
    ]
    for budget in rules["uniform"]:
        (uniform,) = (columns[path] for path in rules["uniform"][budget])
        for rule in [name for name in rules if budget in rules[name]]:
            values = np.mean([columns[path] for path in rules[rule][budget]], axis=0)
            labels = {"weights": weights, "rule": rule, "budget": budget}
            rows.append(bootstrap_mean(values, tokens, resamples=setup.resamples).row(metric="rule_nats", **labels))
            if rule != "uniform":
                interval = bootstrap_mean(values - uniform, tokens, resamples=setup.resamples)
                p = round(mean_p(values - uniform, tokens), 6)
                rows.append(interval.row(metric="rule_nats - uniform", p=p, **labels))
    return rows


def _add_q(rows: list[dict[str, Any]], metric: str) -> None:
    tested = [row for row in rows if row["metric"] == metric]
    for row, q in zip(tested, false_discovery([row["p"] for row in tested]), strict=True):
        row["q"] = round(q, 6)
