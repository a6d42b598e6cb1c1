"""The launchers of the C++ extension, for tensors on a CPU. They check what memory safety needs; `ops` checks the rest.

`prefill_attention` is the torch backend's own function: PyTorch's attention over whole sequences is fast as it is.
Beside the launchers stand `packed_linear`, which `Linear` uses, `most_likely` and `choose_tokens`, and what a fused
decode step needs of the host's language: `plan_rows`, on a CPU or a GPU, and `replay`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dynskip.kernels import switches
from dynskip.ops.reference import ACTIVATIONS
from dynskip.ops.torch_backend import prefill_attention

__all__ = [
    "WHOLE_HEADS",
    "activate",
    "choose_tokens",
    "decode_attention",
    "gather_layer_norm",
    "has_cuda",
    "kv_store",
    "most_likely",
    "packed_linear",
    "panel_outputs",
    "plan_rows",
    "prefill_attention",
    "replay",
    "rotate",
    "scatter_add",
    "unavailable_reason",
]


_BUILD = "Build it: DYNSKIP_BUILD_EXT=1 pip install -v --no-build-isolation -e ."
_BUILD_CUDA = (
    "Build it where nvcc and a torch with CUDA are: DYNSKIP_BUILD_CUDA=1 pip install -v --no-build-isolation -e ."
)
WHOLE_HEADS = 16
"""`decode_attention` is fast where the head size is a multiple of this."""
_MOST_BLOCK_HEAD = 256
CUDA_MISSING = f"The C++ extension was built without its CUDA sources. {_BUILD_CUDA}"
_OPS = (
    "gather_layer_norm",
    "scatter_add",
    "kv_store",
    "decode_attention",
    "rotate",
    "activate",
    "packed_linear",
    "packed_panel_outputs",
    "new_decoder",
    "delete_decoder",
    "decoder_times",
    "decode_step",
    "guess_tokens",
    "most_likely",
    "choose_tokens",
    "float_rows",
    "plan_rows",
    "has_cuda",
    "replay",
)


@functools.cache
def unavailable_reason() -> str | None:
    """Why the extension cannot be used, and how to get it; None when it is loaded."""
    try:
        importlib.import_module("dynskip._C")  # which registers the ops
    except ImportError as error:
        return f"The C++ extension cannot be loaded ({error}). {_BUILD}"
    missing = [name for name in _OPS if not hasattr(torch.ops.dynskip_native, name)]
    if missing:
        return f"The C++ extension was built from older sources and lacks {missing[0]}. {_BUILD}"
    return None


def activate(x: Tensor, activation: str, gated: bool = False) -> Tensor:
    """See `reference.activate`."""
    return _op("activate")(x, ACTIVATIONS.index(activation), gated)


def _launcher(name: str) -> Callable[..., Any]:
    """The launcher of an op that the extension has with the signature of the function that specifies it."""

    def launch(*arguments: Any, **named: Any) -> Any:
        return _op(name)(*arguments, **named)

    return launch


gather_layer_norm = _launcher("gather_layer_norm")
scatter_add = _launcher("scatter_add")
kv_store = _launcher("kv_store")
rotate = _launcher("rotate")
decode_attention = _launcher("decode_attention")
"""Needs `slot_table` to be contiguous. Cost: reads 2 * sum(context_lens) * G * D elements once, fast where D is a
multiple of `WHOLE_HEADS`; of those outside of a window only the positions. The bits of one head of one row depend on
nothing else."""

most_likely = _launcher("most_likely")
"""See `choice_reference.most_likely`."""
choose_tokens = _launcher("choose_tokens")
"""See `choice_reference.choose_tokens`, whose noise and formulas these are to the bit. What top_p keeps is summed in
float32: a token at its edge, within 2e-6 of `top_p`, may fall to the other side. The bits of a row depend on that row
alone. decoder: the handle of one whose threads draw; without it the calling thread does."""
float_rows = _launcher("float_rows")
"""`[R, V], float32`: the rows of logits `[N, V]` that `rows` `[R], int64` names; decoder as in `choose_tokens`."""


def panel_outputs(weight: Tensor, packed_weight: Tensor) -> int:
    """How many outputs a panel of `packed_weight` has, which oneDNN made of `weight` [out, in]; 0: it cannot be read.

    It looks at the packed bytes themselves, so that a oneDNN with another layout is never misread. Readable are panels
    of 64 outputs in float32 and float16, and in bfloat16 on a CPU with AVX-512 BF16; of 32 in bfloat16 with AMX.
    """
    if unavailable_reason() is not None or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return 0
    data, num_bytes = packed_data(packed_weight), torch.ops.mkldnn._nbytes(packed_weight)
    return int(_op("packed_panel_outputs")(weight.contiguous(), data, num_bytes))


def packed_data(packed_weight: Tensor) -> int:
    """The address of a oneDNN tensor's memory."""
    return int(torch.ops.mkldnn.data_ptr(packed_weight))


