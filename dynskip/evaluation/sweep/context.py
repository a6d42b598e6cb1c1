"""`Context`: what work items need beside themselves, loaded once and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from dynskip.evaluation.sweep.checkpoints import Checkpoint, check_tokenizer
from dynskip.evaluation.sweep.dataset import Prompts, Row, encode_prompts, read_splits
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import Option, WorkItem
from dynskip.llm import LLM

# Items are ordered by checkpoint; siblings that are timed in turns have to be there together.
_MAX_MODELS = 8


class Context:
    """Models, tokenizers and prompts of a setup. A process makes one from the setup, which is plain data."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._models: OrderedDict[tuple[str, str], LLM] = OrderedDict()
        self._prompts: dict[tuple[str, str, int], Prompts] = {}

    def llm(self, checkpoint_hash: str, dtype: str | None = None) -> LLM:
        """The model with that hash, in ``dtype`` (default: the setup's), with a tokenizer that fits it."""
        dtype = dtype or self.setup.dtype
        key = (checkpoint_hash, dtype)
        if key not in self._models:
            while len(self._models) >= _MAX_MODELS:
                self._models.popitem(last=False)
            checkpoint = self.setup.checkpoint_of(checkpoint_hash)
            options = {"dtype": getattr(torch, dtype), "device": self.setup.device}
            llm = LLM(checkpoint.directory, adapter=checkpoint.adapter, **options)
            check_tokenizer(llm.tokenizer, llm.model.config, checkpoint.name)
            self._models[key] = llm
        self._models.move_to_end(key)
        return self._models[key]

    def prompts(self, checkpoint_hash: str, split: str, num_prompts: int | None = None) -> Prompts:
        """The first prompts of a split as that checkpoint's tokenizer writes them; None for the number of the setup."""
        num_prompts = num_prompts or num_rows(self.setup, split)
        key = (checkpoint_hash, split, num_prompts)
        if key not in self._prompts:
            setup = self.setup
            # Splits of the sweep use one tokenizer's choice of rows, so that all checkpoints answer the same prompts.
            llm = self.llm(checkpoint_hash)
            if checkpoint_hash != setup.checkpoint.hash:
                self._check_same_tokenizer(llm, checkpoint_hash)
            self._prompts[key] = encode_prompts(
                read_splits(setup.data, setup.split_seed)[split],
                llm.tokenizer,
                llm.model.decoder_config.max_positions,
                setup.max_tokens,
                setup.template,
                num_prompts,
            )
        return self._prompts[key]

    def shard(self, item: WorkItem) -> Sequence[Row]:
        """The rows of an item."""
        end, size = int(item.option("num_rows")), int(item.option("shard_size"))
        # Of shards that grow each names another end; what the longest run asks for is encoded once.
        rows = self.prompts(item.checkpoint, item.split, max(end, most_rows(self.setup, item.split))).rows
        return rows[item.shard * size : min(end, (item.shard + 1) * size)]

    def _check_same_tokenizer(self, llm: LLM, checkpoint_hash: str) -> None:
        base: Any = self.llm(self.setup.checkpoint.hash)
        same_length = llm.model.decoder_config.max_positions == base.model.decoder_config.max_positions
        if llm.tokenizer is None or llm.tokenizer.get_vocab() != base.tokenizer.get_vocab() or not same_length:
            name = self.setup.checkpoint_of(checkpoint_hash).name
            raise ValueError(
                f"eval: sibling {name} must have the vocabulary and positions of the model, got others. "
                "Siblings start from the model they are compared with."
            )


def num_rows(setup: Setup, split: str) -> int:
    """How many prompts of ``split`` a setup asks for: to judge on, or to learn from."""
    return setup.prompts if split == setup.split else setup.train_prompts or setup.prompts


def most_rows(setup: Setup, split: str) -> int:
    """The most prompts of ``split`` that any item of a setup may ask for."""
    asked = num_rows(setup, split)
    if split != setup.split:
        return asked
    return max(asked, setup.num_likelihoods, setup.rule_prompts, setup.state_prompts)


def shard_items(
    setup: Setup,
    task: str,
    checkpoint: Checkpoint,
    path: str,
    split: str,
    seed: int = 0,
    grows: Option = False,
    **options: Option,
) -> list[WorkItem]:
    """The items of ``task`` that go through the prompts of ``split`` once, with ``options`` beside those of all.

    num_rows, shard_size: as options, in place of the setup's. grows: a run of more prompts has the whole shards of a
    run of fewer among its items.
    """
    all_options: dict[str, Option] = {
        "max_tokens": setup.max_tokens,
        "num_rows": num_rows(setup, split),
        "shard_size": setup.shard_size,
        "split_seed": setup.split_seed,
        "template": setup.template,
        **options,
    }
    count, size = int(all_options["num_rows"]), int(all_options["shard_size"])
    items = []
    for shard in range(-(-count // size)):
        if grows:
            all_options["num_rows"] = min(count, (shard + 1) * size)
        named = tuple(sorted(all_options.items()))
        items.append(WorkItem(task, checkpoint.hash, path, setup.data_hash, split, seed, shard, named))
    return items
