"""Rows that have begun: what they have run of their path is not run again, and the logits are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import FAMILIES, family_hf, native_model
from models import NUM_LAYERS, tiny_model
from torch import Tensor

from dynskip import CausalLM, LayerPath, SamplingParams
from dynskip.execution.kv_cache import KVCache
from dynskip.execution.turns import BegunRows, Turns, rows_step
from dynskip.ops import native
from dynskip.sampling import Choice
from dynskip.speculation.draft import Draft

needs_extension = pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the C++ extension")

PATHS = [LayerPath.parse(text, NUM_LAYERS) for text in ("full", "layers:1,2,4,5", "exit:5", "full")]
# The first two begin like their paths, the third is its path, the last has nothing in common with it but entries.
DRAFTS = [
    Draft(LayerPath.parse(text, NUM_LAYERS), "path") for text in ("exit:3", "layers:1,2,5", "exit:5", "layers:1,4")
]
LENGTHS, CACHE_IDS, NUM_GUESSES = [5, 1, 7, 3], [2, 0, 3, 1], [3, 4, 1, 2]


def verify(model: CausalLM, executor_name: Any, resumes: bool) -> tuple[Tensor, Any, list[int], list[int]]:
    """Logits of the step that verifies guesses, the cache behind it, and the rows of each layer in both steps."""
    executor = model.new_executor(executor_name, model.deterministic)
    cache = executor.new_cache(4, 24, 400)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, model.config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    device = model.device
    with torch.no_grad():
        executor.run(rows_step(prompts, [0] * 4, CACHE_IDS, PATHS, device, decode=False), cache)
        executor.row_counts.reset()
        last = [[30 + index] for index in range(4)]
        num_common = [draft.num_common_layers(path) for draft, path in zip(DRAFTS, PATHS, strict=True)]
        assert num_common == [3, 4, NUM_LAYERS, 0]
        choices = [Choice(SamplingParams(), 0, 0, 0)] * 4
        turns = Turns(
            last, LENGTHS, CACHE_IDS, [draft.path for draft in DRAFTS], NUM_GUESSES, choices, device, num_common
        )
        tokens, states = executor.guess(turns, cache)
        assert states is not None
        guessed = list(executor.row_counts.run)
        begun: list[BegunRows | None] = [None] * 4
        if resumes:
            begun = [
                BegunRows(common, states[: NUM_GUESSES[index], index]) if common else None
                for index, common in enumerate(num_common)
            ]
        cache.truncate(CACHE_IDS, LENGTHS, NUM_GUESSES, num_common if resumes else None)
        rows = [[*old, *new] for old, new in zip(last, tokens, strict=True)]
        step = rows_step(rows, LENGTHS, CACHE_IDS, PATHS, device, begun=begun)
        logits = executor.predict(step, cache).logits.clone()
    ran = [after - before for after, before in zip(executor.row_counts.run, guessed, strict=True)]
    return logits, cache, ran, num_common


def assert_rows_run_once(resumed: Sequence[int], again: Sequence[int], num_common: Sequence[int]) -> None:
    for layer in range(NUM_LAYERS):
        saved = [
            length
            for path, length, common in zip(PATHS, NUM_GUESSES, num_common, strict=True)
            if layer < common and layer in path.layers
        ]
        assert resumed[layer] == again[layer] - sum(saved)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("opt", "pre-norm"),
        ("opt", "post-norm-projected"),
        ("llama", "plain"),
        ("mistral", "window"),
        ("bloom", "plain"),
    ],
)
def test_native_steps_resume_with_the_same_bits(family: str, variant: str, dtype: torch.dtype) -> None:
    model = native_model(family, variant, dtype, deterministic=True)
    logits, cache, ran, num_common = verify(model, "compact", resumes=True)
    expected, other, again, _ = verify(model, "compact", resumes=False)
    assert logits.equal(expected)
    assert_rows_run_once(ran, again, num_common)
    assert_same_tokens(cache, other)


@pytest.mark.parametrize("family", ["opt", "llama", "gpt_neox"])
def test_steps_op_by_op_resume_with_the_same_bits(family: str) -> None:
    model = CausalLM.from_hf(family_hf(family), backend="torch", deterministic=True)
    logits, cache, ran, num_common = verify(model, "compact", resumes=True)
    expected, other, again, _ = verify(model, "compact", resumes=False)
    assert logits.equal(expected)
    assert_rows_run_once(ran, again, num_common)
    assert_same_tokens(cache, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_resumes(family: str) -> None:
    model = CausalLM.from_hf(family_hf(family, dtype=torch.float64), backend="torch")
    logits, cache, ran, num_common = verify(model, "reference", resumes=True)
    expected, other, again, _ = verify(model, "reference", resumes=False)
    torch.testing.assert_close(logits, expected)
    assert_rows_run_once(ran, again, num_common)
    assert cache.num_slots_used == other.num_slots_used
    compact, *_ = verify(model, "compact", resumes=True)
    torch.testing.assert_close(compact, expected, rtol=1e-4, atol=1e-5)  # norms and softmax are float32 there


def assert_same_tokens(cache: KVCache, expected: KVCache) -> None:
    """Both hold the same bits of the same tokens, in whatever slots; as many are taken."""
    assert cache.context_lens.equal(expected.context_lens)
    assert cache.num_slots_used == expected.num_slots_used
    for layer in range(NUM_LAYERS):
        ids = torch.tensor(CACHE_IDS)
        for ours, theirs in zip(cache.gather(layer, ids)[:2], expected.gather(layer, ids)[:2], strict=True):
            assert ours.equal(theirs)


def test_what_drafts_and_paths_have_in_common() -> None:
    def common(draft: str, path: str, entries: Any = "path") -> int:
        paths = [LayerPath.parse(text, NUM_LAYERS) for text in (draft, path)]
        return Draft(paths[0], entries).num_common_layers(paths[1])

    assert common("exit:2", "full") == 2
    assert common("exit:2", "full", "own") == 0
    assert common("full", "full") == NUM_LAYERS
    assert common("layers:0,1,4", "layers:0,1,2,4") == 2
    assert common("layers:1,3", "layers:1,3,5") == 5
    assert common("layers:3", "layers:1,3") == 0, "the path runs a layer that the draft leaves out"
    assert common("layers:1", "layers:1,2") == 2
    empty = Draft(LayerPath.of(NUM_LAYERS, [], allow_empty=True), "path")
    assert empty.num_common_layers(LayerPath.of(NUM_LAYERS, [2, 3])) == 0, "no layer has run"


def test_entries_of_some_layers_are_kept() -> None:
    model = tiny_model(deterministic=True)
    executor = model.new_executor("compact", True)
    cache = executor.new_cache(2, 8, 100)
    with torch.no_grad():
        executor.run(rows_step([[5, 6, 7], [8, 9]], [0, 0], [0, 1], [PATHS[0]] * 2, model.device, decode=False), cache)
    cache.truncate([0, 1], [1, 1], [2, 2], [4, 0])
    assert cache.context_lens[:, 0].tolist() == [3, 3, 3, 3, 1, 1]
    assert cache.context_lens[:, 1].tolist() == [1] * 6
    assert cache.num_slots_used == 3 * 4 + 2 + 6
    cache.truncate([0], [1], [2], [NUM_LAYERS])
    assert cache.num_slots_used == 3 * 4 + 2 + 6, "nothing is behind the last layer"
