"""Fused decode steps, with the row ops of the specification: the same texts as op by op, on graphs and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from models import NUM_LAYERS, VARIANTS, random_prompts, tiny_model
from torch import Tensor

from dynskip import LayerPath, SamplingParams
from dynskip.controllers import HiddenStateGate, TokenContext
from dynskip.decode_graphs import WHOLE_STEP_AFTER, GraphedDecode
from dynskip.decode_work import ROW_BUCKETS, StepWork, row_bucket
from dynskip.executor import CompactExecutor
from dynskip.fused_decode import FusedDecode
from dynskip.generate import Generation
from dynskip.kv_cache import KVCache
from dynskip.plan import KVPolicy, Plan
from dynskip.row_ops import get_row_ops

FUSED_VARIANTS = [name for name in VARIANTS if "post" not in name and "projected" not in name and name != "gelu"]
PROMPTS = random_prompts([5, 1, 9, 3, 7])
PARAMS = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (6, 9, 1, 4, 9)]
PATHS = [LayerPath.parse(text, NUM_LAYERS) for text in ("full", "uniform:3", "exit:2", "layers:0,5", "uniform:3")]
MASK = torch.rand(len(PROMPTS), 20, NUM_LAYERS, generator=torch.Generator().manual_seed(3)) < 0.5
MASK[1, :, 2] = MASK[:, 4:, 3] = False  # layers without any row in some steps
GATE = HiddenStateGate(torch.randn(NUM_LAYERS, 2, 32, generator=torch.Generator().manual_seed(4)))


class EagerGraphs:
    """Stands for CUDA graphs: what was captured runs when it is replayed."""

    def __init__(self) -> None:
        self.num_captured = 0
        self.replays: list[int] = []
        self.num_bytes = 0

    def capture(self, launch: Callable[[], None]) -> Any:
        self.num_captured += 1
        return launch

    def replay(self, graphs: Sequence[Any]) -> None:
        self.replays.append(len(graphs))
        for graph in graphs:
            graph()


def fuse(model: Any, monkeypatch: pytest.MonkeyPatch, graphs: EagerGraphs | None = None) -> CompactExecutor:
    """Let the model's decode steps run fused, by the reference's row ops."""
    executor = model.executor()
    monkeypatch.setattr("dynskip.executor.get_row_ops", lambda name: get_row_ops("reference"))
    executor.fuses = True
    if graphs is not None:
        make = executor._decode_steps

        def with_graphs(step: Any, cache: Any) -> Any:
            steps = make(step, cache)
            if steps is not None and steps.graphs is None:
                steps.graphs = GraphedDecode(steps.decoder, graphs)
            return steps

        monkeypatch.setattr(executor, "_decode_steps", with_graphs)
    return executor


def texts(model: Any, paths: Any = None, kv_policy: str | None = None, **options: Any) -> list[list[int]]:
    generation = Generation(model, PROMPTS, PARAMS, paths, kv_policy, **options)
    return [sequence.token_ids for sequence in generation.run()]


def routes() -> list[Any]:
    routes: list[Any] = [pytest.param(None, None, id="full"), pytest.param(PATHS, None, id="paths")]
    for policy in ("evict", "propagate", "share"):
        routes += [pytest.param(MASK, policy, id=f"mask-{policy}"), pytest.param(GATE, policy, id=f"gate-{policy}")]
    return routes


@pytest.mark.parametrize("graphed", [False, True], ids=["launched", "graphed"])
@pytest.mark.parametrize(("paths", "kv_policy"), routes())
def test_texts_and_row_counts_are_those_of_the_ops(
    paths: Any, kv_policy: str | None, graphed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fused = (tiny_model(dtype=torch.float64) for _ in range(2))
    executor = fuse(fused, monkeypatch, EagerGraphs() if graphed else None)
    for _ in range(2):  # the second time in the cache of the first
        assert texts(fused, paths, kv_policy) == texts(plain, paths, kv_policy)
        assert executor.row_counts.run == plain.executor().row_counts.run
        assert executor.row_counts.kv == plain.executor().row_counts.kv


@pytest.mark.parametrize("variant", FUSED_VARIANTS)
def test_every_variant_that_the_kernels_know(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = (tiny_model(variant, dtype=torch.float64) for _ in range(2))
    fuse(fused, monkeypatch)
    assert texts(fused, PATHS) == texts(plain, PATHS)


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - set(FUSED_VARIANTS)))
def test_other_variants_say_why_not(variant: str) -> None:
    model = tiny_model(variant)
    assert model.model.decoder.why_not_fused()
    cache = model.executor().new_cache(1, 4, 24)
    with pytest.raises(ValueError, match="FusedDecode: the model must be one that the fused kernels know, but its"):
        FusedDecode(model.model.decoder, model.lm_head, cache, 1, get_row_ops("reference"))


def test_a_controller_of_somebody_else_runs_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        num_layers = NUM_LAYERS

        def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
            assert context.seq_ids.shape == context.is_prompt.shape == hidden_states.shape[:1]
            return (context.position_ids + layer) % 2 == 1

    plain, fused, graphs = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64), EagerGraphs()
    fuse(fused, monkeypatch, graphs)
    assert texts(fused, Odd(), "propagate") == texts(plain, Odd(), "propagate")
    assert not graphs.replays


def test_a_retired_cache_and_its_graphs_serve_the_next_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs = tiny_model(), EagerGraphs()
    executor = fuse(model, monkeypatch, graphs)
    first = texts(model, PATHS)
    cache, num_captured = executor._retired, graphs.num_captured
    assert cache is not None and num_captured > 0
    assert texts(model, PATHS) == first
    # Its steps came before: some are captured whole by now, and none of their layers again.
    num_whole = graphs.replays.count(1)
    assert executor._retired is cache and num_whole and graphs.num_captured <= num_captured + num_whole
    assert executor.graph_memory is not None
    assert str(executor.graph_memory).startswith(f"{graphs.num_captured} graphs 0.0 MiB, static buffers ")
    executor.release()
    assert executor.graph_memory is None
    larger = Generation(model, [[5] * 40], [SamplingParams(max_tokens=20)], PATHS[0])
    larger.run()
    assert executor._retired is not cache


@pytest.mark.parametrize(("paths", "kv_policy"), routes())
def test_slots_in_any_order_change_no_text(paths: Any, kv_policy: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = (tiny_model(dtype=torch.float64) for _ in range(2))
    executor = fuse(fused, monkeypatch)
    make = executor.new_cache

    def with_a_past(num_seqs: int, max_context_len: int, num_slots: int) -> KVCache:
        """A cache whose sequences have come and gone before, one of which stays."""
        cache = make(num_seqs + 2, max_context_len, num_slots + 3 * NUM_LAYERS)
        for seq in range(num_seqs + 1):
            count = max(cache.num_slots // (num_seqs + 1) // NUM_LAYERS, 1)
            cache.slot_tables[:, seq, :count] = cache.allocate(NUM_LAYERS * count).view(count, NUM_LAYERS).t()
            cache.context_lens[:, seq] = count
        cache.share(num_seqs, num_seqs + 1, 3)
        cache.release(range(num_seqs + 1))
        assert cache.num_slots_used == 3 * NUM_LAYERS and not cache.free_slots.diff().ge(0).all()
        return cache

    monkeypatch.setattr(executor, "new_cache", with_a_past)
    assert texts(fused, paths, kv_policy) == texts(plain, paths, kv_policy)


def test_sequences_come_and_go_under_fused_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slots of one that left serve the next, whose text is as if it had been alone; in the end none is taken."""
    model = tiny_model(dtype=torch.float64)
    fuse(model, monkeypatch)
    alone = texts(model, GATE, "share")
    generation = Generation(model, PROMPTS, PARAMS, GATE, "share")
    cache = generation.cache
    most = 0
    while generation.engine.has_unfinished:
        generation.step()
        seqs = [generation.sequences[seq].state.cache_id for seq in generation.running]
        used, lens = cache.slot_tables[:, seqs], cache.context_lens[:, seqs]
        held = used[torch.arange(used.shape[2]) < lens[..., None]].unique().numel()
        assert held == cache.num_slots_used, "who has left holds nothing"
        most = max(most, held)
    assert [sequence.token_ids for sequence in generation.sequences] == alone
    assert most > 0 and cache.num_slots_used == 0


