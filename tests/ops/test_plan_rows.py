"""`native.plan_rows` against its specification, bit for bit: all policies, calls for one layer and for all."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynskip.ops import native, row_reference
from dynskip.ops.row_reference import ABSENT, EVICT, PROPAGATE, SHARE

if native.unavailable_reason() is not None:
    pytest.skip(str(native.unavailable_reason()), allow_module_level=True)

POLICIES = [ABSENT, EVICT, PROPAGATE, SHARE]
POISON = -77
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and native.has_cuda()), reason="needs a GPU and the extension's CUDA part"
)
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


@dataclass
class State:
    """The cache and the plan, poisoned where nothing has been written; the fields in the order of the arguments."""

    context_lens: Tensor
    slot_tables: Tensor
    free_slots: Tensor
    slot_cursor: Tensor
    row_slots: Tensor
    run_ids: Tensor
    num_run: Tensor
    kv_ids: Tensor
    num_kv: Tensor
    slots: Tensor
    key_limits: Tensor

    @staticmethod
    def of(num_layers: int, num_rows: int, max_context_len: int, generator: torch.Generator) -> State:
        """A cache with entries in it, of three sequences more than rows; its slots for 4 full steps in any order."""
        num_seqs = num_rows + 3

        def poison(*shape: int) -> Tensor:
            return torch.full(shape, POISON, dtype=torch.int32)

        context_lens = torch.randint(0, 4, (num_layers, num_seqs), dtype=torch.int32, generator=generator)
        cursor = torch.tensor([int(context_lens.sum())], dtype=torch.int32)
        free_slots = torch.randperm(int(cursor) + 4 * num_layers * num_rows, generator=generator).int()
        tables = poison(num_layers, num_seqs, max_context_len)
        by_layer = [poison(num_layers, num_rows) for _ in range(4)]
        run_ids, kv_ids, slots, key_limits = by_layer
        num_run, num_kv = poison(num_layers), poison(num_layers)
        cache = (context_lens, tables, free_slots, cursor, poison(num_rows))
        return State(*cache, run_ids, num_run, kv_ids, num_kv, slots, key_limits)

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def clone(self, device: str = "cpu") -> State:
        return State(*(tensor.to(device, copy=True) for tensor in self.tensors()))

    def assert_equal(self, expected: State) -> None:
        for field in fields(self):
            result = getattr(self, field.name).cpu()
            assert torch.equal(result, getattr(expected, field.name)), field.name


def cache_ids_of(num_rows: int, padding: float, generator: torch.Generator) -> Tensor:
    """[M], int32: sequences in any order, and -1 for the given share of the rows."""
    cache_ids = torch.randperm(num_rows + 3, generator=generator)[:num_rows].int()
    cache_ids[torch.rand(num_rows, generator=generator) < padding] = -1
    return cache_ids


def run_native(
    state: State, active: Tensor, policy: int, cache_ids: Tensor, per_call: int | None = None, num_threads: int = 0
) -> None:
    """One step: all layers in one call, or `per_call` layers a call."""
    device = state.slots.device
    active, cache_ids = active.to(device), cache_ids.to(device)
    step = len(active) if per_call is None else per_call
    for first in range(0, max(len(active), 1), max(step, 1)):
        arguments = (active[first : first + step], first, policy, cache_ids, *state.tensors())
        if num_threads == 0:
            native.plan_rows(*arguments)
        else:
            torch.ops.dynskip_native.plan_rows(*arguments, num_threads=num_threads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_rows", [0, 1, 61, 64, 256, 1000])
def test_steps_on_one_cache_equal_the_specification(num_rows: int, policy: int, device: str) -> None:
    generator = torch.Generator().manual_seed(num_rows * 4 + policy)
    num_layers = 5
    state = State.of(num_layers, num_rows, 8, generator)
    whole, by_layer = state.clone(device), state.clone(device)
    for density in (0.5, 0.0, 1.0, 0.1):
        cache_ids = cache_ids_of(num_rows, 0.2, generator)
        active = torch.rand(num_layers, num_rows, generator=generator) < density
        row_reference.plan_rows(active, 0, policy, cache_ids, *state.tensors())
        run_native(whole, active, policy, cache_ids)
        run_native(by_layer, active, policy, cache_ids, per_call=1)
        whole.assert_equal(state)
        by_layer.assert_equal(state)


@pytest.mark.parametrize("device", DEVICES)
@given(
    seed=st.integers(0, 2**32),
    num_layers=st.integers(0, 12),
    num_rows=st.integers(0, 140),
    policy=st.sampled_from(POLICIES),
    per_call=st.integers(1, 12),
    num_threads=st.sampled_from([0, 1, 2, 31, 32, 100, 1024]),
    density=st.floats(0, 1),
    padding=st.floats(0, 1),
)
@settings(max_examples=100)
def test_random_masks_equal_the_specification(
    device: str,
    seed: int,
    num_layers: int,
    num_rows: int,
    policy: int,
    per_call: int,
    num_threads: int,
    density: float,
    padding: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected = State.of(num_layers, num_rows, 5, generator)
    result = expected.clone(device)
    for _ in range(2):
        cache_ids = cache_ids_of(num_rows, padding, generator)
        active = torch.rand(num_layers, num_rows, generator=generator) < density
        row_reference.plan_rows(active, 0, policy, cache_ids, *expected.tensors())
        run_native(result, active, policy, cache_ids, per_call, num_threads)
        result.assert_equal(expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", POLICIES)
def test_96_layers_in_one_call(policy: int, device: str) -> None:
    generator = torch.Generator().manual_seed(policy)
    expected = State.of(96, 130, 5, generator)
    result = expected.clone(device)
    cache_ids = cache_ids_of(130, 0.1, generator)
    active = torch.rand(96, 130, generator=generator) < 0.05
    row_reference.plan_rows(active, 0, policy, cache_ids, *expected.tensors())
    run_native(result, active, policy, cache_ids)
    result.assert_equal(expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_part_of_larger_buffers(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    large = State.of(6, 90, 5, generator).clone(device)
    before = large.clone()

    def part(state: State) -> State:
        # Rows and sequences of larger buffers, as a batch that shrinks leaves them; the cursor is nobody's part.
        views = [tensor[..., 10:73] if tensor.shape[-1] == 90 else tensor for tensor in state.tensors()]
        context_lens, slot_tables, *rest = views
        return State(context_lens[:, 5:71], slot_tables[:, 5:71], *rest)

    expected = before.clone()
    cache_ids = cache_ids_of(63, 0.1, generator)
    active = (torch.rand(6, 90, generator=generator) < 0.5)[:, 10:73]
    row_reference.plan_rows(active, 0, SHARE, cache_ids, *part(expected).tensors())
    run_native(part(large), active, SHARE, cache_ids)
    part(large).assert_equal(part(expected))
    for field in fields(State):
        result, wanted = getattr(large, field.name).cpu(), getattr(before, field.name)
        if result.shape[-1] == 90:
            assert torch.equal(result[..., :10], wanted[..., :10]) and torch.equal(result[..., 73:], wanted[..., 73:])
    assert torch.equal(large.slot_tables.cpu()[:, :5], before.slot_tables[:, :5])
    assert torch.equal(large.slot_tables.cpu()[:, 71:], before.slot_tables[:, 71:])


def test_a_mask_of_any_nonzero_byte_is_true() -> None:
    expected = State.of(1, 3, 5, torch.Generator().manual_seed(0))
    result = expected.clone()
    active = torch.tensor([[0, 255, 2]], dtype=torch.uint8).view(torch.bool)
    cache_ids = torch.arange(3, dtype=torch.int32)
    row_reference.plan_rows(torch.tensor([[False, True, True]]), 0, EVICT, cache_ids, *expected.tensors())
    run_native(result, active, EVICT, cache_ids)
    result.assert_equal(expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_threads", [1, 7])
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_one_sequence_follow_each_other(policy: int, num_threads: int, device: str) -> None:
    generator = torch.Generator().manual_seed(policy)
    state = State.of(4, 70, 16, generator)
    whole, by_layer = state.clone(device), state.clone(device)
    for _ in range(3):
        sequences = cache_ids_of(70, 0.1, generator)
        cache_ids = sequences.repeat_interleave(torch.randint(1, 5, (70,), generator=generator))[:70]
        active = torch.rand(4, 70, generator=generator) < 0.5
        row_reference.plan_rows(active, 0, policy, cache_ids, *state.tensors())
        run_native(whole, active, policy, cache_ids, num_threads=num_threads)
        run_native(by_layer, active, policy, cache_ids, per_call=1)
        whole.assert_equal(state)
        by_layer.assert_equal(state)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_threads", [1, 64])
def test_a_full_table_is_refused_and_nothing_is_written_beyond_it(policy: int, num_threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    backing = State.of(3, 20, 7, generator)
    state = State(*(tensor.clone() for tensor in backing.tensors()))
    # Tables of 6 entries inside longer ones: an entry too far would change the longer one.
    state.slot_tables = backing.slot_tables[:, :, :6]
    state.context_lens.fill_(6)
    state.context_lens[:, 4] = 2
    cache_ids = torch.arange(20, dtype=torch.int32)
    active = torch.ones(3, 20, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"plan_rows: slot_tables must have room .* got a full table of 6 entries"):
        run_native(state, active, policy, cache_ids, num_threads=num_threads)
    assert (backing.slot_tables[:, :, 6] == POISON).all()
    assert int(state.context_lens.max()) == 6 and int(state.key_limits.max()) == 6
    assert state.context_lens[:, 4].tolist() == [3, 3, 3]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("op", [row_reference.plan_rows, native.plan_rows], ids=["specification", "native"])
def test_slots_are_those_of_a_full_list_in_order_put_through_the_list(op: object, policy: int, device: str) -> None:
    generator = torch.Generator().manual_seed(policy)
    in_order = State.of(4, 70, 8, generator).clone(device)
    in_order.context_lens.zero_()
    permuted = in_order.clone(device)
    in_order.free_slots = torch.arange(len(in_order.free_slots), dtype=torch.int32, device=device)
    for _ in range(3):
        active = (torch.rand(4, 70, generator=generator) < 0.5).to(device)
        cache_ids = cache_ids_of(70, 0.1, generator).to(device)
        for state in (in_order, permuted):
            op(active, 0, policy, cache_ids, *state.tensors())  # type: ignore[operator]
        assert torch.equal(permuted.slot_cursor, in_order.slot_cursor)
        assert torch.equal(permuted.context_lens, in_order.context_lens)
        for name in ("slots", "row_slots", "slot_tables"):
            got, numbers = getattr(permuted, name), getattr(in_order, name)
            wanted = torch.where(numbers >= 0, permuted.free_slots[numbers.clamp(min=0).long()], numbers)
            assert torch.equal(got, wanted), name


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_threads", [1, 64])
def test_too_few_free_slots_are_refused_and_none_is_invented(policy: int, num_threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    state = State.of(3, 20, 7, generator)
    state.context_lens.zero_()
    # A list of 5 places inside a longer one: a slot read too far would be one of the longer list.
    first = int(state.slot_cursor)
    before, state.free_slots = state.free_slots.clone(), state.free_slots[: first + 5]
    cache_ids, active = torch.arange(20, dtype=torch.int32), torch.ones(3, 20, dtype=torch.bool)
    message = rf"plan_rows: free_slots must have a slot for each new key .* got too few of {first + 5}\. Create the"
    with pytest.raises(RuntimeError, match=message):
        run_native(state, active, policy, cache_ids, num_threads=num_threads)
    assert torch.equal(state.free_slots, before[: first + 5]) and int(state.slot_cursor) == first + 5
    assert state.slots[0].tolist() == before[first : first + 5].tolist() + [-1] * 15
    assert (state.slots[1:] == -1).all()
    assert state.context_lens[:, :20].tolist() == [[1] * 5 + [0] * 15, [0] * 20, [0] * 20]
    assert (state.slot_tables[0, :5, 0] == before[first : first + 5]).all()
    assert (state.slot_tables[0, 5:] == POISON).all() and (state.slot_tables[1:] == POISON).all()
    with pytest.raises(RuntimeError, match=message):
        run_native(state, active, policy, cache_ids, num_threads=num_threads)
    assert int(state.slot_cursor) == first + 5


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("state.context_lens.fill_(7)", "slot_tables must have room for one more entry of each row"),
        ("state.slot_cursor.fill_(len(state.free_slots) - 9)", "free_slots must have a slot for each new key"),
    ],
)
def test_on_a_gpu_what_finds_no_room_is_an_assertion(spoil: str, message: str) -> None:
    # In a process of its own: a device that has asserted serves its process no more.
    script = f"""
