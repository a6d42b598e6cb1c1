"""`EvalRun`: a sweep in a folder, which the same command finishes after a kill at any moment."""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dynskip.causal_lm import CausalLM
from dynskip.evaluation.dispatch import NUM_TRIES, Dispatch
from dynskip.evaluation.registry import ALONE, EXPERIMENTS, section_name
from dynskip.evaluation.run_folder import RunFolder
from dynskip.evaluation.sweep.context import Context, num_rows
from dynskip.evaluation.sweep.dataset import duplicates, read_splits
from dynskip.evaluation.sweep.place import Place
from dynskip.evaluation.sweep.setup import GROWING, Setup
from dynskip.evaluation.sweep.store import Kind, WorkItem
from dynskip.evaluation.workers import Outcome, crew_here, crew_named

# As long as items take, what others have finished is looked for once in so many seconds.
REFRESH_S = 1.0
# A stage whose first items all fail, each of its tries, will not do better.
_MOST_FAILED_AT_FIRST = 3


class EvalRun:
    """The run of ``setup`` in ``folder``: config.json, starts/, items/, summary.json, log.txt.

    Several processes may run in one folder at once, here and on other machines: each skips what others have finished.
    num_workers: processes that share the items (default: this one). executor: who does them in place of these; see
    `crew_named`. num_workers is then how many items are handed over at a time. progress: show bars on stderr.
    mixes_isa, times_here: see `RunFolder`. left: by experiment, how many items the machine that is timed must do.

    Raises ValueError where the folder belongs to another setup, or holds several instruction sets unasked.
    """

    def __init__(
        self,
        setup: Setup,
        folder: Path,
        num_workers: int | None = None,
        progress: bool = True,
        *,
        executor: str | None = None,
        mixes_isa: bool = False,
        times_here: bool = False,
    ) -> None:
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"eval: workers must be at least 1, got {num_workers}.")
        self.progress = progress
        self.left: dict[str, int] = {}
        self._failed: dict[WorkItem, str] = {}
        self._refreshed = time.monotonic()
        self.folder = RunFolder(folder, setup, mixes_isa, times_here)
        self.store, self.setup = self.folder.store, self.folder.setup
        try:
            self.context = Context(self.setup)
            if executor is None:
                self.crew = crew_here(self.context, num_workers or 1)
            else:
                self.crew = crew_named(executor, self.setup, num_workers)
        except BaseException:
            self.folder.close()
            raise

    def __enter__(self) -> EvalRun:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.folder.close()
        if error is not None:
            # Where the disk is full the log cannot grow either; what is on its way says why.
            with contextlib.suppress(OSError):
                self.folder.log(f"ended by {type(error).__name__}: {error}")

    def run(self, names: Sequence[str]) -> dict[str, Any]:
        """The summary after the experiments of ``names``, written after each of them that has all its items.

        Raises RuntimeError where items have failed; the others are done, and their experiments summarised.
        """
        for name in names:
            if name not in EXPERIMENTS:
                raise ValueError(f"eval: the experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}.")
        for name in names:
            if self._finish(name):
                section = EXPERIMENTS[name].summarise(self.setup, self.store)
                self.folder.write_section(section_name(name), section, self.conditions())
                self.folder.log(f"{name}: summary written")
        if self._failed:
            raise RuntimeError(
                f"eval: items must give results, got {len(self._failed)} that failed {NUM_TRIES} times, the first with "
                f"{next(iter(self._failed.values()))}. Errors are in {self.store.folder}/*.failed.jsonl; the same "
                "command tries again."
            )
        return self.folder.summary()

    def conditions(self) -> dict[str, Any]:
        """What the numbers hold for: model, data, machine, versions, and what was left out."""
        setup = self.setup
        llm = self.context.llm(setup.checkpoint.hash)
        prompts = self.context.prompts(setup.checkpoint.hash, setup.split)
        splits = read_splits(setup.data, setup.split_seed)
        return {
            **setup.guarded(),
            **{name: getattr(setup, name) for name in GROWING},
            "prompts": setup.num_judged,
            "model": setup.checkpoint.name,
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
        }

    def _finish(self, name: str) -> bool:
        """Do the items of an experiment; whether none is left, neither failed ones nor such as others must time."""
        others = frozenset() if self.folder.times_here else ALONE
        while missing := self._missing(name):
            due = [item for item in missing if item not in self._failed and item.task not in others]
            if not due:
                break
            self._do(name, due)
        to_time = sum(item not in self._failed for item in missing)
        if to_time:
            self.left[name] = to_time
            self.folder.log(f"{name}: {to_time} items are left for {self.folder.timed_name}, which is timed")
        return not missing

    def _missing(self, name: str) -> list[WorkItem]:
        self._refresh()
        return self.store.missing(EXPERIMENTS[name].plan(self.setup, self.store))

    def _do(self, name: str, missing: list[WorkItem]) -> None:
        """Do the missing items of an experiment, those that need the machine for themselves at the end."""
        shared = [item for item in missing if item.task not in ALONE]
        alone = [item for item in missing if item.task in ALONE]
        # Each process begins elsewhere, so that several that start together do not do the same items.
        first = random.Random(self.store.writer).randrange(len(shared)) if shared else 0
        shared = shared[first:] + shared[:first]
        here = crew_here(self.context)
        if shared and self.crew.is_here:
            self.folder.refuse_mixing(Place.here(self.setup.device))
        shape = "{desc} {n_fmt}/{total_fmt} items|{bar}| {elapsed}{postfix}"
        with contextlib.ExitStack() as stack:
            dispatch = stack.enter_context(Dispatch(self.crew if shared else here, self.folder.log))
            num_workers = min(dispatch.num_at_once, len(shared)) or 1
            left = Counter(item.kind for item in missing)
            time_left = self._time_left(left, num_workers)
            line = f"{name}: {len(missing)} items to do, {time_left} ({len(self.store)} are done)"
            self.folder.log(line)
            if self.progress:
                print(line, file=sys.stderr)
            with tqdm(total=len(missing), desc=name, disable=not self.progress, bar_format=shape) as bar:
                self._take(shared, dispatch, left, bar)
                stack.close()  # nothing else is to run while the machine is timed
                with Dispatch(here, self.folder.log) as timing:
                    self._take(alone, timing, left, bar)

    def _take(self, items: Sequence[WorkItem], dispatch: Dispatch, left: Counter[Kind], bar: Any) -> None:
        """Keep what becomes of ``items``. left: how many of each kind the bar waits for."""

        def tick(item: WorkItem) -> None:
            left[item.kind] -= 1
            text = f"left: {self._time_left(left, dispatch.num_at_once)}" if left.total() else ""
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        def due() -> Iterator[WorkItem]:
            for item in items:
                if time.monotonic() - self._refreshed > REFRESH_S:
                    self._refresh()
                if item in self.store:
                    tick(item)  # another process was faster
                else:
                    yield item

        num_failed = num_done = 0
        for outcome in dispatch.outcomes(due()):
            if outcome.result is None:
                num_failed += 1
                self._give_up(outcome)
                if num_failed == _MOST_FAILED_AT_FIRST and not num_done:
                    raise RuntimeError(
                        f"eval: items must give results, got none from the first {num_failed}, each tried {NUM_TRIES} "
                        f"times: {outcome.error}"
                    )
            else:
                num_done += 1
                if outcome.item.task not in ALONE:
                    self.folder.refuse_mixing(outcome.place)
                if outcome.item not in self.store:
                    self.store.add(outcome.item, outcome.result, outcome.seconds, outcome.place)
            tick(outcome.item)

    def _give_up(self, outcome: Outcome) -> None:
        path = self.store.fail(outcome.item, outcome.error, outcome.trace, NUM_TRIES, outcome.place)
        self._failed[outcome.item] = outcome.error
        self.folder.log(f"item {outcome.item.key} failed {NUM_TRIES} times, see {path.name}: {outcome.error}")

    def _refresh(self) -> None:
        self.store.refresh()
        self._refreshed = time.monotonic()

    def _time_left(self, kinds: Counter[Kind], num_workers: int) -> str:
        """How long so many items of each kind should take, by finished ones; nothing is known of other kinds yet."""
        total_s, num_new = 0.0, 0
        for kind, count in kinds.items():
            seconds = self.store.seconds_like(kind)
            if seconds is None:
                num_new += count
            else:
                total_s += count * seconds / (1 if kind[0] in ALONE else num_workers)
        if num_new == kinds.total():
            return "time not known yet"
        return f"about {duration(total_s)}" + (f" and {num_new} of kinds not timed yet" if num_new else "")


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
