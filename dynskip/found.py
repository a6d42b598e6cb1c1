"""`FoundPaths`: what `dynskip search` has left for a model, and the file that keeps it. Pure data."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from dynskip.arguments import shown
from dynskip.assets import known_name
from dynskip.files import write_text

FOUND_PATHS = "found-paths.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class FoundDraft:
    """A draft for the full path: its layers, whose entries it reads, how often it is right, and what that gains.

    gain: tokens a second over those without guesses, as predicted for ``device``.
    """

    layers: tuple[int, ...]
    entries: Literal["own", "path"]
    agreement: float
    gain: float
    device: str


@dataclass(frozen=True)
class FoundPaths:
    """The paths and the draft that searches have found for one set of weights.

    weights: their digest. layers: of the path of each budget. draft: None where none pays, or none was searched for.
    searched_draft: whether one was searched for. conditions: of the last search for paths, and for a draft.
    """

    weights: str
    num_layers: int
    layers: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    draft: FoundDraft | None = None
    searched_draft: bool = False
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def layers_of(self, budget: int, function: str) -> tuple[int, ...]:
        """The layers of the path of ``budget``; ValueError, from ``function``, for a budget that was not searched."""
        if budget == self.num_layers:
            return tuple(range(budget))
        if budget not in self.layers:
            known = ", ".join(map(str, sorted(self.layers))) or "none"
            raise ValueError(
                f"{function}: budget must be one that was searched ({known}), got {shown(budget)}. Run "
                f"`{search_command()} --budget {shown(budget)}`."
            )
        return self.layers[budget]

    def updated(self, newer: FoundPaths) -> FoundPaths:
        """Both, of the same weights, where ``newer`` counts in what it has searched."""
        assert self.weights == newer.weights, "found for the same weights"
        both = replace(self, layers={**self.layers, **newer.layers}, conditions={**self.conditions, **newer.conditions})
        return replace(both, draft=newer.draft, searched_draft=True) if newer.searched_draft else both

    def write(self, path: Path) -> None:
        """Write it to ``path`` as JSON, in one piece."""
        path.parent.mkdir(parents=True, exist_ok=True)
        layers = {str(budget): list(self.layers[budget]) for budget in sorted(self.layers, reverse=True)}
        text = json.dumps({"format": _FORMAT, **asdict(self), "layers": layers}, indent=2)
        # A path a line: people read such files.
        write_text(path, re.sub(r"\[[\d,\s]+\]", lambda found: " ".join(found[0].split()), text) + "\n")

    @staticmethod
    def read(path: Path) -> FoundPaths:
        """What `write` left at ``path``; raises ValueError where the file holds something else."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != _FORMAT:
                raise ValueError("another format")
            values["layers"] = {int(budget): tuple(layers) for budget, layers in values["layers"].items()}
            if values["draft"] is not None:
                draft = FoundDraft(**values["draft"])
                values["draft"] = replace(draft, layers=tuple(draft.layers))
            found = FoundPaths(**values)
            for budget, layers in found.layers.items():
                if not len(layers) == len(set(layers) & set(range(found.num_layers))) == budget:
                    raise ValueError(f"{len(layers)} layers of {found.num_layers} for budget {budget}")
            return found
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"FoundPaths.read: path must hold found paths of format {_FORMAT}, got {path} ({error}). Remove it, "
                f"and run `{search_command()}`."
            ) from error


class Searched(Protocol):
    """A model that knows what searches have found for its weights; None where there was none."""

    @property
    def found_paths(self) -> FoundPaths | None: ...


def found_paths_of(model: Searched | str | Path, function: str) -> FoundPaths:
    """What searches have found for ``model``, or beside it where it is a folder; ValueError, from ``function``, if
    nothing, and TypeError for what is neither."""
    if isinstance(model, str | Path):
        beside = Path(model).expanduser() / FOUND_PATHS
        found = FoundPaths.read(beside) if beside.is_file() else None
        name, adapter = str(model), None
    elif hasattr(type(model), "found_paths"):
        config = getattr(model, "config", None)
        found, name, adapter = model.found_paths, getattr(config, "name_or_path", ""), getattr(config, "adapter", None)
    else:
        raise TypeError(f"{function}: model must be a dynskip.CausalLM or a folder, got {type(model).__name__}.")
    if found is None:
        raise ValueError(
            f"{function}: model must have paths that a search has found, got none. Run "
            f"`{search_command(name, adapter)}`."
        )
    return found


def search_command(model: str = "", adapter: str | None = None) -> str:
    """The command that searches paths of ``model`` with ``adapter``, where they lie or by name."""
    model, adapter = known_name(model, adapter)
    merged = f" --adapter {shlex.quote(adapter)}" if adapter else ""
    return f"dynskip search {shlex.quote(model) if model else 'MODEL'}{merged} --data FILE"
