"""A training for paths in a folder: texts in the model's own words, then what is trained. Killed, it goes on."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dynskip.causal_lm import CausalLM
from dynskip.data.conversations import read_rows, read_training_rows
from dynskip.data.examples import Example, encode_examples
from dynskip.data.own_texts import Writing, write_texts
from dynskip.data.templates import CHAT
from dynskip.files import whole_folder
from dynskip.found import FOUND_PATHS, FoundPaths
from dynskip.llm import LLM
from dynskip.paths import LayerPath
from dynskip.training.fine_tune.checkpoint_run import load_for_training, load_tokenizer
from dynskip.training.paths.config import PathsConfig, check_same_run, default_menu
from dynskip.training.paths.model import PathsModel, with_adapter
from dynskip.training.paths.trainer import PathsTrainer
from dynskip.training.stage import default_device, record_start, run_stage, save_model, write_curves
from dynskip.version import __version__

TEXTS = "texts.jsonl"


@dataclass(eq=False)
class PathsRun:
    """One training of ``config`` in ``directory``: ``texts.jsonl`` where the model answers, ``training/`` with
    checkpoints and curves, and ``adapter/``, or ``model/`` where all weights are trained, with the paths of the menu as
    ``found:B``.

    data: files of prompts, as `read_rows` knows them.
    """

    config: PathsConfig
    data: Sequence[Path]
    directory: Path
    device: torch.device = field(default_factory=default_device)
    progress: bool = True

    def train(self) -> Path:
        """The folder of what was trained, which ``LLM`` takes: as ``adapter``, or as the model."""
        menu, examples = self._prepare()
        folder = self.directory / ("adapter" if self.config.method == "lora" else "model")
        make_trainer = partial(self._make_trainer, menu, examples)
        run_stage(self.directory / "training", make_trainer, partial(self._export, folder, menu))
        return folder

    def _prepare(self) -> tuple[list[LayerPath], list[Example]]:
        """The menu's paths and the texts; what writes them is gone afterwards."""
        llm = LLM(self.config.model, device=self.device)
        num_layers = llm.model.num_layers
        texts = self.config.menu or default_menu(num_layers)
        menu = [LayerPath.parse(text, num_layers, llm.model) for text in texts]
        budgets = [path.budget for path in menu]
        if len(set(budgets)) < len(budgets):
            raise ValueError(f"PathsConfig: menu must have one path of each number of layers, got {', '.join(texts)}.")
        use_cpu = self.device.type == "cpu"
        layers = {text: list(path.layers) for text, path in zip(texts, menu, strict=True)}
        record_start(
            self.directory,
            dataclasses.asdict(self.config),
            self.data,
            check_same_run,
            use_cpu=use_cpu,
            kept=("config", "commit", "started"),
            layers=layers,
        )
        torch.manual_seed(self.config.seed)
        if self.config.answers == "data":
            assert llm.tokenizer is not None, "who writes has words"
            return menu, self._answered_rows(llm.tokenizer)
        prompts = [row.user_turn for path in self.data for row in read_rows(path)]
        writing = Writing(
            self.config.num_own_turns,
            self.config.num_data_turns,
            answer_temperature=self.config.answer_temperature,
            seed=self.config.seed,
        )
        return menu, write_texts(llm, prompts, writing, self.directory / TEXTS, self.progress)

    def _answered_rows(self, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Rows of the data with their own answers, drawn by the seed, as prompts stand in the chat template."""
        config = self.config
        rows = [row for path in self.data for row in read_training_rows(path)]
        random.Random(config.seed).shuffle(rows)
        template = "alpaca" if tokenizer.chat_template is None else CHAT
        examples: list[Example] = []
        for start in range(0, len(rows), config.num_data_turns):
            if len(examples) < config.num_data_turns:
                some = rows[start : start + config.num_data_turns]
                examples += encode_examples(tokenizer, some, config.max_tokens, template)
        if len(examples) < config.num_data_turns:
            raise ValueError(
                f"train: data must hold {config.num_data_turns} rows to train on that have an answer and fit "
                f"{config.max_tokens} tokens, got {len(examples)}. Ask for fewer, or give more data."
            )
        return examples[: config.num_data_turns]

    def _make_trainer(self, menu: Sequence[LayerPath], examples: Sequence[Example]) -> PathsTrainer:
        config = self.config
        use_cpu = self.device.type == "cpu"
        model = load_for_training(config.model, self.device, with_loss=False)
        adapter = None
        if config.method == "lora":
            torch.manual_seed(config.seed)
            model.requires_grad_(False)
            if config.precision == "bfloat16":
                for weight in model.parameters():  # buffers stay: frequencies of positions want all their bits
                    weight.data = weight.data.to(torch.bfloat16)
            adapter = with_adapter(model, config.rank, config.adapter)
        cut = [_cut(example, config.max_tokens) for example in examples]
        random.Random(f"{config.seed} held back").shuffle(cut)
        validation, training = cut[: config.num_validation_texts], cut[config.num_validation_texts :]
        tokenizer = load_tokenizer(config.model)
        return PathsTrainer(
            config,
            PathsModel(model, adapter, config.loss),
            menu,
            training,
            validation,
            tokenizer.pad_token_id,
            self.directory / "training",
            use_cpu=use_cpu,
            progress=self.progress,
        )

    def _export(self, folder: Path, menu: Sequence[LayerPath], trainer: PathsTrainer) -> dict[str, Any]:
        history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        write_curves(trainer.directory, history)
        adapter = trainer.paths_model.adapter
        with whole_folder(folder) as partial_folder:
            if adapter is None:
                save_model(trainer.paths_model.model, load_tokenizer(self.config.model), partial_folder)
                model = CausalLM.from_pretrained(partial_folder)
            else:
                adapter.peft_config["default"].base_model_name_or_path = self.config.model
                if self.config.precision == "bfloat16":
                    adapter.to(torch.bfloat16)
                adapter.save_pretrained(str(partial_folder), save_embedding_layers=False)
                (partial_folder / "README.md").unlink(missing_ok=True)  # a form of a card, not filled in
                model = CausalLM.from_pretrained(self.config.model, adapter=partial_folder)
            # `found:B` is then what was trained.
            layers = {path.budget: path.layers for path in menu if path.budget < path.num_layers}
            conditions = {"paths": {"trained": self.config.model, "dynskip": __version__}}
            found = FoundPaths(model.weights_digest, model.num_layers, layers, conditions=conditions)
            found.write(partial_folder / FOUND_PATHS)
        return next(entry for entry in reversed(history) if "eval_loss" in entry)


def _cut(example: Example, max_tokens: int) -> Example:
    room = max(1, max_tokens - len(example.prompt_ids))
    return dataclasses.replace(
        example, prompt_ids=example.prompt_ids[: max_tokens - 1], response_ids=example.response_ids[:room]
    )
