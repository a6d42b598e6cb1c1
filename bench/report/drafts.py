"""The page of what drafts gain, from the JSON lines that `bench/drafts.py` leaves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from bench.speculation.cells import NO_LOSS
from dynskip.benchmark.report import markdown_table
from dynskip.measure.timing import LEAST_ROUNDS

_HEADER = (
    "row", "model", "draft", "entries", "batch", "requests", "acceptance", "seen by the engine", "guesses",
    "tokens given", "guesses a token", "gain (interval)", "control (interval)", "rounds", "target", "predicted",
    "over measured", "same outputs",
)  # fmt: skip
_BESIDE_HEADER = (
    "model", "first layers", "acceptance, ours and theirs", "guesses, ours and theirs", "over transformers with drafts",
    "over transformers without", "gain of its drafts", "tokens alike", "target",
)  # fmt: skip
# Why targets are missed, by machine and row: what a profile of its steps says, each with its entry in bench/LOG.md.
_RAGGED = (
    "steps of all sequences gain 1.36x (four) and 1.34x (eight), but a batch ends with its slowest one: of 40 steps 16 "
    "to 20 have all four, the others one to three at the same price, 7 to 14 are plain"
)
BLAMED: dict[str, dict[str, str]] = {
    "amd-epyc-family-25-model-17-2-cores": {
        "random-0.8-none-4": (
            "8 rows take 1.2 times what 4 take: a guess and its step, 30 and 107 ms, give 1.77 tokens, a plain step of "
            "90 one, which is 1.16x; at the end fewer sequences step, most of them with no guess to make"
        ),
        "random-0.8-none-8": (
            "a plain step of 8 rows takes 95 ms, one of 16 129, a guess 29 as predicted, 43 as calibrated: 1.8 tokens "
            "in 1.66 to 1.81 times the time, 1.08x at most and 0.99x by what the engine knows: no guess is made"
        ),
        "random-0.8-all-8": (
            "1.07x is predicted by the same costs: 16 rows take 1.36 times what 8 take, and a batch ends with its "
            "slowest sequence"
        ),
        "mini-own-4": (
            "a step that verifies 12 or 16 rows takes 1.5 or 1.9 times one of 4: a model of 11.6 M parameters pays for "
            "rows, not bytes. Made to guess two or three each time, runs gain 0.95 to 1.08x. So it does not guess, and "
            "what is left is the price of having a draft: 0.7 % of bookkeeping and asking, and looks at whether it "
            "pays. Its interval reaches 1.00, and that of the control is wider"
        ),
    },
    "intel-r-xeon-r-processor-2-cores": {
        "random-0.8-none-4": _RAGGED,
        "random-0.8-none-8": f"{_RAGGED} (counted with four, not with eight)",
    },
}
# The same of predictions that are off.
_STEPS_ALONE = f"what is predicted is the mean step, and {_RAGGED}"
_LIKE = "what is predicted is the mean step; as random-0.8-none-4, whose steps were counted; these were not"
MISPREDICTED: dict[str, dict[str, str]] = {
    "amd-epyc-family-25-model-17-2-cores": {
        "mini-own-1": (
            "a plain step beside guesses takes 1.10 times one of an engine without drafts (medians of eight runs in "
            "turns), and 5 % of a run with drafts is no step that is learnt from"
        ),
        "mini-path-1": (
            "in another quarter of an hour ten runs gain 1.34x: steps that guess take 3.43 ms for 3.22 tokens, plain "
            "ones 1.46, which is 1.37x, and 0.09 s of a run, in either arm, is no decode step. The row's own control "
            "is 1.05x: its minutes were uneven"
        ),
        "random-0.6-none-1": (
            "not told apart: a run without a draft over another is 0.75 to 1.29x in the same six rounds, which holds "
            "what is predicted; its steps were not counted"
        ),
    },
    "intel-r-xeon-r-processor-2-cores": {
        "random-0.8-none-4": _STEPS_ALONE,
        "random-0.8-none-8": f"{_STEPS_ALONE} (counted with four, not with eight)",
        **dict.fromkeys(("random-0.8-all-4", "random-0.8-all-8", "random-0.6-none-4"), _LIKE),
    },
}
# What predicted gains are held to, over measured ones.
_NEAR = (0.9, 1.1)


def page(conditions: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The result as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items() if version)
    text = (
        "# Drafts: measured\n\n"
        f"Written by `python -m bench.drafts`. bfloat16, {conditions['cpu']}, {conditions['num_cores']} cores, "
        f"{conditions['num_threads']} threads, {versions}.\n"
        "Gains are decode seconds without a draft over those with one, medians of interleaved rounds; greedy.\n"
        "Controls are one run without a draft over another: what no difference at all looks like here. Guesses are\n"
        "those of a step that guesses; guesses a token are all of them over all tokens. Older rows have neither.\n"
        "Acceptance is how often the draft's most likely token is the path's, on the path's own texts; beside it what\n"
        "the engine has seen, - where nothing was guessed. At batch 1 one request follows the other.\n"
        f"In brackets: of {LEAST_ROUNDS} rounds and more the 95 % interval of the median (bootstrap over the rounds);\n"
        "of fewer, and in older rows, the lowest to the highest round.\n"
        f"A target of {NO_LOSS}x (no loss) is met where the bracket reaches it, others by the median.\n"
        "Predicted is the gain of a whole run, by acceptance and by costs of steps as the engine has learnt\n"
        "to correct them before anything was timed; with (steps), in older rows, that of the mean step over one of\n"
        "the same sequences without guesses, by costs alone: but a batch ends with its slowest sequence. It is missed\n"
        f"outside of {_NEAR[0]} to {_NEAR[1]} times the measured one.\n"
    )
    if any(row.get("is_cold") for row in rows):
        text += (
            "Rows that end in cold are first runs: nothing learnt of the model's drafts is kept from one run to the\n"
            "next, and nothing is predicted.\n"
        )
    text += "\n" + markdown_table(_HEADER, [_cells(row) for row in rows], right={4, 5, 6, 7, 8, 9, 10, 13})
    missed = [row["row"] for row in rows if not _is_met(row)]
    if missed:
        text += "\nMissed, and what their steps say:\n\n"
        blamed = BLAMED.get(conditions.get("machine", ""), {})
        text += "".join(f"- {name}: {blamed.get(name, 'not looked into')}.\n" for name in missed)
    off = [row["row"] for row in rows if not _is_predicted(row)]
    if off:
        known = MISPREDICTED.get(conditions.get("machine", ""), {})
        text += "\nPredicted by more than a tenth too much or too little:\n\n"
        text += "".join(f"- {name}: {known.get(name, 'not profiled')}.\n" for name in off)
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


def key_table(machines: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]) -> str:
    """The gains of closed batches, a line per model, draft, acceptance and machine, and how they were measured.

    machines: of each its conditions and its rows.
    """
    groups: dict[tuple[str, str, str], dict[int, Mapping[str, Any]]] = {}
    for conditions, rows in machines:
        for row in rows:
            name, _, number = row["row"].rpartition("-")
            if number == str(row["batch"]):  # others are streams or first runs
                groups.setdefault((row["model"], name, conditions["cpu"]), {})[row["batch"]] = row
    batches = sorted({batch for group in groups.values() for batch in group})
    lines = []
    for (model, _, cpu), group in sorted(groups.items()):
        row, *_ = group.values()
        shown = [f"{each:.2f}" for each in sorted(row["acceptance"] for row in group.values())]
        acceptance = "-".join(dict.fromkeys((shown[0], shown[-1])))
        gains = (_gain(group[batch]) if batch in group else "" for batch in batches)
        lines.append([model, cpu, row["draft"].split(" layers")[0], row["entries"], acceptance, *gains])
    header = ("model", "CPU", "layers of the draft", "entries", "acceptance", *(f"batch {batch}" for batch in batches))
    rounds = sorted({row["rounds"] for group in groups.values() for row in group.values()})
    threads = sorted({conditions["num_threads"] for conditions, _ in machines})
    text = (
        f"Decode seconds without a draft over those with one: medians of {' or '.join(map(str, rounds))} interleaved "
        f"rounds, bfloat16, {' or '.join(map(str, threads))} threads. Of opt-mini the weights are its own; "
        "of the others they are random, scaled to an acceptance. Missed is a target above the gain; one of no loss "
        f"({NO_LOSS}x) is met where the interval of the rounds reaches it. "
        "Why each is missed stands below the tables of all rows."
    )
    return f"{markdown_table(header, lines, right=set(range(5, len(header))))}\n{textwrap.fill(text, 120)}\n"


def in_short(machines: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]) -> str:
    """What drafts gain with opt-mini's own weights, and how many rows miss their targets; as for `key_table`."""
    told = []
    for conditions, rows in machines:
        own = sorted(
            (row for row in rows if row["row"] == f"mini-own-{row['batch']}"), key=lambda row: int(row["batch"])
        )
        if own:
            gains = (f"{_gain(row)} at batch {row['batch']}" for row in own)
            told.append(f"on {conditions['cpu']} {', '.join(gains)}")
    every = [row for _, rows in machines for row in rows]
    missed, off = (sum(not is_met(row) for row in every) for is_met in (_is_met, _is_predicted))
    text = (
        f"Decode seconds without a draft over those with one, of opt-mini, its own weights: {'; '.join(told)}. "
        f"Of {len(every)} rows, most of them on random weights of an acceptance of 0.0 to 0.9, "
        f"{missed} miss their target, and the gain that is predicted is off by more than a tenth in {off}."
    )
    return textwrap.fill(text, 120) + "\n"


