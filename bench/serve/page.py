"""The table of what serving costs, from the rows that `bench.serve_overhead` leaves."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.peers.results import Row, read
from bench.peers.workload import depths_text, paper_paths, paper_text
from dynskip.benchmark.report import markdown_table
from dynskip.models.shapes import get_shape

BEGIN, END = "<!-- cost of serving: written by bench/table.py -->", "<!-- cost of serving end -->"
SHORT_BEGIN, SHORT_END = "<!-- served: written by bench/table.py -->", "<!-- served end -->"
_SHOWN_LOAD = "80%"  # in short
_MISSED = "\\*"
# Tokens/s of the server over those of `Engine`, at least.
TARGETS = {"opt-1.3b": 0.95, "smollm2-135m": 0.85, "smollm2-135m-paths": 0.85}

# Until then a server was held up for 0.27 s by each collection of garbage.
_FROZEN = "2026-11-27 05:04 UTC"


def tables(results: Path) -> str:
    """A page for every file of the folder ``results``."""
    paths = sorted(results.glob("*.jsonl"))
    return "\n".join(page(*read(path)) for path in paths) if paths else "Not measured yet.\n"


def short(results: Path) -> str:
    """What each server of the folder ``results`` can do, and how long its clients wait: a table of few columns."""
    lines, dates, older = [], [], []
    for path in sorted(results.glob("*.jsonl")):
        conditions, rows = read(path)
        found = {(row["peer"], row["what"]): row for row in rows if "error" not in row}
        about = [_of_layers(conditions), conditions["cpu"]]
        for peer in dict.fromkeys(row["peer"] for row in rows):
            capacity, waits = found.get((peer, "capacity")), found.get((peer, f"latency, {_SHOWN_LOAD}"))
            if capacity is not None and waits is not None:
                depth = "full depth" if peer == "vLLM" else "paper's depths"
                figures = [_percentiles(waits[name]) for name in ("ttft_ms", "tpot_ms")]
                costs = _costs(conditions, found, depth) if peer == "cohort" else ""
                lines.append([*about, peer, depth, f"{capacity['tokens_per_s']:.0f}", *figures, costs])
        deep = found.get(("server", "overhead, full depth, streams"))
        if deep is not None:
            speed = f"{deep['ours']:.0f}" if ("cohort", "capacity") in found else ""
            if not speed:  # a mix whose waits were not timed
                shallow = "paper's depths"
                lines.append([*about, "cohort", shallow, "", "", "", _costs(conditions, found, shallow)])
            lines.append([*about, "cohort", "full depth", speed, "", "", _costs(conditions, found, "full depth")])
        dates.append(conditions["date"])
        if _older(conditions, rows):
            older.append(f"{conditions['shape']} on {conditions['cpu']}")
    if not lines:
        return "Not measured yet.\n"
    over = "of Engine's tokens/s: whole answers / streams"
    heads = (
        "model",
        "CPU",
        "server",
        "runs",
        "tokens/s at most",
        "ms to the first token",
        "ms a token behind it",
        over,
    )
    note = (
        f"bfloat16, 2 threads, no prefix caching; measured from {min(dates)} to {max(dates)}. {_MISSED} misses its "
        f"target: {TARGETS['opt-1.3b']} of the tokens/s that `Engine` gives the same requests at OPT-1.3B shapes, "
        f"{TARGETS['smollm2-135m']} for SmolLM2."
    )
    if older:
        note += f" Waits of {' and '.join(older)} are those of a server that did not call `gc.freeze` yet."
    return f"{markdown_table(heads, lines, {4, 5, 6, 7})}\n{textwrap.fill(note, 120)}\n"


def _of_layers(conditions: Row) -> str:
    """The model, and the layers of the mix."""
    num_layers = conditions.get("num_layers") or get_shape(conditions["shape"]).num_layers
    depths = conditions.get("depths") or [(path.budget, share) for path, share in paper_paths(num_layers)]
    return f"{conditions['shape']}, {'/'.join(str(depth) for depth, _ in depths)} of {num_layers} layers"


def _costs(conditions: Row, found: Mapping[tuple[str, str], Row], depth: str) -> str:
    """The server's tokens/s over those of `Engine`, of whole answers and of streams."""
    target = TARGETS.get(conditions["shape"])
    rows = [found.get(("server", f"overhead, {depth}, {what}")) for what in ("whole answers", "streams")]
    shown = (
        "" if row is None else f"{row['value']:.3f}" + _MISSED * (target is not None and row["value"] < target)
        for row in rows
    )
    return " / ".join(shown) if any(rows) else ""


def page(conditions: Row, rows: Sequence[Row]) -> str:
    """One shape: overhead, waits, and under what conditions."""
    parts = [_overhead(conditions, rows), _waits(conditions, rows)]
    text = textwrap.fill(" ".join(_notes(conditions, rows)), 120, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*filter(None, parts), f"{text}\n"])


