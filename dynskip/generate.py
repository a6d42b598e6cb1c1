"""Token-level generation for a closed batch: prefill once, then decode in lock-step until every sequence has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynskip.executor import CompactExecutor
from dynskip.model import ExecutorName, OPTForCausalLM, check_tokens
from dynskip.paths import LayerPath
from dynskip.routing import Paths, Routing, StepTokens, resolve
from dynskip.sampling import Sampler, SamplingParams, choose_tokens
from dynskip.step import Step, packed_positions


@dataclass
class OutputSequence:
    """One output while it grows. ``finish_reason`` is "stop" or "length" once it has ended."""

    prompt_ids: list[int]
    params: SamplingParams
    sampler: Sampler
    path: LayerPath | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str | None = None


# Asked after every token whether the text so far ends the sequence; text belongs to the caller.
StopCheck = Callable[[OutputSequence], bool]


class Generation:
    """The state of one closed batch.

    model: what to run. prompts: token ids. params: one per prompt. paths and the rest as in ``LLM.generate``.
    stops_early: asked after each token of a sequence that has stop texts.
    """

    def __init__(
        self,
        model: OPTForCausalLM,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        paths: Paths = None,
        kv_policy: str | None = None,
        prompt_depth: str = "path",
        executor: ExecutorName = "compact",
        stops_early: StopCheck | None = None,
    ) -> None:
        self.model = model
        self.stops_early = stops_early
        self.executor_name = executor
        self.executor = model.executor(executor)
        for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            check_tokens(prompt, param.max_tokens, model.config, f"generate: prompt {index}")
        packed_ids = [token_id for prompt in prompts for token_id in prompt]
        # All prompts in one copy to the device.
        self._packed_ids = torch.tensor(packed_ids, dtype=torch.int64, device=model.device)
        prompt_ids = torch.split(self._packed_ids, [len(prompt) for prompt in prompts])
        routing = resolve(paths, model.num_layers, prompt_ids, model.embed_tokens, kv_policy, prompt_depth)
        for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            routing.check_covers(index, len(prompt) + param.max_tokens - 1)
        self.num_copies = [param.n for param in params]
        self.routing: Routing = routing.repeat(self.num_copies)
        self.sequences = [
            OutputSequence(list(prompt), param, Sampler(param, copy), routing.path(index))
            for index, (prompt, param) in enumerate(zip(prompts, params, strict=True))
            for copy in range(param.n)
        ]
        self.running = list(range(len(self.sequences)))
        self.stop_ids = [self._stop_ids(sequence.params) for sequence in self.sequences]
        self.num_steps = 0
        self.cache: Any = None  # KVCache or ReferenceCache, as the executor makes it
        self._decode: tuple[tuple[int, ...], Step] | None = None

    @torch.no_grad()
    def prefill(self) -> None:
        """Run all prompts and choose the first token of each output. Copies of a prompt share its entries."""
        num_seqs = len(self.sequences)
        # The last token of an output is never run, so it takes no entry.
        lengths = [len(s.prompt_ids) + s.params.max_tokens - 1 for s in self.sequences]
        copies = torch.tensor(self.num_copies)
        firsts = (copies.cumsum(0) - copies).tolist()
        num_entries = sum(self.routing.num_entries(seq, length) for seq, length in enumerate(lengths))
        for seq in set(range(num_seqs)) - set(firsts):
            num_entries -= self.routing.num_entries(seq, len(self.sequences[seq].prompt_ids))
        self.cache = self.executor.new_cache(num_seqs, max(lengths), num_entries)
        counts = tuple(len(self.sequences[seq].prompt_ids) for seq in firsts)
        tokens = StepTokens(tuple(firsts), (0,) * len(firsts), counts, is_prompt=True)
        device = self.model.device
        step = Step(
            self._packed_ids,
            packed_positions(counts, device),
            torch.tensor(firsts, device=device),
            self.routing.plan(tokens),
        )
        hidden_states = self.executor.run(step, self.cache)
        last_rows = torch.tensor(counts, device=device).cumsum(0) - 1
        logits = self.model.head(hidden_states[last_rows], self.executor_name)
        for first, num_copies in zip(firsts, self.num_copies, strict=True):
            for copy in range(1, num_copies):
                self.cache.fork(first, first + copy)
        self._accept(logits.repeat_interleave(copies.to(device), 0))

    @torch.no_grad()
    def step(self) -> None:
        """Run the last token of every running sequence and choose the next one of each."""
        self._accept(self.model.next_logits(self.next_step(), self.cache, self.executor_name))

    def run(self, on_step: Callable[[Generation], None] | None = None) -> list[OutputSequence]:
        """All sequences at their end, copies side by side; ``on_step`` is called after prefill and each step."""
        self.prefill()
        while True:
            if on_step is not None:
                on_step(self)
            if not self.running:
                if isinstance(self.executor, CompactExecutor):
                    self.executor.retire(self.cache)
                return self.sequences
            self.step()

    def next_step(self) -> Step:
        """The decode step of the running sequences; its plan is kept while they and their paths stay the same."""
        seqs = tuple(self.running)
        device = self.model.device
        positions = [len(self.sequences[s].prompt_ids) + len(self.sequences[s].token_ids) - 1 for s in seqs]
        token_ids = torch.tensor([self.sequences[s].token_ids[-1] for s in seqs], device=device)
        position_ids = torch.tensor(positions, device=device)
        fixed = self.routing.path(seqs[0]) is not None
        if fixed and self._decode is not None and self._decode[0] == seqs:
            old = self._decode[1]
            return Step(token_ids, position_ids, old.cache_ids, old.plan, decode=True)
        plan = self.routing.plan(StepTokens(seqs, tuple(positions), (1,) * len(seqs), is_prompt=False))
        step = Step(token_ids, position_ids, torch.tensor(seqs, device=device), plan, decode=True)
        self._decode = (seqs, step)
        return step

    def _accept(self, logits: Tensor) -> None:
        self.num_steps += 1
        sequences = [self.sequences[seq] for seq in self.running]
        tokens = choose_tokens(logits, [sequence.sampler for sequence in sequences])
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            sequence.token_ids.append(token)
            if sequence.params.logprobs is not None:
                sequence.logprobs.append(_top_logprobs(logits[row], token, sequence.params.logprobs))
            sequence.finish_reason = self._finish_reason(self.running[row], token)
        self.running = [seq for seq in self.running if self.sequences[seq].finish_reason is None]

    def _finish_reason(self, seq: int, token: int) -> str | None:
        sequence = self.sequences[seq]
        if token in self.stop_ids[seq]:
            return "stop"
        if sequence.params.stop and self.stops_early is not None and self.stops_early(sequence):
            return "stop"
        return "length" if len(sequence.token_ids) >= sequence.params.max_tokens else None

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        eos = self.model.config.eos_token_id
        eos_ids = () if eos is None or params.ignore_eos else (eos,) if isinstance(eos, int) else tuple(eos)
        return frozenset((*eos_ids, *params.stop_token_ids))


def _top_logprobs(logits: Tensor, token: int, num_top: int) -> dict[int, float]:
    logprobs = logits.float().log_softmax(0)
    values, tokens = logprobs.topk(min(num_top, logprobs.numel()))
    top = dict(zip(tokens.tolist(), values.tolist(), strict=True))
    return {token: float(logprobs[token]), **top}
