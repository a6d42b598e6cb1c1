"""Streams of requests for the engine, and what each request becomes alone."""

from __future__ import annotations

import collections
import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from models import NUM_LAYERS, VOCAB_SIZE, tiny_model
from torch import Tensor

from dynskip import LayerPath, OPTForCausalLM, SamplingParams
from dynskip.controllers import TokenContext
from dynskip.costs.layer_costs import Curve, LayerCosts
from dynskip.costs.step_costs import StepCosts
from dynskip.engine.engine import Engine
from dynskip.engine.request import RequestOutput
from dynskip.speculation.lengths import Candidate, DraftLengths

PATHS = [
    LayerPath.uniform(NUM_LAYERS, 1),
    LayerPath.of(NUM_LAYERS, [1, 4]),
    LayerPath.uniform(NUM_LAYERS, 3),
    LayerPath.full(NUM_LAYERS),
]


@functools.cache
def model(dtype: torch.dtype = torch.float32) -> OPTForCausalLM:
    """A tiny model, the rows of whose steps do not depend on each other."""
    return tiny_model(dtype=dtype, deterministic=True)


@functools.cache
def costs(num_layers: int = NUM_LAYERS) -> StepCosts:
    """A layer takes 1 ms up to 4 rows, then in proportion; the head half of that."""
    layer, head = (Curve((4, 5, 12), (ms, 1.25 * ms, 3 * ms)) for ms in (1.0, 0.5))
    both = LayerCosts(layer, head, 1e-4)
    return StepCosts(num_layers, both, both)


def engine(policy: str = "lockstep", num_slots: int | None = None, **options: Any) -> Engine:
    """An engine for the tiny model, with room for ``num_slots`` key-value entries."""
    options.setdefault("model", model())
    options.setdefault("costs", costs(options["model"].num_layers))
    kv_bytes = None if num_slots is None else num_slots * options["model"].kv_entry_bytes
    return Engine(kv_bytes=kv_bytes, policy=policy, **options)


@dataclass(eq=False)
class Ask:
    """The arguments of ``add_request``."""

    prompt: list[int]
    params: SamplingParams
    path: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    def add(self, to: Engine, **options: Any) -> Any:
        """Let it wait; returns its id."""
        return to.add_request(self.prompt, self.params, self.path, **self.options, **options)

    def alone(self, **options: Any) -> RequestOutput:
        """What it becomes in an engine of its own."""
        own = engine(**options)
        self.add(own)
        (output,) = own.run()
        assert output.error is None
        return output


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    """The most likely tokens, with log-probabilities: equal ones mean that all bits were."""
    return SamplingParams(**{"max_tokens": max_tokens, "ignore_eos": True, "logprobs": 2, **options})


def drawn(max_tokens: int, seed: int, **options: Any) -> SamplingParams:
    """Tokens drawn with a seed."""
    return greedy(max_tokens, **{"temperature": 1.2, "seed": seed, **options})


def fewer_of_the_last(output_ids: list[int], logits: Tensor) -> Tensor:
    """A logits processor: the last three tokens of the output become less likely."""
    logits[output_ids[-3:]] -= 2.5
    return logits


def more_of_the_prompt(prompt_ids: list[int], output_ids: list[int], logits: Tensor) -> Tensor:
    """A logits processor: a token of the prompt, another each time, becomes more likely."""
    chosen = torch.zeros_like(logits)
    chosen[prompt_ids[len(output_ids) % len(prompt_ids)]] = 3.0
    return logits.double() + chosen.double()


def random_changes(draw: random.Random) -> dict[str, Any]:
    """Parameters that change logits, one or several."""
    changes: dict[str, Any] = {
        "min_p": draw.choice([0.01, 0.1, 0.5, 1.0]),
        "repetition_penalty": draw.choice([0.7, 1.1, 1.7, 1e30]),
        "presence_penalty": draw.choice([-2.0, 0.4, 2.0]),
        "frequency_penalty": draw.choice([-0.5, 0.3, 2.0]),
        "logit_bias": {draw.randrange(VOCAB_SIZE): draw.choice([-math.inf, -3.0, 4.0]) for _ in range(5)},
        "min_tokens": 1,
        "logits_processors": draw.choice([[fewer_of_the_last], [more_of_the_prompt, fewer_of_the_last]]),
    }
    return {name: changes[name] for name in draw.sample(sorted(changes), draw.randint(1, 4))}


