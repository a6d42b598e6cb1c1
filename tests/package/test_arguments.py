"""What callers pass: numbers and token ids of numpy, torch and Python mean the same, and all else is told apart."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import pytest
import torch
from models import NUM_LAYERS, random_prompts, tiny_model

from dynskip import LLM, Engine, LayerPath, SamplingParams
from dynskip.arguments import as_float, as_int, as_token_ids, shown

INTEGERS = [
    5,
    np.int64(5),
    np.uint8(5),
    np.array(5),
    torch.tensor(5),
    torch.tensor(5, dtype=torch.int16),
    enum.IntEnum("E", {"x": 5}).x,
]
NO_INTEGERS = [True, np.True_, torch.tensor(True), 5.0, np.float32(5), torch.tensor(5.0), "5", None, [5], b"5"]
NO_INTEGERS += [np.array([5]), torch.tensor([5]), 5 + 0j]


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_integers_become_pythons(value: Any) -> None:
    assert as_int(value) == 5 and type(as_int(value)) is int


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_what_is_no_integer_is_none(value: Any) -> None:
    assert as_int(value) is None


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5).bfloat16()])
def test_floats_become_pythons(value: Any) -> None:
    assert as_float(value) == 0.5 and type(as_float(value)) is float


def test_what_is_no_float_is_none_and_integers_are_floats() -> None:
    assert all(as_float(value) == 5 and type(as_float(value)) is float for value in INTEGERS)
    assert all(as_float(value) is None for value in (True, np.True_, "0.5", None, [0.5], torch.tensor([0.5]), 1j))
    assert as_float(10**400) == float("inf")


@pytest.mark.parametrize(
    "value",
    [
        [5, 6],
        (5, 6),
        range(5, 7),
        [np.int64(5), 6],
        [torch.tensor(5), np.uint16(6)],
        np.array([5, 6]),
        np.array([5, 6], dtype=np.uint8),
        torch.tensor([5, 6]),
        torch.tensor([[5, 6], [7, 8]])[0],
    ],
    ids=repr,
)
def test_token_ids_become_a_new_list(value: Any) -> None:
    tokens = as_token_ids(value)
    assert tokens == [5, 6] and all(type(token) is int for token in tokens)
    assert tokens is not value


@pytest.mark.parametrize(
    "value",
    [
        *("56", b"56", bytearray(b"56"), memoryview(b"56"), [5, 6.0], [5, True], [[5]], {5, 6}, {5: 6}, 5, None),
        *(iter([5]), np.array([5.0]), np.array([True]), np.array([[5]]), np.array(5)),
        *(torch.tensor([[5, 6]]), torch.tensor([0.5]), torch.tensor(5)),
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0],
)
def test_what_is_no_list_of_integers_is_none(value: Any) -> None:
    assert as_token_ids(value) is None


def test_errors_show_values_on_one_short_line() -> None:
    for value in (10**6000, "x" * 10**6, [0] * 10**6, torch.zeros(100, 100), "a\nb", {"a": "\ud800"}):
        text = shown(value)
        assert len(text) < 200 and "\n" not in text
        text.encode()
    assert shown(-3) == "-3" and shown("2 GB") == "'2 GB'" and shown(None) == "None"


def test_numbers_of_other_libraries_are_parameters() -> None:
    plain = SamplingParams(4, 0.5, 3, 0.25, 2, 1, stop_token_ids=[7], seed=9)
    for number in (np.int32, lambda value: torch.tensor(value)):
        real = np.float32 if number is np.int32 else torch.tensor
        params = SamplingParams(
            number(4), real(0.5), number(3), real(0.25), number(2), number(1),
            stop_token_ids=np.array([7]) if number is np.int32 else torch.tensor([7]), seed=number(9),
        )  # fmt: skip
        assert params == plain and hash(params) == hash(plain) and repr(params) == repr(plain)


def test_numbers_of_other_libraries_make_paths() -> None:
    assert LayerPath.of(np.int64(6), np.array([4, 1])) == LayerPath.of(6, torch.tensor([1, 4])) == LayerPath(6, (1, 4))
    assert LayerPath.uniform(torch.tensor(6), np.int8(3)) == LayerPath.uniform(6, 3)
    assert LayerPath.random(6, np.int64(2), seed=torch.tensor(1)) == LayerPath.random(6, 2, seed=1)
    assert hash(LayerPath(np.int64(6), [np.int64(1)])) == hash(LayerPath(6, (1,)))  # type: ignore[arg-type]


def test_numbers_of_other_libraries_make_engines() -> None:
    options = {"batch": 2, "max_prefill_tokens": 16, "max_context_len": 32, "kv_bytes": 2**16}
    engines = [
        Engine(tiny_model(), policy="lockstep", **{name: number(value) for name, value in options.items()})
        for number in (int, np.int64, torch.tensor)
    ]
    (prompt,) = random_prompts([5])
    for served in engines:
        served.add_request(prompt, SamplingParams(max_tokens=4, ignore_eos=True))
    outputs = [served.run()[0].token_ids for served in engines]
    assert outputs[0] == outputs[1] == outputs[2] and len(outputs[0]) == 4
    assert {served.scheduler.policy.batch for served in engines} == {2}


def test_arrays_and_tensors_are_prompts() -> None:
    llm, params = LLM(tiny_model()), SamplingParams(max_tokens=4, ignore_eos=True)
    prompts = random_prompts([5, 5])
    expected = [output.token_ids for output in llm.generate(prompts, params)]
    for given in (
        [np.array(prompt) for prompt in prompts],
        [torch.tensor(prompt, dtype=torch.int32) for prompt in prompts],
        [tuple(np.array(prompt)) for prompt in prompts],
        np.array(prompts),
        torch.tensor(prompts),
        tuple(prompts),
    ):
        outputs = llm.generate(given, params)
        assert [output.token_ids for output in outputs] == expected
        assert all(type(token) is int for output in outputs for token in output.prompt_ids)
    with Engine(llm.model, policy="lockstep") as served:
        served.add_request(np.array(prompts[0]), params, LayerPath.full(NUM_LAYERS))
        assert list(served.stream(torch.tensor(prompts[1]), params)) == expected[1]
        assert served.run()[0].token_ids == expected[0]
