"""`Engine`: requests join and leave at any step, each along its own path; a scheduler decides who steps."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from dynskip.arguments import as_token_ids, shown
from dynskip.causal_lm import CausalLM, ExecutorName, check_tokens
from dynskip.costs.defaults import default_costs, known_costs
from dynskip.costs.step_costs import StepCosts
from dynskip.engine.config import EngineConfig
from dynskip.engine.drafting import Drafting, find_draft
from dynskip.engine.kv_pool import KVPool
from dynskip.engine.model_runner import ModelRunner
from dynskip.engine.prefixes import PrefixCache
from dynskip.engine.request import OnToken, OutputSequence, Request, RequestOutput
from dynskip.engine.stats import EngineStats
from dynskip.engine.step import StepExecution
from dynskip.engine.token_stream import TokenStream
from dynskip.engine.watch import StepWatch, Watched
from dynskip.execution.kv_cache import KVCache, available_bytes
from dynskip.routing.routes import Paths, Route, resolve
from dynskip.sampling import SamplingParams, draw_seed
from dynskip.scheduler.outcome import NO_CALLS, Tally
from dynskip.scheduler.policies.make import make_policy
from dynskip.scheduler.scheduler import Scheduler
from dynskip.scheduler.sequence import SequenceState
from dynskip.speculation.draft import Draft, DraftEntries, Drafts, resolve_drafts

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

# Of the memory that is free when an engine is made, what its keys and values may take.
_KV_SHARE = 0.5
# Finished requests whose waits percentiles are of.
_KEPT_WAITS = 8192


class Engine:
    """Runs a stream of requests through one model, as many of them at a time as pay.

    model: what to run. kv_bytes: for keys and values; None: what ``pool`` requests of ``max_context_len`` tokens can
        take at most, or half of the free memory if that is less.
    policy: "cohort", "lockstep" or "by_path"; see `make_policy` for it and for batch, pool and max_wait.
    deterministic: every request gets the tokens that it would get alone, independent of its company and of preemptions;
        None: as the model was made.
    max_prefill_tokens: most prompt tokens of a step; longer prompts run in chunks of that many. If ``deterministic``,
        requests share prefixes of whole chunks only: make it 128, say, where they have a system prompt in common.
    max_context_len: most tokens of a request, prompt and output; None: what the model's positions allow.
    prefix_caching: whether keys and values of requests stay, as long as no request wants their memory, for those that
        begin alike along the same path, and are shared while requests run. False: nothing is. The reference executor
        shares nothing.
    costs: what steps take, for "cohort"; None: what `dynskip calibrate` has left for this device and model.
    tokenizer: only for requests with stop texts.
    clock: the time in seconds; a clock that goes back is taken to stand still.
    """

    def __init__(
        self,
        model: CausalLM,
        kv_bytes: int | None = None,
        policy: str = "cohort",
        deterministic: bool | None = None,
        *,
        batch: int = 16,
        pool: int | None = None,
        max_wait: int | None = None,
        max_prefill_tokens: int = 2048,
        max_context_len: int | None = None,
        prefix_caching: bool = True,
        costs: StepCosts | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        executor: ExecutorName = "compact",
        clock: Callable[[], float] = time.monotonic,
        kv: KVPool | None = None,
    ) -> None:
        config = self.config = EngineConfig(
            model,
            kv_bytes,
            policy,
            deterministic,
            batch,
            pool,
            max_wait,
            max_prefill_tokens,
            max_context_len,
            prefix_caching,
            costs,
            tokenizer,
            executor,
            clock,
        )
        self.model = model
        self.max_context_len = config.max_context_len or model.decoder_config.max_positions
        self.runner = ModelRunner(model, executor, deterministic, own_executor=kv is None)
        if costs is None and policy == "cohort":
            costs = default_costs(model)
        chosen = make_policy(policy, costs, config.batch, config.pool, config.max_wait)
        self.entry_bytes = model.kv_entry_bytes
        self.kv = self._make_pool(chosen.pool) if kv is None else kv
        self.scheduler = Scheduler(chosen, self.kv, config.max_prefill_tokens)
        self.tally = Tally()
        self.execution = StepExecution(
            self.runner,
            self.kv,
            self.scheduler,
            self.tally,
            tokenizer,
            self._now,
            self._hand_over,
            Drafting(self.runner, self.kv, self.tally, lambda: costs or known_costs(model), config.max_prefill_tokens),
        )
        self._watch = StepWatch()
        # What a search has left is read once; where none has run, the next request asks again.
        self._find_draft = cache(partial(find_draft, model))
        self._requests: dict[Hashable, Request] = {}
        self._to_abort: deque[Request] = deque()
        self._outputs: dict[Hashable, RequestOutput] = {}
        self._num_ids = 0
        self._is_open = True
        self._is_broken = False  # the last recovery was broken off itself
        self._clock = clock
        self._time_s = self._start_s = clock()

    # Requests

    def add_request(
        self,
        token_ids: Sequence[int] | Tensor | NDArray[Any],
        params: SamplingParams | None = None,
        path: Paths = None,
        *,
        request_id: Hashable = None,
        kv_policy: str | None = None,
        prompt_depth: str = "path",
        draft: Drafts = None,
        draft_entries: DraftEntries = "own",
        on_token: OnToken | None = None,
    ) -> Hashable:
        """Let a request wait; returns its id.

        token_ids: the prompt, a list or a one-dimensional array. path: a LayerPath, bool [L], bool [T, L] per token, a
            controller, or None for all layers. Prompt and masks are copied.
        kv_policy, prompt_depth, draft, draft_entries: as in ``LLM.generate``.
        request_id: anything hashable; None for the next number.
        on_token: called after each token; where it raises, the request ends with that error.
        Raises TypeError or ValueError on bad input, also where prompt and max_tokens would not fit into the memory
        even alone, and what a controller that chooses a path raises.
        """
        if not self._is_open:
            raise RuntimeError("add_request: the engine must be open, got one that was closed. Make another.")
        if not isinstance(request_id, Hashable):
            raise TypeError(f"add_request: request_id must be hashable, got {type(request_id).__name__}.")
        prompt_ids = as_token_ids(token_ids)
        if prompt_ids is None:
            raise TypeError(f"add_request: token_ids must be a list of token ids, got {type(token_ids).__name__}.")
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"add_request: params must be SamplingParams, got {type(params).__name__}.")
        if on_token is not None and not callable(on_token):
            raise TypeError(f"add_request: on_token must be callable or None, got {type(on_token).__name__}.")
        check_tokens(prompt_ids, params.num_new_tokens(1), self.model.decoder_config, "add_request: token_ids")
        params.check_vocabulary(self.model.decoder_config.vocab_size, "add_request")
        paths = path[None] if isinstance(path, Tensor) else path
        prompt = torch.tensor(prompt_ids, device=self.model.device)
        routes = resolve(
            paths, self.model.num_layers, [prompt], self.model.embed_tokens, kv_policy, prompt_depth, "add_request"
        )
        drafts = resolve_drafts(
            draft,
            draft_entries,
            [routes[0].path],
            self.model.num_layers,
            self._find_draft,
            "add_request",
        )
        return self.add_route(prompt_ids, params, routes[0], request_id, on_token, drafts[0]).request_id

    def add_route(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        route: Route,
        request_id: Hashable = None,
        on_token: OnToken | None = None,
        draft: Draft | None = None,
    ) -> Request:
        """As `add_request`, for a prompt that was checked, and route and draft that were found; returns the request."""
        self._abort_queued()
        if params.stop and self.execution.tokenizer is None:
            raise ValueError("add_request: stop must be left out without a tokenizer. Use stop_token_ids.")
        fitting = min(self.max_context_len, self.kv.most_tokens(route.layers))
        max_tokens = params.num_new_tokens(route.most_tokens(fitting) - len(prompt_ids))
        total = len(prompt_ids) + max_tokens
        if total > self.max_context_len:
            raise ValueError(
                f"add_request: prompt and max_tokens must be at most {self.max_context_len} tokens, got {total}. "
                "Shorten the prompt, lower max_tokens or raise max_context_len."
            )
        route.check_covers(total - 1, "add_request")
        if request_id is None:
            while self._num_ids in self._requests or self._num_ids in self._outputs:
                self._num_ids += 1
            request_id = self._num_ids
            self._num_ids += 1
        elif request_id in self._requests or request_id in self._outputs:
            raise ValueError(f"add_request: request_id must be new, got {request_id!r}, which is in use.")
        seed = draw_seed(params)
        if draft is not None and draft.entries == "own" and self.kv.make_place_for_drafts():
            self.runner.executor.release()  # what was made for the tables as they were
        if draft is not None:
            self.execution.drafting.prepare(self.config.batch)
        sequences = [OutputSequence(prompt_ids, params, route, seed, index, draft) for index in range(params.n)]
        if params.prompt_logprobs is not None:
            sequences[0].prompt_logprobs = [None]
        # A checkpoint may name an end that its vocabulary has not.
        known_ends = {token for token in self.model.eos_token_ids if 0 <= token < self.model.decoder_config.vocab_size}
        end_ids = known_ends.union(params.stop_token_ids)
        stop_ids = params.stop_ids(known_ends)
        request = Request(request_id, sequences, stop_ids, frozenset(end_ids), on_token, self._now(), draft)
        if self.tally.first_s is None:
            self.tally.first_s = request.arrival_s - self._start_s
        try:
            for sequence in sequences:
                sequence.request = request
                sequence.state = SequenceState(
                    sequence,
                    route.layers,
                    len(prompt_ids),
                    max_tokens,
                    request.arrival_s,
                    replays=self.runner.deterministic or route.path is None,
                )
                self.scheduler.add(sequence.state)  # the first of them raises, or none
            self._requests[request_id] = request
        except Exception:
            raise
        except BaseException:
            self._recover()
            raise
        return request

    def abort(self, request_id: Hashable) -> RequestOutput:
        """End a request where it stands; returns what it has become. Raises ValueError unless it is unfinished."""
        request = self._requests.get(request_id)
        if request is None:
            raise ValueError(f"abort: request_id must be of a request that has not ended, got {request_id!r}.")
        if self._is_broken:
            self._recover()
        try:
            self.execution.end(request, "abort")
        except BaseException:
            self._recover()
            raise
        return self._outputs.pop(request_id)

    def discard(self, request: Request) -> None:
        """Abort ``request`` unless it has ended, and drop its output."""
        request_id = request.request_id
        if self._requests.get(request_id) is request:
            self.abort(request_id)
        elif request.output is not None and self._outputs.get(request_id) is request.output:
            del self._outputs[request_id]

    def abort_later(self, request: Request) -> None:
        """Queue a `discard`; safe in a destructor and inside a step."""
        self._to_abort.append(request)

    def request(self, request_id: Hashable) -> Request:
        """The request of that id while it runs. Raises ValueError unless it is unfinished."""
        request = self._requests.get(request_id)
        if request is None:
            raise ValueError(f"request: request_id must be of a request that has not ended, got {request_id!r}.")
        return request

    @property
    def has_unfinished(self) -> bool:
        """Whether a request has not ended, or has and its output was not handed out yet."""
        self._abort_queued()
        return bool(self._requests or self._outputs)

    # Steps

    def step(self) -> list[RequestOutput]:
        """Prefill and decode what the scheduler chooses; returns the requests that have ended.

        An exception in what belongs to a request (its controller, its callback, the choice of its token) ends that
        request with finish_reason "error", and so do logits that are not finite, with a NonFiniteError. Anything
        else that interrupts a step is raised; the next step goes on. On a GPU tokens of the model's own logits,
        along a path and without log-probabilities, are told one step late: while the next one runs.
        """
        self.advance()
        outputs = list(self._outputs.values())
        self._outputs.clear()
        return outputs

    def run(self) -> list[RequestOutput]:
        """Step until nothing is left; returns the requests in the order of their ends.

        Where something interrupts it, what has ended is still there for the next call.
        """
        while self._requests:
            self.advance()
        return self.step()

    def stream(
        self,
        token_ids: Sequence[int] | Tensor | NDArray[Any],
        params: SamplingParams | None = None,
        path: Paths = None,
        **options: object,
    ) -> TokenStream:
        """The tokens of a new request as they come; arguments as in `add_request`, with n = 1."""
        if params is not None and not isinstance(params, SamplingParams):
            raise TypeError(f"stream: params must be SamplingParams, got {type(params).__name__}.")
        if params is not None and params.n != 1:
            raise ValueError(f"stream: n must be 1, got {params.n}. Add a request for each output.")
        request_id = self.add_request(token_ids, params, path, **options)  # type: ignore[arg-type]  # checked there
        return TokenStream(self._requests[request_id], self.advance, self.discard, self.abort_later)

    def stats(self) -> EngineStats:
        """What the engine did since it was made, and what it holds now."""
        self._abort_queued()
        return EngineStats.of(self.tally, self.scheduler, self.kv, self.entry_bytes)

    def watch(self, since: int = 0) -> Watched:
        """What the engine holds now, and its last steps, those behind step number ``since``.

        Steps are kept for 10 seconds after each call, the last 512 of them: the first call finds none.
        """
        self._abort_queued()
        time_s, steps = self._watch.look(since)
        groups = self.scheduler.groups
        return Watched(
            time_s=time_s,
            num_waiting=groups.num_waiting,
            num_prefilling=groups.num_resident - groups.num_running,
            num_running=groups.num_running,
            num_tokens=self.tally.num_tokens,
            kv_bytes=self.kv.num_used * self.entry_bytes,
            kv_capacity_bytes=self.kv.num_slots * self.entry_bytes,
            num_steps=self.tally.num_steps,
            steps=steps,
        )

    def reset_prefix_cache(self) -> None:
        """Share nothing that has run so far with requests to come; to be called where the model's weights change."""
        self._check_outside_step("reset_prefix_cache")
        if not self._is_open:
            return
        if self._is_broken:
            self._recover()
        if self.kv.prefixes is not None:
            try:
                self.kv.prefixes.clear()
            except BaseException:
                self._recover()
                raise

    def close(self) -> None:
        """Abort what has not ended and give back the memory of keys and values, static buffers and graphs.

        An engine that was closed takes no requests any more.
        """
        self._check_outside_step("close")
        if not self._is_open:
            return
        if self._is_broken:
            self._recover()
        for request in list(self._requests.values()):
            self.execution.end(request, "abort")
        self.execution.in_flight = None
        self._outputs.clear()
        self.runner.executor.release()
        self._is_open = False
        self.kv.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def advance(self) -> None:
        """One step; outputs stay with the engine until `step` hands them out."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                self.advance()
            return
        self._check_outside_step("step")
        if self._is_broken:
            self._recover()
        self._abort_queued()
        if self.scheduler.has_unfinished or self.execution.in_flight is not None:
            self._advance()

    def _advance(self) -> None:
        begin_s = time.perf_counter()
        execution, tally = self.execution, self.tally
        execution.model_s = 0.0
        try:
            decision = self.scheduler.schedule()
            self.kv.make_room()
            self._watch.begin(decision)
            decide_s = time.perf_counter() - begin_s
            execution.prefill(decision.prefill)
            prefilled_s = time.perf_counter()
            prefill_calls = self.runner.newly_spent() if decision.prefill else NO_CALLS
            execution.decode(decision)
            self.kv.settle(self.scheduler.prefilling)
        except BaseException:
            self._recover()
            raise
        end_s = time.perf_counter()
        prefill_s, decode_s = prefilled_s - begin_s - decide_s, end_s - prefilled_s + decide_s
        tally.num_steps += 1
        tally.prefill_s += prefill_s
        tally.decode_s += decode_s
        if (decode_calls := self.runner.newly_spent()) is not NO_CALLS:
            tally.prefill_calls += prefill_calls
            tally.decode_calls += decode_calls
        tally.bookkeeping_s += end_s - begin_s - execution.model_s
        tally.last_s = self._now() - self._start_s
        self._watch.end(tally.num_steps, begin_s, prefill_s, decode_s)

    def _abort_queued(self) -> None:
        while self._to_abort:
            self.discard(self._to_abort.popleft())

    def _check_outside_step(self, function: str) -> None:
        """Raise RuntimeError where a callback of this engine's own step calls ``function``."""
        # The stack cannot be out of date, as a flag would be once Ctrl-C has kept it from being reset.
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code is Engine._advance.__code__ and frame.f_locals["self"] is self:
                raise RuntimeError(
                    f"{function}: the engine must not be in a step, got a call from within one. Call it later."
                )
            frame = frame.f_back

    def _hand_over(self, request: Request) -> None:
        output = RequestOutput.of(request, self._now())
        request.output = self._outputs[request.request_id] = output
        del self._requests[request.request_id]
        self.tally.num_requests += 1
        for waits, wait_s in (
            (self.tally.ttft_s, output.ttft_s),
            (self.tally.queue_s, output.queue_s),
            (self.tally.tpot_s, output.tpot_s),
        ):
            if wait_s is not None:
                waits.append(wait_s)
                if len(waits) >= 2 * _KEPT_WAITS:
                    del waits[:_KEPT_WAITS]

    def _recover(self) -> None:
        """After an interrupted step: what has not ended waits again, and keeps its tokens."""
        self._is_broken = True
        self.kv.restart()
        self.execution.in_flight = None  # as if these tokens had not been chosen
        self.execution.drafting.interrupt()
        sequences = [sequence for request in self._requests.values() for sequence in request.sequences]
        live = [each for each in sequences if each.finish_reason is None or self.scheduler.knows(each)]
        self.scheduler.restart([sequence.state for sequence in live])
        for request in list(self._requests.values()):
            for sequence in request.sequences:
                self._recover_sequence(sequence)
            if request.has_ended:
                self._hand_over(request)
        self._is_broken = False

    def _recover_sequence(self, sequence: OutputSequence) -> None:
        request = sequence.request
        if sequence.finish_reason is None:
            del sequence.logprobs[len(sequence.token_ids) :]
            del sequence.was_guessed[len(sequence.token_ids) :]
            sequence.guesses, sequence.begun = [], None
            sequence.counts = None  # counted anew: the step may have been interrupted within its counting
            sequence.state.begin_again(len(sequence.token_ids), self.scheduler.step)
            if request.error is None and sequence.token_ids:
                try:
                    sequence.finish_reason = self.execution.finish_reason(sequence)
                except Exception as error:
                    request.error = error
            if request.error is not None:
                sequence.finish_reason = "error"
        if sequence.finish_reason is not None and self.scheduler.knows(sequence):
            has_finished = sequence.finish_reason in ("stop", "length")
            (self.scheduler.finished if has_finished else self.scheduler.abort)(sequence)

    def _make_pool(self, num_seqs: int) -> KVPool:
        most = num_seqs * self.max_context_len * self.model.num_layers
        kv_bytes = self.config.kv_bytes
        if self.model.device.type == "cpu":
            self.model.executor(self.config.executor).release()  # what closed batches have left
        if kv_bytes is None:
            kv_bytes = min(most * self.entry_bytes, int(_KV_SHARE * available_bytes(self.model.device)))
        num_slots = kv_bytes // self.entry_bytes
        if not self.config.prefix_caching:
            num_slots = min(num_slots, most)
        if num_slots < 1:
            raise ValueError(f"Engine: kv_bytes must hold an entry of {self.entry_bytes} bytes, got {shown(kv_bytes)}.")
        executor = self.runner.executor
        cache = executor.new_cache(num_seqs, self.max_context_len, num_slots)
        executor.warm_up(cache, self.config.batch)
        prefixes = None
        if self.config.prefix_caching and isinstance(cache, KVCache):
            prefixes = PrefixCache(cache, self.config.max_prefill_tokens if self.runner.deterministic else None)
        return KVPool(cache, num_seqs, num_slots, prefixes)

    def _now(self) -> float:
        self._time_s = max(self._time_s, self._clock())
        return self._time_s
