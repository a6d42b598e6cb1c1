"""Writes ``report.html``, ``report.md`` and the figures that it links into the folder of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynskip.evaluation.report import claims
from dynskip.evaluation.report import paper_numbers as paper
from dynskip.evaluation.report.document import Block, Figure, Heading, Items, Paragraph, Table, to_html, to_markdown
from dynskip.evaluation.report.numbers import MISSING, number
from dynskip.evaluation.report.paper_claims import claims_table, tally
from dynskip.evaluation.report.rows import score_suffix, select
from dynskip.evaluation.report.savings import savings
from dynskip.evaluation.report.sections import SECTIONS
from dynskip.evaluation.report.sentences import section_sentences
from dynskip.evaluation.report.sentences.oracle_controls import paper_null
from dynskip.evaluation.report.short import in_short

SUMMARY = "summary.json"


def write_report(run: Path) -> tuple[Path, Path]:
    """The paths of the HTML page and of its Markdown twin, both written from the summary in the folder ``run``.

    The Markdown links the figures as SVG files, which are written into the folder ``figures`` beside it.
    """
    summary = read_summary(run)
    title, subtitle, blocks = report_blocks(summary)
    for block in blocks:
        if isinstance(block, Figure):
            path = run / block.drawing.path
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.drawing.svg + "\n", encoding="utf-8")
    pages = (run / "report.html", run / "report.md")
    for path, text in zip(pages, (to_html(title, subtitle, blocks), to_markdown(title, subtitle, blocks)), strict=True):
        path.write_text(text, encoding="utf-8")
    return pages


def read_summary(run: Path) -> dict[str, Any]:
    """The summary of a run; raises OSError or ValueError where there is none that can be read."""
    path = run / SUMMARY
    if not path.is_file():
        raise FileNotFoundError(
            f"read_summary: run must be a folder with {SUMMARY}, got {str(run)!r}. Run `dynskip eval` with --out first."
        )
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"read_summary: {path} must hold JSON, got: {error}.") from error
    if not isinstance(summary, dict) or not isinstance(summary.get("conditions"), dict):
        raise ValueError(
            f"read_summary: {path} must hold an object with conditions, got {type(summary).__name__}. "
            "Run `dynskip eval` again to write it."
        )
    return summary


def report_blocks(summary: Mapping[str, Any]) -> tuple[str, str, list[Block]]:
    """Title, subtitle and blocks of the report of ``summary``."""
    conditions = summary["conditions"]
    title = f"Dynamic layer selection on {conditions.get('model', 'an unnamed model')}"
    num_run = sum(1 for key in SECTIONS if (summary.get(key) or {}).get("rows"))
    which = "All" if num_run == len(SECTIONS) else f"{num_run} of {len(SECTIONS)}"
    subtitle = (
        f"{which} experiments of arXiv 2410.20022, Dynamic layer selection in decoder-only transformers, rerun on one "
        "checkpoint, with 95 % intervals, the controls that the paper lacked, and seconds beside layers."
    )
    blocks: list[Block] = [
        Heading("In short"),
        Items(in_short(summary)),
        Heading("Which of the paper's claims hold here", 3),
        Paragraph(paper_null()),
        Paragraph(tally(summary)),
        claims_table(summary),
        *_conditions(summary),
        *_limits(summary),
    ]
    for key, (name, section_blocks) in SECTIONS.items():
        blocks.append(Heading(name))
        section = summary.get(key)
        if not section or not section.get("rows"):
            blocks.append(Paragraph(f"**Not run**: this run has no section `{key}`.", missing=True))
            continue
        if told := section_sentences(summary, key):
            blocks.append(Items(told))
        num_seeds = section["seeds"]
        seeds = f", {num_seeds} seed{'' if num_seeds == 1 else 's'}" if num_seeds else ""
        alone = (
            " This section scores references alone: for it no text was generated, and nothing timed."
            if score_suffix(section)
            else ""
        )
        scored = section.get("n_nats")
        more = f", log-likelihoods of {scored:,}" if scored and scored != section["n"] else ""
        blocks.append(Paragraph(f"{section['n']:,} sequences{more}{seeds}.{alone}"))
        blocks += section_blocks(section, summary)
        if section.get("notes"):
            blocks += [Heading("Notes", 3), Items(section["notes"])]
    if saved := savings(summary):
        blocks += [Heading("Milliseconds"), Items(saved)]
    cut = summary.get("cut") or []
    blocks.append(Heading("What was cut"))
    blocks.append(Items(cut) if cut else Paragraph("Nothing is noted as cut."))
    return title, subtitle, blocks


def _limits(summary: Mapping[str, Any]) -> list[Block]:
    """What a model much smaller than the paper's can say about it, and what it cannot."""
    num_parameters = summary["conditions"].get("num_parameters")
    if num_parameters is None or num_parameters > paper.NUM_PARAMETERS / 4:
        return []
    num_layers = summary["conditions"].get("num_layers")
    means = select(summary.get("static") or {}, metric="rouge_l", family="paths")
    spread = ""
    if len(means) > 1 and means[-1].get("budget") == num_layers:
        first, last = paper.STATIC_ROUGE_L[4], paper.STATIC_ROUGE_L[paper.NUM_LAYERS]
        spread = (
            f" From {means[0]['budget']} layers to all {num_layers} ROUGE-L moves from {number(means[0]['value'])} to "
            f"{number(means[-1]['value'])} here, and from 4 to {paper.NUM_LAYERS} from {number(first)} to "
            f"{number(last)} in the paper."
        )
    times = round(paper.NUM_PARAMETERS / num_parameters)
    return [
        Heading("What this model can say about OPT-1.3B, and what not"),
        Items(
            [
                f"It has {num_parameters:,} parameters, OPT-1.3B about {times:,} times as many.{spread} The "
                "nearer the depths' scores lie together, the less an oracle has but luck to choose by: what survives "
                "the controls here is no estimate of what would survive there.",
                "It **can** say that an oracle's gain means nothing before it is held against the controls, that each "
                "control, router and controller runs, what those cost that are timed, and how far the paper's own "
                "reasoning carries where its numbers are repeated on another model by the same protocol.",
                "It **cannot** say how large an effect is on OPT-1.3B, which budget is enough there, or from which "
                "capacity on a hidden state would help: a larger model has more to lose with a layer, and weights "
                "trained along paths are made to be skipped.",
                "Milliseconds are those of this machine. Matrices as small as these leave more of a step to what is no "
                "matrix product; the larger the model, the nearer time comes to layers.",
            ]
        ),
    ]


