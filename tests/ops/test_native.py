"""The C++ extension: decode attention against float64, its independence of neighbours, and its checks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dynskip.ops import native, reference, torch_backend

if native.unavailable_reason() is not None:
    pytest.skip(str(native.unavailable_reason()), allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["portable", "avx2", "avx512"], autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs once for each instruction set of this machine."""
    try:
        torch.ops.dynskip_native.use_instruction_set(request.param)
    except RuntimeError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    torch.ops.dynskip_native.use_instruction_set("best")


class Case:
    """Inputs of decode attention: slots out of order, lengths ragged, everything that must not be read poisoned."""

    def __init__(self, lengths: list[int], num_heads: int, head_size: int, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_rows, longest = len(lengths), max([*lengths, 1])
        num_slots = sum(lengths) + 5
        self.k_cache = torch.full((num_slots, num_heads, head_size), torch.nan, dtype=dtype)
        self.v_cache = self.k_cache.clone()
        slots = torch.randperm(num_slots, generator=generator).int()
        self.slot_table = torch.full((num_rows + 2, longest), -1, dtype=torch.int32)
        # Rows are not sequences in order, and two sequences belong to no row.
        self.seq_ids = torch.randperm(num_rows + 2, generator=generator)[:num_rows].int()
        self.context_lens = torch.tensor(lengths, dtype=torch.int32)
        first = 0
        for row, length in enumerate(lengths):
            used = slots[first : first + length]
            first += length
            self.slot_table[self.seq_ids[row], :length] = used
            for cache in (self.k_cache, self.v_cache):
                cache[used.long()] = torch.randn(length, num_heads, head_size, generator=generator).to(dtype)
        projection = torch.randn(num_rows, 3, num_heads, head_size, generator=generator).to(dtype)
        self.q = projection[:, 1]
        self.scale = head_size**-0.5
        self.slopes: torch.Tensor | None = None
        self.window = 0
        self.position_ids: torch.Tensor | None = None
        self.slot_positions: torch.Tensor | None = None

    def arguments(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k_cache, self.v_cache, self.slot_table, self.seq_ids, self.context_lens

    def run(self) -> torch.Tensor:
        return native.decode_attention(
            *self.arguments(), self.scale, self.slopes, self.window, self.position_ids, self.slot_positions
        )


def within_budget(case: Case, y: torch.Tensor, num_ulp: int = 4) -> None:
    q, k_cache, v_cache, *rest = case.arguments()
    exact = reference.decode_attention(q.double(), k_cache.double(), v_cache.double(), *rest, case.scale)
    eager = reference.decode_attention(q, k_cache, v_cache, *rest, case.scale)
    assert y.shape == exact.shape and y.dtype == q.dtype and y.is_contiguous() and not y.isnan().any()
    if y.numel():
        ulp = torch.finfo(q.dtype).eps * exact.abs().max()
        # Float32 is the accumulator too: it needs room for other orders of summation.
        allowed = max(2 * (eager.double() - exact).abs().max(), num_ulp * ulp if q.dtype == torch.float32 else ulp)
        assert (y.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [1, 5, 8, 16, 20, 24, 32, 40, 48, 64, 80, 96, 112, 128])
@pytest.mark.parametrize("lengths", [[], [1], [0], [7, 0, 16, 33], [127, 128, 129, 300, 2]])
def test_decode_attention_stays_within_twice_the_error_of_eager(
    lengths: list[int], head_size: int, dtype: torch.dtype
) -> None:
    case = Case(lengths, 3, head_size, dtype)
    y = case.run()
    within_budget(case, y)
    for row, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(y[row], torch.zeros_like(y[row]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_small_scores_do_not_overflow(dtype: torch.dtype) -> None:
    case = Case([5, 200, 130], 2, 64, dtype)
    # An exponential turns the rounding of its argument, which grows with the scores, into relative error.
    for factor in (40, -1):
        case.k_cache *= factor
        within_budget(case, case.run(), num_ulp=40)


@pytest.mark.parametrize("head_size", [64, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_their_neighbours(dtype: torch.dtype, head_size: int) -> None:
    case = Case([90, 1, 300, 128, 17, 64], 8, head_size, dtype)
    together = case.run()
    q, seq_ids, context_lens = case.q, case.seq_ids, case.context_lens
    for row in range(len(context_lens)):
        case.q, case.seq_ids, case.context_lens = q[row : row + 1], seq_ids[row : row + 1], context_lens[row : row + 1]
        assert torch.equal(case.run()[0], together[row])
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    case.q, case.seq_ids, case.context_lens = q[order], seq_ids[order], context_lens[order]
    assert torch.equal(case.run(), together[order])


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    case = Case([90, 300, 128], 12, 64, torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3, 7):
            torch.set_num_threads(num_threads)
            results.append(case.run())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_heads_do_not_depend_on_each_other() -> None:
    case = Case([200, 40], 5, 80, torch.float32)
    together = case.run()
    for head in range(5):
        alone = native.decode_attention(
            case.q[:, head : head + 1].contiguous(),
            case.k_cache[:, head : head + 1].contiguous(),
            case.v_cache[:, head : head + 1].contiguous(),
            case.slot_table,
            case.seq_ids,
            case.context_lens,
            case.scale,
        )
        assert torch.equal(alone[:, 0], together[:, head])


def test_nan_in_one_row_stays_there() -> None:
    case = Case([30, 40], 2, 64, torch.bfloat16)
    case.q = case.q.clone()
    case.q[0, 1] = torch.nan
    y = case.run()
    assert y[0, 1].isnan().all()
    assert not y[0, 0].isnan().any() and not y[1].isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.slot_table[c.seq_ids[0]].fill_(10_000), "slot_table must hold slots"),
        (lambda c: c.slot_table[c.seq_ids[0]].fill_(-1), "slot_table must hold slots"),
        (lambda c: c.seq_ids.fill_(99), "must lie within slot_table"),
        (lambda c: c.context_lens.fill_(99), "must lie within slot_table"),
        (lambda c: setattr(c, "seq_ids", c.seq_ids.long()), r"seq_ids must be contiguous \[2\] int32"),
        (lambda c: setattr(c, "context_lens", c.context_lens.long()), r"context_lens must be contiguous \[2\] int32"),
        (lambda c: setattr(c, "slot_table", c.slot_table.long()), "slot_table must be contiguous"),
        (lambda c: setattr(c, "q", c.q[..., :10].contiguous()), r"\[num_slots, G, 10\] of q's dtype"),
        (lambda c: setattr(c, "q", c.q[:, :1].repeat(1, 3, 1)), "equally many and divide the 3 heads of q, got 2"),
        (
            lambda c: setattr(c, "v_cache", c.v_cache[:, :1].contiguous()),
            "equally many and divide the 2 heads .* got 1",
        ),
        (lambda c: setattr(c, "slopes", torch.ones(2)), r"position_ids must be contiguous \[2\] int64 with slopes"),
        (lambda c: setattr(c, "slopes", torch.ones(3)), r"slopes must be contiguous \[2\] float32"),
        (lambda c: setattr(c, "window", -1), "window must be at least 0, got -1"),
        (
            lambda c: (setattr(c, "window", 3), setattr(c, "position_ids", torch.arange(2))),
            r"slot_positions must be contiguous \[75\] int32 with slopes or a window",
        ),
        (lambda c: setattr(c, "q", c.q[0]), r"q must be \[R, H, D\]"),
        (lambda c: setattr(c, "q", c.q.double()), "of q's dtype"),
        (lambda c: setattr(c, "v_cache", c.v_cache[:-1]), "equally many slots"),
        (lambda c: setattr(c, "k_cache", c.k_cache[:, :1]), "must be contiguous"),
        (lambda c: setattr(c, "q", c.q.transpose(1, 2).contiguous().transpose(1, 2)), "contiguous heads"),
    ],
)
def test_memory_safety_checks(change: object, message: str) -> None:
    case = Case([30, 40], 2, 64, torch.float32)
    change(case)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=message):
        case.run()


def test_instruction_set_is_named_and_an_unknown_one_is_refused(instruction_set: str) -> None:
    assert torch.ops.dynskip_native.instruction_set() == instruction_set
    with pytest.raises(RuntimeError, match=r"name must be best, portable, avx2 or avx512, .* got sse9"):
        torch.ops.dynskip_native.use_instruction_set("sse9")
    assert torch.ops.dynskip_native.instruction_set() == instruction_set


def budget(dtype: torch.dtype, exact: torch.Tensor, eager: torch.Tensor) -> float:
    """Twice the error of eager PyTorch, at least one unit in the last place of the largest result; float32, four."""
    num_ulp = 4 if dtype == torch.float32 else 1
    ulp = torch.finfo(dtype).eps * float(exact.abs().max())
    return max(2 * float((eager.double() - exact).abs().max()), num_ulp * ulp)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (40, 2048), (7, 100), (33, 192), (5, 1), (300, 300)])
