"""Attention over lists of rows, its contexts split on the device: on a GPU, or else under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dynskip.kernels.attend_rows import Bias, attend_rows, launch_attention
from dynskip.kernels.configs import get_config, use_configs
from dynskip.kernels.context_splits import Splits, plan_splits, workspace_sizes
from dynskip.kernels.decode_attention import decode_attention
from dynskip.kernels.launches import LAUNCHES
from dynskip.kernels.row_list import RowList, Workspace
from dynskip.ops import row_reference
from dynskip.ops.backends import available_backends
from dynskip.validation.errors import allowed_error, eager_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WHY_NOT = available_backends(DEVICE)["triton"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=f"triton backend: {WHY_NOT}")]
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="Triton's interpreter cuts float32 off to bfloat16")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)]
HEADS = ((3, 16), (2, 48), (4, 64), (3, 80), (5, 128))
BLOCK_S = 16


@contextmanager
def constants(**changes: int) -> Iterator[None]:
    """Small constants for attention inside the block, so that short contexts have several splits."""
    entry = {"BLOCK_S": BLOCK_S, "BLOCK_C": 128, "BLOCK_P": 16, "TARGET_PROGRAMS": 8, "SPLIT_TOKENS": 32}
    entry |= {"PDL": True, "num_warps": 2, "maxnreg": 128, **changes}
    groups = {size: [{"max_rows": None, **entry}] for size in ("2", "4")}
    ops = {"attend_rows": {**groups, "deterministic": {"2": entry, "4": entry}}}
    with use_configs({"device": None, "capability": None, "measured": None, "ops": ops}):
        yield


@dataclass
class Case:
    """Queries of some rows and a cache of their sequences, with NaN or nonsense wherever nothing may be read."""

    q: Tensor
    ids: list[int]
    k_cache: Tensor
    v_cache: Tensor
    slot_table: Tensor
    seq_ids: Tensor
    key_limits: Tensor
    scale: float
    bias: Bias

    def attend(
        self, ids: list[int] | None = None, max_rows: int | None = None, deterministic: bool = False
    ) -> tuple[Tensor, Workspace]:
        """`[M, H, D]`: what `attend_rows` writes for the rows `ids`, NaN elsewhere; and the workspace it leaves."""
        ids = self.ids if ids is None else ids
        max_rows = len(self.q) if max_rows is None else max_rows
        rows = RowList(index(*ids, *[-1] * (len(self.q) - len(ids))), index(len(ids)), max_rows)
        num_heads, head_size = self.q.shape[1:]
        num_kv_heads = self.k_cache.shape[1]
        sizes = workspace_sizes(max_rows, num_heads, num_kv_heads, head_size, self.slot_table.shape[1], DEVICE)
        workspace = Workspace(
            torch.full((sizes[0],), float("nan"), device=DEVICE),
            torch.zeros(sizes[1], dtype=torch.int32, device=DEVICE),
        )
        out = torch.full_like(self.q.flatten(1), float("nan"))
        cache = (self.k_cache, self.v_cache, self.slot_table, self.seq_ids, self.key_limits)
        attend_rows(self.q.flatten(1), rows, *cache, self.scale, out, workspace, deterministic, *self.bias)
        return out.view(self.q.shape), workspace

    def splits(self, deterministic: bool = False) -> Splits:
        config = get_config("attend_rows", DEVICE, self.q.dtype, len(self.q), deterministic=deterministic)
        num_rows, num_heads, head_size = self.q.shape
        heads = num_heads, self.k_cache.shape[1], head_size
        return plan_splits(config, num_rows, *heads, self.slot_table.shape[1], deterministic)

    def exact(self) -> Tensor:
        """`[M, H, D], float64`: the right results, NaN for rows that are not listed."""
        q, k_cache, v_cache = (tensor.double() for tensor in (self.q, self.k_cache, self.v_cache))
        rows = RowList(index(*self.ids), index(len(self.ids)), len(self.q))
        out = torch.full_like(q.flatten(1), float("nan"))
        cache = (k_cache, v_cache, self.slot_table, self.seq_ids, self.key_limits)
        row_reference.attend_rows(q.flatten(1), rows, *cache, self.scale, out, None, False, *self.bias)
        return out.view(q.shape)

    def allowed_error(self, exact: Tensor) -> float:
        """Twice the error of eager PyTorch in the dtype, or what rounding the result and float32 sums may cost."""
        if not self.ids:
            return 0.0
        arguments = vars(self) | self.bias._asdict() | {"q": self.q[self.ids], "seq_ids": self.seq_ids[self.ids]}
        arguments["context_lens"] = self.key_limits[self.ids]
        if self.bias.position_ids is not None:
            arguments["position_ids"] = self.bias.position_ids[self.ids]
        return allowed_error(exact[self.ids], *eager_attention(arguments))


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def make_case(
    lengths: list[int],
    listed: list[int],
    num_heads: int = 2,
    head_size: int = 16,
    dtype: torch.dtype = torch.float32,
    max_context_len: int | None = None,
    num_kv_heads: int | None = None,
    alibi: bool = False,
    window: int = 0,
) -> Case:
    """A sequence for each of `lengths`, in a row of its own, of which `listed` take part."""
    generator = torch.Generator().manual_seed(sum(lengths) + head_size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    num_rows, num_slots = len(lengths), sum(lengths) + 3
    max_context_len = max(lengths) if max_context_len is None else max_context_len
    num_kv_heads = num_kv_heads or num_heads
    q = torch.full((num_rows, num_heads, head_size), float("nan"), dtype=dtype)
    q[listed] = normal(len(listed), num_heads, head_size)
    k_cache, v_cache = (torch.full((num_slots, num_kv_heads, head_size), float("nan"), dtype=dtype) for _ in range(2))
    slots = torch.randperm(num_slots, generator=generator)[: sum(lengths)]
    seq_ids = torch.randperm(num_rows, generator=generator)
    table = torch.full((num_rows, max_context_len), -(2**30), dtype=torch.int32)
    # A slot of no row would stand in every window.
    slot_positions = torch.full((num_slots,), 2**30, dtype=torch.int32)
    for row, own in enumerate(slots.split(lengths)):
        slot_positions[own] = torch.arange(len(own), dtype=torch.int32)
        table[seq_ids[row], : lengths[row]] = own.int()
        if row in listed:
            k_cache[own], v_cache[own] = normal(*k_cache[own].shape), normal(*k_cache[own].shape)
    key_limits = torch.tensor(lengths)
    unlisted = [row for row in range(num_rows) if row not in listed]
    seq_ids[unlisted], key_limits[unlisted] = 2**30, 2**30
    q, k_cache, v_cache = (tensor.to(DEVICE) for tensor in (q, k_cache, v_cache))
    table, seq_ids, key_limits = (tensor.to(DEVICE, torch.int32) for tensor in (table, seq_ids, key_limits))
    bias = Bias()
    if alibi or window:
        steps = torch.arange(1, num_heads + 1, device=DEVICE)
        slopes = 2.0 ** (-8.0 / num_heads * steps) if alibi else None
        bias = Bias(slopes, window, torch.tensor(lengths, device=DEVICE) - 1, slot_positions.to(DEVICE))
    return Case(q, listed, k_cache, v_cache, table, seq_ids, key_limits, head_size**-0.5, bias)


def check(case: Case, deterministic: bool = False) -> int:
    """Attends, asserts that results, other rows and counters are right, and returns how many parts were handed over."""
    out, workspace = case.attend(deterministic=deterministic)
    exact = case.exact()
    assert torch.equal(out.isnan(), exact.isnan())
    error = (out.double() - exact).abs().nan_to_num(nan=0.0).max().item()
    assert error <= case.allowed_error(exact)
    assert not workspace.counters.any()
    splits = case.splits(deterministic)
    values_per_part = splits.block_h * (splits.block_d + 2) * splits.num_groups
    num_parts, rest = divmod(int((~workspace.partials.isnan()).sum()), values_per_part)
    assert rest == 0
    return num_parts


RAGGED = [0, 1, BLOCK_S - 1, BLOCK_S, BLOCK_S + 1, 4 * BLOCK_S, 75]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "head_size"), HEADS)
def test_errors_stay_within_the_budget(num_heads: int, head_size: int, dtype: torch.dtype) -> None:
    case = make_case(RAGGED, list(range(len(RAGGED))), num_heads, head_size, dtype)
    with constants(TARGET_PROGRAMS=12, BLOCK_C=256, SPLIT_TOKENS=64):
        assert check(case) > 0
        assert check(case, deterministic=True) > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size"), [(4, 2, 16), (6, 2, 48), (8, 1, 128), (34, 2, 8), (3, 1, 80)]
)
def test_queries_that_share_keys_stay_within_the_budget(
    num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype
) -> None:
    case = make_case(RAGGED, [0, 1, 2, 4, 5, 6], num_heads, head_size, dtype, num_kv_heads=num_kv_heads)
    with constants(TARGET_PROGRAMS=12, BLOCK_C=16, SPLIT_TOKENS=64):
        assert check(case) > 0
        assert check(case, deterministic=True) > 0


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize(("alibi", "window"), [(True, 0), (False, 20), (True, 1)])
def test_slopes_and_windows_go_by_positions(alibi: bool, window: int, num_kv_heads: int) -> None:
    """The window leaves whole splits of the long contexts without a token."""
    case = make_case(RAGGED, [0, 1, 4, 5, 6], 4, num_kv_heads=num_kv_heads, alibi=alibi, window=window)
    with constants(BLOCK_C=16, TARGET_PROGRAMS=24):
        assert check(case) > 0
        assert check(case, deterministic=True) > 0
        far = case.bias._replace(position_ids=case.bias.position_ids + 10_000)
        if window:
            case.bias = far
            assert not case.attend()[0][case.ids].any()


@pytest.mark.parametrize("listed", [[], [3], [5, 0, 2], [0, 1, 2, 3, 4, 5, 6]], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_only_listed_rows_are_touched(listed: list[int], deterministic: bool) -> None:
    with constants():
        check(make_case(RAGGED, listed), deterministic)


def expected_parts(lengths: list[int], target_items: int) -> int:
    """How many parts rows of more than one split hand over, out of splits for about `target_items` items."""
    tokens = max(-(-sum(lengths) // target_items), 1)
    split_tokens = -(-tokens // BLOCK_S) * BLOCK_S
    return sum(parts for length in lengths if (parts := -(-length // split_tokens)) > 1)


@pytest.mark.parametrize(
    ("lengths", "target", "num_parts"),
    [
        ([96], 1, 0),
        ([96], 2, 2),
        ([96], 6, 6),
        ([96], 100, 6),  # no split is shorter than a block
        ([97], 6, 4),  # 17 tokens an item are 32 in whole blocks
        ([32, 32, 32], 3, 0),
        ([64, 32, 32], 4, 2),
        ([0, 0, 0], 4, 0),
        ([1, 0, 96], 4, 3),
        ([96] * 7, 21, 21),
        ([80, 16, 0, 1, 17], 8, 7),
        ([600], 64, 38),  # more parts than are joined at a time
    ],
)
def test_the_context_is_split_as_the_target_says(lengths: list[int], target: int, num_parts: int) -> None:
    case = make_case(lengths, list(range(len(lengths))), num_heads=1)
    with constants(TARGET_PROGRAMS=target, BLOCK_C=256 if target == 64 else 16):
        assert case.splits().num_groups == 1
        assert check(case) == num_parts == expected_parts(lengths, target)


def test_every_row_of_every_length_is_attended() -> None:
    """Random lengths: each item finds its row, and the grid has room for all items."""
    generator = torch.Generator().manual_seed(7)
    for num_rows in (1, 3, 8, 13):
        lengths = torch.randint(0, 5 * BLOCK_S, (num_rows,), generator=generator).tolist()
        listed = torch.randperm(num_rows, generator=generator)[: max(num_rows - 2, 1)].tolist()
        case = make_case(lengths, listed, num_heads=1)
        with constants(TARGET_PROGRAMS=5):
            assert check(case) == expected_parts([lengths[row] for row in listed], 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_kv_heads", [3, 1])
def test_deterministic_bits_depend_on_the_row_alone(num_kv_heads: int, dtype: torch.dtype) -> None:
    listed = [0, 2, 3, 4, 5, 6]
    case = make_case(RAGGED, listed, 3, dtype=dtype, max_context_len=100, num_kv_heads=num_kv_heads, alibi=True)
    with constants():
        together, _ = case.attend(deterministic=True)
        for ids, max_rows in (([0], 1), ([4], 2), ([6], 1), ([6, 2], 2), ([5, 3, 6], 4)):
            out, _ = case.attend(ids, max_rows, deterministic=True)
            assert torch.equal(out[ids], together[ids])
        case.slot_table = case.slot_table[:, :75].contiguous()
        assert torch.equal(case.attend(deterministic=True)[0][case.ids], together[case.ids])


@pytest.mark.parametrize("more", [{}, {"num_kv_heads": 1}, {"alibi": True, "window": 20}], ids=str)
def test_the_op_without_a_list_gives_the_same_bits(more: dict[str, Any]) -> None:
    case = make_case(RAGGED, list(range(len(RAGGED))), num_heads=3, dtype=torch.float16, **more)
    with constants():
        out, _ = case.attend(deterministic=True)
        cache = (case.k_cache, case.v_cache, case.slot_table, case.seq_ids, case.key_limits)
        assert torch.equal(decode_attention(case.q, *cache, case.scale, *case.bias), out)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_second_launch_finds_the_workspace_ready(deterministic: bool) -> None:
    """What the first launch leaves, partials and counters, changes nothing of the second one's result."""
    case = make_case([70, 33], [0, 1])
    with constants():
        first, workspace = case.attend(deterministic=deterministic)
        rows = RowList(index(0, 1), index(2), 2)
        cache = (case.k_cache, case.v_cache, case.slot_table, case.seq_ids, case.key_limits)
        second = torch.full_like(first, float("nan")).flatten(1)
        attend_rows(case.q.flatten(1), rows, *cache, case.scale, second, workspace, deterministic)
    assert torch.equal(second.view(first.shape), first)


