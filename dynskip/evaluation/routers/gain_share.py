"""How much of the oracle's gain over random assignment a choice of paths captures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dynskip.evaluation.routers.path_router import Integers
from dynskip.evaluation.stats.intervals import Floats, Interval, bca, left_out_counts, resampled_counts

# Below this mean gain of the oracle, in ROUGE-L or nats, a share of it says nothing.
SMALLEST_GAIN = 1e-6


def captured_share(
    scores: Floats, chosen: Integers, oracle: Integers, seed: int = 0, resamples: int = 1000
) -> dict[str, Interval]:
    """What the choice ``chosen`` is worth, of scores [N, K], beside the oracle's choice ``oracle`` [N].

    chosen: [N], or [S, N] for the choices of S seeds, which count alike. The oracle should be one of the same mean
    cost. Intervals are over sequences; the choices stay as they are.

    Returns: rouge_l, the mean score of the choice; random, that expected of the same paths dealt to the sequences at
    random; oracle, that of the oracle's choice; gain, the first minus the second; captured_share, gain / (oracle -
    random), left out where the oracle gains nothing over random assignment.
    """
    parts, num_seqs = _parts(scores, chosen, oracle), len(scores)
    (value,) = parts(np.ones((1, num_seqs)))
    found = bca(value, parts(resampled_counts(num_seqs, resamples, seed)), parts(left_out_counts(num_seqs)))
    measured = {name: found.at(place) for place, name in enumerate(_PARTS)}
    if not np.isfinite(measured["captured_share"]).all():
        del measured["captured_share"]
    return measured


def captured_share_difference(
    scores: Floats,
    chosen: Integers,
    oracle: Integers,
    other_chosen: Integers,
    other_oracle: Integers,
    seed: int = 0,
    resamples: int = 1000,
) -> Interval | None:
    """The captured share of one choice minus that of another on the same sequences, paired; None where one has none.

    Arguments as of `captured_share`, each choice beside the oracle's at its own mean cost.
    """
    first, second = _parts(scores, chosen, oracle), _parts(scores, other_chosen, other_oracle)
    place, num_seqs = _PARTS.index("captured_share"), len(scores)

    def differences(counts: Floats) -> Floats:
        """[R]: of means over sequences that count ``counts`` [R, N] times."""
        return np.asarray(first(counts)[:, place] - second(counts)[:, place])

    (value,) = differences(np.ones((1, num_seqs)))
    if not np.isfinite(value):
        return None
    drawn, left_out = (
        differences(counts) for counts in (resampled_counts(num_seqs, resamples, seed), left_out_counts(num_seqs))
    )
    return bca(value, drawn, left_out)


_PARTS = ("rouge_l", "random", "oracle", "gain", "captured_share")


def _parts(scores: Floats, chosen: Integers, oracle: Integers) -> Callable[[Floats], Floats]:
    """From counts [R, N], how often each sequence counts, [R, 5]: all of ``_PARTS``; NaN for no share."""
    num_seqs, num_paths = scores.shape
    dealt = np.eye(num_paths)[chosen.reshape(-1, num_seqs)].mean(0)
    picked, best = (dealt * scores).sum(1), scores[np.arange(num_seqs), oracle]
    table = np.column_stack([picked, best, scores, dealt])

    def parts(counts: Floats) -> Floats:
        means = counts @ table / counts.sum(1, keepdims=True)
        random = (means[:, 2 : 2 + num_paths] * means[:, 2 + num_paths :]).sum(1)
        gain, room = means[:, 0] - random, means[:, 1] - random
        share = np.where(room > SMALLEST_GAIN, gain / np.where(room > SMALLEST_GAIN, room, 1.0), np.nan)
        return np.stack([means[:, 0], random, means[:, 1], gain, share], axis=1)

    return parts