def _gain(row: Mapping[str, Any]) -> str:
    return f"{row['gain']:.2f}x" + _verdict(_is_met(row))


def _is_met(row: Mapping[str, Any]) -> bool:
    """Whether a row has its target: one of no loss where the interval reaches it, others by the median."""
    return bool((_bracket(row)[1] if row["target"] == NO_LOSS else row["gain"]) >= row["target"])


def _has_interval(row: Mapping[str, Any]) -> bool:
    """Whether the bounds are those of an interval of the median, not the lowest and the highest round."""
    were_kept = "seconds" in row or len(row.get("gains", ())) >= LEAST_ROUNDS
    return bool(row.get("is_cold")) or (were_kept and row["rounds"] >= LEAST_ROUNDS)


def _bracket(row: Mapping[str, Any]) -> tuple[float, float]:
    """The bounds that a row is shown with."""
    gains = row.get("gains", ())
    return (row["low"], row["high"]) if _has_interval(row) or not gains else (min(gains), max(gains))


def _is_predicted(row: Mapping[str, Any]) -> bool:
    """Whether the gain is near what was predicted, where something was."""
    return row["predicted"] is None or _NEAR[0] <= row["predicted"] / row["gain"] <= _NEAR[1]


def _verdict(is_met: bool) -> str:
    return "" if is_met else " (missed)"


