"""The specification against PyTorch's own operators in float64, and its gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynskip.ops import reference


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("row_ids", [None, index(), index(3), index(0, 2, 4), index(4, 1)])
def test_gather_layer_norm_is_torch_layer_norm_of_the_rows(row_ids: Tensor | None, affine: bool) -> None:
    x = normal(5, 19)
    weight, bias = (normal(19), normal(19) + 1) if affine else (None, None)
    rows = x if row_ids is None else x[row_ids.long()]
    torch.testing.assert_close(
        reference.gather_layer_norm(x, row_ids, weight, bias, 1e-5),
        F.layer_norm(rows, (19,), weight, bias, 1e-5),
        rtol=0,
        atol=1e-14,
    )


def test_gather_layer_norm_takes_half_precision_statistics_in_float32() -> None:
    x = (normal(3, 512) + 60).to(torch.float16)  # the sum of the squares is beyond float16
    expected = F.layer_norm(x.double(), (512,))
    assert (reference.gather_layer_norm(x, None, None, None, 1e-5) - expected).abs().max() < 2e-3


@pytest.mark.parametrize("row_ids", [None, index(), index(5), index(1, 6, 4)])
def test_scatter_add_adds_to_the_rows_and_to_no_other(row_ids: Tensor | None) -> None:
    x, num_rows = normal(7, 4), 7 if row_ids is None else len(row_ids)
    y, expected = normal(num_rows, 4), normal(7, 4)
    for row, target in enumerate(range(7) if row_ids is None else row_ids.tolist()):
        expected[target] += y[row]
    reference.scatter_add(x, row_ids, y)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scatter_add_rounds_once(dtype: torch.dtype) -> None:
    x, y = normal(7, 40, dtype=dtype), normal(7, 40, dtype=dtype) / 100
    expected = (x.double() + y.double()).to(dtype)
    reference.scatter_add(x, index(*range(7)), y)
    assert torch.equal(x, expected)


def test_kv_store_writes_slots_and_skips_minus_one() -> None:
    k, v = normal(4, 2, 3), normal(4, 2, 3) + 10
    k_cache, v_cache = torch.zeros(6, 2, 3).double(), torch.zeros(6, 2, 3).double()
    reference.kv_store(k, v, k_cache, v_cache, index(5, -1, 0, 2))
    for cache, rows in ((k_cache, k), (v_cache, v)):
        assert torch.equal(cache[[5, 0, 2]], rows[[0, 2, 3]])
        assert not cache[[1, 3, 4]].any()


def test_decode_attention_is_torch_attention_over_the_slots() -> None:
    q, k_cache, v_cache = normal(3, 2, 16), normal(9, 2, 16), normal(9, 2, 16) + 1
    slot_table = index(8, 2, 5, -1, 0, 1, 2, 3).view(2, 4)
    out = reference.decode_attention(q, k_cache, v_cache, slot_table, index(1, 0, 1), index(4, 3, 0), 0.3)
    for row, slots in enumerate(([0, 1, 2, 3], [8, 2, 5])):
        k, v = (cache[slots].transpose(0, 1) for cache in (k_cache, v_cache))
        expected = F.scaled_dot_product_attention(q[row, :, None], k, v, scale=0.3)[:, 0]
        torch.testing.assert_close(out[row], expected, rtol=0, atol=1e-14)
    assert torch.equal(out[2], torch.zeros(2, 16).double())


def test_prefill_attention_is_torch_causal_attention_of_each_sequence() -> None:
    q, k, v = normal(8, 2, 16), normal(8, 2, 16) + 1, normal(8, 2, 16) - 1
    starts = index(0, 3, 3, 8)
    out = reference.prefill_attention(q, k, v, starts, starts, index(1, 2, 3, 1, 2, 3, 4, 5), 0.3)
    for rows in (slice(0, 3), slice(3, 8)):
        heads = [tensor[rows].transpose(0, 1) for tensor in (q, k, v)]
        expected = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True, scale=0.3)
        torch.testing.assert_close(out[rows], expected.transpose(0, 1), rtol=0, atol=1e-14)


def test_prefill_attention_of_the_last_token_is_decode_attention() -> None:
    q, k, v = normal(1, 2, 16), normal(5, 2, 16) + 1, normal(5, 2, 16) - 1
    for limit in range(6):
        prefill = reference.prefill_attention(q, k, v, index(0, 1), index(0, 5), index(limit), 0.3)
        table = index(*range(5))[None]
        assert torch.equal(prefill, reference.decode_attention(q, k, v, table, index(0), index(limit), 0.3))


@pytest.mark.parametrize("bias", [True, False])
def test_gather_layer_norm_is_torch_rms_norm_of_the_rows(bias: bool) -> None:
    x, weight, offset = normal(5, 19) + 2, normal(19), normal(19) if bias else None
    expected = F.rms_norm(x[[4, 1]], (19,), weight, 1e-5)
    expected = expected if offset is None else expected + offset
    found = reference.gather_layer_norm(x, index(4, 1), weight, offset, 1e-5, rms=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rotary_size", [4, 12, 16])
def test_rotated_is_a_product_with_rotation_matrices(rotary_size: int) -> None:
    x, angles, positions = normal(3, 2, 16), normal(5, rotary_size // 2), torch.tensor([4, 0, 4])
    turned = reference.rotated(x, positions, torch.cat([angles.cos(), angles.sin()], dim=1))
    half = rotary_size // 2
    # One complex number a pair.
    pairs = torch.complex(x[..., :half], x[..., half:rotary_size]) * torch.exp(1j * angles)[positions][:, None]
    expected = torch.cat([pairs.real, pairs.imag, x[..., rotary_size:]], dim=-1)
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-14)
    reference.rotate(x, positions, torch.cat([angles.cos(), angles.sin()], dim=1))
    assert torch.equal(x, turned)


def test_rotated_takes_the_rms_norm_of_each_head_first() -> None:
    x, angles, weight, positions = normal(3, 2, 16), normal(5, 8), normal(16), torch.tensor([4, 0, 1])
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    expected = reference.rotated(F.rms_norm(x, (16,), weight, 1e-6), positions, table)
    torch.testing.assert_close(reference.rotated(x, positions, table, weight, 1e-6), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("none", lambda x: x),
        ("relu", F.relu),
        ("gelu", lambda x: x * torch.special.ndtr(x)),
        ("gelu_tanh", lambda x: x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
    ],
)
def test_activate_is_the_function_of_its_name(activation: str, function: Callable[[Tensor], Tensor]) -> None:
    x = normal(7, 10) * 3
    torch.testing.assert_close(reference.activate(x, activation), function(x), rtol=0, atol=1e-14)
    gated = function(x[:, :5]) * x[:, 5:]
    torch.testing.assert_close(reference.activate(x, activation, gated=True), gated, rtol=0, atol=1e-14)


@pytest.mark.parametrize("slopes", [None, (0.5, 0.25, 0.125, 0.0625)])
@pytest.mark.parametrize("window", [0, 3, 100])
def test_attention_with_shared_heads_slopes_and_a_window_is_torch_attention_with_a_mask(
    window: int, slopes: tuple[float, ...] | None
) -> None:
    q, k, v = normal(6, 4, 16), normal(6, 2, 16) + 1, normal(6, 2, 16) - 1
    places = torch.tensor([0, 2, 3, 5, 8, 9])
    distances = places[:, None] - places
    allowed = (distances >= 0) & (distances < (window or 1000))
    mask = torch.zeros(4, 6, 6).double()
    if slopes is not None:
        mask -= torch.tensor(slopes)[:, None, None] * distances
    mask = mask.masked_fill(~allowed, float("-inf"))
    heads = [tensor.transpose(0, 1) for tensor in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))]
    expected = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=mask, scale=0.3).transpose(0, 1)
    given = None if slopes is None else torch.tensor(slopes)
    starts, limits = index(0, 6), index(1, 2, 3, 4, 5, 6)
    found = reference.prefill_attention(q, k, v, starts, starts, limits, 0.3, given, window, places, places)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    table, seq_ids = index(*range(6))[None], index(0, 0, 0, 0, 0, 0)
    decoded = reference.decode_attention(q, k, v, table, seq_ids, limits, 0.3, given, window, places, places.int())
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-14)


def test_no_rows_give_no_rows() -> None:
    nothing, cache = normal(0, 2, 16), normal(5, 2, 16)
    decoded = reference.decode_attention(nothing, cache, cache, index(0, 1)[None], index(), index(), 1.0)
    prefilled = reference.prefill_attention(nothing, nothing, nothing, index(0), index(0), index(), 1.0)
    assert decoded.shape == prefilled.shape == (0, 2, 16)


def test_gradients_pass_through_a_residual_stream_that_is_updated_in_place() -> None:
    """The shape of a layer: norm, attention over a cache written on the way, residual add; twice."""
    starts, slots, table = index(0, 2, 4), index(3, 0, 1, 2), index(3, 0, 1, 2).view(2, 2)

    def run(x: Tensor, weight: Tensor, bias: Tensor, projection: Tensor) -> Tensor:
        stream = x.clone()
        for row_ids in (None, index(0, 1, 2, 3)):
            normed = reference.gather_layer_norm(stream, row_ids, weight, bias, 1e-5)
            q, k, v = (normed @ projection).view(4, 3, 2, 2).unbind(1)
            caches = torch.zeros(4, 2, 2).double(), torch.zeros(4, 2, 2).double()
            reference.kv_store(k, v, *caches, slots)
            attended = reference.prefill_attention(q, k, v, starts, starts, index(1, 2, 1, 2), 0.5)
            decoded = reference.decode_attention(q, *caches, table, index(0, 0, 1, 1), index(1, 2, 1, 2), 0.5)
            reference.scatter_add(stream, row_ids, (attended + decoded).flatten(1))
        return stream

    inputs = (normal(4, 4), normal(4) + 1, normal(4), normal(4, 12))
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(run, inputs)


def test_gradients_pass_through_rotations_gates_and_shared_heads() -> None:
    starts, places = index(0, 3), torch.tensor([0, 1, 3])
    angles = normal(4, 2)
    table = torch.cat([angles.cos(), angles.sin()], dim=1)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        normed = reference.gather_layer_norm(x, None, None, None, 1e-5, rms=True)
        q, k, v = normed.view(3, 4, 4).split([2, 1, 1], dim=1)
        q, k = (reference.rotated(heads, places, table, weight, 1e-6) for heads in (q, k))
        slopes = torch.tensor([0.5, 0.25])
        attended = reference.prefill_attention(q, k, v, starts, starts, index(1, 2, 3), 0.5, slopes, 3, places, places)
        return reference.activate(attended.flatten(1), "silu", gated=True)

    inputs = normal(3, 16).requires_grad_(), (normal(4) + 1).detach().requires_grad_()
    assert torch.autograd.gradcheck(run, inputs)
