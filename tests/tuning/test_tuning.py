"""The search for the kernels' constants: everything but the time that a GPU takes, for which a clock of ours stands."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, family_config

from dynskip.cli import main
from dynskip.cli import tune as tune_command
from dynskip.kernels.configs import KEYS, get_config, read_table, use_configs
from dynskip.kernels.row_list import TUNED_BUCKETS
from dynskip.measure.device import Cpu
from dynskip.models.config import DecoderConfig, Rotary
from dynskip.models.opt import opt_shape
from dynskip.models.shapes import SHAPES
from dynskip.ops import row_reference
from dynskip.ops.backends import available_backends
from dynskip.ops.row_ops import ROW_OP_NAMES, RowOps, get_row_ops
from dynskip.tuning.compiling import CompilerPool, Usage
from dynskip.tuning.search import Outcome, Search
from dynskip.tuning.space import REFINED, Constants, Limits, default_constants, num_programs, tiles, variations
from dynskip.tuning.table import candidate_table, format_table, merge, write_table
from dynskip.tuning.tasks import BUCKETS_BY_WEIGHT, TUNED_OPS, Task, plan_tasks
from dynskip.tuning.workload import Workload

H200 = Limits(132, 227 * 1024)
TINY = replace(opt_shape(2, 32, 2, 64), vocab_size=48)
OTHER = replace(
    TINY,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    norm="rms",
    gated=True,
    activation="silu",
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    rotary=Rotary.plain(8, 10000),
    qk_norm=True,
    alibi=True,
    window=6,
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WHY_NOT = available_backends(DEVICE)["triton"]


def task(op: str, part: str | None = None, max_rows: int = 3, **changes: Any) -> Task:
    return replace(Task(op, part or op, max_rows, "float32", TINY, context_len=9), **changes)


# The candidates


def test_tasks_stand_in_the_order_of_their_weight() -> None:
    tasks = plan_tasks(SHAPES["opt-1.3b"], (16, 1, 16))
    assert [task.max_rows for task in tasks] == [16] * 9 + [1] * 9
    assert [task.part for task in tasks[:5]] == ["fc1", "fc2", "qkv", "out_proj", "head"]
    assert {task.op for task in tasks} == set(TUNED_OPS) - {"rotate_rows", "place_rows"}
    assert set(TUNED_OPS) <= set(KEYS)
    assert {task.op for task in plan_tasks(OTHER, (1,))} == set(TUNED_OPS)
    assert sorted(BUCKETS_BY_WEIGHT) == list(TUNED_BUCKETS)
    assert [task.part for task in plan_tasks(SHAPES["opt-1.3b"], (1,), ("linear_add_rows",))] == ["fc2", "out_proj"]
    with pytest.raises(ValueError, match=r"plan_tasks: ops must be among linear_rows.*, got 'plan_rows'"):
        plan_tasks(TINY, (1,), ("plan_rows",))
    with pytest.raises(
        ValueError, match=r"plan_tasks: ops must hold one that the model launches, got \['place_rows'\]"
    ):
        plan_tasks(TINY, (1,), ("place_rows",))
    with pytest.raises(ValueError, match=r"plan_tasks: rows must be at least 1, got \[4, 0\]"):
        plan_tasks(TINY, (4, 0))


def test_what_runs_in_turn_is_more_than_a_cache_holds_and_less_than_a_card() -> None:
    for planned in plan_tasks(SHAPES["opt-1.3b"]):
        assert planned.num_copies * planned.num_bytes <= 9 * 2**30
        if planned.matrix is not None or planned.op == "attend_rows":
            assert planned.num_copies * planned.num_bytes >= 150 * 2**20
    assert plan_tasks(SHAPES["opt-1.3b"], (1,))[0].num_bytes == 8192 * 2048 * 2


@pytest.mark.parametrize(("model", "dtype"), [*((model, "bfloat16") for model in SHAPES), ("opt-1.3b", "float32")])
def test_every_candidate_has_all_constants_and_fits(model: str, dtype: str) -> None:
    for planned in plan_tasks(SHAPES[model], dtype=dtype):
        candidates = tiles(planned, H200)
        candidates += [other for key in REFINED for other in variations(planned, default_constants(planned), key, H200)]
        assert len(candidates) >= 5
        for constants in candidates:
            read_table(candidate_table(planned, constants))  # raises for a bad one
            if planned.matrix is not None:
                tile_bytes = (
                    (constants["BLOCK_M"] + constants["BLOCK_N"]) * constants["BLOCK_K"] * planned.dtype.itemsize
                )
                assert tile_bytes * (constants["num_stages"] - 1) <= H200.max_shared_bytes


def test_tiles_give_every_multiprocessor_of_a_large_card_something_to_do() -> None:
    for planned in plan_tasks(SHAPES["opt-1.3b"]):
        if planned.matrix is not None:
            programs = [num_programs(planned, constants) for constants in tiles(planned, H200)]
            assert min(programs) >= 0.45 * 132
            assert len({(p["BLOCK_N"], p["BLOCK_K"]) for p in tiles(planned, H200)}) >= 3
    assert tiles(task("linear_rows", "fc1"), H200), "a matrix that no tile spreads over the card has candidates too"


def test_variations_change_one_constant() -> None:
    planned = plan_tasks(SHAPES["opt-1.3b"], (1,), ("linear_add_rows",))[0]
    default = default_constants(planned)
    for key in REFINED:
        for changed in variations(planned, default, key, H200):
            assert [name for name in changed if changed[name] != default[name]] == [key]
    assert [changed["PDL"] for changed in variations(planned, default, "PDL", H200)] == [False]
    assert variations(planned, default, "FUSE_NORM", H200) == [], "the op has no LayerNorm"
    assert {changed["num_warps"] for changed in variations(planned, default, "num_warps", H200)} == {2, 8}


# The tensors, and the check before the clock


@pytest.mark.skipif(WHY_NOT is not None, reason=f"triton backend: {WHY_NOT}")
@pytest.mark.parametrize("op", TUNED_OPS)
def test_the_kernels_compute_right_on_the_tensors_of_a_task(op: str) -> None:
    device = torch.device(DEVICE)
    shapes = (OTHER,) if op in ("rotate_rows", "place_rows") else (TINY, OTHER)
    for planned in [planned for shape in shapes for planned in plan_tasks(shape, (1, 3), (op,), "float32")]:
        workload = Workload(replace(planned, context_len=9), get_row_ops("triton"), device)
        assert len(workload.layers) == 2
        with use_configs(candidate_table(planned, default_constants(planned))):
            assert workload.complaint() is None
            workload.launch()


@pytest.mark.parametrize("config", [TINY, OTHER], ids=["with biases", "without"])
def test_a_projection_stores_all_rows_and_has_the_biases_of_its_model(config: DecoderConfig) -> None:
    planned = task("qkv_rows", "qkv", config=config)
    arguments = Workload(planned, get_row_ops("reference"), torch.device("cpu")).layers[0]
    assert bool((arguments["slots"] >= 0).all())
    assert (arguments["bias"] is not None) == config.qkv_bias


def test_what_a_layer_owns_is_its_own() -> None:
    owned = {"linear_rows": "weight", "linear_add_rows": "weight", "qkv_rows": "weight", "attend_rows": "k_cache"}
    for planned in plan_tasks(TINY, (2,), tuple(owned), "float32"):
        workload = Workload(replace(planned, context_len=9), get_row_ops("reference"), torch.device("cpu"))
        first, second = workload.layers
        assert not torch.equal(first[owned[planned.op]], second[owned[planned.op]])
        assert first["rows"] is second["rows"]


# The search, on a clock of ours


@dataclass
class World:
    """Ops that compute by the reference, on a clock that their constants move. cost: microseconds of a launch."""

    cost: Callable[[str, Constants], float]
    is_wrong: Callable[[Constants], bool] = lambda constants: False
    fails: Callable[[Constants], bool] = lambda constants: False
    us: float = 0.0
    timed: int = 0

    def ops(self) -> RowOps:
        ops = {name: self._op(name) for name in ROW_OP_NAMES}
        return RowOps("fake", **ops, workspace=lambda **sizes: None)

    def _op(self, name: str) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            rows = arguments[2] if name == "embed_rows" else arguments[1]
            weight = next((a for a in arguments[2:5] if isinstance(a, torch.Tensor) and a.dim() == 2), None)
            shape = None if weight is None or name in ("gate_rows", "embed_rows") else tuple(weight.shape)
            constants = dict(get_config(name, torch.device("cpu"), torch.float32, rows.max_rows, shape))
            if self.fails(constants):
                raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
            self.us += self.cost(name, constants)
            getattr(row_reference, name)(*arguments)
            if self.is_wrong(constants):
                assert name == "norm_rows"
                arguments[3][row_reference.listed(rows)] += 1

        return launch


class FakeDevice(Cpu):
    """A device whose time is that of a world; captured launches are made again."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def time(self, task: Callable[[], object], num_repeats: int) -> float:
        before = self.world.us
        for _ in range(num_repeats):
            task()
        self.world.timed += 1
        return (self.world.us - before) / num_repeats / 1e3


