"""``dynskip lm_eval``: the command of lm-eval, which knows the model ``dynskip`` then."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec

from dynskip.cli.options import UserError

HELP = "run lm-eval with the model dynskip: tasks along a path"
DESCRIPTION = "Run lm-eval's own command, with `dynskip` among its models. All arguments are lm-eval's."
EXAMPLES = """examples:
  dynskip lm_eval --model dynskip --model_args pretrained=opt-mini,path=uniform:8 --batch_size auto --tasks arc_easy
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what stands for all arguments of lm-eval, its options among them."""
    parser.prefix_chars = "\0"  # no argument is an option of ours
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="see `dynskip lm_eval run --help`"
    )
    parser.set_defaults(help_text=parser.format_help)


def run(args: argparse.Namespace) -> int:
    """Exit status 0, or what lm-eval leaves with."""
    if args.arguments in (["-h"], ["--help"]):
        print(args.help_text(), end="")
        return 0
    if find_spec("lm_eval") is None:
        raise UserError("lm-eval must be installed, got none. Use pip install 'dynskip[lm-eval]'")
    from lm_eval.__main__ import cli_evaluate

    import dynskip.integrations.lm_eval  # noqa: F401  # registers the model

    before, sys.argv = sys.argv, ["lm-eval", *args.arguments]  # it reads nothing else
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0
