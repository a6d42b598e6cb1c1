"""`Engine` alone, in a process of its own: what a server is measured against, on the same requests."""

from __future__ import annotations

import time
from typing import Any

import torch

from dynskip.causal_lm import CausalLM
from dynskip.costs.defaults import default_costs
from dynskip.engine.engine import Engine
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams
from dynskip.version import __version__


class EnginePeer:
    """Answers `bench.peers.worker`."""

    def load(self, folder: str, **options: Any) -> dict[str, Any]:
        """Load the checkpoint in ``folder``; options: of the engine."""
        self.model = CausalLM.from_pretrained(folder)
        costs = default_costs(self.model)
        self.engine = Engine(self.model, costs=costs, **options)
        kind = "predicted" if costs.predicted else "calibrated"
        settings = f"{self.model.backend.name}, {torch.get_num_threads()} threads, costs {kind}"
        return {"version": __version__, "settings": settings}

    def serve(self, requests: list[dict[str, Any]]) -> float:
        """The seconds from the first of ``requests``, all there at once, to the last token.

        Raises RuntimeError where an output is short.
        """
        asked = [
            (
                request["prompt"],
                SamplingParams(max_tokens=request["max_tokens"], ignore_eos=True),
                LayerPath.parse(request["path"], self.model.num_layers),
            )
            for request in requests
        ]
        begin_s = time.perf_counter()
        for prompt, params, path in asked:
            self.engine.add_request(prompt, params, path)
        outputs = self.engine.run()
        elapsed_s = time.perf_counter() - begin_s
        num_tokens = sum(len(output.token_ids) for output in outputs)
        wanted = sum(request["max_tokens"] for request in requests)
        if num_tokens != wanted:
            raise RuntimeError(f"the engine must make {wanted} tokens, got {num_tokens}")
        return elapsed_s