class FakeCompiler:
    """Says what candidates take of a GPU without compiling them."""

    def __init__(self, usage: Callable[[Constants], Usage] = lambda constants: Usage(32, 0, 1024)) -> None:
        self.usage = usage
        self.submitted: list[Constants] = []

    def submit(self, task: Task, constants: Constants) -> Future[Usage]:
        self.submitted.append(constants)
        future: Future[Usage] = Future()
        future.set_result(self.usage(constants))
        return future


def search(world: World, compiler: FakeCompiler | None = None, **options: Any) -> Search:
    return Search(FakeDevice(world), world.ops(), compiler or FakeCompiler(), H200, num_rounds=2, **options)


def cost_of_warps(op: str, constants: Constants) -> float:
    """Fastest with BLOCK_N = 64, 2 warps and no early start."""
    return 10.0 + abs(constants.get("BLOCK_N", 64) - 64) / 8 + constants["num_warps"] + constants["PDL"]


def test_the_fastest_constants_are_found_tiles_first() -> None:
    planned = task("linear_rows", "fc1")
    kept: list[float] = []
    [outcome] = search(World(cost_of_warps), keep=lambda found: kept.append(found[0].us)).run([planned])
    assert kept == sorted(kept, reverse=True) and kept[-1] < kept[0], "each stage adds to the one before"
    assert outcome.best["BLOCK_N"] == 64 and outcome.best["num_warps"] == 2 and outcome.best["PDL"] is False
    assert outcome.us == pytest.approx(12.0)
    assert outcome.default_us == pytest.approx(cost_of_warps("linear_rows", default_constants(planned)))
    assert outcome.num_timed > 10 and not outcome.discarded and not outcome.num_untried


