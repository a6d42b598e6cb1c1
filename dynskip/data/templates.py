"""How an instruction is written as a prompt: the paper's Alpaca template, and the short one of small models."""

from __future__ import annotations

from collections.abc import Callable

INSTRUCTION_MARK = "### Instruction:\n"
INPUT_MARK = "\n### Input:\n"
RESPONSE_MARK = "\n### Response:\n"

_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
_PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)


def prompt_text(instruction: str, input_text: str = "") -> str:
    """The prompt in the short template, whose three marks are one token each where a tokenizer knows them."""
    middle = INPUT_MARK + input_text if input_text else ""
    return INSTRUCTION_MARK + instruction + middle + RESPONSE_MARK


def alpaca_prompt(instruction: str, input_text: str = "") -> str:
    """The prompt in the template that Alpaca was published with (arXiv 2410.20022, section 4)."""
    if input_text:
        return f"{_PREAMBLE_WITH_INPUT}### Instruction:\n{instruction}\n\n### Input:\n{input_text}\n\n### Response:\n"
    return f"{_PREAMBLE}### Instruction:\n{instruction}\n\n### Response:\n"


def _chat(before: str, after: str) -> str:
    return (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        f"{{{{ {before!r} + message['content'] + {after!r} }}}}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    )


TEMPLATES: dict[str, Callable[[str, str], str]] = {"alpaca": alpaca_prompt, "short": prompt_text}
CHAT = "chat"  # the template that comes with the tokenizer, an input below its instruction
TEMPLATE_NAMES = tuple(sorted((*TEMPLATES, CHAT)))

# What ``tokenizer.apply_chat_template`` needs to write a prompt without input.
CHAT_TEMPLATES = {
    "alpaca": _chat(_PREAMBLE + "### Instruction:\n", "\n\n### Response:\n"),
    "short": _chat(INSTRUCTION_MARK, RESPONSE_MARK),
}
