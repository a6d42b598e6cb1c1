"""The tables of peers, from the rows that `bench.peers.run` leaves; `python -m bench.table` writes them into a page."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.peers.plan import CELLS, DYNSKIP, PEERS
from bench.peers.results import Row, read
from bench.peers.weights import SMOLLM2
from bench.peers.workload import MEAN_OUTPUT, PROMPT_LEN, STREAM_BATCH, STREAM_PROMPT_LEN, paper_text
from dynskip.benchmark.report import markdown_table
from dynskip.models.shapes import get_shape

# How many times as fast as vLLM dynskip should be, at least.
_PREFILL = {("prefill", batch, prompt_len): 0.97 for batch in (1, 8) for prompt_len in (64, 512)}
_PAPER = {("stream, paper's depths", None, None): 4.0}
TARGETS = {
    "opt-1.3b": {
        **{("decode", batch, PROMPT_LEN): target for batch, target in ((1, 1.45), (8, 1.5), (32, 1.43))},
        **_PREFILL,
        ("stream", None, None): 1.3,
        **_PAPER,
    },
    "llama-3.2-1b": {**_PREFILL, ("stream", None, None): 1.3, **_PAPER},
    SMOLLM2: {
        **{("decode", batch, PROMPT_LEN): target for batch, target in ((1, 2.2), (8, 2.0), (32, 1.6))},
        **_PREFILL,
        ("stream", None, None): 1.8,
        **_PAPER,
    },
}
# The rows in their order: what is measured, its unit as shown, and what to divide milliseconds or other values by.
_UNITS = {
    "decode": (", ms a step", 1.0),
    "prefill": (", s", 1e3),
    "stream": (", tokens/s", 1.0),
    "stream, paper's depths": (", tokens/s", 1.0),
    "memory": (", GB at most", 1.0),
}


def render(results: Path) -> str:
    """A table for every file of the folder ``results``, with its conditions."""
    paths = sorted(results.glob("*.jsonl"))
    return "\n".join(_table(*read(path)) for path in paths) if paths else "Not measured yet.\n"


def _table(conditions: Row, rows: Sequence[Row]) -> str:
    shape = conditions["shape"]
    names = [peer.name for peer in PEERS[shape] if any(row["peer"] == peer.name for row in rows)]
    found = {(row["peer"], row["what"], row.get("batch"), row.get("prompt_len")): row for row in rows}
    lines = []
    for what, batch, prompt_len in _questions():
        cells = {name: found.get((name, what, batch, prompt_len)) for name in names}
        if any(cells.values()):
            lines.append(_line(shape, what, batch, prompt_len, cells, found))
    if any(row["what"] == "tokens" for row in rows):
        cells = [_tokens(found.get((name, "tokens", None, None))) for name in (DYNSKIP.name, *names)]
        lines.append(["greedy tokens as dynskip's / the best up to rounding", *cells, ""])
    table = markdown_table((shape, DYNSKIP.name, *names, "target over vLLM"), lines, set(range(1, len(names) + 2)))
    text = " ".join(_notes(conditions, rows, names, found))
    return f"{table}\n{textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)}\n"


def _questions() -> Iterator[tuple[str, int | None, int | None]]:
    for batch, prompt_len in CELLS:
        if prompt_len == PROMPT_LEN:
            yield "decode", batch, prompt_len
    for batch, prompt_len in CELLS:
        yield "prefill", batch, prompt_len
    for what in ("stream", "stream, paper's depths", "memory"):
        yield what, None, None


def _line(
    shape: str, what: str, batch: int | None, prompt_len: int | None, cells: dict[str, Row | None], found: Any
) -> list[str]:
    unit, divisor = _UNITS[what]
    ours = [row["ours"] for row in cells.values() if row is not None and "ours" in row]
    label = what + (f" of {prompt_len}" if what == "prefill" else "") + unit + (f", batch {batch}" if batch else "")
    target = TARGETS[shape].get((what, batch, prompt_len))
    shown_target = ""
    if target is not None:
        row = cells.get("vLLM")
        reached = row is not None and "error" not in row and row["value"] >= target
        hidden = not reached and row is not None and round(row.get("value", 0.0), 2) >= target
        by = f" by {target - row['value']:.1g}" if hidden and row is not None else ""  # two digits do not show it
        shown_target = f">= {target:g}x, {'met' if reached else 'missed'}{by}"
    shown = [_shown(row, divisor) if row is not None else "not timed" for row in cells.values()]
    return [label, _number(median(ours) / divisor) if ours else "failed", *shown, shown_target]


def _shown(row: Row, divisor: float) -> str:
    """The peer's own figure, and in brackets how many times as fast dynskip is, with the 95 % interval."""
    if "error" in row:
        return "failed"
    own = _number(row["theirs"] / divisor)
    return own if "value" not in row else f"{own} ({row['value']:.2f}x, {row['low']:.2f}-{row['high']:.2f})"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _tokens(row: Row | None) -> str:
    if row is None:
        return "not checked"
    return "failed" if "error" in row else f"{row['same']} / {row['near']} of {row['of']}"


