"""The choice of tokens: against exact probabilities, and the extension against the specification, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper

from dynskip import SamplingParams
from dynskip.ops import choice, choice_reference, native
from dynskip.ops.choice import choice_columns, choose_tokens, most_likely
from dynskip.sampling import NOT_FINITE, Choice

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
# The chi-squared distribution exceeds its mean by more than this many standard deviations once in a million draws.
CHI_DEVIATIONS = 7
# At the edge of top_p the mass in float32 and the exact one may fall to different sides.
EDGE = 2e-6


def use_extension(instruction_set: str) -> Iterator[str]:
    if native.unavailable_reason() is not None:
        pytest.skip(str(native.unavailable_reason()))
    try:
        torch.ops.dynskip_native.use_instruction_set(instruction_set)
    except RuntimeError:
        pytest.skip(f"this machine has no {instruction_set}")
    yield instruction_set
    torch.ops.dynskip_native.use_instruction_set("best")


@pytest.fixture(params=["portable", "avx2", "avx512"])
def extension(request: pytest.FixtureRequest) -> Iterator[str]:
    """The extension with each instruction set of this machine."""
    yield from use_extension(request.param)


@pytest.fixture(params=["torch", "portable", "avx2", "avx512"])
def runs_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same, and the specification."""
    if request.param == "torch":
        monkeypatch.setattr(choice, "_launchers", lambda _logits: choice_reference)
        yield request.param
    else:
        yield from use_extension(request.param)


def draw_of(seed: int = 0, output: int = 0, position: int = 0, **params: Any) -> Choice:
    return Choice(SamplingParams(**{"temperature": 1.0, "seed": seed, **params}), seed, output, position)