def test_gather_layer_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape[0], shape[1] + 2, generator=generator) * 3 + 1).to(dtype)[:, : shape[1]]
    weight, bias = (torch.randn(shape[1], generator=generator).to(dtype) for _ in range(2))
    some = torch.randperm(shape[0], generator=generator)[: shape[0] // 2 + 1].int()
    for row_ids in (None, some, some[:0]):
        for parameters in ((weight, bias), (weight, None), (None, bias), (None, None)):
            wide = [None if parameter is None else parameter.double() for parameter in parameters]
            exact = reference.gather_layer_norm(x.double(), row_ids, *wide, 1e-5)
            eager = torch_backend.gather_layer_norm(x, row_ids, *parameters, 1e-5)
            y = native.gather_layer_norm(x, row_ids, *parameters, 1e-5)
            assert y.shape == exact.shape and y.dtype == dtype
            if y.numel():
                assert (y.double() - exact).abs().max() <= budget(dtype, exact, eager)
    together = native.gather_layer_norm(x, None, weight, bias, 1e-5)
    assert torch.equal(native.gather_layer_norm(x, some, weight, bias, 1e-5), together[some.long()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (40, 2048), (7, 100), (33, 192), (5, 1)])
def test_scatter_add_is_exact(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape[0], shape[1] + 2, generator=generator).to(dtype)
    some = torch.randperm(shape[0], generator=generator)[: shape[0] // 2 + 1].int()
    for row_ids in (None, some, some[:0]):
        num_rows = shape[0] if row_ids is None else len(row_ids)
        y = torch.randn(num_rows, shape[1] + 3, generator=generator).to(dtype)[:, : shape[1]]
        expected, result = x.clone(), x.clone()
        reference.scatter_add(expected[:, : shape[1]], row_ids, y)
        native.scatter_add(result[:, : shape[1]], row_ids, y)
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 7, 300])
def test_kv_store_is_exact(num_rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(num_rows, 3, 5, 12, generator=generator).to(dtype)
    k, v = projection[:, 1], projection[:, 2]
    slots = torch.randperm(num_rows + 9, generator=generator)[:num_rows].int()
    slots[::3] = -1
    caches = [torch.full((num_rows + 9, 5, 12), torch.nan, dtype=dtype) for _ in range(4)]
    reference.kv_store(k, v, caches[0], caches[1], slots)
    native.kv_store(k, v, caches[2], caches[3], slots)
    for expected, result in ((caches[0], caches[2]), (caches[1], caches[3])):
        assert torch.equal(result.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("row_ids", [[0, 3], [-1], [1000]])
def test_row_ids_and_slots_outside_are_refused(row_ids: list[int]) -> None:
    x, ids = torch.zeros(3, 16), torch.tensor(row_ids, dtype=torch.int32)
    y = torch.zeros(len(row_ids), 16)
    with pytest.raises(RuntimeError, match=r"gather_layer_norm: row_ids must lie in 0\.\.2"):
        native.gather_layer_norm(x, ids, None, None, 1e-5)
    with pytest.raises(RuntimeError, match=r"scatter_add: row_ids must lie in 0\.\.2"):
        native.scatter_add(x, ids, y)
    cache = torch.zeros(3, 1, 16)
    with pytest.raises(RuntimeError, match=r"kv_store: slot_mapping must hold slots 0\.\.2 or -1"):
        native.kv_store(y[:, None], y[:, None], cache, cache.clone(), torch.where(ids < 0, -2, ids))


def test_dtypes_and_shapes_that_the_extension_lacks_are_refused() -> None:
    x, ids = torch.zeros(3, 16, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"must be float32, bfloat16 or float16\. Use the torch backend"):
        native.gather_layer_norm(x, ids, None, None, 1e-5)
    with pytest.raises(RuntimeError, match=r"row_ids must be contiguous \[R\] int32"):
        native.scatter_add(x, ids.long(), x[:1])
    with pytest.raises(RuntimeError, match=r"y must be \[1, 16\] of x's dtype"):
        native.scatter_add(x, ids, x[:1].float())


def test_an_extension_of_older_sources_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_OPS", ("kv_store", "an_op_of_tomorrow"))
    reason = native.unavailable_reason.__wrapped__()
    assert reason.startswith("The C++ extension was built from older sources and lacks an_op_of_tomorrow. Build it:")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [20, 48, 64, 128])
@pytest.mark.parametrize("groups", [(2, 1), (3, 2), (4, 2), (7, 1), (4, 8)])
def test_shared_heads_are_heads_of_their_own_to_the_bit(
    groups: tuple[int, int], head_size: int, dtype: torch.dtype
) -> None:
    group_size, num_kv_heads = groups
    case = Case([90, 1, 300, 0, 5], num_kv_heads, head_size, dtype)
    case.q = torch.randn(5, num_kv_heads * group_size, head_size).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 7):
            torch.set_num_threads(num_threads)
            results.append(case.run())
    finally:
        torch.set_num_threads(before)
    case.k_cache, case.v_cache = (cache.repeat_interleave(group_size, dim=1) for cache in (case.k_cache, case.v_cache))
    results.append(case.run())
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("head_size", [20, 64])
@pytest.mark.parametrize("window", [1, 7, 127, 128, 129, 1000])
def test_a_window_is_a_table_without_what_lies_outside(window: int, head_size: int) -> None:
    lengths = [300, 1, 129, 700]
    case = Case(lengths, 4, head_size, torch.float32)
    case.q = torch.randn(4, 8, head_size)
    case.window, case.position_ids = window, torch.tensor([length + 2 for length in lengths])
    case.slot_positions = torch.full((len(case.k_cache),), -9, dtype=torch.int32)
    # Positions stand in the table in any order, and the last of a sequence are none of its entries'.
    for row, length in enumerate(lengths):
        slots = case.slot_table[case.seq_ids[row], :length].long()
        case.slot_positions[slots] = torch.randperm(length).int()
    found = case.run()
    case.window, table = 0, torch.full_like(case.slot_table, -1)
    for row, length in enumerate(lengths):
        slots = case.slot_table[case.seq_ids[row], :length]
        inside = slots[case.position_ids[row] - case.slot_positions[slots.long()] < window]
        table[case.seq_ids[row], : len(inside)] = inside
        case.context_lens[row] = len(inside)
    case.slot_table = table
    assert torch.equal(found, case.run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [20, 64])
