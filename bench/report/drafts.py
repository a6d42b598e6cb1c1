"""The page of what drafts gain, from the JSON lines that `bench/drafts.py` leaves."""

from __future__ import annotations

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