class Parity:
    """A per-token controller: which rows run a layer depends on their own hidden states alone."""

    def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N], bool: True in the first layer, and where the second value is positive."""
        return (hidden_states[:, 1] > 0) | (layer == 0)


def same(output: RequestOutput, expected: RequestOutput) -> bool:
    """Whether both became the same, bit by bit; ids and times apart."""
    assert output.error is None and expected.error is None
    ours, theirs = ((each.samples, each.prompt_ids, each.path, each.prompt_logprobs) for each in (output, expected))
    return ours == theirs


def serve(served: Engine, asks: Sequence[Ask]) -> list[RequestOutput]:
    """The outputs of ``asks``, all of which wait from the beginning, in their order; the memory is empty then."""
    ids = [ask.add(served) for ask in asks]
    outputs = {output.request_id: output for output in served.run()}
    assert_empty(served)
    assert len(outputs) == len(ids)
    return [outputs[request_id] for request_id in ids]


def assert_empty(served: Engine) -> None:
    """Nothing runs or waits, and all memory is free once nothing is kept for requests to come."""
    stats = served.stats()
    assert not served.has_unfinished and stats.num_waiting == stats.num_prefilling == stats.num_running == 0
    check_slots(served)
    assert served.kv.num_used == stats.kv_bytes == 0
    served.reset_prefix_cache()
    assert served.kv.cache.num_slots_used == served.stats().prefix_bytes == 0
    assert served.kv.num_free_seqs == served.scheduler.policy.pool
    counters = served.scheduler.counters
    assert counters.num_added == counters.num_finished + counters.num_aborted


def guess_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every draft guess three tokens a step, whatever that costs."""
    choose = DraftLengths.choose

    def three(self: DraftLengths, candidates: Sequence[Candidate], others: Sequence[LayerPath] = ()) -> Any:
        lengths = tuple(min(3, each.most) for each in candidates)
        return replace(choose(self, candidates, others), lengths=lengths, gain=1e9)

    monkeypatch.setattr(DraftLengths, "choose", three)
    monkeypatch.setattr(DraftLengths, "plain", lambda *_: None)


def check_slots(served: Engine) -> None:
    """Between steps each slot is owned by those that know it, and all accounts agree; kept prefixes are in order."""
    kv, cache = served.kv, served.kv.cache
    assert kv.num_used + kv.num_kept <= kv.num_slots
    if kv.prefixes is None:
        return
    tree = kv.prefixes._tree
    kept: list[int] = []
    unused: list[int] = []
    places = {prefix: place for place, prefix in enumerate(tree._unused)}
    left = [*tree.root.children.items()]
    while left:
        key, prefix = left.pop()
        left += prefix.children.items()
        path, slots = prefix.key[0], prefix.slots.flatten().tolist()
        assert key == prefix.key == (path, *prefix.tokens[: tree.multiple])
        assert prefix.slots.shape == (path.budget, len(prefix.tokens)) and len(prefix.tokens) % tree.multiple == 0
        assert prefix.end == prefix.parent.end + len(prefix.tokens)
        assert all(child.parent is prefix and child.num_users <= prefix.num_users for child in prefix.children.values())
        kept += slots
        if prefix.num_users:
            assert prefix not in places
        else:
            unused += slots
            assert all(places[child] < places[prefix] for child in prefix.children.values())
    assert len(set(kept)) == len(kept), "a slot is kept once"
    assert cache.pool.is_kept.nonzero().flatten().tolist() == sorted(kept)
    owners = collections.Counter(kept)
    for seq in range(cache.context_lens.shape[1]):
        owned = {
            slot
            for layer, count in enumerate(cache.context_lens[:, seq].tolist())
            for slot in cache.slot_tables[layer, seq, :count].tolist()
        }
        owners.update(owned)
    assert all(owners[slot] == 1 for slot in unused), "what no sequence uses no sequence owns"
    assert all(owners[slot] > 1 for slot in {*kept} - {*unused}), "what is used is owned"
    assert kv.num_kept == len(unused)
    assert cache.num_slots_used == len(owners)
    assert all(cache.num_extra_owners[slot] == count - 1 for slot, count in owners.items())
