"""Decode steps whole, one call into the C++ extension each: rows and slots planned, embedding, layers, head.

The steps in which drafts guess are one call all together.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dynskip.controllers import HiddenStateGate, TokenController
from dynskip.controllers.token_controllers import FixedController, HiddenController
from dynskip.execution.executor import Predictions
from dynskip.execution.kv_cache import KVCache
from dynskip.execution.step import RowCounts, Step
from dynskip.execution.turns import Guesses, Turns
from dynskip.models.decoder import Decoder, DecoderLayer, Norm
from dynskip.models.linear import NATIVE_ROWS, Linear
from dynskip.ops import native
from dynskip.ops.choice import choice_columns
from dynskip.ops.reference import ACTIVATIONS
from dynskip.ops.row_reference import KV_POLICY_CODES
from dynskip.routing.plan import Plan
from dynskip.routing.routes import ControllerDecision
from dynskip.sampling import NOT_FINITE, Choice

# Rows of one call: the memory that calls work in stays, and grows with them. More rows than that read the matrices from
# memory no less often.
PASS_ROWS = 2048
# Where prompts attend row by row, tokens of one from which PyTorch's attention wins.
_MOST_TOKENS_BY_ROW = 256


_Gate = tuple[Tensor, Tensor | None, Tensor]


class NativeSteps:
    """Runs decode steps of known paths, and those of linear gates, in one call into the extension each.

    A decode step computes what the compact executor computes op by op, with the same bits. The extension keeps threads
    for the steps as long as this object lives, as many as torch has; it follows weights that change in place.
    """

    def __init__(self, decoder: Decoder, lm_head: Linear, row_counts: RowCounts, deterministic: bool) -> None:
        self.decoder = decoder
        self.lm_head = lm_head
        self.row_counts = row_counts
        self.deterministic = deterministic
        self.is_timed = False
        self.most_prompt_rows = sys.maxsize
        self.pass_rows = PASS_ROWS
        row_counts.on_device = torch.zeros(2, decoder.config.num_layers, dtype=torch.int64)
        self._made_at = -1
        self._matrices: Sequence[tuple[object, ...]] = ()
        self._delete: Callable[[], object] = lambda: None
        self._dtype: torch.dtype | None = None
        self._handle = 0
        self._known: tuple[Plan, int] | None = None  # the last plan, and the entries that it needs at most
        self._gate: tuple[Plan, _Gate | None] | None = None  # the last plan that was asked for, and what decides of it

    def takes(self, step: Step) -> bool:
        """Whether ``step`` is run in one call: not where Python code decides layer by layer.

        Long prompts run so where `native.multiplies_many_rows`. In deterministic mode a gate is Python code, too:
        prompts ask it op by op, and near-ties must fall alike. Prompts are none of its steps there, for their bits may
        not depend on how many rows come with them.
        """
        if not step.decode and not self._takes_prompts(step):
            return False
        if not self._is_ready():
            return False
        return step.plan.active is not None or (not self.deterministic and self._gate_of(step.plan) is not None)

    def run(
        self, step: Step, cache: KVCache, head: bool, on_layer: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Run ``step``: [N, C], the last layer's output, or with ``head`` [N, V], the logits."""
        assert on_layer is None, "inside of a call nobody looks at the layers' inputs"
        return self._run(step, cache, head)[0]

    def predict(
        self, step: Step, cache: KVCache, rows: Tensor | None = None, choices: Sequence[Choice] | None = None
    ) -> Predictions:
        """See `Executor.predict`. A prompt's step, which may take several calls, gives the most likely tokens."""
        if choices is None or not step.decode:
            logits, likely = self._run(step, cache, head=True, head_rows=rows)
            return Predictions(logits, likely, self._handle)
        columns = choice_columns(choices, self.decoder.config.vocab_size, step.token_ids.device)
        logits, drawn = self._run(step, cache, head=True, head_rows=rows, columns=columns)
        return Predictions(logits, decoder=self._handle, drawn=drawn)

    @torch.no_grad()
    def guess(self, turns: Turns, cache: KVCache) -> Guesses:
        """See `Executor.guess`: all steps in one call."""
        step, counts = turns.first_step, self.row_counts.on_device
        active, cache_ids = step.plan.active, step.cache_ids_of_rows
        assert active is not None and counts is not None, "a path is known; made with this object"
        choices = turns.choices
        is_greedy = all(choice.params.greedy for choice in choices)
        # A guess that is not finite is the last one: how many slots are taken is known afterwards.
        cache.reserve(turns.num_entries)
        tokens, states = native.guess_tokens(
            self._handle,
            step.token_ids,
            step.position_ids,
            cache_ids,
            active,
            torch.tensor(turns.num_guesses),
            () if is_greedy else choice_columns(choices, self.decoder.config.vocab_size, step.token_ids.device),
            None if turns.num_common is None else torch.tensor(turns.num_common),
            *_cache_arguments(cache),
            counts,
            self.is_timed,
        )
        cache.settle()
        columns = zip(tokens.t().tolist(), turns.num_guesses, strict=True)
        guesses = [_until_not_finite(column[:count]) for column, count in columns]
        return Guesses(guesses, None if turns.num_common is None else states)

    def _run(
        self,
        step: Step,
        cache: KVCache,
        head: bool,
        head_rows: Tensor | None = None,
        columns: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """What `native.decode_step` returns. columns: of choices, for a decode step.

        A sequence may bring several tokens, one after the other: each attends to those before it.
        """
        plan = step.plan
        num_rows = plan.rows.num_rows
        known = self._known
        if known is None or known[0] is not plan:
            exact = plan.active is not None
            num_entries = sum(num_kv for _, num_kv in plan.num_rows_by_layer) if exact else plan.num_layers * num_rows
            self._known = known = plan, num_entries
        gate = self._gate_of(plan)
        if gate is None:
            active, weight, bias, asks = plan.active, None, None, None
        else:
            weight, bias, asks = gate
            active = ~asks[:, None].expand(-1, num_rows).contiguous()
        assert active is not None, "a plan has a mask or a gate"
        cache.reserve(known[1], exact=gate is None)
        cache_ids = step.cache_ids_of_rows
        counts = self.row_counts.on_device
        assert counts is not None, "made with this object"

        begun_rows, begun_states = step.begun or (None, None)

        def call(rows: slice | None, head: bool, head_rows: Tensor | None) -> tuple[Tensor, Tensor]:
            return native.decode_step(
                self._handle,
                step.token_ids if rows is None else step.token_ids[rows],
                step.position_ids if rows is None else step.position_ids[rows],
                cache_ids if rows is None else cache_ids[rows],
                active if rows is None else active[:, rows].contiguous(),
                KV_POLICY_CODES[plan.kv_policy],
                *_cache_arguments(cache),
                counts,
                weight,
                bias,
                asks,
                head,
                head_rows,
                not step.decode,
                self.is_timed,
                begun_rows,
                begun_states,
                columns,
            )

        if step.decode or num_rows <= self.pass_rows:
            return call(None, head, head_rows)
        return self._in_passes(call, num_rows, head, head_rows)

    def _in_passes(
        self,
        call: Callable[[slice | None, bool, Tensor | None], tuple[Tensor, Tensor]],
        num_rows: int,
        head: bool,
        head_rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """What ``call`` returns for all rows, in passes of at most ``pass_rows``; each sees those before it."""
        num_passes = -(-num_rows // self.pass_rows)
        ends = [num_rows * (index + 1) // num_passes for index in range(num_passes)]
        parts, places = [], []
        for begin, end in zip([0, *ends], ends, strict=False):
            rows, wanted = slice(begin, end), None
            if head_rows is not None:
                places.append(((head_rows >= begin) & (head_rows < end)).nonzero()[:, 0])
                wanted = head_rows[places[-1]] - begin
            has_head = head and (wanted is None or len(wanted) > 0)
            part = call(rows, has_head, wanted if has_head else None)
            if has_head == head:
                parts.append(part)
        results, tokens = (torch.cat(of_parts) for of_parts in zip(*parts, strict=True))
        if head_rows is None:
            return results, tokens
        order = torch.cat(places).argsort()
        return results[order], tokens[order]

    @property
    def times_s(self) -> tuple[float, float, float]:
        """Seconds of the first thread in products, in attention and in the rest, of all steps while `is_timed` held."""
        products, attention, rest = native.decoder_times(self._handle) if self._handle else (0, 0, 0)
        return products / 1e9, attention / 1e9, rest / 1e9

    def _takes_prompts(self, step: Step) -> bool:
        rows, layer = step.plan.rows, self.decoder.stack()[0]
        if self.deterministic or rows.num_rows > self.most_prompt_rows:
            return False
        panels = layer.q_proj.native_panels
        is_fast = panels is not None and self.decoder.dtype == torch.bfloat16 and native.multiplies_many_rows(panels[1])
        if not is_fast:
            return step.fresh and rows.num_rows <= NATIVE_ROWS
        if native.attends_in_blocks(self.decoder.config.head_size):
            return True
        return step.fresh and max(rows.num_new_tokens) <= _MOST_TOKENS_BY_ROW

    def _is_ready(self) -> bool:
        """Whether the extension can read all matrices; describes the decoder anew where one was packed or unpacked."""
        if self._made_at != Linear.num_changes or self._dtype != self.decoder.dtype:
            linears = [linear for linear in (*self.decoder.modules(), self.lm_head) if isinstance(linear, Linear)]
            # A change of another model changes nothing here.
            matrices = [(linear.native_panels, id(linear.weight), self.decoder.dtype) for linear in linears]
            if matrices != self._matrices:
                self._delete()
                self._handle = 0
                if all(self._reads(linear) for linear in linears):
                    self._handle = _Description(self.decoder, self.lm_head).new_decoder()
                    self._delete = weakref.finalize(self, native.delete_decoder, self._handle)
            self._made_at, self._dtype, self._matrices = Linear.num_changes, self.decoder.dtype, matrices
        return self._handle != 0

    def _reads(self, linear: Linear) -> bool:
        # Prompts multiply by dense weights with the library's bits, which a deterministic step would have to have.
        return linear.native_panels is not None if linear.packed else not self.deterministic

    def _gate_of(self, plan: Plan) -> _Gate | None:
        """As ``_new_gate``, made once a plan, of which each step of a controller has its own."""
        if self._gate is None or self._gate[0] is not plan:
            self._gate = plan, self._new_gate(plan)
        return self._gate[1]

    def _new_gate(self, plan: Plan) -> _Gate | None:
        """[L, 2, C] and [L, 2], float32, or None, and [L], bool: what decides of ``plan``, and where it is asked.

        None where the extension does not know it.
        """
        controller = plan.decide.controller if isinstance(plan.decide, ControllerDecision) else None
        map_ = _linear_map(controller)
        # A gate of another hidden size is refused where it is asked op by op.
        if controller is None or map_ is None or map_[0].shape[2] != self.decoder.config.hidden_size:
            return None
        weight, bias, always = map_
        asks = torch.tensor([layer not in always for layer in range(plan.num_layers)])
        return weight.float().contiguous(), None if bias is None else bias.float().contiguous(), asks


class _Description:
    """A decoder as lists of tensors and numbers, in the order in which the extension's `new_decoder` reads them."""

    def __init__(self, decoder: Decoder, lm_head: Linear) -> None:
        self.tensors: list[Tensor] = []
        self.integers: list[int] = []
        self.floats: list[float] = []
        config = decoder.config
        self.integers += (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads)
        self.integers += (config.head_size, config.embedding_size, config.ffn_size, config.vocab_size)
        self.integers += (config.position_offset, config.norm_first, config.parallel, config.shared_norm, config.gated)
        self.integers.append(ACTIVATIONS.index(config.activation))
        self._tensor(decoder.embed_tokens.weight)
        self._tensor(None if decoder.embed_positions is None else decoder.embed_positions.weight)
        self._tensor(decoder.cos_sin)
        self._tensor(decoder.slopes)
        self._norm(decoder.embed_norm)
        self._norm(decoder.final_norm)
        for linear in (decoder.project_in, decoder.project_out, lm_head):
            self._matrix(linear)
        for layer in decoder.stack():
            self._layer(layer)

    def new_decoder(self) -> int:
        """The extension's handle of it."""
        return native.new_decoder(self.tensors, [int(number) for number in self.integers], self.floats)

    def _layer(self, layer: DecoderLayer) -> None:
        for norm in (layer.attention_norm, layer.feed_forward_norm, layer.q_norm, layer.k_norm):
            self._norm(norm)
        for linear in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj, layer.fc1, layer.fc2):
            self._matrix(linear)
        self.floats.append(layer.scale)
        self.integers.append(layer.window)

    def _tensor(self, tensor: Tensor | None) -> None:
        self.integers.append(-1 if tensor is None else len(self.tensors))
        if tensor is not None:
            self.tensors.append(tensor.detach() if not isinstance(tensor, torch.nn.Parameter) else tensor)

    def _norm(self, norm: Norm | None) -> None:
        self.integers.append(norm is not None)
        self._tensor(None if norm is None else norm.weight)
        self._tensor(None if norm is None else norm.bias)
        self.integers.append(norm is not None and norm.rms)
        self.floats.append(0.0 if norm is None else norm.eps)

    def _matrix(self, linear: Linear | None) -> None:
        self.integers += (0, 0) if linear is None else (linear.out_features, linear.in_features)
        panels = None if linear is None else linear.native_panels
        if panels is not None:
            self.integers += (panels[1], panels[0])
        else:
            self.integers.append(0)
            self._tensor(None if linear is None else linear.weight)
        self._tensor(None if linear is None else linear.bias)


def _cache_arguments(cache: KVCache) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """What the extension reads and writes of ``cache``, in the order in which its ops take it."""
    return (
        cache.k_cache,
        cache.v_cache,
        cache.slot_positions,
        cache.context_lens,
        cache.slot_tables,
        cache.free_slots,
        cache.slot_cursor,
    )


def _until_not_finite(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(NOT_FINITE) + 1] if NOT_FINITE in tokens else tokens


def _linear_map(controller: TokenController | None) -> tuple[Tensor, Tensor | None, frozenset[int]] | None:
    """Weight and bias of the logits of ``controller``, and the layers that always run; None where it is no such map.

    A subclass may decide in a way of its own.
    """
    if type(controller) is HiddenStateGate:
        return controller.weight, controller.bias, controller.always
    if (type(controller) is FixedController or type(controller) is HiddenController) and not controller.sample:
        return *controller.linear_map(), controller.always
    return None