def _cells(row: Mapping[str, Any]) -> list[str]:
    seen, predicted = row.get("acceptance_seen"), ["-", "-"]
    (low, high), between = _bracket(row), ", " if _has_interval(row) else " to "
    if row["predicted"] is not None:
        over = row["predicted"] / row["gain"]
        predicted = [
            f"{row['predicted']:.2f}x" + ("" if row.get("predicted_of") == "run" else " (steps)"),
            f"{over:.2f}" + _verdict(_is_predicted(row)),
        ]
    return [
        row["row"],
        row["model"],
        row["draft"].split(" layers")[0],
        row["entries"],
        str(row["batch"]),
        str(row["requests"]),
        f"{row['acceptance']:.2f}",
        "-" if seen is None or not row["guesses"] else f"{seen:.2f}",
        f"{row['guesses']:.1f}",
        f"{row['given']:.2f}",
        "" if row.get("drafted") is None else f"{row['drafted']:.2f}",
        f"{row['gain']:.2f}x ({low:.2f}{between}{high:.2f})",
        _control(row, between),
        str(row["rounds"]),
        f">= {row['target']:.2f}x" + _verdict(_is_met(row)),
        *predicted,
        f"{row['same_outputs']} of {row['requests']}",
    ]


def _control(row: Mapping[str, Any], between: str) -> str:
    if row.get("control") is None:
        return ""
    return f"{row['control']:.2f}x ({row['control_low']:.2f}{between}{row['control_high']:.2f})"


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
        ">= 1.00x" + _verdict(row["over_transformers"] >= 1),
    ]
