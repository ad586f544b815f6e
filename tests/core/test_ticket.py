"""Tickets, and commit records against a reference that counts single cells."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.ticket import CommitRecord, Segment, SegmentRecord, Ticket, engine_id, prefix_hash

NUM_LAYERS, NUM_HEADS = 2, 3


def record(segments: list[Segment], num_tokens: int = 6, num_skipped_tokens: int = 2) -> CommitRecord:
    return CommitRecord(tuple(SegmentRecord(s, 8, 0) for s in segments), num_tokens, num_skipped_tokens)


def tiling(draw: st.DrawFn, num_tokens: int, num_skipped_tokens: int) -> list[Segment]:
    """Every layer cut into bands of tokens, and every band into ranges of heads, in any order."""
    segments = []
    for layer in range(NUM_LAYERS):
        cuts = draw(st.sets(st.integers(num_skipped_tokens, num_tokens))) | {num_skipped_tokens, num_tokens}
        for start, end in pairwise(sorted(cuts)):
            heads = sorted(draw(st.sets(st.integers(0, NUM_HEADS))) | {0, NUM_HEADS})
            segments += [Segment(layer, h, i, start, end) for h, i in pairwise(heads)]
    return draw(st.permutations(segments))


@st.composite
def records(draw: st.DrawFn) -> CommitRecord:
    """Whole ones, and ones with a segment lost, sent twice, or shifted and stretched."""
    num_skipped_tokens = draw(st.integers(0, 2))
    num_tokens = num_skipped_tokens + draw(st.integers(0, 4))
    segments = tiling(draw, num_tokens, num_skipped_tokens)
    for _ in range(draw(st.integers(0, 2)) if segments else 0):
        i = draw(st.integers(0, len(segments) - 1))
        match draw(st.sampled_from(["lose", "double", "bend"])):
            case "lose" if len(segments) > 1:
                del segments[i]
            case "double":
                segments.append(segments[i])
            case _:
                field = draw(st.sampled_from(["layer", "kv_head_start", "kv_head_end", "token_start", "token_end"]))
                by = draw(st.sampled_from([-1, 1]))
                segments[i] = replace(segments[i], **{field: getattr(segments[i], field) + by})
    return record(segments, num_tokens, num_skipped_tokens)


def covers_each_cell_once(commit: CommitRecord) -> bool:
    segments = [r.segment for r in commit.segments]
    cells = Counter(
        (s.layer, token, head)
        for s in segments
        for token in range(s.token_start, s.token_end)
        for head in range(s.kv_head_start, s.kv_head_end)
    )
    needed = {
        (layer, token, head)
        for layer in range(NUM_LAYERS)
        for token in range(commit.num_skipped_tokens, commit.num_tokens)
        for head in range(NUM_HEADS)
    }
    no_empty_ones = all(s.token_start < s.token_end and s.kv_head_start < s.kv_head_end for s in segments)
    return no_empty_ones and cells.keys() == needed and set(cells.values()) <= {1}


@given(records())
def test_a_record_is_whole_if_and_only_if_each_cell_is_covered_once(commit: CommitRecord) -> None:
    assert (commit.gap(NUM_LAYERS, NUM_HEADS) is None) == covers_each_cell_once(commit)


WHOLE = [Segment(layer, 0, 3, 2, 6) for layer in range(NUM_LAYERS)]


@pytest.mark.parametrize(
    ("segments", "reason"),
    [
        (WHOLE[:1], "layer 1: 0 of 12"),
        ([WHOLE[0], replace(WHOLE[1], token_end=5)], "layer 1: 9 of 12"),
        ([*WHOLE, replace(WHOLE[0], token_start=5)], "layer 0: segments overlap"),
        ([*WHOLE, replace(WHOLE[0], layer=2)], "a segment outside of the transfer"),
        ([replace(WHOLE[0], token_start=1), WHOLE[1]], "a segment outside of the transfer"),
        ([replace(WHOLE[0], kv_head_end=4), WHOLE[1]], "a segment outside of the transfer"),
    ],
)
def test_a_gap_says_what_is_wrong(segments: list[Segment], reason: str) -> None:
    assert (record(segments).gap(NUM_LAYERS, NUM_HEADS) or "").startswith(reason)


def test_the_bytes_of_a_record_are_those_of_its_segments() -> None:
    assert record(WHOLE).num_bytes == 16


def test_a_ticket_is_local_where_one_incarnation_does_both() -> None:
    ticket = Ticket("r", 1, "t", "p0-1", "d0-1", 0)
    assert not ticket.local
    assert replace(ticket, decode_incarnation="p0-1").local
    assert not replace(ticket, decode_incarnation="p0-2").local


def test_attempts_at_one_request_have_names_of_their_own() -> None:
    ticket = Ticket("r", 1, "t", "p", "d", 0)
    assert engine_id(ticket.key) != engine_id(replace(ticket, attempt=2).key)


def test_a_prefix_hash_is_the_same_everywhere() -> None:
    assert prefix_hash([1, 2, 2**32 - 1]).hex() == "67348348c2e1789da508f7854c02ca4e"


@given(st.lists(st.integers(0, 3), max_size=4), st.lists(st.integers(0, 3), max_size=4))
def test_prefixes_have_equal_hashes_only_where_they_are_equal(a: list[int], b: list[int]) -> None:
    assert (prefix_hash(a) == prefix_hash(b)) == (a == b)
