"""A fine-tune in a folder: full depth first, then from there one stage a path. Started again, it goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import OPTForCausalLM, PreTrainedTokenizerBase

from dynskip.data.corpus import read_corpus
from dynskip.data.examples import Example, encode_examples
from dynskip.data.provenance import provenance
from dynskip.data.templates import CHAT_TEMPLATES
from dynskip.files import whole_folder, write_json
from dynskip.models.source_files import read_config, read_source
from dynskip.models.tokenizer import check_vocabulary, read_tokenizer
from dynskip.paths import LayerPath
from dynskip.training import attention
from dynskip.training.curves import write_curves
from dynskip.training.fine_tune.config import FineTuneConfig, differences
from dynskip.training.fine_tune.trainer import FineTuneTrainer
from dynskip.training.response_loss import ResponseLossOPT
from dynskip.training.schedule import PathMenu


@dataclass(frozen=True, slots=True)
class Stage:
    """One training of a run: its folder's name, the paths it draws from, and the stage whose model it starts with."""

    name: str
    paths: tuple[str, ...]
    source: str | None = "full"


def stages(config: FineTuneConfig) -> list[Stage]:
    """The stages of a run in their order. A stage ``full-continued`` is the full path trained as long as the others."""
    later = [Stage("full-continued" if path == "full" else path.replace(":", "-"), (path,)) for path in config.paths]
    menu = [Stage("menu", config.menu)] if config.menu else []
    return [Stage("full", ("full",), source=None), *later, *menu]


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; ValueError where it has none, or none with padding and an end."""
    tokenizer: PreTrainedTokenizerBase = read_tokenizer(source, "load_tokenizer")
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"load_tokenizer: {name} must be known to the tokenizer of {source}, got None.")
    return tokenizer


def load_for_training(source: str, device: torch.device, kind: type[OPTForCausalLM] = ResponseLossOPT) -> Any:
    """The fp32 model of a checkpoint, without LayerDrop."""
    found = read_source(source, "load_for_training")
    model = kind.from_pretrained(None, config=found.config, state_dict=found.tensors, dtype=torch.float32)
    model.config.layerdrop = model.model.decoder.layerdrop = 0.0
    # Ours knows no dropout of attention weights, and is written for a CPU.
    if device.type == "cpu" and not model.config.attention_dropout:
        model.set_attn_implementation(attention.register())
    return model


def check_length(max_tokens: int, source: str) -> None:
    """Raise ValueError where rows of ``max_tokens`` tokens do not fit the positions of the checkpoint."""
    positions = read_config(source, "train").max_position_embeddings
    if max_tokens > positions:
        raise ValueError(
            f"train: --max-length must be at most {positions}, the positions of {source}, got {max_tokens}. "
            f"Pass --max-length {positions}."
        )


def load_rows(
    config: FineTuneConfig, data: Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], list[Example], dict[str, Any]]:
    """The examples to train on, those to validate with, and how many of what the data held."""
    corpus = read_corpus([data], config.split_seed)
    examples = encode_examples(tokenizer, corpus.train, config.max_tokens, config.template, config.max_prompt_tokens)
    validation = encode_examples(tokenizer, corpus.validation, config.max_tokens, config.template)
    validation = validation[: config.num_validation_rows]
    if not validation:
        raise ValueError("load_rows: data must leave a row to validate with, got none. Give more rows.")
    counts = {
        "rows": {"train": len(corpus.train), "validation": len(corpus.validation), "test": len(corpus.test)},
        "kept": {"train": len(examples), "validation": len(validation)},
        "train_tokens": sum(example.num_tokens for example in examples),
        "train_response_tokens": sum(len(example.response_ids) for example in examples),
    }
    return examples, validation, counts


def is_first_process(device: torch.device) -> bool:
    """Whether this process is the one that writes, of those that a launcher started."""
    from accelerate import PartialState  # type: ignore[import-untyped]  # it ships no types

    return bool(PartialState(cpu=device.type == "cpu").is_main_process)


def record_start(directory: Path, started: dict[str, Any], counts: dict[str, Any], device: torch.device) -> None:
    """Write ``run.json``, or add a start to it; ValueError, naming the difference, for a run of another config."""
    record = directory / "run.json"
    new = json.loads(json.dumps(started))
    old = json.loads(record.read_text()) if record.exists() else None
    if old is not None:
        changed = differences(old["config"], new["config"])
        if old["data"] != new["data"]:
            changed.append(f"data {old['data']} there, {new['data']} asked")
        if changed:
            raise ValueError(
                f"record_start: config must equal that of the run in {directory}, got {'; '.join(changed)}. "
                "Give the run's own options or another folder."
            )
    if is_first_process(device):
        directory.mkdir(parents=True, exist_ok=True)
        resumed = [] if old is None else [*old["resumed"], {key: new[key] for key in ("commit", "started")}]
        write_json(record, {**(old or new), "counts": counts, "resumed": resumed})


def export_model(
    model: OPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    directory: Path,
    about: dict[str, Any] | None = None,
) -> None:
    """Write the model and its tokenizer so that the folder is there whole or not at all."""
    # The Trainer switches the cache off, for its own passes; whoever generates wants it.
    model.config.use_cache = True
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATES[template]
    with whole_folder(directory) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_json(partial / "fine_tune.json", {"template": template, **(about or {})})


class FineTuneRun:
    """One fine-tune in ``directory``; in each stage's folder ``model/`` is its best model with the tokenizer."""

    def __init__(
        self,
        config: FineTuneConfig,
        data: Path,
        directory: Path,
        device: torch.device | None = None,
        progress: bool = True,
    ) -> None:
        self.config = config
        self.directory = directory
        self._data = data
        self._progress = progress
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(default) if device is None else device

    def train(self) -> dict[str, Path]:
        """Per stage the folder of its model, all stages finished."""
        torch.manual_seed(self.config.seed)
        tokenizer = load_tokenizer(self.config.model)
        check_length(self.config.max_tokens, self.config.model)
        examples, validation, counts = load_rows(self.config, self._data, tokenizer)
        record_start(self.directory, provenance(dataclasses.asdict(self.config), [self._data]), counts, self._device)
        models: dict[str, Path] = {}
        for number, stage in enumerate(stages(self.config)):
            source = self.config.model if stage.source is None else str(models[stage.source])
            models[stage.name] = self._train_stage(number, stage, source, tokenizer, examples, validation)
        return models

    def _train_stage(
        self,
        number: int,
        stage: Stage,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        validation: Sequence[Example],
    ) -> Path:
        directory = self.directory / stage.name
        if (directory / "done.json").exists():
            return directory / "model"
        model = load_for_training(source, self._device)
        check_vocabulary(tokenizer, model.config.vocab_size, source, "train")
        num_layers = model.config.num_hidden_layers
        paths = tuple(LayerPath.parse(path, num_layers) for path in stage.paths)
        used = {layer for path in paths for layer in path.layers}
        for index, layer in enumerate(model.model.decoder.layers):
            layer.requires_grad_(index in used)
        trainer = FineTuneTrainer(
            model,
            directory,
            self.config,
            PathMenu(paths, (1.0,) * len(paths), (1.0,) * len(paths)),
            examples,
            validation,
            pad_id=tokenizer.pad_token_id,
            num_steps=self.config.steps(len(examples), full=stage.source is None),
            # Every later stage sees the same batches, so that they differ in their layers alone.
            seed=self.config.seed * 1000 + min(number, 1),
            use_cpu=self._device.type == "cpu",
            progress=self._progress,
        )
        best = trainer.run()
        if is_first_process(self._device):
            self._export(stage, directory, best, tokenizer, trainer.history)
        trainer.accelerator.wait_for_everyone()
        return directory / "model"

    def _export(
        self,
        stage: Stage,
        directory: Path,
        best: Path,
        tokenizer: PreTrainedTokenizerBase,
        history: Sequence[dict[str, Any]],
    ) -> None:
        scores = [entry for entry in history if "eval_loss" in entry]
        step = int(best.name.split("-")[1])
        result = {
            "paths": list(stage.paths),
            "template": self.config.template,
            "step": step,
            "num_steps": max(entry["step"] for entry in history),
            "validation": next(entry for entry in scores if entry["step"] == step),
            "validation_rows": self.config.num_validation_rows,
        }
        model = OPTForCausalLM.from_pretrained(best, dtype=torch.float32)
        export_model(model, tokenizer, self.config.template, directory / "model", result)
        write_curves(directory, history)
        write_json(directory / "done.json", result)


def end_processes() -> None:
    """Wait for all processes of a distributed run, and take down what connects them; nothing where one runs alone.

    A process that ends with its connections still up may be aborted by them, after its work is done.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
