"""What the report says of the oracle, of routers that stand in for it, and of the depths that it chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from dynskip.evaluation.report import claims, figures, oracle_figures
from dynskip.evaluation.report import paper_numbers as paper
from dynskip.evaluation.report.document import Block, Figure, Heading, Items, Paragraph, Table
from dynskip.evaluation.report.evidence import ceiling, detectable
from dynskip.evaluation.report.numbers import MISSING, cell, interval, number, percent, signed
from dynskip.evaluation.report.rows import Row, Summary, distinct, families_of, find, score_suffix, select


def oracle(section: Row, summary: Summary) -> list[Block]:
    """Experiment 4 with its controls."""
    draws = section.get("draws", MISSING)
    blocks: list[Block] = [
        Paragraph(
            "The oracle knows the ROUGE-L of every candidate depth for every sequence and spends a mean budget of "
            "layers where it pays most: a multiple-choice knapsack, solved exactly by dynamic programming. Knowing the "
            "outcome also means profiting from its noise, so the controls stand beside it:"
        ),
        Items(
            [
                "**random assignment**: the oracle's own depths dealt to the sequences at random; a gain is what lies "
                "above it;",
                f"**cross-fitted oracle**: depths chosen on the ROUGE-L of one sampled output ({draws} of each "
                "candidate were drawn), judged on another: what is left does not come from the luck of one draw; and "
                "the same with means of many outputs to choose by;",
                "**equal depth**: the same choice among as many sampled outputs of one and the same depth: what luck "
                "alone is worth; and among greedy outputs along as many paths of one depth, what a choice is worth "
                "that has no depth in it;",
                "**null model**: the candidates' means plus independent noise that knows nothing of the sequence.",
            ]
        ),
        Paragraph(
            "**Ceiling**: where the score of a sequence is an expectation of its own and noise, both normal, and a "
            "choice on one draw keeps a share r of its gain on another, a choice that knows the expectations keeps "
            "√r of it, and noise alone shows √(1 − r). "
            "**Seen from**: the true share that an interval as wide would leave zero out of in 80 % of runs."
        ),
    ]
    for family in families_of(section, metric="mean"):
        blocks += [
            Heading(figures.FAMILIES.get(family, family).capitalize(), 3),
            Figure(
                oracle_figures.oracle(section, family),
                "Mean ROUGE-L at every mean budget, on greedy outputs and on sampled ones, and the depths that the "
                "oracle chooses where it reaches full depth's. Bands and bars are 95 % intervals over sequences, the "
                f"null model's over {claims.NUM_NULL_DRAWS} draws of its noise; the dashed line is full depth. Below, "
                "as shares of each model's own full depth, the points that the paper has of OPT-1.3B, another model: "
                "its oracle where nothing can be chosen, where it reaches full depth, and without a limit.",
            ),
            *_oracle_tables(section, family, summary["conditions"]["num_layers"]),
            *_oracle_by_nats(section, family),
        ]
    return blocks


def _oracle_by_nats(section: Row, family: str) -> list[Block]:
    if not select(section, metric="gain_nats", family=family):
        return []
    caption = (
        "By the log-likelihood of references, which has no noise of draws: left what each budget, the best of all up "
        "to it and the oracles score, at the mean layers where they reach full depth's score and at those that they "
        "choose without a limit; right what they gain over dealing their own depths at random, beside the same choice "
        "among as many paths of one depth. Bars are 95 % intervals over sequences."
    )
    return [Figure(oracle_figures.oracle_nats(section, family), caption)]


def _oracle_tables(section: Row, family: str, num_layers: int) -> list[Block]:
    cells = partial(cell, section, family=family)
    candidates = [
        [
            str(budget),
            cells("mean", budget=budget),
            number(paper.at_budget(paper.STATIC_ROUGE_L, budget, num_layers), 4),
            cells("best_up_to", budget=budget),
            number(paper.at_budget(paper.BEST_UP_TO, budget, num_layers), 4),
            cells("mean_sampled", budget=budget),
            cells("best_of_draws", budget=budget),
        ]
        for budget in sorted(distinct(select(section, metric="mean", family=family), "budget"))
    ]
    header = [
        "layers",
        "mean",
        "the paper",
        "best of all up to it",
        "the paper",
        "mean, sampled",
        f"best of {len(candidates)} samples",
    ]
    noise = claims.paper_null()
    null = f"{number(noise.matching_share)} (our computation, sd {number(noise.sd)})"
    papers = {"oracle": f"{paper.MATCHING_BUDGET}, {paper.MATCHING_SHARE}", "null": null}
    matching = [
        [
            str(oracle_figures.CONTROLS.get(row["control"], row["control"])),
            # A curve that never reaches the full depth's score has no budget where it does.
            cells("matching_budget", 2, control=row["control"]) if row["value"] is not None else "nowhere",
            cells("matching_share", control=row["control"]),
            papers.get(row["control"], MISSING),
        ]
        for row in section["rows"]
        if row["metric"] == "matching_budget" and row["family"] == family
    ]
    sampled = claims.Matching(section, family).sampled_oracle
    if sampled is not None and find(section, metric="matching_budget", family=family, control="in-sample") is None:
        found = [oracle_figures.CONTROLS["in-sample"], number(sampled, 2), number(sampled / num_layers), MISSING]
        matching.insert(1, found)
    labels = ("family", "control", "place", "at")
    gains = [
        [
            str(oracle_figures.CONTROLS.get(row["control"], row["control"])),
            f"{row['at']:g}",
            cells("score", 4, control=row["control"], place=row.get("place")),
            cells("random", 4, control=row["control"], place=row.get("place")),
            interval(row, 4),
            *_share_cells(find(section, metric="surviving_share", **{name: row.get(name) for name in labels})),
        ]
        for row in select(section, metric="gain", family=family)
    ]
    times = [
        [_mix(row), interval(row), cells("ms_saved", mix=row.get("mix")), cells("speedup", 2, mix=row.get("mix"))]
        for row in select(section, metric="ms_per_token", family=family)
    ]
    return [
        Table("Candidates, and the best of them", header, candidates),
        Table(
            "Where the full depth's ROUGE-L is reached", ["", "mean layers", f"of {num_layers}", "the paper"], matching
        ),
        Figure(oracle_figures.surviving(section, family), "What of the oracle's gain is left under each control."),
        Table(
            "What of the gain survives",
            ["", "mean layers", "ROUGE-L", "random", "gain", "share of the oracle's gain", "seen from", "ceiling"],
            gains,
            folded=True,
        ),
        Table(
            "What it costs in time, in a batch",
            ["paths of the batch", "ms per token", "ms saved", "times faster"],
            times,
        ),
    ]


def _share_cells(row: Row | None) -> list[str]:
    """A share of the oracle's gain, the share from which on it would have been seen, and the ceiling it stands for."""
    if row is None:
        return [MISSING] * 3
    return [interval(row), _seen_from(row), percent(ceiling(row)) if row["control"] == "cross-fitted" else MISSING]


