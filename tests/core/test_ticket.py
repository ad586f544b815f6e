"""Tickets, and commit records against a reference that counts single cells."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from core.ticket import CommitRecord, Segment, SegmentRecord, Ticket, engine_id, prefix_hash


def test_the_bytes_of_a_record_are_those_of_its_segments() -> None:
    segments = [Segment(layer, 0, 3, 2, 6) for layer in range(2)]
    assert CommitRecord(tuple(SegmentRecord(s, 8, 0) for s in segments), 6, 2).num_bytes == 16


def test_a_segment_counts_its_tokens_of_each_head() -> None:
    assert Segment(0, 1, 4, 2, 6).num_cells == 12


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