def _notes(conditions: Row, rows: Sequence[Row], names: Sequence[str], found: Any) -> Iterator[str]:
    versions, depths = conditions["versions"], paper_text(get_shape(conditions["shape"]).num_layers)
    yield (
        f"{'Real' if conditions['shape'] == SMOLLM2 else 'Random'} weights; {conditions['cpu']} "
        f"({conditions['num_cores']} cores), torch {versions['torch']}, commit {conditions['commit']}, "
        f"{conditions['date']}, load {conditions['load'][0]} before. A process each, stopped while the other is timed; "
        f"medians of up to {conditions['rounds']} turns, in brackets how many times as fast dynskip is in the turns "
        "beside that peer, with a 95% bootstrap interval over them; its own column has the turns beside all. "
        f"Decode behind prompts of {PROMPT_LEN}. Streams: {conditions['requests']} "
        f"requests with prompts of {STREAM_PROMPT_LEN} and outputs geometric with a mean of {MEAN_OUTPUT}, at most "
        f"{STREAM_BATCH} of them in a step; at the paper's depths ({depths}) against "
        f"the peer's full depth{_repeats(rows)}. Memory: the most that was resident before the streams."
    )
    if any(row["what"] == "tokens" for row in rows):
        yield (
            "Greedy tokens: how many come before the first that differs from dynskip's, and how many are the best of "
            "float32 logits up to twice the largest error of transformers' bf16 logits at that place."
        )
    for name in (DYNSKIP.name, *names):
        row = found.get((name, "load", None, None))
        if row is not None and "settings" in row:
            # Of libraries the name, without where they are.
            variables = "".join(f", {key}={re.sub('[^:]*/', '', value)}" for key, value in row["env"].items())
            tried = f" Tried: {row['tried']}." if row["tried"] else ""
            # Rows that do not say so come from runs in which it had its default.
            caching = "" if name != DYNSKIP.name or "prefix caching" in row["settings"] else ", prefix caching on"
            yield f"{name} {row['version']}: {row['settings']}{caching}{variables}.{tried}"
    absent = [peer.name for peer in PEERS[conditions["shape"]] if peer.name not in names]
    if absent:
        yield f"Not timed on this machine: {' and '.join(absent)}."
    for peer in PEERS[conditions["shape"]]:
        left_out = [f"{batch} x {prompt_len}" for batch, prompt_len in CELLS if (batch, prompt_len) not in peer.cells]
        if peer.name in names and left_out:
            yield f"Not timed, for the length of the run: {peer.name} at {' and '.join(left_out)}."
    for row in rows:
        if "error" in row:
            about = f"{row['what']}" + (f" at batch {row['batch']}" if "batch" in row else "")
            yield f"Failed, {row['peer']}, {about}: {row['error']}"


def _repeats(rows: Sequence[Row]) -> str:
    """What the intervals of streams are over, and whose were not timed."""
    streams = [row for row in rows if row["what"] == "stream" and "error" not in row]
    if not streams:
        return ": no stream was timed"
    if not any("repeats" in row for row in streams):
        return f", {' and '.join(row['peer'] for row in streams)} alone, intervals over eighths of one stream"
    repeats = ", ".join(f"{row['repeats']} beside {row['peer']}" for row in streams if "repeats" in row)
    return (
        f", whole streams ({repeats}); a closed batch is {STREAM_BATCH} requests in their order, until the longest "
        "output is there"
    )
