"""Memory that two workers share: written by one, read by the other, and gone with both."""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from core.errors import IntegrityError, TransferError
from kv_transfer.frame import FRAME_BYTES
from kv_transfer.shared_memory import Invitation, SharedMemoryTransport, visit
from kv_transfer.transport import Delivery

WAIT_S = 10.0
SIZE = 1 << 20


@contextmanager
def joined() -> Iterator[tuple[SharedMemoryTransport, SharedMemoryTransport]]:
    """A sender and a receiver."""
    invitation = Invitation(SIZE)
    with ThreadPoolExecutor(1) as pool, invitation.socket:
        accepted = pool.submit(invitation.accept, WAIT_S)
        receiver = visit(socket.socket(socket.AF_UNIX), invitation.address, WAIT_S)
        sender = accepted.result(WAIT_S)
    try:
        yield sender, receiver
    finally:
        sender.abort()
        receiver.abort()


def frame(value: int = 0) -> torch.Tensor:
    return torch.full((FRAME_BYTES,), value, dtype=torch.uint8)


def send(sender: SharedMemoryTransport, payload: torch.Tensor, offset: int = 0) -> Delivery:
    assert sender.memory is not None
    part = sender.memory[offset : offset + payload.numel()]
    return sender.send(frame(int(payload[0])), (part.copy_(payload),), WAIT_S)


def test_payload_arrives_from_where_it_was_staged() -> None:
    with joined() as (sender, receiver):
        payload = torch.randint(256, (1000,), dtype=torch.uint8)
        send(sender, payload, SIZE - 1000)
        receiver.receive_frame(frame(), WAIT_S)
        assert torch.equal(next(receiver.receive_parts([1000], WAIT_S)), payload)


def test_payload_that_is_not_staged_is_refused() -> None:
    with joined() as (sender, _), pytest.raises(IntegrityError):
        sender.send(frame(1), (torch.zeros(8, dtype=torch.uint8),), WAIT_S)


def test_a_sender_has_its_memory_back_when_the_receiver_comes_for_more() -> None:
    with joined() as (sender, receiver):
        sent = send(sender, torch.zeros(8, dtype=torch.uint8))
        receiver.receive_frame(frame(), WAIT_S)
        receiver.receive_parts([8], WAIT_S)
        more = sender.send(frame(7), (), WAIT_S)
        received = frame()
        receiver.receive_frame(received, WAIT_S)
        sent.wait(WAIT_S)
        with pytest.raises(TransferError, match="timed out"):
            more.wait(0.05)
        assert torch.equal(received, frame(7))


def test_several_messages_may_be_on_their_way_and_are_done_one_after_the_other() -> None:
    with joined() as (sender, receiver):
        sent = [send(sender, torch.full((8,), i, dtype=torch.uint8), 8 * i) for i in (1, 2)]
        for i in (1, 2):
            receiver.receive_frame(received := frame(), WAIT_S)
            assert torch.equal(received, frame(i))
            assert next(receiver.receive_parts([8], WAIT_S)).tolist() == [i] * 8
        sent[0].wait(WAIT_S)
        with pytest.raises(TransferError, match="timed out"):
            sent[1].wait(0.05)


def test_a_receiver_that_takes_nothing_is_noticed() -> None:
    with joined() as (sender, _), pytest.raises(TransferError, match="timed out"):
        sender.send(frame(), (), WAIT_S).wait(0.05)


@pytest.mark.parametrize("mine", [True, False], ids=["its own", "the peer's"])
def test_an_abort_wakes_who_waits_for_a_frame(mine: bool) -> None:
    with joined() as (sender, receiver), ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receiver.receive_frame, frame(), WAIT_S)
        (receiver if mine else sender).abort()
        with pytest.raises(TransferError):
            receiving.result(WAIT_S)


@pytest.mark.parametrize("place", [(SIZE - 4, 8), (1 << 60, 8), (0, 1 << 60)])
def test_payload_outside_of_the_memory_is_refused(place: tuple[int, int]) -> None:
    with joined() as (sender, receiver):
        sender._connection.sendall(place[0].to_bytes(8, "little") + place[1].to_bytes(8, "little"))
        with pytest.raises(TransferError, match="not within the memory"):
            receiver.receive_parts([8], WAIT_S)


def test_the_receiver_can_not_write_the_memory() -> None:
    with joined() as (sender, receiver):
        child = os.fork()
        if child == 0:  # a write must end it
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            receiver._region[0] = 1
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGSEGV
        assert sender._region[0] == 0


def test_no_descriptor_and_no_file_is_left() -> None:
    gc.collect()  # what tests before have left
    files, descriptors = set(Path("/dev/shm").iterdir()), len(list(Path("/proc/self/fd").iterdir()))
    with joined() as (sender, receiver):
        assert set(Path("/dev/shm").iterdir()) == files
    del sender, receiver
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