def packed_linear(x: Tensor, data: int, panel: int, num_outputs: int, bias: Tensor | None, activation: str) -> Tensor:
    """Returns `x` times the packed matrix at the address `data`, plus `bias`, through `activation`: `[R, out]`.

    x: `[R, in]`, rows contiguous, in the matrix's dtype. panel: what `panel_outputs` said of the matrix, which still
    exists. activation: one of `reference.ACTIVATIONS`, in float32 before the result is rounded.

    Cost: reads the matrix once. Fastest to about 50 rows. The bits of a row depend on that row alone.
    """
    return _op("packed_linear")(x, data, panel, num_outputs, bias, ACTIVATIONS.index(activation))


def new_decoder(tensors: list[Tensor], integers: list[int], floats: list[float]) -> int:
    """The handle of a decoder for `decode_step`, which holds `tensors`; `execution.native_steps` describes it."""
    return int(_op("new_decoder")(tensors, integers, floats))


def multiplies_many_rows(panel: int) -> bool:
    """Whether many rows by bfloat16 panels of so many outputs take no longer on this CPU than oneDNN's product.

    They do not with AMX, and with AVX-512 BF16 where the first cache has 32 KiB; where it has more was not measured.
    """
    return bool(_op("multiplies_many_rows")(panel))


def attends_in_blocks(head_size: int) -> bool:
    """Whether prompts of `decode_step` attend in blocks of rows in bfloat16, on a CPU with AMX or AVX-512 BF16."""
    return head_size % WHOLE_HEADS == 0 and head_size <= _MOST_BLOCK_HEAD


def delete_decoder(handle: int) -> None:
    """Ends the threads of a decoder, and gives its memory back."""
    _op("delete_decoder")(handle)


def decoder_times(handle: int) -> tuple[int, int, int]:
    """Nanoseconds of the first thread in products, in attention and in the rest, of all steps that were timed."""
    products, attention, rest = _op("decoder_times")(handle)
    return products, attention, rest


