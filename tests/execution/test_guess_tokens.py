"""Guesses in one call into the extension: the tokens, entries and counts of the same steps one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from caches import assert_same_entries
from families import ALL_VARIANTS, native_model
from models import NUM_LAYERS, VARIANTS

from dynskip import CausalLM, LayerPath, SamplingParams
from dynskip.execution.compact import CompactExecutor
from dynskip.execution.executor import Executor
from dynskip.execution.kv_cache import KVCacheMemoryError
from dynskip.execution.native_steps import NativeSteps
from dynskip.execution.turns import Guesses, Turns, rows_step
from dynskip.ops import native
from dynskip.sampling import NOT_FINITE, Choice

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the C++ extension")

PATHS = [LayerPath.parse(text, NUM_LAYERS) for text in ("full", "uniform:4", "exit:5", "layers:0,2,5", "full")]
DRAFTS = [LayerPath.parse(text, NUM_LAYERS) for text in ("exit:3", "uniform:4", "layers:1,4", "layers:0,5", "full")]
DRAFTS[3] = LayerPath.of(NUM_LAYERS, [], allow_empty=True)
LENGTHS = [5, 1, 9, 3, 7]
CACHE_IDS = [3, 0, 4, 1, 2]
NUM_GUESSES = [4, 1, 6, 4, 2]
PROMPT_TOKENS = 50  # others are guessed only
# One new token each, as behind entries of the path; some, as where the draft's own entries lack the last tokens.
ONE_EACH, SOME = [1] * 5, [2, 1, 1, 4, 3]
GREEDY = SamplingParams()
DRAWN = [
    SamplingParams(temperature=1.3, seed=5),
    GREEDY,
    SamplingParams(temperature=0.8, top_k=7, top_p=0.9),
    SamplingParams(temperature=2.0, top_p=0.8, min_p=0.2),
    SamplingParams(temperature=1.0, top_k=40),
]


class Case:
    """A cache behind prompts, and what is guessed there; the prompts have run op by op."""

    def __init__(
        self,
        model: CausalLM,
        num_tokens: Sequence[int] = ONE_EACH,
        params: Sequence[SamplingParams] = (GREEDY,) * 5,
        num_guesses: Sequence[int] = NUM_GUESSES,
        num_slots: int = 400,
        longest: int = 24,
        num_common: Sequence[int] | None = None,
    ) -> None:
        executor = model.new_executor("compact", model.deterministic)
        assert isinstance(executor, CompactExecutor) and executor.native_steps is not None
        self.executor = executor
        self.cache = executor.new_cache(5, longest, num_slots)
        generator = torch.Generator().manual_seed(1)
        prompts, tokens = (
            [torch.randint(3, PROMPT_TOKENS, (length,), generator=generator).tolist() for length in lengths]
            for lengths in (LENGTHS, num_tokens)
        )
        steps, executor.native_steps = executor.native_steps, None
        with torch.no_grad():
            executor.run(rows_step(prompts, [0] * 5, CACHE_IDS, PATHS, model.device, decode=False), self.cache)
        executor.native_steps = steps
        executor.row_counts.reset()
        choices = [Choice(each, 11 + index, index, 2 * index) for index, each in enumerate(params)]
        self.turns = Turns(tokens, LENGTHS, CACHE_IDS, DRAFTS, num_guesses, choices, model.device, num_common)

    def guess(self, how: str) -> Guesses:
        """The guesses: "whole" in one call, "step" in one call a step, "op" op by op."""
        with torch.no_grad():
            if how == "whole":
                return self.executor.guess(self.turns, self.cache)
            if how == "op":
                self.executor.native_steps = None
            return Executor.guess(self.executor, self.turns, self.cache)


def kept_states(turns: Turns, guesses: list[list[int]], states: torch.Tensor) -> torch.Tensor:
    """[N, C]: the states that are defined."""
    assert states.shape[:2] == (turns.num_steps, len(guesses)) and turns.num_common is not None
    kept = [states[: len(tokens), i] for i, tokens in enumerate(guesses) if turns.num_common[i]]
    return torch.cat(kept)


def assert_same(model: CausalLM, **options: Any) -> list[list[int]]:
    whole = Case(model, **options)
    guesses, states = whole.guess("whole")
    for how in ("step", "op"):
        other = Case(model, **options)
        tokens, expected = other.guess(how)
        assert guesses == tokens, how
        assert (states is None) == (expected is None)
        if states is not None and expected is not None:
            assert torch.equal(*(kept_states(whole.turns, guesses, each) for each in (states, expected))), how
        assert_same_entries(whole.cache, other.cache)
        assert whole.executor.row_counts.run == other.executor.row_counts.run
        assert whole.executor.row_counts.kv == other.executor.row_counts.kv
        used = whole.cache.num_slots_used
        assert whole.cache.free_slots[used:].equal(other.cache.free_slots[used:]), (
            "slots are given out alike afterwards"
        )
    return guesses


@pytest.mark.parametrize(
    ("family", "variant"), [*ALL_VARIANTS, *(("opt", name) for name in VARIANTS)], ids=lambda value: value
)
def test_one_call_guesses_what_its_steps_do(family: str, variant: str) -> None:
    guesses = assert_same(native_model(family, variant), num_tokens=SOME)
    assert list(map(len, guesses)) == NUM_GUESSES


@pytest.mark.parametrize("params", [(GREEDY,) * 5, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("num_tokens", [ONE_EACH, SOME], ids=["path", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["opt", "llama", "bloom", "gpt_neox"])
def test_in_every_dtype(
    family: str, dtype: torch.dtype, num_tokens: Sequence[int], params: Sequence[SamplingParams]
) -> None:
    model = native_model(family, "pre-norm" if family == "opt" else "plain", dtype, deterministic=True)
    guesses = assert_same(model, num_tokens=num_tokens, params=params)
    assert len({token for tokens in guesses for token in tokens}) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("opt", "pre-norm"),
        ("opt", "post-norm-projected"),
        ("llama", "plain"),
        ("gpt_neox", "plain"),
        ("bloom", "plain"),
    ],
)
def test_states_behind_some_layers_come_with_the_guesses(family: str, variant: str, dtype: torch.dtype) -> None:
    model = native_model(family, variant, dtype, deterministic=True)
    assert_same(model, num_common=[3, 0, 1, NUM_LAYERS, 2], params=DRAWN)


def test_by_several_threads(three_threads: None) -> None:
    assert_same(native_model("llama", "plain"), num_tokens=SOME, params=DRAWN)


def test_a_guess_that_is_not_finite_is_the_last() -> None:
    model = native_model("llama", "plain")
    guesses = Case(model).guess("whole").tokens[2]
    place = next(place for place, token in enumerate(guesses[:-1]) if token >= PROMPT_TOKENS)
    with torch.no_grad():
        model.decoder.embed_tokens.weight[guesses[place]] = float("nan")
    found = assert_same(model)
    assert found[2] == [*guesses[: place + 1], NOT_FINITE]
    assert sum(NOT_FINITE in tokens for tokens in found) < 5, "the others go on"


def test_a_draft_of_the_whole_path_guesses_what_the_path_chooses() -> None:
    """Sequence 4 is its own draft: its guesses are the tokens of plain decode steps."""
    model = native_model("opt", "pre-norm")
    case = Case(model)
    guesses = case.guess("whole").tokens[4]
    token, found = case.turns.tokens[4], []
    alone = Case(model)
    for place in range(2):
        step = rows_step([token], [LENGTHS[4] + place], [CACHE_IDS[4]], [PATHS[4]], model.device)
        likely = alone.executor.predict(step, alone.cache).most_likely
        assert likely is not None
        token = likely.tolist()
        found += token
    assert guesses == found


def test_it_is_one_entry_into_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls = Case(native_model("llama", "plain"), params=DRAWN), []
    call = native.guess_tokens

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return call(*arguments)

    def refused(*arguments: Any) -> Any:
        raise AssertionError("all of it is one call")

    monkeypatch.setattr(native, "guess_tokens", counted)
    for name in ("decode_step", "plan_rows", "choose_tokens", "most_likely"):
        monkeypatch.setattr(native, name, refused)
    case.guess("whole")
    assert len(calls) == 1


def test_times_are_those_of_all_steps() -> None:
    case = Case(native_model("llama", "plain"))
    steps = case.executor.native_steps
    assert isinstance(steps, NativeSteps)
    case.guess("whole")
    assert steps.times_s == (0, 0, 0)
    steps.is_timed = True
    case.guess("whole")
    assert all(time > 0 for time in steps.times_s)


def test_a_cache_that_is_too_small_is_an_error() -> None:
    model = native_model("llama", "plain")
    needed = sum(path.budget * length for path, length in zip(PATHS, LENGTHS, strict=True))
    case = Case(model, num_slots=needed + 39)
    with pytest.raises(KVCacheMemoryError, match="num_slots must be at most 39"):
        case.guess("whole")
    assert case.cache.num_slots_used == needed, "nothing has run"
    case = Case(model, longest=9 + 5)
    with pytest.raises(RuntimeError, match="guess_tokens: slot_tables must have room for one more entry of each row"):
        case.guess("whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_guesses": [4, 0, 6, 4, 2]}, r"num_guesses must lie in 1..63, .* got 0 of sequence 1"),
        ({"num_guesses": [4, 1, 56, 4, 2]}, r"num_guesses must lie in 1..55, .* got 56 of sequence 2"),
        ({"num_guesses": [4, 1, 6, 4]}, r"num_guesses must be contiguous \[5\] int64, got \[4\]"),
        ({"tokens": [[101], [5], [6], [7], [8]]}, "guess_tokens: token_ids must lie in 0..100, got 101 in row 0"),
        ({"cache_ids": [3, 0, 4, 1, 5]}, "guess_tokens: cache_ids must lie in 0..4, got 5 in row 4"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], message: str) -> None:
    case = Case(native_model("llama", "plain"))
    for name, value in changes.items():
        setattr(case.turns, name, value)
    used = case.cache.num_slots_used
    with pytest.raises(RuntimeError, match=message):
        raw_guess(case)
    assert case.cache.num_slots_used == used


def raw_guess(
    case: Case, choices: Sequence[torch.Tensor] = (), num_common: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    step, cache, steps = case.turns.first_step, case.cache, case.executor.native_steps
    assert steps is not None and steps.takes(step) and step.plan.active is not None
    return native.guess_tokens(
        steps._handle,
        step.token_ids,
        step.position_ids,
        step.cache_ids,
        step.plan.active,
        torch.tensor(case.turns.num_guesses),
        choices,
        None if num_common is None else torch.tensor(num_common),
        cache.k_cache,
        cache.v_cache,
        cache.slot_positions,
        cache.context_lens,
        cache.slot_tables,
        cache.free_slots,
        cache.slot_cursor,
        torch.zeros(2, NUM_LAYERS, dtype=torch.int64),
        False,
    )


def test_states_are_kept_behind_layers_of_the_decoder() -> None:
    case = Case(native_model("llama", "plain"))
    with pytest.raises(RuntimeError, match=r"guess_tokens: num_common must lie in 0..6, got 7 in row 2"):
        raw_guess(case, num_common=[0, 6, 7, 0, 0])


def test_choices_are_seven_columns_or_none() -> None:
    case = Case(native_model("llama", "plain"))
    with pytest.raises(RuntimeError, match="choices must be seven columns or none, got 1"):
        raw_guess(case, (torch.zeros(5),))
    with pytest.raises(RuntimeError, match=r"guess_tokens: temperature must be contiguous \[5\] float64"):
        raw_guess(case, (torch.zeros(5),) * 7)
