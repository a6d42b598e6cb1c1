"""CTranslate2 on the file that `weights` has exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ctranslate2
import torch

from bench.peers.streams import ClosedBatches
from bench.peers.workload import draw_prompts
from dynskip.benchmark.ctranslate2_runner import CTranslate2Process
from dynskip.measure.timing import timed


class CTranslate2Peer(ClosedBatches):
    """The process that runs the model, of this one's process group, and one batch at a time."""

    def load(self, folder: str, compute_type: str, vocab_size: int, num_layers: int) -> dict[str, Any]:
        """Load the export in ``folder``."""
        num_threads = torch.get_num_threads()
        self.vocab_size, self.num_layers = vocab_size, num_layers
        self.process = CTranslate2Process(Path(folder), num_threads, compute_type, settle_s=0.0)
        self.is_running = False
        settings = f"{compute_type}, {num_threads} threads, streams in closed batches"
        return {"version": ctranslate2.__version__, "settings": settings}

    def prefill(self, batch: int, prompt_len: int, num_new: int) -> float:
        """The milliseconds of a prefill, first tokens chosen."""
        if self.is_running:
            self.process.finish()
        self.is_running = True
        prompts = torch.tensor(draw_prompts(batch, prompt_len, self.vocab_size))
        return timed(lambda: self.process.start(prompts, num_new))

    def decode(self, num_steps: int) -> list[float]:
        """The milliseconds of each of the next steps."""
        return [self.process.step() for _ in range(num_steps)]
