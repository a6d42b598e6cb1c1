"""What the report says of each section of a summary: figures, tables, the paper's numbers, methods in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dynskip.evaluation.report import figures
from dynskip.evaluation.report import paper_numbers as paper
from dynskip.evaluation.report.document import Block, Figure, Heading, Items, Paragraph, Table
from dynskip.evaluation.report.rows import MISSING, Row, distinct, find, interval, number, select

Summary = Mapping[str, Any]
SAVINGS = "savings"  # no section: told from all of them


def hidden_states(section: Row, summary: Summary) -> list[Block]:
    """Experiment 1."""
    blocks: list[Block] = [
        Paragraph(
            "Is skipping closer than exiting? The full model and the same model along a shallower path read the same "
            "references, teacher-forced; compared are their final hidden states, the states after every layer, and the "
            "predictions, on response tokens only. All in float32, with the final LayerNorm on both sides. The paper "
            "took the states of early exit before that LayerNorm and those of skipping after it, and computed norms in "
            "float16, where they overflow."
        )
    ]
    for weights in distinct(select(section), "weights"):
        named = {
            "paths": "the weights shared by all paths",
            "full-tuned": "weights tuned at full depth only",
        }
        blocks += [
            Figure(
                figures.hidden_states(section, weights),
                f"Similarity to the full model by executed layers: {named.get(weights, weights)}. Bars are 95 % "
                "intervals over sequences. Higher is closer for cosines, lower for KL.",
            ),
            _strategy_table(section, weights),
        ]
    blocks.append(
        Paragraph(
            "Beside the paper: it claims that uniform skipping stays far closer to the full model than early exit, on "
            f"{paper.MODEL}, fine-tuned at full depth only, over 57,882 response tokens of 1,000 sequences. Its "
            "figures are not given as numbers in the material at hand, so only the order can be compared."
        )
    )
    return blocks


def _strategy_table(section: Row, weights: str) -> Table:
    rows = []
    for strategy, label in figures.STRATEGIES.items():
        for budget in distinct(select(section, weights=weights, strategy=strategy), "budget"):
            at = {"weights": weights, "strategy": strategy, "budget": budget}
            cells = [interval(find(section, metric=metric, **at)) for metric in ("cosine_final", "cosine_layers", "kl")]
            rows.append([label, str(budget), *cells])
    return Table(
        "All values", ["strategy", "layers", "cosine, final", "cosine, layers", "KL (nats)"], rows, folded=True
    )


def static(section: Row, summary: Summary) -> list[Block]:
    """Experiment 2, and what the budgets cost in time."""
    num_layers = summary["conditions"]["num_layers"]
    families = distinct(select(section, metric="rouge_l"), "family")
    budgets = sorted({row["budget"] for row in select(section, metric="rouge_l")})
    scores, times = [], []
    for budget in budgets:
        cells = [interval(find(section, metric="rouge_l", family=family, budget=budget)) for family in families]
        scores.append([str(budget), *cells, number(_at_paper(paper.STATIC_ROUGE_L, budget, num_layers), 4)])
        measured = ("ms_per_token", "ms_saved", "ms_per_token_single", "ms_saved_single")
        times.append(
            [str(budget), *(interval(_first(section, families, metric=metric, budget=budget)) for metric in measured)]
        )
    header = ["layers", *(figures.FAMILIES.get(family, family) for family in families), "the paper (OPT-1.3B)"]
    return [
        Paragraph(
            "ROUGE-L F (rouge_score, no stemmer) of greedy outputs along uniform paths. Weights of their own per "
            "budget start from the weights of full depth, as in the paper; one set of weights answers along every "
            "path."
        ),
        Figure(
            figures.static_budgets(section, num_layers),
            "ROUGE-L by executed layers: left absolute, right as a share of each family's own full depth, where models "
            "of different size can be compared. Bars are 95 % intervals over sequences.",
        ),
        Figure(
            figures.wall_clock(section),
            "What the layers cost on this machine: a step of generation divided by its sequences, in a batch of "
            f"{summary['conditions'].get('timed_batch', MISSING)} and alone. A quarter of the layers is not a quarter "
            "of the time: embedding, head and what a step costs besides its layers stay.",
        ),
        Table("ROUGE-L by budget", header, scores),
        Table(
            "Time by budget",
            ["layers", "ms per token, batch", "ms saved", "ms per token, alone", "ms saved"],
            times,
        ),
    ]


def _at_paper(numbers: Mapping[int, float], budget: int, num_layers: int) -> float | None:
    """The paper's number at ``budget`` of as many layers; None for a model of another depth."""
    return numbers.get(budget) if num_layers == paper.NUM_LAYERS else None


