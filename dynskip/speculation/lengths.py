"""How many tokens to guess in a step: what guessing and verifying take against the tokens that they are worth."""

from __future__ import annotations

import functools
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import NamedTuple

from dynskip.costs.step_costs import StepCosts
from dynskip.paths import LayerPath
from dynskip.speculation.draft import Draft

# The most tokens that are guessed before they are verified.
MOST_GUESSES = 8
# What guessing must gain to be worth it: costs and rates are estimates.
_LEAST_GAIN = 1.03
# Rates are rounded to such steps: the same question comes again and again.
_RATE_STEPS = 32
_MOST_KNOWN = 1024
# Plain steps that the ratio of measured to predicted times is the lower quartile of.
_REMEMBERED = 31
# Pairs of a plain step and the guesses just before it: so many are compared, so few are enough.
_PAIRS, _FIRST_PAIRS = 9, 6
# A plain step comes again after so many with guesses; sooner as long as pairs do not count, or where the last guesses
# differ from them by so much.
_PLAIN_EVERY, _PLAIN_EVERY_AT_FIRST, _FAR_OFF = 32, 8, 1.5
# So many steps that show nothing may lie between guesses and the plain step that they are compared with.
_MOST_BETWEEN = 8
# The first steps of a kind and size are slow, and say nothing: memory is new, threads are not awake yet.
_UNSEEN_STEPS = 4
# What pairs say is rounded to steps of so many percent.
_RATIO_STEP = 1.05


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence that may guess: at most ``most`` tokens along ``draft``, each right with probability ``rate``.

    rides: it has no draft; its own path goes along with the guesses of others, if their drafts read its layers anyway.
    """

    path: LayerPath
    draft: Draft
    rate: float
    most: int
    rides: bool = False


class Ratios(NamedTuple):
    """How many times as long as predicted guesses and verifications take, over the same of plain steps."""

    guess: float = 1.0
    verify: float = 1.0


@dataclass(frozen=True, slots=True)
class Choice:
    """What a step does. lengths: of each drafter. gain: tokens a second over those without guesses, as predicted.

    num_tokens: expected of all sequences together. guess_ms, verify_ms: predicted and not corrected, of all guesses and
        of the step that verifies them; plain_ms: of a step without any.
    """

    lengths: tuple[int, ...]
    gain: float
    num_tokens: float
    guess_ms: float
    verify_ms: float
    plain_ms: float

    def saved_ms(self, num_seqs: int, num_left: int) -> float:
        """What such steps of ``num_seqs`` sequences save on the ``num_left`` tokens that one of them has left."""
        return num_left * self.plain_ms / num_seqs * (1 - 1 / max(self.gain, 1.0))


@dataclass(slots=True)
class _Learnt:
    """What was seen of steps of about as many sequences: of plain ones, and of guesses and verifications beside them.

    A machine may be slower for seconds or minutes, and then all of its steps are: steps that stand side by side are
    compared. plain: how long plain steps take as a multiple of what is predicted, the lower quartile of the last ones;
    what disturbs a step makes it longer.
    """

    plain: float = 1.0
    ratios: Ratios | None = None  # None as long as too little was seen
    was_measured: bool = False  # whether they began as what `dynskip calibrate` has seen
    num_since_plain: int = 0
    _num_pairs: int = 0
    _pairs: deque[Ratios] = field(default_factory=lambda: deque(maxlen=_PAIRS))
    _recent: deque[Ratios] = field(default_factory=lambda: deque(maxlen=_PLAIN_EVERY_AT_FIRST))  # since the last plain
    _plain_steps: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    @property
    def wants_plain(self) -> bool:
        """Whether a step without guesses is due: what they gain is known beside such steps only.

        At first one stands behind each step with some, unless they were measured before.
        """
        are_known = len(self._pairs) >= _FIRST_PAIRS
        if not are_known and not self.was_measured:
            return self.num_since_plain > 0
        every = _PLAIN_EVERY if are_known and not self._is_far_off() else _PLAIN_EVERY_AT_FIRST
        return self.num_since_plain >= every

    def add_guesses(self, guess: float, verify: float) -> None:
        """Count a step with guesses, which took so many times what is predicted."""
        self._recent.append(Ratios(guess, verify))
        self.num_since_plain += 1

    def add_plain(self, ratio: float) -> None:
        """Count a plain step, and compare those with guesses just before it."""
        self._plain_steps.append(ratio)
        self.plain = sorted(self._plain_steps)[len(self._plain_steps) // 4]
        if self._recent:
            self._num_pairs += 1
            if self._num_pairs > _UNSEEN_STEPS:
                self._pairs.append(self._beside(ratio))
            self._recent.clear()
        self.num_since_plain = 0
        if len(self._pairs) >= _FIRST_PAIRS:
            guess, verify = map(median, zip(*self._pairs, strict=True))
            self.ratios = Ratios(_rounded(guess), _rounded(verify))

    def forget_recent(self) -> None:
        """Compare the last guesses with nothing."""
        self._recent.clear()

    def _beside(self, plain: float) -> Ratios:
        """What the last guesses took, over a plain step."""
        guess, verify = map(median, zip(*self._recent, strict=True))
        return Ratios(guess / plain, verify / plain)

    def _is_far_off(self) -> bool:
        """Whether the last guesses differ from what is believed of them."""
        if len(self._recent) < _PLAIN_EVERY_AT_FIRST or self.ratios is None:
            return False
        now = self._beside(self._plain_steps[-1])
        return any(max(new / old, old / new) > _FAR_OFF for new, old in zip(now, self.ratios, strict=True))


@dataclass
class DraftLengths:
    """Chooses lengths by the costs of steps, which it corrects by what guesses and steps took.

    costs: what steps are predicted to take. most_rows: of a step that verifies, unless it has more without guesses.
    resumes: whether what a draft has run of its path is not run again when the path verifies.
    """

    costs: StepCosts
    most_rows: int
    resumes: bool = False
    _learnt: dict[int, _Learnt] = field(default_factory=dict)  # by the bits of the number of sequences
    _last: _Learnt | None = None  # of the last step that was seen
    _num_between: int = 0  # steps since then that show nothing
    _known: dict[object, Choice] = field(default_factory=dict)
    _model_costs: StepCosts = field(init=False)

    def __post_init__(self) -> None:
        self._model_costs = self.costs.of_model()
        for num_seqs, (guess, verify) in self.costs.draft_ratios.items():
            self._learnt[num_seqs.bit_length()] = _Learnt(ratios=Ratios(guess, verify), was_measured=True)

    def choose(self, candidates: Sequence[Candidate], others: Sequence[LayerPath] = ()) -> Choice:
        """How many tokens each of ``candidates`` guesses in a step in which ``others`` have one row each."""
        return self._ordered(candidates, others, self.ratios(len(candidates) + len(others)))

    def plain(self, candidates: Sequence[Candidate], others: Sequence[LayerPath]) -> Choice | None:
        """A step in which nobody guesses, where one is due to see what guesses gain; else None."""
        if not self._of(len(candidates) + len(others)).wants_plain:
            return None
        return self._evaluate(candidates, [0] * len(candidates), others, Ratios())

    def of_lengths(
        self, candidates: Sequence[Candidate], others: Sequence[LayerPath], lengths: Sequence[int]
    ) -> Choice:
        """A step in which ``candidates`` guess so many tokens, whether that pays or not."""
        return self._evaluate(candidates, lengths, others, self.ratios(len(candidates) + len(others)))

    def asks_as(self, other: DraftLengths) -> bool:
        """Whether both choose by the same costs under the same limits."""
        return (self.costs, self.most_rows, self.resumes) == (other.costs, other.most_rows, other.resumes)

    def probe(self, candidates: Sequence[Candidate], others: Sequence[LayerPath], place: int, length: int) -> Choice:
        """What would pay if all took what is predicted; else the candidate at ``place`` guesses ``length`` tokens."""
        best = self._ordered(candidates, others, Ratios())
        if any(best.lengths):
            return best
        lengths = [length * (index == place) for index in range(len(candidates))]
        return self._evaluate(candidates, lengths, others, self.ratios(len(candidates) + len(others)))

    def observe(self, choice: Choice, num_seqs: int, guessed_ms: float, stepped_ms: float) -> None:
        """Learn from a step of ``num_seqs`` sequences: guesses took ``guessed_ms``, all else ``stepped_ms``."""
        learnt = self._of(num_seqs)
        self._num_between = 0
        if self._last is not learnt:
            self.interrupt()
            self._last = learnt
        if any(choice.lengths):
            if min(choice.guess_ms, choice.verify_ms, guessed_ms, stepped_ms) > 0:
                learnt.add_guesses(guessed_ms / choice.guess_ms, stepped_ms / choice.verify_ms)
        elif min(choice.verify_ms, stepped_ms) > 0:
            learnt.add_plain(stepped_ms / choice.verify_ms)

    def skip(self) -> None:
        """Count a step that shows nothing: what comes behind many of them does not stand beside what came before."""
        self._num_between += 1
        if self._num_between > _MOST_BETWEEN:
            self.interrupt()

    def interrupt(self) -> None:
        """Compare no plain step to come with the guesses that were made so far: it does not stand beside them."""
        if self._last is not None:
            self._last.forget_recent()

    def ratios(self, num_seqs: int) -> Ratios:
        """Those of steps of about ``num_seqs`` sequences; of the nearest number with any, where they have none yet."""
        size = num_seqs.bit_length()
        own = self.learnt_ratios(num_seqs)
        if own is not None:
            return own
        known = {other: found for other, each in self._learnt.items() if (found := each.ratios) is not None}
        return known[min(known, key=lambda other: (abs(other - size), other))] if known else Ratios()

    def learnt_ratios(self, num_seqs: int) -> Ratios | None:
        """Those of steps of about ``num_seqs`` sequences alone; None where too few were seen."""
        return self._of(num_seqs).ratios

    def lost_ms(
        self, choice: Choice, num_seqs: int, num_tokens: float | None = None, measured_ms: float | None = None
    ) -> float:
        """What a step with the guesses of ``choice`` loses beside plain steps; negative where it gains.

        num_tokens: that it gave, all sequences together; measured_ms: how long it took. None for what is expected.
        """
        unit = self.slowness(num_seqs)
        if measured_ms is None:
            measured_ms = sum(self.expected_ms(choice, num_seqs)) * unit
        tokens = choice.num_tokens if num_tokens is None else num_tokens
        return measured_ms - tokens / num_seqs * choice.plain_ms * unit

    def expected_ms(self, choice: Choice, num_seqs: int) -> tuple[float, float]:
        """What the guesses of ``choice`` take, and what the step behind them does, where plain steps take what is
        predicted.
        """
        ratios = self.ratios(num_seqs) if any(choice.lengths) else Ratios()
        return choice.guess_ms * ratios.guess, choice.verify_ms * ratios.verify

    def slowness(self, num_seqs: int) -> float:
        """How many times as long as predicted plain steps of about ``num_seqs`` sequences take."""
        return self._of(num_seqs).plain

    def _of(self, num_seqs: int) -> _Learnt:
        return self._learnt.setdefault(num_seqs.bit_length(), _Learnt())

    def _ordered(self, candidates: Sequence[Candidate], others: Sequence[LayerPath], ratios: Ratios) -> Choice:
        """The best choice for ``candidates`` in their order, from memory where the same was asked before."""
        rounded = [
            (each.path, each.draft, round(each.rate * _RATE_STEPS), min(each.most, MOST_GUESSES), each.rides)
            for each in candidates
        ]
        # With one path after the other, who comes first makes no difference.
        order = _by_rate(candidates)
        key = (tuple(rounded[index] for index in order), tuple(Counter(others).items()), ratios)
        choice = self._known.get(key)
        if choice is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            choice = self._known[key] = self._best([candidates[index] for index in order], others, ratios)
        lengths = [0] * len(rounded)
        for place, index in enumerate(order):
            lengths[index] = choice.lengths[place]
        return replace(choice, lengths=tuple(lengths))

    def _best(self, candidates: Sequence[Candidate], others: Sequence[LayerPath], ratios: Ratios) -> Choice:
        """The best choice for ``candidates``, those with the highest rates first."""
        none = self._evaluate(candidates, [0] * len(candidates), others, ratios)
        best = none
        room = max(0, self.most_rows - len(candidates) - len(others))
        # Whoever guesses best guesses first: all of them, half of them, ...
        num_guessing = sum(not each.rides for each in candidates)
        while num_guessing:
            last = 0.0
            for most in range(1, MOST_GUESSES + 1):
                lengths = [min(most, each.most) if place < num_guessing else 0 for place, each in enumerate(candidates)]
                if not any(lengths) or sum(lengths) > room:
                    break
                choice = self._together(candidates, lengths, others, ratios, room - sum(lengths))
                if choice.gain > best.gain:
                    best = choice
                elif choice.gain < min(last, 0.9 * best.gain):
                    break  # more guesses gain more at first, even where one alone loses
                last = choice.gain
            num_guessing //= 2
        return best if best.gain >= _LEAST_GAIN else none

    def _together(
        self,
        candidates: Sequence[Candidate],
        lengths: Sequence[int],
        others: Sequence[LayerPath],
        ratios: Ratios,
        room: int,
    ) -> Choice:
        """Guesses of ``lengths``, along with which those ride that may, in ``room`` rows, if no draft loses by that."""
        riding = _ride(candidates, lengths, room)
        if not any(riding):
            return self._evaluate(candidates, lengths, others, ratios)
        both = [length + more for length, more in zip(lengths, riding, strict=True)]
        together = self._evaluate(candidates, both, others, ratios)
        own = [expected_tokens(each.rate, length) for each, length in zip(candidates, lengths, strict=True) if length]
        mean = together.num_tokens / (len(candidates) + len(others))
        if together.gain * min(own) >= mean:
            return together
        return self._evaluate(candidates, lengths, others, ratios)

    def _evaluate(
        self,
        candidates: Sequence[Candidate],
        lengths: Sequence[int],
        others: Sequence[LayerPath],
        ratios: Ratios,
    ) -> Choice:
        plain: dict[LayerPath, int] = {}
        for path in others:
            plain[path] = plain.get(path, 0) + 1
        rows = dict(plain)
        most = max(lengths, default=0)
        guessing: dict[LayerPath, list[int]] = {}  # by path of the draft: how many guess one token, two, ..
        tokens = float(len(others))
        for each, length in zip(candidates, lengths, strict=True):
            path = each.path
            plain[path] = plain.get(path, 0) + 1
            rows[path] = rows.get(path, 0) + 1
            tokens += expected_tokens(each.rate, length)
            if length:
                # The last token and all guesses but the last, as many rows as guesses, have begun along the draft.
                behind = _behind(path, each.draft.num_common_layers(path) if self.resumes else 0)
                rows[behind] = rows.get(behind, 0) + length
                guessing.setdefault(each.draft.path, [0] * most)[length - 1] += 1
        guess_ms = 0.0
        for turn in range(most):
            # Guesses are chosen inside of the step: what an engine's steps take besides the model, they do not.
            cohort = [(path, count) for path, counts in guessing.items() if (count := sum(counts[turn:]))]
            guess_ms += self._model_costs.decode_ms(cohort)
        verify_ms = self.costs.decode_ms([*rows.items()])
        plain_ms = self.costs.decode_ms([*plain.items()])
        num_plain = len(candidates) + len(others)
        total_ms = guess_ms * ratios.guess + verify_ms * (ratios.verify if any(lengths) else 1.0)
        gain = tokens / num_plain * plain_ms / total_ms if total_ms > 0 else 1.0
        return Choice(tuple(lengths), gain if any(lengths) else 1.0, tokens, guess_ms, verify_ms, plain_ms)


def _by_rate(candidates: Sequence[Candidate]) -> list[int]:
    """Places of candidates: those with the highest rates first, those that ride last."""
    return sorted(range(len(candidates)), key=lambda place: (candidates[place].rides, -candidates[place].rate))


def _ride(candidates: Sequence[Candidate], lengths: Sequence[int], room: int) -> list[int]:
    """The tokens that each candidate runs along with the guesses of others, ``room`` of them at most.

    A guess reads the weights of the draft's layers; rows of a path that runs no other layers are cheap beside it.
    """
    most = max(lengths)
    read = {
        layer
        for each, length in zip(candidates, lengths, strict=True)
        if length == most
        for layer in each.draft.path.layers
    }
    riding = [0] * len(candidates)
    for place, each in enumerate(candidates):
        length = min(most, each.most)
        if each.rides and length <= room and read.issuperset(each.path.layers):
            riding[place] = length
            room -= length
    return riding


@functools.lru_cache(maxsize=256)
def _behind(path: LayerPath, num_layers: int) -> LayerPath:
    """What ``path`` runs behind the decoder's first ``num_layers`` layers."""
    layers = [layer for layer in path.layers if layer >= num_layers]
    return LayerPath.of(path.num_layers, layers, allow_empty=True)


def _rounded(ratio: float) -> float:
    return float(_RATIO_STEP ** round(math.log(ratio, _RATIO_STEP)))


def expected_tokens(rate: float, length: int) -> float:
    """The tokens that a verification of ``length`` guesses gives, each right with probability ``rate``."""
    tokens = 1.0
    for _ in range(length):
        tokens = 1 + rate * tokens
    return tokens
