"""The costs that an engine works with where nobody gives it any."""

from __future__ import annotations

import shlex
import warnings

import torch

from dynskip.assets import known_name
from dynskip.causal_lm import CausalLM
from dynskip.costs.layer_costs import LayerCosts, MachineSpeed, ModelBytes
from dynskip.costs.step_costs import StepCosts
from dynskip.costs.store import cost_keys, load_cached

# Bandwidth and arithmetic of a usual device of each kind: which paths are worth a step depends on their ratio only.
_USUAL = {"cpu": MachineSpeed(bandwidth_gbps=40.0, peak_gflops=500.0), "cuda": MachineSpeed(2500.0, 500e3)}


class UnmeasuredCostsWarning(UserWarning):
    """The scheduler works with predicted costs, because none were measured."""


def default_costs(model: CausalLM) -> StepCosts:
    """What `dynskip calibrate` measured on this device for models of this shape; else a prediction, with a warning."""
    device, shape = cost_keys(model)
    costs = known_costs(model)
    if not costs.predicted:
        return costs
    warnings.warn(
        f"No costs were measured for {shape} on {device}: the scheduler predicts them from bytes and operations. "
        f"{_advice(model)} measures them.",
        UnmeasuredCostsWarning,
        stacklevel=3,
    )
    return costs


def known_costs(model: CausalLM) -> StepCosts:
    """As `default_costs`, without a warning: for those who correct a prediction by what steps take."""
    known = load_cached(*cost_keys(model))
    return predicted_costs(model) if known is None else known


def predicted_costs(model: CausalLM) -> StepCosts:
    """What bytes and operations let expect on a usual device of the model's kind, whatever was measured."""
    costs = LayerCosts.modelled(ModelBytes.of(model.decoder_config, model.dtype.itemsize), _USUAL[model.device.type])
    return StepCosts(model.num_layers, costs, costs, device=cost_keys(model)[0], predicted=True)


def calibrate_command(model: CausalLM, name: str | None = None) -> str:
    """The command that measures costs for models of this shape and dtype on this device, with as many threads.

    name: of a folder or hub id that holds such a model; None: where this one came from.
    Raises ValueError for a model that came from none, and no name.
    """
    source = model.config.name_or_path if name is None else name
    if not source:
        raise ValueError("calibrate_command: name must be given for a model that was not loaded, got None. Save it.")
    words = ["dynskip", "calibrate", "--model", known_name(source)[0]]
    if model.dtype != torch.bfloat16:
        words += ["--dtype", str(model.dtype).removeprefix("torch.")]
    if model.device.type == "cpu":
        words += ["--threads", str(torch.get_num_threads())]
    else:
        words += ["--device", str(model.device)]
    return shlex.join(words)


def _advice(model: CausalLM) -> str:
    """What to run; a model made in memory is to be saved first."""
    if model.config.name_or_path:
        return f"`{calibrate_command(model)}`"
    return f'`model.save_pretrained("FOLDER")` and then `{calibrate_command(model, "FOLDER")}`'
