"""transformers: its model, its cache and an argmax; and the judge of what others chose."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from bench.peers.workload import STREAM_BATCH, STREAM_PROMPT_LEN, draw_prompts, draw_requests
from dynskip.measure.runners import TransformersRunner
from dynskip.measure.timing import timed

_PAGE = 32  # tokens
_READY_S, _WAIT_S = 120.0, 1.0
# Of a step: the first prompts of a stream come in one.
_MAX_STEP_TOKENS = STREAM_BATCH * STREAM_PROMPT_LEN


class TransformersPeer:
    """A model, one batch at a time, and a stream by its continuous batching."""

    def load(self, folder: str, cache: str = "dynamic") -> dict[str, Any]:
        """Load the checkpoint in ``folder``. cache: as in `TransformersRunner`."""
        self.folder, self.cache = folder, cache
        self.model = self._model(torch.bfloat16)
        settings = f"bf16, sdpa, {torch.get_num_threads()} threads, {cache} cache, no `generate`; "
        settings += "streams by its continuous batching"
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

    def begin_stream(self, name: str, num_requests: int) -> dict[str, Any]:
        """Make ready for the requests of the stream at full depth, the only one that it knows."""
        assert name == "full", name
        config = self.model.config
        self.lengths = [request.num_output for request in draw_requests(config.num_hidden_layers, False, num_requests)]
        pages = STREAM_BATCH * -(-(STREAM_PROMPT_LEN + max(self.lengths)) // _PAGE)
        self.batching = self.model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            ContinuousBatchingConfig(
                page_size=_PAGE,
                num_blocks=pages,
                max_batch_tokens=_MAX_STEP_TOKENS,
                max_requests_per_batch=STREAM_BATCH,
                allow_block_sharing=False,  # the prompts that are timed come again
            ),
        )
        self.batching.start()
        self._hand_over([1])
        self.batching.get_result(timeout=_READY_S)  # what it makes before its first step is there
        self.num_done = -1
        return {"tokens": sum(self.lengths), "layers": float(config.num_hidden_layers)}

    def stream(self, name: str, share: float) -> float:
        """The seconds to get to ``share`` of the stream's tokens; those of requests that have ended count."""
        begin_s = time.perf_counter()
        if self.num_done < 0:
            self._hand_over(self.lengths)
            self.num_done = 0
        while self.num_done < share * sum(self.lengths):
            output = self.batching.get_result(timeout=_WAIT_S)
            self.num_done += len(output.generated_tokens) if output is not None and output.is_finished() else 0
        elapsed_s = time.perf_counter() - begin_s
        if share >= 1:
            self.batching.stop(block=True)
        return elapsed_s

    def _hand_over(self, lengths: list[int]) -> None:
        prompts = draw_prompts(len(lengths), STREAM_PROMPT_LEN, self.model.config.vocab_size)
        for prompt, length in zip(prompts, lengths, strict=True):
            self.batching.add_request(prompt, max_new_tokens=length)

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
