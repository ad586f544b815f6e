"""A frame says exactly what was packed, or is refused."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import TransferError
from core.ticket import Segment, SegmentRecord
from kv_transfer.frame import (
    FRAME_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_SEGMENTS,
    VERSION,
    Entry,
    Frame,
    FrameKind,
    check_transfer_id,
    pack,
    unpack,
)

counts = st.integers(0, 2**32 - 1)
segments = st.builds(Segment, *[counts] * 7)
records = st.builds(
    SegmentRecord,
    segments,
    st.integers(0, MAX_PAYLOAD_BYTES // MAX_SEGMENTS // 4).map(lambda n: n * 4),
    st.integers(0, 2**64 - 1),
)
ids = st.text("0123456789abcdef-", min_size=1, max_size=32)
entries = st.builds(Entry, st.tuples(ids, counts), records, counts)
frames = st.builds(
    Frame,
    st.sampled_from(FrameKind),
    st.lists(entries, max_size=MAX_SEGMENTS).map(tuple),
    st.binary(min_size=16, max_size=16),
)
ONE = Frame(FrameKind.SEGMENTS, (Entry(("a" * 32, 1), SegmentRecord(Segment(0, 0, 2, 0, 5), 640, 77)),))


def sealed(body: bytes) -> bytes:
    """`body` as a frame with a right CRC."""
    return body[:-4] + struct.pack("<I", zlib.crc32(body[:-4]))


@given(frames)
def test_a_frame_comes_out_as_it_went_in(frame: Frame) -> None:
    data = pack(frame)
    assert len(data) == FRAME_BYTES
    assert unpack(data) == frame


@given(st.integers(0, FRAME_BYTES * 8 - 1))
def test_a_flipped_bit_is_noticed_wherever_it_is(bit: int) -> None:
    data = bytearray(pack(ONE))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(TransferError) as failure:
        unpack(bytes(data))
    assert failure.value.reason == "corrupt_frame"


@given(st.binary(max_size=2 * FRAME_BYTES))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(TransferError):
        unpack(data)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, b"XXXX"),  # magic
        (4, struct.pack("<H", VERSION + 1)),  # version
        (6, struct.pack("<H", 99)),  # kind
        (8, struct.pack("<H", MAX_SEGMENTS + 1)),  # count
        (12, struct.pack("<Q", 641)),  # payload bytes
    ],
)
def test_a_frame_of_another_make_is_refused_although_its_crc_is_right(offset: int, value: bytes) -> None:
    data = bytearray(pack(ONE))
    data[offset : offset + len(value)] = value
    with pytest.raises(TransferError) as failure:
        unpack(sealed(bytes(data)))
    assert failure.value.reason == "corrupt_frame"


@pytest.mark.parametrize("num_bytes", [MAX_PAYLOAD_BYTES + 4, 2**40, 6])
def test_a_size_that_no_sender_makes_is_refused(num_bytes: int) -> None:
    record = SegmentRecord(Segment(0, 0, 2, 0, 5), num_bytes, 0)
    with pytest.raises(TransferError):
        unpack(pack(Frame(FrameKind.SEGMENTS, (Entry(("a", 1), record),))))


@pytest.mark.parametrize("transfer_id", ["", "a" * 33, "é", "a\0", "a\n"])
def test_an_id_that_has_no_place_in_a_frame_is_refused_before_it_is_sent(transfer_id: str) -> None:
    with pytest.raises(TransferError) as failure:
        check_transfer_id(transfer_id)
    assert failure.value.reason == "invalid_ticket"
