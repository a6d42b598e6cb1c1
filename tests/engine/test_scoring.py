"""Scores of continuations: those of a forward pass, however contexts are shared, batched and cut into chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import NUM_LAYERS, VOCAB_SIZE, cut, random_prompts, tiny_hf, tiny_model
from streams import PATHS, greedy, model

from dynskip import LLM, LayerPath
from dynskip.engine import scoring
from dynskip.engine.diagnosis import NonFiniteError
from dynskip.engine.scoring import Score, Scoring
from dynskip.ops import native

FULL = LayerPath.full(NUM_LAYERS)
Pair = tuple[list[int], list[int]]


def pairs_of(context_lengths: list[int], continuation_lengths: list[int], seed: int = 0) -> list[Pair]:
    """Each context with a continuation of each length."""
    contexts = random_prompts(context_lengths, seed)
    return [
        (context, continuation)
        for number, context in enumerate(contexts)
        for continuation in random_prompts(continuation_lengths, seed + 1 + number)
    ]


def scored(own: Any, pairs: list[Pair], path: LayerPath = FULL, **options: Any) -> list[Score]:
    scores = dict(Scoring(own, path, **options).run(pairs))
    assert sorted(scores) == list(range(len(pairs))), "each pair has one score"
    return [scores[index] for index in range(len(pairs))]


def assert_those_of(logits_of: Any, pairs: list[Pair], scores: list[Score], atol: float) -> None:
    """logits_of: of token ids, [1, T], the logits, [T, V]."""
    for (context, continuation), score in zip(pairs, scores, strict=True):
        rows = logits_of(torch.tensor([context + continuation]))[len(context) - 1 : -1].float().log_softmax(-1)
        expected = rows[range(len(rows)), continuation].tolist()
        assert score.logprobs == pytest.approx(expected, abs=atol)
        assert score.is_greedy == (rows.argmax(-1).tolist() == continuation)


def greedy_continuations(own: Any, contexts: list[list[int]], path: LayerPath) -> list[Pair]:
    outputs = LLM(own).generate(contexts, greedy(4, ignore_eos=True), path)
    return [(output.prompt_ids, output.token_ids) for output in outputs]


@pytest.mark.parametrize("path", PATHS)
def test_they_are_those_of_a_forward_pass(path: LayerPath) -> None:
    pairs = pairs_of([1, 15, 16, 30], [1, 2, 7, 1]) + pairs_of([40], [3], seed=9)
    pairs += greedy_continuations(model(), random_prompts([5, 20, 33], 7), path)
    scores = scored(model(), pairs, path)
    assert_those_of(lambda ids: model()(ids, paths=path).logits[0], pairs, scores, 1e-4)
    assert all(score.is_greedy for score in scores[-3:]) and not all(score.is_greedy for score in scores[:-3])


def test_they_are_those_of_transformers_with_the_layers_cut() -> None:
    path = LayerPath.of(NUM_LAYERS, [0, 2, 3, 5])
    pairs = pairs_of([3, 17, 30], [1, 5, 2])
    theirs = cut(tiny_hf(), path)
    with torch.no_grad():
        assert_those_of(lambda ids: theirs(ids).logits[0], pairs, scored(tiny_model(), pairs, path), 1e-4)


def test_they_are_the_prompt_logprobs_of_an_engine() -> None:
    pairs = pairs_of([20, 9], [4, 1])
    outputs = LLM(model()).generate([a + b for a, b in pairs], greedy(1, prompt_logprobs=1), FULL)
    for (context, continuation), score, output in zip(pairs, scored(model(), pairs), outputs, strict=True):
        assert output.prompt_logprobs is not None
        told = output.prompt_logprobs[len(context) :]
        own = [each[token] for each, token in zip(told, continuation, strict=True) if each is not None]
        assert score.logprobs == pytest.approx(own, abs=1e-5)


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the C++ extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_backend_scores(dtype: torch.dtype) -> None:
    own = tiny_model(dtype=dtype, backend="native")
    pairs = pairs_of([3, 20, 33], [1, 4, 9])
    exact = tiny_model()
    for score, expected in zip(scored(own, pairs), scored(exact, pairs), strict=True):
        assert score.logprobs == pytest.approx(expected.logprobs, abs=1e-4 if dtype == torch.float32 else 0.15)


@pytest.mark.parametrize("options", [{"batch": 1}, {"batch": 3}, {"max_rows": 7}, {"batch": 100, "max_rows": 40}])
def test_batches_and_chunks_change_nothing(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = pairs_of([20, 20, 3, 16, 33, 2], [1, 12, 2, 12])
    expected = scored(model(), pairs)
    monkeypatch.setattr(scoring, "MOST_LOGITS", 3 * VOCAB_SIZE)
    for score, other in zip(scored(model(), pairs, **options), expected, strict=True):
        assert score.logprobs == pytest.approx(other.logprobs, abs=1e-4) and score.is_greedy == other.is_greedy


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_the_bits_of_a_pair_are_its_own_in_deterministic_mode(backend: str) -> None:
    if backend == "native" and native.unavailable_reason() is not None:
        pytest.skip("needs the C++ extension")
    own = tiny_model(backend=backend, deterministic=True)
    pairs = pairs_of([20, 3, 33], [1, 4, 9])
    together = scored(own, pairs)
    assert together == [scored(own, [pair])[0] for pair in pairs]
    assert together == scored(own, pairs[::-1])[::-1] == scored(own, pairs, batch=1)


def test_a_context_runs_once_and_last_tokens_never() -> None:
    own = tiny_model()
    counts = own.executor().row_counts
    for pairs, num_rows in [
        (pairs_of([20], [1, 1, 1, 1]), 20),
        (pairs_of([20], [4, 1, 3]), 20 + 3 + 0 + 2),
        (pairs_of([15], [4, 3]), (15 + 3) + (15 + 2)),
        (pairs_of([20, 30], [2]), 21 + 31),
        (pairs_of([20], [4, 3]) * 3, 20 + 3 + 2),
    ]:
        counts.reset()
        scored(own, pairs, PATHS[2])
        run = [num_rows if layer in PATHS[2].layers else 0 for layer in range(NUM_LAYERS)]
        assert [*counts.run] == run


def test_longest_contexts_come_first() -> None:
    pairs = pairs_of([2, 40, 20], [1])
    assert [index for index, _ in Scoring(model(), FULL, batch=1).run(pairs)] == [1, 2, 0]


def test_one_token_more_than_positions_is_scored() -> None:
    positions = model().decoder_config.max_positions
    for lengths in ((positions, 1), (1, positions)):
        (pair,) = pairs_of([lengths[0]], [lengths[1]])
        (score,) = scored(model(), [pair])
        assert len(score.logprobs) == lengths[1]
    with pytest.raises(ValueError, match=rf"score: context 0 must fit {positions} positions, got {positions} prompt"):
        scored(model(), pairs_of([positions], [2]))


def test_no_pairs_have_no_scores() -> None:
    assert scored(model(), []) == []


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([([5], [6]), ([], [5])], "score: context 1 must hold at least one token, got none"),
        ([([5], [])], "score: continuation 0 must hold at least one token, got none"),
        ([([5], [VOCAB_SIZE])], "score: continuation 0 must hold token ids in 0..100, got 101"),
        ([([-1], [5])], "score: context 0 must hold token ids in 0..100, got -1"),
    ],
)
def test_bad_pairs_are_told_before_anything_runs(pairs: list[Pair], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(Scoring(model(), FULL).run(pairs))


def test_bad_options_are_told() -> None:
    with pytest.raises(ValueError, match="Scoring: batch must be at least 1, got 0"):
        Scoring(model(), FULL, batch=0)
    with pytest.raises(ValueError, match="Scoring: max_rows must be at least 1, got -1"):
        Scoring(model(), FULL, max_rows=-1)
    with pytest.raises(ValueError, match="Scoring: path must be of 6 layers, got 4/4 layers"):
        Scoring(model(), LayerPath.full(4))


def test_logits_that_are_not_finite_are_told() -> None:
    own = tiny_model("untied")
    with torch.no_grad():
        own.decoder.layers[3].fc2.bias[0] = torch.nan
    pairs = pairs_of([20], [2, 1])
    with pytest.raises(NonFiniteError, match=r"score: logits must be finite, got NaN or infinity, in torch\.float32"):
        scored(own, pairs)
    around = LayerPath.of(NUM_LAYERS, [0, 1, 2, 4, 5])
    assert all(len(score.logprobs) for score in scored(own, pairs, around)), "a path without that layer has scores"
