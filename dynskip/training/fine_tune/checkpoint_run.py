"""What runs on a checkpoint share: its model, its tokenizer, the rows to train on, the record of the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynskip.data.corpus import read_corpus
from dynskip.data.examples import Example, encode_examples
from dynskip.data.templates import CHAT_TEMPLATES
from dynskip.files import whole_folder, write_json
from dynskip.models.hf_model import hf_class
from dynskip.models.registry import decoder_config
from dynskip.models.source_files import read_config, read_source
from dynskip.models.tokenizer import check_vocabulary, read_tokenizer
from dynskip.models.weights import Deferred
from dynskip.training import attention
from dynskip.training.fine_tune.config import FineTuneConfig, check_same_run
from dynskip.training.response_loss import with_response_loss
from dynskip.training.stage import default_device, record_start, save_model


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; ValueError where it has none, or none with padding and an end."""
    tokenizer: PreTrainedTokenizerBase = read_tokenizer(source, "load_tokenizer")
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"load_tokenizer: {name} must be known to the tokenizer of {source}, got None.")
    return tokenizer


def load_for_training(source: str, device: torch.device, *, with_loss: bool = True) -> Any:
    """The fp32 model of a checkpoint, of transformers' own class and without LayerDrop.

    with_loss: its pass ends in the loss of responses, as `with_response_loss` says.
    """
    found = read_source(source, "load_for_training")
    architecture = found.architecture
    if architecture.layer_dropout is not None:
        setattr(found.config, architecture.layer_dropout, 0.0)
    kind = hf_class(found.config)
    tensors = {name: held.read() if isinstance(held, Deferred) else held for name, held in found.tensors.items()}
    model = (with_response_loss(kind) if with_loss else kind).from_pretrained(
        None, config=found.config, state_dict=tensors, dtype=torch.float32
    )
    # Ours knows no dropout of attention weights and no ALiBi, and is written for a CPU.
    has_dropout = getattr(model.config, architecture.attention_dropout)
    if device.type == "cpu" and not has_dropout and not found.decoder_config.alibi:
        model.set_attn_implementation(attention.register())
    return model


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


@dataclass(eq=False)
class CheckpointRun:
    """A run in ``directory`` that trains on a checkpoint, with the rows of an Alpaca file, as ``training`` says.

    tokenizer, examples, validation: there after ``start``.
    """

    training: FineTuneConfig
    data: Path
    directory: Path
    device: torch.device = field(default_factory=default_device)
    progress: bool = True
    tokenizer: PreTrainedTokenizerBase = field(init=False)
    examples: Sequence[Example] = field(init=False)
    validation: Sequence[Example] = field(init=False)

    def start(self, config: dict[str, Any]) -> None:
        """Seed, read tokenizer and rows, and put the start of a run of ``config`` on record.

        Raises ValueError for a checkpoint or data that cannot be trained with, and for the folder of another run.
        """
        torch.manual_seed(self.training.seed)
        self.tokenizer = load_tokenizer(self.training.model)
        positions = decoder_config(read_config(self.training.model, "train")).max_positions
        if self.training.max_tokens > positions:
            raise ValueError(
                f"train: --max-length must be at most {positions}, the positions of {self.training.model}, "
                f"got {self.training.max_tokens}. Pass --max-length {positions}."
            )
        self.examples, self.validation, counts = load_rows(self.training, self.data, self.tokenizer)
        use_cpu = self.device.type == "cpu"
        record_start(self.directory, config, [self.data], check_same_run, use_cpu=use_cpu, counts=counts)

    def load(self, source: str, *, with_loss: bool = True) -> Any:
        """The model of a checkpoint; ValueError where the tokenizer does not fit it."""
        model = load_for_training(source, self.device, with_loss=with_loss)
        check_vocabulary(self.tokenizer, model.config.vocab_size, source, "train")
        return model

    def export(self, model: PreTrainedModel, directory: Path, about: dict[str, Any] | None = None) -> None:
        """Write a trained model and the tokenizer so that the folder is there whole or not at all."""
        template = self.training.template
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = CHAT_TEMPLATES[template]
        with whole_folder(directory) as partial:
            save_model(model, self.tokenizer, partial)
            write_json(partial / "fine_tune.json", {"template": template, **(about or {})})
