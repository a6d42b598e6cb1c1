"""`PromptReader`: from the prompts and messages of requests to token ids, in a thread of its own."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from dynskip.arguments import shown
from dynskip.llm import LLM
from dynskip.prompts import Message
from dynskip.serving.errors import bad_request, told
from dynskip.serving.protocol import ChatMessage

T = TypeVar("T")
# What a message may have beside role and content, as clients send answers back: nothing, in any form. A name of who
# speaks is a hint, which chat templates do not write.
_NOTHING: tuple[object, ...] = (None, [], {}, "")
_HINT = "name"


class PromptReader:
    """Tokenizes what clients send with a tokenizer of its own, one text at a time: the event loop never waits for it.

    A tokenizer is not to be used by two threads at once, and that of ``llm`` is the engine's.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = LLM(llm.model, copy.deepcopy(llm.tokenizer))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dynskip-tokenizer")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    async def completions(self, prompt: str | list[Any]) -> list[list[int]]:
        """The token ids of each prompt: a text, token ids, or a list of either.

        Names of special tokens in a text stand for them: its caller writes all of it.
        """
        prompts = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
        if not prompts:
            raise bad_request("prompt: it must hold at least one prompt, got none.", "prompt")
        return await self._run("prompt", lambda: [self._llm.encode(each, "completions: prompt") for each in prompts])

    async def chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The token ids of a conversation. What its messages say is text: it cannot end a turn."""
        plain = [_message(index, message) for index, message in enumerate(messages)]
        return await self._run("messages", lambda: self._llm.chat_prompt(plain, special_tokens=False))

    async def tokens(self, prompt: str, special_tokens: bool) -> list[int]:
        """The token ids of a text, with what the tokenizer puts around it or without."""
        tokenizer = self._tokenizer("prompt")
        if special_tokens:
            return await self._run("prompt", lambda: self._llm.encode(prompt, "tokenize: prompt"))
        return await self._run("prompt", lambda: list(tokenizer(prompt, add_special_tokens=False)["input_ids"]))

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

    async def _run(self, field: str, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (TypeError, ValueError) as error:
            raise told(error, field) from error


def _message(index: int, message: ChatMessage) -> Message:
    """The message as a chat template takes it; an APIError for what is no text."""
    what = f"messages: message {index}"
    for name, value in (message.model_extra or {}).items():
        if value not in _NOTHING and not (name == _HINT and isinstance(value, str)):
            raise bad_request(f"{what} must have role and content only, got {name} too.", "messages")
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise bad_request(f"{what} must have parts of type text, got another.", "messages")
        content = "\n".join(part.text or "" for part in content)
    if content is None:
        raise bad_request(f"{what} must have content, got none.", "messages")
    # What newer clients call the system.
    return {"role": "system" if message.role == "developer" else message.role, "content": content}
