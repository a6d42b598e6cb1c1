"""`DepthTable`: from ``path``, ``depth``, ``draft`` and the name of a model to the layers that a request runs."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from dynskip.assets import ADAPTED, PACKAGED
from dynskip.causal_lm import CausalLM
from dynskip.engine.drafting import find_draft
from dynskip.found import FoundPaths
from dynskip.paths import LayerPath
from dynskip.prompts import lines
from dynskip.serving.errors import APIError, bad_request, told
from dynskip.speculation.draft import Draft

_NUMBER = re.compile(r"\d{1,5}", re.ASCII)
_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)%", re.ASCII)
_NO_DRAFT = "none"
_AUTO = "auto"


@dataclass(frozen=True)
class NamedPath:
    """A path, and the text that stands for it in requests and answers."""

    name: str
    path: LayerPath


@dataclass(frozen=True)
class Depth:
    """What a request runs, and the draft that guesses its tokens, if one does."""

    named: NamedPath
    draft: Draft | None


@dataclass(frozen=True)
class _Found:
    """Stands for a model before `LayerPath.found`: what its searches have found is read once."""

    kept: FoundPaths | None

    @property
    def found_paths(self) -> FoundPaths | None:
        """What they have found."""
        return self.kept


class DepthTable:
    """The paths that a server offers by their number of layers, and what else a request may ask for.

    model: what is served. name: what it is called. file: a table of paths, as `dynskip search` leaves it or a path a
    line; None: what a search has found for the model, if one has. path, draft: of requests that name none.
    Raises ValueError for a file or a text that names no paths of this model.
    """

    def __init__(
        self, model: CausalLM, name: str, file: Path | None = None, path: str = "full", draft: str | None = None
    ) -> None:
        self.name = name
        self._model = model
        self._num_layers = model.num_layers
        found, listed = (model.found_paths, []) if file is None else self._read(file)
        self._found = _Found(found)
        self._entries = self._make_entries(found, listed)
        self._default = self.parse(path)
        self._default_draft = draft
        self.draft(draft, self._default.path)

    @property
    def entries(self) -> Mapping[int, NamedPath]:
        """The paths of the table by their number of layers, shallow ones first; none without a table."""
        return self._entries

    @property
    def names(self) -> list[str]:
        """The names by which requests may ask for the model: its own, and that with each depth of the table."""
        return [self.name, *(f"{self.name}@{budget}" for budget in self._entries)]

    @cached_property
    def offered(self) -> list[NamedPath]:
        """What a slider has: the paths of the table; without one uniform paths of every number of layers."""
        if self._entries:
            return list(self._entries.values())
        uniform = [self.parse(f"uniform:{budget}") for budget in range(1, self._num_layers)]
        return [*uniform, self.parse("full")]

    @cached_property
    def drafts(self) -> list[str]:
        """Drafts that requests may ask for: none, what a search has found, the server's, the shallower of the paths."""
        found = self._model.found_paths
        has_auto = found is not None and found.draft is not None
        paths = list(self._entries.values())[:-1]
        if not paths:
            budgets = sorted({max(1, self._num_layers // parts) for parts in (6, 4, 3, 2)} - {self._num_layers})
            paths = [self.parse(f"uniform:{budget}") for budget in budgets]
        names = [_NO_DRAFT, *[_AUTO] * has_auto, self.default_draft, *(named.name for named in paths)]
        return list(dict.fromkeys(names))

    @property
    def default_draft(self) -> str:
        """The draft of requests that name none; ``none`` where they have none."""
        return _NO_DRAFT if self._default_draft is None else self._default_draft

    def without_model(self) -> Self:
        """The same table for another process: it knows all paths, and "none" as the only draft."""
        table = copy.copy(self)
        del table._model
        table._default_draft = None
        return table

    def of(self, model: str | None, path: str | None, depth: int | str | None, draft: str | None) -> Depth:
        """What a request with these fields runs; an APIError names the one that is wrong."""
        by_name = self._by_name(model)
        asked = [name for name, value in (("path", path), ("depth", depth), ("model", by_name)) if value is not None]
        if len(asked) > 1:
            raise bad_request(f"{asked[0]}: it must be left out beside a depth in {asked[1]}, got both.", asked[0])
        if path is not None:
            named = self._checked(path)
        elif depth is not None:
            named = self._at_least(depth, "depth")
        else:
            named = self._default if by_name is None else by_name
        if draft == _AUTO and not self._has_searched_draft:
            raise bad_request(
                f"draft: it must be a path or {_NO_DRAFT} where no search has looked for a draft, got {_AUTO}.", "draft"
            )
        try:
            return Depth(named, self.draft(self._default_draft if draft is None else draft, named.path))
        except (TypeError, ValueError) as error:
            raise told(error, "draft") from error

    def parse(self, text: str) -> NamedPath:
        """The path that ``text`` names; raises ValueError where it names none."""
        return NamedPath(text.strip(), LayerPath.parse(text, self._num_layers, self._found))

    def draft(self, text: str | None, path: LayerPath) -> Draft | None:
        """The draft that ``text`` names for requests along ``path``; None where there is none."""
        if text in (None, _NO_DRAFT):
            return None
        if text == _AUTO:
            found = self._auto_draft
            return found if path.budget == self._num_layers else None
        return Draft(self.parse(text).path)

    @cached_property
    def _has_searched_draft(self) -> bool:
        found = self._model.found_paths
        return found is not None and found.searched_draft

    @cached_property
    def _auto_draft(self) -> Draft | None:
        return find_draft(self._model, LayerPath.full(self._num_layers))

    def _checked(self, path: str) -> NamedPath:
        try:
            return self.parse(path)
        except (TypeError, ValueError) as error:
            raise told(error, "path") from error

    def _by_name(self, model: str | None) -> NamedPath | None:
        """The path that the name of a model asks for; None for its plain name. An unknown name is a 404.

        So is one with a depth where there is no table; what is wrong is said as of the field ``depth``.
        """
        if model in (None, self.name):
            return None
        name, _, depth = model.rpartition("@")
        if name == self.name:
            if not self._entries:
                raise APIError(404, _no_table("model"), "model", "model_not_found")
            with suppress(APIError):  # a depth that the table has not is as unknown
                return self._at_least(int(depth) if _NUMBER.fullmatch(depth) else depth, "model")
        raise APIError(
            404, f"model: it must be one of {', '.join(self.names)}, got another.", "model", "model_not_found"
        )

    def _at_least(self, depth: int | str, field: str) -> NamedPath:
        """The shallowest path of the table that runs at least ``depth`` layers, or that share of them."""
        if not self._entries:
            raise bad_request(_no_table(field), field)
        share = _SHARE.fullmatch(depth) if isinstance(depth, str) else None
        wanted = depth if isinstance(depth, int) else 0
        if share is not None:
            wanted = math.ceil(round(float(share[1]) * self._num_layers / 100, 6))
        if not 1 <= wanted <= self._num_layers:
            raise bad_request(
                f'{field}: a depth must be a number of layers in 1..{self._num_layers} or a share such as "50%", got '
                "another.",
                field,
            )
        return next(named for budget, named in self._entries.items() if budget >= wanted)

    def _make_entries(self, found: FoundPaths | None, listed: list[str]) -> dict[int, NamedPath]:
        """The table, with the full path where anything is in it."""
        names = listed or ([] if found is None else [f"found:{budget}" for budget in found.layers])
        entries: dict[int, NamedPath] = {}
        for named in map(self.parse, names):
            if named.path.budget in entries:
                other = entries[named.path.budget].name
                raise ValueError(
                    f"DepthTable: paths must have a number of layers each, got {named.name} beside {other}."
                )
            entries[named.path.budget] = named
        if entries:
            entries.setdefault(self._num_layers, self.parse("full"))
        return dict(sorted(entries.items()))

    def _read(self, file: Path) -> tuple[FoundPaths | None, list[str]]:
        """What a search has found, or the paths that are listed in ``file``."""
        text = file.read_text(encoding="utf-8")
        if not text.lstrip().startswith("{"):
            listed = [line.strip() for line in lines(text) if line.strip() and not line.startswith("#")]
            if not listed:
                raise ValueError(f"DepthTable: {file} must hold at least one path, got none.")
            return self._model.found_paths, listed
        found = FoundPaths.read(file)
        if found.num_layers != self._num_layers:
            raise ValueError(
                f"DepthTable: {file} must hold paths of {self._num_layers} layers, got paths of {found.num_layers}."
            )
        return found, []


def _no_table(field: str) -> str:
    """What is wrong with ``field``, which asks for a depth, where there is no table, and how to have one."""
    return (
        f"{field}: the server must have a table of paths for a depth, got none. Start it with --paths FILE, a path a "
        "line, or with a model for which `dynskip search` has found paths; "
        f"{' and '.join((*PACKAGED, *ADAPTED))} come with some."
    )
