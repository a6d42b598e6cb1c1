"""What a caller of the engine gets wrong: one clear line at once, and nothing is left of it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from models import NUM_LAYERS, VOCAB_SIZE, random_prompts
from streams import PATHS, Ask, assert_empty, costs, drawn, engine, greedy, model, same

from dynskip import LayerPath, SamplingParams
from dynskip.controllers import HiddenStateGate, StaticController
from dynskip.engine.engine import Engine

FULL = LayerPath.full(NUM_LAYERS)
MASK = torch.ones(12, NUM_LAYERS, dtype=torch.bool)


class Choosing:
    """A sequence controller that gives back what it was given."""

    def __init__(self, chosen: Any) -> None:
        self.chosen = chosen

    def choose_paths(self, prompt_ids: Any, prompt_embeddings: Any) -> Any:
        return self.chosen


REQUEST_MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "text": ({"token_ids": "w005"}, TypeError, "token_ids must be a list of token ids, got str"),
    "a batch": ({"token_ids": torch.ones(1, 3).long()}, TypeError, "token_ids must be a list of token ids, got Tensor"),
    "bytes": ({"token_ids": b"w005"}, TypeError, "token_ids must be a list of token ids, got bytes"),
    "more logprobs than tokens": (
        {"params": SamplingParams(logprobs=VOCAB_SIZE + 1)},
        ValueError,
        f"logprobs must be at most {VOCAB_SIZE}, the vocabulary, got {VOCAB_SIZE + 1}",
    ),
    "a stop token that cannot come": (
        {"params": SamplingParams(stop_token_ids=[VOCAB_SIZE])},
        ValueError,
        r"stop_token_ids must hold token ids in 0\.\.100, got 101",
    ),
    "no room for a token": (
        {"token_ids": [5] * 30, "params": SamplingParams(max_tokens=None)},
        ValueError,
        "prompt and max_tokens must be at most 30 tokens, got 31",
    ),
    "a float among the ids": ({"token_ids": [5, 2.0]}, TypeError, "token_ids must be a list of token ids, got list"),
    "a truth value among the ids": ({"token_ids": [5, True]}, TypeError, "token_ids must be a list of token ids"),
    "no token": ({"token_ids": []}, ValueError, "token_ids must hold at least one token, got none."),
    "token id too large": (
        {"token_ids": [5, VOCAB_SIZE]},
        ValueError,
        rf"token_ids must hold token ids in 0\.\.{VOCAB_SIZE - 1}, got {VOCAB_SIZE}",
    ),
    "negative token id": ({"token_ids": [-1, 5]}, ValueError, r"token_ids must hold token ids in 0\.\.100, got -1"),
    "more than the model's positions": (
        {"token_ids": [5] * 40, "params": SamplingParams(max_tokens=25)},
        ValueError,
        "token_ids must fit 64 positions, got 40 prompt and 25 new tokens. Shorten the prompt or lower max_tokens",
    ),
    "more than max_context_len": (
        {"token_ids": [5] * 15, "params": SamplingParams(max_tokens=16)},
        ValueError,
        "prompt and max_tokens must be at most 30 tokens, got 31. Shorten the prompt, lower max_tokens or raise",
    ),
    "params of another type": ({"params": {"max_tokens": 3}}, TypeError, "params must be SamplingParams, got dict"),
    "stop texts without a tokenizer": (
        {"params": SamplingParams(stop="w005")},
        ValueError,
        r"stop must be left out without a tokenizer\. Use stop_token_ids",
    ),
    "a path of another model": (
        {"path": LayerPath.full(24)},
        ValueError,
        "paths must be for 6 layers, got a path for 24",
    ),
    "a path as text": ({"path": "uniform:3"}, TypeError, "paths must be a LayerPath, .* or None, got str"),
    "two paths": ({"path": [FULL, FULL]}, ValueError, "paths must be one per sequence, got 2 for 1 sequences"),
    "a mask of another model": ({"path": MASK[:, :5]}, ValueError, r"paths must be bool .*, got shape \[1, 12, 5\]"),
    "a mask of numbers": ({"path": MASK.int()}, TypeError, r"paths must be bool .*, got torch.int32"),
    "a mask that ends too soon": (
        {"path": MASK, "params": SamplingParams(max_tokens=11)},
        ValueError,
        r"paths must cover 13 tokens, got T=12\. Give T >= prompt \+ max_tokens - 1 rows",
    ),
    "a mask without a layer": ({"path": ~MASK[0]}, ValueError, "paths must run at least one layer for each sequence"),
    "a controller of another model": (
        {"path": HiddenStateGate(torch.zeros(4, 2, 32))},
        ValueError,
        "the controller must decide for 6 layers, got 4",
    ),
    "a controller that chooses for another model": (
        {"path": StaticController(LayerPath.full(4))},
        ValueError,
        "paths must be for 6 layers, got a path for 4",
    ),
    "a controller that chooses too many paths": (
        {"path": Choosing([FULL, FULL])},
        ValueError,
        "paths must be one per sequence, got 2",
    ),
    "a controller that chooses no path": (
        {"path": Choosing(None)},
        TypeError,
        "the controller's choose_paths must return a list of LayerPath",
    ),
    "kv_policy with a path": ({"path": FULL, "kv_policy": "evict"}, ValueError, "kv_policy must be left out with per-"),
    "another kv_policy": ({"path": MASK, "kv_policy": "drop"}, ValueError, "kv_policy must be .*, got 'drop'"),
    "another prompt_depth": ({"prompt_depth": "half"}, ValueError, "prompt_depth must be 'path' or 'full', got 'half'"),
    "an id that cannot be hashed": ({"request_id": [1]}, TypeError, "request_id must be hashable, got list"),
    "an id in use": ({"request_id": "there"}, ValueError, "request_id must be new, got 'there', which is in use"),
    "a callback that cannot be called": ({"on_token": 3}, TypeError, "on_token must be callable or None, got int"),
    "an option that there is not": ({"priority": 3}, TypeError, "unexpected keyword argument 'priority'"),
}


@pytest.mark.parametrize("name", REQUEST_MISTAKES)
def test_a_request_that_is_wrong_leaves_nothing(name: str) -> None:
    mistake, kind, match = REQUEST_MISTAKES[name]
    served = engine(max_context_len=30)
    there = Ask([7, 8], drawn(5, 1), PATHS[1])
    there.add(served, request_id="there")
    served.step()
    used = served.kv.num_used
    function = r"add_request\(\) got an" if name == "an option that there is not" else "add_request:"
    with pytest.raises(kind, match=f"{function} .*{match}"):
        served.add_request(**{"token_ids": [5, 6, 7], **mistake})
    assert served.stats().num_waiting == 0 and served.scheduler.counters.num_added == 1
    assert served.kv.num_used == used
    assert served.add_request([5], greedy(2)) == 0, "no number was spent on it"
    outputs = {output.request_id: output for output in served.run()}
    assert outputs.keys() == {"there", 0} and same(outputs["there"], there.alone())
    assert_empty(served)


@pytest.mark.parametrize(("path", "most"), [(FULL, 11), (PATHS[2], 21), (PATHS[0], 61), (MASK, 11)])
def test_a_request_that_can_never_fit_says_what_would(path: Any, most: int) -> None:
    served = engine(num_slots=60)
    num_layers = path.budget if isinstance(path, LayerPath) else NUM_LAYERS
    too_many = most - 5 + 1
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"prompt and max_tokens must fit into 60 key-value slots, got 5 + {too_many} tokens through {num_layers} "
            f"layers, which take {(5 + too_many - 1) * num_layers}. Along this path at most {most} tokens fit, prompt "
            "and output together."
        ),
    ):
        served.add_request([5, 6, 7, 8, 9], greedy(too_many), path)
    assert not served.has_unfinished
    most = min(most, served.max_context_len)
    served.add_request([5, 6, 7, 8, 9], greedy(most - 5), path)
    (output,) = served.run()
    assert len(output.token_ids) == most - 5 and served.kv.peak_used <= 60
    assert_empty(served)


def test_an_id_is_in_use_until_its_output_was_handed_out() -> None:
    served = engine(batch=1)
    in_use = pytest.raises(ValueError, match="add_request: request_id must be new, got 'x', which is in use")
    served.add_request([5], greedy(2), request_id="x")
    with in_use:  # waits
        served.add_request([6], greedy(2), request_id="x")
    served.step()
    with in_use:  # runs
        served.add_request([6], greedy(2), request_id="x")
    served.advance()
    with in_use:  # has ended
        served.add_request([6], greedy(2), request_id="x")
    (output,) = served.step()
    assert output.prompt_ids == [5]
    served.add_request([6], greedy(2), request_id="x")
    (output,) = served.run()
    assert output.prompt_ids == [6]


def test_only_what_has_not_ended_can_be_aborted() -> None:
    served = engine(batch=2)
    staying = Ask([7, 8], drawn(6, 1), PATHS[1])
    staying.add(served, request_id="staying")

    def refused(request_id: Any) -> None:
        with pytest.raises(
            ValueError, match=f"abort: request_id must be of a request that has not ended, got {request_id!r}"
        ):
            served.abort(request_id)
        with pytest.raises(ValueError, match=f"request: request_id must be of a request .*, got {request_id!r}"):
            served.request(request_id)

    assert [sequence.prompt_ids for sequence in served.request("staying").sequences] == [[7, 8]]
    refused("unknown")
    refused(0)
    served.add_request([5], greedy(1), request_id="short")
    served.advance()
    refused("short")  # ended, not handed out
    assert [output.request_id for output in served.step()] == ["short"]
    refused("short")
    served.add_request([5], greedy(5), request_id="gone")
    served.step()
    assert served.abort("gone").finish_reason == "abort"
    refused("gone")
    (output,) = served.run()
    assert same(output, staying.alone())
    assert_empty(served)
    refused("staying")


ENGINE_MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another model": ({"model": "opt-mini"}, TypeError, "Engine: model must be a dynskip.CausalLM, got str"),
    "another policy": ({"policy": "fair"}, ValueError, "name must be one of cohort, lockstep, by_path, got 'fair'"),
    "no batch": ({"batch": 0}, ValueError, "Cohort: batch must be at least 1, got 0"),
    "half a row": ({"batch": 2.5}, TypeError, r"Engine: batch must be an integer, got 2\.5"),
    "a small pool": ({"batch": 4, "pool": 3}, ValueError, "Cohort: pool must be at least the batch, 4, got 3"),
    "a pool in lock-step": (
        {"policy": "lockstep", "batch": 4, "pool": 8},
        ValueError,
        r"pool must be 4, the batch, for lockstep, got 8\. Use policy cohort",
    ),
    "a bound that cannot be kept": (
        {"batch": 4, "pool": 16, "max_wait": 3},
        ValueError,
        "Cohort: max_wait must be at least 4, the steps that batches of 4 take through a pool of 16, got 3",
    ),
    "a bound in lock-step": (
        {"policy": "lockstep", "max_wait": 3},
        ValueError,
        r"max_wait must be left out for lockstep, got 3\. Use policy cohort",
    ),
    "no prefill": ({"max_prefill_tokens": 0}, ValueError, "max_prefill_tokens must be at least 1, got 0"),
    "no context": ({"max_context_len": 0}, ValueError, r"Engine: max_context_len must lie in 1\.\.64, got 0"),
    "too much context": ({"max_context_len": 65}, ValueError, r"Engine: max_context_len must lie in 1\.\.64, got 65"),
    "memory for nothing": ({"kv_bytes": 255}, ValueError, "Engine: kv_bytes must hold an entry of 256 bytes, got 255"),
    "negative memory": ({"kv_bytes": -1}, ValueError, "Engine: kv_bytes must hold an entry of 256 bytes, got -1"),
    "memory as text": ({"kv_bytes": "2 GB"}, TypeError, "Engine: kv_bytes must be an integer, got '2 GB'"),
    "too large a batch": ({"batch": 2**16 + 1}, ValueError, "Cohort: batch must be at most 65536, got 65537"),
    "too large a batch in lock-step": (
        {"policy": "lockstep", "batch": 10**9},
        ValueError,
        "Lockstep: batch must be at most 65536, got 1000000000",
    ),
    "too large a pool": ({"pool": 10**9}, ValueError, "Cohort: pool must be at most 1048576, got 1000000000"),
    "a truth value": ({"batch": True}, TypeError, "Engine: batch must be an integer, got True"),
    "a float of numpy": ({"pool": np.float32(8)}, TypeError, "Engine: pool must be an integer, got"),
    "costs as text": ({"costs": "x"}, TypeError, "Engine: costs must be StepCosts or None, got str"),
    "deterministic as text": ({"deterministic": "no"}, TypeError, "Engine: deterministic must be True, False or None"),
    "a tokenizer by name": ({"tokenizer": "opt-mini"}, TypeError, "Engine: tokenizer must be a transformers tokenizer"),
    "a clock that stands": ({"clock": 0.0}, TypeError, "Engine: clock must be callable, got float"),
    "costs of another model": (
        {"costs": costs(24)},
        ValueError,
        "Engine: costs must be of 6 layers, got 24. Run `dynskip calibrate`",
    ),
    "another executor": ({"executor": "fast"}, ValueError, "executor must be 'compact' or 'reference', got 'fast'"),
}


@pytest.mark.parametrize("name", ENGINE_MISTAKES)
def test_an_engine_that_cannot_be(name: str) -> None:
    mistake, kind, match = ENGINE_MISTAKES[name]
    with pytest.raises(kind, match=match):
        Engine(**{"model": model(), "costs": costs(), **mistake})


def test_a_stream_has_one_output() -> None:
    served = engine()
    with pytest.raises(ValueError, match=r"stream: n must be 1, got 2\. Add a request for each output"):
        served.stream([5], greedy(3, n=2))
    with pytest.raises(ValueError, match=r"token_ids must hold token ids in 0\.\.100, got 101"):
        served.stream([101])
    assert not served.has_unfinished


MASKS = {
    "per token": torch.ones(12, NUM_LAYERS, dtype=torch.bool),
    "per sequence": torch.ones(NUM_LAYERS, dtype=torch.bool),
    "a row of a larger buffer": torch.ones(2, 12, NUM_LAYERS, dtype=torch.bool)[1],
}


@pytest.mark.parametrize("container", [list, np.array, torch.tensor])
def test_prompts_are_copied(container: Any) -> None:
    (prompt,) = random_prompts([5])
    given = container(prompt)
    served = engine()
    served.add_request(given, greedy(4))
    given[:] = container([1] * 5)
    (output,) = served.run()
    assert output.prompt_ids == prompt and same(output, Ask(prompt, greedy(4)).alone())


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("steps", [0, 2])
def test_masks_are_copied(kind: str, steps: int) -> None:
    (prompt,) = random_prompts([5])
    expected = Ask(prompt, greedy(8), MASKS[kind]).alone()
    buffer = MASKS[kind].clone()
    served = engine()
    served.add_request(prompt, greedy(8), buffer)
    for _ in range(steps):
        served.step()
    buffer[..., 1:] = False
    (output,) = served.run()
    assert same(output, expected)
    assert not same(Ask(prompt, greedy(8), buffer).alone(), expected), "the layers make a difference"


def test_parameters_and_paths_are_copied() -> None:
    stop, tokens, layers = ["a"], [7], [0, 3]
    params, path = SamplingParams(stop=stop, stop_token_ids=tokens), LayerPath(NUM_LAYERS, layers)  # type: ignore[arg-type]
    stop.append("b"), tokens.append(8), layers.append(5)
    assert params == SamplingParams(stop="a", stop_token_ids=[7]) and path == LayerPath.of(NUM_LAYERS, [0, 3])
    chosen = [FULL]
    controller = StaticController(chosen)
    chosen.append(FULL)
    controller.choose_paths([torch.tensor([5])], []).append(FULL)
    assert controller.choose_paths([torch.tensor([5])], []) == [FULL]


@pytest.mark.parametrize(
    ("options", "path", "total"),
    [
        ({}, FULL, 64),
        ({"max_context_len": 30}, FULL, 30),
        ({"num_slots": 60}, FULL, 11),
        ({"num_slots": 60}, PATHS[2], 21),
        ({}, MASK, 13),
    ],
)
def test_without_max_tokens_a_request_gets_as_many_as_fit(options: dict[str, Any], path: Any, total: int) -> None:
    served = engine(**options)
    served.add_request([5, 6, 7], SamplingParams(max_tokens=None, ignore_eos=True), path)
    (output,) = served.run()
    assert output.finish_reason == "length" and 3 + len(output.token_ids) == total
    assert_empty(served)
