"""What the parts of ``dynskip demo`` have in common: prompts as a model knows them, paths by a share, tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynskip.llm import LLM
    from dynskip.paths import LayerPath


def demo_path(num_layers: int, kind: str, share: float, seed: int) -> tuple[str, LayerPath]:
    """A path of a kind that runs ``share`` of the layers, and the name that `--path` takes for it."""
    from dynskip.paths import LayerPath

    budget = max(1, round(num_layers * share))
    name = {"full": "full", "random": f"random:{budget}:{seed}"}.get(kind, f"{kind}:{budget}")
    return name, LayerPath.parse(name, num_layers)


def prompt_ids(llm: LLM, prompt: str) -> list[int]:
    """The prompt in the form that the model was fine-tuned on, where its tokenizer knows one."""
    has_template = getattr(llm.tokenizer, "chat_template", None) is not None
    return llm.chat_prompt(prompt) if has_template else llm.encode(prompt)


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The rows as lines, names to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return lines
