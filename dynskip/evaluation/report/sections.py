"""What the report says of each section of a summary: figures, tables, the paper's numbers, methods in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dynskip.evaluation.report import claims, figures, oracle_sections
from dynskip.evaluation.report import paper_numbers as paper
from dynskip.evaluation.report.curves import training_curves
from dynskip.evaluation.report.document import Block, Figure, Paragraph, Table
from dynskip.evaluation.report.evidence import detectable
from dynskip.evaluation.report.likelihood_table import likelihoods
from dynskip.evaluation.report.numbers import MISSING, cell, interval, number, percent, signed
from dynskip.evaluation.report.rows import Row, Summary, distinct, families_of, find, score_suffix, select
from dynskip.evaluation.report.sibling_sections import siblings
from dynskip.evaluation.report.step_times import StepTimes

# What a token takes and what it saves, by metric.
TIMES = {
    "ms_per_token": "ms per token, batch",
    "ms_saved": "ms saved",
    "ms_per_token_single": "ms per token, alone",
    "ms_saved_single": "ms saved",
}


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
        blocks += [
            Figure(
                figures.hidden_states(section, weights),
                f"Distance from the full model by executed layers: {figures.WEIGHTS.get(weights, weights)}. Lower is "
                f"closer. Bars are 95 % intervals over sequences.{_of_tokens(section)}",
            ),
            *_trajectory(section, weights),
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


def _of_tokens(section: Row) -> str:
    return " Of final states it is the geometric mean over tokens." if select(section, metric="log_distance") else ""


def _trajectory(section: Row, weights: str) -> list[Block]:
    if not select(section, metric="trajectory", weights=weights):
        return []
    caption = (
        f"Distance from the full model after each layer: {figures.WEIGHTS.get(weights, weights)}. A layer that is left "
        "out passes its state on, early exit repeats its last one. Where states are the same there is no point."
    )
    return [Figure(figures.trajectories(section, weights), caption)]


def _strategy_table(section: Row, weights: str) -> Table:
    rows = []
    for strategy, label in figures.STRATEGIES.items():
        for budget in distinct(select(section, weights=weights, strategy=strategy), "budget"):
            at = {"weights": weights, "strategy": strategy, "budget": budget}
            cells = [cell(section, metric, **at) for metric in ("cosine_final", "cosine_layers", "kl")]
            rows.append([label, str(budget), *cells])
    header = ["strategy", "layers", "cosine, final", "cosine, layers", "KL (nats)"]
    return Table("All values", header, rows, folded=True)


def static(section: Row, summary: Summary) -> list[Block]:
    """Experiment 2, and what the budgets cost in time."""
    blocks = [] if score_suffix(section) else _by_texts(section, summary)
    return [*blocks, *_by_nats(section, summary), *_by_labels(section, summary)]


def _by_texts(section: Row, summary: Summary) -> list[Block]:
    num_layers = summary["conditions"]["num_layers"]
    families = families_of(section, metric="rouge_l")
    budgets = sorted({row["budget"] for row in select(section, metric="rouge_l")})
    scores, times = [], []
    for budget in budgets:
        cells = [cell(section, "rouge_l", family=family, budget=budget) for family in families]
        scores.append([str(budget), *cells, number(paper.at_budget(paper.STATIC_ROUGE_L, budget, num_layers), 4)])
        timed = (_first(section, families, metric=metric, budget=budget) for metric in TIMES)
        times.append([str(budget), *map(interval, timed)])
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
            "of different size can be compared. Bars are 95 % intervals over sequences, on the right of the paired "
            "difference to full depth over full depth's mean.",
        ),
        Figure(
            figures.wall_clock(section),
            "What the layers cost on this machine: a step of generation divided by its sequences, in a batch of "
            f"{summary['conditions'].get('timed_batch', MISSING)} and alone. A quarter of the layers is not a quarter "
            "of the time: embedding, head and what a step costs besides its layers stay.",
        ),
        Table("ROUGE-L by budget", header, scores),
        Table(
            "ROUGE-L minus that of full depth, paired, and the loss that would have been seen in 80 % of runs",
            ["layers", *(text for family in families for text in (figures.FAMILIES.get(family, family), "seen from"))],
            [[str(budget), *_losses(section, families, budget)] for budget in budgets if budget != num_layers],
        ),
        Table("Time by budget", ["layers", *TIMES.values()], times),
    ]


def _by_nats(section: Row, summary: Summary) -> list[Block]:
    """By the log-likelihood of references: budgets, what tuning changes, and the rules for the layers of a budget."""
    if not select(section, metric="nats"):
        return []
    families = families_of(section, metric="nats")
    budgets = sorted({row["budget"] for row in select(section, metric="nats")}, reverse=True)
    names = [figures.FAMILIES.get(family, family) for family in families]
    times, paths = StepTimes(summary), {row["budget"]: row.get("path") for row in select(section, family="paths")}
    blocks: list[Block] = [
        Figure(
            figures.likelihoods(section),
            "Minus the log-likelihood of a token of the reference, teacher-forced. Bars are 95 % intervals over "
            "sequences; on the right the rules that name the layers of a budget, without any tuning for them.",
        ),
        Table(
            "Nats a token by budget",
            ["layers", times.header, *names],
            [
                [
                    str(budget),
                    times.cell(paths.get(budget)),
                    *(cell(section, "nats", family=family, budget=budget) for family in families),
                ]
                for budget in budgets
            ],
        ),
        Paragraph(_TIMES_OF_PATHS),
        Table(
            "Nats minus those at full depth, paired, and the difference that would have been seen in 80 % of runs",
            ["layers", *(text for name in names for text in (name, "seen from", "verdict"))],
            [
                [str(budget), *(text for family in families for text in _paired(section, "full", family, budget))]
                for budget in budgets
                if budget != summary["conditions"]["num_layers"]
            ],
        ),
    ]
    if select(section, metric="nats - backbone"):
        blocks.append(
            Table(
                "Nats minus those before tuning, along the same path, paired",
                ["layers", "difference", "seen from", "verdict"],
                [[str(budget), *_paired(section, "backbone", "paths", budget)] for budget in budgets],
            )
        )
    for weights in distinct(select(section, metric="rule_nats"), "weights"):
        at = {"metric": "rule_nats", "weights": weights}
        rules = [rule for rule in figures.RULES if find(section, rule=rule, **at)]
        cells = [
            [str(budget), *(cell(section, rule=rule, budget=budget, **at) for rule in rules)]
            for budget in sorted(distinct(select(section, rule="uniform", **at), "budget"), reverse=True)
        ]
        header = ["layers", *(figures.RULES[rule] for rule in rules)]
        blocks.append(Table(f"Nats a token by rule, weights: {weights}", header, cells))
    return blocks


def _by_labels(section: Row, summary: Summary) -> list[Block]:
    """The share of closed labels that are chosen right, beside what is right without reading; none without labels."""
    families = families_of(section, metric="label_match")
    if not families:
        return []
    names = [figures.FAMILIES.get(family, family) for family in families]
    budgets = sorted({row["budget"] for row in select(section, metric="label_match - full")}, reverse=True)
    cells = [
        [
            str(budget),
            *(
                text
                for family in families
                for text in _labels_at(section, family, budget, budget == summary["conditions"]["num_layers"])
            ),
        ]
        for budget in budgets
    ]
    rules = ((rule, find(section, metric="label_match", rule=rule)) for rule in ("chance", "majority"))
    told = ", ".join(f"{rule} {percent(row, 1)}" for rule, row in rules if row is not None)
    num_rows = summary["conditions"].get("label_prompts", MISSING)
    return [
        Paragraph(
            f"Closed labels: of {num_rows} rows of T0 the share whose right label is the likeliest of its template's. "
            f"Without reading a row: {told}; majority is the label that is right most often in the same rows."
        ),
        Table(
            "Right labels by budget, minus those at full depth, paired, and the difference that would have been seen",
            ["layers", *(text for name in names for text in (name, "minus full depth", "seen from", "verdict"))],
            cells,
        ),
    ]


def _labels_at(section: Row, family: str, budget: int, is_full: bool) -> list[str]:
    found = find(section, metric="label_match", family=family, budget=budget)
    row = find(section, metric="label_match - full", family=family, budget=budget)
    rest = (
        [MISSING] * 3 if is_full or row is None else [signed(row, 3), number(detectable(row), 3), str(row["verdict"])]
    )
    return [percent(found, 1), *rest]


_TIMES_OF_PATHS = (
    "Milliseconds are those of a decode step along the path, with one set of weights for all paths, divided by the "
    "sequences of the batch."
)


def _paired(section: Row, against: str, family: str, budget: int) -> list[str]:
    """The cells of a paired difference of nats: the value, the effect that would be seen, the verdict."""
    row = find(section, metric=f"nats - {against}", family=family, budget=budget)
    return [MISSING] * 3 if row is None else [signed(row, 4), number(detectable(row), 4), str(row["verdict"])]


def _losses(section: Row, families: list[str], budget: int) -> list[str]:
    """The cells of one budget: by family the paired difference to full depth and the loss that would be seen."""
    cells = []
    for family in families:
        row = find(section, metric="rouge_l - full", family=family, budget=budget)
        cells += [MISSING, MISSING] if row is None else [signed(row, 4), number(detectable(row), 4)]
    return cells


def _first(section: Row, families: list[str], **labels: Any) -> Row | None:
    return next(filter(None, (find(section, family=family, **labels) for family in families)), None)


# What a comparison with fixed input is, by whether it is one of recipes: so it was of single controllers before.
_OVER_FIXED = {
    False: "`over fixed input` is the ROUGE-L minus that of fixed-input gates at as many layers, interpolated between "
    "them and paired by sequence; it is untested where no fixed-input gate runs as many, so that the full pass stands "
    "in for one.",
    True: "A recipe, all its trainings and draws of noise together, is held against the measured frontier of "
    "fixed-input recipes at as many layers, with intervals over trainings, draws and sequences; beyond the layers of "
    "the fixed input it is untested.",
}


def _recipe_table(found: claims.Controllers) -> list[Block]:
    """Each comparison of a recipe with the frontier of fixed input."""
    if not found.recipes:
        return []
    scores = {"over_fixed": "ROUGE-L", "over_fixed_nats": "log-likelihood"}
    cells = [
        [
            str(row["recipe"]),
            scores[row["metric"]],
            number(row["layers"], 2),
            f"{row['trainings']} × {row['runs'] // max(row['trainings'], 1)}",
            signed(row, 4),
            number(row.get("detectable"), 4),
            number(row["q"]),
            row["verdict"] + (f" ({', '.join(row['reasons'])})" if row["reasons"] else ""),
        ]
        for row in found.recipes
    ]
    header = ["recipe", "score", "layers", "trainings × draws", "over fixed input", "seen from", "q", "verdict"]
    return [Table("Recipes against fixed input at as many layers", header, cells)]


_BESIDE_THE_PAPER = (
    "Beside it the ROUGE-L that the paper reports of its own, along static paths with weights of their own. Bars are "
    "95 % intervals over sequences."
)


def controllers(section: Row, summary: Summary) -> list[Block]:
    """Experiment 3."""
    how = (
        "A fixed-input gate is a learned constant per layer, a linear one reads the layer's input, an MLP reads it "
        "with a hidden layer of the given width."
    )
    if score_suffix(section):
        return _controllers_by_nats(section, how, StepTimes(summary))
    quality, cost = [], []
    found = claims.Controllers(section)
    for row in select(section, metric="rouge_l"):
        name = {"controller": row["controller"]}
        over = find(section, metric="over_fixed", **name)
        over_fixed = "untested" if over is not None and row["controller"] in found.beyond else interval(over, 4)
        over_static = cell(section, "over_static", 4, **name)
        layers = cell(section, "layers", 2, **name)
        quality.append([str(row["controller"]), layers, interval(row), over_fixed, over_static])
        parameters = f"{row['parameters']:,}" if row.get("parameters") is not None else MISSING
        times = (cell(section, metric, **name) for metric in TIMES)
        cost.append([str(row["controller"]), parameters, str(row.get("kv_policy") or MISSING), *times])
    paper_rows = [
        [name, str(alpha), number(layers, 1), number(score)] for name, alpha, layers, score in paper.CONTROLLERS
    ]
    return [
        Paragraph(
            "Learned gates choose the layers of each generated token while it is generated; the prompt runs all "
            f"layers. {how} {_OVER_FIXED[bool(found.recipes)]} "
            "In the paper every layer was computed and masked, so no time was saved; here skipped layers do not run, "
            "and the time is measured."
        ),
        Figure(
            figures.controllers(section, ""),
            f"ROUGE-L of controllers by layers and by time. {_BESIDE_THE_PAPER}",
        ),
        *_skip_rates(section),
        Table(
            "ROUGE-L of controllers",
            ["controller", "mean layers", "ROUGE-L", "over fixed input", "over static paths"],
            quality,
        ),
        *_recipe_table(found),
        *training_curves(section),
        Table("What controllers cost", ["controller", "parameters", "skipped layers store", *TIMES.values()], cost),
        Table("The paper's controllers (OPT-1.3B)", ["input", "alpha", "mean layers", "ROUGE-L"], paper_rows),
        *likelihoods(section),
    ]


def _controllers_by_nats(section: Row, how: str, times: StepTimes) -> list[Block]:
    """Experiment 3 where nothing was generated. how: what gates there are. times: along static paths."""
    cells = []
    for row in select(section, metric="nats"):
        name = {"controller": row["controller"]}
        layers = cell(section, "layers_nats", 2, **name)
        parameters = f"{row['parameters']:,}" if row.get("parameters") is not None else MISSING
        over = cell(section, "over_static_nats", 4, **name)
        ms = times.cell(str(row["controller"]) if row.get("kind") == "static" else None)
        cells.append([_controller_name(row), parameters, layers, ms, interval(row, 4), over])
    header = [
        "controller",
        "parameters",
        "mean layers",
        times.header,
        "nats a token",
        "log-likelihood over static paths",
    ]
    return [
        Paragraph(
            "Learned gates choose the layers of each token of a reference, teacher-forced; the prompt runs all layers, "
            f"but the path's along a static path. {how} {_OVER_FIXED[True]}"
        ),
        Figure(
            figures.controllers(section, "_nats"),
            "Minus the log-likelihood of a token of the reference under controllers, and along static paths as far as "
            "controllers reach, by layers. "
            f"{_BESIDE_THE_PAPER}",
        ),
        *_skip_rates(section),
        Table("Nats a token under controllers", header, cells),
        Paragraph(_TIMES_OF_PATHS),
        *_recipe_table(claims.Controllers(section)),
        *training_curves(section),
    ]


def _skip_rates(section: Row) -> list[Block]:
    if not select(section, metric=f"skip_rate{score_suffix(section)}"):
        return []
    return [
        Figure(figures.skip_rates(section), "Which layers controllers leave out: white none of the tokens, black all.")
    ]


def _controller_name(row: Row) -> str:
    """A controller's own name; of a path that is known by its layers their number."""
    name = str(row["controller"])
    kind, _, layers = name.partition(":")
    return f"static path of {len(layers.split(','))} layers" if kind == "layers" else name


def _by_both_scores(tell: Callable[[Row, Summary], list[Block]]) -> Callable[[Row, Summary], list[Block]]:
    """What ``tell`` says of a section, and then its log-likelihoods."""
    return lambda section, summary: [*tell(section, summary), *likelihoods(section)]


# In the order of the paper: key in the summary, title, what to say of it.
SECTIONS: dict[str, tuple[str, Callable[[Row, Summary], list[Block]]]] = {
    "hidden_states": ("Hidden states", _by_both_scores(hidden_states)),
    "static": ("Static budgets", _by_both_scores(static)),
    "siblings": ("Weights of their own for each budget", siblings),
    "controllers": ("Controllers", controllers),
    "oracle": ("The oracle and its controls", _by_both_scores(oracle_sections.oracle)),
    "router": ("A router that sees the prompt only", _by_both_scores(oracle_sections.router)),
    "depth": ("What decides depth", _by_both_scores(oracle_sections.depth)),
}