def _conditions(summary: Mapping[str, Any]) -> list[Block]:
    conditions = summary["conditions"]
    rows = [[name.replace("_", " "), _text(value)] for name, value in conditions.items()]
    trainings = claims.Controllers(summary.get("controllers") or {}).num_trainings
    compared = [
        ["model", str(conditions.get("model", MISSING)), paper.MODEL],
        ["parameters", _text(conditions.get("num_parameters")), f"{paper.NUM_PARAMETERS:,}"],
        ["layers", _text(conditions.get("num_layers")), "24"],
        ["test prompts", _text(conditions.get("prompts")), f"{paper.NUM_TEST:,}"],
        ["new tokens at most", _text(conditions.get("max_tokens")), f"{paper.MAX_TOKENS}"],
        ["sampled outputs of a prompt and path", _text((summary.get("oracle") or {}).get("draws")), MISSING],
        ["seeds of routers and of random layers", _text(conditions.get("seeds")), "1"],
        ["trainings of each controller", str(trainings or MISSING), MISSING],
    ]
    return [
        Heading("What was run"),
        Table("What differs from the paper", ["", "this run", "the paper"], compared),
        Table("All conditions", ["", ""], rows, folded=True),
    ]


def _text(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items()) or MISSING
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or MISSING
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:,}"
    return str(value)