def _seen_from(row: Row | None, digits: int = 3) -> str:
    """The smallest effect that the width of a row's interval lets be seen; of shares none where it is beyond all."""
    size = None if row is None else detectable(row)
    if size is None:
        return MISSING
    return "none" if size > 1 else number(size, digits)


def _mix(row: Row) -> str:
    mix = str(row.get("mix"))
    return f"all {mix} layers" if mix.isdecimal() else mix


_LEARNED_ON = {"validation": "validation", "train": "training"}


def router(section: Row, summary: Summary) -> list[Block]:
    """Experiment 5."""
    quality, cost = [], []
    for row in select(section, metric="rouge_l"):
        at = {"family": row.get("family"), "predictor": row["predictor"], "at": row["at"]}
        cells: Callable[..., str] = partial(cell, section, **at)
        plain: Callable[..., str] = partial(_plain, section, **at)
        name = [str(row.get("family")), str(row["predictor"]), f"{row['at']:g}", plain("layers", 2)]
        share = find(section, metric="captured_share", **at)
        captured = [interval(share, 2), _seen_from(share, 2)]
        quality.append([*name, interval(row), plain("random"), plain("oracle"), *captured, cells("over_static", 4)])
        overhead = [cells("overhead_ms_single"), cells("overhead_ms_batched")]
        cost.append([*name, cells("ms_per_token"), cells("ms_saved"), plain("speedup", 2), *overhead])
    shared = ["weights", "predictor", "budget", "layers"]
    if score_suffix(section):
        return _router_by_nats(section)
    return [
        Paragraph(
            f"A stand-in for the oracle that sees the prompt only, trained on the oracle's choices on prompts of the "
            f"{_LEARNED_ON.get(section.get('learned_on', ''), 'training')} split. "
            "`logistic` and `boosting` learn which path the oracle chose and `ridge` the score of each "
            "path, all from mean token embeddings of the prompt and of its opening words, its length and simple "
            "counts; `transformer` learns the oracle's choice with one encoder layer over the token embeddings in "
            "order. The captured share is (router − random) / (oracle − random): random assignment has the router's "
            "own depths, the oracle the router's own mean cost. **Seen from**: the true share that an interval as wide "
            "would leave zero out of in 80 % of runs; none where it is more than all of the gain."
        ),
        Figure(
            oracle_figures.router(section), "Captured share of the oracle's gain with 95 % intervals over sequences."
        ),
        Table(
            "What routers score",
            [*shared, "ROUGE-L", "random", "oracle", "captured share", "seen from", "over fixed budgets"],
            quality,
        ),
        Table(
            "What routers cost",
            [*shared, "ms per token", "ms saved", "times faster", "routing a prompt, ms", "in a batch, ms"],
            cost,
        ),
        *_router_by_nats(section),
    ]


