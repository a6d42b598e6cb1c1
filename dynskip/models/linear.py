"""A linear map held once: dense while it is trained, packed by oneDNN while it runs on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.nn import functional

from dynskip.host import ask_for_huge_pages
from dynskip.ops import native, torch_backend
from dynskip.ops.reference import ACTIVATIONS

# oneDNN's names of the activations and of the algorithms that compute them, in float32 before the result is rounded.
_POINTWISE = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}
# Rows of one call in deterministic mode. The libraries choose a kernel by the row count, so one count means one
# kernel, and inside it each row is summed in the same order.
DETERMINISTIC_ROWS = 16
# Up to so many rows the extension's product is faster than oneDNN's (bench/LOG.md); its rows are independent anyway.
NATIVE_ROWS = 48
# Where a dense product, its bias and its ReLU are one kernel of the library; elsewhere ReLU is a pass of its own.
_FUSED_RELU_DEVICES = {"cuda"}


class Linear(torch.nn.Module):
    """``activation(x @ weight.T + bias)`` with a dense, differentiable weight or a packed one, never both.

    Dense: ``weight`` is a Parameter ``[out_features, in_features]`` on any device. After :meth:`pack_` the Parameter is
    gone and the matrix lives in the layout that oneDNN multiplies fastest; :meth:`unpack_` brings it back bit by bit.
    The C++ extension multiplies few rows from that same copy; ``native_rows`` says up to how many, 0 for none.
    ``state_dict`` holds the dense weight in both states.

    num_changes: how often any Linear was packed, unpacked or given a Parameter; who keeps addresses looks at it.
    """

    num_changes: ClassVar[int] = 0

    weight: torch.nn.Parameter | None
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.bias = torch.nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self._packed_weight: torch.Tensor | None = None
        self._packed_data = 0
        self._panel_outputs = 0
        self._merged = False
        self.native_rows = 0

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """As every module does it, and counted."""
        super().register_parameter(name, param)
        Linear.num_changes += 1

    @staticmethod
    def of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        """A dense Linear that holds these tensors themselves: ``weight`` [out, in], ``bias`` [out] or None."""
        if weight.dim() != 2:
            raise ValueError(f"Linear.of: weight must have 2 dimensions, got shape {tuple(weight.shape)}.")
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
            raise ValueError(
                f"Linear.of: bias must be [{weight.shape[0]}] {weight.dtype}, got {list(bias.shape)} {bias.dtype}."
            )
        linear = Linear(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            dtype=weight.dtype,
            device="meta",
        )
        linear.weight = _as_parameter(weight)
        linear.bias = None if bias is None else _as_parameter(bias)
        return linear

    @property
    def packed(self) -> bool:
        """True when the matrix is held in the packed layout."""
        return self._packed_weight is not None

    @property
    def weight_bytes(self) -> int:
        """Bytes that the matrix takes in its present state, padding of the packed layout included; no bias."""
        if self._packed_weight is not None:
            return int(torch.ops.mkldnn._nbytes(self._packed_weight))
        weight = self._dense()
        return weight.numel() * weight.element_size()

    @property
    def packing_obstacle(self) -> str | None:
        """Why :meth:`pack_` would leave the weight dense, in words; None when it can be packed or is packed."""
        return None if self.packed else packing_obstacle(self._dense())

    def pack_(self, use_native: bool = True) -> Linear:
        """Replace the dense weight by a packed one; stays dense where :attr:`packing_obstacle` says why it cannot.

        use_native: multiply up to ``native_rows`` rows by the C++ extension, where it is there and knows the layout.
        """
        if self.packed or self.packing_obstacle is not None:
            return self
        weight = self._dense().detach()
        self._packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        if use_native and (panel := native.panel_outputs(weight, self._packed_weight)):
            self._packed_data, self._panel_outputs = native.packed_data(self._packed_weight), panel
            ask_for_huge_pages(self._packed_data, self.weight_bytes, is_written=True)
            self.native_rows = NATIVE_ROWS
        self.weight = None
        Linear.num_changes += 1
        return self

    def unpack_(self) -> Linear:
        """Replace the packed weight by a dense Parameter of the same bits that requires grad."""
        if self._packed_weight is not None:
            self.weight = torch.nn.Parameter(self.dense_weight())
            self._packed_weight, self._packed_data, self._panel_outputs, self.native_rows = None, 0, 0, 0
            Linear.num_changes += 1
        return self

    @property
    def native_panels(self) -> tuple[int, int] | None:
        """Address of the packed matrix and outputs of a panel, where the C++ extension can read it."""
        return (self._packed_data, self._panel_outputs) if self._panel_outputs else None

    def dense_weight(self) -> torch.Tensor:
        """The matrix [out_features, in_features]: the Parameter itself when dense, a new exact copy when packed."""
        return self._dense() if self._packed_weight is None else self._packed_weight.to_dense()

    def forward(self, x: torch.Tensor, activation: str = "none", deterministic: bool = False) -> torch.Tensor:
        """``activation(x @ weight.T + bias)``, [..., out_features], x.dtype.

        ``x`` [..., in_features]. ``activation`` is one of ``ACTIVATIONS``. With ``deterministic`` the bits of a row do
        not depend on how many other rows there are, on what they hold, or on the row's position among them.

        Raises: ValueError for an unknown activation or a packed weight under autograd.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(f"Linear: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
        if self._packed_weight is not None and x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "Linear: x must not require grad when the weight is packed, got x.requires_grad=True. "
                "Call unpack_(), use the reference executor, or run under torch.no_grad()."
            )
        if x.dim() == 2:
            return self._multiply_in_tiles(x, activation) if deterministic else self._multiply(x, activation)
        return self(x.reshape(-1, self.in_features), activation, deterministic).reshape(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        state = f"packed, native_rows={self.native_rows}" if self.packed else "dense"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {state}"
        )

    def _dense(self) -> torch.nn.Parameter:
        assert self.weight is not None, "a Linear holds either a dense or a packed weight"
        return self.weight

    def _multiply(self, x: torch.Tensor, activation: str, weight: torch.Tensor | None = None) -> torch.Tensor:
        if self.native_rows and x.shape[0] <= self.native_rows:
            data, panel = self._packed_data, self._panel_outputs
            return native.packed_linear(x, data, panel, self.out_features, self.bias, activation)
        if self._packed_weight is not None:
            name, algorithm = _POINTWISE[activation]
            return torch.ops.mkldnn._linear_pointwise(x, self._packed_weight, self.bias, name, [], algorithm)
        weight = self._dense() if weight is None else weight
        if activation == "relu" and self.bias is not None and fuses_relu(x.device):
            return torch._addmm_activation(self.bias, x, weight.t())
        y = functional.linear(x, weight, self.bias)
        return y if activation == "none" else torch_backend.activate(y, activation)

    def _multiply_in_tiles(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        num_rows, weight = x.shape[0], None
        if not self.packed:
            x, weight = torch_backend.aligned_rows(x), torch_backend.aligned_rows(self._dense())
        tile_rows = self.native_rows or DETERMINISTIC_ROWS
        num_padding = -num_rows % tile_rows if self.native_rows == 0 else 0
        if num_padding:
            x = torch.cat([x, x.new_zeros(num_padding, x.shape[1])])
        tiles = [self._multiply(tile, activation, weight) for tile in torch.split(x, tile_rows)]
        return (torch.cat(tiles) if len(tiles) > 1 else tiles[0])[:num_rows]

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        if self.packed:
            raise RuntimeError(
                "Linear: the weight must be dense to be moved or cast, got a packed one. Call unpack_()."
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def __getstate__(self) -> dict[str, Any]:
        # oneDNN's tensors can neither be copied nor pickled: a copy is made through the dense weight.
        state = dict(self.__dict__)
        if self._merged:
            # Pickled as it is, each part of a merged matrix would take the whole of it along.
            state["_parameters"] = {
                name: None if held is None else torch.nn.Parameter(held.detach().clone(), held.requires_grad)
                for name, held in self._parameters.items()
            }
            state["_merged"] = False
        if self.packed:
            state["_parameters"] = {**self._parameters, "weight": torch.nn.Parameter(self.dense_weight())}
            state["_packed_weight"], state["_packed_data"], state["_panel_outputs"] = "pack", 0, 0
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if isinstance(self._packed_weight, str):
            use_native, self.native_rows = self.native_rows > 0, 0
            self._packed_weight = None
            self.pack_(use_native)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed:
            destination[prefix + "weight"] = self.dense_weight()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.packed and prefix + "weight" in state_dict:
            raise RuntimeError("Linear: the weight must be dense to be loaded, got a packed one. Call unpack_() first.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def merge(linears: Sequence[Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights of dense ``linears`` one under the other, [sum of out_features, in_features], and so their biases.

    From then on the Parameters of the linears are views of these two, so that nothing is held twice and a change of one
    is a change of both. Where they are already, nothing is copied; casting or moving the linears undoes it. For
    inference: no gradient flows through the result. The bias is None where none of the linears has one.
    """
    packed = [linear for linear in linears if linear.packed]
    if packed:
        raise RuntimeError(
            f"merge: linears must be dense, got {len(packed)} of {len(linears)} packed. Call unpack_(), or load the "
            "model with pack=False."
        )
    weight = _merge([linear._dense() for linear in linears])
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if len(biases) not in (0, len(linears)):
        raise ValueError(f"merge: linears must all have a bias or none, got {len(biases)} of {len(linears)} with one.")
    bias = _merge(biases) if biases else None
    for linear in linears:
        linear._merged = True
    return weight, bias


def fuses_relu(device: torch.device) -> bool:
    """True where a dense product on ``device`` applies bias and ReLU before it writes its result; not for training."""
    return device.type in _FUSED_RELU_DEVICES and hasattr(torch, "_addmm_activation") and not torch.is_grad_enabled()


def packing_obstacle(weight: torch.Tensor) -> str | None:
    """Why ``weight`` [out, in] cannot be packed on this machine, in words; None when it can."""
    missing = [
        name for name in ("_reorder_linear_weight", "_linear_pointwise", "_nbytes", "data_ptr") if not _has_op(name)
    ]
    if missing:
        return f"this torch has no torch.ops.mkldnn.{missing[0]}"
    if weight.device.type != "cpu":
        return f"only CPU weights can be packed, this one is on {weight.device}"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return "this torch was built without oneDNN"
    if weight.dtype == torch.float32:
        return None
    if weight.dtype == torch.bfloat16:
        return None if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "oneDNN has no bf16 kernels for this CPU"
    if weight.dtype == torch.float16:
        return None if torch.ops.mkldnn._is_mkldnn_fp16_supported() else "oneDNN has no fp16 kernels for this CPU"
    return f"oneDNN packs float32, bfloat16 and float16 weights, this one is {weight.dtype}"


def _merge(parts: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    first = parts[0]
    num_rows = sum(part.shape[0] for part in parts)
    size, place = (num_rows, *first.shape[1:]), first.data_ptr()
    together = all(part.is_contiguous() for part in parts)
    for part in parts:
        # Neighbours in memory by chance are no part of one storage: it would not reach as far.
        together &= part.data_ptr() == place and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        place += part.numel() * part.element_size()
    if together:
        return first.detach().as_strided(size, first.stride())
    merged = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, torch.split(merged, [part.shape[0] for part in parts]), strict=True):
        part.data = view
    return merged


def _has_op(name: str) -> bool:
    return hasattr(torch.ops.mkldnn, name)


def _as_parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return tensor if isinstance(tensor, torch.nn.Parameter) else torch.nn.Parameter(tensor)