def test_slopes_of_zero_change_no_bit(head_size: int, dtype: torch.dtype) -> None:
    case = Case([90, 1, 300], 4, head_size, dtype)
    expected = case.run()
    case.slopes, case.position_ids = torch.zeros(4), torch.tensor([400, 3, 900])
    case.slot_positions = torch.arange(len(case.k_cache), dtype=torch.int32)
    assert torch.equal(case.run(), expected)
    case.slopes = torch.full((4,), 1e4)  # the nearest key alone keeps its weight
    nearest = case.run()
    for row, length in enumerate([90, 1, 300]):
        slots = case.slot_table[case.seq_ids[row], :length].long()
        assert torch.equal(nearest[row], case.v_cache[slots.max()])


def exact_activation(x: torch.Tensor, activation: str) -> torch.Tensor:
    return reference.activate(x.double(), activation)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_are_exact_to_a_few_units_in_the_last_place(activation: str) -> None:
    x = torch.cat(
        [torch.linspace(-13, 13, 200_001), torch.linspace(-1e-3, 1e-3, 2001), torch.tensor([-90.0, 1e4, 1e30])]
    )
    y, exact = native.activate(x[None], activation)[0], exact_activation(x, activation)
    unit = torch.finfo(torch.float32).eps
    assert ((y.double() - exact).abs() <= 2 * unit * torch.maximum(x.abs().double(), exact.abs())).all()
    # Where little is left of x, the error is one of what is left.
    num_units = {"gelu": 4, "gelu_tanh": 40, "silu": 2}.get(activation, 0)
    assert ((y.double() - exact).abs() <= num_units * unit * exact.abs())[x > -6].all()


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_of_what_is_no_number(activation: str) -> None:
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0, -0.0]])
    for dtype in DTYPES:
        y, expected = native.activate(x.to(dtype), activation), exact_activation(x, activation).to(dtype)
        assert y.isnan()[0, 0] and torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_rotation_does_not_reach_keeps_its_bits(dtype: torch.dtype) -> None:
    projection = torch.randn(5, 3, 4, 40).to(dtype)
    before = projection.clone()
    native.rotate(projection[:, 1], torch.arange(5), torch.randn(5, 24))
    assert torch.equal(projection[:, ::2], before[:, ::2])
    assert torch.equal(projection[:, 1, :, 24:], before[:, 1, :, 24:])
    assert not torch.equal(projection[:, 1, :, :24], before[:, 1, :, :24])


