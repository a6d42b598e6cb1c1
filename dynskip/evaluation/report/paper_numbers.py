"""What arXiv 2410.20022 reports, as data: read off the authors' public code and notebooks unless said otherwise."""

from __future__ import annotations

from collections.abc import Mapping

MODEL = "OPT-1.3B (facebook/opt-iml-1.3b in the authors' code), 24 layers"
NUM_LAYERS = 24
NUM_PARAMETERS = 1_316_000_000
NUM_TEST = 7801
MAX_TOKENS = 300

# Mean ROUGE-L of separately fine-tuned models along uniform paths, and of the best of all up to that depth.
STATIC_ROUGE_L = {4: 0.2493, 8: 0.3085, 12: 0.3208, 24: 0.3418}
BEST_UP_TO = {4: 0.2493, 8: 0.3341, 12: 0.3688, 24: 0.3964}
MATCHING_BUDGET = 5.6  # mean layers at which the oracle has full depth's ROUGE-L
MATCHING_SHARE = 0.233
# The oracle's mean ROUGE-L at the mean budgets where it is known: no choice, full depth's score, no limit.
ORACLE_ROUGE_L = {4: STATIC_ROUGE_L[4], MATCHING_BUDGET: STATIC_ROUGE_L[24], 24: BEST_UP_TO[24]}
DEPTH_LENGTH_PEARSON = (-0.015, 0.029)

# Controllers, ROUGE-L against mean layers of a generated token: (name, alpha, layers or None, ROUGE-L).
CONTROLLERS = (
    ("fixed input", 10, 7.8, 0.299),
    ("hidden state", 10, 7.3, 0.293),
    ("hidden state", 4, None, 0.320),
)


def at_budget(numbers: Mapping[int, float], budget: int, num_layers: int) -> float | None:
    """The paper's number at ``budget`` of as many layers; None for a model of another depth."""
    return numbers.get(budget) if num_layers == NUM_LAYERS else None
