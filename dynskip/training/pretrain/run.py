"""A training run in a folder: tokenizer, phases, exported model. Started again after a kill, it goes on."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from dynskip.data.batches import BatchPlan
from dynskip.data.corpus import Corpus, read_corpus
from dynskip.data.examples import Example, encode_examples, encode_windows
from dynskip.data.provenance import provenance
from dynskip.files import write_json
from dynskip.training import attention
from dynskip.training.finite import check_numbers
from dynskip.training.pretrain.config import ModelShape, Phase, RunConfig
from dynskip.training.pretrain.tokenizer import train_tokenizer, training_texts
from dynskip.training.pretrain.trainer import PathTrainer
from dynskip.training.schedule import Clock

# The step count of a phase that only minutes bound.
_UNBOUNDED_STEPS = 1_000_000
Evaluate = Callable[[OPTForCausalLM, Sequence[Example], int], dict[str, float]]


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
            layer.self_attn.out_proj.weight.zero_()
            layer.fc2.weight.zero_()
            for matrix in (
                layer.self_attn.q_proj,
                layer.self_attn.k_proj,
                layer.self_attn.v_proj,
                layer.fc1,
            ):
                matrix.weight.normal_(std=0.5 * shape.hidden_size**-0.5)
    return model


class TrainingRun:
    """One run in ``directory``. ``evaluate`` maps model, examples and pad id to named scores."""

    def __init__(
        self, config: RunConfig, data: Sequence[Path], directory: Path, evaluate: Evaluate, progress: bool = True
    ) -> None:
        self.config = config
        self.directory = directory
        self._data = tuple(data)
        self._evaluate = evaluate
        self._progress = progress
        directory.mkdir(parents=True, exist_ok=True)

    def _record_start(self) -> None:
        record = self.directory / "run.json"
        new = json.loads(json.dumps(provenance(dataclasses.asdict(self.config), self._data)))
        if not record.exists():
            write_json(record, {**new, "resumed": []})
            return
        old = json.loads(record.read_text())
        for name in ("shape", "seed", "split_seed", "tokens_per_batch", "window"):
            if old["config"][name] != new["config"][name]:
                raise ValueError(
                    f"TrainingRun: {name} must equal the run's {old['config'][name]!r}, got {new['config'][name]!r}. "
                    f"Give the run's own options or another folder than {self.directory}."
                )
        if old["data"] != new["data"]:
            raise ValueError(
                f"TrainingRun: data must be the run's files {old['data']}, got {new['data']}. "
                f"Give the same files or another folder than {self.directory}."
            )
        # Length and rates of a phase may change between two starts; every start is on record.
        old["resumed"].append({key: new[key] for key in ("config", "commit", "started")})
        write_json(record, old)

    def _tokenizer(self, corpus: Corpus) -> PreTrainedTokenizerFast:
        directory = self.directory / "tokenizer"
        if not (directory / "complete").exists():
            shape = self.config.shape
            tokenizer = train_tokenizer(
                training_texts(corpus), shape.vocab_size, shape.max_positions, progress=self._progress
            )
            if len(tokenizer) != shape.vocab_size:
                raise ValueError(
                    f"TrainingRun: vocab_size must be at most what the texts give ({len(tokenizer)}), "
                    f"got {shape.vocab_size}. Ask for fewer tokens or give more text."
                )
            tokenizer.save_pretrained(directory)
            (directory / "complete").touch()
        return PreTrainedTokenizerFast.from_pretrained(directory)

    def _train_phase(
        self,
        number: int,
        phase: Phase,
        model: OPTForCausalLM,
        examples: Sequence[Example],
        windows: Sequence[tuple[int, ...]],
        watched: Sequence[Example],
        pad_id: int,
    ) -> None:
        directory = self.directory / phase.name
        directory.mkdir(exist_ok=True)
        num_steps = phase.max_steps or _UNBOUNDED_STEPS
        seed = self.config.seed * 1000 + number
        plan = BatchPlan(
            examples,
            windows,
            pad_id=pad_id,
            tokens_per_batch=self.config.tokens_per_batch,
            passage_share=phase.passage_share,
            response_only=phase.response_only,
            seed=seed,
            num_steps=num_steps,
        )
        clock = Clock(phase.max_steps, phase.max_minutes)
        watch_every_s = 2 * self.config.save_every_s
        bar = tqdm(
            total=1000,
            desc=phase.name,
            disable=not self._progress,
            bar_format="{desc} {percentage:5.1f}%|{bar}| {elapsed} < {remaining}{postfix}",
            mininterval=5,
        )
        watched_at = time.monotonic()

        def on_step(step: int, progress: float) -> None:
            nonlocal watched_at
            if bar.n == 0:
                bar.initial = round(1000 * progress)  # what a resumed phase has behind it is no guide to its pace
            bar.n = round(1000 * progress)
            bar.set_postfix_str(f"step {step}", refresh=False)
            bar.update(0)
            if watched and (progress >= 1.0 or time.monotonic() - watched_at >= watch_every_s):
                watched_at = time.monotonic()
                scores = self._evaluate(model, watched, pad_id)
                check_numbers(scores, step, directory)
                with (directory / "watched.jsonl").open("a") as file:
                    file.write(json.dumps({"step": step, "progress": round(progress, 4), **scores}) + "\n")

        trainer = PathTrainer(
            model,
            directory,
            plan,
            menu=phase.menu(self.config.shape.num_layers),
            learning_rate=phase.learning_rate,
            clock=clock,
            num_steps=num_steps,
            seed=seed,
            muon_lr=self.config.muon_lr,
            adamw_lr=self.config.adamw_lr,
            weight_decay=self.config.weight_decay,
            use_cpu=not torch.cuda.is_available(),
            save_every_s=self.config.save_every_s,
            on_step=on_step,
        )
        try:
            steps_done = trainer.run()
        finally:
            bar.close()
        model.save_pretrained(directory / "model")
        write_json(directory / "done.json", {"num_steps": steps_done, "elapsed_s": round(clock.elapsed_s, 1)})

    def train(self) -> Path:
        """The folder of the exported bf16 model with its tokenizer and scores, after all phases."""
        self._record_start()
        corpus = read_corpus(self._data, self.config.split_seed)
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
        model = new_model(self.config.shape, tokenizer, self.config.seed)
        watched = validation[: self.config.num_watched_rows]
        for number, phase in enumerate(self.config.phases):
            finished = self.directory / phase.name
            if (finished / "done.json").exists():
                model = OPTForCausalLM.from_pretrained(
                    finished / "model", dtype=torch.float32, attn_implementation=attention.register()
                )
                continue
            self._train_phase(number, phase, model, examples, windows, watched, pad_id)
        return self._export(model, tokenizer, validation[: self.config.num_scored_rows])

    def _export(self, model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, scored: Sequence[Example]) -> Path:
        """Write model, tokenizer and scores so that the folder is there whole or not at all."""
        directory, partial = self.directory / "export", self.directory / "export.partial"
        shutil.rmtree(partial, ignore_errors=True)
        # The Trainer switches the cache off, for its own passes; whoever generates wants it.
        model.config.use_cache = True
        model.bfloat16().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "model.safetensors").chmod(0o644)
        exported = OPTForCausalLM.from_pretrained(
            partial, dtype=torch.bfloat16, attn_implementation=attention.register()
        )
        torch.nn.Module.to(exported, model.device)
        scores = self._evaluate(exported, scored, tokenizer.pad_token_id)
        last = self.directory / self.config.phases[-1].name
        check_numbers(scores, json.loads((last / "done.json").read_text())["num_steps"], last)
        num_bytes = sum(example.num_bytes for example in scored)
        write_json(partial / "scores.json", {"num_rows": len(scored), "num_bytes": num_bytes, **scores})
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
        return directory
