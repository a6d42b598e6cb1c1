"""Conversations in a model's own words: turns of a user that it writes itself or that data give, answered by it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynskip.data.conversations import encode_prompt
from dynskip.data.examples import Example
from dynskip.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynskip.llm import LLM

# Conversations that are written together, and appended to the file together.
_CHUNK = 64
# A turn that is kept: as long as a question or a task, of several words, most of them once.
_TURN_CHARS = range(16, 401)
_MIN_WORDS = 4
_MIN_DISTINCT = 0.6
# An answer that goes round in circles has few distinct groups of so many words.
_GROUP = 4
_MIN_DISTINCT_GROUPS = 0.7
# Chunks in a row of which hardly anything is kept, before the writing is given up.
_MAX_POOR_CHUNKS = 8


@dataclass(frozen=True, slots=True)
class Writing:
    """How many conversations are written, and how.

    num_own_turns: that begin with a turn which the model writes itself, behind the opening of a user's turn in its
        chat template. num_data_turns: that begin with a prompt of the data, at most ``max_prompt_tokens`` long in the
        template. Turns have at most ``max_turn_tokens``, answers are cut at ``max_answer_tokens``. Turns are sampled
        at ``turn_temperature``, answers at ``answer_temperature``, from the likeliest tokens of mass ``top_p``.

    What is kept of the own turns: those that end by themselves, have 16 to 400 characters and at least 4 words, 60 % of
    them distinct, hold no control token, and were not there before. Of the answers: those that are not empty and whose
    groups of 4 words are distinct to 70 %.
    """

    num_own_turns: int
    num_data_turns: int
    max_turn_tokens: int = 80
    max_prompt_tokens: int = 256
    max_answer_tokens: int = 96
    turn_temperature: float = 1.0
    answer_temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0


def user_turn_opening(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """The token ids before what a user says, in the chat template, and the token that ends it.

    Raises ValueError where the tokenizer has no chat template, or one that ends a turn with text.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "user_turn_opening: model must come with a chat template, got none. Use --own-turns 0, no turns of its own."
        )
    mark = "\ue000"
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
    )
    before, _, behind = str(written).partition(mark)
    end = tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
    if not behind or not end or end[0] not in tokenizer.all_special_ids:
        raise ValueError(
            "user_turn_opening: chat template must end a turn with a control token, got text. Use --own-turns 0, no "
            "turns of its own."
        )
    return list(tokenizer(before, add_special_tokens=False)["input_ids"]), end[0]


def write_texts(
    llm: LLM, prompts: Sequence[str], writing: Writing, path: Path, progress: bool = False
) -> list[Example]:
    """The conversations of ``writing``, kept in ``path`` as they are written: started again, it goes on.

    prompts: of the data, in any order. path: a chunk a line, {"source": "own" or "data", "chunk": its number, "texts":
    pairs of the token ids of a prompt and its answer}. Raises ValueError where the data have too few prompts that fit,
    and where the model repeats itself, so that hardly anything is kept of what it writes.
    """
    from tqdm import tqdm

    assert llm.tokenizer is not None, "who writes has words"
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = _whole_lines(path)
    plans: list[tuple[str, int, Callable[[int], list[tuple[int, ...]]]]] = [
        ("own", writing.num_own_turns, _OwnTurns(llm, writing) if writing.num_own_turns else _no_turns),
        ("data", writing.num_data_turns, _DataTurns(llm.tokenizer, prompts, writing)),
    ]
    examples: list[Example] = []
    total = writing.num_own_turns + writing.num_data_turns
    with (
        path.open("a", encoding="utf-8") as file,
        tqdm(total=total, desc="texts", unit="text", leave=False, disable=not progress) as bar,
    ):
        for source, num_wanted, turns_of in plans:
            kept: dict[tuple[int, ...], tuple[int, ...]] = {}
            num_poor = 0
            for chunk in count():
                if len(kept) >= num_wanted:
                    break
                if (source, chunk) not in chunks:
                    turns = [turn for turn in dict.fromkeys(turns_of(chunk)) if turn not in kept]
                    texts = _answered(llm, turns, writing, f"{writing.seed} {source} {chunk}")
                    line = {"source": source, "chunk": chunk, "texts": texts}
                    file.write(json.dumps(line, separators=(",", ":")) + "\n")
                    file.flush()
                    chunks[source, chunk] = texts
                texts = chunks[source, chunk][: num_wanted - len(kept)]
                kept.update((tuple(prompt), tuple(answer)) for prompt, answer in texts)
                bar.update(len(texts))
                num_poor = num_poor + 1 if len(texts) < _CHUNK / 20 else 0
                if num_poor == _MAX_POOR_CHUNKS and len(kept) < num_wanted:
                    raise ValueError(
                        f"write_texts: model must write turns that differ, got {len(kept)} of {num_wanted}: of the "
                        f"last {num_poor * _CHUNK} hardly one was kept. Ask for fewer, or give prompts as data."
                    )
            examples += [Example(prompt, answer, 0) for prompt, answer in kept.items()]
    return examples


