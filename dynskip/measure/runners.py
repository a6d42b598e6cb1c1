"""Who is timed: dynskip along given paths, and transformers. Each can prefill a batch and then take decode steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from dynskip.causal_lm import CausalLM
from dynskip.engine.closed_batch import Generation
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams


class DynskipRunner:
    """dynskip's generation: plan, step, greedy choice, as ``LLM.generate`` runs it.

    prompts: [B, T]. paths: one per sequence. max_new_tokens: how often step may be called after a prefill, plus one.
    All memory of keys and values is written once by the first prefill, so that later ones and all steps find it as an
    engine does behind its first requests: new pages may take longer than what is stored there.
    """

    def __init__(self, model: CausalLM, prompts: Tensor, paths: Sequence[LayerPath], max_new_tokens: int) -> None:
        self.model = model
        self.prompts: list[list[int]] = prompts.tolist()
        self.paths = list(paths)
        self.params = [SamplingParams(max_tokens=max_new_tokens, ignore_eos=True)] * len(self.prompts)
        self.generation: Generation | None = None

    def prefill(self) -> None:
        """Run the prompts from scratch and choose the first token of each."""
        is_first = self.generation is None
        self.generation = None  # its cache serves the new one
        self.generation = Generation(self.model, self.prompts, self.params, self.paths)
        if is_first:
            self.generation.cache.k_cache.zero_()
            self.generation.cache.v_cache.zero_()
        self.generation.prefill()

    def step(self) -> None:
        """Run the last token of each sequence and choose the next one."""
        assert self.generation is not None and self.generation.running, "prefilled, with tokens left to generate"
        self.generation.step()


class TransformersRunner:
    """transformers' model, its key-value cache and an argmax: without the bookkeeping of its ``generate``.

    cache: "dynamic" grows by a copy a step, "static" is as long as ``max_new_tokens`` asks from the start.
    """

    def __init__(self, model: Any, prompts: Tensor, max_new_tokens: int, cache: str = "dynamic") -> None:
        if cache not in ("dynamic", "static"):
            raise ValueError(f"TransformersRunner: cache must be 'dynamic' or 'static', got {cache!r}.")
        self.model = model
        self.prompts = prompts
        self.max_len = prompts.shape[1] + max_new_tokens
        self.cache_kind = cache
        self.cache: DynamicCache | StaticCache | None = None
        self.token_ids = prompts[:, -1:]
        self.logits: Tensor | None = None  # [B, V], of the last step

    @torch.no_grad()
    def prefill(self) -> None:
        """Run the prompts from scratch and choose the first token of each."""
        self.cache = None
        if self.cache_kind == "static":
            self.cache = StaticCache(config=self.model.config, max_cache_len=self.max_len)
        else:
            self.cache = DynamicCache(config=self.model.config)
        self._run(self.prompts)

    @torch.no_grad()
    def step(self) -> None:
        """Run the last token of each sequence and choose the next one."""
        assert self.cache is not None, "prefilled"
        self._run(self.token_ids)

    def _run(self, token_ids: Tensor) -> None:
        # Not the model's own `logits_to_keep=1`: torch multiplies that strided slice by one copy of the head per
        # sequence, which makes a prefill of 32 prompts several times slower than it has to be.
        output = self.model.base_model(input_ids=token_ids, past_key_values=self.cache, use_cache=True)
        self.logits = self.model.get_output_embeddings()(output.last_hidden_state[:, -1].contiguous())
        self.token_ids = self.logits.argmax(-1, keepdim=True)


# One way to run a batch of prompts of equal length, greedily.
Runner: TypeAlias = DynskipRunner | TransformersRunner
