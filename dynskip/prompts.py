"""Texts and conversations as token ids: what of a text is text, and what the tokenizer's control tokens are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dynskip.arguments import is_unicode, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")
_LINE_END = re.compile(r"\r\n|\n|\r")
_BYTE_ORDER_MARK = "\ufeff"
# Unicode's characters of no meaning.
_PRIVATE = [chr(code) for code in range(0xE000, 0xF900)]


def lines(text: str) -> list[str]:
    """The lines of ``text`` without their ends, which are \\n, \\r\\n and \\r only, and without byte order marks."""
    return [line.removeprefix(_BYTE_ORDER_MARK) for line in _LINE_END.split(text)]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool, what: str) -> list[int]:
    """The token ids of ``text``, with what the tokenizer puts before and behind it.

    special_tokens: whether ``</s>`` and the like in the text are the tokenizer's tokens; False: text like any other.
    Raises ValueError, beginning with ``what``, for no text and for a lone surrogate.
    """
    if not text:
        raise ValueError(f"{what} must hold at least one token, got empty text.")
    check_unicode(text, what)
    return list(tokenizer(text, **_options(special_tokens))["input_ids"])


def check_unicode(text: str, what: str) -> None:
    """Raise ValueError, beginning with ``what``, where ``text`` has a lone surrogate."""
    if not is_unicode(text):
        raise ValueError(f"{what} must be text without lone surrogates, got {shown(text)}. Decode bytes as UTF-8.")


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], special_tokens: bool) -> list[int]:
    """The token ids of ``messages`` in the chat template of ``tokenizer``, ready to be answered; see `text_ids`.

    Raises TypeError for what is no list of messages, ValueError for a role or an order that the template cannot write.
    """
    messages = _checked(messages)
    names = (
        [] if special_tokens else [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    )
    contained = [name for name in names if any(name in message["content"] for message in messages)]
    if not contained:
        return _ids(tokenizer, _render(tokenizer, messages))
    # A special token that a message spells out gets another name while the template is applied: what is left of them
    # in the result is the template's own, and what stands between those is text.
    used = {character for message in messages for character in message["content"]}
    mark = next((character for character in _PRIVATE if character not in used), None)
    if mark is None:
        raise ValueError(
            f"chat_prompt: messages that spell out special tokens must leave out one of the characters {_PRIVATE[0]!r} "
            f"to {_PRIVATE[-1]!r}, got all of them."
        )
    aliases = {name: f"{mark}{index}{mark}" for index, name in enumerate(contained)}
    spelled = _pattern(aliases)
    renamed = [
        {**message, "content": spelled.sub(lambda found: aliases[found[0]], message["content"])} for message in messages
    ]
    rendered = _render(tokenizer, renamed)
    originals = {alias: name for name, alias in aliases.items()}
    restored, ids = _pattern(originals), []
    for number, part in enumerate(re.split(f"({_pattern(names).pattern})", rendered)):
        is_special = number % 2 == 1
        ids += _ids(tokenizer, restored.sub(lambda found: originals[found[0]], part), special_tokens=is_special)
    return ids


def _checked(messages: object) -> list[Message]:
    """Copies of the messages; raises TypeError or ValueError where they are none."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise TypeError(f"chat_prompt: messages must be text or a list of messages, got {type(messages).__name__}.")
    if not messages:
        raise ValueError("chat_prompt: messages must hold at least one message, got none.")
    for index, message in enumerate(messages):
        what = f"chat_prompt: message {index}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise TypeError(f'{what} must be {{"role": ..., "content": ...}}, got {shown(message)}.')
        if message["role"] not in ROLES:
            raise ValueError(f"{what} must have a role of {', '.join(ROLES)}, got {shown(message['role'])}.")
        if not isinstance(message["content"], str):
            raise TypeError(f"{what} must have a text for its content, got {type(message['content']).__name__}.")
        check_unicode(message["content"], what)
    return [dict(message) for message in messages]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The text of the chat template; raises ValueError where it refuses the messages, or leaves a role out."""
    text = _apply(tokenizer, messages)
    for role in dict.fromkeys(message["role"] for message in messages):
        index = [message["role"] for message in messages].index(role)
        if not _is_written(tokenizer, messages, index, text):
            raise ValueError(
                f"chat_prompt: message {index} must have a role that the chat template writes, got {role!r}, which it "
                "leaves out. Put its text into another message."
            )
    return text


def _is_written(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], index: int, text: str) -> bool:
    """Whether ``text``, all ``messages`` in the chat template, would be another without one of them."""
    others = [*messages[:index], *messages[index + 1 :]]
    if not others:
        return messages[index]["content"].strip() in text
    try:
        return _apply(tokenizer, others) != text
    except ValueError:  # the template cannot do without it
        return True


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    import jinja2

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:  # also what a template raises by itself
        reason = " ".join(str(error).split())
        raise ValueError(f"chat_prompt: messages must fit the chat template, got: {reason}") from error
    assert isinstance(text, str), "one conversation renders to one text"
    return text


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool = True) -> list[int]:
    if not text:
        return []
    return list(tokenizer(text, add_special_tokens=False, **_options(special_tokens))["input_ids"])


def _options(special_tokens: bool) -> dict[str, bool]:
    return {} if special_tokens else {"split_special_tokens": True}


def _pattern(names: Mapping[str, str] | Sequence[str]) -> re.Pattern[str]:
    """Finds any of ``names``, the longest where several begin at one place."""
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))