def _whole_lines(path: Path) -> dict[tuple[str, int], list[Any]]:
    """The chunks in the file; what a kill has left of a line is cut off."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("rb+") as file:
            file.truncate(len(whole))
    lines = map(json.loads, whole.splitlines())
    return {(line["source"], line["chunk"]): line["texts"] for line in lines}


def _no_turns(chunk: int) -> list[tuple[int, ...]]:
    return []


class _OwnTurns:
    """Turns that the model writes behind the opening of a user's."""

    def __init__(self, llm: LLM, writing: Writing) -> None:
        assert llm.tokenizer is not None, "who writes has words"
        self.llm, self.tokenizer, self.writing = llm, llm.tokenizer, writing
        self.opening, self.end = user_turn_opening(llm.tokenizer)

    def __call__(self, chunk: int) -> list[tuple[int, ...]]:
        """The prompts, in the template, of what was kept of chunk number ``chunk``."""
        params = SamplingParams(
            max_tokens=self.writing.max_turn_tokens,
            temperature=self.writing.turn_temperature,
            top_p=self.writing.top_p,
            n=_CHUNK,
            stop_token_ids=[self.end],
            seed=_seed(f"{self.writing.seed} turn {chunk}"),
        )
        (output,) = self.llm.generate([self.opening], params)
        turns = []
        for sample in output.samples:
            if sample.finish_reason == "stop" and sample.token_ids[-1] == self.end:
                text = str(self.tokenizer.decode(sample.token_ids[:-1])).strip()
                if _is_turn(text, self.tokenizer.all_special_tokens):
                    turns.append(tuple(encode_prompt(self.tokenizer, text)))
        return turns


class _DataTurns:
    """The prompts of the data that fit, each once, in shuffled order."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], writing: Writing) -> None:
        self.tokenizer, self.writing = tokenizer, writing
        order = list(dict.fromkeys(prompt.strip() for prompt in prompts))
        random.Random(writing.seed).shuffle(order)
        self.fitting = self._fitting(order)
        self.turns: list[tuple[int, ...]] = []

    def __call__(self, chunk: int) -> list[tuple[int, ...]]:
        """The prompts, in the template, of chunk number ``chunk``."""
        end = (chunk + 1) * _CHUNK
        self.turns += islice(self.fitting, end - len(self.turns))
        if len(self.turns) <= chunk * _CHUNK:
            raise ValueError(
                f"write_texts: data must hold prompts of at most {self.writing.max_prompt_tokens} tokens for "
                f"{self.writing.num_data_turns} conversations, got {len(self.turns)}. Ask for fewer, or give more data."
            )
        return self.turns[end - _CHUNK : end]

    def _fitting(self, prompts: Sequence[str]) -> Iterator[tuple[int, ...]]:
        for prompt in prompts:
            if prompt:
                ids = encode_prompt(self.tokenizer, prompt)
                if len(ids) <= self.writing.max_prompt_tokens:
                    yield tuple(ids)


def _answered(
    llm: LLM, turns: Sequence[tuple[int, ...]], writing: Writing, seed: str
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """``turns`` with answers, where these are any good."""
    positions = llm.model.decoder_config.max_positions
    turns = [turn for turn in turns if len(turn) < positions]
    if not turns:
        return []
    params = [
        SamplingParams(
            max_tokens=min(writing.max_answer_tokens, positions - len(turn)),
            temperature=writing.answer_temperature,
            top_p=writing.top_p,
            seed=_seed(f"{seed} answer {index}"),
        )
        for index, turn in enumerate(turns)
    ]
    answered = []
    for turn, output in zip(turns, llm.generate([list(turn) for turn in turns], params), strict=True):
        if output.error is not None:
            raise output.error
        if _is_answer(output.text or ""):
            answered.append((turn, tuple(output.token_ids)))
    return answered


def _is_turn(text: str, control_tokens: Sequence[str]) -> bool:
    words = text.lower().split()
    return (
        len(text) in _TURN_CHARS
        and len(words) >= _MIN_WORDS
        and len(set(words)) >= _MIN_DISTINCT * len(words)
        and not any(token in text for token in control_tokens)
        and "\ufffd" not in text
    )


def _is_answer(text: str) -> bool:
    words = text.lower().split()
    groups = [tuple(words[start : start + _GROUP]) for start in range(len(words) - _GROUP + 1)]
    return bool(words) and len(set(groups)) >= _MIN_DISTINCT_GROUPS * len(groups)


def _seed(text: str) -> int:
    return random.Random(text).getrandbits(63)