def test_rows_of_buffers_may_lie_apart() -> None:
    case = make_case([40, 3], [0, 1], num_heads=3)
    exact = case.exact()
    wide = torch.full((2, 3 * 48), float("nan"), device=DEVICE)
    wide[:, 48:96] = case.q.flatten(1)
    sizes = workspace_sizes(2, 3, 3, 16, 40, DEVICE)
    workspace = Workspace(torch.empty(sizes[0], device=DEVICE), torch.zeros(sizes[1], dtype=torch.int32, device=DEVICE))
    cache = (case.k_cache, case.v_cache, case.slot_table, case.seq_ids, case.key_limits)
    attend_rows(wide[:, 48:96], RowList(index(1, 0), index(2), 2), *cache, case.scale, wide[:, 96:], workspace)
    assert torch.allclose(wide[:, 96:].double(), exact.flatten(1), rtol=0, atol=case.allowed_error(exact))
    assert wide[:, :48].isnan().all()


def test_a_workspace_too_small_is_refused() -> None:
    case = make_case([70], [0])
    num_partials, num_counters = workspace_sizes(1, 2, 2, 16, 70, DEVICE)
    out = torch.empty_like(case.q).flatten(1)
    cache = (case.k_cache, case.v_cache, case.slot_table, case.seq_ids, case.key_limits)
    partials = torch.empty(num_partials, device=DEVICE)
    counters = torch.zeros(num_counters, dtype=torch.int32, device=DEVICE)
    for workspace in (Workspace(partials[:1], counters), Workspace(partials, counters[:0])):
        with pytest.raises(AssertionError):
            attend_rows(case.q.flatten(1), RowList(index(0), index(1), 1), *cache, case.scale, out, workspace)


