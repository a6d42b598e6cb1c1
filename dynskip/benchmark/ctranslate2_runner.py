"""CTranslate2 as a competitor: in a process of its own, so that its threads and ours never share a pool."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import OPTForCausalLM as HFOPTForCausalLM

# Its OpenMP threads spin for 200 ms after their last work: what is timed next waits until they sleep.
_SETTLE_S = 0.3


def unavailable_reason(architecture: str) -> str | None:
    """Why CTranslate2 cannot be compared here on a model of that type, and what would help; None where it can."""
    if architecture != "opt":
        return f"ctranslate2 is compared on models of type opt only, got {architecture}. Choose a --shape of OPT."
    if importlib.util.find_spec("ctranslate2") is None:
        return "ctranslate2 is not installed. Install it: pip install ctranslate2==4.8.5."
    return None


def export(hf_model: HFOPTForCausalLM, directory: Path) -> None:
    """Write the weights of ``hf_model`` as a CTranslate2 model, in the dtype they have."""
    from ctranslate2.converters.transformers import OPTLoader

    spec = OPTLoader().get_model_spec(hf_model)
    spec.register_vocabulary([f"t{token_id}" for token_id in range(hf_model.config.vocab_size)])
    eos = f"t{hf_model.config.eos_token_id}"
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = eos
    spec.validate()
    spec.optimize()
    directory.mkdir(parents=True, exist_ok=True)
    spec.save(str(directory))


class CTranslate2Process:
    """A process that has loaded an exported model and generates one batch at a time, stopping where it is told to.

    settle_s: how long each step waits until the process's threads sleep; 0 where it is stopped while others are timed.
    """

    def __init__(
        self, directory: Path, num_threads: int, compute_type: str = "float32", settle_s: float = _SETTLE_S
    ) -> None:
        self._settle_s = settle_s
        command = [sys.executable, "-m", "dynskip.benchmark.ctranslate2_worker", str(directory)]
        command += [str(num_threads), compute_type]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._receive()  # it has loaded the model

    def logits(self, prompts: Tensor) -> Tensor:
        """[B, T, V], float32, of ``prompts`` [B, T]."""
        shape = (*prompts.shape, -1)
        values = self._ask({"do": "logits", "prompts": prompts.tolist()})["logits"]
        return torch.frombuffer(bytearray.fromhex(values), dtype=torch.float32).view(shape)

    def start(self, prompts: Tensor, max_new_tokens: int) -> None:
        """Prefill ``prompts`` and stop before the first decode step."""
        self._ask({"do": "generate", "prompts": prompts.tolist(), "max_new_tokens": max_new_tokens})

    def step(self) -> float:
        """The milliseconds of the next decode step, measured where it ran."""
        ms = float(self._ask({"do": "step"})["ms"])
        time.sleep(self._settle_s)
        return ms

    def finish(self) -> None:
        """Give up the batch that ``start`` began."""
        self._ask({"do": "finish"})

    def close(self) -> None:
        """End the process."""
        # The worker ends when its input does; with an exception on its way it may have ended already.
        self._process.communicate(timeout=60)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"CTranslate2Process: the worker must answer, got exit status {self._process.wait()}. "
                "See its traceback above; status -9 means that memory was short."
            )
        answer: dict[str, Any] = json.loads(line)
        return answer
