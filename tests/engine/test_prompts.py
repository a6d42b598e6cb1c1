"""Texts and conversations as token ids: lines, lone surrogates, special tokens that are text, chat templates."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from models import tiny_model, word_tokenizer

from dynskip import LLM
from dynskip.prompts import lines

ENDS = "ab\x0bc\x0cd\x1ce\x1df\x1eg\x85h\u2028i\u2029j"
TURNS = [
    {"role": "user", "content": "Name a cheese."},
    {"role": "assistant", "content": "Brie."},
    {"role": "user", "content": "Another."},
]


@functools.cache
def mini() -> LLM:
    return LLM()


def chat_llm(template: str) -> LLM:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return LLM(tiny_model(), tokenizer)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_only_line_ends_end_lines(end: str) -> None:
    assert lines(f"one{end}{ENDS}{end}{end}three") == ["one", ENDS, "", "three"]


def test_byte_order_marks_are_no_text() -> None:
    # Files that were written with a mark each, one after the other.
    assert lines("\ufeffone\n\ufefftwo\nth\ufeffree") == ["one", "two", "th\ufeffree"]


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", "caf\udce9"])
def test_lone_surrogates_are_refused_in_one_line(text: str) -> None:
    message = "must be text without lone surrogates, got '.*'. Decode bytes as UTF-8."
    for call in (
        lambda: mini().encode(text),
        lambda: mini().encode(text, special_tokens=False),
        lambda: mini().generate(["fine", text]),
        lambda: mini().chat_prompt(text),
        lambda: mini().chat_prompt([*TURNS, {"role": "assistant", "content": text}]),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
        str(caught.value).encode()


def test_special_tokens_in_a_text_are_tokens_or_text() -> None:
    tokenizer: Any = mini().tokenizer
    eos, text = tokenizer.eos_token_id, "a</s>b <pad>"
    assert mini().encode(text) == [eos, *mini().encode("a")[1:], eos, *mini().encode("b ")[1:], tokenizer.pad_token_id]
    ids = mini().encode(text, special_tokens=False)
    assert ids[0] == eos, "what the tokenizer itself puts before a text"
    assert not {eos, tokenizer.pad_token_id} & set(ids[1:]) and tokenizer.decode(ids[1:]) == text
    assert mini().encode("nothing special", special_tokens=False) == mini().encode("nothing special")
    assert mini().encode(text) == mini().encode(text, special_tokens=True), "a call leaves no trace"


@pytest.mark.parametrize("content", ["a</s>b", "</s>", "<pad></s>", "### </s>\n", "plain", "\ue000 </s>"])
def test_special_tokens_in_a_message_are_text_on_request(content: str) -> None:
    tokenizer: Any = mini().tokenizer
    eos = tokenizer.eos_token_id
    ids = mini().chat_prompt(content, special_tokens=False)
    assert ids.count(eos) == 1 and ids[0] == eos and tokenizer.pad_token_id not in ids, "that of the template is left"
    assert tokenizer.decode(ids) == f"</s>### Instruction:\n{content}\n### Response:\n"
    assert (mini().chat_prompt(content) == ids) == ("</s>" not in content)


def test_the_template_keeps_its_own_special_tokens() -> None:
    tokenizer: Any = mini().tokenizer
    turns = [*TURNS, {"role": "assistant", "content": "no</s>"}, {"role": "user", "content": "</s>yes"}]
    ids = mini().chat_prompt(turns, special_tokens=False)
    assert ids.count(tokenizer.eos_token_id) == 3, "one at the beginning, and one behind each answer"
    assert tokenizer.decode(ids) == tokenizer.decode(mini().chat_prompt(turns))
    assert mini().chat_prompt(TURNS, special_tokens=False) == mini().chat_prompt(TURNS)


def test_messages_that_leave_no_mark_are_refused() -> None:
    every = "".join(map(chr, range(0xE000, 0xF900)))
    end = mini().tokenizer.eos_token
    with pytest.raises(ValueError, match="messages that spell out special tokens must leave out one of the characters"):
        mini().chat_prompt(every + end, special_tokens=False)
    assert mini().chat_prompt(every, special_tokens=False), "nothing is spelled out"
    assert mini().chat_prompt(every[:-1] + end, special_tokens=False)


def test_a_conversation_is_what_its_template_makes_of_it() -> None:
    tokenizer: Any = mini().tokenizer
    expected = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    assert mini().chat_prompt(TURNS) == mini().chat_prompt(tuple(TURNS)) == expected
    assert mini().chat_prompt(TURNS[:1]) == mini().chat_prompt(TURNS[0]["content"])


MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "bytes": (b"hi", TypeError, "messages must be text or a list of messages, got bytes"),
    "one message without its list": (TURNS[0], TypeError, "messages must be text or a list of messages, got dict"),
    "no message": ([], ValueError, "messages must hold at least one message, got none"),
    "a text among messages": ([*TURNS, "hi"], TypeError, 'message 3 must be {"role": ..., "content": ...}, got \'hi\''),
    "no role": ([{"content": "hi"}], TypeError, 'message 0 must be {"role": ..., "content": ...}, got '),
    "unknown role": (
        [{"role": "robot", "content": "hi"}],
        ValueError,
        "message 0 must have a role of system, user, assistant, got 'robot'",
    ),
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        TypeError,
        "message 0 must have a text for its content, got list",
    ),
    "a role that opt-mini never saw": (
        [{"role": "system", "content": "Be brief."}, *TURNS],
        ValueError,
        "message 0 must have a role that the chat template writes, got 'system', which it leaves out",
    ),
    "that role alone": (
        [{"role": "system", "content": "Be brief."}],
        ValueError,
        "message 0 must have a role that the chat template writes, got 'system'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_conversation(mistake: str) -> None:
    messages, error, message = MISTAKES[mistake]
    with pytest.raises(error) as caught:
        mini().chat_prompt(messages)
    assert str(caught.value).startswith(f"chat_prompt: {message}") and "\n" not in str(caught.value)


def test_a_template_may_refuse_and_may_know_systems() -> None:
    alternating = chat_llm(
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must\n alternate') }}{% endif %}{{ m['content'] + ' ' }}{% endfor %}"
    )
    with pytest.raises(
        ValueError, match=r"^chat_prompt: messages must fit the chat template, got: roles must alternate"
    ):
        alternating.chat_prompt([{"role": "user", "content": "w005"}] * 2)
    turns = [{"role": "user", "content": "w005"}, {"role": "assistant", "content": "w006"}]
    assert alternating.chat_prompt(turns) == alternating.encode("w005 w006")
    systems = chat_llm("{% for m in messages %}{{ m['content'] | trim + ' ' }}{% endfor %}")
    assert systems.chat_prompt([{"role": "system", "content": " w007 "}, *turns]) == systems.encode("w007 w005 w006")
