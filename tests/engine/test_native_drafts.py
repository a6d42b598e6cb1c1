"""Drafts on the native backend, which guesses in one call: the same outputs as without, bit for bit."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from drafts import asks_of as random_asks
from drafts import draw_lengths, serve_with_drafts, with_draft
from families import native_model
from models import NUM_LAYERS, random_prompts, tiny_hf, tiny_model
from streams import PATHS, Ask, assert_empty, drawn, engine, greedy, random_changes, same, serve

from dynskip import CausalLM, LayerPath
from dynskip.engine.drafting import DraftWarning
from dynskip.engine.model_runner import ModelRunner
from dynskip.engine.request import Span
from dynskip.measure.agreement import Gate, NearTies
from dynskip.models.linear import NATIVE_ROWS
from dynskip.ops import native
from dynskip.scheduler.policies.make import POLICIES
from dynskip.speculation.draft import Draft
from dynskip.speculation.lengths import Candidate, DraftLengths

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the C++ extension")

FULL = PATHS[3]
DRAFTS = [
    Draft(LayerPath.of(NUM_LAYERS, [0, 1, 2, 3, 4]), "path"),
    Draft(LayerPath.of(NUM_LAYERS, [0, 2, 3, 5]), "path"),
    Draft(LayerPath.of(NUM_LAYERS, [1, 2, 4, 5])),
    Draft(FULL, "path"),
    Draft(LayerPath.of(NUM_LAYERS, [], allow_empty=True)),
]


@functools.cache
def model(family: str = "opt", dtype: torch.dtype = torch.float32) -> CausalLM:
    return native_model(family, "pre-norm" if family == "opt" else "plain", dtype, deterministic=True)


@pytest.fixture(autouse=True)
def random_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths drawn at random, in place of those that pay."""
    draw_lengths(monkeypatch)


def prompts(count: int) -> list[list[int]]:
    return random_prompts([3 + index % 5 for index in range(count)])