def _first(section: Row, families: list[str], **labels: Any) -> Row | None:
    return next(filter(None, (find(section, family=family, **labels) for family in families)), None)


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
                "alone is worth;",
                "**null model**: the candidates' means plus independent noise that knows nothing of the sequence.",
            ]
        ),
    ]
    for family in distinct(select(section), "family"):
        blocks += [
            Heading(figures.FAMILIES.get(family, family).capitalize(), 3),
            Figure(
                figures.oracle(section, family),
                "Mean ROUGE-L at every mean budget. Bands and bars are 95 % intervals over sequences; the dashed line "
                "is full depth. Left all is scored on greedy outputs, right on sampled ones.",
            ),
            *_oracle_tables(section, family, summary["conditions"]["num_layers"]),
        ]
    return blocks


def _oracle_tables(section: Row, family: str, num_layers: int) -> list[Block]:
    def cell(metric: str, digits: int = 3, **labels: Any) -> str:
        return interval(find(section, metric=metric, family=family, **labels), digits)

    candidates = [
        [
            str(budget),
            cell("mean", budget=budget),
            number(_at_paper(paper.STATIC_ROUGE_L, budget, num_layers), 4),
            cell("best_up_to", budget=budget),
            number(_at_paper(paper.BEST_UP_TO, budget, num_layers), 4),
            cell("mean_sampled", budget=budget),
            cell("best_of_draws", budget=budget),
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
    null = f"{number(paper.NULL_MATCHING_SHARE, 2)} (our computation, sd {paper.NULL_SD})"
    papers = {"oracle": f"{paper.MATCHING_BUDGET}, {paper.MATCHING_SHARE}", "null": null}
    matching = [
        [
            str(figures.CONTROLS.get(row["control"], row["control"])),
            # A curve that never reaches the full depth's score has no budget where it does.
            cell("matching_budget", 2, control=row["control"]) if row["value"] is not None else "nowhere",
            cell("matching_share", control=row["control"]),
            papers.get(row["control"], MISSING),
        ]
        for row in section["rows"]
        if row["metric"] == "matching_budget" and row["family"] == family
    ]
    gains = [
        [
            str(figures.CONTROLS.get(row["control"], row["control"])),
            f"{row['at']:g}",
            cell("score", 4, control=row["control"], place=row.get("place")),
            cell("random", 4, control=row["control"], place=row.get("place")),
            interval(row, 4),
            cell("surviving_share", 2, control=row["control"], place=row.get("place")),
        ]
        for row in select(section, metric="gain", family=family)
    ]
    times = [
        [_mix(row), interval(row), cell("ms_saved", mix=row.get("mix")), cell("speedup", 2, mix=row.get("mix"))]
        for row in select(section, metric="ms_per_token", family=family)
    ]
    return [
        Table("Candidates, and the best of them", header, candidates),
        Table(
            "Where the full depth's ROUGE-L is reached", ["", "mean layers", f"of {num_layers}", "the paper"], matching
        ),
        Figure(figures.surviving(section, family), "What of the oracle's gain is left under each control."),
        Table(
            "What of the gain survives",
            ["", "mean layers", "ROUGE-L", "random", "gain", "share of the oracle's gain"],
            gains,
            folded=True,
        ),
        Table(
            "What it costs in time, in a batch",
            ["paths of the batch", "ms per token", "ms saved", "times faster"],
            times,
        ),
    ]


def _mix(row: Row) -> str:
    mix = str(row.get("mix"))
    return f"all {mix} layers" if mix.isdecimal() else mix


def router(section: Row, summary: Summary) -> list[Block]:
    """Experiment 5."""
    quality, cost = [], []
    for row in select(section, metric="rouge_l"):
        at = {"family": row.get("family"), "predictor": row["predictor"], "at": row["at"]}

        def cell(metric: str, digits: int = 3, labels: Mapping[str, Any] = at) -> str:
            return interval(find(section, metric=metric, **labels), digits)

        def value(metric: str, digits: int = 3, labels: Mapping[str, Any] = at) -> str:
            return number((find(section, metric=metric, **labels) or {}).get("value"), digits)

        name = [str(row.get("family")), str(row["predictor"]), f"{row['at']:g}", value("layers", 2)]
        scores = [interval(row), value("random"), value("oracle"), cell("captured_share", 2), cell("over_static", 4)]
        times = [cell("ms_per_token"), cell("ms_saved"), value("speedup", 2)]
        times += [cell("overhead_ms_single"), cell("overhead_ms_batched")]
        quality.append([*name, *scores])
        cost.append([*name, *times])
    shared = ["weights", "predictor", "budget", "layers"]
    return [
        Paragraph(
            "A stand-in for the oracle that sees the prompt only, trained on the oracle's choices on prompts of the "
            "training split. `logistic` and `boosting` learn which path the oracle chose and `ridge` the score of each "
            "path, all from mean token embeddings of the prompt and of its opening words, its length and simple "
            "counts; `transformer` learns the oracle's choice with one encoder layer over the token embeddings in "
            "order. The captured share is (router − random) / (oracle − random): random assignment has the router's "
            "own depths, the oracle the router's own mean cost."
        ),
        Figure(figures.router(section), "Captured share of the oracle's gain with 95 % intervals over sequences."),
        Table(
            "What routers score",
            [*shared, "ROUGE-L", "random", "oracle", "captured share", "over fixed budgets"],
            quality,
        ),
        Table(
            "What routers cost",
            [*shared, "ms per token", "ms saved", "times faster", "routing a prompt, ms", "in a batch, ms"],
            cost,
        ),
    ]


def controllers(section: Row, summary: Summary) -> list[Block]:
    """Experiment 3."""
    quality, cost = [], []
    for row in select(section, metric="rouge_l"):
        name = {"controller": row["controller"]}
        layers = interval(find(section, metric="layers", **name), 2)
        quality.append(
            [
                str(row["controller"]),
                layers,
                interval(row),
                interval(find(section, metric="over_fixed", **name), 4),
                interval(find(section, metric="over_static", **name), 4),
            ]
        )
        cost.append(
            [
                str(row["controller"]),
                f"{row['parameters']:,}" if row.get("parameters") is not None else MISSING,
                str(row.get("kv_policy") or MISSING),
                *(
                    interval(find(section, metric=metric, **name))
                    for metric in ("ms_per_token", "ms_saved", "ms_per_token_single", "ms_saved_single")
                ),
            ]
        )
    paper_rows = [
        [name, str(alpha), number(layers, 1), number(score)] for name, alpha, layers, score in paper.CONTROLLERS
    ]
    return [
        Paragraph(
            "Learned gates choose the layers of each generated token while it is generated; the prompt runs all "
            "layers. A fixed-input gate is a learned constant per layer, a linear one reads the layer's input, an MLP "
            "reads it with a hidden layer of the given width. `over fixed input` is the ROUGE-L minus that of "
            "fixed-input gates at as many layers, interpolated between them and paired by sequence: above zero, the "
            "hidden state helps. In the paper every layer was computed and masked, so no time was saved; here skipped "
            "layers do not run, and the time is measured."
        ),
        Figure(figures.controllers(section), "ROUGE-L of controllers against layers and against time."),
        Table(
            "ROUGE-L of controllers",
            ["controller", "mean layers", "ROUGE-L", "over fixed input", "over uniform paths"],
            quality,
        ),
        Table(
            "What controllers cost",
            [
                *("controller", "parameters", "skipped layers store"),
                *("ms per token, batch", "ms saved", "ms per token, alone", "ms saved"),
            ],
            cost,
        ),
        Table("The paper's controllers (OPT-1.3B)", ["input", "alpha", "mean layers", "ROUGE-L"], paper_rows),
    ]


def depth(section: Row, summary: Summary) -> list[Block]:
    """Experiment 6."""
    blocks: list[Block] = [
        Paragraph(
            "Which sequences does the oracle give more layers? The chosen depth is held against lengths, the full "
            "model's loss on the reference and the type of the task, named by the verb of its instruction. The "
            "**reliability** is the correlation between the depths chosen on two independent sets of sampled outputs: "
            "what is known before anything is generated can correlate with the depths of one such set by no more than "
            "its square root."
        )
    ]
    for family in distinct(select(section), "family"):
        spearman = select(section, metric="spearman", family=family)
        tasks = select(section, metric="mean_depth", family=family)
        blocks += [
            Heading(figures.FAMILIES.get(family, family).capitalize(), 3),
            Figure(
                figures.depth(section, family),
                "Mean chosen depth in bins of equally many sequences, 95 % intervals over sequences.",
            ),
            Figure(figures.correlations(spearman, f"correlations-{family}"), "Rank correlations with 95 % intervals."),
            Table(
                "Correlations with the chosen depth",
                ["feature", "mean budget", "Pearson", "Spearman"],
                [
                    [
                        str(figures.FEATURES.get(row["feature"], row["feature"])),
                        f"{row['at']:g}",
                        interval(find(section, metric="pearson", family=family, at=row["at"], feature=row["feature"])),
                        interval(row),
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
                        ("explained_by_task", "share of its variance between task types"),
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


# In the order of the paper: key in the summary, title, what to say of it.
SECTIONS: dict[str, tuple[str, Callable[[Row, Summary], list[Block]]]] = {
    "hidden_states": ("Hidden states", hidden_states),
    "static": ("Static budgets", static),
    "controllers": ("Controllers", controllers),
    "oracle": ("The oracle and its controls", oracle),
    "router": ("A router that sees the prompt only", router),
    "depth": ("What decides depth", depth),
}

# What a reader came to ask, by the section that answers it.
QUESTIONS = {
    "hidden_states": "Is skipping closer to the full model than exiting?",
    "controllers": "Do hidden states help to choose layers, and from which capacity on?",
    "oracle": "Which share of the oracle's gain survives the controls?",
    "router": "Which share does a router capture that sees the prompt only?",
    SAVINGS: "How many milliseconds does each save?",
    "static": "What do fixed budgets cost?",
    "depth": "What decides how deep a sequence has to go?",
}
