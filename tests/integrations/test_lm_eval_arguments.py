"""What a run of lm-eval asks for, as dynskip's own; without lm-eval."""

from __future__ import annotations

from typing import Any

import pytest
from models import NUM_LAYERS
from streams import model

from dynskip import LayerPath, SamplingParams
from dynskip.integrations.lm_eval_arguments import batch_of, draft_of, path_of, sampling_params, whole_number

SPECIALS = {"</s>": 2, "<|end|>": 7}


def made(**asked: Any) -> SamplingParams:
    return sampling_params(asked, SPECIALS, 2, 256)


@pytest.mark.parametrize(
    ("given", "expected"), [(1, 1), ("8", 8), ("auto", 16), ("auto:4", 16), (("auto", 64), 64), ((4, 64), 4)]
)
def test_sizes_of_batches(given: Any, expected: int) -> None:
    assert batch_of(*given) == expected if isinstance(given, tuple) else batch_of(given) == expected


@pytest.mark.parametrize("given", [0, -1, "0", "many", 1.5, None, True, "autos"])
def test_bad_sizes_of_batches(given: Any) -> None:
    with pytest.raises(ValueError, match="dynskip: batch_size must be a whole number, at least 1, got "):
        batch_of(given)
    with pytest.raises(ValueError, match="dynskip: max_batch_size must be a whole number, at least 1, got 0"):
        batch_of("auto", 0)


def test_numbers_are_bounded() -> None:
    assert whole_number("max_length", 64, 2, 64) == 64
    for value in (1, 65, "64"):
        with pytest.raises(ValueError, match=r"dynskip: max_length must be a whole number, in 2\.\.64, got "):
            whole_number("max_length", value, 2, 64)


def test_paths_and_drafts_are_those_of_the_command_line() -> None:
    assert path_of("full", model()) == LayerPath.full(NUM_LAYERS)
    assert path_of("layers:0,3", model()) == LayerPath.of(NUM_LAYERS, [0, 3])
    full = LayerPath.full(NUM_LAYERS)
    assert draft_of("uniform:2", full, model()) == LayerPath.uniform(NUM_LAYERS, 2)
    assert draft_of("none", full, model()) is None is draft_of(None, full, model())
    for text in ("uniform", "half", 8):
        with pytest.raises(ValueError, match=f"LayerPath.parse: path must be full, uniform:B.*, got '{text}'"):
            path_of(text, model())
    with pytest.raises(ValueError, match=rf"budget must lie in 1\.\.{NUM_LAYERS}, got 40"):
        path_of("uniform:40", model())


def test_texts_that_end_an_output() -> None:
    params = made(until=["\n\n", "<|end|>", ""])
    assert params.stop == ("\n\n",) and params.stop_token_ids == (7, 2)
    assert made(until="Q:").stop == ("Q:",)
    assert made(until=None).stop == () and made().stop_token_ids == (2,)
    assert made(ignore_eos=True).stop_token_ids == ()
    assert sampling_params({}, SPECIALS, None, 256).stop_token_ids == ()
    with pytest.raises(ValueError, match=r"dynskip: until must be a text or a list of texts, got \[5\]"):
        made(until=[5])


def test_most_new_tokens_by_any_name() -> None:
    assert made().max_tokens == 256
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert made(**{name: 5}).max_tokens == 5
    assert made(max_tokens=5, max_gen_toks=7).max_tokens == 7, "lm-eval's own name comes first"
    with pytest.raises(ValueError, match="dynskip: max_gen_toks must be a whole number, at least 1, got 0"):
        made(max_gen_toks=0)


def test_greedy_unless_sampling_is_asked_for() -> None:
    assert made(do_sample=False, temperature=0.7, top_p=0.5, top_k=5).greedy
    assert made(do_sample=False, temperature=0.7).temperature == 0 == made(temperature=0).temperature
    assert made(do_sample=True).temperature == 1
    params = made(do_sample=True, temperature=0.7, top_p=0.5, seed=3)
    assert (params.temperature, params.top_p, params.seed) == (0.7, 0.5, 3)
    assert made(temperature=0.7).temperature == 0.7
    assert made(do_sample=False, repetition_penalty=1.2).repetition_penalty == 1.2


def test_what_is_not_known_is_told() -> None:
    assert made(num_beams=1, use_cache=True) == made()
    with pytest.raises(ValueError, match="dynskip: num_beams must be 1 or left out, got 4"):
        made(num_beams=4)
    with pytest.raises(ValueError, match="must be of those that dynskip knows, got guidance_scale, typical_p"):
        made(typical_p=0.5, guidance_scale=2)
    with pytest.raises(ValueError, match="SamplingParams: top_p must lie in "):
        made(do_sample=True, top_p=2.0)
