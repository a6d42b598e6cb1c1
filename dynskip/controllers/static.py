"""The controller that knows its paths beforehand."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dynskip.paths import LayerPath


class StaticController:
    """Gives every sequence the same path, or sequence b the b-th of several."""

    def __init__(self, paths: LayerPath | Sequence[LayerPath]) -> None:
        self.paths = paths if isinstance(paths, LayerPath) else list(paths)

    def choose_paths(self, prompt_ids: Sequence[Tensor], prompt_embeddings: Sequence[Tensor]) -> list[LayerPath]:
        """One path per prompt; raises ValueError where several were given and their number is not the prompts'."""
        if isinstance(self.paths, LayerPath):
            return [self.paths] * len(prompt_ids)
        if len(self.paths) != len(prompt_ids):
            raise ValueError(
                f"StaticController: paths must be one per prompt, got {len(self.paths)} for {len(prompt_ids)} prompts."
            )
        return list(self.paths)
