"""`Draft`: the path that guesses the tokens of a request, and what the ``draft`` argument stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from dynskip.arguments import shown
from dynskip.paths import LayerPath

DraftEntries = Literal["own", "path"]
ENTRIES: tuple[DraftEntries, ...] = ("own", "path")
Drafts: TypeAlias = "LayerPath | Draft | Sequence[LayerPath | Draft | None] | Literal['auto'] | None"


@dataclass(frozen=True, slots=True)
class Draft:
    """A path that guesses tokens which the request's own path verifies.

    entries: whose keys and values it reads: those of its "own" making, for all tokens of the request, or the "path"'s,
        to which it adds its own for the tokens that it guesses; its layers are among the path's then.
    agreement: how often a search has seen it right, None where none has looked.
    """

    path: LayerPath
    entries: DraftEntries = "own"
    agreement: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.entries not in ENTRIES:
            raise ValueError(f"Draft: entries must be {' or '.join(ENTRIES)}, got {shown(self.entries)}.")

    def check(self, path: LayerPath | None, what: str) -> None:
        """Raise ValueError, about ``what``, where it cannot guess for a request along ``path``."""
        if path is None:
            raise _no_draft_per_token(str(self.path), what)
        if self.path.num_layers != path.num_layers:
            raise ValueError(f"{what}: draft must be of {path.num_layers} layers, got one of {self.path.num_layers}.")
        others = set(self.path.layers) - set(path.layers)
        if self.entries == "path" and others:
            raise ValueError(
                f"{what}: draft must run layers of the path only where draft_entries is 'path', got layer "
                f"{min(others)} beside {path}. Use draft_entries='own'."
            )

    def for_path(self, path: LayerPath) -> Draft:
        """The same for requests along ``path``: where it is the path's beginning, both make the same entries."""
        is_beginning = path.layers[: self.path.budget] == self.path.layers
        return replace(self, entries="path") if is_beginning else self

    def num_common_layers(self, path: LayerPath) -> int:
        """How many of the decoder's first layers compute the same for the draft as for ``path``; 0 where it runs none.

        They do as long as both run the same layers and read the same entries.
        """
        if self.entries == "own":
            return 0
        others = set(path.layers) ^ set(self.path.layers)
        first = min(others, default=path.num_layers)
        return first if any(layer < first for layer in path.layers) else 0

    def __str__(self) -> str:
        return f"{self.path}, {self.entries} entries"


def _no_draft_per_token(draft: str, what: str) -> ValueError:
    return ValueError(
        f"{what}: draft must be None for a request whose tokens have layers of their own each, got {draft}. What a "
        "token runs is decided with its path's states, which a draft has not."
    )


def resolve_drafts(
    draft: Drafts,
    entries: str,
    paths: Sequence[LayerPath | None],
    num_layers: int,
    find: Callable[[LayerPath], Draft | None],
    what: str,
) -> list[Draft | None]:
    """The draft of each request along ``paths``, None for none.

    find: gives the draft that a search has left for a path, for "auto". Raises TypeError or ValueError, about ``what``.
    """
    if entries not in ENTRIES:
        raise ValueError(f"{what}: draft_entries must be 'own' or 'path', got {shown(entries)}.")
    if draft is None:
        return [None] * len(paths)
    given: Sequence[object]
    if isinstance(draft, str):
        if draft != "auto":
            raise ValueError(f"{what}: draft must be a LayerPath, 'auto' or None, got {shown(draft)}.")
        if entries != "own":
            raise ValueError(
                f"{what}: draft_entries must be left out with 'auto', which knows them, got {shown(entries)}."
            )
        known: dict[LayerPath, Draft | None] = {}
        for path in dict.fromkeys(paths):
            if path is None:
                raise _no_draft_per_token("'auto'", what)
            known[path] = find(path)
        given = [None if path is None else known[path] for path in paths]
    elif isinstance(draft, LayerPath | Draft):
        given = [draft] * len(paths)
    elif isinstance(draft, Sequence) and not isinstance(draft, bytes | bytearray):
        given = draft
        if len(given) != len(paths):
            raise ValueError(f"{what}: draft must be one for all or one per prompt, got {len(given)} for {len(paths)}.")
    else:
        raise TypeError(f"{what}: draft must be a LayerPath, 'auto' or None, got {type(draft).__name__}.")
    found: list[Draft | None] = []
    for each, path in zip(given, paths, strict=True):
        if each is None:
            found.append(None)
            continue
        one = Draft(each, entries) if isinstance(each, LayerPath) else each
        if not isinstance(one, Draft):
            raise TypeError(f"{what}: draft of a prompt must be a LayerPath or None, got {shown(each)}.")
        one.check(path, what)
        assert path is not None, "checked"
        found.append(one.for_path(path))
    return found
