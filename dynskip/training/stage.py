"""What every run does: say how it was started, train its stages one after the other, export what they gave."""

from __future__ import annotations

import csv
import gc
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynskip.files import file_hash, write_json
from dynskip.host import commit
from dynskip.training.resumable import ResumableTrainer

AnyTrainer = TypeVar("AnyTrainer", bound=ResumableTrainer)
Record = dict[str, Any]


def processes(use_cpu: bool) -> Any:
    """The processes that a launcher started, this one among them: accelerate's PartialState."""
    from accelerate import PartialState  # type: ignore[import-untyped]  # it ships no types

    return PartialState(cpu=use_cpu)


def end_processes() -> None:
    """Wait for all processes of a distributed run, and take down what connects them; nothing where one runs alone.

    A process that ends with its connections still up may be aborted by them, after its work is done. A model that waits
    for the collector keeps them up.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        gc.collect()
        torch.distributed.destroy_process_group()


def record_start(
    directory: Path,
    config: Record,
    data: Sequence[Path],
    check: Callable[[Record, Record, Path], None],
    *,
    use_cpu: bool,
    kept: tuple[str, ...] = ("commit", "started"),
    **found: object,
) -> None:
    """Write ``run.json``, what one needs to know to repeat the run; or add to it a start with its names ``kept``.

    check: raises ValueError where a run of the second record cannot go on with what one of the first has left in the
    directory. found: what the run says besides.
    """
    started = {
        "config": config,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "accelerate")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "num_threads": torch.get_num_threads(),
        "commit": commit(),
        "data": {path.name: file_hash(path) for path in data},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    path = directory / "run.json"
    new = json.loads(json.dumps(started))
    old = json.loads(path.read_text()) if path.exists() else None
    if old is not None:
        check(old, new, directory)
    if processes(use_cpu).is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        resumed = [] if old is None else [*old["resumed"], {name: new[name] for name in kept}]
        write_json(path, {**(old or new), **found, "resumed": resumed})


def check_same_config(
    old: Record, new: Record, directory: Path, free: frozenset[str], defaults: Mapping[str, object] | None = None
) -> None:
    """Raise ValueError, naming each difference, where a run of the record ``new`` cannot go on with one of ``old``.

    free: fields of the config that may differ. defaults: of fields that records of older versions lack.
    """
    before, after = ({**record["config"], "data": record["data"]} for record in (old, new))
    before = {**{name: value for name, value in (defaults or {}).items() if name in after}, **before}
    changed = [
        f"{name} {before.get(name)!r} there, {after.get(name)!r} asked"
        for name in sorted({*before, *after} - free)
        if before.get(name) != after.get(name)
    ]
    if changed:
        raise ValueError(
            f"record_start: config must equal that of the run in {directory}, got {'; '.join(changed)}. "
            "Give the run's own options or another folder."
        )


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


def write_curves(directory: Path, history: Sequence[dict[str, Any]]) -> list[Path]:
    """The files written: ``curves.json``, ``curves.csv``, ``curves.png``.

    history: a Trainer's log, one entry a step with ``loss``, one an evaluation with ``eval_loss``.
    """
    paths = [directory / "curves.json", directory / "curves.csv"]
    write_json(paths[0], list(history))
    names = ["step", *sorted({name for entry in history for name in entry} - {"step"})]
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(history)
    if find_spec("matplotlib") is not None:
        paths.append(directory / "curves.png")
        _draw(paths[2], history)
    return paths


def _draw(path: Path, history: Sequence[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, marker, label in (("loss", "", "training batch"), ("eval_loss", "o", "validation")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per response token")
    axes.legend()
    figure.savefig(path, dpi=120)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a trained model and its tokenizer."""
    # The Trainer switches the cache off, for its own passes; generation wants it.
    model.config.use_cache = True
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
