"""The two ends of a channel: a thread each, and nothing else shared."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from core.clock import Clock
from core.errors import IntegrityError, TransferError
from core.ticket import AttemptKey
from kernels.memory import zeros
from kv_transfer.config import TransferConfig
from kv_transfer.frame import FRAME_BYTES, Entry, Frame, FrameKind, pack, unpack
from kv_transfer.outbox import Outbox, Outgoing
from kv_transfer.transport import Transport

OnSent = Callable[[AttemptKey, int, float, float], None]
"""`(key, bytes, share of the channel's time in s, when)`, for each segment that has left."""
OnSegment = Callable[[Entry, Tensor], None]
"""A segment and its payload: 1-D uint8, in memory of the transport that is used again after the call."""
OnDown = Callable[[str], None]
"""The channel has ended, with the reason. Called once, by the channel's thread."""


class Channel(ABC):
    """One end: a thread that runs until it is closed, the peer goes, or it fails; then `on_down` is called.

    However the thread ends, it breaks the connection, so that neither end outlives the other.
    """

    def __init__(self, name: str, transport: Transport, config: TransferConfig, on_down: OnDown) -> None:
        self._transport, self._config, self._on_down = transport, config, on_down
        self._closed = threading.Event()
        self.num_turns = 0
        """Frames sent or received: a channel that lives always has another before long."""
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """End at once, from any thread; returns without waiting for it."""
        self._closed.set()
        self._transport.abort()

    def _run(self) -> None:
        reason = (
            "the channel's thread failed"  # stands where anything but a TransferError ends it: a bug, shown as such
        )
        try:
            reason = self._carry()
        except TransferError as error:
            reason = str(error)
        finally:
            self.close()
            self._on_down(reason)

    @abstractmethod
    def _carry(self) -> str:
        """The thread's work; returns the reason of an orderly end."""


class SendChannel(Channel):
    """The sending end. `put` and `drop` may be called from any thread.

    With nothing to send it says that it lives, so that its peer can tell silence from death. Nothing leaves unless
    the peer takes it, so a peer that does not is noticed as soon.
    """

    def __init__(
        self,
        name: str,
        transport: Transport,
        config: TransferConfig,
        clock: Clock,
        on_sent: OnSent,
        on_down: OnDown,
        *,
        by_blocks: bool = False,
    ) -> None:
        """`by_blocks`: the caches of both sides have blocks of the same size."""
        super().__init__(f"kv-send-{name}", transport, config, on_down)
        self.by_blocks = by_blocks
        self._clock, self._on_sent = clock, on_sent
        memory = transport.memory
        if memory is None and transport.payload_device.type == "cpu":
            memory = zeros(config.max_staging_bytes)
        self._outbox = Outbox(config.max_staging_bytes, config.coalesce_bytes, memory)

    def stage(self, num_bytes: int, wanted: Callable[[], bool]) -> Tensor | None:
        """[num_bytes] uint8 on CPU to make a payload in, for `put` or `unstage`; waits and fails as `put` does."""
        return self._outbox.stage(num_bytes, self._config.keepalive_s, wanted)

    def unstage(self, payload: Tensor) -> None:
        self._outbox.unstage(payload)

    def put(self, outgoing: Outgoing, wanted: Callable[[], bool]) -> bool:
        """Queue a segment. Where staging is full, waits for as long as the peer takes something every `keepalive_s`.

        False: it was not queued.
        """
        return self._outbox.put(outgoing, self._config.keepalive_s, wanted)

    def drop(self, key: AttemptKey) -> None:
        """Forget what is queued of an attempt. What is leaving right now still leaves."""
        self._outbox.drop(key)

    def close(self) -> None:
        self._outbox.close()
        super().close()

    def _carry(self) -> str:
        while (batch := self._outbox.take(self._config.keepalive_s)) is not None:
            self.num_turns += 1
            if batch:
                self._send(batch)
            else:
                send_frame(self._transport, Frame(FrameKind.KEEPALIVE), self._config.silence_timeout_s)
        return "closed"

    def _send(self, batch: list[Outgoing]) -> None:
        timeout_s, started_at = self._config.silence_timeout_s, self._clock()
        payload = _joined([outgoing.payload.to(self._transport.payload_device) for outgoing in batch])
        frame = Frame(FrameKind.SEGMENTS, tuple(outgoing.entry for outgoing in batch))
        if payload.numel() != frame.num_payload_bytes:  # gloo ends the peer's process where more comes than it expects
            raise IntegrityError(f"{payload.numel()} bytes of payload, {frame.num_payload_bytes} announced")
        send_frame(self._transport, frame, timeout_s)
        self._transport.send_payload(payload, timeout_s)
        sent_at = self._clock()
        self._outbox.sent(batch)
        for outgoing in batch:
            share = (sent_at - started_at) * outgoing.num_bytes / payload.numel()
            self._on_sent(outgoing.entry.key, outgoing.num_bytes, share, sent_at)


class ReceiveChannel(Channel):
    """The receiving end: hands on what comes. Never touches a block itself."""

    def __init__(
        self, name: str, transport: Transport, config: TransferConfig, on_segment: OnSegment, on_down: OnDown
    ) -> None:
        super().__init__(f"kv-receive-{name}", transport, config, on_down)
        self._on_segment = on_segment

    def _carry(self) -> str:
        while True:
            frame = receive_frame(self._transport, self._config.silence_timeout_s)
            self.num_turns += 1
            if frame.kind is FrameKind.SEGMENTS:
                self._receive_segments(frame)
            elif frame.kind is not FrameKind.KEEPALIVE:
                raise TransferError("corrupt_frame", f"a frame of kind {frame.kind.name} in the middle")

    def _receive_segments(self, frame: Frame) -> None:
        payload = self._transport.receive_payload(frame.num_payload_bytes, self._config.silence_timeout_s)
        offset = 0
        for entry in frame.entries:
            end = offset + entry.record.num_bytes
            self._on_segment(entry, payload[offset:end])
            offset = end


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts as one tensor: without a copy where each begins in memory at the end of the one before."""
    first, num_bytes = parts[0], sum(part.numel() for part in parts)
    end = first.data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(parts)
        end += part.numel()
    return first.as_strided((num_bytes,), (1,))


def send_frame(transport: Transport, frame: Frame, timeout_s: float) -> None:
    transport.send_frame(torch.frombuffer(bytearray(pack(frame)), dtype=torch.uint8), timeout_s)


def receive_frame(transport: Transport, timeout_s: float) -> Frame:
    """Raises TransferError `pair_down` or `corrupt_frame`."""
    data = torch.empty(FRAME_BYTES, dtype=torch.uint8)
    transport.receive_frame(data, timeout_s)
    return unpack(data.numpy().tobytes())