def test_the_default_stays_where_nothing_is_faster() -> None:
    default = default_constants(task("norm_rows"))
    # One part in a thousand faster is not faster.
    world = World(
        lambda op, constants: 5.0 + (constants["num_warps"] > default["num_warps"]) - 0.005 * (constants != default)
    )
    [outcome] = search(world).run([task("norm_rows")])
    assert outcome.best == outcome.default and outcome.us == outcome.default_us == pytest.approx(5.0)


def test_what_spills_or_needs_too_much_memory_or_does_not_compile_is_not_timed() -> None:
    def usage(constants: Constants) -> Usage:
        if constants["num_warps"] == 1:
            return Usage(255, 8, 1024)
        if constants["num_warps"] == 2:
            return Usage(32, 0, H200.max_shared_bytes + 1)
        return Usage(error="PTXAS error") if constants["num_warps"] == 8 else Usage(32, 0, 1024)

    world = World(lambda op, constants: 1.0 + (constants["num_warps"] > 8))
    [outcome] = search(world, FakeCompiler(usage)).run([task("norm_rows")])
    assert outcome.discarded == {"spills": 1, "too much shared memory": 2, "does not compile": 2}
    assert outcome.best["num_warps"] == 4


def test_what_computes_wrong_is_never_timed() -> None:
    """A wrong candidate is a fast one here: it would win."""
    said: list[str] = []
    world = World(lambda op, constants: 20.0 - constants["num_warps"], lambda constants: constants["num_warps"] == 16)
    [outcome] = search(world, report=said.append).run([task("norm_rows")])
    assert outcome.best["num_warps"] == 8
    # Once as a tile, once as a variation of the best.
    assert outcome.discarded == {"wrong or refused": 2}
    assert any("discarded: norm_rows, 3 rows" in text and "its error is" in text for text in said)


