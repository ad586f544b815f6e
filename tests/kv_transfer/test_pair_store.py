"""What one side sets the other gets, in time or not at all."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest

from kv_transfer.pair_store import MAX_ITEM_BYTES, PairStore

LONG_S = 20.0


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_each_side_gets_what_the_other_sets_in_any_order(sockets: tuple[socket.socket, socket.socket]) -> None:
    a, b = (PairStore(connection, LONG_S) for connection in sockets)
    a.set("first", b"1")
    a.set("second", b"\0\xff")
    b.set("back", b"")
    assert b.get("second") == b"\0\xff"
    assert b.get("first") == b"1"
    assert a.get("back") == b""
    assert a.get("first") == b"1"
    assert b.check(["first", "second"])
    assert not a.check(["first", "unknown"])


def test_a_wait_ends_when_the_last_key_has_come(sockets: tuple[socket.socket, socket.socket]) -> None:
    a, b = (PairStore(connection, LONG_S) for connection in sockets)
    waiting = threading.Thread(target=b.wait, args=(["x", "y"], timedelta(seconds=LONG_S)), daemon=True)
    waiting.start()
    a.set("x", b"")
    waiting.join(0.05)
    assert waiting.is_alive()
    a.set("y", b"")
    waiting.join(LONG_S)
    assert not waiting.is_alive()


@pytest.mark.parametrize("said", [timedelta(seconds=0.2), None])
def test_a_peer_that_sets_nothing_is_waited_for_as_long_as_was_said(
    sockets: tuple[socket.socket, socket.socket], said: timedelta | None
) -> None:
    store = PairStore(sockets[0], LONG_S if said else 0.2)
    sockets[0].settimeout(LONG_S)
    started_at = time.monotonic()
    with pytest.raises(OSError, match="timed out"):
        store.wait(["x"], said)
    assert 0.1 < time.monotonic() - started_at < 5.0


def test_a_peer_that_goes_away_ends_the_wait(sockets: tuple[socket.socket, socket.socket]) -> None:
    sockets[1].close()
    with pytest.raises(OSError, match="closed"):
        PairStore(sockets[0], LONG_S).get("x")


def test_a_size_that_no_process_group_needs_is_refused(sockets: tuple[socket.socket, socket.socket]) -> None:
    sockets[1].sendall(struct.pack("<II", 1, MAX_ITEM_BYTES))
    with pytest.raises(OSError, match=f"sets {MAX_ITEM_BYTES + 1} bytes"):
        PairStore(sockets[0], LONG_S).get("x")
