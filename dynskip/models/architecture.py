"""`Architecture`: what is one architecture's own, as data: how its config reads, and how its weights are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dynskip.models.config import DecoderConfig, Rotary

# transformers' names of activations, and ours.
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
# Sizes of a decoder, and what most configs of transformers call them.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
}
GROUPED_SIZES = {**SIZES, "num_kv_heads": "num_key_value_heads"}
# Frequencies that are the same at every length; "dynamic" changes them beyond max_position_embeddings only.
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class Stored:
    """Where a checkpoint keeps a module of ours.

    names: of its modules; several are laid one below the other. part: 0, 1 or 2 where one of them holds query, key and
    value; by_head: those of each head stand together there, not those of all heads.
    """

    names: tuple[str, ...]
    part: int | None = None
    by_head: bool = False


@dataclass(frozen=True)
class Architecture:
    """An architecture of transformers.

    model_type: its name there. decoder_config: reads its config; raises ValueError for one that cannot be built.
    config_values: the other way: by name, what its config says of a decoder where that is not what it says by default.
    sizes, optional_sizes: the integers of the config that must be at least 1; the latter may be None or left out.
    prefix: of all names but the head's; checkpoints of the model without its head lack it. base, layer: where the
        modules of the decoder, and of a layer, are kept, by our names. layers: where transformers keeps the list of
        layers, from the prefix on. head: its name in checkpoints, also where transformers calls its module lm_head.
    transposed: matrices of layers are kept [in, out]. derived: how names of tensors end that hold nothing of their own.
    attention_dropout, layer_dropout: what its config calls the dropout of attention weights, and that of whole layers;
        None where it has none.
    """

    model_type: str
    decoder_config: Callable[[Any], DecoderConfig]
    config_values: Callable[[DecoderConfig], dict[str, Any]]
    sizes: tuple[str, ...]
    prefix: str
    layers: str
    base: Mapping[str, str]
    layer: Mapping[str, str | Stored]
    head: str = "lm_head"
    transposed: bool = False
    derived: tuple[str, ...] = ()
    optional_sizes: tuple[str, ...] = ()
    attention_dropout: str = "attention_dropout"
    layer_dropout: str | None = None

    def stored(self, module: str) -> Stored:
        """Where the module of `CausalLM` called ``module`` is kept."""
        if module == "lm_head":
            return Stored((self.head,))
        name = module.removeprefix("decoder.")
        if not name.startswith("layers."):
            assert name in self.base, f"{self.model_type} has no {name}"
            return Stored((self.prefix + self.base[name],))
        _, index, name = name.split(".")
        assert name in self.layer, f"a layer of {self.model_type} has no {name}"
        held = self.layer[name]
        held = Stored((held,)) if isinstance(held, str) else held
        return Stored(
            tuple(f"{self.prefix}{self.layers}.{index}.{name}" for name in held.names), held.part, held.by_head
        )


def read_sizes(config: Any, names: Mapping[str, str] = SIZES) -> dict[str, Any]:
    """The sizes of a decoder that a config calls by ``names``; without a number of key-value heads, that of heads."""
    sizes = {ours: getattr(config, theirs) for ours, theirs in names.items()}
    shared = {
        "embedding_size": sizes["hidden_size"],
        "num_kv_heads": sizes["num_heads"],
        "head_size": head_size_of(config),
    }
    return shared | sizes


def size_values(config: DecoderConfig, names: Mapping[str, str] = SIZES) -> dict[str, Any]:
    """What a config that calls sizes by ``names`` says of ``config``."""
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}


def qkv_parts(name: str, by_head: bool = False) -> dict[str, Stored]:
    """Query, key and value kept in the one module ``name``."""
    return {ours: Stored((name,), part, by_head) for part, ours in enumerate(("q_proj", "k_proj", "v_proj"))}


def activation_of(config: Any, name: str) -> str:
    """Our name of the activation that ``config.<name>`` says. Raises ValueError for another one."""
    value = getattr(config, name)
    if value not in ACTIVATIONS:
        raise ValueError(f"CausalLM: {name} must be one of {', '.join(ACTIVATIONS)}, got {value!r}.")
    return ACTIVATIONS[value]


def refuse(config: Any, **plain: Any) -> None:
    """Raise ValueError where a value of ``config`` that changes results is another than the ``plain`` one."""
    for name, value in plain.items():
        got = getattr(config, name, value)
        if got != value:
            raise ValueError(f"CausalLM: {name} must be {value!r}, got {got!r}. Other values are not supported.")


def head_size_of(config: Any) -> int:
    """D of a config that may leave it to hidden size and heads."""
    size: int | None = getattr(config, "head_dim", None)
    if size is not None:
        return size
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"CausalLM: num_attention_heads must divide hidden_size {config.hidden_size}, "
            f"got {config.num_attention_heads}."
        )
    return int(config.hidden_size // config.num_attention_heads)


def activation_name(config: DecoderConfig) -> str:
    """transformers' name of the activation of ``config``."""
    return next(name for name, ours in ACTIVATIONS.items() if ours == config.activation)


def rope_theta(config: DecoderConfig) -> float:
    """The theta of `Rotary.plain` that gives the rotary positions of ``config``. Raises ValueError for other ones."""
    rotary, size = config.rotary, config.rotary_size
    assert rotary is not None, "asked of architectures that have it"
    theta = round(rotary.frequencies[1] ** (-size / 2)) if size > 2 else 1
    if rotary != Rotary.plain(size, theta):
        raise ValueError(
            f"rope_theta: rotary must be Rotary.plain({size}, theta) of a whole theta, got frequencies "
            f"{rotary.frequencies[:3]} and scaling {rotary.scaling}."
        )
    return float(theta)


def rotary_of(config: Any, embedding: Any) -> Rotary:
    """The rotary positions of ``config``, as transformers' module ``embedding`` works them out."""
    import torch

    parameters = config.rope_parameters
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise ValueError(
            f"CausalLM: rope_parameters must be the same for all layers, got those of {', '.join(parameters)}."
        )
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"CausalLM: rope_type must be one of {', '.join(ROPE_TYPES)}, got {kind!r}. Others change with the length."
        )
    try:
        with torch.device("cpu"):  # values, also where a model is being made on meta
            module = embedding(config)
        if not module.inv_freq.isfinite().all():
            raise ValueError("its frequencies are not finite")
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"CausalLM: rope_parameters must be those of {kind!r}, got {parameters}: {got}") from error
    return Rotary(tuple(module.inv_freq.tolist()), float(module.attention_scaling))
