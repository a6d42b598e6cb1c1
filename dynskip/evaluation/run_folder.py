"""`RunFolder`: what a run leaves in its folder, which several processes may write to at once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from dynskip.evaluation.registry import ALONE
from dynskip.evaluation.sweep.place import Place
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore
from dynskip.evaluation.tasks.timing import machine_name
from dynskip.files import write_json
from dynskip.measure import machine

SCHEMA = 1


class RunFolder:
    """config.json, starts/, items/, summary.json and log.txt of the run of ``setup`` in ``path``.

    mixes_isa: items may be done with several instruction sets. times_here: this machine is the one that is timed from
    now on; else that is the machine of the folder's first start. timed_on: its host, name and instruction sets; older
    folders do not say the last. setup: the one given, with the name of that machine.

    Raises ValueError where the folder belongs to another setup, or holds several instruction sets unasked.
    """

    def __init__(self, path: Path, setup: Setup, mixes_isa: bool = False, times_here: bool = False) -> None:
        self.path = path
        self.mixes_isa = mixes_isa
        path.mkdir(parents=True, exist_ok=True)
        self.store = ItemStore(path / "items")
        try:
            self.machine = machine.describe()
            self._here = _timed_machine(setup.device)
            self.timed_on = self._guard(setup, times_here)
            self.refuse_mixing()
        except BaseException:
            self.close()
            raise
        self.setup = dataclasses.replace(setup, timed_on=self.timed_on["machine"])

    def close(self) -> None:
        """Let go of the files."""
        self.store.close()

    @property
    def times_here(self) -> bool:
        """Whether this is the machine that is timed: virtual machines on several CPUs may have one host's name."""
        return all(self._here[name] == value for name, value in self.timed_on.items())

    @property
    def timed_name(self) -> str:
        """The machine that is timed, as text."""
        return f"{self.timed_on['host']} ({self.timed_on['machine']})"

    def log(self, line: str) -> None:
        """Add a line with the time to the run's log."""
        with (self.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} {line}\n")

    def summary(self) -> dict[str, Any]:
        """What summary.json holds by now."""
        path = self.path / "summary.json"
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {"schema": SCHEMA, **old}

    def write_section(self, name: str, section: dict[str, Any], conditions: dict[str, Any]) -> None:
        """Put a section into summary.json, beside those that other processes have written meanwhile."""
        where = {
            "done_on": [
                {"host": place.host, "isa": place.isa, "items": count}
                for place, count in self.store.places().most_common()
            ],
            "timed_on": self.timed_on,
        }
        new = {name: section, "conditions": {**conditions, **where, **self.machine}}
        write_json(self.path / "summary.json", self.summary() | new)

    def refuse_mixing(self, place: Place | None = None) -> None:
        """Raise ValueError where the items, and those done in ``place``, are of several instruction sets, unasked."""
        counts: Counter[str] = Counter()
        for known, count in self.store.places(without=ALONE).items():
            counts[known.isa] += count
        counts.pop("", None)  # lines of older versions do not say
        told = [f"{isa!r} for {count}" for isa, count in sorted(counts.items())]
        if place is not None and place.isa not in counts:
            told.append(f"{place.isa!r} of {place}")
        if len(told) > 1 and not self.mixes_isa:
            raise ValueError(
                f"eval: items must be done with one instruction set, got {' and '.join(told)}. Greedy tokens differ "
                "between them now and then: use machines of one kind, or allow it with --mix-instruction-sets."
            )

    def _guard(self, setup: Setup, times_here: bool) -> dict[str, str]:
        """The machine that is timed. Records this start, unless the folder has another setup."""
        record = self.path / "config.json"
        guarded = json.loads(json.dumps(setup.guarded()))
        here = self._here
        if not record.exists():
            if len(self.store):
                raise ValueError(
                    f"eval: {self.path} must hold the config.json of its items, got items without one. "
                    "Bring it back or name another --out."
                )
            self._write_first(record, {"schema": SCHEMA, "setup": guarded, "timed_on": here})
        old = json.loads(record.read_text(encoding="utf-8"))
        # A field that an older version did not know takes part from now on.
        differences = [
            f"{name} {old['setup'][name]!r}, not {value!r}"
            for name, value in guarded.items()
            if name in old["setup"] and old["setup"][name] != value and not _has_grown(name, old["setup"], value)
        ]
        if differences:
            raise ValueError(
                f"eval: the setup must be that of the run in {self.path}, got another: the run has "
                f"{'; '.join(differences)}. Give the run's own options or another --out."
            )
        guarded["siblings"] = {**old["setup"].get("siblings", {}), **guarded["siblings"]}
        timed_on: dict[str, str] = here if times_here else old.get("timed_on", here)
        new = {**old, "setup": guarded, "timed_on": timed_on}
        if new != old:
            write_json(record, new)
        start = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": here["host"],
            "model": str(setup.checkpoint.adapter or setup.checkpoint.directory),
            "data": str(setup.data),
            **self.machine,
        }
        (self.path / "starts").mkdir(exist_ok=True)
        write_json(self.path / "starts" / f"{self.store.writer}.json", start)
        return timed_on

    def _write_first(self, path: Path, value: object) -> None:
        """Write ``value`` unless another process has written the file: of several the first stays."""
        own = path.with_name(f"{path.stem}.{self.store.writer}.json")
        write_json(own, value)
        with contextlib.suppress(FileExistsError):
            os.link(own, path)
        own.unlink()


def _has_grown(name: str, old: dict[str, Any], value: Any) -> bool:
    """Whether ``value`` is that of ``old`` with more in it: budgets, their searched paths and labels may come.

    Siblings may come and be left out, too; those of one budget are the same weights throughout.
    """
    if name == "budgets":
        return set(old[name]) <= set(value)
    if name == "searched":
        return bool(old[name].items() <= value.items())
    if name == "siblings":
        return all(old[name].get(budget, weights) == weights for budget, weights in value.items())
    return name in ("labels_hash", "label_prompts") and old.get("labels_hash") is None


def _timed_machine(device: str) -> dict[str, str]:
    """What tells this machine from others that are timed."""
    place = Place.here(device)
    return {"host": place.host, "machine": machine_name(device), "isa": place.isa}