def _overhead(conditions: Row, rows: Sequence[Row]) -> str:
    lines = []
    target = TARGETS.get(conditions["shape"])
    for row in rows:
        kind, _, what = row["what"].partition(", ")
        if kind != "overhead" or "error" in row:
            continue
        shown = "" if target is None else f">= {target:.2f}x, {'met' if row['value'] >= target else 'missed'}"
        ratio = f"{row['value']:.3f}x, {row['low']:.3f}-{row['high']:.3f}"
        speeds = [f"{row[name]:.0f}" for name in ("theirs", "ours")]
        lines.append([what, *speeds, ratio, shown, f"{row['client_cpu']:.0%}", f"{row['server_cpu']:.0%}"])
    heads = (conditions["shape"], "Engine, tokens/s", "server, tokens/s", "server over Engine", "target")
    return markdown_table((*heads, "client's CPU", "server's CPU"), lines, {1, 2, 3, 5, 6}) if lines else ""


def _waits(conditions: Row, rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        kind, _, load = row["what"].partition(", ")
        if kind != "latency" or "error" in row:
            continue
        figures = [_percentiles(row[name]) for name in ("ttft_ms", "tpot_ms", "gap_ms")]
        lines.append([row["peer"], load, f"{row['rate']:.2f}", *figures, f"{row['client_cpu']:.0%}"])
    heads = (conditions["shape"], "load", "requests/s", "ms to the first token", "ms a token", "ms between pieces")
    return markdown_table((*heads, "client's CPU"), lines, {1, 2, 3, 4, 5, 6}) if lines else ""


def _weights(conditions: Row) -> str:
    return "Real weights" if conditions["shape"].startswith("smollm2") else "Random weights"


def _depths(conditions: Row) -> str:
    """The layers of the mix; rows that do not name their paths ran the paper's, scaled to the shape."""
    if "mix" not in conditions:
        return paper_text(get_shape(conditions["shape"]).num_layers)
    return f"{depths_text(conditions['num_layers'], conditions['depths'])}, {conditions['mix']}"


def _bursts(rows: Sequence[Row]) -> str:
    """How often a server's capacity was measured; rows that do not say it, once."""
    most = max((len(row.get("bursts", ())) for row in rows), default=0)
    return f"the middle one of {most} bursts, all servers in turns" if most else "a burst"


def _percentiles(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.1f}" if value < 100 else f"{value:.0f}" for value in values)


def _older(conditions: Row, rows: Sequence[Row]) -> str:
    """What waits of a run before `_FROZEN` do not tell of."""
    has_waits = any(row["what"].startswith("latency, ") for row in rows)
    return (
        " Waits of a server before its memory was frozen, whose 99th percentile is not that of today's code."
        if has_waits and conditions["date"] < _FROZEN
        else ""
    )


def _notes(conditions: Row, rows: Sequence[Row]) -> Iterator[str]:
    versions = conditions["versions"]
    yield (
        f"{_weights(conditions)} in bfloat16; {conditions['cpu']} ({conditions['num_cores']} cores), "
        f"{conditions['num_threads']} threads, torch {versions['torch']}, commit {conditions['commit']}, "
        f"{conditions['date']}, load {conditions['load'][0]} before. Prompts of {conditions['prompt_len']} token ids, "
        f"outputs geometric with a mean of {conditions['mean_output']}, greedy; the paper's depths "
        f"({_depths(conditions)}), or full depth. CPU: shares of one core; the client is a process of its own on the "
        "same cores."
    )
    if any(row["what"].startswith("overhead, ") for row in rows):
        yield (
            f"Overhead: {conditions['requests']} requests (a quarter of them at full depth), all there at once, "
            f"through Engine and through the server in {conditions['rounds']} turns, one process stopped while the "
            "other runs; with a 95% bootstrap interval over turns; whole answers, and streams of single tokens."
        )
    if any(row["what"].startswith("latency, ") for row in rows):
        shares = ", ".join(
            f"{row['peer']} {row['requests_per_s']:.2f}"
            for row in rows
            if row["what"] == "capacity" and "error" not in row
        )
        by_name = ", or of what the named server has" if any("% of " in row["what"] for row in rows) else ""
        yield (
            "Waits: percentiles 50 / 90 / 99 of requests that arrive at random (Poisson) for "
            f"{conditions['budget_s']:g} s at that share of what the server has served in {_bursts(rows)} (requests/s: "
            f"{shares}){by_name}, streamed; the first tenth is not counted. vLLM runs full depth, the others the "
            f"paper's.{_older(conditions, rows)}"
        )
    for row in rows:
        if row["what"] == "load":
            yield f"{row['peer']} {row['version']}: {row['settings']}."
        if "error" in row:
            yield f"Failed, {row['peer']}, {row['what']}: {row['error']}"
