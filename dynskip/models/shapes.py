"""Shapes of models by name, so that what costs or tunes a model need not load one."""

from __future__ import annotations

from dynskip.models.bloom import bloom_shape
from dynskip.models.config import DecoderConfig
from dynskip.models.gpt2 import gpt2_shape
from dynskip.models.gpt_neox import gpt_neox_shape
from dynskip.models.llama import llama_shape
from dynskip.models.opt import opt_shape
from dynskip.models.phi import phi_shape

# Published models; of OPT those whose layers all have one size (350m's embedding has another), and two that were not
# published: they have opt-1.3b's depth, so that the same paths apply, and fit into less memory.
DEFAULT_SHAPE = "opt-1.3b"
SHAPES = {
    "opt-1.3b": opt_shape(24, 2048, 32),
    "opt-125m": opt_shape(12, 768, 12),
    "opt-0.4b-24": opt_shape(24, 1024, 16),
    "opt-0.2b-24": opt_shape(24, 768, 12),
    "opt-2.7b": opt_shape(32, 2560, 32),
    "opt-6.7b": opt_shape(32, 4096, 32),
    "opt-13b": opt_shape(40, 5120, 40),
    "opt-30b": opt_shape(48, 7168, 56),
    "opt-66b": opt_shape(64, 9216, 72),
    "smollm2-135m": llama_shape(30, 576, 9, 3, 1536, 49152, 8192, 1e5),
    "llama-3.2-1b": llama_shape(16, 2048, 32, 8, 8192, 128256, 131072, 5e5),
    "llama-3-8b": llama_shape(32, 4096, 32, 8, 14336, 128256, 8192, 5e5, is_head_tied=False),
    "mistral-7b": llama_shape(
        32, 4096, 32, 8, 14336, 32000, 32768, 1e4, is_head_tied=False, architecture="mistral", window=4096
    ),
    "qwen2.5-1.5b": llama_shape(28, 1536, 12, 2, 8960, 151936, 32768, 1e6, architecture="qwen2"),
    "qwen3-1.7b": llama_shape(28, 2048, 16, 8, 6144, 151936, 40960, 1e6, architecture="qwen3", head_size=128),
    "pythia-1.4b": gpt_neox_shape(24, 2048, 16, 8192, 50304),
    "phi-1.5": phi_shape(24, 2048, 32, 51200),
    "bloom-1b7": bloom_shape(24, 2048, 16),
    "gpt2": gpt2_shape(12, 768, 12),
}


def get_shape(name: str) -> DecoderConfig:
    """The shape of that name. Raises ValueError for an unknown one."""
    if name not in SHAPES:
        raise ValueError(f"get_shape: name must be one of {', '.join(SHAPES)}, got {name!r}.")
    return SHAPES[name]
