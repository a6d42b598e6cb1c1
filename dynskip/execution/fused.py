"""Decode steps on state that lives on the device: no kernel asks the host which rows it works on, or how many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynskip.controllers import HiddenStateGate, TokenContext
from dynskip.execution.kv_cache import KVCache
from dynskip.execution.step_shape import LayerBounds, StepShape
from dynskip.kernels.row_list import RowList
from dynskip.models.linear import Linear
from dynskip.ops.row_ops import RowOps
from dynskip.ops.row_reference import KV_POLICY_CODES

if TYPE_CHECKING:
    from dynskip.models.decoder import FusedLayer, OPTDecoder


@dataclass(frozen=True)
class DecodeBuffers:
    """The state of a decode step of up to M rows; row r of each buffer belongs to the sequence in row r.

    token_ids, position_ids: [M], int64. cache_ids: [M], int32, each row's sequence in the cache, -1 for an empty row.
    hidden_states: [M, C], the residual stream. normed, query, attention: [M, C]. inner: [M, F]. logits: [M, V].
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
    def of(decoder: OPTDecoder, vocab_size: int, max_rows: int) -> DecodeBuffers:
        """Buffers of ``max_rows`` rows, on the device and in the dtype of ``decoder``; every row is empty."""
        table = decoder.embed_positions.weight
        layers = decoder.stack()
        num_layers, size, ffn_size = len(layers), table.shape[1], layers[0].fc1.out_features

        def rows(*shape: int) -> Tensor:
            return torch.zeros(max_rows, *shape, dtype=table.dtype, device=table.device)

        def integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=table.device)

        return DecodeBuffers(
            token_ids=integers(max_rows, dtype=torch.int64),
            position_ids=integers(max_rows, dtype=torch.int64),
            cache_ids=integers(max_rows).fill_(-1),
            hidden_states=rows(size),
            normed=rows(size),
            query=rows(size),
            attention=rows(size),
            inner=rows(ffn_size),
            logits=rows(vocab_size),
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
    """Runs decode steps of the sequences of one cache, one token a sequence, by the fused kernels of ``ops``.

    It has the cache's tensors, and leaves to others how long the cache itself is kept.

    Every method only launches: nothing is allocated, copied from the host or waited for, so that all of them can be
    captured in a CUDA graph. What a step does is given by a `StepShape`; which rows do it stands on the device.

    max_rows: M, the most rows of a step. on_layer: called with each layer's index and input [M, C] before it runs.
    """

    def __init__(
        self,
        decoder: OPTDecoder,
        lm_head: Linear,
        cache: KVCache,
        max_rows: int,
        ops: RowOps,
        deterministic: bool = False,
    ) -> None:
        reason = decoder.why_not_fused()
        if reason is not None:
            raise ValueError(f"FusedDecode: the model must be one that the fused kernels know, but {reason}.")
        self.decoder = decoder
        self.k_cache, self.v_cache = cache.k_cache, cache.v_cache
        self.slot_tables, self.context_lens = cache.slot_tables, cache.context_lens
        self.free_slots, self.slot_cursor = cache.free_slots, cache.slot_cursor
        self.max_rows = max_rows
        self.ops = ops
        self.deterministic = deterministic
        self.layers: list[FusedLayer] = [layer.fused() for layer in decoder.stack()]
        self.final_norm = decoder.final_norm()
        self.head_weight = lm_head.dense_weight()
        self.buffers = DecodeBuffers.of(decoder, lm_head.out_features, max_rows)
        first = self.layers[0]
        self.workspace = ops.workspace(
            max_rows=max_rows,
            num_heads=cache.k_cache.shape[1],
            head_size=cache.k_cache.shape[2],
            sizes=[tuple(first.out_weight.shape), tuple(first.fc2_weight.shape)],
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
        """Put the sequences ``cache_ids`` ([N], int) into rows 0..N-1, and none into the others."""
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
        decoder = self.decoder
        ops.embed_rows(
            buffers.token_ids,
            buffers.position_ids,
            self._all_rows(shape.max_rows),
            decoder.embed_tokens.weight,
            decoder.embed_positions.weight,
            decoder.position_offset,
            buffers.hidden_states,
        )

    def layer(self, shape: StepShape, bounds: LayerBounds) -> None:
        """Run one layer for the rows that the plan, or the controller, gives it."""
        index = bounds.layer
        if shape.controller is not None:
            self._decide(shape, index)
        buffers, ops, layer = self.buffers, self.ops, self.layers[index]
        hidden_states, normed = buffers.hidden_states, buffers.normed
        num_run, num_kv = buffers.counts[0, index : index + 1], buffers.counts[1, index : index + 1]
        if bounds.max_kv:
            ops.qkv_rows(
                hidden_states,
                RowList(buffers.kv_ids[index], num_kv, bounds.max_kv),
                num_run,
                layer.attention_norm,
                layer.qkv_weight,
                layer.qkv_bias,
                buffers.query,
                self.k_cache,
                self.v_cache,
                buffers.slots[index],
                normed,
                self.deterministic,
            )
        if not bounds.max_run:
            return
        run = RowList(buffers.run_ids[index], num_run, bounds.max_run)
        ops.attend_rows(
            buffers.query,
            run,
            self.k_cache,
            self.v_cache,
            self.slot_tables[index],
            buffers.cache_ids,
            buffers.key_limits[index],
            layer.scale,
            buffers.attention,
            self.workspace,
            self.deterministic,
        )
        attended = buffers.attention
        ops.linear_add_rows(
            attended, run, layer.out_weight, layer.out_bias, hidden_states, self.workspace, self.deterministic
        )
        ops.linear_rows(
            hidden_states,
            run,
            layer.ffn_norm,
            layer.fc1_weight,
            layer.fc1_bias,
            "relu",
            False,
            buffers.inner,
            normed,
            self.deterministic,
        )
        ops.linear_add_rows(
            buffers.inner, run, layer.fc2_weight, layer.fc2_bias, hidden_states, self.workspace, self.deterministic
        )

    def head(self, max_rows: int) -> None:
        """Leave the logits of every row in ``buffers.logits``; max_rows: the bucket of the step."""
        buffers = self.buffers
        self.ops.linear_rows(
            buffers.hidden_states,
            self._all_rows(max_rows),
            self.final_norm,
            self.head_weight,
            None,
            "none",
            False,
            buffers.logits,
            buffers.normed,
            self.deterministic,
        )

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
