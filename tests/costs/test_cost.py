"""The cost model against sums done by hand, and against a roofline written another way."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynskip.costs.layer_costs import Curve, LayerCosts, MachineSpeed, ModelBytes, PathMix, roofline_ms
from dynskip.paths import LayerPath

SHAPE = ModelBytes(
    num_layers=24,
    layer_bytes=100_000_000,
    layer_flops_per_row=100_000_000,
    head_bytes=200_000_000,
    head_flops_per_row=200_000_000,
    kv_entry_bytes=8192,
)
MACHINE = MachineSpeed(bandwidth_gbps=40.0, peak_gflops=800.0)  # a knee at 20 rows


def test_a_mix_counts_rows_per_layer() -> None:
    mix = PathMix.of([LayerPath.of(4, [0, 2]), LayerPath.of(4, [2]), LayerPath.of(4, [0, 1, 2])], rows_per_seq=5)
    assert mix.rows_per_layer == (10, 5, 15, 0)
    assert (mix.num_rows, mix.num_head_rows, mix.num_layers) == (15, 3, 4)
    assert mix.mean_layers == 2.0
    assert mix.union == 3
    assert mix.ideal_speedup == 2.0
    assert mix.at_full_depth() == PathMix((15,) * 4, 15, 3)


def test_a_path_without_layers_is_infinitely_fast_in_layers_only() -> None:
    mix = PathMix.of([LayerPath.of(4, [], allow_empty=True)])
    assert mix.ideal_speedup == float("inf")
    costs = LayerCosts(Curve((1,), (2.0,)), Curve((1,), (1.0,)))
    assert costs.speedup(mix) == 9.0  # the head remains


def test_a_curve_joins_its_points() -> None:
    curve = Curve((2, 4, 8), (10.0, 12.0, 20.0))
    assert [curve.at(rows) for rows in (0, 1, 2, 3, 4, 6, 8, 10)] == [0.0, 10.0, 10.0, 11.0, 12.0, 16.0, 20.0, 24.0]
    assert Curve((8,), (2.0,)).at(16) == 4.0
    assert Curve((8,), (2.0,)).at(3) == 2.0


def test_a_step_sums_layers_cache_and_head() -> None:
    costs = LayerCosts(Curve((1, 2), (3.0, 4.0)), Curve((1, 2), (5.0, 7.0)), kv_ms_per_entry=0.01)
    mix = PathMix.of([LayerPath.of(3, [0, 1]), LayerPath.of(3, [1])])
    assert costs.step_ms(mix) == 3.0 + 4.0 + 7.0
    assert costs.step_ms(mix, context_len=10) == pytest.approx(14.0 + 3 * 10 * 0.01)
    assert costs.speedup(mix) == (3 * 4.0 + 7.0) / 14.0


def test_shared_paths_of_a_weight_bound_step_reach_the_ideal_but_for_the_head() -> None:
    costs = LayerCosts.modelled(SHAPE, MACHINE)
    mix = PathMix.of([LayerPath.uniform(24, budget=6)] * 8)
    layer_ms, head_ms = 100_000_000 / 40e6, 200_000_000 / 40e6
    assert costs.speedup(mix) == pytest.approx((24 * layer_ms + head_ms) / (6 * layer_ms + head_ms))


def test_independent_paths_of_a_weight_bound_step_pay_for_their_union() -> None:
    costs = LayerCosts.modelled(SHAPE, MACHINE)
    mix = PathMix.of([LayerPath.random(24, budget=12, seed=seed) for seed in range(16)])
    assert mix.union == 24
    assert mix.ideal_speedup == 2.0
    assert costs.speedup(mix) == 1.0


@given(
    budgets=st.lists(st.integers(1, 24), min_size=1, max_size=80),
    rows_per_seq=st.integers(1, 40),
    context_len=st.integers(0, 500),
    bandwidth=st.floats(1, 4000),
    peak=st.floats(1, 1e6),
)
def test_the_modelled_costs_are_the_roofline(
    budgets: list[int], rows_per_seq: int, context_len: int, bandwidth: float, peak: float
) -> None:
    machine = MachineSpeed(bandwidth, peak)
    mix = PathMix.of([LayerPath.random(24, budget, seed=index) for index, budget in enumerate(budgets)], rows_per_seq)
    expected = roofline_ms(mix, SHAPE, machine, context_len)
    assert LayerCosts.modelled(SHAPE, machine).step_ms(mix, context_len) == pytest.approx(expected, rel=1e-6)


def test_the_roofline_is_what_it_says() -> None:
    mix = PathMix((0, 10, 30), 30, 30)
    by_hand = 0 + 100e6 / 40e9 + 30 * 100e6 / 800e9 + 40 * 7 * 8192 / 40e9 + 30 * 200e6 / 800e9
    assert roofline_ms(mix, SHAPE, MACHINE, context_len=7) == pytest.approx(by_hand * 1e3)


def test_the_best_speed_takes_each_at_its_best() -> None:
    assert MachineSpeed.best([MachineSpeed(3, 7), MachineSpeed(5, 2)]) == MachineSpeed(5, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PathMix.of([]), "paths must hold at least one path, got none"),
        (lambda: PathMix.of([LayerPath.full(2)], rows_per_seq=0), "rows_per_seq must be at least 1, got 0"),
        (lambda: PathMix.of([LayerPath.full(2), LayerPath.full(3)]), "must be for one number of layers, got 2 and 3"),
        (lambda: Curve((), ()), "must be equally long and not empty, got 0 and 0"),
        (lambda: Curve((1, 2), (1.0,)), "must be equally long and not empty, got 2 and 1"),
        (lambda: Curve((2, 2), (1.0, 1.0)), r"num_rows must increase from at least 1, got \[2, 2\]"),
        (lambda: Curve((0,), (1.0,)), r"num_rows must increase from at least 1, got \[0\]"),
        (lambda: Curve((1,), (-1.0,)), "ms must be at least 0, got -1.0"),
        (lambda: Curve((1,), (1.0,)).at(-1), "num_rows must be at least 0, got -1"),
        (lambda: MachineSpeed.best([]), "speeds must hold at least one, got none"),
        (lambda: MachineSpeed(0, 1), "bandwidth_gbps must be positive, got 0"),
        (lambda: MachineSpeed(1, -2.0), "peak_gflops must be positive, got -2.0"),
    ],
)
def test_bad_input_is_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_it_needs_no_torch() -> None:
    code = "import sys; import dynskip.costs.layer_costs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
