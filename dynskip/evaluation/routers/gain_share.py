"""How much of the oracle's gain over random assignment a choice of paths captures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dynskip.evaluation.routers.path_router import Integers
from dynskip.evaluation.stats.intervals import Floats, Interval, bootstrap

# Below this mean gain of the oracle, in ROUGE-L, a share of it says nothing.
SMALLEST_GAIN = 1e-6


@dataclass(frozen=True)
class Captured:
    """What a choice of paths is worth between random assignment and the oracle, each with its 95 % interval.

    score: mean score of the choice. random: expected mean score of the same paths dealt to the sequences at random.
    gain: score - random. oracle: mean score of the oracle's choice. share: gain / (oracle - random), None where the
    oracle gains nothing over random assignment.
    """

    score: Interval
    random: Interval
    oracle: Interval
    gain: Interval
    share: Interval | None


def captured_share(scores: Floats, chosen: Integers, oracle: Integers, seed: int = 0) -> Captured:
    """What the choice ``chosen`` captures, of scores [N, K], beside the oracle's choice ``oracle`` [N].

    chosen: [N], or [S, N] for the choices of S seeds, which count alike. The oracle should be one of the same mean
    cost. Intervals are over sequences; the choices stay as they are.
    """
    num_seqs, num_paths = scores.shape
    dealt = np.eye(num_paths)[chosen.reshape(-1, num_seqs)].mean(0)
    picked, best = (dealt * scores).sum(1), scores[np.arange(num_seqs), oracle]

    def parts(scores: Floats, picked: Floats, best: Floats, dealt: Floats) -> Floats:
        random = float(dealt.mean(0) @ scores.mean(0))
        gain, room = picked.mean() - random, best.mean() - random
        return np.array([picked.mean(), random, best.mean(), gain, gain / room if room > SMALLEST_GAIN else np.nan])

    found = bootstrap(parts, scores, picked, best, dealt, seed=seed)
    score, random, oracle_score, gain, share = map(found.at, range(5))
    return Captured(score, random, oracle_score, gain, share if np.isfinite(share).all() else None)
