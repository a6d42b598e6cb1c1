"""The kernels that multiply listed rows by a matrix: on a GPU, or else under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynskip.kernels import linear_rows as linear_module
from dynskip.kernels import one_row
from dynskip.kernels.configs import use_configs
from dynskip.kernels.launches import LAUNCHES
from dynskip.kernels.linear_add_rows import linear_add_rows
from dynskip.kernels.linear_rows import linear_rows, qkv_rows
from dynskip.kernels.norm_rows import norm_rows
from dynskip.kernels.row_list import RowList, RowNorm, Workspace
from dynskip.ops import row_reference
from dynskip.ops.backends import available_backends
from dynskip.validation.errors import eager_activation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WHY_NOT = available_backends(DEVICE)["triton"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=f"triton backend: {WHY_NOT}")]
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter multiplies bfloat16 matrices wrongly")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)]
NO_ROW = 2**30  # an id that stands behind the end of a list: a kernel that used it would not survive
M = 21  # rows of every buffer: more than one tile of 16


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    """Tiles so small that small matrices have several."""
    with tiles():
        yield


def default_tiles() -> Any:
    """The table that is shipped."""
    return use_configs({"device": None, "capability": None, "measured": None, "ops": {}})


def tiles(**changes: Any) -> Any:
    """A table of small tiles, with some of its constants changed."""
    linear = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "WEIGHTS_LEFT": False, "PREFETCH_K": 64}
    linear |= {"PREFETCH_MIB": 16, "PDL": True, "num_warps": 4, "num_stages": 3}
    linear |= {key: value for key, value in changes.items() if key in linear}
    fuse, split = changes.get("FUSE_NORM", False), changes.get("SPLIT_K", 3)
    ops = {
        "linear_rows": {"FUSE_NORM": fuse, **linear},
        "qkv_rows": {"FUSE_NORM": fuse, **linear},
        "linear_add_rows": {"SPLIT_K": split, **linear},
    }
    groups = {op: {size: [{"max_rows": None, **entry}] for size in ("2", "4")} for op, entry in ops.items()}
    return use_configs({"device": None, "capability": None, "measured": None, "ops": groups})


class Draw:
    """Repeatable random tensors of one dtype, and lists of rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(20241027)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(DEVICE, self.dtype)

    def nan(self, *shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=self.dtype, device=DEVICE)

    def rows(self, num: int, max_rows: int) -> RowList:
        ids = torch.full((max(M, max_rows),), NO_ROW, dtype=torch.int32)
        ids[:max_rows] = -1
        ids[:num] = torch.randperm(M, generator=self.generator)[:num]
        return RowList(ids.to(DEVICE), index(num), max_rows)

    def listed(self, rows: RowList, width: int) -> Tensor:
        """`[M, width]`: random in the rows of the list, NaN in the others."""
        x, ids = self.nan(M, width), row_reference.listed(rows)
        x[ids] = self.normal(len(ids), width)
        return x

    def norm(self, width: int, affine: bool = True, rms: bool = False) -> RowNorm:
        if not affine:
            return RowNorm(None, None, 1e-5, rms)
        return RowNorm(self.normal(width), None if rms else self.normal(width), 1e-5, rms)

    def product(self, num_columns: int, depth: int, bias: bool = True) -> tuple[Tensor, Tensor | None]:
        return self.normal(num_columns, depth, scale=depth**-0.5), self.normal(num_columns) if bias else None


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def workspace() -> Workspace:
    return Workspace(
        torch.full((200_000,), float("nan"), device=DEVICE), torch.zeros(200, dtype=torch.int32, device=DEVICE)
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def double(argument: Any) -> Any:
    if isinstance(argument, RowNorm):
        return RowNorm(*map(double, argument))
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def assert_within_budget(actual: Tensor, eager: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """Holds `actual` against `exact`, float64: twice the error of `eager`, or what rounding and float32 leave.

    magnitude: the sums of the products' absolute values, of which float32 keeps 24 bits.
    """
    assert exact.dtype == torch.float64
    if not exact.numel():
        return
    largest, magnified = exact.abs().max().item(), magnitude.max().item()
    floor = torch.finfo(actual.dtype).eps / 2 * largest + torch.finfo(torch.float32).eps * (4 * largest + 2 * magnified)
    allowed = max(2 * (eager.double() - exact).abs().max().item(), floor)
    error = (actual.double() - exact).abs().max().item()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def eager_norm(x: Tensor, norm: RowNorm) -> Tensor:
    if norm.rms:
        return F.rms_norm(x, x.shape[1:], norm.weight, norm.eps)
    return F.layer_norm(x, x.shape[1:], norm.weight, norm.bias, norm.eps)


def eager_product(x: Tensor, norm: RowNorm | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The textbook formula in the dtype of `x`, and the magnitude of its sums."""
    if norm is not None:
        x = eager_norm(x, norm)
    return F.linear(x, weight, bias), x.double().abs() @ weight.double().abs().T


def check_linear(
    draw: Draw,
    x: Tensor,
    rows: RowList,
    norm: RowNorm | None,
    num_columns: int,
    bias: bool = True,
    activation: str = "none",
    gated: bool = False,
) -> None:
    product = draw.product(2 * num_columns if gated else num_columns, x.shape[1], bias)
    out, normed = draw.nan(M, num_columns), draw.nan(*x.shape)
    linear_rows(x, rows, norm, *product, activation, gated, out, normed)

    ids = row_reference.listed(rows)
    exact = out.double()
    row_reference.linear_rows(double(x), rows, double(norm), *map(double, product), activation, gated, exact, normed)
    eager, magnitude = eager_product(x[ids], norm, *product)
    if len(ids):
        eager, magnified = eager_activation(eager, activation, gated, magnitude.max().item())
        magnitude = torch.tensor(magnified)
    assert_within_budget(out[ids], eager, exact[ids], magnitude)
    others = torch.ones(M, dtype=torch.bool, device=DEVICE).index_fill(0, ids, False)
    assert out[others].isnan().all()


class Case(NamedTuple):
    """A call of linear_rows: rows of M, matrix, and what stands around the product."""

    num: int
    max_rows: int
    depth: int
    num_columns: int
    norm: str = "affine"
    bias: bool = True
    activation: str = "none"
    gated: bool = False


CASES = [
    Case(0, 1, 32, 16),
    Case(1, 1, 32, 16),
    Case(1, 4, 64, 48, activation="relu"),
    Case(3, 4, 97, 35),
    Case(3, 16, 33, 1, norm="none"),
    Case(5, 8, 1, 7, norm="none", bias=False),
    Case(7, 8, 80, 40, norm="plain"),
    Case(M - 1, 32, 64, 33, norm="plain", bias=False, activation="relu"),
    Case(M, M, 45, 32),
    Case(3, 4, 48, 35, norm="rms", activation="gelu"),
    Case(0, 1, 32, 16, norm="rms", activation="silu", gated=True),
    Case(1, 1, 97, 24, norm="rms", activation="silu", gated=True),
    Case(M - 1, 32, 40, 33, norm="rms", bias=False, activation="gelu_tanh", gated=True),
    Case(M, M, 64, 1, norm="none", gated=True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fused", "block_m"), [(False, 16), (True, 16), (False, 1), (True, 4)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.num}of{case.max_rows}-{case.num_columns}x{case.depth}")
def test_products_of_rows_stay_within_the_budget(case: Case, fused: bool, block_m: int, dtype: torch.dtype) -> None:
    draw = Draw(dtype)
    rows = draw.rows(case.num, case.max_rows)
    norm = None if case.norm == "none" else draw.norm(case.depth, case.norm != "plain", case.norm == "rms")
    x = draw.listed(rows, case.depth)
    with tiles(FUSE_NORM=fused, WEIGHTS_LEFT=fused, BLOCK_M=block_m):
        check_linear(draw, x, rows, norm, case.num_columns, case.bias, case.activation, case.gated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_k", [16, 128])
@pytest.mark.parametrize(("num", "gated"), [(1, False), (1, True), (2, False)])
def test_programs_that_share_the_columns_of_one_row(
    num: int, gated: bool, block_k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of them for seven tiles or more, the last of which is not whole; in one piece of K or several."""
    monkeypatch.setattr(one_row, "_NUM_WARPS", 3 * 4)
    draw = Draw(dtype)
    rows, norm = draw.rows(num, num), draw.norm(97, True, gated)
    with tiles(BLOCK_M=1, BLOCK_N=16, BLOCK_K=block_k, FUSE_NORM=True):
        check_linear(draw, draw.listed(rows, 97), rows, norm, 99, True, "silu", gated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [16, 8192])
@pytest.mark.parametrize(("shift", "rms"), [(0.0, False), (300.0, False), (0.0, True)])
def test_a_row_may_be_normalised_in_chunks_and_lie_far_from_zero(
    shift: float, rms: bool, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums about each chunk's own mean keep what a difference of squares would lose."""
    monkeypatch.setattr(linear_module, "MAX_NORM_TILE", chunk)
    draw = Draw(dtype)
    rows = draw.rows(3, 4)
    x = draw.listed(rows, 83) + shift
    norm = draw.norm(83, rms=rms)
    normed, out = draw.nan(M, 83), draw.nan(M, 83)
    identity = torch.eye(83, dtype=dtype, device=DEVICE)
    with tiles(FUSE_NORM=True):
        linear_rows(x, rows, norm, identity, None, "none", False, out, normed)
    ids = row_reference.listed(rows)
    exact = double(x)
    row_reference.norm_rows(double(x), rows, double(norm), exact)
    eager = eager_norm(x[ids], norm)
    uncentered = x[ids].double().abs().amax() / x[ids].double().std(1, correction=0).amin() * norm.weight.double().abs()
    assert_within_budget(out[ids], eager, exact[ids], uncentered)
    assert same_bits(out[ids], normed[ids])  # an identity passes on what was normalised


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [False, True])
def test_norms_of_rows(rms: bool, dtype: torch.dtype) -> None:
    for num, max_rows, width, affine in ((0, 4, 16, True), (1, 1, 97, True), (M, 32, 192, False), (5, 8, 1, True)):
        draw = Draw(dtype)
        rows, norm = draw.rows(num, max_rows), draw.norm(width, affine, rms)
        x, out = draw.listed(rows, width), draw.nan(M, width)
        norm_rows(x, rows, norm, out)
        ids = row_reference.listed(rows)
        exact = out.double()
        row_reference.norm_rows(double(x), rows, double(norm), exact)
        eager = eager_norm(x[ids], norm)
        assert_within_budget(out[ids], eager, exact[ids], x[ids].double().abs())
        assert int(out.isnan().all(1).sum()) == M - num
        in_place = x.clone()
        norm_rows(in_place, rows, norm, in_place)
        assert same_bits(in_place[ids], out[ids])
        others = torch.ones(M, dtype=torch.bool, device=DEVICE).index_fill(0, ids, False)
        assert same_bits(in_place[others], x[others])


def make_qkv(draw: Draw, rows: RowList, num_heads: int, head_size: int, num_kv_heads: int) -> dict[str, Any]:
    """With heads of their own for all keys, LayerNorm; else RMSNorm, and another hidden size than all heads have."""
    size, rms = num_heads * head_size, num_heads != num_kv_heads
    num_inputs = size + 5 if rms else size
    weight, bias = draw.product(size + 2 * num_kv_heads * head_size, num_inputs)
    return {
        "x": draw.listed(rows, num_inputs),
        "rows": rows,
        "num_run": rows.num,
        "norm": draw.norm(num_inputs, rms=rms),
        "weight": weight,
        "bias": bias,
        "q": draw.nan(M, size),
        "k_cache": draw.nan(2 * M, num_kv_heads, head_size),
        "v_cache": draw.nan(2 * M, num_kv_heads, head_size),
        "slots": index(*torch.randperm(2 * M, generator=draw.generator)[:M].tolist()),
        "normed": draw.nan(M, num_inputs),
    }


# The last ones: tiles of 16 columns have parts of two kinds, or of all three.
HEADS = [(2, 16, 2), (4, 16, 1), (6, 16, 3), (3, 7, 3), (9, 7, 3), (4, 3, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize(("num", "max_rows"), [(0, 2), (1, 1), (5, 8), (M, M)])
@pytest.mark.parametrize(("num_heads", "head_size", "num_kv_heads"), HEADS)
def test_queries_go_to_their_rows_and_keys_and_values_to_their_slots(
    num_heads: int, head_size: int, num_kv_heads: int, num: int, max_rows: int, fused: bool, dtype: torch.dtype
) -> None:
    draw = Draw(dtype)
    arguments = make_qkv(draw, draw.rows(num, max_rows), num_heads, head_size, num_kv_heads)
    ids = row_reference.listed(arguments["rows"])
    arguments["slots"][ids[1::2]] = -1
    exact = {name: double(argument) for name, argument in arguments.items()}
    with tiles(FUSE_NORM=fused):
        qkv_rows(**arguments)
    row_reference.qkv_rows(**exact)
    eager, magnitude = eager_product(*(arguments[name] for name in ("x", "norm", "weight", "bias")))
    stored = ids[::2]
    slots = arguments["slots"][stored].long()
    places = {"q": ids, "k_cache": slots, "v_cache": slots}
    end = 0
    for name, written in places.items():
        part = slice(end, end + arguments[name][0].numel())
        end = part.stop
        actual, expected = arguments[name].flatten(1), exact[name].flatten(1)
        assert torch.equal(actual.isnan(), expected.isnan())
        listed = ids if name == "q" else stored
        assert_within_budget(actual[written], eager[listed, part], expected[written], magnitude[listed, part])


@pytest.mark.parametrize(("num_heads", "head_size", "num_kv_heads"), HEADS)
def test_no_query_is_written_where_no_row_attends(num_heads: int, head_size: int, num_kv_heads: int) -> None:
    draw = Draw(torch.float32)
    arguments = make_qkv(draw, draw.rows(5, 8), num_heads, head_size, num_kv_heads)
    both = {
        name: argument.clone() if isinstance(argument, Tensor) else argument for name, argument in arguments.items()
    }
    qkv_rows(**arguments)
    qkv_rows(**both | {"num_run": index(0)})
    assert both["q"].isnan().all() and not arguments["q"].isnan().all()
    assert same_bits(both["k_cache"], arguments["k_cache"]) and same_bits(both["v_cache"], arguments["v_cache"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights_left", [False, True], ids=["rows", "weights"])
@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize(
    ("num", "max_rows", "depth", "num_columns", "bias"),
    [(0, 1, 64, 32, True), (1, 1, 128, 32, True), (5, 8, 97, 35, False), (3, 4, 20, 1, True), (M, M, 160, 48, True)],
)
def test_products_are_added_to_their_rows(
    num: int,
    max_rows: int,
    depth: int,
    num_columns: int,
    bias: bool,
    split: int,
    weights_left: bool,
    dtype: torch.dtype,
) -> None:
    """With 20 or 97 columns some of the parts of K hold little or nothing."""
    draw = Draw(dtype)
    rows = draw.rows(num, max_rows)
    x, product, residual = draw.listed(rows, depth), draw.product(num_columns, depth, bias), draw.normal(M, num_columns)
    ids = row_reference.listed(rows)
    before, shared = residual.clone(), workspace()
    with tiles(SPLIT_K=split, WEIGHTS_LEFT=weights_left):
        linear_add_rows(x, rows, *product, residual, shared)
    exact = before.double()
    row_reference.linear_add_rows(double(x), rows, *map(double, product), exact)
    eager, magnitude = eager_product(x[ids], None, *product)
    assert_within_budget(residual[ids], before[ids] + eager, exact[ids], magnitude)
    others = torch.ones(M, dtype=torch.bool, device=DEVICE).index_fill(0, ids, False)
    assert same_bits(residual[others], before[others])
    assert not shared.counters.any()
    if split == 1:
        assert shared.partials.isnan().all()


def test_a_workspace_that_is_too_small_is_noticed() -> None:
    draw = Draw(torch.float32)
    rows = draw.rows(3, 4)
    x, product, residual = draw.listed(rows, 64), draw.product(32, 64), draw.normal(M, 32)
    small = Workspace(torch.empty(10, device=DEVICE), index(0, 0))
    with pytest.raises(AssertionError, match="make_workspace was told of this matrix"):
        linear_add_rows(x, rows, *product, residual, small)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours_nor_on_the_bucket(dtype: torch.dtype) -> None:
    """In deterministic mode: alone, in another place of the list, and in every bucket, each row has the same bits."""
    draw = Draw(dtype)
    together = draw.rows(M, M)
    x, norm, product = draw.normal(M, 97), draw.norm(97), draw.product(36, 97)
    qkv = make_qkv(draw, together, 4, 16, 2)
    order = together.ids.tolist()

    def run(rows: RowList) -> list[Tensor]:
        out, normed, residual = draw.nan(M, 36), draw.nan(M, 97), torch.ones(M, 36, dtype=dtype, device=DEVICE)
        gated = draw.nan(M, 18)
        caches = {name: draw.nan(*qkv[name].shape) for name in ("q", "k_cache", "v_cache", "normed")}
        linear_rows(x, rows, norm, *product, "relu", False, out, normed, deterministic=True)
        linear_rows(x, rows, norm, *product, "silu", True, gated, normed, deterministic=True)
        linear_add_rows(x, rows, *product, residual, workspace(), deterministic=True)
        qkv_rows(**qkv | caches | {"rows": rows}, deterministic=True)
        slots = qkv["slots"].long()
        return [
            out,
            gated,
            residual,
            caches["q"],
            caches["k_cache"][slots].flatten(1),
            caches["v_cache"][slots].flatten(1),
        ]

    with default_tiles():
        expected = run(together)
        for ids, max_rows in (([order[0]], 1), ([order[17]], 16), ([3, order[20], order[5]], 4), (order[::-1], 32)):
            listed = index(*ids, *[-1] * (max_rows - len(ids)), *[NO_ROW] * (M - max_rows))
            rows = RowList(listed, index(len(ids)), max_rows)
            for alone, among_others in zip(run(rows), expected, strict=True):
                assert same_bits(alone[ids], among_others[ids])


def test_launches_are_counted() -> None:
    draw = Draw(torch.float32)
    rows = draw.rows(2, 2)
    x, norm, product, out = draw.listed(rows, 32), draw.norm(32), draw.product(32, 32), draw.nan(M, 32)
    qkv = make_qkv(draw, rows, 2, 16, 2)
    LAUNCHES.clear()
    with tiles(FUSE_NORM=False):
        linear_rows(x, rows, norm, *product, "relu", False, out, draw.nan(M, 32))
        linear_rows(x, rows, None, *product, "relu", False, out, draw.nan(M, 32))
        qkv_rows(**qkv)
    assert LAUNCHES == {"norm_rows": 2, "linear_rows": 2, "qkv_rows": 1}
    LAUNCHES.clear()
    with tiles(FUSE_NORM=True):
        linear_rows(x, rows, norm, *product, "relu", False, out, draw.nan(M, 32))
        qkv_rows(**qkv)
    linear_add_rows(x, rows, *product, out, workspace())
    assert LAUNCHES == {"linear_rows": 1, "qkv_rows": 1, "linear_add_rows": 1}


def test_the_default_tiles_compute_the_same() -> None:
    """All buckets of the table that is shipped, on one matrix that no tile divides and one that many do."""
    draw = Draw(torch.float16)
    for num_columns, depth in ((136, 264), (128, 256)):
        product = draw.product(num_columns, depth)
        with default_tiles():
            for max_rows in (1, 4, 16, 32, 64, 128):
                rows = draw.rows(min(3, max_rows), max_rows)
                x, norm = draw.listed(rows, depth), draw.norm(depth)
                ids = row_reference.listed(rows)
                out, residual = draw.nan(M, num_columns), torch.zeros_like(draw.nan(M, num_columns))
                linear_rows(x, rows, norm, *product, "none", False, out, draw.nan(M, depth))
                linear_add_rows(x, rows, *product, residual, workspace())
                for actual, before in ((out, norm), (residual, None)):
                    exact = out.double()
                    row_reference.linear_rows(
                        double(x), rows, double(before), *map(double, product), "none", False, exact, double(x)
                    )
                    assert_within_budget(actual[ids], *_budget(x[ids], before, product, exact[ids]))


def _budget(x: Tensor, norm: RowNorm | None, product: Any, exact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    eager, magnitude = eager_product(x, norm, *product)
    return eager, exact, magnitude


def test_rows_beyond_two_to_the_31_elements() -> None:
    """The memory is reserved, not touched: only the few rows used become resident."""
    stride = 2**30 + 16
    far = torch.empty(2 * stride + 32, dtype=torch.float16, device=DEVICE).as_strided((3, 32), (stride, 1))
    far[2] = torch.arange(32)
    identity = torch.eye(32, dtype=torch.float16, device=DEVICE)
    rows = RowList(index(2), index(1), 1)
    linear_add_rows(far, rows, identity, None, far, workspace())
    assert torch.equal(far[2].cpu(), 2 * torch.arange(32).half())
    linear_rows(far, rows, None, identity, None, "none", False, far, far)
    assert torch.equal(far[2].cpu(), 2 * torch.arange(32).half())
