"""How many tokens are guessed: by costs, by what steps took, and by how often guesses were right."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from models import NUM_LAYERS
from streams import PATHS, costs

from dynskip import LayerPath
from dynskip.costs.step_costs import StepCosts
from dynskip.speculation.acceptance import MOST_PAIRS, Acceptance, own_rate
from dynskip.speculation.draft import Draft
from dynskip.speculation.lengths import Candidate, Choice, DraftLengths, Ratios, expected_tokens

FULL = PATHS[3]
# Of a device on which a few rows more cost nothing.
WIDE = replace(StepCosts.h200(), num_layers=NUM_LAYERS)
SHALLOW = Draft(LayerPath.of(NUM_LAYERS, [0]), "path")
OTHER = Draft(LayerPath.of(NUM_LAYERS, [0, 2, 3, 5]), "path")


def candidate(rate: float, draft: Draft = SHALLOW, most: int = 8) -> Candidate:
    return Candidate(FULL, draft, rate, most)


def rider(layers: list[int], most: int = 8) -> Candidate:
    path = LayerPath.of(NUM_LAYERS, layers)
    return Candidate(path, Draft(path, "path"), 1.0, most, rides=True)


def observe(lengths: DraftLengths, choice: Choice, num_seqs: int, guess: float, verify: float, count: int = 50) -> None:
    """Steps that took so many times what is predicted, each beside a plain one that took what is predicted."""
    for _ in range(count):
        lengths.observe(choice, num_seqs, guess * choice.guess_ms, verify * choice.verify_ms)
        plain = lengths._evaluate([candidate(0.5)] * num_seqs, [0] * num_seqs, (), lengths.ratios(num_seqs))
        lengths.observe(plain, num_seqs, 0.0, plain.plain_ms)


def test_lengths_follow_acceptance_and_cost() -> None:
    lengths = DraftLengths(costs(), most_rows=48)

    def length(rate: float, draft: Draft = SHALLOW) -> int:
        return lengths.choose([Candidate(FULL, draft, rate, 8)]).lengths[0]

    assert length(0.0) == 0
    assert [length(rate) for rate in (0.2, 0.6, 0.9)] == sorted(length(rate) for rate in (0.2, 0.6, 0.9))
    assert length(0.9) >= 2
    assert length(1.0, Draft(FULL, "path")) == 0, "a draft as deep as the path gains nothing"
    crowd = [Candidate(FULL, SHALLOW, 0.9, 8)] * 40
    assert sum(lengths.choose(crowd).lengths) <= 8, "no more rows than run with the same bits"
    mixed = lengths.choose([Candidate(FULL, SHALLOW, 0.9, 8), Candidate(FULL, SHALLOW, 0.05, 8)]).lengths
    assert mixed[0] > mixed[1] == 0


def test_many_guesses_may_pay_where_one_loses() -> None:
    lengths = DraftLengths(costs(), most_rows=48)
    observe(lengths, lengths.of_lengths([candidate(1.0)], (), [8]), 1, 1.0, 2.5)
    gains = {length: lengths.of_lengths([candidate(1.0)], (), [length]).gain for length in range(1, 9)}
    best = max(gains, key=gains.__getitem__)
    assert gains[1] < 0.9 < 1.1 < gains[best], "what this test is about"
    assert lengths.choose([candidate(1.0)]).lengths == (best,)


def test_guesses_do_not_pay_for_what_an_engine_does_between_steps() -> None:
    plain = DraftLengths(costs(), most_rows=48).choose([candidate(0.6)])
    busy = replace(costs(), step_ms=100 * plain.plain_ms)
    chosen = DraftLengths(busy, most_rows=48).choose([candidate(0.6)])
    assert chosen.lengths[0] > plain.lengths[0], "each token that is guessed right saves a step with all of it"
    assert chosen.guess_ms / chosen.lengths[0] == pytest.approx(plain.guess_ms / plain.lengths[0])


def test_the_expected_tokens_are_those_of_independent_guesses() -> None:
    draw = random.Random(0)
    rate, length, total = 0.7, 4, 0
    for _ in range(20000):
        accepted = next((index for index in range(length) if draw.random() >= rate), length)
        total += accepted + 1
    assert total / 20000 == pytest.approx(expected_tokens(rate, length), rel=0.02)


def test_rates_are_learnt_of_the_pair_and_of_the_request() -> None:
    acceptance = Acceptance()
    draft = SHALLOW
    good, bad = own_rate(), own_rate()
    for _ in range(200):
        acceptance.add(FULL, draft, good, 3, 4)  # the fourth is wrong
        acceptance.add(FULL, draft, bad, 0, 4)  # nothing is learnt of three of them
    assert acceptance.of(FULL, draft, good) == pytest.approx(0.75, abs=0.05)
    assert acceptance.of(FULL, draft, bad) < 0.15
    assert acceptance.pair(FULL, draft) == pytest.approx(3 / 5, abs=0.1)
    assert acceptance.pair(FULL, OTHER) == Acceptance().pair(FULL, draft)


def test_of_many_pairs_the_ones_seen_last_are_known() -> None:
    acceptance, num_layers = Acceptance(), 13
    drafts = [
        Draft(LayerPath.of(num_layers, [layer for layer in range(num_layers) if code >> layer & 1]), "path")
        for code in range(1, MOST_PAIRS + 2)
    ]
    path = LayerPath.full(num_layers)
    for draft in drafts[:-1]:
        acceptance.add(path, draft, own_rate(), 0, 4)
    acceptance.add(path, drafts[0], own_rate(), 0, 4)
    acceptance.add(path, drafts[-1], own_rate(), 0, 4)
    unseen = Acceptance().pair(path, drafts[0])
    assert acceptance.pair(path, drafts[1]) == unseen, "seen longest ago"
    assert all(acceptance.pair(path, drafts[number]) < unseen for number in (0, 2, -2, -1))


def test_costs_are_corrected_by_what_steps_take() -> None:
    lengths = DraftLengths(costs(), most_rows=48)
    one = candidate(0.8)
    before = lengths.choose([one])
    assert before.gain > 1.2
    assert lengths.plain([one], []) is None
    lengths.observe(before, 1, before.guess_ms, before.verify_ms)
    plain = lengths.plain([one], [])
    assert plain is not None and plain.lengths == (0,), "nothing is known yet of steps without guesses"
    for _ in range(50):
        lengths.observe(before, 1, 2 * before.guess_ms, 2 * before.verify_ms)
        lengths.observe(plain, 1, 0.0, 2 * plain.plain_ms)
    assert lengths.choose([one]) == before, "all of it takes twice as long"
    assert lengths.plain([one], []) is None
    num_steps = 0
    while lengths.choose([one]) == before:
        if lengths.plain([one], []) is None:
            lengths.observe(before, 1, 20 * before.guess_ms, 2 * before.verify_ms)
        else:
            lengths.observe(plain, 1, 0.0, 2 * plain.plain_ms)
        num_steps += 1
    assert lengths.choose([one]).lengths == (0,) and num_steps < 50, "where they differ by far, they are compared soon"


def test_a_step_without_guesses_comes_now_and_then() -> None:
    lengths = DraftLengths(costs(), most_rows=48)
    one = candidate(0.8)
    choice = lengths.choose([one])
    observe(lengths, choice, 1, 1.0, 1.0)
    for _ in range(32):
        assert lengths.plain([one], []) is None
        lengths.observe(choice, 1, choice.guess_ms, choice.verify_ms)
    assert lengths.plain([one], []) is not None


def test_a_machine_that_is_slow_for_a_while_changes_nothing() -> None:
    """Guesses are compared with the plain step behind them, not with plain steps of another time."""
    lengths = DraftLengths(costs(), most_rows=48)
    one = candidate(0.8)
    choice = lengths.choose([one])
    for turn in range(60):
        slow = 3.0 if turn // 7 % 2 else 1.0
        for _ in range(8):
            lengths.observe(choice, 1, slow * choice.guess_ms, slow * 1.1 * choice.verify_ms)
        plain = lengths._evaluate([one], [0], (), Ratios())
        lengths.observe(plain, 1, 0.0, slow * plain.plain_ms)
        assert lengths.learnt_ratios(1) in (None, Ratios(1.0, 1.05**2))
    assert lengths.learnt_ratios(1) == Ratios(1.0, 1.05**2)


def test_the_first_steps_of_a_size_say_nothing() -> None:
    lengths = DraftLengths(costs(), most_rows=48)
    choice = lengths.choose([candidate(0.8)])
    observe(lengths, choice, 1, 50.0, 50.0, count=4)
    observe(lengths, choice, 1, 1.0, 1.0, count=6)
    assert lengths.choose([candidate(0.8)]) == choice
    observe(lengths, choice, 1, 50.0, 50.0, count=31)
    assert lengths.choose([candidate(0.8)]).lengths == (0,)


def test_what_was_learnt_of_one_size_counts_for_others_until_they_know_better() -> None:
    lengths = DraftLengths(WIDE, most_rows=48)
    crowd = [candidate(0.8)] * 4
    at_first = lengths.choose(crowd)
    assert any(at_first.lengths)
    observe(lengths, lengths.choose(crowd[:1]), 1, 20.0, 1.0)
    assert lengths.choose(crowd).lengths == (0,) * 4
    assert lengths.ratios(4) == lengths.ratios(1) != Ratios()
    observe(lengths, at_first, 4, 1.0, 1.0)
    assert lengths.choose(crowd) == at_first
    assert lengths.choose(crowd[:1]).lengths == (0,)
    assert lengths.ratios(2) == lengths.ratios(1), "of two as near, the smaller"
    assert lengths.ratios(40) == lengths.ratios(4)


def test_what_was_measured_before_is_believed_until_steps_are_seen() -> None:
    lengths = DraftLengths(costs(), most_rows=48)
    one = candidate(0.8)
    choice = lengths.choose([one])
    assert any(choice.lengths)
    lengths.observe(choice, 1, choice.guess_ms, choice.verify_ms)
    assert lengths.plain([one], []) is not None, "both kinds take turns at first"
    told = DraftLengths(replace(costs(), draft_ratios={1: (20.0, 1.0), 4: (1.0, 1.25)}), most_rows=48)
    assert told.choose([one]).lengths == (0,) and told.ratios(4) == Ratios(1.0, 1.25)
    assert told.learnt_ratios(2) is None and told.ratios(2) == Ratios(20.0, 1.0), "of two as near, the smaller"
    told.observe(choice, 1, choice.guess_ms, choice.verify_ms)
    assert told.plain([one], []) is None, "what is known needs no turns"
    for _ in range(7):
        told.observe(choice, 1, choice.guess_ms, choice.verify_ms)
    assert told.plain([one], []) is not None, "a step without guesses is due sooner where none has been seen"
    observe(told, choice, 1, 1.0, 1.0)
    assert told.ratios(1) == Ratios() and told.choose([one]) == choice, "what steps take counts more"


def test_a_step_loses_what_it_took_beyond_what_its_tokens_are_worth() -> None:
    lengths = DraftLengths(WIDE, most_rows=48)
    choice = lengths.choose([candidate(0.8)] * 2)
    expected = lengths.lost_ms(choice, 2)
    total_ms = choice.guess_ms + choice.verify_ms
    assert expected == pytest.approx(total_ms - choice.gain * total_ms) and expected < 0, "it gains"
    assert lengths.lost_ms(choice, 2, num_tokens=2) == pytest.approx(total_ms - choice.plain_ms)
    assert lengths.lost_ms(choice, 2, 4, measured_ms=5.0) == pytest.approx(5.0 - 2 * choice.plain_ms)


def test_what_a_search_has_seen_is_what_is_believed_first() -> None:
    acceptance = Acceptance()
    unknown = acceptance.pair(FULL, SHALLOW)
    searched = Draft(SHALLOW.path, "path", agreement=0.4)
    assert searched == SHALLOW and searched.for_path(FULL).agreement == 0.4
    assert acceptance.pair(FULL, searched) == 0.4 != unknown
    for _ in range(4):
        acceptance.add(FULL, searched, own_rate(), 0, 2)
    assert 0.3 < acceptance.pair(FULL, searched) < 0.4
    assert acceptance.pair(FULL, SHALLOW) < 0.3, "which counts for less where no search has looked"


# Requests without a draft in the guesses of others


def test_paths_whose_layers_a_draft_reads_run_along() -> None:
    lengths = DraftLengths(WIDE, most_rows=48, resumes=True)
    others = [rider([0]), rider([3]), rider([0], most=1)]
    alone = lengths.choose([candidate(0.9)], [each.path for each in others])
    together = lengths.choose([others[0], candidate(0.9), *others[1:]])
    length = together.lengths[1]
    assert length >= 1 and together.lengths == (length, length, 0, 1)
    assert together.gain > alone.gain
    assert together.num_tokens == pytest.approx(expected_tokens(0.9, length) + length + 1 + 1 + 2)


def test_none_runs_along_where_the_draft_would_lose_by_it() -> None:
    lengths = DraftLengths(WIDE, most_rows=48, resumes=True)
    for count in (1, 6):
        assert lengths.choose([candidate(0.0), *[rider([0])] * count]).lengths == (0,) * (1 + count)
    probe = lengths.probe([candidate(0.0), rider([0])], (), 0, 1)
    assert probe.lengths == (1, 0)


def test_no_more_rows_run_along_than_have_the_same_bits() -> None:
    lengths = DraftLengths(WIDE, most_rows=12, resumes=True)
    choice = lengths.choose([candidate(0.95), *[rider([0])] * 6])
    assert choice.lengths[0] and 2 <= sum(choice.lengths) <= 12 - 7


def test_a_draft_reads_entries_of_one_of_two_kinds() -> None:
    with pytest.raises(ValueError, match="Draft: entries must be own or path, got 'ours'"):
        Draft(LayerPath.full(4), "ours")  # type: ignore[arg-type]
