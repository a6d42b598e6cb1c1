"""The next tokens of sequences, from the logits of their rows, which change first where parameters ask for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from dynskip.engine.diagnosis import NoTokenError
from dynskip.engine.request import OutputSequence
from dynskip.engine.token_counts import TokenCounts
from dynskip.execution.executor import Predictions
from dynskip.ops.choice import choose_tokens, most_likely
from dynskip.ops.logit_changes import NO_TOKENS, LogitChange, change_logits_
from dynskip.sampling import NOT_FINITE, Choice, SamplingParams

# A row's sequence, and which token of its output it gives.
Row = tuple[OutputSequence, int]


def choose(predictions: Predictions, rows: Sequence[Row]) -> list[int | Exception]:
    """The token of each row of ``predictions``, `NOT_FINITE` for none, or what its choice raises.

    Of the tokens before a row's, those that are not chosen yet are guesses of its sequence. Logits stay as they are.
    Tokens that were drawn with ``predictions`` are these, by the same choices: see `request.choices_of`.
    """
    changed = [row for row, (own, position) in enumerate(rows) if own.params.changes_logits(position)]
    if not changed and predictions.drawn is not None:
        return [*predictions.drawn.tolist()]
    if not changed and predictions.most_likely is not None and all(own.params.greedy for own, _ in rows):
        return [*predictions.most_likely.tolist()]
    choices = [sequence.choice_of(position) for sequence, position in rows]
    if not changed:
        return _each_or_all(lambda some: _chosen(predictions, choices, some), [*range(len(rows))])
    others = sorted({*range(len(rows))} - {*changed})
    tokens: dict[int, int | Exception] = {}
    if others:
        chosen = _each_or_all(lambda some: _chosen(predictions, choices, some), others)
        tokens.update(zip(others, chosen, strict=True))
    chosen = _each_or_all(lambda some: _chosen_behind_changes(predictions, some, [rows[row] for row in some]), changed)
    tokens.update(zip(changed, chosen, strict=True))
    return [tokens[row] for row in range(len(rows))]


def _each_or_all(choose_some: Callable[[list[int]], list[int | Exception]], rows: list[int]) -> list[int | Exception]:
    """The tokens of ``rows``, chosen together; where that raises, each alone, or what it raises."""
    try:
        return choose_some(rows)
    except Exception as error:
        if len(rows) == 1:
            return [error]
    return [token for row in rows for token in _each_or_all(choose_some, [row])]


def _chosen(predictions: Predictions, choices: Sequence[Choice], rows: list[int]) -> list[int | Exception]:
    if len(rows) < len(choices):
        predictions, choices = predictions.of_rows(rows), [choices[row] for row in rows]
    if predictions.drawn is not None:
        return [*predictions.drawn.tolist()]
    return [*choose_tokens(predictions.logits, choices, predictions.most_likely, predictions.decoder)]


def _chosen_behind_changes(predictions: Predictions, places: list[int], rows: Sequence[Row]) -> list[int | Exception]:
    """The same of the ``rows`` at ``places``, whose logits change."""
    own = predictions.of_rows(places).logits
    for row, (sequence, position) in enumerate(rows):
        if sequence.params.processors:
            _process_(own[row], sequence, position)
    change_logits_(own, [_change(sequence, position) for sequence, position in rows])
    choices = [sequence.choice_of(position) for sequence, position in rows]
    tokens: list[int | Exception] = [*choose_tokens(own, choices, decoder=predictions.decoder)]
    lost = [row for row, token in enumerate(tokens) if token == NOT_FINITE]
    # Where the model's own logits are not finite, a diagnosis tells more.
    found = most_likely(predictions.logits[[places[row] for row in lost]]).tolist() if lost else ()
    for row, token in zip(lost, found, strict=True):
        if token != NOT_FINITE:
            tokens[row] = _no_token(own[row], rows[row][0].params)
    return tokens


def _process_(logits: Tensor, sequence: OutputSequence, position: int) -> None:
    """Let the logits_processors of ``sequence`` change ``logits``, [V], those of its output token ``position``."""
    output_ids = sequence.token_ids + sequence.guesses[: position - len(sequence.token_ids)]
    processed = logits
    for processor, takes_prompt in sequence.params.processors:
        ids = ([*sequence.prompt_ids], [*output_ids]) if takes_prompt else ([*output_ids],)
        processed = processor(*ids, processed)
        if not isinstance(processed, Tensor) or not processed.is_floating_point() or processed.shape != logits.shape:
            what = f"{list(processed.shape)}, {processed.dtype}" if isinstance(processed, Tensor) else type(processed)
            raise TypeError(f"generate: logits_processors must return logits of [{len(logits)}], got {what}.")
    logits.copy_(processed)


def _change(sequence: OutputSequence, position: int) -> LogitChange:
    params = sequence.params
    withheld = seen = counts = NO_TOKENS
    if position < params.min_tokens:
        ends = sequence.request.end_ids
        withheld = np.fromiter(ends, np.int64, len(ends))
    if params.penalizes:
        if sequence.counts is None:
            sequence.counts = TokenCounts(sequence.prompt_ids if params.repetition_penalty != 1 else ())
        guesses = sequence.guesses[: position - len(sequence.token_ids)]
        seen, counts = sequence.counts.behind(sequence.token_ids, guesses)
    return LogitChange(params, withheld, seen, counts)


def _no_token(logits: Tensor, params: SamplingParams) -> NoTokenError:
    """The error of a row whose ``logits``, [V], were finite before ``params`` changed them."""
    largest = float(logits.max())
    found = "NaN" if math.isnan(largest) else "inf" if largest > 0 else "-inf for every token"
    changing = {
        "logits_processors": bool(params.logits_processors),
        "logit_bias": bool(params.logit_bias),
        "min_tokens": bool(params.min_tokens),
        "repetition_penalty": params.repetition_penalty != 1,
        "presence_penalty": params.presence_penalty != 0,
    }
    parameter = next((name for name, changes in changing.items() if changes), "frequency_penalty")
    return NoTokenError(
        parameter,
        "generate: logits must be finite, or -inf for some tokens, behind logits_processors, logit_bias, min_tokens "
        f"and penalties, got {found}. Leave a token that may come.",
    )
