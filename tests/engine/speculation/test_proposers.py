"""Guesses: from where they come, how far they go, and of whom nothing is learned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.request import Request
from core.sampling import SamplingParams
from engine.config import EngineConfig, SpeculativeConfig
from engine.speculation.fading_map import FadingMap
from engine.speculation.methods import make_speculator
from engine.speculation.ngram import NgramProposer
from engine.speculation.proposer import Proposer
from engine.speculation.recycling import RecyclingProposer
from engine.speculation.shared_ngrams import SharedNgramProposer

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def request(token_ids: list[int], salt: str = "") -> Request:
    return Request("r", token_ids, SamplingParams(max_tokens=100), cache_salt=salt)


def guess(proposer: Proposer, token_ids: list[int], limit: int = 4, salt: str = "") -> list[int]:
    return proposer.propose([(request(token_ids, salt), limit)])[0]


# ---- prompt lookup


def test_it_goes_on_as_it_did_before() -> None:
    assert guess(NgramProposer(2, 4), [1, 2, 3, 4, 5, 6, 7, 1, 2]) == [3, 4, 5, 6]


def test_the_place_most_alike_counts_more_than_the_latest() -> None:
    assert guess(NgramProposer(2, 4), [9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], limit=1) == [3]


def test_beyond_the_longest_likeness_the_latest_place_counts() -> None:
    assert guess(NgramProposer(2, 2), [9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], limit=1) == [4]


def test_fewer_equal_tokens_than_the_least_are_no_place() -> None:
    assert guess(NgramProposer(2, 4), [1, 2, 3, 9, 2]) == []


def test_a_loop_goes_on_beyond_its_end() -> None:
    assert guess(NgramProposer(2, 4), [7, 1, 2, 3, 1, 2, 3, 1, 2], limit=7) == [3, 1, 2, 3, 1, 2, 3]


@given(tokens, st.integers(1, 3), st.integers(0, 3))
def test_every_guess_follows_what_stands_at_the_end(token_ids: list[int], least: int, more: int) -> None:
    """Token by token, as the request grows, and found wherever there is a place."""
    proposer, growing = NgramProposer(least, least + more), request(token_ids[:1])
    for token_id in [*token_ids[1:], 0]:
        known = growing.token_ids(0, growing.num_tokens)
        [found] = proposer.propose([(growing, 3)])
        ends = [end for end in range(least, len(known)) if known[end - least : end] == known[-least:]]
        assert bool(found) == (bool(ends) and len(known) >= least)
        if found:
            assert any((known + found)[end : end + 3] == found for end in ends)
        growing.output_token_ids.append(token_id)


# ---- lookup in all requests


def test_what_another_request_said_is_guessed_also_when_it_is_gone() -> None:
    proposer = SharedNgramProposer(2, 4)
    gone = request([1, 2, 3, 4])
    proposer.propose([(gone, 1)])
    gone.output_token_ids += [5, 6, 7]
    proposer.forget(gone)
    assert guess(proposer, [9, 3, 4]) == [5, 6, 7]


def test_nothing_is_learned_across_salts() -> None:
    proposer = SharedNgramProposer(2, 4)
    guess(proposer, [1, 2, 3, 4, 5], salt="one")
    assert guess(proposer, [9, 3, 4], salt="two") == []


def test_the_longest_known_run_counts() -> None:
    proposer = SharedNgramProposer(1, 3)
    guess(proposer, [1, 2, 3, 7])
    guess(proposer, [8, 8, 3, 9])
    assert guess(proposer, [5, 1, 2, 3], limit=1) == [7]
    assert guess(proposer, [5, 5, 5, 3], limit=1) == [9]


def test_what_was_not_met_for_long_is_forgotten() -> None:
    proposer = SharedNgramProposer(2, 2, max_entries=10)
    guess(proposer, [1, 2, 3])
    guess(proposer, list(range(10, 40)))
    assert guess(proposer, [1, 2]) == []
    assert guess(proposer, [36, 37]) == [38, 39]


@given(st.lists(tokens, min_size=1, max_size=4))
def test_every_guess_has_been_said_by_somebody(said: list[list[int]]) -> None:
    proposer = SharedNgramProposer(2, 3)
    for token_ids in said:
        found = guess(proposer, token_ids, limit=1)
        runs = [list(one[i : i + 3]) for one in said for i in range(len(one))]
        assert not found or token_ids[-2:] + found in runs


# ---- token recycling


def test_what_was_drawn_after_a_token_last_is_guessed_after_it() -> None:
    proposer = RecyclingProposer()
    proposer.learn(request([1]), (1, 2, 3), (2, 3, 4))
    assert guess(proposer, [7, 1]) == [2, 3, 4]
    assert guess(proposer, [7, 1], limit=2) == [2, 3]
    proposer.learn(request([1]), (2,), (9,))
    assert guess(proposer, [7, 1]) == [2, 9]


def test_draws_are_not_recycled_across_salts() -> None:
    proposer = RecyclingProposer()
    proposer.learn(request([1], "one"), (1,), (2,))
    assert guess(proposer, [1], salt="two") == []


# ---- what they remember


@given(st.lists(st.integers(0, 30)), st.integers(1, 5))
def test_the_last_keys_are_kept_and_no_more_than_twice_as_many(keys: list[int], max_entries: int) -> None:
    fading: FadingMap[int, int] = FadingMap(max_entries)
    for i, key in enumerate(keys):
        fading.put(key, i)
    latest = {key: i for i, key in enumerate(keys)}
    assert len(fading) <= 2 * max_entries
    assert all(fading.get(key) == latest[key] for key in sorted(latest, key=latest.__getitem__)[-max_entries:])
    assert all(fading.get(key) in (None, i) for key, i in latest.items())


# ---- configuration


@pytest.mark.parametrize("method", ["ngram", "suffix", "token_recycling"])
def test_every_method_has_a_proposer(method: str) -> None:
    config = EngineConfig(speculative_config=SpeculativeConfig(method=method))  # type: ignore[arg-type]
    assert make_speculator(config, None, 1) is not None


def test_without_a_method_nothing_is_guessed() -> None:
    assert make_speculator(EngineConfig(), None, 1) is None
