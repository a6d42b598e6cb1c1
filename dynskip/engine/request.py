"""A request while the engine works on it, and what comes back of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dynskip.engine.token_counts import TokenCounts
from dynskip.execution.turns import BegunRows
from dynskip.paths import LayerPath
from dynskip.routing.routes import Route
from dynskip.sampling import Choice, SamplingParams
from dynskip.scheduler.sequence import SequenceState
from dynskip.speculation.acceptance import Rate, own_rate
from dynskip.speculation.draft import Draft

# Called with the request's id, the number of the output and its new token.
OnToken = Callable[[Hashable, int, int], None]
# Of each token of a prompt, log-probabilities in its place, by token id; None for the first, which follows nothing.
PromptLogprobs = list[dict[int, float] | None]


class RequestError(RuntimeError):
    """A request ended before its time; the cause is the exception that ended it."""


class EngineStoppedError(RequestError):
    """No request is to blame: the engine was closed, or has failed, and serves nobody any more."""


@dataclass(eq=False)
class OutputSequence:
    """One output while it grows.

    prompt_ids, params, route, seed, draft: those of the request. state: what the scheduler knows of it.
    guesses: tokens behind its last one that its draft expects, until the step that verifies them ends. rate: how often
        they are right. num_drafted, num_accepted: how many were made, and were right.
    begun: what the draft has run of the step that verifies its guesses, if it has.
    token_ids, logprobs: as chosen so far. times_s: of each token, when it was chosen, by the engine's clock.
    was_guessed: of each token, whether the draft had guessed it.
    prompt_logprobs: of the prompt's tokens so far, None for the first; None where they are not asked for, or of another
        output. counts: of its tokens, where penalties have asked for them.
    finish_reason: None until it has ended, see `RequestOutput`.
    """

    prompt_ids: list[int]
    params: SamplingParams
    route: Route
    seed: int | None
    index: int = 0
    draft: Draft | None = None
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    was_guessed: list[bool] = field(default_factory=list)
    guesses: list[int] = field(default_factory=list)
    begun: BegunRows | None = None
    rate: Rate = field(default_factory=own_rate)
    num_drafted: int = 0
    num_accepted: int = 0
    logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    counts: TokenCounts | None = None
    finish_reason: str | None = None
    request: Request = field(init=False, repr=False)
    state: SequenceState = field(init=False, repr=False)

    @property
    def path(self) -> LayerPath | None:
        """The layers of prompt and output, or None where each token has its own."""
        return self.route.path

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def choice(self) -> Choice:
        """How its next token is chosen."""
        return self.choice_of(len(self.token_ids))

    def choice_of(self, position: int) -> Choice:
        """How token number ``position`` of its output is chosen."""
        return Choice(self.params, self.seed or 0, self.index, position)

    @property
    def is_replayed(self) -> bool:
        """Whether the token that the current step gives it is known: see `SequenceState.num_replayed`."""
        return len(self.token_ids) >= self.state.num_generated

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether its prompt has to run for log-probabilities that are asked for."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt_ids)

    def token_at(self, place: int) -> int:
        """The token at ``place`` of prompt and output."""
        behind = place - len(self.prompt_ids)
        return self.token_ids[behind] if behind >= 0 else self.prompt_ids[place]

    def tokens(self, first: int, count: int) -> list[int]:
        """``count`` tokens of prompt, output and guesses, from token ``first`` on."""
        num_prompt = len(self.prompt_ids)
        if first + count > self.num_tokens and self.guesses:
            known = self.tokens(first, self.num_tokens - first) if first < self.num_tokens else []
            skipped = max(0, first - self.num_tokens)
            return known + self.guesses[skipped : skipped + count - len(known)]
        if first >= num_prompt:
            return self.token_ids[first - num_prompt : first - num_prompt + count]
        if first + count <= num_prompt:
            return self.prompt_ids[first : first + count]
        return self.prompt_ids[first:] + self.token_ids[: first + count - num_prompt]


class Span(NamedTuple):
    """``num_tokens`` tokens of a sequence from its token ``first`` on, whose predecessors are in the cache."""

    sequence: OutputSequence
    first: int
    num_tokens: int


@dataclass(eq=False)
class Request:
    """A request while it runs; output: what it has become. Times are those of the engine's clock, in seconds.

    stop_ids: tokens that end an output. end_ids: those that must not come before min_tokens others.
    num_cached_tokens: see `RequestOutput`.
    """

    request_id: Hashable
    sequences: list[OutputSequence]
    stop_ids: frozenset[int]
    end_ids: frozenset[int]
    on_token: OnToken | None
    arrival_s: float
    draft: Draft | None = None
    admitted_s: float | None = None
    num_cached_tokens: int = 0
    first_s: float | None = None
    error: Exception | None = None
    output: RequestOutput | None = None

    @property
    def has_ended(self) -> bool:
        """Whether all its outputs have ended."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)


@dataclass(frozen=True)
class SequenceOutput:
    """One output of a request; the fields are those of `RequestOutput`.

    was_guessed: of each token, whether the draft had guessed it; None without a draft.
    token_times_s: of each token, the seconds from the request's arrival until it was chosen. Those of one step share
        theirs.
    """

    token_ids: list[int]
    finish_reason: str
    logprobs: list[dict[int, float]] | None
    text: str | None = None
    was_guessed: list[bool] | None = field(default=None, compare=False)
    token_times_s: list[float] = field(default_factory=list, compare=False)


