"""Decode steps on state that lives on the device: no kernel asks the host which rows it works on, or how many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dynskip.controllers import HiddenStateGate, TokenContext
from dynskip.execution.kv_cache import KVCache
from dynskip.execution.step_shape import LayerBounds, StepShape
from dynskip.kernels.row_list import RowList, RowNorm
from dynskip.models.decoder import Decoder, FusedLayer
from dynskip.models.linear import Linear
from dynskip.ops.row_ops import RowOps
from dynskip.ops.row_reference import KV_POLICY_CODES


@dataclass(frozen=True)
class DecodeBuffers:
    """The state of a decode step of up to M rows; row r of each buffer belongs to the sequence in row r.

    token_ids, position_ids: [M], int64. cache_ids: [M], int32, each row's sequence in the cache, -1 for an empty row.
    hidden_states: [M, C], the residual stream. normed: [M, C]. query, attention: [M, H * D]. inner: [M, F].
    embedded: [M, E], between the residual stream and embedding or head, where these have another size; else empty.
    logits: [M, V].
    active: [L, M], bool, which rows run which layer. all_ids: [M], int32, the rows of the step, then -1. The rest is
        what `plan_rows` makes of it.
    """

    token_ids: Tensor
    position_ids: Tensor
    cache_ids: Tensor
    hidden_states: Tensor
    normed: Tensor
    query: Tensor
    attention: Tensor
    inner: Tensor
    embedded: Tensor
    logits: Tensor
    active: Tensor
    all_ids: Tensor
    num_rows: Tensor
    row_slots: Tensor
    run_ids: Tensor
    kv_ids: Tensor
    counts: Tensor  # [2, L], int32: how many rows run, and compute key and value
    slots: Tensor
    key_limits: Tensor

    @staticmethod
    def of(decoder: Decoder, max_rows: int) -> DecodeBuffers:
        """Buffers of ``max_rows`` rows, on the device and in the dtype of ``decoder``; every row is empty."""
        config, device = decoder.config, decoder.device
        num_layers, size, heads_size = config.num_layers, config.hidden_size, config.num_heads * config.head_size

        def rows(*shape: int) -> Tensor:
            return torch.zeros(max_rows, *shape, dtype=decoder.dtype, device=device)

        def integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return DecodeBuffers(
            token_ids=integers(max_rows, dtype=torch.int64),
            position_ids=integers(max_rows, dtype=torch.int64),
            cache_ids=integers(max_rows).fill_(-1),
            hidden_states=rows(size),
            normed=rows(size),
            query=rows(heads_size),
            attention=rows(heads_size),
            inner=rows(config.ffn_size),
            embedded=rows(config.embedding_size if decoder.project_in is not None else 0),
            logits=rows(config.vocab_size),
            active=integers(num_layers, max_rows, dtype=torch.bool),
            all_ids=integers(max_rows).fill_(-1),
            num_rows=integers(1),
            row_slots=integers(max_rows),
            run_ids=integers(num_layers, max_rows),
            kv_ids=integers(num_layers, max_rows),
            counts=integers(2, num_layers),
            slots=integers(num_layers, max_rows),
            key_limits=integers(num_layers, max_rows),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes that all buffers take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in vars(self).values())


class FusedDecode:
    """Runs decode steps of the sequences of one cache by the fused kernels of ``ops``.

    It has the cache's tensors, and leaves to others how long the cache itself is kept.

    Every method only launches: nothing is allocated, copied from the host or waited for, so that all of them can be
    captured in a CUDA graph. What a step does is given by a `StepShape`; which rows do it stands on the device.

    max_rows: M, the most rows of a step. on_layer: called with each layer's index and input [M, C] before it runs.
    """

    def __init__(
        self,
        decoder: Decoder,
        lm_head: Linear,
        cache: KVCache,
        max_rows: int,
        ops: RowOps,
        deterministic: bool = False,
    ) -> None:
        self.decoder = decoder
        self.config = decoder.config
        self.k_cache, self.v_cache, self.slot_positions = cache.k_cache, cache.v_cache, cache.slot_positions
        self.slot_tables, self.context_lens = cache.slot_tables, cache.context_lens
        self.free_slots, self.slot_cursor = cache.free_slots, cache.slot_cursor
        self.max_rows = max_rows
        self.ops = ops
        self.deterministic = deterministic
        self.layers = decoder.stack()
        self.weights: list[FusedLayer] = [layer.fused() for layer in self.layers]
        self.final_norm = None if decoder.final_norm is None else decoder.final_norm.of_rows()
        self.head_weight, self.head_bias = lm_head.dense_weight(), lm_head.bias
        self.project_in, self.project_out = (
            None if linear is None else linear.dense_weight() for linear in (decoder.project_in, decoder.project_out)
        )
        self.cos_sin, self.slopes = decoder.cos_sin, decoder.slopes
        self.buffers = DecodeBuffers.of(decoder, max_rows)
        first = self.weights[0]
        self.workspace = ops.workspace(
            max_rows=max_rows,
            num_heads=self.config.num_heads,
            num_kv_heads=self.config.num_kv_heads,
            head_size=self.config.head_size,
            sizes=[
                tuple(weight.shape)
                for weight in (first.out_weight, first.fc2_weight, self.project_in)
                if weight is not None
            ],
            max_context_len=cache.slot_tables.shape[2],
            device=cache.k_cache.device,
        )
        self._gates: dict[HiddenStateGate, tuple[Tensor, Tensor | None]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of buffers and workspace; weights and cache not counted."""
        workspace = () if self.workspace is None else self.workspace
        return self.buffers.num_bytes + sum(tensor.numel() * tensor.element_size() for tensor in workspace)

    def set_rows(self, cache_ids: Tensor) -> None:
        """Put the sequences ``cache_ids`` ([N], int) into rows 0..N-1, and none into the others.

        Rows of one sequence stand side by side, in the order of their positions.
        """
        num_rows = cache_ids.shape[0]
        torch.arange(num_rows, out=self.buffers.all_ids[:num_rows])
        self.buffers.all_ids[num_rows:].fill_(-1)
        self.buffers.cache_ids[:num_rows].copy_(cache_ids, non_blocking=True)
        self.buffers.cache_ids[num_rows:].fill_(-1)
        self.buffers.num_rows.fill_(num_rows)

    def set_tokens(self, token_ids: Tensor, position_ids: Tensor) -> None:
        """Give the next token of each row and its position, each [N], int64."""
        num_rows = token_ids.shape[0]
        self.buffers.token_ids[:num_rows].copy_(token_ids, non_blocking=True)
        self.buffers.position_ids[:num_rows].copy_(position_ids, non_blocking=True)

    def set_active(self, active: Tensor) -> None:
        """Say which rows run which layers: ``active`` [L, N], bool, on any device."""
        self.buffers.active[:, : active.shape[1]].copy_(active, non_blocking=True)

    def prepare_gate(self, gate: HiddenStateGate) -> None:
        """Keep the gate's parameters on the device, as float32."""
        if gate not in self._gates:
            device = self.buffers.active.device
            bias = None if gate.bias is None else gate.bias.to(device, torch.float32).contiguous()
            self._gates[gate] = gate.weight.to(device, torch.float32).contiguous(), bias

    def run(self, shape: StepShape, on_layer: Callable[[int, Tensor], None] | None = None, head: bool = False) -> None:
        """Run all layers; the last one's output stands in ``buffers.hidden_states``, the new entries in the cache.

        head: leave logits in ``buffers.logits``, too.
        Only layers of ``shape`` are launched. ``on_layer`` is called for those left out, too.
        """
        self.plan_and_embed(shape)
        layers = {layer.layer: layer for layer in shape.layers}
        for index in range(len(self.layers)):
            if on_layer is not None:
                on_layer(index, self.buffers.hidden_states)
            if index in layers:
                self.layer(shape, layers[index])
        if head:
            self.head(shape.max_rows)

    def warm_up(self, shape: StepShape) -> None:
        """Launch all that ``shape`` launches, for no rows: kernels are compiled and loaded, and nothing changes."""
        buffers = self.buffers
        of_rows = (buffers.cache_ids, buffers.all_ids, buffers.num_rows)
        before = [tensor.clone() for tensor in of_rows]
        buffers.cache_ids.fill_(-1)
        buffers.all_ids.fill_(-1)
        buffers.num_rows.zero_()
        if isinstance(shape.controller, HiddenStateGate):
            self.prepare_gate(shape.controller)
        self.run(shape, head=True)
        for tensor, values in zip(of_rows, before, strict=True):
            tensor.copy_(values)

    def plan_and_embed(self, shape: StepShape) -> None:
        """Embed the tokens, and plan all layers unless a controller is asked later."""
        buffers, ops = self.buffers, self.ops
        if shape.controller is None:
            self._plan(shape, 0, len(self.layers))
        decoder, rows = self.decoder, self._all_rows(shape.max_rows)
        tokens, table, offset = decoder.embed_tokens.weight, decoder.embed_positions, self.config.position_offset
        positions, states = buffers.position_ids, buffers.hidden_states
        if self.project_in is None:
            table_weight = None if table is None else table.weight
            ops.embed_rows(buffers.token_ids, positions, rows, tokens, table_weight, offset, states)
        else:
            ops.embed_rows(buffers.token_ids, positions, rows, tokens, None, 0, buffers.embedded)
            if table is None:
                states.zero_()
            else:
                ops.embed_rows(positions, positions, rows, table.weight[offset:], None, 0, states)
            ops.linear_add_rows(
                buffers.embedded, rows, self.project_in, None, states, self.workspace, self.deterministic
            )
        if decoder.embed_norm is not None:
            ops.norm_rows(states, rows, decoder.embed_norm.of_rows(), states)

    def layer(self, shape: StepShape, bounds: LayerBounds) -> None:
        """Run one layer for the rows that the plan, or the controller, gives it."""
        index = bounds.layer
        if shape.controller is not None:
            self._decide(shape, index)
        counts = self.buffers.counts
        num_run, num_kv = counts[0, index : index + 1], counts[1, index : index + 1]
        if bounds.max_kv:
            self._project(index, RowList(self.buffers.kv_ids[index], num_kv, bounds.max_kv), num_run)
        if bounds.max_run:
            run = RowList(self.buffers.run_ids[index], num_run, bounds.max_run)
            self._attend(index, run)
            self._finish(index, run)

    def head(self, max_rows: int) -> None:
        """Leave the logits of every row in ``buffers.logits``; max_rows: the bucket of the step."""
        buffers, rows = self.buffers, self._all_rows(max_rows)
        states, norm = buffers.hidden_states, self.final_norm
        if self.project_out is not None:
            self._multiply(states, rows, norm, self.project_out, None, buffers.embedded)
            states, norm = buffers.embedded, None
        self._multiply(states, rows, norm, self.head_weight, self.head_bias, buffers.logits)

    def _project(self, index: int, rows: RowList, num_run: Tensor) -> None:
        """Queries of the rows of a layer into ``buffers.query``, keys and values into the cache."""
        buffers, ops, layer, weights = self.buffers, self.ops, self.layers[index], self.weights[index]
        ops.qkv_rows(
            buffers.hidden_states,
            rows,
            num_run,
            layer.attention_norm.of_rows() if self.config.norm_first else None,
            weights.qkv_weight,
            weights.qkv_bias,
            buffers.query,
            self.k_cache,
            self.v_cache,
            buffers.slots[index],
            buffers.normed,
            self.deterministic,
        )
        if self.cos_sin is not None:
            q_norm, k_norm = layer.q_norm, layer.k_norm
            ops.rotate_rows(
                buffers.query,
                rows,
                self.k_cache,
                buffers.slots[index],
                buffers.position_ids,
                self.cos_sin,
                None if q_norm is None else q_norm.weight,
                None if k_norm is None else k_norm.weight,
                self.config.norm_eps,
            )
        if self.slot_positions is not None:
            ops.place_rows(rows, buffers.slots[index], buffers.position_ids, self.slot_positions)

    def _attend(self, index: int, rows: RowList) -> None:
        buffers, layer = self.buffers, self.layers[index]
        by_position: tuple[Tensor | int | None, ...] = ()
        if self.slopes is not None or layer.window:
            by_position = (self.slopes, layer.window, buffers.position_ids, self.slot_positions)
        self.ops.attend_rows(
            buffers.query,
            rows,
            self.k_cache,
            self.v_cache,
            self.slot_tables[index],
            buffers.cache_ids,
            buffers.key_limits[index],
            layer.scale,
            buffers.attention,
            self.workspace,
            self.deterministic,
            *by_position,
        )

    def _finish(self, index: int, rows: RowList) -> None:
        """Add attention and feed-forward of a layer to the residual stream."""
        buffers, config, weights = self.buffers, self.config, self.weights[index]
        states = buffers.hidden_states
        attention_norm, ffn_norm = (
            norm.of_rows() for norm in (self.layers[index].attention_norm, self.layers[index].feed_forward_norm)
        )
        if not config.parallel:
            self._add(buffers.attention, rows, weights.out_weight, weights.out_bias, attention_norm)
        self._multiply(
            states,
            rows,
            ffn_norm if config.norm_first else None,
            weights.fc1_weight,
            weights.fc1_bias,
            buffers.inner,
            config.activation,
            config.gated,
        )
        if config.parallel:
            self._add(buffers.attention, rows, weights.out_weight, weights.out_bias, attention_norm)
        self._add(buffers.inner, rows, weights.fc2_weight, weights.fc2_bias, ffn_norm)

    def _multiply(
        self,
        x: Tensor,
        rows: RowList,
        norm: RowNorm | None,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        activation: str = "none",
        gated: bool = False,
    ) -> None:
        normed = self.buffers.normed
        self.ops.linear_rows(x, rows, norm, weight, bias, activation, gated, out, normed, self.deterministic)

    def _add(self, x: Tensor, rows: RowList, weight: Tensor, bias: Tensor | None, norm: RowNorm) -> None:
        """Add a product to the residual stream; norm: that of post-norm models, which follows it."""
        states = self.buffers.hidden_states
        self.ops.linear_add_rows(x, rows, weight, bias, states, self.workspace, self.deterministic)
        if not self.config.norm_first:
            self.ops.norm_rows(states, rows, norm, states)

    def _all_rows(self, max_rows: int) -> RowList:
        return RowList(self.buffers.all_ids, self.buffers.num_rows, max_rows)

    def _decide(self, shape: StepShape, layer: int) -> None:
        buffers, controller = self.buffers, shape.controller
        active = buffers.active[layer]
        if isinstance(controller, HiddenStateGate):
            if layer in controller.always:
                active.fill_(True)
            else:
                weight, bias = self._gates[controller]
                layer_bias = None if bias is None else bias[layer]
                self.ops.gate_rows(
                    buffers.hidden_states, self._all_rows(shape.max_rows), weight[layer], layer_bias, active
                )
        else:
            assert controller is not None
            # Rows behind those of the step hold old numbers; what is said of them is never looked at.
            rows = slice(0, shape.max_rows)
            seq_ids = buffers.all_ids[rows].clamp(min=0)
            context = TokenContext(seq_ids, buffers.position_ids[rows], torch.zeros_like(buffers.active[0, rows]))
            active[rows].copy_(controller.active(layer, buffers.hidden_states[rows], context))
        self._plan(shape, layer, 1)

    def _plan(self, shape: StepShape, first_layer: int, num_layers: int) -> None:
        # Of the buffers, which have a row for each sequence of the cache, no more than the step may use: one block of
        # threads goes over all of it.
        buffers, rows = self.buffers, slice(0, shape.max_rows)
        self.ops.plan_rows(
            buffers.active[first_layer : first_layer + num_layers, rows],
            first_layer,
            KV_POLICY_CODES[shape.kv_policy],
            buffers.cache_ids[rows],
            self.context_lens,
            self.slot_tables,
            self.free_slots,
            self.slot_cursor,
            buffers.row_slots[rows],
            buffers.run_ids[:, rows],
            buffers.counts[0],
            buffers.kv_ids[:, rows],
            buffers.counts[1],
            buffers.slots[:, rows],
            buffers.key_limits[:, rows],
        )
