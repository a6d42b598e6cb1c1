"""Linear: dense and packed states hold the same bits, and deterministic rows do not depend on their neighbours."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn import functional

from dynskip.models.linear import Linear, merge, packing_obstacle
from dynskip.ops import native, torch_backend
from dynskip.ops.reference import ACTIVATIONS, activate

SHAPES = [(192, 192), (768, 192), (4096, 192), (2048, 2048)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    bias: bool = True,
    seed: int = 0,
) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    bias_tensor = torch.randn(out_features, generator=generator).to(dtype) if bias else None
    return Linear.of(weight, bias_tensor)


def pack_or_skip(linear: Linear) -> Linear:
    if linear.packing_obstacle is not None:
        pytest.skip(linear.packing_obstacle)
    return linear.pack_()


def test_private_ops_are_where_this_package_expects_them() -> None:
    for name in ("_reorder_linear_weight", "_linear_pointwise", "_nbytes", "data_ptr"):
        assert hasattr(torch.ops.mkldnn, name), f"torch.ops.mkldnn.{name} is gone from torch {torch.__version__}"
    schema = str(torch.ops.mkldnn._linear_pointwise.default._schema)
    assert "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm)" in schema
    assert packing_obstacle(torch.empty(16, 16)) is None
    schema = str(torch.ops.aten._addmm_activation.default._schema)
    assert "(Tensor self, Tensor mat1, Tensor mat2, *, Scalar beta=1, Scalar alpha=1, bool use_gelu=False)" in schema
    assert hasattr(torch, "_addmm_activation"), f"torch._addmm_activation is gone from torch {torch.__version__}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 33])
def test_a_fused_relu_is_within_twice_the_error_of_eager(
    num_rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = make(256, 192, dtype)
    x = torch.randn(num_rows, 192, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight, bias = linear.dense_weight().detach(), linear.bias
    assert bias is not None
    calls: list[torch.Tensor] = []
    fused = torch._addmm_activation

    def record(*args: torch.Tensor) -> torch.Tensor:
        calls.append(args[1])
        return fused(*args)

    monkeypatch.setattr(torch, "_addmm_activation", record)
    monkeypatch.setattr("dynskip.models.linear._FUSED_RELU_DEVICES", {"cpu", "cuda"})
    exact = functional.linear(x.double(), weight.double(), bias.double()).relu()
    eager = functional.linear(x, weight, bias).relu()
    with torch.no_grad():
        y = linear(x, "relu")
        linear(x)
    assert len(calls) == 1 and y.shape == eager.shape and y.dtype == dtype
    ulp = torch.finfo(dtype).eps * (exact.abs().max() if num_rows else 0)
    assert ((y.double() - exact).abs() <= 2 * (eager.double() - exact).abs() + ulp).all()
    x.requires_grad_(True)
    linear(x, "relu").sum().backward()
    assert len(calls) == 1 and x.grad is not None, "a product with gradients is not fused"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(192, 192), (100, 36), (5, 7), (4099, 192)])
def test_packing_and_unpacking_keep_every_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    linear = make(*shape, dtype)
    before = linear.dense_weight().detach().clone()
    pack_or_skip(linear)
    assert linear.packed and linear.weight is None
    assert torch.equal(linear.dense_weight(), before)
    linear.unpack_()
    assert not linear.packed and isinstance(linear.weight, torch.nn.Parameter)
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 33])
@torch.no_grad()
def test_forward_stays_within_twice_the_error_of_eager(
    num_rows: int, dtype: torch.dtype, packed: bool, activation: str, bias: bool
) -> None:
    linear = make(256, 192, dtype, bias)
    x = torch.randn(num_rows, 192).to(dtype)
    weight, offset = linear.dense_weight().detach().clone(), linear.bias
    exact = functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    eager = functional.linear(x, weight, offset)
    # One rounding of the result to dtype, and a sum in float32 whose order is the library's own business.
    magnitude = x.double().abs() @ weight.double().abs().T
    largest, largest_sum = (float(t.abs().max()) if num_rows else 0.0 for t in (exact, magnitude))
    rounding = torch.finfo(dtype).eps * largest + 2 * torch.finfo(torch.float32).eps * largest_sum
    exact, eager = activate(exact, activation), torch_backend.activate(eager, activation)
    if packed:
        pack_or_skip(linear)
    for deterministic in (False, True):
        y = linear(x, activation, deterministic=deterministic)
        assert y.dtype == dtype and y.shape == (num_rows, 256)
        if num_rows:
            error, eager_error = (
                (y.double() - exact).abs().max(),
                (eager.double() - exact).abs().max(),
            )
            assert error <= max(2 * eager_error, rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_deterministic_rows_do_not_depend_on_their_neighbours(
    shape: tuple[int, int], packed: bool, dtype: torch.dtype
) -> None:
    linear = make(*shape, dtype)
    if packed:
        pack_or_skip(linear)
    x = torch.randn(70, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = linear(x, "relu", deterministic=True)
    for num_rows in range(1, 71):
        assert torch.equal(linear(x[:num_rows], "relu", deterministic=True), expected[:num_rows]), num_rows
    for first in (1, 5, 15, 16, 33):
        assert torch.equal(linear(x[first:], "relu", deterministic=True), expected[first:]), first
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2))
    assert torch.equal(linear(x[order], "relu", deterministic=True), expected[order])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(11, 11), (7, 66), (33, 257)])
@torch.no_grad()
def test_deterministic_rows_do_not_depend_on_where_they_lie(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Rows whose bytes fill no vector begin at another place in one each."""
    linear = make(*shape, dtype)
    row = torch.randn(1, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = linear(row, deterministic=True)
    assert torch.equal(linear(row.expand(19, -1), deterministic=True), expected.expand(19, -1))
    torch.testing.assert_close(expected, functional.linear(row, linear.dense_weight(), linear.bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@torch.no_grad()
def test_activated_rows_do_not_depend_on_their_neighbours(activation: str, packed: bool, dtype: torch.dtype) -> None:
    linear = make(301, 40, dtype)
    if packed:
        pack_or_skip(linear)
    x = torch.randn(37, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = linear(x, activation, deterministic=True)
    for first, end in ((0, 1), (0, 16), (1, 37), (15, 17), (36, 37)):
        assert torch.equal(linear(x[first:end], activation, deterministic=True), expected[first:end])


def test_leading_dimensions_are_kept() -> None:
    linear = make(32, 48, torch.float32)
    x = torch.randn(2, 3, 48)
    for deterministic in (False, True):
        assert linear(x, deterministic=deterministic).shape == (2, 3, 32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_of_a_dense_weight_is_differentiable(activation: str) -> None:
    linear = make(6, 5, torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: linear(rows, activation), (x,))
    torch.testing.assert_close(linear(x, activation), activate(linear(x), activation), rtol=0, atol=1e-14)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_activations_of_a_packed_weight_are_as_exact_as_those_of_pytorch(dtype: torch.dtype, activation: str) -> None:
    """Behind the unit matrix the activation is all that is computed."""
    linear = pack_or_skip(Linear.of(torch.eye(64, dtype=dtype)))
    x = torch.linspace(-12, 12, 64 * 800).view(-1, 64).to(dtype)
    for num_rows in (7, len(x)):
        exact = activate(x[:num_rows].double(), activation)
        eager = torch_backend.activate(x[:num_rows], activation)
        error = (linear(x[:num_rows], activation).double() - exact).abs()
        allowed = 2 * (eager.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs()
        # GELU of -12 is -2e-32, which PyTorch's erf, 1 in float64 from 6 on, does not see.
        assert (error <= allowed + 1e-30).all()


def test_dense_weight_is_differentiable_and_packed_says_the_way_out() -> None:
    linear = make(32, 48, torch.float32)
    x = torch.randn(5, 48, requires_grad=True)
    linear(x, "relu").sum().backward()
    assert linear.weight is not None and linear.weight.grad is not None and x.grad is not None
    linear.pack_()
    with pytest.raises(RuntimeError, match=r"Linear: x must not require grad .* Call unpack_\(\)"):
        linear(x)
    with torch.no_grad():
        assert linear(x).shape == (5, 32)


def test_state_dict_holds_the_dense_weight_in_both_states() -> None:
    linear = make(32, 48, torch.bfloat16)
    dense = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    packed = pack_or_skip(linear).state_dict()
    assert set(packed) == {"weight", "bias"}
    assert all(torch.equal(packed[name], dense[name]) for name in dense)
    with pytest.raises(RuntimeError, match="must be dense to be loaded"):
        linear.load_state_dict(dense)
    with pytest.raises(RuntimeError, match="must be dense to be moved or cast"):
        linear.to(torch.float32)


def test_packed_weight_is_the_only_copy() -> None:
    linear = pack_or_skip(make(256, 192, torch.bfloat16))
    assert linear.weight_bytes == 256 * 192 * 2
    assert [name for name, _ in linear.named_parameters()] == ["bias"]


def test_obstacles_are_named() -> None:
    assert "is on meta" in str(packing_obstacle(torch.empty(4, 4, device="meta")))
    assert "float64" in str(packing_obstacle(torch.empty(4, 4, dtype=torch.float64)))
    linear = make(4, 4, torch.float64)
    assert not linear.pack_().packed and linear.packing_obstacle is not None


def test_bad_arguments() -> None:
    linear = make(8, 4, torch.float32)
    with pytest.raises(ValueError, match="activation must be one of none, relu, gelu, gelu_tanh, silu, got 'swish'"):
        linear(torch.randn(1, 4), "swish")
    with pytest.raises(ValueError, match="weight must have 2 dimensions"):
        Linear.of(torch.randn(4))
    with pytest.raises(ValueError, match=r"bias must be \[8\]"):
        Linear.of(torch.randn(8, 4), torch.randn(4))


def test_copies_hold_the_same_bits_and_memory_of_their_own() -> None:
    linear = pack_or_skip(make(256, 192, torch.bfloat16))
    x = torch.randn(3, 192).bfloat16()
    with torch.no_grad():
        expected = linear(x)
        copied = copy.deepcopy(linear)
        assert copied.packed and torch.equal(copied(x), expected)
        weight = linear.dense_weight()
        del linear
        assert torch.equal(copied(x), expected) and torch.equal(copied.dense_weight(), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(192, 192), (100, 36), (5, 7), (4099, 130), (64, 2048)])
@torch.no_grad()
def test_native_product_reads_the_packed_layout(shape: tuple[int, int], dtype: torch.dtype) -> None:
    if native.unavailable_reason() is not None:
        pytest.skip("needs the C++ extension")
    linear = make(*shape, dtype)
    weight = linear.dense_weight().detach().clone()
    pack_or_skip(linear)
    assert linear.native_rows > 0, "oneDNN's packed layout has changed"
    assert linear._packed_weight is not None
    assert not native.panel_outputs(weight.flip(0), linear._packed_weight)
    strided = torch.randn(linear.native_rows, shape[1] + 3).to(dtype)[:, : shape[1]]
    for activation in ACTIVATIONS:
        y = linear(strided, activation)
        exact = functional.linear(strided.double(), weight.double(), linear.bias.double())  # type: ignore[union-attr]
        exact = activate(exact, activation)
        # A float32 sum of 2048 products errs by several units in its last place.
        tolerance = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 1)
        assert (y.double() - exact).abs().max() <= tolerance * exact.abs().max()
    strided[:] = torch.nan
    assert linear(strided, "relu").isnan().all()


def merged_three(dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> tuple[list[Linear], torch.Tensor]:
    linears = [make(*shape, dtype, bias, seed) for seed, shape in enumerate([(24, 40), (24, 40), (8, 40)])]
    expected = torch.cat([linear.dense_weight().detach().clone() for linear in linears])
    return linears, expected


@pytest.mark.parametrize("bias", [True, False])
def test_merged_weights_are_one_matrix_held_once(bias: bool) -> None:
    linears, expected = merged_three(bias=bias)
    parameters = [linear.weight for linear in linears]
    weight, offset = merge(linears)
    assert torch.equal(weight, expected) and weight.is_contiguous() and not weight.requires_grad
    assert (offset is None) == (not bias)
    assert [linear.weight for linear in linears] == parameters, "an optimizer that holds them would lose them"
    storages = {linear.dense_weight().untyped_storage().data_ptr() for linear in linears}
    assert storages == {weight.untyped_storage().data_ptr()}
    again, _ = merge(linears)
    assert again.data_ptr() == weight.data_ptr(), "merging twice must copy nothing"
    with torch.no_grad():
        linears[1].dense_weight().zero_()
    assert not weight[24:48].any() and weight[:24].any()


def test_neighbours_in_memory_are_not_taken_for_one_matrix() -> None:
    whole = torch.arange(60.0).view(10, 6)
    swapped = [Linear.of(whole[5:]), Linear.of(whole[:5])]
    weight, _ = merge(swapped)
    assert torch.equal(weight, torch.cat([whole[5:], whole[:5]]))
    columns = [Linear.of(whole[:, :3].t()), Linear.of(whole[:, 3:].t())]
    assert torch.equal(merge(columns)[0], whole.t())


def test_merging_again_follows_a_cast_and_a_load() -> None:
    linears, expected = merged_three()
    merge(linears)
    for linear in linears:
        linear.to(torch.float32)
    weight, bias = merge(linears)
    assert weight.dtype == torch.float32 and torch.equal(weight, expected.float()) and bias is not None
    linears[0].load_state_dict({"weight": torch.ones(24, 40), "bias": torch.ones(24)})
    assert weight[:24].eq(1).all() and bias[:24].eq(1).all()


def test_copies_of_merged_linears_take_their_own_rows_only() -> None:
    linears, expected = merged_three()
    merge(linears)
    for copied in (copy.deepcopy(linears[1]), pickle.loads(pickle.dumps(linears[1]))):
        assert torch.equal(copied.dense_weight(), expected[24:48])
        assert copied.dense_weight().untyped_storage().nbytes() == 24 * 40 * 2
        assert copied.dense_weight().requires_grad
        pairs = zip(copied.parameters(), linears[1].parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_linears_that_cannot_be_merged_say_so() -> None:
    linears, _ = merged_three(torch.float32)
    pack_or_skip(linears[2])
    with pytest.raises(RuntimeError, match=r"merge: linears must be dense, got 1 of 3 packed. Call unpack_\(\)"):
        merge(linears)
    with pytest.raises(ValueError, match="merge: linears must all have a bias or none, got 1 of 2 with one"):
        merge([make(4, 4, torch.float32), make(4, 4, torch.float32, bias=False)])
