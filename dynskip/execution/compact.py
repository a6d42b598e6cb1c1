"""The executor that saves time: it gathers the active rows of each layer, runs the layer once, and scatters back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dynskip.execution.executor import Executor, Predictions
from dynskip.execution.fused import FusedDecode
from dynskip.execution.graphs import DecodeSteps, GraphMemory, sum_memory
from dynskip.execution.kv_cache import EntryIndex, KVCache
from dynskip.execution.native_steps import NativeSteps
from dynskip.execution.step import RowCounts, Step
from dynskip.execution.threads import check_fork
from dynskip.execution.turns import Guesses, Turns
from dynskip.kernels.row_list import ROW_BUCKETS, row_bucket
from dynskip.models.decoder import Decoder, DecoderLayer, Positions
from dynskip.models.linear import Linear
from dynskip.ops import choice, native, varlen_attention
from dynskip.ops.backends import Backend
from dynskip.ops.row_ops import get_row_ops, why_not_triton
from dynskip.routing.plan import KVPolicy, LayerPlan
from dynskip.sampling import Choice


class CompactExecutor(Executor[KVCache]):
    """Runs steps of many sequences, each layer once, on the compact rows that the plan gives it.

    The triton backend runs decode steps by its row ops, on a GPU from CUDA graphs; the native backend runs each in one
    call into the C++ extension. All other steps run op by op through the backend's launchers.

    native_steps: what runs the decode steps of the native backend; None on others.

    backend: whose launchers gather, scatter and attend. Raises RuntimeError where it is triton, and lacks its row ops.
    deterministic: compute each row with the same bits independent of its neighbours.
    """

    def __init__(self, decoder: Decoder, lm_head: Linear, backend: Backend, deterministic: bool = False) -> None:
        self.decoder = decoder
        self.lm_head = lm_head
        self.backend = backend
        self.deterministic = deterministic
        self.row_counts = RowCounts(len(decoder.layers))
        self.fuses = backend.name == "triton"
        reason = why_not_triton(decoder.device) if self.fuses else None
        if reason is not None:
            raise RuntimeError(f"CompactExecutor: decode steps must have the triton row ops, got none. {reason}")
        self.native_steps = (
            NativeSteps(decoder, lm_head, self.row_counts, deterministic) if backend.name == "native" else None
        )
        # Norms before the first and behind the last layer have the bits that they have in a whole step.
        self._normaliser = None if self.native_steps is None else backend
        self._retired: list[KVCache] = []  # at most one; a list, which threads may pop from
        # Several batches may take turns, each with a cache of its own; what was made for one lives as long as it.
        self._steps: WeakKeyDictionary[KVCache, DecodeSteps] = WeakKeyDictionary()

    def new_cache(self, num_seqs: int, max_context_len: int, num_slots: int) -> KVCache:
        """See `Executor.new_cache`. A retired one that is large enough is used again."""
        with suppress(IndexError):
            cache = self._retired.pop()
            if cache.holds(num_seqs, max_context_len, num_slots):
                cache.clear()
                return cache
            del cache  # the new one may need its memory
        config = self.decoder.config
        return KVCache(
            config.num_layers,
            num_seqs,
            max_context_len,
            num_slots,
            config.num_kv_heads,
            config.head_size,
            self.decoder.dtype,
            self.decoder.device,
            has_positions=config.attends_by_position,
        )

    def retire(self, cache: KVCache) -> None:
        """Keep ``cache``, which is used no more, for the next batch: graphs belong to one cache, and memory of the CPU
        that was written before costs no page faults (of OPT-1.3B's step for 32 sequences they were a tenth)."""
        if cache in self._steps or self.decoder.device.type == "cpu":
            self._retired[:] = [cache]

    def release(self) -> None:
        """Give back the memory of the retired cache, of static buffers and of graphs."""
        self._retired.clear()
        self._steps.clear()

    def warm_up(self, cache: KVCache, max_rows: int) -> None:
        """Compile and load what fused decode steps of at most ``max_rows`` rows and draws launch, before the first.

        Without a GPU kernels are interpreted, and there is nothing to compile.
        """
        if self.fuses and cache.k_cache.device.type == "cuda":
            steps = self._steps_of(cache, max_rows)
            steps.warm_up(min(max_rows, ROW_BUCKETS[-1]))
            choice.warm_up(steps.fused.buffers.logits)

    @property
    def graph_memory(self) -> GraphMemory | None:
        """What graphs and static buffers of fused steps take on the device; None where there are none."""
        return sum_memory([steps.memory for steps in self._steps.values()]) if self._steps else None

    def head(self, hidden_states: Tensor) -> Tensor:
        """[R, V]: the logits of the last layer's output ``hidden_states``, [R, C]."""
        return self.lm_head(self.finish(hidden_states), deterministic=self.deterministic)

    def finish(self, hidden_states: Tensor) -> Tensor:
        """See `Executor.finish`."""
        return self.decoder.finish(hidden_states, self.deterministic, self._normaliser)

    def logits(self, step: Step, cache: KVCache) -> Tensor:
        """[N, V]: the logits of a decode step; the next one may overwrite them."""
        return self.predict(step, cache).logits

    def predict(
        self, step: Step, cache: KVCache, rows: Tensor | None = None, choices: Sequence[Choice] | None = None
    ) -> Predictions:
        """See `Executor.predict`."""
        steps = self._decode_steps(step, cache)
        if isinstance(steps, NativeSteps):
            return steps.predict(step, cache, rows, choices)
        if steps is not None:
            logits = steps.run(step, cache, head=True)
            return Predictions(logits if rows is None else logits[rows])
        states = self.run(step, cache)
        return Predictions(self.head(states if rows is None else states[rows]))

    @property
    def resumes(self) -> bool:
        """See `Executor.resumes`; fused steps begin with embeddings."""
        return not self.fuses

    def guess(self, turns: Turns, cache: KVCache) -> Guesses:
        """See `Executor.guess`."""
        steps = self._decode_steps(turns.first_step, cache)
        return steps.guess(turns, cache) if isinstance(steps, NativeSteps) else super().guess(turns, cache)

    def prompt_attention(self) -> str:
        """Which attention whole prompts run, for people to read: `prompt_attention` chooses."""
        decoder, config = self.decoder, self.decoder.config
        return varlen_attention.attention_name(
            self.backend,
            decoder.dtype,
            decoder.device,
            config.head_size,
            self.deterministic,
            config.attends_by_position,
        )

    def decode_attention(self) -> str:
        """Which attention decode steps run, and whether the head size slows it down, for people to read."""
        head_size = self.decoder.config.head_size
        if self.backend.name != "native" or head_size % native.WHOLE_HEADS == 0:
            return self.backend.name
        return f"native, slower because heads of {head_size} elements are no multiple of {native.WHOLE_HEADS}"

    @torch.no_grad()
    def run(self, step: Step, cache: KVCache | None, on_layer: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """[N, C]: the last layer's output for every row of ``step``.

        cache: takes the new entries; None where nothing will be decoded from them.
        on_layer: called with each layer's index and input, [N, C], which the layer then changes in place.
        """
        steps = self._decode_steps(step, cache, is_watched=on_layer is not None)
        if steps is not None:
            assert cache is not None, "decoding needs a cache"
            return steps.run(step, cache, head=False, on_layer=on_layer)
        return self.run_layers_(self.embed(step), step, cache, on_layer)

    @torch.no_grad()
    def embed(self, step: Step) -> Tensor:
        """[N, C]: the first layer's input for every row of ``step``."""
        embeddings = self.decoder.embed(step.token_ids, step.position_ids, self.deterministic, self._normaliser)
        return step.begin_(embeddings)

    @torch.no_grad()
    def run_layers_(
        self,
        hidden_states: Tensor,
        step: Step,
        cache: KVCache | None,
        on_layer: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """``hidden_states`` [N, C], changed in place by the layers that ``step`` runs; op by op. See `run`."""
        entries = _Entries(self, step, cache) if cache is not None else None
        positions = Positions(step.position_ids, self.decoder.cos_sin)
        for index, layer in enumerate(self.decoder.stack()):
            if on_layer is not None:
                on_layer(index, hidden_states)
            plan = step.plan.layer(index, hidden_states)
            if plan.entries.num_rows:
                self._run_layer(index, layer, plan, hidden_states, step, positions, entries)
        return hidden_states

    def _decode_steps(
        self, step: Step, cache: KVCache | None, is_watched: bool = False
    ) -> DecodeSteps | NativeSteps | None:
        """What runs ``step`` whole; None where it runs op by op. is_watched: somebody looks at the layers' inputs."""
        check_fork()
        if step.plan.kv_policy is KVPolicy.SHARE:
            assert cache is not None, "sharing entries needs a cache"
            cache.may_repeat = True
        if cache is None:
            return None
        if self.fuses:
            assert step.begun is None, "fused steps begin with embeddings"
            return self._steps_of(cache, step.plan.rows.num_rows) if step.decode else None
        native = self.native_steps
        return native if native is not None and not is_watched and native.takes(step) else None

    def _steps_of(self, cache: KVCache, num_rows: int = 0) -> DecodeSteps:
        steps = self._steps.get(cache)
        # Sequences that verify guesses bring more rows than the cache has places.
        if steps is None or steps.fused.max_rows < min(num_rows, ROW_BUCKETS[-1]):
            max_rows = row_bucket(min(max(cache.context_lens.shape[1], num_rows), ROW_BUCKETS[-1]))
            ops = get_row_ops("triton")
            fused = FusedDecode(self.decoder, self.lm_head, cache, max_rows, ops, self.deterministic)
            steps = self._steps[cache] = DecodeSteps(fused, self.row_counts)
        return steps

    def _run_layer(
        self,
        index: int,
        layer: DecoderLayer,
        plan: LayerPlan,
        hidden_states: Tensor,
        step: Step,
        positions: Positions,
        entries: _Entries | None,
    ) -> None:
        backend, deterministic = self.backend, self.deterministic
        run, kv = plan.run, plan.kv
        query = key = value = None
        if kv.num_rows:
            rows = layer.attention_input(hidden_states, kv.row_ids, backend)
            if kv is run:
                query, key, value = layer.project(rows, positions.of(kv.row_ids), backend, deterministic)
            else:
                key, value = layer.project_key_value(rows, positions.of(kv.row_ids), backend, deterministic)
            self.row_counts.add(index, num_kv=key.shape[0])
        placed = entries.add(index, plan, key, value) if entries is not None else None
        if not run.num_rows:
            return
        if query is None:
            rows = layer.attention_input(hidden_states, run.row_ids, backend)
            query = layer.project_query(rows, positions.of(run.row_ids), backend, deterministic)
        self.row_counts.add(index, num_run=query.shape[0])
        if step.decode:
            assert entries is not None and placed is not None, "decoding needs a cache"
            cache = entries.cache
            attention = backend.decode_attention(
                query,
                cache.k_cache,
                cache.v_cache,
                cache.slot_tables[index],
                placed.seq_ids,
                placed.key_limits,
                layer.scale,
                *self._by_position(layer, step, run.row_ids, cache.slot_positions),
            )
        else:
            keys, values, cu_seqlens_k, key_positions = (
                entries.visible(index, plan, key, value)
                if entries is not None
                else (key, value, kv.cu_seqlens, _rows(step.position_ids, kv.row_ids))
            )
            assert keys is not None and values is not None, "a row that runs a layer has a key and a value there"
            key_limits = placed.key_limits if placed is not None else plan.key_ranks
            attention = varlen_attention.attend(
                backend,
                query,
                keys,
                values,
                plan,
                cu_seqlens_k,
                key_limits,
                layer.scale,
                max(step.plan.rows.num_new_tokens),
                causal=kv is run and keys is key,
                deterministic=deterministic,
                by_position=self._by_position(layer, step, run.row_ids, key_positions),
            )
        layer.finish_(hidden_states, run.row_ids, attention, backend, deterministic)

    def _by_position(
        self, layer: DecoderLayer, step: Step, row_ids: Tensor | None, key_positions: Tensor | None
    ) -> tuple[Tensor | None, int, Tensor, Tensor] | tuple[()]:
        """Slopes, window and positions of the rows and of the keys, as attention takes them; nothing without them."""
        if self.decoder.slopes is None and not layer.window:
            return ()
        assert key_positions is not None, "the cache of such a model knows where its tokens stand"
        return self.decoder.slopes, layer.window, _rows(step.position_ids, row_ids), key_positions


class _Placed(NamedTuple):
    """seq_ids: [R], int32, the cache sequence of each run row; key_limits: [R], int32, the entries it attends to."""

    seq_ids: Tensor
    key_limits: Tensor


class _Entries:
    """The cache entries of one step: placed for all layers at once if the plan allows, else layer by layer."""

    def __init__(self, executor: CompactExecutor, step: Step, cache: KVCache) -> None:
        self.backend = executor.backend
        self.step = step
        self.cache = cache
        self.index = cache.index(step.plan, step.cache_ids)
        if self.index is not None:
            self.slots = cache.allocate(self.index.entry_indptr[-1])
            self.key_limits = cache.append(self.index, self.slots)
        else:
            # The slot that holds each row's last key and value: SHARE lets later layers point to it.
            self.row_slots = torch.full_like(step.token_ids, -1, dtype=torch.int32)

    def add(self, layer: int, plan: LayerPlan, key: Tensor | None, value: Tensor | None) -> _Placed:
        """Store the new keys and values, each [K, H, D], of ``layer``; returns where its run rows stand."""
        index, part = self.index, layer
        if index is None:
            index, part = EntryIndex.of([plan], layer, self.step.cache_ids, self.cache.context_lens.shape[1]), 0
            slots = self.cache.allocate(plan.kv.num_rows)
            key_limits = self.cache.append(index, self._entry_slots(plan, slots))
        else:
            slots = self.slots[index.entry_indptr[part] : index.entry_indptr[part + 1]]
            key_limits = self.key_limits
        if key is not None and value is not None:
            self.backend.kv_store(key, value, self.cache.k_cache, self.cache.v_cache, slots)
            if self.cache.slot_positions is not None:
                positions = _rows(self.step.position_ids, plan.kv.row_ids)
                self.cache.slot_positions.index_copy_(0, slots.long(), positions.int())
        begin, end = index.run_indptr[part], index.run_indptr[part + 1]
        return _Placed(index.run_cache_ids[begin:end], key_limits[begin:end])

    def visible(
        self, layer: int, plan: LayerPlan, key: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """Keys, values, their cu_seqlens and positions that the run rows of ``layer`` attend to in a prefill step."""
        if self.step.fresh and plan.entries is plan.kv:
            return key, value, plan.kv.cu_seqlens, _rows(self.step.position_ids, plan.kv.row_ids)
        return self.cache.gather(layer, self.step.cache_ids)

    def _entry_slots(self, plan: LayerPlan, slots: Tensor) -> Tensor:
        if plan.kv.row_ids is None:
            self.row_slots.copy_(slots)
        else:
            self.row_slots[plan.kv.row_ids.long()] = slots
        return slots if plan.entries is plan.kv else self.row_slots


def _rows(tensor: Tensor, row_ids: Tensor | None) -> Tensor:
    """Some rows of ``tensor``; all for None."""
    return tensor if row_ids is None else tensor.index_select(0, row_ids)