def exact_probabilities(
    logits: list[float], temperature: float, top_k: int | None, top_p: float, min_p: float = 0.0
) -> list[float]:
    """The rule on plain lists: temperature, min_p, then the top_k best, then the fewest that reach top_p."""
    best = max(logits)
    weights = [math.exp((logit - best) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: -logits[token])  # stable: of equal ones the first
    kept = [token for token in order if weights[token] >= min_p][: top_k or len(order)]
    total = sum(weights[token] for token in kept)
    chosen, mass = [], 0.0
    for token in kept:
        if mass >= top_p * total:
            break
        chosen.append(token)
        mass += weights[token]
    total = sum(weights[token] for token in chosen)
    return [weights[token] / total if token in chosen else 0.0 for token in range(len(logits))]


def specified(logits: Tensor, choices: list[Choice]) -> list[int]:
    tokens: list[int] = choice_reference.choose_tokens(logits, *choice_columns(choices, logits.shape[1], CPU)).tolist()
    return tokens


def is_near_edge(logits: Tensor, row_choice: Choice) -> bool:
    """Whether the mass of some first tokens of a row [V] is its top_p, within `EDGE`."""
    params = row_choice.params
    floats = logits.float().sort(descending=True, stable=True).values[: params.top_k]
    if params.min_p:
        floats = floats[floats >= floats[0] + params.temperature * math.log(params.min_p)]
    mass = ((floats - floats[0]).double() / params.temperature).exp().cumsum(0)
    return params.top_p < 1 and bool(((mass / mass[-1] - params.top_p).abs() < EDGE).any())


def assert_as_specified(logits: Tensor, choices: list[Choice], most_edges: int = 0) -> None:
    """Tokens equal those of the specification, but for at most ``most_edges`` rows at the edge of their top_p."""
    expected, tokens = specified(logits, choices), choose_tokens(logits, choices)
    differing = [row for row, (token, wanted) in enumerate(zip(tokens, expected, strict=True)) if token != wanted]
    assert all(is_near_edge(logits[row], choices[row]) for row in differing) and len(differing) <= most_edges


def test_what_draws_is_launched_before_the_first_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """From logits as they are, and from float32, as changed ones are."""
    launched = []

    def note(logits: Tensor, *columns: Tensor) -> Tensor:
        launched.append((logits.dtype, logits.shape, len(columns)))
        return torch.zeros(1, dtype=torch.int64)

    monkeypatch.setattr(choice, "_launchers", lambda _logits: SimpleNamespace(choose_tokens=note))
    choice.warm_up(torch.full((4, 70), math.nan, dtype=torch.bfloat16))
    assert launched == [(dtype, (1, 70), 7) for dtype in (torch.bfloat16, torch.float32)]


def test_philox_gives_the_published_words() -> None:
    # kat_vectors of Random123, philox4x32 with 10 rounds.
    counters = ([0] * 4, [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344])
    keys = ([0] * 2, [0xFFFFFFFF] * 2, [0xA4093822, 0x299F31D0])
    expected = [
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ]
    words = choice_reference.philox(torch.tensor(counters).unbind(1), torch.tensor(keys).unbind(1))  # type: ignore[arg-type]
    for place, line in enumerate(expected):
        assert " ".join(f"{int(word[place]):08x}" for word in words) == line


def test_noise_is_that_of_its_key_and_its_ends_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    seed, output, position = (
        torch.tensor([5, 5, 5, 6, 5 + 2**40]),
        torch.tensor([0, 1, 0, 0, 0]),
        torch.tensor([0, 0, 1, 0, 0]),
    )
    noise = choice_reference.gumbel_noise(seed, output, position, 200)
    assert len({tuple(row) for row in noise.tolist()}) == 5
    assert len(set(noise.flatten().tolist())) == noise.numel()
    for num_tokens in (1, 17, 64, 65):
        fewer = choice_reference.gumbel_noise(seed[1:3], output[1:3], position[1:3], num_tokens)
        assert torch.equal(fewer, noise[1:3, :num_tokens])
    # The mean of the distribution is Euler's constant, its variance pi^2 / 6.
    many = choice_reference.gumbel_noise(seed, output, position, 40_000).flatten()
    assert abs(float(many.mean()) - 0.5772) < 4 * math.pi / math.sqrt(6 * many.numel())
    assert abs(float(many.var()) - math.pi**2 / 6) < 0.05
    largest, smallest = -math.log(-math.log1p(-(2.0**-33))), -math.log(33 * math.log(2))
    for word, expected in ((0, largest), (0xFFFFFFFF, smallest)):
        monkeypatch.setattr(choice_reference, "philox", lambda *_arguments, w=word: [torch.full((1, 16), w)] * 4)
        ends = choice_reference.gumbel_noise(seed[:1], output[:1], position[:1], 64)
        assert all(math.isclose(end, expected, rel_tol=1e-12) for end in ends.flatten().tolist())


@given(
    st.integers(1, 60).flatmap(lambda size: st.permutations(range(size))),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.none() | st.integers(1, 70),
    st.sampled_from([0.05, 0.5, 0.83, 1.0]),
    st.sampled_from([0.0, 0.05, 0.4, 1.0]),
)
def test_filters_keep_what_the_rule_keeps(
    order: list[int], temperature: float, top_k: int | None, top_p: float, min_p: float
) -> None:
    # Two of each logit: of equal ones the first comes first.
    logits = [(place // 2) * 0.137 for place in order]
    row = torch.tensor([logits])
    scaled = (row - row.max()).double() / temperature
    least = row.max() + temperature * torch.tensor([[min_p]]).log()
    kept = choice_reference.kept(
        row, scaled, torch.tensor([top_k or 0]), torch.tensor([top_p], dtype=torch.float64), least
    )
    expected = exact_probabilities(row[0].tolist(), temperature, top_k, top_p, min_p)
    assert kept[0].tolist() == [probability > 0 for probability in expected]


def test_filters_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()

    def kept(**params: Any) -> set[int]:
        return {choose_tokens(logits, [draw_of(seed, **params)])[0] for seed in range(60)}

    assert kept() == {0, 1, 2, 3} and kept(top_k=1) == {3} and kept(top_p=0.6) == {2, 3}
    # top_p counts the share among the top_k: 4/7 reaches 0.5.
    assert kept(top_k=2, top_p=0.5) == {3} and kept(top_k=2, top_p=0.6) == {2, 3}
    # min_p counts from the likeliest: 0.2 is half of it. What it leaves is what shares are of: 4/7 does not reach 0.6.
    assert kept(min_p=0.49) == {1, 2, 3} and kept(min_p=0.51) == kept(min_p=0.51, top_p=0.6) == {2, 3}
    assert kept(min_p=0.51, top_p=0.57) == {3} == kept(min_p=1.0) and kept(min_p=0.3, top_k=2) == {2, 3}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("min_p", [1e-9, 0.02, 0.3, 1.0])
def test_min_p_is_that_of_transformers(min_p: float, temperature: float) -> None:
    logits = 3 * torch.randn(40, 97, generator=torch.Generator().manual_seed(0))
    scaled = (logits - logits.amax(1, keepdim=True)).double() / temperature
    least = logits.amax(1, keepdim=True) + temperature * math.log(min_p)
    zeros, ones = torch.zeros(40, dtype=torch.int64), torch.ones(40, dtype=torch.float64)
    kept = choice_reference.kept(logits, scaled, zeros, ones, least)
    expected = MinPLogitsWarper(min_p)(torch.tensor([[1]] * 40), logits / temperature)
    assert torch.equal(kept, expected > -math.inf) and 0 < int(kept.sum()) <= kept.numel()


def test_draws_follow_the_probabilities(runs_on: str) -> None:
    # 7 settings of a small vocabulary in each batch, whose rows differ in seed, output or position.
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(1)) * 1.5
    logits[0, 4] = logits[0, 2]
    settings: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_k": 5},
        {"temperature": 1.4, "top_p": 0.8},
        {"temperature": 2.5, "top_k": 7, "top_p": 0.7},
        {"temperature": 1.5, "min_p": 0.3},
        {"temperature": 1.0, "min_p": 0.1, "top_k": 4},
        {"temperature": 2.0, "min_p": 0.25, "top_p": 0.6},
    ]
    num_draws = 5000
    counts = torch.zeros(len(settings), 9)
    for key in range(3):
        names = [
            {"seed": draw} if key == 0 else {"output": draw} if key == 1 else {"position": draw}
            for draw in range(num_draws)
        ]
        for place, setting in enumerate(settings):
            tokens = choose_tokens(logits.expand(num_draws, -1), [draw_of(**name, **setting) for name in names])
            counts[place] = torch.bincount(torch.tensor(tokens), minlength=9).float()
            params = SamplingParams(**setting)
            rule = params.temperature, params.top_k, params.top_p, params.min_p
            probabilities = exact_probabilities(logits[0].tolist(), *rule)
            expected = torch.tensor(probabilities) * num_draws
            possible = expected > 0
            assert int(counts[place][~possible].sum()) == 0
            freedom = int(possible.sum()) - 1
            chi = float(((counts[place] - expected).square() / expected)[possible].sum())
            assert chi < freedom + CHI_DEVIATIONS * math.sqrt(2 * freedom), (setting, key)


def test_what_the_extension_leaves_out_could_not_have_been_drawn(extension: str) -> None:
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(3)) * 2
    num_draws = 4000
    groups = torch.arange(5000) * 40 // 5000
    settings: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.5, "top_k": 900},
        {"temperature": 2.0, "min_p": 0.02},
    ]
    for params in settings:
        tokens = choose_tokens(logits.expand(num_draws, -1), [draw_of(seed, **params) for seed in range(num_draws)])
        given_params = SamplingParams(**params)
        exact = exact_probabilities(
            logits[0].tolist(),
            given_params.temperature,
            given_params.top_k,
            given_params.top_p,
            given_params.min_p,
        )
        expected = (
            torch.zeros(40, dtype=torch.float64).index_add_(0, groups, torch.tensor(exact, dtype=torch.float64))
            * num_draws
        )
        counts = torch.bincount(groups[tokens], minlength=40)
        chi = float(((counts - expected).square() / expected).sum())
        assert chi < 39 + CHI_DEVIATIONS * math.sqrt(2 * 39)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 63, 64, 65, 500, 3001])
