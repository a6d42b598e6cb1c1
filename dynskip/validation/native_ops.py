"""What only the native backend has: whole decode steps, and the choice of tokens, against their specifications."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynskip.controllers import HiddenStateGate
from dynskip.execution.executor import Executor
from dynskip.execution.kv_cache import KVCache
from dynskip.execution.native_steps import NativeSteps
from dynskip.execution.reference import ReferenceExecutor
from dynskip.execution.step import RowCounts, Step, packed_positions
from dynskip.execution.turns import Guesses, Turns, rows_step
from dynskip.models.config import DecoderConfig, Rotary
from dynskip.models.decoder import Decoder
from dynskip.models.linear import Linear
from dynskip.ops import choice_reference, native
from dynskip.ops.checks import dtype_name
from dynskip.ops.choice import choice_columns
from dynskip.paths import LayerPath
from dynskip.routing.plan import KVPolicy, Plan
from dynskip.routing.routes import ControllerDecision, StepTokens
from dynskip.sampling import Choice, SamplingParams
from dynskip.validation import errors
from dynskip.validation.errors import Result, max_error

NATIVE_OP_NAMES = ("decode_step", "guess_tokens", "choose_tokens")

_LAYERS, _VOCAB = 4, 200
# Every part that a layer may have, in few decoders.
_DECODERS: dict[str, dict[str, Any]] = {
    "learned positions, post-norm, projected": {"norm_first": False, "final_norm": False, "embedding_size": 32},
    "rotary, RMS, gated, grouped heads": {
        "norm": "rms",
        "gated": True,
        "activation": "silu",
        "rotary": Rotary.plain(16, 100.0),
        "num_kv_heads": 2,
        "qk_norm": True,
        "qkv_bias": False,
    },
    "parallel, partly rotary": {"parallel": True, "activation": "gelu", "rotary": Rotary.plain(8, 100.0)},
    "ALiBi, embedding norm": {"alibi": True, "embedding_norm": True, "activation": "gelu_tanh"},
    "windows": {"rotary": Rotary.plain(16, 100.0), "window": 5, "window_layers": (1, 3)},
}
# Tokens of each sequence by step; of prompts more than a block of rows and of keys, then what follows them.
_COUNTS = ((7, 1, 12), (1, 1, 1), (1, 1, 1), (3, 1, 2))
_PROMPT_COUNTS = ((40, 1, 70), (3, 1, 35), (1, 1, 1))
_MOST_TOKENS = 128
_ASKED = (0, 2, 3)  # the layers that gates decide for
_POLICIES = (KVPolicy.EVICT, KVPolicy.PROPAGATE, KVPolicy.SHARE)


class _Steps(NamedTuple):
    """Steps of three sequences, one after the other.

    kv_policy: of masks per token, or None for paths. is_prompt: several tokens of a sequence are those of a prompt.
    begins: every other row begins in the middle, with a state. gate: decides in place of masks.
    """

    name: str
    kv_policy: KVPolicy | None
    is_prompt: bool = False
    begins: bool = False
    gate: HiddenStateGate | None = None

    @property
    def counts(self) -> tuple[tuple[int, ...], ...]:
        return _PROMPT_COUNTS if self.is_prompt else _COUNTS

    def plan(self, counts: tuple[int, ...], firsts: Sequence[int], paths: Tensor, generator: torch.Generator) -> Plan:
        """What the layers of a step do; paths: [B, L], bool."""
        if self.gate is not None:
            assert self.kv_policy is not None, "a gate decides for each token"
            tokens = StepTokens(tuple(firsts), counts, self.is_prompt)
            return Plan.decided(ControllerDecision(self.gate, tokens), _LAYERS, counts, self.kv_policy)
        if self.kv_policy is None:
            active = paths.repeat_interleave(torch.tensor(counts), 0)
        else:
            active = torch.rand(sum(counts), _LAYERS, generator=generator) < 0.6
        if self.begins:
            active[::2, : _LAYERS // 2] = False
        return Plan.per_token(active, counts, self.kv_policy or KVPolicy.EVICT)


_STEPS = [
    *(_Steps("paths" if policy is None else policy.value, policy) for policy in (None, *_POLICIES)),
    _Steps("prompts, paths", None, is_prompt=True),
    _Steps("prompts, share", KVPolicy.SHARE, is_prompt=True),
    _Steps("begun rows", None, begins=True),
]


def validate_native_op(name: str, dtype: torch.dtype, falsify: bool) -> list[Result]:
    """The results of every case of one of `NATIVE_OP_NAMES`; with `falsify` after an element of each was changed."""
    results = {"decode_step": _decode_steps, "guess_tokens": _guesses, "choose_tokens": _choices}[name](dtype, falsify)
    return [Result("native", dtype_name(dtype), name, case, error, allowed) for case, error, allowed in results]


def _guesses(dtype: torch.dtype, falsify: bool) -> Iterator[tuple[str, float, float]]:
    """The error is how many tokens differ from those of the steps one by one, which `decode_step` answers for."""
    generator = torch.Generator().manual_seed(9)
    for name, changes in _DECODERS.items():
        steps = _WholeSteps(*_random_decoder(_config(changes), dtype))
        for temperature in (0.0, 1.5):
            tokens = [torch.randint(_VOCAB, (count,), generator=generator).tolist() for count in _COUNTS[0]]
            paths = [LayerPath.of(_LAYERS, [0, 2]), LayerPath.of(_LAYERS, [1, 2, 3]), LayerPath.full(_LAYERS)]
            params = SamplingParams(temperature=temperature, top_k=50)
            choices = [Choice(params, 977, output, 3 * output) for output in range(3)]
            turns = Turns(tokens, [0] * 3, range(3), paths, [4, 1, 5], choices, torch.device("cpu"))
            found = []
            for guess in (steps.guess, partial(Executor.guess, steps)):
                guesses = guess(turns, steps.new_cache(3, 32, 32 * 3 * _LAYERS)).tokens
                found.append(torch.tensor([token for each in guesses for token in each]))
            if falsify:
                errors.change_one_element(found[0])
            yield f"{name}, temperature {temperature}", float((found[0] != found[1]).sum()), 0.0


def _decode_steps(dtype: torch.dtype, falsify: bool) -> Iterator[tuple[str, float, float]]:
    for name, changes in _DECODERS.items():
        config = _config(changes)
        decoder, head = _random_decoder(config, dtype)
        wide = ReferenceExecutor(copy.deepcopy(decoder).double(), copy.deepcopy(head).double())
        gated = _Steps("gate, share", KVPolicy.SHARE, gate=_clear_gate(wide, KVPolicy.SHARE))
        for steps in (*_STEPS, gated):
            exact = _logits(wide, steps)
            eager = _logits(ReferenceExecutor(decoder, head), steps)
            for packs in (False, True):
                own, own_head = copy.deepcopy(decoder), copy.deepcopy(head)
                for module in (*own.modules(), own_head) if packs else ():
                    if isinstance(module, Linear):
                        module.pack_()
                logits = _logits(_WholeSteps(own, own_head), steps)
                if falsify:
                    errors.change_one_element(logits)
                case = f"{name}, {steps.name}, {'packed' if packs else 'dense'}"
                allowed = errors.allowed_error(exact, eager, exact.abs().max().item() * _LAYERS)
                yield case, max_error(logits.double(), exact), allowed
        drawn, expected = _drawn(_WholeSteps(decoder, head))
        if falsify:
            errors.change_one_element(drawn)
        yield f"{name}, drawn", float((drawn != expected).sum()), 0.0


def _drawn(executor: _WholeSteps) -> tuple[Tensor, Tensor]:
    """The tokens that a step draws, several rows a sequence, and those that the specification draws from its logits."""
    step = rows_step([[5, 9], [3], [7, 1, 8]], [0] * 3, range(3), [LayerPath.full(_LAYERS)] * 3, torch.device("cpu"))
    choices = [
        Choice(SamplingParams(temperature=temperature, top_k=50), 977, row, 3 * row)
        for row, temperature in enumerate((0.0, 1.5, 1.0, 0.0, 1.5, 1.0))
    ]
    assert executor.steps.takes(step), "the extension reads every matrix"
    predictions = executor.steps.predict(step, executor.new_cache(3, 32, 32 * 3 * _LAYERS), choices=choices)
    assert predictions.drawn is not None, "choices were given"
    columns = choice_columns(choices, _VOCAB, torch.device("cpu"))
    return predictions.drawn, choice_reference.choose_tokens(predictions.logits, *columns)


def _clear_gate(executor: ReferenceExecutor, kv_policy: KVPolicy) -> HiddenStateGate:
    """A gate whose decisions no rounding changes: a layer's threshold lies in the widest gap above the median row."""
    generator = torch.Generator().manual_seed(13)
    hidden_size = executor.decoder.config.hidden_size
    weight = torch.randn(_LAYERS, 2, hidden_size, generator=generator) * hidden_size**-0.5
    bias = torch.zeros(_LAYERS, 2)
    gate = HiddenStateGate(weight, bias, always=set(range(_LAYERS)) - {*_ASKED})
    for asked in _ASKED:
        margins: list[Tensor] = []

        def look(layer: int, hidden_states: Tensor, asked: int = asked, margins: list[Tensor] = margins) -> None:
            if layer == asked:
                margins.append(hidden_states.float() @ (weight[asked, 1] - weight[asked, 0]))

        _logits(executor, _Steps("gate", kv_policy, gate=gate), look)
        ordered = torch.cat(margins).sort().values
        ordered = ordered[len(ordered) // 2 : -2]
        widest = int(ordered.diff().argmax())
        bias[asked, 0] = ordered[widest : widest + 2].mean()
    return gate


def _config(changes: dict[str, Any]) -> DecoderConfig:
    return DecoderConfig.of_sizes(
        "case", _LAYERS, 64, 4, **{"vocab_size": _VOCAB, "max_positions": _MOST_TOKENS, **changes}
    )


class _WholeSteps(Executor[KVCache]):
    """Runs every step whole, prompts too, on any CPU."""

    def __init__(self, decoder: Decoder, lm_head: Linear) -> None:
        self.decoder = decoder
        self.row_counts = RowCounts(decoder.config.num_layers)
        self.steps = NativeSteps(decoder, lm_head, self.row_counts, deterministic=False)

    def new_cache(self, num_seqs: int, max_context_len: int, num_slots: int) -> KVCache:
        """See `Executor.new_cache`."""
        config, device = self.decoder.config, torch.device("cpu")
        sizes = config.num_layers, num_seqs, max_context_len, num_slots, config.num_kv_heads, config.head_size
        return KVCache(*sizes, self.decoder.dtype, device, has_positions=config.attends_by_position)

    def run(self, step: Step, cache: KVCache | None, on_layer: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """[N, V]: the logits; the head comes with the step."""
        # Which prompts are worth a call depends on the CPU; what a call computes does not.
        assert cache is not None and self.steps.takes(replace(step, decode=True)), "the extension reads every matrix"
        return self.steps.run(step, cache, head=True, on_layer=on_layer)

    def guess(self, turns: Turns, cache: KVCache) -> Guesses:
        """See `Executor.guess`."""
        assert self.steps.takes(turns.first_step), "the extension reads every matrix"
        return self.steps.guess(turns, cache)

    def head(self, hidden_states: Tensor) -> Tensor:
        """What `run` returned."""
        return hidden_states

    def finish(self, hidden_states: Tensor) -> Tensor:
        """What `run` returned."""
        return hidden_states


@torch.no_grad()
def _logits(
    executor: ReferenceExecutor | _WholeSteps, steps: _Steps, on_layer: Callable[[int, Tensor], None] | None = None
) -> Tensor:
    """[N, V]: of all rows of all steps."""
    generator, decoder = torch.Generator().manual_seed(7), executor.decoder
    num_tokens = sum(map(sum, steps.counts))
    cache: Any = executor.new_cache(3, _MOST_TOKENS, num_tokens * _LAYERS)
    if steps.kv_policy is KVPolicy.SHARE and isinstance(cache, KVCache):
        cache.may_repeat = True
    lengths, found = torch.zeros(3, dtype=torch.int64), []
    paths = torch.rand(3, _LAYERS, generator=generator) < 0.6
    for counts in steps.counts:
        tokens = torch.randint(_VOCAB, (sum(counts),), generator=generator)
        repeats = torch.tensor(counts)
        positions = packed_positions(counts, torch.device("cpu")) + lengths.repeat_interleave(repeats)
        step = Step(
            tokens,
            positions,
            torch.arange(3),
            steps.plan(counts, lengths.tolist(), paths, generator),
            decode=not steps.is_prompt or max(counts) == 1,
            fresh=not lengths.any(),
        )
        if steps.begins:
            rows = torch.arange(0, sum(counts), 2)
            states = torch.randn(len(rows), decoder.config.hidden_size, generator=generator)
            step.begun = rows, states.bfloat16().to(decoder.dtype)
        found.append(executor.head(executor.run(step, cache, on_layer)))
        lengths += repeats
    return torch.cat(found)


def _random_decoder(config: DecoderConfig, dtype: torch.dtype) -> tuple[Decoder, Linear]:
    generator = torch.Generator().manual_seed(3)
    decoder, head = Decoder(config), Linear(config.embedding_size, config.vocab_size, bias=False)
    for name, parameter in (*decoder.named_parameters(), *head.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name and name.endswith("weight")
        with torch.no_grad():
            parameter.copy_(1 + 0.1 * values if is_norm else values * parameter.shape[-1] ** -0.5)
    return decoder.to(dtype).requires_grad_(False), head.to(dtype).requires_grad_(False)


def _choices(dtype: torch.dtype, falsify: bool) -> Iterator[tuple[str, float, float]]:
    """The error is how many rows have another token than the specification's."""
    generator = torch.Generator().manual_seed(5)
    for num_rows, num_tokens in ((1, 1), (7, 200), (32, 5000)):
        logits = (3 * torch.randn(num_rows, num_tokens, generator=generator)).to(dtype)
        row = torch.arange(num_rows)
        temperature = (row % 3).double()
        top_k = torch.where(row % 2 == 0, 0, 50).clamp(max=num_tokens)
        everything = torch.ones(num_rows, dtype=torch.float64)
        min_p = 0.001 * (row % 5).double()
        for name, top_p in (("", everything), (", top_p", _clear_top_p(logits, temperature, top_k, min_p))):
            columns = temperature, top_k, top_p, min_p, row * 977, row % 4, row * 3
            tokens = native.choose_tokens(logits, *columns)
            if falsify:
                errors.change_one_element(tokens)
            wrong = tokens != choice_reference.choose_tokens(logits, *columns)
            yield f"{num_rows} rows of {num_tokens}{name}", float(wrong.sum()), 0.0


def _clear_top_p(logits: Tensor, temperature: Tensor, top_k: Tensor, min_p: Tensor) -> Tensor:
    """[R], float64: a mass near 0.7 whose last token no rounding changes: half of that token's share is missing."""
    floats = logits.double().sort(dim=-1, descending=True, stable=True).values
    weights = ((floats - floats[:, :1]) / torch.where(temperature > 0, temperature, 1.0)[:, None]).exp()
    weights[torch.arange(logits.shape[1]) >= torch.where(top_k > 0, top_k, logits.shape[1])[:, None]] = 0
    weights[weights < min_p[:, None]] = 0
    shares = weights / weights.sum(1, keepdim=True)
    up_to = shares.cumsum(1)
    last = (up_to < 0.7).sum(1, keepdim=True)
    return (up_to - shares / 2).gather(1, last)[:, 0]
