"""Two workers that meet agree on what carries their payload."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from core.errors import TransferError
from core.messages import Connect
from kv_transfer.config import TransferConfig
from kv_transfer.rendezvous import RECEIVER, SENDER, GroupRendezvous
from tests.kv_transfer.harness import HOST, WAIT_S, layout

QUICK = TransferConfig(connect_timeout_s=5)


class Meeting:
    """A sender and a receiver that meet, with what each says of its GPU; NCCL groups are not made, only counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sender_gpu: bytes, receiver_gpu: bytes) -> None:
        self.nccl_ranks: list[int] = []
        self._sides = [GroupRendezvous(HOST, torch.device("cpu"), QUICK) for _ in range(2)]
        for side, gpu in zip(self._sides, (sender_gpu, receiver_gpu), strict=True):
            monkeypatch.setattr(side, "_gpu", lambda gpu=gpu: gpu)
            monkeypatch.setattr(side, "_nccl_group", lambda store, rank: self.nccl_ranks.append(rank))

    def ask_for_nccl(self, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(self._sides[side], "_backend", "nccl")

    def meet(self) -> list[str]:
        """What came of it on each side."""
        connect = Connect("p", "d", 1, self._sides[RECEIVER].address, layout())

        def one(rank: int) -> str:
            try:
                self._sides[rank].meet(connect, rank).abort()
            except TransferError as error:
                return str(error)
            return "met"

        with ThreadPoolExecutor(2) as pool:
            outcomes = list(pool.map(one, (SENDER, RECEIVER), timeout=WAIT_S))
        for side in self._sides:
            side.close()
        return outcomes


@pytest.mark.parametrize(
    ("sender_gpu", "receiver_gpu", "ranks"),
    [
        (b"GPU-1", b"GPU-2", [SENDER, RECEIVER]),
        (b"GPU-1", b"GPU-1", []),
        (b"GPU-1", b"", []),
        (b"", b"GPU-1", []),
        (b"", b"", []),
    ],
)
def test_payload_goes_over_nccl_only_between_two_gpus(
    monkeypatch: pytest.MonkeyPatch, sender_gpu: bytes, receiver_gpu: bytes, ranks: list[int]
) -> None:
    meeting = Meeting(monkeypatch, sender_gpu, receiver_gpu)
    assert meeting.meet() == ["met", "met"]
    assert sorted(meeting.nccl_ranks) == ranks


def test_who_insists_on_nccl_does_not_get_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting(monkeypatch, b"GPU-1", b"")
    meeting.ask_for_nccl(SENDER, monkeypatch)
    assert "NCCL is asked for" in meeting.meet()[SENDER]
    assert meeting.nccl_ranks == []
