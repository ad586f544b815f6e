"""K and V rounded on the wire: fewer bytes, within half a step of what was sent, verified as they travel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from core.kv_layout import KVLayout
from kv_transfer.events import TransferFailed, TransferReady
from tests.kv_transfer.harness import Transfer, Worker, layout, pair, tickets
from tests.kv_transfer.memory_transport import MemoryNetwork

NUM_TOKENS, NUM_SKIPPED = 37, 3


def transfer_of(prefill: Worker, decode: Worker) -> Transfer:
    ticket = replace(tickets("p", "d", 1), kv_wire_dtype="int8")
    return Transfer(prefill, decode, NUM_TOKENS, num_skipped=NUM_SKIPPED, ticket=ticket)


def vectors(worker: Worker, blocks: tuple[int, ...], layer: int) -> Tensor:
    """[M, D] float32: what stands at the positions that were sent."""
    payload = worker.storage.read(layer, blocks, NUM_SKIPPED, NUM_TOKENS)
    return payload.view(getattr(torch, worker.layout.dtype)).view(-1, worker.layout.head_size).float()


@pytest.mark.parametrize(("ours", "theirs"), [(4, 4), (16, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_arrives_is_within_half_a_step_of_what_was_sent(dtype: str, ours: int, theirs: int) -> None:
    shapes = tuple(layout(block_size=size, dtype=dtype) for size in (ours, theirs))
    with pair(prefill_layout=shapes[0], decode_layout=shapes[1]) as (prefill, decode):
        transfer = transfer_of(prefill, decode)
        skipped = decode.storage.read(0, transfer.target, 0, NUM_SKIPPED)
        transfer.begin()
        transfer.push(0, 20)
        transfer.push(20, NUM_TOKENS)
        transfer.accept(transfer.commit())
        assert decode.expect(TransferReady).key == transfer.key
        for layer in range(prefill.layout.num_layers):
            sent = vectors(prefill, transfer.source, layer)
            step = sent.abs().amax(dim=1, keepdim=True) / 127
            own = torch.finfo(getattr(torch, dtype)).eps * sent.abs()
            off = (vectors(decode, transfer.target, layer) - sent).abs()
            assert (off <= 0.5001 * step + own).all()
            assert off.any()
        assert torch.equal(decode.storage.read(0, transfer.target, 0, NUM_SKIPPED), skipped)
        transfer.release()


def test_the_record_counts_and_sums_the_bytes_on_the_wire() -> None:
    with pair() as (prefill, decode):
        transfer = transfer_of(prefill, decode)
        transfer.begin()
        transfer.push()
        record = transfer.commit()
        num_vectors = 2 * prefill.layout.num_kv_heads * (NUM_TOKENS - NUM_SKIPPED) * prefill.layout.num_layers
        assert record.num_bytes == num_vectors * (prefill.layout.head_size + 4)
        transfer.accept(record)
        decode.expect(TransferReady)
        stats = prefill.plane.sender.release(transfer.key)
        assert stats is not None
        assert stats.num_bytes == record.num_bytes
        transfer.release()


@pytest.mark.parametrize(("dtype", "kind"), [("int8", "heads"), ("bfloat16", "latent")])
def test_what_is_int8_already_or_latent_travels_as_it_is(dtype: str, kind: str) -> None:
    shape = layout(dtype=dtype, kind=kind)
    with pair(prefill_layout=shape, decode_layout=shape) as (prefill, decode):
        transfer = transfer_of(prefill, decode)
        transfer.complete()
        assert transfer.arrived()
        transfer.release()


def last_byte(flip: int) -> Callable[[Tensor], Tensor]:
    """Damage to the scale of the last vector of a payload."""

    def damage(message: Tensor) -> Tensor:
        message[-1] ^= flip
        return message

    return damage


def test_a_damaged_scale_fails_closed() -> None:
    network = MemoryNetwork()
    with pair(network=network) as (prefill, decode):
        transfer = transfer_of(prefill, decode)
        before = decode.snapshot()
        transfer.begin()
        frames = iter((lambda frame: frame, last_byte(1)))  # the table of segments, then the payload
        wire = network.to_receiver[1]
        wire.damage = lambda message: next(frames, lambda rest: rest)(message)
        transfer.push(layers=[0])
        assert decode.expect(TransferFailed).reason == "checksum_mismatch"
        assert torch.equal(decode.snapshot(), before)
        transfer.release()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [(layout(), "int8"), (layout(dtype="int8"), "int8"), (layout(dtype="bfloat16", kind="latent"), "bfloat16")],
    ids=["float32", "int8", "latent"],
)
def test_a_layout_says_what_travels(shape: KVLayout, expected: str) -> None:
    assert shape.on_wire("int8").dtype == expected
    assert shape.on_wire("auto") == shape
