"""The side where the two of a pair meet, and tell each other all that a channel is made of, goes away."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from core.messages import Connect, PairDown
from kv_transfer.config import Backend
from kv_transfer.door import NAME_BYTES
from kv_transfer.handshake import Offer
from kv_transfer.pair_store import PairStore, receive_exactly
from kv_transfer.rendezvous import RECEIVER
from tests.kv_transfer.harness import HOST, QUICK, WAIT_S, Transfer, Worker, connect, connects, layout

BOTH = pytest.mark.parametrize("backend", ["shm", "gloo"])


def at_once(store: PairStore) -> None:
    """Before it has said what it can do."""


def in_the_middle(store: PairStore) -> None:
    """The two have agreed; nothing of the channel is made yet."""
    store.set(f"offer/{RECEIVER}", Offer("gloo", "cpu", "", "").pack())
    store.get("offer/0")


@pytest.mark.parametrize("last_words", [at_once, in_the_middle])
def test_a_meeting_whose_host_is_lost_fails_at_once_and_leaves_nothing(last_words: Callable[[PairStore], None]) -> None:
    worker = Worker("p", layout(), replace(QUICK, backend="gloo"))
    with socket.create_server((HOST, 0)) as server:

        def host() -> None:
            connection, _ = server.accept()
            with connection:
                receive_exactly(connection, NAME_BYTES)
                last_words(PairStore(connection, WAIT_S))

        thread = threading.Thread(target=host)
        thread.start()
        started_at = time.monotonic()
        worker.plane.connect(Connect("p", "d", 1, f"{HOST}:{server.getsockname()[1]}", layout()))
        down = worker.expect(PairDown)
        assert time.monotonic() - started_at < QUICK.connect_timeout_s / 2
        assert not down.permanent
        assert "the peer did not come" in down.reason
        thread.join(WAIT_S)
    worker.plane.close()


@BOTH
def test_pairs_that_stand_do_not_need_the_host_any_more(backend: Backend) -> None:
    config = replace(QUICK, backend=backend)
    prefill, decode = Worker("p", layout(), config), Worker("d", layout(), config)
    try:
        connect(prefill, decode, 1)
        decode.plane._pairs._rendezvous.close()
        transfer = Transfer(prefill, decode, 8)
        transfer.complete()
        assert transfer.arrived()
        transfer.release()
        prefill.plane.connect(connects(prefill, decode, 2)[0])
        assert [prefill.expect(PairDown).epoch for _ in range(2)] == [1, 2]
    finally:
        prefill.plane.close()
        decode.plane.close()


@BOTH
def test_a_host_that_comes_back_elsewhere_is_met_there(backend: Backend) -> None:
    config = replace(QUICK, backend=backend)
    prefill, decode = Worker("p", layout(), config), Worker("d", layout(), config)
    try:
        connect(prefill, decode, 1)
        decode.plane.close()
        assert prefill.expect(PairDown).epoch == 1
        decode = Worker("d", layout(), config)
        connect(prefill, decode, 2)
        assert prefill.silent()
    finally:
        prefill.plane.close()
        decode.plane.close()
