"""Texts for training and evaluation: corpora, templates, tokenized examples, batches."""