def test_each_call_launches_one_kernel() -> None:
    case = make_case([70], [0])
    LAUNCHES.clear()
    with constants():
        case.attend()
        case.attend(deterministic=True)
        case.attend(ids=[])
    assert LAUNCHES == {"attend_rows": 3}


def test_items_beyond_65535_stand_on_the_axis_that_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        "dynskip.kernels.attend_rows.launch", lambda op, kernel, grid, *arguments, **options: grids.append(grid)
    )
    num_rows, context_len = 4100, 2048
    q = torch.empty(num_rows, 12 * 64, device="meta")
    cache, table = torch.empty(1, 12, 64, device="meta"), torch.empty(num_rows, context_len, device="meta")
    config = get_config("attend_rows", DEVICE, torch.float32, num_rows, deterministic=True)
    splits = plan_splits(config, num_rows, 12, 12, 64, context_len, deterministic=True)
    workspace = Workspace(torch.empty(0), torch.empty(0))
    launch_attention(
        *("attend_rows", config, splits, q, num_rows, cache, cache, table, table, table, 1.0, q, workspace, Bias())
    )
    assert splits.num_items > 65535
    assert grids == [(splits.num_groups * splits.num_items,)]


def test_items_grow_with_the_target_and_never_beyond_it() -> None:
    with constants(TARGET_PROGRAMS=64, BLOCK_C=128):
        config = get_config("attend_rows", DEVICE, torch.float32, 8)
        splits = plan_splits(config, 8, 12, 12, 64, 2048, deterministic=False)
        assert splits == Splits(6, 10 + 8, 10, 0, 2, 64, BLOCK_S)
        fixed = plan_splits(config, 8, 12, 12, 64, 2048, deterministic=True)
        assert fixed == Splits(6, 8 * 64, 10, 32, 2, 64, BLOCK_S)
        sizes = [workspace_sizes(max_rows, 12, 12, 64, 2048, DEVICE) for max_rows in (1, 2, 8, 256)]
        assert all(first < second for first, second in pairwise(sizes))
