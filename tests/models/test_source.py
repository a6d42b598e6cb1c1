"""Models of transformers: every part of one is read, or the model is refused by the name of the part."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INPUT_IDS, PEFT_WARNS, check_untied, logits, other_head, same_logits
from models import stored_state, tiny_config, tiny_hf
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from dynskip import OPTForCausalLM
from dynskip.models.source import Source
from dynskip.models.weights import HEAD


def layer(hf_model: Any, index: int = 1) -> Any:
    return hf_model.model.decoder.layers[index]


# What makes a model another than plain OPT of its config.


class DoubledLinear(nn.Linear):
    """A Linear by its class, and another by what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class WrappedTensor(Tensor):
    """A tensor by its class, as quantised and distributed weights are."""


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def biased_head(hf_model: Any) -> None:
    hf_model.lm_head = nn.Linear(32, hf_model.config.vocab_size)


def subclass(hf_model: Any) -> None:
    layer(hf_model).fc1.__class__ = DoubledLinear


def adapted(hf_model: Any) -> None:
    import peft

    peft.get_peft_model(hf_model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))


def fewer_layers(hf_model: Any) -> None:
    del hf_model.model.decoder.layers[2]


def more_layers(hf_model: Any) -> None:
    hf_model.model.decoder.layers.append(copy.deepcopy(layer(hf_model)))


def own_forward(hf_model: Any) -> None:
    plain = layer(hf_model).fc2.forward
    layer(hf_model).fc2.forward = lambda x: 2 * plain(x)


def offloaded(hf_model: Any) -> None:
    import accelerate

    accelerate.cpu_offload(hf_model, execution_device="cpu")


def in_integers(hf_model: Any) -> None:
    weight = layer(hf_model).fc1.weight
    layer(hf_model).fc1.weight = nn.Parameter((weight * 100).to(torch.int8), requires_grad=False)


def in_float8(hf_model: Any) -> None:
    layer(hf_model).fc1.weight = nn.Parameter(layer(hf_model).fc1.weight.to(torch.float8_e4m3fn), requires_grad=False)


def wrapped_tensor(hf_model: Any) -> None:
    weight = layer(hf_model).fc1.weight.detach()
    layer(hf_model).fc1._parameters["weight"] = weight.as_subclass(WrappedTensor)


ODD_MODELS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a head with a bias": (biased_head, "must hold the weights of its config only, got 1 more, such as lm_head.bias"),
    "a parameter more": (
        lambda m: layer(m).register_parameter("gate", nn.Parameter(torch.ones(1))),
        "got 1 more, such as model.decoder.layers.1.gate",
    ),
    "a buffer more": (
        lambda m: layer(m).fc1.register_buffer("scales", torch.ones(64)),
        "got 1 more, such as model.decoder.layers.1.fc1.scales",
    ),
    "a buffer that is not saved": (
        lambda m: m.model.register_buffer("steering", torch.ones(32), persistent=False),
        "got 1 more, such as model.steering",
    ),
    "no bias where the config has one": (
        lambda m: layer(m).fc1.register_parameter("bias", None),
        "must hold every weight of its config, got 1 missing, such as model.decoder.layers.1.fc1.bias",
    ),
    "another size": (
        lambda m: setattr(layer(m), "fc1", nn.Linear(32, 48)),
        r"model.decoder.layers.1.fc1.bias of the model must have the shape \[64\] of its config, got \[48\]",
    ),
    "a layer deleted": (fewer_layers, r"got no model.decoder.layers.5, .*OPTDecoderLayer\. .* num_hidden_layers"),
    "a layer more": (more_layers, "must have the modules of its config only, got model.decoder.layers.6, "),
    "LoRA inside": (
        adapted,
        r"layers.0.self_attn.q_proj must be a plain torch.nn.modules.linear.Linear, got peft.tuners.lora.layer.Linear",
    ),
    "a subclass": (subclass, "layers.1.fc1 must be a plain torch.nn.modules.linear.Linear, got .*DoubledLinear"),
    "a module in between": (
        lambda m: setattr(layer(m), "fc1", nn.Sequential(layer(m).fc1, Doubled())),
        r"layers.1.fc1 must be a plain .*Linear, got torch.nn.modules.container.Sequential",
    ),
    "another activation": (
        lambda m: setattr(layer(m), "activation_fn", nn.Tanh()),
        "layers.1.activation_fn must be a plain .*ReLU, got .*Tanh",
    ),
    "a parametrization": (
        lambda m: parametrize.register_parametrization(layer(m).fc1, "weight", Doubled()),
        "layers.1.fc1 must be a plain .*Linear, got .*ParametrizedLinear.* remove parametrizations",
    ),
    "pruning": (
        lambda m: prune.l1_unstructured(layer(m).fc1, "weight", amount=0.5),
        "layers.1.fc1 must have no forward hook, got torch.nn.utils.prune.L1Unstructured",
    ),
    "a forward hook": (
        lambda m: layer(m).register_forward_hook(lambda module, args, output: 2 * output),
        "layers.1 must have no forward hook, got .*test_source.*lambda.*Remove it",
    ),
    "a forward pre-hook on the model": (
        lambda m: m.register_forward_pre_hook(lambda module, args: args),
        "from_hf: the model must have no forward hook",
    ),
    "a forward of its own": (own_forward, "layers.1.fc2 must have the forward of its class, got .*own_forward"),
    "offloaded": (offloaded, "must have no forward hook, got accelerate.hooks.AlignDevicesHook. Remove it"),
    "on meta": (
        lambda m: layer(m).fc1.to("meta"),
        "model.decoder.layers.1.fc1.bias of the model must be in memory, got a tensor on meta",
    ),
    "all on meta": (lambda m: m.to("meta"), "must be in memory, got a tensor on meta: offloaded, or never loaded"),
    "integers": (in_integers, "layers.1.fc1.weight of the model must be float32, .* got int8. Quantised weights"),
    "float8": (in_float8, "layers.1.fc1.weight of the model must be float32, .* got float8_e4m3fn"),
    "a tensor of another class": (
        wrapped_tensor,
        "layers.1.fc1.weight .* must be a plain tensor, got .*test_source.Wrap",
    ),
    "two dtypes": (
        lambda m: layer(m).fc1.bfloat16(),
        "layers.1.fc1.bias of the model must be float32 like the embedding, got bfloat16",
    ),
    "another epsilon": (
        lambda m: setattr(layer(m).final_layer_norm, "eps", 0.1),
        "layers.1.final_layer_norm must have eps 1e-05 as its config says, got 0.1",
    ),
    "another scale": (
        lambda m: setattr(layer(m).self_attn, "scaling", 1.0),
        "layers.1.self_attn must have scaling 0.25 as its config says, got 1.0",
    ),
    "a quantised config": (
        lambda m: setattr(m.config, "quantization_config", {"bits": 4}),
        r"config of the model must describe a plain model, got quantization_config {'bits': 4}",
    ),
    "ends that are no tokens": (
        lambda m: setattr(m.generation_config, "eos_token_id", [2, "</s>"]),
        "eos_token_id in generation_config must be a token id or a list of them",
    ),
}


