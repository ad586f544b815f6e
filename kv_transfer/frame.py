"""What travels ahead of payload: a table of the segments that come in one message."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

from core.errors import TransferError
from core.ticket import AttemptKey, Segment, SegmentRecord

FRAME_BYTES = 4096
MAGIC = b"PSTK"
VERSION = 2
MAX_PAYLOAD_BYTES = 16 << 20
"""Of one message, so of one segment too: what a receiver's staging may take, and what a cancel may wait behind."""
MAX_TRANSFER_ID_BYTES = 32
_PREAMBLE = struct.Struct("<4sHHHxxQ16s")  # magic, version, kind, count, payload bytes, identity
_ENTRY = struct.Struct("<32sIIIIIIIIQQI")  # transfer id, attempt, segment (7 fields), bytes, checksum, block size
_CRC = struct.Struct("<I")
_ALIGNMENT = 4  # bytes: vectors have an even number of elements, and K comes with V or in 2 bytes or more
MAX_SEGMENTS = (FRAME_BYTES - _PREAMBLE.size - _CRC.size) // _ENTRY.size


class FrameKind(IntEnum):
    HELLO = 1
    """The first frame each way: `identity` says for which pair, epoch and layout."""
    SEGMENTS = 2
    """A message of payload follows."""
    KEEPALIVE = 3


_KINDS = frozenset(map(int, FrameKind))  # before Python 3.12 an int can't be looked up in an enum


@dataclass(frozen=True, slots=True)
class Entry:
    """One segment in a frame: whose it is, and what its payload must be."""

    key: AttemptKey
    record: SegmentRecord
    block_size: int = 0
    """Where the payload is by blocks (`kernels.kv_copy`), their size; else 0."""


@dataclass(frozen=True, slots=True)
class Frame:
    kind: FrameKind
    entries: tuple[Entry, ...] = ()
    identity: bytes = bytes(16)

    @property
    def num_payload_bytes(self) -> int:
        return sum(entry.record.num_bytes for entry in self.entries)


def check_transfer_id(transfer_id: str) -> None:
    """TransferError `invalid_ticket` where the id has no place in a frame."""
    if not (transfer_id.isascii() and transfer_id.isprintable() and 0 < len(transfer_id) <= MAX_TRANSFER_ID_BYTES):
        raise TransferError(
            "invalid_ticket", f"transfer id {transfer_id!r} must be 1 to {MAX_TRANSFER_ID_BYTES} ASCII characters"
        )


def pack(frame: Frame) -> bytes:
    """`FRAME_BYTES` bytes, the last four a CRC-32 of the others."""
    head = _PREAMBLE.pack(MAGIC, VERSION, frame.kind, len(frame.entries), frame.num_payload_bytes, frame.identity)
    body = (head + b"".join(map(_pack_entry, frame.entries))).ljust(FRAME_BYTES - _CRC.size, b"\0")
    return body + _CRC.pack(zlib.crc32(body))


def unpack(data: bytes) -> Frame:
    """Raises TransferError `corrupt_frame`: what comes after such a frame can't be trusted."""
    if len(data) != FRAME_BYTES or _CRC.unpack(data[-_CRC.size :])[0] != zlib.crc32(data[: -_CRC.size]):
        raise TransferError("corrupt_frame", "a frame's CRC is wrong")
    magic, version, kind, count, num_payload_bytes, identity = _PREAMBLE.unpack_from(data)
    if magic != MAGIC or version != VERSION or kind not in _KINDS or count > MAX_SEGMENTS:
        raise TransferError("corrupt_frame", f"a frame of version {version}, kind {kind}, {count} segments")
    entries = tuple(_unpack_entry(data, _PREAMBLE.size + i * _ENTRY.size) for i in range(count))
    frame = Frame(FrameKind(kind), entries, identity)
    if frame.num_payload_bytes != num_payload_bytes or num_payload_bytes > MAX_PAYLOAD_BYTES:
        raise TransferError("corrupt_frame", f"a frame announces {num_payload_bytes} bytes of payload")
    if any(entry.record.num_bytes % _ALIGNMENT for entry in entries):
        raise TransferError("corrupt_frame", "a frame lists a segment of broken size")
    return frame


def _pack_entry(entry: Entry) -> bytes:
    (transfer_id, attempt), s = entry.key, entry.record.segment
    return _ENTRY.pack(
        transfer_id.encode("ascii"),
        attempt,
        s.layer,
        s.kv_head_start,
        s.kv_head_end,
        s.token_start,
        s.token_end,
        s.sender_rank,
        s.receiver_rank,
        entry.record.num_bytes,
        entry.record.checksum,
        entry.block_size,
    )


def _unpack_entry(data: bytes, offset: int) -> Entry:
    transfer_id, attempt, *segment, num_bytes, value, block_size = _ENTRY.unpack_from(data, offset)
    key = (transfer_id.rstrip(b"\0").decode("ascii", "replace"), attempt)
    return Entry(key, SegmentRecord(Segment(*segment), num_bytes, value), block_size)
