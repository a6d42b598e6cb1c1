"""`Setup`: everything that was asked of a sweep, and what it was found to mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynskip.data.templates import TEMPLATE_NAMES
from dynskip.evaluation.sweep.checkpoints import Checkpoint, ControllerFolder
from dynskip.evaluation.sweep.dataset import SPLITS
from dynskip.files import file_hash
from dynskip.found import FoundPaths
from dynskip.paths import LayerPath

PAPER_LAYERS = 24
PAPER_BUDGETS = (4, 8, 12, 16, 20)
PAPER_CANDIDATES = (4, 8, 12)
RULES = ("uniform", "searched")
GROWING = ("likelihood_prompts", "rule_prompts", "state_prompts", "controller_prompts", "train_prompts", "draws")
# Of each seed where no number of draws is given: best-of-4 compares as many draws as the oracle has depths.
DRAWS_PER_SEED = 4


@dataclass(frozen=True, slots=True)
class Setup:
    """What a sweep is made of, as plain data.

    checkpoint: one set of weights, for all paths. siblings: by budget, weights tuned for that budget alone.
    data, data_hash: the Alpaca file. split, prompts: the first rows of that part of it; train_prompts: of learn_split,
    for what learns (0: as many); state_prompts: for hidden states (0: as many as prompts).
    budgets: layers of the static paths, without the full depth.
    controllers: learned ones, each with the weights that it steers. controller_seeds: how often each samples its
    decisions, beside taking the likelier ones. controller_prompts: prompts whose references are scored under each (0:
    as many as along paths). candidates: those that the oracle chooses among, beside the full depth.
    backbone: the weights before any tuning, to compare with. searched: by budget, paths that a search has found, as
    `LayerPath.parse` reads them. rule: "uniform" or "searched", where the paths of a budget come from.
    likelihood_prompts: prompts whose references are scored (0: as many as prompts); rule_prompts: those on which rules
    for the layers of a budget are compared (0: as many as these). likelihood_only: references are scored, no texts are
    generated, and nothing is timed. labels, labels_hash: the T0 file,
    label_prompts: rows of it that have closed labels. margin_rouge_l, margin_nats, margin_match: differences to full
    depth that count as none, of ROUGE-L, of nats a token and of the share of right labels.
    seeds: how often what is drawn is drawn. draws: sampled generations of a prompt along a path (0: four for each of
    the seeds); where they are given a run may grow by prompts, too. max_tokens: new tokens at most. temperature, top_p:
    of sampled generations. shard_size: prompts of one item. timed_batch: sequences of a timed batch; timed_rounds: how
    often each is timed, in turns. resamples: of each bootstrap. timed_on: the name of the machine that is timed; "" for
    this one.
    """

    checkpoint: Checkpoint
    data: Path
    data_hash: str
    budgets: tuple[int, ...]
    candidates: tuple[int, ...]
    siblings: tuple[tuple[int, Checkpoint], ...] = ()
    controllers: tuple[ControllerFolder, ...] = ()
    controller_seeds: int = 1
    controller_prompts: int = 0
    backbone: Checkpoint | None = None
    searched: tuple[tuple[int, str], ...] = ()
    rule: str = "uniform"
    template: str = "short"
    split: str = "test"
    split_seed: int = 42
    prompts: int = 500
    train_prompts: int = 0
    state_prompts: int = 0
    likelihood_prompts: int = 0
    rule_prompts: int = 0
    likelihood_only: bool = False
    labels: Path | None = None
    labels_hash: str | None = None
    label_prompts: int = 500
    margin_rouge_l: float = 0.01
    margin_nats: float = 0.02
    margin_match: float = 0.02
    seeds: int = 3
    draws: int = 0
    max_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 1.0
    dtype: str = "bfloat16"
    device: str = "cpu"
    shard_size: int = 64
    timed_batch: int = 64
    timed_rounds: int = 12
    resamples: int = 1000
    timed_on: str = ""

    def __post_init__(self) -> None:
        positive = (
            "prompts",
            "label_prompts",
            "seeds",
            "max_tokens",
            "shard_size",
            "timed_batch",
            "timed_rounds",
            "resamples",
        )
        for name in (*positive, *GROWING, "controller_seeds"):
            least = int(name in positive)
            if getattr(self, name) < least:
                raise ValueError(f"eval: {name} must be at least {least}, got {getattr(self, name)}.")
        if self.num_controlled > self.num_likelihoods:
            raise ValueError(
                f"eval: controller_prompts must be at most the {self.num_likelihoods} prompts whose references are "
                f"scored along paths, which controllers are held against, got {self.num_controlled}."
            )
        labels = [controller.label for controller in self.controllers]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"eval: controllers must differ, got {label!r} twice. Give one of the folders.")
        for controller in self.controllers:
            if controller.checkpoint.num_layers != self.num_layers:
                raise ValueError(
                    f"eval: controller {controller.directory} must decide for {self.num_layers} layers, "
                    f"got {controller.checkpoint.num_layers}."
                )
        if self.backbone is not None and self.backbone.num_layers != self.num_layers:
            raise ValueError(
                f"eval: backbone must have the {self.num_layers} layers of the model, got {self.backbone.num_layers}."
            )
        if self.rule not in RULES:
            raise ValueError(f"eval: rule must be one of {', '.join(RULES)}, got {self.rule!r}.")
        if self.rule == "searched":
            known = dict(self.searched)
            for budget in {*self.budgets, *self.candidates} - {self.num_layers, *known}:
                raise ValueError(
                    f"eval: searched must hold a path of each budget, got none of {budget} layers. Search it with "
                    "dynskip search, or leave out --rule searched."
                )
        for name in ("margin_rouge_l", "margin_nats", "margin_match"):
            if getattr(self, name) <= 0:
                raise ValueError(f"eval: {name} must be above 0, got {getattr(self, name)}.")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"eval: temperature must be above 0 and top_p in (0, 1], got {self.temperature} and {self.top_p}."
            )
        if self.split not in SPLITS:
            raise ValueError(f"eval: split must be one of {', '.join(SPLITS)}, got {self.split!r}.")
        if self.template not in TEMPLATE_NAMES:
            raise ValueError(f"eval: template must be one of {', '.join(TEMPLATE_NAMES)}, got {self.template!r}.")
        for name in ("budgets", "candidates"):
            for budget in getattr(self, name):
                if not 1 <= budget <= self.num_layers:
                    raise ValueError(
                        f"eval: {name} must lie in 1..{self.num_layers}, the layers of the model, got {budget}."
                    )
            if not any(budget < self.num_layers for budget in getattr(self, name)):
                raise ValueError(
                    f"eval: {name} must hold a budget below the {self.num_layers} layers of the model, "
                    f"got {', '.join(map(str, getattr(self, name))) or 'none'}."
                )
        for budget, sibling in self.siblings:
            if not 1 <= budget <= self.num_layers:
                raise ValueError(f"eval: sibling must have a budget in 1..{self.num_layers}, got {budget}.")
            if sibling.num_layers not in (budget, self.num_layers):
                raise ValueError(
                    f"eval: sibling {budget} must have {self.num_layers} layers, or the {budget} that it runs, "
                    f"got {sibling.num_layers}."
                )

    @staticmethod
    def of(
        model: str | None,
        data: Path,
        siblings: dict[int, str],
        budgets: tuple[int, ...] | None = None,
        candidates: tuple[int, ...] | None = None,
        controllers: Sequence[str | Path] = (),
        searched: Path | None = None,
        backbone: str | None = None,
        labels: Path | None = None,
        **options: Any,
    ) -> Setup:
        """The setup of a model's folder or hub id, siblings' likewise by budget; options are the other fields.

        budgets, candidates: None for the paper's, scaled to the model's depth where it has fewer layers.
        searched: the file that `dynskip search` has left beside the model. labels: the T0 file.
        """
        checkpoint = Checkpoint.of(model)
        if not data.is_file():
            raise FileNotFoundError(f"eval: data must be a file, got {str(data)!r}. Check the path.")
        if labels is not None and not labels.is_file():
            raise FileNotFoundError(f"eval: labels must be a file, got {str(labels)!r}. Check the path.")
        budgets = scaled(PAPER_BUDGETS, checkpoint.num_layers) if budgets is None else tuple(sorted(set(budgets)))
        if candidates is None:
            candidates = scaled(PAPER_CANDIDATES, checkpoint.num_layers)
        candidates = tuple(sorted(set(candidates)))
        found = {} if searched is None else _searched(searched, checkpoint.num_layers)
        return Setup(
            checkpoint,
            data,
            file_hash(data)[:16],
            budgets,
            candidates,
            tuple((budget, Checkpoint.of(source)) for budget, source in sorted(siblings.items())),
            tuple(map(ControllerFolder.of, controllers)),
            labels=labels,
            labels_hash=None if labels is None else file_hash(labels)[:16],
            backbone=None if backbone is None else Checkpoint.of(backbone),
            # Of others nothing is asked: that more are found makes no other run.
            searched=tuple((budget, found[budget]) for budget in sorted({*budgets, *candidates}) if budget in found),
            **options,
        )

    @property
    def num_layers(self) -> int:
        """L of the model whose paths are compared."""
        return self.checkpoint.num_layers

    def path_of(self, budget: int) -> str:
        """The path of ``budget`` layers along which the model is run, by the setup's rule."""
        found = dict(self.searched) if self.rule == "searched" else {}
        return found.get(budget) or path_text(budget, self.num_layers)

    @property
    def learn_split(self) -> str:
        """The part of the data to learn from: rows that are not judged, nor, for those of the test part, trained on."""
        return "validation" if self.split == "test" else "train"

    @property
    def num_likelihoods(self) -> int:
        """How many prompts have their references scored."""
        return self.likelihood_prompts or self.prompts

    @property
    def num_controlled(self) -> int:
        """How many prompts have their references scored under controllers."""
        return self.controller_prompts or self.num_likelihoods

    @property
    def num_judged(self) -> int:
        """How many prompts the sections count: those with texts, or with references where nothing is generated."""
        return self.num_likelihoods if self.likelihood_only else self.prompts

    @property
    def sample_seeds(self) -> range:
        """The seeds of the sampled generations that each prompt has along each candidate."""
        return range(1, (self.draws or DRAWS_PER_SEED * self.seeds) + 1)

    @property
    def full_checkpoint(self) -> Checkpoint:
        """The weights tuned at full depth alone where they were given, else those for all paths."""
        return dict(self.siblings).get(self.num_layers, self.checkpoint)

    @property
    def weights_compared(self) -> dict[str, Checkpoint]:
        """By name the weights on which rules for the layers of a budget are compared: shared by all paths, tuned at
        full depth only, and those before any tuning, as far as they were given."""
        found = {"paths": self.checkpoint}
        if self.full_checkpoint != self.checkpoint:
            found["full-tuned"] = self.full_checkpoint
        return found if self.backbone is None else {**found, "backbone": self.backbone}

    def checkpoint_of(self, checkpoint_hash: str) -> Checkpoint:
        """The checkpoint with that hash."""
        steered = (controller.checkpoint for controller in self.controllers)
        others = () if self.backbone is None else (self.backbone,)
        for checkpoint in (self.checkpoint, *(sibling for _, sibling in self.siblings), *others, *steered):
            if checkpoint.hash == checkpoint_hash:
                return checkpoint
        raise ValueError(f"eval: the checkpoint must be one of the setup, got hash {checkpoint_hash!r}.")

    def guarded(self) -> dict[str, Any]:
        """What must not change within a run folder, as JSON holds it; where files lie may, and controllers may come.

        So may more references, more prompts to learn from, and, of a run that says its draws, more of these and more
        prompts: the items of fewer are among theirs. A folder takes more budgets, searched paths for them and labels,
        too, and from then on no setup without them; and siblings, with which or without.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("data", "labels", "controllers", "controller_seeds", "timed_on", "likelihood_only", *GROWING):
            del fields[name]
        if self.draws:
            # Such a run may grow by prompts; the items of one that does not say its draws are others.
            fields["prompts"] = None
        return fields | {
            "checkpoint": self.checkpoint.hash,
            "siblings": {str(budget): sibling.hash for budget, sibling in self.siblings},
            "budgets": list(self.budgets),
            "candidates": list(self.candidates),
            "searched": {str(budget): path for budget, path in self.searched},
            "backbone": None if self.backbone is None else self.backbone.hash,
        }


def scaled(budgets: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Budgets out of 24 layers as shares of fewer layers, each once; unchanged for 24 layers or more."""
    if num_layers >= PAPER_LAYERS:
        return budgets
    shares = {max(1, round(budget * num_layers / PAPER_LAYERS)) for budget in budgets}
    return tuple(sorted(share for share in shares if share < num_layers))


def _searched(file: Path, num_layers: int) -> dict[int, str]:
    found = FoundPaths.read(file)
    if found.num_layers != num_layers:
        raise ValueError(
            f"eval: searched must be paths through the {num_layers} layers of the model, got {found.num_layers} in "
            f"{file}. Search the model itself."
        )
    return {budget: f"layers:{','.join(map(str, layers))}" for budget, layers in found.layers.items()}


def path_text(budget: int, num_layers: int) -> str:
    """The uniform path of ``budget`` layers as ``LayerPath.parse`` reads it."""
    path = LayerPath.uniform(num_layers, budget=budget)
    return "full" if path == LayerPath.full(num_layers) else f"uniform:{budget}"