def test_when_time_is_up_the_best_so_far_is_kept_and_the_rest_counted() -> None:
    world = World(cost_of_warps)
    tasks = [task("linear_rows", "fc1"), task("linear_rows", "head")]
    [first, second] = search(world, deadline=1.0, now=lambda: world.us / 1e3).run(tasks)
    assert first.us is not None and first.num_untried > 0
    assert second.us is None and second.num_timed == 0
    assert second.num_untried >= len(tiles(tasks[1], H200))

    world = World(cost_of_warps)
    [nothing] = search(world, deadline=0.0, now=lambda: 0.0).run(tasks[:1])
    assert nothing.us is None and world.timed == 0


def test_a_gpu_that_fails_ends_the_search_and_what_was_found_stands() -> None:
    world = World(cost_of_warps, fails=lambda constants: constants["num_warps"] == 16)
    searching = search(world)
    good, bad = searching.run([task("linear_rows", "fc1"), task("norm_rows")])
    assert good.us is not None and bad.us is None
    assert searching.failure == ("tiles: RuntimeError: Triton Error [CUDA]: an illegal memory access was encountered")


# The table


FIGURES = {"us": 8.0, "default_us": 9.0, "bandwidth_share": 0.97}


def made(before: Any, *tasks: Task, **changes: Any) -> Any:
    found = {planned: ({**default_constants(planned), **changes}, FIGURES) for planned in tasks}
    return merge(before, "NVIDIA H200", 90, {"commit": "abc"}, found)


def test_a_table_gives_what_was_found_for_its_matrix_and_the_default_for_others() -> None:
    few, many = (task("linear_rows", "fc1", rows) for rows in (4, 16))
    table = made(None, few, num_stages=7)
    table = made(table, many, num_stages=6)
    table = made(table, task("norm_rows", max_rows=8), num_warps=8)
    assert (table["device"], table["capability"], table["measured"]) == ("NVIDIA H200", 90, {"commit": "abc"})
    cpu, fc1 = torch.device("cpu"), TINY.layer_matrices["fc1"]

    def stages(max_rows: int, shape: tuple[int, int] = fc1) -> int:
        return get_config("linear_rows", cpu, torch.float32, max_rows, shape)["num_stages"]

    default = stages(17), stages(4, (1, 1))
    with use_configs(table):
        assert [stages(rows) for rows in (1, 4, 5, 16)] == [7, 7, 6, 6]
        assert (stages(17), stages(4, (1, 1))) == default
        warps = [get_config("norm_rows", cpu, torch.float32, rows)["num_warps"] for rows in (1, 8, 9)]
        assert warps == [8, 8, default_constants(task("norm_rows"))["num_warps"]]


