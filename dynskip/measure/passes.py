"""`Pass`: the response tokens of some texts in one batch, whose layers run piece by piece along any path.

A candidate that agrees with another one up to a layer begins with the other's states there: `run_paths` runs each layer
once for all paths that agree up to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynskip.causal_lm import CausalLM
from dynskip.data.examples import Example
from dynskip.execution.compact import CompactExecutor
from dynskip.execution.kv_cache import KVCache
from dynskip.execution.step import Step, packed_positions
from dynskip.paths import LayerPath
from dynskip.routing.plan import Plan

# Rows whose logits are held at once. On a CPU few, which stay in the cache; a GPU wants many.
_HEAD_ROWS = {"cpu": 64, "cuda": 1024}
PASS_TOKENS = 8192  # of the texts of one pass


@dataclass(frozen=True)
class Measured:
    """Of each text: nats of its response, response tokens that are the likeliest, and response tokens."""

    nats: tuple[float, ...]
    agreed: tuple[int, ...]
    num_tokens: tuple[int, ...]


@dataclass(frozen=True)
class TokenMeasured(Measured):
    """Also of each response token its nats, and of each text the entropy of what follows its prompt, in nats."""

    token_nats: tuple[float, ...]
    entropy: tuple[float, ...]


class Pass:
    """Texts along paths with keys and values of their own making: plain forward passes, packed without padding."""

    def __init__(self, model: CausalLM, texts: Sequence[Example]) -> None:
        self.model = model
        executor = model.executor()
        assert isinstance(executor, CompactExecutor), "what runs layers on states that are given"
        self.executor = executor
        self.num_texts = len(texts)
        self.num_tokens = tuple(len(text.response_ids) for text in texts)
        device = model.device
        counts = [text.num_tokens - 1 for text in texts]
        ends = torch.tensor(counts).cumsum(0)
        self.lengths: Sequence[int] = counts
        self.token_ids = torch.tensor(
            [token for text in texts for token in (*text.prompt_ids, *text.response_ids)[:-1]], device=device
        )
        self.position_ids = packed_positions(counts, device)
        self.cache_ids = torch.arange(len(counts), device=device)
        # A token is predicted by the row before it: the last rows of each text.
        spans = zip(ends.tolist(), self.num_tokens, strict=True)
        self.predicting = torch.cat([torch.arange(end - count, end) for end, count in spans]).to(device)
        self.targets = torch.tensor([token for text in texts for token in text.response_ids], device=device)
        self.text_ids = torch.arange(len(texts)).repeat_interleave(torch.tensor(self.num_tokens))

    def states(self) -> Tensor:
        """[N, C]: the first layer's input of every row."""
        return self.executor.embed(self._step(()))

    def run_(self, states: Tensor, layers: Sequence[int]) -> None:
        """Let ``layers`` change ``states`` [N, C]."""
        self.executor.run_layers_(states, self._step(layers), None)

    @torch.no_grad()
    def measure(self, states: Tensor) -> Measured:
        """What the head makes of ``states`` [N, C], the last layer's output."""
        nats, agreed, _ = self._scores(states)
        return Measured(nats, agreed, self.num_tokens)

    @torch.no_grad()
    def _scores(self, states: Tensor) -> tuple[tuple[float, ...], tuple[int, ...], Tensor]:
        """Nats and agreement of each text, and the nats of each response token, [tokens], float64 on the CPU."""
        nats = torch.zeros(self.num_texts, dtype=torch.float64)
        agreed = torch.zeros(self.num_texts, dtype=torch.int64)
        of_tokens = []
        num_rows = _HEAD_ROWS[states.device.type]
        parts = [torch.split(each, num_rows) for each in (self.predicting, self.targets, self.text_ids)]
        for rows, targets, text_ids in zip(*parts, strict=True):
            logits = self.model.head(states.index_select(0, rows)).float()
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            of_tokens.append(losses.double().cpu())
            nats.index_add_(0, text_ids, of_tokens[-1])
            agreed.index_add_(0, text_ids, (logits.argmax(1) == targets).long().cpu())
        return tuple(nats.tolist()), tuple(agreed.tolist()), torch.cat(of_tokens)

    def _step(self, layers: Sequence[int]) -> Step:
        path = LayerPath(self.model.num_layers, tuple(layers))
        plan = Plan.per_sequence([path] * len(self.lengths), self.lengths)
        return Step(self.token_ids, self.position_ids, self.cache_ids, plan, fresh=True)


