"""What clients are sent: choices, log-probabilities and usage, whole or in chunks. Pure data."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from dynskip.engine.request import RequestOutput
from dynskip.engine.text_rule import REPLACEMENT
from dynskip.serving.depths import NamedPath

Kind = Literal["completion", "chat"]
# JSON has no infinity; log-probabilities of what cannot come are sent as this.
_LEAST_LOGPROB = -9999.0
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
# Of byte-level tokenizers the sign of each byte: itself where it is a printable one, else the next beyond 255, as GPT-2
# has it. Others name a byte, as SentencePiece does.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_LEVEL = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_OBJECTS = {"completion": ("text_completion", "text_completion"), "chat": ("chat.completion", "chat.completion.chunk")}


def as_json(value: object) -> bytes:
    """``value`` as the bytes of an answer."""
    return _ENCODER.encode(value).encode()


def usage(num_prompt_tokens: int, num_tokens: int, outputs: Sequence[RequestOutput] | None = None) -> dict[str, Any]:
    """How many tokens a request read and got; outputs: once they are known, tell how much of the prompts was cached."""
    counts: dict[str, Any] = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
    }
    if outputs is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": sum(output.num_cached_tokens for output in outputs)}
    return counts


def facts(named: NamedPath, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """The object ``dynskip`` of an answer: which layers ran, what drafts guessed, how long it was in the engine.

    seeds: of each prompt's outputs, given or drawn; None of greedy ones.
    """
    return {
        "path": named.name,
        "layers": list(named.path.layers),
        "num_drafted": sum(output.num_drafted for output in outputs),
        "num_accepted": sum(output.num_accepted for output in outputs),
        "seeds": [output.seed for output in outputs],
        "milliseconds": round(1e3 * max(output.latency_s for output in outputs), 3),
    }


@dataclass(frozen=True)
class Envelope:
    """What all parts of an answer have in common."""

    kind: Kind
    request_id: str
    created: int
    model: str

    def whole(self, choices: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
        """An answer of one piece."""
        return self._made(0, choices, others)

    def chunk(self, choices: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
        """A part of a stream."""
        return self._made(1, choices, others)

    def _made(self, is_chunk: int, choices: list[dict[str, Any]], others: dict[str, Any]) -> dict[str, Any]:
        prefix = "cmpl" if self.kind == "completion" else "chatcmpl"
        return {
            "id": f"{prefix}-{self.request_id}",
            "object": _OBJECTS[self.kind][is_chunk],
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **others,
        }


class TokenTexts:
    """The texts of single tokens, for log-probabilities; ``token:7`` for token 7 without a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.special = frozenset(() if tokenizer is None else tokenizer.all_special_ids)
        self.of = lru_cache(maxsize=65536)(self._of)
        self.bytes_of = lru_cache(maxsize=65536)(self._bytes_of)

    def _of(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"token:{token_id}"
        text = str(self._tokenizer.decode([token_id]))
        spelled = self._tokenizer.convert_ids_to_tokens(token_id)
        # SentencePiece takes the space before the first word away.
        begins_word = isinstance(spelled, str) and spelled.startswith("\u2581") and not text.startswith(" ")
        return f" {text}" if begins_word else text

    def completion_logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, float] | None], offsets: list[int]
    ) -> dict[str, Any]:
        """``logprobs`` of a completion's choice; None stands for a token that nothing came before.

        offsets: of each token, the characters before it.
        """
        texts = [self.of(token_id) for token_id in token_ids]
        return {
            "tokens": texts,
            "token_logprobs": [
                None if each is None else _clipped(each[token_id])
                for token_id, each in zip(token_ids, logprobs, strict=True)
            ],
            "top_logprobs": [
                None if each is None else {self.of(token): _clipped(value) for token, value in reversed(_ranked(each))}
                for each in logprobs
            ],
            "text_offset": offsets,
        }

    def chat_logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, float]], num_top: int
    ) -> dict[str, Any]:
        """``logprobs`` of a chat's choice."""
        content = [
            {
                **self._entry(token_id, each[token_id]),
                "top_logprobs": [self._entry(token, value) for token, value in _ranked(each)[:num_top]],
            }
            for token_id, each in zip(token_ids, logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}

    def prompt_logprobs(self, logprobs: Sequence[Mapping[int, float] | None]) -> list[dict[str, Any] | None]:
        """``prompt_logprobs`` of an answer: for each token of the prompt by token id, None for the first."""
        return [
            None
            if each is None
            else {
                str(token): {"logprob": _clipped(value), "decoded_token": self.of(token)}
                for token, value in _ranked(each)
            }
            for each in logprobs
        ]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": self.of(token_id), "logprob": _clipped(logprob), "bytes": [*self.bytes_of(token_id)]}

    def _bytes_of(self, token_id: int) -> bytes:
        """Those that the token stands for: of a part of a character its own, where `of` can only say that it is one."""
        text = self.of(token_id)
        spelled = None if self._tokenizer is None else self._tokenizer.convert_ids_to_tokens(token_id)
        if REPLACEMENT not in text or not isinstance(spelled, str):
            return text.encode()
        if named := _BYTE.fullmatch(spelled):
            return bytes([int(named[1], 16)])
        own = [_BYTE_LEVEL.get(character) for character in spelled]
        return text.encode() if None in own else bytes(byte for byte in own if byte is not None)


class Characters:
    """Counts the characters of a text as its tokens come, which may begin and end within one."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_ended = 0

    def add(self, token_ids: Sequence[int], hides_special: bool) -> list[int]:
        """Count those of more tokens; how many have begun before each. hides_special: special tokens add none."""
        hidden = self._texts.special if hides_special else frozenset()
        begun = []
        for token_id in token_ids:
            begun.append(self._num_ended + bool(self._decoder.getstate()[0]))
            if token_id not in hidden:
                self._num_ended += len(self._decoder.decode(self._texts.bytes_of(token_id)))
        return begun


def choice_of(kind: Kind, index: int, text: str, finish_reason: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    """One output of an answer of one piece."""
    message = {"role": "assistant", "content": text, "refusal": None}
    content: dict[str, Any] = {"text": text} if kind == "completion" else {"message": message}
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


def delta_of(
    kind: Kind,
    index: int,
    text: str,
    finish_reason: str | None,
    logprobs: dict[str, Any] | None = None,
    role: bool = False,
) -> dict[str, Any]:
    """What a chunk adds to one output; role: as the first of a chat."""
    delta = {"role": "assistant", "content": text} if role else {"content": text}
    content: dict[str, Any] = {"text": text} if kind == "completion" else {"delta": delta}
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


def _ranked(logprobs: Mapping[int, float]) -> list[tuple[int, float]]:
    """The tokens, the most likely first."""
    return sorted(logprobs.items(), key=lambda item: -item[1])


def _clipped(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
