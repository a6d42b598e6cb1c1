"""transformers: its model, its cache and an argmax; and the judge of what others chose."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from bench.peers.workload import draw_prompts
from dynskip.measure.runners import TransformersRunner
from dynskip.measure.timing import timed


class TransformersPeer:
    """A model, and one batch at a time."""

    def load(self, folder: str, cache: str = "dynamic") -> dict[str, Any]:
        """Load the checkpoint in ``folder``. cache: as in `TransformersRunner`."""
        self.folder, self.cache = folder, cache
        self.model = self._model(torch.bfloat16)
        settings = f"bf16, sdpa, {torch.get_num_threads()} threads, {cache} cache, no `generate`"
        return {"version": transformers.__version__, "settings": settings}

    def prefill(self, batch: int, prompt_len: int, num_new: int) -> float:
        """The milliseconds of a prefill, first tokens chosen."""
        prompts = torch.tensor(draw_prompts(batch, prompt_len, self.model.config.vocab_size))
        self.runner = TransformersRunner(self.model, prompts, num_new, self.cache)
        return timed(self.runner.prefill)

    def decode(self, num_steps: int) -> list[float]:
        """The milliseconds of each of the next steps."""
        return [timed(self.runner.step) for _ in range(num_steps)]

    def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        """The greedy tokens of each prompt, which runs alone."""
        outputs = []
        for prompt in prompts:
            runner = TransformersRunner(self.model, torch.tensor([prompt]), num_new, self.cache)
            runner.prefill()
            tokens = [int(runner.token_ids)]
            while len(tokens) < num_new:
                runner.step()
                tokens.append(int(runner.token_ids))
            outputs.append(tokens)
        return outputs

    @torch.no_grad()
    def judge(self, prompts: list[list[int]], outputs: list[list[int]]) -> list[list[float]]:
        """How far the float32 logit of each token of ``outputs`` is below the best, in units of what rounding allows.

        Allowed is twice the largest error of this model's bf16 logits at that place: once for the token, once for the
        best. At most 1: the token is the best, up to a near-tie.
        """
        exact = self._model(torch.float32)
        shares = []
        for prompt, output in zip(prompts, outputs, strict=True):
            ids = torch.tensor([prompt + output[:-1]])
            kept = slice(len(prompt) - 1, None)
            truth, rounded = (model(ids, use_cache=False).logits[0, kept].float() for model in (exact, self.model))
            behind = truth.max(-1).values - truth[torch.arange(len(output)), torch.tensor(output)]
            shares.append((behind / (2 * (truth - rounded).abs().max(-1).values)).tolist())
        return shares

    def _model(self, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, attn_implementation="sdpa").eval()
