"""Where the numbers of a request stop being finite: found by running it once more, alone."""

from __future__ import annotations

import torch
from torch import Tensor

from dynskip.engine.model_runner import ModelRunner
from dynskip.engine.request import OutputSequence


class NonFiniteError(ArithmeticError):
    """The logits of a request are NaN or infinite, or -inf for every token.

    The message names the layer and the dtype, or the parameters of the request that may have made them so.
    """


class NoTokenError(NonFiniteError):
    """What the parameters of a request made of its finite logits leaves no token to choose.

    parameter: the first one that changes logits.
    """

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(parameter, message)
        self.parameter = parameter

    def __str__(self) -> str:
        return str(self.args[1])


def diagnose(runner: ModelRunner, sequence: OutputSequence) -> NonFiniteError:
    """The error of ``sequence``, the logits after whose last token are not finite.

    Runs prompt and output so far, all output tokens at once, into a cache of their own. Should that fail, what it
    raised is the cause of the error.
    """
    dtype = runner.model.dtype
    found: str | None = None

    def look(what: str, numbers: Tensor) -> None:
        nonlocal found
        if found is None and not bool(numbers.isfinite().all()):
            found = f"{'NaN' if bool(numbers.isnan().any()) else 'inf'} first in the {what}"

    cause: Exception | None = None
    try:
        hidden_states, logits = runner.run_alone(sequence, lambda layer, states: look(_input_of(layer), states))
        look(_input_of(runner.model.num_layers), hidden_states)
        look("logits of the head", logits)
    except Exception as error:
        cause = error
    if found is None:
        found = "others in a run that could not be repeated" if cause else "others in a batch, but not alone"
    if dtype == torch.float16:
        advice = "float16 ends at 65504. Load the model as bfloat16 or float32."
    else:
        advice = "Check the weights, which may be damaged."
    diagnosis = NonFiniteError(f"generate: logits must be finite, got {found}, in {dtype}. {advice}")
    diagnosis.__cause__ = cause
    return diagnosis


def _input_of(layer: int) -> str:
    return f"output of layer {layer - 1}" if layer else "embedding"
