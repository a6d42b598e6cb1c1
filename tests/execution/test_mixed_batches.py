"""A sequence in a mixed batch is the sequence alone: equal greedy tokens, and in deterministic mode equal bits."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import LARGE, family_hf, large_changes
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    NUM_LAYERS,
    VARIANTS,
    VOCAB_SIZE,
    cpu_backend,
    cut,
    ragged_batch,
    random_prompts,
    tiny_hf,
    tiny_model,
    within_budget,
)
from torch import Tensor

from dynskip import LLM, CausalLM, LayerPath, OPTForCausalLM, Output, SamplingParams
from dynskip.execution.native_steps import NativeSteps
from dynskip.execution.step import Step
from dynskip.models.linear import Linear
from dynskip.ops import varlen_attention
from dynskip.routing.plan import KVPolicy, Plan

BACKENDS = ["torch", "native"]
POLICIES = ["absent", "propagate", "evict", "share"]
# (variant, dtype): both places of the LayerNorm, and a dtype in which nearly every sum is rounded.
MODELS = [("pre-norm", torch.float32), ("post-norm-projected", torch.float32), ("pre-norm", torch.bfloat16)]

llm_of = functools.cache(lambda variant, dtype, **options: LLM(tiny_model(variant, dtype=dtype, **options)))


@dataclass(frozen=True)
class Batch:
    """A ragged batch, each sequence with its own layers: one path a sequence, or one mask row a token."""

    prompts: list[list[int]]
    max_tokens: list[int]
    active: Tensor  # [B, T, L], constant along T for the policy "absent"
    policy: str
    prompt_depth: str
    temperature: float

    def part(self, seqs: list[int]) -> Batch:
        """The batch of some of the sequences, in this order."""
        prompts, max_tokens = [self.prompts[seq] for seq in seqs], [self.max_tokens[seq] for seq in seqs]
        longest = max(len(p) + n for p, n in zip(prompts, max_tokens, strict=True))
        active = self.active[seqs, :longest]
        return Batch(prompts, max_tokens, active, self.policy, self.prompt_depth, self.temperature)

    def run(self, llm: LLM, **options: Any) -> list[Output]:
        """Generate, with the log-probability of every token of the vocabulary."""
        params = [
            SamplingParams(max_tokens=n, temperature=self.temperature, seed=len(p), logprobs=VOCAB_SIZE)
            for p, n in zip(self.prompts, self.max_tokens, strict=True)
        ]
        if self.policy == "absent":
            paths = [
                LayerPath.of(NUM_LAYERS, row.nonzero().flatten().tolist(), allow_empty=True)
                for row in self.active[:, 0]
            ]
            return llm.generate(self.prompts, params, paths, **options)
        policy = {"kv_policy": self.policy, "prompt_depth": self.prompt_depth}
        return llm.generate(self.prompts, params, self.active, **policy, **options)


@st.composite
def batches(draw: st.DrawFn, policies: list[str] = POLICIES, temperatures: tuple[float, ...] = (0.0,)) -> Batch:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    max_tokens = [draw(st.integers(1, 5)) for _ in lengths]
    policy = draw(st.sampled_from(policies))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    density = draw(st.sampled_from([0.0, 0.3, 0.6, 1.0]))
    num_tokens = max(lengths) + max(max_tokens)
    active = torch.rand(len(lengths), num_tokens, NUM_LAYERS, generator=generator) < density
    if policy == "absent":
        active = active[:, :1].expand(-1, num_tokens, -1)
    prompts = random_prompts(lengths, seed=draw(st.integers(0, 10**6)))
    depth = "path" if policy == "absent" else draw(st.sampled_from(["path", "full"]))
    return Batch(prompts, max_tokens, active, policy, depth, draw(st.sampled_from(temperatures)))


def same_bits(one: Output, other: Output) -> None:
    """Equal tokens and, for every token of the vocabulary at every step, equal bits of the log-probability."""
    assert one.token_ids == other.token_ids
    assert one.finish_reason == other.finish_reason
    assert one.logprobs == other.logprobs


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model[0]}-{model[1]}".replace("torch.", ""))
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(batch=batches(temperatures=(0.0, 1.0)))
def test_each_sequence_of_a_batch_has_the_bits_it_has_alone(backend: str, model: Any, batch: Batch) -> None:
    llm = llm_of(*model, backend=cpu_backend(backend), deterministic=True)
    for seq, output in enumerate(batch.run(llm)):
        (alone,) = batch.part([seq]).run(llm)
        same_bits(output, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_larger_shapes_keep_their_bits_too(backend: str, dtype: torch.dtype) -> None:
    """Heads of 64, sums of 768 terms, prompts longer than a block of any attention kernel."""
    sizes = {"hidden_size": 192, "word_embed_proj_dim": 192, "ffn_dim": 768, "num_attention_heads": 3}
    hf_model = tiny_hf(dtype=dtype, max_position_embeddings=320, **sizes)
    llm = LLM(OPTForCausalLM.from_hf(hf_model, backend=cpu_backend(backend), deterministic=True))
    prompts = random_prompts([1, 130, 33, 300, 64, 17, 16])
    paths = [LayerPath.random(NUM_LAYERS, budget=3, seed=seed) for seed in range(len(prompts))]
    params = SamplingParams(max_tokens=3, logprobs=VOCAB_SIZE)
    outputs = llm.generate(prompts, params, paths)
    for prompt, path, output in zip(prompts, paths, outputs, strict=True):
        (alone,) = llm.generate([prompt], params, path)
        same_bits(output, alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", LARGE)
def test_larger_shapes_of_every_family_keep_their_bits_too(family: str, backend: str) -> None:
    """Windows and slopes over prompts longer than a block of any attention kernel, keys that heads share.

    In bfloat16, where a product of 1024 terms for 33 or 64 rows may have other bits than among more rows.
    """
    hf_model = family_hf(family, dtype=torch.bfloat16, **large_changes(family))
    llm = LLM(CausalLM.from_hf(hf_model, backend=cpu_backend(backend), deterministic=True))
    input_ids, attention_mask = ragged_batch([130, 1, 300, 33, 64], "right")
    logits = llm.model(input_ids, attention_mask).logits
    prompts = [ids[keep] for ids, keep in zip(input_ids, attention_mask.bool(), strict=True)]
    for prompt, rows in zip(prompts, logits, strict=True):
        assert torch.equal(llm.model(prompt[None]).logits[0], rows[: len(prompt)])
    params = SamplingParams(max_tokens=3, logprobs=VOCAB_SIZE)
    token_ids = [prompt.tolist() for prompt in prompts]
    for prompt, output in zip(token_ids, llm.generate(token_ids, params), strict=True):
        (alone,) = llm.generate([prompt], params)
        same_bits(output, alone)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("opt", VARIANTS["post-norm-projected"]),
        *((family, {}) for family in LARGE),
        ("gpt_neox", {"use_parallel_residual": False}),
    ],
)
def test_every_product_of_a_deterministic_model_is_deterministic(
    family: str, changes: dict[str, Any], deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of each one: a product of few terms may have the same bits beside any rows, on the machine at hand."""
    hf_model = family_hf(family, **changes)
    model = CausalLM.from_hf(hf_model, backend=cpu_backend("native"), deterministic=deterministic)
    names = {module: name for name, module in model.named_modules() if isinstance(module, Linear)}
    asked: dict[str, set[bool]] = {}
    forward, attend = Linear.forward, varlen_attention.attend

    def noted(linear: Linear, rows: Tensor, **options: Any) -> Tensor:
        asked.setdefault(names[linear], set()).add(options["deterministic"])
        return forward(linear, rows, **options)

    def noted_attention(*arguments: Any, **options: Any) -> Tensor:
        asked.setdefault("attention", set()).add(options["deterministic"])
        return attend(*arguments, **options)

    monkeypatch.setattr(Linear, "forward", noted)
    monkeypatch.setattr(NativeSteps, "takes", lambda steps, step: False)  # one call asks nobody, and has the same bits
    monkeypatch.setattr(varlen_attention, "attend", noted_attention)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    mask = torch.rand(2, 6, NUM_LAYERS, generator=torch.Generator().manual_seed(1)) < 0.5
    LLM(model).generate(random_prompts([4, 2]), params)
    LLM(model).generate(random_prompts([4, 2]), params, mask, kv_policy="propagate")
    assert asked.keys() == {*names.values(), "attention"}
    assert all(answers == {deterministic} for answers in asked.values()), asked


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(batch=batches())
def test_each_sequence_of_a_batch_has_the_tokens_it_has_alone(backend: str, batch: Batch) -> None:
    """Without deterministic mode too; float32 leaves the gap between the two best tokens far above the rounding."""
    llm = llm_of("pre-norm", torch.float32, backend=cpu_backend(backend))
    for seq, output in enumerate(batch.run(llm)):
        (alone,) = batch.part([seq]).run(llm)
        assert output.token_ids == alone.token_ids


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=8)
@given(batch=batches(), random=st.randoms(use_true_random=False))
def test_permuting_a_batch_permutes_its_outputs(backend: str, batch: Batch, random: Any) -> None:
    llm = llm_of("pre-norm", torch.float32, backend=cpu_backend(backend), deterministic=True)
    order = random.sample(range(len(batch.prompts)), len(batch.prompts))
    permuted = batch.part(order).run(llm)
    original = batch.run(llm)
    for place, seq in enumerate(order):
        same_bits(permuted[place], original[seq])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=8)
