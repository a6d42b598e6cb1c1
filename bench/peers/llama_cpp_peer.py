"""llama.cpp on a GGUF file, through its C interface: the batch is one `llama_decode` a step."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy

from bench.peers.streams import CallByCall
from bench.peers.workload import STREAM_BATCH, STREAM_PROMPT_LEN, draw_prompts

_PAD = 256  # llama.cpp rounds the entries of a sequence up to that


class LlamaCppPeer(CallByCall):
    """A model, and a context for one batch at a time."""

    def load(self, folder: str) -> dict[str, Any]:
        """Load the GGUF file ``folder``."""
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = False  # 0.3.36 crashes in `llama_decode` on weights that it has repacked for AMX
        self.model = llama_cpp.llama_model_load_from_file(folder.encode(), params)
        if not self.model:
            raise ValueError(f"LlamaCppPeer: folder must be a GGUF file that llama.cpp reads, got {folder}.")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.num_layers = llama_cpp.llama_model_n_layer(self.model)
        self.context: Any = None
        self.num_threads = len(os.sched_getaffinity(0))
        settings = f"{os.path.basename(folder)}, {self.num_threads} threads, weights not repacked, "
        settings += "streams as its server batches them"
        return {"version": llama_cpp.__version__, "settings": settings}

    def prefill(self, batch: int, prompt_len: int, num_new: int) -> float:
        """The milliseconds of a prefill, first tokens chosen."""
        prompts = draw_prompts(batch, prompt_len, self.vocab_size)
        self._new_context(prompts, num_new)
        begin_s = time.perf_counter()
        self._run([(token, at, i) for i, prompt in enumerate(prompts) for at, token in enumerate(prompt)])
        return (time.perf_counter() - begin_s) * 1e3

    def decode(self, num_steps: int) -> list[float]:
        """The milliseconds of each of the next steps."""
        times = []
        for _ in range(num_steps):
            begin_s = time.perf_counter()
            self._run([(token, self.num_tokens, i) for i, token in enumerate(self.token_ids)])
            times.append((time.perf_counter() - begin_s) * 1e3)
        return times

    def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        """The greedy tokens of each prompt, which runs alone."""
        outputs = []
        for prompt in prompts:
            self._new_context([prompt], num_new)
            self._run([(token, at, 0) for at, token in enumerate(prompt)])
            tokens = [*self.token_ids]
            while len(tokens) < num_new:
                self.decode(1)
                tokens += self.token_ids
            outputs.append(tokens)
        return outputs

    def calls_of(self, lengths: list[int]) -> Iterator[tuple[int, float]]:
        """Steps in which a prompt takes the place of each sequence that has ended, as in llama.cpp's server."""
        prompts = draw_prompts(len(lengths), STREAM_PROMPT_LEN, self.vocab_size)
        waiting = list(zip(prompts, lengths, strict=True))[::-1]
        # With entries by sequence, a step of prompts and single tokens would run in several pieces.
        self._new_context(prompts[:STREAM_BATCH], max(lengths), unified=True)
        memory = llama_cpp.llama_get_memory(self.context)
        running: dict[
            int, tuple[int, int, int]
        ] = {}  # of each sequence its last token, that token's place, tokens to go
        while waiting or running:
            begin_s = time.perf_counter()
            rows = [(token, at, sequence) for sequence, (token, at, _) in running.items()]
            for sequence in set(range(STREAM_BATCH)) - set(running):
                if waiting:
                    prompt, length = waiting.pop()
                    rows += [(token, at, sequence) for at, token in enumerate(prompt)]
                    running[sequence] = (0, len(prompt) - 1, length)
            self._run(rows)
            for (sequence, (_, at, to_go)), token in zip(list(running.items()), self.token_ids, strict=True):
                running[sequence] = (token, at + 1, to_go - 1)
                if to_go == 1:
                    del running[sequence]
                    llama_cpp.llama_memory_seq_rm(memory, sequence, -1, -1)
            yield len(self.token_ids), (time.perf_counter() - begin_s) * 1e3

    def _new_context(self, prompts: list[list[int]], num_new: int, unified: bool = False) -> None:
        if self.context is not None:
            llama_cpp.llama_batch_free(self.batch)
            llama_cpp.llama_free(self.context)
        num_rows = sum(map(len, prompts))
        per_sequence = -(-(len(prompts[0]) + num_new) // _PAD) * _PAD
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = per_sequence * len(prompts), len(prompts)
        params.n_batch = num_rows
        params.kv_unified = unified
        params.n_threads = params.n_threads_batch = self.num_threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.batch = llama_cpp.llama_batch_init(num_rows, 0, 1)
        self.num_tokens = 0

    def _run(self, rows: list[tuple[int, int, int]]) -> None:
        """One step over (token, position, sequence), and the likeliest token behind the last row of each sequence."""
        batch = self.batch
        batch.n_tokens = len(rows)
        last = {sequence: row for row, (_, _, sequence) in enumerate(rows)}
        for row, (token, position, sequence) in enumerate(rows):
            batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, position, 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = last[sequence] == row
        status = llama_cpp.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"LlamaCppPeer: llama_decode must return 0, got {status} for {len(rows)} rows.")
        logits = (llama_cpp.llama_get_logits_ith(self.context, row) for row in last.values())
        self.token_ids = [int(numpy.ctypeslib.as_array(each, (self.vocab_size,)).argmax()) for each in logits]
        self.num_tokens = rows[-1][1] + 1
