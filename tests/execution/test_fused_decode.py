"""Fused decode steps, with the row ops of the specification: the same texts as op by op, on graphs and without."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, family_hf
from models import NUM_LAYERS, VARIANTS, cpu_backend, random_prompts, tiny_model
from streams import costs
from torch import Tensor

from dynskip import CausalLM, LayerPath, SamplingParams
from dynskip.controllers import HiddenStateGate, TokenContext
from dynskip.engine.closed_batch import Generation
from dynskip.engine.engine import Engine
from dynskip.execution import graphs as graphs_module
from dynskip.execution.compact import CompactExecutor
from dynskip.execution.fused import FusedDecode
from dynskip.execution.graphs import GraphedDecode
from dynskip.execution.kv_cache import KVCache
from dynskip.execution.step_shape import StepShape
from dynskip.execution.turns import rows_step
from dynskip.kernels.launches import LAUNCHES
from dynskip.kernels.row_list import ROW_BUCKETS, RowList, row_bucket
from dynskip.ops.row_ops import ROW_OP_NAMES, get_row_ops
from dynskip.routing.plan import KVPolicy, Plan
from dynskip.speculation.draft import Draft
from dynskip.speculation.lengths import MOST_GUESSES, Candidate, Choice, DraftLengths

# Of each architecture but OPT: keys shared, windowed, placed or scaled in its own way first, then other parts.
FUSED_VARIANTS = [
    *(("llama", name) for name in ("one-kv-head", "biases")),
    ("mistral", "window"),
    *(("qwen2", name) for name in ("layer-types", "tied")),
    *(("qwen3", name) for name in ("window", "biases")),
    *(("gpt_neox", name) for name in ("plain", "sequential", "no-bias")),
    *(("bloom", name) for name in ("three-heads", "eps")),
    ("phi", "two-kv-heads"),
    *(("gpt2", name) for name in ("by-depth", "unscaled")),
]
ONE_A_FAMILY = list({family: (family, name) for family, name in reversed(FUSED_VARIANTS)}.values())
PROMPTS = random_prompts([5, 1, 9, 3, 7])
WHOLE_STEP_AFTER = 4
PARAMS = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (6, 9, 1, 4, 9)]
PATHS = [LayerPath.parse(text, NUM_LAYERS) for text in ("full", "uniform:3", "exit:2", "layers:0,5", "uniform:3")]
MASK = torch.rand(len(PROMPTS), 20, NUM_LAYERS, generator=torch.Generator().manual_seed(3)) < 0.5
MASK[1, :, 2] = MASK[:, 4:, 3] = False  # layers without any row in some steps
GATE = HiddenStateGate(torch.randn(NUM_LAYERS, 2, 32, generator=torch.Generator().manual_seed(4)))


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are captured whole sooner."""
    monkeypatch.setattr(graphs_module, "WHOLE_STEP_AFTER", WHOLE_STEP_AFTER)


class EagerGraphs:
    """Stands for CUDA graphs: what was captured runs when it is replayed."""

    def __init__(self) -> None:
        self.num_captured = 0
        self.replays: list[int] = []
        self.num_bytes = 0

    def capture(self, *launches: Callable[[], None]) -> list[Any]:
        self.num_captured += len(launches)
        return [*launches]

    def replay(self, graphs: Sequence[Any]) -> None:
        self.replays.append(len(graphs))
        for graph in graphs:
            graph()


def fuse(model: Any, monkeypatch: pytest.MonkeyPatch, graphs: EagerGraphs | None = None) -> CompactExecutor:
    """Let the model's decode steps run fused, by the reference's row ops."""
    executor = model.executor()
    monkeypatch.setattr("dynskip.execution.compact.get_row_ops", lambda name: get_row_ops("reference"))
    executor.fuses = True
    if graphs is not None:
        make = executor._decode_steps

        def with_graphs(step: Any, cache: Any, is_watched: bool = False) -> Any:
            steps = make(step, cache, is_watched)
            if steps is not None and steps.graphs is None:
                steps.graphs = GraphedDecode(steps.fused, graphs)
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = (tiny_model(variant, dtype=torch.float64) for _ in range(2))
    fuse(fused, monkeypatch)
    assert texts(fused, PATHS) == texts(plain, PATHS)


