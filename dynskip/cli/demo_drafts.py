"""The demo's draft: one prompt with and without, the guessed tokens marked."""

from __future__ import annotations

import shutil
import textwrap
import time
from dataclasses import dataclass

from dynskip.cli.demo_common import prompt_ids
from dynskip.cli.options import UserError

PROMPT = "Give me three tips for growing tomatoes on a balcony."
# opt-mini has 24 layers, and was trained along uniform:4, too.
_SHARE = 1 / 6
_ROUNDS = 5


@dataclass(frozen=True)
class DraftResult:
    """A text with and without a draft.

    marked: the text, each run of tokens that the draft had guessed in brackets. seconds: medians of rounds in turns.
    """

    prompt: str
    draft: str
    text: str
    marked: str
    num_tokens: int
    num_drafted: int
    num_accepted: int
    same_text: bool
    with_draft_s: float
    without_s: float


def run_drafts(model: str | None, max_tokens: int, backend: str) -> DraftResult:
    """The demo's prompt, greedily, with and without a draft."""
    from dynskip.llm import LLM
    from dynskip.paths import LayerPath
    from dynskip.sampling import SamplingParams

    llm = LLM(model, backend=backend, deterministic=True)
    if llm.tokenizer is None:
        raise UserError("--model must come with a tokenizer for texts")
    num_layers = llm.model.num_layers
    draft = LayerPath.uniform(num_layers, max(1, round(num_layers * _SHARE)))
    prompts = [prompt_ids(llm, PROMPT)]
    params = SamplingParams(max_tokens=max_tokens)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    outputs = {}
    for turn in range(2 * _ROUNDS):
        guesses = bool(turn % 2)
        begin_s = time.perf_counter()
        (outputs[guesses],) = llm.generate(prompts, params, draft=draft if guesses else None)
        seconds[guesses].append(time.perf_counter() - begin_s)
    output = outputs[True]
    guessed = output.samples[0].was_guessed
    assert guessed is not None, "it had a draft"
    return DraftResult(
        PROMPT,
        f"uniform:{draft.budget}",
        output.text or "",
        _marked(llm, output.token_ids, guessed),
        len(output.token_ids),
        output.num_drafted,
        output.num_accepted,
        output.token_ids == outputs[False].token_ids,
        *(sorted(seconds[guesses])[_ROUNDS // 2] for guesses in (True, False)),
    )


def drafts_page(result: DraftResult) -> str:
    """The text with its guessed tokens marked, counts and seconds."""
    width = min(shutil.get_terminal_size().columns, 120)
    same = "the same text without" if result.same_text else "ANOTHER TEXT WITHOUT"
    lines = [f"DRAFT: {result.draft} guesses, all layers verify; [guessed tokens] ({same})", ""]
    lines += textwrap.wrap(result.prompt, width, initial_indent="  > ", subsequent_indent="    ")
    for paragraph in result.marked.strip().splitlines():
        lines += textwrap.wrap(paragraph, width, initial_indent="    ", subsequent_indent="    ")
    seconds = f"{result.with_draft_s:.3f} s with the draft, {result.without_s:.3f} s without"
    if result.num_drafted:
        found = f"{result.num_accepted} of {result.num_drafted} guesses were right."
        seconds += f", {result.without_s / result.with_draft_s:.2f}x as fast"
    else:
        # What differs then is the machine's doing, and no gain.
        found = "No token was guessed, since by the steps that were timed here none would have paid."
    lines += ["", f"{found} {result.num_tokens} tokens: {seconds}."]
    return "\n".join(lines) + "\n"


def _marked(llm: object, token_ids: list[int], guessed: list[bool]) -> str:
    """The text with brackets around what was guessed; a piece is what a token adds to the text before it."""
    from dynskip.llm import LLM

    assert isinstance(llm, LLM)
    pieces: list[str] = []
    before = ""
    is_open = False
    for index, was_guessed in enumerate(guessed):
        text = llm.text(token_ids[: index + 1]) or ""
        piece, before = text[len(before) :], text
        if was_guessed != is_open:
            pieces.append("[" if was_guessed else "]")
            is_open = was_guessed
        pieces.append(piece)
    return "".join(pieces) + ("]" if is_open else "")
