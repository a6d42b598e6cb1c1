"""A model in a GGUF file: its config, and its tensors under transformers' names, dequantised one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynskip.models.gguf_config import EMBEDDING, HEAD, read_config
from dynskip.models.gguf_file import GGUFHeader, StoredTensor, read_header

_ROPE_FACTORS = "rope_freqs.weight"
# transformers' names of a layer's modules, and those of the format.
_LAYER = {
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


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A model in a GGUF file. Made by `read_gguf`.

    architecture: transformers' ``model_type``. config: values of that class of config, ``model_type`` among them.
    tensors: every parameter of transformers' model by its name, none more; a tied head is left out.
    """

    path: Path
    architecture: str
    config: dict[str, Any]
    tensors: GGUFTensors


class GGUFTensors(Mapping[str, Tensor]):
    """The tensors of a GGUF file under transformers' names; each look-up dequantises one anew, from the mapped file."""

    def __init__(self, header: GGUFHeader, config: Mapping[str, Any], stored: dict[str, StoredTensor]) -> None:
        self._data = np.memmap(header.path, dtype=np.uint8, mode="r")
        self._stored = stored
        # The format keeps the halves of a Llama head's rotation interleaved.
        is_interleaved = config["model_type"] == "llama"
        self._num_heads = {
            "q_proj": config["num_attention_heads"] if is_interleaved else 0,
            "k_proj": config["num_key_value_heads"] if is_interleaved else 0,
        }

    def __getitem__(self, name: str) -> Tensor:
        """A new tensor, float32, contiguous."""
        tensor = _dequantise(self._data, self._stored[name])
        num_heads = self._num_heads.get(name.split(".")[-2], 0)
        if num_heads:
            # [H, D/2, 2, ...] to [H, 2, D/2, ...]: neighbours rotate together there, halves here.
            paired = tensor.view(num_heads, -1, 2, *tensor.shape[1:])
            tensor = paired.transpose(1, 2).reshape(tensor.shape)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor, without reading it."""
        return torch.Size(self._stored[name].shape)


def read_gguf(path: str | Path, function: str) -> GGUFFile:
    """The model in the GGUF file at ``path``, of architecture llama, qwen2 or qwen3; its tensors are not yet read.

    Raises ImportError without the package gguf, FileNotFoundError, and ValueError for a file that is cut or damaged, or
    holds another architecture, an unknown quantisation, or tensors that are not those of its config. All begin with
    ``function``.
    """
    try:
        import gguf  # noqa: F401  # only to say what is missing before the file is read
    except ImportError as error:
        raise ImportError(
            f"{function}: a GGUF file must be read with the package gguf, got none. Use pip install 'dynskip[gguf]'."
        ) from error
    header = read_header(path, function)
    _check_stored(header)
    factors = None
    if _ROPE_FACTORS in header.tensors:
        data = np.memmap(header.path, dtype=np.uint8, mode="r")
        factors = _dequantise(data, header.tensors[_ROPE_FACTORS]).flatten().tolist()
    config = read_config(header, factors)
    tensors = GGUFTensors(header, config, _named(header, config))
    return GGUFFile(header.path, config["model_type"], config, tensors)


def _check_stored(header: GGUFHeader) -> None:
    """Raise ValueError where a tensor is of a type that cannot be dequantised, or does not lie within the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    known: set[int] = set()
    for name, tensor in header.tensors.items():
        what = f"{header.function}: {name} of {header.path}"
        if tensor.kind not in known:
            try:
                kind = GGMLQuantizationType(tensor.kind)
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except (ValueError, NotImplementedError) as error:
                raise ValueError(f"{what} must be of a type that gguf dequantises, got: {error}.") from error
            known.add(tensor.kind)
        block, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
        if not tensor.shape or 0 in tensor.shape or tensor.shape[-1] % block:
            raise ValueError(f"{what} must have rows of a multiple of {block} values, got {list(tensor.shape)}.")
        end = tensor.offset + math.prod(tensor.shape) // block * num_bytes
        if end > header.size:
            raise ValueError(
                f"{what} must lie within the file, got one up to byte {end} of {header.size}. Download it again."
            )


def _dequantise(data: np.ndarray[Any, np.dtype[np.uint8]], stored: StoredTensor) -> Tensor:
    """A new tensor, float32, of a stored one that `_check_stored` has passed."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(stored.kind)
    block, num_bytes = GGML_QUANT_SIZES[kind]
    row_bytes = stored.shape[-1] // block * num_bytes
    rows = math.prod(stored.shape[:-1])
    raw = np.asarray(data)[stored.offset : stored.offset + rows * row_bytes].reshape(rows, row_bytes)
    # Scales of a damaged file overflow without a word: what loads a model refuses numbers that are not finite.
    with np.errstate(over="ignore", invalid="ignore"):
        values = dequantize(raw, kind)
    if not values.flags.writeable or np.may_share_memory(values, raw):  # of float32 it is a view of the file
        values = values.copy()
    return torch.from_numpy(values).view(stored.shape)


def _named(header: GGUFHeader, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The file's tensors by transformers' names. Raises ValueError unless they are those of the config."""
    shapes = _shapes(config)
    for stored, (_, shape) in shapes.items():
        if stored not in header.tensors:
            raise header.error(f"hold every tensor of its config, got no {stored}.")
        found = header.tensors[stored].shape
        if found != shape:
            raise header.error(f"hold {stored} in the shape {list(shape)} of its config, got {list(found)}.")
    unknown = sorted(header.tensors.keys() - shapes.keys() - {_ROPE_FACTORS})
    if unknown:
        raise header.error(f"hold the tensors of its config only, got {len(unknown)} more, such as {unknown[0]}.")
    return {name: header.tensors[stored] for stored, (name, _) in shapes.items()}


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """transformers' name and the shape of each tensor of a config, by its name in the format."""
    hidden, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    matrices = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    vectors = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    biased: tuple[str, ...] = ()
    if config["model_type"] == "qwen3":
        vectors |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    if config["attention_bias"]:
        # Qwen2 has none on the way out.
        biased = tuple(matrices)[: 3 if config["model_type"] == "qwen2" else 4]
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        EMBEDDING: ("model.embed_tokens.weight", (config["vocab_size"], hidden)),
        "output_norm.weight": ("model.norm.weight", (hidden,)),
    }
    if not config["tie_word_embeddings"]:
        shapes[HEAD] = ("lm_head.weight", (config["vocab_size"], hidden))
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for name, matrix in matrices.items():
            shapes[f"{theirs}.{_LAYER[name]}.weight"] = (f"{ours}.{name}.weight", matrix)
        for name, size in vectors.items():
            shapes[f"{theirs}.{_LAYER[name]}.weight"] = (f"{ours}.{name}.weight", (size,))
        for name in biased:
            shapes[f"{theirs}.{_LAYER[name]}.bias"] = (f"{ours}.{name}.bias", matrices[name][:1])
    return shapes