@dataclass(frozen=True)
class RequestOutput:
    """What one request became. Equal where prompt, path and what came of them are, whenever and however they ran.

    prompt_ids: the prompt as the model saw it.
    path: the layers that prompt and output ran, or None where each token had its own.
    token_ids: the new tokens, with the end-of-sequence token if it came.
    text: the new text without special tokens and without what ended it, a stop text or a token; None without a
        tokenizer, and of an `Engine`.
    finish_reason: "stop" (end of sequence, stop token or stop text), "length", "abort", or "error".
    logprobs: per new token its log-probability and those of the most likely ones, by token id; None unless asked for.
    prompt_logprobs: the same per token of the prompt, None for the first; fewer where the request ended before its
        prompt had run; None unless asked for.
    error: the exception that ended the request, such as a NonFiniteError; None unless finish_reason is "error".
    seed: what the outputs were drawn by, given or not: the same prompt, path and parameters with it repeat them. None
        where they were not sampled.
    samples: all ``n`` outputs; token_ids, text, finish_reason and logprobs are those of the first.
    queue_s: from arrival to admission. ttft_s: from arrival to the first token. tpot_s: from the first token to the
        last, by the tokens after the first. latency_s: from arrival to the end. None where it did not come that far.
    num_preemptions: how often its keys and values were given up and computed again.
    num_cached_tokens: tokens of the prompt whose keys and values were there when it was first admitted.
    draft: the path that guessed its tokens, if there was one. num_drafted, num_accepted: how many it guessed for all
        outputs together, and how many of them its own path chose, too.
    """

    request_id: Hashable = field(compare=False)
    prompt_ids: list[int]
    path: LayerPath | None
    token_ids: list[int]
    finish_reason: str
    logprobs: list[dict[int, float]] | None
    error: Exception | None
    samples: tuple[SequenceOutput, ...]
    queue_s: float | None = field(compare=False)
    ttft_s: float | None = field(compare=False)
    tpot_s: float | None = field(compare=False)
    latency_s: float = field(compare=False)
    num_preemptions: int = field(compare=False)
    seed: int | None = field(default=None, compare=False)
    text: str | None = None
    prompt_logprobs: PromptLogprobs | None = None
    draft: Draft | None = field(default=None, compare=False)
    num_drafted: int = field(default=0, compare=False)
    num_accepted: int = field(default=0, compare=False)
    num_cached_tokens: int = field(default=0, compare=False)

    @property
    def texts(self) -> tuple[str | None, ...]:
        """The texts of all ``n`` outputs."""
        return tuple(sample.text for sample in self.samples)

    def with_text(self, text_of: Callable[[list[int]], str | None]) -> RequestOutput:
        """The same with the texts that ``text_of`` makes of the tokens."""
        samples = tuple(replace(sample, text=text_of(sample.token_ids)) for sample in self.samples)
        return replace(self, text=samples[0].text, samples=samples)

    @staticmethod
    def of(request: Request, end_s: float) -> RequestOutput:
        """What ``request``, all of whose outputs have ended, became by ``end_s``."""
        samples, arrival_s = [], request.arrival_s
        for sequence in request.sequences:
            assert sequence.finish_reason is not None, "its outputs have ended"
            logprobs = None if sequence.params.logprobs is None else sequence.logprobs
            was_guessed = None if request.draft is None else sequence.was_guessed
            times_s = [time_s - arrival_s for time_s in sequence.times_s]
            samples.append(
                SequenceOutput(sequence.token_ids, sequence.finish_reason, logprobs, None, was_guessed, times_s)
            )
        first, first_s = request.sequences[0], request.first_s
        num_later = max(len(sample.token_ids) for sample in samples) - 1
        return RequestOutput(
            request_id=request.request_id,
            prompt_ids=first.prompt_ids,
            path=first.path,
            token_ids=samples[0].token_ids,
            finish_reason=samples[0].finish_reason,
            logprobs=samples[0].logprobs,
            error=request.error,
            samples=tuple(samples),
            queue_s=None if request.admitted_s is None else request.admitted_s - arrival_s,
            ttft_s=None if first_s is None else first_s - arrival_s,
            tpot_s=(end_s - first_s) / num_later if first_s is not None and num_later > 0 else None,
            latency_s=end_s - arrival_s,
            num_preemptions=sum(sequence.state.num_preemptions for sequence in request.sequences),
            seed=first.seed,
            prompt_logprobs=first.prompt_logprobs,
            draft=request.draft,
            num_drafted=sum(sequence.num_drafted for sequence in request.sequences),
            num_accepted=sum(sequence.num_accepted for sequence in request.sequences),
            num_cached_tokens=request.num_cached_tokens,
        )


def choices_of(spans: Sequence[Span]) -> list[Choice] | None:
    """How the token behind each row of ``spans``, the last of their sequences, is chosen, for `Executor.predict`.

    None where all are the most likely ones, or logits of a sequence change first.
    """
    params = [span.sequence.params for span in spans]
    if all(own.greedy for own in params) or any(own.changes_logits() for own in params):
        return None
    return [
        sequence.choice_of(sequence.state.num_generated - 1 + rank)
        for sequence, _, num_tokens in spans
        for rank in range(num_tokens)
    ]
