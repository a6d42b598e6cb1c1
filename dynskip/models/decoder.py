"""What is OPT's own: its embedding, its decoder layer and its head. No other module knows these.

Parameter names are those of transformers' ``modeling_opt.py``, so checkpoints need no key map. Each layer has two
forms. The functional one takes rows and returns rows; it is the specification, and differentiable. The in-place one
updates the residual stream of many sequences through the launchers of a backend; it is what runs in a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import OPTConfig
from transformers.activations import ACT2FN

from dynskip.kernels.row_list import RowNorm
from dynskip.models.linear import Linear, merge
from dynskip.ops.backends import Backend

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "ffn_dim",
    "num_attention_heads",
    "max_position_embeddings",
    "word_embed_proj_dim",
)
POSITION_OFFSET = 2  # rows 0 and 1 of OPT's position table are never used
# Where one large product is faster than three: query, key and value of the rows that need all of them.
_MERGED_DEVICES = {"cuda"}


class OPTAttention(nn.Module):
    """The projections of OPT's self-attention."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.enable_bias
        self.k_proj = Linear(size, size, bias=bias)
        self.v_proj = Linear(size, size, bias=bias)
        self.q_proj = Linear(size, size, bias=bias)
        self.out_proj = Linear(size, size, bias=bias)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight [3C, C] and bias [3C] or None of query, key and value, of which those of the projections are views.

        Merges them where they are not, and copies nothing where they are. Raises RuntimeError for packed projections.
        """
        return merge((self.q_proj, self.k_proj, self.v_proj))


class FusedLayer(NamedTuple):
    """What the fused kernels need of a layer: dense weights [out, in], those of query, key and value in one."""

    attention_norm: RowNorm
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    ffn_norm: RowNorm
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    scale: float


class OPTDecoderLayer(nn.Module):
    """One OPT layer: attention and feed-forward, each with a LayerNorm before it (350m: behind it)."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        size, bias, affine = config.hidden_size, config.enable_bias, config.layer_norm_elementwise_affine
        self.num_heads = config.num_attention_heads
        self.head_size = size // self.num_heads
        self.scale = self.head_size**-0.5
        self.norm_first = config.do_layer_norm_before
        self.self_attn = OPTAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(size, elementwise_affine=affine)
        self.fc1 = Linear(size, config.ffn_dim, bias=bias)
        self.fc2 = Linear(config.ffn_dim, size, bias=bias)
        self.final_layer_norm = nn.LayerNorm(size, elementwise_affine=affine)
        self.fused_relu = config.activation_function == "relu"
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[config.activation_function]

    # The functional form.

    def query(self, rows: Tensor) -> Tensor:
        """[R, H, D]: the queries of the layer's input ``rows`` [R, C]."""
        rows = self.self_attn_layer_norm(rows) if self.norm_first else rows
        return self._heads(_dense(self.self_attn.q_proj, rows))

    def key_value(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [R, H, D], of the layer's input ``rows`` [R, C]."""
        rows = self.self_attn_layer_norm(rows) if self.norm_first else rows
        return self._heads(_dense(self.self_attn.k_proj, rows)), self._heads(_dense(self.self_attn.v_proj, rows))

    def output(self, rows: Tensor, attention: Tensor) -> Tensor:
        """[R, C]: the layer's output for its input ``rows`` [R, C] and their ``attention`` [R, H, D]."""
        rows = rows + _dense(self.self_attn.out_proj, attention.reshape(rows.shape))
        rows = rows if self.norm_first else self.self_attn_layer_norm(rows)
        hidden = self.final_layer_norm(rows) if self.norm_first else rows
        rows = rows + _dense(self.fc2, self.activation(_dense(self.fc1, hidden)))
        return rows if self.norm_first else self.final_layer_norm(rows)

    # The in-place form.

    def attention_input(self, hidden_states: Tensor, row_ids: Tensor | None, backend: Backend) -> Tensor:
        """[R, C]: what the projections of attention see of some rows of the residual stream [N, C]."""
        return self._input(self.self_attn_layer_norm, hidden_states, row_ids, backend)

    def project(self, attention_input: Tensor, deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [R, H, D], of ``attention_input`` [R, C]: on a GPU one product."""
        attention = self.self_attn
        one = attention_input.device.type in _MERGED_DEVICES and not deterministic and not attention.q_proj.packed
        if not one:
            return self.project_query(attention_input, deterministic), *self.project_key_value(
                attention_input, deterministic
            )
        weight, bias = attention.merged()
        projected = F.linear(attention_input, weight, bias).view(-1, 3, self.num_heads, self.head_size)
        return projected[:, 0], projected[:, 1], projected[:, 2]

    def project_query(self, attention_input: Tensor, deterministic: bool) -> Tensor:
        """[R, H, D]: queries of ``attention_input`` [R, C]."""
        return self._heads(self.self_attn.q_proj(attention_input, deterministic=deterministic))

    def project_key_value(self, attention_input: Tensor, deterministic: bool) -> tuple[Tensor, Tensor]:
        """Keys and values, each [R, H, D], of ``attention_input`` [R, C]."""
        key = self.self_attn.k_proj(attention_input, deterministic=deterministic)
        value = self.self_attn.v_proj(attention_input, deterministic=deterministic)
        return self._heads(key), self._heads(value)

    def add_attention_(
        self, hidden_states: Tensor, row_ids: Tensor | None, attention: Tensor, backend: Backend, deterministic: bool
    ) -> None:
        """Add the projected ``attention`` [R, H, D] to its rows of the residual stream [N, C]."""
        delta = self.self_attn.out_proj(attention.flatten(1), deterministic=deterministic)
        self._add_(self.self_attn_layer_norm, hidden_states, row_ids, delta, backend)

    def add_feed_forward_(
        self, hidden_states: Tensor, row_ids: Tensor | None, backend: Backend, deterministic: bool
    ) -> None:
        """Add the feed-forward of some rows to the residual stream [N, C]."""
        inner = self._input(self.final_layer_norm, hidden_states, row_ids, backend)
        if self.fused_relu:
            inner = self.fc1(inner, activation="relu", deterministic=deterministic)
        else:
            inner = self.activation(self.fc1(inner, deterministic=deterministic))
        delta = self.fc2(inner, deterministic=deterministic)
        self._add_(self.final_layer_norm, hidden_states, row_ids, delta, backend)

    # The fused form.

    def why_not_fused(self) -> str | None:
        """Why the fused kernels cannot run this layer, in words; None where they can."""
        if not self.norm_first:
            return "its LayerNorms stand behind attention and feed-forward"
        return None if self.fused_relu else "its activation is not ReLU"

    def fused(self) -> FusedLayer:
        """The layer as the fused kernels take it; packed weights are copied, dense ones are the layer's own."""
        attention = self.self_attn
        if attention.q_proj.packed:
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            biases: list[Tensor] = [linear.bias for linear in projections if linear.bias is not None]
            qkv_weight = torch.cat([linear.dense_weight() for linear in projections])
            qkv_bias = torch.cat(biases) if biases else None
        else:
            qkv_weight, qkv_bias = attention.merged()
        return FusedLayer(
            row_norm(self.self_attn_layer_norm),
            qkv_weight,
            qkv_bias,
            attention.out_proj.dense_weight(),
            attention.out_proj.bias,
            row_norm(self.final_layer_norm),
            self.fc1.dense_weight(),
            self.fc1.bias,
            self.fc2.dense_weight(),
            self.fc2.bias,
            self.scale,
        )

    def _input(self, norm: nn.LayerNorm, hidden_states: Tensor, row_ids: Tensor | None, backend: Backend) -> Tensor:
        if self.norm_first:
            return backend.gather_layer_norm(hidden_states, row_ids, norm.weight, norm.bias, norm.eps)
        return hidden_states if row_ids is None else hidden_states.index_select(0, row_ids)

    def _add_(
        self, norm: nn.LayerNorm, hidden_states: Tensor, row_ids: Tensor | None, delta: Tensor, backend: Backend
    ) -> None:
        backend.scatter_add(hidden_states, row_ids, delta)
        if self.norm_first:
            return
        normed = backend.gather_layer_norm(hidden_states, row_ids, norm.weight, norm.bias, norm.eps)
        if row_ids is None:
            hidden_states.copy_(normed)
        else:
            hidden_states.index_copy_(0, row_ids.long(), normed)

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.view(rows.shape[0], self.num_heads, self.head_size)


class OPTDecoder(nn.Module):
    """OPT without its head: token and position embedding, layers, final LayerNorm."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        embed_size, size = embedding_size(config), config.hidden_size
        projected = embed_size != size
        final_norm = config.do_layer_norm_before and not config._remove_final_layer_norm
        self.embed_tokens = nn.Embedding(config.vocab_size, embed_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings + POSITION_OFFSET, size)
        self.project_out = Linear(size, embed_size, bias=False) if projected else None
        self.project_in = Linear(embed_size, size, bias=False) if projected else None
        self.final_layer_norm = (
            nn.LayerNorm(size, elementwise_affine=config.layer_norm_elementwise_affine) if final_norm else None
        )
        self.layers = nn.ModuleList(OPTDecoderLayer(config) for _ in range(config.num_hidden_layers))

    def stack(self) -> list[OPTDecoderLayer]:
        """The layers, from the first to the last."""
        return cast("list[OPTDecoderLayer]", list(self.layers))

    position_offset = POSITION_OFFSET

    def why_not_fused(self) -> str | None:
        """Why the fused kernels cannot run this decoder, in words; None where they can."""
        if self.project_in is not None:
            return "its embedding has another size than its layers"
        return self.stack()[0].why_not_fused()

    def final_norm(self) -> RowNorm | None:
        """The LayerNorm before the head as the fused kernels take it."""
        return None if self.final_layer_norm is None else row_norm(self.final_layer_norm)

    def embed(self, token_ids: Tensor, position_ids: Tensor, deterministic: bool = False) -> Tensor:
        """[N, C]: the first layer's input for ``token_ids`` and ``position_ids``, each [N], int64; positions from 0."""
        tokens = self.embed_tokens(token_ids)
        if self.project_in is not None:
            tokens = self.project_in(tokens, deterministic=deterministic)
        return tokens + self.embed_positions(position_ids + POSITION_OFFSET)

    def finish(self, hidden_states: Tensor, deterministic: bool = False) -> Tensor:
        """[R, E]: what the head sees of ``hidden_states`` [R, C], the last layer's output."""
        if self.final_layer_norm is not None:
            hidden_states = self.final_layer_norm(hidden_states)
        if self.project_out is not None:
            hidden_states = self.project_out(hidden_states, deterministic=deterministic)
        return hidden_states


class OPTModel(nn.Module):
    """A level of nesting that transformers' checkpoints have."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        self.decoder = OPTDecoder(config)


def row_norm(norm: nn.LayerNorm) -> RowNorm:
    """A LayerNorm as the fused kernels take it."""
    return RowNorm(norm.weight, norm.bias, norm.eps)


def embedding_size(config: OPTConfig) -> int:
    """E, the size of token embeddings and of what the head sees; C except in 350m."""
    return config.word_embed_proj_dim or config.hidden_size


def check_config(config: OPTConfig) -> None:
    """Raise ValueError where ``config`` describes no OPT decoder that can be built."""
    if config.model_type != "opt":
        raise ValueError(
            f"CausalLM: config must describe an OPT model, got model_type {config.model_type!r}. "
            "Other architectures are not supported."
        )
    for size in _SIZES:
        value = getattr(config, size)
        if type(value) is not int or value < 1:
            raise ValueError(f"CausalLM: {size} must be an integer of at least 1, got {value!r}.")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"CausalLM: num_attention_heads must divide hidden_size {config.hidden_size}, "
            f"got {config.num_attention_heads}."
        )
    if config.activation_function not in ACT2FN:
        raise ValueError(
            f"CausalLM: activation_function must be known to transformers, got {config.activation_function!r}."
        )


def _dense(linear: Linear, rows: Tensor) -> Tensor:
    return F.linear(rows, linear.dense_weight(), linear.bias)
