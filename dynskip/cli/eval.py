"""``dynskip eval``: the experiments of arXiv 2410.20022 on a checkpoint and a data set, with controls and seconds."""

from __future__ import annotations

import argparse
import dataclasses
from importlib.util import find_spec

from dynskip.cli.options import DTYPES, file_path, set_threads

HELP = "run the paper's experiments, resumable, with confidence intervals"
DESCRIPTION = "The experiments of arXiv 2410.20022 on a checkpoint and a data set, with controls and seconds."
EXAMPLES = """examples:
  dynskip eval static --data alpaca_data.json.xz --out runs/eval --prompts 100
      ROUGE-L and milliseconds per token at each budget, on the model shipped with dynskip
  dynskip eval oracle --model runs/base --sibling 4=runs/uls4 --sibling 8=runs/uls8 --sibling 12=runs/uls12 \\
      --sibling 24=runs/full --data alpaca_data.json.xz --out runs/eval
      the oracle and its controls, on one set of weights and on weights tuned for each budget
  dynskip eval all --model runs/base --data alpaca_data.json.xz --out runs/eval
      every experiment; killed and started again, it goes on where it was
  dynskip eval all --model runs/base --data alpaca_data.json.xz --out /shared/eval --executor ray:auto
      the same on a cluster of Ray, whose nodes see the same files
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``eval``."""
    parser.add_argument("experiment", metavar="EXPERIMENT", help="one of them by name (see below), or all")
    parser.add_argument(
        "--out", required=True, type=file_path, metavar="FOLDER", help="run folder, new or to be finished"
    )
    parser.add_argument("--data", required=True, type=file_path, metavar="FILE", help="Alpaca as *.json[.xz]")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="NAME",
        help="folder, of an adapter too, GGUF file, hub id, or opt-mini, shipped with dynskip (the default)",
    )
    model.add_argument(
        "--sibling",
        action="append",
        default=[],
        metavar="BUDGET=NAME",
        help="weights tuned for one budget alone, the full depth among them; give it once a budget",
    )
    model.add_argument(
        "--controller",
        action="append",
        default=[],
        metavar="FOLDER",
        help="a learned controller, as dynskip train wrote it, with the weights it steers; repeatable",
    )
    model.add_argument("--backbone", metavar="NAME", help="the weights before any tuning, to compare with")
    model.add_argument(
        "--searched", type=file_path, metavar="FILE", help="found-paths.json, as dynskip search left it for the model"
    )
    model.add_argument("--rule", help="where the paths of a budget come from: uniform (default) or searched")
    model.add_argument("--template", help="how a prompt is written: short (default), alpaca or chat")
    model.add_argument("--dtype", choices=DTYPES, help="type of the weights that generate (default: bfloat16)")
    model.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cpu)")
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument("--split", help="the part of the data that is scored: train, validation or test (default)")
    sweep.add_argument("--prompts", type=int, metavar="N", help="prompts of the split (default: 500)")
    sweep.add_argument("--train-prompts", type=int, metavar="N", help="prompts to learn from (default: as many)")
    sweep.add_argument(
        "--likelihood-prompts", type=int, metavar="N", help="prompts whose references are scored (default: as many)"
    )
    sweep.add_argument(
        "--rule-prompts", type=int, metavar="N", help="prompts on which rules for layers are compared (default: those)"
    )
    sweep.add_argument(
        "--likelihood-only", action="store_true", help="score references: generate no texts, time nothing"
    )
    sweep.add_argument("--labels", type=file_path, metavar="FILE", help="T0 as *.jsonl[.xz]: labels as a third score")
    sweep.add_argument("--label-prompts", type=int, metavar="N", help="rows with closed labels (default: 500)")
    sweep.add_argument(
        "--margin-rouge-l", type=float, metavar="M", help="of ROUGE-L: differences that count as none (default: 0.01)"
    )
    sweep.add_argument("--margin-nats", type=float, metavar="M", help="the same of nats a token (default: 0.02)")
    sweep.add_argument("--state-prompts", type=int, metavar="N", help="prompts for hidden states (default: as many)")
    sweep.add_argument("--seeds", type=int, metavar="N", help="how often what is drawn is drawn (default: 3)")
    sweep.add_argument(
        "--draws", type=int, metavar="N", help="sampled texts of a prompt along a path (default: four for each seed)"
    )
    sweep.add_argument(
        "--controller-seeds",
        type=int,
        metavar="N",
        help="how often a controller samples its decisions, beside taking the likelier ones (default: 1)",
    )
    sweep.add_argument(
        "--controller-prompts",
        type=int,
        metavar="N",
        help="prompts whose references are scored under controllers (default: as many as along paths)",
    )
    sweep.add_argument("--max-tokens", type=int, metavar="N", help="new tokens at most (default: 128)")
    sweep.add_argument("--temperature", type=float, metavar="T", help="of sampled generations (default: 0.7)")
    sweep.add_argument("--top-p", type=float, metavar="P", help="of sampled generations (default: 1)")
    sweep.add_argument("--budgets", metavar="B,B,...", help="layers of static paths (default: 4,8,12,16,20 out of 24)")
    sweep.add_argument("--candidates", metavar="B,B,...", help="those the oracle chooses from (default: 4,8,12)")
    sweep.add_argument("--shard-size", type=int, metavar="N", help="prompts of one work item (default: 64)")
    sweep.add_argument("--timed-batch", type=int, metavar="N", help="sequences of a timed batch (default: 64)")
    sweep.add_argument("--timed-rounds", type=int, metavar="N", help="how often each batch is timed (default: 12)")
    sweep.add_argument("--resamples", type=int, metavar="N", help="of each bootstrap (default: 1000)")
    sweep.add_argument(
        "--margin-match", type=float, metavar="M", help="the same of the share of right labels (default: 0.02)"
    )
    where = parser.add_argument_group("where items are done")
    where.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that share the work (default: 1); with --executor, items that it is given at a time (default: "
        "1, or twice what a cluster of Ray has room for)",
    )
    where.add_argument(
        "--executor",
        metavar="NAME",
        help="ray:ADDRESS for a cluster of Ray (auto, HOST:PORT), or MODULE:FACTORY, a callable without arguments that "
        "makes a concurrent.futures.Executor",
    )
    where.add_argument(
        "--time-here",
        action="store_true",
        help="time on this machine from now on (default: the one of the run's first start)",
    )
    where.add_argument(
        "--mix-instruction-sets",
        action="store_true",
        help="take items of machines whose greedy tokens may differ now and then",
    )
    where.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads of one process (default: PyTorch's choice)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 after a finished run; a user's mistake is a ValueError or an OSError."""
    for package, module in (
        ("datasets", "datasets"),
        ("rouge-score", "rouge_score"),
        ("scikit-learn", "sklearn"),
        ("scipy", "scipy"),
    ):
        if find_spec(module) is None:
            raise ValueError(
                f"eval: {package} must be installed, got none. Install it with `pip install dynskip[eval]`."
            )
    from transformers.utils import logging

    from dynskip.evaluation.registry import EXPERIMENTS, section_name
    from dynskip.evaluation.report.sentences import section_sentences
    from dynskip.evaluation.run import EvalRun
    from dynskip.evaluation.sweep.setup import Setup

    if args.experiment != "all" and args.experiment not in EXPERIMENTS:
        raise ValueError(f"eval: EXPERIMENT must be all or one of {', '.join(EXPERIMENTS)}, got {args.experiment!r}.")
    set_threads(args.threads)
    logging.disable_progress_bar()
    named = {field.name for field in dataclasses.fields(Setup)} - {
        "data",
        "budgets",
        "candidates",
        "backbone",
        "searched",
    }
    options = {name: value for name, value in vars(args).items() if name in named and value is not None}
    setup = Setup.of(
        args.model,
        args.data,
        parse_siblings(args.sibling),
        _budgets("--budgets", args.budgets),
        _budgets("--candidates", args.candidates),
        args.controller,
        args.searched,
        args.backbone,
        args.labels,
        **options,
    )
    names = list(EXPERIMENTS) if args.experiment == "all" else [args.experiment]
    with EvalRun(
        setup,
        args.out,
        args.workers,
        progress=not args.quiet,
        executor=args.executor,
        mixes_isa=args.mix_instruction_sets,
        times_here=args.time_here,
    ) as evaluation:
        summary = evaluation.run(names)
    for name in names:
        if name in evaluation.left:
            print(
                f"{name}: {evaluation.left[name]} items are left for {evaluation.folder.timed_name}, the machine that "
                "is timed: run the same command there, or here with --time-here"
            )
        else:
            for sentence in section_sentences(summary, section_name(name)):
                print(f"{name}: {sentence}")
    if len(evaluation.left) < len(names):
        print(f"{args.out / 'summary.json'}: every number with its interval")
    return 0


def parse_siblings(pairs: list[str]) -> dict[int, str]:
    """The names of models by budget; ValueError where one is no BUDGET=NAME or a budget comes twice."""
    found: dict[int, str] = {}
    for pair in pairs:
        budget, _, name = pair.partition("=")
        if not budget.isdecimal() or not name or int(budget) in found:
            raise ValueError(
                f"eval: --sibling must be BUDGET=NAME, each budget once, got {pair!r}. Write for example --sibling "
                "4=runs/uls4."
            )
        found[int(budget)] = name
    return found


def _budgets(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"eval: {option} must be layer counts with commas between, got {text!r}.")
    return tuple(int(part) for part in parts)