def test_the_cache_holds_what_was_stored_and_nothing_for_skipped_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    fuse(model, monkeypatch)
    generation = Generation(model, PROMPTS, PARAMS, PATHS)
    generation.prefill()
    used = generation.cache.num_slots_used
    # Sequence 2 has its one token; nobody else ends here, so that entries stay where they are.
    assert set(generation.running) == {0, 1, 3, 4}
    generation.step()
    assert set(generation.running) == {0, 1, 3, 4}
    budget = sum(PATHS[seq].budget for seq in (0, 1, 3, 4))
    assert generation.cache.num_slots_used == used + budget and int(generation.cache.slot_cursor) == used + budget
    for layer, lens in enumerate(generation.cache.context_lens.tolist()):
        for seq, path in enumerate(PATHS):
            has_left = seq == 2
            assert lens[seq] == (len(PROMPTS[seq]) + 1 if layer in path.layers and not has_left else 0)


class TestGraphs:
    """Which graphs a step is made of."""

    def decoder(self, max_rows: int = 4) -> FusedDecode:
        model = tiny_model()
        cache = model.executor().new_cache(max_rows, 8, 8 * max_rows * NUM_LAYERS)
        decoder = FusedDecode(model.model.decoder, model.lm_head, cache, max_rows, get_row_ops("reference"))
        decoder.set_rows(torch.arange(max_rows))
        return decoder

    def work(self, *paths: str) -> StepWork:
        plan = Plan.per_sequence([LayerPath.parse(f"layers:{path}", NUM_LAYERS) for path in paths], [1] * len(paths))
        return StepWork.of(plan)

    def test_layers_without_rows_are_not_launched_and_graphs_are_shared(self) -> None:
        graphs = EagerGraphs()
        graphed = GraphedDecode(self.decoder(), graphs)
        graphed.run(self.work("0,5", "0", "0,5"))
        assert graphs.replays == [4]  # begin, two layers, head
        graphed.run(self.work("0,5", "0,3", "0,5"))
        assert graphs.replays == [4, 5] and graphs.num_captured == 5

    def test_a_step_that_comes_again_is_captured_whole(self) -> None:
        graphs = EagerGraphs()
        graphed = GraphedDecode(self.decoder(), graphs)
        for _ in range(WHOLE_STEP_AFTER + 2):
            graphed.run(self.work("0,5", "0"))
        assert graphs.replays == [4] * (WHOLE_STEP_AFTER - 1) + [1] * 3

    def test_whole_steps_are_bounded_and_the_oldest_goes(self) -> None:
        graphs = EagerGraphs()
        graphed = GraphedDecode(self.decoder(), graphs, max_step_graphs=2)
        for layer in (0, 1, 0, 2, 0, 1):
            graphed.run_whole(self.work(str(layer)))
        assert graphs.num_captured == 4 and graphed.memory.num_graphs == 2
        with pytest.raises(ValueError, match="max_step_graphs must be at least 1, got 0"):
            GraphedDecode(self.decoder(), graphs, max_step_graphs=0)

    def test_warming_up_changes_nothing(self) -> None:
        decoder = self.decoder()
        for tensor in (decoder.buffers.hidden_states, decoder.cache.k_cache, decoder.cache.v_cache):
            tensor.normal_()
        watched = (decoder.buffers.hidden_states, decoder.buffers.cache_ids, decoder.buffers.num_rows)
        cache = decoder.cache
        watched += (cache.k_cache, cache.v_cache, cache.slot_tables, cache.context_lens, cache.slot_cursor)
        before = [tensor.clone() for tensor in watched]
        decoder.warm_up(StepWork.unknown(4, NUM_LAYERS, KVPolicy.PROPAGATE))
        assert all(map(torch.equal, watched, before))


def test_buckets() -> None:
    assert [row_bucket(count) for count in (0, 1, 3, 64, 65, 1024)] == [0, 1, 4, 64, 128, 1024]
    with pytest.raises(ValueError, match=f"num_rows must be at most {ROW_BUCKETS[-1]}, got 1025. Split the batch"):
        row_bucket(1025)


def test_steps_of_one_gate_are_equal_and_of_two_are_not() -> None:
    other = HiddenStateGate(GATE.weight)
    works = [StepWork.unknown(3, NUM_LAYERS, KVPolicy.EVICT, gate) for gate in (GATE, GATE, other)]
    assert works[0] == works[1] != works[2] != StepWork.unknown(3, NUM_LAYERS, KVPolicy.EVICT)


@pytest.mark.parametrize("policy", list(KVPolicy))
def test_counts_by_layer_are_those_of_the_layer_plans(policy: KVPolicy) -> None:
    active = torch.rand(7, NUM_LAYERS, generator=torch.Generator().manual_seed(5)) < 0.4
    plan = Plan.per_token(active, [1] * 7, policy)
    by_layer = [(layer.run.num_rows, layer.kv.num_rows) for layer in plan.all_layers(torch.device("cpu"))]
    assert plan.num_rows_by_layer == by_layer
