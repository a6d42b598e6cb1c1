"""Log-likelihoods of references along many paths: items of the task "likelihood", and what they gave as arrays."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynskip.data.examples import Example
from dynskip.evaluation.stats.intervals import Floats
from dynskip.evaluation.sweep.checkpoints import Checkpoint
from dynskip.evaluation.sweep.context import Context, num_rows, shard_items
from dynskip.evaluation.sweep.dataset import Row
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, Option, WorkItem
from dynskip.evaluation.tasks.path_families import Member, families
from dynskip.evaluation.tasks.strategies import drawn_path, is_drawn
from dynskip.measure.passes import TokenMeasured, TokenPass, in_parts, run_paths
from dynskip.paths import LayerPath


@dataclass(frozen=True)
class Likelihoods:
    """Nats of N references along K paths: minus the log-likelihood of all response tokens, teacher-forced.

    nats, entropy: [N, K]; entropy is that of what follows the prompt. num_tokens: [N]. token_nats: [T, K], of each
    token, one reference after the other; without rows where tokens were not asked for.
    """

    nats: Floats
    entropy: Floats
    num_tokens: Floats
    token_nats: Floats

    @property
    def scores(self) -> Floats:
        """[N, K]: the mean log-likelihood of a token of each reference."""
        return -self.nats / self.num_tokens[:, None]

    def first(self, count: int) -> Likelihoods:
        """Those of the first ``count`` references."""
        tokens = int(self.num_tokens[:count].sum())
        return Likelihoods(self.nats[:count], self.entropy[:count], self.num_tokens[:count], self.token_nats[:tokens])

    @property
    def token_units(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[T]: the reference that each token belongs to."""
        return np.repeat(np.arange(len(self.num_tokens)), self.num_tokens.astype(np.int64))


def likelihood_items(
    setup: Setup,
    checkpoint: Checkpoint,
    paths: Sequence[str],
    split: str | None = None,
    tokens: bool = False,
    num_rows: int | None = None,
) -> list[WorkItem]:
    """The items that score the references of ``split`` along ``paths``, distinct; tokens: each token by itself.

    A path may be a name of `strategies.drawn_name`: each reference runs its own.

    num_rows: how many references (default: as the setup says).
    """
    split = split or setup.split
    options: dict[str, Option] = {"dtype": setup.dtype, "num_rows": num_rows or likelihood_rows(setup, split)}
    if tokens:
        options["tokens"] = "float16"
    return shard_items(setup, "likelihood", checkpoint, " ".join(paths), split, 0, True, **options)


def likelihood_rows(setup: Setup, split: str) -> int:
    """How many references of ``split`` are scored: those to judge on, or those to learn from."""
    return setup.num_likelihoods if split == setup.split else num_rows(setup, split)


def member_items(setup: Setup, members: Sequence[Member], split: str | None = None) -> list[WorkItem]:
    """The items that score the references along the paths of ``members``, each with its own weights."""
    return [item for group in _by_weights(members) for item in _items_of(setup, group, split)]


def member_likelihoods(
    setup: Setup, store: ItemStore, members: Sequence[Member], split: str | None = None
) -> Likelihoods:
    """What ``member_items`` gave: a column for each member, in order."""
    columns: dict[Member, Likelihoods] = {}
    for group in _by_weights(members):
        found = read_likelihoods(store, _items_of(setup, group, split))
        places = {path: [place] for place, path in enumerate(_paths_of(setup, group, split))}
        columns |= {
            member: Likelihoods(
                found.nats[:, place], found.entropy[:, place], found.num_tokens, found.token_nats[:, place]
            )
            for member, place in ((member, places[member.path]) for member in group)
        }
    ordered = [columns[member] for member in members]
    num_tokens = ordered[0].num_tokens
    assert all((each.num_tokens == num_tokens).all() for each in ordered), "all weights score the same references"
    return Likelihoods(
        np.concatenate([each.nats for each in ordered], axis=1),
        np.concatenate([each.entropy for each in ordered], axis=1),
        num_tokens,
        np.concatenate([each.token_nats for each in ordered], axis=1),
    )


