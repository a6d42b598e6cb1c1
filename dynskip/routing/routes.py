"""What the ``paths`` argument stands for: for each sequence a route, which gives every step its plan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dynskip.arguments import shown
from dynskip.controllers import SequenceController, TokenContext, TokenController
from dynskip.paths import LayerPath
from dynskip.routing.plan import KVPolicy, Plan

Paths = LayerPath | Sequence[LayerPath] | Tensor | SequenceController | TokenController | None


@dataclass(frozen=True)
class StepTokens:
    """The tokens of a step: ``num_new_tokens[b]`` of its sequence b, the first at ``first_positions[b]``."""

    first_positions: tuple[int, ...]
    num_new_tokens: tuple[int, ...]
    is_prompt: bool


class Route(Protocol):
    """How the tokens of one sequence find their layers.

    key: sequences whose routes have the same key may share a step.
    path: the layers that all its tokens run; None where they have none in common.
    layers: the layers that its tokens may run, as a path.
    """

    @property
    def key(self) -> Hashable: ...

    @property
    def path(self) -> LayerPath | None: ...

    @property
    def layers(self) -> LayerPath: ...

    def num_entries(self, num_tokens: int) -> int:
        """How many key-value entries its first ``num_tokens`` tokens take at most, over all layers."""
        ...

    def check_covers(self, num_tokens: int, what: str) -> None:
        """Raise ValueError, about ``what``, where it cannot tell the layers of its first ``num_tokens`` tokens."""
        ...

    def most_tokens(self, limit: int) -> int:
        """How many tokens, prompt and output, it can tell the layers of, at most ``limit``; the last one runs none."""
        ...

    def plan(self, routes: Sequence[Any], tokens: StepTokens) -> Plan:
        """The plan of a step that brings ``tokens`` of sequences with ``routes``, all of this one's key."""
        ...


@dataclass(frozen=True, slots=True)
class PathRoute:
    """One path for prompt and output; skipped layers store nothing."""

    path: LayerPath

    @property
    def key(self) -> Hashable:
        """The same for all paths."""
        return PathRoute

    @property
    def layers(self) -> LayerPath:
        """The path."""
        return self.path

    def num_entries(self, num_tokens: int) -> int:
        """One entry per token and layer of the path."""
        return self.path.budget * num_tokens

    def check_covers(self, num_tokens: int, what: str) -> None:
        """Nothing: a path holds for any number of tokens."""

    def most_tokens(self, limit: int) -> int:
        """``limit``."""
        return limit

    def plan(self, routes: Sequence[PathRoute], tokens: StepTokens) -> Plan:
        """The plan of a step that brings ``tokens`` of sequences with ``routes``."""
        paths = tuple(route.path for route in routes)
        return (Plan.per_sequence if tokens.is_prompt else path_plan)(paths, tokens.num_new_tokens)


