"""How much of the oracle's gain over random assignment a choice of paths captures."""

from __future__ import annotations

import numpy as np

from dynskip.evaluation.routers.path_router import Integers
from dynskip.evaluation.stats.intervals import Floats, Interval, bootstrap

# Below this mean gain of the oracle, in ROUGE-L, a share of it says nothing.
SMALLEST_GAIN = 1e-6


def captured_share(scores: Floats, chosen: Integers, oracle: Integers, seed: int = 0) -> dict[str, Interval]:
    """What the choice ``chosen`` is worth, of scores [N, K], beside the oracle's choice ``oracle`` [N].

    chosen: [N], or [S, N] for the choices of S seeds, which count alike. The oracle should be one of the same mean
    cost. Intervals are over sequences; the choices stay as they are.

    Returns: rouge_l, the mean score of the choice; random, that expected of the same paths dealt to the sequences at
    random; oracle, that of the oracle's choice; gain, the first minus the second; captured_share, gain / (oracle -
    random), left out where the oracle gains nothing over random assignment.
    """
    num_seqs, num_paths = scores.shape
    dealt = np.eye(num_paths)[chosen.reshape(-1, num_seqs)].mean(0)
    picked, best = (dealt * scores).sum(1), scores[np.arange(num_seqs), oracle]

    def parts(scores: Floats, picked: Floats, best: Floats, dealt: Floats) -> Floats:
        random = float(dealt.mean(0) @ scores.mean(0))
        gain, room = picked.mean() - random, best.mean() - random
        return np.array([picked.mean(), random, best.mean(), gain, gain / room if room > SMALLEST_GAIN else np.nan])

    found = bootstrap(parts, scores, picked, best, dealt, seed=seed)
    names = ("rouge_l", "random", "oracle", "gain", "captured_share")
    measured = {name: found.at(place) for place, name in enumerate(names)}
    if not np.isfinite(measured["captured_share"]).all():
        del measured["captured_share"]
    return measured
