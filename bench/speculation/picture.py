"""A run of opt-mini as a picture: guesses and verifications."""

from __future__ import annotations

from collections.abc import Sequence

from dynskip.engine.drafting import Drafting
from dynskip.engine.request import Span
from dynskip.llm import LLM
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams


def picture(num_tokens: int = 48) -> str:
    """An SVG of a run of opt-mini: a row a verification, a cell a token; guesses, right or wrong, and its own."""
    llm = LLM(deterministic=True)
    rounds: list[tuple[int, list[int], int]] = []
    accepted = Drafting.accepted

    def recorded(self: Drafting, span: Span, num_kept: int) -> None:
        rounds.append((span.sequence.num_tokens - len(prompt), list(span.sequence.guesses), num_kept))
        accepted(self, span, num_kept)

    prompt = llm.chat_prompt("Give me three tips for growing tomatoes on a balcony.")
    params = SamplingParams(max_tokens=num_tokens)
    llm.generate([prompt], params, draft=LayerPath.uniform(24, 4))  # the first run learns what guesses take
    Drafting.accepted = recorded  # type: ignore[method-assign]
    try:
        (output,) = llm.generate([prompt], params, draft=LayerPath.uniform(24, 4))
    finally:
        Drafting.accepted = accepted  # type: ignore[method-assign]
    return _svg(rounds, len(output.token_ids))


def _svg(rounds: Sequence[tuple[int, list[int], int]], num_tokens: int) -> str:
    cell, left, top = 15, 110, 48
    width, height = left + cell * (num_tokens + 9) + 10, top + cell * (len(rounds) + 1) + 12
    kinds = (("right", "#2a9d62", "guess, right"), ("wrong", "#d9634c", "guess, wrong"), ("own", "#3f6fb5", "its own"))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11" role="img" aria-label="guesses of a draft and their verifications">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for index, (_, color, name) in enumerate(kinds):
        x = left + 120 * index
        parts.append(f'<rect x="{x}" y="10" width="11" height="11" fill="{color}"/>')
        parts.append(f'<text x="{x + 16}" y="20">{name}</text>')
    note = "tokens of the output, one after the other; steps without guesses gave those in the gaps"
    parts.append(f'<text x="{left}" y="40" fill="#555555">{note}</text>')
    for row, (first, guesses, num_kept) in enumerate(rounds):
        y = top + cell * row
        parts.append(f'<text x="8" y="{y + 11}" fill="#555555">verification {row + 1}</text>')
        for rank in range(len(guesses)):
            is_right = rank < num_kept - 1
            # In grey the wrong ones are known by their outline.
            style = f'fill="{kinds[0][1]}"' if is_right else f'fill="#ffffff" stroke="{kinds[1][1]}" stroke-width="2"'
            inset = 0 if is_right else 1
            size = cell - 2 - 2 * inset
            x = left + cell * (first + rank) + inset
            parts.append(f'<rect x="{x}" y="{y + inset}" width="{size}" height="{size}" {style}/>')
        x = left + cell * (first + num_kept - 1)
        parts.append(f'<rect x="{x + 3}" y="{y + 3}" width="{cell - 8}" height="{cell - 8}" fill="{kinds[2][1]}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"
