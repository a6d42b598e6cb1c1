"""A training run in a folder: tokenizer, phases, exported model. Started again after a kill, it goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from dynskip.data.corpus import Corpus, read_corpus
from dynskip.data.examples import Example, encode_examples, encode_windows
from dynskip.files import whole_folder, write_json
from dynskip.training import attention
from dynskip.training.pretrain.config import ModelShape, RunConfig, check_same_run
from dynskip.training.pretrain.tokenizer import train_tokenizer, training_texts
from dynskip.training.pretrain.trainer import PathTrainer
from dynskip.training.resumable import check_numbers
from dynskip.training.stage import default_device, record_start, run_stage, save_model


def new_model(shape: ModelShape, tokenizer: PreTrainedTokenizerFast, seed: int) -> OPTForCausalLM:
    """A fresh fp32 model whose layers change nothing yet: the matrices that write to the residual stream are zero,
    so a layer that a path adds late does not disturb what the others have learned."""
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        word_embed_proj_dim=shape.hidden_size,
        ffn_dim=shape.ffn_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=shape.max_positions,
        do_layer_norm_before=True,
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        init_std=0.02,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config._attn_implementation = attention.register()
    model = OPTForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            heads = layer.self_attn
            heads.out_proj.weight.zero_()
            layer.fc2.weight.zero_()
            for matrix in (heads.q_proj, heads.k_proj, heads.v_proj, layer.fc1):
                matrix.weight.normal_(std=0.5 * shape.hidden_size**-0.5)
    return model


@dataclass(eq=False)
class TrainingRun:
    """One run in ``directory``. ``evaluate`` maps model, examples and pad id to named scores."""

    config: RunConfig
    data: Sequence[Path]
    directory: Path
    evaluate: Callable[[OPTForCausalLM, Sequence[Example], int], dict[str, float]]
    progress: bool = True

    def _tokenizer(self, corpus: Corpus) -> PreTrainedTokenizerFast:
        directory = self.directory / "tokenizer"
        if not (directory / "complete").exists():
            shape = self.config.shape
            tokenizer = train_tokenizer(
                training_texts(corpus), shape.vocab_size, shape.max_positions, progress=self.progress
            )
            if len(tokenizer) != shape.vocab_size:
                raise ValueError(
                    f"TrainingRun: vocab_size must be at most what the texts give ({len(tokenizer)}), "
                    f"got {shape.vocab_size}. Ask for fewer tokens or give more text."
                )
            tokenizer.save_pretrained(directory)
            (directory / "complete").touch()
        return PreTrainedTokenizerFast.from_pretrained(directory)

    def train(self) -> Path:
        """The folder of the exported bf16 model with its tokenizer and scores, after all phases."""
        record_start(
            self.directory,
            dataclasses.asdict(self.config),
            self.data,
            check_same_run,
            use_cpu=not torch.cuda.is_available(),
            kept=("config", "commit", "started"),
        )
        corpus = read_corpus(self.data, self.config.split_seed)
        tokenizer = self._tokenizer(corpus)
        pad_id = tokenizer.pad_token_id
        max_tokens = self.config.shape.max_positions
        examples = encode_examples(tokenizer, corpus.train, max_tokens)
        windows = encode_windows(tokenizer, corpus.passages, self.config.window)
        validation = encode_examples(tokenizer, corpus.validation, max_tokens)
        write_json(
            self.directory / "corpus.json",
            {
                "train_rows": len(examples),
                "train_tokens": sum(example.num_tokens for example in examples),
                "passage_tokens": len(windows) * self.config.window,
                "validation_rows": len(validation),
                "validation_bytes": sum(example.num_bytes for example in validation),
            },
        )
        watched = validation[: self.config.num_watched_rows]
        folders = [self.directory / phase.name for phase in self.config.phases]

        def make_trainer(number: int) -> PathTrainer:
            if number == 0:
                model = new_model(self.config.shape, tokenizer, self.config.seed)
            else:
                model = _load(folders[number - 1] / "model", torch.float32)
            return PathTrainer(
                model,
                folders[number],
                self.config,
                self.config.phases[number],
                examples,
                windows,
                pad_id=pad_id,
                seed=self.config.seed * 1000 + number,
                score=(lambda model: self.evaluate(model, watched, pad_id)) if watched else None,
                progress=self.progress,
            )

        def export(trainer: PathTrainer) -> dict[str, Any]:
            trainer.decoder_model.save_pretrained(trainer.directory / "model")
            return {"num_steps": trainer.state.global_step, "elapsed_s": round(trainer.clock.elapsed_s, 1)}

        for number, folder in enumerate(folders):
            run_stage(folder, partial(make_trainer, number), export)
        return self._export(folders[-1], tokenizer, validation[: self.config.num_scored_rows])

    def _export(self, last: Path, tokenizer: PreTrainedTokenizerFast, scored: Sequence[Example]) -> Path:
        """Write model, tokenizer and scores so that the folder is there whole or not at all."""
        directory = self.directory / "export"
        with whole_folder(directory) as partly:
            save_model(_load(last / "model", torch.float32).bfloat16(), tokenizer, partly)
            (partly / "model.safetensors").chmod(0o644)
            exported = _load(partly, torch.bfloat16)
            torch.nn.Module.to(exported, default_device())
            scores = self.evaluate(exported, scored, tokenizer.pad_token_id)
            check_numbers(scores, json.loads((last / "done.json").read_text())["num_steps"], last)
            num_bytes = sum(example.num_bytes for example in scored)
            write_json(partly / "scores.json", {"num_rows": len(scored), "num_bytes": num_bytes, **scores})
        return directory


def _load(directory: Path, dtype: torch.dtype) -> OPTForCausalLM:
    return OPTForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention.register())