def _router_by_nats(section: Row) -> list[Block]:
    """Learning curves of routers that learn from log-likelihoods, and what each scores with the most prompts."""
    blocks: list[Block] = []
    for family in families_of(section, metric="captured_share_nats"):
        captured = select(section, metric="captured_share_nats", family=family)
        most = max(distinct(captured, "size"))
        cells = []
        for row in captured:
            if row["size"] == most:
                at = {name: row[name] for name in ("family", "predictor", "features", "size", "at")}
                scores = [find(section, metric=metric, **at) for metric in _NATS]
                nats = [MISSING if found is None else number(-found["value"]) for found in scores]
                reads = oracle_figures.READS.get(row["features"], row["features"])
                layers = cell(section, "layers_nats", 2, **at)
                over = signed(find(section, metric="over_static_nats", **at))
                cells.append([row["predictor"], reads, layers, *nats, interval(row, 2), _seen_from(row, 2), over])
        blocks += [
            Figure(
                oracle_figures.learning_curves(section, family),
                "What routers are worth by the prompts that they learned from, on the log-likelihood of references: "
                "left the captured share of the oracle's gain over the router's own depths dealt at random, right the "
                "nats a token gained over the best mix of fixed budgets of the same mean cost, the constant rule; "
                "level strokes are the oracle's at each router's cost. Bars are 95 % intervals over sequences. "
                "Routers read embeddings of the prompt, the full model's state at its end, both, or entropy.",
            ),
            Table(
                f"What routers score, learned from {most:,} prompts, in nats a token",
                ["predictor", "reads", "layers", *_NATS.values(), "captured share", "seen from", "over fixed budgets"],
                cells,
            ),
        ]
    return blocks


_NATS = {"score_nats": "router", "random_nats": "random", "oracle_nats": "oracle"}


def _plain(section: Row, metric: str, digits: int = 3, **labels: Any) -> str:
    return number((find(section, metric=metric, **labels) or {}).get("value"), digits)


# What is said of p-values, by whether ties are among the sequences: so it was before they were left out.
_ADJUSTED = {
    True: "**p (Holm)** is adjusted for all rank correlations of this section but the yardstick's, with errors taken "
    "as normal from the intervals.",
    False: "**q** is the p-value of the rank correlation, ties left out, adjusted by Benjamini and Hochberg for all "
    "rank correlations of this section, over scores and within types of task, but the yardsticks'.",
}


