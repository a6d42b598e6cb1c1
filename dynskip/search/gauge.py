"""`Gauge`: measures paths on one set of texts, and keeps every measure on the disk as soon as it is there."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Literal

from dynskip.causal_lm import CausalLM
from dynskip.data.examples import Example
from dynskip.engine.closed_batch import Generation
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.measure.passes import DraftPass, Measured, Pass, block_influence, in_parts, num_layer_runs, run_paths
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams

# What is measured: nats of the reference answers; agreement with the full path's own answers, by a path with entries
# of its own, and by one that reads the full path's.
Kind = Literal["loss", "own", "path"]
# Tokens of the full path's own answers.
ANSWER_TOKENS = 64


class Bar:
    """Progress in runs of a layer over a set of texts, for a bar with the time that is left."""

    def __init__(self, shown: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=0, unit="layer", desc="search", leave=False, disable=not shown)

    def plan(self, count: int) -> None:
        """``count`` more are to be run; fewer than was thought where it is negative."""
        self._bar.total += count
        self._bar.refresh()

    def done(self, count: int) -> None:
        """``count`` more have run."""
        self._bar.update(count)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


class Gauge:
    """The texts of a search, or of its judge, and what is known of paths on them.

    item: what all measures have in common, with the name of the split. bar: told of layers that run.
    """

    def __init__(
        self, model: CausalLM, references: Sequence[Example], store: ItemStore, item: WorkItem, bar: Bar
    ) -> None:
        self.model, self.references = model, list(references)
        self.store, self.item, self.bar = store, item, bar
        self._passes: dict[tuple[Kind, int], Pass] = {}

    def measure(self, kind: Kind, paths: Iterable[LayerPath], is_planned: bool = False) -> list[Measured]:
        """What ``kind`` says of ``paths`` on all texts. is_planned: the bar knows of them."""
        wanted = list(paths)
        parts = self._parts(kind)
        missing = [
            [path for path in dict.fromkeys(wanted) if self._item(kind, path, part) not in self.store]
            for part in range(len(parts))
        ]
        planned = num_layer_runs(wanted) * len(parts) if is_planned else 0
        self.bar.plan(sum(map(num_layer_runs, missing)) - planned)
        for part, (texts, left) in enumerate(zip(parts, missing, strict=True)):
            self._run(kind, part, texts, left)
        results = [[self.store.result(self._item(kind, path, part)) for part in range(len(parts))] for path in wanted]
        return [_joined(each) for each in results]

    def num_parts(self, kind: Kind) -> int:
        """How many batches of texts each path of ``kind`` runs over."""
        return len(self._parts(kind))

    def influence(self) -> list[float]:
        """[L]: the influence of each layer; see `block_influence`."""
        item = dataclasses.replace(self.item, task="search influence", path="full")
        if item not in self.store:
            start = time.monotonic()
            parts = in_parts(self.references)
            found = [block_influence(self.model, texts) for texts in parts]
            counts = [sum(text.num_tokens - 1 for text in texts) for texts in parts]
            weighted = [[count * value for value in each] for count, each in zip(counts, found, strict=True)]
            mean = [sum(each) / sum(counts) for each in zip(*weighted, strict=True)]
            self.store.add(item, {"influence": mean}, time.monotonic() - start)
        influence: list[float] = self.store.result(item)["influence"]
        return influence

    def _parts(self, kind: Kind) -> list[list[Example]]:
        return in_parts(self.references if kind == "loss" else self.answers)

    @cached_property
    def answers(self) -> list[Example]:
        """The prompts with the full path's own greedy answers."""
        item = dataclasses.replace(self.item, task="search answers", path="full")
        if item not in self.store:
            start = time.monotonic()
            prompts = [text.prompt_ids for text in self.references]
            room = self.model.decoder_config.max_positions - max(map(len, prompts))
            params = SamplingParams(max_tokens=min(ANSWER_TOKENS, room))
            generation = Generation(self.model, prompts, [params] * len(prompts))
            token_ids = [sequence.token_ids for sequence in generation.run()]
            for output in generation.outputs:
                if output.error is not None:
                    raise output.error
            self.store.add(item, {"token_ids": token_ids}, time.monotonic() - start)
        answers = self.store.token_ids(item)["token_ids"]
        pairs = zip(self.references, answers, strict=True)
        return [Example(text.prompt_ids, tuple(answer), 0) for text, answer in pairs]

    def _run(self, kind: Kind, part: int, texts: Sequence[Example], paths: Sequence[LayerPath]) -> None:
        if not paths:
            return
        place = (kind, part)
        if place not in self._passes:
            self._passes[place] = (DraftPass if kind == "path" else Pass)(self.model, texts)
        start = time.monotonic()

        def keep(path: LayerPath, measured: Measured) -> None:
            nonlocal start
            now = time.monotonic()
            result = dataclasses.asdict(measured)
            # JSON has no NaN: logits that are not finite are as bad as they can be.
            result["nats"] = [nats if math.isfinite(nats) else None for nats in measured.nats]
            self.store.add(self._item(kind, path, part), result, now - start)
            start = now

        run_paths(self._passes[place], paths, keep, self.bar.done)

    def _item(self, kind: Kind, path: LayerPath, part: int) -> WorkItem:
        layers = ",".join(map(str, path.layers))
        return dataclasses.replace(self.item, task=f"search {kind}", path=f"layers:{layers}", shard=part)


def _joined(results: Sequence[dict[str, list[float | None]]]) -> Measured:
    """The measures of all parts, one text after the other."""
    columns = {name: [value for each in results for value in each[name]] for name in ("nats", "agreed", "num_tokens")}
    nats = tuple(math.inf if value is None else value for value in columns["nats"])
    return Measured(nats, tuple(columns["agreed"]), tuple(columns["num_tokens"]))  # type: ignore[arg-type]  # integers
