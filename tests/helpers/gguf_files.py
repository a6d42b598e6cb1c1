"""Tiny random models of the architectures that are read of GGUF files, and what llama.cpp's converter makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

_CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_model(architecture: str, **changes: Any) -> Any:
    """transformers' model of two layers: four heads of 32 over two of keys, every weight random."""
    config_class, model_class = _CLASSES[architecture]
    values = {
        "vocab_size": 71,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "tie_word_embeddings": False,
    }
    if architecture == "qwen2":
        del values["head_dim"]
    torch.manual_seed(0)
    model: Any = model_class(config_class(**{**values, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model.eval()


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of transformers' model as the converter stores them: the format's names and order of heads."""
    config, stored = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, kind = name.rsplit(".", 1)
        layer, prefix = module.removeprefix("model.layers.").partition(".")[::2], ""
        if module.startswith("model.layers."):
            prefix, module = f"blk.{layer[0]}.", layer[1]
        if config.model_type == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        stored[f"{prefix}{_NAMES[module]}.{kind}"] = tensor
    return stored


def metadata(model: Any) -> dict[str, Any]:
    """What the converter says of transformers' model, tokenizer apart."""
    config, name = model.config, model.config.model_type
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if name == "llama":
        values["rope.dimension_count"] = head_dim
    ends = {"bos": config.bos_token_id, "eos": config.eos_token_id, "padding": config.pad_token_id}
    return {
        **{f"{name}.{key}": value for key, value in values.items()},
        **{f"tokenizer.ggml.{key}_token_id": token for key, token in ends.items()},
    }


def write_gguf(
    path: Path,
    architecture: str,
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kind: str = "F32",
    raw: Mapping[str, tuple[Any, str]] | None = None,
) -> Path:
    """A GGUF file of metadata and tensors. kind: of matrices; vectors are F32. raw: bytes of tensors and their kinds.

    A value of None leaves its key out.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        _add(writer, key, value)
    for name, tensor in tensors.items():
        quant = gguf.GGMLQuantizationType[kind if tensor.dim() == 2 else "F32"]
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), quant), raw_dtype=quant)
    for name, (data, raw_kind) in (raw or {}).items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[raw_kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path: Path, model: Any, kind: str = "F32", **changes: Any) -> Path:
    """The GGUF file of transformers' model. changes: metadata, two underscores for a dot; None leaves a key out."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return write_gguf(path, model.config.model_type, {**metadata(model), **named}, stored_tensors(model), kind)


def _add(writer: Any, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
