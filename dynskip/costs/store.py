"""Where measured costs are kept: one file per device and model shape in the user's cache."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from dynskip.costs.step_costs import StepCosts
from dynskip.files import OTHER_CACHE, cache_folder
from dynskip.host import cpu_model
from dynskip.models.config import DecoderConfig

if TYPE_CHECKING:
    from dynskip.causal_lm import CausalLM


class CostCacheWarning(UserWarning):
    """Measured costs cannot be read, so the scheduler works with predicted ones."""


def device_key(device: str = "cpu", num_threads: int | None = None) -> str:
    """The name of a device as a file name: a GPU's own, or the CPU's and the number of threads that torch uses."""
    import torch

    from dynskip.kernels.configs import device_slug

    if torch.device(device).type == "cuda":
        return device_slug(torch.cuda.get_device_name(device))
    return device_slug(f"{cpu_model()} {torch.get_num_threads() if num_threads is None else num_threads} threads")


def shape_key(config: DecoderConfig, dtype: str) -> str:
    """What of a model decides its costs: layers, sizes, vocabulary, dtype; of keys where they are not as wide."""
    sizes = {"l": config.num_layers, "c": config.hidden_size, "f": config.ffn_size, "v": config.vocab_size}
    if config.kv_entry_size != 2 * config.hidden_size:
        sizes["k"] = config.kv_entry_size // 2
    return "-".join(f"{letter}{size}" for letter, size in sizes.items()) + f"-{dtype}"


def cost_keys(model: CausalLM) -> tuple[str, str]:
    """The device and the shape of a CausalLM, each by its key."""
    return device_key(str(model.device)), shape_key(model.decoder_config, str(model.dtype).removeprefix("torch."))


def cached_path(device: str, shape: str) -> Path:
    """Where the costs of a device and a shape, each by its key, are kept; ValueError for a user without a home."""
    return cache_folder() / "costs" / device / f"{shape}.json"


def load_cached(device: str, shape: str) -> StepCosts | None:
    """The costs that `dynskip calibrate` has left for a device and a shape; None where it has not run.

    None as well, with a CostCacheWarning, where they cannot be read: something else stands in their file, or it is
    closed to this user.
    """
    try:
        path = cached_path(device, shape)
    except ValueError:
        return None  # nothing was ever kept; `dynskip calibrate` says what to do about it
    try:
        costs = StepCosts.read(path)
        if not shape.startswith(f"l{costs.num_layers}-"):
            raise ValueError(f"costs of {costs.num_layers} layers")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.__cause__ or error
        warnings.warn(
            f"The costs in {path} cannot be used ({reason}). Remove the file and run `dynskip calibrate`. "
            f"{OTHER_CACHE} where this one is not yours.",
            CostCacheWarning,
            stacklevel=2,
        )
        return None
    return costs
