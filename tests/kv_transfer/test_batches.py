"""When a prompt's layers leave: as soon as they are enough to be worth a batch, and all of them at the last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from kv_transfer.events import TransferReady
from kv_transfer.frame import FRAME_BYTES, FrameKind, unpack
from kv_transfer.streaming import Streaming
from tests.kv_transfer.harness import QUICK, Transfer, layout, pair
from tests.kv_transfer.memory_transport import MemoryNetwork

SHAPE = layout(block_size=1024, num_layers=4)  # 128 KiB of a layer's K and V in a block
SMALL, LARGE = 8, 32 * 1024


@contextmanager
def batches(streaming: Streaming) -> Iterator[tuple[Transfer, Transfer, list[list[int]]]]:
    """A small and a large prompt, and the layers of each batch that left."""
    network, seen = MemoryNetwork(), list[list[int]]()

    def look(message: torch.Tensor) -> torch.Tensor:
        if message.numel() == FRAME_BYTES and (frame := unpack(message.numpy().tobytes())).kind is FrameKind.SEGMENTS:
            seen.append([entry.record.segment.layer for entry in frame.entries])
        return message

    config = replace(QUICK, streaming=streaming, keepalive_s=1.0)
    with pair(config=config, network=network, prefill_layout=SHAPE, decode_layout=SHAPE) as (prefill, decode):
        network.to_receiver[1].damage = look
        yield Transfer(prefill, decode, SMALL), Transfer(prefill, decode, LARGE), seen


def test_a_short_prompt_leaves_in_one_piece_with_its_last_layer() -> None:
    with batches("auto") as (small, _, seen):
        small.begin()
        small.push(layers=[0, 1, 2])
        assert small.prefill.plane.sender._sending[small.key].records == []
        small.push(layers=[3])
        small.accept(small.commit())
        assert small.decode.expect(TransferReady).key == small.key
        assert small.arrived()
        assert seen == [[0, 1, 2, 3]]
        small.release()


def test_a_long_prompt_leaves_while_it_is_computed() -> None:
    with batches("auto") as (_, large, _):
        large.begin()
        large.push(layers=[0, 1, 2])
        assert {r.segment.layer for r in large.prefill.plane.sender._sending[large.key].records} >= {0, 1}
        large.push(layers=[3])
        large.accept(large.commit())
        assert large.decode.expect(TransferReady).key == large.key
        assert large.arrived()
        large.release()


@pytest.mark.parametrize(("streaming", "num_early"), [("layerwise", 3), ("serial", 0)])
def test_a_user_may_say_when_layers_leave(streaming: Streaming, num_early: int) -> None:
    with batches(streaming) as transfers:
        for transfer in transfers[:2]:
            transfer.begin()
            transfer.push(layers=[0, 1, 2])
            records = transfer.prefill.plane.sender._sending[transfer.key].records
            assert len({r.segment.layer for r in records}) == num_early
            transfer.push(layers=[3])
            transfer.accept(transfer.commit())
            assert transfer.decode.expect(TransferReady).key == transfer.key
            assert transfer.arrived()
            transfer.release()


def test_nothing_is_left_behind_where_the_last_layer_never_comes() -> None:
    with batches("serial") as (small, _, _):
        small.begin()
        small.push(layers=[0, 1])
        assert [r.segment.layer for r in small.commit().segments] == [0, 1]
        small.release()
