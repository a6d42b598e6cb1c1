"""The process that ``ctranslate2_runner`` talks to: one JSON request a line on stdin, one JSON answer a line on stdout.

CTranslate2 runs a whole generation in one call. A callback after each token stops it until the next request, so that
its decode steps can be timed one at a time, in turns with those of others.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import ctranslate2
import numpy


def main(directory: str, num_threads: str, compute_type: str) -> int:
    """Answer requests until stdin ends."""
    generator = ctranslate2.Generator(
        directory, device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=int(num_threads)
    )
    answer({"ready": True})
    while (request := read()) is not None:
        prompts = [[f"t{token_id}" for token_id in prompt] for prompt in request["prompts"]]
        if request["do"] == "logits":
            logits = numpy.array(generator.forward_batch(prompts), dtype=numpy.float32)
            answer({"logits": logits.tobytes().hex()})
        elif not generate(generator, prompts, request["max_new_tokens"]):
            return 0
        else:
            answer({"finished": True})
    return 0


def generate(generator: ctranslate2.Generator, prompts: list[list[str]], max_new_tokens: int) -> bool:
    """Generate, one step a request, until "finish"; False where stdin ended first."""
    ended = {"input": False, "batch": False}
    last = {"step": -1, "began": 0.0}

    def on_token(result: Any) -> bool:
        # Called once a sequence and step; a new step has run where its number changes.
        if result.step != last["step"] and not any(ended.values()):
            elapsed_ms = (time.perf_counter() - last["began"]) * 1e3
            answer({"prefilled": True} if last["step"] < 0 else {"ms": elapsed_ms})
            last["step"] = result.step
            request = read()
            ended["input"] = request is None
            ended["batch"] = request is not None and request["do"] == "finish"
            last["began"] = time.perf_counter()
        return any(ended.values())

    generator.generate_batch(
        prompts,
        max_length=max_new_tokens,
        min_length=max_new_tokens,
        beam_size=1,
        sampling_topk=1,
        include_prompt_in_result=False,
        callback=on_token,
    )
    assert any(ended.values()), "the batch was long enough for all its steps"
    return not ended["input"]


def read() -> dict[str, Any] | None:
    """The next request, None where stdin has ended."""
    line = sys.stdin.readline()
    return json.loads(line) if line else None


def answer(values: dict[str, Any]) -> None:
    """Write one answer."""
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