def asks_of(count: int, is_drafted: bool) -> list[Ask]:
    """Requests of all drafts together, greedy ones and drawn ones."""
    asks = []
    for index, prompt in enumerate(prompts(count)):
        draft = DRAFTS[index % len(DRAFTS)]
        params = greedy(14) if index % 2 else drawn(14, index, n=1 + index % 3, top_p=0.9)
        options = {"draft": draft.path, "draft_entries": draft.entries} if is_drafted else {}
        asks.append(Ask(prompt, params, FULL, options))
    return asks


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each decode step to come."""
    decode, num_rows = ModelRunner.decode, []

    def counted(self: ModelRunner, spans: Sequence[Span], *others: Any) -> Any:
        num_rows.append(sum(span.num_tokens for span in spans))
        return decode(self, spans, *others)

    monkeypatch.setattr(ModelRunner, "decode", counted)
    return num_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guesses_know_nothing_of_what_changes_logits(dtype: torch.dtype) -> None:
    own, draw = model("llama", dtype), random.Random(2)
    changes = [random_changes(draw) if index % 4 else {} for index in range(12)]

    def changed(asks: list[Ask]) -> list[Ask]:
        return [replace(ask, params=replace(ask.params, **each)) for ask, each in zip(asks, changes, strict=True)]

    served = engine(model=own, batch=6)
    outputs = serve(served, changed(asks_of(12, True)))
    for output, ask in zip(outputs, changed(asks_of(12, False)), strict=True):
        assert same(output, ask.alone(model=own))
    assert served.tally.num_drafted > served.tally.num_accepted > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt_neox"])
def test_a_batch_of_drafts_equals_the_one_without(family: str, dtype: torch.dtype) -> None:
    own = model(family, dtype)
    served = engine(model=own, batch=6)
    outputs = serve(served, asks_of(10, True))
    for output, ask in zip(outputs, asks_of(10, False), strict=True):
        assert same(output, ask.alone(model=own))
    assert served.tally.num_drafted > served.tally.num_accepted > 0
    for output in outputs[3::5]:
        assert output.num_drafted == output.num_accepted > 0, "the path agrees with itself"


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_without_determinism_bf16_is_equal_to_the_bit_up_to_48_rows(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = native_model(family, "pre-norm" if family == "opt" else "plain", torch.bfloat16)
    choose = DraftLengths.choose

    def seven(self: DraftLengths, candidates: Sequence[Candidate], others: Sequence[LayerPath] = ()) -> Any:
        return replace(choose(self, candidates, others), lengths=tuple(min(7, each.most) for each in candidates))

    monkeypatch.setattr(DraftLengths, "choose", seven)
    num_rows = count_rows(monkeypatch)
    served = engine(model=own, batch=6)
    outputs = serve(served, [replace(ask, params=greedy(30)) for ask in asks_of(10, True)])
    assert max(num_rows) == NATIVE_ROWS == 48 and len({*num_rows}) > 6
    for output, ask in zip(outputs, asks_of(10, False), strict=True):
        assert same(output, replace(ask, params=greedy(30)).alone(model=own))
    assert served.tally.num_drafted > served.tally.num_accepted > 0


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 4), (torch.bfloat16, 16)])
def test_elsewhere_the_first_token_that_differs_is_a_near_tie(
    dtype: torch.dtype, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loose = CausalLM.from_hf(tiny_hf(dtype=dtype), backend="native")
    ties = NearTies(loose, Gate(tiny_hf(dtype=dtype), [FULL]))
    asks = [Ask(prompt, greedy(20), FULL) for prompt in random_prompts([9] * batch)]
    num_rows = count_rows(monkeypatch)
    outputs = serve(
        engine(model=loose, batch=batch),
        [with_draft(ask, DRAFTS[index % 3]) for index, ask in enumerate(asks)],
    )
    assert dtype == torch.float32 or max(num_rows) > NATIVE_ROWS
    for ask, output in zip(asks, outputs, strict=True):
        assert output.num_drafted > 0
        ties.num_equal("drafts", ask.prompt, output.token_ids, ask.alone(model=loose).token_ids)


@pytest.mark.parametrize("changes_logits", [False, True])
@pytest.mark.parametrize("num_slots", [None, 340])
@pytest.mark.parametrize("policy", POLICIES)
def test_streams_of_all_paths_and_drafts_equal_those_without(
    policy: str, num_slots: int | None, changes_logits: bool
) -> None:
    """Where no logits change tokens are drawn in the call of the step, else behind it."""
    own, draw = model("llama", torch.bfloat16), random.Random(3)
    asks = random_asks(24, 5, changes_logits)
    served = engine(policy, num_slots, batch=6, model=own)
    outputs = serve_with_drafts(served, asks, draw)
    assert_empty(served)
    for output, ask in zip(outputs, asks, strict=True):
        assert same(output, ask.alone(model=own))
    assert served.tally.num_drafted > served.tally.num_accepted > 0
    assert bool(served.stats().outcome.num_preempted) == (num_slots is not None)


def test_drawn_tokens_of_a_step_that_fails_are_those_of_its_sequences_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    decode, calls = ModelRunner.decode, []

    def fails(self: ModelRunner, spans: Sequence[Span], *others: Any) -> Any:
        predictions = decode(self, spans, *others)
        calls.append(predictions.drawn is not None)
        if len(calls) in (3, 4):
            raise MemoryError("fails behind the step")
        return predictions

    monkeypatch.setattr(ModelRunner, "decode", fails)
    asks = [replace(ask, params=drawn(12, index, top_p=0.8)) for index, ask in enumerate(asks_of(6, False))]
    served = engine(model=model(), batch=6)
    outputs = serve(served, asks)
    assert all(calls) and len(calls) > 12
    expected = [ask.alone(model=model()) for ask in asks]
    assert [output.finish_reason for output in outputs].count("error") == 1, "the one that failed alone, too"
    for output, alone in zip(outputs, expected, strict=True):
        assert output.finish_reason == "error" or same(output, alone)


def test_all_guesses_of_a_step_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    call = native.guess_tokens

    def counted(handle: int, token_ids: Any, position_ids: Any, cache_ids: Any, *others: Any) -> Any:
        tokens, states = call(handle, token_ids, position_ids, cache_ids, *others)
        calls.append(int((tokens >= 0).sum()))
        return tokens, states

    monkeypatch.setattr(native, "guess_tokens", counted)
    served = engine(model=model(), batch=6)
    serve(served, asks_of(10, True))
    assert sum(calls) == served.tally.num_drafted
    assert len(calls) < served.tally.num_decode_steps


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_draft_that_the_path_begins_with_runs_its_layers_once(backend: str) -> None:
    """All layers run the same rows: the draft's those that it guesses and the last guess, the others all of these."""
    own = model() if backend == "native" else tiny_model(deterministic=True)
    served = engine(model=own, batch=4)
    asks = [Ask(prompt, greedy(16), FULL, {"draft": LayerPath.early_exit(NUM_LAYERS, 4)}) for prompt in prompts(5)]
    outputs = serve(served, asks)
    for output, ask in zip(outputs, asks, strict=True):
        assert output.draft is not None and output.draft.entries == "path"
        assert same(output, Ask(ask.prompt, ask.params, FULL).alone(model=own))
    assert served.tally.num_drafted > 40
    counts = served.runner.executor.row_counts
    assert counts.run == [counts.run[0]] * NUM_LAYERS and counts.kv == counts.run


@pytest.mark.parametrize("num_failures", [1, 3])
def test_a_verification_that_fails_behind_its_layers_runs_again_without_guesses(
    num_failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = ModelRunner.decode, []

    def fails(self: ModelRunner, spans: Sequence[Any], *others: Any) -> Any:
        predictions = decode(self, spans, *others)
        if any(span.num_tokens > 1 for span in spans):
            calls.append(sum(span.sequence.begun is not None for span in spans))
            if 2 < len(calls) <= 2 + num_failures:
                raise MemoryError("fails behind the step")
        return predictions

    monkeypatch.setattr(ModelRunner, "decode", fails)
    served = engine(model=model(), batch=6)
    outputs = serve(served, asks_of(10, True))
    assert sum(calls) > 10
    for output, ask in zip(outputs, asks_of(10, False), strict=True):
        assert same(output, ask.alone(model=model()))


def test_a_fault_in_the_call_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    call, calls = native.guess_tokens, []

    def fails(*arguments: Any) -> Any:
        calls.append(1)
        tokens = call(*arguments)
        if len(calls) == 3:
            raise RuntimeError("guesses fail behind the steps")
        return tokens

    monkeypatch.setattr(native, "guess_tokens", fails)
    served = engine(model=model(), batch=6)
    with pytest.warns(DraftWarning, match="guesses fail behind the steps"):
        outputs = serve(served, asks_of(10, True))
    for output, ask in zip(outputs, asks_of(10, False), strict=True):
        assert same(output, ask.alone(model=model()))
    assert_empty(served)
