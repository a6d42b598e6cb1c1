"""Compares how fast two states of the project are: `make golden-speed OLD=commit [NEW=commit]`.

Both are kept alive, each in a process of its own, and take turns old, new, new, old; only one computes at a time. Rows
are those of the tables in bench/results. Exit status 1 where the 95 % interval of a row's ratio, new over old, lies
above 1.03. Before a row is timed, both must generate the same tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.golden.sides import FOLDER, Side, make_side

LIMIT = 1.03
# Decode steps, prefills or streams, of models so small that a turn would never end.
_MOST_IN_A_TURN = 32


@dataclass(frozen=True)
class Row:
    """What is timed. kind: decode, prefill or stream. model: a folder or opt-mini.

    path: as `LayerPath.parse` reads it, SEED being the number of the sequence. policy, requests: of a stream.
    """

    name: str
    kind: str
    model: str
    batch: int
    path: str = "full"
    policy: str = ""
    requests: int = 0


@dataclass(frozen=True)
class Ratio:
    """New over old: the median over rounds, and its 95 % interval by bootstrap over rounds."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(rounds: Sequence[tuple[float, float]], resamples: int = 4000, seed: int = 0) -> Ratio:
        """The ratio of rounds, the seconds of old and new in each."""
        ratios = [new / old for old, new in rounds]
        draw = random.Random(seed)
        medians = sorted(median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples))
        return Ratio(median(ratios), medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1])

    @property
    def is_slower(self) -> bool:
        """Whether the whole interval lies above the limit."""
        return self.low > LIMIT


# Asked for an amount of a row, a state answers with the seconds and a hash of the tokens.
Ask = Callable[[Row, int], tuple[float, str]]


def abba(row: Row, ask: dict[str, Ask], num_rounds: int, turn_s: float) -> tuple[list[tuple[float, float]], int]:
    """The seconds of old and new in each round of turns old, new, new, old; and how much of the row a turn does.

    Raises RuntimeError where the states do not generate the same tokens.
    """

    def both(names: Sequence[str], amount: int) -> dict[str, float]:
        answers = [(name, *ask[name](row, amount)) for name in names]
        if [tokens for name, _, tokens in answers if name == "old"] != [t for name, _, t in answers if name == "new"]:
            raise RuntimeError(f"golden-speed: {row.name} must have the same tokens in both states. See make golden.")
        return {name: sum(seconds for each, seconds, _ in answers if each == name) for name in ask}

    both(("old", "new"), 1)  # longer than any later one
    amount = min(max(round(turn_s / max(both(("old", "new"), 1)["old"], 1e-6)), 1), _MOST_IN_A_TURN)
    rounds = [both(("old", "new", "new", "old"), amount) for _ in range(num_rounds)]
    return [(each["old"] / (2 * amount), each["new"] / (2 * amount)) for each in rounds], amount


def rows_of(model: str, num_layers: int) -> list[Row]:
    """The rows of the committed tables: decode, prefill, shared and independent paths, streams."""
    half, quarter = f"uniform:{num_layers // 2}", f"uniform:{max(num_layers // 4, 1)}"
    rows = []
    for batch in (1, 8, 32):
        for name, path in (("full depth", "full"), ("shared 50% path", half), ("shared 25% path", quarter)):
            rows += [Row(f"{kind}, {name}, batch {batch}", kind, model, batch, path) for kind in ("decode", "prefill")]
    rows.append(Row("decode, independent 50% paths, batch 32", "decode", model, 32, f"random:{num_layers // 2}:SEED"))
    for name, served, requests in (("opt-mini", "opt-mini", 128), ("the model", model, 48)):
        for policy in ("cohort", "lockstep"):
            for batch in (16, 32):
                label = f"stream, {name}, {policy}, batch {batch}"
                rows.append(Row(label, "stream", served, batch, policy=policy, requests=requests))
    return rows


