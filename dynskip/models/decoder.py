"""The decoder: embedding, layers and final norm, made from a `DecoderConfig`.

A layer has two forms. The functional one takes rows and returns rows; it is the specification, and differentiable. The
in-place one updates the residual stream of many sequences through the launchers of a backend. `FusedLayer` is what the
fused kernels of a decode step need of it.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynskip.kernels.row_list import RowNorm
from dynskip.models.config import DecoderConfig
from dynskip.models.linear import Linear, merge
from dynskip.ops import reference
from dynskip.ops.backends import Backend

# Where one large product is faster than three: query, key and value of the rows that need all of them.
_MERGED_DEVICES = {"cuda"}


class Norm(nn.Module):
    """LayerNorm or RMSNorm of rows of ``size`` values, as ``config`` has it; ``affine``: with weight, and bias."""

    def __init__(self, config: DecoderConfig, size: int, affine: bool = True, rms: bool | None = None) -> None:
        super().__init__()
        self.rms = config.norm == "rms" if rms is None else rms
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if affine and not self.rms else None

    def forward(self, rows: Tensor) -> Tensor:
        """``rows`` [..., size], normalised."""
        if self.rms:
            return F.rms_norm(rows, rows.shape[-1:], self.weight, self.eps)
        return F.layer_norm(rows, rows.shape[-1:], self.weight, self.bias, self.eps)

    def of_rows(self) -> RowNorm:
        """The norm as kernels take it."""
        return RowNorm(self.weight, self.bias, self.eps, self.rms)


class Positions(NamedTuple):
    """Where rows stand: ids [R], int64, from 0; cos_sin: the decoder's table, None where nothing is rotated."""

    ids: Tensor
    cos_sin: Tensor | None

    def of(self, row_ids: Tensor | None) -> Positions:
        """The positions of some of the rows; of all for None. Only what is rotated asks for them."""
        if row_ids is None or self.cos_sin is None:
            return self
        return Positions(self.ids.index_select(0, row_ids), self.cos_sin)


class FusedLayer(NamedTuple):
    """What the fused kernels need of a layer: dense weights [out, in], those of query, key and value in one."""

    qkv_weight: Tensor
    qkv_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None


