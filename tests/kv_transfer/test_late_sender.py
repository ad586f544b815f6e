"""A sender that slept past its lease, and wakes when its blocks belong to somebody else, who has committed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from core.clock import ManualClock
from core.messages import Connect
from kv_transfer.config import Backend, TransferConfig
from kv_transfer.events import TransferReady
from tests.kv_transfer.harness import WAIT_S, Transfer, Worker, connect, layout, tickets
from tests.kv_transfer.peer_process import Push, peer

CONFIG = TransferConfig(lease_s=2.0, silence_timeout_s=20.0, keepalive_s=0.2, streaming="layerwise")
NUM_TOKENS = 16


def until(condition: Callable[[], bool]) -> bool:
    """Whether it holds before long; nothing tells of a segment that is discarded."""
    ends_at, pause = time.monotonic() + WAIT_S, threading.Event()
    while not (holds := condition()) and time.monotonic() < ends_at:
        pause.wait(0.01)
    return holds


@pytest.mark.parametrize("backend", ["shm", "tcp", "gloo"])
@pytest.mark.parametrize("knows", [True, False], ids=["it finds its lease over", "it believes in its lease"])
def test_what_it_still_sends_changes_nothing_for_the_new_owner(backend: Backend, knows: bool) -> None:
    config = replace(CONFIG, backend=backend)
    clock = ManualClock()
    decode, prefill = Worker("d", layout(), config, clock=clock), Worker("p", layout(), config)
    try:
        with peer("sleeper", replace(config, lease_s=CONFIG.lease_s if knows else 60.0)) as sleeper:
            connect(prefill, decode, 1)
            command = Connect("sleeper", "d", 2, decode.plane.address, layout())
            sleeper.connect(command)
            decode.plane.connect(command)
            assert sleeper.is_up()
            decode.events.get(timeout=WAIT_S)
            receiver, ticket = decode.plane.receiver, tickets("sleeper", "d", 2)
            blocks = decode.take_blocks(NUM_TOKENS)
            receiver.begin(ticket, blocks, NUM_TOKENS)
            sleeper.tell(ticket)
            sleeper.tell(Push(ticket.key, 0, NUM_TOKENS))
            assert until(lambda: len(receiver._receiving[ticket.key].received) == 1)

            sleeper.signal(signal.SIGSTOP)
            clock.advance(CONFIG.lease_s)
            assert decode.plane.expired(clock()) == [(ticket.key, "lease_expired")]
            receiver.release(ticket.key)
            owner = Transfer(prefill, decode, NUM_TOKENS)
            owner.target = blocks
            owner.complete()
            before = decode.snapshot()
            if knows:
                threading.Event().wait(CONFIG.lease_s)  # on the sleeper's own clock

            for layer in (1, 2):
                sleeper.tell(Push(ticket.key, layer, NUM_TOKENS))
            probe = tickets("sleeper", "d", 2)  # comes behind it on the same channel
            receiver.begin(probe, decode.take_blocks(NUM_TOKENS), NUM_TOKENS)
            sleeper.tell(probe)
            sleeper.tell(Push(probe.key, 0, 1))
            sleeper.signal(signal.SIGCONT)
            assert until(lambda: len(receiver._receiving[probe.key].received) == 1)
            assert receiver.num_discarded_segments == (0 if knows else 2)
            receiver.release(probe.key)
            assert torch.equal(decode.snapshot()[list(blocks)], before[list(blocks)])
            assert owner.arrived()
            owner.release()
            assert decode.silent() or isinstance(decode.events.get(), TransferReady)
    finally:
        prefill.plane.close()
        decode.plane.close()