@functools.lru_cache(maxsize=256)
def path_plan(paths: tuple[LayerPath, ...], num_new_tokens: tuple[int, ...]) -> Plan:
    """`Plan.per_sequence`, kept: sequences come and go, but few mixes of paths fill most of the decode steps."""
    return Plan.per_sequence(paths, num_new_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class MaskRoute:
    """A mask per token: ``active`` is [T, L], bool, row p for the token at position p."""

    active: Tensor
    kv_policy: KVPolicy
    full_prompt: bool

    @property
    def key(self) -> Hashable:
        """The same for all masks that leave the same entries."""
        return MaskRoute, self.kv_policy, self.full_prompt

    @property
    def path(self) -> None:
        """None: each token has its own layers."""

    @property
    def layers(self) -> LayerPath:
        """All layers: a policy may store entries where no token runs."""
        return LayerPath.full(self.active.shape[1])

    def num_entries(self, num_tokens: int) -> int:
        """One entry per token and layer, but with EVICT only where the mask holds."""
        if self.kv_policy is KVPolicy.EVICT and not self.full_prompt:
            return int(self.active[:num_tokens].sum())
        return num_tokens * self.active.shape[1]

    def check_covers(self, num_tokens: int, what: str) -> None:
        """Raise ValueError where the mask has fewer rows than ``num_tokens``."""
        if self.active.shape[0] < num_tokens:
            raise ValueError(
                f"{what}: paths must cover {num_tokens} tokens, got T={self.active.shape[0]}. "
                "Give T >= prompt + max_tokens - 1 rows."
            )

    def most_tokens(self, limit: int) -> int:
        """One more than the mask has rows, at most ``limit``."""
        return min(limit, self.active.shape[0] + 1)

    def plan(self, routes: Sequence[MaskRoute], tokens: StepTokens) -> Plan:
        """The plan of a step that brings ``tokens`` of sequences with ``routes``."""
        parts = []
        for route, first, count in zip(routes, tokens.first_positions, tokens.num_new_tokens, strict=True):
            assert first + count <= route.active.shape[0], "check_covers refuses a mask that is too short"
            parts.append(route.active[first : first + count])
        active = torch.cat(parts)
        if tokens.is_prompt and self.full_prompt:
            active = torch.ones_like(active)
        return Plan.per_token(active, tokens.num_new_tokens, self.kv_policy)


@dataclass(eq=False)
class ControllerDecision:
    """Asks ``controller`` at each layer of a step which rows run it."""

    controller: TokenController
    tokens: StepTokens
    _context: TokenContext | None = field(default=None, repr=False)

    def __call__(self, layer: int, hidden_states: Tensor) -> Tensor:
        """[N], bool: True where the row runs ``layer``; ``hidden_states`` is the layer's input, [N, C]."""
        if self._context is None:
            self._context = self._make_context(hidden_states.device)
        return self.controller.active(layer, hidden_states, self._context)

    def _make_context(self, device: torch.device) -> TokenContext:
        counts = torch.tensor(self.tokens.num_new_tokens)
        firsts = torch.tensor(self.tokens.first_positions)
        seq_ids = torch.from_numpy(np.repeat(np.arange(len(counts), dtype=np.int32), self.tokens.num_new_tokens))
        starts = counts.cumsum(0) - counts
        position_ids = torch.arange(len(seq_ids)) - starts[seq_ids.long()] + firsts[seq_ids.long()]
        is_prompt = torch.full((len(seq_ids),), self.tokens.is_prompt)
        return TokenContext(seq_ids.to(device), position_ids.to(device), is_prompt.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class ControllerRoute:
    """A controller that decides at each layer which rows run it."""

    controller: TokenController
    num_layers: int
    kv_policy: KVPolicy
    full_prompt: bool

    @property
    def key(self) -> Hashable:
        """The same where one controller decides and leaves the same entries."""
        return ControllerRoute, id(self.controller), self.kv_policy, self.full_prompt

    @property
    def path(self) -> None:
        """None: each token has its own layers."""

    @property
    def layers(self) -> LayerPath:
        """All layers: the most that the controller can ask for."""
        return LayerPath.full(self.num_layers)

    def num_entries(self, num_tokens: int) -> int:
        """One entry per token and layer."""
        return num_tokens * self.num_layers

    def check_covers(self, num_tokens: int, what: str) -> None:
        """Nothing: the controller decides for every token that comes."""

    def most_tokens(self, limit: int) -> int:
        """``limit``."""
        return limit

    def plan(self, routes: Sequence[ControllerRoute], tokens: StepTokens) -> Plan:
        """The plan of a step that brings ``tokens``; the controller is asked while it runs, unless all layers do."""
        if tokens.is_prompt and self.full_prompt:
            active = torch.ones(sum(tokens.num_new_tokens), self.num_layers, dtype=torch.bool)
            return Plan.per_token(active, tokens.num_new_tokens, self.kv_policy)
        decide = ControllerDecision(self.controller, tokens)
        return Plan.decided(decide, self.num_layers, tokens.num_new_tokens, self.kv_policy)


def resolve(
    paths: Paths,
    num_layers: int,
    prompts: Sequence[Tensor],
    embed: Callable[[Tensor], Tensor],
    kv_policy: str | None = None,
    prompt_depth: str = "path",
    function: str = "generate",
) -> list[Route]:
    """The routes that ``paths`` stands for, one per prompt; they hold copies of masks.

    prompts: per sequence [T], int64. embed: token ids to embeddings, for controllers that decide per sequence.
    Raises TypeError or ValueError, naming ``function``, for anything that does not fit the model or the batch.
    """
    if prompt_depth not in ("path", "full"):
        raise ValueError(f"{function}: prompt_depth must be 'path' or 'full', got {prompt_depth!r}.")
    num_seqs = len(prompts)
    if isinstance(paths, SequenceController):
        paths = paths.choose_paths(prompts, [embed(prompt) for prompt in prompts])
        if not isinstance(paths, list | tuple):
            raise TypeError(
                f"{function}: the controller's choose_paths must return a list of LayerPath, got {type(paths)}."
            )
    if isinstance(paths, TokenController):
        known = getattr(paths, "num_layers", num_layers)
        if known != num_layers:
            raise ValueError(f"{function}: the controller must decide for {num_layers} layers, got {known}.")
        gate = ControllerRoute(paths, num_layers, KVPolicy.per_token(kv_policy, function), prompt_depth == "full")
        return [gate] * num_seqs
    if isinstance(paths, Tensor) and paths.dim() == 3:
        masks = _check_mask(paths, num_layers, num_seqs, function)
        policy = KVPolicy.per_token(kv_policy, function)
        return [MaskRoute(mask, policy, prompt_depth == "full") for mask in masks]
    if kv_policy is not None or prompt_depth == "full":
        name, value = ("kv_policy", kv_policy) if kv_policy is not None else ("prompt_depth", prompt_depth)
        raise ValueError(
            f"{function}: {name} must be left out with per-sequence paths, got {value!r}. A skipped layer stores "
            "nothing there; give a [B, T, L] mask to choose."
        )
    if paths is None:
        return [PathRoute(LayerPath.full(num_layers))] * num_seqs
    if isinstance(paths, LayerPath):
        paths = [paths] * num_seqs
    if isinstance(paths, Tensor):
        paths = _paths_of_mask(_check_mask(paths, num_layers, num_seqs, function), function)
    if isinstance(paths, str) or not isinstance(paths, Sequence) or not all(isinstance(p, LayerPath) for p in paths):
        found = type(paths).__name__
        if isinstance(paths, Sequence) and not isinstance(paths, str):
            place, other = next((i, p) for i, p in enumerate(paths) if not isinstance(p, LayerPath))
            found += f", whose element {place} is {shown(other)}"
        raise TypeError(
            f"{function}: paths must be a LayerPath, a list of them, a bool tensor [B, L] or [B, T, L], a controller "
            f"or None, got {found}. LayerPath.parse reads texts such as 'uniform:8'."
        )
    if len(paths) != num_seqs:
        raise ValueError(f"{function}: paths must be one per sequence, got {len(paths)} for {num_seqs} sequences.")
    for path in paths:
        if path.num_layers != num_layers:
            raise ValueError(f"{function}: paths must be for {num_layers} layers, got a path for {path.num_layers}.")
    return [PathRoute(path) for path in paths]


def _check_mask(mask: Tensor, num_layers: int, num_seqs: int, function: str) -> Tensor:
    per_seq, per_token = f"[{num_seqs}, {num_layers}]", f"[{num_seqs}, T, {num_layers}]"
    expected = {2: per_seq, 3: per_token}.get(mask.dim(), f"{per_seq} or {per_token}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{function}: paths must be bool {expected}, got {mask.dtype}. Use paths.bool().")
    if mask.dim() not in (2, 3) or mask.shape[0] != num_seqs or mask.shape[-1] != num_layers:
        raise ValueError(f"{function}: paths must be bool {expected}, got shape {list(mask.shape)}.")
    return mask.detach().to("cpu", copy=True)


def _paths_of_mask(mask: Tensor, function: str) -> list[LayerPath]:
    for seq, row in enumerate(mask):
        if not row.any():
            raise ValueError(
                f"{function}: paths must run at least one layer for each sequence, got none for sequence {seq}. "
                "To skip all layers, pass LayerPath.of(num_layers, [], allow_empty=True)."
            )
    return [LayerPath.of(mask.shape[1], row.nonzero().flatten().tolist()) for row in mask]
