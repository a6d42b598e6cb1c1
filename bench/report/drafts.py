"""The page of what drafts gain, from the JSON lines that `bench/drafts.py` leaves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from dynskip.benchmark.report import markdown_table

_HEADER = (
    "row", "model", "draft", "entries", "batch", "requests", "acceptance", "guesses", "tokens given",
    "gain (lowest, highest)", "target", "predicted", "same outputs",
)  # fmt: skip
_BESIDE_HEADER = (
    "model", "first layers", "acceptance, ours and theirs", "guesses, ours and theirs", "over transformers with drafts",
    "over transformers without", "gain of its drafts", "tokens alike", "target",
)  # fmt: skip


def page(conditions: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The result as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items() if version)
    text = (
        "# Drafts: measured\n\n"
        f"Written by `python -m bench.drafts`. bfloat16, {conditions['cpu']}, {conditions['num_cores']} cores, "
        f"{conditions['num_threads']} threads, {versions}.\n"
        "Gains are decode seconds without a draft over those with one, medians of interleaved rounds; greedy.\n"
        "Acceptance is how often the draft's most likely token is the path's, on the path's own texts. At batch 1 one\n"
        "request follows the other.\n\n"
    )
    text += markdown_table(_HEADER, [_cells(row) for row in rows], right={4, 5, 6, 7, 8})
    beside = [row for row in rows if "over_transformers" in row]
    if beside:
        text += (
            "\nBeside transformers' `assistant_early_exit`, batch 1, whole calls, prompt included: the same weights,\n"
            "and the same layers guess. transformers guesses a constant number of tokens a verification, the fastest\n"
            "of those that were tried.\n\n"
        )
        text += markdown_table(_BESIDE_HEADER, [_beside_cells(row) for row in beside], right=set())
    commits: dict[str, list[str]] = {}
    for row in rows:
        commits.setdefault(f"commit {row['commit']}, {row['date']}", []).append(row["row"])
    return text + "\n" + "".join(f"{when}: {', '.join(names)}.\n" for when, names in commits.items())


def key_table(conditions: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The gains of closed batches, a line per model, draft and acceptance, and how they were measured."""
    groups: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        name, _, number = row["row"].rpartition("-")
        if number == str(row["batch"]):  # others are streams
            groups.setdefault((row["model"], name), {})[row["batch"]] = row
    batches = sorted({batch for group in groups.values() for batch in group})
    lines = []
    for (model, _), group in sorted(groups.items()):
        row, *_ = group.values()
        shown = [f"{each:.2f}" for each in sorted(row["acceptance"] for row in group.values())]
        acceptance = "-".join(dict.fromkeys((shown[0], shown[-1])))
        gains = (_gain(group[batch]) if batch in group else "" for batch in batches)
        lines.append([model, row["draft"].split(" layers")[0], row["entries"], acceptance, *gains])
    header = ("model", "layers of the draft", "entries", "acceptance", *(f"batch {batch}" for batch in batches))
    text = (
        f"Decode seconds without a draft over those with one: medians of {rows[0]['rounds']} interleaved rounds, "
        f"bfloat16, {conditions['num_threads']} threads on {conditions['cpu']}. Of opt-mini the weights are its own; "
        "of the others they are random, scaled to an acceptance."
    )
    return f"{markdown_table(header, lines, right=set(range(4, len(header))))}\n{textwrap.fill(text, 120)}\n"


def _gain(row: Mapping[str, Any]) -> str:
    return f"{row['gain']:.2f}x" + ("" if row["gain"] >= row["target"] else " (missed)")


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["row"],
        row["model"],
        row["draft"].split(" layers")[0],
        row["entries"],
        str(row["batch"]),
        str(row["requests"]),
        f"{row['acceptance']:.2f}",
        f"{row['guesses']:.1f}",
        f"{row['given']:.2f}",
        f"{row['gain']:.2f}x ({row['low']:.2f}, {row['high']:.2f})",
        _target(row["target"], row["gain"]),
        f"{row['predicted']:.2f}x",
        f"{row['same_outputs']} of {row['requests']}",
    ]


def _beside_cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["over_transformers_range"]
    return [
        row["model"],
        row["draft"].split(" layers")[0],
        f"{row['acceptance']:.2f}, {row['their_acceptance']:.2f}",
        f"{row['guesses']:.1f}, {row['their_guesses']:.1f}",
        f"{row['over_transformers']:.2f}x ({low:.2f}, {high:.2f})",
        f"{row['over_plain_transformers']:.2f}x",
        f"{row['their_gain']:.2f}x",
        f"{row['tokens_alike']} of {row['tokens']}",
        _target(1.0, row["over_transformers"]),
    ]


def _target(target: float, value: float) -> str:
    return f">= {target:.2f}x" + ("" if value >= target else " (missed)")
