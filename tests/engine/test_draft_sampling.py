"""How tokens are chosen with a draft: exactly as without, whatever changes their logits."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from drafts import DRAFTS, FULL, with_draft
from models import random_prompts, tiny_hf
from streams import (
    Ask,
    drawn,
    engine,
    fewer_of_the_last,
    greedy,
    same,
    serve,
)
from torch import Tensor

from dynskip import CausalLM, SamplingParams
from dynskip.ops.backends import available_backends
from dynskip.speculation.draft import ENTRIES, DraftEntries


def test_rows_that_are_verified_together_see_the_guesses_before_them(random_lengths: random.Random) -> None:
    # A path agrees with itself: all guesses are right as long as nothing changes its logits.
    changes = {"frequency_penalty": 2.0, "repetition_penalty": 1.5}
    for params in (greedy(24, **changes), drawn(24, 5, **changes), greedy(24, logits_processors=[fewer_of_the_last])):
        ask = Ask(*random_prompts([9]), params, FULL)
        (output,) = serve(engine(batch=4), [with_draft(ask, DRAFTS[6])])
        plain = Ask(
            ask.prompt,
            replace(params, frequency_penalty=0.0, repetition_penalty=1.0, logits_processors=()),
            FULL,
        ).alone()
        assert same(output, ask.alone()) and not same(output, plain)
        assert 0 < output.num_accepted < output.num_drafted


def test_what_a_processor_makes_of_wrong_guesses_ends_nothing(random_lengths: random.Random) -> None:
    ask = Ask(*random_prompts([9]), greedy(24), FULL)
    expected = ask.alone()

    def refuses(output_ids: list[int], logits: Tensor) -> Tensor:
        if output_ids != expected.token_ids[: len(output_ids)]:
            raise ValueError("this output never comes")
        return logits

    asked = Ask(ask.prompt, greedy(24, logits_processors=[refuses]), FULL)
    (output,) = serve(engine(batch=4), [with_draft(asked, DRAFTS[3])])
    assert same(output, expected)
    assert 0 < output.num_accepted < output.num_drafted


# Exact sampling


@pytest.mark.parametrize("entries", ENTRIES)
@pytest.mark.parametrize(
    "chosen",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 0.8, "top_k": 7},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.3, "min_p": 0.15},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_tokens_are_drawn_with_the_probabilities_of_the_path(
    backend: str, chosen: dict[str, Any], entries: DraftEntries, random_lengths: random.Random
) -> None:
    """Of all second tokens together, which were guessed: each under the probabilities behind its own first."""
    from scipy.stats import chisquare

    reason = available_backends("cpu")[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    tiny = CausalLM.from_hf(tiny_hf(vocab_size=12), backend=backend, deterministic=True)
    prompt = [5, 6, 7, 8]
    params = SamplingParams(max_tokens=3, seed=11, n=600, ignore_eos=True, **chosen)
    served = engine(model=tiny, batch=12)  # with three guesses each as many rows as native steps take of guesses
    served.add_request(prompt, params, FULL, draft=DRAFTS[3].path, draft_entries=entries)
    (output,) = served.run()
    assert output.num_accepted > 100, "tokens whose place was guessed are among them"
    seconds = torch.tensor([sample.token_ids[1] for sample in output.samples])
    firsts, which = torch.tensor([sample.token_ids[0] for sample in output.samples]).unique(return_inverse=True)
    rows = torch.cat([torch.tensor([prompt]).expand(len(firsts), -1), firsts[:, None]], 1)
    probabilities = (tiny(rows, paths=FULL).logits[:, -1].double() / chosen["temperature"]).softmax(1)
    ordered, order = probabilities.sort(1, descending=True)
    if "top_k" in chosen:
        ordered[:, chosen["top_k"] :] = 0
    if "top_p" in chosen:  # the most likely tokens up to the one with which they reach it
        ordered[ordered.cumsum(1) - ordered >= chosen["top_p"]] = 0
    if "min_p" in chosen:
        ordered[ordered < chosen["min_p"] * ordered[:, :1]] = 0
    kept = torch.zeros_like(probabilities).scatter(1, order, ordered / ordered.sum(1, keepdim=True))
    assert bool((kept == 0).any()) == (len(chosen) > 1) and bool((kept[which, seconds] > 0).all())
    counts, expected = torch.bincount(seconds, minlength=12).double(), kept[which].sum(0)
    common = expected > 5
    common[expected.argmax()] = False  # the rare ones go with the most frequent
    counts, expected = (torch.cat([each[common], each[~common].sum(0, keepdim=True)]) for each in (counts, expected))
    assert len(counts) > 6 and chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3
