"""Two workers that meet agree on what carries their payload, or say why they can't."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from core.errors import TransferError
from core.messages import Connect
from kv_transfer.config import Backend, TransferConfig
from kv_transfer.pair_store import PairStore
from kv_transfer.rendezvous import RECEIVER, SENDER, GroupRendezvous
from kv_transfer.transport import Transport
from tests.kv_transfer.harness import HOST, WAIT_S, layout


class Meeting:
    """A sender and a receiver that meet, with what each says of its GPU; NCCL groups are not made, only counted."""

    def __init__(self, sides: tuple[GroupRendezvous, GroupRendezvous]) -> None:
        self.nccl_ranks: list[int] = []
        self.sides = sides

    def gpus(self, monkeypatch: pytest.MonkeyPatch, *gpus: str) -> None:
        for side, gpu in zip(self.sides, gpus, strict=True):
            monkeypatch.setattr(side, "_gpu", lambda gpu=gpu: gpu)
            monkeypatch.setattr(side, "_nccl_group", lambda store, rank: self.nccl_ranks.append(rank))

    def meet(self) -> list[str]:
        """What carries the payload on each side, or why nothing does."""
        connect = Connect("p", "d", 1, self.sides[RECEIVER].address, layout())

        def one(rank: int) -> Transport | str:
            try:
                return self.sides[rank].meet(connect, rank)
            except TransferError as error:
                return f"{error.reason}: {error}"

        with ThreadPoolExecutor(2) as pool:
            met = list(pool.map(one, (SENDER, RECEIVER), timeout=WAIT_S))
        for each in met:
            if not isinstance(each, str):
                each.abort()  # not before both have come: it would end the other's coming
        return [each if isinstance(each, str) else each.name for each in met]


@contextmanager
def meeting(sender: Backend = "auto", receiver: Backend = "auto") -> Iterator[Meeting]:
    configs = [TransferConfig(backend=backend, connect_timeout_s=5) for backend in (sender, receiver)]
    sides = [GroupRendezvous(HOST, torch.device("cpu"), config) for config in configs]
    try:
        yield Meeting((sides[0], sides[1]))
    finally:
        for side in sides:
            side.close()


@pytest.mark.parametrize(
    ("sender", "receiver", "carrier"),
    [
        ("auto", "auto", "shm"),
        ("shm", "auto", "shm"),
        ("gloo", "auto", "gloo"),
        ("auto", "gloo", "gloo"),
        ("tcp", "auto", "tcp"),
        ("auto", "tcp", "tcp"),
    ],
)
def test_workers_of_one_host_share_memory_unless_told_otherwise(
    sender: Backend, receiver: Backend, carrier: str
) -> None:
    with meeting(sender, receiver) as both:
        assert both.meet() == [carrier, carrier]


@pytest.mark.parametrize(
    ("sender_gpu", "receiver_gpu", "ranks"),
    [("GPU-1", "GPU-2", [SENDER, RECEIVER]), ("GPU-1", "GPU-1", []), ("GPU-1", "", []), ("", "", [])],
)
def test_payload_goes_over_nccl_only_between_two_gpus(
    monkeypatch: pytest.MonkeyPatch, sender_gpu: str, receiver_gpu: str, ranks: list[int]
) -> None:
    with meeting() as both:
        for side in both.sides:
            monkeypatch.setattr(side, "_shared_host", "")
        both.gpus(monkeypatch, sender_gpu, receiver_gpu)
        carrier = "gloo" if ranks else "tcp"  # the NCCL group that would stand beside gloo is not made here
        assert both.meet() == [carrier, carrier]
        assert sorted(both.nccl_ranks) == ranks


def test_both_sides_of_an_impossible_pair_say_why() -> None:
    with meeting("gloo", "shm") as both:
        reason = "incompatible: transfer.backend is gloo on the sender's side and shm on the receiver's"
        assert both.meet() == [reason, reason]


def test_closing_ends_a_meeting_over_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The receiver has said that it will come, and does not."""
    with meeting() as both:

        def stay_away(_store: PairStore, _rank: int) -> Transport:
            both.sides[SENDER].close()
            raise OSError("no")

        monkeypatch.setattr(both.sides[RECEIVER], "_shared_memory", stay_away)
        assert "the peer did not come" in both.meet()[SENDER]