@given(batch=batches(policies=["absent"]), other=batches(policies=["absent"]))
def test_neighbours_change_nothing(backend: str, batch: Batch, other: Batch) -> None:
    """The first sequence among two sets of neighbours: other prompts, paths, lengths and numbers."""
    llm = llm_of("pre-norm", torch.float32, backend=cpu_backend(backend), deterministic=True)
    first = batch.part([0])
    longest = max(first.active.shape[1], other.active.shape[1])
    active = torch.cat([b.active[:, :1].expand(-1, longest, -1) for b in (first, other)])
    prompts, max_tokens = first.prompts + other.prompts, first.max_tokens + other.max_tokens
    among_others = Batch(prompts, max_tokens, active, "absent", "path", 0.0)
    same_bits(among_others.run(llm)[0], batch.run(llm)[0])


@pytest.mark.parametrize("variant", ["pre-norm", "post-norm-projected"])
@settings(max_examples=12)
@given(batch=batches())
def test_the_compact_executor_does_what_the_reference_does(variant: str, batch: Batch) -> None:
    """Error against the reference in float64: that of the reference in float32 is the budget."""
    llm = llm_of(variant, torch.float32, backend="torch")
    exact_llm = llm_of(variant, torch.float64, backend="torch")
    compact, eager, exact = (
        batch.run(llm),
        batch.run(llm, executor="reference"),
        batch.run(exact_llm, executor="reference"),
    )
    for outputs in zip(compact, eager, exact, strict=True):
        assert outputs[0].token_ids == outputs[1].token_ids == outputs[2].token_ids
    values, eager_values, exact_values = (_logprobs(outputs) for outputs in (compact, eager, exact))
    within_budget(values.float(), eager_values.float(), exact_values)


