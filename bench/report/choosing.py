"""The table of what drawn tokens cost a step over greedy ones, from the JSON lines of `bench/choosing.py`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynskip.benchmark.report import markdown_table


def choosing_tables(paths: Sequence[Path]) -> str:
    """A table a machine: what each draw adds to a step, by shape, and under which conditions."""
    return "\n".join(
        _table([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]) for path in paths
    )


def _table(lines: Sequence[Mapping[str, Any]]) -> str:
    shapes = {line["shape"]: line for line in lines}
    # A shape that was measured again has its last run alone.
    lines = [line for line in lines if line["conditions"] == shapes[line["shape"]]["conditions"]]
    costs = {(line["draw"], line["shape"]): _cell(line) for line in lines}
    cells = [
        (draw, *(costs.get((draw, shape), "") for shape in shapes))
        for draw in dict.fromkeys(line["draw"] for line in lines)
    ]
    header = ("", *(f"{shape}, {line['vocab_size']:,} words" for shape, line in shapes.items()))
    first = lines[0]["conditions"]
    runs = "; ".join(
        f"{shape}: commit {line['conditions']['commit']}, {line['conditions']['date']}, {line['rounds']} rounds, a "
        f"greedy step {line['greedy_ms']:.1f} ms"
        for shape, line in shapes.items()
    )
    note = (
        f"What drawn tokens add to a decode step of {lines[0]['batch']} rows on {first['cpu']}, {first['num_threads']} "
        f"threads, over greedy ones in turns (target: at most {lines[0]['target']:.0%}), with the 95 % interval over "
        f"rounds; of fewer than six it is no more than their range. {runs}."
    )
    wrapped = textwrap.fill(note, 120, break_long_words=False, break_on_hyphens=False)
    return f"{wrapped}\n\n{markdown_table(header, cells, right=set(range(1, len(header))))}"


def _cell(line: Mapping[str, Any]) -> str:
    low, high = line["interval"]
    missed = " (missed)" if line["cost"] > line["target"] else ""
    return f"{line['cost']:+.1%} [{100 * low:.1f}, {100 * high:.1f}]{missed}"
