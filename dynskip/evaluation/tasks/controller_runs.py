"""Texts that a learned controller steers: the tasks "controlled", "controlled-likelihood" and "time-controlled"."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from dynskip.controllers import TokenController, load_controller
from dynskip.data.batches import group_in_order
from dynskip.engine.closed_batch import Generation
from dynskip.evaluation.sweep.checkpoints import ControllerFolder
from dynskip.evaluation.sweep.context import Context, shard_items
from dynskip.evaluation.sweep.dataset import Row
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import WorkItem
from dynskip.evaluation.tasks.controller_decisions import ResponseDecisions, SequenceCounter
from dynskip.evaluation.tasks.generations import rouge_l
from dynskip.evaluation.tasks.prompt_facts import TOKENS_PER_BATCH, padded
from dynskip.evaluation.tasks.timing import decode_ms, machine_item, timed_in_turns
from dynskip.llm import LLM
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams

ARGMAX = 0


def controlled_items(setup: Setup, controller: ControllerFolder, seed: int) -> list[WorkItem]:
    """The items that generate greedily while ``controller`` decides: the likelier way for seed 0, else sampled."""
    return _items(setup, "controlled", controller, seed)


def controlled_likelihood_items(setup: Setup, controller: ControllerFolder, seed: int) -> list[WorkItem]:
    """The items that score the references while ``controller`` decides, teacher-forced."""
    return _items(setup, "controlled-likelihood", controller, seed, True, num_rows=setup.num_controlled)


def _items(
    setup: Setup, task: str, controller: ControllerFolder, seed: int, grows: bool = False, **options: int
) -> list[WorkItem]:
    return shard_items(
        setup,
        task,
        controller.checkpoint,
        controller.label,
        setup.split,
        seed,
        grows,
        controller=controller.hash,
        dtype=setup.dtype,
        kv_policy=controller.kv_policy or "",
        noise="by sequence",
        prompt_depth=controller.prompt_depth,
        **options,
    )


def run_controlled(item: WorkItem, context: Context) -> dict[str, Any]:
    """Row by row of the shard: ROUGE-L, number of new tokens, layers that decided tokens ran, and how many those were.

    layer_runs: [L], how many decided tokens of the shard ran each layer. The token that follows the prompt is not
    decided on, nor is the last one run.
    """
    setup = context.setup
    llm = context.llm(item.checkpoint)
    rows = context.shard(item)
    controller = loaded(setup, str(item.option("controller")), llm, item.seed)
    params = [SamplingParams(max_tokens=setup.max_tokens)] * len(rows)
    prompts = [list(row.prompt_ids) for row in rows]
    if isinstance(controller, TokenController):
        counter = SequenceCounter(controller, _keys(rows), llm.model.num_layers)
        policy, depth = str(item.option("kv_policy")), str(item.option("prompt_depth"))
        generation = Generation(llm.model, prompts, params, counter, policy, depth)
        counter.watch(generation)
        sequences = generation.run()
        counts = _counted(counter.num_run, counter.num_tokens, counter.layer_runs)
    else:
        sequences = Generation(llm.model, prompts, params, controller).run()
        paths = [sequence.path for sequence in sequences]
        counts = _along([path for path in paths if path is not None], [len(s.token_ids) - 1 for s in sequences])
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
        **counts,
        "token_ids": [sequence.token_ids for sequence in sequences],
    }


@torch.no_grad()
def run_controlled_likelihood(item: WorkItem, context: Context) -> dict[str, Any]:
    """Row by row of the shard: nats of the reference and its tokens, and the counts of ``run_controlled``."""
    llm = context.llm(item.checkpoint)
    rows = context.shard(item)
    controller = loaded(context.setup, str(item.option("controller")), llm, item.seed)
    nats = [0.0] * len(rows)
    counts: dict[str, list[int]] = {"num_run": [0] * len(rows), "num_decided": [0] * len(rows)}
    layer_runs = np.zeros(llm.model.num_layers, dtype=np.int64)
    lengths = [len(row.prompt_ids) + len(row.response_ids) for row in rows]
    for indices in group_in_order(lengths, TOKENS_PER_BATCH):
        batch = [rows[index] for index in indices]
        input_ids, attention_mask, scored = padded(batch, llm.model.device)
        if isinstance(controller, TokenController):
            sizes = [len(row.prompt_ids) for row in batch], [lengths[index] for index in indices]
            decisions = ResponseDecisions(controller, _keys(batch), llm.model.num_layers, *sizes)
            policy = str(item.option("kv_policy"))
            logits = llm.model(input_ids, attention_mask, decisions, kv_policy=policy).logits
            found = _counted(decisions.num_run, decisions.num_tokens, decisions.layer_runs)
        else:
            prompts = [torch.tensor(row.prompt_ids, device=llm.model.device) for row in batch]
            paths = controller.choose_paths(prompts, [llm.model.embed_tokens(prompt) for prompt in prompts])
            logits = llm.model(input_ids, attention_mask, paths).logits
            found = _along(paths, [len(row.response_ids) - 1 for row in batch])
        layer_runs += found["layer_runs"]
        for place, (index, row) in enumerate(zip(indices, batch, strict=True)):
            predicted = logits[place, scored[place]].float().cpu()
            nats[index] = float(cross_entropy(predicted, torch.tensor(row.response_ids), reduction="sum"))
            for name, of_rows in counts.items():
                of_rows[index] = found[name][place]
    if not np.isfinite(nats).all():
        raise ValueError("run_controlled_likelihood: logits must be finite, got NaN or infinity. Check the weights.")
    return {
        "rows": [row.index for row in rows],
        "nats": [round(value, 5) for value in nats],
        "num_tokens": [len(row.response_ids) for row in rows],
        **counts,
        "layer_runs": [int(count) for count in layer_runs],
    }


def _keys(rows: Sequence[Row]) -> list[int]:
    """What the noise of each row is drawn by: its place in the split."""
    return [row.index + 1 for row in rows]


def _counted(num_run: list[int], num_decided: list[int], layer_runs: list[int]) -> dict[str, list[int]]:
    return {"num_run": num_run, "num_decided": num_decided, "layer_runs": layer_runs}


def _along(paths: Sequence[LayerPath], num_decided: list[int]) -> dict[str, list[int]]:
    """The counts of sequences each of which runs one path."""
    pairs = list(zip(paths, num_decided, strict=True))
    layer_runs = sum(path.mask.long() * count for path, count in pairs)
    return _counted([path.budget * count for path, count in pairs], num_decided, torch.as_tensor(layer_runs).tolist())


def timed_item(setup: Setup, controllers: Sequence[ControllerFolder], batch: int) -> WorkItem:
    """The item that times decode steps of ``batch`` sequences, controllers and uniform paths in turns."""
    budgets = sorted({*setup.candidates, setup.num_layers})
    content = {
        "controllers": {controller.label: controller.hash for controller in controllers},
        "paths": {path: path for path in (setup.path_of(budget) for budget in budgets)},
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
