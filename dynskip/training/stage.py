"""What every run does: say how it was started, train its stages one after the other, export what they gave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import OPTForCausalLM, PreTrainedTokenizerBase

from dynskip.files import write_json
from dynskip.training.resumable import ResumableTrainer

AnyTrainer = TypeVar("AnyTrainer", bound=ResumableTrainer)
Record = dict[str, Any]


def processes(use_cpu: bool) -> Any:
    """The processes that a launcher started, this one among them: accelerate's PartialState."""
    from accelerate import PartialState  # type: ignore[import-untyped]  # it ships no types

    return PartialState(cpu=use_cpu)


def end_processes() -> None:
    """Wait for all processes of a distributed run, and take down what connects them; nothing where one runs alone.

    A process that ends with its connections still up may be aborted by them, after its work is done.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def record_start(
    directory: Path,
    started: Record,
    check: Callable[[Record, Record, Path], None],
    *,
    use_cpu: bool,
    kept: tuple[str, ...] = ("commit", "started"),
    **found: object,
) -> None:
    """Write ``run.json``, or add to it a start with what it says under the names ``kept``.

    check: raises ValueError where a run of the second record cannot go on with what one of the first has left in the
    directory. found: what the run says besides.
    """
    path = directory / "run.json"
    new = json.loads(json.dumps(started))
    old = json.loads(path.read_text()) if path.exists() else None
    if old is not None:
        check(old, new, directory)
    if processes(use_cpu).is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        resumed = [] if old is None else [*old["resumed"], {name: new[name] for name in kept}]
        write_json(path, {**(old or new), **found, "resumed": resumed})


def run_stage(directory: Path, make_trainer: Callable[[], AnyTrainer], export: Callable[[AnyTrainer], Record]) -> None:
    """Train to the end and export, unless ``done.json`` in ``directory`` says that both have happened.

    export: called in the first process; returns what ``done.json`` says.
    """
    done = directory / "done.json"
    if done.exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer()
    trainer.run()
    if trainer.is_world_process_zero():
        write_json(done, export(trainer))
    trainer.accelerator.wait_for_everyone()


def save_model(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a trained model and its tokenizer."""
    # The Trainer switches the cache off, for its own passes; generation wants it.
    model.config.use_cache = True
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
