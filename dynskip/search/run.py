"""`PathSearch`: finds paths and drafts on some rows, judges them on others, and keeps what was found for the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dynskip.causal_lm import CausalLM
from dynskip.costs.defaults import default_costs
from dynskip.costs.store import device_key
from dynskip.data.conversations import draw_conversations, read_rows
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.files import file_hash, write_json
from dynskip.found import FoundDraft, FoundPaths
from dynskip.measure.passes import by_influence
from dynskip.models.found import place_to_keep
from dynskip.paths import LayerPath
from dynskip.search.drafts import DraftGains
from dynskip.search.frontier import FAMILIES, frontier, mean_value, static_paths
from dynskip.search.gauge import Bar, Gauge, Kind
from dynskip.search.methods import METHODS, best, by_swaps, greedily, num_removal_runs
from dynskip.speculation.draft import Draft, DraftEntries
from dynskip.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What each score asks of candidates. The likelier guesses are right, the more a draft of a given budget gains.
SCORES: dict[str, tuple[Kind, ...]] = {"loss": ("loss",), "agreement": ("own",), "speed": ("own", "path")}
MEASUREMENTS, RESULT, FIGURE = "measurements", "frontier.json", "frontier.svg"


@dataclass(frozen=True)
class SearchOptions:
    """What to search. budgets: those that are judged; a greedy search keeps those on its way as well.

    num_rows: to search on; num_judge_rows: others, to judge on. seed: draws both.
    """

    budgets: tuple[int, ...]
    score: str = "loss"
    method: str = "greedy"
    num_rows: int = 48
    num_judge_rows: int = 48
    seed: int = 1

    def check(self, num_layers: int) -> None:
        """Raise ValueError where a model of ``num_layers`` cannot be searched so."""
        for name, known in (("score", tuple(SCORES)), ("method", METHODS)):
            if getattr(self, name) not in known:
                raise ValueError(f"search: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        for budget in self.budgets:
            if not 1 <= budget < num_layers:
                raise ValueError(f"search: budgets must lie in 1..{num_layers - 1}, got {budget}.")
        if not self.budgets:
            raise ValueError("search: budgets must name at least one, got none.")
        if min(self.num_rows, self.num_judge_rows) < 1:
            raise ValueError("search: rows must be at least 1, to search on and to judge on, got none.")


class SearchResult(NamedTuple):
    """What was found, rows of a summary on how good it is on unseen rows, and the file that keeps what was found."""

    found: FoundPaths
    rows: list[dict[str, Any]]
    kept: Path


class PathSearch:
    """One search. folder: where its measures are kept, so that a killed search goes on where it was, and its results.

    Raises ValueError for options, or a data file, that do not fit.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        data: Path,
        options: SearchOptions,
        folder: Path,
        progress: bool = False,
    ) -> None:
        options.check(model.num_layers)
        self.model, self.options, self.folder, self.progress = model, options, folder, progress
        ends = model.eos_token_ids
        if not ends:
            raise ValueError("search: the model must have an end token, which references end with, got none.")
        counts = (options.num_judge_rows, options.num_rows)
        self.judged, self.searched = draw_conversations(
            tokenizer, read_rows(data), counts, ends[0], options.seed, model.decoder_config.max_positions
        )
        weights = model.weights_digest
        where = {"dtype": str(model.dtype), "device": str(model.device), "backend": model.backend.name}
        rows = {"rows": options.num_rows, "judge_rows": options.num_judge_rows}
        item = WorkItem("", weights, "", file_hash(data), "", options.seed, 0, tuple(sorted((where | rows).items())))
        self.items = {split: dataclasses.replace(item, split=split) for split in ("search", "judge")}
        adapter = getattr(model.config, "adapter", None)
        self.conditions = {
            "model": Path(model.config.name_or_path).name,
            **({} if adapter is None else {"adapter": Path(adapter).name}),
            "data": data.name,
            **dataclasses.asdict(options),
            **where,
            "dynskip": __version__,
        }

    def run(self) -> SearchResult:
        """Search, judge, and keep what was found; all that a killed run had measured is there already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        bar = Bar(self.progress)
        try:
            with ItemStore(self.folder / MEASUREMENTS) as store:
                searching = Gauge(self.model, self.searched, store, self.items["search"], bar)
                judging = Gauge(self.model, self.judged, store, self.items["judge"], bar)
                found, rows = self._search(searching, judging)
        finally:
            bar.close()
        kept = place_to_keep(found.weights, self.model.weights_folder)
        before = self.model.found_paths
        (found if before is None else before.updated(found)).write(kept)
        result = {"found": dataclasses.asdict(found), "families": FAMILIES, "rows": rows}
        write_json(self.folder / RESULT, result)
        return SearchResult(found, rows, kept)

    def _search(self, searching: Gauge, judging: Gauge) -> tuple[FoundPaths, list[dict[str, Any]]]:
        options = self.options
        kinds = SCORES[options.score]
        paths = {kind: self._find(searching, kind) for kind in kinds}
        is_speed = options.score == "speed"
        gains = DraftGains(default_costs(self.model), self.model.executor().resumes) if is_speed else None
        rows = []
        for kind in dict.fromkeys(("loss", "own", *kinds)):
            rows += frontier(judging, kind, paths.get(kind, paths[kinds[0]]), options.budgets, gains)
        empty = FoundPaths(self.model.weights_digest, self.model.num_layers)
        if gains is not None:
            draft = self._best_draft(searching, judging, paths, gains)
            conditions = {"draft": self.conditions | {"costs": device_key(str(self.model.device))}}
            return dataclasses.replace(empty, draft=draft, searched_draft=True, conditions=conditions), rows
        layers = {budget: path.layers for budget, path in paths[kinds[0]].items()}
        return dataclasses.replace(empty, layers=layers, conditions={"paths": self.conditions}), rows

    def _find(self, gauge: Gauge, kind: Kind) -> dict[int, LayerPath]:
        """By budget: the best path by ``kind`` of what the method finds and of the static rules."""
        num_layers, least, method = self.model.num_layers, min(self.options.budgets), self.options.method

        def evaluate(paths: Sequence[LayerPath], is_planned: bool = False) -> list[float]:
            sign = -1 if kind == "loss" else 1
            return [sign * mean_value(kind, each) for each in gauge.measure(kind, paths, is_planned)]

        if method == "influence":
            found = by_influence(gauge.influence(), least)
        else:
            gauge.bar.plan(num_removal_runs(num_layers, least) * gauge.num_parts(kind))
            found = greedily(num_layers, least, lambda paths: evaluate(paths, is_planned=True))
            if method == "swap":
                found |= by_swaps({budget: found[budget] for budget in self.options.budgets}, evaluate)
        rivals = {
            budget: [path, *static_paths(num_layers, budget)["uniform"], *static_paths(num_layers, budget)["exit"]]
            for budget, path in found.items()
        }
        evaluate([path for paths in rivals.values() for path in paths])  # all at once: many of them begin alike
        return {budget: best(paths, evaluate) for budget, paths in rivals.items()}

    def _best_draft(
        self, searching: Gauge, judging: Gauge, paths: Mapping[Kind, Mapping[int, LayerPath]], gains: DraftGains
    ) -> FoundDraft | None:
        """The draft that gains most on the rows of the search; None where it does not pay on those of the judge."""
        best_gain, best_draft, best_kind = 0.0, None, None
        for kind, found in paths.items():
            entries: DraftEntries = "own" if kind == "own" else "path"
            # Of a beginning the path does not run the guessed rows again: it may gain more, right less often.
            exits = [LayerPath.early_exit(self.model.num_layers, budget) for budget in found]
            candidates = [*dict.fromkeys((*found.values(), *exits))]
            for path, measured in zip(candidates, searching.measure(kind, candidates), strict=True):
                draft = Draft(path, entries)
                gain = gains.gain(draft, mean_value(kind, measured))
                if gain > best_gain:
                    best_gain, best_draft, best_kind = gain, draft, kind
        assert best_draft is not None and best_kind is not None, "a gain is positive"
        agreement = mean_value(best_kind, judging.measure(best_kind, [best_draft.path])[0])
        if not gains.pays(best_draft, agreement):
            return None
        gain = round(gains.gain(best_draft, agreement), 4)
        device = device_key(str(self.model.device))
        return FoundDraft(best_draft.path.layers, best_draft.entries, round(agreement, 4), gain, device)
