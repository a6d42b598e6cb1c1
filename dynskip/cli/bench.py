"""``dynskip bench``: the time of steps along paths, beside the time that they should take."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from dynskip.assets import OPT_MINI
from dynskip.benchmark.report import SECTIONS
from dynskip.cli.options import BACKENDS, UserError, add_number, file_path, in_range, set_threads, show_progress
from dynskip.models.shapes import DEFAULT_SHAPE, SHAPES

if TYPE_CHECKING:
    from dynskip.benchmark.suite import Options

HELP = "time steps along paths, beside the time they should take"
DESCRIPTION = "Time prefill and decode along paths on this CPU, in turns with what they are held against."
EXAMPLES = """examples:
  dynskip bench                               everything, at the shapes of OPT-1.3B: minutes, and 11 GiB of memory
  dynskip bench --quick                       fewer rounds
  dynskip bench --only decode,mix --batch 32  two sections at one batch size
  dynskip bench --shape opt-0.2b-24           a smaller model of as many layers
  dynskip bench --shape llama-3.2-1b          another architecture
  dynskip bench --shape opt-mini --rounds 40  a small model, many rounds
  dynskip bench --out bench/results/cpu       also as JSON lines and Markdown, named after shape and machine

sections:
  decode       a decode step against its matrix products with its keys and values, against transformers, and against
               reading all weights once; what else is in its call
  prefill      the prompts of a batch, of --prompt-len and of 512 tokens, against transformers
  paths        one path for all: how much of the speed-up that its products, embedding and head allow
  mix          independent random paths in one batch of 32
  overhead     everything but products and attention as a share of a step
  ctranslate2  a decode step against CTranslate2 in float32, where it is installed; OPT only

All times are medians. What is compared is timed in turns, so that a busy machine disturbs both alike: believe ratios
before milliseconds. Before anything is timed, logits are held against float64.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench``."""
    parser.add_argument("--only", metavar="A,B,...", help=f"sections to run, of {','.join(SECTIONS)} (default: all)")
    parser.add_argument(
        "--shape", choices=(*SHAPES, OPT_MINI), default=DEFAULT_SHAPE, help="model shapes (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=in_range(1, 1024), action="append", metavar="N", help="repeatable (default: 1, 8 and 32)"
    )
    add_number(parser, "--prompt-len", "T", 1, 1024, 64, "tokens of a prompt")
    rounds = parser.add_mutually_exclusive_group()
    add_number(rounds, "--rounds", "N", 1, 200, 8, "rounds of decode steps: small models are noisy, and take no time")
    rounds.add_argument("--quick", action="store_true", help="fewer rounds: less time, more noise")
    parser.add_argument("--out", type=file_path, metavar="DIR", help="also write <shape>-<machine>.jsonl and .md there")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of dynskip (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--json", action="store_true", help="print JSON lines, one a row, in place of a table")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Measure and print; exit status 0 whatever the verdicts: a busy machine is no error."""
    set_threads(args.threads)
    progress = show_progress(args.quiet)

    from dynskip.benchmark.suite import Suite

    report = Suite(options(args, progress)).run()
    if args.json:
        for line in report.lines():
            print(json.dumps(line))
    else:
        print(report.markdown())
    if args.out is not None:
        written = report.write(args.out)
        print(f"written: {', '.join(map(str, written))}")
    return 0


def options(args: argparse.Namespace, progress: bool) -> Options:
    """The benchmark's options as the command line asks for them."""
    from dynskip.benchmark.suite import Options

    sections = tuple(args.only.split(",")) if args.only is not None else SECTIONS
    for name in sections:
        if name not in SECTIONS:
            raise UserError(f"--only must list sections of {', '.join(SECTIONS)}, got {name!r}")
    batches = tuple(dict.fromkeys(args.batch or (1, 8, 32)))
    chosen = Options(
        shape=args.shape,
        batches=batches,
        sections=sections,
        prompt_len=args.prompt_len,
        num_rounds=args.rounds,
        backend=args.backend,
        progress=progress,
    )
    return dataclasses.replace(chosen, num_rounds=2, num_prefill_rounds=1, prefill_s=0.0) if args.quick else chosen
