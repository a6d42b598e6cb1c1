"""``dynskip report``: one HTML page, and its Markdown twin, from the summary of a run."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from dynskip.cli.options import UserError, file_path

HELP = "write the report of an evaluation run"
DESCRIPTION = (
    "Write report.html, one page that needs nothing else, and report.md with figures/ into the folder of a run."
)
EXAMPLES = """examples:
  dynskip report runs/paper      writes runs/paper/report.html and runs/paper/report.md
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``report``."""
    parser.add_argument("run", type=file_path, metavar="RUN", help="folder that `dynskip eval --out` filled")


def run(args: argparse.Namespace) -> int:
    """Write both files and say where they are."""
    if find_spec("matplotlib") is None:
        raise UserError("report: matplotlib must be installed. Install it with `pip install dynskip[eval]`.")
    from dynskip.evaluation.report.write import write_report

    for path in write_report(args.run):
        print(path)
    return 0
