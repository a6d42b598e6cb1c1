"""transformers at full depth: its eager model with a growing cache, and its compiled one with a static cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from bench.gpu.workloads import Workload
from dynskip.measure.runners import TransformersRunner


class TransformersEager:
    """transformers' own attention (sdpa) and dynamic cache, without the bookkeeping of its ``generate``."""

    name = "transformers sdpa eager"

    def __init__(self, model: PreTrainedModel, workload: Workload) -> None:
        self.workload = workload
        self.runner = TransformersRunner(model, workload.prompts[:, :-1], workload.num_steps)
        self.runner.prefill()
        self.runner.token_ids = workload.prompts[:, -1:]

    def step(self) -> None:
        """Run the last token of each sequence and choose the next one."""
        self.runner.step()

    def first_step(self) -> Tensor:
        """Run one step: its logits [B, V]."""
        self.step()
        assert self.runner.logits is not None
        return self.runner.logits


class TransformersCompiled:
    """transformers' static cache and ``torch.compile(mode="reduce-overhead")``, greedy choice in the compiled step.

    Mask and positions are made on the device and handed to the model, as its ``generate`` does: made inside the model
    they would wait for the device.
    """

    name = "transformers static cache, torch.compile reduce-overhead"

    def __init__(self, model: PreTrainedModel, workload: Workload, **options: Any) -> None:
        self.model = model
        self.head = model.get_output_embeddings()
        max_len = workload.prompt_len + workload.num_steps
        self.cache = StaticCache(config=model.config, max_cache_len=max_len)
        self.places = torch.arange(max_len, device=model.device)
        self.position_ids = torch.full((workload.batch, 1), workload.prompt_len, device=model.device)
        self.token_ids = workload.prompts[:, -1:].clone()
        self.logits = torch.empty(0)
        self._prefill(workload.prompts[:, :-1])
        self._compiled = torch.compile(self._decode, **(options or {"mode": "reduce-overhead", "dynamic": False}))

    def step(self) -> None:
        """Run the last token of each sequence and choose the next one."""
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.logits, chosen = self._compiled(self.token_ids, self.position_ids)
        # What a compiled step returns is overwritten by the next one.
        self.token_ids.copy_(chosen)
        self.position_ids.add_(1)

    def first_step(self) -> Tensor:
        """Run one step: its logits [B, V]. Compiles it."""
        self.step()
        return self.logits.clone()

    def _prefill(self, prompts: Tensor) -> None:
        self.model.base_model(
            input_ids=prompts,
            attention_mask=self._mask(torch.arange(prompts.shape[1], device=prompts.device)[None]),
            position_ids=torch.arange(prompts.shape[1], device=prompts.device)[None],
            past_key_values=self.cache,
            use_cache=True,
        )

    def _decode(self, token_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model.base_model(
            input_ids=token_ids,
            attention_mask=self._mask(position_ids),
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
        )
        logits = self.head(output.last_hidden_state[:, -1])
        return logits, logits.argmax(-1, keepdim=True)

    def _mask(self, position_ids: Tensor) -> Tensor:
        """[B or 1, 1, T, S], bool: the keys that each position sees."""
        return (self.places <= position_ids[:, :, None])[:, None]
