"""What a kernel does before it waits, found in programs of a few lines."""

from __future__ import annotations

import pytest

from dynskip.validation.offline.waits import acts_before_wait


def program(*lines: str) -> str:
    return "\n".join([".version 8.7", ".visible .entry k(", "\t.param .u64 p", ")", "{", *lines, "}"])


WAIT, WRITE, RETURN = "griddepcontrol.wait ;", "@%p1 st.global.b32 [ %rd1 + 0 ], { %r1 };", "ret;"
LOOP = ("$L__BB0_1:", "add.s32 %r1, %r1, 1;", "@%p1 bra $L__BB0_1;")


@pytest.mark.parametrize(
    ("lines", "acts"),
    [
        ([WAIT, WRITE, RETURN], []),
        ([WRITE, WAIT, RETURN], ["writes"]),
        ([WRITE, RETURN], ["returns", "writes"]),
        # An early end that has not waited, one that has, and a way around the wait.
        (["@%p1 bra $L__BB0_2;", WAIT, WRITE, "$L__BB0_2:", RETURN], ["returns"]),
        ([WAIT, "@%p1 bra $L__BB0_2;", WRITE, "$L__BB0_2:", RETURN], []),
        (["@%p1 bra $L__BB0_2;", WAIT, "bra.uni $L__BB0_3;", "$L__BB0_2:", WAIT, "$L__BB0_3:", RETURN], []),
        ([*LOOP, WAIT, WRITE, RETURN], []),
        ([*LOOP, WRITE, WAIT, RETURN], ["writes"]),
        (["@%p1 ret;", WAIT, RETURN], ["returns"]),
        (["@%p1 griddepcontrol.wait ;", WRITE, RETURN], ["returns", "writes"]),
        # Shared memory is nobody else's; an atomic addition to global memory is a write; a prefetch is none.
        (["st.shared.b32 [%r1], %r2;", "atom.shared.add.u32 %r1, [%r2], 1;", WAIT, RETURN], []),
        (["@%p1 atom.global.gpu.acq_rel.add.u32 %r652, [ %rd343 + 0 ], %r653;", WAIT, RETURN], ["writes"]),
        (["red.add.u32 [ %rd1 ], 1;", WAIT, RETURN], ["writes"]),
        (["st.b32 [ %rd1 ], 1;", WAIT, RETURN], ["writes"]),
        (["cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd1], [%r1];", WAIT, RETURN], ["writes"]),
        # What it loads before may be out of date; a volatile load is a hint, parameters and shared memory are its own.
        (["@%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];", WAIT, RETURN], ["reads"]),
        (["ld.global.nc.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 ];", WAIT, RETURN], ["reads"]),
        (["ld.b32 %r1, [%rd1];", WAIT, RETURN], ["reads"]),
        ([WAIT, "ld.global.b32 { %r1 }, [ %rd1 + 0 ];", RETURN], []),
        (["ld.volatile.global.b32 { %r1 }, [ %rd1 ];", "ld.param.b64 %rd1, [k_param_0];", WAIT, RETURN], []),
        (["ld.shared.b32 %r1, [%r2];", "ld.const.b32 %r1, [c];", WAIT, RETURN], []),
        (["prefetch.global.L2 [%rd1];", "cp.async.cg.shared.global [ %r1 ], [ %rd1 ], 0x10, %r2;", WAIT, RETURN], []),
    ],
)
def test_every_way_is_followed(lines: list[str], acts: list[str]) -> None:
    assert acts_before_wait(program(*lines)) == acts


def test_a_way_that_cannot_be_followed_is_not_passed_over() -> None:
    with pytest.raises(AssertionError, match=r"nobody follows brx\.idx"):
        acts_before_wait(program("brx.idx %r1, table;", WAIT, RETURN))
