"""The tables of constants that kernels are launched with, and the workspace that follows from them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dynskip.ops.row_ops import ROW_OP_NAMES

configs: Any = pytest.importorskip("dynskip.kernels.configs", reason="triton is not installed")
workspace: Any = pytest.importorskip("dynskip.kernels.workspace", reason="triton is not installed")

CPU = torch.device("cpu")
GENERIC = json.loads((configs.FOLDER / "generic.json").read_text())


def table(**ops: Any) -> dict[str, Any]:
    return {"device": None, "capability": None, "measured": None, "ops": ops}


def norm_rows(max_rows: int | None, num_warps: int, **more: Any) -> dict[str, Any]:
    return {"max_rows": max_rows, "PDL": False, "num_warps": num_warps, **more}


@pytest.mark.parametrize("name", configs.config_names())
def test_every_shipped_table_is_well_formed(name: str) -> None:
    entries = configs.read_table(configs.FOLDER / f"{name}.json")
    assert all(group[-1].shape is None and group[-1].max_rows is None for group in entries.values())


def test_the_default_has_every_kernel_in_every_mode() -> None:
    assert set(configs.KEYS) == (set(ROW_OP_NAMES) - {"plan_rows"}) | {"prefill_attention"}
    entries = configs.read_table(configs.FOLDER / "generic.json")
    assert set(entries) == {(op, size, mode) for op in configs.KEYS for size in (2, 4) for mode in (False, True)}


def test_the_first_entry_that_covers_the_rows_is_chosen() -> None:
    entries = [norm_rows(4, 1, shape=[8, 16]), norm_rows(2, 2), norm_rows(8, 4), norm_rows(None, 8)]
    with configs.use_configs(table(norm_rows={"2": entries})):

        def num_warps(max_rows: int, shape: tuple[int, int] | None = None) -> int:
            return configs.get_config("norm_rows", CPU, torch.float16, max_rows, shape)["num_warps"]

        assert [num_warps(rows) for rows in (1, 2, 3, 8, 9, 256)] == [2, 2, 4, 4, 8, 8]
        assert [num_warps(rows, (8, 16)) for rows in (1, 4, 5)] == [1, 1, 4]
        assert num_warps(1, (16, 8)) == 2


def test_deterministic_launches_have_one_config() -> None:
    for op in configs.KEYS:
        for dtype in (torch.bfloat16, torch.float32):
            assert len(configs.get_entries(op, CPU, dtype, deterministic=True)) == 1


def test_a_table_in_place_is_taken_away_again_and_the_rest_is_the_default() -> None:
    def now(op: str) -> Any:
        return configs.get_config(op, CPU, torch.bfloat16, 1)

    before = now("norm_rows"), now("gate_rows")
    with configs.use_configs(table(norm_rows={"2": [norm_rows(None, 16)]})):
        assert now("norm_rows")["num_warps"] == 16
        assert now("gate_rows") == before[1]
        with pytest.raises(ValueError, match="name ops of"), configs.use_configs(table(typo={})):
            pass
        assert now("norm_rows")["num_warps"] == 16
    assert (now("norm_rows"), now("gate_rows")) == before


def test_a_table_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(table(norm_rows={"4": [norm_rows(None, 2)]})))
    with configs.use_configs(path):
        assert configs.get_config("norm_rows", CPU, torch.float32, 3)["num_warps"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("measured"), "have the keys capability, device, measured, ops"),
        (lambda t: t["ops"].update(fused_moe={}), "name ops of embed_rows.*'fused_moe'"),
        (lambda t: t["ops"]["norm_rows"].update({"8": []}), "group entries by 2, 4, deterministic"),
        (lambda t: t["ops"]["norm_rows"]["2"][0].update(BLOCK_X=1), "give norm_rows PDL, max_rows, num_warps"),
        (lambda t: t["ops"]["norm_rows"]["2"][0].pop("PDL"), "give norm_rows PDL, max_rows, num_warps"),
        (lambda t: t["ops"]["norm_rows"]["2"][0].update(PDL=1), "have PDL true or false in norm_rows, got 1"),
        (lambda t: t["ops"]["norm_rows"]["2"][0].update(num_warps=3), "a power of two as num_warps of norm_rows"),
        (lambda t: t["ops"]["norm_rows"]["2"][0].update(max_rows=8), "whose max_rows is null"),
        (lambda t: t["ops"]["norm_rows"]["2"][0].update(max_rows=0), "have max_rows > 0, got 0"),
        (lambda t: t["ops"]["norm_rows"]["2"].append(norm_rows(4, 4)), "list norm_rows by rising max_rows"),
        (lambda t: t["ops"]["linear_rows"]["2"][0].update(shape=[3]), r"give shape as \[N, K\]"),
        (lambda t: t["ops"]["linear_rows"]["2"][0].update(num_stages=0), "have num_stages >= 1 in linear_rows"),
        (
            lambda t: t["ops"]["linear_rows"]["2"][0].update(PREFETCH_K=96),
            r"have 0 or 64 \* 2\*\*n as PREFETCH_K, got 96",
        ),
        (lambda t: t["ops"]["qkv_rows"]["deterministic"]["2"].update(FUSE_NORM=True), "not fuse LayerNorm"),
    ],
)
def test_a_bad_table_is_refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    content = copy.deepcopy(GENERIC)
    change(content)
    with pytest.raises(ValueError, match=f"read_table: the table must .*{message}"):
        configs.read_table(content)


@pytest.mark.parametrize(
    ("shape", "num_parts", "itemsize", "most", "mib", "expected"),
    [
        ((8192, 2048), 1, 2, 2048, 16, 1024),  # fc1 of OPT-1.3B: 16 MiB are half of it
        ((8192, 2048), 1, 2, 2048, 64, 2048),
        ((6144, 2048), 1, 2, 2048, 16, 1024),  # 1365 would fit
        ((2048, 8192), 8, 2, 2048, 16, 512),
        ((2048, 8192), 8, 2, 2048, 64, 1024),  # a part of K
        ((2048, 2048), 8, 2, 2048, 16, 256),
        ((50272, 2048), 1, 2, 2048, 16, 128),
        ((2048, 8192), 4, 4, 1024, 16, 512),
        ((2048, 320), 1, 2, 2048, 16, 512),  # no more than covers K
        ((100, 20), 1, 2, 2048, 16, 64),
        ((2048, 2048), 1, 2, 0, 16, 0),
        ((200_000, 64), 1, 4, 64, 16, 0),  # a line of each column would be more
    ],
)
def test_programs_ask_for_no_more_than_their_part_and_the_share_of_l2(
    shape: tuple[int, int], num_parts: int, itemsize: int, most: int, mib: int, expected: int
) -> None:
    row_tiles: Any = pytest.importorskip("dynskip.kernels.row_tiles")
    weight = torch.empty(shape, dtype={2: torch.bfloat16, 4: torch.float32}[itemsize], device="meta")
    config = {"BLOCK_K": 64, "PREFETCH_K": most, "PREFETCH_MIB": mib}
    depth = row_tiles.prefetch_depth(config, weight, num_parts)
    assert depth == expected
    assert depth * shape[0] * num_parts * itemsize <= mib * 2**20


def test_an_unknown_op_and_an_unknown_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"get_config: op must be one of embed_rows.*, got 'matmul'"):
        configs.get_config("matmul", CPU, torch.float32, 1)
    with pytest.raises(ValueError, match=r"get_config: dtype must have 2 or 4 bytes, got torch\.float64"):
        configs.get_config("norm_rows", CPU, torch.float64, 1)


def test_the_name_of_a_device_gives_that_of_its_table() -> None:
    assert configs.device_slug("NVIDIA H200") == "nvidia-h200"
    assert configs.device_slug("NVIDIA GeForce RTX 4090 (D)") == "nvidia-geforce-rtx-4090-d"


def test_programs_start_early_only_where_the_gpu_can() -> None:
    launches: Any = pytest.importorskip("dynskip.kernels.launches")
    for capability, wanted, expected in ((0, True, False), (80, True, False), (90, True, True), (100, False, False)):
        with launches.compile_only(capability, lambda op, kernel: None):
            assert configs.pdl_options({"PDL": wanted}, CPU) == {"USE_PDL": expected, "launch_pdl": expected}


def test_the_workspace_holds_what_the_largest_config_needs() -> None:
    entry = dict(GENERIC["ops"]["linear_add_rows"]["2"][0], max_rows=None, BLOCK_M=16, BLOCK_N=64, SPLIT_K=8)
    content = table(linear_add_rows={key: [entry] for key in ("2", "4")})
    content["ops"]["linear_add_rows"]["deterministic"] = GENERIC["ops"]["linear_add_rows"]["deterministic"]
    sizes = {"max_rows": 40, "num_heads": 2, "head_size": 16, "max_context_len": 8, "device": "cpu"}
    with configs.use_configs(content):
        made = workspace.make_workspace(sizes=[(1000, 64), (10_000, 8)], **sizes)
    num_tiles = 3 * 157  # 40 rows in tiles of 16, 10,000 columns in tiles of 64
    assert made.counters.numel() >= num_tiles and not made.counters.any()
    assert made.partials.numel() == 8 * num_tiles * 16 * 64
    assert made.partials.dtype == torch.float32 and made.counters.dtype == torch.int32

    small = workspace.make_workspace(sizes=[(8, 8)], **sizes)
    large = workspace.make_workspace(sizes=[(8, 8)], **sizes | {"max_context_len": 100_000})
    assert small.partials.numel() < large.partials.numel()
    # Queries that share two heads of keys: a program has the parts of a whole group.
    long = sizes | {"max_context_len": 100_000}
    grouped = workspace.make_workspace(sizes=[(8, 8)], **long | {"num_heads": 16, "num_kv_heads": 2})
    assert large.partials.numel() < grouped.partials.numel()