def _logprobs(outputs: list[Output]) -> torch.Tensor:
    """[tokens of all outputs, V], float64."""
    steps = [step for output in outputs for step in output.logprobs or []]
    return torch.tensor([[step[token] for token in range(VOCAB_SIZE)] for step in steps], dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(batch=batches(policies=["absent"]))
def test_a_constant_mask_with_evict_is_the_path(backend: str, batch: Batch) -> None:
    llm = llm_of("pre-norm", torch.float32, backend=cpu_backend(backend), deterministic=True)
    as_mask = Batch(batch.prompts, batch.max_tokens, batch.active, "evict", "path", 0.0)
    for output, other in zip(batch.run(llm), as_mask.run(llm), strict=True):
        same_bits(output, other)


@pytest.mark.parametrize("policy", ["propagate", "evict", "share"])
def test_a_mask_of_all_layers_is_the_full_path(policy: str) -> None:
    llm = llm_of("pre-norm", torch.float32, backend="torch", deterministic=True)
    prompts = random_prompts([4, 1, 6])
    everything = torch.ones(3, 10, NUM_LAYERS, dtype=torch.bool)
    masked = Batch(prompts, [3, 4, 2], everything, policy, "path", 0.0).run(llm)
    for output, other in zip(
        masked, Batch(prompts, [3, 4, 2], everything, "absent", "path", 0.0).run(llm), strict=True
    ):
        same_bits(output, other)


def test_the_policies_differ() -> None:
    """Or the tests above would compare one policy with itself."""
    llm = llm_of("pre-norm", torch.float32, backend="torch", deterministic=True)
    active = torch.rand(1, 12, NUM_LAYERS, generator=torch.Generator().manual_seed(0)) < 0.6
    results = []
    for policy in ("propagate", "evict", "share"):
        for depth in ("path", "full"):
            (output,) = Batch(random_prompts([8]), [4], active, policy, depth, 0.0).run(llm)
            results.append(str(output.logprobs))
    assert len(set(results)) == len(results)


@pytest.mark.parametrize("variant", ["pre-norm", "post-norm-projected", "untied"])
def test_tokens_are_those_of_transformers_cut_to_the_path(variant: str) -> None:
    hf_model = tiny_hf(variant)
    prompts = random_prompts([5, 1, 9, 3, 7, 2])
    paths = [LayerPath.random(NUM_LAYERS, budget=budget, seed=budget) for budget in (1, 2, 3, 4, 5, 6)]
    llm = LLM(OPTForCausalLM.from_hf(hf_model, backend="torch"))
    outputs = llm.generate(prompts, SamplingParams(max_tokens=8), paths)
    assert len({tuple(output.token_ids) for output in outputs}) == len(prompts)
    for prompt, path, output in zip(prompts, paths, outputs, strict=True):
        alone = cut(hf_model, path)
        ids = torch.tensor([prompt])
        expected = alone.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        assert output.token_ids == expected[0, len(prompt) :].tolist()
        assert output.path == path


@pytest.mark.parametrize("executor", ["compact", "reference"])
@pytest.mark.parametrize("policy", list(KVPolicy), ids=lambda policy: policy.value)
def test_prompts_may_be_run_in_parts(policy: KVPolicy, executor: Any) -> None:
    """Two prefill steps, the second over the entries of the first, end where one step ends."""
    model = tiny_model(dtype=torch.float64)
    runner = model.executor(executor)
    lengths, first_part = [7, 4, 5], [3, 1, 4]
    prompts = [torch.tensor(prompt) for prompt in random_prompts(lengths)]
    active = torch.rand(3, 7, NUM_LAYERS, generator=torch.Generator().manual_seed(2)) < 0.5
    if policy is KVPolicy.ABSENT:
        active = active[:, :1].expand(-1, 7, -1)

    def run(cache: Any, begins: list[int], ends: list[int]) -> list[Tensor]:
        spans = [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]
        token_ids = torch.cat([prompt[span] for prompt, span in zip(prompts, spans, strict=True)])
        position_ids = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        mask = torch.cat([rows[span] for rows, span in zip(active, spans, strict=True)])
        counts = [span.stop - span.start for span in spans]
        step = Step(token_ids, position_ids, torch.arange(3), Plan.per_token(mask, counts, policy))
        with torch.no_grad():
            return list(runner.run(step, cache).split(counts))

    num_slots = sum(lengths) * NUM_LAYERS
    whole = run(runner.new_cache(3, 7, num_slots), [0, 0, 0], lengths)
    cache = runner.new_cache(3, 7, num_slots)
    parts = [run(cache, [0, 0, 0], first_part), run(cache, first_part, lengths)]
    for seq, expected in enumerate(whole):
        torch.testing.assert_close(torch.cat([part[seq] for part in parts]), expected)
