"""What only the native backend has: whole decode steps, and the choice of tokens, against their specifications."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dynskip.execution.executor import Executor
from dynskip.execution.kv_cache import KVCache
from dynskip.execution.native_steps import NativeSteps
from dynskip.execution.reference import ReferenceExecutor
from dynskip.execution.step import RowCounts, Step, packed_positions
from dynskip.execution.turns import Guesses, Turns
from dynskip.models.config import DecoderConfig, Rotary
from dynskip.models.decoder import Decoder
from dynskip.models.linear import Linear
from dynskip.ops import choice_reference, native
from dynskip.ops.checks import dtype_name
from dynskip.paths import LayerPath
from dynskip.routing.plan import KVPolicy, Plan
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
_COUNTS = ((7, 1, 12), (1, 1, 1), (1, 1, 1), (3, 1, 2))


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
        wide, wide_head = copy.deepcopy(decoder).double(), copy.deepcopy(head).double()
        for policy in (None, KVPolicy.EVICT, KVPolicy.PROPAGATE, KVPolicy.SHARE):
            exact = _logits(ReferenceExecutor(wide, wide_head), config, policy)
            eager = _logits(ReferenceExecutor(decoder, head), config, policy)
            for packs in (False, True):
                own, own_head = copy.deepcopy(decoder), copy.deepcopy(head)
                for module in (*own.modules(), own_head) if packs else ():
                    if isinstance(module, Linear):
                        module.pack_()
                logits = _logits(_WholeSteps(own, own_head), config, policy)
                if falsify:
                    errors.change_one_element(logits)
                case = f"{name}, {'paths' if policy is None else policy.value}, {'packed' if packs else 'dense'}"
                allowed = errors.allowed_error(exact, eager, exact.abs().max().item() * _LAYERS)
                yield case, max_error(logits.double(), exact), allowed


def _config(changes: dict[str, Any]) -> DecoderConfig:
    return DecoderConfig.of_sizes("case", _LAYERS, 64, 4, **{"vocab_size": _VOCAB, "max_positions": 64, **changes})


class _WholeSteps(Executor[KVCache]):
    """Runs every step whole, prompts too: as steps whose sequences bring several rows."""

    def __init__(self, decoder: Decoder, lm_head: Linear) -> None:
        self.config, self.dtype = decoder.config, decoder.dtype
        self.row_counts = RowCounts(decoder.config.num_layers)
        self.steps = NativeSteps(decoder, lm_head, self.row_counts, deterministic=False)

    def new_cache(self, num_seqs: int, max_context_len: int, num_slots: int) -> KVCache:
        """See `Executor.new_cache`."""
        config, device = self.config, torch.device("cpu")
        sizes = config.num_layers, num_seqs, max_context_len, num_slots, config.num_kv_heads, config.head_size
        return KVCache(*sizes, self.dtype, device, has_positions=config.attends_by_position)

    def run(self, step: Step, cache: KVCache | None, on_layer: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """[N, V]: the logits; the head comes with the step."""
        step.decode = True
        assert cache is not None and self.steps.takes(step), "the extension reads every matrix"
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
def _logits(executor: Executor[Any], config: DecoderConfig, kv_policy: KVPolicy | None) -> Tensor:
    """[N, V]: of all rows of all steps."""
    generator = torch.Generator().manual_seed(7)
    cache = executor.new_cache(3, 32, 32 * 3 * _LAYERS)
    if kv_policy is KVPolicy.SHARE and isinstance(cache, KVCache):
        cache.may_repeat = True
    lengths, found = torch.zeros(3, dtype=torch.int64), []
    masks = torch.rand(3, _LAYERS, generator=generator) < 0.6
    for counts in _COUNTS:
        tokens = torch.randint(_VOCAB, (sum(counts),), generator=generator)
        repeats = torch.tensor(counts)
        positions = packed_positions(counts, torch.device("cpu")) + lengths.repeat_interleave(repeats)
        if kv_policy is None:
            plan = Plan.per_token(masks.repeat_interleave(repeats, 0), counts, KVPolicy.EVICT)
        else:
            active = torch.rand(sum(counts), _LAYERS, generator=generator) < 0.6
            plan = Plan.per_token(active, counts, kv_policy)
        step = Step(tokens, positions, torch.arange(3), plan, decode=max(counts) == 1, fresh=not lengths.any())
        found.append(executor.logits(step, cache))
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
        # Tokens at the very edge of a mass below 1 may fall to either side, so top_p is left to the tests.
        columns = temperature, top_k, torch.ones(num_rows, dtype=torch.float64), row * 977, row % 4, row * 3
        tokens = native.choose_tokens(logits, *columns)
        if falsify:
            errors.change_one_element(tokens)
        wrong = tokens != choice_reference.choose_tokens(logits, *columns)
        yield f"{num_rows} rows of {num_tokens}", float(wrong.sum()), 0.0
