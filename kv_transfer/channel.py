"""The two ends of a channel: a thread each, staging of their own, and nothing else shared."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from core.clock import Clock
from core.errors import TransferError
from core.ticket import AttemptKey
from kv_transfer.config import TransferConfig
from kv_transfer.frame import FRAME_BYTES, MAX_SEGMENTS, Entry, Frame, FrameKind, pack, unpack
from kv_transfer.transport import Transport

OnSent = Callable[[AttemptKey, int, float, float], None]
"""`(key, bytes, share of the channel's time in s, when)`, for each segment that has left."""
OnSegment = Callable[[Entry, Tensor], None]
"""A segment and its payload: 1-D uint8, in staging that is used again after the call."""
OnDown = Callable[[str], None]
"""The channel has ended by itself, with the reason. Called once, by the channel's thread."""


@dataclass(slots=True)
class Outgoing:
    """A segment on its way out. Owned by the channel from `put` until it has left or is dropped."""

    entry: Entry
    payload: Tensor
    ready: torch.cuda.Event | None = None


class SendChannel:
    """The sending end. `put` and `drop` may be called from any thread.

    Segments leave in the order they came; those that wait together leave together. With nothing to say, the channel
    says that it lives, so that its peer can tell silence from death.
    """

    def __init__(
        self,
        transport: Transport,
        identity: bytes,
        config: TransferConfig,
        clock: Clock,
        on_sent: OnSent,
        on_down: OnDown,
    ) -> None:
        self._transport, self._identity, self._config, self._clock = transport, identity, config, clock
        self._on_sent, self._on_down = on_sent, on_down
        self._changed = threading.Condition()
        self._queue: deque[Outgoing] = deque()
        self._num_queued_bytes = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kv-send", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, outgoing: Outgoing, timeout_s: float) -> bool:
        """Queue a segment; waits while `max_staging_bytes` are queued. False where it closed or time ran out."""
        num_bytes = outgoing.entry.record.num_bytes
        with self._changed:

            def has_room() -> bool:
                room = self._config.max_staging_bytes - self._num_queued_bytes
                return self._closed or not self._queue or num_bytes <= room

            if not self._changed.wait_for(has_room, timeout_s) or self._closed:
                return False
            self._queue.append(outgoing)
            self._num_queued_bytes += num_bytes
            self._changed.notify_all()
        return True

    def drop(self, key: AttemptKey) -> None:
        """Forget what is queued of an attempt. What is leaving right now still leaves."""
        with self._changed:
            self._queue = deque(outgoing for outgoing in self._queue if outgoing.entry.key != key)
            self._num_queued_bytes = sum(outgoing.entry.record.num_bytes for outgoing in self._queue)
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """Say goodbye and end; what is queued does not leave. `on_down` is not called."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._transport.abort()

    def _run(self) -> None:
        try:
            self._send_frame(Frame(FrameKind.HELLO, identity=self._identity))
            while (batch := self._next_batch()) is not None:
                if batch:
                    self._send(batch)
                else:
                    self._send_frame(Frame(FrameKind.KEEPALIVE))
            self._send_frame(Frame(FrameKind.BYE))
        except TransferError as error:
            with self._changed:
                was_closed, self._closed = self._closed, True
                self._queue.clear()
                self._changed.notify_all()
            if not was_closed:
                self._on_down(str(error))
        finally:
            self._transport.abort()

    def _next_batch(self) -> list[Outgoing] | None:
        """Segments to send together; none when it is time for a sign of life; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed, self._config.keepalive_s)
            if self._closed:
                return None
            batch: list[Outgoing] = []
            num_bytes = 0
            while self._queue and len(batch) < MAX_SEGMENTS:
                num_bytes += self._queue[0].entry.record.num_bytes
                if batch and num_bytes > self._config.coalesce_bytes:
                    break
                batch.append(self._queue.popleft())
            return batch

    def _send(self, batch: list[Outgoing]) -> None:
        started_at = self._clock()
        for outgoing in batch:
            if outgoing.ready is not None:
                outgoing.ready.synchronize()
        parts = [outgoing.payload.to(self._transport.payload_device) for outgoing in batch]
        payload = parts[0] if len(parts) == 1 else torch.cat(parts)
        self._send_frame(Frame(FrameKind.SEGMENTS, tuple(outgoing.entry for outgoing in batch)))
        self._transport.send_payload(payload, self._config.silence_timeout_s)
        sent_at = self._clock()
        with self._changed:
            self._num_queued_bytes = sum(outgoing.entry.record.num_bytes for outgoing in self._queue)
            self._changed.notify_all()
        for outgoing in batch:
            num_bytes = outgoing.entry.record.num_bytes
            share = (sent_at - started_at) * num_bytes / max(1, payload.numel())
            self._on_sent(outgoing.entry.key, num_bytes, share, sent_at)

    def _send_frame(self, frame: Frame) -> None:
        data = torch.frombuffer(bytearray(pack(frame)), dtype=torch.uint8)
        self._transport.send_frame(data, self._config.silence_timeout_s)


class ReceiveChannel:
    """The receiving end: takes what comes into staging of its own, and hands it on. Never touches a block itself."""

    def __init__(
        self,
        transport: Transport,
        identity: bytes,
        config: TransferConfig,
        on_up: Callable[[], None],
        on_segment: OnSegment,
        on_down: OnDown,
    ) -> None:
        self._transport, self._identity, self._config = transport, identity, config
        self._on_up, self._on_segment, self._on_down = on_up, on_segment, on_down
        self._closed = threading.Event()
        self._frame = torch.empty(FRAME_BYTES, dtype=torch.uint8)
        self._staging = torch.empty(0, dtype=torch.uint8, device=transport.payload_device)
        self._thread = threading.Thread(target=self._run, name="kv-receive", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """End at the next frame, a sign of life at the latest. `on_down` is not called."""
        self._closed.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._transport.abort()

    def _run(self) -> None:
        reason = "the peer closed the channel"
        try:
            self._expect_hello()
            self._on_up()
            while not self._closed.is_set() and (frame := self._receive_frame()).kind is not FrameKind.BYE:
                if frame.kind is FrameKind.SEGMENTS:
                    self._receive_segments(frame)
        except TransferError as error:
            reason = str(error)
        finally:
            self._transport.abort()
        if not self._closed.is_set():
            self._on_down(reason)

    def _expect_hello(self) -> None:
        hello = self._receive_frame()
        if hello.kind is not FrameKind.HELLO or hello.identity != self._identity:
            raise TransferError("pair_down", "the peer is not the one that the router named")

    def _receive_frame(self) -> Frame:
        self._transport.receive_frame(self._frame, self._config.silence_timeout_s)
        return unpack(self._frame.numpy().tobytes())

    def _receive_segments(self, frame: Frame) -> None:
        num_bytes = frame.num_payload_bytes
        if num_bytes > self._config.max_staging_bytes:
            raise TransferError("corrupt_frame", f"a message of {num_bytes} bytes, more than staging may take")
        if num_bytes > self._staging.numel():
            self._staging = torch.empty(num_bytes, dtype=torch.uint8, device=self._transport.payload_device)
        payload = self._staging[:num_bytes]
        self._transport.receive_payload(payload, self._config.silence_timeout_s)
        offset = 0
        for entry in frame.entries:
            end = offset + entry.record.num_bytes
            self._on_segment(entry, payload[offset:end])
            offset = end
