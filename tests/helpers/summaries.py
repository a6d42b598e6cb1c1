"""A summary with every section, made of numbers that follow a rule, for the tests of the report."""

from __future__ import annotations

from typing import Any

from dynskip.evaluation.report.sentences import section_sentences

BUDGETS = (4, 8, 12, 16, 20, 24)


def row(value: float, spread: float | None = None, **labels: Any) -> dict[str, Any]:
    """A row with an interval of ``spread`` to both sides, or without one."""
    bounds = {"low": None, "high": None} if spread is None else {"low": value - spread, "high": value + spread}
    return {**labels, "value": value, **bounds}


def section(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A section of 500 sequences and 3 seeds."""
    return {"n": 500, "seeds": 3, "rows": rows, "notes": ["A note."], **more}


def example_summary() -> dict[str, Any]:
    """All sections as a run writes them."""
    return {
        "schema": 1,
        "conditions": {
            "model": "opt-example",
            "num_layers": 24,
            "num_parameters": 11_053_440,
            "prompts": 500,
            "max_tokens": 128,
            "seeds": 3,
            "timed_batch": 32,
            "siblings": {"4": "aaaa", "24": "bbbb"},
            "versions": {"torch": "2.13.0"},
            "cpu": "a <processor> & more",
        },
        "hidden_states": _hidden_states(),
        "static": _static(),
        "siblings": _siblings(),
        "controllers": _controllers(),
        "oracle": _oracle(),
        "router": _router(),
        "depth": _depth(),
        "cut": ["MLP controllers wider than 24: no time."],
    }


def _hidden_states() -> dict[str, Any]:
    worth = {"uls": 0.1, "rls": 0.25, "rls-first": 0.2, "exit": 0.4}
    rows = []
    for weights in ("paths", "full-tuned"):
        for strategy, loss in worth.items():
            for budget in BUDGETS[:-1]:
                away = loss * (1 - budget / 24)
                labels = {"weights": weights, "strategy": strategy, "budget": budget, "trained": None}
                rows += [
                    row(1 - away, 0.01, metric="cosine_final", **labels),
                    row(1 - away / 2, 0.01, metric="cosine_layers", **labels),
                    row(3 * away, 0.03, metric="kl", **labels),
                ]
        for budget in BUDGETS[:-1]:
            nearer = (worth["exit"] - worth["uls"]) * (1 - budget / 24)
            labels = {"weights": weights, "strategy": "uls - exit", "budget": budget}
            rows.append(row(nearer, 0.005, metric="cosine_final", **labels))
            rows.append(row(nearer / 2 if budget < 20 else -0.002, 0.001, metric="cosine_layers", **labels))
    return section(rows, num_tokens=40_000)


def _static() -> dict[str, Any]:
    rows = []
    for shift, family in enumerate(("paths", "siblings", "untuned")):
        for budget in BUDGETS:
            labels = {"family": family, "budget": budget, "path": "full" if budget == 24 else f"uniform:{budget}"}
            rows.append(row(0.3 - 0.02 * shift - 0.4 / budget / (1 + shift), 0.008, metric="rouge_l", **labels))
            loss = 0.4 / (1 + shift) * (1 / 24 - 1 / budget)
            rows.append(row(loss, 0.0 if budget == 24 else 0.009, metric="rouge_l - full", **labels))
            if family == "paths":
                rows.append(row(0.1 + 0.02 * budget, 0.004, metric="ms_per_token", **labels))
                rows.append(row(0.5 + 0.2 * budget, 0.03, metric="ms_per_token_single", **labels))
                rows.append(row(0.48 - 0.02 * budget, 0.004, metric="ms_saved", **labels))
                rows.append(row(4.8 - 0.2 * budget, 0.03, metric="ms_saved_single", **labels))
    return section(rows)


def _siblings() -> dict[str, Any]:
    worth = {"siblings": 0.8, "untuned": 2.0, "paths": 0.6, "backbone": 3.0}
    rows = [row(20.5, 0.3, metric="matching_budget", family="siblings", never=0.0)]
    for family, loss in worth.items():
        for budget in (8, 12, 24):
            labels = {"family": family, "budget": budget, "path": f"uniform:{budget}"}
            lost = loss * (1 - budget / 24)
            rows.append(row(2 + lost, 0.01, metric="nats", **labels))
            rows.append(
                row(lost, 0.01, metric="nats - full", margin=0.02, p_equivalent=0.9, verdict="higher", **labels)
            )
            if family != "siblings" and budget < 24:
                own = labels | {"family": "siblings"}
                away = (worth["siblings"] - loss) * (1 - budget / 24)
                verdict = "lower" if away < 0 else "higher"
                rows.append(row(away, 0.01, metric=f"nats - {family}", margin=0.02, verdict=verdict, **own))
                rows.append(row(away, 0.01, metric=f"loss - loss of {family}", p=0.0, q=0.0, **own))
    rows.append(row(19.5, 0.3, metric="matching_budget", family="paths", never=0.0))
    return section(rows, notes=["A note.", "Siblings of 8, 12, 24 layers: adapters of rank 16."])


def _controllers() -> dict[str, Any]:
    rows = []

    def add(name: str, layers: float, score: float, **labels: Any) -> None:
        labels = {"controller": name, "parameters": None, "alpha": None, "backbone": None, **labels}
        rows.append(row(score, 0.01, metric="rouge_l", **labels))
        rows.append(row(layers, 0.1, metric="layers", **labels))
        rows.append(row(0.1 + 0.03 * layers, 0.01, metric="ms_per_token", **labels))
        rows.append(row(0.5 + 0.22 * layers, 0.01, metric="ms_per_token_single", **labels))
        rows.append(row(0.48 - 0.03 * layers, 0.01, metric="ms_saved", **labels))
        if labels["kind"] != "static":
            rows.append(row(score - 0.27, 0.012, metric="over_static", **labels))
            rows.append(row(score - 0.28, 0.012, metric="over_fixed", **labels))

    for budget in BUDGETS:
        add(f"uniform:{budget}", budget, 0.3 - 0.4 / budget, kind="static")
    for place, alpha in enumerate((2, 4, 6, 10)):
        for kind, width, score in (("fixed", None, 0.26), ("hidden", None, 0.265), ("mlp", 24, 0.27)):
            add(
                f"{kind} {width or ''} alpha={alpha}",
                18 - 4 * place,
                score + 0.01 * (3 - place),
                kind=kind,
                width=width,
                alpha=alpha,
                parameters=1000 * (width or 1),
                backbone="frozen",
                kv_policy="propagate",
                choice="argmax",
            )
    return section(rows)


def _oracle() -> dict[str, Any]:
    rows, curves, nulls = [], [], []
    candidates = (4, 8, 12, 24)
    budgets = [4 + 0.5 * step for step in range(41)]
    lifts = {"oracle": 0.05, "null": 0.045, "cross-fitted greedy": 0.01, "static mixture": 0.005}
    lifts |= {"in-sample": 0.04, "equal depth": 0.039, "cross-fitted": 0.0, "random, as in-sample": -0.005}
    shares = {"oracle": 1.0, "in-sample": 0.9, "cross-fitted": 0.1, "cross-fitted greedy": 0.2, "equal depth": 0.95}
    for family in ("siblings", "paths"):
        labels = {"family": family}
        for budget in candidates:
            mean = 0.3 - 0.4 / budget
            rows += [
                row(mean, 0.008, metric="mean", budget=budget, **labels),
                row(mean + 0.01 * candidates.index(budget), 0.008, metric="best_up_to", budget=budget, **labels),
                row(mean - 0.02, 0.008, metric="mean_sampled", budget=budget, **labels),
                row(mean + 0.04, 0.008, metric="best_of_draws", budget=budget, **labels),
            ]
        for control in ("oracle", "cross-fitted", "equal depth", "null"):
            rows += [
                row(5.9, 0.2, metric="matching_budget", control=control, **labels),
                row(0.246, 0.01, metric="matching_share", control=control, **labels),
            ]
        for place, at in (("matching", 5.9), ("third", 8.0), ("full", 24.0)):
            for control, share in shares.items():
                control_labels = {**labels, "control": control, "place": place, "at": at}
                rows += [
                    row(0.25 + 0.05 * share, 0.01, metric="score", **control_labels),
                    row(0.25, 0.01, metric="random", **control_labels),
                    row(0.05 * share, 0.01, metric="gain", **control_labels),
                ]
                if control not in ("oracle", "in-sample"):
                    rows.append(row(share, 0.3, metric="surviving_share", reference="oracle", **control_labels))
        for mix, ms in (("4", 0.2), ("24", 0.58), ("oracle at its matching budget", 0.22)):
            rows.append(row(ms, 0.01, metric="ms_per_token", mix=mix, **labels))
            rows.append(row(0.58 / ms, 0.05, metric="speedup", mix=mix, **labels))
            rows.append(row(0.58 - ms, 0.02, metric="ms_saved", mix=mix, **labels))
        for name, lift in lifts.items():
            values = [0.3 - 0.4 / budget + lift * min(1, (budget - 4) / 2) for budget in budgets]
            bounds = {"low": [value - 0.006 for value in values], "high": [value + 0.006 for value in values]}
            curves.append({"family": family, "name": name, "budgets": budgets, "values": values, **bounds})
        means = [0.3 - 0.4 / budget for budget in candidates]
        nulls.append({"family": family, "sd": 0.08, "means": means, "matching_budget": 6.4})
    histogram = [
        {"family": f, "at": 5.9, "counts": {"4": 300, "8": 150, "12": 40, "24": 10}} for f in ("siblings", "paths")
    ]
    return section(rows, curves=curves, null_model=nulls, histogram=histogram, draws=12)


def changed(name: str, change: dict[str, Any], **labels: Any) -> dict[str, Any]:
    """The example summary, the rows of one section with ``labels`` changed."""
    summary = example_summary()
    rows = [r for r in summary[name]["rows"] if all(r.get(label) == wanted for label, wanted in labels.items())]
    assert rows
    for each in rows:
        each.update(change)
    return summary


def text_of(summary: dict[str, Any], name: str) -> str:
    """What a section says in sentences."""
    return "\n".join(section_sentences(summary, name))


def recipe_rows(*verdicts: str, reasons: tuple[str, ...] = ()) -> dict[str, Any]:
    """A section of recipes, one for each verdict, by both scores."""
    rows = []
    for place, verdict in enumerate(verdicts):
        for metric in ("over_fixed", "over_fixed_nats"):
            labels = {"recipe": f"hidden, alpha {place}", "trainings": 3, "runs": 15, "layers": 9.0, "inside": 1.0}
            own = list(reasons) if verdict == "untested" else []
            tested = {"p": 0.01, "q": 0.02 + place, "reasons": own, "verdict": verdict}
            rows.append(row(0.01, 0.005, metric=metric, **labels, **tested))
    rows.append(row(0.3, 0.01, metric="rouge_l", controller="hidden", kind="hidden", choice="argmax"))
    return {"conditions": {}, "controllers": section(rows, noise="by sequence")}


def _router() -> dict[str, Any]:
    rows = []
    for family in ("siblings", "paths"):
        for shift, predictor in enumerate(("logistic", "boosting", "ridge", "transformer")):
            for at in (6.0, 8.0):
                labels = {"family": family, "predictor": predictor, "at": at}
                rows += [
                    row(0.25 + 0.002 * shift, 0.007, metric="rouge_l", **labels),
                    row(0.249, 0.006, metric="random", **labels),
                    row(0.31, 0.007, metric="oracle", **labels),
                    row(0.03 * shift, 0.05, metric="captured_share", **labels),
                    row(at - 0.1, None, metric="layers", **labels),
                    row(0.001 + 0.002 * shift, 0.004, metric="gain", **labels),
                    row(0.03 * at, None, metric="ms_per_token", **labels),
                    row(0.58 - 0.03 * at, 0.01, metric="ms_saved", **labels),
                    row(0.3 + 0.1 * shift, 0.02, metric="overhead_ms_single", **labels),
                    row(0.02, None, metric="overhead_ms_batched", **labels),
                ]
    return section(rows)


def _depth() -> dict[str, Any]:
    rows = []
    for at in (6.0, 8.0):
        labels = {"family": "paths", "at": at}
        for shift, feature in enumerate(("prompt_length", "response_length", "generated_length", "full_loss")):
            rows.append(row(0.05 * shift, 0.08, metric="pearson", feature=feature, **labels))
            rows.append(row(0.04 * shift, 0.08, metric="spearman", feature=feature, **labels))
            for place in range(5):
                bounds = {"bin_low": 20.0 * place, "bin_high": 20.0 * place + 20, "num": 100}
                rows.append(
                    row(at + 0.1 * place * shift, 0.6, metric="binned_depth", feature=feature, **bounds, **labels)
                )
        for place, kind in enumerate(("write", "classify", "question")):
            rows.append(row(at + 0.3 * place, 0.5, metric="mean_depth", task_type=kind, num=120 + place, **labels))
        rows.append(row(0.012, 0.01, metric="explained_by_task", p=0.31, **labels))
        rows.append(row(0.04, 0.08, metric="reliability", **labels))
    return section(rows)
