"""Loading, converting and saving: what comes back, what is held in memory meanwhile, and what is left untouched."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PEFT_WARNS
from families import family_hf
from gguf_files import write_model
from models import NUM_LAYERS, VARIANTS, ragged_batch, stored_state, tiny_hf
from safetensors.torch import load_file
from transformers import OPTForCausalLM as HFOPTForCausalLM

from dynskip import CausalLM, LayerPath, OPTForCausalLM
from dynskip.models.linear import Linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert weight.dtype == other[name].dtype and torch.equal(weight, other[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load_through_transformers_and_back(variant: str, tmp_path: Path) -> None:
    hf_model = tiny_hf(variant)
    model = OPTForCausalLM.from_hf(hf_model, backend="torch")
    model.save_pretrained(tmp_path)
    input_ids, attention_mask = ragged_batch([5, 3], "left")
    # transformers reads what was saved ...
    loaded = HFOPTForCausalLM.from_pretrained(tmp_path)
    same_state(dict(loaded.named_parameters()), dict(hf_model.named_parameters()))
    with torch.no_grad():
        expected = hf_model(input_ids, attention_mask=attention_mask).logits
        assert torch.equal(loaded.eval()(input_ids, attention_mask=attention_mask).logits, expected)
    # ... and so does this package, packed weights included.
    again = OPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, backend="torch")
    same_state(again.state_dict(), model.state_dict())
    assert torch.equal(again(input_ids, attention_mask).logits, model(input_ids, attention_mask).logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_round_trip_keeps_every_bit_of_packed_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    hf_model = tiny_hf(dtype=dtype)
    model = OPTForCausalLM.from_hf(hf_model, backend="torch")
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    assert all(linear.packed or linear.packing_obstacle is not None for linear in linears)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    again = OPTForCausalLM.from_pretrained(tmp_path, dtype=dtype, backend="torch")
    assert again.dtype == dtype
    state = stored_state(again)
    for name, weight in hf_model.state_dict().items():
        assert torch.equal(state[name], weight), name


def test_loading_in_another_dtype_rounds_once(tmp_path: Path) -> None:
    hf_model = tiny_hf()
    hf_model.save_pretrained(tmp_path)
    model = OPTForCausalLM.from_pretrained(tmp_path, backend="torch")
    assert model.dtype == torch.bfloat16, "the default"
    for name, weight in hf_model.state_dict().items():
        assert torch.equal(stored_state(model)[name], weight.bfloat16()), name


def test_sharded_checkpoints(tmp_path: Path) -> None:
    hf_model = tiny_hf("post-norm-projected")
    hf_model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model = OPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, backend="torch")
    for name, weight in hf_model.state_dict().items():
        assert torch.equal(stored_state(model)[name], weight), name


def test_a_path_object_or_its_text_name_the_directory(tmp_path: Path) -> None:
    tiny_hf().save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path)):
        assert OPTForCausalLM.from_pretrained(source, backend="torch").num_layers == NUM_LAYERS


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("variant", ["pre-norm", "untied", "post-norm-projected"])
def test_from_hf_never_alters_its_argument(variant: str, pack: bool) -> None:
    hf_model = tiny_hf(variant)
    before = copy.deepcopy(hf_model)
    model = OPTForCausalLM.from_hf(hf_model, backend="torch", pack=pack)
    model.unpack_()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    same_state(hf_model.state_dict(), before.state_dict())
    assert hf_model.config.to_dict() == before.config.to_dict()
    assert all(parameter.requires_grad for parameter in hf_model.parameters())
    assert hf_model.model.decoder.embed_tokens.weight is hf_model.get_input_embeddings().weight


def test_from_hf_shares_no_config() -> None:
    hf_model = tiny_hf()
    model = OPTForCausalLM.from_hf(hf_model, backend="torch")
    model.config.eos_token_id = 77
    assert hf_model.config.eos_token_id != 77


def live_bytes() -> int:
    """Bytes of all dense CPU tensors that Python still holds; tensors that share memory count once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu" and not thing.is_mkldnn:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


OF_OPT = {"ffn_dim": 256, "word_embed_proj_dim": 128}


