"""vLLM on a CPU: its engine in this process, a `step` at a time, so that prefills and decode steps are timed apart."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import vllm
from transformers import AutoConfig
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from bench.peers.workload import STREAM_BATCH, STREAM_PROMPT_LEN, draw_prompts, draw_requests

# Most tokens of a sequence, and of a step: no prompt that is timed is cut into chunks.
_MAX_LEN, _MAX_STEP_TOKENS = 1024, 4096


class VLLMPeer:
    """An engine, and what is on its way in it."""

    def load(self, folder: str, **options: Any) -> dict[str, Any]:
        """Load the checkpoint in ``folder``; options: handed to `LLM`."""
        config = AutoConfig.from_pretrained(Path(folder))
        self.vocab_size, self.num_layers = config.vocab_size, config.num_hidden_layers
        llm = LLM(
            model=folder,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=_MAX_LEN,
            max_num_batched_tokens=_MAX_STEP_TOKENS,
            max_num_seqs=STREAM_BATCH,
            enable_prefix_caching=False,  # the prompts that are timed come again
            **options,
        )
        self.engine = llm.llm_engine
        self.running: list[str] = []
        self.num_ids = 0
        return {"version": vllm.__version__, "settings": "bf16, its engine stepped in its process, no prefix caching"}

    def prefill(self, batch: int, prompt_len: int, num_new: int) -> float:
        """The milliseconds until every sequence has its first token."""
        self.engine.abort_request(self.running)
        prompts = draw_prompts(batch, prompt_len, self.vocab_size)
        begin_s = time.perf_counter()
        self.running = [self._add(prompt, num_new) for prompt in prompts]
        waiting = set(self.running)
        while waiting:
            waiting -= {output.request_id for output in self.engine.step()}
        return (time.perf_counter() - begin_s) * 1e3

    def decode(self, num_steps: int) -> list[float]:
        """The milliseconds of each of the next steps."""
        times = []
        for _ in range(num_steps):
            begin_s = time.perf_counter()
            outputs = self.engine.step()
            times.append((time.perf_counter() - begin_s) * 1e3)
            assert len(outputs) == len(self.running), "a decode step gives each sequence a token"
        return times

    def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        """The greedy tokens of each prompt."""
        self.engine.abort_request(self.running)
        tokens: dict[str, list[int]] = {self._add(prompt, num_new): [] for prompt in prompts}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                tokens[output.request_id] += output.outputs[0].token_ids
        return list(tokens.values())

    def begin_stream(self, name: str, num_requests: int) -> dict[str, Any]:
        """Hand over the requests of the stream at full depth, the only one that it knows."""
        assert name == "full", name
        self.engine.abort_request(self.running)
        requests = draw_requests(self.num_layers, False, num_requests)
        prompts = draw_prompts(num_requests, STREAM_PROMPT_LEN, self.vocab_size)
        self.num_tokens, self.num_done = sum(request.num_output for request in requests), 0
        for prompt, request in zip(prompts, requests, strict=True):
            self._add(prompt, request.num_output)
        return {"tokens": self.num_tokens, "layers": float(self.num_layers)}

    def stream(self, name: str, share: float) -> float:
        """The seconds to get to ``share`` of the stream's tokens."""
        begin_s = time.perf_counter()
        while self.num_done < share * self.num_tokens:
            self.num_done += sum(len(output.outputs[0].token_ids) for output in self.engine.step())
        return time.perf_counter() - begin_s

    def _add(self, prompt: list[int], num_new: int) -> str:
        self.num_ids += 1
        params = SamplingParams(
            temperature=0, max_tokens=num_new, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        self.engine.add_request(str(self.num_ids), {"prompt_token_ids": prompt}, params)
        return str(self.num_ids)