def run_likelihood(item: WorkItem, context: Context) -> dict[str, Any]:
    """Rows of the shard, their response tokens, and by path the nats of each response and the entropy before it.

    tokens: also of each token, float16 in base64.
    """
    llm = context.llm(item.checkpoint)
    rows = context.shard(item)
    names = item.path.split()
    num_layers = llm.model.num_layers
    drawn = [name for name in names if is_drawn(name)]
    measured: dict[str, list[TokenMeasured]] = {name: [] for name in names}

    def run(texts: Sequence[Example], paths: dict[str, LayerPath]) -> None:
        def keep(path: LayerPath, found: Any) -> None:
            for name in paths:
                if paths[name] == path:
                    measured[name].append(found)

        if paths:
            run_paths(TokenPass(llm.model, texts), [*dict.fromkeys(paths.values())], keep)

    for part in in_parts(examples(rows)):
        run(part, {name: LayerPath.parse(name, num_layers, llm.model) for name in names if name not in drawn})
    for row in rows:
        run(examples([row]), {name: drawn_path(name, num_layers, row.index) for name in drawn})
    with_tokens = bool(dict(item.options).get("tokens"))
    return {
        "rows": [row.index for row in rows],
        "num_tokens": [len(row.response_ids) for row in rows],
        "paths": {name: _result(measured[name], with_tokens) for name in names},
    }


def examples(rows: Sequence[Row]) -> list[Example]:
    """The rows as texts to pass through a model."""
    return [Example(row.prompt_ids, row.response_ids, 0) for row in rows]


def read_likelihoods(store: ItemStore, items: Sequence[WorkItem]) -> Likelihoods:
    """What the items of one checkpoint, path list and split gave, in the order of the split."""
    results = [store.result(item) for item in sorted(items, key=lambda item: item.shard)]
    names = items[0].path.split()

    def column(name: str, what: str) -> list[float]:
        return [value for result in results for value in result["paths"][name][what]]

    def tokens(name: str) -> Floats:
        parts = [base64.b64decode(result["paths"][name].get("token_nats", "")) for result in results]
        return np.concatenate([np.frombuffer(part, "<f2") for part in parts]).astype(np.float64)

    nats, entropy = (np.array([column(name, what) for name in names], np.float64).T for what in ("nats", "entropy"))
    num_tokens = np.array(store.column(items, "num_tokens"), dtype=np.float64)
    return Likelihoods(nats, entropy, num_tokens, np.stack([tokens(name) for name in names], axis=1))


def _result(parts: Sequence[TokenMeasured], with_tokens: bool) -> dict[str, Any]:
    nats = [value for part in parts for value in part.nats]
    if not np.isfinite(nats).all():
        raise ValueError("run_likelihood: logits must be finite, got NaN or infinity. Check the weights.")
    found: dict[str, Any] = {
        "nats": [round(value, 5) for value in nats],
        "entropy": [round(value, 6) for part in parts for value in part.entropy],
    }
    if with_tokens:
        each = np.array([value for part in parts for value in part.token_nats], dtype="<f2")
        found["token_nats"] = base64.b64encode(each.tobytes()).decode()
    return found


def _by_weights(members: Sequence[Member]) -> list[list[Member]]:
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(member.checkpoint.hash, []).append(member)
    return list(groups.values())


def _items_of(setup: Setup, members: Sequence[Member], split: str | None) -> list[WorkItem]:
    weights = members[0].checkpoint
    # Nothing chooses among the paths of weights before any tuning, for each token least of all.
    return likelihood_items(setup, weights, _paths_of(setup, members, split), split, weights != setup.backbone)


def _paths_of(setup: Setup, members: Sequence[Member], split: str | None) -> list[str]:
    """The paths that are scored with those of ``members``, of one set of weights: on the setup's split all of a family,
    so that what asks for some of them finds them done."""
    own = [member.path for member in members]
    if split in (None, setup.split):
        for family in families(setup).values():
            alike = [member.path for member in family if member.checkpoint == members[0].checkpoint]
            if set(own) <= set(alike):
                return alike
    return own