def _within(rows: Mapping[tuple[str, float, str], Row], row: Row) -> list[str]:
    """The correlation of ``row`` within types of task, and its q; nothing where a run has no such rows."""
    own = rows.get((row["family"], row["at"], row["feature"]))
    return [interval(own), number((own or {}).get("q"))] if rows else []


def _depth_by_nats(section: Row, family: str, score: str) -> list[Block]:
    """The figure of the depths by the other score, where there are both."""
    if score or not select(section, metric="binned_depth_nats", family=family):
        return []
    caption = "The same of the depths that an oracle chooses by the log-likelihood of references."
    return [Figure(oracle_figures.depth(section, family, "_nats"), caption)]


def depth(section: Row, summary: Summary) -> list[Block]:
    """Experiment 6."""
    blocks: list[Block] = [
        Paragraph(
            "Which sequences does the oracle give more layers? The chosen depth is held against lengths, the full "
            "model's loss on the reference and the type of the task, named by the verb of its instruction. The "
            "**reliability** is the correlation between the depths chosen on two independent sets of sampled outputs: "
            "what is known before anything is generated can correlate with the depths of one such set by no more than "
            f"its square root. {_ADJUSTED[claims.Correlations(section).ties]} "
            "**Seen from**: the true correlation that an interval as "
            "wide would leave zero out of in 80 % of runs, uncorrected."
        )
    ]
    tested, score = claims.Correlations(section), score_suffix(section)
    adjusted = {
        (row["family"], row["at"], row["feature"]): number(p)
        for row, p in zip(tested.rows, tested.adjusted, strict=True)
    }
    within = {
        (row["family"], row["at"], row["feature"]): row for row in select(section, metric=f"spearman_within{score}")
    }
    for family in families_of(section):
        spearman = select(section, metric=f"spearman{score}", family=family)
        tasks = select(section, metric=f"mean_depth{score}", family=family)
        blocks += [
            Heading(figures.FAMILIES.get(family, family).capitalize(), 3),
            Figure(
                oracle_figures.depth(section, family),
                "Mean chosen depth in bins of equally many sequences, 95 % intervals over sequences.",
            ),
            *_depth_by_nats(section, family, score),
            Figure(
                oracle_figures.correlations(spearman, f"correlations-{family}"),
                "Rank correlations with 95 % intervals.",
            ),
            Table(
                "Correlations with the chosen depth",
                [
                    "feature",
                    "mean budget",
                    "Pearson",
                    "Spearman",
                    "p (Holm)" if tested.ties else "q",
                    "seen from",
                    *(["Spearman within types of task", "q within"] if within else []),
                ],
                [
                    [
                        str(figures.FEATURES.get(row["feature"], row["feature"])),
                        f"{row['at']:g}",
                        cell(section, f"pearson{score}", family=family, at=row["at"], feature=row["feature"]),
                        interval(row),
                        adjusted.get((family, row["at"], row["feature"]), MISSING),
                        _seen_from(row, 2),
                        *_within(within, row),
                    ]
                    for row in spearman
                ],
            ),
            Table(
                "Mean chosen depth by type of task",
                ["type", "mean budget", "sequences", "mean depth"],
                [[str(row["task_type"]), f"{row['at']:g}", str(row["num"]), interval(row, 2)] for row in tasks],
            ),
            Table(
                "Reliability, and what the type of task explains",
                ["what", "mean budget", "value", "p (permutation)"],
                [
                    [label, f"{row['at']:g}", interval(row), number(row.get("p"))]
                    for metric, label in (
                        ("reliability", "reliability of the chosen depth"),
                        (f"explained_by_task{score}", "share of its variance between task types"),
                    )
                    for row in select(section, metric=metric, family=family)
                ],
            ),
        ]
    low, high = paper.DEPTH_LENGTH_PEARSON
    blocks.append(
        Paragraph(
            f"Beside the paper: Pearson's r of chosen depth and response length, 95 % interval [{number(low)}, "
            f"{number(high)}] over {paper.NUM_TEST:,} sequences."
        )
    )
    return blocks