def test_the_extension_chooses_as_specified(num_tokens: int, dtype: torch.dtype, extension: str) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 1e-6},
        {"temperature": 5e-324},
        {"temperature": 1e6},
        {"temperature": 1e308},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 40},
        {"top_k": num_tokens},
        {"top_k": max(num_tokens // 2, 1)},
        {"top_k": max(num_tokens // 7, 1), "temperature": 2.0},
        {"top_k": 10**30},
        {"top_p": 0.95},
        {"top_p": 0.3},
        {"top_p": 1e-9},
        {"top_p": 0.9, "temperature": 3.0},
        {"top_k": 40, "top_p": 0.9},
        {"top_k": max(num_tokens // 3, 1), "top_p": 0.6, "temperature": 1.7},
        {"min_p": 0.05},
        {"min_p": 1.0, "temperature": 2.0},
        {"min_p": 1e-300, "temperature": 1e308},
        {"min_p": 0.02, "top_k": 5},
        {"min_p": 0.5, "top_k": 40, "top_p": 0.9},
        {"min_p": 0.01, "top_p": 0.7, "temperature": 3.0},
    ]
    for num_rows in (0, 1, 2, 7, 64):
        for spread in (0.0, 0.5, 4.0):
            logits = (torch.randn(num_rows, num_tokens, generator=generator) * spread).to(dtype)
            logits[torch.rand(logits.shape, generator=generator) < 0.05] = -math.inf
            logits[:, num_tokens // 2] = 1.5
            choices = [
                draw_of(row * 2**57 + num_rows, row % 3, row, **settings[(row + num_rows) % len(settings)])
                for row in range(num_rows)
            ]
            # Equal logits have their masses at round numbers, which float32 holds exactly.
            assert_as_specified(logits, choices, most_edges=1 if spread else 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits_are_chosen_as_specified(dtype: torch.dtype, extension: str) -> None:
    most = torch.finfo(dtype).max
    rows = [
        [most, -most, 0.0, most, 1.0],
        [-most, -most, -math.inf, -most, -math.inf],
        [0.0, -0.0, 0.0, -0.0, -math.inf],
        [torch.finfo(dtype).tiny, 0.0, -torch.finfo(dtype).tiny, -0.0, 0.0],
        [-88.0, -90.0, -87.0, -100.0, -103.0],
    ]
    logits = torch.tensor(rows, dtype=torch.float64).to(dtype).repeat(1, 40)
    for params in (
        {},
        {"temperature": 1e-6},
        {"temperature": 1e6},
        {"top_k": 3},
        {"top_p": 0.5},
        {"top_k": 90},
        {"min_p": 0.3},
        {"min_p": 1.0, "top_k": 3},
        {"min_p": 0.5, "temperature": 1e300},
    ):
        for seed in range(20):
            choices = [draw_of(seed, **params) for _ in rows]
            assert_as_specified(logits, choices)
            # Nothing of -inf is ever drawn, and no NaN arises.
            tokens = choose_tokens(logits, choices)
            assert all(0 <= token < 200 and logits[row, token] > -math.inf for row, token in enumerate(tokens))


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 5e-324])
def test_the_lowest_temperatures_take_the_best_token(temperature: float, runs_on: str) -> None:
    logits = torch.tensor([[3.0, -8.0, 7.0, 6.5]]).expand(50, -1)
    assert choose_tokens(logits, [draw_of(seed, temperature=temperature) for seed in range(50)]) == [2] * 50


@pytest.mark.parametrize("temperature", [1e6, 1e308])
def test_the_highest_temperatures_draw_evenly(temperature: float, runs_on: str) -> None:
    logits = torch.tensor([[3.0, -8.0, 7.0, 6.5]]).expand(4000, -1)
    tokens = choose_tokens(logits, [draw_of(seed, temperature=temperature) for seed in range(4000)])
    assert all(abs(tokens.count(token) - 1000) < 5 * math.sqrt(750) for token in range(4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_itself_alone(dtype: torch.dtype, runs_on: str) -> None:
    logits = torch.randn(32, 1501, generator=torch.Generator().manual_seed(0)).to(dtype)
    params: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_p": 0.8},
        {"top_k": 20},
        {"top_k": 300, "top_p": 0.5},
        {"min_p": 0.01, "top_p": 0.9},
    ]
    choices = [draw_of(7, row // 6, 3, **params[row % 6]) for row in range(32)]
    together = choose_tokens(logits, choices)
    assert together == [choose_tokens(logits[row : row + 1], [choices[row]])[0] for row in range(32)]
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1)).tolist()
    assert choose_tokens(logits[order], [choices[row] for row in order]) == [together[row] for row in order]
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            assert choose_tokens(logits, choices) == together
    finally:
        torch.set_num_threads(before)
    wide = torch.full((32, 1600), math.nan, dtype=dtype)
    wide[:, 50:1551] = logits
    assert choose_tokens(wide[:, 50:1551], choices) == together
    assert [token for token, one in zip(together, choices, strict=True) if one.params.greedy] == [
        int(row.float().argmax()) for row, one in zip(logits, choices, strict=True) if one.params.greedy
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, [-math.inf] * 97, [math.nan, math.inf, -math.inf, *[1.0] * 94]])
@pytest.mark.parametrize("place", [0, 3, 63, 64, 96])
def test_a_row_whose_largest_logit_is_not_finite_has_no_token(
    bad: Any, place: int, dtype: torch.dtype, runs_on: str
) -> None:
    sound = torch.randn(5, 97, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits = sound.clone()
    if isinstance(bad, list):
        logits[[1, 2]] = torch.tensor(bad).to(dtype)
    else:
        logits[[1, 2], place] = bad
    choices = [
        draw_of(temperature=0.0),
        draw_of(temperature=0.0),
        draw_of(1),
        draw_of(1),
        draw_of(1, top_p=0.5, top_k=9, min_p=0.2),
    ]
    tokens, expected = choose_tokens(logits, choices), choose_tokens(sound, choices)
    assert tokens[1] == tokens[2] == NOT_FINITE
    assert [tokens[row] for row in (0, 3, 4)] == [expected[row] for row in (0, 3, 4)]
    assert most_likely(logits).tolist()[1:3] == [NOT_FINITE] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 5, 16, 64, 130, 4097])
def test_the_most_likely_token_is_the_first_of_the_largest(num_tokens: int, dtype: torch.dtype, runs_on: str) -> None:
    for num_levels in (1, 3, 10**6):
        levels = torch.randint(num_levels, (9, num_tokens), generator=torch.Generator().manual_seed(2))
        logits = (levels / 7 - num_levels / 9).to(dtype)
        assert torch.equal(most_likely(logits), logits.float().max(-1).indices)
    assert most_likely(torch.zeros(0, num_tokens, dtype=dtype)).tolist() == []


def test_a_logit_of_minus_infinity_is_that_of_a_token_that_never_comes(runs_on: str) -> None:
    logits = torch.full((2, 9), -math.inf)
    logits[:, [2, 5]] = torch.tensor([1.0, 1.5])
    drawn = [choose_tokens(logits, [draw_of(temperature=0.0), draw_of(seed, temperature=2.0)]) for seed in range(40)]
    assert {greedy for greedy, _ in drawn} == {5} and {sampled for _, sampled in drawn} == {2, 5}


def test_double_precision_runs_as_specified() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    choices = [draw_of(seed) for seed in range(4)]
    assert choose_tokens(logits, choices) == choose_tokens(logits.float(), choices)


def test_kept_columns_follow_any_row_that_changes() -> None:
    """Columns of the same rows are kept, but for the positions; a change of any row, or of their order, is seen."""
    base = [draw_of(3, 1, 5, temperature=0.7, top_k=9, top_p=0.8), draw_of(4, 0, 2, temperature=1.3), draw_of(0)]
    changes: list[tuple[int, dict[str, Any]]] = [
        (row, change)
        for row in range(3)
        for change in (
            {"temperature": 0.2},
            {"top_k": 3},
            {"top_k": 30},
            {"top_p": 0.4},
            {"min_p": 0.2},
            {"temperature": 0.0},
        )
    ]
    batches = [[*base], base[::-1], base[:2], [*base, base[0]]]
    for row, change in changes:
        batches.append([*base])
        batches[-1][row] = base[row]._replace(params=replace(base[row].params, **change))
    batches += [[each._replace(seed=8) if each is base[1] else each for each in base]]
    batches += [[each._replace(output=8) if each is base[1] else each for each in base]]
    batches += [[each._replace(position=each.position + 1) for each in base]]
    for batch in [*batches, *batches[::-1]]:
        for num_tokens in (20, 5):
            found = choice_columns(batch, num_tokens, CPU)
            wanted = [
                [each.params.temperature for each in batch],
                [min(each.params.top_k or 0, num_tokens) for each in batch],
                [each.params.top_p for each in batch],
                [each.params.min_p for each in batch],
                [each.seed for each in batch],
                [each.output for each in batch],
                [each.position for each in batch],
            ]
            assert [column.tolist() for column in found] == wanted
            dtypes = [torch.float64, torch.int64, *[torch.float64] * 2, *[torch.int64] * 3]
            assert [column.dtype for column in found] == dtypes
    once, later = choice_columns(base, 20, CPU), choice_columns(batches[-1], 20, CPU)
    assert all(one is two for one, two in zip(once[:6], later[:6], strict=True)) and once[6] is not later[6]


def test_the_extension_refuses_what_it_cannot_read() -> None:
    if native.unavailable_reason() is not None:
        pytest.skip(str(native.unavailable_reason()))
    logits = torch.zeros(2, 5)
    columns = choice_columns([draw_of()] * 2, 5, CPU)
    with pytest.raises(RuntimeError, match=r"most_likely: logits must be \[R, V\] with contiguous rows"):
        native.most_likely(logits.T.contiguous().T)
    with pytest.raises(RuntimeError, match=r"choose_tokens: logits must be \[R, V\].* and V at least 1, got \[2, 0\]"):
        native.choose_tokens(logits[:, :0], *columns)
    with pytest.raises(RuntimeError, match="choose_tokens: tensors must be float32, bfloat16 or float16"):
        native.choose_tokens(logits.double(), *columns)
    for place, name in enumerate(("temperature", "top_k", "top_p", "min_p", "seed", "output", "position")):
        for wrong in (columns[place][:1], columns[place].float(), columns[place].repeat(2)[::2]):
            arguments = [*columns[:place], wrong, *columns[place + 1 :]]
            with pytest.raises(RuntimeError, match=rf"choose_tokens: {name} must be contiguous \[2\] (float|int)64"):
                native.choose_tokens(logits, *arguments)
