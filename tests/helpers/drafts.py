"""What tests of drafts share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from streams import Ask

from dynskip import LayerPath
from dynskip.speculation.draft import Draft
from dynskip.speculation.lengths import Candidate, DraftLengths


def draw_lengths(monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """Lengths drawn at random, in place of those that pay."""
    draw = random.Random(0)
    choose = DraftLengths.choose

    def drawn_lengths(self: DraftLengths, candidates: Sequence[Candidate], others: Sequence[LayerPath] = ()) -> Any:
        lengths = tuple(draw.randint(0, min(each.most, draw.choice([1, 3, 8]))) for each in candidates)
        # Own entries are worth making, whatever they cost.
        return replace(choose(self, candidates, others), lengths=lengths, gain=1e9)

    monkeypatch.setattr(DraftLengths, "choose", drawn_lengths)
    monkeypatch.setattr(DraftLengths, "plain", lambda *_: None)
    return draw


def draft_options(draft: Draft) -> dict[str, Any]:
    """The arguments of a request that is given ``draft``."""
    return {"draft": draft.path, "draft_entries": draft.entries}


def with_draft(ask: Ask, draft: Draft) -> Ask:
    """The same request with a draft."""
    return Ask(ask.prompt, ask.params, ask.path, {**ask.options, **draft_options(draft)})


def fits(draft: Draft, path: LayerPath) -> bool:
    """Whether ``draft`` may guess for requests along ``path``."""
    return draft.entries == "own" or set(draft.path.layers) <= set(path.layers)
