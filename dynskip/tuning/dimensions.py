"""The sizes of a model's matrices: all that the speed of its kernels depends on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dynskip.assets import find_model


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a decoder of OPT's kind. C, F, H and V stand in `docs/structures.md`."""

    name: str
    num_layers: int
    hidden_size: int
    ffn_dim: int
    num_heads: int
    vocab_size: int = 50272

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"Dimensions: num_heads must divide hidden_size {self.hidden_size}, got {self.num_heads}. "
                "Check the model's config."
            )

    @property
    def head_size(self) -> int:
        """D, the size of a head."""
        return self.hidden_size // self.num_heads

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """N and K of each matrix that a decode step multiplies by."""
        return {
            "fc1": (self.ffn_dim, self.hidden_size),
            "fc2": (self.hidden_size, self.ffn_dim),
            "qkv": (3 * self.hidden_size, self.hidden_size),
            "out_proj": (self.hidden_size, self.hidden_size),
            "head": (self.vocab_size, self.hidden_size),
        }


# The published models whose layers all have one size; 350m's embedding has another, and it is normalised after its
# layers, for which there are no fused kernels.
KNOWN = {
    dimensions.name: dimensions
    for dimensions in (
        Dimensions("opt-125m", 12, 768, 3072, 12),
        Dimensions("opt-1.3b", 24, 2048, 8192, 32),
        Dimensions("opt-2.7b", 32, 2560, 10240, 32),
        Dimensions("opt-6.7b", 32, 4096, 16384, 32),
        Dimensions("opt-13b", 40, 5120, 20480, 40),
        Dimensions("opt-30b", 48, 7168, 28672, 56),
        Dimensions("opt-66b", 64, 9216, 36864, 72),
    )
}


def get_dimensions(model: str) -> Dimensions:
    """The dimensions of a published model, or of the checkpoint in the folder ``model``.

    Raises: ValueError where it is neither, or is no OPT model.
    """
    if model in KNOWN:
        return KNOWN[model]
    path = Path(find_model(model)) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"get_dimensions: model must be one of {', '.join(KNOWN)}, or a folder with a config.json, got {model!r}."
        )
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_type") != "opt":
        raise ValueError(f"get_dimensions: model must be an OPT model, got {config.get('model_type')!r} in {path}.")
    return Dimensions(
        Path(model).resolve().name,
        config["num_hidden_layers"],
        config["hidden_size"],
        config["ffn_dim"],
        config["num_attention_heads"],
        config["vocab_size"],
    )