import sys
sys.path[:0] = ["tests/ops", "tests/helpers"]
import torch
from test_plan_rows import EVICT, State, run_native
state = State.of(3, 20, 7, torch.Generator().manual_seed(0)).clone("cuda")
{spoil}
run_native(state, torch.ones(3, 20, dtype=torch.bool), EVICT, torch.arange(20, dtype=torch.int32))
torch.cuda.synchronize()
"""
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=300)
    assert ended.returncode != 0
    assert f"plan_rows: {message}" in ended.stderr + ended.stdout


def test_a_sequence_that_the_cache_lacks_is_refused() -> None:
    state = State.of(2, 4, 5, torch.Generator().manual_seed(0))
    cache_ids = torch.tensor([0, 7, -1, 2], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"plan_rows: cache_ids must be -1 or below 7, got more"):
        run_native(state, torch.ones(2, 4, dtype=torch.bool), EVICT, cache_ids)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("run_ids", lambda t: t.long(), r"run_ids must be \[2, 4\] int32 with contiguous rows"),
        ("kv_ids", lambda t: t[:, :3], r"kv_ids must be \[2, 4\] int32 .* got \[2, 3\]"),
        ("slots", lambda t: t.T.contiguous().T, r"slots must be \[2, 4\] int32 with contiguous rows"),
        ("key_limits", lambda t: t[:1], r"key_limits must be \[2, 4\] int32"),
        ("num_kv", lambda t: t[:1], r"num_kv must be contiguous \[2\] int32"),
        ("row_slots", lambda t: t[:3], r"row_slots must be contiguous \[4\] int32"),
        ("slot_cursor", lambda t: t.long(), r"slot_cursor must be contiguous \[1\] int32"),
        ("free_slots", lambda t: t.long(), r"free_slots must be contiguous \[\d+\] int32"),
        ("free_slots", lambda t: t[::2], r"free_slots must be contiguous \[\d+\] int32"),
        ("free_slots", lambda t: t[None], r"free_slots must be contiguous \[(\d+)\] int32 .* got \[1, \1\]"),
        ("context_lens", lambda t: t[:, :2], r"context_lens must be \[2, 7\] int32"),
        ("slot_tables", lambda t: t[:, :, 0], r"slot_tables must be \[2, B, S_max\] int32"),
        ("active", lambda t: t.int(), r"active must be \[n, M\] bool"),
        ("active", lambda t: t.new_ones(3, 4), r"first_layer must leave room for the 3 layers .* below 2, got 0"),
        ("cache_ids", lambda t: t.long(), r"cache_ids must be contiguous \[4\] int32"),
    ],
)
def test_memory_safety_checks(name: str, change: object, message: str) -> None:
    state = State.of(2, 4, 5, torch.Generator().manual_seed(0))
    arguments = {"active": torch.ones(2, 4, dtype=torch.bool), "cache_ids": torch.arange(4, dtype=torch.int32)}
    arguments |= {field.name: getattr(state, field.name) for field in fields(state)}
    arguments[name] = change(arguments[name])  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=f"plan_rows: {message}"):
        native.plan_rows(first_layer=0, kv_policy=EVICT, **arguments)


def test_an_unknown_policy_and_an_unknown_number_of_threads_are_refused() -> None:
    state = State.of(2, 4, 5, torch.Generator().manual_seed(0))
    cache_ids, active = torch.arange(4, dtype=torch.int32), torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"plan_rows: kv_policy must be 0 \(absent\), .* got 4"):
        run_native(state, active, 4, cache_ids)
    with pytest.raises(RuntimeError, match=r"plan_rows: num_threads must be 1\.\.1024, .* got 1025"):
        run_native(state, active, EVICT, cache_ids, num_threads=1025)
