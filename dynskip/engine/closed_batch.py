"""Token-level generation for a closed batch: all requests at once, in lock-step until every sequence has ended."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from dynskip.causal_lm import CausalLM, ExecutorName, check_tokens
from dynskip.engine.diagnosis import NonFiniteError
from dynskip.engine.drafting import find_draft
from dynskip.engine.engine import Engine
from dynskip.engine.kv_pool import KVPool
from dynskip.engine.request import OutputSequence, RequestOutput, Span
from dynskip.execution.step import Step
from dynskip.routing.routes import Paths, resolve
from dynskip.sampling import SamplingParams
from dynskip.speculation.draft import DraftEntries, Drafts, resolve_drafts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Generation:
    """One closed batch: an engine whose requests are all there at the beginning, and step together.

    model: what to run. prompts: token ids. params: one per prompt; without max_tokens, as many tokens as the model's
    positions hold. paths and the rest as in ``LLM.generate``.
    tokenizer: only for stop texts. sequences: the outputs, copies of a prompt side by side.
    reads_late: as in `ModelRunner`, for `run` only: after each `step` its tokens are known.
    """

    def __init__(
        self,
        model: CausalLM,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        paths: Paths = None,
        kv_policy: str | None = None,
        prompt_depth: str = "path",
        executor: ExecutorName = "compact",
        tokenizer: PreTrainedTokenizerBase | None = None,
        draft: Drafts = None,
        draft_entries: DraftEntries = "own",
    ) -> None:
        for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            check_tokens(prompt, param.num_new_tokens(1), model.decoder_config, f"generate: prompt {index}")
            param.check_vocabulary(model.decoder_config.vocab_size, f"generate: prompt {index}")
        packed = torch.tensor([token for prompt in prompts for token in prompt], device=model.device)
        prompt_ids = torch.split(packed, [len(prompt) for prompt in prompts])
        routes = resolve(paths, model.num_layers, prompt_ids, model.embed_tokens, kv_policy, prompt_depth)
        drafts = resolve_drafts(
            draft,
            draft_entries,
            [route.path for route in routes],
            model.num_layers,
            partial(find_draft, model),
            "generate",
        )
        num_slots = num_counted = longest = 0
        for index, (prompt, param, route, guess) in enumerate(zip(prompts, params, routes, drafts, strict=True)):
            fitting = route.most_tokens(model.decoder_config.max_positions)
            total = len(prompt) + param.num_new_tokens(fitting - len(prompt))
            longest = max(longest, total)
            route.check_covers(total - 1, f"generate: prompt {index}")
            # The last token of an output is never run, so it takes no entry. Copies of a prompt share its entries.
            num_slots += param.n * route.num_entries(total - 1) - (param.n - 1) * route.num_entries(len(prompt))
            num_counted += param.n * total * route.layers.budget
            if guess is not None and guess.entries == "own":
                num_slots += param.n * total * guess.path.budget
                num_counted += param.n * total * guess.path.budget
        num_seqs = sum(param.n for param in params)
        self.executor = model.executor(executor)
        self.cache = self.executor.new_cache(num_seqs, longest - 1, num_slots)
        # Once: the next batch has it then.
        self.retire = weakref.finalize(self, self.executor.retire, self.cache)
        self.retire.atexit = False
        self.engine = Engine(
            model,
            policy="lockstep",
            batch=num_seqs,
            max_prefill_tokens=sum(len(prompt) * param.n for prompt, param in zip(prompts, params, strict=True)),
            tokenizer=tokenizer,
            executor=executor,
            kv=KVPool(self.cache, num_seqs, max(num_counted, 1)),
        )
        self.reads_late, self.engine.runner.reads_late = self.engine.runner.reads_late, False
        batch = zip(prompts, params, routes, drafts, strict=True)
        self._requests = [
            self.engine.add_route(list(prompt), param, route, draft=guess) for prompt, param, route, guess in batch
        ]
        self.sequences = [sequence for request in self._requests for sequence in request.sequences]
        self._index = {sequence: index for index, sequence in enumerate(self.sequences)}

    @property
    def num_steps(self) -> int:
        """Steps so far, the prefill among them."""
        return self.engine.tally.num_steps

    @property
    def outputs(self) -> list[RequestOutput]:
        """What the prompts became, one each, once all have ended."""
        return [request.output for request in self._requests if request.output is not None]

    @property
    def running(self) -> list[int]:
        """The sequences that have not ended, in the order of the rows of a decode step."""
        return [self._index[sequence] for sequence in self._rows()] or [
            index for index, sequence in enumerate(self.sequences) if sequence.finish_reason is None
        ]

    def prefill(self) -> None:
        """Run all prompts and choose the first token of each output."""
        self.step()

    def step(self) -> None:
        """Run the last token of every running sequence and choose the next one of each. Raises what goes wrong."""
        for output in self.engine.step():
            if output.error is not None:
                raise output.error

    def run(self, on_step: Callable[[Generation], None] | None = None) -> list[OutputSequence]:
        """All sequences at their end; ``on_step`` is called after prefill and each step.

        Raises what goes wrong, but for logits that are not finite: those end their request alone, see `Request.error`.
        """
        self.engine.runner.reads_late = self.reads_late
        while self.engine.has_unfinished:
            for output in self.engine.step():
                if output.error is not None and not isinstance(output.error, NonFiniteError):
                    raise output.error
            if on_step is not None:
                on_step(self)
        self.retire()
        return self.sequences

    def next_step(self) -> Step:
        """The decode step of the running sequences, not run."""
        return self.engine.runner.decode_step([Span(s, s.num_tokens - 1, 1) for s in self._rows()])

    def _rows(self) -> list[OutputSequence]:
        return [state.owner for group in self.engine.scheduler.groups.resident for state in group.running]