@pytest.mark.parametrize(("family", "variant"), FUSED_VARIANTS)
def test_every_family(family: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_model = family_hf(family, dtype=torch.float64, **FAMILIES[family][variant])
    plain, fused = (CausalLM.from_hf(hf_model, backend="torch") for _ in range(2))
    fuse(fused, monkeypatch, EagerGraphs())
    for paths, kv_policy in ((PATHS, None), (MASK, "evict"), (MASK, "propagate"), (MASK, "share")):
        assert texts(fused, paths, kv_policy) == texts(plain, paths, kv_policy), kv_policy


@pytest.mark.parametrize(("family", "variant"), ONE_A_FAMILY)
def test_the_kernels_give_every_family_the_texts_of_the_ops(family: str, variant: str) -> None:
    hf_model = family_hf(family, **FAMILIES[family][variant])
    some_layers = MASK[:2] & torch.tensor([layer in (0, 3) for layer in range(NUM_LAYERS)])
    params = [SamplingParams(max_tokens=3, ignore_eos=True)] * 2
    outputs, launches = [], []
    for backend in ("torch", cpu_backend("triton")):
        model = CausalLM.from_hf(hf_model, backend=backend)
        LAUNCHES.clear()
        generation = Generation(model, random_prompts([4, 2]), params, some_layers, "evict")
        outputs.append([sequence.token_ids for sequence in generation.run()])
        launches.append(dict(LAUNCHES))
    assert outputs[0] == outputs[1]
    assert not launches[0] and launches[1]["attend_rows"] > 0
    assert ("rotate_rows" in launches[1]) == (model.decoder_config.rotary is not None)
    assert ("place_rows" in launches[1]) == model.decoder_config.attends_by_position


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


@pytest.mark.parametrize("graphed", [False, True], ids=["launched", "graphed"])
@pytest.mark.parametrize(("family", "variant"), [("opt", "pre-norm"), ("mistral", "window"), ("bloom", "three-heads")])
def test_sequences_may_bring_several_rows(
    family: str, variant: str, graphed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than the cache has places, other numbers of them in each step, and the same places each time."""
    changes = VARIANTS[variant] if family == "opt" else FAMILIES[family][variant]
    hf_model = family_hf(family, dtype=torch.float64, **changes)
    cache_ids, found = torch.tensor([2, 0, 1]), []
    for fuses in (False, True):
        model = CausalLM.from_hf(hf_model, backend="torch")
        executor = fuse(model, monkeypatch, EagerGraphs() if graphed else None) if fuses else model.executor()
        cache, lengths = executor.new_cache(3, 24, 400), [0, 0, 0]
        logits = []
        for counts in ((1, 1, 1), (3, 1, 4), (1, 1, 1), (2, 2, 2), (1, 3, 2), (1, 1, 1)):
            tokens = [list(range(10 + first, 10 + first + count)) for first, count in zip(lengths, counts, strict=True)]
            step = rows_step(tokens, lengths, [2, 0, 1], PATHS[:3], model.device)
            step.cache_ids = cache_ids
            logits.append(executor.logits(step, cache).clone())
            lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
        found.append(torch.cat(logits))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entries", ["own", "path"])
def test_drafts_guess_and_paths_verify(entries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused steps begin with embeddings: no row goes on behind the layers that draft and path have in common."""
    model = tiny_model(dtype=torch.float64)
    fuse(model, monkeypatch)
    # Layer 4 is left out: what has to be made again is right now and then.
    draft = Draft(LayerPath.of(NUM_LAYERS, [0, 1, 2, 3, 5]), entries)
    monkeypatch.setattr(DraftLengths, "choose", lambda self, candidates, others=(): chosen(candidates))
    monkeypatch.setattr(DraftLengths, "plain", lambda *_: None)
    outputs = []
    for draft_of in (None, draft):
        engine = Engine(model, batch=3, costs=costs())
        executor = engine.runner.executor
        assert isinstance(executor, CompactExecutor) and executor.resumes
        executor.fuses = draft_of is not None
        assert executor.resumes != executor.fuses
        ids = [engine.add_request(*each, PATHS[0], draft=draft_of) for each in zip(PROMPTS, PARAMS, strict=True)]
        ended = {output.request_id: output for output in engine.run()}
        outputs.append([ended[request_id] for request_id in ids])
        assert engine.kv.cache.num_slots_used == 0
    assert [output.token_ids for output in outputs[0]] == [output.token_ids for output in outputs[1]]
    assert sum(output.num_drafted for output in outputs[1]) > sum(output.num_accepted for output in outputs[1]) > 0


def chosen(candidates: Sequence[Candidate]) -> Choice:
    return Choice(tuple(min(each.most, 3) for each in candidates), 1e9, 1.0, 1.0, 1.0, 1.0)


def test_a_retired_cache_and_its_graphs_serve_the_next_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs = tiny_model(), EagerGraphs()
    executor = fuse(model, monkeypatch, graphs)
    first = texts(model, PATHS)
    (cache,), num_captured = executor._retired, graphs.num_captured
    assert num_captured > 0
    assert texts(model, PATHS) == first
    # Its steps came before: some are captured whole by now, and none of their layers again.
    num_whole = graphs.replays.count(1)
    assert executor._retired == [cache] and num_whole and graphs.num_captured <= num_captured + num_whole
    assert executor.graph_memory is not None
    assert str(executor.graph_memory).startswith(f"{graphs.num_captured} graphs 0.0 MiB, static buffers ")
    executor.release()
    assert executor.graph_memory is None
    larger = Generation(model, [[5] * 40], [SamplingParams(max_tokens=20)], PATHS[0])
    larger.run()
    assert executor._retired != [cache]


def test_batches_that_take_turns_keep_their_graphs_as_long_as_their_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs = tiny_model(), EagerGraphs()
    executor = fuse(model, monkeypatch, graphs)
    made: list[FusedDecode] = []
    make = FusedDecode.__init__

    def noted(decoder: FusedDecode, *arguments: Any) -> None:
        make(decoder, *arguments)
        made.append(decoder)

    monkeypatch.setattr(FusedDecode, "__init__", noted)
    params = [SamplingParams(max_tokens=12, ignore_eos=True)] * len(PROMPTS)
    batches = [Generation(model, PROMPTS, params, PATHS) for _ in range(3)]
    for batch in batches:
        batch.prefill()
    alone = Generation(tiny_model(), PROMPTS, params, PATHS).run()
    captured_by_round = []
    for _ in range(10):
        for batch in batches:
            batch.step()
        captured_by_round.append(graphs.num_captured)
    assert len(made) == 3, "one a cache, not one a step"
    # In the first round each cache gets the graphs of its layers, in a later one that of its whole step, and no more.
    assert len(set(captured_by_round)) == 2
    for batch in batches:
        assert [sequence.token_ids[:11] for sequence in batch.sequences] == [one.token_ids[:11] for one in alone]

    assert executor.graph_memory is not None
    buffers = made[0].num_bytes
    assert executor.graph_memory.buffer_bytes == 3 * buffers
    made.clear()
    del batch, batches[1:]
    gc.collect()
    # The last that was let go of waits for another batch.
    assert executor.graph_memory.buffer_bytes == 2 * buffers
    batches.clear()
    gc.collect()
    assert executor.graph_memory.buffer_bytes == buffers
    executor.release()
    assert executor.graph_memory is None


def test_planning_looks_at_no_more_rows_than_the_step_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(dtype=torch.float64)
    fuse(model, monkeypatch)
    reference, seen = get_row_ops("reference"), []

    def plan_rows(active: Tensor, first_layer: int, kv_policy: int, cache_ids: Tensor, *others: Tensor) -> None:
        seen.append((active.shape[1], len(cache_ids), others[-1].shape[1]))
        reference.plan_rows(active, first_layer, kv_policy, cache_ids, *others)

    monkeypatch.setattr("dynskip.execution.compact.get_row_ops", lambda name: replace(reference, plan_rows=plan_rows))
    plain = tiny_model(dtype=torch.float64)
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (2, 3, 5, 9, 9)]
    results = [Generation(one, PROMPTS, params, PATHS).run() for one in (model, plain)]
    assert [sequence.token_ids for sequence in results[0]] == [sequence.token_ids for sequence in results[1]]
    # Five sequences, whose cache has eight rows, then four, three and two.
    assert [rows for rows, *_ in seen] == [8, 4, 4, 4, 2, 2, 2, 2][: len(seen)] and len(seen) == 8
    assert all(len(set(sizes)) == 1 for sizes in seen)


def test_steps_are_warmed_up_for_every_bucket_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(dtype=torch.float64)
    executor = fuse(model, monkeypatch)
    reference = get_row_ops("reference")
    launched: dict[str, set[int]] = {"linear_rows": set(), "attend_rows": set()}

    def noted(name: str) -> Any:
        def op(x: Tensor, rows: Any, *others: Any) -> None:
            launched[name].add(rows.max_rows)
            getattr(reference, name)(x, rows, *others)

        return op

    ops = replace(reference, **{name: noted(name) for name in launched})
    monkeypatch.setattr("dynskip.execution.compact.get_row_ops", lambda name: ops)
    cache = executor.new_cache(7, 16, 100)
    tables = cache.slot_tables.clone()
    executor._steps_of(cache).warm_up(6)
    assert launched == {name: {1, 2, 4, 8} for name in launched}
    assert torch.equal(cache.slot_tables, tables) and not cache.context_lens.any() and not cache.slot_cursor.any()
    # Those that a step of the cache can have, whatever is asked for.
    executor._steps_of(cache).warm_up(ROW_BUCKETS[-1])
    assert launched == {name: {1, 2, 4, 8} for name in launched}


def test_an_engine_warms_up_its_batch_and_an_interpreter_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[tuple[KVCache, int]] = []
    warm_up = CompactExecutor.warm_up

    def noted(executor: CompactExecutor, cache: KVCache, max_rows: int) -> None:
        warmed.append((cache, max_rows))
        executor.fuses = True
        warm_up(executor, cache, max_rows)
        assert executor.graph_memory is None

    monkeypatch.setattr(CompactExecutor, "warm_up", noted)
    with Engine(tiny_model(), policy="lockstep", batch=3) as engine:
        assert warmed == [(engine.kv.cache, 3)]
        for _ in range(2):
            engine.add_request([5, 6], PARAMS[0], draft=Draft(LayerPath.early_exit(NUM_LAYERS, 2), "path"))
        assert warmed[1:] == [(engine.kv.cache, 3 * (1 + MOST_GUESSES))], "of a step that verifies, once"


def test_rows_of_one_sequence_are_launched_as_those_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch is compiled for what its arguments are, whatever they hold: guesses need no kernels of their own."""
    model = tiny_model(dtype=torch.float64)
    executor = fuse(model, monkeypatch)
    reference = get_row_ops("reference")
    launches: list[tuple[Any, ...]] = []

    def about(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return argument.shape, argument.stride(), argument.dtype, argument.storage_offset()
        return argument.max_rows if isinstance(argument, RowList) else argument

    def noted(name: str) -> Any:
        def op(*arguments: Any) -> None:
            launches.append((name, *map(about, arguments)))
            getattr(reference, name)(*arguments)

        return op

    ops = replace(reference, **{name: noted(name) for name in ROW_OP_NAMES})
    monkeypatch.setattr("dynskip.execution.compact.get_row_ops", lambda name: ops)
    cache = executor.new_cache(4, 16, 200)

    def launched(tokens: Sequence[list[int]]) -> list[tuple[Any, ...]]:
        launches.clear()
        paths = [LayerPath.full(NUM_LAYERS)] * len(tokens)
        executor.predict(rows_step(tokens, [0] * len(tokens), range(len(tokens)), paths, model.device), cache)
        return [*launches]

    several = launched([[5], [6], [7], [8]])
    assert {name for name, *_ in several} >= {"plan_rows", "qkv_rows", "attend_rows"}
    assert launched([[5, 6, 7, 8]]) == several


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
        decoder = FusedDecode(model.decoder, model.lm_head, cache, max_rows, get_row_ops("reference"))
        decoder.set_rows(torch.arange(max_rows))
        return decoder

    def shape(self, *paths: str) -> StepShape:
        plan = Plan.per_sequence([LayerPath.parse(f"layers:{path}", NUM_LAYERS) for path in paths], [1] * len(paths))
        return StepShape.of(plan)

    def test_layers_of_the_same_bounds_are_warmed_up_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        decoder = self.decoder()
        warmed: list[tuple[int, ...]] = []
        monkeypatch.setattr(
            decoder, "warm_up", lambda shape: warmed.append(tuple(bounds.max_run for bounds in shape.layers))
        )
        graphed = GraphedDecode(decoder, EagerGraphs())
        for paths in (("0,5", "0,5"), ("0,3", "0"), ("1,2", "1,2"), ("0", "0", "0"), ("4,5", "4,5", "4,5")):
            graphed.run(self.shape(*paths))
        graphed.run_whole(self.shape("3", "4"))
        assert warmed == [(2,), (1,), (4,)]

    def test_layers_without_rows_are_not_launched_and_graphs_are_shared(self) -> None:
        graphs = EagerGraphs()
        graphed = GraphedDecode(self.decoder(), graphs)
        graphed.run(self.shape("0,5", "0", "0,5"))
        assert graphs.replays == [4]  # begin, two layers, head
        graphed.run(self.shape("0,5", "0,3", "0,5"))
        assert graphs.replays == [4, 5] and graphs.num_captured == 5

    def test_a_step_that_comes_again_is_captured_whole(self) -> None:
        graphs = EagerGraphs()
        graphed = GraphedDecode(self.decoder(), graphs)
        for _ in range(WHOLE_STEP_AFTER + 2):
            graphed.run(self.shape("0,5", "0"))
        assert graphs.replays == [4] * (WHOLE_STEP_AFTER - 1) + [1] * 3

    def test_more_mixes_than_graphs_drive_each_other_out_less_and_less(self) -> None:
        graphs = EagerGraphs()
        graphed = GraphedDecode(self.decoder(), graphs, max_step_graphs=2)
        shapes = [self.shape(str(layer)) for layer in range(3)]

        def num_captured(num_rounds: int) -> int:
            before = graphs.num_captured
            for _ in range(num_rounds):
                for shape in shapes:
                    graphed.run(shape)
            return graphs.num_captured - before

        num_captured(1)  # the graphs of the layers
        counts = [num_captured(8 * WHOLE_STEP_AFTER) for _ in range(6)]
        # If a step that was dropped were captured as soon as it comes again, each of its turns would be a capture.
        assert counts[0] <= 3 * 3 + 2 and counts == sorted(counts, reverse=True) and counts[-1] <= 2

    def test_a_step_that_was_dropped_has_to_come_again_twice_as_often(self) -> None:
        graphs = EagerGraphs()
        graphed = GraphedDecode(self.decoder(), graphs, max_step_graphs=1)
        one, other = self.shape("0"), self.shape("1")
        needed = []
        for _ in range(3):
            count, before = 0, len(graphs.replays)
            while 1 not in graphs.replays[before:]:
                graphed.run(one)
                count += 1
            needed.append(count)
            graphed.run_whole(other)
        assert needed == [WHOLE_STEP_AFTER, 2 * WHOLE_STEP_AFTER, 4 * WHOLE_STEP_AFTER]

    def test_whole_steps_are_bounded_and_the_oldest_goes(self) -> None:
        graphs = EagerGraphs()
        graphed = GraphedDecode(self.decoder(), graphs, max_step_graphs=2)
        for layer in (0, 1, 0, 2, 0, 1):
            graphed.run_whole(self.shape(str(layer)))
        assert graphs.num_captured == 4 and graphed.memory.num_graphs == 2
        with pytest.raises(ValueError, match="max_step_graphs must be at least 1, got 0"):
            GraphedDecode(self.decoder(), graphs, max_step_graphs=0)

    def test_warming_up_changes_nothing(self) -> None:
        decoder = self.decoder()
        buffers = decoder.buffers
        for tensor in (buffers.hidden_states, decoder.k_cache, decoder.v_cache):
            tensor.normal_()
        watched = (buffers.hidden_states, buffers.cache_ids, buffers.all_ids, buffers.num_rows)
        watched += (decoder.k_cache, decoder.v_cache, decoder.slot_tables, decoder.context_lens, decoder.slot_cursor)
        before = [tensor.clone() for tensor in watched]
        decoder.warm_up(StepShape.unknown(4, NUM_LAYERS, KVPolicy.PROPAGATE))
        assert all(map(torch.equal, watched, before))


def test_buckets() -> None:
    assert [row_bucket(count) for count in (0, 1, 3, 64, 65, 1024)] == [0, 1, 4, 64, 128, 1024]
    with pytest.raises(ValueError, match=f"num_rows must be at most {ROW_BUCKETS[-1]}, got 1025. Split the batch"):
        row_bucket(1025)


def test_steps_of_one_gate_are_equal_and_of_two_are_not() -> None:
    other = HiddenStateGate(GATE.weight)
    shapes = [StepShape.unknown(3, NUM_LAYERS, KVPolicy.EVICT, gate) for gate in (GATE, GATE, other)]
    assert shapes[0] == shapes[1] != shapes[2] != StepShape.unknown(3, NUM_LAYERS, KVPolicy.EVICT)


@pytest.mark.parametrize("policy", list(KVPolicy))
def test_counts_by_layer_are_those_of_the_layer_plans(policy: KVPolicy) -> None:
    active = torch.rand(7, NUM_LAYERS, generator=torch.Generator().manual_seed(5)) < 0.4
    plan = Plan.per_token(active, [1] * 7, policy)
    by_layer = [(layer.run.num_rows, layer.kv.num_rows) for layer in plan.all_layers(torch.device("cpu"))]
    assert plan.num_rows_by_layer == by_layer