@pytest.mark.parametrize("positions", [[0, -1], [5, 0]])
def test_positions_outside_of_the_table_are_refused(positions: list[int]) -> None:
    with pytest.raises(RuntimeError, match=r"rotate: position_ids must lie in 0\.\.4, got (-1|5) in row (1|0)"):
        native.rotate(torch.ones(2, 1, 16), torch.tensor(positions), torch.ones(5, 16))


def test_rotations_and_activations_of_other_shapes_and_dtypes_are_refused() -> None:
    x, positions, table = torch.ones(2, 1, 16), torch.zeros(2, dtype=torch.int64), torch.ones(5, 16)
    for arguments, message in (
        ((x[0], positions, table), r"x must be \[R, H, D\] with contiguous rows"),
        ((x, positions.int(), table), r"position_ids must be contiguous \[2\] int64"),
        ((x, positions, table.double()), r"cos_sin must be contiguous \[P, E\] float32"),
        ((x, positions, torch.ones(5, 18)), r"E even and at most 16, got \[5, 18\]"),
        ((x, positions, table, torch.ones(8)), r"weight must be contiguous \[16\] of x's dtype"),
        ((x.double(), positions, table), r"must be float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=f"rotate: .*{message}"):
            native.rotate(*arguments)
    with pytest.raises(RuntimeError, match="activate: x must have an even number of columns with a gate, got 7"):
        native.activate(torch.ones(2, 7), "silu", True)
    with pytest.raises(RuntimeError, match=r"activate: x must be \[R, F\] with contiguous rows"):
        native.activate(torch.ones(7, 2).t(), "silu")
    with pytest.raises(RuntimeError, match=r"activate: activation must be one of the numbers of .*, got 5"):
        torch.ops.dynskip_native.activate(torch.ones(2, 4), 5)


def packed(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`weight` [out, in] as packed_linear reads it, and the outputs of a panel; in bfloat16 inputs stand in pairs.

    Skips where this CPU multiplies no such panels.
    """
    group, block = (2, 32) if weight.dtype == torch.bfloat16 else (1, 16)
    for panel in (64, 32):
        padded = torch.zeros(-(-weight.shape[0] // panel) * panel, -(-weight.shape[1] // block) * block).to(weight)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        layout = padded.view(-1, panel, padded.shape[1] // group, group).transpose(1, 2).contiguous()
        if torch.ops.dynskip_native.packed_panel_outputs(weight, layout.data_ptr(), layout.nbytes) == panel:
            return layout, panel
    pytest.skip(f"packed {weight.dtype} needs a CPU with AVX-512 BF16 or AMX")


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(192, 192), (100, 36), (5, 7), (130, 513), (70, 1500), (5000, 300)])
def test_a_packed_product_goes_through_its_activation_unrounded(
    shape: tuple[int, int], dtype: torch.dtype, activation: str
) -> None:
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    layout, panel = packed(weight)
    x = torch.randn(70, shape[1]).to(dtype)
    for offset in (bias, None):
        together = native.packed_linear(x, layout.data_ptr(), panel, shape[0], offset, activation)
        product = x.double() @ weight.double().t() + (0 if offset is None else offset.double())
        exact = reference.activate(product, activation)
        # Rounded once, after a float32 sum; an activation is off by units in the last place of its argument. Of
        # 350,000 sums of 300 terms one lies beyond half of this in one draw of 30.
        sums = x.double().abs() @ weight.double().abs().t() * torch.finfo(torch.float32).eps * 4
        arguments = 4 * torch.finfo(torch.float32).eps * product.abs() + 1e-30
        assert ((together.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + sums + arguments).all()
        for num_rows in (1, 6, 7, 16, 33):
            alone = native.packed_linear(x[:num_rows], layout.data_ptr(), panel, shape[0], offset, activation)
            assert torch.equal(alone, together[:num_rows])
    x[3] = torch.nan
    y = native.packed_linear(x, layout.data_ptr(), panel, shape[0], bias, activation)
    assert y[3].isnan().all() and not y[:3].isnan().any() and not y[4:].isnan().any()


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_products_of_every_instruction_set_agree(dtype: torch.dtype, name: str) -> None:
    weight = torch.randn(130, 1100).to(dtype)
    layout, panel = packed(weight)
    x = torch.randn(9, 1100).to(dtype)
    try:
        torch.ops.dynskip_native.use_instruction_set(name)
    except RuntimeError:
        pytest.skip(f"this CPU has no {name}")
    try:
        y = native.packed_linear(x, layout.data_ptr(), panel, 130, None, "none")
    finally:
        torch.ops.dynskip_native.use_instruction_set("best")
    exact = x.double() @ weight.double().t()
    sums = x.double().abs() @ weight.double().abs().t() * torch.finfo(torch.float32).eps * 2
    assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + sums).all()


def test_what_a_packed_product_cannot_read_is_refused() -> None:
    weight = torch.ones(5, 7)
    layout, panel = packed(weight)
    multiply = torch.ops.dynskip_native.packed_linear
    with pytest.raises(RuntimeError, match=r"packed_linear: activation must be one of the numbers of .*, got -1"):
        multiply(torch.ones(1, 7), layout.data_ptr(), panel, 5, None, -1)
    with pytest.raises(RuntimeError, match=r"packed_linear: panel_outputs must be what .*, got 48"):
        multiply(torch.ones(1, 7), layout.data_ptr(), 48, 5, None, 0)
    assert not torch.ops.dynskip_native.packed_panel_outputs(weight + 1, layout.data_ptr(), layout.nbytes)
