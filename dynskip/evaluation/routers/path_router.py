"""A prompt-only stand-in for the oracle: a predictor that chooses the path of each prompt before anything has run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dynskip.evaluation.routers.prompt_features import head_length, prompt_features
from dynskip.evaluation.routers.prompt_transformer import PromptTransformer
from dynskip.evaluation.stats.intervals import Floats
from dynskip.paths import LayerPath

Integers = npt.NDArray[np.int64]
PredictorName = Literal["logistic", "boosting", "ridge", "transformer"]
Inputs = Floats | npt.NDArray[np.object_]

NUM_FOLDS = 5
MAX_COMPONENTS = 32  # of the features: a few hundred prompts cannot tell apart what hundreds of dimensions mean


class PathRouter:
    """Chooses one of K paths for each prompt from the prompt alone.

    predictor: "logistic", "boosting" (gradient boosting) and "transformer" learn which path the oracle chose; "ridge"
        learns the score of each path by linear regression.
    costs: [K], what each path costs, in layers or in any other unit.

    Each predictor gives a prompt one worth per path. The path with the largest ``worth - price * cost`` is chosen; the
    price of a unit is set on the training prompts, from predictions of models that had not seen them, so that the
    mean cost keeps to the budget.
    """

    def __init__(self, predictor: PredictorName, costs: Sequence[float], seed: int = 0) -> None:
        if predictor not in get_args(PredictorName):
            raise ValueError(
                f"PathRouter: predictor must be one of {', '.join(get_args(PredictorName))}, got {predictor!r}."
            )
        self.predictor = predictor
        self.costs = np.asarray(costs, dtype=np.float64)
        self.seed = seed
        self.price = 0.0
        self._model: Any = None
        self._unseen: Floats = np.empty((0, len(self.costs)))

    def fit(self, features: Inputs, scores: Floats, labels: Integers, budget: float) -> PathRouter:
        """Itself, trained on ``features``, ``scores`` [N, K] and the oracle's choices ``labels`` [N].

        features: what ``router_inputs`` makes of the prompts for this predictor.
        budget: mean cost that choices on prompts of this kind may have; at least that of the cheapest path.
        """
        num_rows, num_paths = len(features), len(self.costs)
        if scores.shape != (num_rows, num_paths) or labels.shape != (num_rows,):
            raise ValueError(
                f"PathRouter.fit: scores must be [{num_rows}, {num_paths}] and labels [{num_rows}], "
                f"got {list(scores.shape)} and {list(labels.shape)}."
            )
        if num_rows < 2 * NUM_FOLDS:
            raise ValueError(
                f"PathRouter.fit: features must hold at least {2 * NUM_FOLDS} prompts, got {num_rows}. "
                "Generate for more training prompts."
            )
        if budget < self.costs.min():
            raise ValueError(
                f"PathRouter.fit: budget must be at least the cheapest path's {self.costs.min():g}, got {budget:g}."
            )
        order = np.random.default_rng(self.seed).permutation(num_rows)
        unseen = np.empty_like(scores, dtype=np.float64)
        for fold in range(NUM_FOLDS):
            held_out = order[fold::NUM_FOLDS]
            kept = np.setdiff1d(order, held_out)
            model = self._train(features[kept], scores[kept], labels[kept])
            unseen[held_out] = self._worths(model, features[held_out])
        self._unseen = unseen
        self._model = self._train(features, scores, labels)
        return self.spend(budget)

    def spend(self, budget: float) -> PathRouter:
        """Itself, its price set anew so that choices keep to ``budget``: what a predictor of scores knows of all."""
        self.price = price_for_budget(self._unseen, self.costs, budget)
        return self

    def choose(self, features: Inputs) -> Integers:
        """[N], int64: the column of the path of each prompt, of which ``features`` tell what ``fit`` was told."""
        if self._model is None:
            raise ValueError("PathRouter.choose: the router must be fitted first, got none of fit's results. Call fit.")
        return choose_at_price(self._worths(self._model, features), self.costs, self.price)

    def _train(self, features: Inputs, scores: Floats, labels: Integers) -> Any:
        from sklearn.decomposition import PCA
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.linear_model import LogisticRegression, RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if self.predictor != "ridge" and len(np.unique(labels)) == 1:
            return int(labels[0])  # the oracle chose one path for all: there is nothing to tell apart
        if self.predictor == "transformer":
            return PromptTransformer.fit(list(features), labels, len(self.costs), self.seed)
        if self.predictor == "boosting":
            # As the features stand: trees ask one feature at a time, and a rotation would hide what one of them tells.
            trees = HistGradientBoostingClassifier(
                learning_rate=0.1, max_iter=50, max_leaf_nodes=8, early_stopping=False, random_state=self.seed
            )
            return trees.fit(features, labels)
        components = PCA(min(MAX_COMPONENTS, features.shape[1], len(features) - 1), random_state=self.seed)
        if self.predictor == "logistic":
            return make_pipeline(StandardScaler(), components, LogisticRegression(C=0.1, max_iter=1000)).fit(
                features, labels
            )
        return make_pipeline(StandardScaler(), components, RidgeCV(alphas=np.logspace(-1, 5, 13))).fit(features, scores)

    def _worths(self, model: Any, features: Inputs) -> Floats:
        worths = np.zeros((len(features), len(self.costs)))
        if isinstance(model, int):
            worths[:, model] = 1.0
        elif isinstance(model, PromptTransformer):
            worths[:] = model.probabilities(list(features))
        elif self.predictor == "ridge":
            worths[:] = model.predict(features).reshape(worths.shape)
        else:
            worths[:, model.classes_] = model.predict_proba(features)
        return worths


class RouterController:
    """A ``SequenceController``: gives every prompt the path that ``router`` chooses among ``paths``.

    heads: the token sequences that the template opens with, as the features were made with.
    """

    def __init__(self, router: PathRouter, paths: Sequence[LayerPath], heads: Sequence[Sequence[int]] = ()) -> None:
        if len(paths) != len(router.costs):
            raise ValueError(
                f"RouterController: paths must be one per cost of the router, got {len(paths)} for {len(router.costs)}."
            )
        self.router = router
        self.paths = tuple(paths)
        self.heads = tuple(tuple(head) for head in heads)

    def choose_paths(self, prompt_ids: Sequence[Tensor], prompt_embeddings: Sequence[Tensor]) -> list[LayerPath]:
        """One path per prompt."""
        prompts = [ids.tolist() for ids in prompt_ids]
        features = router_inputs(self.router.predictor, prompts, prompt_embeddings, self.heads)
        return [self.paths[column] for column in self.router.choose(features)]


def router_inputs(
    predictor: PredictorName,
    prompts: Sequence[Sequence[int]],
    embeddings: Sequence[Tensor],
    heads: Sequence[Sequence[int]] = (),
) -> Inputs:
    """What ``predictor`` reads of each prompt: features [N, F]; or [N], object, embeddings [T, E] for the transformer.

    prompts: their token ids. embeddings: [T, E] each, those of the tokens. heads: what the template opens with, which
    the transformer does not read.
    """
    starts = [head_length(prompt, heads) for prompt in prompts]
    if predictor != "transformer":
        return np.stack([prompt_features(*row) for row in zip(prompts, embeddings, starts, strict=True)])
    inputs = np.empty(len(prompts), dtype=np.object_)
    for place, (rows, start) in enumerate(zip(embeddings, starts, strict=True)):
        inputs[place] = rows[min(start, len(rows) - 1) :]
    return inputs


def choose_at_price(worths: Floats, costs: Floats, price: float) -> Integers:
    """[N], int64: per row of ``worths`` [N, K] the column with the largest worth less ``price`` times its cost.

    Of equal columns the cheapest is taken.
    """
    by_cost = np.argsort(costs, kind="stable")
    return by_cost[np.argmax((worths - price * costs)[:, by_cost], axis=1)]


def price_for_budget(worths: Floats, costs: Floats, budget: float) -> float:
    """The smallest price of a unit of cost, to ten digits, at which the choices keep to ``budget`` on average."""

    def cost(price: float) -> float:
        return float(costs[choose_at_price(worths, costs, price)].mean())

    low, high = 0.0, 1.0
    if cost(low) <= budget:
        return low
    while cost(high) > budget:
        high *= 2
        assert high < 1e30, "some price makes every row take the cheapest column"
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= budget else (middle, high)
    return high