@PEFT_WARNS
@pytest.mark.parametrize("oddity", ODD_MODELS)
def test_a_model_that_is_no_plain_opt(oddity: str) -> None:
    change, message = ODD_MODELS[oddity]
    hf_model = tiny_hf("untied")
    change(hf_model)
    with pytest.raises(ValueError, match=message) as caught:
        OPTForCausalLM.from_hf(hf_model)
    assert str(caught.value).startswith("from_hf: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", ["num_attention_heads", "hidden_size", "ffn_dim", "vocab_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [0, -2])
def test_impossible_sizes(size: str, value: int) -> None:
    config = tiny_config()
    setattr(config, size, value)
    with pytest.raises(ValueError, match=f"{size} must be an integer of at least 1, got {value}"):
        OPTForCausalLM(config)
    hf_model = tiny_hf()
    setattr(hf_model.config, size, value)
    with pytest.raises(ValueError, match=f"{size} must be an integer of at least 1, got {value}"):
        OPTForCausalLM.from_hf(hf_model)


@PEFT_WARNS
def test_a_model_with_an_adapter_is_refused_until_it_is_merged() -> None:
    import peft

    plain = tiny_hf()
    options = {"target_modules": ["q_proj", "fc2"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**options)).eval()
    with pytest.raises(
        TypeError, match=r"got PeftModelForCausalLM\. Merge its adapter with merge_and_unload\(\) first"
    ):
        OPTForCausalLM.from_hf(wrapped)
    merged = wrapped.merge_and_unload()
    assert not torch.allclose(logits(merged), logits(plain))
    same_logits(OPTForCausalLM.from_hf(merged, backend="torch"), merged)


def test_what_changes_no_output_is_no_obstacle() -> None:
    import accelerate

    hf_model = tiny_hf()
    before = logits(hf_model)
    hf_model(INPUT_IDS, output_hidden_states=True, output_attentions=True)  # leaves hooks of transformers' own
    assert any(module._forward_hooks for module in hf_model.modules())
    accelerate.hooks.attach_align_device_hook(hf_model, execution_device="cpu")
    accelerate.hooks.remove_hook_from_submodules(hf_model)  # leaves a forward in each module: that of its class
    hf_model.register_full_backward_hook(lambda module, inputs, outputs: None)
    hf_model.train()
    model = OPTForCausalLM.from_hf(hf_model, backend="torch")
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["pre-norm", "untied", "post-norm-projected", "no-bias-no-affine"])
def test_each_tensor_is_needed_and_none_is_unknown(variant: str) -> None:
    hf_model = tiny_hf(variant, num_hidden_layers=2)
    tensors = dict(hf_model.named_parameters(remove_duplicate=False))
    tied = hf_model.config.tie_word_embeddings
    source = Source.of("f", "it", copy.deepcopy(hf_model.config), tensors)
    assert source.tensors.keys() == tensors.keys() - ({HEAD} if tied else set())
    for name in source.tensors:
        rest = {key: tensor for key, tensor in source.tensors.items() if key != name}
        with pytest.raises(
            ValueError, match=f"^f: it must hold every weight of its config, got 1 missing, such as {name}"
        ):
            Source.of("f", "it", copy.deepcopy(hf_model.config), rest)
        with pytest.raises(ValueError, match=f"^f: it must hold .* config only, got 1 more, such as {name}_scale"):
            Source.of("f", "it", copy.deepcopy(hf_model.config), {**tensors, f"{name}_scale": torch.ones(1)})
    state = stored_state(OPTForCausalLM.from_hf(hf_model, backend="torch"))
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("variant", ["pre-norm", "post-norm-projected"])
def test_a_head_of_its_own_in_a_tied_model(variant: str, tmp_path: Path) -> None:
    hf_model = tiny_hf(variant)
    hf_model.lm_head.weight = nn.Parameter(other_head(hf_model))
    check_untied(OPTForCausalLM.from_hf(hf_model, backend="torch"), hf_model, tmp_path)
    assert hf_model.config.tie_word_embeddings is True, "the argument is not altered"
