"""`PromptReader`: from the prompts and messages of requests to token ids, in a thread of its own."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from dynskip.arguments import shown
from dynskip.llm import LLM
from dynskip.prompts import Message, check_unicode
from dynskip.serving.errors import bad_request, told, too_long
from dynskip.serving.protocol import ChatMessage

T = TypeVar("T")
# What a message may have beside role and content, as clients send answers back: nothing, in any form. A name of who
# speaks is a hint, which chat templates do not write.
_NOTHING: tuple[object, ...] = (None, [], {}, "")
_HINT = "name"
_TYPES = ("message", "text")  # what some clients call a message


class PromptReader:
    """Tokenizes what clients send with a tokenizer of its own, one text at a time: the event loop never waits for it.

    A tokenizer is not to be used by two threads at once, and that of ``llm`` is the engine's. A text that has more
    characters than ``max_context_len`` tokens can stand for is refused unread: it would keep all others waiting.
    """

    def __init__(self, llm: LLM, max_context_len: int) -> None:
        self._llm = LLM(llm.model, copy.deepcopy(llm.tokenizer))
        self._max_context_len = max_context_len
        names = () if llm.tokenizer is None else llm.tokenizer.get_vocab()
        self._most_characters = max_context_len * max(map(len, names), default=0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dynskip-tokenizer")

    def close(self) -> None:
        """End the thread, which begins nothing new."""
        self._thread.shutdown(cancel_futures=True)

    async def completions(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """The token ids of each prompt, a text or token ids, which wait for no text.

        Names of special tokens in a text stand for them: its caller writes all of it.
        """
        for each in prompts:
            if isinstance(each, str):
                self._check_length("prompt", len(each))
            elif len(each) >= self._max_context_len:
                raise too_long("prompt", self._max_context_len, len(each))
        encode = partial(self._llm.encode, what="completions: prompt")
        if not any(isinstance(each, str) for each in prompts):
            return _told("prompt", lambda: list(map(encode, prompts)))
        return await self._run("prompt", lambda: list(map(encode, prompts)))

    async def chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The token ids of a conversation. What its messages say is text: it cannot end a turn.

        Each message has at least a token, so that as many as the context has cannot fit: an empty one is not free.
        """
        if len(messages) >= self._max_context_len:
            raise too_long("messages", self._max_context_len, f"{len(messages)} messages, which have more")
        plain = [_message(index, message) for index, message in enumerate(messages)]
        self._check_length("messages", sum(len(message["content"]) for message in plain))
        return await self._run("messages", lambda: self._llm.chat_prompt(plain, special_tokens=False))

    async def tokens(self, prompt: str, special_tokens: bool) -> list[int]:
        """The token ids of a text, with what the tokenizer puts around it or without."""
        tokenizer = self._tokenizer("prompt")
        self._check_length("prompt", len(prompt))

        def work() -> list[int]:
            if special_tokens:
                return self._llm.encode(prompt, "tokenize: prompt")
            check_unicode(prompt, "tokenize: prompt")
            return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])

        return await self._run("prompt", work)

    async def token_texts(self, token_ids: list[int]) -> list[str]:
        """The token of each id, as the tokenizer's vocabulary spells it."""
        tokenizer = self._tokenizer("return_token_strs")
        return await self._run("return_token_strs", lambda: list(tokenizer.convert_ids_to_tokens(token_ids)))

    async def text(self, token_ids: list[int]) -> str:
        """The text of token ids, special tokens among it."""
        tokenizer, vocab_size = self._tokenizer("tokens"), self._llm.model.decoder_config.vocab_size
        wrong = next((token for token in token_ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise bad_request(f"tokens: they must be token ids in 0..{vocab_size - 1}, got {shown(wrong)}.", "tokens")
        return await self._run("tokens", lambda: str(tokenizer.decode(token_ids)))

    def _tokenizer(self, field: str) -> Any:
        if self._llm.tokenizer is None:
            raise bad_request(f"{field}: the model must come with a tokenizer, got none. Use token ids.", field)
        return self._llm.tokenizer

    def _check_length(self, field: str, num_characters: int) -> None:
        """Raise an APIError for so long a text that it cannot fit."""
        if self._llm.tokenizer is not None and num_characters > self._most_characters:
            raise too_long(field, self._max_context_len, f"{num_characters} characters, which are more")

    async def _run(self, field: str, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(_told, field, work))


def _told(field: str, work: Callable[[], T]) -> T:
    """What ``work`` comes to; what a client is to be told becomes an APIError."""
    try:
        return work()
    except (TypeError, ValueError) as error:
        raise told(error, field) from error
    except StopIteration as error:  # no future takes one: who waits for it would wait for ever
        raise RuntimeError("PromptReader: a prompt must be read to its end, got StopIteration.") from error


def prompts_in(prompt: str | list[Any]) -> list[Any]:
    """The prompts that the field stands for: a text, token ids, or a list of either."""
    prompts = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
    if not prompts:
        raise bad_request("prompt: it must hold at least one prompt, got none.", "prompt")
    return prompts


def _message(index: int, message: ChatMessage) -> Message:
    """The message as a chat template takes it; an APIError for what is no text."""
    what = f"messages: message {index}"
    for name, value in (message.model_extra or {}).items():
        is_hint = (name == _HINT and isinstance(value, str)) or (name == "type" and value in _TYPES)
        if value not in _NOTHING and not is_hint:
            raise bad_request(f"{what} must have role and content only, got {name} too.", "messages")
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise bad_request(f"{what} must have parts of type text, got another.", "messages")
            given = [name for name, value in (part.model_extra or {}).items() if value not in _NOTHING]
            if given:
                raise bad_request(f"{what} must have parts of type and text only, got {given[0]} too.", "messages")
        content = "\n".join(part.text or "" for part in content)
    if content is None:
        raise bad_request(f"{what} must have content, got none.", "messages")
    # What newer clients call the system.
    return {"role": "system" if message.role == "developer" else message.role, "content": content}
