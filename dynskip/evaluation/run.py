"""`EvalRun`: a sweep in a folder, which the same command finishes after a kill at any moment."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Collection, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dynskip.causal_lm import CausalLM
from dynskip.evaluation.registry import EXPERIMENTS, TASKS, section_name
from dynskip.evaluation.sweep.context import Context, num_rows
from dynskip.evaluation.sweep.dataset import duplicates, read_splits
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.workers import run_here, run_in_processes
from dynskip.files import write_json
from dynskip.measure import machine

SCHEMA = 1


class EvalRun:
    """The run of ``setup`` in ``folder``: config.json, items.jsonl, summary.json, log.txt.

    num_workers: processes that share the items. progress: show bars on stderr.

    Raises: ValueError where the folder belongs to another setup, RuntimeError where another process runs in it.
    """

    def __init__(self, setup: Setup, folder: Path, num_workers: int = 1, progress: bool = True) -> None:
        if num_workers < 1:
            raise ValueError(f"eval: workers must be at least 1, got {num_workers}.")
        self.setup = setup
        self.folder = folder
        self.num_workers = num_workers
        self.progress = progress
        self.context = Context(setup)
        folder.mkdir(parents=True, exist_ok=True)
        self.store = ItemStore(folder / "items.jsonl")
        try:
            self._machine = machine.describe()
            self._guard()
        except BaseException:
            self.store.close()
            raise

    def __enter__(self) -> EvalRun:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.store.close()
        if error is not None:
            # Where the disk is full the log cannot grow either; what is on its way says why.
            with contextlib.suppress(OSError):
                self.log(f"ended by {type(error).__name__}: {error}")

    def run(self, names: Sequence[str]) -> dict[str, Any]:
        """The summary after the experiments of ``names``, written after each of them."""
        for name in names:
            if name not in EXPERIMENTS:
                raise ValueError(f"eval: the experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}.")
        path = self.folder / "summary.json"
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        summary: dict[str, Any] = {"schema": SCHEMA, **old}
        for name in names:
            experiment = EXPERIMENTS[name]
            while missing := self.store.missing(experiment.plan(self.setup, self.store)):
                self._do(name, missing)
            summary[section_name(name)] = experiment.summarise(self.setup, self.store)
            summary["conditions"] = self.conditions()
            write_json(path, summary)
            self.log(f"{name}: summary written")
        return summary

    def conditions(self) -> dict[str, Any]:
        """What the numbers hold for: model, data, machine, versions, and what was left out."""
        setup = self.setup
        llm = self.context.llm(setup.checkpoint.hash)
        prompts = self.context.prompts(setup.checkpoint.hash, setup.split)
        splits = read_splits(setup.data, setup.split_seed)
        return {
            **setup.guarded(),
            "model": setup.checkpoint.directory.name,
            "num_layers": setup.num_layers,
            "hidden_size": llm.model.decoder_config.hidden_size,
            "max_positions": llm.model.decoder_config.max_positions,
            "num_parameters": num_parameters(llm.model),
            "backend": llm.model.backend.name,
            "data_file": setup.data.name,
            "split_sizes": {name: len(rows) for name, rows in splits.items()},
            "train_prompts": num_rows(setup, setup.learn_split),
            "left_out": {"empty response": prompts.empty, "too long": prompts.too_long},
            "duplicates": duplicates(splits),
            "items": len(self.store),
            "item_seconds": round(self.store.total_seconds, 1),
            **self._machine,
        }

    def log(self, line: str) -> None:
        """Add a line with the time to the run's log."""
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} {line}\n")

    def _do(self, name: str, missing: list[WorkItem]) -> None:
        """Do the missing items of an experiment, those that need the machine for themselves at the end."""
        shared = [item for item in missing if not TASKS[item.task].alone]
        alone = [item for item in missing if TASKS[item.task].alone]
        num_workers = min(self.num_workers, len(shared)) or 1
        line = (
            f"{name}: {len(missing)} items to do, {self._time_left(missing, num_workers)} ({len(self.store)} are done)"
        )
        self.log(line)
        if self.progress:
            print(line, file=sys.stderr)
        here = num_workers == 1
        first = run_here(shared, self.context) if here else run_in_processes(shared, self.setup, num_workers)
        left = set(missing)
        shape = "{desc} {n_fmt}/{total_fmt} items|{bar}| {elapsed}{postfix}"
        with tqdm(total=len(missing), desc=name, disable=not self.progress, bar_format=shape) as bar:
            for item, result, seconds in chain(first, run_here(alone, self.context)):
                self.store.add(item, result, seconds)
                left.remove(item)
                bar.set_postfix_str(f"left: {self._time_left(left, num_workers)}" if left else "", refresh=False)
                bar.update()

    def _time_left(self, items: Collection[WorkItem], num_workers: int) -> str:
        """How long ``items`` should take, by the finished ones of their kinds; nothing is known of other kinds yet."""
        known = {item: seconds for item in items if (seconds := self.store.seconds_like(item)) is not None}
        if not known:
            return "time not known yet"
        total_s = sum(seconds / (1 if TASKS[item.task].alone else num_workers) for item, seconds in known.items())
        new = len(items) - len(known)
        return f"about {duration(total_s)}" + (f" and {new} of kinds not timed yet" if new else "")

    def _guard(self) -> None:
        """Record this start, unless the folder was begun with another setup."""
        record = self.folder / "config.json"
        guarded = json.loads(json.dumps(self.setup.guarded()))
        start = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "model": str(self.setup.checkpoint.directory),
            "data": str(self.setup.data),
            **self._machine,
        }
        starts: list[dict[str, Any]] = []
        if record.exists():
            old = json.loads(record.read_text(encoding="utf-8"))
            # A field that an older version did not know takes part from now on.
            differences = [
                f"{name} {old['setup'][name]!r}, not {value!r}"
                for name, value in guarded.items()
                if name in old["setup"] and old["setup"][name] != value
            ]
            if differences:
                raise ValueError(
                    f"eval: the setup must be that of the run in {self.folder}, got another: the run has "
                    f"{'; '.join(differences)}. Give the run's own options or another --out."
                )
            starts = old["starts"]
        elif len(self.store):
            raise ValueError(
                f"eval: {self.folder} must hold the config.json of its items, got items without one. "
                "Bring it back or name another --out."
            )
        write_json(record, {"schema": SCHEMA, "setup": guarded, "starts": [*starts, start]})


def num_parameters(model: CausalLM) -> int:
    """How many numbers the weights of ``model`` hold; a head that is the embedding counts once."""
    weights = model.state_dict()
    if model.decoder_config.is_head_tied:
        del weights["lm_head.weight"]
    return sum(weight.numel() for weight in weights.values())


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
