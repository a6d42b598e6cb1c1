"""The model against transformers: every variant, every padding, full depth and along paths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import (
    NUM_LAYERS,
    VARIANTS,
    cpu_backend,
    cut,
    ragged_batch,
    stored_state,
    tiny_hf,
    tiny_model,
    within_budget,
)
from torch import Tensor

from dynskip import LayerPath, OPTForCausalLM
from dynskip.models.linear import Linear

LENGTHS = [7, 1, 12, 4]
PATHS = [
    LayerPath.of(NUM_LAYERS, [1, 2, 5]),
    LayerPath.full(NUM_LAYERS),
    LayerPath.of(NUM_LAYERS, [], allow_empty=True),
    LayerPath.of(NUM_LAYERS, [0]),
]


@torch.no_grad()
def hf_logits(hf_model: Any, input_ids: Tensor, attention_mask: Tensor, paths: list[LayerPath]) -> Tensor:
    """[B, T, V] of transformers' model cut to each sequence's path, zero at padding."""
    rows = [
        cut(hf_model, path)(input_ids[seq : seq + 1], attention_mask=attention_mask[seq : seq + 1]).logits[0]
        for seq, path in enumerate(paths)
    ]
    return torch.stack(rows) * attention_mask[:, :, None]


@pytest.mark.parametrize(
    ("side", "paths"), [("left", None), ("right", None), ("left", PATHS)], ids=["full-left", "full-right", "paths-left"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(variant: str, side: str, paths: list[LayerPath] | None) -> None:
    hf_model = tiny_hf(variant)
    input_ids, attention_mask = ragged_batch(LENGTHS, side)
    all_paths = paths or [LayerPath.full(NUM_LAYERS)] * len(LENGTHS)
    eager = hf_logits(hf_model, input_ids, attention_mask, all_paths)
    exact = hf_logits(copy.deepcopy(hf_model).double(), input_ids, attention_mask, all_paths)
    model = OPTForCausalLM.from_hf(hf_model, backend="torch")
    logits = model(input_ids, attention_mask, paths=paths).logits
    assert logits.dtype == torch.float32 and logits.shape == exact.shape
    within_budget(logits, eager, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_is_as_good_as_eager(variant: str, dtype: torch.dtype) -> None:
    hf_model = tiny_hf(variant, dtype=dtype)
    input_ids, attention_mask = ragged_batch(LENGTHS, "left")
    eager = hf_logits(hf_model, input_ids, attention_mask, PATHS)
    exact = hf_logits(copy.deepcopy(hf_model).double(), input_ids, attention_mask, PATHS)
    model = OPTForCausalLM.from_hf(hf_model, backend="torch")
    logits = model(input_ids, attention_mask, paths=PATHS).logits
    assert logits.dtype == dtype
    within_budget(logits, eager, exact)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("variant", ["pre-norm", "post-norm-projected", "no-affine"])
def test_other_backends_give_the_same_logits(variant: str, backend: str) -> None:
    hf_model = tiny_hf(variant)
    input_ids, attention_mask = ragged_batch([3, 1, 5], "right")
    eager = hf_logits(hf_model, input_ids, attention_mask, PATHS[:3])
    exact = hf_logits(copy.deepcopy(hf_model).double(), input_ids, attention_mask, PATHS[:3])
    model = OPTForCausalLM.from_hf(hf_model, backend=cpu_backend(backend))
    within_budget(model(input_ids, attention_mask, paths=PATHS[:3]).logits, eager, exact)


@pytest.mark.parametrize("executor", ["compact", "reference"])
@pytest.mark.parametrize("variant", ["pre-norm", "post-norm-projected", "no-final-norm"])
def test_hidden_states_are_those_of_transformers(variant: str, executor: str) -> None:
    hf_model = tiny_hf(variant)
    input_ids, attention_mask = ragged_batch(LENGTHS, "left")
    with torch.no_grad():
        expected = hf_model(input_ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states
        model = OPTForCausalLM.from_hf(hf_model, backend="torch")
        states = model(input_ids, attention_mask, output_hidden_states=True, executor=executor).hidden_states
    assert len(states) == len(expected) == NUM_LAYERS + 1
    kept = attention_mask.bool()
    for state, wanted in zip(states, expected, strict=True):
        assert state.shape == wanted.shape
        torch.testing.assert_close(state[kept], wanted[kept])
        assert not state[~kept].any()


def test_a_skipped_layer_passes_its_input_on() -> None:
    model = tiny_model()
    input_ids, _ = ragged_batch([5], "left")
    path = LayerPath.of(NUM_LAYERS, [1, 4])
    states = model(input_ids, paths=path, output_hidden_states=True).hidden_states
    changed = [not torch.equal(states[layer], states[layer + 1]) for layer in range(NUM_LAYERS - 1)]
    assert changed == [layer in path.layers for layer in range(NUM_LAYERS - 1)]


def test_hidden_states_only_where_asked_for() -> None:
    input_ids, _ = ragged_batch([5], "left")
    assert tiny_model()(input_ids).hidden_states is None


def test_padding_may_stand_inside() -> None:
    hf_model = tiny_hf()
    input_ids, _ = ragged_batch([6, 6], "left")
    attention_mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]])
    expected = hf_logits(hf_model, input_ids, attention_mask, [LayerPath.full(NUM_LAYERS)] * 2)
    logits = OPTForCausalLM.from_hf(hf_model, backend="torch")(input_ids, attention_mask).logits
    torch.testing.assert_close(logits, expected)


def test_tokens_under_padding_are_never_looked_at() -> None:
    model = tiny_model(deterministic=True)
    input_ids, attention_mask = ragged_batch(LENGTHS, "left")
    other = input_ids.masked_fill(attention_mask == 0, -7)
    assert torch.equal(model(input_ids, attention_mask).logits, model(other, attention_mask).logits)


def test_every_form_of_paths_means_the_same() -> None:
    model = tiny_model(deterministic=True)
    input_ids, attention_mask = ragged_batch(LENGTHS, "right")
    paths = [LayerPath.of(NUM_LAYERS, layers) for layers in ([0, 3], [1], [2, 3, 4], [5])]
    expected = model(input_ids, attention_mask, paths=paths).logits
    assert torch.equal(model(input_ids, attention_mask, paths=tuple(paths)).logits, expected)
    mask = torch.stack([path.mask for path in paths])
    assert torch.equal(model(input_ids, attention_mask, paths=mask).logits, expected)
    per_token = mask[:, None, :].expand(-1, input_ids.shape[1], -1)
    assert torch.equal(model(input_ids, attention_mask, paths=per_token, kv_policy="evict").logits, expected)
    # No row that runs a layer has a predecessor that skipped it: nothing to propagate or to share either.
    assert torch.equal(model(input_ids, attention_mask, paths=per_token).logits, expected)
    full = model(input_ids, attention_mask).logits
    assert torch.equal(model(input_ids, attention_mask, paths=LayerPath.full(NUM_LAYERS)).logits, full)


@pytest.mark.parametrize("kv_policy", ["propagate", "evict", "share"])
def test_per_token_masks_follow_their_tokens_through_padding(kv_policy: str) -> None:
    model = tiny_model(deterministic=True)
    results = []
    for side in ("left", "right"):
        input_ids, attention_mask = ragged_batch(LENGTHS, side)
        # The mask of a token is drawn from the token, so that both paddings carry the same one.
        layers = (input_ids[:, :, None] * torch.arange(3, 3 + NUM_LAYERS)) % 7 < 3
        logits = model(input_ids, attention_mask, paths=layers, kv_policy=kv_policy).logits
        results.append([row[kept.bool()] for row, kept in zip(logits, attention_mask, strict=True)])
        tokens = [row[kept.bool()] for row, kept in zip(input_ids, attention_mask, strict=True)]
        results.append(tokens)
    (left, left_tokens, right, right_tokens) = results
    # The batches differ where the sides do, so compare sequence by sequence with each sequence alone.
    for tokens, rows in ((left_tokens, left), (right_tokens, right)):
        for ids, row in zip(tokens, rows, strict=True):
            mask = ((ids[:, None] * torch.arange(3, 3 + NUM_LAYERS)) % 7 < 3)[None]
            assert torch.equal(model(ids[None], paths=mask, kv_policy=kv_policy).logits[0], row)


def test_propagate_runs_attention_over_every_token() -> None:
    """One layer, the first token skips it: the second still attends to it, as in transformers' layer."""
    hf_model = tiny_hf(num_hidden_layers=1)
    model = OPTForCausalLM.from_hf(hf_model, backend="torch")
    input_ids, _ = ragged_batch([2], "left")
    mask = torch.tensor([[[False], [True]]])
    with torch.no_grad():
        full = hf_model(input_ids).logits[0]
        alone = hf_model(input_ids[:, :1])
        assert alone is not None
    propagated = model(input_ids, paths=mask, kv_policy="propagate").logits[0]
    torch.testing.assert_close(propagated[1], full[1])
    evicted = model(input_ids, paths=mask, kv_policy="evict").logits[0]
    assert not torch.allclose(evicted[1], full[1], atol=1e-2)
    # The token that skips the only layer goes from the embedding to the head.
    with torch.no_grad():
        none = cut(hf_model, LayerPath.of(1, [], allow_empty=True))(input_ids).logits[0]
    torch.testing.assert_close(propagated[0], none[0])