class TokenPass(Pass):
    """A pass whose measures are `TokenMeasured`."""

    @torch.no_grad()
    def measure(self, states: Tensor) -> TokenMeasured:
        """What the head makes of ``states`` [N, C], the last layer's output."""
        nats, agreed, of_tokens = self._scores(states)
        entropy: list[float] = []
        for rows in torch.split(self.last_of_prompts, _HEAD_ROWS[states.device.type]):
            logprobs = self.model.head(states.index_select(0, rows)).float().log_softmax(1)
            entropy += (-(logprobs.exp() * logprobs).sum(1)).tolist()
        return TokenMeasured(nats, agreed, self.num_tokens, tuple(of_tokens.tolist()), tuple(entropy))

    @property
    def last_of_prompts(self) -> Tensor:
        """[texts], int64: the row of the last token of each prompt, which predicts the first of the response."""
        counts = torch.tensor(self.num_tokens)
        return self.predicting[(counts.cumsum(0) - counts).to(self.predicting.device)]


class DraftPass(Pass):
    """Texts as a draft sees them that reads the full path's keys and values: each response token is a first guess.

    Each predicting row is a sequence of its own, which begins with the full path's entries of the tokens before it.
    """

    def __init__(self, model: CausalLM, texts: Sequence[Example]) -> None:
        super().__init__(model, texts)
        full = range(model.num_layers)
        num_texts, num_rows = len(texts), len(self.predicting)
        num_slots = model.num_layers * (len(self.token_ids) + num_rows)
        self._cache: KVCache = self.executor.new_cache(num_texts + num_rows, max(self.lengths) + 1, num_slots)
        self.executor.run(self._step(full), self._cache)
        places = self.position_ids[self.predicting]
        for row, (text, place) in enumerate(zip(self.text_ids.tolist(), places.tolist(), strict=True)):
            if place:
                self._cache.share(text, num_texts + row, place)
        self.lengths = [1] * num_rows
        self._held = places.tolist()
        self.token_ids, self.position_ids = self.token_ids[self.predicting], places
        self.cache_ids = torch.arange(num_texts, num_texts + num_rows, device=model.device)
        self.predicting = torch.arange(num_rows, device=model.device)

    def run_(self, states: Tensor, layers: Sequence[int]) -> None:
        """Let ``layers`` change ``states`` [N, C]; the entries that they make are given back."""
        step = self._step(layers)
        step.fresh, step.decode = False, True
        self.executor.run_layers_(states, step, self._cache)
        self._cache.truncate(self.cache_ids.tolist(), self._held, [1] * len(self._held))


def in_parts(texts: Sequence[Example]) -> list[list[Example]]:
    """``texts`` in order, in batches of about `PASS_TOKENS` tokens."""
    parts: list[list[Example]] = []
    room = 0
    for text in texts:
        if text.num_tokens > room:
            parts.append([])
            room = PASS_TOKENS
        parts[-1].append(text)
        room -= text.num_tokens
    return parts


def run_paths(
    texts: Pass,
    paths: Iterable[LayerPath],
    on_path: Callable[[LayerPath, Measured], None],
    on_layers: Callable[[int], None] = lambda count: None,
) -> None:
    """Measure distinct ``paths`` on ``texts``: ``on_path`` gets each with its measure, ``on_layers`` what was run.

    Cost: `num_layer_runs` runs of a layer, and as many heads as there are paths; holds the states at branches.
    """

    def visit(paths: list[LayerPath], states: Tensor, layer: int) -> None:
        layers = []
        while layer < num_layers:
            without = [path for path in paths if layer not in path.layers]
            if without and len(without) < len(paths):
                break
            if not without:
                layers.append(layer)
            layer += 1
        if layers:
            texts.run_(states, layers)
            on_layers(len(layers))
        if layer == num_layers:
            on_path(paths[0], texts.measure(states))
            return
        visit(without, states.clone(), layer)
        visit([path for path in paths if layer in path.layers], states, layer)

    distinct = list(dict.fromkeys(paths))
    num_layers = texts.model.num_layers
    if distinct:
        visit(distinct, texts.states(), 0)


def num_layer_runs(paths: Iterable[LayerPath]) -> int:
    """How many layers `run_paths` runs for ``paths``: one for each beginning that ends in a layer."""
    return len({path.layers[:count] for path in paths for count in range(1, path.budget + 1)})


@torch.no_grad()
def block_influence(model: CausalLM, texts: Sequence[Example]) -> list[float]:
    """[L]: 1 - cosine of each layer's input and output, mean over all tokens (ShortGPT, arXiv 2403.03853)."""
    batch = Pass(model, texts)
    states, influence = batch.states(), []
    for layer in range(model.num_layers):
        before = states.clone()
        batch.run_(states, [layer])
        cosine = torch.nn.functional.cosine_similarity(before.float(), states.float(), dim=1)
        influence.append(float(1 - cosine.double().mean()))
    return influence


def by_influence(influence: Sequence[float], least_budget: int) -> dict[int, LayerPath]:
    """By budget: the layers of most influence."""
    num_layers = len(influence)
    order = sorted(range(num_layers), key=lambda layer: (-influence[layer], layer))
    return {budget: LayerPath.of(num_layers, order[:budget]) for budget in range(num_layers - 1, least_budget - 1, -1)}
