"""Writes tables of results into README.md and pages of docs: no number in them is typed by hand.

python -m bench.table          writes them
python -m bench.table --check  exit status 1 where a page shows something else than bench/results holds
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from bench.peers.table import render as peers_tables
from bench.report.choosing import choosing_tables
from bench.report.cpu import cpu_tables
from bench.report.device import DeviceReport
from bench.report.drafts import in_short as drafts_in_short
from bench.report.drafts import key_table as drafts_table
from bench.report.overview import overview
from bench.report.serving import key_table, serving_tables
from bench.serve.page import BEGIN as SERVED_BEGIN
from bench.serve.page import END as SERVED_END
from bench.serve.page import SHORT_BEGIN, SHORT_END, short
from bench.serve.page import tables as served_tables
from dynskip.benchmark.report import Report
from dynskip.evaluation.report.paper_claims import tally
from dynskip.evaluation.report.sentences.oracle_controls import paper_null
from dynskip.evaluation.report.short import in_short
from dynskip.evaluation.report.write import read_summary

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: written by bench/table.py -->", "<!-- results end -->"
PEERS_BEGIN, PEERS_END = "<!-- peers: written by bench/table.py -->", "<!-- peers end -->"
OVERVIEW_BEGIN, OVERVIEW_END = "<!-- overview: written by bench/table.py -->", "<!-- overview end -->"
KEY_BEGIN, KEY_END = "<!-- streams: written by bench/table.py -->", "<!-- streams end -->"
SERVING_BEGIN, SERVING_END = "<!-- serving: written by bench/table.py -->", "<!-- serving end -->"
DRAFTS_BEGIN, DRAFTS_END = "<!-- drafts: written by bench/table.py -->", "<!-- drafts end -->"
PAPER_BEGIN, PAPER_END = "<!-- paper: written by bench/table.py -->", "<!-- paper end -->"
PAPER_RUN = "paper-smollm2"  # the folder of results whose report the README tells in short
CARDS_HEADING = "## On a GPU\n"
# What `bench/serving.py` and `bench/drafts.py` leave.
SERVING_FILES, DRAFTS_FILES = "serving*.jsonl", "drafts/*.jsonl"


def render(results: Path) -> str:
    """The tables of all reports in the folders ``cpu``, ``choosing`` and ``gpu`` of ``results``, by machine or card."""
    cpus = {path: Report.read(path) for path in sorted((results / "cpu").glob("*.jsonl"))}
    cards = [DeviceReport.read(path).summary() for path in sorted((results / "gpu").glob("*.jsonl"))]
    if not cpus and not cards:
        raise ValueError(
            f"render: {results} must hold a report, got none. Run `dynskip bench --out {results / 'cpu'}`, or where "
            f"there is a GPU `make gpu OUT={results / 'gpu'}`."
        )
    tables = [cpu_tables(cpus, "../bench/results/cpu")] if cpus else []
    draws = sorted((results / "choosing").glob("*.jsonl"))
    tables += [choosing_tables(draws)] if draws else []
    return "\n".join([*tables, *([CARDS_HEADING] if cards else []), *cards])


def insert(readme: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """``readme`` with ``table`` between its two marks."""
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
        raise ValueError(f"insert: readme must hold {begin!r} and then {end!r} once each.")
    head, tail = readme.split(begin)[0], readme.split(end)[1]
    return f"{head}{begin}\n\n{table}\n{end}{tail}"


def fill(readme: str, results: Path) -> str:
    """``readme`` with its tables, and its sentences on the paper, as the folder ``results`` has them."""
    readme = insert(readme, overview(results, _streams(results)), OVERVIEW_BEGIN, OVERVIEW_END)
    readme = insert(readme, short(results / "serve"), SHORT_BEGIN, SHORT_END)
    readme = insert(readme, paper_sentences(results / PAPER_RUN), PAPER_BEGIN, PAPER_END)
    return insert(readme, drafts_in_short(drafts(results)), DRAFTS_BEGIN, DRAFTS_END)


def fill_measured(page: str, results: Path) -> str:
    """``page``, the one on steps and other engines, with its tables as the folder ``results`` has them."""
    return insert(insert(page, render(results)), peers_tables(results / "peers"), PEERS_BEGIN, PEERS_END)


def paper_sentences(run: Path) -> str:
    """What opens the report of ``run``, made anew from its summary: five sentences, the null, and how claims do."""
    summary = read_summary(run)
    lines = [
        textwrap.fill(text, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        for text in in_short(summary)
    ]
    told = textwrap.fill(f"{paper_null()} {tally(summary)}", 120, break_on_hyphens=False)
    return "\n".join([*lines, "", told, ""])


def drafts(results: Path) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The conditions and rows of each machine on which `bench/drafts.py` has run."""
    files = (path.read_text(encoding="utf-8").splitlines() for path in sorted(results.glob(DRAFTS_FILES)))
    return [(conditions, rows) for conditions, *rows in (map(json.loads, lines) for lines in files)]


def fill_drafts(page: str, results: Path) -> str:
    """``page``, the one on drafts, with its table as the folder ``results`` has it."""
    return insert(page, drafts_table(drafts(results)), DRAFTS_BEGIN, DRAFTS_END)


def fill_serving(page: str, results: Path) -> str:
    """``page``, the one on serving, with its tables as the folder ``results`` has them."""
    page = insert(page, key_table(_streams(results)), KEY_BEGIN, KEY_END)
    page = insert(page, serving_tables(_streams(results), "../bench/results"), SERVING_BEGIN, SERVING_END)
    return insert(page, served_tables(results / "serve"), SERVED_BEGIN, SERVED_END)


def _streams(results: Path) -> list[Path]:
    return sorted(results.glob(SERVING_FILES))


# The pages that show results, and how each is filled.
PAGES = {
    ROOT / "README.md": fill,
    ROOT / "docs" / "measured.md": fill_measured,
    ROOT / "docs" / "serving.md": fill_serving,
    ROOT / "docs" / "speculation.md": fill_drafts,
}


def main(argv: list[str] | None = None) -> int:
    """Write, or with ``--check`` compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page is behind")
    args = parser.parse_args(argv)
    status = 0
    for path, fill_page in PAGES.items():
        old = path.read_text(encoding="utf-8")
        new = fill_page(old, ROOT / "bench" / "results")
        if args.check:
            status = max(status, int(new != old))
        else:
            path.write_text(new, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
