"""One state of the project, kept alive and timed a turn at a time: `speed.py` says over a pipe what to run next."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from probe import fixed_costs
from transformers.utils import logging

import dynskip
from dynskip import LLM, Engine, LayerPath, OPTForCausalLM, SamplingParams

# As in the tables of bench/results; so many tokens later a batch begins anew, which is not timed.
PROMPT_LEN, NUM_NEW = 64, 64


class Turns:
    """What the rows need: models, loaded once, and the engine of the row that is timed."""

    def __init__(self) -> None:
        self.models: dict[str, OPTForCausalLM] = {}
        self.engine: Engine | None = None

    def run(self, row: dict[str, Any], amount: int) -> tuple[float, str]:
        """Seconds of ``amount`` decode steps, prefills or streams of requests, and a hash of all tokens."""
        if row["model"] not in self.models:
            self.models[row["model"]] = LLM(row["model"]).model
        seconds, tokens = 0.0, hashlib.sha256()
        for _ in range(amount):
            each_s, each_tokens = getattr(self, row["kind"])(self.models[row["model"]], row)
            seconds += each_s
            tokens.update(each_tokens)
        return seconds, tokens.hexdigest()[:16]

    def end(self) -> None:
        """The row is over: its memory is given back."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def decode(self, model: OPTForCausalLM, row: dict[str, Any]) -> tuple[float, bytes]:
        """A step of the engine in which all sequences decode; prompts are run before it, where there are none."""
        if self.engine is None or not self.engine.has_unfinished:
            self.end()
            self._begin(model, row, NUM_NEW)
            assert self.engine is not None
            self.engine.step()
        return self._step()

    def prefill(self, model: OPTForCausalLM, row: dict[str, Any]) -> tuple[float, bytes]:
        """The step that runs all prompts, of an engine of its own."""
        self.end()
        self._begin(model, row, 1)
        return self._step()

    def stream(self, model: OPTForCausalLM, row: dict[str, Any]) -> tuple[float, bytes]:
        """All requests of a stream to their ends: mixed depths, prompts of 32 tokens, geometric lengths of mean 16."""
        draw = random.Random(0)
        num_layers = model.num_layers
        depths = [LayerPath.uniform(num_layers, max(1, num_layers * part // 24)) for part in (4, 8, 12, 24)]
        options = {"policy": row["policy"], "batch": row["batch"], "max_context_len": 32 + 64}
        costs = fixed_costs(num_layers) if row["policy"] == "cohort" else None
        with Engine(model, costs=costs, max_prefill_tokens=512, **options) as engine:
            for index in range(row["requests"]):
                length = min(64, 1 + int(draw.expovariate(1 / 15)))
                prompt = [draw.randrange(4, model.config.vocab_size) for _ in range(32)]
                params = SamplingParams(max_tokens=length, ignore_eos=True)
                engine.add_request(prompt, params, draw.choices(depths, (74, 18, 6, 2))[0], request_id=index)
            begin_s = time.perf_counter()
            outputs = engine.run()
            seconds = time.perf_counter() - begin_s
        tokens = sorted((each.request_id, each.token_ids) for each in outputs)
        return seconds, json.dumps(tokens).encode()

    def _begin(self, model: OPTForCausalLM, row: dict[str, Any], num_new: int) -> None:
        draw = random.Random(0)
        batch, longest = row["batch"], PROMPT_LEN + num_new
        options: dict[str, Any] = {"batch": batch, "max_context_len": longest}
        self.engine = Engine(model, policy="lockstep", max_prefill_tokens=batch * PROMPT_LEN, **options)
        self.tokens: list[Any] = []
        for index in range(batch):
            prompt = [draw.randrange(4, model.config.vocab_size) for _ in range(PROMPT_LEN)]
            path = LayerPath.parse(row["path"].replace("SEED", str(index)), model.num_layers)
            params = SamplingParams(max_tokens=num_new, ignore_eos=True)
            self.engine.add_request(prompt, params, path, on_token=lambda *token: self.tokens.append(token))

    def _step(self) -> tuple[float, bytes]:
        assert self.engine is not None
        self.tokens.clear()
        begin_s = time.perf_counter()
        self.engine.step()
        seconds = time.perf_counter() - begin_s
        return seconds, json.dumps(sorted(self.tokens)).encode()


def main() -> int:
    """Answer each line of stdin, {row, amount} as JSON, by {seconds, tokens}; an amount of 0 ends a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="of the state that must be imported")
    args = parser.parse_args()
    assert Path(dynskip.__file__).resolve().is_relative_to(args.root.resolve()), f"{dynskip.__file__} is another state"
    logging.disable_progress_bar()
    # Nothing but answers goes through the pipe: what else prints, prints to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    turns = Turns()
    with torch.no_grad():
        for line in sys.stdin:
            asked = json.loads(line)
            if asked["amount"]:
                seconds, tokens = turns.run(asked["row"], asked["amount"])
            else:
                turns.end()
                seconds, tokens = 0.0, ""
            answers.write(json.dumps({"seconds": seconds, "tokens": tokens}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
