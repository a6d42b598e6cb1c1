"""`DecoderConfig`: what a decoder is, as data. Sizes, costs, memory, tuning and tables all ask it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The sizes of a decoder and what its layers are made of. Letters as in `docs/structures.md`.

    architecture: transformers' ``model_type``. num_heads: of queries. num_kv_heads: of keys and values.
    max_positions: tokens of a sequence at most. embedding_size: E, of a token's embedding; where it is not C, the
        embedding is projected to C and the last states back to E.
    norm_first: norms stand before attention and feed-forward, not behind them. norm_affine: they have weight and bias.
    final_norm: one more before the head. position_offset: rows of the position table that no token has.
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
    has_bias: bool = True
    is_head_tied: bool = True

    @property
    def kv_entry_size(self) -> int:
        """Values of one entry: the key and the value of one token in one layer, all heads."""
        return 2 * self.num_kv_heads * self.head_size

    @property
    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns, [out, in], of each matrix of a layer; those of query, key and value as one."""
        heads = self.num_heads * self.head_size
        return {
            "fc1": (self.ffn_size, self.hidden_size),
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
