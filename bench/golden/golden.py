"""Compares what two states of the project compute: `make golden OLD=commit [NEW=commit]`, by default the working tree.

One probe runs in each state: tokens, logits and their bits, scheduler decisions, the commands' JSON, and what the new
state makes of the old one's checkpoints, controllers, cost caches and sweeps. Exit status 1 where anything differs that
`expected.json` does not name: {pattern of names: why}, or {pattern: {"why": why, "ulps": 100}} where tensors may be so
many units in the last place apart. An entry counts until the old state has it too.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.golden.sides import FOLDER, Side, make_side

EXPECTED = Path("bench/golden/expected.json")
# How far logits that are not deterministic may be apart, in units in the last place of the largest.
_ULPS = 32

# The values and the tensors of a record, by the names of its cases.
State = tuple[dict[str, Any], dict[str, Tensor]]


class Expected(NamedTuple):
    """A difference that is meant. ulps: how far tensors may be apart where that is no rounding, as `compare` has it."""

    why: str
    ulps: float = 0.0


def compare(
    old: tuple[Any, Mapping[str, Tensor]], new: tuple[Any, Mapping[str, Tensor]]
) -> tuple[dict[str, str], dict[str, str], dict[str, float]]:
    """Differences and remarks, each by its name, and how far the tensors among the differences are apart.

    Values must be equal and free of errors; tensors may differ by rounding, which is a remark. What they are apart
    counts in units in the last place of the largest value.
    """
    found = dict(_differences("", old[0], new[0]))
    for name, value in new[0].items():
        if isinstance(value, dict) and "error" in value and value == old[0].get(name):
            found[name] = f"fails in both: {value['error']}"
    remarks: dict[str, str] = {}
    apart: dict[str, float] = {}
    for name in sorted({*old[1], *new[1]}):
        ours, theirs = new[1].get(name), old[1].get(name)
        if ours is None or theirs is None or (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            found[name] = f"old {_form(theirs)}, new {_form(ours)}"
        elif not torch.equal(ours, theirs):
            largest = theirs.double().abs().max()
            ulps = float((ours.double() - theirs.double()).abs().max() / largest / torch.finfo(ours.dtype).eps)
            text = f"{ulps:.1f} units in the last place apart"
            if ulps <= _ULPS:
                remarks[name] = text
            else:
                found[name], apart[name] = text, ulps
    return found, remarks, apart


def _form(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype)[6:]} {list(tensor.shape)}"


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, str]]:
    """The innermost values that differ, by their place."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            place = f"{name} > {key}" if name else str(key)
            if key in old and key in new:
                yield from _differences(place, old[key], new[key])
            else:
                yield place, f"only in the {'old' if key in old else 'new'} state"
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (theirs, ours) in enumerate(zip(old, new, strict=True)):
            yield from _differences(f"{name} > {index}", theirs, ours)
    elif old != new:
        yield name, f"old {_short(old)}, new {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:160]}..."


def split_expected(
    found: Mapping[str, str], apart: Mapping[str, float], patterns: Mapping[str, Expected]
) -> tuple[dict[str, str], dict[str, str]]:
    """Those that no pattern names, or that are too far apart for it, and those that one does, with its reason."""

    def reason(name: str) -> str | None:
        whys = (each.why for pattern, each in patterns.items() if fnmatchcase(name, pattern) and fits(name, each))
        return next(whys, None)

    def fits(name: str, expected: Expected) -> bool:
        return name not in apart or apart[name] <= expected.ulps

    reasons = {name: reason(name) for name in found}
    unnamed = {name: text for name, text in found.items() if reasons[name] is None}
    return unnamed, {name: f"{text} ({reasons[name]})" for name, text in found.items() if reasons[name] is not None}


def known(side: Side, old: Side) -> dict[str, Expected]:
    """The expectations of a state that are not in ``old``: these are behind both."""
    paths = (side.root / EXPECTED, old.root / EXPECTED)
    patterns, behind = (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {} for path in paths)
    return {
        pattern: Expected(entry) if isinstance(entry, str) else Expected(**entry)
        for pattern, entry in patterns.items()
        if behind.get(pattern) != entry
    }


def record(sides: list[Side], options: list[str]) -> list[State]:
    """What each state computes, all at a time, a thread each; the first one's artefacts are read by all."""
    folder = FOLDER / "records"
    shutil.rmtree(folder, ignore_errors=True)
    artefacts = folder / "artefacts"
    artefacts.mkdir(parents=True)
    environment = {"DYNSKIP_CACHE": str(artefacts / "cache"), "OMP_NUM_THREADS": "1"}
    common = ("--artefacts", artefacts, *options)
    _wait(sides[0].start("probe.py", "--root", sides[0].root, *common, **environment), sides[0])
    outs = [folder / side.name for side in sides]
    for out in outs:
        out.mkdir()
    processes = [
        side.start("probe.py", "--root", side.root, "--out", out, *common, **environment)
        for side, out in zip(sides, outs, strict=True)
    ]
    for process, side in zip(processes, sides, strict=True):
        _wait(process, side)
    return [read(out) for out in outs]


def read(out: Path) -> State:
    """What a probe has left in ``out``."""
    return json.loads((out / "record.json").read_text("utf-8")), load_file(out / "record.safetensors")


def _wait(process: subprocess.Popen[str], side: Side) -> None:
    process.communicate()
    if process.returncode:
        raise RuntimeError(f"golden: the probe of {side.name}, {side.root}, must end well; see above.")


def main(argv: list[str] | None = None) -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, metavar="COMMIT")
    parser.add_argument("--new", metavar="COMMIT", help="default: the working tree")
    parser.add_argument("--quick", action="store_true", help="less of everything, in a minute")
    parser.add_argument("--only", metavar="SECTION", help="forward, generation, engine, commands or artefacts")
    parser.add_argument("--allow", action="append", default=[], metavar="PATTERN", help="of names that may differ")
    args = parser.parse_args(argv)
    sides = [make_side("old", args.old), make_side("new", args.new)]
    options = ["--quick"] * args.quick + (["--only", args.only] if args.only else [])
    old, new = record(sides, options)
    found, remarks, apart = compare(old, new)
    patterns = {**known(sides[1], sides[0]), **dict.fromkeys(args.allow, Expected("--allow", math.inf))}
    unnamed, named = split_expected(found, apart, patterns)
    for title, differences in (("rounding", remarks), ("expected", named), ("DIFFERENT", unnamed)):
        for name, text in differences.items():
            print(f"{title}: {name}: {text}")
    counts = f"{len(unnamed)} differences, {len(named)} expected, {len(remarks)} of rounding"
    print(f"old {sides[0].commit}, new {sides[1].commit}: {len(new[0])} values and {len(new[1])} tensors; {counts}")
    return 1 if unnamed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
