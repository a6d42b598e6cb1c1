"""Plans against a slow statement of the same rules, row by row in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dynskip import LayerPath
from dynskip.routing.plan import KVPolicy, LayerPlan, Plan, Rows, RowSet

CPU = torch.device("cpu")
POLICIES = [KVPolicy.ABSENT, KVPolicy.EVICT, KVPolicy.PROPAGATE, KVPolicy.SHARE]


def row_ids(row_set: RowSet) -> list[int]:
    return list(range(row_set.num_rows)) if row_set.row_ids is None else row_set.row_ids.tolist()


def check_row_set(row_set: RowSet, expected: list[int], counts: list[int]) -> None:
    """Every field of a row set against the rows that it should hold."""
    seq_of_row = [seq for seq, count in enumerate(counts) for _ in range(count)]
    assert row_ids(row_set) == expected
    assert row_set.num_rows == len(expected)
    seqs = [seq_of_row[row] for row in expected]
    assert row_set.seq_ids.tolist() == seqs
    assert row_set.ranks.tolist() == [seqs[:place].count(seq) for place, seq in enumerate(seqs)]
    assert row_set.cu_seqlens.tolist() == [sum(s < seq for s in seqs) for seq in range(len(counts) + 1)]
    for tensor in (row_set.row_ids, row_set.seq_ids, row_set.ranks, row_set.cu_seqlens):
        assert tensor is None or tensor.dtype == torch.int32


@st.composite
def masked_batches(draw: st.DrawFn) -> tuple[list[int], Tensor]:
    """Row counts per sequence, and a mask [N, L]."""
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    num_layers = draw(st.integers(1, 5))
    # Whole masks of one value are drawn often: they take other branches.
    cell = draw(st.sampled_from([st.booleans(), st.just(True), st.just(False)]))
    mask = [[draw(cell) for _ in range(num_layers)] for _ in range(sum(counts))]
    return counts, torch.tensor(mask)


@given(masked_batches(), st.sampled_from(POLICIES))
def test_per_token_plan_follows_the_rules(batch: tuple[list[int], Tensor], policy: KVPolicy) -> None:
    counts, mask = batch
    num_rows, num_layers = mask.shape
    rank = [place for count in counts for place in range(count)]
    plans = Plan.per_token(mask, counts, policy).all_layers(CPU)
    assert len(plans) == num_layers
    for layer, plan in enumerate(plans):
        run = [row for row in range(num_rows) if mask[row, layer]]
        ran_before = [bool(mask[row, :layer].any()) for row in range(num_rows)]
        if policy in (KVPolicy.ABSENT, KVPolicy.EVICT):
            kv = entries = run
        else:
            entries = list(range(num_rows))
            kv = (
                entries if policy is KVPolicy.PROPAGATE else [r for r in entries if mask[r, layer] or not ran_before[r]]
            )
        check_row_set(plan.run, run, counts)
        check_row_set(plan.kv, kv, counts)
        check_row_set(plan.entries, entries, counts)
        # A row attends to the entries of its own sequence up to and with its own.
        seq_start = [row - rank[row] for row in range(num_rows)]
        limits = [sum(1 for entry in entries if seq_start[row] <= entry <= row) for row in run]
        assert plan.key_ranks.tolist() == limits and plan.key_ranks.dtype == torch.int32


@given(masked_batches(), st.sampled_from(POLICIES))
def test_a_decision_layer_by_layer_gives_the_plan_of_the_mask(
    batch: tuple[list[int], Tensor], policy: KVPolicy
) -> None:
    counts, mask = batch
    known = Plan.per_token(mask, counts, policy)
    decided = Plan.decided(lambda layer, hidden_states: mask[:, layer], mask.shape[1], counts, policy)
    hidden_states = torch.zeros(mask.shape[0], 2)
    for layer in range(mask.shape[1]):
        one, other = known.layer(layer, hidden_states), decided.layer(layer, hidden_states)
        for part in ("run", "kv", "entries"):
            check_row_set(getattr(other, part), row_ids(getattr(one, part)), counts)
        assert torch.equal(one.key_ranks, other.key_ranks)


def test_a_path_per_sequence_is_a_constant_mask() -> None:
    paths = [LayerPath.of(4, [0, 3]), LayerPath.of(4, [1]), LayerPath.of(4, [], allow_empty=True)]
    plans = Plan.per_sequence(paths, [2, 3, 1]).all_layers(CPU)
    assert [row_ids(plan.run) for plan in plans] == [[0, 1], [2, 3, 4], [], [0, 1]]
    assert all(plan.kv is plan.run and plan.entries is plan.run for plan in plans)


def test_a_full_layer_has_no_row_list() -> None:
    plan = Plan.per_sequence([LayerPath.full(2)] * 3, [1, 2, 1]).all_layers(CPU)[1]
    assert plan.run.row_ids is None and plan.run.num_rows == 4


def test_a_plan_is_worked_out_once() -> None:
    plan = Plan.per_sequence([LayerPath.full(2)], [3])
    assert plan.all_layers(CPU) is plan.all_layers(CPU)


def test_moving_a_plan_keeps_what_is_shared() -> None:
    rows = Rows((2, 1))
    active = torch.tensor([True, False, True])
    for policy in POLICIES:
        plan = LayerPlan.of(active, torch.tensor([False, True, False]), rows, policy)
        moved = plan.to(torch.device("meta"))
        assert (moved.kv is moved.run) == (plan.kv is plan.run)
        assert (moved.entries is moved.run) == (plan.entries is plan.run)
        assert (moved.entries is moved.kv) == (plan.entries is plan.kv)
        assert moved.run.seq_ids.device.type == "meta" and moved.run.num_rows == plan.run.num_rows


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (torch.ones(3), r"torch.float32 \[3\]"),
        (torch.ones(2, dtype=torch.bool), r"torch.bool \[2\]"),
        (torch.ones(3, 1, dtype=torch.bool), r"torch.bool \[3, 1\]"),
        ([True] * 3, "list"),
    ],
)
def test_a_controller_must_answer_with_a_bool_per_row(answer: object, got: str) -> None:
    plan = Plan.decided(lambda layer, hidden_states: answer, 2, [3], KVPolicy.EVICT)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match=rf"active must return bool \[3\], got {got}"):
        plan.layer(0, torch.zeros(3, 2))


def test_policies_by_name() -> None:
    assert KVPolicy.per_token(None) is KVPolicy.PROPAGATE
    assert [KVPolicy.per_token(name) for name in ("propagate", "evict", "share")] == [
        KVPolicy.PROPAGATE,
        KVPolicy.EVICT,
        KVPolicy.SHARE,
    ]
