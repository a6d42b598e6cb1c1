"""The paper's questions on SmolLM2-135M, in pieces: each starts from the committed items and ends with committed items.

python -m bench.paper --data alpaca_data.json.xz              every piece that needs no texts, what is missing of it
python -m bench.paper --data alpaca_data.json.xz static depth     these pieces alone, in this order
python -m bench.paper --data alpaca_data.json.xz --rows 200       on so many rows; they are the first of a longer run
python -m bench.paper --data alpaca_data.json.xz --text-rows 300 oracle    texts, too: greedy ones and draws, by ROUGE-L
python -m bench.paper --data alpaca_data.json.xz --controller runs/hidden --controller runs/fixed controllers
                                                              learned controllers, by log-likelihood alone
python -m bench.paper --data alpaca_data.json.xz --sibling 25=runs/s25/adapter --sibling 30=runs/s30/adapter siblings
                                                              weights tuned for one budget each, likewise

A piece is an experiment of `dynskip eval`. Controllers and siblings are not committed, what was measured of them is,
and what their trainings logged, in curves.csv and siblings.csv; controllers.json and siblings.json know each by its
hash and how it was trained, so that what was said of siblings can be said anew without them. Items of controllers that
the piece was not given go. Items are unpacked into a run folder, the missing ones done there,
and all of them packed again: token ids and what routers read of prompts are left out, which are large and come again
when they are asked for. What was killed is packed by the next start. summary.json, report.html and report.md are
written anew, with what cut.txt says was left out; power.md says how many rows each comparison needs.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import lzma
import math
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynskip.assets import FOUND_PATHS_FOLDER
from dynskip.benchmark.report import markdown_table
from dynskip.cli.eval import parse_siblings
from dynskip.cli.options import set_threads
from dynskip.evaluation.report.write import write_report
from dynskip.evaluation.run import EvalRun
from dynskip.evaluation.sweep.checkpoints import Checkpoint, ControllerFolder
from dynskip.evaluation.sweep.item_files import encoded
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore
from dynskip.evaluation.sweep.training_curves import CURVES, RUN
from dynskip.files import write_json, write_text
from dynskip.paths import LayerPath

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "bench/results/paper-smollm2"
PACKED = "items.jsonl.xz"
CUT = "cut.txt"  # a line for each thing that was left out, and what it would have cost
# Of a run folder what is committed beside the items: the setup that they belong to, and what was said of them.
KEPT = ("config.json", "summary.json", "log.txt")
BASE, TUNED = "smollm2-135m-instruct", "smollm2-135m-paths"
PIECES = ("static", "depth", "oracle", "router", "hidden-states")
# Judged by references, whatever is generated elsewhere: texts of many controllers take longer than all other pieces.
WITHOUT_TEXTS = frozenset(("controllers", "siblings"))
# By budget the hash of each sibling, and how it was trained; other pieces know nothing of siblings.
SIBLINGS, SIBLING_CURVES = "siblings.json", "siblings.csv"
CONTROLLERS = "controllers.json"  # by name the hash of each controller, and how it was trained
NOT_PACKED = frozenset(("features",))

Siblings = tuple[tuple[int, Checkpoint], ...]


def setup_of(
    data: Path,
    rows: int,
    rule_rows: int,
    state_rows: int,
    learn_rows: int,
    text_rows: int = 0,
    siblings: Mapping[int, Path] | None = None,
    **more: Any,
) -> Setup:
    """The run: the tuned model along searched paths, beside the same weights before any tuning.

    siblings: folders by budget. more: fields of `Setup`: which controllers, drawn how often, judged on how many rows;
    labels; the device.
    """
    options: dict[str, Any] = {
        "budgets": (27, 25, 20, 15, 10),
        "candidates": (25, 20, 15),
        "backbone": BASE,
        "searched": FOUND_PATHS_FOLDER / f"{BASE}.json",
        "rule": "searched",
        "template": "chat",
        "likelihood_only": not text_rows,
        "prompts": text_rows or rows,
        "draws": 4,
        "likelihood_prompts": rows,
        "rule_prompts": rule_rows,
        "state_prompts": state_rows,
        "train_prompts": learn_rows,
        "shard_size": 50,
        **more,
    }
    folders = {budget: str(folder) for budget, folder in (siblings or {}).items()}
    return Setup.of(TUNED, data, folders, **options)


def unpack(folder: Path, work: Path) -> None:
    """Lay the committed items of ``folder`` into the run folder ``work``, beside what a killed run has left there."""
    work.mkdir(parents=True, exist_ok=True)
    if (folder / PACKED).is_file():
        with lzma.open(folder / PACKED, "rt", encoding="utf-8") as packed:
            write_text(work / "items.jsonl", packed.read())
        for name in KEPT:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, work / name)


def pack(work: Path, folder: Path, controllers: Collection[str] | None = None) -> int:
    """Put the items of ``work`` into ``folder``, in an order that depends on them alone, and say how many they are.

    controllers: hashes; the items of others are left out.
    """
    with ItemStore(work / "items") as store:
        lines = [line for line in store.lines() if line["item"]["task"] not in NOT_PACKED]
    if controllers is not None:
        lines = [line for line in lines if line["item"]["options"].get("controller") in (None, *controllers)]
    for line in lines:
        line.pop("apart", None)
    lines.sort(key=lambda line: json.dumps(line["item"], sort_keys=True))
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{PACKED}.partial"
    partial.write_bytes(lzma.compress(b"".join(map(encoded, lines)), preset=9 | lzma.PRESET_EXTREME))
    partial.replace(folder / PACKED)
    for name in KEPT:
        if (work / name).is_file():
            shutil.copyfile(work / name, folder / name)
    return len(lines)


def run(
    setup: Setup,
    names: Sequence[str],
    folder: Path,
    work: Path,
    progress: bool = True,
    mixes_isa: bool = False,
    num_workers: int = 1,
) -> dict[str, Any]:
    """The summary once what is missing of the pieces ``names`` is done; items are packed after each, or its error."""
    unpack(folder, work)
    summary: dict[str, Any] = {}
    for name in names:
        own = setup if name == "siblings" else dataclasses.replace(setup, siblings=())
        own = dataclasses.replace(own, likelihood_only=True) if name in WITHOUT_TEXTS else own
        try:
            with EvalRun(own, work, num_workers, progress, mixes_isa=mixes_isa) as evaluation:
                summary = evaluation.run([name])
        finally:
            pack(work, folder, [each.hash for each in own.controllers] if name == "controllers" else None)
    if summary:
        # A piece without texts says how many references it has; the conditions are those of all pieces.
        siblings = {str(budget): checkpoint.hash for budget, checkpoint in setup.siblings}
        summary["conditions"] |= {"prompts": setup.num_judged, "siblings": siblings}
    return summary


def keep_curves(trainings: Mapping[str, Path], of: str, path: Path, keeps_others: bool = False) -> None:
    """Write what ``trainings``, folders by name, logged, a step a line, into one file, a column ``of`` naming each.

    keeps_others: lines of other names that are in the file stay, before those. Raises FileNotFoundError where one has
    left no curves.
    """
    lines: list[dict[str, str]] = []
    if keeps_others and path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            lines += [line for line in csv.DictReader(file) if line[of] not in trainings]
    for name, directory in trainings.items():
        with (directory / CURVES).open(encoding="utf-8", newline="") as file:
            lines += [{of: name, **line} for line in csv.DictReader(file)]
    names = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def keep_controllers(controllers: Sequence[ControllerFolder], folder: Path) -> None:
    """Write down which weights ``controllers`` are, how they were trained, and what their trainings logged."""
    known = {
        each.label: {
            "hash": each.hash,
            "trained": json.loads((each.directory / RUN).read_text(encoding="utf-8"))["config"],
        }
        for each in controllers
    }
    write_json(folder / CONTROLLERS, known)
    keep_curves({each.label: each.directory for each in controllers}, "controller", folder / CURVES)


def check_siblings(given: Mapping[int, Path], setup: Setup) -> None:
    """Raise ValueError where a folder of ``given`` was trained along another path than it is scored along.

    A folder is ``adapter`` or ``model`` of a run of `dynskip train --preset paths`, whose record says that.
    """
    for budget, folder in given.items():
        trained = [*json.loads((folder.parent / RUN).read_text(encoding="utf-8"))["layers"].values()]
        path = LayerPath.parse(setup.path_of(budget), setup.num_layers)
        if trained != [[*path.layers]]:
            raise ValueError(
                f"paper: the sibling of {budget} layers must be trained along {path} alone, got {trained} in "
                f"{folder.parent / RUN}."
            )


def keep_siblings(given: Mapping[int, Path], siblings: Siblings, folder: Path) -> None:
    """Write down which weights ``siblings`` are and how those in the folders ``given`` were trained, by budget.

    What is known of other budgets stays.
    """
    known = json.loads((folder / SIBLINGS).read_text(encoding="utf-8")) if (folder / SIBLINGS).is_file() else {}
    curves: dict[str, Path] = {}
    for budget, checkpoint in siblings:
        if budget not in given:
            continue
        run = given[budget].parent
        trained = json.loads((run / RUN).read_text(encoding="utf-8"))["config"]
        known[str(budget)] = {"hash": checkpoint.hash, "num_layers": checkpoint.num_layers, "trained": trained}
        curves[str(budget)] = run / "training"
        if trained.get("adapter") is not None:  # the full-depth one, which it starts from
            before = Path(trained["adapter"]).parent
            known[str(budget)]["before"] = json.loads((before / RUN).read_text(encoding="utf-8"))["config"]
            curves["before"] = before / "training"
    write_json(folder / SIBLINGS, known)
    keep_curves(curves, "budget", folder / SIBLING_CURVES, keeps_others=True)


def trainings_of(folder: Path) -> list[str]:
    """How the siblings that ``folder`` knows were trained, in words."""
    if not (folder / SIBLINGS).is_file():
        return []
    lines: dict[str, list[str]] = {}
    for budget, each in json.loads((folder / SIBLINGS).read_text(encoding="utf-8")).items():
        found = each["trained"]
        what = f"adapters of rank {found['rank']}" if found["method"] == "lora" else "all weights"
        start = "" if found.get("adapter") is None else ", from an adapter of full depth"
        line = (
            f"{what}{start}, {found['num_steps']} steps of {found['batch_size']} rows, learning rate "
            f"{found['learning_rate']:g}"
        )
        lines.setdefault(line, []).append(budget)
    return [f"Siblings of {', '.join(budgets)} layers: {line}." for line, budgets in lines.items()]


def known_siblings(folder: Path) -> Siblings:
    """Those that were scored; their weights need not be there, and are found nowhere where one asks for them."""
    if not (folder / SIBLINGS).is_file():
        return ()
    held = json.loads((folder / SIBLINGS).read_text(encoding="utf-8"))
    gone = folder / "not committed"
    return tuple(
        (int(budget), Checkpoint(gone / budget, each["hash"], each["num_layers"])) for budget, each in held.items()
    )


def rows_needed(row: dict[str, Any], num_rows: int) -> int | None:
    """How many rows show a difference of the margin of ``row`` in 80 % of runs, where it is known from ``num_rows``."""
    seen = row.get("detectable")
    return math.ceil(num_rows * (seen / row["margin"]) ** 2) if seen else None


def power_table(summary: dict[str, Any]) -> str:
    """Each paired difference of log-likelihoods with the rows that it needs."""
    # A difference that both sections have is told once; each is of as many rows as its section.
    found: dict[tuple[Any, ...], tuple[dict[str, Any], int]] = {}
    for name in ("static", "siblings"):
        section = summary.get(name, {})
        for row in section.get("rows", ()):
            key = (row["metric"], row.get("family"), row.get("budget"))
            found.setdefault(key, (row, section["n_nats"] if "n_nats" in section else section["n"]))
    body = [
        [
            *(row["metric"], row["family"], str(row["budget"]), str(num_rows)),
            *(f"{row['value']:.3f}", f"{row['detectable']:.4f}", str(rows_needed(row, num_rows)), row["verdict"]),
        ]
        for row, num_rows in found.values()
        if row["metric"].startswith("nats - ") and row.get("detectable")
    ]
    head = ["difference", "weights", "layers", "rows", "nats a token", "seen from", "rows for the margin", "verdict"]
    margin = summary["conditions"]["margin_nats"]
    return (
        "# Power\n\nOf so many rows: the paired difference, the true one that an interval as wide leaves zero out "
        f"of in 80 % of runs, and how many rows that makes for one of {margin:g} nats, the margin.\n\n"
        f"{markdown_table(head, body, range(2, len(head) - 1))}\n"
    )


def main() -> int:
    """Do what is missing of the pieces, and write what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", default=PIECES, metavar="PIECE", help=f"default: {' '.join(PIECES)}")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="Alpaca as *.json[.xz]")
    parser.add_argument("--rows", type=int, default=1000, metavar="N", help="test rows along the paths (1000)")
    parser.add_argument("--rule-rows", type=int, default=50, metavar="N", help="rows along paths of other rules (50)")
    parser.add_argument("--state-rows", type=int, default=50, metavar="N", help="rows for hidden states (50)")
    parser.add_argument("--learn-rows", type=int, default=250, metavar="N", help="validation rows for routers (250)")
    parser.add_argument("--text-rows", type=int, default=0, metavar="N", help="rows with texts, timed, too (0)")
    parser.add_argument(
        "--controller", action="append", default=[], metavar="FOLDER", help="a learned controller; repeatable"
    )
    parser.add_argument("--controller-rows", type=int, default=0, metavar="N", help="rows under each (all of --rows)")
    parser.add_argument("--controller-seeds", type=int, default=0, metavar="N", help="draws of its decisions, too (0)")
    parser.add_argument(
        "--sibling", action="append", default=[], metavar="BUDGET=FOLDER", help="weights tuned for it; repeatable"
    )
    parser.add_argument("--labels", type=Path, metavar="FILE", help="T0 as *.jsonl[.xz]: labels as a third score")
    parser.add_argument("--label-rows", type=int, default=500, metavar="N", help="rows with closed labels (500)")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda or cuda:N (cpu)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that share the items (1)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the items are committed")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/paper-smollm2", help="the run folder")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--mix-instruction-sets", action="store_true", help="go on where another kind of CPU began")
    args = parser.parse_args()
    if args.sibling and "siblings" not in args.pieces:
        parser.error("--sibling must be left out without the piece siblings")
    if "controllers" in args.pieces and not args.controller:
        parser.error("--controller must name the folders of the piece controllers, got none")
    given = {budget: Path(folder).expanduser() for budget, folder in parse_siblings(args.sibling).items()}
    set_threads(args.threads)
    setup = setup_of(
        args.data,
        args.rows,
        args.rule_rows,
        args.state_rows,
        args.learn_rows,
        args.text_rows,
        given,
        controllers=args.controller,
        controller_prompts=args.controller_rows,
        controller_seeds=args.controller_seeds,
        labels=args.labels,
        label_prompts=args.label_rows,
        device=args.device,
    )
    if given:
        check_siblings(given, setup)
    scored = {**dict(known_siblings(args.folder)), **dict(setup.siblings)}
    setup = dataclasses.replace(setup, siblings=tuple(sorted(scored.items())))
    summary = run(
        setup,
        args.pieces,
        args.folder,
        args.work,
        mixes_isa=args.mix_instruction_sets,
        num_workers=args.workers,
    )
    if given:
        keep_siblings(given, setup.siblings, args.folder)
    if "siblings" in summary:
        notes = summary["siblings"]["notes"]
        notes += [line for line in trainings_of(args.folder) if line not in notes]
    if "controllers" in args.pieces:
        keep_controllers(setup.controllers, args.folder)
    if (args.folder / CUT).is_file():
        summary["cut"] = (args.folder / CUT).read_text(encoding="utf-8").splitlines()
    write_json(args.folder / "summary.json", summary)
    if "static" in summary:
        write_text(args.folder / "power.md", power_table(summary))
    for page in write_report(args.folder):
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
