"""`DecoderConfig`: what a decoder is, as data. Sizes, costs, memory, tuning and tables all ask it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary positions (arXiv 2104.09864): value i of a head and value i + E/2 turn together, E/2 pairs in all.

    frequencies: [E/2], radians a position. scaling: of cosines and sines, as YaRN has it.
    """

    frequencies: tuple[float, ...]
    scaling: float = 1.0

    @staticmethod
    def plain(size: int, theta: float) -> Rotary:
        """Those of ``size`` values whose wave lengths grow geometrically up to 2 pi ``theta`` positions."""
        return Rotary(tuple(theta ** (-2 * i / size) for i in range(size // 2)))


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The sizes of a decoder and what its layers are made of. Letters as in `docs/structures.md`.

    architecture: transformers' ``model_type``. num_heads: of queries. num_kv_heads: of keys and values, a divisor.
    max_positions: tokens of a sequence at most. embedding_size: E, of a token's embedding; where it is not C, the
        embedding is projected to C and the last states back to E.
    norm: "layer" or "rms". norm_first: norms stand before attention and feed-forward, not behind them. norm_affine:
        they have weights, and those of LayerNorm biases. final_norm: one more before the head. embedding_norm: one
        behind the embedding. qk_norm: an RMSNorm of each head's query and key. shared_norm: the feed-forward has none
        of its own and reads the attention's.
    parallel: attention and feed-forward read the same rows, and both are added to them.
    activation: one of `dynskip.ops.reference.ACTIVATIONS`. gated: it multiplies a second product.
    rotary, alibi (arXiv 2108.12409): how attention sees positions; with neither a table of learned ones is added to
        the embedding, whose first position_offset rows no token has.
    window: positions that a token sees back, itself included; 0 for all. window_layers: which layers have it; None for
        all. attention_scale: of scores; None for head_size ** -0.5. scale_by_depth: layer l divides it by l + 1.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    embedding_size: int
    norm_eps: float = 1e-5
    norm_affine: bool = True
    norm_first: bool = True
    final_norm: bool = True
    position_offset: int = 0
    activation: str = "relu"
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    is_head_tied: bool = True
    norm: str = "layer"
    embedding_norm: bool = False
    qk_norm: bool = False
    shared_norm: bool = False
    parallel: bool = False
    gated: bool = False
    rotary: Rotary | None = None
    alibi: bool = False
    window: int = 0
    window_layers: tuple[int, ...] | None = None
    attention_scale: float | None = None
    scale_by_depth: bool = False

    @staticmethod
    def of_sizes(architecture: str, num_layers: int, hidden_size: int, num_heads: int, **others: Any) -> DecoderConfig:
        """A decoder whose sizes follow where ``others`` has none: as many heads of keys, F four times C, E like C."""
        sizes = {
            "num_kv_heads": num_heads,
            "head_size": hidden_size // num_heads,
            "ffn_size": 4 * hidden_size,
            "embedding_size": hidden_size,
        }
        return DecoderConfig(architecture, num_layers, hidden_size, num_heads, **{**sizes, **others})

    @property
    def kv_entry_size(self) -> int:
        """Values of one entry: the key and the value of one token in one layer, all heads."""
        return 2 * self.num_kv_heads * self.head_size

    @property
    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns, [out, in], of each matrix of a layer; query, key and value as one, gate and up as one."""
        heads = self.num_heads * self.head_size
        return {
            "fc1": ((2 if self.gated else 1) * self.ffn_size, self.hidden_size),
            "fc2": (self.hidden_size, self.ffn_size),
            "qkv": (heads + self.kv_entry_size, self.hidden_size),
            "out_proj": (self.hidden_size, heads),
        }

    @property
    def head_matrix(self) -> tuple[int, int]:
        """Rows and columns, [V, E], of the head."""
        return self.vocab_size, self.embedding_size

    @property
    def layer_size(self) -> int:
        """Values of the matrices of one layer."""
        return sum(rows * columns for rows, columns in self.layer_matrices.values())

    @property
    def has_position_table(self) -> bool:
        """Whether positions are learned."""
        return self.rotary is None and not self.alibi

    @property
    def rotary_size(self) -> int:
        """E, the values of a head that turn with its position."""
        return 0 if self.rotary is None else 2 * len(self.rotary.frequencies)

    @property
    def attends_by_position(self) -> bool:
        """Whether attention asks how far a key stands from a query, which a cache then has to know."""
        return self.alibi or self.window > 0

    def layer_window(self, layer: int) -> int:
        """The window of ``layer``, 0 for none."""
        return self.window if self.window_layers is None or layer in self.window_layers else 0

    def layer_scale(self, layer: int) -> float:
        """What the scores of ``layer`` are multiplied by."""
        scale = self.head_size**-0.5 if self.attention_scale is None else self.attention_scale
        return scale / (layer + 1) if self.scale_by_depth else scale

    @property
    def slopes(self) -> tuple[float, ...]:
        """[H]: ALiBi's: geometric steps from 2 ** (-8 / n) on, n a power of two; other heads in between."""
        whole = 2 ** math.floor(math.log2(self.num_heads))
        slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
        between = [2 ** (-4 * (2 * i + 1) / whole) for i in range(self.num_heads - whole)]
        return tuple(slopes + between)
