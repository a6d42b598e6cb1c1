"""What kind of task an instruction is, by its verb: a rule that anyone can check by eye."""

from __future__ import annotations

import re

OTHER = "other"
FIRST_WORDS = {
    "write": "write compose create generate draft design construct develop make produce craft invent imagine tell "
    "brainstorm devise form formulate come build",
    "rewrite": "rewrite edit convert translate change fix correct revise rephrase paraphrase reword replace transform "
    "modify improve add insert remove delete simplify reorder rearrange arrange sort complete fill combine update "
    "adapt format reformat turn expand proofread restructure switch reverse extend finish",
    "explain": "explain describe discuss define elaborate illustrate outline clarify interpret argue",
    "summarise": "summarize summarise condense shorten abbreviate",
    "list": "list name give provide suggest propose recommend state cite offer mention",
    "classify": "classify identify categorize categorise detect determine select choose pick decide judge label rank "
    "rate group match tag evaluate assess analyze analyse compare contrast find locate extract highlight recognize "
    "predict estimate check verify spot distinguish",
    "calculate": "calculate compute solve multiply divide count sum simulate",
    "question": "what who whom whose which when where why how is are was were do does did can could should would will "
    "has have if",
}
_WORD = re.compile(r"[A-Za-z]+")
_TYPE_OF = {word: kind for kind, words in FIRST_WORDS.items() for word in words.split()}
_POLITE = frozenset(("please", "kindly", "now", "then"))
# "Given a list of names, sort it": the verb follows the comma.
_OPENINGS = frozenset(("given", "in", "for", "using", "based", "from", "with", "as", "after", "considering", "suppose"))


def task_type(instruction: str) -> str:
    """The type of an instruction, a key of ``FIRST_WORDS``, by its first word; "other" for a word not listed there.

    Polite words are passed over, and of an instruction that opens with "given", "in" and the like what stands before
    the first comma is.
    """
    words = _words(instruction)
    if words and words[0] in _OPENINGS:
        words = _words(instruction.partition(",")[2])
    return _TYPE_OF.get(words[0], OTHER) if words else OTHER


def _words(text: str) -> list[str]:
    words = [word.lower() for word in _WORD.findall(text)]
    while words and words[0] in _POLITE:
        words.pop(0)
    return words
