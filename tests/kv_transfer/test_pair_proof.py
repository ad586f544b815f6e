"""The KV plane's door: who was not told the secret of the pair gets no further than it, on either side."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from core.errors import TransferError
from core.messages import Connect
from core.secret import Secret
from kv_transfer.config import TransferConfig
from kv_transfer.pair_proof import PROOF_BYTES, prove_both
from kv_transfer.rendezvous import RECEIVER, SENDER, GroupRendezvous, _name
from tests.kv_transfer.harness import HOST, WAIT_S, layout

SECRET = b"s" * 32


@pytest.fixture
def rendezvous() -> GroupRendezvous:
    return GroupRendezvous(HOST, torch.device("cpu"), TransferConfig(connect_timeout_s=5))


def connect_to(rendezvous: GroupRendezvous, secret: bytes = SECRET) -> Connect:
    return Connect("p", "d", 1, rendezvous.address, layout(), secret)


def outcome(rendezvous: GroupRendezvous, connect: Connect, rank: int) -> str:
    try:
        transport = rendezvous.meet(connect, rank)
    except TransferError as error:
        return str(error)
    transport.abort()
    return transport.name


def test_two_that_were_told_the_secret_meet(rendezvous: GroupRendezvous) -> None:
    connect = connect_to(rendezvous)
    with ThreadPoolExecutor(2) as pool:
        met = [pool.submit(outcome, rendezvous, connect, rank) for rank in (SENDER, RECEIVER)]
        assert [each.result(WAIT_S) for each in met] == ["shm", "shm"]
    rendezvous.close()


def test_a_stranger_who_knows_the_pairs_name_is_refused_before_anything_is_read(rendezvous: GroupRendezvous) -> None:
    """He says all that a visitor of a pair without a secret would: none of it is taken in."""
    connect = connect_to(rendezvous)
    host, _, port = rendezvous.address.rpartition(":")
    with socket.create_connection((host, int(port)), WAIT_S) as stranger, ThreadPoolExecutor(1) as pool:
        stranger.sendall(_name(connect) + b"n" * 16 + b"x" * PROOF_BYTES + b"offer")
        meeting = pool.submit(outcome, rendezvous, connect, RECEIVER)
        assert meeting.result(WAIT_S) == "the peer does not prove that it is of the pair"
        stranger.settimeout(WAIT_S)
        heard = b""
        try:
            while part := stranger.recv(64):
                heard += part
        except ConnectionResetError:
            pass
        assert len(heard) <= 16  # a nonce, and not a word more
    rendezvous.close()


def test_without_the_secret_nobody_can_tell_the_pairs_name(rendezvous: GroupRendezvous) -> None:
    connect = connect_to(rendezvous)
    names = {_name(connect), _name(replace(connect, secret=b"")), _name(replace(connect, secret=b"t" * 32))}
    assert len(names) == 3
    rendezvous.close()


@pytest.mark.parametrize("visits", [True, False])
def test_neither_side_takes_a_peer_with_another_secret_or_an_echo(visits: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        proving = pool.submit(prove_both, ours, Secret(SECRET), visits=visits, timeout_s=WAIT_S)
        nonce = theirs.recv(16)
        theirs.sendall(nonce)  # an echo of the nonce, then of the proof, where there is one
        theirs.sendall(theirs.recv(PROOF_BYTES) if visits else Secret(b"other").prove("visitor", nonce, nonce))
        with pytest.raises(TransferError, match="does not prove"):
            proving.result(WAIT_S)


def test_a_silent_stranger_is_waited_for_only_so_long() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(OSError, match="timed out"):
        prove_both(ours, Secret(SECRET), visits=False, timeout_s=0.05)


def test_the_secret_of_a_pair_shows_nowhere() -> None:
    assert "s" * 32 not in repr(Connect("p", "d", 1, "h:1", layout(), SECRET))
