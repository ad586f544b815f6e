from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text.stop_strings import StopMatcher

LETTERS = st.text("ab水", max_size=24)
STOPS = st.lists(st.text("ab水", min_size=1, max_size=5), max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first; the longest, where several are."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


def feed(stops: list[str], deltas: list[str]) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops)
    shown = []
    for delta in deltas:
        output = matcher.push(delta)
        shown.append(output.text)
        if output.stop is not None:
            return shown, output.stop
    return [*shown, matcher.flush()], None


@settings(max_examples=500, deadline=None)
@given(deltas=st.lists(LETTERS, max_size=8), stops=STOPS)
def test_any_deltas_are_cut_where_the_whole_text_would_be(deltas: list[str], stops: list[str]) -> None:
    shown, stop = feed(stops, deltas)
    assert ("".join(shown), stop) == naive("".join(deltas), stops)


@settings(max_examples=300, deadline=None)
@given(text=LETTERS, stops=STOPS)
def test_only_a_possible_start_of_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for character in text:
        output = matcher.push(character)
        if output.stop is not None:
            return
        shown += output.text
        held = matcher.flush()
        assert held == "" or any(stop.startswith(held) for stop in stops)
        matcher = StopMatcher(stops)
        shown += held
        assert matcher.push(held).stop is None


def test_text_shown_is_never_part_of_the_stop_string() -> None:
    assert feed(["END"], ["one E", "N", "D two"]) == (["one ", "", ""], "END")


def test_text_held_back_in_vain_comes_out() -> None:
    assert feed(["END"], ["one E", "N", "d two"]) == (["one ", "", "ENd two", ""], None)


def test_text_held_back_comes_out_at_the_end() -> None:
    assert feed(["END"], ["one EN"]) == (["one ", "EN"], None)


@pytest.mark.parametrize("deltas", [["xabcd"], ["xa", "bcd"], ["xabc", "d"]])
def test_the_string_completed_first_wins_wherever_deltas_are_cut(deltas: list[str]) -> None:
    shown, stop = feed(["abcd", "bc"], deltas)
    assert ("".join(shown), stop) == ("xa", "bc")