def test_a_second_run_replaces_its_own_entries_only() -> None:
    fc1, head = task("linear_rows", "fc1", 4), task("linear_rows", "head", 4)
    table = made(made(made(None, fc1, num_stages=7), head, num_stages=6), fc1, num_stages=5)
    entries = {tuple(e["shape"]): e for e in table["ops"]["linear_rows"]["4"] if "shape" in e}
    assert entries[TINY.layer_matrices["fc1"]]["num_stages"] == 5 and entries[TINY.head_matrix]["num_stages"] == 6
    assert entries[TINY.layer_matrices["fc1"]]["measured"] == FIGURES


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "card.json"
    table = made(None, task("linear_rows", "fc1"), task("attend_rows"))
    write_table(path, table)
    assert json.loads(path.read_text()) == table
    assert path.read_text() == format_table(table) and path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(ValueError, match="read_table: the table must"):
        write_table(path, {**table, "surprise": 1})

    def fail(*arguments: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_table(path, made(None, task("gate_rows")))
    assert json.loads(path.read_text()) == table
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"


# The command


def outcome(us: float | None) -> Outcome:
    planned = plan_tasks(SHAPES["opt-1.3b"], (1,), ("qkv_rows",))[0]
    default = default_constants(planned)
    default_us = None if us is None else us + 1
    return Outcome(planned, default, {**default, "num_stages": 7}, us, default_us, num_timed=4, num_untried=3)


def test_results_are_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "card.json"
    args = dynskip_tune_arguments("--dtype", "bfloat16")
    assert tune_command.save(path, [outcome(None)], "A card", 90, args, 4300.0) == 0
    assert not path.exists()
    assert tune_command.save(path, [outcome(None), outcome(7.0)], "A card", 90, args, 4300.0) == 1
    written = json.loads(path.read_text())
    assert written["measured"]["bandwidth_gbps"] == 4300.0 and written["measured"]["model"] == "opt-1.3b"
    entry = written["ops"]["qkv_rows"]["2"][0]
    share = 6144 * 2048 * 2 / 4300.0 / 1e3 / 7.0
    assert entry["shape"] == [6144, 2048] and entry["num_stages"] == 7
    assert entry["measured"] == {"us": 7.0, "default_us": 8.0, "bandwidth_share": pytest.approx(share, abs=1e-4)}

    tune_command.print_outcomes([outcome(None), outcome(7.0)], 4300.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith(f"8.00     7.00{share:>14.1%}      4          0        3  num_stages=7")
    assert lines[3] == "time was up: 6 candidates were not tried"


def dynskip_tune_arguments(*options: str) -> Any:
    from dynskip.cli import build_parser

    return build_parser().parse_args(["tune", *options])


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dynskip tune: error: no CUDA GPU was found") and "--dry-run" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "0"], "--minutes must be positive, got 0"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--dry-run", "--rows", "1;2"], "--rows must list numbers of rows, such as 1,16, got '1;2'"),
        (["--dry-run", "--rows", "0"], "plan_tasks: rows must be at least 1"),
        (["--dry-run", "--model", "gpt"], "read_decoder_config: model must be one of"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_compiles_the_candidates(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    assert pytestconfig.cache is not None
    monkeypatch.setenv("TRITON_CACHE_DIR", str(pytestconfig.cache.mkdir("triton")))
    assert main(["tune", "--dry-run", "--rows", "1", "--op", "norm_rows", "--jobs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sm_90, 132 multiprocessors")
    assert lines[2].split()[:3] == ["norm_rows,", "1", "rows"]
    assert lines[2].split()[3:] == ["5", "3", "9", "0"], "five tiles, two warp counts, one early start, the default"


@pytest.fixture(scope="module")
def compiler() -> Iterator[CompilerPool]:
    """One process for all families: each `tune` would start its own, which is most of what a dry run costs."""
    with CompilerPool(90, 1) as pool:
        yield pool


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_every_architecture_is_tuned(
    family: str,
    compiler: CompilerPool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("dynskip.tuning.compiling.CompilerPool", lambda *_: contextlib.nullcontext(compiler))
    family_config(family).save_pretrained(tmp_path)
    options = ["--dry-run", "--rows", "1", "--op", "linear_rows", "--jobs", "1", "--minutes", "1e-9", "--quiet"]
    assert main(["tune", "--model", str(tmp_path), *options]) == 0
    assert "linear_rows head, 1 rows" in capsys.readouterr().out


def test_a_dry_run_whose_time_is_up_gives_up_equal_candidates_once(capsys: pytest.CaptureFixture[str]) -> None:
    """The default is a tile, too: both wait for one compilation."""
    assert main(["tune", "--dry-run", "--rows", "1", "--op", "norm_rows", "--jobs", "1", "--minutes", "1e-9"]) == 0
    assert int(capsys.readouterr().out.splitlines()[2].split()[6]) > 0


def test_a_candidate_that_does_not_compile_is_told_from_a_bug(
    monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    assert pytestconfig.cache is not None
    monkeypatch.setenv("TRITON_CACHE_DIR", str(pytestconfig.cache.mkdir("triton")))
    planned = task("linear_rows", "fc1", dtype_name="bfloat16")
    with CompilerPool(90, 1) as pool:
        fits = pool.submit(planned, default_constants(planned)).result()
        too_short = pool.submit(planned, {**default_constants(planned), "BLOCK_M": 16, "BLOCK_K": 4}).result()
        with pytest.raises(AssertionError, match=r"the process that compiles ended with status 1 at .*BLOCK_X"):
            pool.submit(planned, {**default_constants(planned), "BLOCK_X": 4}).result()
        assert pool.submit(planned, default_constants(planned)).result() is fits
        rotated = replace(task("rotate_rows", dtype_name="bfloat16"), config=OTHER)
        turns = pool.submit(rotated, default_constants(rotated)).result()
    assert turns.error is None and turns.registers > 0
    assert fits.error is None and fits.registers > 0 and fits.spilled_bytes == 0
    assert too_short.error is not None
    assert "does not compile" in (too_short.complaint(1) or "")
