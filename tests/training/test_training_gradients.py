"""Gradients: the reference executor has those of transformers, everything made for inference refuses to record any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import NUM_LAYERS, VARIANTS, cut, ragged_batch, tiny_hf, tiny_model
from torch import Tensor

from dynskip import LLM, LayerPath, OPTForCausalLM, SamplingParams, ops
from dynskip.models.opt import OPT
from dynskip.models.weights import stored_names


def loss_of(logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Cross-entropy of the next token, over the tokens that are none of padding."""
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_transformers_cut_to_the_path(variant: str) -> None:
    hf_model = tiny_hf(variant, dtype=torch.float64)
    model = OPTForCausalLM.from_hf(hf_model, backend="torch", pack=False).unpack_()
    input_ids, attention_mask = ragged_batch([6, 4], "right")
    path = LayerPath.of(NUM_LAYERS, [0, 2, 5])
    short = cut(hf_model, path)
    loss_of(short(input_ids, attention_mask=attention_mask).logits, input_ids, attention_mask).backward()
    logits = model(input_ids, attention_mask, paths=path, executor="reference").logits
    loss_of(logits, input_ids, attention_mask).backward()
    expected = dict(short.named_parameters())
    for name, parameter in model.named_parameters():
        short_name = name
        if ".layers." in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            if layer not in path.layers:
                assert parameter.grad is None, name
                continue
            short_name = name.replace(f".layers.{layer}.", f".layers.{path.layers.index(layer)}.")
        [stored] = stored_names(OPT, short_name)
        torch.testing.assert_close(parameter.grad, expected[stored].grad, msg=lambda text, n=name: f"{n}: {text}")


def test_each_sequence_trains_its_own_path() -> None:
    """The gradient of a mixed batch is the sum of those of its sequences."""
    hf_model = tiny_hf(dtype=torch.float64)
    model = OPTForCausalLM.from_hf(hf_model, backend="torch", pack=False).unpack_()
    input_ids, _ = ragged_batch([5, 5], "left")
    paths = [LayerPath.of(NUM_LAYERS, [1, 2]), LayerPath.of(NUM_LAYERS, [2, 4])]
    model(input_ids, paths=paths, executor="reference").logits.square().sum().backward()
    mixed = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for seq, path in enumerate(paths):
        model(input_ids[seq : seq + 1], paths=path, executor="reference").logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert mixed[name] is None
        else:
            torch.testing.assert_close(mixed[name], parameter.grad)


@pytest.mark.parametrize("kv_policy", ["propagate", "evict", "share"])
def test_per_token_masks_are_differentiable(kv_policy: str) -> None:
    model = tiny_model(dtype=torch.float64, pack=False).unpack_()
    input_ids, _ = ragged_batch([5, 3], "left")
    mask = torch.rand(2, 5, NUM_LAYERS, generator=torch.Generator().manual_seed(0)) < 0.5
    weight = model.decoder.layers[2].v_proj.weight

    def loss() -> Tensor:
        return model(input_ids, paths=mask, kv_policy=kv_policy, executor="reference").logits.sin().sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values, step = [], 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
            values.append(loss())
            weight -= sign * step * direction
    slope = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-6)


def test_hidden_states_carry_gradients() -> None:
    model = tiny_model(pack=False).unpack_()
    input_ids, _ = ragged_batch([4], "left")
    states = model(input_ids, output_hidden_states=True, executor="reference").hidden_states
    assert all(state.requires_grad for state in states)


def test_the_compact_executor_refuses_and_names_the_way_out() -> None:
    model = tiny_model(pack=False).unpack_()
    input_ids, _ = ragged_batch([4], "left")
    with pytest.raises(
        RuntimeError,
        match=r"executor must be 'reference' while gradients are recorded, got 'compact'.*"
        r"Pass executor='reference' to train, or call under torch.no_grad\(\)",
    ):
        model(input_ids)
    with torch.no_grad():
        assert not model(input_ids).logits.requires_grad
    # Generation records nothing, so a model in training can speak between two steps.
    (output,) = LLM(model).generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True))
    assert len(output.token_ids) == 2


def op_calls(requires_grad: bool) -> dict[str, Callable[[], Any]]:
    """A valid call of every public op, one floating-point input of which wants a gradient."""
    x = torch.randn(3, 32, requires_grad=requires_grad)
    rows = torch.tensor([0, 2], dtype=torch.int32)
    heads = torch.randn(2, 2, 16, requires_grad=requires_grad)
    cache = torch.zeros(4, 2, 16)
    lengths = torch.tensor([1, 1], dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)
    table = torch.zeros(1, 2, dtype=torch.int32)
    seq_ids = torch.zeros(2, dtype=torch.int32)
    return {
        "gather_layer_norm": lambda: ops.gather_layer_norm(x, rows, None, None, 1e-5),
        "scatter_add": lambda: ops.scatter_add(torch.zeros(3, 32), rows, x[:2]),
        "kv_store": lambda: ops.kv_store(heads, heads, cache, cache.clone(), rows),
        "decode_attention": lambda: ops.decode_attention(heads, cache, cache, table, seq_ids, lengths, 0.25),
        "prefill_attention": lambda: ops.prefill_attention(heads, heads, heads, cu_seqlens, cu_seqlens, lengths, 0.25),
    }


@pytest.mark.parametrize("op", op_calls(False))
def test_every_op_refuses_and_names_the_way_out(op: str) -> None:
    with ops.use_backend("torch"):
        op_calls(requires_grad=False)[op]()
        call = op_calls(requires_grad=True)[op]
        with pytest.raises(RuntimeError, match=r"must not require grad.*torch.no_grad\(\).*reference"):
            call()
        with torch.no_grad():
            call()