# Matrices as they are, two that become one, three kept as one: whole, by head, and turned; of a folder, of a GGUF file,
# and with an adapter's factors.
@PEFT_WARNS
@pytest.mark.parametrize(
    ("family", "changes", "source"),
    [
        pytest.param("opt", OF_OPT, "folder", id="opt"),
        pytest.param("opt", {**OF_OPT, "tie_word_embeddings": False}, "folder", id="opt-untied"),
        pytest.param("llama", {"intermediate_size": 256}, "folder", id="llama"),
        pytest.param("llama", {"intermediate_size": 256}, "gguf", id="llama-gguf"),
        pytest.param("llama", {"intermediate_size": 256}, "adapter", id="llama-adapter"),
        pytest.param("bloom", {}, "folder", id="bloom"),
        pytest.param("gpt_neox", {"intermediate_size": 256}, "folder", id="gpt_neox"),
        pytest.param("gpt2", {}, "folder", id="gpt2"),
    ],
)
def test_loading_holds_at_most_one_matrix_twice(
    family: str, changes: dict[str, Any], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Large enough that weights, not Python's odds and ends, are counted.
    hf_model = family_hf(family, hidden_size=128, num_hidden_layers=1, **changes)
    place, options, factors = tmp_path, {}, 0
    if source == "gguf":
        pytest.importorskip("gguf", reason="gguf is not installed")
        place = write_model(tmp_path / "model.gguf", hf_model)
    else:
        hf_model.save_pretrained(tmp_path)
    if source == "adapter":
        pytest.importorskip("peft", reason="peft is not installed")
        from adapters import adapted

        adapted(hf_model, tmp_path / "adapter")
        options["adapter"] = tmp_path / "adapter"
        factors = sum(x.nbytes for x in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values())
    total = sum(p.numel() * p.element_size() for p in hf_model.parameters())
    largest = max(p.numel() * p.element_size() for p in hf_model.parameters())
    vocabulary = hf_model.get_output_embeddings().weight.numel() * 4
    is_tied = hf_model.config.tie_word_embeddings
    del hf_model
    gc.collect()
    gc.freeze()  # what is there already is not looked through again, matrix by matrix
    held: list[int] = []
    packed = 0
    pack = Linear.pack_

    def watched(self: Linear, use_native: bool) -> Linear:
        nonlocal packed
        dense = live_bytes()
        pack(self, use_native)
        packed += self.weight_bytes
        # While one matrix is packed, its dense form is still there: count it with what is packed already.
        held.append(dense + packed)
        return self

    monkeypatch.setattr(Linear, "pack_", watched)
    model = CausalLM.from_pretrained(place, dtype=torch.float32, backend="torch", **options)
    assert len(held) == 6 + 1
    # Tied, the head is a packed copy of the embedding, which stays.
    resting = total + (vocabulary if is_tied else 0)
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    matrices = [linear.in_features * linear.out_features * 4 for linear in linears]
    largest = max(largest, *matrices)
    slack = sum(linear.weight_bytes for linear in linears if linear.packed) - sum(matrices)
    assert max(held) <= resting + largest + factors + max(slack, 0), (max(held), resting, largest, slack)
    gc.collect()
    assert live_bytes() + packed == model.memory.weight_bytes


def test_weight_bytes_count_each_weight_once() -> None:
    hf_model = tiny_hf()
    dense_bytes = sum(p.numel() * p.element_size() for p in hf_model.parameters())
    assert OPTForCausalLM.from_hf(hf_model, backend="torch", pack=False).memory.weight_bytes == dense_bytes
    model = OPTForCausalLM.from_hf(hf_model, backend="torch")
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    if not all(linear.packed for linear in linears):
        pytest.skip(f"nothing is packed here: {linears[0].packing_obstacle}")
    head_bytes = model.lm_head.weight_bytes
    # A packed tied head stands beside the embedding; oneDNN may pad what it packs.
    padding = sum(x.weight_bytes - x.in_features * x.out_features * 4 for x in linears if x is not model.lm_head)
    assert model.memory.weight_bytes == dense_bytes + head_bytes + padding


def test_conversion_leaves_no_reference_to_the_source() -> None:
    import weakref

    hf_model = tiny_hf()
    model = OPTForCausalLM.from_hf(hf_model, backend="torch")
    source = weakref.ref(hf_model.model.decoder.layers[0].fc1.weight)
    del hf_model
    gc.collect()
    assert source() is None
    assert model.num_layers == NUM_LAYERS


def test_a_model_cut_to_a_path_can_be_saved_by_hand(tmp_path: Path) -> None:
    """What a user does to ship one path as a model of its own: the weights are plain parameters after unpack_."""
    model = OPTForCausalLM.from_hf(tiny_hf(), backend="torch", deterministic=True)
    input_ids, _ = ragged_batch([6], "left")
    path = LayerPath.of(NUM_LAYERS, [0, 2, 5])
    expected = model(input_ids, paths=path).logits
    model.unpack_()
    decoder: Any = model.decoder
    decoder.layers = torch.nn.ModuleList([decoder.layers[layer] for layer in path.layers])
    model.config.num_hidden_layers = path.budget
    model.save_pretrained(tmp_path)
    short = OPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, backend="torch", deterministic=True)
    assert short.num_layers == 3
    assert torch.equal(short(input_ids).logits, expected)


@pytest.mark.parametrize("variant", ["pre-norm", "no-bias"])
def test_merged_projections_are_saved_copied_and_pickled_apart(variant: str, tmp_path: Path) -> None:
    hf_model = tiny_hf(variant)
    model = OPTForCausalLM.from_hf(hf_model, backend="torch", pack=False)
    for layer in model.decoder.stack():
        weight, bias = layer.merged()
        projections = (layer.q_proj, layer.k_proj, layer.v_proj)
        assert torch.equal(weight, torch.cat([projection.dense_weight() for projection in projections]))
        assert (bias is None) == (variant == "no-bias")
    same_state(stored_state(model), dict(hf_model.state_dict()))
    model.save_pretrained(tmp_path / "saved")
    loaded = HFOPTForCausalLM.from_pretrained(tmp_path / "saved")
    same_state(dict(loaded.named_parameters()), dict(hf_model.named_parameters()))
    torch.save(model, tmp_path / "pickled")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "pickled", weights_only=False)):
        same_state(other.state_dict(), model.state_dict())
        weight = other.decoder.stack()[0].q_proj.dense_weight()
        assert weight.untyped_storage().nbytes() == weight.nbytes
        assert other.lm_head.weight is other.decoder.embed_tokens.weight
    with pytest.raises(RuntimeError, match="merge: linears must be dense"):
        OPTForCausalLM.from_hf(hf_model, backend="torch").decoder.stack()[0].merged()
