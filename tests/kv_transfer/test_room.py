"""Pieces of a room never overlap, and none is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.room import Room

SIZE = 100


@given(st.lists(st.tuples(st.integers(1, SIZE + 5), st.integers(0, 5))))
def test_pieces_never_overlap_and_all_come_back(steps: list[tuple[int, int]]) -> None:
    """Each step takes a piece, then frees some of those that are held, in any order."""
    room, held = Room(SIZE), dict[int, int]()
    for num_bytes, num_freed in steps:
        offset = room.take(num_bytes)
        if offset is not None:
            assert 0 <= offset <= SIZE - num_bytes
            assert all(offset + num_bytes <= start or start + size <= offset for start, size in held.items())
            held[offset] = num_bytes
        for start in list(held)[num_freed % 2 :: 2][:num_freed]:
            room.free(start)
            del held[start]
        assert room.num_bytes == sum(held.values())
    for start in held:
        room.free(start)
    assert room.take(SIZE) == 0


def test_the_lowest_place_is_taken_and_gaps_grow_together() -> None:
    room = Room(SIZE)
    assert [room.take(30) for _ in range(4)] == [0, 30, 60, None]
    room.free(0)
    assert [room.take(20), room.take(30), room.take(10)] == [0, None, 20]
    room.free(30)
    room.free(60)
    assert room.take(70) == 30


def test_what_is_not_held_can_not_be_freed() -> None:
    room = Room(SIZE)
    assert room.take(10) == 0
    room.free(0)
    with pytest.raises(KeyError):
        room.free(0)
