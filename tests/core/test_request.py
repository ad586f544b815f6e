"""The request automaton, its tokens, and what ends it."""

from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import IntegrityError
from core.request import FinishReason, Request, RequestState
from core.sampling import SamplingParams

STOP = 99
W, R, H, P, F = RequestState
EDGES = {(W, R), (W, H), (W, F), (R, W), (R, H), (R, P), (R, F), (H, R), (H, F), (P, R), (P, W), (P, F)}


def request(prompt: list[int] | None = None, *, num_prompt_tokens: int = -1, **sampling: Any) -> Request:
    params = SamplingParams(**{"max_tokens": 10, **sampling}, stop_token_ids=(STOP,))
    return Request("a", prompt or [1, 2, 3], params, num_prompt_tokens)


@pytest.mark.parametrize("before", RequestState)
@pytest.mark.parametrize("after", RequestState)
def test_only_the_drawn_edges_can_be_taken(before: RequestState, after: RequestState) -> None:
    a = request()
    a.state = before
    if (before, after) in EDGES:
        a.advance(after)
        assert a.state is after
    else:
        with pytest.raises(IntegrityError, match=f"request a: no way from {before.name} to {after.name}"):
            a.advance(after)
        assert a.state is before


@given(prompt=st.lists(st.integers(0, 9), min_size=1), output=st.lists(st.integers(10, 19)), data=st.data())
def test_token_ids_are_a_slice_of_prompt_and_output_together(
    prompt: list[int], output: list[int], data: st.DataObject
) -> None:
    a = request(prompt)
    a.output_token_ids = output
    start = data.draw(st.integers(0, a.num_tokens))
    end = data.draw(st.integers(start, a.num_tokens))
    assert a.token_ids(start, end) == (prompt + output)[start:end]
    assert a.num_tokens == len(prompt + output)


def test_a_stop_token_ends_the_request() -> None:
    a = request()
    assert a.append(5, max_model_len=100) is None
    assert a.append(STOP, max_model_len=100) is a.finish_reason is FinishReason.STOP
    assert a.output_token_ids == [5, STOP]


def test_a_stop_token_before_min_tokens_does_not() -> None:
    a = request(min_tokens=1)
    assert a.append(STOP, max_model_len=100) is None
    assert a.append(STOP, max_model_len=100) is FinishReason.STOP


@pytest.mark.parametrize(("max_tokens", "max_model_len"), [(2, 100), (10, 5)])
def test_a_request_ends_by_length_at_its_own_limit_and_at_the_models(max_tokens: int, max_model_len: int) -> None:
    a = request(max_tokens=max_tokens)
    assert a.append(5, max_model_len) is None
    assert a.append(5, max_model_len) is FinishReason.LENGTH


def test_a_stop_token_at_the_limit_counts_as_stop() -> None:
    assert request(max_tokens=1).append(STOP, max_model_len=4) is FinishReason.STOP


def test_tokens_from_before_a_resume_count_as_output() -> None:
    resumed = request([1, 2, 3, 50, 51], num_prompt_tokens=3, max_tokens=3)
    assert resumed.num_output_tokens == 2
    assert resumed.append(52, max_model_len=100) is FinishReason.LENGTH


def test_packed_tokens_follow_what_is_appended() -> None:
    a = request([1, 2, 3])
    assert array("i", a.packed_token_ids()).tolist() == [1, 2, 3]
    a.append(7, max_model_len=100)
    a.append(8, max_model_len=100)
    assert array("i", a.packed_token_ids()).tolist() == [1, 2, 3, 7, 8]
