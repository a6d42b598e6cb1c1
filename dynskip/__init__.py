"""dynskip: one decoder-only transformer, each sequence through its own subset of the layers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dynskip.version import __version__

if TYPE_CHECKING:
    from dynskip import ops
    from dynskip.async_llm import AsyncLLM, Piece, TextOutput
    from dynskip.causal_lm import CausalLM, OPTForCausalLM
    from dynskip.costs.defaults import UnmeasuredCostsWarning
    from dynskip.engine.diagnosis import NonFiniteError
    from dynskip.engine.engine import Engine
    from dynskip.engine.metrics import MetricsLog
    from dynskip.engine.request import RequestError, RequestOutput
    from dynskip.engine.stats import EngineStats
    from dynskip.engine.token_stream import TokenStream
    from dynskip.execution.slot_pool import KVCacheMemoryError
    from dynskip.llm import LLM, Output
    from dynskip.ops import reference
    from dynskip.paths import LayerPath
    from dynskip.sampling import SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CausalLM",
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
    "CausalLM": "dynskip.causal_lm",
    "Engine": "dynskip.engine.engine",
    "EngineStats": "dynskip.engine.stats",
    "KVCacheMemoryError": "dynskip.execution.slot_pool",
    "LLM": "dynskip.llm",
    "LayerPath": "dynskip.paths",
    "MetricsLog": "dynskip.engine.metrics",
    "NonFiniteError": "dynskip.engine.diagnosis",
    "OPTForCausalLM": "dynskip.causal_lm",
    "Output": "dynskip.llm",
    "Piece": "dynskip.async_llm",
    "RequestError": "dynskip.engine.request",
    "RequestOutput": "dynskip.engine.request",
    "SamplingParams": "dynskip.sampling",
    "TextOutput": "dynskip.async_llm",
    "TokenStream": "dynskip.engine.token_stream",
    "UnmeasuredCostsWarning": "dynskip.costs.defaults",
}
# Modules by their public names.
_MODULES = {"ops": "dynskip.ops", "reference": "dynskip.ops.reference"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'dynskip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
