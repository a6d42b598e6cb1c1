"""Tiny random OPT models of every variant, and transformers' model cut to a path."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import OPTConfig, PreTrainedTokenizerFast
from transformers import OPTForCausalLM as HFOPTForCausalLM

from dynskip import CausalLM, LayerPath, OPTForCausalLM
from dynskip.models.registry import get_architecture
from dynskip.models.weights import to_stored
from dynskip.ops.backends import available_backends

NUM_LAYERS = 6
VOCAB_SIZE = 101
# Every way in which the config of an OPT model changes what is computed.
VARIANTS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "post-norm-projected": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "post-norm": {"do_layer_norm_before": False},
    "pre-norm-projected": {"word_embed_proj_dim": 16},
    "no-bias": {"enable_bias": False},
    "no-affine": {"layer_norm_elementwise_affine": False},
    "no-bias-no-affine": {"enable_bias": False, "layer_norm_elementwise_affine": False},
    "post-norm-no-affine": {"do_layer_norm_before": False, "layer_norm_elementwise_affine": False},
    "untied": {"tie_word_embeddings": False},
    "gelu": {"activation_function": "gelu"},
    "no-final-norm": {"_remove_final_layer_norm": True},
}


def tiny_config(**changes: Any) -> OPTConfig:
    """A config of 6 layers, hidden size 32, two heads of 16."""
    options = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    }
    return OPTConfig(**{**options, **changes})


def stored_state(model: CausalLM) -> dict[str, Tensor]:
    """The weights of ``model`` by transformers' names, a tied head among them."""
    architecture = get_architecture(model.config.model_type)
    return dict(to_stored(architecture, model.decoder_config, model.state_dict()))


def tiny_hf(variant: str = "pre-norm", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """transformers' model of a variant, with every weight random: no bias is zero, no LayerNorm is the identity."""
    torch.manual_seed(seed)
    model = HFOPTForCausalLM(tiny_config(**VARIANTS[variant], **changes))
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.LayerNorm):
                    parameter.normal_(1.0 if name == "weight" else 0.0, 0.2)
                elif module is model.model.decoder.embed_positions:
                    parameter.normal_()  # strong positions: greedy texts do not repeat one token, a wrong place shows
                else:
                    # Such weights keep the residual stream and every layer's share in it near one.
                    parameter.normal_(0.0, parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.2)
    return model.to(dtype).eval()


def tiny_model(variant: str = "pre-norm", seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Our model with the weights of ``tiny_hf``; options as in OPTForCausalLM.from_hf."""
    return OPTForCausalLM.from_hf(tiny_hf(variant, seed, dtype), **{"backend": "torch", **options})


def cut(hf_model: Any, path: LayerPath) -> Any:
    """A copy of transformers' model whose ``layers`` hold only those of ``path``."""
    model = copy.deepcopy(hf_model)
    layers = [model.model.decoder.layers[layer] for layer in path.layers]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index  # its cache counts the layers that are there
    model.model.decoder.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    return model


def within_budget(actual: Tensor, eager: Tensor, exact: Tensor, num_layers: int = NUM_LAYERS, times: float = 2) -> None:
    """The error of ``actual`` is at most twice that of eager PyTorch in the same dtype, both against ``exact``.

    Where eager happens to err less than the roundings that no order of sums avoids, those are the bound: one of the
    residual stream for each of a layer's two parts, one of the embedding and one of the head, in units in the last
    place of the largest value. exact: the same in a wider dtype. times: for twice.
    """
    wide = exact.double()
    ulp = torch.finfo(actual.dtype).eps * wide.abs().max()
    error, allowed = (actual.double() - wide).abs().max(), times * (eager.double() - wide).abs().max()
    # Half precision rounds everything it stores, eager too, so that twice its error is bound enough.
    num_roundings = 2 * num_layers + 2 if actual.dtype == torch.float32 else 2
    floor = num_roundings * ulp
    assert error <= torch.maximum(allowed, floor), f"error {error:.3g}, allowed {allowed:.3g}, floor {floor:.3g}"


def ragged_batch(lengths: list[int], side: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, each [B, T]: random tokens, padded on the ``left`` or ``right``."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    input_ids = torch.randint(4, VOCAB_SIZE, (len(lengths), longest), generator=generator)
    places = torch.arange(longest)
    starts = torch.tensor([longest - length if side == "left" else 0 for length in lengths])[:, None]
    attention_mask = (places >= starts) & (places < starts + torch.tensor(lengths)[:, None])
    return input_ids.masked_fill(~attention_mask, 1), attention_mask.long()


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random token ids, one list of each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def cpu_backend(name: str) -> str:
    """``name``, or a skip that says why this machine lacks the backend."""
    reason = available_backends("cpu")[name]
    if reason is not None:
        pytest.skip(f"no {name} backend: {reason}")
    return name


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 101 whole words: token 7 is ``w007``; 1 is padding, 2 the end of a sequence."""
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, **{f"w{token:03}": token for token in range(4, VOCAB_SIZE)}}
    tokenizer = tokenizers.Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
