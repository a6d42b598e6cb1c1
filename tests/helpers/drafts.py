"""What tests of drafts share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from models import NUM_LAYERS, random_prompts
from streams import PATHS, Ask, drawn, greedy, random_changes

from dynskip import Engine, LayerPath
from dynskip.engine.drafting import Drafting
from dynskip.engine.request import RequestOutput
from dynskip.speculation.draft import ENTRIES, Draft
from dynskip.speculation.lengths import Candidate, DraftLengths

FULL = PATHS[3]
# A layer of a random model changes little: leaving one out is right about half of the time.
DRAFTS = [
    Draft(LayerPath.of(NUM_LAYERS, [0, 1, 2, 3, 4]), "path"),
    Draft(LayerPath.of(NUM_LAYERS, [0, 1, 2, 3, 4])),
    Draft(LayerPath.of(NUM_LAYERS, [0, 2, 3, 5]), "path"),
    Draft(LayerPath.of(NUM_LAYERS, [1, 2, 4, 5])),
    Draft(LayerPath.of(NUM_LAYERS, [], allow_empty=True)),
    Draft(FULL),
    Draft(FULL, "path"),
]


def draw_lengths(monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """Lengths drawn at random at each step, not those that pay; own entries are worth making, whatever they cost.

    Nothing hangs on the clock: no step rests behind a length of zero, and none is a look.
    """
    draw = random.Random(0)
    choose = DraftLengths.choose

    def drawn_lengths(self: DraftLengths, candidates: Sequence[Candidate], others: Sequence[LayerPath] = ()) -> Any:
        lengths = tuple(draw.randint(0, min(each.most, draw.choice([1, 3, 8]))) for each in candidates)
        return replace(choose(self, candidates, others), lengths=lengths)

    monkeypatch.setattr(DraftLengths, "choose", drawn_lengths)
    monkeypatch.setattr(DraftLengths, "plain", lambda *_: None)
    monkeypatch.setattr(Drafting, "_is_worth_entries", lambda *_: True)
    monkeypatch.setattr(Drafting, "_rest", lambda _: None)
    monkeypatch.setattr(Drafting, "_probe", lambda *_: None)
    return draw


def draft_options(draft: Draft) -> dict[str, Any]:
    """The arguments of a request that is given ``draft``."""
    return {"draft": draft.path, "draft_entries": draft.entries}


def with_draft(ask: Ask, draft: Draft) -> Ask:
    """The same request with a draft."""
    return Ask(ask.prompt, ask.params, ask.path, {**ask.options, **draft_options(draft)})


def random_path(draw: random.Random) -> LayerPath:
    """A path of one layer or more of a tiny model."""
    return LayerPath.of(NUM_LAYERS, draw.sample(range(NUM_LAYERS), draw.randint(1, NUM_LAYERS)))


def random_draft(draw: random.Random, path: LayerPath) -> Draft:
    """Any draft for requests along ``path``, those without a layer and those as deep as the model among them."""
    entries = draw.choice(ENTRIES)
    layers = path.layers if entries == "path" else range(path.num_layers)
    chosen = draw.sample(layers, draw.randint(0, len(layers)))
    return Draft(LayerPath.of(path.num_layers, chosen, allow_empty=True), entries)


def serve_with_drafts(served: Engine, asks: Sequence[Ask], draw: random.Random) -> list[RequestOutput]:
    """The outputs of ``asks``, which come a few steps apart, four of five with any draft; in their order."""
    ids, outputs = [], {}
    for index, ask in enumerate(asks):
        told = ask if index % 5 == 4 else with_draft(ask, random_draft(draw, ask.path))
        ids.append(told.add(served))
        for _ in range(draw.choice([0, 0, 1, 2])):
            outputs.update({output.request_id: output for output in served.step()})
    outputs.update({output.request_id: output for output in served.run()})
    return [outputs[request_id] for request_id in ids]


def asks_of(count: int, seed: int, changes_logits: bool = False) -> list[Ask]:
    """Requests of all lengths, paths, ways to choose a token and to end; two of three change logits, if any does."""
    draw = random.Random(seed)
    asks = []
    for index, prompt in enumerate(random_prompts([draw.randint(1, 20) for _ in range(count)], seed)):
        max_tokens = draw.randint(1, 16)
        copies = draw.choice([1, 1, 1, 3])
        params = (
            greedy(max_tokens, n=copies)
            if index % 2
            else drawn(max_tokens, index, n=copies, top_p=draw.choice([1.0, 0.7]), top_k=draw.choice([None, 5]))
        )
        if changes_logits and index % 3:
            params = replace(params, **random_changes(draw))
        asks.append(Ask(prompt, params, random_path(draw) if draw.random() < 0.5 else FULL))
    return asks
