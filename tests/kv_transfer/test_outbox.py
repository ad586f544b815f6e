"""Segments leave in order and in batches, and never take more memory than they may."""

from __future__ import annotations

import threading

import pytest
import torch

from core.ticket import Segment, SegmentRecord
from kv_transfer.frame import MAX_SEGMENTS, Entry
from kv_transfer.outbox import Outbox, Outgoing

WAIT_S = 10.0
SOON_S = 0.05


def outgoing(num_bytes: int = 100, transfer_id: str = "a", layer: int = 0) -> Outgoing:
    record = SegmentRecord(Segment(layer, 0, 1, 0, 1), num_bytes, 0)
    return Outgoing(Entry((transfer_id, 1), record), torch.empty(num_bytes, dtype=torch.uint8))


def always() -> bool:
    return True


class Putter:
    """A put in a thread of its own."""

    def __init__(self, outbox: Outbox, item: Outgoing) -> None:
        self.wanted = True
        self.result: bool | None = None
        self._thread = threading.Thread(target=self._put, args=(outbox, item), daemon=True)
        self._thread.start()

    def _put(self, outbox: Outbox, item: Outgoing) -> None:
        self.result = outbox.put(item, WAIT_S, lambda: self.wanted)

    def outcome(self, timeout_s: float = WAIT_S) -> bool | None:
        self._thread.join(timeout_s)
        return self.result


def test_what_waits_together_leaves_together_in_order() -> None:
    outbox = Outbox(1000, 250)
    items = [outgoing(layer=layer) for layer in range(5)]
    for item in items:
        assert outbox.put(item, WAIT_S, always)
    assert outbox.take(0) == items[:2]
    assert outbox.take(0) == items[2:4]
    assert outbox.take(0) == items[4:]
    assert outbox.take(0) == []


def test_a_segment_larger_than_a_batch_leaves_alone() -> None:
    outbox = Outbox(10_000, 250)
    items = [outgoing(400), outgoing(100)]
    for item in items:
        outbox.put(item, WAIT_S, always)
    assert outbox.take(0) == items[:1]
    assert outbox.take(0) == items[1:]


def test_a_batch_has_no_more_segments_than_a_frame() -> None:
    outbox = Outbox(1 << 20, 1 << 20)
    for layer in range(MAX_SEGMENTS + 3):
        outbox.put(outgoing(4, layer=layer), WAIT_S, always)
    first, second = outbox.take(0), outbox.take(0)
    assert first is not None
    assert second is not None
    assert (len(first), len(second)) == (MAX_SEGMENTS, 3)


def test_memory_is_bounded_until_a_batch_has_left() -> None:
    outbox = Outbox(250, 100)
    for _ in range(2):
        assert outbox.put(outgoing(), WAIT_S, always)
    third = Putter(outbox, outgoing())
    batch = outbox.take(0)
    assert batch is not None
    assert third.outcome(SOON_S) is None  # what is being sent takes memory, too
    assert outbox.num_bytes == 200
    outbox.sent(batch)
    assert third.outcome() is True
    assert outbox.num_bytes == 200


def test_an_empty_outbox_has_room_for_anything() -> None:
    outbox = Outbox(250, 100)
    assert outbox.put(outgoing(400), 0, always)
    assert not outbox.put(outgoing(4), 0, always)


def test_waiting_for_room_ends_in_time() -> None:
    outbox = Outbox(100, 100)
    outbox.put(outgoing(), WAIT_S, always)
    assert not outbox.put(outgoing(), SOON_S, always)
    assert outbox.num_bytes == 100


def test_a_drop_takes_one_attempt_and_makes_room() -> None:
    outbox = Outbox(250, 1000)
    mine, other = outgoing(transfer_id="a"), outgoing(transfer_id="b")
    outbox.put(mine, WAIT_S, always)
    outbox.put(other, WAIT_S, always)
    third = Putter(outbox, outgoing(transfer_id="c"))
    outbox.drop(("a", 1))
    assert third.outcome() is True
    batch = outbox.take(0)
    assert batch is not None
    assert [item.entry.key[0] for item in batch] == ["b", "c"]


def test_a_drop_wakes_the_put_of_the_same_attempt() -> None:
    outbox = Outbox(100, 100)
    outbox.put(outgoing(), WAIT_S, always)
    waiting = Putter(outbox, outgoing(transfer_id="b"))
    waiting.wanted = False
    outbox.drop(("b", 1))
    assert waiting.outcome() is False
    assert outbox.num_bytes == 100


def test_what_is_not_wanted_is_not_queued_although_there_is_room() -> None:
    outbox = Outbox(100, 100)
    assert not outbox.put(outgoing(), WAIT_S, lambda: False)
    assert outbox.take(0) == []
    assert outbox.num_bytes == 0


@pytest.mark.parametrize("full", [True, False])
def test_closing_wakes_whoever_waits(full: bool) -> None:
    outbox = Outbox(100, 100)
    if full:
        outbox.put(outgoing(), WAIT_S, always)
        waiting = Putter(outbox, outgoing())
        outbox.close()
        assert waiting.outcome() is False
    outbox.close()
    assert outbox.take(WAIT_S) is None
    assert not outbox.put(outgoing(), WAIT_S, always)


def test_staged_payload_takes_the_outboxs_memory_until_it_has_left() -> None:
    outbox = Outbox(1000, 250, torch.zeros(200, dtype=torch.uint8))
    pieces = [outbox.stage(100, WAIT_S, always) for _ in range(2)]
    assert outbox.stage(100, SOON_S, always) is None
    for piece, name in zip(pieces, "ab", strict=True):
        assert piece is not None
        assert outbox.put(Outgoing(outgoing(transfer_id=name).entry, piece, staged=True), WAIT_S, always)
    outbox.drop(("b", 1))
    assert outbox.num_bytes == 100
    again = outbox.stage(100, WAIT_S, always)
    assert again is not None
    outbox.unstage(again)
    batch = outbox.take(0)
    assert batch is not None
    outbox.sent(batch)
    assert outbox.num_bytes == 0


@pytest.mark.parametrize("end", ["close", "unwanted"])
def test_staged_payload_that_can_not_be_queued_is_given_back(end: str) -> None:
    outbox = Outbox(1000, 250, torch.zeros(200, dtype=torch.uint8))
    piece = outbox.stage(200, WAIT_S, always)
    assert piece is not None
    if end == "close":
        outbox.close()
    assert not outbox.put(Outgoing(outgoing(200).entry, piece, staged=True), WAIT_S, lambda: end == "close")
    assert outbox.num_bytes == 0


def test_nobody_is_woken_for_what_is_put_with_more_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    outbox, woken = Outbox(1000, 1000), list[int]()
    layer: int
    monkeypatch.setattr(outbox._changed, "notify_all", lambda: woken.append(layer))
    for layer in range(3):
        assert outbox.put(outgoing(layer=layer), WAIT_S, always, more=layer < 2)
    assert woken == [2]


def test_what_was_put_with_more_to_come_leaves_where_that_has_no_room() -> None:
    outbox, taken = Outbox(1000, 1000, torch.zeros(150, dtype=torch.uint8)), list[list[Outgoing] | None]()
    taking = threading.Thread(target=lambda: taken.append(outbox.take(WAIT_S)), daemon=True)
    taking.start()
    first = outbox.stage(100, WAIT_S, always)
    assert first is not None
    assert outbox.put(Outgoing(outgoing().entry, first, staged=True), WAIT_S, always, more=True)
    assert outbox.stage(100, SOON_S, always) is None
    taking.join(WAIT_S / 10)
    assert [len(batch or []) for batch in taken] == [1]
