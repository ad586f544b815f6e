"""The choice of a transport is the best that both sides can do, and says why where there is none."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import TransferError
from kv_transfer.handshake import Offer, choose

CPU = Offer("auto", "cpu", "host", "")
GPU = Offer("auto", "cuda", "", "GPU-1")

offers = st.builds(
    Offer,
    st.sampled_from(["auto", "shm", "tcp", "gloo", "nccl"]),
    st.sampled_from(["cpu", "cuda"]),
    st.sampled_from(["", "a", "b"]),
    st.sampled_from(["", "1", "2"]),
)


@pytest.mark.parametrize(
    ("sender", "receiver", "chosen"),
    [
        (CPU, CPU, "shm"),
        (CPU, replace(CPU, host="another"), "tcp"),
        (CPU, replace(CPU, host=""), "tcp"),
        (replace(CPU, backend="gloo"), CPU, "gloo"),
        (GPU, replace(GPU, gpu="GPU-2"), "nccl"),
        (GPU, GPU, "tcp"),
        (GPU, CPU, "tcp"),
    ],
)
def test_the_best_that_both_can_do(sender: Offer, receiver: Offer, chosen: str) -> None:
    assert choose(sender, receiver) == chosen


@pytest.mark.parametrize(
    ("sender", "receiver", "reason"),
    [
        (replace(CPU, backend="shm"), replace(CPU, host="another"), "shm, but the two are not on one host"),
        (replace(CPU, backend="shm"), GPU, "shm, but KV is on cpu and cuda"),
        (replace(CPU, backend="shm"), replace(CPU, host=""), "shm, but one of the two can't share memory"),
        (replace(GPU, backend="nccl"), CPU, "nccl, but the two do not have a GPU each"),
        (replace(GPU, backend="nccl"), GPU, "nccl, but both use the same GPU"),
        (replace(CPU, backend="shm"), replace(CPU, backend="gloo"), "shm on the sender's side and gloo on"),
    ],
)
def test_who_insists_gets_that_or_a_reason(sender: Offer, receiver: Offer, reason: str) -> None:
    with pytest.raises(TransferError, match=reason) as failure:
        choose(sender, receiver)
    assert failure.value.reason == "incompatible"


@given(offers, offers)
def test_a_choice_is_what_each_side_wants(sender: Offer, receiver: Offer) -> None:
    try:
        chosen = choose(sender, receiver)
    except TransferError:
        assert {sender.backend, receiver.backend} != {"auto"}
    else:
        assert {sender.backend, receiver.backend} <= {"auto", chosen}


@given(offers)
def test_an_offer_survives_the_wire(offer: Offer) -> None:
    assert Offer.unpack(offer.pack()) == offer


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", json.dumps({"protocol": 1, "backend": "auto"}).encode()])
def test_what_is_no_offer_of_this_version_is_refused(data: bytes) -> None:
    with pytest.raises(TransferError) as failure:
        Offer.unpack(data)
    assert failure.value.reason == "incompatible"