def test_the_model_is_in_eval_mode_and_frozen() -> None:
    model = tiny_model()
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_pack_and_unpack_keep_every_bit() -> None:
    hf_model = tiny_hf()
    packed = OPTForCausalLM.from_hf(hf_model, backend="torch")
    dense = OPTForCausalLM.from_hf(hf_model, backend="torch", pack=False)
    for name, weight in dense.state_dict().items():
        assert torch.equal(packed.state_dict()[name], weight), name
    packed.unpack_()
    assert packed.lm_head.weight is packed.decoder.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in packed.parameters())
    state = stored_state(packed)
    assert state.keys() == hf_model.state_dict().keys()
    for name, weight in hf_model.named_parameters():
        assert torch.equal(state[name], weight), name


def test_properties() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    assert (model.num_layers, model.dtype, model.device) == (NUM_LAYERS, torch.bfloat16, torch.device("cpu"))
    assert model.backend.name == "torch"


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_only_the_native_backend_multiplies_by_its_own_code(backend: str) -> None:
    model = OPTForCausalLM.from_hf(tiny_hf(dtype=torch.bfloat16), backend=cpu_backend(backend))
    expected = Linear.of(torch.randn(16, 16).to(torch.bfloat16)).pack_(use_native=backend == "native").native_rows
    assert {m.native_rows for m in model.modules() if isinstance(m, Linear)} == {expected}
    again = model.unpack_().pack_()
    assert {m.native_rows for m in again.modules() if isinstance(m, Linear)} == {expected}
    assert copy.deepcopy(model).lm_head.native_rows == expected
