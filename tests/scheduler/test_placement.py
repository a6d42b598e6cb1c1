"""Which engine a request goes to."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynskip.paths import LayerPath
from dynskip.scheduler.placement import place

NUM_LAYERS, BATCH = 24, 16
SHALLOW, MIDDLE, FULL = LayerPath.uniform(NUM_LAYERS, 4), LayerPath.uniform(NUM_LAYERS, 8), LayerPath.full(NUM_LAYERS)
PATHS = [LayerPath.uniform(NUM_LAYERS, budget) for budget in range(1, NUM_LAYERS + 1)]


def engines(count: int) -> dict[str, Counter[LayerPath]]:
    return {f"replica-{index}": Counter() for index in range(count)}


def placed(held: dict[str, Counter[LayerPath]], path: LayerPath, prefix: str = "") -> str:
    """The engine of a request, which then holds it."""
    name = place(held, path, prefix, BATCH)
    held[name][path] += 1
    return name


def work(paths: Counter[LayerPath]) -> int:
    return sum(count * (path.budget + 1) for path, count in paths.items())


held_by_engines = st.dictionaries(
    st.text(min_size=1, max_size=4),
    st.dictionaries(st.sampled_from(PATHS), st.integers(0, 100)),
    min_size=1,
    max_size=6,
)


@given(held_by_engines, st.sampled_from(PATHS), st.text(max_size=3), st.integers(1, 64))
def test_an_engine_that_holds_half_a_batch_more_than_another_gets_nothing(
    held: dict[str, dict[LayerPath, int]], path: LayerPath, prefix: str, batch: int
) -> None:
    name = place(held, path, prefix, batch)
    loads = {each: work(Counter(paths)) for each, paths in held.items()}
    assert loads[name] <= min(loads.values()) + batch * (path.budget + 1) / 2
    assert place(dict(reversed(held.items())), path, prefix, batch) == name, "the order of the engines says nothing"


def test_a_rare_path_meets_on_one_engine_whatever_its_prompts() -> None:
    held = engines(4)
    for index in range(400):
        placed(held, SHALLOW, f"{index}")
    assert len({placed(held, FULL, f"{index}") for index in range(8)}) == 1


def test_a_frequent_path_spreads_over_all_engines_and_none_is_left_behind() -> None:
    held = engines(4)
    for index in range(400):
        placed(held, SHALLOW, f"{index}")
    assert all(50 < each[SHALLOW] < 150 for each in held.values())


def test_prompts_that_begin_alike_meet_on_one_engine_until_it_is_full() -> None:
    held = engines(4)
    first = placed(held, SHALLOW, "you are a helpful assistant")
    names = [placed(held, SHALLOW, "you are a helpful assistant") for _ in range(BATCH // 2)]
    assert set(names) == {first}
    assert placed(held, SHALLOW, "you are a helpful assistant") != first, (
        "it holds more than half a batch, the others none"
    )


def test_every_beginning_has_an_engine_of_its_own_choice_for_each_path() -> None:
    held = engines(4)
    for path in (SHALLOW, MIDDLE):
        assert {place(held, path, f"{prefix}", BATCH) for prefix in range(40)} == set(held)


def test_an_engine_that_goes_moves_only_what_it_had() -> None:
    held = engines(5)
    before = {prefix: place(held, SHALLOW, f"{prefix}", BATCH) for prefix in range(200)}
    del held["replica-2"]
    after = {prefix: place(held, SHALLOW, f"{prefix}", BATCH) for prefix in range(200)}
    assert "replica-2" not in after.values()
    assert {prefix for prefix in before if before[prefix] != after[prefix]} == {
        prefix for prefix, name in before.items() if name == "replica-2"
    }


def test_a_mix_of_paths_keeps_the_work_level() -> None:
    draw, held = random.Random(0), engines(3)
    for index in range(2000):
        placed(held, draw.choices((SHALLOW, MIDDLE, FULL), (80, 18, 2))[0], f"{index % 7}")
        loads = [work(paths) for paths in held.values()]
        assert max(loads) - min(loads) <= (BATCH // 2 + 1) * (NUM_LAYERS + 1)


def test_no_engine_is_an_error() -> None:
    with pytest.raises(ValueError, match="held must have at least one engine, got none"):
        place({}, SHALLOW, "", BATCH)
