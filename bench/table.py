"""Writes the table of results into the README: no number there is typed by hand.

python bench/table.py          writes it
python bench/table.py --check  exit status 1 where the README shows something else than bench/results holds
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dynskip.benchmark.device_report import read_report

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: written by bench/table.py -->", "<!-- results end -->"


def render(results: Path) -> str:
    """The summaries of all reports in the folder ``results``, of CPUs and cards, by machine."""
    reports = [read_report(path) for path in sorted(results.glob("*.jsonl"))]
    if not reports:
        raise ValueError(
            f"render: {results} must hold a report, got none. Run `dynskip bench --out {results}`, or where there is a "
            f"GPU `make gpu OUT={results}`."
        )
    return "\n".join(report.summary() for report in reports)


def insert(readme: str, table: str) -> str:
    """``readme`` with ``table`` between its two marks."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"insert: readme must hold {BEGIN!r} and then {END!r} once each.")
    head, tail = readme.split(BEGIN)[0], readme.split(END)[1]
    return f"{head}{BEGIN}\n\n{table}\n{END}{tail}"


def main(argv: list[str] | None = None) -> int:
    """Write, or with ``--check`` compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where the README is behind")
    args = parser.parse_args(argv)
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = insert(old, render(ROOT / "bench" / "results"))
    if args.check:
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
