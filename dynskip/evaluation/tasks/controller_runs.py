"""Generations that a learned controller steers, and their time: the tasks "controlled" and "time-controlled"."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynskip.controllers import TokenContext, TokenController, load_controller
from dynskip.engine.closed_batch import Generation
from dynskip.evaluation.sweep.checkpoints import ControllerFolder
from dynskip.evaluation.sweep.context import Context, shard_items
from dynskip.evaluation.sweep.setup import Setup, path_text
from dynskip.evaluation.sweep.store import WorkItem
from dynskip.evaluation.tasks.generations import rouge_l
from dynskip.evaluation.tasks.timing import decode_ms, machine_item, timed_in_turns
from dynskip.llm import LLM
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams

ARGMAX = 0


class SequenceCounter:
    """Passes on what ``controller`` decides, and counts it by sequence of ``generation``, the one that asks.

    num_run, num_tokens: [B], how many layers the decided tokens of a sequence ran, and how many tokens those were.
    """

    def __init__(self, controller: TokenController) -> None:
        self.controller = controller
        self.generation: Generation | None = None
        self.num_run: list[int] = []
        self.num_tokens: list[int] = []

    def watch(self, generation: Generation) -> None:
        """Count for the sequences of ``generation``, which has this object for its paths."""
        self.generation = generation
        self.num_run = [0] * len(generation.sequences)
        self.num_tokens = [0] * len(generation.sequences)

    def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N], bool: what the controller says."""
        assert self.generation is not None, "watch comes before the first step"
        active = self.controller.active(layer, hidden_states, context)
        running = self.generation.running
        for place, runs in zip(context.seq_ids.tolist(), active.tolist(), strict=True):
            self.num_run[running[place]] += runs
            self.num_tokens[running[place]] += layer == 0
        return active


def controlled_items(setup: Setup, controller: ControllerFolder, seed: int) -> list[WorkItem]:
    """The items that generate greedily while ``controller`` decides: the likelier way for seed 0, else sampled."""
    return shard_items(
        setup,
        "controlled",
        controller.checkpoint,
        controller.label,
        setup.split,
        seed,
        controller=controller.hash,
        dtype=setup.dtype,
        kv_policy=controller.kv_policy or "",
        prompt_depth=controller.prompt_depth,
    )


def run_controlled(item: WorkItem, context: Context) -> dict[str, Any]:
    """Row by row of the shard: ROUGE-L, number of new tokens, layers that decided tokens ran, and how many those were.

    The token that follows the prompt is not decided on, nor is the last one run.
    """
    setup = context.setup
    llm = context.llm(item.checkpoint)
    rows = context.shard(item)
    controller = loaded(setup, str(item.option("controller")), llm, item.seed)
    params = [SamplingParams(max_tokens=setup.max_tokens)] * len(rows)
    prompts = [list(row.prompt_ids) for row in rows]
    if isinstance(controller, TokenController):
        counter = SequenceCounter(controller)
        policy, depth = str(item.option("kv_policy")), str(item.option("prompt_depth"))
        generation = Generation(llm.model, prompts, params, counter, policy, depth)
        counter.watch(generation)
        sequences = generation.run()
        num_run, num_decided = counter.num_run, counter.num_tokens
    else:
        sequences = Generation(llm.model, prompts, params, controller).run()
        num_decided = [len(sequence.token_ids) - 1 for sequence in sequences]
        paths = [sequence.path for sequence in sequences]
        num_run = [path.budget * count for path, count in zip(paths, num_decided, strict=True) if path is not None]
    for sequence in sequences:
        if sequence.request.error is not None:
            raise sequence.request.error  # no score stands for it
    assert llm.tokenizer is not None, "a context's models have their tokenizers"
    texts = [str(llm.tokenizer.decode(sequence.token_ids, skip_special_tokens=True)) for sequence in sequences]
    scores = rouge_l([row.reference for row in rows], texts)
    return {
        "rows": [row.index for row in rows],
        "rouge_l": [round(score, 6) for score in scores],
        "num_tokens": [len(sequence.token_ids) for sequence in sequences],
        "num_run": num_run,
        "num_decided": num_decided,
        "token_ids": [sequence.token_ids for sequence in sequences],
    }


def timed_item(setup: Setup, controllers: Sequence[ControllerFolder], batch: int) -> WorkItem:
    """The item that times decode steps of ``batch`` sequences, controllers and uniform paths in turns."""
    budgets = sorted({*setup.candidates, setup.num_layers})
    content = {
        "controllers": {controller.label: controller.hash for controller in controllers},
        "paths": {path: path for path in (path_text(budget, setup.num_layers) for budget in budgets)},
    }
    text = json.dumps(content, sort_keys=True)
    return machine_item(setup, "time-controlled", text, batch=batch, dtype=setup.dtype, rounds=setup.timed_rounds)


def run_timed(item: WorkItem, context: Context) -> dict[str, Any]:
    """By label, round by round, the milliseconds per generated token of a decode step: its time over its sequences.

    Controllers take the likelier decisions; a batch's sequences need not run the same layers.
    """
    setup = context.setup
    batch = int(item.option("batch"))
    rows = context.prompts(setup.checkpoint.hash, item.split).rows
    prompts = [list(rows[place % len(rows)].prompt_ids) for place in range(batch)]
    content = json.loads(item.path)

    def along(path: str) -> Any:
        llm = context.llm(setup.checkpoint.hash)
        return lambda: decode_ms(llm, prompts, LayerPath.parse(path, setup.num_layers, llm.model)) / batch

    def steered(controller_hash: str) -> Any:
        folder = folder_of(setup, controller_hash)
        llm = context.llm(folder.checkpoint.hash)
        controller = loaded(setup, controller_hash, llm, ARGMAX)
        return lambda: decode_ms(llm, prompts, controller, folder.kv_policy, folder.prompt_depth) / batch

    tasks = {label: along(path) for label, path in content["paths"].items()}
    tasks |= {label: steered(controller_hash) for label, controller_hash in content["controllers"].items()}
    return timed_in_turns(tasks, setup.timed_rounds)


def folder_of(setup: Setup, controller_hash: str) -> ControllerFolder:
    """The controller of the setup with that hash."""
    for controller in setup.controllers:
        if controller.hash == controller_hash:
            return controller
    raise ValueError(f"eval: the controller must be one of the setup, got hash {controller_hash!r}.")


def loaded(setup: Setup, controller_hash: str, llm: LLM, seed: int) -> Any:
    """The controller with that hash on the device of ``llm``: likelier decisions for seed 0, else sampled ones."""
    folder = folder_of(setup, controller_hash)
    device: torch.device = llm.model.device
    return load_controller(folder.directory, device, sample=seed != ARGMAX, seed=seed)
