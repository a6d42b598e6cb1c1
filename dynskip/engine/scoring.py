"""Log-probabilities of given continuations: a context is run once, however many continuations it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dynskip.arguments import shown
from dynskip.causal_lm import CausalLM, check_tokens
from dynskip.engine.diagnosis import NonFiniteError
from dynskip.engine.kv_pool import Cache
from dynskip.engine.prompt_logprobs import MOST_LOGITS
from dynskip.execution.turns import rows_step
from dynskip.ops.choice import most_likely
from dynskip.paths import LayerPath
from dynskip.sampling import NOT_FINITE

# A shorter context is run with each of its continuations: so few rows cost less than they save.
_MIN_SHARED = 16


@dataclass(frozen=True)
class Score:
    """logprobs: of each token of a continuation, behind its context and the tokens before it.

    is_greedy: whether each of them is the most likely token of its place.
    """

    logprobs: list[float]
    is_greedy: bool


class _Asked(NamedTuple):
    """The log-probability of ``token``, number ``number`` of the continuation that ``score`` is of."""

    token: int
    score: _Growing
    number: int


@dataclass(eq=False)
class _Growing:
    """A score while it grows; indices: of the pairs that it is of."""

    indices: list[int]
    logprobs: list[float]
    is_greedy: bool = True


@dataclass(eq=False)
class _Rows:
    """Rows of one sequence that run together; the first stands at position ``first``.

    asked: what is asked of a row, by its number among ``tokens``. branches: rows that go on behind these.
    """

    tokens: list[int]
    first: int = 0
    asked: dict[int, list[_Asked]] = field(default_factory=dict)
    branches: list[_Rows] = field(default_factory=list)
    cache_id: int = -1

    @property
    def end(self) -> int:
        """How many tokens the sequence has with these rows."""
        return self.first + len(self.tokens)


class Scoring:
    """Scores continuations along one path of ``model``.

    batch: most contexts that run together. max_rows: most rows of a step; longer contexts run in chunks of that many.
    In deterministic mode the scores of a pair are, bit for bit, those that it has alone.
    """

    def __init__(self, model: CausalLM, path: LayerPath, batch: int = 16, max_rows: int = 2048) -> None:
        for name, value in (("batch", batch), ("max_rows", max_rows)):
            if value < 1:
                raise ValueError(f"Scoring: {name} must be at least 1, got {shown(value)}.")
        if path.num_layers != model.num_layers:
            raise ValueError(f"Scoring: path must be of {model.num_layers} layers, got {path}.")
        self._model, self._path = model, path
        self._batch, self._max_rows = batch, max_rows
        self._executor = model.executor()
        self._rows_of_logits = max(MOST_LOGITS // model.decoder_config.vocab_size, 1)

    def run(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[tuple[int, Score]]:
        """The index and the score of each of ``pairs``, as they come, longest contexts first.

        pairs: token ids of a context and of its continuation, at least one each. The last token of a continuation is
            not run, so that both together may be one token longer than the model has positions.
        Raises ValueError for tokens that do not fit the model, before anything runs; NonFiniteError where logits are
        not finite, KVCacheMemoryError where a batch does not fit into memory.
        """
        config = self._model.decoder_config
        for index, (context, continuation) in enumerate(pairs):
            check_tokens(context, len(continuation) - 1, config, f"score: context {index}")
            check_tokens(continuation, 0, config, f"score: continuation {index}")
        stems = sorted(self._stems(pairs), key=lambda stem: -len(stem.tokens))
        first = 0
        while first < len(stems):
            last, num_rows = first + 1, len(stems[first].tokens)
            while last < min(len(stems), first + self._batch):
                num_rows += len(stems[last].tokens)
                if num_rows > self._max_rows:
                    break
                last += 1
            self._run_batch(stems[first:last])
            # The first token of each continuation is asked of a stem.
            for asked in (each for stem in stems[first:last] for row in stem.asked.values() for each in row):
                if asked.number == 0:
                    score = Score(asked.score.logprobs, asked.score.is_greedy)
                    yield from ((index, score) for index in asked.score.indices)
            first = last

    def _stems(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[_Rows]:
        """The sequences of ``pairs``: those of one context share it, equal ones are one."""
        groups: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        for index, (context, continuation) in enumerate(pairs):
            groups.setdefault(tuple(context), {}).setdefault(tuple(continuation), []).append(index)
        for context, group in groups.items():
            # In deterministic mode what a context has in company it has alone: the same rows in the same steps.
            is_shared = len(context) >= _MIN_SHARED and (len(group) > 1 or self._model.deterministic)
            stem = _Rows([*context])
            for continuation, indices in group.items():
                *inputs, _ = continuation
                score = _Growing(indices, [0.0] * len(continuation))
                rows = stem if is_shared else _Rows([*context, *inputs])
                rows.asked.setdefault(len(context) - 1, []).append(_Asked(continuation[0], score, 0))
                if not is_shared:
                    yield rows
                elif inputs:
                    rows = _Rows(inputs, first=len(context))
                    stem.branches.append(rows)
                for number, token in enumerate(continuation[1:], start=1):
                    rows.asked[len(context) - 1 + number - rows.first] = [_Asked(token, score, number)]
            if is_shared:
                yield stem

    def _run_batch(self, stems: Sequence[_Rows]) -> None:
        """Run ``stems`` and their branches, and score what is asked of them."""
        packs = [*self._packs([(stem, branch) for stem in stems for branch in stem.branches])]
        rows = [*stems, *(branch for pack in packs for _, branch in pack)]
        num_stem_rows = sum(len(stem.tokens) for stem in stems)
        num_pack_rows = max((sum(len(branch.tokens) for _, branch in pack) for pack in packs), default=0)
        cache = self._executor.new_cache(
            len(stems) + max(map(len, packs), default=0),
            max(each.end for each in rows),
            (num_stem_rows + num_pack_rows) * self._path.budget,
        )
        for cache_id, stem in enumerate(stems):
            stem.cache_id = cache_id
        self._run(stems, cache)
        for pack in packs:
            branches = [branch for _, branch in pack]
            for cache_id, (stem, branch) in enumerate(pack, start=len(stems)):
                branch.cache_id = cache_id
                cache.fork(stem.cache_id, cache_id)
            self._run(branches, cache)
            cache.release([branch.cache_id for branch in branches])
        self._executor.retire(cache)

    def _packs(self, branches: Sequence[tuple[_Rows, _Rows]]) -> Iterator[list[tuple[_Rows, _Rows]]]:
        """``branches`` with their stems, as many together as a step has rows for."""
        pack: list[tuple[_Rows, _Rows]] = []
        num_rows = 0
        for stem, branch in branches:
            if pack and num_rows + len(branch.tokens) > self._max_rows:
                yield pack
                pack, num_rows = [], 0
            pack.append((stem, branch))
            num_rows += len(branch.tokens)
        if pack:
            yield pack

    @torch.no_grad()
    def _run(self, sequences: Sequence[_Rows], cache: Cache) -> None:
        """Run rows of several sequences in one step, or those of a long one in chunks, and score what is asked."""
        num_rows = sum(len(each.tokens) for each in sequences)
        assert num_rows <= self._max_rows or len(sequences) == 1, "only a sequence alone may be longer than a step"
        for begin in range(0, num_rows, self._max_rows):
            spans = [each.tokens[begin : begin + self._max_rows] for each in sequences]
            step = rows_step(
                spans,
                [each.first + begin for each in sequences],
                [each.cache_id for each in sequences],
                [self._path] * len(sequences),
                self._model.device,
                decode=False,
            )
            states = self._executor.run(step, cache)
            first = -begin
            rows: list[int] = []
            asked: list[list[_Asked]] = []
            for each, span in zip(sequences, spans, strict=True):
                inside = [row for row in each.asked if begin <= row < begin + len(span)]
                rows += [first + row for row in inside]
                asked += [each.asked[row] for row in inside]
                first += len(each.tokens)
            for part in range(0, len(rows), self._rows_of_logits):
                some = slice(part, part + self._rows_of_logits)
                _take_scores(self._executor.head(states[rows[some]]), asked[some])


def _take_scores(logits: Tensor, asked: Sequence[list[_Asked]]) -> None:
    """Add to the scores what is ``asked`` of each row of ``logits``, [R, V]."""
    best = most_likely(logits).tolist()
    if NOT_FINITE in best:
        raise NonFiniteError(
            f"score: logits must be finite, got NaN or infinity, in {logits.dtype}. Load the model as bfloat16 or "
            "float32, or check the weights, which may be damaged."
        )
    rows = [row for row, each in enumerate(asked) for _ in each]
    flat = [each for of_row in asked for each in of_row]
    own = logits.float().log_softmax(-1)[rows, [token for token, _, _ in flat]]
    for row, (token, score, number), logprob in zip(rows, flat, own.tolist(), strict=True):
        score.logprobs[number] = logprob
        score.is_greedy &= token == best[row]