def decode_step(
    handle: int,
    token_ids: Tensor,
    position_ids: Tensor,
    cache_ids: Tensor,
    active: Tensor,
    kv_policy: int,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_positions: Tensor | None,
    context_lens: Tensor,
    slot_tables: Tensor,
    free_slots: Tensor,
    slot_cursor: Tensor,
    counts: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    gate_asks: Tensor | None,
    with_head: bool,
    head_rows: Tensor | None,
    is_prompt: bool,
    is_timed: bool,
    begun_rows: Tensor | None = None,
    begun_states: Tensor | None = None,
    choices: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Runs a decode step of N rows: `[R, V]`, the logits, and `[R], int64`, the tokens that are chosen from them.

    They are those of the rows in head_rows, `[R], int64`; None for all. Without head it returns `[N, C]`, the last
    layer's output, and an empty tensor.

    handle: of a decoder. token_ids, position_ids, cache_ids: `[N], int64`, of each row; rows of one sequence stand side
    by side. active: `[L, N], bool`. kv_policy, slots and tables: as in `row_reference.plan_rows`. counts: `[2, L],
    int64`, to which the rows that ran each layer, and that computed a key and a value, are added. gate_weight: `[L, 2,
    C]`, gate_bias: `[L, 2]`, float32, gate_asks: `[L], bool`: as in `row_reference.gate_rows`, where gate_asks holds.
    is_prompt: rows of a sequence attend in blocks where the extension can, summed in another order than one by one.
    begun_rows: `[R'], int64`, rows that begin with begun_states, `[R', C]`, in place of their embeddings. choices: the
    columns of `choice_reference.choose_tokens`, each `[R]`; none for what `most_likely` says.
    The interpreter's lock is free meanwhile; steps of one decoder wait for each other.

    Cost: reads the matrices of the layers that have rows once, and the keys and values of their rows.
    """
    rows, tokens = _op("decode_step")(
        handle,
        token_ids,
        position_ids,
        cache_ids,
        active,
        kv_policy,
        k_cache,
        v_cache,
        slot_positions,
        context_lens,
        slot_tables,
        free_slots,
        slot_cursor,
        counts,
        gate_weight,
        gate_bias,
        gate_asks,
        with_head,
        head_rows,
        is_prompt,
        is_timed,
        begun_rows,
        begun_states,
        choices,
    )
    return rows, tokens


def guess_tokens(
    handle: int,
    token_ids: Tensor,
    position_ids: Tensor,
    cache_ids: Tensor,
    active: Tensor,
    num_guesses: Tensor,
    choices: Sequence[Tensor],
    num_common: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_positions: Tensor | None,
    context_lens: Tensor,
    slot_tables: Tensor,
    free_slots: Tensor,
    slot_cursor: Tensor,
    counts: Tensor,
    is_timed: bool,
) -> tuple[Tensor, Tensor]:
    """Runs decode steps of B sequences one after the other: `[K, B], int64`, the tokens that each of them has chosen.

    With num_common, `[B], int64`, also `[K, B, C]`: the state of each sequence's last row in each step behind the first
    num_common layers of the decoder; undefined where the sequence has no row, or 0 such layers. Else an empty tensor.

    The first step brings N rows, at least one of each sequence; each next one brings one row of every sequence that
    still guesses: the token that its last row has chosen, at the next position, in the same layers. A sequence whose
    logits are not finite gets `NOT_FINITE` and guesses no more; behind its last guess it has `NOT_FINITE`, too.

    num_guesses: `[B], int64`, the tokens that each sequence guesses, at least 1; K is the largest. choices: the columns
    of `choice_reference.choose_tokens`, each `[B]`, for the first guesses, with position 1 more for each next one; none
    for the most likely tokens. The rest is as in `decode_step`; skipped layers store nothing. A full cache is a
    RuntimeError, and leaves the entries of the steps before.

    Cost: that of the steps, each of which reads the matrices of the layers that have rows once.
    """
    tokens, states = _op("guess_tokens")(
        handle,
        token_ids,
        position_ids,
        cache_ids,
        active,
        num_guesses,
        choices,
        num_common,
        k_cache,
        v_cache,
        slot_positions,
        context_lens,
        slot_tables,
        free_slots,
        slot_cursor,
        counts,
        is_timed,
    )
    return tokens, states


def plan_rows(active: Tensor, *others: Any, **named: Any) -> None:
    """See `row_reference.plan_rows`. Tensors may have any stride between layers; what a layer holds is contiguous.

    On a GPU one launch of one block on the current stream, without a question to the host, so that it can be captured.
    A table without room for a new entry is an error, and a new key without a free slot: on a CPU a RuntimeError, on a
    GPU an assertion on the device. Then neither is written, and `slot_cursor` stops at the end of `free_slots`.
    `switches` say whether the kernel may overlap with the one before it.

    Cost: reads and writes 25 bytes a row and layer.
    """
    if active.is_cuda:
        _check_cuda("plan_rows")
    percent = switches.carveout()
    _op("plan_rows")(active, *others, **named, overlaps=switches.pdl(), carveout=-1 if percent is None else percent)


def has_cuda() -> bool:
    """Whether the extension is loaded and was built with its CUDA sources."""
    return unavailable_reason() is None and bool(torch.ops.dynskip_native.has_cuda())


def replay(graph_execs: Sequence[int], device: torch.device) -> None:
    """Launches captured CUDA graphs one after another on the current stream of `device`.

    graph_execs: what `torch.cuda.CUDAGraph.raw_cuda_graph_exec()` returns for each; the graphs must still exist.

    Raises: RuntimeError where the extension has no CUDA part, and where a launch fails, with the graph's index.
    """
    _check_cuda("replay")
    index = torch.cuda.current_device() if device.index is None else device.index
    _op("replay")(graph_execs, index)


@functools.cache
def _check_cuda(name: str) -> None:
    if not has_cuda():
        reason = (unavailable_reason() or CUDA_MISSING).replace(_BUILD, _BUILD_CUDA)
        raise RuntimeError(f"native.{name}: the C++ extension must have its CUDA part, got none. {reason}")


@functools.cache
def _op(name: str) -> torch._ops.OpOverload:
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"native.{name}: the C++ extension must be loaded, got none. {reason}")
    return getattr(torch.ops.dynskip_native, name).default
