"""dynskip, as a user runs it."""

from __future__ import annotations

import time
from typing import Any

import torch

from bench.peers.workload import STREAM_BATCH, STREAM_PROMPT_LEN, draw_prompts, draw_requests
from dynskip.causal_lm import CausalLM
from dynskip.costs.defaults import default_costs
from dynskip.engine.closed_batch import Generation
from dynskip.measure.runners import DynskipRunner
from dynskip.measure.streams import Job, Served
from dynskip.measure.timing import timed
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams
from dynskip.version import __version__

_TURN_S = 1e-3  # how often a stream looks whether its share is there


class DynskipPeer:
    """A model, one batch at a time, and streams by name."""

    def load(self, folder: str) -> dict[str, Any]:
        """Load the checkpoint in ``folder``."""
        self.model = CausalLM.from_pretrained(folder)
        self.vocab_size = self.model.decoder_config.vocab_size
        self.streams: dict[str, Served] = {}
        self.runner: DynskipRunner | None = None
        self.costs = default_costs(self.model)
        costs = "predicted" if self.costs.predicted else "calibrated"
        settings = f"bf16, backend {self.model.backend.name}, {torch.get_num_threads()} threads; cohort, costs {costs}"
        settings += ", no prefix caching"
        return {"version": __version__, "settings": settings}

    def prefill(self, batch: int, prompt_len: int, num_new: int) -> float:
        """The milliseconds of a prefill, first tokens chosen."""
        prompts = torch.tensor(draw_prompts(batch, prompt_len, self.vocab_size))
        runner = self.runner
        if runner is None or (runner.prompts, runner.params[0].max_tokens) != (prompts.tolist(), num_new):
            paths = [LayerPath.full(self.model.num_layers)] * batch
            self.runner = runner = DynskipRunner(self.model, prompts, paths, num_new)
        return timed(runner.prefill)

    def decode(self, num_steps: int) -> list[float]:
        """The milliseconds of each of the next steps."""
        assert self.runner is not None, "behind a prefill"
        return [timed(self.runner.step) for _ in range(num_steps)]

    def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        """The greedy tokens of each prompt."""
        params = [SamplingParams(max_tokens=num_new, ignore_eos=True)] * len(prompts)
        return [sequence.token_ids for sequence in Generation(self.model, prompts, params).run()]

    def begin_stream(self, name: str, num_requests: int) -> dict[str, Any]:
        """Hand over the requests of a stream: "full" or "paper"."""
        requests = draw_requests(self.model.num_layers, name == "paper", num_requests)
        prompts = draw_prompts(num_requests, STREAM_PROMPT_LEN, self.vocab_size)
        jobs = [Job(prompt, request) for prompt, request in zip(prompts, requests, strict=True)]
        # As vLLM is run: no prompt comes again, and those that are kept take memory that was never written.
        served = Served(name, self.model, jobs, self.costs, turn_s=_TURN_S, batch=STREAM_BATCH, prefix_caching=False)
        self.streams[name] = served
        return {"tokens": served.num_tokens, "layers": sum(r.path.budget for r in requests) / num_requests}

    def stream(self, name: str, share: float) -> float:
        """The seconds to get to ``share`` of the stream's tokens; the engine is closed behind the last."""
        served = self.streams[name]
        begin_s = time.perf_counter()
        while served.progress < share:
            served.advance()
        elapsed_s = time.perf_counter() - begin_s
        if share >= 1:
            served.engine.close()
            del self.streams[name]
        return elapsed_s
