"""Whole prompts run PyTorch's packed attention where it can serve, and only where it computes the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import NUM_LAYERS, ragged_batch, tiny_hf, tiny_model, within_budget
from torch import Tensor

from dynskip import LayerPath, OPTForCausalLM
from dynskip.execution.compact import CompactExecutor
from dynskip.models import decoder
from dynskip.ops import varlen_attention
from dynskip.ops.backends import get_backend

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch's packed attention needs a GPU")
LENGTHS = [7, 1, 12, 4]


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, **how: Any
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` computes, for tests without a GPU."""
    assert how["window_size"] == (-1, 0) and set(how) == {"window_size", "scale"}
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    out = torch.empty_like(query)
    starts = cu_seq_q.tolist()
    assert starts == cu_seq_k.tolist() and max_q == max_k
    for begin, end in itertools.pairwise(starts):
        assert end - begin <= max_q
        heads = [tensor[begin:end].transpose(0, 1) for tensor in (query, key, value)]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True, scale=how["scale"])
        out[begin:end] = attended.transpose(0, 1)
    return out


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The queries that PyTorch's packed attention is given, on a CPU that seems to have it."""
    seen: list[Tensor] = []

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(query)
        return packed_attention(query, *args, **kwargs)

    monkeypatch.setattr(varlen_attention, "why_not_varlen", lambda *args: None)
    monkeypatch.setattr(varlen_attention, "varlen_attention", lambda: attend)
    return seen


def test_this_torch_has_the_attention_that_is_called() -> None:
    assert varlen_attention.missing_varlen() is None


PATHS: dict[str, Any] = {
    "paths": [LayerPath.full(NUM_LAYERS), *(LayerPath.random(NUM_LAYERS, 3, seed) for seed in range(3))],
    "masks": torch.rand(4, 12, NUM_LAYERS, generator=torch.Generator().manual_seed(3)) < 0.5,
}


@pytest.mark.parametrize(
    ("paths", "kv_policy", "fits"),
    [("paths", None, True), ("masks", "evict", True), ("masks", "propagate", False), ("masks", "share", False)],
)
def test_it_serves_rows_that_attend_to_each_other_only(
    paths: str, kv_policy: str | None, fits: bool, calls: list[Tensor]
) -> None:
    model = tiny_model(dtype=torch.float32)
    input_ids, attention_mask = ragged_batch(LENGTHS, "right")
    arguments = {"paths": PATHS[paths], "kv_policy": kv_policy}
    logits = model(input_ids, attention_mask, **arguments).logits
    assert bool(calls) == fits
    expected = model(input_ids, attention_mask, executor="reference", **arguments).logits
    exact = tiny_model(dtype=torch.float64)(input_ids, attention_mask, executor="reference", **arguments).logits
    within_budget(logits, expected, exact)


def test_generation_uses_it_for_prompts_and_not_in_later_steps(calls: list[Tensor]) -> None:
    from dynskip.engine.closed_batch import Generation
    from dynskip.sampling import SamplingParams

    model = tiny_model(dtype=torch.float32)
    prompts = [list(range(4, 4 + length)) for length in LENGTHS]
    params = [SamplingParams(max_tokens=4, ignore_eos=True)] * 4
    Generation(model, prompts, params, PATHS["paths"]).prefill()
    num_calls = len(calls)
    assert num_calls > 0
    ours = Generation(model, prompts, params, PATHS["paths"])
    ours.run()
    assert len(calls) == 2 * num_calls, "the second prefill, and no decode step"
    reference = Generation(model, prompts, params, PATHS["paths"], executor="reference")
    assert [s.token_ids for s in ours.sequences] == [s.token_ids for s in reference.run()]


def test_the_deterministic_mode_does_without(calls: list[Tensor]) -> None:
    model = tiny_model(dtype=torch.float32, deterministic=True)
    model(*ragged_batch(LENGTHS, "left"))
    assert not calls
    executor = model.executor()
    assert isinstance(executor, CompactExecutor)
    assert executor.prompt_attention() == "torch, because of the deterministic mode"


