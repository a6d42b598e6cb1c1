"""The byte-level BPE tokenizer of a small model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dynskip.data.corpus import Corpus
from dynskip.data.templates import CHAT_TEMPLATES, INPUT_MARK, INSTRUCTION_MARK, RESPONSE_MARK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<pad>"
END_TOKEN = "</s>"


def training_texts(corpus: Corpus) -> Iterable[str]:
    """The texts a tokenizer may learn from: all passages and Alpaca's training rows, never the held-out ones."""
    yield from corpus.passages
    for row in corpus.train:
        yield from (row.instruction, row.input, row.output)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int, progress: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocab_size`` tokens that puts ``</s>`` in front of a text, as OPT's does.

    Every byte has a token, so any text survives a round trip. The marks of the template are one token each.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    marks = [INSTRUCTION_MARK, INPUT_MARK, RESPONSE_MARK]
    smallest = 256 + 2 + len(marks)
    if vocab_size < smallest:
        raise ValueError(
            f"train_tokenizer: vocab_size must be at least {smallest}, got {vocab_size}. "
            "256 bytes, two special tokens and the marks of the template need a place."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(marks),
        special_tokens=[PAD_TOKEN, END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in marks])
    end_id = tokenizer.token_to_id(END_TOKEN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_TOKEN} $A", pair=f"{END_TOKEN} $A $B", special_tokens=[(END_TOKEN, end_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        unk_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATES["short"],
        clean_up_tokenization_spaces=False,
    )