class DecoderLayer(nn.Module):
    """One layer: attention and feed-forward, with their norms and residuals where ``config`` has them.

    scale: of scores. window: positions that a query sees back, 0 for all. slopes: [H], float32, of ALiBi, or None.
    """

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        size, affine = config.hidden_size, config.norm_affine
        query_size, key_size = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.config = config
        self.scale, self.window = config.layer_scale(index), config.layer_window(index)
        self.attention_norm = Norm(config, size, affine)
        self.q_proj = Linear(size, query_size, bias=config.qkv_bias)
        self.k_proj = Linear(size, key_size, bias=config.qkv_bias)
        self.v_proj = Linear(size, key_size, bias=config.qkv_bias)
        self.q_norm = Norm(config, config.head_size, rms=True) if config.qk_norm else None
        self.k_norm = Norm(config, config.head_size, rms=True) if config.qk_norm else None
        self.out_proj = Linear(query_size, size, bias=config.out_bias)
        self.ffn_norm = None if config.shared_norm else Norm(config, size, affine)
        # The gate's rows, then those that it multiplies.
        self.fc1 = Linear(size, (2 if config.gated else 1) * config.ffn_size, bias=config.mlp_bias)
        self.fc2 = Linear(config.ffn_size, size, bias=config.mlp_bias)

    @property
    def feed_forward_norm(self) -> Norm:
        """The norm of the feed-forward's rows, which may be the attention's."""
        return self.attention_norm if self.ffn_norm is None else self.ffn_norm

    # The functional form.

    def query(self, rows: Tensor, positions: Positions) -> Tensor:
        """[R, H, D]: the queries of the layer's input ``rows`` [R, C]."""
        rows = self.attention_norm(rows) if self.config.norm_first else rows
        return self._rotated(self._heads(_dense(self.q_proj, rows)), positions, self.q_norm)

    def key_value(self, rows: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Keys and values, each [R, G, D], of the layer's input ``rows`` [R, C]."""
        rows = self.attention_norm(rows) if self.config.norm_first else rows
        key = self._rotated(self._heads(_dense(self.k_proj, rows)), positions, self.k_norm)
        return key, self._heads(_dense(self.v_proj, rows))

    def output(self, rows: Tensor, attention: Tensor) -> Tensor:
        """[R, C]: the layer's output for its input ``rows`` [R, C] and their ``attention`` [R, H, D]."""
        norm_first = self.config.norm_first
        attended = rows + _dense(self.out_proj, attention.flatten(1))
        attended = attended if norm_first else self.attention_norm(attended)
        inner = rows if self.config.parallel else attended
        inner = self.feed_forward_norm(inner) if norm_first else inner
        inner = reference.activate(_dense(self.fc1, inner), self.config.activation, self.config.gated)
        rows = attended + _dense(self.fc2, inner)
        return rows if norm_first else self.feed_forward_norm(rows)

    # The in-place form.

    def attention_input(self, hidden_states: Tensor, row_ids: Tensor | None, backend: Backend) -> Tensor:
        """[R, C]: what the projections of attention see of some rows of the residual stream [N, C]."""
        return self._input(self.attention_norm, hidden_states, row_ids, backend)

    def project(
        self, rows: Tensor, positions: Positions, backend: Backend, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [R, H, D], keys and values [R, G, D] of `attention_input` ``rows`` [R, C]: on a GPU one product."""
        if rows.device.type not in _MERGED_DEVICES or deterministic or self.q_proj.packed:
            query = self.project_query(rows, positions, backend, deterministic)
            return query, *self.project_key_value(rows, positions, backend, deterministic)
        weight, bias = self.merged()
        sizes = [linear.out_features for linear in (self.q_proj, self.k_proj, self.v_proj)]
        query, key, value = map(self._heads, torch.split(F.linear(rows, weight, bias), sizes, dim=1))
        self._rotate_(query, positions, self.q_norm, backend)
        self._rotate_(key, positions, self.k_norm, backend)
        return query, key, value

    def project_query(self, rows: Tensor, positions: Positions, backend: Backend, deterministic: bool) -> Tensor:
        """[R, H, D]: queries of `attention_input` ``rows`` [R, C]."""
        query = self._heads(self.q_proj(rows, deterministic=deterministic))
        self._rotate_(query, positions, self.q_norm, backend)
        return query

    def project_key_value(
        self, rows: Tensor, positions: Positions, backend: Backend, deterministic: bool
    ) -> tuple[Tensor, Tensor]:
        """Keys and values, each [R, G, D], of `attention_input` ``rows`` [R, C]."""
        key = self._heads(self.k_proj(rows, deterministic=deterministic))
        value = self._heads(self.v_proj(rows, deterministic=deterministic))
        self._rotate_(key, positions, self.k_norm, backend)
        return key, value

    def finish_(
        self, hidden_states: Tensor, row_ids: Tensor | None, attention: Tensor, backend: Backend, deterministic: bool
    ) -> None:
        """Add the projected ``attention`` [R, H, D] and the feed-forward to some rows of the residual stream [N, C]."""
        config, norm = self.config, self.feed_forward_norm
        inner = self._input(norm, hidden_states, row_ids, backend) if config.parallel else None
        delta = self.out_proj(attention.flatten(1), deterministic=deterministic)
        self._add_(self.attention_norm, hidden_states, row_ids, delta, backend)
        if inner is None:
            inner = self._input(norm, hidden_states, row_ids, backend)
        if config.gated:
            inner = backend.activate(self.fc1(inner, deterministic=deterministic), config.activation, True)
        else:
            inner = self.fc1(inner, activation=config.activation, deterministic=deterministic)
        self._add_(norm, hidden_states, row_ids, self.fc2(inner, deterministic=deterministic), backend)

    # The fused form.

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight [(H + 2 G) D, C] and bias or None of query, key and value: the projections hold views of them.

        Merges them where they are not, and copies nothing where they are. Raises RuntimeError for packed projections.
        """
        return merge((self.q_proj, self.k_proj, self.v_proj))

    def fused(self) -> FusedLayer:
        """The layer as the fused kernels take it; packed weights are copied, dense ones are the layer's own."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if self.q_proj.packed:
            biases: list[Tensor] = [linear.bias for linear in projections if linear.bias is not None]
            qkv_weight = torch.cat([linear.dense_weight() for linear in projections])
            qkv_bias = torch.cat(biases) if biases else None
        else:
            qkv_weight, qkv_bias = self.merged()
        return FusedLayer(
            qkv_weight,
            qkv_bias,
            self.out_proj.dense_weight(),
            self.out_proj.bias,
            self.fc1.dense_weight(),
            self.fc1.bias,
            self.fc2.dense_weight(),
            self.fc2.bias,
        )

    def _rotated(self, heads: Tensor, positions: Positions, norm: Norm | None) -> Tensor:
        if positions.cos_sin is None:
            return heads
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return reference.rotated(heads, positions.ids, positions.cos_sin, weight, eps)

    def _rotate_(self, heads: Tensor, positions: Positions, norm: Norm | None, backend: Backend) -> None:
        if positions.cos_sin is not None:
            weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            backend.rotate(heads, positions.ids, positions.cos_sin, weight, eps)

    def _input(self, norm: Norm, hidden_states: Tensor, row_ids: Tensor | None, backend: Backend) -> Tensor:
        if self.config.norm_first:
            return backend.gather_layer_norm(hidden_states, row_ids, *norm.of_rows())
        return hidden_states if row_ids is None else hidden_states.index_select(0, row_ids)

    def _add_(self, norm: Norm, hidden_states: Tensor, row_ids: Tensor | None, delta: Tensor, backend: Backend) -> None:
        backend.scatter_add(hidden_states, row_ids, delta)
        if self.config.norm_first:
            return
        normed = backend.gather_layer_norm(hidden_states, row_ids, *norm.of_rows())
        if row_ids is None:
            hidden_states.copy_(normed)
        else:
            hidden_states.index_copy_(0, row_ids.long(), normed)

    def _heads(self, rows: Tensor) -> Tensor:
        head_size = self.config.head_size
        return rows.view(rows.shape[0], rows.shape[1] // head_size, head_size)


def _embedding(num_rows: int, size: int) -> nn.Embedding:
    """One whose values are still to come: drawing them on the meta device would import PyTorch's compiler."""
    return nn.Embedding(num_rows, size, _weight=torch.empty(num_rows, size))


class Decoder(nn.Module):
    """A decoder without its head: embedding of tokens and positions, layers, final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        embed_size, size = config.embedding_size, config.hidden_size
        projected = embed_size != size
        self.config = config
        self.embed_tokens = _embedding(config.vocab_size, embed_size)
        num_positions = config.max_positions + config.position_offset
        self.embed_positions = _embedding(num_positions, size) if config.has_position_table else None
        self.project_out = Linear(size, embed_size, bias=False) if projected else None
        self.project_in = Linear(embed_size, size, bias=False) if projected else None
        self.embed_norm = Norm(config, size) if config.embedding_norm else None
        self.final_norm = Norm(config, size, config.norm_affine) if config.final_norm else None
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        self._tables: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights, hidden states and key-value cache."""
        return self._embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embedding.device

    @property
    def _embedding(self) -> Tensor:
        # Every step asks for it: where modules keep what they have is found at once, by its name in many calls.
        embedding = self._modules["embed_tokens"]
        assert embedding is not None
        weight = embedding._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def cos_sin(self) -> Tensor | None:
        """[P, E], float32: cosines and sines of every position, for `reference.rotated`; None without rotation."""
        return self._tables_here()[0]

    @property
    def slopes(self) -> Tensor | None:
        """[H], float32: ALiBi's, or None."""
        return self._tables_here()[1]

    def stack(self) -> list[DecoderLayer]:
        """The layers, from the first to the last."""
        return cast("list[DecoderLayer]", list(self.layers))

    def embed(
        self, token_ids: Tensor, position_ids: Tensor, deterministic: bool = False, backend: Backend | None = None
    ) -> Tensor:
        """[N, C]: the first layer's input for ``token_ids`` and ``position_ids``, each [N], int64; positions from 0.

        backend: whose launcher normalises; None for the differentiable way, here and in `finish`.
        """
        states: Tensor = self.embed_tokens(token_ids)
        if self.project_in is not None:
            states = self.project_in(states, deterministic=deterministic)
        if self.embed_positions is not None:
            states = states + self.embed_positions(position_ids + self.config.position_offset)
        return states if self.embed_norm is None else _normed(self.embed_norm, states, backend)

    def finish(self, hidden_states: Tensor, deterministic: bool = False, backend: Backend | None = None) -> Tensor:
        """[R, E]: what the head sees of ``hidden_states`` [R, C], the last layer's output."""
        if self.final_norm is not None:
            hidden_states = _normed(self.final_norm, hidden_states, backend)
        if self.project_out is not None:
            hidden_states = self.project_out(hidden_states, deterministic=deterministic)
        return hidden_states

    def _tables_here(self) -> tuple[Tensor | None, Tensor | None]:
        """Tables that follow from the config, worked out once for each device."""
        device = self.device
        if device not in self._tables:
            config, rotary = self.config, self.config.rotary
            cos_sin = None
            if rotary is not None:
                frequencies = torch.tensor(rotary.frequencies, dtype=torch.float32, device=device)
                positions = torch.arange(config.max_positions, dtype=torch.float32, device=device)
                angles = positions[:, None] * frequencies
                cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1) * rotary.scaling
            slopes = torch.tensor(config.slopes, dtype=torch.float32, device=device) if config.alibi else None
            self._tables[device] = cos_sin, slopes
        return self._tables[device]


def _dense(linear: Linear, rows: Tensor) -> Tensor:
    return F.linear(rows, linear.dense_weight(), linear.bias)


def _normed(norm: Norm, rows: Tensor, backend: Backend | None) -> Tensor:
    normed: Tensor = norm(rows) if backend is None else backend.gather_layer_norm(rows, None, *norm.of_rows())
    return normed
