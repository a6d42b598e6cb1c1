"""Generation: what comes back for each prompt, when it ends, and how often each kernel runs."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import NUM_LAYERS, VOCAB_SIZE, cpu_backend, random_prompts, tiny_model, word_tokenizer

from dynskip import LLM, LayerPath, OPTForCausalLM, SamplingParams
from dynskip.controllers import HiddenStateGate
from dynskip.engine.closed_batch import Generation
from dynskip.kernels.row_list import row_bucket

PROMPTS = random_prompts([5, 1, 7])
PATHS = [LayerPath.of(NUM_LAYERS, layers) for layers in ([0, 3, 5], [1], [0, 2, 3, 4])]


@functools.cache
def model() -> OPTForCausalLM:
    return tiny_model(deterministic=True)


@functools.cache
def llm() -> LLM:
    return LLM(model(), tokenizer=word_tokenizer())


def words(token_ids: list[int]) -> str:
    return " ".join(f"w{token:03}" for token in token_ids)


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **options)


def test_outputs_come_in_order_with_their_fields() -> None:
    outputs = llm().generate(PROMPTS, greedy(6), PATHS)
    assert [output.prompt_ids for output in outputs] == PROMPTS
    assert [output.path for output in outputs] == PATHS
    for output in outputs:
        assert len(output.token_ids) == 6 and output.finish_reason == "length"
        assert output.text == words([token for token in output.token_ids if token > 3])
        assert output.logprobs is None
        (sample,) = output.samples
        assert (sample.token_ids, sample.text, sample.finish_reason) == (output.token_ids, output.text, "length")


def test_texts_and_token_ids_are_the_same_prompts() -> None:
    texts = [words(prompt) for prompt in PROMPTS]
    by_text = llm().generate(texts, greedy(4), PATHS)
    by_ids = llm().generate(PROMPTS, greedy(4), PATHS)
    assert by_text == by_ids
    mixed = llm().generate([texts[0], PROMPTS[1], texts[2]], greedy(4), PATHS)  # type: ignore[list-item]
    assert mixed == by_ids


def test_without_a_tokenizer_there_is_no_text() -> None:
    outputs = LLM(model()).generate(PROMPTS, greedy(3))
    assert all(output.text is None and len(output.token_ids) == 3 for output in outputs)


def test_the_default_path_is_full_and_the_default_params_are_greedy() -> None:
    (output,) = llm().generate(PROMPTS[:1])
    assert output.path == LayerPath.full(NUM_LAYERS)
    assert output == llm().generate(PROMPTS[:1], SamplingParams(max_tokens=16, temperature=0.0))[0]


def test_each_prompt_has_its_own_params() -> None:
    params = [greedy(2), greedy(7, logprobs=3), SamplingParams(max_tokens=4, temperature=1.3, seed=3, ignore_eos=True)]
    outputs = llm().generate(PROMPTS, params, PATHS)
    assert [len(output.token_ids) for output in outputs] == [2, 7, 4]
    assert [output.logprobs is None for output in outputs] == [True, False, True]
    for prompt, param, path, output in zip(PROMPTS, params, PATHS, outputs, strict=True):
        assert llm().generate([prompt], param, path) == [output]


def test_the_end_of_sequence_token_ends_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    (free,) = llm().generate(PROMPTS[:1], greedy(8))
    eos = free.token_ids[4]
    end = free.token_ids.index(eos) + 1
    monkeypatch.setattr(model().config, "eos_token_id", eos)
    (output,) = llm().generate(PROMPTS[:1], SamplingParams(max_tokens=8))
    assert output.token_ids == free.token_ids[:end] and output.finish_reason == "stop"
    (output,) = llm().generate(PROMPTS[:1], SamplingParams(max_tokens=8, ignore_eos=True))
    assert output.token_ids == free.token_ids and output.finish_reason == "length"
    monkeypatch.setattr(model().config, "eos_token_id", [99, eos])
    (output,) = llm().generate(PROMPTS[:1], SamplingParams(max_tokens=8))
    assert output.token_ids == free.token_ids[:end] and output.finish_reason == "stop"


def test_an_ended_sequence_leaves_the_others_alone() -> None:
    free = llm().generate(PROMPTS, greedy(8), PATHS)
    stop = free[1].token_ids[2]
    params = [greedy(8), greedy(8, stop_token_ids=[stop]), greedy(8)]
    outputs = llm().generate(PROMPTS, params, PATHS)
    end = free[1].token_ids.index(stop) + 1
    assert outputs[1].token_ids == free[1].token_ids[:end] and outputs[1].finish_reason == "stop"
    assert outputs[0] == free[0] and outputs[2] == free[2]


def test_stop_texts_cut_the_text_before_the_first_of_them() -> None:
    (free,) = llm().generate(PROMPTS[:1], greedy(8))
    assert free.text is not None
    shown = free.text.split()
    first, later = shown[3], shown[5]
    assert shown.index(first) == 3 and first != later
    (output,) = llm().generate(PROMPTS[:1], greedy(8, stop=[later, first]))
    assert output.finish_reason == "stop"
    assert output.text == " ".join(shown[:3]) + " "
    assert output.token_ids == free.token_ids[: len(output.token_ids)] and len(output.token_ids) < 8
    (output,) = llm().generate(PROMPTS[:1], greedy(8, stop="nowhere"))
    assert output == free
    # A stop text on the last token counts as a stop, not as the length.
    (output,) = llm().generate(PROMPTS[:1], greedy(len(output.token_ids), stop=shown[-1]))
    assert output.finish_reason == "stop"


def test_n_outputs_draw_apart_and_can_be_repeated() -> None:
    params = SamplingParams(max_tokens=5, temperature=1.5, n=4, seed=10, ignore_eos=True)
    outputs = llm().generate(PROMPTS, params, PATHS)
    for prompt, path, output in zip(PROMPTS, PATHS, outputs, strict=True):
        assert len({tuple(sample.token_ids) for sample in output.samples}) > 1
        assert output.token_ids == output.samples[0].token_ids and output.seed == 10
        for n in (1, 3):
            (fewer,) = llm().generate([prompt], replace(params, n=n), path)
            assert fewer.samples == output.samples[:n]
        # An output is keyed by seed and number, not by their sum.
        (next_seed,) = llm().generate([prompt], replace(params, seed=11, n=3), path)
        assert all(next_seed.samples[place] != output.samples[place + 1] for place in range(3))


def test_a_drawn_seed_is_reported_and_repeats_the_outputs() -> None:
    params = SamplingParams(max_tokens=6, temperature=1.5, top_p=0.9, n=2, ignore_eos=True)
    first, second, third = llm().generate(PROMPTS, params, PATHS)
    assert len({first.seed, second.seed, third.seed}) == 3
    for prompt, path, output in zip(PROMPTS, PATHS, (first, second, third), strict=True):
        assert output.seed is not None
        (again,) = llm().generate([prompt], replace(params, seed=output.seed), path)
        assert again == output and again.seed == output.seed
    (greedily,) = llm().generate(PROMPTS[:1], greedy(2, seed=4))
    assert greedily.seed is None


@pytest.mark.parametrize("kv_policy", [None, "propagate", "evict", "share"])
def test_copies_of_a_prompt_are_as_good_as_prompts_of_their_own(kv_policy: str | None) -> None:
    active = torch.rand(3, 12, NUM_LAYERS, generator=torch.Generator().manual_seed(3)) < 0.5
    params = [greedy(4, n=n, logprobs=VOCAB_SIZE) for n in (2, 1, 3)]
    outputs = llm().generate(PROMPTS, params, PATHS if kv_policy is None else active, kv_policy=kv_policy)
    single = [greedy(4, logprobs=VOCAB_SIZE)] * 3
    expected = llm().generate(PROMPTS, single, PATHS if kv_policy is None else active, kv_policy=kv_policy)
    for output, alone in zip(outputs, expected, strict=True):
        assert all(sample == alone.samples[0] for sample in output.samples)


def test_a_seed_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    llm().generate(PROMPTS, SamplingParams(max_tokens=3, temperature=1.0, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_logprobs_are_those_of_the_model() -> None:
    num_top = 5
    params = SamplingParams(max_tokens=6, temperature=1.5, top_k=40, seed=2, logprobs=num_top, ignore_eos=True)
    outputs = llm().generate(PROMPTS, params, PATHS)
    for prompt, path, output in zip(PROMPTS, PATHS, outputs, strict=True):
        everything = torch.tensor([prompt + output.token_ids])
        expected = model()(everything, paths=path).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        assert output.logprobs is not None and len(output.logprobs) == 6
        for step, (row, token) in enumerate(zip(expected, output.token_ids, strict=True)):
            reported = output.logprobs[step]
            assert set(reported) == {token, *row.topk(num_top).indices.tolist()}
            values = torch.tensor([reported[name] for name in reported])
            torch.testing.assert_close(values, row[list(reported)], rtol=1e-5, atol=1e-5)


def test_no_top_logprobs_still_name_the_chosen_token() -> None:
    (output,) = llm().generate(PROMPTS[:1], greedy(3, logprobs=0))
    assert output.logprobs is not None
    assert [list(step) for step in output.logprobs] == [[token] for token in output.token_ids]


def test_a_prompt_may_fill_all_positions_but_one() -> None:
    limit = model().config.max_position_embeddings
    (output,) = llm().generate(random_prompts([limit - 1]), greedy(1))
    assert len(output.token_ids) == 1
    (output,) = llm().generate(random_prompts([1]), greedy(limit - 1))
    assert len(output.token_ids) == limit - 1


def test_a_sequence_may_run_no_layer_at_all() -> None:
    nothing = LayerPath.of(NUM_LAYERS, [], allow_empty=True)
    together = llm().generate(PROMPTS, greedy(4), [nothing, PATHS[1], nothing])
    alone = llm().generate(PROMPTS[:1], greedy(4), nothing)
    assert together[0] == alone[0]


@pytest.mark.parametrize("kv_policy", ["propagate", "evict", "share"])
def test_prompt_depth_full_runs_all_layers_for_the_prompt(kv_policy: str) -> None:
    """The first token then is that of the full path, and the rest is what a mask with a full prompt gives."""
    active = torch.rand(3, 12, NUM_LAYERS, generator=torch.Generator().manual_seed(4)) < 0.4
    params = greedy(5, logprobs=VOCAB_SIZE)
    outputs = llm().generate(PROMPTS, params, active, kv_policy=kv_policy, prompt_depth="full")
    full = llm().generate(PROMPTS, greedy(1, logprobs=VOCAB_SIZE))
    for output, expected in zip(outputs, full, strict=True):
        assert output.path is None and expected.logprobs is not None
        assert output.logprobs is not None and output.logprobs[0] == expected.logprobs[0]
    spelled_out = active.clone()
    for mask, prompt in zip(spelled_out, PROMPTS, strict=True):
        mask[: len(prompt)] = True
    assert outputs == llm().generate(PROMPTS, params, spelled_out, kv_policy=kv_policy)
    assert outputs != llm().generate(PROMPTS, params, active, kv_policy=kv_policy)


def test_the_reference_executor_generates_too() -> None:
    outputs = llm().generate(PROMPTS, greedy(4), PATHS, executor="reference")
    expected = llm().generate(PROMPTS, greedy(4), PATHS)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


def test_one_call_leaves_nothing_behind_for_the_next() -> None:
    prompts, paths, params = [list(prompt) for prompt in PROMPTS], list(PATHS), [greedy(4)] * 3
    first = llm().generate(prompts, params, paths)
    llm().generate(random_prompts([3, 3]), greedy(9))
    assert llm().generate(prompts, params, paths) == first
    assert (prompts, paths, params) == (PROMPTS, PATHS, [greedy(4)] * 3)


def test_progress_is_shown_on_stderr_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    silent = llm().generate(PROMPTS, greedy(4), PATHS)
    assert capsys.readouterr().err == ""
    assert llm().generate(PROMPTS, greedy(4), PATHS, progress=True) == silent
    assert "0/12" in capsys.readouterr().err  # three outputs of at most four tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_triton_kernels_generate_what_torch_does(dtype: torch.dtype) -> None:
    from dynskip.kernels.launches import LAUNCHES

    texts, max_tokens = [words(prompt) for prompt in PROMPTS], 3
    outputs = {}
    for backend in ("torch", cpu_backend("triton")):
        small = LLM(tiny_model(dtype=dtype, backend=backend), tokenizer=word_tokenizer())
        LAUNCHES.clear()
        outputs[backend] = small.generate(texts, greedy(max_tokens), PATHS)
        if backend == "torch":
            assert not LAUNCHES
    assert outputs["triton"] == outputs["torch"]
    # PATHS run every layer, each once a step for all its sequences. In the prefill both of a layer's halves gather and
    # scatter; then come the fused steps; the last token is chosen, not run.
    num_layers = len({layer for path in PATHS for layer in path.layers})
    assert num_layers == NUM_LAYERS
    assert LAUNCHES.pop("norm_rows", 0) == num_separate_norms(dtype) * (max_tokens - 1)
    assert dict(LAUNCHES) == {
        "gather_layer_norm": 2 * num_layers,
        "scatter_add": 2 * num_layers,
        "kv_store": num_layers,
        "prefill_attention": num_layers,
        **fused_launches(num_layers, num_steps=max_tokens - 1),
    }


def num_separate_norms(dtype: torch.dtype) -> int:
    """How many norms of a step along PATHS have a kernel of their own, as the table of constants says."""
    from dynskip.kernels.configs import get_config

    num_rows = [sum(layer in path.layers for path in PATHS) for layer in range(NUM_LAYERS)]
    norms = [(op, count) for count in num_rows for op in ("qkv_rows", "linear_rows")] + [("linear_rows", len(PATHS))]
    configs = [get_config(op, torch.device("cpu"), dtype, row_bucket(count)) for op, count in norms]
    return sum(not config["FUSE_NORM"] for config in configs)


def fused_launches(num_layers: int, num_steps: int) -> dict[str, int]:
    """The launches of fused decode steps in which ``num_layers`` layers run, but for the norms."""
    return {
        "embed_rows": num_steps,
        "qkv_rows": num_layers * num_steps,
        "attend_rows": num_layers * num_steps,
        "linear_add_rows": 2 * num_layers * num_steps,
        "linear_rows": (num_layers + 1) * num_steps,  # fc1 of each layer, and the head
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kv_policy", ["propagate", "evict", "share"])
def test_a_gate_decides_by_a_kernel_what_it_decides_in_torch(kv_policy: str, dtype: torch.dtype) -> None:
    from dynskip.kernels.launches import LAUNCHES

    gate = HiddenStateGate(torch.randn(NUM_LAYERS, 2, 32, generator=torch.Generator().manual_seed(4)))
    outputs, counts = {}, {}
    for backend in ("torch", cpu_backend("triton")):
        model = tiny_model(dtype=dtype, backend=backend)
        params = [SamplingParams(max_tokens=4, ignore_eos=True)] * len(PROMPTS)
        generation = Generation(model, PROMPTS, params, gate, kv_policy, prompt_depth="full")
        LAUNCHES.clear()
        outputs[backend] = [sequence.token_ids for sequence in generation.run()]
        counts[backend] = model.executor().row_counts.run, model.executor().row_counts.kv
    assert outputs["triton"] == outputs["torch"]
    assert counts["triton"] == counts["torch"]
    launches = fused_launches(NUM_LAYERS, num_steps=3) | {"gate_rows": (NUM_LAYERS - 2) * 3}
    assert {op: LAUNCHES[op] for op in launches} == launches
    assert min(counts["torch"][0]) < max(counts["torch"][0])  # some rows were skipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fused_steps_give_each_sequence_the_bits_it_has_alone(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype, backend=cpu_backend("triton"), deterministic=True)

    def logprobs(seqs: list[int]) -> list[list[dict[int, float]]]:
        params = [SamplingParams(max_tokens=3, ignore_eos=True, logprobs=VOCAB_SIZE)] * len(seqs)
        generation = Generation(model, [PROMPTS[seq] for seq in seqs], params, [PATHS[seq] for seq in seqs])
        return [sequence.logprobs for sequence in generation.run()]

    together = logprobs([0, 1, 2])
    for seq in range(len(PROMPTS)):
        assert logprobs([seq]) == together[seq : seq + 1]


def test_a_layer_that_nobody_runs_launches_nothing() -> None:
    from dynskip.kernels.launches import LAUNCHES

    small = tiny_model(backend=cpu_backend("triton"))
    LAUNCHES.clear()
    LLM(small).generate(PROMPTS, greedy(1), LayerPath.of(NUM_LAYERS, [2, 4]))
    assert LAUNCHES["prefill_attention"] == 2


def test_generation_can_be_driven_step_by_step() -> None:
    """The token-level interface that an engine builds on."""
    params = [greedy(2), greedy(3), greedy(1)]
    generation = Generation(model(), PROMPTS, params, PATHS)
    generation.prefill()
    running = []
    while generation.running:
        running.append(list(generation.running))
        generation.step()
    assert running == [[0, 1], [1]]
    expected = LLM(model()).generate(PROMPTS, params, PATHS)
    assert [sequence.token_ids for sequence in generation.sequences] == [output.token_ids for output in expected]
