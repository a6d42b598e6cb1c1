"""``dynskip search``: which layers a model can do without, found on some of its prompts and judged on others."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from dynskip.cli.options import (
    UserError,
    add_model_options,
    add_number,
    check_readable,
    check_writable,
    file_path,
    load_llm,
    set_threads,
    show_progress,
)

HELP = "find which layers a model can do without"
DESCRIPTION = "Search paths of a model on its own chat prompts, and judge them on others beside static rules."
EXAMPLES = """examples:
  dynskip search smollm2-135m-instruct --data alpaca_data.json.xz --budget 27,25,20
      remove the layer that costs least, again and again, down to 20 layers
  dynskip search runs/chat --data alpaca_data.json.xz --method swap --budget 20
      then exchange layers as long as that helps
  dynskip search runs/chat --data t0_train_50k.jsonl.xz --score speed --all
      the draft that guesses tokens for the full path fastest
  dynskip search runs/chat --adapter runs/lora --data alpaca_data.json.xz
      paths of the model with an adapter; kept beside the adapter
  dynskip generate --model runs/chat --path found:20 --chat "Why does bread rise?"
      what the result is for; draft="auto" of LLM.generate takes the draft

methods:
  influence   leave out the layers whose output is most like their input
  greedy      remove the layer without which the score is best, again and again
  swap        greedy, then exchange a kept and a left-out layer while the score improves

scores:
  loss        nats a token of the reference answers
  agreement   how often the likeliest token is the full path's own greedy one
  speed       what the path gains as a draft for the full path, with entries of its own or reading the full path's

Killed and started again, it goes on where it was. Uniform and exit paths are kept where they are better than what the
method finds.
"""
# The shares of the layers that are searched where no budget is given; drafts are shallower.
_SHARES = {"loss": (5 / 6, 2 / 3, 1 / 2), "speed": (5 / 6, 2 / 3, 1 / 2, 1 / 3, 1 / 6)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``search``."""
    parser.add_argument(
        "--data",
        required=True,
        type=file_path,
        metavar="FILE",
        help="Alpaca as *.json[.xz], T0 or your own as *.jsonl[.xz]",
    )
    budgets = parser.add_mutually_exclusive_group()
    budgets.add_argument("--budget", metavar="B,B,...", help="layers of the paths (default: 5/6, 2/3 and 1/2 of them)")
    budgets.add_argument("--all", action="store_true", help="paths of all numbers of layers")
    parser.add_argument("--score", choices=("loss", "agreement", "speed"), default="loss", help="(default: loss)")
    parser.add_argument("--method", choices=("influence", "greedy", "swap"), default="greedy", help="(default: greedy)")
    add_number(parser, "--rows", "N", 1, 4096, 48, "rows to search on")
    add_number(parser, "--judge-rows", "N", 1, 4096, 48, "other rows, to judge on")
    add_number(parser, "--seed", "N", 0, 2**31 - 1, 1, "draws the rows")
    parser.add_argument(
        "--out", type=file_path, metavar="FOLDER", help="of measures and results (default: in the user's cache)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_model_options(parser, positional=True)


def run(args: argparse.Namespace) -> int:
    """Search, judge, print; exit status 0 whatever is found."""
    check_readable(args.data, "--data")
    for package in ("matplotlib", "scipy"):
        if find_spec(package) is None:
            raise UserError(
                f"search: {package} must be installed, got none. Install it with `pip install dynskip[eval]`."
            )
    set_threads(args.threads)
    progress = show_progress(args.quiet)

    from dynskip.files import cache_folder, write_text
    from dynskip.found import FOUND_PATHS
    from dynskip.models.found import place_to_keep
    from dynskip.paths import LayerPath
    from dynskip.search.frontier import FAMILIES
    from dynskip.search.report import figure, table
    from dynskip.search.run import FIGURE, RESULT, PathSearch, SearchOptions

    llm = load_llm(args)
    model = llm.model
    if llm.tokenizer is None:
        raise UserError(f"{args.model} must come with a tokenizer, got none beside it")
    budgets = _budgets(args, model.num_layers)
    options = SearchOptions(budgets, args.score, args.method, args.rows, args.judge_rows, args.seed)
    folder: Path = args.out or cache_folder() / "search" / model.weights_digest[:16]
    for path in (folder / RESULT, place_to_keep(model.weights_digest, model.weights_folder)):
        check_writable(path, "Name another folder with --out, or set DYNSKIP_CACHE to one of your own.")
    result = PathSearch(model, llm.tokenizer, args.data, options, folder, progress).run()
    write_text(folder / FIGURE, figure(result.rows, FAMILIES) + "\n")
    print(table(result.rows, FAMILIES))
    for budget in sorted(result.found.layers, reverse=True):
        print(f"found:{budget:<4} {LayerPath(model.num_layers, result.found.layers[budget])}")
    draft = result.found.draft
    if draft is not None:
        print(
            f"draft: {LayerPath(model.num_layers, draft.layers)}, {draft.entries} entries, right {draft.agreement:.1%} "
            f"of the time, {draft.gain:.2f} times the tokens a second, predicted"
        )
    elif result.found.searched_draft:
        print('draft: none pays on this device; draft="auto" is none')
    print(f"written: {folder / RESULT}, {folder / FIGURE}, and what {FOUND_PATHS} holds to {result.kept}")
    return 0


def _budgets(args: argparse.Namespace, num_layers: int) -> tuple[int, ...]:
    """The budgets that were asked for, the largest first."""
    if args.all:
        return tuple(range(num_layers - 1, 0, -1))
    if args.budget is None:
        shares = _SHARES.get(args.score, _SHARES["loss"])
        found = {round(share * num_layers) for share in shares}
        return tuple(sorted({budget for budget in found if 1 <= budget < num_layers}, reverse=True))
    parts = args.budget.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"--budget must be layer counts with commas between, got {args.budget!r}")
    return tuple(sorted({int(part) for part in parts}, reverse=True))
