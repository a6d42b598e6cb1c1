"""`place`: which of several engines a request goes to. A pure function of what they hold.

Paths and prefixes have an order of the engines each, by rendezvous hashing: it is the same in every process, and where
an engine comes or goes, only those requests move that went there.

A path spans as many engines as its share of all work is worth in whole ones, at least one: the first of the path's
order. Among them the request goes to the first of its prefix's order. So requests of a rare path meet on one engine and
make full batches, those of a frequent one spread, and prompts that begin alike go where their keys and values are. An
engine that holds more work than the least busy one, and half a batch of this path on top of it, is passed over: then
the path's order decides among the others. Work is counted in layers of outputs that have not ended, the head as one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

from dynskip.paths import LayerPath

# As `place`: what engines hold by path, a request's path and prefix, and the rows of a batch, to the engine's name.
Choose = Callable[[Mapping[str, Mapping[LayerPath, int]], LayerPath, str, int], str]


def place(held: Mapping[str, Mapping[LayerPath, int]], path: LayerPath, prefix: str, batch: int) -> str:
    """The name of the engine that a request goes to.

    held: by engine, the outputs of each path that have not ended. prefix: what the prompt has in common with those that
    begin alike. batch: most rows of a decode step.
    Raises ValueError where there is no engine.
    """
    if not held:
        raise ValueError("place: held must have at least one engine, got none.")
    work = {name: sum(count * _row(each) for each, count in paths.items()) for name, paths in held.items()}
    own = _row(path) * (1 + sum(paths.get(path, 0) for paths in held.values()))
    span = max(1, len(held) * own // (_row(path) + sum(work.values())))
    limit = min(work.values()) + batch * _row(path) / 2
    by_path = _ranked(list(held), f"path {path.layers}")
    by_prefix = _ranked(by_path[:span], f"prefix {path.layers} {prefix}")
    return next(name for name in (*by_prefix, *by_path) if work[name] <= limit)


def _row(path: LayerPath) -> int:
    """The work of an output along ``path``."""
    return path.budget + 1


def _ranked(names: Sequence[str], key: str) -> list[str]:
    """``names`` in the order that belongs to ``key``."""
    return sorted(names, key=lambda name: hashlib.blake2b(f"{name} {key}".encode(), digest_size=8).digest())
