"""dynskip: one decoder-only transformer, each sequence through its own subset of the layers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dynskip.version import __version__

if TYPE_CHECKING:
    from dynskip import ops, reference
    from dynskip.async_llm import AsyncLLM, Piece, TextOutput
    from dynskip.engine.default_costs import UnmeasuredCostsWarning
    from dynskip.engine.diagnosis import NonFiniteError
    from dynskip.engine.engine import Engine
    from dynskip.engine.metrics import MetricsLog
    from dynskip.engine.request import RequestError, RequestOutput
    from dynskip.engine.stats import EngineStats
    from dynskip.engine.token_stream import TokenStream
    from dynskip.llm import LLM, Output
    from dynskip.model import OPTForCausalLM
    from dynskip.paths import LayerPath
    from dynskip.sampling import SamplingParams
    from dynskip.slot_pool import KVCacheMemoryError

__all__ = [
    "LLM",
    "AsyncLLM",
    "Engine",
    "EngineStats",
    "KVCacheMemoryError",
    "LayerPath",
    "MetricsLog",
    "NonFiniteError",
    "OPTForCausalLM",
    "Output",
    "Piece",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "TextOutput",
    "TokenStream",
    "UnmeasuredCostsWarning",
    "__version__",
    "ops",
    "reference",
]

# Resolved on first use: `import dynskip` stays quick, and needs neither transformers nor a compiler nor Triton.
_HOME = {
    "AsyncLLM": "dynskip.async_llm",
    "Engine": "dynskip.engine.engine",
    "EngineStats": "dynskip.engine.stats",
    "KVCacheMemoryError": "dynskip.slot_pool",
    "LLM": "dynskip.llm",
    "LayerPath": "dynskip.paths",
    "MetricsLog": "dynskip.engine.metrics",
    "NonFiniteError": "dynskip.engine.diagnosis",
    "OPTForCausalLM": "dynskip.model",
    "Output": "dynskip.llm",
    "Piece": "dynskip.async_llm",
    "RequestError": "dynskip.engine.request",
    "RequestOutput": "dynskip.engine.request",
    "SamplingParams": "dynskip.sampling",
    "TextOutput": "dynskip.async_llm",
    "TokenStream": "dynskip.engine.token_stream",
    "UnmeasuredCostsWarning": "dynskip.engine.default_costs",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in ("ops", "reference"):
        return importlib.import_module(f"dynskip.{name}")
    raise AttributeError(f"module 'dynskip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