class Worker:
    """A state's process."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.process: subprocess.Popen[str] = side.start("speed_worker.py", "--root", side.root)

    def ask(self, row: Row, amount: int) -> tuple[float, str]:
        """Let it work, and wait until it has."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"row": asdict(row), "amount": amount}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"golden-speed: the process of {self.side.name} must answer, got its end; see above.")
        answer = json.loads(line)
        return answer["seconds"], answer["tokens"]

    def close(self) -> None:
        """Let it end."""
        self.process.communicate()


def weights() -> Path:
    """A checkpoint of opt-1.3b's shapes with random weights, made once; both states map the same file."""
    from dynskip.files import whole_folder
    from dynskip.measure.random_models import hf_config, random_hf_model

    folder = FOLDER / "weights" / "opt-1.3b"
    if not folder.exists():
        with whole_folder(folder) as partial:
            random_hf_model(hf_config("opt-1.3b")).save_pretrained(partial)
    return folder


def write(out: Path, lines: list[dict[str, Any]], conditions: dict[str, Any]) -> str:
    """Leave the table as Markdown and as JSON lines; returns the Markdown."""
    about = ", ".join(f"{name} {value}" for name, value in conditions.items())
    table = ["| row | old ms | new ms | new / old | 95 % interval |", "|---|--:|--:|--:|--:|"]
    for line in lines:
        figures = f"{line['old_ms']:.3f} | {line['new_ms']:.3f} | {line['ratio']:.3f}"
        verdict = "**slower**" if line["is_slower"] else ""
        table.append(f"| {line['row']} | {figures} | {line['low']:.3f} .. {line['high']:.3f} {verdict}|")
    text = f"# Speed of two states\n\n{about}.\n\nTurns old, new, new, old; medians over rounds.\n\n" + "\n".join(table)
    out.mkdir(parents=True, exist_ok=True)
    (out / "speed.md").write_text(text + "\n", encoding="utf-8")
    (out / "speed.jsonl").write_text("".join(json.dumps({**line, **conditions}) + "\n" for line in lines), "utf-8")
    return text


def main(argv: list[str] | None = None) -> int:
    """Time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, metavar="COMMIT")
    parser.add_argument("--new", metavar="COMMIT", help="default: the working tree")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: opt-1.3b's shapes, random weights")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="rows whose name holds it")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="of four turns (default: 9)")
    parser.add_argument("--turn", type=float, default=0.4, metavar="S", help="seconds of a turn (default: 0.4)")
    parser.add_argument("--out", type=Path, default=FOLDER / "speed", metavar="FOLDER", help="of the table")
    args = parser.parse_args(argv)
    from dynskip.measure import machine

    sides = [make_side("old", args.old), make_side("new", args.new)]
    model = (weights() if args.model is None else args.model).resolve()
    rows = rows_of(str(model), json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])
    chosen = [row for row in rows if not args.only or any(text in row.name for text in args.only)]
    if not chosen:
        raise ValueError(
            f"golden-speed: --only must name rows, got {args.only}. They are:\n" + "\n".join(row.name for row in rows)
        )
    about = machine.describe()
    conditions = {name: about[name] for name in ("machine", "num_threads", "date", "load")}
    conditions |= {side.name: side.commit for side in sides} | {"model": model.name, "rounds": args.rounds}
    workers = {side.name: Worker(side) for side in sides}
    lines = []
    for row in chosen:
        rounds, amount = abba(row, {name: worker.ask for name, worker in workers.items()}, args.rounds, args.turn)
        for worker in workers.values():
            worker.ask(row, 0)
        ratio = Ratio.of(rounds)
        old_ms, new_ms = (1e3 * median(side) for side in zip(*rounds, strict=True))
        figures = {"old_ms": old_ms, "new_ms": new_ms, "ratio": ratio.value, "low": ratio.low, "high": ratio.high}
        lines.append({"row": row.name, **figures, "is_slower": ratio.is_slower, "amount": amount, "rounds_s": rounds})
        print(f"{row.name}: {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.close()
    print(write(args.out, lines, conditions))
    return 1 if any(line["is_slower"] for line in lines) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
