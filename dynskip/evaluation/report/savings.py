"""How many milliseconds each way to leave layers out saves, in sentences made of the rows of a summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dynskip.evaluation.report.claims import Routers
from dynskip.evaluation.report.evidence import negated
from dynskip.evaluation.report.figures import FAMILIES
from dynskip.evaluation.report.numbers import cell, interval, number
from dynskip.evaluation.report.rows import Row, Summary, families_of, find, select

ORACLE_MIX = "oracle at its matching budget"


def savings(summary: Summary) -> list[str]:
    """A sentence for uniform paths, the oracle, the best router and the fastest controller, each that was timed."""
    sentences: dict[str, Callable[[Row], list[str]]] = {
        "static": lambda section: _static(section, summary["conditions"]),
        "oracle": _oracle,
        "router": _router,
        "controllers": _controllers,
    }
    return [text for name, tell in sentences.items() for text in tell(summary.get(name) or {})]


def _static(section: Row, conditions: Mapping[str, Any]) -> list[str]:
    family = next(iter(families_of(section, metric="ms_saved")), None)
    full = find(section, metric="ms_per_token", family=family, budget=conditions.get("num_layers"))
    if family is None or full is None:
        return []
    parts = [
        f"{row['budget']} layers {_saved(row, plural=True)}"
        for row in select(section, metric="ms_saved", family=family)
        if row["budget"] != conditions["num_layers"]
    ]
    return [
        f"Uniform paths: of the {interval(full)} ms that a token takes along all {conditions['num_layers']} layers in "
        f"a batch of {full.get('batch', conditions.get('timed_batch'))}, {', '.join(parts)}."
    ]


def _oracle(section: Row) -> list[str]:
    lines = []
    for row in select(section, metric="ms_saved", mix=ORACLE_MIX):
        matching = find(section, metric="matching_budget", family=row["family"], control="oracle")
        layers = "" if matching is None else f", {number(matching['value'], 1)} layers on average,"
        lines.append(
            f"With {FAMILIES.get(row['family'], row['family'])}, the depths that the oracle chose to match full depth"
            f"{layers} would {_saved(row, plural=True)} a token; nobody can make that choice beforehand."
        )
    return lines


def _router(section: Row) -> list[str]:
    lines = []
    for family in families_of(section, metric="ms_saved"):
        best = Routers(section, family).best
        if best is None:
            continue
        labels = {"family": family, "predictor": best["predictor"], "at": best["at"]}
        saved = find(section, metric="ms_saved", **labels)
        if saved is not None:
            lines.append(
                f"With {FAMILIES.get(family, family)}, the router that gains most ({best['predictor']} at a budget "
                f"of {best['at']:g} layers) {_saved(saved)} a token, and takes "
                f"{cell(section, 'overhead_ms_single', **labels)} ms to choose the path of a prompt."
            )
    return lines


def _controllers(section: Row) -> list[str]:
    learned = [row for row in select(section, metric="ms_saved") if row.get("kind") != "static"]
    if not learned:
        return []
    fastest = max(learned, key=lambda row: row["value"])
    layers = cell(section, "layers", 1, controller=fastest["controller"])
    return [
        f"The fastest of {len(learned)} learned controllers ({fastest['controller']}) {_saved(fastest)} a token at "
        f"{layers} layers, its own decisions included."
    ]


def _saved(row: Row, plural: bool = False) -> str:
    """What ``row`` saves as a predicate; a negative saving is a cost."""
    if row["value"] >= 0:
        return f"{'save' if plural else 'saves'} {interval(row)} ms"
    return f"{'cost' if plural else 'costs'} {interval(negated(row))} ms more"
