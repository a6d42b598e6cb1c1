"""The transformer that routes by the prompt: what it can tell apart, and that training it is repeatable and an item."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_models import tiny_setup

from dynskip.evaluation.registry import run_item
from dynskip.evaluation.routers import prompt_transformer
from dynskip.evaluation.routers.prompt_transformer import MAX_TOKENS, PromptTransformer
from dynskip.evaluation.sweep.context import Context
from dynskip.evaluation.sweep.store import ItemStore
from dynskip.evaluation.tasks.routes import read_chosen, route_item

CLASSES = 3


def prompts_with_a_word(num_prompts: int, seed: int = 0) -> tuple[list[torch.Tensor], np.ndarray]:
    """Embedded prompts of 6 to 12 noisy tokens: one word in front is class 0, at the end class 1, nowhere class 2."""
    generator = torch.Generator().manual_seed(seed)
    word = 4 * torch.nn.functional.one_hot(torch.tensor(5), 16)
    labels = np.arange(num_prompts) % CLASSES
    prompts = []
    for row in range(num_prompts):
        prompt = torch.randn(6 + row % 7, 16, generator=generator)
        if labels[row] < 2:
            prompt[0 if labels[row] == 0 else -1] += word
        prompts.append(0.02 * prompt)
    return prompts, labels


def test_where_a_word_stands_is_told() -> None:
    # Means of embeddings cannot tell it: this is what the network is there for.
    prompts, labels = prompts_with_a_word(600)
    network = PromptTransformer.fit(prompts[:450], labels[:450], CLASSES)
    chosen = network.probabilities(prompts[450:]).argmax(1)
    assert (chosen == labels[450:]).mean() > 0.85


def test_a_prompt_is_judged_the_same_alone_and_among_longer_ones() -> None:
    prompts, labels = prompts_with_a_word(60)
    network = PromptTransformer.fit(prompts, labels, CLASSES)
    together = network.probabilities(prompts)
    alone = np.concatenate([network.probabilities([prompt]) for prompt in prompts])
    assert np.allclose(together, alone, atol=1e-6)
    assert np.allclose(together.sum(1), 1.0)
    # What stands beyond the last token that is read changes nothing.
    long = torch.cat([prompts[0]] * (MAX_TOKENS // len(prompts[0]) + 1))
    assert np.array_equal(network.probabilities([long]), network.probabilities([long[:MAX_TOKENS]]))


def test_one_seed_one_network_and_nobody_elses_draws() -> None:
    prompts, labels = prompts_with_a_word(60)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = (PromptTransformer.fit(prompts, labels, CLASSES, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    weights, same, others = (network.state_dict() for network in (first, again, other))
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not all(torch.equal(weights[name], others[name]) for name in weights)


def test_without_a_gain_on_prompts_held_out_the_frequencies_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, labels = prompts_with_a_word(200)
    # A step so long that it can only do harm: training ends, and leaves no trace.
    monkeypatch.setattr(prompt_transformer, "_LEARNING_RATE", 1e3)
    network = PromptTransformer.fit(prompts, labels, CLASSES + 1)
    chances = network.probabilities(prompts)
    assert np.allclose(chances, chances[0])
    assert np.allclose(chances[0], [1 / 3, 1 / 3, 1 / 3, 0.0], atol=0.05) and chances[0, 3] > 0


def test_a_router_that_takes_long_is_an_item(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install dynskip[eval]")
    pytest.importorskip("datasets", reason="datasets is not installed: pip install dynskip[eval]")
    setup = tiny_setup(tmp_path, train_prompts=12)
    labels = np.arange(12) % 2
    items = [route_item(setup, setup.checkpoint, "transformer", [2, 6], labels, 4.0, seed) for seed in range(2)]
    assert items[0].key == route_item(setup, setup.checkpoint, "transformer", [2, 6], labels, 4.0, 0).key
    others = [
        items[1],
        route_item(setup, setup.checkpoint, "transformer", [2, 6], 1 - labels, 4.0, 0),
        route_item(setup, setup.checkpoint, "transformer", [2, 6], labels, 5.0, 0),
    ]
    assert items[0].key not in {other.key for other in others}
    with ItemStore(tmp_path / "items") as store:
        for item in items:
            store.add(item, run_item(item, Context(setup)), 1.0)
        chosen = read_chosen(store, items)
    assert chosen.shape == (2, 12) and {*chosen.ravel().tolist()} <= {0, 1}
    assert run_item(items[0], Context(setup))["chosen"] == chosen[0].tolist()