def test_what_runs_is_told_with_the_reason() -> None:
    torch_backend, triton = get_backend("torch"), get_backend("triton")
    cpu, bfloat16 = torch.device("cpu"), torch.bfloat16
    name = varlen_attention.attention_name
    assert name(torch_backend, bfloat16, cpu, 64, False) == "torch, because the backend torch runs its own"
    assert "triton, because PyTorch has no attention of packed sequences for cpu" in name(
        triton, bfloat16, cpu, 64, False
    )
    cuda = torch.device("cuda", 0)
    assert "not torch.float32" in name(triton, torch.float32, cuda, 64, False)
    assert "elements, not 20" in name(triton, bfloat16, cuda, 20, False)
    assert "elements, not 512" in name(triton, bfloat16, cuda, 512, False)


def test_a_torch_without_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen_attention, "varlen_attention", lambda: lambda query, key, is_causal: None)
    assert "without value, cu_seq_q" in str(varlen_attention.missing_varlen())

    def missing() -> Any:
        raise ImportError("no such module")

    monkeypatch.setattr(varlen_attention, "varlen_attention", missing)
    assert "has no torch.nn.attention.varlen (no such module)" in str(varlen_attention.missing_varlen())


@pytest.mark.parametrize("variant", ["pre-norm", "post-norm", "no-bias"])
@pytest.mark.parametrize("packed", [False, True])
def test_one_product_gives_queries_keys_and_values(variant: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_MERGED_DEVICES", {"cpu"})
    hf_model = tiny_hf(variant)
    input_ids, attention_mask = ragged_batch(LENGTHS, "right")
    model = OPTForCausalLM.from_hf(hf_model, backend="torch", pack=packed)
    arguments = {"paths": PATHS["paths"]}
    logits = model(input_ids, attention_mask, **arguments).logits
    exact = OPTForCausalLM.from_hf(tiny_hf(variant, dtype=torch.float64), backend="torch")(
        input_ids, attention_mask, executor="reference", **arguments
    ).logits
    expected = model(input_ids, attention_mask, executor="reference", **arguments).logits
    within_budget(logits, expected, exact)
    projection = model.decoder.stack()[0].q_proj
    if not packed:
        assert projection.dense_weight().untyped_storage().nbytes() == 3 * projection.dense_weight().nbytes


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[1], [64, 1, 33], [128, 0, 300]])
def test_pytorch_computes_what_the_reference_does(lengths: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape = (sum(lengths), 3, 4, 64)
    query, key, value = torch.randn(shape, device="cuda").to(dtype).unbind(1)
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    how = {"scale": 0.125, "window_size": (-1, 0)}
    tensors = (query, key, value)
    out = varlen_attention.varlen_attention()(*tensors, starts, starts, 300, 300, **how)
    exact = packed_attention(*(tensor.double() for tensor in tensors), starts, starts, 300, 300, **how)
    eager = packed_attention(*tensors, starts, starts, 300, 300, **how)
    within_budget(out, eager, exact)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prompts_on_a_gpu_run_it(dtype: torch.dtype) -> None:
    model = OPTForCausalLM.from_hf(tiny_hf(dtype=dtype).cuda(), backend="triton")
    executor = model.executor()
    assert isinstance(executor, CompactExecutor)
    assert executor.prompt_attention() == varlen_attention.VARLEN
    input_ids, attention_mask = (tensor.cuda() for tensor in ragged_batch(LENGTHS, "right"))
    logits = model(input_ids, attention_mask, PATHS["paths"]).logits
    expected = model(input_ids, attention_mask, PATHS["paths"], executor="reference").logits
    exact = OPTForCausalLM.from_hf(tiny_hf(dtype=torch.float64), backend="torch", pack=False)
    truth = exact(input_ids.cpu(), attention_mask.cpu(), PATHS["paths"], executor="reference").logits
    within_budget(logits.cpu(), expected.cpu(), truth)
