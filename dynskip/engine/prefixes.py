"""`PrefixCache`: sequences that begin with the same tokens along the same path have the same entries, made once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dynskip.engine.prefix_tree import Prefix, PrefixTree
from dynskip.engine.request import OutputSequence
from dynskip.execution.kv_cache import KVCache
from dynskip.paths import LayerPath

# Shorter prefixes are not looked for: a prefill of so few tokens takes as long without them.
_MIN_TOKENS = 16


@dataclass(slots=True)
class _Share:
    """What a resident sequence has in common with others.

    prefix: the last one of the tree whose slots it owns. has_run: whether its prompt has run since it was admitted.
    num_forked: tokens at its beginning whose slots other outputs of its prompt own, too, perhaps unknown to the tree.
    """

    prefix: Prefix
    has_run: bool = False
    num_forked: int = 0


class PrefixCache:
    """The entries of ``cache`` that sequences with a path leave to those which come later, while they run and after it.

    It owns these slots beside the sequences. Those that no sequence owns any more are evicted where slots are wanted.

    chunk: only prompts are shared, in whole chunks of so many tokens; None: any number of tokens, of outputs, too.
    num_queried, num_found: tokens of sequences when they were first admitted, and those of them that had entries.
    num_evicted: slots.
    """

    def __init__(self, cache: KVCache, chunk: int | None = None) -> None:
        self.num_queried = self.num_found = self.num_evicted = 0
        self._cache = cache
        self._shares_outputs = chunk is None
        self._tree = PrefixTree(chunk or 1)
        self._shares: dict[OutputSequence, _Share] = {}

    @property
    def num_unused(self) -> int:
        """Slots that no sequence owns."""
        return self._tree.num_unused

    def find(self, sequence: OutputSequence) -> int:
        """How many tokens of ``sequence``, which waits, have entries; its last one has to run, for its logits."""
        path = sequence.path
        # Rows that are taken over have no logits.
        if path is None or not path.budget or sequence.lacks_prompt_logprobs:
            return 0
        num_found = self._tree.find(path, self._tokens(sequence, sequence.state.num_tokens - 1))
        return num_found if num_found >= _MIN_TOKENS else 0

    def begin(self, sequence: OutputSequence) -> int:
        """Let ``sequence``, which has its place, own the entries that are there; of how many tokens they are."""
        path, state = sequence.path, sequence.state
        if path is None or not path.budget:
            return 0
        num_found = self.find(sequence)
        prefix = self._tree.cut(path, sequence.tokens(0, num_found))
        self._tree.use(prefix)
        self._shares[sequence] = _Share(prefix)
        if num_found:
            slots = torch.cat([each.slots for each in prefix.up()][::-1], 1)
            self._cache.begin(state.cache_id, path.layers, slots)
        if not state.num_preemptions and not sequence.lacks_prompt_logprobs:
            self.num_queried += state.num_tokens
            self.num_found += num_found
        return num_found

    def offer(self, sequence: OutputSequence) -> None:
        """The prompt of ``sequence`` has run: others may begin with its entries."""
        share, path = self._shares.get(sequence), sequence.path
        if share is None or path is None:
            return
        share.has_run = True
        tokens = self._tokens(sequence, sequence.state.num_cached)
        # Where others have run the same tokens meanwhile, theirs are there, and it goes on with its own.
        if self._tree.find(path, tokens) == share.prefix.end < len(tokens):
            prefix = self._keep(share.prefix, path, tokens, sequence.state.cache_id)
            self._tree.use(prefix)
            self._tree.release(share.prefix)
            share.prefix = prefix

    def fork(self, source: OutputSequence, target: OutputSequence) -> bool:
        """``target`` is about to own the slots of ``source``, and no others; whether it has owned some."""
        share, own = self._shares.get(source), self._shares.get(target)
        if share is None or own is None:
            return False
        self._tree.use(share.prefix)
        self._tree.release(own.prefix)
        share.num_forked = source.state.num_cached
        self._shares[target] = replace(share)
        return own.prefix.end > 0

    def end(self, sequence: OutputSequence, cache_id: int) -> None:
        """``sequence`` is about to give up its slots: those of tokens whose successors were chosen stay for others.

        Where it has failed, or nothing was chosen behind its prompt, what others neither use nor continue goes.
        """
        share, path = self._shares.pop(sequence, None), sequence.path
        if share is None or path is None:
            return
        self._tree.release(share.prefix)
        if sequence.request.error is not None or (share.has_run and not sequence.token_ids):
            self._cache.let_go(self._tree.drop(share.prefix))
        elif share.has_run:
            tokens = self._tokens(sequence, sequence.num_tokens - 1)
            prefix = self._tree.cut(path, tokens)
            if share.num_forked <= prefix.end < len(tokens):
                prefix = self._keep(prefix, path, tokens, cache_id)
            self._tree.touch(prefix)

    def evict(self, num_slots: int) -> None:
        """Let go of ``num_slots`` slots that no sequence owns, or of a few more, the least recently used ones."""
        slots = self._tree.evict(num_slots)
        num_freed = self._cache.let_go(slots)
        assert num_freed == sum(each.numel() for each in slots), "no sequence owns what is evicted"
        self.num_evicted += num_freed

    def clear(self) -> None:
        """Let go of all slots; sequences keep theirs."""
        self._cache.let_go(self._tree.clear())
        self._shares.clear()

    def close(self) -> None:
        """Let go of all slots, and of the cache."""
        self.clear()
        del self._cache

    def forget(self) -> None:
        """Begin anew, with an empty cache."""
        self._tree.clear()
        self._shares.clear()

    def _tokens(self, sequence: OutputSequence, num_tokens: int) -> list[int]:
        """What may be shared of the first ``num_tokens`` tokens of ``sequence``."""
        if not self._shares_outputs:  # rows of decode steps may have other bits than those of prompts
            num_tokens = min(num_tokens, len(sequence.prompt_ids))
        num_tokens -= num_tokens % self._tree.multiple
        return sequence.tokens(0, num_tokens) if num_tokens >= _MIN_TOKENS else []

    def _keep(self, prefix: Prefix, path: LayerPath, tokens: list[int], cache_id: int) -> Prefix:
        """``tokens``, the first of which are those of ``prefix``, with the slots of the sequence at ``cache_id``."""
        slots = self._cache.keep(cache_id, path.layers, prefix.end, len(tokens))
        return self._tree.append(prefix, path, tokens[prefix.end :], slots)
